"""Branch and bound on each network alone: the ranges of its log-odds, and eq. (11) from both.

Where the ball is so large that the joint rows gain nothing, teacher and student are better split apart: two trees of
n domains each say about the pair what one tree would only with n x n. No row is descended here; a domain's ranges come
from the differences z_j - z_i of one class i, with the slopes of the whole ball.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.domains import (
    BOTH,
    Domain,
    Root,
    Splits,
    Table,
    all_odds,
    ball_of,
    full,
    halve,
    lines_of,
    loosest,
    rank_in,
    rebox,
    setting,
    whole,
    with_inputs,
)
from faithkd.bounds.linear import Dual, backward
from faithkd.bounds.operators import Box
from faithkd.bounds.softmax import class_bounds

NEARLY = 0.9  # a bound above this share of eq. (11) gains nothing yet from the shared input
WIDTH = 4  # domains of one image and network that are split at once: those with the worst range


@dataclass(frozen=True)
class Tree(Table):
    """Domains of one network that cover the balls, with the range of every class's log-odds, `low` and `high` `(D, C)`,
    and all largest differences z_j - z_i, `highest` `(D, C, C)`, in each."""

    domains: Domain
    low: Tensor
    high: Tensor
    highest: Tensor


def apart(odds: tuple[Box, Box]) -> Tensor:
    """Eq. (11) of each order and class from the ranges of both networks' log-odds: `(N, 2, C)`."""
    confidences = (tuple(torch.sigmoid(end) for end in ends) for ends in odds)
    return (class_bounds(*confidences) + 2.0**-50).clamp(0, 1)


