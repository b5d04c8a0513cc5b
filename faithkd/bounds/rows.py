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
from torch.nn import functional as F

from faithkd.bounds import domains, linear
from faithkd.bounds.alone import NEARLY, apart
from faithkd.bounds.descent import Range, minimise
from faithkd.bounds.domains import Domain, Root, Table, mapped, meet
from faithkd.bounds.graph import Network
from faithkd.bounds.linear import Dual, Slopes
from faithkd.bounds.operators import Box

STEPS = 6  # of descent in each part: further parts bring more
RANGES = {"slopes": Range(0.25, 0, 1), "push": Range(0.05, 0)}
FALL = 0.9
NEAR = 0.02  # a row so near to what it attains, by the width of its unit's first box, is finished
BYTES = 32  # of a part for each unit that can be split: boxes, phases, slopes, multipliers


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
    `enough`, `near`: a part is finished at or below `enough` (a unit is off, or on), or so near to `low`.
    """

    form: Tensor
    image: Tensor
    low: Tensor
    closed: Tensor
    made: Tensor
    enough: Tensor
    near: Tensor

    @property
    def goal(self) -> Tensor:
        """The value at which a part is finished."""
        return torch.maximum(self.enough, self.low + self.near)

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


def units_before(network: Network) -> list[int]:
    """The nodes that can be split and that the network's end depends on."""
    return [k for k in network.before(len(network.nodes)) if network.nodes[k].operator.splits]


def attained(values: Tensor) -> Tensor:
    """The values, or nothing (-inf) where they are no numbers."""
    return values.nan_to_num(-math.inf, -math.inf, -math.inf)


def planted(root: Root, rows: Rows, number: Tensor, value: Tensor, slopes: Slopes) -> Parts:
    """The whole balls as first parts of the rows with these numbers, bounded by `value` with these `slopes`."""
    image, network = rows.image[number], root.network
    boxes = {k: tuple(end[image] for end in root.bounds[network.place(k)]) for k in units_before(network)}
    phases = {k: torch.zeros_like(box[0], dtype=torch.float32) for k, box in boxes.items()}
    push = mapped(torch.clone, phases)
    return Parts(number, Domain(image, {root.q: boxes}, {root.q: phases}), slopes, push, value)


def dual(parts: Parts, q: int, free: dict, dtype: torch.dtype = torch.float64) -> Dual:
    """The slopes, and what fixed phases add to the rows: a multiplier times z >= 0 or times -z >= 0."""
    push = {k: (free["push", k] * parts.domains.phases[q][k]).unsqueeze(1).to(dtype) for k in parts.push}
    return Dual({k: free["slopes", k].unsqueeze(1).to(dtype) for k in parts.slopes}, push)


def free_of(parts: Parts) -> dict[tuple, Tensor]:
    """All that is free, by kind and node."""
    return {(kind, k): part for kind in ("slopes", "push") for k, part in getattr(parts, kind).items()}


def tightened(root: Root, form: Tensor, parts: Parts) -> tuple[Parts, Tensor]:
    """The parts with the smallest bound met on a descent, and what their rows, `form` `(D, 1, *shape)`, attain there.

    The descent is in float32, what it finds is certified in float64.
    """
    network, q, now = root.network, root.q, free_of(parts)
    lines, box = domains.lines_of(root, parts.domains), domains.ball_of(root, parts.domains)
    rough, rough_box, rough_form = [line.rough() for line in lines], tuple(end.float() for end in box), form.float()

    def value_of(free: dict) -> Tensor:
        pulled = linear.pull(network.single, rough, rough_form, dual=dual(parts, q, free, torch.float32))
        return linear.over_ball(*pulled, *rough_box)[:, 0]

    if now:
        now = mapped(torch.clone, now)
        now = minimise(value_of, now, STEPS, {name: RANGES[name[0]] for name in now}, FALL)
    pulled, total = linear.pull(network, lines, form, dual=dual(parts, q, now))
    value = torch.minimum(parts.value, linear.over_ball(pulled, total, *box)[:, 0])
    x = torch.where(pulled[:, 0] > 0, box[1], box[0])
    reached = attained((network(x) * form[:, 0]).flatten(1).sum(1))
    columns = {kind: {k: now[kind, k] for k in getattr(parts, kind)} for kind in ("slopes", "push")}
    return replace(parts, value=value, **columns), reached


