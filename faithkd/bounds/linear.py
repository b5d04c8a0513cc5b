"""Interval arithmetic and linear bounds (CROWN, alpha-CROWN) through a whole network, in float64, rounded outwards.

`bounds` is a list of boxes: `bounds[k] = (lower, upper)`, each `(N, *shape)`, holds everything that can reach
layer k when the input moves in the ball `bounds[0]`; the last box is that of the logits. `lines[k]` holds two
linear functions, one above and one below layer k on that box. `pull` carries linear forms ("rows") back through
all lines to the input, where `over_ball` takes their maximum.

Rounding. A sum of n products, in whatever order, is off by at most gamma(n) times the sum of the absolute
values. So every step below adds that much to the bound: gamma times |row| . size, where `size` bounds the
absolute terms that the layer sums up over its certified input box. What is certified is the network as a
function of real numbers with exactly these weights; a float32 evaluation of it has its own rounding on top.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faithkd.bounds import patches
from faithkd.bounds.network import AFFINE, Network, affine, single, transpose, windows

Box = tuple[Tensor, Tensor]
Slopes = dict[int, Tensor]  # by layer: lower slopes of its units, one set per row
RELAXED = (nn.ReLU, nn.MaxPool2d)  # what is not linear
BUDGET = 2**20  # numbers in the largest tensor of one pass (8 MB): what fits in a cache is also faster
LARGE = 512  # places of a layer before ReLU: past it, one pass without descent (convolutions)
STEPS = 10  # of gradient descent on the slopes; on the paper's networks more gain less than 0.1 % of the bound
RATE, FALL = 0.6, 0.8  # its first step, falling each time; slopes lie in [0, 1]


def gamma(terms: int) -> float:
    """Relative rounding error of a float64 sum of `terms` products, doubled to cover its own evaluation."""
    return 2 * (terms + 16) * 2.0**-53


def interval(network: Network, lower: Tensor, upper: Tensor) -> list[Box]:
    """Boxes of every layer's input and of the logits by interval arithmetic alone."""
    bounds = [(lower, upper)]
    for layer in network.layers:
        bounds.append(interval_step(layer, *bounds[-1]))
    return bounds


def interval_step(layer: nn.Module, lower: Tensor, upper: Tensor) -> Box:
    """Box of one layer's output from the box of its input; what overflows becomes (-inf, inf)."""
    if not isinstance(layer, AFFINE):  # ReLU, max-pooling and flatten grow with their inputs: end goes to end
        return layer(lower), layer(upper)
    middle = (lower + upper) / 2
    radius = torch.maximum(upper - middle, middle - lower)
    slack = gamma(layer.weight[0].numel()) * absolute(layer, largest(lower, upper))
    radius = affine(layer, radius, layer.weight.abs(), None) + slack
    middle = affine(layer, middle, layer.weight, layer.bias)
    lower = (middle - radius).nan_to_num(-math.inf, -math.inf, -math.inf)
    return lower, (middle + radius).nan_to_num(math.inf, math.inf, math.inf)


def largest(lower: Tensor, upper: Tensor) -> Tensor:
    """Largest absolute value in a box."""
    return torch.maximum(lower.abs(), upper.abs())


def absolute(layer: nn.Module, size: Tensor) -> Tensor:
    """Sum of the absolute terms that an affine layer adds up for inputs no larger than `size`."""
    return affine(layer, size, layer.weight.abs(), None if layer.bias is None else layer.bias.abs())


@dataclass(frozen=True)
class Lines:
    """Two linear functions that hold a layer on a box: below . z <= layer(z) <= above . z + shift.

    `noise` covers the rounding of either, per output. All start `(N, 1, ...)`, to be used for every row. A slope
    below may be replaced by any in [0, 1] where `free`; of a max-pool, slopes are weights over the window,
    `(N, 1, channels, window, outputs)`. An affine layer is its own line and has `noise` only.
    """

    noise: Tensor | None
    shift: Tensor | None = None
    above: Tensor | None = None
    below: Tensor | None = None
    free: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "Lines":
        return Lines(*(None if part is None else part[index] for part in vars(self).values()))

    def rough(self) -> "Lines":
        """The same in float32 and without noise: for looking around, never for a bound."""
        parts = (self.shift, self.above, self.below)
        return Lines(None, *(None if part is None else part.float() for part in parts), self.free)


