"""The ladder of methods: each bound is the smallest of all computed on the way to it."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from faithkd import arguments, workers
from faithkd.bounds import agreement as agreements
from faithkd.bounds import search
from faithkd.bounds.domains import Root, root
from faithkd.bounds.graph import Network, check_images, inner_ball, outer_ball, prepare, prepare_pair
from faithkd.bounds.linear import box_differences, crown, image_chunks, interval, row_differences
from faithkd.bounds.operators import Box
from faithkd.bounds.rows import narrowed
from faithkd.bounds.softmax import pair_bound, softmax_interval
from faithkd.core import attacks
from faithkd.devices import follows_images
from faithkd.errors import FaithkdError

METHODS = {
    "interval": "interval arithmetic to a box of logits, eq. (9): fastest and very loose",
    "crown": "one linear relaxation per logit difference, batched: for whole test sets",
    "alpha-crown": "crown with every slope optimised: about as tight as the LP, at a fraction of its time",
    "lp": "the best linear relaxation per logit difference, by linear programming: tenths of seconds per image",
    "milp": "exact ranges of the logit differences, by branch and bound: small networks or small balls",
    "rows": "alpha-crown with hidden boxes tightened unit by unit, by small branch and bounds: where balls are large",
    "joint": "both networks see the same image: their linear forms are subtracted before the maximum is taken",
    "bab": "branch and bound on top of joint and rows: the longer, the tighter",
    "best": "bab from a lower bound by PGD, in processes on all cores: both ends of the bracket",
}
_LINEAR = ("interval", "crown", "alpha-crown")
LADDER = {
    **{name: _LINEAR[: place + 1] for place, name in enumerate(_LINEAR)},
    "lp": (*_LINEAR, "lp"),
    "milp": (*_LINEAR, "lp", "milp"),
    "rows": (*_LINEAR, "rows"),
    "joint": (*_LINEAR, "joint"),
    "bab": (*_LINEAR, "joint", "rows", "bab"),
    "best": (*_LINEAR, "joint", "rows", "bab"),
}
CERTIFIED = "certified"
NOT_FINITE = "not finite: trivial bound 1"
PIECE = 16  # images searched at once, and given to one process at a time
DEFAULT_NODES, UNLIMITED = 1000, 10**9
PARTS = 16_000  # of all images searched at once; one image alone may make more, and takes what it needs
ROW_PARTS = 32  # of each row's tree, where nothing is said
EXPECTED = 1000  # parts of a ball in a second of a budget
ROW_SHARE = 0.2  # of a budget, for the rows of each network
LEAST = 3  # times what alpha-crown took: less time for rows is better spent in the search


@dataclass(frozen=True)
class UpperBound:
    """Certified upper bounds of delta*, `values` `(N,)` in [0, 1]; `status` says what limited each image.

    `step`: the cheapest method of LADDER that gave the value. `seconds`: wall-clock time per image. `rungs`: the values
    of every method climbed on the way, `(N,)` each. With "bab" and "best" also `lower` `(N,)`, a difference that is
    attained at `witnesses` `(N, *image)`, and `nodes`, the parts made. With `agreement`, `agrees` `(N,)` bool.
    """

    values: Tensor
    method: str
    status: list[str]
    step: list[str]
    seconds: Tensor
    rungs: dict[str, Tensor]
    lower: Tensor | None = None
    witnesses: Tensor | None = None
    nodes: Tensor | None = None
    agrees: Tensor | None = None


@dataclass(frozen=True)
class Choices:
    """How to bound, checked once and passed down unchanged: the keywords of the public functions.

    `method`: a key of METHODS. `solver` (lp and milp): "highs", "gurobi", or "auto", Gurobi where its licence is large
    enough. `max_nodes` (milp): branch-and-bound nodes per logit difference; where they run out, the bound reached by
    then is used, and the status says so.

    bab and best: an image is finished when its bound is within `tolerance` of a difference that is attained, or when
    `nodes` parts of its ball were made, or after `budget` seconds per image, whichever comes first; only nodes
    repeat exactly (1,000 where neither is given). An image also stops where its parts fill `domains.ROOM` bytes.
    "best" begins with PGD from `seed`, and works in `jobs` processes (without: $FAITHKD_JOBS, or one for each core), so
    that its budget is wall-clock time; in a process that multiprocessing made, or a forked one, it works alone.

    `parts` (rows, bab and best): of each hidden unit's tree in `rows`; 0 leaves them out. Without it 32 for rows, for
    bab and best the root of all nodes, or of 1,000 for each second of a budget; a budget that alpha-crown nearly spends
    has no rows.

    `agreement` (alpha-crown and above): also `agrees`, as `certified_agreement` says, from the linear bounds at hand.
    `progress`: whether to show a bar.
    """

    method: str = "crown"
    solver: str = "highs"
    max_nodes: int = 10_000
    nodes: int | None = None
    budget: float | None = None
    tolerance: float = 1e-3
    parts: int | None = None
    seed: int = 0
    agreement: bool = False
    jobs: int | None = None
    progress: bool = False

    @staticmethod
    def of(keywords: dict) -> "Choices":
        """From a caller's keywords: raises FaithkdError for one that is misspelt, too."""
        arguments.keywords(keywords, [part.name for part in fields(Choices)] + ["clip", "device"])
        return Choices(**keywords)

    def __post_init__(self) -> None:
        arguments.choice("method", self.method, METHODS)
        arguments.choice("solver", self.solver, ("highs", "gurobi", "auto"))
        arguments.whole("max_nodes", self.max_nodes)
        arguments.random_seed(self.seed)
        arguments.number("tolerance", self.tolerance)
        for name in ("nodes", "jobs"):
            if getattr(self, name) is not None:
                arguments.whole(name, getattr(self, name), below=2**62)
        if self.parts is not None:
            arguments.whole("parts", self.parts, least=int(self.method == "rows"))
        if self.budget is not None:
            arguments.number("budget", self.budget)
        if self.agreement and "alpha-crown" not in LADDER[self.method]:
            able = ", ".join(name for name, rungs in LADDER.items() if "alpha-crown" in rungs)
            raise FaithkdError(f"agreement=True is for the methods {able}, not {self.method}; or certified_agreement()")

    @property
    def rungs(self) -> tuple[str, ...]:
        """The methods on the way, LADDER's, `rows` only where it is wanted."""
        return tuple(name for name in LADDER[self.method] if name != "rows" or self.row_parts)

    @property
    def row_parts(self) -> int:
        """How many parts each row's tree may have, 0 where there are none."""
        if self.parts is not None:
            return self.parts
        return ROW_PARTS if self.method == "rows" else math.ceil(math.sqrt(self.expected))

    @property
    def most_nodes(self) -> int:
        """How many parts of a ball may be made."""
        return self.nodes or (DEFAULT_NODES if self.budget is None else UNLIMITED)

    @property
    def expected(self) -> float:
        """How many parts of a ball a search is likely to make."""
        return self.most_nodes if self.budget is None else min(self.most_nodes, EXPECTED * self.budget)


