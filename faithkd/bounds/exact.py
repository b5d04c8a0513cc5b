"""LP and MILP values of logit differences, eqs (8) and (9), each proved by our own backward pass.

The MILP is solved by branch and bound over the LP: where the LP's best point has y above both pieces of a ReLU (or all
inputs of a max-pool's window), the ball is cut into *parts*, in each of which y equals one of them. A part is a list of
such decisions. The LP of a part only steers: what is certified is the largest bound of all leaves, each evaluated by
`linear.pull` with the multipliers that the LP ended with, which are valid whatever they are. A part that is said to be
empty is dropped only where its multipliers prove it.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from faithkd.bounds import programs, solvers
from faithkd.bounds.graph import Network
from faithkd.bounds.linear import BUDGET, Dual, over_ball, pull, widest
from faithkd.bounds.operators import Box, Lines
from faithkd.bounds.softmax import class_bounds, softmax_interval

TOLERANCE = 1e-6  # a part this close to a value that is attained needs no cut: it moves a confidence by < 2.5e-7
SMALL = 1e-3  # so that a gap counts also where the LP gains nothing from it
Decisions = tuple[tuple[int, int, int], ...]  # output `unit` of node k equals its lower piece: (k, unit, piece)


@dataclass(frozen=True)
class Image:
    """One network on one ball: certified boxes and lines, and the LP on them."""

    network: Network
    bounds: list[Box]
    lines: list[Lines]
    form: programs.Canonical
    solve: solvers.Solve


@dataclass(frozen=True, order=True)
class Part:
    """A part of the ball, in the order in which to cut: largest LP value first. `ray` if it is said to be empty."""

    negative: float
    number: int
    decisions: Decisions
    multipliers: np.ndarray
    ray: np.ndarray | None = None
    cut: tuple[int, int] | None = None  # node and unit to decide next


def opener(network: Network, name: str) -> Callable[[list[Box]], Image | None]:
    """A function from an image's boxes to its LP, compiled once for the solver `name`; None if a box is not finite."""
    program = programs.build(network, integer=False)
    rows = sum(constraint.size for constraint in program.problem.constraints)
    variables = sum(variable.size for variable in program.problem.variables())
    chosen, start = solvers.choose(name, rows, variables)

    def open_image(bounds: list[Box]) -> Image | None:
        if not all(bool(torch.isfinite(end).all()) for box in bounds for end in box):
            return None
        programs.set_image(program, bounds)
        form = programs.canonical(program, chosen)
        lines = [node.operator.relax(*(bounds[place] for place in node.inputs)) for node in network.nodes]
        return Image(network, bounds, lines, form, start(form))

    return open_image


def lowered(images: list[Image], highest: list[Tensor], nodes: int) -> tuple[list[Tensor], str]:
    """The largest z_j - z_i `(C, C)` of each network made smaller, and a note: all of one network, or of teacher and
    student those that can change eq. (11).

    Its maximum over both orders and all classes is worked on from the largest term downwards, and done when the
    largest term is: a term below another one's final value needs no LP. `nodes`: LPs for each difference; 0: that of
    the whole ball alone.
    """
    classes = len(highest[0])
    highest = [part.clone() for part in highest]
    gaps = [torch.full_like(part, math.nan) for part in highest]
    if len(images) == 1:
        maxima(images[0], highest[0], gaps[0], torch.ones(classes, classes, dtype=torch.bool), nodes)
        return highest, note(gaps[0], nodes)
    done = torch.zeros(2 * classes, dtype=torch.bool)
    while not done[place := int(class_bounds(*map(softmax_interval, highest)).flatten().argmax())]:
        done[place] = True
        order, label = divmod(place, classes)
        for q, image in enumerate(images):
            wanted = torch.zeros(classes, classes, dtype=torch.bool)
            # the upper end of class i stands on all z_i - z_j, the lower end on all z_j - z_i
            wanted[(slice(None), label) if q == order else label] = True
            maxima(image, highest[q], gaps[q], wanted & gaps[q].isnan(), nodes)
    return highest, note(torch.stack(gaps), nodes)


