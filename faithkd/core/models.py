"""The paper's networks as plain `nn.Sequential` that return logits g(x); softmax only where the paper writes σ."""

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional


def fully_connected(inputs: int, hidden: Sequence[int], classes: int = 10) -> nn.Sequential:
    """Fully connected ReLU network, z^(k) = W^(k) φ(z^(k-1)) + b^(k), §4.

    `inputs` counts the input values (28 × 28 = 784), `hidden` lists the hidden widths; an output layer of width
    `classes` follows them. Maps (N, *shape) to logits (N, classes). Source: §A.1, §A.2.
    """
    widths = [inputs, *hidden, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(filters: Sequence[int], hidden: Sequence[int], classes: int = 10) -> nn.Sequential:
    """The convolutional network of Table 4 for images of 3 × 32 × 32, layer by layer as printed.

    `filters`: the three numbers of filters; `hidden`: the two hidden widths. Table 4 prints no ReLU between the
    third convolution and the first fully connected layer, so there is none. Source: §A.3.
    """
    one, two, three = filters
    return nn.Sequential(
        nn.Conv2d(3, one, kernel_size=3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=2),
        nn.Conv2d(one, two, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(two, three, kernel_size=3, stride=1),
        *fully_connected(three * 2 * 2, hidden, classes),
    )


INITIALISATIONS = {
    "pytorch": None,  # what nn.Linear and nn.Conv2d do by themselves
    "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "glorot": nn.init.xavier_uniform_,
}


def build(
    architecture, shape: Sequence[int], classes: int = 10, *, seed: int, initialisation: str = "pytorch"
) -> nn.Sequential:
    """A network with the architecture of the parameters and random weights that follow from `seed`.

    `initialisation`: one of INITIALISATIONS; with "he" (He et al., 2015) and "glorot" (Glorot and Bengio, 2010) all
    biases start at 0.
    """
    with torch.random.fork_rng(devices=[]):
        if architecture.kind == "convolutional":
            network = convolutional(architecture.filters, architecture.hidden, classes)
        else:
            network = fully_connected(prod(shape), architecture.hidden, classes)
    return initialise(network, initialisation, seed=seed)


def initialise(network: nn.Module, initialisation: str = "pytorch", *, seed: int) -> nn.Module:
    """Draw all weights of a network on the CPU anew, in place; they follow from `seed` as those of `build`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        for layer in layers:
            layer.reset_parameters()
        if draw := INITIALISATIONS[initialisation]:
            for layer in layers:
                draw(layer.weight)
                nn.init.zeros_(layer.bias)
    return network


class _OnBlocks(nn.Module):
    """A convolution with kernel 3 and stride 2, on images that are cut into blocks of 2 × 2 pixels.

    Its kernel, filled up with zeros to 4 × 4 and cut in the same way, has stride 1: the same sums without the gaps,
    on which a CPU spends half of a backward pass to the image.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution

    def forward(self, blocks: Tensor) -> Tensor:
        weight = functional.pixel_unshuffle(functional.pad(self.convolution.weight, (0, 1, 0, 1)), 2)
        return functional.conv2d(blocks, weight, self.convolution.bias)


def _untouched(module: nn.Module, kind: type) -> bool:
    """Whether a module is of this very class, and neither hooks nor a method of its own change what it does."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)


def on_blocks(network: nn.Module, shape: Sequence[int]) -> nn.Sequential | None:
    """The same network, weights shared, for images as `to_blocks` gives them; None if it does not begin as Table 4.

    `shape`: that of an image, (C, height, width); also None where its sides are not even, or where anything suggests
    that the network's first steps are not just those of its first layer.
    """
    if not _untouched(network, nn.Sequential) or not len(network) or not _untouched(network[0], nn.Conv2d):
        return None
    if len(shape) != 3 or shape[-1] % 2 or shape[-2] % 2:
        return None
    first = network[0]
    form = (first.kernel_size, first.stride, first.padding, first.dilation, first.groups)
    if form != ((3, 3), (2, 2), (0, 0), (1, 1), 1):
        return None
    return nn.Sequential(_OnBlocks(first), *network[1:])


def to_blocks(x: Tensor) -> Tensor:
    """Images (N, C, 2h, 2w) as (N, 4C, h, w), each 2 × 2 pixels stacked, in the memory layout that suits pooling."""
    return functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def from_blocks(blocks: Tensor) -> Tensor:
    """The images of `to_blocks`."""
    return functional.pixel_shuffle(blocks, 2).contiguous()


def parameter_count(network: nn.Module) -> int:
    """The number of weights and biases, by which §6 calls a student 37.7 % smaller than its teacher."""
    return sum(parameter.numel() for parameter in network.parameters())