@dataclass(frozen=True)
class Balls:
    """Images `x` `(N, *shape)` and the balls around them, cut to the valid images: `box` rounded outwards, for bounds,
    `reach` inwards, for witnesses."""

    x: Tensor
    eps: float
    box: Box
    reach: Box

    @staticmethod
    def around(x: Tensor, eps: float, clip: tuple | None) -> "Balls":
        """The balls of images that may be anything yet: raises FaithkdError."""
        x = check_images(x)
        return Balls(x, arguments.radius(eps), outer_ball(x, eps, clip), inner_ball(x, eps, clip))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, some: Tensor) -> "Balls":
        """Some of them."""
        return Balls(self.x[some], self.eps, *(tuple(end[some] for end in box) for box in (self.box, self.reach)))


def faithfulness_upper_bound(
    teacher: nn.Module, student: nn.Module, x: Tensor, eps: float, *, clip: tuple | None = None, **choices
) -> UpperBound:
    """FaithUB of each image: certified to be at least ||f_t(x') - f_s(x')||_inf on all of B_eps(x), eq. (11).

    `teacher`, `student`: torch modules of known operations (`reading`), returning logits `(N, C)`. `x`: `(N, *image)`
    in the networks' input space; `eps`: radius in the same units; `clip`: `(low, high)`, the range of valid images,
    broadcastable to `x`. Other keywords: the fields of `methods.Choices`, `method`, `nodes`, `budget` and so on, and
    `device`, where all of this is computed, in float64; without it where `x` is.

    Values hold for the networks as functions of real numbers; float64 rounding is accounted for. No solver's word is
    taken: for "lp" and "milp" its multipliers only, and every bound is computed from them anew (`exact`).
    Raises FaithkdError for whatever cannot be bounded. Paper §4.2, eqs (8) to (11).
    """
    return faithfulness_upper_bounds(teacher, [student], x, eps, clip=clip, **choices)[0]


