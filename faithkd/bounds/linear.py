"""Interval arithmetic and linear bounds (CROWN, alpha-CROWN) through a whole network, in float64, rounded outwards.

`bounds` is a list of boxes: `bounds[p] = (lower, upper)`, each `(N, *shape)`, holds all that can stand at place p when
the input moves in the ball `bounds[0]`; the last box is that of the logits. `lines[k]` holds node k between two
linear functions. `pull` carries linear forms ("rows") back through all lines to the input, where `over_ball` takes
their maximum. `operators` says how rounding is accounted for.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from faithkd.bounds import patches
from faithkd.bounds.descent import Range, minimise
from faithkd.bounds.graph import Network
from faithkd.bounds.operators import TINY, Box, Lines, dot, gamma

Slopes = dict[int, Tensor]  # by node: lower slopes of its units, one set per row
BUDGET = 2**20  # numbers in the largest tensor of one pass (8 MB): what fits in a cache is also faster
LARGE = 512  # places before ReLU: past it, one pass without descent (convolutions)
STEPS = 10  # of gradient descent on the slopes; on the paper's networks more gain less than 0.1 % of the bound
RATE, FALL = 0.6, 0.9  # its first step, falling each time; slopes lie in [0, 1]
CURVED_RATE = 0.15  # of a curve's lines, which begin in the middle
LONGER = 2  # times as many steps for curves and small convolutions, which gain by them


@dataclass(frozen=True)
class Dual:
    """What may be chosen for rows: any of it gives a valid bound.

    `slopes`: below the units that are free, `(1 or N, R, *shape)` by node, of a max-pool weights over its windows.
    `push`: forms added to the rows on a node's input, `(N, R, *shape)`; they must be >= 0 on the domain.
    """

    slopes: Slopes = field(default_factory=dict)
    push: Slopes = field(default_factory=dict)


def interval(network: Network, lower: Tensor, upper: Tensor) -> list[Box]:
    """Boxes of every place by interval arithmetic alone."""
    bounds = [(lower, upper)]
    for node in network.nodes:
        bounds.append(node.operator.interval(*(bounds[place] for place in node.inputs)))
    return bounds


def pull(
    network: Network,
    lines: list[Lines],
    rows: Tensor,
    at: int | None = None,
    dual: Dual | None = None,
    to: int = 0,
    trace: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows `(1 or N, R, *shapes[at])` on the place `at` (default: the logits) as rows on the place `to`, and constants.

    The form `row . z` is nowhere above the one returned on the boxes of `lines`, whatever the `dual`. `trace`: filled
    with the rows as they are at the output of each node that can be split. Returns `(N, R, *shapes[to])` and `(N, R)`.
    """
    at, dual = len(network.nodes) if at is None else at, dual or Dual()
    waiting, total = {at: rows}, rows.new_zeros(1, 1)
    for k in reversed(range(to, at)):
        node, rows = network.nodes[k], waiting.pop(k + 1, None)
        if rows is None:
            continue  # nothing that is asked depends on it
        if trace is not None and node.operator.splits:
            trace[k] = rows
        if k == 1 and to == 0 and lines[k].noise is None and patches.patches(network):
            form, constant = patches.pull(network, lines[k], rows, dual.slopes.get(k))
            return form, total + constant
        shapes = (network.shapes[place] for place in node.inputs)
        parts, constant = node.operator.transpose(rows, lines[k], dual.slopes.get(k), *shapes)
        total = total + constant
        if lines[k].noise is not None:
            total = total + TINY * lines[k].noise.flatten(2).sum(2)
        if k in dual.push:
            parts[0] = parts[0] + dual.push[k]
        for place, part in zip(node.inputs, parts, strict=True):
            waiting[place] = waiting[place] + part if place in waiting else part
    return waiting[to], total


