"""Parts of a ball on which some ReLUs are known to be on or off: what all searches stand on.

Splitting a ReLU makes two domains which together cover the first; the boxes of all later nodes are then computed anew.
Where no ReLU is left, the input is halved instead, as "node 0 of network BOTH", so that a search converges on whatever
is still loose.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.descent import Range, minimise
from faithkd.bounds.graph import Network
from faithkd.bounds.linear import (
    STEPS,
    Dual,
    Slopes,
    crown,
    difference_pairs,
    over_ball,
    pull,
    refine,
    row_differences,
    with_choices,
)
from faithkd.bounds.operators import Box, Lines

LATER = 2.0  # a split one ReLU layer further from the logits counts that much more: it tightens all layers behind
BOTH = -1  # the network of a split of the input, which both networks share
SPREAD = 1.0  # weight of a unit's whole triangle in its score, beside the gap at the worst point
ROOM = 128 * 2**20  # bytes of one image's table, past which its search ends: with copies, a process stays below 0.5 GB
ROUNDING = 2.0**-44  # hundreds of times what the few operations on a row's coefficients can be off by
RANGES = {  # of what a descent moves
    "w": Range(0.25),
    "k": Range(0.25, -12, 2),  # neither 0 nor huge
    "s": Range(0.25),
    "cut": Range(0.05),
    "slopes": Range(0.25, 0, 1),
    "push": Range(0.05, 0),
}
FALL = 0.9  # of a step in each next one


def mapped(function, first, *others):
    """`function` of the tensors at the same places of several trees of dictionaries, tuples, lists and tables."""
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: mapped(function, part, *(tree[name] for tree in others)) for name, part in first.items()}
    if isinstance(first, list | tuple):
        return type(first)(mapped(function, *parts) for parts in zip(first, *others, strict=True))
    if isinstance(first, Table):
        trees = [{part.name: getattr(tree, part.name) for part in fields(tree)} for tree in (first, *others)]
        return type(first)(**mapped(function, *trees))
    return first if isinstance(first, Network | int) else function(first, *others)


def paths(tree, *path) -> dict[tuple, Tensor]:
    """The tensors of a tree of dictionaries, by their paths."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {place: part for name, branch in tree.items() for place, part in paths(branch, *path, name).items()}


class Table:
    """A dataclass whose tensors have one entry per item of the table, and are indexed together."""

    FREE: ClassVar = ()  # the columns with what may be chosen freely, a key of RANGES each

    def __getitem__(self, index: Tensor) -> Self:
        """The items at `index`, a mask or numbers."""
        return mapped(lambda column: column[index], self)

    def join(self, *others) -> Self:
        """This table and others, one below the other."""
        return mapped(lambda *columns: torch.cat(columns), self, *others)

    def free(self) -> dict[tuple, Tensor]:
        """All that is FREE, by column and, where that is a tree, path."""
        return paths({name: getattr(self, name) for name in self.FREE})

    def having(self, free: dict[tuple, Tensor]) -> Self:
        """The table with other entries of `free`, in its order."""
        parts = iter(free.values())
        return replace(self, **{name: mapped(lambda _: next(parts), getattr(self, name)) for name in self.FREE})

    def descended(self, value_of: Callable[[Self], Tensor], steps: int) -> Self:
        """With what is FREE where `value_of` it, in float32, was smallest on a descent: nothing is certified yet."""
        before = self.free()
        if not before:
            return self
        rough = mapped(lambda part: part.float() if part.is_floating_point() else part, self)
        ranges = {path: RANGES[path[0]] for path in before}
        now = mapped(torch.clone, rough.free())
        kept = minimise(lambda free: value_of(rough.having(free)), now, steps, ranges, FALL)
        return self.having({path: part.to(before[path]) for path, part in kept.items()})


def full(image: Tensor, images: int, table: Table) -> Tensor:
    """Whether a table whose items belong to `image` takes more than ROOM for one of them: `(images,)`."""
    sizes = []
    mapped(lambda column: sizes.append(column.shape[1:].numel() * column.element_size()), table)
    return torch.bincount(image, minlength=images) * sum(sizes) > ROOM