@follows_images
@torch.inference_mode(False)  # descent needs gradients
def faithfulness_upper_bounds(
    teacher: nn.Module, students: Sequence[nn.Module], x: Tensor, eps: float, *, clip: tuple | None = None, **choices
) -> list[UpperBound]:
    """`faithfulness_upper_bound` of each student of one teacher, who is bounded only once for all of them, eq. (11).

    Arguments and errors as there; a `budget` is for each student.
    """
    choices, balls = Choices.of(choices), Balls.around(x, eps, clip)
    if isinstance(students, nn.Sequential) or not isinstance(students, Iterable):
        raise FaithkdError(f"students must be a list of networks, not {type(students).__name__}")
    shape = tuple(balls.x.shape[1:])
    networks = [prepare(teacher, shape, "teacher"), *(prepare(student, shape, "student") for student in students)]
    for network in networks:
        arguments.same_classes(networks[0].classes, network.classes)
    count = min(workers.jobs() if choices.jobs is None else choices.jobs, len(balls))
    if choices.method != "best" or count <= 1 or balls.x.device.type != "cpu" or not workers.possible():
        return bounded(networks, balls, choices)
    pieces = torch.arange(len(balls)).split(min(PIECE, math.ceil(len(balls) / count)))
    # all images' time together, divided by the images that a process works on one after the other
    times = len(balls) / (len(pieces[0]) * math.ceil(len(pieces) / count))
    budget = None if choices.budget is None else choices.budget * times
    share = replace(choices, budget=budget, progress=False)
    calls = [partial(bounded, networks, balls[some], share) for some in pieces]
    done = [None] * len(calls)
    with progress_bar(choices, len(balls)) as bar:
        for place, found in workers.run(calls, count, sample=0.0):
            done[place] = found
            bar.update(len(pieces[place]))
    return [joined(parts) for parts in zip(*done, strict=True)]


def progress_bar(choices: Choices, images: int) -> tqdm:
    return tqdm(total=images, desc=choices.method, unit="image", disable=not choices.progress, leave=False)


def joined(parts: Sequence[UpperBound]) -> UpperBound:
    """The results of several pieces as one: numbers on the CPU, witnesses where the images are."""
    columns = {}
    for name in ("values", "seconds", "lower", "witnesses", "nodes", "agrees"):
        entries = [getattr(part, name) for part in parts]
        columns[name] = None if entries[0] is None else torch.cat(entries)
        if entries[0] is not None and name != "witnesses":
            columns[name] = columns[name].cpu()
    for name in ("status", "step"):
        columns[name] = [entry for part in parts for entry in getattr(part, name)]
    columns["rungs"] = {name: torch.cat([part.rungs[name] for part in parts]).cpu() for name in parts[0].rungs}
    return UpperBound(method=parts[0].method, **columns)