def relax(layer: nn.Module, lower: Tensor, upper: Tensor) -> Lines | None:
    """Lines of one layer on the box of its input; None for a layer that computes nothing."""
    if isinstance(layer, nn.Flatten):
        return None
    size = largest(lower, upper)
    if isinstance(layer, AFFINE):
        terms = absolute(layer, size)
        return Lines((gamma(layer.weight.numel() + math.prod(terms.shape[1:])) * terms).unsqueeze(1))
    if isinstance(layer, nn.MaxPool2d):
        return relax_pool(layer, lower, upper)
    slope, shift, below = relu_lines(lower, upper)
    # every term of either line is at most 2 max|z|, and its coefficients carry a few roundings
    noise = gamma(math.prod(lower.shape[1:])) * 2 * size
    free = (lower < 0) & (upper > 0)
    return Lines(*(part.unsqueeze(1) for part in (noise, shift + noise, slope, below, free)))


def relu_lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ehlers' triangle, relu(z) <= slope z + shift on [lower, upper], and CROWN's lower slope, 0 or 1.

    Units that are always on have slope 1, those always off have slope 0, above and below, and no shift.
    """
    unsettled = (lower < 0) & (upper > 0)
    on = (lower >= 0).double()
    slope = torch.where(unsettled, upper / (upper - lower), on)
    shift = torch.where(unsettled, -slope * lower, 0.0)
    below = torch.where(unsettled, (upper > -lower).double(), on)
    return slope, shift, below


def window_boxes(pool: nn.MaxPool2d, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of the inputs in each window, `(N, channels, window, outputs)` twice; -inf where there is padding."""
    places = windows(pool, tuple(lower.shape[1:]))
    return tuple(end.flatten(2)[:, :, places.clamp(min=0)].masked_fill(places < 0, -math.inf) for end in (lower, upper))


