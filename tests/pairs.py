"""Small pairs of networks, the points of their balls, and what the networks make of these by torch itself."""

import itertools

import torch
from torch import nn


def fully_connected(*widths, seed=0, factor=2.0):
    """Linear layers with ReLU between, all weights and biases times `factor`."""
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return scaled(nn.Sequential(*layers[:-1]), factor)


def scaled(network, factor):
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(factor)
    return network.double()


def convolutional(seed=0, factor=1.5):
    """A deep teacher and a flatter student for images of 1 x 4 x 4, max-pooling of two kinds, three classes."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(
        *(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2, stride=1), nn.Conv2d(2, 3, 2, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2, stride=1, padding=1), nn.Flatten(), nn.Linear(48, 3)),
    )
    student = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return scaled(teacher, factor), scaled(student, factor)


def case(kind, seed=0):
    """Teacher, student, two images and a radius at which the bounds are neither exact nor trivial."""
    if kind == "convolutional":
        pair = convolutional(seed)
        return *pair, torch.randn(2, 1, 4, 4, dtype=torch.float64), 0.2
    pair = fully_connected(2, 6, 5, 3, seed=seed), fully_connected(2, 5, 3, seed=seed + 50)
    return *pair, torch.randn(2, 2, dtype=torch.float64), 0.6


KINDS = ("fully connected", "convolutional")


def gap(teacher, student, x):
    """||f_t(x) - f_s(x)||_inf, eq. (8)."""
    return (teacher(x).softmax(1) - student(x).softmax(1)).abs().amax(1)


def points(x, eps, count=400):
    """Points of the ball around one image: a grid up to two inputs, else corners, random points and the middle."""
    x = x.double()
    if x.numel() <= 2:
        side = torch.linspace(-1, 1, 1001 if x.numel() == 1 else 41, dtype=torch.float64)
        return x + eps * torch.cartesian_prod(*[side] * x.numel()).view(-1, *x.shape[1:])
    noise = torch.rand(count, *x.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    noise[: count // 2] = noise[: count // 2].sign()
    noise[0] = 0
    return x + eps * noise


def odds(z, label):
    """Log-odds of class `label` at each of the logits `(P, C)`."""
    others = torch.cat([z[:, :label], z[:, label + 1 :]], 1)
    return z[:, label] - others.logsumexp(1)