def bounded(networks: list[Network], balls: Balls, choices: Choices) -> list[UpperBound]:
    """`faithfulness_upper_bounds` of a teacher and its students, in this process."""
    parts = []
    with progress_bar(choices, len(balls)) as bar:
        # the same pieces for every method, so that the ladder of methods holds to the last bit
        for some in image_chunks(tuple(networks), len(balls)) or (torch.arange(0),):
            begin, mine = time.monotonic(), balls[some]
            teacher = of_one(networks[0], 0, mine.box, choices)
            spent = time.monotonic() - begin
            parts.append([])
            for student in networks[1:]:
                begin = time.monotonic() - spent  # every student's time has the teacher's in it
                both = [teacher, of_one(student, 1, mine.box, choices)]
                parts[-1].append(of_pair(both, mine, choices, begin))
            bar.update(len(some))
    return [joined(each) for each in zip(*parts, strict=True)]


def of_pair(both: list["Alone"], balls: Balls, choices: Choices, begin: float) -> UpperBound:
    """All rungs for a few images from those of each network by itself: eq. (11), then what sees both."""
    notes = [[]] * len(balls)
    if "lp" in choices.rungs:
        both, notes = solved(both, choices)
    rungs = {name: pair_bound(*(part.rungs[name] for part in both)) for name in both[0].rungs}
    finite = both[0].finite & both[1].finite
    pair, searched, ends = tuple(part.network for part in both), "bab" in choices.rungs, {}
    if "joint" in choices.rungs:
        known = attained(pair, balls, choices) if searched else (torch.zeros(len(balls)).double(), balls.x)
        found = shared(both, balls, known, choices, begin)
        rungs |= found.pop("rungs")
        ends = found if searched else {}
    rungs = {name: rungs[name] for name in choices.rungs}
    table = torch.stack([torch.where(finite, bound, 1.0) for bound in rungs.values()]).cummin(0).values
    names, values = list(rungs), table[-1]
    steps = [names[place] for place in (table == values).int().argmax(0).tolist()]
    status = []
    for n, good in enumerate(finite.tolist()):
        late = ends and values[n] > ends["lower"][n] + choices.tolerance
        said = notes[n] + ([f"stopped at {int(ends['nodes'][n])} nodes"] if late else [])
        status.append("; ".join(dict.fromkeys(said)) or CERTIFIED if good else NOT_FINITE)
    if ends:
        ends["lower"] = kept_below(pair, ends["lower"], ends["witnesses"], values)
    if choices.agreement:
        # nothing is left to be proved where a disagreement is known
        known = ends.get("witnesses", balls.x)
        alike = pair[0](known).argmax(1) == pair[1](known).argmax(1)
        ends["agrees"] = agreements.agrees(tuple(part.narrow for part in both), asked=alike)
    seconds = torch.full((len(balls),), (time.monotonic() - begin) / max(len(balls), 1), dtype=torch.float64)
    return UpperBound(values, choices.method, status, steps, seconds, dict(zip(names, table, strict=True)), **ends)


@dataclass(frozen=True)
class Alone:
    """What is known of one network: the largest z_j - z_i `(N, C, C)` by method, whether all of them are finite, and
    the boxes of every place; its `root` from alpha-crown on, and what `rows` make of it, `narrow`."""

    network: Network
    rungs: dict[str, Tensor]
    finite: Tensor
    boxes: list[Box]
    root: Root | None
    narrow: Root | None


def of_one(network: Network, q: int, box: Box, choices: Choices) -> Alone:
    """One network's rungs for some images, up to alpha-crown or rows."""
    names, found, narrow, begin = choices.rungs, None, None, time.monotonic()
    boxes = interval(network, *box)
    rungs = {"interval": box_differences(*boxes[-1])}
    if "crown" in names:
        boxes, lines, _ = crown(network, *box)
        rungs["crown"] = torch.minimum(rungs["interval"], row_differences(network, lines, boxes)[0])
    if "alpha-crown" in names:
        found = narrow = root(network, q, *box)
        boxes, rungs["alpha-crown"] = found.bounds, torch.minimum(rungs["crown"], found.highest)
    if "rows" in names:
        room = math.inf if choices.budget is None else ROW_SHARE * choices.budget * len(box[0])
        if LEAST * (time.monotonic() - begin) < room:
            narrow = narrowed(found, choices.row_parts, time.monotonic() + room)
        boxes, rungs["rows"] = narrow.bounds, torch.minimum(rungs["alpha-crown"], narrow.highest)
    last = list(rungs.values())[-1]
    return Alone(network, rungs, last.isfinite().flatten(1).all(1), boxes, found, narrow)