def pool_lines(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max(z) <= slope z_i + shift with i the input of largest upper end u_i: its place `(N, channels, 1, outputs)`,
    slope and shift `(N, channels, outputs)`, from the boxes of `window_boxes`.

    Let m be the second largest upper end. Then max(z) <= max(z_i, m), which is convex in z_i, so its chord on [l_i,
    u_i] is above it: never above u_i, the paper's interval rule (§4.2), and exact where l_i >= m.
    """
    best = high.argmax(2, keepdim=True)
    first, low_first = high.gather(2, best).squeeze(2), low.gather(2, best).squeeze(2)
    second = high.scatter(2, best, -math.inf).amax(2)
    decided = low_first >= second
    slope = torch.where(decided, 1.0, (first - second) / (first - low_first))
    return best, slope, torch.where(decided, 0.0, second - slope * low_first)


def relax_pool(pool: nn.MaxPool2d, lower: Tensor, upper: Tensor) -> Lines:
    """Lines of a max-pool: the chord of `pool_lines` above, the input with the largest lower end below."""
    low, high = window_boxes(pool, lower, upper)
    best, slope, shift = pool_lines(low, high)
    decided = (slope == 1).unsqueeze(2)
    under = torch.where(decided, best, low.argmax(2, keepdim=True))
    above = torch.zeros_like(low).scatter_(2, best, slope.unsqueeze(2))
    below = torch.zeros_like(low).scatter_(2, under, 1.0)
    size = F.max_pool2d(largest(lower, upper), pool.kernel_size, pool.stride, pool.padding, pool.dilation).flatten(2)
    noise = gamma(math.prod(low.shape[1:])) * 4 * size
    free = ~decided & (high > -math.inf)
    return Lines(*(part.unsqueeze(1) for part in (noise, shift + noise, above, below, free)))


def through_pool(pool: nn.MaxPool2d, line: Lines, rows: Tensor, weights: Tensor | None, shape: tuple) -> Tensor:
    """Rows on a max-pool's output as rows on its input: each spread over its window."""
    places = windows(pool, shape)
    below = line.below if weights is None else mixture(weights, line)
    positive = rows.clamp(min=0)
    spread = positive.unsqueeze(3) * line.above + (rows - positive).unsqueeze(3) * below
    flat = torch.zeros(*rows.shape[:3], shape[1] * shape[2], dtype=rows.dtype)
    index = places.clamp(min=0).flatten().expand(*rows.shape[:3], -1)
    return flat.scatter_add(3, index, spread.flatten(3)).unflatten(3, shape[1:])


def allowed(slopes: Tensor | None, line: Lines) -> Tensor:
    """Slopes below a ReLU: the given ones in [0, 1] where the unit is free, elsewhere the line's own."""
    # not clamp(), whose gradient vanishes at 0 and 1, where every descent begins
    return line.below if slopes is None else torch.where(line.free & (slopes >= 0) & (slopes <= 1), slopes, line.below)


def mixture(weights: Tensor, line: Lines) -> Tensor:
    """Weights >= 0 of sum 1 over each window; where they vanish or are not free, the line's own."""
    weights = torch.where(line.free & (weights >= 0), weights, 0.0)
    total = weights.sum(3, keepdim=True)
    usable = line.free.any(3, keepdim=True) & (total > 1e-6)
    return torch.where(usable, weights / total.clamp(min=1e-6), line.below)


def dot(rows: Tensor, values: Tensor) -> Tensor:
    """Sum of `rows` `(N, R, ...)` times `values` `(1 or N, 1, ...)`: `(N, R)`."""
    return (rows.flatten(2) @ values.flatten(2).transpose(1, 2)).squeeze(2)


def pull(
    network: Network,
    lines: list[Lines],
    rows: Tensor,
    at: int | None = None,
    slopes: Slopes | None = None,
    push: Slopes | None = None,
    trace: dict[int, Tensor] | None = None,
    to: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rows on the input of layer `at` (default: on the logits) as rows on the network's input, and constants.

    The form `row . z` is nowhere above the one returned on the boxes of `lines`, for any `slopes` of the units that
    are free: `(1 or N, R, *shapes[k])` by layer k, of a max-pool weights over its windows. `push`: forms added to the
    rows at the input of layer k, a ReLU or max-pool, `(N, R, *shapes[k])`; they must be >= 0 on the domain.
    `trace`: filled with the rows as they are at the output of each ReLU layer.
    `rows`: `(1 or N, R, *shapes[at])`. Returns `(N, R, *shapes[0])` and `(N, R)`.
    """
    at = len(network.layers) if at is None else at
    slopes, push = slopes or {}, push or {}
    total = torch.zeros(1, 1, dtype=rows.dtype)
    for k in reversed(range(to, at)):
        layer, line, shape = network.layers[k], lines[k], network.shapes[k]
        if isinstance(layer, nn.Flatten):
            rows = rows.unflatten(2, shape)
        elif isinstance(layer, AFFINE):
            if line.noise is not None:
                total = total + dot(rows.abs(), line.noise)
            if layer.bias is not None:
                total = total + (rows if rows.ndim == 3 else rows.flatten(3).sum(3)) @ layer.bias
            rows = transpose(layer, rows.flatten(0, 1), shape).unflatten(0, rows.shape[:2])
        elif isinstance(layer, nn.ReLU):
            if trace is not None:
                trace[k] = rows
            positive = rows.clamp(min=0)
            negative = rows - positive
            total = total + dot(positive, line.shift)
            if line.noise is not None:
                total = total - dot(negative, line.noise)
            rows = positive * line.above + negative * allowed(slopes.get(k), line)
        else:
            rows = rows.flatten(3)
            total = total + dot(rows.clamp(min=0), line.shift)
            if line.noise is not None:
                total = total - dot(rows.clamp(max=0), line.noise)
            rows = through_pool(layer, line, rows, slopes.get(k), shape)
        if k in push:
            rows = rows + push[k]
    return rows, total


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
        slack = gamma(2 * math.prod(middle.shape[1:])) * (middle.abs() + radius)
        return dot(rows, middle) + dot(rows.abs(), radius + slack)

    @staticmethod
    def backward(ctx, gradient):
        rows, lower, upper = ctx.saved_tensors
        corner = torch.where(rows > 0, upper.unsqueeze(1), lower.unsqueeze(1))
        return corner.mul_(gradient.view(*gradient.shape, *[1] * (rows.ndim - 2))), None, None


def backward(
    network: Network, lines: list[Lines], box: Box, rows: Tensor, at: int | None = None, slopes: Slopes | None = None
) -> Tensor:
    """Certified maximum over the ball `box` of linear forms on the input of layer `at`: `(N, R)`, see `pull`."""
    cut = patches.patches(network)
    if cut is None or (at is not None and at < 2):
        return over_ball(*pull(network, lines, rows, at, slopes), *box)
    rows, total = pull(network, lines, rows, at, slopes, to=2)
    total = total + over_patches(network, cut, lines[1], box, rows, (slopes or {}).get(1))
    return total.nan_to_num(math.inf, math.inf, math.inf)


def over_patches(
    network: Network, cut: patches.Patches, line: Lines, box: Box, rows: Tensor, weights: Tensor | None
) -> Tensor:
    """Certified maximum over the ball of rows on the first max-pool's output: `(N, R, *shapes[2])` to `(N, R)`.

    `pull` through the two layers before it and `over_ball` in one. `line`: the pool's; `weights`: its slopes.
    """
    conv, pool = network.layers[:2]
    lower, upper = box
    middle = (lower + upper) / 2
    radius = torch.maximum(upper - middle, middle - lower)
    places = windows(pool, network.shapes[1])
    at_middle = affine(conv, middle, conv.weight, conv.bias).flatten(2)[:, :, places]
    columns = rows.flatten(3).permute(0, 2, 3, 1).contiguous()  # `(N, channels, places, R)`
    positive = columns.clamp(min=0)
    negative = columns - positive
    below = line.below[:, 0].unsqueeze(-1) if weights is None else mixture(weights, line).permute(0, 2, 3, 4, 1)
    spread = positive.unsqueeze(2) * line.above[:, 0].unsqueeze(-1)
    spread = torch.addcmul(spread, negative.unsqueeze(2), below)
    value = patches.maximum(cut, spread, at_middle, patches.cut(cut, radius))
    up, down = line.shift[:, 0], None if line.noise is None else line.noise[:, 0]
    if down is not None:
        # the coefficients in a window add up to no more than the row's there, so its largest noise covers them all
        noise = gamma(patches.terms(cut)) * absolute(conv, largest(lower, upper)).flatten(2)[:, :, places].amax(2)
        up, down = up + noise, down + noise
        value = value - (down.flatten(1).unsqueeze(1) @ negative.flatten(1, 2)).squeeze(1)
    return value + (up.flatten(1).unsqueeze(1) @ positive.flatten(1, 2)).squeeze(1)


def descend(
    network: Network, lines: list[Lines], box: Box, rows: Tensor, at: int, steps: int, slopes: Slopes | None = None
) -> tuple[Tensor, Slopes]:
    """The smallest of the maxima of `backward` met on `steps` of gradient descent over the slopes, and its slopes.

    Every value on the way is certified, so nothing depends on whether the descent converges (alpha-CROWN, Xu et al.
    2021). Each row has slopes of its own, hence nothing to share and nothing to balance. `slopes`: where to start.
    """
    free = [k for k in range(at) if isinstance(network.layers[k], RELAXED) and lines[k].free.any()]
    if not steps or not free:
        return backward(network, lines, box, rows, at, slopes), slopes or {}
    start = {k: lines[k].below for k in free} | (slopes or {})
    now = {k: part.float().expand(*rows.shape[:2], *part.shape[2:]).clone() for k, part in start.items()}
    rough, rough_lines = single(network), [None if line is None else line.rough() for line in lines]
    rough_box, rough_rows = tuple(end.float() for end in box), rows.float()
    value = torch.full(rows.shape[:2], math.inf)
    kept = {k: part.clone() for k, part in now.items()}
    adam = Adam(list(now.values()))
    for step in range(steps + 1):
        for part in now.values():
            part.requires_grad_(step < steps)
        with torch.enable_grad():
            found = backward(rough, rough_lines, rough_box, rough_rows, at, now)
            if step < steps:
                gradients = torch.autograd.grad(found[found.isfinite()].sum(), list(now.values()))
        value = keep_better(value, found.detach(), kept, now)
        if step < steps:
            adam.step([part.nan_to_num(0.0) for part in gradients], [RATE * FALL**step] * len(now))
            for part in now.values():
                part.clamp_(0, 1)
    kept = {k: part.double() for k, part in kept.items()}
    return backward(network, lines, box, rows, at, kept), kept


def keep_better(value: Tensor, found: Tensor, kept: dict, now: dict) -> Tensor:
    """The smaller of both values; where that is `found`, the entries of `kept` become those of `now`."""
    better = found < value
    for name, part in now.items():
        kept[name][better] = part.detach()[better]
    return torch.where(better, found, value)


class Adam:
    """Kingma & Ba (2015) in place. Not torch.optim's, whose import takes longer than a student's first bound."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.count = parameters, 0
        self.moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in parameters]

    def step(self, gradients: list[Tensor], rates: list[float]) -> None:
        self.count += 1
        for part, gradient, rate, (first, second) in zip(self.parameters, gradients, rates, self.moments, strict=True):
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            size = (second / (1 - 0.999**self.count)).sqrt_().add_(1e-12)
            part.detach_().addcdiv_(first, size, value=-rate / (1 - 0.9**self.count))


def crown(
    network: Network, lower: Tensor, upper: Tensor, steps: int = 0
) -> tuple[list[Box], list[Lines], dict[int, Slopes]]:
    """Boxes of every layer's input and of the logits, refined by backward passes before ReLU and max-pool.

    Zhang et al. (2018) on the relaxations of Ehlers (2017), intersected with interval arithmetic everywhere. With
    `steps`, every pass descends on slopes of its own where a layer is small enough. Returns the boxes, the lines of
    every layer, and the slopes found before layer k, `(N, 2, units, *shapes[j])` by k and j: upward and downward rows.
    """
    bounds, lines, slopes = [(lower, upper)], [], {}
    seen = 0  # affine layers so far
    for k, layer in enumerate(network.layers):
        # behind the first affine layer the interval is exact already
        if seen > 1 and isinstance(layer, RELAXED) and isinstance(network.layers[k - 1], AFFINE):
            bounds[k], slopes[k] = refine(network, lines, bounds[0], bounds[k], k, steps)
        lines.append(relax(layer, *bounds[k]))
        bounds.append(interval_step(layer, *bounds[k]))
        seen += isinstance(layer, AFFINE)
    return bounds, lines, slopes


def refine(
    network: Network, lines: list[Lines], ball: Box, box: Box, k: int, steps: int = 0, slopes: Slopes | None = None
) -> tuple[Box, Slopes]:
    """Box of layer k's input, tightened by a backward pass up and one down for each place that needs it.

    `slopes`, `(N, 2, units, *shapes[j])`: where to begin; with `steps` the ones found come back in the same form.
    """
    (lower, upper), shape = (end.flatten(1).clone() for end in box), network.shapes[k]
    # a ReLU that is settled is exact; each image decides for itself, so batches do not matter
    every = torch.ones_like(lower, dtype=torch.bool)
    open_ = (lower < 0) & (upper > 0) if isinstance(network.layers[k], nn.ReLU) else every
    most = int(open_.sum(1).max()) if len(lower) else 0
    places = open_.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    steps = steps if most <= LARGE else 0
    kept = {}
    if steps:
        relus = [j for j in range(k) if isinstance(network.layers[j], nn.ReLU)]
        kept = {
            j: lines[j].below.unsqueeze(1).repeat(1, 2, math.prod(shape), *[1] * (lines[j].below.ndim - 2))
            for j in relus
        }
    for here in chunks(network, places):
        unit = torch.zeros(*here.shape, math.prod(shape), dtype=torch.float64).scatter_(2, here.unsqueeze(2), 1.0)
        rows = torch.cat([unit, -unit], 1).unflatten(2, shape)
        start = {
            j: torch.cat([at_units(part[:, side], here) for side in (0, 1)], 1) for j, part in (slopes or {}).items()
        }
        found, used = descend(network, lines, ball, rows, k, steps, start)
        highest, lowest = found.chunk(2, 1)
        mine, low, high = (part.gather(1, here) for part in (open_, lower, upper))
        upper.scatter_(1, here, torch.where(mine, torch.minimum(high, highest), high))
        lower.scatter_(1, here, torch.where(mine, torch.maximum(low, -lowest), low))
        for j in kept.keys() & used.keys():
            for side, part in enumerate(used[j].chunk(2, 1)):
                index = here.view(*here.shape, *[1] * (part.ndim - 2)).expand_as(part)
                kept[j][:, side].scatter_(1, index, part)
    return (lower.view_as(box[0]), upper.view_as(box[1])), kept


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
    """Numbers in the largest layer, the input included."""
    return max(math.prod(shape) for shape in network.shapes)


def difference_rows(classes: int) -> tuple[Tensor, Tensor]:
    """The C(C-1) rows z_j - z_i on the logits, `(C(C-1), C)`, and their places (i, j), `(C(C-1), 2)`."""
    pairs = (~torch.eye(classes, dtype=torch.bool)).nonzero()
    unit = torch.eye(classes, dtype=torch.float64)
    return unit[pairs[:, 1]] - unit[pairs[:, 0]], pairs


def as_matrix(values: Tensor, pairs: Tensor, classes: int) -> Tensor:
    """Maxima of the difference rows `(N, C(C-1))` as `(N, C, C)`: entry (i, j) bounds z_j - z_i above.

    Minima need no rows of their own: min (z_j - z_i) = -max (z_i - z_j).
    """
    matrix = torch.zeros(len(values), classes, classes, dtype=torch.float64)
    matrix[:, pairs[:, 0], pairs[:, 1]] = values
    return matrix


def box_differences(lower: Tensor, upper: Tensor) -> Tensor:
    """Largest z_j - z_i over a box of logits, eq. (9): `(N, C)` twice to `(N, C, C)` at (i, j)."""
    highest = upper.unsqueeze(1) - lower.unsqueeze(2)
    highest = torch.nextafter(highest, torch.full_like(highest, math.inf)).nan_to_num(math.inf, math.inf, math.inf)
    return highest.masked_fill(torch.eye(lower.shape[1], dtype=torch.bool), 0.0)


def row_differences(
    network: Network, lines: list[Lines], bounds: list[Box], steps: int = 0, slopes: Slopes | None = None
) -> tuple[Tensor, Slopes]:
    """Largest z_j - z_i, each bounded as one row and never above the logits' box: `(N, C, C)` at (i, j).

    With `steps` by descent from `slopes`, `(1 or N, C(C-1), *shapes[k])`; the ones found come back.
    """
    rows, pairs = difference_rows(network.classes)
    n = len(bounds[0][0])
    found, used = [], []
    for chunk in torch.arange(len(rows)).split(max(1, BUDGET // (max(n, 1) * widest(network)))):
        mine = {k: part[:, chunk] for k, part in (slopes or {}).items()}
        value, kept = descend(
            network, lines, bounds[0], rows[chunk].expand(n, -1, -1), len(network.layers), steps, mine
        )
        found.append(value)
        used.append(kept)
    slopes = {k: torch.cat([part[k] for part in used], 1) for k in used[0]}
    matrix = as_matrix(torch.cat(found, 1), pairs, network.classes)
    return torch.minimum(matrix, box_differences(*bounds[-1])), slopes