@dataclass(frozen=True)
class Domain(Table):
    """Parts of balls: the number of each one's `image`, and by network q (0: the teacher, 1: the student) and ReLU node
    k `boxes[q][k]` of its input, each `(D, *shape)`, and `phases[q][k]`: 1 split and on, -1 split and off, 0 neither.

    `input`: boxes of the image, None where each is its image's whole ball: they are large. Phases are in float32.
    """

    image: Tensor
    boxes: dict[int, dict[int, Box]]
    phases: dict[int, Slopes] = field(default_factory=dict)
    input: Box | None = None


@dataclass(frozen=True)
class Splits(Table):
    """Where domains are halved, each `(D,)`: node and unit of a network, or for BOTH, an input."""

    network: Tensor
    node: Tensor
    unit: Tensor


@dataclass(frozen=True)
class Root(Table):
    """What is known of network q on the whole balls: boxes, lines and slopes of `crown`, and all differences.

    `highest` `(N, C, C)` holds the largest z_j - z_i at (i, j), `row_slopes` `(N, C, C, *shape)` the slopes of each,
    and `odds` the range of every class's log-odds m, `(N, C)` twice.
    """

    network: Network
    q: int
    bounds: list[Box]
    lines: list[Lines]
    slopes: dict[int, Slopes]
    highest: Tensor
    row_slopes: Slopes
    odds: Box


def root(network: Network, q: int, lower: Tensor, upper: Tensor) -> Root:
    """alpha-CROWN of one network on each ball: the root of every tree, and a bound by itself."""
    bounds, lines, slopes = crown(network, lower, upper, STEPS)
    sides, row_slopes = (network.classes, network.classes), {}
    for k in with_choices(network, lines):
        start = lines[k].start
        row_slopes[k] = start.unsqueeze(1).repeat(1, *sides, *[1] * (start.ndim - 2))
    return with_differences(network, q, bounds, lines, slopes, row_slopes)


def with_differences(
    network: Network, q: int, bounds: list[Box], lines: list[Lines], slopes: dict[int, Slopes], row_slopes: Slopes
) -> Root:
    """The root with these boxes and lines, with all differences by a descent that begins at `row_slopes`."""
    i, j = difference_pairs(network.classes).unbind(1)
    start = {k: part[:, i, j] for k, part in row_slopes.items()}
    highest, found = row_differences(network, lines, bounds, STEPS, start)
    row_slopes = mapped(torch.clone, row_slopes)
    for k in row_slopes.keys() & found.keys():
        row_slopes[k][:, i, j] = found[k]
    return Root(network, q, bounds, lines, slopes, highest, row_slopes, all_odds(highest))


def log_odds(logits: Tensor, label: Tensor) -> Tensor:
    """m = z_i - LSE_{j != i} z_j for the class i = `label` of each row of logits `(B, C)`."""
    own = F.one_hot(label, logits.shape[1]).bool()
    return logits.gather(1, label[:, None])[:, 0] - logits.masked_fill(own, -math.inf).logsumexp(1)


