"""How cost grows: with the number of images bounded at once, and with the width and depth of the networks."""

import itertools

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.contenders import CONTENDERS
from benchmarks.measure import Job, images_of, run
from faithkd import data, experiment, models
from faithkd.reproduce.params import Params

IMAGES = (1, 10, 100, 1000)
WIDTHS, DEPTH = (10, 20, 40, 80), 3
DEPTHS, WIDTH = (2, 3, 4, 5, 6), 20
NODES = 100  # branch and bound: work that can be repeated exactly, where seconds would all be alike
FEW = 5  # images for width and depth, and for contenders that take long
LONG = 30.0  # seconds: who would take longer for ten times as many images is not asked
STEPS = 400  # of training: enough for the networks to be right on most images, a second each


def measure(p: Params, names: list[str]) -> pd.DataFrame:
    """Rows of quantity (images, width or depth), size, method, eps, seconds an image, bound, megabytes, note."""
    names = [name for name in names if not CONTENDERS[name].slow and "direct" not in name]
    eps = float(p.evaluate.eps[len(p.evaluate.eps) // 2])
    images = images_of(p)
    own = experiment.teacher(p), experiment.student(p, "FD")
    found = []
    for name in names:
        for size in (size for size in IMAGES if size <= len(images)):
            found.append(row(p, "images", size, name, own, images.x[:size], eps))
            if not found[-1]["seconds"] * size * 10 < LONG:
                break
    shapes = {("width", width): [width] * DEPTH for width in WIDTHS}
    shapes |= {("depth", depth): [WIDTH] * depth for depth in DEPTHS}
    for (quantity, size), hidden in shapes.items():
        pair = tuple(quickly_trained(p, hidden, p.seed + k) for k in range(2))
        found += [row(p, quantity, size, name, pair, images.x[:FEW], eps) for name in names]
    return pd.DataFrame(found)


def row(p: Params, quantity: str, size: int, name: str, pair, x, eps: float) -> dict:
    """One measurement as a row of the table."""
    nodes = NODES if CONTENDERS[name].anytime else None
    found = run(Job(name, *pair, x, eps, data.clip_range(p), nodes=nodes))
    told = found.note or f"{found.seconds / len(x):.4f} s an image"
    print(f"{quantity} {size:<5} {name:<28} {told}", flush=True)
    return {
        "quantity": quantity,
        "size": size,
        "method": name,
        "eps": eps,
        "seconds": found.seconds / len(x),
        "bound": found.values.mean().item(),
        "megabytes": found.megabytes,
        "note": found.note,
    }


def quickly_trained(p: Params, hidden: list[int], seed: int) -> nn.Sequential:
    """A fully connected network after STEPS steps of plain training with Adam: no random weights, and no waiting."""
    images, shape = data.training(p), data.SHAPES[p.data.name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = models.fully_connected(images.x[0].numel(), hidden)
        optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in itertools.repeat(None, STEPS):
            chosen = torch.randint(len(images), (p.train.batch_size,))
            optimiser.zero_grad()
            F.cross_entropy(network(images.x[chosen].view(-1, *shape)), images.y[chosen]).backward()
            optimiser.step()
    return network.eval().requires_grad_(False)