def most_apart(odds: list[Box], cap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value of eq. (11), but where `cap` `(N, 2, C)` is clearly below, its order and its class: `(N,)`."""
    bound = apart(odds)
    value, place = torch.where(cap < NEARLY * bound, 0.0, bound).flatten(1).max(1)
    return value, place // bound.shape[2], place % bound.shape[2]


def plant(root: Root) -> Tree:
    """The tree of a network before any split: every image's whole ball."""
    return Tree(replace(whole((root,)), phases={}), *(end.clone() for end in root.odds), root.highest)


def search_alone(
    roots: tuple[Root, Root], trees: list[Tree], cap: Tensor, goal: Tensor, nodes: Tensor, deadline: float = math.inf
) -> tuple[list[Tree], Tensor]:
    """The trees grown where eq. (11) is largest, and the number of domains made for each image, two `(N,)` counts.

    An image is finished when the bound of its worst order and class is at most `goal` `(N,)`, or when `nodes` `(N,)`
    are made, or where a tree fills its ROOM. A class whose `cap` `(N, 2, C)`, a bound found otherwise, is clearly below
    eq. (11) is left alone.
    """
    images = len(cap)
    made, stuck = torch.zeros(images, dtype=torch.long), torch.zeros(images, dtype=torch.bool)
    while True:
        odds = ranges(trees, images)
        value, order, label = most_apart(odds, cap)
        large = [full(tree.domains.image, images, tree) for tree in trees]
        busy = (value > goal) & (made < nodes) & ~stuck & ~large[0] & ~large[1]
        if not busy.any() or time.monotonic() > deadline:
            return trees, made
        turn = steeper(trees, odds, order, label)
        both = zip(roots, trees, strict=True)
        grown = [grow(root, tree, busy & (turn == root.q), order == root.q, label) for root, tree in both]
        trees = [tree for tree, _ in grown]
        fresh = torch.bincount(torch.cat([image for _, image in grown]), minlength=images)
        made, stuck = made + fresh, stuck | (busy & (fresh == 0))


def steeper(trees: list[Tree], odds: list, order: Tensor, label: Tensor) -> Tensor:
    """The network to split next, `(N,)`: where sig is steeper at the end of m that counts, divided by the tree's size.

    So near to 0 or 1 a network is left alone. What a tree gains is about the same each time that it doubles.
    """
    here, gains = torch.arange(len(label)), []
    for q, (tree, (low, high)) in enumerate(zip(trees, odds, strict=True)):
        end = torch.where(order == q, high[here, label], low[here, label])
        size = torch.bincount(tree.domains.image, minlength=len(label))
        gains.append(torch.sigmoid(end) * torch.sigmoid(-end) / size)
    return (gains[1] > gains[0]).long()


def ranges(trees: list[Tree], images: int) -> list[Box]:
    """The range of every class's log-odds over all domains of each image, per network."""
    return [(over(tree, tree.low, images, "amin"), over(tree, tree.high, images, "amax")) for tree in trees]


def narrowed(roots: tuple[Root, Root], trees: list[Tree]) -> tuple[Root, Root]:
    """The roots with what the trees say of the whole balls."""
    images = len(roots[0].highest)
    highest = [over(tree, tree.highest, images, "amax") for tree in trees]
    parts = zip(roots, ranges(trees, images), highest, strict=True)
    return tuple(replace(root, odds=odds, highest=high) for root, odds, high in parts)


def over(tree: Tree, column: Tensor, images: int, how: str) -> Tensor:
    """The smallest ("amin") or largest ("amax") entry of a column over the domains of each image."""
    start = torch.full((images, *column.shape[1:]), math.inf if how == "amin" else -math.inf, dtype=torch.float64)
    index = tree.domains.image.view(-1, *[1] * (column.ndim - 1)).expand_as(column)
    return start.scatter_reduce(0, index, column, how)


def grow(root: Root, tree: Tree, busy: Tensor, upper: Tensor, label: Tensor) -> tuple[Tree, Tensor]:
    """Split the domains of each busy image where m of class `label` reaches highest (`upper`) or lowest, all `(N,)`.

    Returns the tree and the images of the new domains.
    """
    image = tree.domains.image
    high, low = (torch.sigmoid(end.gather(1, label[image][:, None])[:, 0]) for end in (tree.high, tree.low))
    width = (torch.bincount(image, minlength=len(busy)) // 16).clamp(min=WIDTH)
    chosen = (rank_in(image, torch.where(upper[image], high, -low)) < width[image]) & busy[image]
    parents = tree[chosen]
    if not chosen.any():
        return tree, image[chosen]
    splits, found = where_to_split(root, parents, upper[image[chosen]], label[image[chosen]])
    chosen[chosen.clone()] = found
    if (splits.network[found] == BOTH).any():
        tree, parents = (replace(part, domains=with_inputs(root, part.domains)) for part in (tree, parents))
    parents, splits = parents[found], splits[found]
    halves = halve(parents.domains, splits)
    empty = rebox((root,), halves, splits.join(splits))
    halves = replace(parents.join(parents), domains=halves)[~empty]
    highest = differences_of(root, halves, label[halves.domains.image])
    low, high = all_odds(highest)
    halves = replace(halves, highest=highest, low=torch.maximum(halves.low, low), high=torch.minimum(halves.high, high))
    return tree[~chosen].join(halves), halves.domains.image


def differences_of(root: Root, tree: Tree, label: Tensor) -> Tensor:
    """`highest` with the differences to class `label` of each domain computed anew."""
    domains, classes = tree.domains, root.network.classes
    image = domains.image
    unit = torch.eye(classes, dtype=torch.float64)
    rows = unit - unit[label][:, None]
    slopes = {k: torch.cat([part[image, label], part[image, :, label]], 1) for k, part in root.row_slopes.items()}
    rows, box = torch.cat([rows, -rows], 1), ball_of(root, domains)
    up, down = backward(root.network, lines_of(root, domains), box, rows, slopes=slopes).chunk(2, 1)
    highest, here = tree.highest.clone(), torch.arange(len(image))
    highest[here, label] = torch.minimum(highest[here, label], up)
    highest[here, :, label] = torch.minimum(highest[here, :, label], down)
    highest[here, label, label] = 0.0
    return highest


def where_to_split(root: Root, tree: Tree, upper: Tensor, label: Tensor) -> tuple[Splits, Tensor]:
    """Where to split each domain, and whether anything is left to split there, `(D,)`.

    Judged on one row for m of class `label`: the differences weighted by what each contributes to the range's end.
    """
    here = torch.arange(len(label))
    own = F.one_hot(label, root.network.classes)
    up, down = tree.highest[here, label], tree.highest[here, :, label]
    low_weights, high_weights = (part.masked_fill(own.bool(), -math.inf).softmax(1) for part in (up, -down))
    row = torch.where(upper[:, None], own - high_weights, low_weights - own)
    domains = tree.domains
    place = loosest((root,), setting((root,), domains), [row], [Dual()])
    return place.splits, ~place.settled | place.moves
