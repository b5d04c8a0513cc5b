"""The paper's networks as plain `nn.Sequential` that return logits g(x); softmax only where the paper writes σ."""

from collections.abc import Callable, Sequence
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
        return functional.conv2d(blocks, _blocked(self.convolution), self.convolution.bias)


def _blocked(convolution: nn.Conv2d) -> Tensor:
    return functional.pixel_unshuffle(functional.pad(convolution.weight, (0, 1, 0, 1)), 2)


def _bias(convolution: nn.Conv2d) -> Tensor:
    return convolution.weight.new_zeros(convolution.out_channels) if convolution.bias is None else convolution.bias


def on_blocks(network: nn.Module, shape: Sequence[int]) -> nn.Sequential | None:
    """The same network, weights shared, for images as `to_blocks` gives them; None if it does not begin as Table 4.

    `shape`: that of an image, (C, height, width); also None where its sides are not even.
    """
    first = network[0] if isinstance(network, nn.Sequential) and len(network) else None
    if not isinstance(first, nn.Conv2d) or shape[-1] % 2 or shape[-2] % 2:
        return None
    form = (first.kernel_size, first.stride, first.padding, first.dilation, first.groups)
    if form != ((3, 3), (2, 2), (0, 0), (1, 1), 1):
        return None
    return nn.Sequential(_OnBlocks(first), *network[1:])


class _Together(nn.Module):
    """Networks of `on_blocks` at the same points: one first convolution for all, and what follows while it is alike.

    A CPU that works on sixteen channels at a time spends little more on it than on that of one network.
    """

    def __init__(self, networks: Sequence[nn.Sequential]):
        super().__init__()
        first, rest = [network[0].convolution for network in networks], [list(network[1:]) for network in networks]
        self.channels, shared = [convolution.out_channels for convolution in first], []
        self.register_buffer("weight", torch.cat([_blocked(convolution) for convolution in first]))
        self.register_buffer("bias", torch.cat([_bias(convolution) for convolution in first]))
        while all(layers and type(layers[0]) in (nn.ReLU, nn.MaxPool2d) for layers in rest):
            if len({repr(layers[0]) for layers in rest}) > 1:
                break
            shared.append(rest[0][0])
            rest = [layers[1:] for layers in rest]
        for k in range(len(shared) - 1):  # max(relu(z)) = relu(max(z)), of which the latter has less to do
            if isinstance(shared[k], nn.ReLU) and isinstance(shared[k + 1], nn.MaxPool2d):
                shared[k : k + 2] = shared[k + 1], shared[k]
        self.shared, self.rest = nn.Sequential(*shared), nn.ModuleList(nn.Sequential(*layers) for layers in rest)

    def forward(self, blocks: Tensor) -> tuple[Tensor, ...]:
        z = self.shared(functional.conv2d(blocks, self.weight, self.bias)).split(self.channels, 1)
        return tuple(rest(part) for rest, part in zip(self.rest, z, strict=True))


def together(networks: Sequence[nn.Module]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The logits of all networks at the same points, as one function: of frozen networks, for gradients in the points.

    Networks of `on_blocks` share the work of their first layers; their logits are the same but for rounding.
    """
    if all(
        isinstance(network, nn.Sequential) and isinstance(next(iter(network), None), _OnBlocks) for network in networks
    ):
        return _Together(networks)
    return lambda z: tuple(network(z) for network in networks)


def to_blocks(x: Tensor) -> Tensor:
    """Images (N, C, 2h, 2w) as (N, 4C, h, w), each 2 × 2 pixels stacked, in the memory layout that suits pooling."""
    return functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def from_blocks(blocks: Tensor) -> Tensor:
    """The images of `to_blocks`."""
    return functional.pixel_shuffle(blocks, 2).contiguous()


def parameter_count(network: nn.Module) -> int:
    """The number of weights and biases, by which §6 calls a student 37.7 % smaller than its teacher."""
    return sum(parameter.numel() for parameter in network.parameters())
