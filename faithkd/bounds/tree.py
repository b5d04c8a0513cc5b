"""Parts of a ball on which some ReLUs are known to be on or off: what all searches, `apart` and `branch`, stand on.

A table of domains is a dictionary of columns, one entry per domain: `image` and, for ReLU layer k of network q (0: the
teacher, 1: the student), `low.q.k` and `high.q.k`, the box of its input, each `(D, *shape)`. Splitting a ReLU makes two
domains which together cover the first; the boxes of all later layers are then computed anew. Where no ReLU is left, the
input is halved instead, as "layer 0 of network BOTH", so that a search converges on whatever is still loose.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from faithkd.bounds.joint import Table, join, log_odds_range, pick
from faithkd.bounds.linear import (
    STEPS,
    Box,
    Lines,
    Slopes,
    allowed,
    crown,
    difference_rows,
    refine,
    relax,
    row_differences,
)
from faithkd.bounds.network import Network, forward

LATER = 2.0  # a split one ReLU layer further from the logits counts that much more: it tightens all layers behind
BOTH, INPUT = -1, "-1.0"  # the network and the columns of a split of the input, which both networks share
SPREAD = 1.0  # weight of a unit's whole triangle in its score, beside the gap at the worst point


@dataclass(frozen=True)
class Root:
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

    @property
    def relus(self) -> list[int]:
        return [k for k, layer in enumerate(self.network.layers) if isinstance(layer, nn.ReLU)]


def at_images(root: Root, some: Tensor) -> Root:
    """The root of some of its images."""

    def part(tree):
        if isinstance(tree, dict):
            return {name: part(entry) for name, entry in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(part(entry) for entry in tree)
        return None if tree is None else tree[some]

    columns = ("bounds", "lines", "slopes", "highest", "row_slopes", "odds")
    return replace(root, **{name: part(getattr(root, name)) for name in columns})


def root(network: Network, q: int, lower: Tensor, upper: Tensor, steps: int = STEPS) -> Root:
    """alpha-CROWN of one network on each ball: the root of every tree, and a bound by itself."""
    bounds, lines, slopes = crown(network, lower, upper, steps)
    highest, found = row_differences(network, lines, bounds, steps)
    classes, (_, pairs) = network.classes, difference_rows(network.classes)
    row_slopes = {}
    for k, line in enumerate(lines):
        if isinstance(network.layers[k], nn.ReLU):
            part = line.below.unsqueeze(1).repeat(1, classes, classes, *[1] * (line.below.ndim - 2))
            if k in found:
                part[:, pairs[:, 0], pairs[:, 1]] = found[k]
            row_slopes[k] = part
    return Root(network, q, bounds, lines, slopes, highest, row_slopes, all_odds(highest))


def all_odds(highest: Tensor) -> Box:
    """Range of the log-odds of every class, `(N, C)` twice, from the largest differences `(N, C, C)`."""
    images, classes = highest.shape[:2]
    label = torch.arange(classes).repeat(images)
    return tuple(end.view(images, classes) for end in log_odds_range(highest.repeat_interleave(classes, 0), label))


def run(network: Network, z: Tensor) -> Tensor:
    """The network's logits, layer by layer as the bounds understand them."""
    for layer in network.layers:
        z = forward(layer, z)
    return z


def whole(roots: tuple[Root, ...]) -> Table:
    """One domain per image: its whole ball."""
    domains = {"image": torch.arange(len(roots[0].highest))}
    for root in roots:
        for k in root.relus:
            domains[f"low.{root.q}.{k}"], domains[f"high.{root.q}.{k}"] = (end.clone() for end in root.bounds[k])
    return domains


def lines_of(root: Root, domains: Table, upto: int | None = None) -> list[Lines | None]:
    """Lines of each layer on the domains: ReLUs from their boxes, all others as on the whole ball."""
    lines = []
    for k, line in enumerate(root.lines[:upto]):
        if k in root.relus:
            box = domains[f"low.{root.q}.{k}"], domains[f"high.{root.q}.{k}"]
            lines.append(relax(root.network.layers[k], *box))
        else:
            lines.append(None if line is None else line[domains["image"]])
    return lines


def ball_of(root: Root, domains: Table) -> Box:
    """The input boxes of the domains: the balls of their images, or parts of these."""
    if f"low.{INPUT}" in domains:
        return domains[f"low.{INPUT}"], domains[f"high.{INPUT}"]
    return tuple(end[domains["image"]] for end in root.bounds[0])


def with_inputs(root: Root, domains: Table) -> Table:
    """The domains with columns for their input boxes, which only a split of the input needs: they are large."""
    low, high = ball_of(root, domains)
    return domains | {f"low.{INPUT}": low, f"high.{INPUT}": high}


