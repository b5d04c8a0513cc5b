"""The first convolution and the max-pool behind it in one step, in float32: for looking around, never for a bound.

A pooled value sees a small patch of the image, and few pixels are in two of them. So one matrix product turns
coefficients of the convolution's outputs, window by window, into coefficients of pixels, patch by patch.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.graph import Network
from faithkd.bounds.operators import Conv2d, Lines, MaxPool2d, pair


@dataclass(frozen=True)
class Patches:
    """How a convolution and the max-pool behind it see the image: in patches of `size`, one every `step` pixels.

    `matrix` `(pixels, coefficients)`: what coefficients of a window, `(channels, window)`, are on its patch.
    """

    matrix: Tensor
    size: tuple[int, int]
    step: tuple[int, int]


@functools.lru_cache(maxsize=32)
def patches(network: Network) -> Patches | None:
    """The patches of a network that begins with a convolution and a max-pool; None where they would not pay or suit."""
    readers = [place for node in network.nodes for place in node.inputs]
    if len(network.nodes) < 2 or (readers.count(0), readers.count(1)) != (1, 1):
        return None
    conv, pool = (node.operator for node in network.nodes[:2])
    if not isinstance(conv, Conv2d) or not isinstance(pool, MaxPool2d):
        return None
    plain = [pair(pool.padding) == (0, 0), pair(pool.dilation) == conv.dilation == (1, 1), conv.groups == 1]
    if not all(plain) or any(conv.padding):
        return None
    window, (channels, colours, *kernel) = pair(pool.kernel_size), conv.weight.shape
    size = tuple(s * (w - 1) + k for s, w, k in zip(conv.stride, window, kernel, strict=True))
    step = tuple(s * t for s, t in zip(conv.stride, pair(pool.stride), strict=True))
    if any(s > 2 * t for s, t in zip(size, step, strict=True)):
        return None  # pixels in more than two patches down or across
    units = torch.eye(channels * math.prod(window), dtype=conv.weight.dtype, device=conv.weight.device)
    matrix = conv.back(units.view(-1, channels, *window), (colours, *size)).flatten(1).T
    return Patches(matrix.contiguous(), size, step)


def pull(network: Network, line: Lines, rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows on the first max-pool's output, `(N, R, *shapes[2])`, as rows on the image, and constants, `(N, R)`.

    As `linear.pull` through both nodes. `line`: the pool's, `weights`: its slopes.
    """
    cut, (conv, pool) = patches(network), (node.operator for node in network.nodes[:2])
    spread, constant = pool.spread(rows, line, weights)
    if conv.bias is not None:
        constant = constant + spread.sum((3, 4)) @ conv.bias
    pixels = cut.matrix @ spread.flatten(2, 3)
    form = F.fold(pixels.flatten(0, 1), network.shapes[0][1:], cut.size, stride=cut.step)
    return form.unflatten(0, rows.shape[:2]), constant
