"""Branch and bound for the differences z_j - z_i of each network by itself, those that decide on eq. (11).

Where the ball is so large that the joint rows gain nothing, teacher and student are better split apart: two trees of
n parts each say about the pair what one tree would only with n x n.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds import domains
from faithkd.bounds.domains import Root
from faithkd.bounds.operators import Box
from faithkd.bounds.rows import Parts, Rows, about, finished, grow, largest, planted
from faithkd.bounds.softmax import class_bounds

CLOSE = 0.002  # a difference so near to what it attains, by its size, is finished
ALIKE = 4  # trees grow together that promise a quarter of the best one's gain
NEARLY = 0.9  # a bound above this share of eq. (11) gains nothing yet from the shared input


@dataclass(frozen=True)
class Trees:
    """Trees of one network's differences, a row for each (image, i, j), and the root with what they say."""

    root: Root
    rows: Rows
    parts: Parts


def apart(odds: list[Box]) -> Tensor:
    """Eq. (11) of each order and class from the ranges of both networks' log-odds: `(N, 2, C)`."""
    confidences = (tuple(torch.sigmoid(end) for end in ends) for ends in odds)
    return (class_bounds(*confidences) + 2.0**-50).clamp(0, 1)


def most_apart(odds: list[Box], cap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value of eq. (11), but where `cap` `(N, 2, C)` is clearly below, its order and its class: `(N,)`."""
    bound = apart(odds)
    value, place = torch.where(cap < NEARLY * bound, 0.0, bound).flatten(1).max(1)
    return value, place // bound.shape[2], place % bound.shape[2]


def plant(root: Root) -> Trees:
    """No trees yet, for the largest z_j - z_i of all i and j."""
    images, classes = root.odds[0].shape
    label = torch.arange(classes)
    image = torch.arange(images).repeat_interleave(classes**2)
    i, j = (part.repeat(images) for part in (label.repeat_interleave(classes), label.repeat(classes)))
    rows = about(root, image, j, i, torch.zeros_like(image).double(), -math.inf)
    rows = replace(rows, near=CLOSE * (1 + rows.low.abs()))
    return Trees(root, rows, first_parts(root, *[image[:0]] * 3))


def first_parts(root: Root, image: Tensor, i: Tensor, j: Tensor) -> Parts:
    """The whole ball of each `image` as the first part of a row, its z_j - z_i."""
    slopes = {k: part[image, i, j].float() for k, part in root.row_slopes.items()}
    return planted(root, image, root.highest[image, i, j], slopes)


def search(
    trees: list[Trees], cap: Tensor, goal: Tensor, nodes: Tensor, deadline: float = math.inf
) -> tuple[list[Trees], Tensor]:
    """The trees grown where eq. (11) is largest, and the number of parts made for each image, a `(N,)` count.

    An image is finished when the bound of its worst order and class is at most `goal` `(N,)`, or when `nodes` `(N,)`
    are made, or where its trees fill their ROOM. A class whose `cap` `(N, 2, C)`, a bound found otherwise, is clearly
    below eq. (11) is left alone.
    """
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
    first = first_parts(root, *(column[fresh] for column in (rows.image, rows.minus, rows.plus)))
    parts = parts.join(replace(first, row=fresh))
    rows = replace(rows, made=rows.made.index_add(0, fresh, torch.ones_like(fresh)))
    rows, parts = finished(rows, parts)
    if (chosen := largest(rows, parts, wanted)).any():
        rows, parts = grow(root, rows, parts, chosen)
    highest = torch.where(rows.made > 0, rows.upper(parts), math.inf).view_as(root.highest)
    highest = torch.minimum(highest, root.highest)
    return Trees(replace(root, highest=highest, odds=domains.all_odds(highest)), rows, parts)
