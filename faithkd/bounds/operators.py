"""One small class for each kind of operation: all that the bounds know of it.

An operator takes tensors `(N, *shape)` and says four things: its value, `interval` (a box of its output from boxes of
its inputs, rounded outwards), `relax` (lines that hold it on such a box) and `transpose` (rows on its output as rows on
its inputs). A new kind is one class here, one line in each table of `graph`, and one line in tests/laws.

Rounding. A float64 product is a b (1 + d) + e with |d| <= 2^-53, and |e| <= tiny (1 + |a| + |b|) is what underflow
loses, tiny = 2^-1022, also where a processor takes all subnormal numbers for 0; a sum is off in the same way. So a
sum of n products, in whatever order, is off by at most gamma(n) sum |a| |b| + 2 tiny sum (1 + |a| + |b|). Write t for
TINY. As gamma t^2 > 2^-650 is far above tiny, that is less than gamma sum (|a| + t) (|b| + t): one formula for both,
none of whose terms can underflow. A row r on the outputs of z -> W z + b is carried back to r W, each entry of which
is off by that much, which counts |z| <= size times; so the step adds gamma (|r| + t) . (|W| + t) (size + t), and as
much for b. This is |r| . noise + t sum noise with `noise` = gamma (|W| + t) (size + t) + gamma (|b| + t), where `size`
bounds |z| over the certified box of the input; at most gamma t^3 > 2^-950 small, it cannot underflow either. Other
operators have a noise of their own, of the same form. gamma has room for a few roundings more: those of a row's
coefficients, and of rows added up where one value has several readers. What is certified is the network as a function
of real numbers with exactly these weights; a float32 evaluation of it has its own rounding on top.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.errors import FaithkdError

Box = tuple[Tensor, Tensor]
Shape = tuple[int, ...]
TINY = 2.0**-300  # t above: nothing beside numbers of any use, its cube far from underflow; 0 in float32


def gamma(terms: int) -> float:
    """Relative rounding error of a float64 sum of `terms` products, doubled to cover its own evaluation.

    At least 2^-48, of which TINY's proof makes use.
    """
    return 2 * (terms + 16) * 2.0**-53


def largest(lower: Tensor, upper: Tensor) -> Tensor:
    """Largest absolute value in a box, and TINY."""
    return torch.maximum(lower.abs(), upper.abs()) + TINY


def finite(lower: Tensor, upper: Tensor) -> Box:
    """The box, with what overflows as (-inf, inf)."""
    return lower.nan_to_num(-math.inf, -math.inf, -math.inf), upper.nan_to_num(math.inf, math.inf, math.inf)


def dot(rows: Tensor, values: Tensor) -> Tensor:
    """Sum of `rows` `(N, R, ...)` times `values` `(1 or N, 1, ...)`: `(N, R)`."""
    return (rows.flatten(2) @ values.flatten(2).transpose(1, 2)).squeeze(2)


@dataclass(frozen=True)
class Lines:
    """Two linear functions that hold f on a box: below . z + low - noise <= f(z) <= above . z + high.

    `noise` covers the rounding of either, per output, and is in `high` already; no `low` means 0. All start `(N, 1,
    ...)`, to be used for every row. A slope below may be replaced by any in [0, 1] where `free`; of a max-pool, slopes
    are weights over the window, `(N, 1, channels, window, outputs)`. Of a curve it is a place in [0, 1] among `many`
    lines, `(N, 2, 2, K, *shape)`: of K below and of K above slopes and constants, with the lines above in the middle.
    An affine operator is its own line: `noise` only.
    """

    noise: Tensor | None = None
    high: Tensor | None = None
    above: Tensor | None = None
    below: Tensor | None = None
    free: Tensor | None = None
    low: Tensor | None = None
    many: Tensor | None = None

    @property
    def start(self) -> Tensor:
        """Where a descent over what is free begins: these lines."""
        return self.below if self.many is None else torch.full_like(self.below, 0.5)

    def __getitem__(self, index: Tensor) -> "Lines":
        return Lines(*(None if part is None else part[index] for part in vars(self).values()))

    def rough(self) -> "Lines":
        """The same in float32 and without noise: for looking around, never for a bound."""
        high, above, below, low, many = (
            None if part is None else part.float() for part in (self.high, self.above, self.below, self.low, self.many)
        )
        return Lines(None, high, above, below, self.free, low, many)

    def constant(self, positive: Tensor, negative: Tensor) -> Tensor:
        """What the lines add to rows with these positive and negative parts: `(N, R)`."""
        total = dot(positive, self.high)
        if self.low is not None:
            total = total + dot(negative, self.low)
        return total if self.noise is None else total - dot(negative, self.noise)


class Operator:
    """y = f(z, ...), by itself the identity on the shape of its input."""

    linear = False  # exactly so: it needs no lines, only room for rounding
    mixes = False  # whether an output stands on several numbers, so that an interval can lose what they share
    splits = False  # whether z >= 0 and z <= 0 make two parts of a domain on which it is simpler

    def __call__(self, *z: Tensor) -> Tensor:
        """The output for a batch."""
        raise NotImplementedError

    def interval(self, *boxes: Box) -> Box:
        """Box of the output from boxes of the inputs."""
        raise NotImplementedError

    def relax(self, *boxes: Box) -> Lines:
        """Lines that hold on boxes of the inputs."""
        raise NotImplementedError

    def freed(self, lines: Lines, *boxes: Box) -> Lines:
        """The lines of `relax` with whatever else can be chosen freely: for a descent, which takes longer anyhow."""
        return lines

    def transpose(self, rows: Tensor, lines: Lines, slopes: Tensor | None, *shapes: Shape):
        """Rows `(N, R, *out)` on the output as a row on each input of `shapes`, and a constant `(N, R)`.

        row . f(z) is nowhere above their sum on the box of `lines`, whatever `slopes` are.
        """
        raise NotImplementedError

    def loose(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Where in a box of its input a tighter end would gain anything."""
        return torch.ones_like(lower, dtype=torch.bool)

    def check(self, *shapes: Shape) -> None:
        """Refuse inputs of these shapes, where it would not fail of itself."""

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Operator":
        """The same in another precision, or on another device."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):  # whole numbers are places, and stay so
                setattr(other, name, value.to(device, dtype if value.is_floating_point() else None))
        return other


class Affine(Operator):
    """y = A z + b. A subclass says `product`; `back` only where there is something faster than autograd."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    terms = products = 1  # of one output, and of one input or output at most
    linear = mixes = True

    def product(self, z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """A z + b with these weights in place of its own, e.g. their absolute values."""
        raise NotImplementedError

    def back(self, rows: Tensor, shape: Shape) -> Tensor:
        """r A for rows `(M, *out)`: `(M, *shape)`."""
        with torch.enable_grad():
            z = rows.new_zeros(len(rows), *shape, requires_grad=True)
            return torch.autograd.grad(self.product(z, self.weight, None), z, rows, create_graph=rows.requires_grad)[0]

    def constant(self, rows: Tensor) -> Tensor | float:
        """r b for rows `(N, R, *out)`."""
        return 0.0 if self.bias is None else (rows if rows.ndim == 3 else rows.flatten(3).sum(3)) @ self.bias

    def __call__(self, z: Tensor) -> Tensor:
        return self.product(z, self.weight, self.bias)

    def absolute(self, size: Tensor) -> Tensor:
        """|A| size + |b|, the absolute terms that are summed up for inputs up to `size`, each factor + TINY."""
        return self.product(size, *(None if part is None else part.abs() + TINY for part in (self.weight, self.bias)))

    def interval(self, box: Box) -> Box:
        middle = (box[0] + box[1]) / 2
        radius = torch.maximum(box[1] - middle, middle - box[0])
        slack = gamma(self.terms) * self.absolute(largest(*box))
        radius = self.product(radius, None if self.weight is None else self.weight.abs(), None) + slack
        middle = self(middle)
        return finite(middle - radius, middle + radius)

    def relax(self, box: Box) -> Lines:
        terms = self.absolute(largest(*box))
        return Lines((gamma(self.products + math.prod(terms.shape[1:])) * terms).unsqueeze(1))

    def transpose(self, rows: Tensor, lines: Lines, slopes: Tensor | None, shape: Shape):
        constant = self.constant(rows)
        if lines.noise is not None:
            constant = constant + dot(rows.abs(), lines.noise)
        return [self.back(rows.flatten(0, 1), shape).unflatten(0, rows.shape[:2])], constant


@dataclass(eq=False)
class Linear(Affine):
    """y = W z + b, of the last dimension where there are several."""

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        self.terms, self.products = self.weight[0].numel(), self.weight.numel()

    def product(self, z, weight, bias):
        return F.linear(z, weight, bias)

    def back(self, rows, shape):
        return rows @ self.weight

    def constant(self, rows):
        return (
            0.0 if self.bias is None else rows.flatten(2, -2).sum(2) @ self.bias if rows.ndim > 3 else rows @ self.bias
        )


class Matrix(Affine):
    """What an affine `operator` does to images of this shape as y = W z + b, with all zeros of W."""

    def __init__(self, operator: Affine, shape: Shape) -> None:
        units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        bias = operator(torch.zeros_like(units[:1]))
        self.shape, self.bias = tuple(bias.shape[1:]), bias.flatten()
        self.weight = operator.product(units, operator.weight, None).flatten(1).T

    def product(self, z, weight, bias):
        return F.linear(z.flatten(1), weight, bias).unflatten(1, self.shape)

    def back(self, rows, shape):
        return (rows.flatten(1) @ self.weight).unflatten(1, shape)

    def constant(self, rows):
        return rows.flatten(2) @ self.bias


@dataclass(eq=False)
class Conv2d(Affine):
    """Zero padding, followed by a linear map of every patch."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple = 1
    padding: int | tuple | str = 0
    dilation: int | tuple = 1
    groups: int = 1

    def __post_init__(self) -> None:
        self.terms, self.products = self.weight[0].numel(), self.weight.numel()
        self.stride, self.dilation = pair(self.stride), pair(self.dilation)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        if self.padding == "same":
            down, across = ((part // 2, part - part // 2) for part in reach)
        else:
            down, across = ((part, part) for part in pair(0 if self.padding == "valid" else self.padding))
        self.padding = (*across, *down)  # left, right, above, below

    def product(self, z, weight, bias):
        return F.conv2d(F.pad(z, self.padding), weight, bias, self.stride, 0, self.dilation, self.groups)

    def back(self, rows, shape):
        left, right, top, bottom = self.padding
        padded = (len(rows), shape[0], shape[1] + top + bottom, shape[2] + left + right)
        options = (self.stride, 0, self.dilation, self.groups)
        grad = torch.nn.grad.conv2d_input(padded, self.weight, rows, *options)
        return grad[:, :, top : top + shape[1], left : left + shape[2]]


@dataclass(eq=False)
class View(Affine):
    """The same numbers in another shape, `(*shape)`: nothing is computed."""

    shape: Shape
    mixes = False

    def __call__(self, z):
        return z.reshape(len(z), *self.shape)

    def interval(self, box):
        return self(box[0]), self(box[1])

    def relax(self, box):
        return Lines()

    def transpose(self, rows, lines, slopes, shape):
        return [rows.flatten(2).unflatten(2, shape)], 0.0


class Elementwise(Operator):
    """y = f(z) number by number: a row takes the line above where it is positive, else the one below."""

    def transpose(self, rows, lines, slopes, shape):
        positive = F.relu(rows)
        negative = rows - positive
        below = lines.below if slopes is None else self.allowed(slopes, lines)
        return [positive * lines.above + negative * below], lines.constant(positive, negative)

    @staticmethod
    def allowed(slopes: Tensor, lines: Lines) -> Tensor:
        """What was chosen, in [0, 1], where a unit is free; elsewhere, or where that is no number, the line's own."""
        if lines.free is None:
            return lines.start
        if lines.noise is None:  # rough: no bound, and where() is many times slower than arithmetic
            return torch.lerp(lines.start, slopes, lines.free.to(slopes))
        return torch.where(lines.free & (slopes >= 0) & (slopes <= 1), slopes, lines.start)


class ReLU(Elementwise):
    """y = max(z, 0)."""

    splits = True

    def __call__(self, z):
        return z.clamp(min=0)

    def interval(self, box):
        return self(box[0]), self(box[1])

    def relax(self, box):
        lower, upper = box
        slope, shift, below = self.triangle(lower, upper)
        # every term of either line is at most 2 max|z|, and its coefficients carry a few roundings
        noise = gamma(math.prod(lower.shape[1:])) * 2 * largest(lower, upper)
        parts = (noise, shift + noise, slope, below, self.loose(lower, upper))
        return Lines(*(part.unsqueeze(1) for part in parts))

    @staticmethod
    def triangle(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ehlers' triangle, relu(z) <= slope z + shift on [lower, upper], and CROWN's lower slope, 0 or 1.

        Units that are always on have slope 1, those always off have slope 0, above and below, and no shift.
        """
        unsettled = (lower < 0) & (upper > 0)
        on = (lower >= 0).to(lower)
        slope = torch.where(unsettled, upper / (upper - lower), on)
        slope = torch.where(unsettled & (upper - lower).isinf(), 1.0, slope)  # not 0 where the width overflows
        shift = torch.where(unsettled, -slope * lower, 0.0)
        below = torch.where(unsettled, (upper > -lower).to(lower), on)
        return slope, shift, below

    def loose(self, lower, upper):
        return (lower < 0) & (upper > 0)


@dataclass(eq=False)
class MaxPool2d(Operator):
    """The largest number of every window of places."""

    kernel_size: int | tuple
    stride: int | tuple | None = None
    padding: int | tuple = 0
    dilation: int | tuple = 1
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        self.stride = self.stride or self.kernel_size

    def __call__(self, z):
        return F.max_pool2d(z, *vars_of(self))

    def check(self, shape):
        if (self.windows(shape) < 0).all(dim=0).any():
            raise FaithkdError("a window of a max-pool covers only padding, its maximum is -infinity")

    def windows(self, shape: Shape) -> Tensor:
        """The flat places (row * width + column) in the window of each output; -1 is padding.

        `(window size, output places)`, the same for all channels.
        """
        places = torch.arange(math.prod(shape[1:]), dtype=torch.float64).view(1, 1, *shape[1:])
        kernel, stride, dilation, padding = (
            pair(part) for part in (self.kernel_size, self.stride, self.dilation, self.padding)
        )
        # with ceil_mode the last windows end past the padding
        count = self(places).shape[2:]
        ends = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(stride, count, dilation, kernel, strict=True)]
        more = [max(end - p, n + p) - n for end, p, n in zip(ends, padding, shape[1:], strict=True)]
        places = F.pad(places, (padding[1], more[1], padding[0], more[0]), value=-1)
        return F.unfold(places, kernel, dilation, 0, stride)[0].long()

    def boxes(self, lower: Tensor, upper: Tensor) -> Box:
        """Boxes of the inputs in each window, `(N, channels, window, outputs)` twice; -inf where there is padding."""
        places = self.windows(tuple(lower.shape[1:])).to(lower.device)
        return tuple(
            end.flatten(2)[:, :, places.clamp(min=0)].masked_fill(places < 0, -math.inf) for end in (lower, upper)
        )

    @staticmethod
    def chord(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """max(z) <= slope z_i + shift with i the input of largest upper end u_i: its place `(N, channels, 1, outputs)`,
        slope and shift `(N, channels, outputs)`, from `boxes`.

        Let m be the second largest upper end. Then max(z) <= max(z_i, m), which is convex in z_i, so its chord on [l_i,
        u_i] is above it: never above u_i, the paper's interval rule (§4.2), and exact where l_i >= m.
        """
        best = high.argmax(2, keepdim=True)
        first, low_first = high.gather(2, best).squeeze(2), low.gather(2, best).squeeze(2)
        second = high.scatter(2, best, -math.inf).amax(2)
        decided = low_first >= second
        wide = (first - low_first).isinf()  # where the width overflows, the slope must not become 0
        slope = torch.where(decided | wide, 1.0, (first - second) / (first - low_first))
        return best, slope, torch.where(decided, 0.0, second - slope * low_first)

    def interval(self, box):
        return self(box[0]), self(box[1])

    def relax(self, box):
        """The chord above, the input with the largest lower end below."""
        low, high = self.boxes(*box)
        best, slope, shift = self.chord(low, high)
        decided = (slope == 1).unsqueeze(2)
        under = torch.where(decided, best, low.argmax(2, keepdim=True))
        above = torch.zeros_like(low).scatter_(2, best, slope.unsqueeze(2))
        below = torch.zeros_like(low).scatter_(2, under, 1.0)
        noise = gamma(math.prod(low.shape[1:])) * 4 * self(largest(*box)).flatten(2)
        free = ~decided & (high > -math.inf)
        return Lines(*(part.unsqueeze(1) for part in (noise, shift + noise, above, below, free)))

    def transpose(self, rows, lines, slopes, shape):
        spread, constant = self.spread(rows, lines, slopes)
        return [self.gathered(spread, shape)], constant

    def spread(self, rows: Tensor, lines: Lines, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each entry of a row spread over its window, `(N, R, channels, window, outputs)`, and a constant `(N, R)`."""
        rows = rows.flatten(3)
        positive = rows.clamp(min=0)
        negative = rows - positive
        below = lines.below if slopes is None else self.allowed(slopes, lines)
        spread = positive.unsqueeze(3) * lines.above + negative.unsqueeze(3) * below
        return spread, lines.constant(positive, negative)

    def gathered(self, spread: Tensor, shape: Shape) -> Tensor:
        """Numbers `(..., channels, window, outputs)` added up at the places that they belong to: `(..., *shape)`."""
        index = self.windows(shape).clamp(min=0).flatten().to(spread.device)
        flat = spread.new_zeros(*spread.shape[:-2], shape[1] * shape[2])
        return flat.scatter_add(-1, index.expand(*spread.shape[:-2], -1), spread.flatten(-2)).unflatten(-1, shape[1:])

    @staticmethod
    def allowed(weights: Tensor, lines: Lines) -> Tensor:
        """Weights >= 0 of sum 1 over each window; where they vanish or are not free, the line's own."""
        weights = torch.where(lines.free & (weights >= 0), weights, 0.0)
        total = weights.sum(3, keepdim=True)
        usable = lines.free.any(3, keepdim=True) & (total > 1e-6)
        return torch.where(usable, weights / total.clamp(min=1e-6), lines.below)


def pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    """Down and across."""
    return (size, size) if isinstance(size, int) else (*size, *size)[:2]


def vars_of(operator: Operator) -> list:
    """The fields of a pooling operator in the order in which torch takes them."""
    return [getattr(operator, name) for name in operator.__dataclass_fields__]
