"""Branch and bound for linear rows of one network; and hidden units' boxes by it, from the front.

A *row* is the largest value of z_plus - z_minus, or of one of the two, at one place and over one ball: an end of an
unsettled unit's box, or a difference of logits. Each has a small tree of its own over the phases of the ReLUs before
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
from faithkd.bounds.domains import Domain, Root, Table, mapped, meet
from faithkd.bounds.graph import Network
from faithkd.bounds.linear import Dual, Slopes
from faithkd.bounds.operators import Box

STEPS = 6  # of descent in each part: further parts bring more
NONE = -1  # no such term
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
    """Rows z_plus - z_minus at the end of a network, NONE where there is no such term, and what is known of each.

    `low`: a value that is attained, `closed`: the largest bound of a part that is finished, `made`: parts so far. A
    part is finished where its bound is `enough` (0: the unit is off, or on) or so `near` to `low`.
    """

    plus: Tensor
    minus: Tensor
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

    def forms(self, shape: torch.Size) -> Tensor:
        """The rows on values of this shape, `(R, *shape)`."""
        size = math.prod(shape)
        plus, minus = (F.one_hot(term % (size + 1), size + 1)[:, :size] for term in (self.plus, self.minus))
        return (plus - minus).double().unflatten(1, shape)

    def at(self, values: Tensor) -> Tensor:
        """What each row is at values `(R, *shape)`, -inf where that is no number."""
        values = F.pad(values.flatten(1), (0, 1))  # NONE is the last entry, 0
        plus, minus = (values[torch.arange(len(values)), term] for term in (self.plus, self.minus))
        return (plus - minus).nan_to_num(-math.inf, -math.inf, -math.inf)

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


def about(root: Root, image: Tensor, plus: Tensor, minus: Tensor, near: Tensor, enough: float) -> Rows:
    """Rows of which only the middle of the ball is known."""
    nothing = torch.zeros(len(image), dtype=torch.float64)
    rows = Rows(plus, minus, image, nothing, nothing - math.inf, nothing.long(), near, nothing + enough)
    return replace(rows, low=rows.at(root.network(sum(root.bounds[0]) / 2)[image]))


def planted(root: Root, image: Tensor, value: Tensor, slopes: Slopes) -> Parts:
    """The whole balls of an `image` for each row as its first part, bounded by `value` with these `slopes`."""
    network = root.network
    boxes = {k: tuple(end[image] for end in root.bounds[network.place(k)]) for k in units_before(network)}
    phases = {k: torch.zeros_like(box[0], dtype=torch.float32) for k, box in boxes.items()}
    inside = Domain(image, {root.q: boxes}, {root.q: phases})
    return Parts(torch.arange(len(image)), inside, slopes, mapped(torch.clone, phases), value)


def dual(parts: Parts, q: int, like: Tensor) -> Dual:
    """The parts' slopes and multipliers, see `domains.phased`."""
    return domains.phased(parts.slopes, parts.push, parts.domains.phases[q], like)


def tightened(root: Root, rows: Rows, parts: Parts) -> tuple[Parts, Tensor]:
    """The parts with the smallest bound met on a descent, and what their `rows`, one for each, attain there."""

    def bound(at: domains.Setting, form: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        return domains.summed(at, [form], [dual(parts, root.q, form)], form.new_zeros(len(form)))

    at, form = domains.setting((root,), parts.domains), rows.forms(root.network.shapes[-1])
    rough, rough_form = at.rough(), form.float()
    parts = parts.descended(lambda tried: bound(rough, rough_form, tried)[0], STEPS)
    value, pulled = bound(at, form, parts)
    reached = rows.at(root.network(domains.farthest(at, pulled)))
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
    at, form = domains.setting((root,), parents.domains), rows[parents.row].forms(root.network.shapes[-1])
    place = domains.loosest((root,), at, [form], [dual(parents, root.q, form)])
    rows = rows.closing(parents[place.settled])
    parents, splits = parents[~place.settled], place.splits[~place.settled]
    if not len(parents.row):
        return rows, parents
    children = replace(parents.join(parents), domains=domains.halve(parents.domains, splits))
    children, reached = tightened(root, rows[children.row], children)
    low = rows.low.scatter_reduce(0, children.row, reached, "amax")
    return replace(rows, low=low, made=rows.made + torch.bincount(children.row, minlength=len(low))), children


def largest(rows: Rows, parts: Parts, busy: Tensor) -> Tensor:
    """The largest parts of each row that is `busy` `(R,)`: a quarter of them."""
    width = (torch.bincount(parts.row, minlength=len(rows.made)) // 4).clamp(min=1)
    return (domains.rank_in(parts.row, parts.value) < width[parts.row]) & busy[parts.row]


def finished(rows: Rows, parts: Parts) -> tuple[Rows, Parts]:
    """The rows after their finished parts, and the parts that are not."""
    done = parts.value <= rows.goal[parts.row]
    return rows.closing(parts[done]), parts[~done]


def search(root: Root, rows: Rows, parts: Parts, most: int, deadline: float = math.inf) -> tuple[Rows, Parts]:
    """All trees grown, each in its largest part, until a row is settled, near what it attains, or has `most` parts."""
    while True:
        rows, parts = finished(rows, parts)
        chosen = largest(rows, parts, rows.made < most)
        if not chosen.any() or time.monotonic() > deadline:
            return rows, parts
        rows, parts = grow(root, rows, parts, chosen)


def share(deadline: float, left: int) -> float:
    """When to end the first of `left` equal pieces of work, for all to end at the deadline."""
    return (now := time.monotonic()) + (deadline - now) / left


def narrowed_box(root: Root, k: int, box: Box, most: int, deadline: float) -> Box:
    """The box of node k's input with the ends of each unsettled unit as rows; `root`: what is known up to there."""
    network = root.network
    place = network.place(k)
    before = upto(root, place)
    lower, upper = (end.flatten(1).clone() for end in box)
    image, unit = network.nodes[k].operator.loose(lower, upper).nonzero().unbind(1)
    if not len(image) or not units_before(before.network) or torch.bincount(image).max() > linear.LARGE:
        return box
    near = (NEAR * (upper - lower)[image, unit]).repeat(2)
    side = torch.arange(2).repeat_interleave(len(image))
    image, unit = image.repeat(2), unit.repeat(2)
    value = torch.where(side == 0, upper[image, unit], -lower[image, unit])
    rows = about(before, image, unit.where(side == 0, NONE), unit.where(side == 1, NONE), near, 0.0)
    slopes = {j: part[image, side, unit].float() for j, part in root.slopes[k].items()}
    units = sum(math.prod(network.shapes[network.place(j)]) for j in units_before(before.network))
    pieces = torch.arange(len(image)).split(max(1, domains.ROOM // (BYTES * units * most)))
    for done, some in enumerate(pieces):
        mine = rows[some]
        parts = planted(before, mine.image, value[some], {j: part[some] for j, part in slopes.items()})
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
