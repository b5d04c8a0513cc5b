"""Operators of networks past the paper's. A new kind is one class here, one line in the tables of `reading`, and one in
tests/laws.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.operators import TINY, Affine, Elementwise, Lines, Operator, finite, gamma, largest, pair, vars_of


@dataclass(eq=False)
class AvgPool2d(Affine):
    """The mean of every window."""

    kernel_size: int | tuple
    stride: int | tuple | None = None
    padding: int | tuple = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    dims = 3

    def __post_init__(self) -> None:
        self.terms = self.products = math.prod(pair(self.kernel_size))

    def product(self, z, weight, bias):
        return F.avg_pool2d(z, *vars_of(self))


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
class SShaped(Elementwise):
    """Tanh and sigmoid: convex up to 0, concave from there, with the largest slope at 0."""

    name: str  # "tanh" or "sigmoid"
    ULPS = 2.0**-48  # absolute: what torch's values and slopes may be off by, many times over

    def __call__(self, z):
        return getattr(torch, self.name)(z)

    def slope(self, z: Tensor) -> Tensor:
        """f'(z)."""
        y = self(z)
        return 1 - y * y if self.name == "tanh" else y * (1 - y)

    def interval(self, box):
        return self(box[0]) - self.ULPS, self(box[1]) + self.ULPS

    def relax(self, box):
        lower, upper = box
        ends, middle = (self(lower), self(upper)), (lower + upper) / 2
        # f' is nowhere smaller than at one of the ends, so lines of that slope hold from either end on
        gentle = torch.minimum(self.slope(lower), self.slope(upper))
        chord = ((ends[1] - ends[0]) / (upper - lower)).nan_to_num(0.0).clamp(0, 1)
        tangent = self.slope(middle)
        below = torch.where(lower >= 0, chord, torch.where(upper <= 0, tangent, gentle))
        above = torch.where(upper <= 0, chord, torch.where(lower >= 0, tangent, gentle))
        points = torch.stack([lower, upper, middle])
        rest_below, rest_above = (torch.stack([*ends, self(middle)]) - slope * points for slope in (below, above))
        # a chord and a gentle line touch at an end, a tangent in the middle, where it is extreme
        low, high = rest_below.amin(0), rest_above.amax(0)
        noise = gamma(math.prod(lower.shape[1:])) * 2 * (1 + largest(lower, upper)) + self.ULPS * (1 + upper - lower)
        return Lines(*(part.unsqueeze(1) for part in (noise, high + noise, above, below)), None, low.unsqueeze(1))