def log_odds_range(highest: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Range of m for class i from the largest z_j - z_i, `(B, C, C)` at (i, j): two `(B,)`, rounded outwards."""
    here = torch.arange(len(label))
    own = F.one_hot(label, highest.shape[1]).bool()
    up, down = highest[here, label], highest[here, :, label]  # z_j - z_i <= up, z_i - z_j <= down
    low = -up.masked_fill(own, -math.inf).logsumexp(1)
    high = -(-down).masked_fill(own, -math.inf).logsumexp(1)
    return low - ROUNDING * (1 + low.abs()), high + ROUNDING * (1 + high.abs())


def all_odds(highest: Tensor) -> Box:
    """Range of the log-odds of every class, `(N, C)` twice, from the largest differences `(N, C, C)`."""
    images, classes = highest.shape[:2]
    label = torch.arange(classes).repeat(images)
    return tuple(end.view(images, classes) for end in log_odds_range(highest.repeat_interleave(classes, 0), label))


def whole(roots: tuple[Root, ...]) -> Domain:
    """One domain per image: its whole ball."""
    boxes = {
        root.q: {k: tuple(end.clone() for end in root.bounds[root.network.place(k)]) for k in root.network.splits}
        for root in roots
    }
    phases = {q: {k: torch.zeros_like(box[0]).float() for k, box in parts.items()} for q, parts in boxes.items()}
    return Domain(torch.arange(len(roots[0].highest)), boxes, phases)


def lines_of(root: Root, domains: Domain, upto: int | None = None) -> list[Lines]:
    """Lines of each node on the domains: ReLUs from their boxes, all others as on the whole ball."""
    boxes = domains.boxes[root.q]
    return [
        root.network.nodes[k].operator.relax(boxes[k]) if k in boxes else line[domains.image]
        for k, line in enumerate(root.lines[:upto])
    ]


def ball_of(root: Root, domains: Domain) -> Box:
    """The input boxes of the domains: the balls of their images, or parts of these."""
    return domains.input or tuple(end[domains.image] for end in root.bounds[0])


def with_inputs(root: Root, domains: Domain) -> Domain:
    """The domains with their input boxes, which only a split of the input needs."""
    return replace(domains, input=ball_of(root, domains))


def rank_in(group: Tensor, value: Tensor) -> Tensor:
    """Place of each value among those of its group, 0 for the largest."""
    order = value.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group)
    before = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - before[group[order]]
    return rank


@dataclass(frozen=True)
class Setting:
    """Where rows live, one entry for each row: the networks, their lines, the input boxes and the size of logits."""

    pair: tuple[Network, ...]
    lines: tuple[list[Lines], ...]
    domains: Domain
    box: Box
    size: Tensor

    def rough(self) -> "Setting":
        """The same in float32."""
        lines = tuple([line.rough() for line in lines] for lines in self.lines)
        pair, box = tuple(network.single for network in self.pair), tuple(end.float() for end in self.box)
        return Setting(pair, lines, self.domains, box, self.size.float())


def setting(roots: tuple[Root, ...], domains: Domain) -> Setting:
    """The setting of rows in these domains, one for each."""
    pair, lines = tuple(root.network for root in roots), tuple(lines_of(root, domains) for root in roots)
    size = torch.stack([end.abs().flatten(1).amax(1) for root in roots for end in root.bounds[-1]]).amax(0)
    return Setting(pair, lines, domains, ball_of(roots[0], domains), size[domains.image])


def phased(slopes: Slopes, push: Slopes, phases: Slopes, like: Tensor) -> Dual:
    """The slopes, and what fixed phases add to the rows: a multiplier times z >= 0 or times -z >= 0.

    All of one network and for each row `(B, *shape)`; `like`: in which precision.
    """
    pushes = {k: (part * phases[k]).unsqueeze(1).to(like) for k, part in push.items()}
    return Dual({k: part.unsqueeze(1).to(like) for k, part in slopes.items()}, pushes)


def summed(at: Setting, rows: list[Tensor], duals: list[Dual], constant: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of the sum of rows at the end of each network, `(B, *shape)`, and a constant `(B,)`: `(B,)`.

    Also its linear form on x, `(B, *image)`, added up before the maximum over the ball is taken.
    """
    form, total = 0.0, constant[:, None]
    for network, lines, row, dual in zip(at.pair, at.lines, rows, duals, strict=True):
        pulled, shift = pull(network, lines, row.unsqueeze(1), dual=dual)
        form, total = form + pulled, total + shift
    return over_ball(form, total, *at.box)[:, 0], form[:, 0].detach()


def farthest(at: Setting, form: Tensor) -> Tensor:
    """The corners of the balls where linear forms on x `(B, *image)` are largest."""
    return torch.where(form > 0, at.box[1], at.box[0])


@dataclass(frozen=True)
class Place:
    """Where domains are loosest: `splits` says at which unit or, where all ReLUs are `settled`, at which input.

    `moves`: whether any input changes the row; `loss`: what all lines lose at the row's worst point; `logits`: theirs,
    of each network, there. All `(B, ...)`.
    """

    splits: Splits
    settled: Tensor
    moves: Tensor
    loss: Tensor
    logits: list[Tensor]


def loosest(roots: tuple[Root, ...], at: Setting, rows: list[Tensor], duals: list[Dual]) -> Place:
    """Where to split, by rows `(B, *shape)` at the end of each network, whose sum counts: at its worst point.

    A unit's score is what its line loses there, and its whole triangle besides.
    """
    forms, traces, logits = [], [{} for _ in roots], []
    for network, line, row, dual, trace in zip(at.pair, at.lines, rows, duals, traces, strict=True):
        forms.append(pull(network, line, row.unsqueeze(1), dual=dual, trace=trace)[0][:, 0])
    x = farthest(at, sum(forms))
    # an entry of score 0 first: for networks without any ReLU
    loss = x.new_zeros(len(x))
    names, scores = [(BOTH, 0, 0)], [x.new_zeros(len(x), 1)]
    for root, line, dual, trace in zip(roots, at.lines, duals, traces, strict=True):
        found, splits = [x], root.network.splits
        for k, node in enumerate(root.network.nodes):
            z = [found[place] for place in node.inputs]
            if k not in trace:
                found.append(node.operator(*z))
                continue
            (z,), line_k, row = z, line[k], trace[k][:, 0]
            free = line_k.free[:, 0]
            below = line_k.below if k not in dual.slopes else node.operator.allowed(dual.slopes[k], line_k)
            y = torch.where(row > 0, line_k.above[:, 0] * z + line_k.high[:, 0], below[:, 0] * z)
            gap = (row * (y - node.operator(z))).clamp(min=0) * free
            spread = torch.where(row > 0, row * line_k.high[:, 0], 0.0) * free
            weight = LATER ** (len(splits) - splits.index(k))
            score = torch.where(free, weight * (gap + SPREAD * spread + 1e-12), 0.0).flatten(1)
            loss = loss + gap.flatten(1).sum(1)
            names += [(root.q, k, unit) for unit in range(score.shape[1])]
            scores.append(score)
            found.append(y)
        logits.append(found[-1])
    best, which = torch.cat(scores, 1).max(1)
    network, node, unit = torch.tensor(names)[which].unbind(1)
    most, coordinate = (sum(form.abs() for form in forms) * (at.box[1] - at.box[0])).flatten(1).max(1)
    settled = ~(best > 0)
    unit = torch.where(settled, coordinate, unit)
    splits = Splits(network.masked_fill(settled, BOTH), node.masked_fill(settled, 0), unit)
    return Place(splits, settled, most > 0, loss, logits)


def halve(domains: Domain, splits: Splits) -> Domain:
    """Both halves of each domain, all first ones (the unit is on) before all second ones (it is off).

    Of the input ("node 0 of network BOTH"): the upper half before the lower one; both hold the middle.
    """
    halves, count = mapped(Tensor.contiguous, domains.join(domains)), len(splits.unit)  # to be changed in place

    def cut(box: Box, network: int, node: int, at: Tensor | float = 0.0) -> None:
        hit = ((splits.network == network) & (splits.node == node)).nonzero()[:, 0]
        (low, high), unit = (end.flatten(1) for end in box), splits.unit[hit]
        at = at[hit] if isinstance(at, Tensor) else low.new_tensor(at)
        low[hit, unit] = torch.maximum(low[hit, unit], at)
        high[hit + count, unit] = torch.minimum(high[hit + count, unit], at)

    for q, boxes in halves.boxes.items():
        for k, box in boxes.items():
            cut(box, q, k)
    for q, phases in halves.phases.items():
        for k, phase in phases.items():
            hit = ((splits.network == q) & (splits.node == k)).nonzero()[:, 0]
            phase, unit = phase.flatten(1), splits.unit[hit]
            phase[hit, unit], phase[hit + count, unit] = 1.0, -1.0
    if halves.input is not None:
        low, high = (end.flatten(1) for end in domains.input)
        middle = (low + high)[torch.arange(count), splits.unit.clamp(max=low.shape[1] - 1)] / 2
        cut(halves.input, BOTH, 0, middle)
    return halves


def meet(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ends in order, and which entries are empty: only where they cross by more than any rounding."""
    empty = low > high + 1e-9 * (1 + low.abs() + high.abs())
    return torch.minimum(low, high), torch.maximum(low, high), empty


def rebox(roots: tuple[Root, ...], domains: Domain, splits: Splits) -> Tensor:
    """Boxes behind what was split, computed anew in place with the slopes of the whole ball; who is empty, `(D,)`."""
    empty = torch.zeros(len(splits.unit), dtype=torch.bool)
    for root in roots:
        for k, (lower, upper) in domains.boxes[root.q].items():
            # behind the first affine node a box is exact until the input is split
            behind = (splits.network == root.q) & (splits.node < k) & (k in root.slopes)
            hit = ((splits.network == BOTH) | behind).nonzero()[:, 0]
            if not len(hit):
                continue
            mine = domains[hit]
            slopes = {j: part[mine.image] for j, part in root.slopes.get(k, {}).items()}
            lines, ball = lines_of(root, mine, upto=k), ball_of(root, mine)
            box, _ = refine(root.network, lines, ball, mine.boxes[root.q][k], k, slopes=slopes)
            lower[hit], upper[hit], gone = meet(*box)
            empty[hit] |= gone.flatten(1).any(1)
    return empty