def over_ball(rows: Tensor, total: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Maximum of each row over the input box, row . middle + |row| . radius, plus its constant: `(N, R)`.

    Never below the exact maximum; what overflows is +inf.
    """
    return (total + Highest.apply(rows, lower, upper)).nan_to_num(math.inf, math.inf, math.inf)


class Highest(torch.autograd.Function):
    """The maximum of rows over a box; its gradient is the corner that attains it, which is cheaper than autograd's."""

    @staticmethod
    def forward(ctx, rows, lower, upper):
        ctx.save_for_backward(rows, lower, upper)
        middle = ((lower + upper) / 2).unsqueeze(1)
        radius = torch.maximum(upper.unsqueeze(1) - middle, middle - lower.unsqueeze(1))
        slack = gamma(2 * math.prod(middle.shape[1:])) * (middle.abs() + radius + TINY)
        return dot(rows, middle) + dot(rows.abs(), radius + slack) + TINY * slack.flatten(2).sum(2)

    @staticmethod
    def backward(ctx, gradient):
        rows, lower, upper = ctx.saved_tensors
        # not where(), which is many times slower than arithmetic
        corner = rows.sign().mul_((upper - lower).unsqueeze(1) / 2).add_((upper + lower).unsqueeze(1) / 2)
        return corner.mul_(gradient.view(*gradient.shape, *[1] * (rows.ndim - 2))), None, None


def backward(
    network: Network, lines: list[Lines], box: Box, rows: Tensor, at: int | None = None, slopes: Slopes | None = None
) -> Tensor:
    """Certified maximum over the ball `box` of linear forms on the place `at`: `(N, R)`, see `pull`."""
    return over_ball(*pull(network, lines, rows, at, Dual(slopes or {})), *box)


def descend(
    network: Network, lines: list[Lines], box: Box, rows: Tensor, at: int, steps: int, slopes: Slopes | None = None
) -> tuple[Tensor, Slopes]:
    """The smallest of the maxima of `backward` met on `steps` of gradient descent over the slopes, and its slopes.

    Every value on the way is certified, so nothing depends on whether the descent converges (alpha-CROWN, Xu et al.
    2021). Each row has slopes of its own, hence nothing to share and nothing to balance. `slopes`: where to start.
    """
    free = [k for k in network.before(at) if lines[k].free is not None and lines[k].free.any()] if steps else []
    if not free:
        return backward(network, lines, box, rows, at, slopes), slopes or {}
    start = {k: lines[k].start for k in free} | (slopes or {})
    now = {k: part.float().expand(*rows.shape[:2], *part.shape[2:]).clone() for k, part in start.items()}
    rough = network.single, [line.rough() for line in lines], tuple(end.float() for end in box), rows.float(), at

    def value_of(slopes: Slopes) -> Tensor:
        return backward(*rough, slopes)

    ranges = {k: Range(RATE if lines[k].many is None else CURVED_RATE, 0, 1) for k in now}
    longer = LONGER if network.small or any(lines[k].many is not None for k in now) else 1
    kept = minimise(value_of, now, longer * steps, ranges, FALL ** (1 / longer))
    kept = {k: part.double() for k, part in kept.items()}
    return backward(network, lines, box, rows, at, kept), kept


def crown(
    network: Network, lower: Tensor, upper: Tensor, steps: int = 0
) -> tuple[list[Box], list[Lines], dict[int, Slopes]]:
    """Boxes of every place, refined by backward passes before whatever is not linear.

    Zhang et al. (2018) on the relaxations of Ehlers (2017), intersected with interval arithmetic everywhere. With
    `steps`, every pass descends on slopes of its own where a layer is small enough. Returns the boxes, the lines of
    every node, and the slopes found before node k, `(N, 2, units, *shapes[j])` by k and j: upward and downward rows.
    """
    bounds, lines, slopes = [(lower, upper)], [], {}
    depth = [0]  # by place: how many operators that mix numbers stand before it
    for k, node in enumerate(network.nodes):
        operator, place = node.operator, network.place(k)
        # behind the first one that mixes, the interval is exact already
        if depth[place] > 1 and not operator.linear and network.nodes[place - 1].operator.linear:
            bounds[place], slopes[k] = refine(network, lines, bounds[0], bounds[place], k, steps)
        boxes = [bounds[place] for place in node.inputs]
        lines.append(operator.relax(*boxes))
        if steps:
            lines[k] = operator.freed(lines[k], *boxes)
        bounds.append(operator.interval(*boxes))
        depth.append(max(depth[place] for place in node.inputs) + operator.mixes)
    return bounds, lines, slopes


def refine(
    network: Network, lines: list[Lines], ball: Box, box: Box, k: int, steps: int = 0, slopes: Slopes | None = None
) -> tuple[Box, Slopes]:
    """Box of node k's input, tightened by a backward pass up and one down for each place that needs it.

    `slopes`, `(N, 2, units, *shapes[j])`: where to begin; with `steps` the ones found come back in the same form.
    """
    place, operator = network.place(k), network.nodes[k].operator
    (lower, upper), shape = (end.flatten(1).clone() for end in box), network.shapes[place]
    # each image decides for itself, so batches do not matter
    open_ = operator.loose(lower, upper)
    most = int(open_.sum(1).max()) if len(lower) else 0
    places = open_.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    steps = steps if most <= LARGE else 0
    kept, units = {}, math.prod(shape)
    for j in with_choices(network, lines).intersection(network.before(place)) if steps else ():
        kept[j] = lines[j].start.unsqueeze(1).repeat(1, 2, units, *[1] * (lines[j].start.ndim - 2))
    for here in chunks(network, places):
        unit = lower.new_zeros(*here.shape, units).scatter_(2, here.unsqueeze(2), 1.0)
        rows = torch.cat([unit, -unit], 1).unflatten(2, shape)
        start = {
            j: torch.cat([at_units(part[:, side], here) for side in (0, 1)], 1) for j, part in (slopes or {}).items()
        }
        found, used = descend(network, lines, ball, rows, place, steps, start)
        highest, lowest = found.chunk(2, 1)
        mine, low, high = (part.gather(1, here) for part in (open_, lower, upper))
        upper.scatter_(1, here, torch.where(mine, torch.minimum(high, highest), high))
        lower.scatter_(1, here, torch.where(mine, torch.maximum(low, -lowest), low))
        for j in kept.keys() & used.keys():
            for side, part in enumerate(used[j].chunk(2, 1)):
                index = here.view(*here.shape, *[1] * (part.ndim - 2)).expand_as(part)
                kept[j][:, side].scatter_(1, index, part)
    return (lower.view_as(box[0]), upper.view_as(box[1])), kept


def with_choices(network: Network, lines: list[Lines]) -> set[int]:
    """The nodes whose choices are kept for later: ReLUs and curves, not the many weights of max-pools."""
    return {k for k, line in enumerate(lines) if k in network.splits or line.many is not None}


def at_units(values: Tensor, here: Tensor) -> Tensor:
    """Entries of `values` `(N, units, ...)` at the units `here` `(N, m)` of each image."""
    return values.gather(1, here.view(*here.shape, *[1] * (values.ndim - 2)).expand(*here.shape, *values.shape[2:]))


def chunks(network: Network, places: Tensor) -> tuple[Tensor, ...]:
    """The columns of `places` `(N, m)` in pieces whose backward passes, one up and one down each, fit in BUDGET."""
    return places.split(max(1, BUDGET // (2 * max(len(places), 1) * widest(network))), dim=1) if places.numel() else ()


def image_chunks(networks: tuple[Network, ...], images: int) -> tuple[Tensor, ...]:
    """Image numbers 0 .. `images` - 1 in pieces whose difference rows take some 16 MB a layer, all at once."""
    largest_pass = max(net.classes * (net.classes - 1) * widest(net) for net in networks)
    return torch.arange(images).split(max(1, 2 * BUDGET // largest_pass)) if images else ()


def widest(network: Network) -> int:
    """Numbers at the largest place, the input included."""
    return max(math.prod(shape) for shape in network.shapes)


def difference_pairs(classes: int, numbers: Tensor | None = None) -> Tensor:
    """The places (i, j) of the C(C-1) differences z_j - z_i, or of those with these numbers: `(..., 2)`."""
    numbers = torch.arange(classes * (classes - 1)) if numbers is None else numbers
    i, j = numbers // (classes - 1), numbers % (classes - 1)
    return torch.stack([i, j + (j >= i)], 1)


def difference_rows(classes: int, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows z_j - z_i on the logits, `(..., C)`, and their places (i, j), as in `difference_pairs`.

    All C(C-1) of them take C^3 numbers, 8 GB for 1,000 classes.
    """
    pairs = difference_pairs(classes, numbers)
    rows = torch.zeros(len(pairs), classes, dtype=torch.float64)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(len(pairs), 2)
    return rows.scatter_(1, pairs, signs), pairs


def as_matrix(values: Tensor, pairs: Tensor, classes: int) -> Tensor:
    """Maxima of the difference rows `(N, C(C-1))` as `(N, C, C)`: entry (i, j) bounds z_j - z_i above.

    Minima need no rows of their own: min (z_j - z_i) = -max (z_i - z_j).
    """
    matrix = values.new_zeros(len(values), classes, classes)
    matrix[:, pairs[:, 0], pairs[:, 1]] = values
    return matrix


def box_differences(lower: Tensor, upper: Tensor) -> Tensor:
    """Largest z_j - z_i over a box of logits, eq. (9): `(N, C)` twice to `(N, C, C)` at (i, j)."""
    highest = upper.unsqueeze(1) - lower.unsqueeze(2)
    highest = torch.nextafter(highest, torch.full_like(highest, math.inf)).nan_to_num(math.inf, math.inf, math.inf)
    return highest.masked_fill(torch.eye(lower.shape[1], dtype=torch.bool, device=lower.device), 0.0)


def row_differences(
    network: Network, lines: list[Lines], bounds: list[Box], steps: int = 0, slopes: Slopes | None = None
) -> tuple[Tensor, Slopes]:
    """Largest z_j - z_i, each bounded as one row and never above the logits' box: `(N, C, C)` at (i, j).

    With `steps` by descent from `slopes`, `(1 or N, C(C-1), *shapes[k])`; the ones found come back.
    """
    pairs = difference_pairs(network.classes)
    n, last = len(bounds[0][0]), len(network.nodes)
    found, used = [], []
    for chunk in torch.arange(len(pairs)).split(max(1, BUDGET // (max(n, 1) * widest(network)))):
        mine = {k: part[:, chunk] for k, part in (slopes or {}).items()}
        rows, _ = difference_rows(network.classes, chunk)
        value, kept = descend(network, lines, bounds[0], rows.expand(n, -1, -1), last, steps, mine)
        found.append(value)
        used.append(kept)
    slopes = {k: torch.cat([part[k] for part in used], 1) for k in used[0]}
    matrix = as_matrix(torch.cat(found, 1), pairs, network.classes)
    return torch.minimum(matrix, box_differences(*bounds[-1])), slopes