def solved(networks: list[Alone], choices: Choices) -> tuple[list[Alone], list[list[str]]]:
    """The rungs "lp" and "milp" of one network, or of a pair where eq. (11) can change, and notes for each image."""
    try:
        from faithkd.bounds import exact  # cvxpy takes seconds to import
    except ModuleNotFoundError as missing:
        raise FaithkdError(f"{missing.name} is not installed: pip install 'faithkd[lp]' for lp and milp") from None
    if torch.get_default_device().type != "cpu":
        raise FaithkdError("lp and milp are solved on the CPU; pass device='cpu' for them")
    names = [name for name in ("lp", "milp") if name in choices.rungs]
    rungs = [{name: list(each.rungs.values())[-1].clone() for name in names} for each in networks]
    notes = []
    for n in range(len(networks[0].finite)):
        boxes = [[(low[n : n + 1], high[n : n + 1]) for low, high in each.boxes] for each in networks]
        images = [exact.opened(each.network, mine, choices.solver) for each, mine in zip(networks, boxes, strict=True)]
        notes.append([] if all(images) else ["LP not tried: boxes not finite"])
        highest = [found[names[0]][n] for found in rungs]
        for name in names if all(images) else ():
            highest, note = exact.lowered(images, highest, choices.max_nodes if name == "milp" else 0)
            notes[-1] += [note] if note else []
            for found, mine in zip(rungs, highest, strict=True):
                found[name][n] = mine
    return [replace(each, rungs=each.rungs | found) for each, found in zip(networks, rungs, strict=True)], notes


def attained(pair: tuple[Network, Network], balls: Balls, choices: Choices) -> tuple[Tensor, Tensor]:
    """A difference that is attained in each ball, `(N,)`, and where: at x, for "best" where PGD finds more (§4.1)."""
    x = torch.clamp(balls.x, *balls.reach)
    if choices.method != "best" or not len(x):
        return search.gap(pair, x), x
    exact = bool((x.float().double() == x).all())
    rough = tuple(network.single for network in pair) if exact else pair

    def objective(z: Tensor) -> tuple[Tensor, Tensor]:
        difference = search.gap(rough, z)
        return difference, difference

    witnesses, _ = attacks.search(
        objective,
        x.float() if exact else x,
        balls.eps,
        steps=50,
        step_size=2.5 * balls.eps / 50,
        restarts=5,
        generator=torch.Generator().manual_seed(int(choices.seed)),
        clip=tuple(end.float() if exact else end for end in balls.reach),
    )
    witnesses = torch.clamp(witnesses.double(), *balls.reach)
    return search.gap(pair, witnesses), witnesses


def kept_below(pair: tuple[Network, Network], lower: Tensor, witnesses: Tensor, upper: Tensor) -> Tensor:
    """The differences at the witnesses, as float64 has them, and never above what is certified.

    The real functions' values at a point lie in certified ranges. Where large logits cancel, float64's own may be off
    by anything: there the least that is certified stands for it.
    """
    ends = [softmax_interval(box_differences(*interval(network, witnesses, witnesses)[-1])) for network in pair]
    least = torch.maximum(ends[0][0] - ends[1][1], ends[1][0] - ends[0][1]).amax(1) - 2.0**-52
    if (least > upper).any():
        raise AssertionError("an upper bound lies below a difference that is attained: please report it")
    return torch.where(lower > least + 1e-9, least.clamp(min=0), lower).minimum(upper)


