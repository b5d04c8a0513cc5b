"""Upper bounds of the faithfulness gap delta* = max ||f_t(x') - f_s(x')||_inf over the ball B_eps(x) (§4.2).

Read in this order: `network` (what is accepted), `linear` (intervals and CROWN), `softmax` (eqs 10 and 11),
`programs` (LP and MILP, eqs 8 to 11). Each method's bound is also capped by all cheaper ones: interval >=
crown >= lp >= milp.
"""

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from faithkd.bounds.linear import box_differences, crown, image_chunks, interval, row_differences
from faithkd.bounds.network import Network, ball, check_images, prepare, prepare_pair
from faithkd.bounds.softmax import pair_bound, softmax_interval
from faithkd.errors import FaithkdError

__all__ = ["METHODS", "UpperBound", "difference_bounds", "faithfulness_upper_bound", "softmax_bounds"]

METHODS = {
    "interval": "interval arithmetic to a box of logits, eq. (9): fastest and very loose",
    "crown": "one linear relaxation per logit difference, batched: for whole test sets",
    "lp": "the best linear relaxation per logit difference, by linear programming: seconds per image",
    "milp": "exact ranges of the logit differences, by branch and bound: small networks or small balls",
}
CERTIFIED = "certified"
NOT_FINITE = "not finite: trivial bound 1"


@dataclass(frozen=True)
class UpperBound:
    """Certified upper bounds of delta*, `values` `(N,)` in [0, 1]; `status` says what limited each image."""

    values: Tensor
    method: str
    status: list[str]


@dataclass(frozen=True)
class Choices:
    """How to bound: checked once, passed down unchanged."""

    method: str
    solver: str = "highs"
    max_nodes: int = 10_000
    progress: bool = False

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("solver", self.solver, ("highs", "gurobi", "auto"))
        if isinstance(self.max_nodes, bool) or not isinstance(self.max_nodes, int) or self.max_nodes < 1:
            raise FaithkdError(f"max_nodes must be a whole number >= 1, not {self.max_nodes!r}")


def check_choice(what: str, given: str, known) -> None:
    """Refuse an unknown name with the nearest known one."""
    if given not in known:
        near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.4)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise FaithkdError(f"unknown {what} {given!r}: choose one of {', '.join(known)}{meant}")


def faithfulness_upper_bound(
    teacher: nn.Sequential,
    student: nn.Sequential,
    x: Tensor,
    eps: float,
    *,
    method: str = "crown",
    solver: str = "highs",
    clip: tuple | None = None,
    max_nodes: int = 10_000,
    progress: bool = False,
) -> UpperBound:
    """FaithUB of each image: certified to be at least ||f_t(x') - f_s(x')||_inf on all of B_eps(x), eq. (11).

    `teacher`, `student`: torch.nn.Sequential of Linear, ReLU, Conv2d, MaxPool2d and Flatten, returning logits
    `(N, C)`. `x`: `(N, *image)` in the networks' input space; `eps`: radius in the same units; `clip`: `(low,
    high)`, the range of valid images, broadcastable to `x`. `method`: a key of METHODS. `solver` (lp and
    milp): "highs", "gurobi", or "auto", Gurobi where its licence is large enough. `max_nodes` (milp):
    branch-and-bound nodes per logit difference; where they run out, the dual bound reached by then is used,
    and the status says so.

    Values hold for the networks as functions of real numbers; float64 rounding is accounted for, so that no
    solver's word is taken for "lp". For "milp" the solver's dual bound is, loosened by `programs.margin`.
    Raises FaithkdError for whatever cannot be bounded. Paper §4.2, eqs (8) to (11).
    """
    choices = Choices(method, solver, max_nodes, progress)
    x = check_images(x)
    pair = prepare_pair(teacher, student, x)
    lower, upper = ball(x, eps, clip)
    values, status = torch.ones(len(x), dtype=torch.float64), []
    climbs = [climber(network, choices) for network in pair]
    # the same pieces for every method, so that the ladder of methods holds to the last bit
    for part in image_chunks(pair, len(x)):
        (of_teacher, teacher_notes), (of_student, student_notes) = (climb(lower[part], upper[part]) for climb in climbs)
        bound = torch.stack([pair_bound(*rung) for rung in zip(of_teacher, of_student, strict=True)]).amin(0)
        finite = (of_teacher[-1].isfinite() & of_student[-1].isfinite()).flatten(1).all(1)
        values[part] = torch.where(finite, bound, 1.0)
        for good, *notes in zip(finite.tolist(), teacher_notes, student_notes, strict=True):
            told = "; ".join(dict.fromkeys(note for note in notes if note)) or CERTIFIED
            status.append(told if good else NOT_FINITE)
    return UpperBound(values, method, status)


def climber(network: Network, choices: Choices) -> Callable[[Tensor, Tensor], tuple[list[Tensor], list[str]]]:
    """A function from boxes of images to bounds of z_j - z_i `(N, C, C)`, by each method in turn.

    It also returns a note per image. Programs are compiled once, when the function is made.
    """
    names = list(METHODS)[: list(METHODS).index(choices.method) + 1]
    solved = {}
    if "lp" in names:
        from faithkd.bounds import programs  # cvxpy takes seconds to import

        solved = {name: programs.solver(network, name, choices.solver, choices.max_nodes) for name in names[2:]}

    def climb(lower: Tensor, upper: Tensor) -> tuple[list[Tensor], list[str]]:
        boxes = interval(network, lower, upper)
        rungs, notes = [box_differences(*boxes[-1])], [""] * len(lower)
        if "crown" in names:
            boxes = crown(network, lower, upper)
            rungs.append(torch.minimum(rungs[-1], row_differences(network, boxes)))
        for name, solve in solved.items():
            highest = rungs[-1].clone()
            for k in range(len(lower)):
                one = [(low[k : k + 1], high[k : k + 1]) for low, high in boxes]
                highest[k], notes[k] = solve(one, highest[k])
                if choices.progress:
                    told = f"\r{name}: image {k + 1} of {len(lower)} of this part"
                    print(told, end="\n" if k + 1 == len(lower) else "", file=sys.stderr, flush=True)
            rungs.append(highest)
        return rungs, notes

    return climb


def difference_bounds(
    network: nn.Sequential,
    x: Tensor,
    eps: float,
    *,
    method: str = "crown",
    solver: str = "highs",
    clip: tuple | None = None,
    max_nodes: int = 10_000,
) -> Tensor:
    """Certified maximum of each logit difference z_j - z_i over the ball, `(N, C, C)` at [n, i, j], eq. (9).

    Minima follow by antisymmetry: min (z_j - z_i) = -result[n, j, i]. +inf where nothing could be certified.
    Arguments and errors as in `faithfulness_upper_bound`.
    """
    choices = Choices(method, solver, max_nodes)
    x = check_images(x)
    prepared = prepare(network, tuple(x.shape[1:]))
    lower, upper = ball(x, eps, clip)
    climb = climber(prepared, choices)
    found = torch.zeros(len(x), prepared.classes, prepared.classes, dtype=torch.float64)
    for part in image_chunks((prepared,), len(x)):
        found[part] = climb(lower[part], upper[part])[0][-1]
    return found


def softmax_bounds(network: nn.Sequential, x: Tensor, eps: float, **choices) -> tuple[Tensor, Tensor]:
    """Certified lower and upper bound of every confidence over the ball, two `(N, C)`, eq. (10).

    Keyword arguments as in `difference_bounds`.
    """
    return softmax_interval(difference_bounds(network, x, eps, **choices))
