"""Random checks of soundness at scale: python -m benchmarks.violations --checks 1000000

Random pairs of networks (fully connected and convolutional, of unequal depth and of mixed weight scales), random balls,
and many points in each: random ones, corners, and all that EmpLB's gradient ascents pass through. One check is one
point x' against one method's bound: a violation is ||f_t(x') - f_s(x')||_inf > bound + 1e-12 (rounding in float64).
"""

from collections import Counter
from random import Random
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from benchmarks.common import start
from faithkd import empirical_lower_bound
from faithkd.bounds import METHODS, faithfulness_upper_bound
from faithkd.core import attacks
from faithkd.core.evaluation import confidence_difference

ROUNDING = 1e-12
IMAGES = 4  # balls for each pair of networks
POINTS = 60  # random points and corners of each ball
RESTARTS, STEPS = 8, 10  # of EmpLB, which keeps the largest difference of all points that it passes
SOLVERS, RARE = ("lp", "milp"), 100  # seconds for each pair where the others take milliseconds: for one pair in RARE
# Branch-and-bound nodes an image: few, so that most bounds come from trees that are not finished.
LITTLE = {"bab": {"nodes": 30}, "best": {"nodes": 30}, "milp": {"max_nodes": 30}}


def main(
    checks: Annotated[int, typer.Option(help="How many points to check at least, over all methods.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Another seed, other networks.")] = 0,
    methods: Annotated[str, typer.Option(help="By commas; default: all that faithkd.bounds has.")] = ",".join(METHODS),
) -> None:
    """Check random points of random balls around random images of random networks; exit code 1 for any violation."""
    made, wrong = run(checks, seed, methods.split(","))
    for name in made:
        print(f"{name:<12}{made[name]:>12,} checks {wrong[name]:>8,} violations")
    if wrong.total():
        raise typer.Exit(1)


def run(checks: int, seed: int, names: list[str]) -> tuple[Counter, Counter]:
    """Checks made and violated balls by method, over as many random pairs as it takes. Prints each violation."""
    made, wrong, number = Counter(), Counter(), 0
    while made.total() < checks:
        draw = Random(1_000_003 * seed + number)
        torch.manual_seed(draw.getrandbits(60))
        flat, classes = draw.random() < 0.5, draw.randint(2, 5)
        shape = (draw.randint(1, 6),) if flat else (draw.randint(1, 2), draw.randint(4, 6), draw.randint(4, 6))
        teacher, student = (random_network(draw, shape, classes) for _ in range(2))
        x = torch.randn(IMAGES, *shape, dtype=torch.float64)
        eps = 10 ** draw.uniform(-2.5, 0.3)
        reached = largest_difference(teacher, student, x, eps, number)
        for name in (name for name in names if name not in SOLVERS or number % RARE == 0):
            bound = faithfulness_upper_bound(teacher, student, x, eps, method=name, **LITTLE.get(name, {})).values
            made[name] += IMAGES * (POINTS + RESTARTS * (STEPS + 1) + 1)
            if few := int((~(reached <= bound + ROUNDING)).sum()):
                wrong[name] += few
                over = float((reached - bound).max())
                print(f"VIOLATION: {name}, pair {number} of seed {seed}, eps {eps:.4g}: {over:.3g} above the bound")
        number += 1
    return made, wrong


def largest_difference(teacher: nn.Module, student: nn.Module, x: Tensor, eps: float, seed: int) -> Tensor:
    """The largest ||f_t(x') - f_s(x')||_inf at many points of each ball, `(N,)`."""
    low, high = (end.unsqueeze(1) for end in attacks.ball(x, eps))
    share = torch.rand(len(x), POINTS, *x.shape[1:], dtype=torch.float64)
    share[:, : POINTS // 2] = share[:, : POINTS // 2].round()  # corners
    points = (low + share * (high - low)).clamp(low, high)
    drawn = confidence_difference(teacher, student, points.flatten(0, 1)).view(len(x), -1).amax(1)
    climbed = empirical_lower_bound(teacher, student, x, eps, steps=STEPS, restarts=RESTARTS, seed=seed)
    return torch.maximum(drawn, climbed.values)


@torch.no_grad()
def random_network(draw: Random, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Perhaps convolutions and max-pooling before or after ReLU, then one to four hidden layers.

    The scale of each layer's weights is drawn, from too small to matter to a saturated softmax.
    """
    layers = []
    if len(shape) > 1:
        filters = draw.randint(1, 3)
        layers += [nn.LazyConv2d(filters, draw.randint(2, 3), padding=draw.randint(0, 1))]
        layers += draw.choice([[nn.ReLU(), nn.MaxPool2d(2)], [nn.MaxPool2d(2, stride=1), nn.ReLU()], [nn.ReLU()]])
        layers += draw.choice([[], [nn.LazyConv2d(filters, 2, 2, padding=1), nn.ReLU()]])
        layers += [nn.Flatten()]
    for _ in range(draw.randint(1, 4)):
        layers += [nn.LazyLinear(draw.randint(2, 12)), nn.ReLU()]
    network = nn.Sequential(*layers, nn.LazyLinear(classes)).double()
    network(torch.zeros(1, *shape, dtype=torch.float64))  # now all layers know their sizes
    for layer in (layer for layer in network if isinstance(layer, nn.Linear | nn.Conv2d)):
        scale = 10 ** draw.uniform(-0.5, 0.7) / layer.weight[0].numel() ** 0.5
        for weight in layer.parameters():
            weight.copy_(scale * torch.randn_like(weight))
    return network.requires_grad_(False)


if __name__ == "__main__":
    start(main)