def note(gaps: Tensor, nodes: int) -> str:
    """What to say of the differences that were worked on: "" if all ended as they should."""
    gaps = gaps[~gaps.isnan()]
    failed, loose = gaps.isinf(), gaps[gaps.isfinite() & (gaps > 2 * TOLERANCE)]
    said = []
    if failed.any():
        said.append(f"LP without multipliers for {int(failed.sum())} of {len(gaps)} differences")
    if nodes and len(loose):
        said.append(
            f"MILP not settled at {nodes} nodes for {len(loose)} of {len(gaps)} differences: "
            f"up to {loose.max():.2g} above what is attained"
        )
    return ", ".join(said)


def maxima(image: Image, highest: Tensor, gaps: Tensor, wanted: Tensor, nodes: int) -> None:
    """Lower the `wanted` entries of `highest` `(C, C)` by trees of `nodes` LPs each, in place.

    `gaps` becomes the distance to a value that is attained, +inf if there was nothing to be had from the solver.
    """
    pairs = (wanted & ~torch.eye(len(wanted), dtype=torch.bool)).nonzero()
    unit = torch.eye(len(wanted), dtype=torch.float64)
    rows = unit[pairs[:, 1]] - unit[pairs[:, 0]]
    middle = image.network(torch.cat(image.bounds[0]).mean(0, keepdim=True))[0]
    leaves, owners, attained = [], [], rows @ middle
    for r, row in enumerate(rows):
        if highest[*pairs[r]] - attained[r] > TOLERANCE:
            found, best = tree(image, row, nodes)
            leaves, owners = leaves + found, owners + [r] * len(found)
            attained[r] = max(attained[r].item(), best)
    if leaves:
        values = certified(image, rows[owners], leaves)
        found = torch.full((len(rows),), -math.inf, dtype=torch.float64).scatter_reduce(
            0, torch.tensor(owners), values, "amax"
        )
        touched = torch.zeros(len(rows), dtype=torch.bool)
        touched[owners] = True
        i, j = pairs[touched].unbind(1)
        highest[i, j] = torch.minimum(highest[i, j], found[touched])
    i, j = pairs.unbind(1)
    gaps[i, j] = highest[i, j] - attained
    if (gaps[i, j] < -1e-9 * (1 + attained.abs())).any():
        raise AssertionError("a bound lies below a value that is attained: please report it")
    for r, leaf in zip(owners, leaves, strict=True):
        if not np.isfinite(leaf.multipliers).all():
            gaps[*pairs[r]] = math.inf


def tree(image: Image, row: Tensor, nodes: int) -> tuple[list[Part], float]:
    """The leaves of branch and bound for the largest row . z over the ball, and the largest value that was met."""
    nothing = np.full(len(image.form.right), np.nan)
    first, best = visit(image, row, Part(-math.inf, 0, (), nothing))
    queue, leaves, made = [first], [], 1
    while queue:
        part = heapq.heappop(queue)
        choices = [] if part.cut is None else [r >= 0 for r in image.form.pieces[part.cut[0]][part.cut[1]]]
        if -part.negative <= best + TOLERANCE or not choices or made + sum(choices) > nodes:
            leaves.append(part)
            continue
        for piece in np.flatnonzero(choices):
            decisions = (*part.decisions, (*part.cut, int(piece)))
            child, met = visit(image, row, Part(part.negative, made, decisions, part.multipliers))
            best, made = max(best, met), made + 1
            heapq.heappush(queue, child)
    return leaves, best


