"""Branch and bound for linear rows of one network: hidden units' boxes from the front, then differences of logits.

A *row* is the largest value of a linear form on one place, over one ball: an end of an unsettled unit's box or, where
it decides on eq. (11), of a difference z_j - z_i. Each has a small tree of its own over the phases of the ReLUs before
that place. In every part of it the slopes below unsettled ReLUs and the multipliers of the fixed phases are found by
descent, every value of which is valid; other boxes stay, for to compute them anew takes twice the time of all else and
gains next to nothing. A row's bound is the largest of its parts'. All rows of one place, over all images, are worked on
in one batch.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds import domains, linear
from faithkd.bounds.alone import most_apart
from faithkd.bounds.domains import Domain, Root, Table, mapped, meet
from faithkd.bounds.graph import Network
from faithkd.bounds.linear import Dual, Slopes
from faithkd.bounds.operators import Box

STEPS = 6  # of descent in each part: further parts bring more
CLOSE = 0.002  # a difference so near to what it attains, by its size, is finished
ALIKE = 4  # trees grow together that promise a quarter of the best one's gain
NEAR = 0.02  # a row so near to what it attains, by the width of its unit's first box, is finished
BYTES = 32  # of a part for each unit that can be split: boxes, phases, slopes, multipliers


@dataclass(frozen=True)
class Parts(Table):
    """Parts of balls: the `row` whose tree each is in, domains, `value`, and what is free by node, `(D, *shape)`."""

    FREE: ClassVar = ("slopes", "push")
    row: Tensor
    domains: Domain
    slopes: Slopes
    push: Slopes
    value: Tensor


@dataclass(frozen=True)
class Rows(Table):
    """Rows `form . z` at the end of a network: `form` `(R, *shape)`, `image` `(R,)`, and what is known of each, `(R,)`.

    `low`: a value that is attained, `closed`: the largest bound of a part that is finished, `made`: parts so far. A
    part is finished where its bound is `enough` (0: the unit is off, or on) or so `near` to `low`.
    """

    form: Tensor
    image: Tensor
    low: Tensor
    closed: Tensor
    made: Tensor
    near: Tensor
    enough: Tensor

    @property
    def goal(self) -> Tensor:
        """The value at which a part is finished."""
        return torch.maximum(self.low + self.near, self.enough)

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


def planted(root: Root, rows: Rows, value: Tensor, slopes: Slopes) -> Parts:
    """The whole balls as first parts of the rows, bounded by `value` with these `slopes`."""
    image, network = rows.image, root.network
    boxes = {k: tuple(end[image] for end in root.bounds[network.place(k)]) for k in units_before(network)}
    phases = {k: torch.zeros_like(box[0], dtype=torch.float32) for k, box in boxes.items()}
    inside = Domain(image, {root.q: boxes}, {root.q: phases})
    return Parts(torch.arange(len(image)), inside, slopes, mapped(torch.clone, phases), value)


def dual(parts: Parts, q: int, like: Tensor) -> Dual:
    """The parts' slopes and multipliers, see `domains.phased`."""
    return domains.phased(parts.slopes, parts.push, parts.domains.phases[q], like)


