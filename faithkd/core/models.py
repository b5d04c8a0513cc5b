"""The paper's networks as plain `nn.Sequential` that return logits g(x); softmax only where the paper writes σ."""

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import nn


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


def parameter_count(network: nn.Module) -> int:
    """The number of weights and biases, by which §6 calls a student 37.7 % smaller than its teacher."""
    return sum(parameter.numel() for parameter in network.parameters())
