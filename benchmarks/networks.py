"""Small networks of many kinds for images of 8 x 8. Needs torch alone: a peer has an environment of its own."""

from functools import partial

from torch import Tensor, nn


class Residual(nn.Module):
    """relu(z + f(z)), f two convolutions with batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        one, two = (
            (nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)) for _ in range(2)
        )
        self.layers, self.last = nn.Sequential(*one, nn.ReLU(), *two), nn.ReLU()

    def forward(self, z: Tensor) -> Tensor:
        return self.last(z + self.layers(z))


def dense(activation: type[nn.Module], width: int = 40) -> nn.Module:
    """Two hidden layers."""
    hidden = nn.Linear(64, width), activation(), nn.Linear(width, width), activation()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def conv(*layers: nn.Module) -> nn.Module:
    """A linear classifier behind these layers."""
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


ACTIVATIONS = (*(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.SiLU, nn.GELU),)
KINDS = {
    **{activation.__name__: partial(dense, activation) for activation in ACTIVATIONS},
    "conv, BatchNorm": lambda: conv(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
    ),
    "conv, residual": lambda: conv(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), Residual(4)),
    "conv, average": lambda: conv(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU()),
    "conv, maximum": lambda: conv(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU()),
    "conv, Tanh": lambda: conv(nn.Conv2d(1, 4, 3, 2), nn.Tanh(), nn.Conv2d(4, 6, 2), nn.Tanh()),
}