def shared(both: list[Alone], balls: Balls, known: tuple[Tensor, Tensor], choices: Choices, begin: float) -> dict:
    """The rungs "joint" and "bab", and both ends of the bracket; 1 for images whose boxes are not finite."""
    finite = both[0].finite & both[1].finite
    lower, witnesses = (part.clone() for part in known)
    whole = {name: torch.ones_like(lower) for name in ("joint", "bab") if name in choices.rungs}
    made = torch.zeros(len(lower), dtype=torch.long)
    left = finite.nonzero()[:, 0]
    # so few at once that all their parts fit in memory
    for some in left.split(max(1, min(PIECE, int(PARTS / max(choices.expected, 1))))) if len(left) else ():
        begun = balls[some].reach, lower[some], witnesses[some]
        leaves = search.start(tuple(part.root[some] for part in both), *begun)
        whole["joint"][some] = leaves.upper
        if "bab" in whole:
            roots = tuple(part.narrow[some] for part in both)
            if "rows" in choices.rungs:
                leaves = search.start(roots, *begun, leaves.rows.value)
            now = time.monotonic()
            end = math.inf if choices.budget is None else begin + choices.budget * len(finite)
            deadline = now + (end - now) * len(some) / len(left)
            left = left[len(some) :]
            leaves, made[some] = search.certify(roots, leaves, choices.tolerance, choices.most_nodes, deadline)
            whole["bab"][some] = leaves.upper
            lower[some], witnesses[some] = leaves.lower, leaves.witnesses
    if "bab" not in whole:
        return {"rungs": whole}
    return {"rungs": whole, "lower": lower, "witnesses": witnesses, "nodes": made}


@follows_images
@torch.inference_mode(False)  # descent needs gradients
def difference_bounds(network: nn.Module, x: Tensor, eps: float, *, clip: tuple | None = None, **choices) -> Tensor:
    """Certified maximum of each logit difference z_j - z_i over the ball, `(N, C, C)` at [n, i, j], eq. (9).

    Minima follow by antisymmetry: min (z_j - z_i) = -result[n, j, i]. +inf where nothing could be certified.
    Arguments and errors as in `faithfulness_upper_bound`; methods up to "milp", which look at one network.
    """
    choices, balls = Choices.of(choices), Balls.around(x, eps, clip)
    arguments.choice("method", choices.method, [name for name in METHODS if "joint" not in LADDER[name]])
    prepared = prepare(network, tuple(balls.x.shape[1:]))
    found = torch.zeros(len(balls), prepared.classes, prepared.classes, dtype=torch.float64)
    for some in image_chunks((prepared,), len(balls)):
        mine = [of_one(prepared, 0, balls[some].box, choices)]
        if "lp" in choices.rungs:
            mine, _ = solved(mine, choices)
        found[some] = mine[0].rungs[choices.method]
    return found


@follows_images
@torch.inference_mode(False)  # descent needs gradients
def certified_agreement(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    eps: float,
    *,
    clip: tuple | None = None,
    nodes: int = agreements.NODES,
) -> Tensor:
    """Whether c_t(x') = c_s(x') on all of B_eps(x), certified: `(N,)` bool, False where nothing is known.

    The mean is a certified lower bound of the distillation agreement, Def. 3. `nodes`: into how many parts the ball is
    split at most, for each network. Other arguments and errors as in `faithfulness_upper_bound`.
    """
    arguments.whole("nodes", nodes, below=2**62)
    balls = Balls.around(x, eps, clip)
    pair = prepare_pair(teacher, student, balls.x)
    holds = torch.zeros(len(balls), dtype=torch.bool)
    classes = [network(torch.clamp(balls.x, *balls.reach)).argmax(1) for network in pair]
    alike = classes[0] == classes[1]
    for some in image_chunks(pair, len(balls)):
        roots = tuple(root(network, q, *balls[some].box) for q, network in enumerate(pair))
        holds[some] = agreements.agrees(roots, 0)
        open_ = (~holds[some] & alike[some]).nonzero()[:, 0]
        roots = tuple(narrowed(each[open_], math.ceil(math.sqrt(nodes))) for each in roots)
        holds[some[open_]] = agreements.agrees(roots, nodes)
    return holds