def widest_input(forms: list[Tensor], box: Box) -> tuple[Tensor, Tensor]:
    """The input along which forms `(B, *image)` change most in their box, and whether any does, two `(B,)`."""
    change = sum(form.abs() for form in forms) * (box[1] - box[0])
    most, unit = change.flatten(1).max(1)
    return unit, most > 0


def logit_size(roots: tuple[Root, ...], image: Tensor) -> Tensor:
    """The largest absolute logit of either network on the image's ball."""
    return torch.stack([end.abs().amax(1) for root in roots for end in root.bounds[-1]]).amax(0)[image]


def rank_in(group: Tensor, value: Tensor) -> Tensor:
    """Place of each value among those of its group, 0 for the largest."""
    order = value.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group)
    before = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - before[group[order]]
    return rank


def loose_units(
    root: Root, lines: list[Lines], slopes: Slopes, trace: Slopes, x: Tensor
) -> tuple[Slopes, Slopes, Tensor]:
    """By ReLU layer: how much each unit's lines lose at x, and its score, `(B, units)`; and the lines' logits at x."""
    gaps, scores = {}, {}
    z, relus = x, root.relus
    for k, layer in enumerate(root.network.layers):
        if k not in relus:
            z = forward(layer, z)
            continue
        line, row = lines[k], trace[k][:, 0]
        below = allowed(slopes.get(k), line)[:, 0]
        up = line.above[:, 0] * z + line.shift[:, 0]
        y = torch.where(row > 0, up, below * z)
        free = line.free[:, 0]
        gap = (row * (y - z.clamp(min=0))).clamp(min=0) * free
        spread = torch.where(row > 0, row * line.shift[:, 0], 0.0) * free
        gaps[k] = gap.flatten(1)
        weight = LATER ** (len(relus) - relus.index(k))
        scores[k] = torch.where(free, weight * (gap + SPREAD * spread + 1e-12), 0.0).flatten(1)
        z = y
    return gaps, scores, z


def halve_domains(domains: Table, network: Tensor, layer: Tensor, unit: Tensor) -> Table:
    """Both halves of each domain, all first ones (the unit is on) before all second ones (it is off).

    Of the input ("layer 0 of network BOTH"): the upper half before the lower one; both hold the middle.
    """
    count, here = len(unit), torch.arange(len(unit))
    halves, cut = join(domains, domains), torch.zeros(len(unit), dtype=torch.float64)
    if (network == BOTH).any():
        low, high = (domains[f"{end}.{INPUT}"].flatten(1) for end in ("low", "high"))
        middle = (low + high)[here, unit.clamp(max=low.shape[1] - 1)] / 2
        cut = torch.where(network == BOTH, middle, cut)
    for name in domains:
        if name == "image":
            continue
        what, q, k = name.split(".")
        hit = ((network == int(q)) & (layer == int(k))).nonzero()[:, 0]
        column = halves[name].flatten(1)
        if what == "low":
            column[hit, unit[hit]] = torch.maximum(column[hit, unit[hit]], cut[hit])
        elif what == "high":
            column[hit + count, unit[hit]] = torch.minimum(column[hit + count, unit[hit]], cut[hit])
        else:
            column[hit, unit[hit]], column[hit + count, unit[hit]] = 1.0, -1.0
    return halves


def meet(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ends in order, and which entries are empty: only where they cross by more than any rounding."""
    empty = low > high + 1e-9 * (1 + low.abs() + high.abs())
    return torch.minimum(low, high), torch.maximum(low, high), empty


def rebox(roots: tuple[Root, ...], domains: Table, network: Tensor, layer: Tensor) -> tuple[Table, Tensor]:
    """Boxes behind what was split, computed anew with the slopes of the whole ball; and which domains are empty."""
    empty = torch.zeros(len(network), dtype=torch.bool)
    for root in roots:
        for k in root.relus:
            # behind the first affine layer a box is exact until the input is split
            behind = (network == root.q) & (layer < k) & (k in root.slopes)
            hit = ((network == BOTH) | behind).nonzero()[:, 0]
            if not len(hit):
                continue
            mine = pick(domains, hit)
            box = mine[f"low.{root.q}.{k}"], mine[f"high.{root.q}.{k}"]
            slopes = {j: part[mine["image"]] for j, part in root.slopes.get(k, {}).items()}
            lines = lines_of(root, mine, upto=k)
            box, _ = refine(root.network, lines, ball_of(root, mine), box, k, slopes=slopes)
            low, high, gone = meet(*box)
            domains[f"low.{root.q}.{k}"][hit], domains[f"high.{root.q}.{k}"][hit] = low, high
            empty[hit] |= gone.flatten(1).any(1)
    return domains, empty
