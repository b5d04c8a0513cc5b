"""Operators of networks past the paper's. A new kind is one class here, one line in the table of `reading`, and one in
tests/laws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.operators import (
    TINY,
    Affine,
    Box,
    Elementwise,
    Lines,
    MaxPool2d,
    Operator,
    finite,
    gamma,
    largest,
    pair,
    vars_of,
)
from faithkd.errors import FaithkdError


@dataclass(eq=False)
class AvgPool2d(Affine):
    """The mean of every window."""

    kernel_size: int | tuple
    stride: int | tuple | None = None
    padding: int | tuple = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    def __post_init__(self) -> None:
        self.terms = self.products = math.prod(pair(self.kernel_size))

    def product(self, z, weight, bias):
        return F.avg_pool2d(z, *vars_of(self))


@dataclass(eq=False)
class ConvTranspose2d(Affine):
    """What carries rows back through a convolution, as a layer of its own."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple = 1
    padding: int | tuple = 0
    output_padding: int | tuple = 0
    groups: int = 1
    dilation: int | tuple = 1

    def __post_init__(self) -> None:
        self.terms, self.products = self.weight[:, 0].numel(), self.weight.numel()

    def product(self, z, weight, bias):
        return F.conv_transpose2d(z, weight, bias, *vars_of(self)[2:])

    def back(self, rows, shape):
        made = F.conv2d(rows, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return made[:, :, : shape[1], : shape[2]]  # more where the padding of its output is as wide as a stride


class AdaptiveMaxPool2d(MaxPool2d):
    """The largest number of every window, of as many and as large ones as make an output of this `size`."""

    def __init__(self, size: int | tuple) -> None:
        self.size = pair(size)

    def __call__(self, z):
        return F.adaptive_max_pool2d(z, self.size)

    def windows(self, shape):
        spans = []
        for before, after in zip(shape[1:], self.size, strict=True):
            number = torch.arange(after)
            first, past = number * before // after, -(-(number + 1) * before // after)
            places = first + torch.arange(int((past - first).amax())).unsqueeze(1)
            spans.append(places.where(places < past, -1))
        down, across = spans[0][:, None, :, None], spans[1][None, :, None, :]
        return (down * shape[2] + across).where((down >= 0) & (across >= 0), -1).flatten(2).flatten(0, 1)


@dataclass(eq=False)
class Sums(Affine):
    """Any linear `function` without negative coefficients: means and sums of any numbers, at most `terms` in each."""

    function: Callable[[Tensor], Tensor]
    terms: int

    def __post_init__(self) -> None:
        self.products = self.terms

    def product(self, z, weight, bias):
        return self.function(z)


@dataclass(eq=False)
class Scale(Affine):
    """y = a z + b with numbers that repeat along the image. `size`: of the terms that b was summed up from."""

    weight: Tensor
    bias: Tensor
    size: Tensor | None = None
    terms = products = 2
    mixes = False

    def product(self, z, weight, bias):
        return z * weight if bias is None else z * weight + bias

    def absolute(self, size):
        return size * (self.weight.abs() + TINY) + (self.bias.abs() if self.size is None else self.size) + TINY

    def back(self, rows, shape):
        return rows * self.weight

    def constant(self, rows):
        return (rows * self.bias).flatten(2).sum(2)


@dataclass(eq=False)
class Pick(Affine):
    """Numbers of an image at other places, some left out or repeated: `index`, of the output's shape, says which of the
    flat input each one is, -1 for a 0. Nothing is computed.
    """

    index: Tensor
    mixes = False

    def __post_init__(self) -> None:
        self.terms = self.products = int(self.index[self.index >= 0].bincount().amax()) if self.index.amax() >= 0 else 1

    def product(self, z, weight, bias):
        return F.pad(z.flatten(1), (0, 1))[:, self.index]

    def back(self, rows, shape):
        flat = rows.new_zeros(len(rows), math.prod(shape) + 1)
        index = self.index.flatten().remainder(flat.shape[1])
        return flat.index_add(1, index, rows.flatten(1))[:, :-1].unflatten(1, shape)

    def interval(self, box):
        return self(box[0]), self(box[1])

    def relax(self, box):
        return Lines() if self.terms == 1 else super().relax(box)  # rows on a number that is repeated are added up


class Add(Operator):
    """y = z + z': a row goes to both of them as it is, so that nothing is rounded."""

    linear = mixes = True

    def __call__(self, first, second):
        return first + second

    def interval(self, first, second):
        ends = first[0] + second[0], first[1] + second[1]
        return finite(
            *(torch.nextafter(end, end.new_tensor(way)) for end, way in zip(ends, (-math.inf, math.inf), strict=True))
        )

    def relax(self, first, second):
        return Lines()

    def transpose(self, rows, lines, slopes, *shapes):
        return [rows, rows], 0.0


@dataclass(eq=False)
class Smooth(Elementwise):
    """y = f(z) for an f that is by turns convex and concave, number by number, whether or not it grows everywhere.

    `turns`: where it changes, `convex`: whether it is so before the first turn (a kink may only stand at a turn behind
    which f is straight); `off`: how far torch's f may be from it.

    Any slope s makes a line: the constant above is the largest g(z) = f(z) - s z. On a convex piece that is at an end.
    On a concave one, halving finds t < t' with g growing at t and falling at t'. Up to t then g(z) <= g(t), from t' on
    g(z) <= g(t'), and between them g lies below its tangent at t, g(t) + g'(t) (t' - t). For the line below take -f.
    The slope is that of the hull of f, at some points, over the middle of the box: the least area between line and f.
    A descent also chooses among lines on both sides of that one, from the hull's left end to its right end, and all
    that lie between two neighbours: where two lines hold, each mixture of them does.
    """

    function: Callable[[Tensor], Tensor]
    turns: tuple[float, ...] = ()
    convex: bool = True
    off: float = 0.0
    ULPS = 2.0**-48  # what torch's values and slopes may be off by, many times over, of all numbers that take part
    HALVINGS, FEWER = 20, 8  # squared in the error: 10^-12 times the box's squared width, 10^-5 for `many` lines
    POINTS = 17
    SIDE = 12  # lines to choose from on each side of the first

    def __call__(self, z):
        return self.function(z)

    def slope(self, z: Tensor) -> Tensor:
        """f'(z)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self(z).sum(), z)[0]

    def most(self, slope: Tensor, box: Box, sign: int, halvings: int = HALVINGS) -> Tensor:
        """Never below the largest sign (f(z) - slope z) in the box, but for rounding."""

        def g(z: Tensor) -> Tensor:
            return sign * (self(z) - slope * z)

        edges = [box[0], *(box[0].new_tensor(turn).clamp(*box) for turn in self.turns), box[1]]
        found = torch.stack([g(edge) for edge in edges]).amax(0)
        for number, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            if ((number % 2 == 0) == self.convex) == (sign > 0):
                continue  # sign f is convex here
            for _ in range(halvings):
                middle = (a + b) / 2
                grows = sign * (self.slope(middle) - slope) > 0
                a, b = torch.where(grows, middle, a), torch.where(grows, b, middle)
            rise = (sign * (self.slope(a) - slope)).clamp(min=0) * (b - a)
            found = torch.maximum(found, torch.maximum(g(a) + rise, g(b)))
        return found

    def steepness(self, box: Box, sign: int) -> Tensor:
        """A slope for the line above, or below where `sign` is -1."""
        (lower, upper), half = box, self.POINTS // 2
        width, share = upper - lower, torch.linspace(-0.5, 0.5, self.POINTS).to(lower)
        values = sign * self((lower + upper).unsqueeze(-1) / 2 + width.unsqueeze(-1) * share)
        left, middle, right = values.tensor_split([half, half + 1], -1)
        least = ((right - middle) / share[half + 1 :]).amax(-1)  # of slopes, by the width, of lines through the middle
        most = ((left - middle) / share[:half]).amin(-1)
        tangent = sign * width * self.slope((lower + upper) / 2)
        # the hull's edge over the middle is the chord that is highest there
        chords = (right.unsqueeze(-2) - left.unsqueeze(-1)) / (share[half + 1 :] - share[:half].unsqueeze(1))
        which = (left.unsqueeze(-1) - chords * share[:half].unsqueeze(1)).flatten(-2).argmax(-1, keepdim=True)
        chord = chords.flatten(-2).gather(-1, which).squeeze(-1)
        found = torch.where(least <= most, torch.minimum(torch.maximum(tangent, least), most), chord)
        # of a narrow box rounding is all that differences say
        return sign * torch.where(width < 1e-6, tangent, found) / width.clamp(min=1e-300)

    def noise(self, box: Box, steep: Tensor) -> Tensor:
        """Of rows on lines of this steepness."""
        return (2 * gamma(math.prod(box[0].shape[1:])) + self.ULPS) * self.size(box, steep) + self.off

    def size(self, box: Box, steep: Tensor | float) -> Tensor:
        """Of the numbers that a line's constant is computed from."""
        return 1 + sum(self(end).abs() for end in box) + (1 + steep) * largest(*box)

    def interval(self, box):
        low, high = (sign * self.most(0.0, box, sign) for sign in (-1, 1))
        slack = self.ULPS * self.size(box, 0.0) + self.off
        return finite(low - slack, high + slack)

    def relax(self, box):
        below, above = (self.steepness(box, sign) for sign in (-1, 1))
        low, high = -self.most(below, box, -1), self.most(above, box, 1)
        noise = self.noise(box, below.abs() + above.abs())
        return Lines(*(part.unsqueeze(1) for part in (noise, high + noise, above, below)), None, low.unsqueeze(1))

    def freed(self, lines, box):
        (lower, upper), tables = box, []
        share = torch.linspace(0, 1, self.SIDE + 1).to(lower).view(-1, *[1] * lower.ndim)
        edges = torch.linspace(0, 1, self.POINTS).to(lower).view(-1, *[1] * lower.ndim)
        values = self(lower + edges * (upper - lower))
        width = (upper - lower).clamp(min=1e-300)
        from_left = (values[1:] - values[0]) / (edges[1:] * width)
        from_right = (values[-1] - values[:-1]) / ((1 - edges[:-1]) * width)
        ends = self.slope(lower), self.slope(upper)
        for sign, middle in ((-1, lines.below[:, 0]), (1, lines.above[:, 0])):
            # the hull's steepest line at the left end, above, and its flattest one at the right end
            left = sign * torch.maximum((sign * from_left).amax(0), sign * ends[0])
            right = sign * torch.minimum((sign * from_right).amin(0), sign * ends[1])
            steep = torch.cat([left + share * (middle - left), middle + share[1:] * (right - middle)])
            steep = torch.where(width < 1e-6, middle, steep)
            constants = sign * self.most(steep, tuple(end.expand_as(steep) for end in box), sign, self.FEWER)
            constants[self.SIDE] = (lines.low if sign < 0 else lines.high - lines.noise)[:, 0]
            tables.append(torch.stack([steep, constants]).movedim(2, 0))
        many = torch.stack(tables, 1)
        noise = self.noise(box, many[:, :, 0].abs().amax((1, 2)))
        many[:, 0, 1] -= noise.unsqueeze(1)
        many[:, 1, 1] += noise.unsqueeze(1)
        free = (many[:, :, 0].amax(2) > many[:, :, 0].amin(2)).any(1)
        return replace(lines, free=free.unsqueeze(1), many=many)

    def transpose(self, rows, lines, slopes, shape):
        """Each entry takes one mixture of two neighbouring lines, of those above where it is positive, else below."""
        if slopes is None or lines.many is None:
            return super().transpose(rows, lines, None, shape)
        count = lines.many.shape[3]
        place = self.allowed(slopes, lines) * (count - 1)
        first = place.detach().long().clamp(max=count - 2)
        share = place - first
        first = first + count * (rows > 0)
        tables = lines.many.transpose(1, 2).flatten(2, 3).expand(-1, -1, -1, *rows.shape[2:])
        slope, constant = (
            torch.lerp(*(table.gather(1, first + step) for step in (0, 1)), share) for table in tables.unbind(1)
        )
        return [rows * slope], (rows * constant).flatten(2).sum(2)


def elu(z: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """scale z, and scale alpha (exp(input_scale z) - 1) below 0: ELU, SELU and CELU, as torch has it."""
    return scale * torch.where(z > 0, z, alpha * torch.expm1(input_scale * z.clamp(max=0)))


def elu_of(alpha=1.0, scale=1.0, input_scale=1.0) -> Smooth:
    if min(alpha, scale, input_scale) <= 0:
        raise FaithkdError("an ELU with a factor that is not > 0 turns elsewhere, and cannot be bounded")
    return Smooth(partial(elu, alpha=alpha, scale=scale, input_scale=input_scale), (0.0,))


def softplus_of(beta=1.0, threshold=20.0) -> Smooth:
    # torch says z past the threshold, which is less by ln(1 + exp(-beta z)) / beta
    return Smooth(
        partial(F.softplus, beta=beta, threshold=threshold), convex=beta > 0, off=math.exp(-threshold) / abs(beta)
    )


def gelu_of(approximate="none") -> Smooth:
    turn = 1.41850400879082836 if approximate == "tanh" else math.sqrt(2)
    return Smooth(partial(F.gelu, approximate=approximate), (-turn, turn), convex=False)


CURVES = {  # by torch's name: what takes the rest of its arguments
    "tanh": lambda: Smooth(torch.tanh, (0.0,)),
    "sigmoid": lambda: Smooth(torch.sigmoid, (0.0,)),
    "silu": lambda: Smooth(F.silu, (-2.39935728051546766, 2.39935728051546766), convex=False),
    "mish": lambda: Smooth(F.mish, (-2.25637639636079312, 1.49057117948542846), convex=False),
    "gelu": gelu_of,
    "hardswish": lambda: Smooth(F.hardswish, (-3.0, 3.0), convex=False),  # straight behind its kinks
    "log_sigmoid_forward": lambda: Smooth(F.logsigmoid, convex=False),
    "elu": elu_of,
    "celu": lambda alpha=1.0: elu_of(alpha, 1.0, 1 / alpha),
    "softplus": softplus_of,
}
