"""Interval arithmetic and linear bounds (CROWN) through a whole network, in float64 and rounded outwards.

`bounds` is a list of boxes: `bounds[k] = (lower, upper)`, each `(N, *shape)`, holds everything that can reach
layer k when the input moves in the ball `bounds[0]`; the last box is that of the logits.

Rounding. A sum of n products, in whatever order, is off by at most gamma(n) times the sum of the absolute
values. So every step below adds that much to the bound: gamma times |row| . size, where `size` bounds the
absolute terms that the layer sums up over its certified input box. What is certified is the network as a
function of real numbers with exactly these weights; a float32 evaluation of it has its own rounding on top.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faithkd.bounds.network import AFFINE, Network, affine, transpose, windows

Box = tuple[Tensor, Tensor]
BUDGET = 2**21  # numbers in the largest tensor of one pass (16 MB): what fits in a cache is also faster


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


def dot(rows: Tensor, values: Tensor) -> Tensor:
    """Sum of `rows` `(N, R, *shape)` times `values` `(N, *shape)`: `(N, R)`."""
    return (rows.flatten(2) @ values.flatten(1).unsqueeze(2)).squeeze(2)


def crown(network: Network, lower: Tensor, upper: Tensor) -> list[Box]:
    """Boxes of every layer's input and of the logits, refined by backward passes before ReLU and max-pool.

    Zhang et al. (2018) on the relaxations of Ehlers (2017), intersected with interval arithmetic everywhere.
    """
    bounds = [(lower, upper)]
    seen = 0  # affine layers so far
    for k, layer in enumerate(network.layers):
        # behind the first affine layer the interval is exact already
        if seen > 1 and isinstance(layer, nn.ReLU | nn.MaxPool2d) and isinstance(network.layers[k - 1], AFFINE):
            bounds[k] = refine(network, bounds, k)
        bounds.append(interval_step(layer, *bounds[k]))
        seen += isinstance(layer, AFFINE)
    return bounds


def refine(network: Network, bounds: list[Box], k: int) -> Box:
    """Box of layer k's input, tightened by a backward pass up and one down for each place that needs it."""
    lower, upper = bounds[k][0].flatten(1).clone(), bounds[k][1].flatten(1).clone()
    # a ReLU that interval arithmetic has settled is exact; each image decides for itself, so batches do not
    # matter
    is_relu = isinstance(network.layers[k], nn.ReLU)
    unsettled = (lower < 0) & (upper > 0) if is_relu else torch.ones_like(lower, dtype=torch.bool)
    places = unsettled.any(0).nonzero()[:, 0]
    for chunk in row_chunks(network, 2 * len(lower), len(places)):
        here = places[chunk]
        rows = torch.zeros(len(here), lower.shape[1], dtype=torch.float64)
        rows[torch.arange(len(here)), here] = 1
        rows = torch.cat([rows, -rows]).unflatten(1, network.shapes[k]).unsqueeze(0)
        highest, lowest = backward(network, bounds, rows, k).chunk(2, dim=1)
        mine = unsettled[:, here]
        upper[:, here] = torch.where(mine, torch.minimum(upper[:, here], highest), upper[:, here])
        lower[:, here] = torch.where(mine, torch.maximum(lower[:, here], -lowest), lower[:, here])
    return lower.view_as(bounds[k][0]), upper.view_as(bounds[k][1])