def grow(root: Root, rows: Rows, parts: Parts, chosen: Tensor) -> tuple[Rows, Parts]:
    """The chosen parts split, so many at a time that a pass fits in BUDGET."""
    parents, grown = parts[chosen], [parts[~chosen]]
    for some in torch.arange(len(parents.row)).split(max(1, linear.BUDGET // (2 * linear.widest(root.network)))):
        rows, children = halved(root, rows, parents[some])
        grown.append(children)
    return rows, grown[0].join(*grown[1:])


def halved(root: Root, rows: Rows, parents: Parts) -> tuple[Rows, Parts]:
    """Both halves of each part, split at its loosest unit; those without any are finished."""
    inside, form = parents.domains, rows.form[parents.row]
    lines, box = domains.lines_of(root, inside), domains.ball_of(root, inside)
    place = domains.loosest((root,), [lines], [form], [dual(parents, root.q, free_of(parents))], box)
    rows = rows.closing(parents[place.settled])
    parents, splits = parents[~place.settled], place.splits[~place.settled]
    if not len(parents.row):
        return rows, parents
    halves = domains.halve(parents.domains, splits)
    empty = domains.rebox((root,), halves, splits.join(splits))
    made = rows.made + 2 * torch.bincount(parents.row, minlength=len(rows.made))
    children = replace(parents.join(parents), domains=halves)[~empty]
    children, reached = tightened(root, rows.form[children.row].unsqueeze(1), children)
    low = rows.low.scatter_reduce(0, children.row, reached, "amax")
    return replace(rows, low=low, made=made), children


def largest(rows: Rows, parts: Parts, busy: Tensor) -> Tensor:
    """The largest parts of each row that is `busy` `(R,)`: a quarter of them."""
    width = (torch.bincount(parts.row, minlength=len(rows.made)) // 4).clamp(min=1)
    return (domains.rank_in(parts.row, parts.value) < width[parts.row]) & busy[parts.row]


def search(root: Root, rows: Rows, parts: Parts, most: int, deadline: float = math.inf) -> tuple[Rows, Parts]:
    """All trees grown, each in its largest part, until a row is settled, near what it attains, or has `most` parts."""
    while True:
        done = parts.value <= rows.goal[parts.row]
        rows, parts = rows.closing(parts[done]), parts[~done]
        chosen = largest(rows, parts, rows.made < most)
        if not chosen.any() or time.monotonic() > deadline:
            return rows, parts
        rows, parts = grow(root, rows, parts, chosen)


def narrowed_box(root: Root, k: int, box: Box, most: int, deadline: float) -> Box:
    """The box of node k's input with the ends of each unsettled unit as rows; `root`: what is known up to there."""
    network, shape = root.network, box[0].shape[1:]
    place = network.place(k)
    before = upto(root, place)
    lower, upper = (end.flatten(1).clone() for end in box)
    image, unit = network.nodes[k].operator.loose(lower, upper).nonzero().unbind(1)
    if not len(image) or not units_before(before.network) or torch.bincount(image).max() > linear.LARGE:
        return box
    near = (NEAR * (upper - lower)[image, unit]).repeat(2)
    side = torch.arange(2).repeat_interleave(len(image))
    image, unit, sign = image.repeat(2), unit.repeat(2), 1.0 - 2.0 * side.double()
    value = torch.where(side == 0, upper[image, unit], -lower[image, unit])
    form = torch.zeros(len(image), lower.shape[1], dtype=torch.float64)
    form[torch.arange(len(image)), unit] = sign
    middle = attained(before.network(sum(root.bounds[0]) / 2).flatten(1)[image, unit] * sign)
    nothing = torch.zeros_like(near)
    rows = Rows(form.unflatten(1, shape), image, middle, nothing - math.inf, nothing.long(), nothing, near)
    slopes = {j: part[image, side, unit].float() for j, part in root.slopes[k].items()}
    units = sum(math.prod(network.shapes[network.place(j)]) for j in units_before(before.network))
    for some in torch.arange(len(image)).split(max(1, domains.ROOM // (BYTES * units * most))):
        mine = rows[some]
        chosen = {j: part[some] for j, part in slopes.items()}
        parts = planted(before, mine, torch.arange(len(some)), value[some], chosen)
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
            start = root.slopes[k]
            bounds[place], slopes[k] = linear.refine(network, lines, ball, bounds[place], k, linear.STEPS, start)
            if node.operator.splits:
                known = replace(root, bounds=bounds, lines=lines, slopes=slopes)
                bounds[place] = narrowed_box(known, k, bounds[place], most, deadline)
        boxes = [bounds[at] for at in node.inputs]
        lines.append(node.operator.freed(node.operator.relax(*boxes), *boxes))
        (low, high), (old_low, old_high) = node.operator.interval(*boxes), root.bounds[k + 1]
        bounds.append(meet(torch.maximum(low, old_low), torch.minimum(high, old_high))[:2])
    pairs = linear.difference_pairs(network.classes)
    row_slopes = mapped(torch.clone, root.row_slopes)
    start = {k: part[:, pairs[:, 0], pairs[:, 1]] for k, part in row_slopes.items()}
    highest, found = linear.row_differences(network, lines, bounds, linear.STEPS, start)
    for k in row_slopes.keys() & found.keys():
        row_slopes[k][:, pairs[:, 0], pairs[:, 1]] = found[k]
    highest = torch.minimum(highest, root.highest)
    columns = {"highest": highest, "row_slopes": row_slopes, "odds": domains.all_odds(highest)}
    return replace(root, bounds=bounds, lines=lines, slopes=slopes, **columns)


@dataclass(frozen=True)
class Forest:
    """Trees of both networks' differences, None where there are none yet, and the roots with what they say."""

    roots: tuple[Root, Root]
    rows: tuple[Rows, Rows]
    parts: tuple[Parts | None, Parts | None] = (None, None)


def forest(roots: tuple[Root, Root]) -> Forest:
    """No trees yet."""
    return Forest(roots, tuple(differences(root) for root in roots))


def decided(
    known: Forest, cap: Tensor, goal: Tensor, nodes: Tensor, deadline: float = math.inf
) -> tuple[Forest, Tensor]:
    """The trees grown that decide on eq. (11), and the parts made for each image: as `alone.search_alone`.

    Those of the order and class where it is largest, and there where one more part promises most.
    """
    roots, rows, parts = list(known.roots), list(known.rows), list(known.parts)
    images, classes = roots[0].odds[0].shape
    before = sum(table.made.view(images, -1).sum(1) for table in rows)
    while True:
        bound = apart([root.odds for root in roots])
        value, place = torch.where(cap < NEARLY * bound, 0.0, bound).flatten(1).max(1)
        order, label = place // classes, place % classes
        made = sum(table.made.view(images, -1).sum(1) for table in rows) - before
        gains = [gain(root, table, order == root.q, label) for root, table in zip(roots, rows, strict=True)]
        best = torch.stack(gains).view(2, images, -1).amax((0, 2))
        busy = (value > goal) & (made < nodes) & (best > 0)
        for trees in parts:
            if trees is not None:
                busy &= ~domains.full(trees.domains.image, images, trees)
        if not busy.any() or time.monotonic() > deadline:
            return Forest(tuple(roots), tuple(rows), tuple(parts)), made
        for q, part in enumerate(gains):
            wanted = (part > 0) & (part >= best[rows[q].image] / 4) & busy[rows[q].image]
            if wanted.any():
                roots[q], rows[q], parts[q] = enlarged(roots[q], rows[q], parts[q], wanted)


def differences(root: Root) -> Rows:
    """All differences z_j - z_i as rows, number (image, i, j)."""
    images, classes = root.odds[0].shape
    unit = torch.eye(classes, dtype=torch.float64)
    form = (unit[None] - unit[:, None]).flatten(0, 1).repeat(images, 1)
    image = torch.arange(images).repeat_interleave(classes**2)
    nothing = torch.zeros(len(image), dtype=torch.float64)
    low = attained((root.network(sum(root.bounds[0]) / 2)[image] * form).sum(1))
    near = 0.002 * (1 + low.abs())
    return Rows(form, image, low, nothing - math.inf, nothing.long(), nothing - math.inf, near)


def gain(root: Root, rows: Rows, upper: Tensor, label: Tensor) -> Tensor:
    """What eq. (11) would gain by one unit less in each row, by parts made, `(R,)`.

    sig'(m) at the end of m that counts, of class `label`, times the row's weight in the log-sum-exp.
    """
    images, classes = root.odds[0].shape
    here = torch.arange(images)
    own = F.one_hot(label, classes).bool()
    ends = torch.where(upper[:, None], -root.highest[here, :, label], root.highest[here, label])
    ends = ends.masked_fill(own, -math.inf)
    m = -ends.logsumexp(1)
    share = ends.softmax(1) * (torch.sigmoid(m) * torch.sigmoid(-m))[:, None]
    found = torch.zeros(images, classes, classes, dtype=torch.float64)
    at_upper, at_lower = here[upper], here[~upper]
    found[at_upper, :, label[at_upper]] = share[at_upper]
    found[at_lower, label[at_lower]] = share[at_lower]
    found = found.flatten() / (rows.made + 1)
    return found.masked_fill(root.highest.flatten() <= torch.maximum(rows.goal, rows.closed), 0.0)


def enlarged(root: Root, rows: Rows, parts: Parts | None, wanted: Tensor) -> tuple[Root, Rows, Parts]:
    """The trees of the `wanted` rows `(R,)` grown, or planted where there are none, and the root with their bounds."""
    fresh, highest = (wanted & (rows.made == 0)).nonzero()[:, 0], root.highest.flatten()
    slopes = {k: part.flatten(0, 2)[fresh].float() for k, part in root.row_slopes.items()}
    new = planted(root, rows, fresh, highest[fresh], slopes)
    parts = new if parts is None else parts.join(new)
    rows = replace(rows, made=rows.made.index_add(0, fresh, torch.ones_like(fresh)))
    done = parts.value <= rows.goal[parts.row]
    rows, parts = rows.closing(parts[done]), parts[~done]
    chosen = largest(rows, parts, wanted)
    if chosen.any():
        rows, parts = grow(root, rows, parts, chosen)
    highest = torch.where(rows.made > 0, torch.minimum(highest, rows.upper(parts)), highest).view_as(root.highest)
    return replace(root, highest=highest, odds=domains.all_odds(highest)), rows, parts
