"""PGD on 2 × 2 blocks of pixels: faster, where networks begin as those of Table 4 do. Nothing here is the paper's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from faithkd import arguments
from faithkd.frozen import untouched


def fastest(
    networks: Sequence[nn.Module | None], x: Tensor, clip: tuple | None
) -> tuple[Sequence[nn.Module | None], Tensor, tuple | None, Callable[[Tensor], Tensor]]:
    """Networks, images and clip in the layout that PGD climbs fastest in, and what brings its points back from there.

    That is blocks if they suit every network, else what was given. Only for objectives that do nothing to images but
    hand them to these networks.
    """
    blocks = [None if network is None else on_blocks(network, x.shape[1:]) for network in networks]
    if any((new is None) != (old is None) for new, old in zip(blocks, networks, strict=True)):
        return networks, x, clip, lambda points: points
    clip = clip and tuple(to_blocks(end) for end in arguments.clip_range(clip, x))
    return blocks, to_blocks(x), clip, from_blocks


def on_blocks(network: nn.Module, shape: Sequence[int]) -> nn.Sequential | None:
    """The same network, weights shared, for images of `shape` as `to_blocks` gives them.

    None if it does not begin as Table 4, or if anything suggests that its first steps are not just its first layer's.
    """
    first = network[0] if untouched(network, nn.Sequential) and len(network) else None
    if not untouched(first, nn.Conv2d) or len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
        return None
    form = (first.kernel_size, first.stride, first.padding, first.dilation, first.groups)
    return nn.Sequential(_OnBlocks(first), *network[1:]) if form == ((3, 3), (2, 2), (0, 0), (1, 1), 1) else None


class _OnBlocks(nn.Module):
    """A 3 × 3 convolution of stride 2, on images as `to_blocks` gives them.

    Its weights and sums, as a convolution of 2 × 2 blocks of pixels by their neighbours: without the gaps, on which a
    CPU spends half of a backward pass to the image.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution

    def forward(self, blocks: Tensor) -> Tensor:
        weight = functional.pixel_unshuffle(functional.pad(self.convolution.weight, (0, 1, 0, 1)), 2)
        return functional.conv2d(blocks, weight, self.convolution.bias)


def to_blocks(x: Tensor) -> Tensor:
    """Images (N, C, 2h, 2w) as (N, 4C, h, w), each 2 × 2 pixels stacked, in the memory layout that suits pooling."""
    return functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def from_blocks(blocks: Tensor) -> Tensor:
    """The images of `to_blocks`."""
    return functional.pixel_shuffle(blocks, 2).contiguous()
