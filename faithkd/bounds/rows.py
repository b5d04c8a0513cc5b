"""Branch and bound for linear rows of one network: hidden units' ends from the front, then differences of logits.

A *row* is the largest value of a linear form on one place, over one ball. Each has a small tree of its own over the
phases of the ReLUs before that place. In every part of it the boxes between are computed anew, and the slopes below
unsettled ReLUs and the multipliers of the fixed phases are found by descent, every value of which is valid. A row's
bound is the largest of its parts'. All rows of one place, over all images, are worked on in one batch.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from faithkd.bounds.descent import Range, minimise
from faithkd.bounds.domains import (
    Domain,
    Root,
    Splits,
    Table,
    all_odds,
    ball_of,
    halve,
    lines_of,
    loosest,
    mapped,
    meet,
    rank_in,
    rebox,
)
from faithkd.bounds.graph import Network
from faithkd.bounds.linear import (
    BUDGET,
    LARGE,
    Dual,
    Slopes,
    difference_pairs,
    over_ball,
    pull,
    refine,
    row_differences,
    widest,
)
from faithkd.bounds.linear import STEPS as ALPHA_STEPS
from faithkd.bounds.operators import Box

STEPS = 6  # of descent in each part: further parts bring more
RANGES = {"slopes": Range(0.25, 0, 1), "push": Range(0.05, 0)}
FALL = 0.9
NEAR = 0.02  # a row so near to what it attains, by the width of its unit's first box, is finished
PARTS = 2**15  # of all rows that are worked on at once: about 4 kB each in networks like the paper's


@dataclass(frozen=True)
class Parts(Table):
    """Parts of balls: the `row` whose tree each is in, domains, `value`, and what is free by node, `(D, *shape)`."""

    row: Tensor
    domains: Domain
    slopes: Slopes
    push: Slopes
    value: Tensor


@dataclass(frozen=True)
class Rows(Table):
    """Rows `form . z` at the end of a network: `form` `(R, *shape)`, `image` `(R,)`, and what is known of each, `(R,)`.

    `low`: a value that is attained, `closed`: the largest bound of a part that is finished, `made`: parts so far,
    `near`: how near to `low` is enough. At or below 0 a unit is off, or on, and the row is finished.
    """

    form: Tensor
    image: Tensor
    low: Tensor
    closed: Tensor
    made: Tensor
    near: Tensor

    @property
    def goal(self) -> Tensor:
        """The value at which a part is finished."""
        return (self.low + self.near).clamp(min=0)

    def closing(self, parts: Parts) -> "Rows":
        """The rows after these parts of theirs are finished."""
        return replace(self, closed=self.closed.scatter_reduce(0, parts.row, parts.value, "amax"))

    def upper(self, parts: Parts) -> Tensor:
        """The bound of each row: the largest of its finished and open parts, and never below what is attained."""
        return torch.maximum(self.closed, self.low).scatter_reduce(0, parts.row, parts.value, "amax")


def upto(root: Root, place: int) -> Root:
    """The root of the network that ends at `place`."""
    nodes, shapes = root.network.nodes[:place], root.network.shapes[: place + 1]
    return replace(root, network=Network(nodes, shapes), bounds=root.bounds[: place + 1], lines=root.lines[:place])


def planted(root: Root, rows: Rows, value: Tensor, slopes: Slopes) -> Parts:
    """The whole balls as the first parts of the rows, bounded by `value` with these `slopes`."""
    image, network = rows.image, root.network
    boxes = {k: tuple(end[image] for end in root.bounds[network.place(k)]) for k in network.splits}
    phases = {k: torch.zeros_like(box[0], dtype=torch.float32) for k, box in boxes.items()}
    push = mapped(torch.clone, phases)
    return Parts(torch.arange(len(image)), Domain(image, {root.q: boxes}, {root.q: phases}), slopes, push, value)


def dual(parts: Parts, q: int, free: dict, dtype: torch.dtype = torch.float64) -> Dual:
    """The slopes, and what fixed phases add to the rows: a multiplier times z >= 0 or times -z >= 0."""
    push = {k: (free["push", k] * parts.domains.phases[q][k]).unsqueeze(1).to(dtype) for k in parts.push}
    return Dual({k: free["slopes", k].unsqueeze(1).to(dtype) for k in parts.slopes}, push)


def free_of(parts: Parts) -> dict[tuple, Tensor]:
    """All that is free, by kind and node."""
    return {(kind, k): part for kind in ("slopes", "push") for k, part in getattr(parts, kind).items()}


def pieces(root: Root, parts: Parts) -> list[Parts]:
    """The parts, so many at a time that a pass fits in BUDGET; at least one piece."""
    numbers = torch.arange(len(parts.row))
    return [parts[piece] for piece in numbers.split(max(1, BUDGET // widest(root.network)))]


def tightened(root: Root, rows: Rows, parts: Parts, steps: int) -> tuple[Parts, Tensor]:
    """The parts with the smallest bound met on a descent, and what each row attains where that bound is attained."""
    found = [descended(root, rows.form[mine.row].unsqueeze(1), mine, steps) for mine in pieces(root, parts)]
    return found[0][0].join(*(part for part, _ in found[1:])), torch.cat([reached for _, reached in found])


def descended(root: Root, form: Tensor, parts: Parts, steps: int) -> tuple[Parts, Tensor]:
    """`tightened` for the form `(D, 1, *shape)` of each part. In float32 but for what is found: that is certified."""
    network, q, now = root.network, root.q, free_of(parts)
    lines, box = lines_of(root, parts.domains), ball_of(root, parts.domains)
    rough, rough_box, rough_form = [line.rough() for line in lines], tuple(end.float() for end in box), form.float()

    def value_of(free: dict) -> Tensor:
        pulled = pull(network.single, rough, rough_form, dual=dual(parts, q, free, torch.float32))
        return over_ball(*pulled, *rough_box)[:, 0]

    if now:
        now = mapped(torch.clone, now)
        now = minimise(value_of, now, steps, {name: RANGES[name[0]] for name in now}, FALL)
    pulled, total = pull(network, lines, form, dual=dual(parts, q, now))
    value = torch.minimum(parts.value, over_ball(pulled, total, *box)[:, 0])
    x = torch.where(pulled[:, 0] > 0, box[1], box[0])
    reached = (network(x) * form[:, 0]).flatten(1).sum(1).nan_to_num(-math.inf, -math.inf, -math.inf)
    columns = {kind: {k: now[kind, k] for k in getattr(parts, kind)} for kind in ("slopes", "push")}
    return replace(parts, value=value, **columns), reached


def loosest_units(root: Root, rows: Rows, parts: Parts) -> tuple[Splits, Tensor]:
    """Where each part is loosest, and whether no ReLU is left to split there, `(D,)`."""
    found = []
    for mine in pieces(root, parts):
        lines, box = lines_of(root, mine.domains), ball_of(root, mine.domains)
        duals = [dual(mine, root.q, free_of(mine))]
        found.append(loosest((root,), [lines], [rows.form[mine.row]], duals, box))
    first, *others = (place.splits for place in found)
    return first.join(*others), torch.cat([place.settled for place in found])


def grow(root: Root, rows: Rows, parts: Parts, chosen: Tensor, steps: int = STEPS) -> tuple[Rows, Parts]:
    """The chosen parts split, each at its loosest unit; those without any are finished."""
    parents, others = parts[chosen], parts[~chosen]
    splits, settled = loosest_units(root, rows, parents)
    rows = rows.closing(parents[settled])
    parents, splits = parents[~settled], splits[~settled]
    if not len(parents.row):
        return rows, others
    halves = halve(parents.domains, splits)
    empty = rebox((root,), halves, splits.join(splits))
    made = rows.made + 2 * torch.bincount(parents.row, minlength=len(rows.made))
    children = replace(parents.join(parents), domains=halves)[~empty]
    children, reached = tightened(root, rows, children, steps)
    low = rows.low.scatter_reduce(0, children.row, reached, "amax")
    return replace(rows, low=low, made=made), others.join(children)


def search(root: Root, rows: Rows, parts: Parts, most: int, deadline: float = math.inf) -> tuple[Rows, Parts]:
    """All trees grown, each in its largest part, until a row is settled, near what it attains, or has `most` parts."""
    while True:
        done = parts.value <= rows.goal[parts.row]
        rows, parts = rows.closing(parts[done]), parts[~done]
        width = (torch.bincount(parts.row, minlength=len(rows.made)) // 4).clamp(min=1)
        chosen = (rank_in(parts.row, parts.value) < width[parts.row]) & (rows.made < most)[parts.row]
        if not chosen.any() or time.monotonic() > deadline:
            return rows, parts
        rows, parts = grow(root, rows, parts, chosen)


def narrowed_box(root: Root, k: int, box: Box, most: int, deadline: float) -> Box:
    """The box of node k's input with the ends of each unsettled unit as rows; `root`: what is known up to there."""
    place, shape = root.network.place(k), box[0].shape[1:]
    before = upto(root, place)
    lower, upper = (end.flatten(1).clone() for end in box)
    image, unit = root.network.nodes[k].operator.loose(lower, upper).nonzero().unbind(1)
    if not len(image) or not before.network.splits or torch.bincount(image).max() > LARGE:
        return box
    near = (NEAR * (upper - lower)[image, unit]).repeat(2)
    side = torch.arange(2).repeat_interleave(len(image))
    image, unit, sign = image.repeat(2), unit.repeat(2), 1.0 - 2.0 * side.double()
    value = torch.where(side == 0, upper[image, unit], -lower[image, unit])
    form = torch.zeros(len(image), lower.shape[1], dtype=torch.float64)
    form[torch.arange(len(image)), unit] = sign
    middle = before.network(sum(root.bounds[0]) / 2).flatten(1)[image, unit] * sign
    nothing = torch.zeros_like(near)
    rows = Rows(form.unflatten(1, shape), image, middle, nothing - math.inf, nothing.long(), near)
    slopes = {j: part[image, side, unit].float() for j, part in root.slopes[k].items()}
    # few rows at once where their trees are large
    for some in torch.arange(len(image)).split(max(1, PARTS // most)):
        mine = rows[some]
        parts = planted(before, mine, value[some], mapped(lambda part, some=some: part[some], slopes))
        mine, parts = search(before, mine, parts, most, deadline)
        value[some] = torch.minimum(value[some], mine.upper(parts))
    first = side == 0
    upper[image[first], unit[first]], lower[image[~first], unit[~first]] = value[first], -value[~first]
    lower, upper, _ = meet(lower, upper)
    return lower.view_as(box[0]), upper.view_as(box[1])


def narrowed(root: Root, most: int, deadline: float = math.inf) -> Root:
    """The root from narrower boxes: each end of a hidden unit by a tree of at most `most` parts, front to back."""
    network, ball = root.network, root.bounds[0]
    bounds, lines, slopes = [ball], [], {}
    for k, node in enumerate(network.nodes):
        place = network.place(k)
        if k in root.slopes:
            bounds[place], slopes[k] = refine(network, lines, ball, bounds[place], k, ALPHA_STEPS, root.slopes[k])
            if node.operator.splits:
                known = replace(root, bounds=bounds, lines=lines, slopes=slopes)
                bounds[place] = narrowed_box(known, k, bounds[place], most, deadline)
        boxes = [bounds[at] for at in node.inputs]
        lines.append(node.operator.relax(*boxes))
        (low, high), (old_low, old_high) = node.operator.interval(*boxes), root.bounds[k + 1]
        bounds.append(meet(torch.maximum(low, old_low), torch.minimum(high, old_high))[:2])
    pairs = difference_pairs(network.classes)
    row_slopes = mapped(torch.clone, root.row_slopes)
    start = {k: part[:, pairs[:, 0], pairs[:, 1]] for k, part in row_slopes.items()}
    highest, found = row_differences(network, lines, bounds, ALPHA_STEPS, start)
    for k, part in found.items():
        row_slopes[k][:, pairs[:, 0], pairs[:, 1]] = part
    highest = torch.minimum(highest, root.highest)
    columns = {"highest": highest, "row_slopes": row_slopes, "odds": all_odds(highest)}
    return replace(root, bounds=bounds, lines=lines, slopes=slopes, **columns)