def tightened(root: Root, form: Tensor, parts: Parts) -> tuple[Parts, Tensor]:
    """The parts with the smallest bound met on a descent, and what their rows, `form` `(D, *shape)`, attain there."""

    def bound(at: domains.Setting, form: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        return domains.summed(at, [form], [dual(parts, root.q, form)], form.new_zeros(len(form)))

    at = domains.setting((root,), parts.domains)
    rough, rough_form = at.rough(), form.float()
    parts = parts.descended(lambda tried: bound(rough, rough_form, tried)[0], STEPS)
    value, pulled = bound(at, form, parts)
    reached = attained((root.network(domains.farthest(at, pulled)) * form).flatten(1).sum(1))
    return replace(parts, value=torch.minimum(parts.value, value)), reached


def grow(root: Root, rows: Rows, parts: Parts, chosen: Tensor) -> tuple[Rows, Parts]:
    """The chosen parts split, so many at a time that a pass fits in BUDGET."""
    parents, grown = parts[chosen], [parts[~chosen]]
    for some in torch.arange(len(parents.row)).split(max(1, linear.BUDGET // (2 * linear.widest(root.network)))):
        rows, children = halved(root, rows, parents[some])
        grown.append(children)
    return rows, grown[0].join(*grown[1:])


def halved(root: Root, rows: Rows, parents: Parts) -> tuple[Rows, Parts]:
    """Both halves of each part, split at its loosest unit; those without any are finished."""
    at, form = domains.setting((root,), parents.domains), rows.form[parents.row]
    place = domains.loosest((root,), at, [form], [dual(parents, root.q, form)])
    rows = rows.closing(parents[place.settled])
    parents, splits = parents[~place.settled], place.splits[~place.settled]
    if not len(parents.row):
        return rows, parents
    children = replace(parents.join(parents), domains=domains.halve(parents.domains, splits))
    children, reached = tightened(root, rows.form[children.row], children)
    low = rows.low.scatter_reduce(0, children.row, reached, "amax")
    return replace(rows, low=low, made=rows.made + torch.bincount(children.row, minlength=len(low))), children


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


def share(deadline: float, left: int) -> float:
    """When to end the first of `left` equal pieces of work, for all to end at the deadline."""
    return (now := time.monotonic()) + (deadline - now) / left


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
    rows = Rows(form.unflatten(1, shape), image, middle, nothing - math.inf, nothing.long(), near, nothing)
    slopes = {j: part[image, side, unit].float() for j, part in root.slopes[k].items()}
    units = sum(math.prod(network.shapes[network.place(j)]) for j in units_before(before.network))
    pieces = torch.arange(len(image)).split(max(1, domains.ROOM // (BYTES * units * most)))
    for done, some in enumerate(pieces):
        mine = rows[some]
        parts = planted(before, mine, value[some], {j: part[some] for j, part in slopes.items()})
        mine, parts = search(before, mine, parts, most, share(deadline, len(pieces) - done))
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
                soon = share(deadline, sum(j >= k for j in network.splits))
                bounds[place] = narrowed_box(known, k, bounds[place], most, soon)
        boxes = [bounds[at] for at in node.inputs]
        lines.append(node.operator.freed(node.operator.relax(*boxes), *boxes))
        (low, high), (old_low, old_high) = node.operator.interval(*boxes), root.bounds[k + 1]
        bounds.append(meet(torch.maximum(low, old_low), torch.minimum(high, old_high))[:2])
    found = domains.with_differences(network, root.q, bounds, lines, slopes, root.row_slopes)
    highest = torch.minimum(found.highest, root.highest)
    return replace(found, highest=highest, odds=domains.all_odds(highest))


@dataclass(frozen=True)
class Trees:
    """Trees of one network's differences, a row for each (image, i, j), and the root with what they say."""

    root: Root
    rows: Rows
    parts: Parts


def differences(root: Root) -> Trees:
    """No trees yet, for the largest z_j - z_i of all i and j."""
    images, classes = root.odds[0].shape
    unit = torch.eye(classes, dtype=torch.float64)
    form = (unit[None] - unit[:, None]).flatten(0, 1).repeat(images, 1)
    image = torch.arange(images).repeat_interleave(classes**2)
    low = attained((root.network(sum(root.bounds[0]) / 2)[image] * form).sum(1))
    never = torch.full_like(low, -math.inf)
    rows = Rows(form, image, low, never, torch.zeros_like(image), CLOSE * (1 + low.abs()), never)
    return Trees(root, rows, first_parts(root, rows, image[:0]))


def first_parts(root: Root, rows: Rows, which: Tensor) -> Parts:
    """The whole balls as first parts of the differences with the numbers `which`."""
    slopes = {k: part.flatten(0, 2)[which].float() for k, part in root.row_slopes.items()}
    return replace(planted(root, rows[which], root.highest.flatten()[which], slopes), row=which)


def decided(
    trees: list[Trees], cap: Tensor, goal: Tensor, nodes: Tensor, deadline: float = math.inf
) -> tuple[list[Trees], Tensor]:
    """The trees grown that decide on eq. (11), and the parts made for each image: as `alone.search_alone`."""
    images, classes = trees[0].root.odds[0].shape
    before = sum(each.rows.made for each in trees)
    while True:
        value, order, label = most_apart([each.root.odds for each in trees], cap)
        made = (sum(each.rows.made for each in trees) - before).view(images, -1).sum(1)
        gains = [gain(each, order == each.root.q, label) for each in trees]
        best = torch.stack(gains).view(2, images, -1).amax((0, 2))
        busy = (value > goal) & (made < nodes) & (best > 0)
        for each in trees:
            busy &= ~domains.full(each.parts.domains.image, images, each.parts)
        if not busy.any() or time.monotonic() > deadline:
            return trees, made
        least = torch.where(busy, best / ALIKE, math.inf).repeat_interleave(classes**2)
        trees = [grown(each, promise >= least) for each, promise in zip(trees, gains, strict=True)]


def gain(trees: Trees, upper: Tensor, label: Tensor) -> Tensor:
    """What eq. (11) would gain by one unit less in each row, divided by the parts made, `(R,)`; 0 for finished ones.

    Of the class i = `label`, through the upper end of m where `upper`, else through the lower one, both `(N,)`.
    """
    root, rows, here = trees.root, trees.rows, torch.arange(len(label))
    ends = torch.where(upper[:, None], -root.highest[here, :, label], root.highest[here, label])
    ends = ends.masked_fill(F.one_hot(label, ends.shape[1]).bool(), -math.inf)
    m = ends.logsumexp(1)
    share = ends.softmax(1) * (torch.sigmoid(m) * torch.sigmoid(-m))[:, None]
    found = torch.zeros_like(root.highest)
    found[here[upper], :, label[upper]], found[here[~upper], label[~upper]] = share[upper], share[~upper]
    finished = root.highest.flatten() <= torch.maximum(rows.goal, rows.closed)
    return (found.flatten() / (1 + rows.made)).masked_fill(finished, 0.0)


def grown(trees: Trees, wanted: Tensor) -> Trees:
    """With the trees of the `wanted` rows `(R,)` grown, or planted where there are none."""
    root, rows, parts = trees.root, trees.rows, trees.parts
    fresh = (wanted & (rows.made == 0)).nonzero()[:, 0]
    parts = parts.join(first_parts(root, rows, fresh))
    rows = replace(rows, made=rows.made.index_add(0, fresh, torch.ones_like(fresh)))
    done = parts.value <= rows.goal[parts.row]
    rows, parts = rows.closing(parts[done]), parts[~done]
    if (chosen := largest(rows, parts, wanted)).any():
        rows, parts = grow(root, rows, parts, chosen)
    highest = torch.where(rows.made > 0, rows.upper(parts), math.inf).view_as(root.highest)
    highest = torch.minimum(highest, root.highest)
    return Trees(replace(root, highest=highest, odds=domains.all_odds(highest)), rows, parts)