def row_chunks(network: Network, images: int, rows: int) -> tuple[Tensor, ...]:
    """Row numbers 0 .. `rows` - 1 in pieces whose backward pass stays within BUDGET."""
    return torch.arange(rows).split(max(1, BUDGET // (images * widest(network))))


def image_chunks(networks: tuple[Network, ...], images: int) -> tuple[Tensor, ...]:
    """Image numbers 0 .. `images` - 1 in pieces; all difference rows of one piece stay within BUDGET."""
    largest_pass = max(net.classes * (net.classes - 1) * widest(net) for net in networks)
    return torch.arange(images).split(max(1, BUDGET // largest_pass)) if images else ()


def widest(network: Network) -> int:
    """Numbers in the largest layer, the input included."""
    return max(math.prod(shape) for shape in network.shapes)


def backward(
    network: Network,
    bounds: list[Box],
    rows: Tensor,
    at: int | None = None,
    slopes: dict[int, Tensor] | None = None,
) -> Tensor:
    """Certified maximum over the ball of each linear form on the input of layer `at` (default: on the
    logits).

    `rows`: `(1 or N, R, *shapes[at])`. `bounds`: boxes of at least the inputs of layers 0 .. at - 1.
    `slopes`: for any ReLU layer k, lower slopes `(1 or N, R, *shapes[k])` of its unsettled units, cut to [0,
    1]; any value is valid, without them CROWN's adaptive choice is made. Returns `(N, R)`; what overflows is
    +inf.
    """
    at = len(network.layers) if at is None else at
    total = torch.zeros(len(bounds[0][0]), rows.shape[1], dtype=torch.float64)
    for k in reversed(range(at)):
        layer, (lower, upper) = network.layers[k], bounds[k]
        if isinstance(layer, nn.Flatten):
            rows = rows.unflatten(2, network.shapes[k])
        elif isinstance(layer, AFFINE):
            rows, constant = back_affine(layer, rows, lower, upper)
            total = total + constant
        elif isinstance(layer, nn.ReLU):
            rows, constant = back_relu(rows, lower, upper, None if slopes is None else slopes.get(k))
            total = total + constant
        else:
            rows, constant = back_pool(layer, rows, lower, upper, network.shapes[k])
            total = total + constant
    return (total + over_ball(rows, *bounds[0])).nan_to_num(math.inf, math.inf, math.inf)


def over_ball(rows: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Maximum of each row over the input box: row . middle + |row| . radius."""
    middle = (lower + upper) / 2
    radius = torch.maximum(upper - middle, middle - lower)
    slack = gamma(2 * middle[0].numel()) * (middle.abs() + radius)
    return dot(rows, middle) + dot(rows.abs(), radius + slack)


def back_affine(layer: nn.Module, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """row . (W z + b) as a row on z and a constant."""
    size = absolute(layer, largest(lower, upper))
    slack = gamma(layer.weight.numel() + size[0].numel()) * dot(rows.abs(), size)
    constant = slack
    if layer.bias is not None:
        bias = layer.bias if rows.ndim == 3 else layer.bias.view(-1, 1, 1)
        constant = slack + dot(rows, bias.expand(1, *rows.shape[2:]))
    flat = transpose(layer, rows.flatten(0, 1), tuple(lower.shape[1:]))
    return flat.unflatten(0, rows.shape[:2]), constant


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


def back_relu(rows: Tensor, lower: Tensor, upper: Tensor, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """row . relu(z) bounded above: the triangle's upper line where the row is positive, else a lower line."""
    slope, shift, below = (line.unsqueeze(1) for line in relu_lines(lower, upper))
    if slopes is not None:
        unsettled = ((lower < 0) & (upper > 0)).unsqueeze(1)
        below = torch.where(unsettled, slopes.clamp(0, 1), below)
    positive, negative = rows.clamp(min=0), rows.clamp(max=0)
    # every term of either line is at most 2 max|z|, and its coefficients carry a few roundings
    slack = gamma(lower[0].numel()) * dot(rows.abs(), 2 * largest(lower, upper))
    return positive * slope + negative * below, dot(positive, shift.squeeze(1)) + slack


def back_pool(
    pool: nn.MaxPool2d, rows: Tensor, lower: Tensor, upper: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """row . maxpool(z) bounded above.

    Below stands one input of the window, the one with the largest lower bound. Above stands that same input
    where it beats all others on the whole box, elsewhere the constant largest upper bound (the paper's
    interval rule, §4.2).
    """
    places = windows(pool, shape)
    low, high = (box.flatten(2)[:, :, places.clamp(min=0)] for box in (lower, upper))  # (N, channels, window, outputs)
    low, high = (box.masked_fill(places < 0, -math.inf) for box in (low, high))
    best = low.argmax(2, keepdim=True)
    others = high.scatter(2, best, -math.inf).amax(2)
    decided = (low.gather(2, best).squeeze(2) >= others).unsqueeze(1)
    target = places.expand_as(low).gather(2, best).squeeze(2).unsqueeze(1)
    rows = rows.flatten(3)
    through = torch.where(decided, rows, rows.clamp(max=0))
    ceiling = torch.where(decided, 0.0, high.amax(2).unsqueeze(1)).squeeze(1)
    size = F.max_pool2d(largest(lower, upper), pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    slack = gamma(places.numel() * shape[0]) * dot(rows.abs(), size)
    before = torch.zeros(*through.shape[:2], shape[0], shape[1] * shape[2], dtype=torch.float64)
    before.scatter_add_(3, target.expand_as(through), through)
    return before.unflatten(3, shape[1:]), dot(rows.clamp(min=0), ceiling) + slack


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


def row_differences(network: Network, bounds: list[Box], slopes: dict[int, Tensor] | None = None) -> Tensor:
    """Largest z_j - z_i, each bounded as one row and never above the logits' box: `(N, C, C)` at (i, j)."""
    rows, pairs = difference_rows(network.classes)
    found = []
    for chunk in row_chunks(network, len(bounds[0][0]), len(rows)):
        mine = None if slopes is None else {k: slope[:, chunk] for k, slope in slopes.items()}
        found.append(backward(network, bounds, rows[chunk].unsqueeze(0), slopes=mine))
    return torch.minimum(as_matrix(torch.cat(found, 1), pairs, network.classes), box_differences(*bounds[-1]))
