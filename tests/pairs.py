"""Small pairs of networks, the points of their balls, and what the networks make of these by torch itself."""

import itertools
import math
from fractions import Fraction

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


def pooled(seed=0):
    """A convolution, max-pooling with padding and one more convolution, for images of 1 x 2 x 2 or 1 x 3 x 3."""
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2, stride=1, padding=1)]
    head = [nn.Conv2d(2, 2, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*body, *head).double()


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


def attacked(objective, x, eps, steps=25, starts=20):
    """Largest value of `objective` found by sampling and by a plain projected gradient ascent."""
    z = points(x, eps, starts)
    best = objective(points(x, eps, 2000)).max().item()
    for _ in range(steps):
        z.requires_grad_()
        values = objective(z)
        best = max(best, values.max().item())
        step = torch.autograd.grad(values.sum(), z)[0].sign()
        z = (z.detach() + eps / 8 * step).clamp(x - eps, x + eps)
    return best


def odds(z, label):
    """Log-odds of class `label` at each of the logits `(P, C)`."""
    others = torch.cat([z[:, :label], z[:, label + 1 :]], 1)
    return z[:, label] - others.logsumexp(1)


def chain_of_tiny_weights():
    """A teacher whose slope underflows float64 on the way, 1e-30 twelve times before 1e30 as often; a student that is
    always 1/2; and their difference at x = 1."""
    layers = [nn.Linear(1, 1, bias=False) for _ in range(24)]
    teacher = nn.Sequential(*layers, nn.Linear(1, 2, bias=False)).double()
    student = nn.Sequential(nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        for k, layer in enumerate(layers):
            layer.weight.fill_(1e-30 if k < 12 else 1e30)
        teacher[-1].weight.copy_(torch.tensor([[5.0], [-5.0]]))
        student[0].weight.zero_()
    slope = math.prod(Fraction(layer.weight.item()) for layer in layers)
    return teacher, student, 1 / (1 + math.exp(-10 * float(slope))) - 0.5