def visit(image: Image, row: Tensor, part: Part) -> tuple[Part, float]:
    """The part with what its LP says, and a value of row . z that is attained (-inf: none).

    If the LP fails, the part stays as it is: with the multipliers of the one it was cut from.
    """
    form = image.form
    held = [form.pieces[k][unit, piece] for k, unit, piece in part.decisions]
    dropped = [form.above[k][unit] for k, unit, _ in part.decisions]
    answer = solvers.attempt(image.solve, form, form.cost(row.numpy()), np.array(held, int), np.array(dropped, int))
    if answer.status == solvers.INFEASIBLE:
        return Part(math.inf, part.number, part.decisions, part.multipliers, answer.multipliers), -math.inf
    if answer.status != solvers.OPTIMAL:
        return part, -math.inf
    value = float(row.numpy() @ answer.point[form.logits])
    cut = loosest(image, answer, part.decisions)
    x = torch.as_tensor(answer.point[form.image]).view(1, *image.network.shapes[0])
    met = (row @ image.network(x.clamp(*image.bounds[0]))[0]).item()
    return Part(-value, part.number, part.decisions, answer.multipliers, None, cut), met


def loosest(image: Image, answer: solvers.Answer, decisions: Decisions) -> tuple[int, int] | None:
    """The node and unit whose line above costs the LP most at its best point, None if y equals a piece everywhere."""
    point = answer.point
    slack = image.form.right - image.form.matrix @ point
    best, where = 0.0, None
    for k, rows in image.form.pieces.items():
        free = image.form.kinds[k].free(image.lines[k])
        gap = np.where(free.numpy(), np.where(rows >= 0, slack[rows], np.inf).min(1), 0.0)
        gap = np.where(gap > 1e-9, gap * (SMALL + answer.multipliers[image.form.above[k]].clip(min=0)), 0.0)
        gap[[unit for node, unit, _ in decisions if node == k]] = 0.0
        if gap.max() > best:
            best, where = gap.max(), (k, int(gap.argmax()))
    return where


def certified(image: Image, rows: Tensor, parts: list[Part]) -> Tensor:
    """Certified maximum of rows[b] . z over each part, `(B,)`; -inf where it is proved to be empty."""
    values = evaluated(image, rows, parts, [part.multipliers for part in parts])
    said = [b for b, part in enumerate(parts) if part.ray is not None]
    if said:
        # what is >= 0 on all of a part cannot have a maximum below 0 over the ball
        some = [parts[b] for b in said]
        proof = evaluated(image, torch.zeros_like(rows[said]), some, [part.ray for part in some])
        values[said] = torch.where(proof < 0, -math.inf, values[said])
    return values


def evaluated(image: Image, rows: Tensor, parts: list[Part], multipliers: list[np.ndarray]) -> Tensor:
    """Our own bound of each row on its part, with slopes and pushes from the multipliers: `(B,)`."""
    found = []
    for some in torch.arange(len(parts)).split(max(1, BUDGET // (4 * widest(image.network)))):
        decisions = [parts[b].decisions for b in some]
        shares = image.form.shares(np.stack([multipliers[b] for b in some]))
        lines = [decided(image, k, decisions) for k in range(len(image.lines))]
        duals = {k: image.form.kinds[k].dual(lines[k], share) for k, share in shares.items()}
        slopes, push = ({k: both[side].unsqueeze(1) for k, both in duals.items()} for side in (0, 1))
        form = pull(image.network, lines, rows[some].unsqueeze(1), dual=Dual(slopes, push))
        found.append(over_ball(*form, *image.bounds[0])[:, 0])
    return torch.cat(found)


def decided(image: Image, k: int, decisions: list[Decisions]) -> Lines:
    """Lines of node k on each part: those of the whole ball, and the chosen piece alone where it is decided."""
    mine = [(b, unit, piece) for b, part in enumerate(decisions) for node, unit, piece in part if node == k]
    if not mine:
        return image.lines[k]
    box, chosen = image.bounds[image.network.place(k)], torch.tensor(mine).unbind(1)
    return image.form.kinds[k].decided(image.lines[k], box, chosen, len(decisions))
