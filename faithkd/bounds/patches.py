"""The first convolution and the max-pool behind it: from rows on the pool's output to their maxima over the ball.

A pooled value sees a small patch of the image, its neighbour the next one, and only a few pixels at their edges are
shared. So one matrix product turns coefficients of the convolution's outputs, window by window, into coefficients of
pixels, patch by patch; those of shared pixels are added up, and the maximum over the ball is |coefficients| . radius.
That is what `linear.pull` and `linear.over_ball` do with a transposed convolution and whole images, in half the time.

Here the row comes last, `(N, ..., R)`, not second: then every step works on long pieces of memory.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.graph import Network
from faithkd.bounds.operators import TINY, Box, Conv2d, Lines, MaxPool2d, gamma, largest, pair


@dataclass(frozen=True)
class Patches:
    """How a convolution and the max-pool behind it see the image: in patches of `size`, one every `step` pixels.

    `matrix` `(pixels, coefficients)`: what coefficients of a window, `(channels, window)`, are on its patch, `(colours,
    *size)`; `grid`: the number of patches down and across; `shared`: how many pixels two neighbours have in common.
    """

    matrix: Tensor
    size: tuple[int, int]
    step: tuple[int, int]
    grid: tuple[int, int]
    shared: tuple[int, int]


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
    window, stride, (channels, colours, *kernel) = pair(pool.kernel_size), conv.stride, conv.weight.shape
    size = tuple(s * (w - 1) + k for s, w, k in zip(stride, window, kernel, strict=True))
    step = tuple(s * t for s, t in zip(stride, pair(pool.stride), strict=True))
    shared = tuple(max(0, s - t) for s, t in zip(size, step, strict=True))
    if any(2 * part > s for part, s in zip(shared, size, strict=True)):
        return None  # pixels in more than two patches down or across
    units = torch.eye(channels * math.prod(window), dtype=conv.weight.dtype, device=conv.weight.device)
    matrix = conv.back(units.view(-1, channels, *window), (colours, *size)).flatten(1).T
    return Patches(matrix.contiguous(), size, step, network.shapes[2][1:], shared)


def cut(patches: Patches, images: Tensor) -> Tensor:
    """The patches of images `(N, colours, height, width)`: `(N, pixels, places)`."""
    return F.unfold(images, patches.size, stride=patches.step)


def terms(patches: Patches) -> int:
    """How many numbers are added up at most from coefficients to maxima: in the product and in both sums."""
    return sum(patches.matrix.shape) * (math.prod(patches.grid) + 1)


def maximum(patches: Patches, coefficients: Tensor, at_middle: Tensor, radius: Tensor) -> Tensor:
    """max of c . conv(x) over the ball for the coefficients c `(N, channels, window, places, R)`: `(N, R)`.

    `at_middle` `(N, channels, window, places)`: the convolution's outputs at the middle of the ball, where they count;
    `radius` `(N, pixels, places)`: the ball's, as `cut` gives it. No rounding is accounted for here: see `terms`.
    """
    return _Maximum.apply(coefficients, at_middle, radius, patches)


def over_ball(network: Network, line: Lines, box: Box, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Certified maximum over the ball of rows on the first max-pool's output: `(N, R, *shapes[2])` to `(N, R)`.

    `linear.pull` through two nodes and `linear.over_ball` in one. `line`: the pool's; `weights`: its slopes.
    """
    pieces, (conv, pool) = patches(network), (node.operator for node in network.nodes[:2])
    lower, upper = box
    middle = (lower + upper) / 2
    radius = torch.maximum(upper - middle, middle - lower)
    places = pool.windows(network.shapes[1]).to(middle.device)
    at_middle = conv(middle).flatten(2)[:, :, places]
    columns = rows.flatten(3).permute(0, 2, 3, 1).contiguous()  # `(N, channels, places, R)`
    positive = columns.clamp(min=0)
    negative = columns - positive
    below = line.below[:, 0].unsqueeze(-1) if weights is None else pool.allowed(weights, line).permute(0, 2, 3, 4, 1)
    spread = positive.unsqueeze(2) * line.above[:, 0].unsqueeze(-1)
    spread = torch.addcmul(spread, negative.unsqueeze(2), below)
    value = maximum(pieces, spread, at_middle, cut(pieces, radius))
    up, down = line.high[:, 0], None if line.noise is None else line.noise[:, 0]
    if down is not None:
        # the coefficients in a window add up to no more than the row's there, so its largest noise covers them all
        noise = gamma(terms(pieces)) * conv.absolute(largest(lower, upper)).flatten(2)[:, :, places].amax(2)
        up, down = up + noise, down + noise
        value = value - (down.flatten(1).unsqueeze(1) @ negative.flatten(1, 2)).squeeze(1)
        value = value + TINY * down.flatten(1).sum(1, keepdim=True)
    return value + (up.flatten(1).unsqueeze(1) @ positive.flatten(1, 2)).squeeze(1)


class _Maximum(torch.autograd.Function):
    """Its gradient is the convolution at the corner that attains it, which is cheaper than autograd's."""

    @staticmethod
    def forward(ctx, coefficients, at_middle, radius, patches):
        n, *_, places, rows = coefficients.shape
        pixels = patches.matrix @ coefficients.reshape(n, patches.matrix.shape[1], places * rows)
        pixels = pixels.view(n, len(patches.matrix), places, rows)
        _share(patches, pixels)
        ctx.save_for_backward(pixels if ctx.needs_input_grad[0] else None, at_middle, radius)
        ctx.patches, ctx.form = patches, coefficients.shape
        pixels = pixels.abs() if ctx.needs_input_grad[0] else pixels.abs_()
        value = at_middle.flatten(1).unsqueeze(1) @ coefficients.flatten(1, -2)
        return (value + radius.flatten(1).unsqueeze(1) @ pixels.flatten(1, -2)).squeeze(1)

    @staticmethod
    def backward(ctx, gradient):
        pixels, at_middle, radius = ctx.saved_tensors
        move = pixels.sign().mul_(radius.unsqueeze(-1))
        _unshare(ctx.patches, move)
        corner = (ctx.patches.matrix.T @ move.flatten(2)).view(ctx.form).add_(at_middle.unsqueeze(-1))
        return corner.mul_(gradient[:, None, None, None]), None, None, None


def _edges(patches: Patches, pixels: Tensor):
    """For each direction: views of the pixels that a patch shares with the next one, and of the same in the next."""
    colours = len(patches.matrix) // math.prod(patches.size)
    whole = pixels.view(len(pixels), colours, *patches.size, *patches.grid, pixels.shape[-1])
    for axis, (size, shared, count) in enumerate(zip(patches.size, patches.shared, patches.grid, strict=True)):
        if shared and count > 1:
            here = whole.narrow(2 + axis, size - shared, shared).narrow(4 + axis, 0, count - 1)
            there = whole.narrow(2 + axis, 0, shared).narrow(4 + axis, 1, count - 1)
            yield here, there


def _share(patches: Patches, pixels: Tensor) -> None:
    """Count every pixel once: what a patch says of a pixel that the next one sees too is added there, in place."""
    for here, there in _edges(patches, pixels):
        there += here
        here.zero_()


def _unshare(patches: Patches, pixels: Tensor) -> None:
    """What the next patch says of shared pixels, said by both, in place: the transpose of `_share`."""
    for here, there in reversed(list(_edges(patches, pixels))):
        here.copy_(there)
