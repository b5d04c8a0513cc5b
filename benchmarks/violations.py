"""Random checks of soundness at scale: python -m benchmarks.violations --checks 1000000

Random pairs of networks (fully connected and convolutional, of unequal depth and of mixed weight scales), random balls,
and many points in each: random ones, corners, and all that projected gradient ascents pass through. One check is one
point x' against one method's bound: a violation is ||f_t(x') - f_s(x')||_inf > bound + 1e-12, which allows for the
rounding of evaluating the left-hand side in float64.
"""

import sys
import time
from collections import Counter
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from faithkd.bounds import METHODS, faithfulness_upper_bound
from faithkd.bounds.graph import outer_ball
from faithkd.errors import FaithkdError
from faithkd.evaluation import confidence_difference

ROUNDING = 1e-12
IMAGES = 4  # balls for each pair of networks
POINTS = 60  # random points and corners of each ball
STARTS, STEPS = 8, 10  # of the gradient ascents in each ball, whose points are all checked
SOLVERS = ("lp", "milp")  # seconds for each pair where the others take milliseconds: for one pair in RARE
RARE = 100
NODES = 30  # branch-and-bound nodes an image, so that most bounds come from trees that are not finished

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    checks: Annotated[int, typer.Option(help="How many points to check at least, over all methods.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Another seed, other networks.")] = 0,
    methods: Annotated[str, typer.Option(help="By commas; default: all that faithkd.bounds has.")] = ",".join(METHODS),
) -> None:
    """Check random points of random balls around random images of random networks; exit code 1 for any violation."""
    names, start = methods.split(","), time.monotonic()
    made, wrong = run(checks, seed, names)
    print(f"{'method':<14}{'checks':>12}{'violations':>12}")
    for name in names:
        print(f"{name:<14}{made[name]:>12,}{wrong[name]:>12,}")
    print(f"{'all':<14}{made.total():>12,}{wrong.total():>12,}   in {time.monotonic() - start:.0f} s, seed {seed}")
    if wrong.total():
        raise typer.Exit(1)


def run(checks: int, seed: int, names: list[str]) -> tuple[Counter, Counter]:
    """Checks made and violations found by method, over as many random pairs as it takes. Prints each violation."""
    made, wrong, number = Counter(), Counter(), 0
    while made.total() < checks:
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        teacher, student, x = random_pair(generator)
        eps = 10 ** uniform(generator, -2.5, 0.3)
        reached = differences(teacher, student, x, eps, generator)
        for name in names:
            if name in SOLVERS and number % RARE:
                continue
            few = 1 if name in SOLVERS else len(x)
            bound = upper_bound(teacher, student, x[:few], eps, name)
            bad = ~(reached[:few] <= bound.unsqueeze(1) + ROUNDING)  # written so that NaN is a violation
            made[name] += bad.numel()
            wrong[name] += int(bad.sum())
            if bad.any():
                worst = (reached[:few].amax(1) - bound).max().item()
                print(f"VIOLATION: {name}, pair {number} of seed {seed}, eps {eps:.4g}: {worst:.3g} above the bound")
        number += 1
    return made, wrong


def upper_bound(teacher: nn.Sequential, student: nn.Sequential, x: Tensor, eps: float, name: str) -> Tensor:
    """One method's bounds `(N,)`, with little work for those that would go on for long."""
    options = {"nodes": NODES} if name in ("bab", "best") else {"max_nodes": NODES} if name == "milp" else {}
    return faithfulness_upper_bound(teacher, student, x, eps, method=name, **options).values


def differences(teacher: nn.Module, student: nn.Module, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """||f_t(x') - f_s(x')||_inf at many points of each ball, `(N, points)`."""
    lower, upper = (end.unsqueeze(1) for end in outer_ball(x, eps))
    shape = (len(x), POINTS + STARTS, *x.shape[1:])
    share = torch.rand(shape, dtype=torch.float64, generator=generator)
    share[:, : POINTS // 2] = share[:, : POINTS // 2].round()  # corners
    points = (lower + share * (upper - lower)).clamp(lower, upper)
    passed, ascending = [points[:, :POINTS]], points[:, POINTS:]
    for _ in range(STEPS):
        ascending = ascending.detach().requires_grad_()
        values = confidence_difference(teacher, student, ascending.flatten(0, 1))
        (slope,) = torch.autograd.grad(values.sum(), ascending)
        ascending = (ascending.detach() + 0.3 * eps * slope.sign()).clamp(lower, upper)
        passed.append(ascending)
    everything = torch.cat(passed, 1)
    with torch.no_grad():
        return confidence_difference(teacher, student, everything.flatten(0, 1)).view(len(x), -1)


def random_pair(generator: torch.Generator) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """Two small random networks of float64 weights on the same kind of images, and IMAGES images for them."""
    classes = whole(generator, 2, 5)
    if uniform(generator, 0, 1) < 0.5:
        shape = (whole(generator, 1, 6),)
        pair = [fully_connected(generator, shape[0], classes) for _ in range(2)]
    else:
        shape = (whole(generator, 1, 2), whole(generator, 4, 6), whole(generator, 4, 6))
        pair = [convolutional(generator, shape, classes) for _ in range(2)]
    for network in pair:
        randomise(network, generator)
    return *pair, torch.randn(IMAGES, *shape, dtype=torch.float64, generator=generator)


def fully_connected(generator: torch.Generator, inputs: int, classes: int) -> nn.Sequential:
    """One to four hidden layers of 2 to 12 units."""
    widths = [inputs, *(whole(generator, 2, 12) for _ in range(whole(generator, 1, 4))), classes]
    layers = [layer for pair in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutional(generator: torch.Generator, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """A convolution, ReLU and max-pooling in either order or no pooling, perhaps another convolution, linear layers."""
    filters = whole(generator, 1, 3)
    body = [nn.Conv2d(shape[0], filters, whole(generator, 2, 3), padding=whole(generator, 0, 1))]
    body += [[nn.ReLU(), nn.MaxPool2d(2)], [nn.MaxPool2d(2, stride=1), nn.ReLU()], [nn.ReLU()]][whole(generator, 0, 2)]
    if whole(generator, 0, 1):
        body += [nn.Conv2d(filters, 2, 2, padding=1), nn.ReLU()]
    body.append(nn.Flatten())
    width = nn.Sequential(*body)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*body, *fully_connected(generator, width, classes))


def randomise(network: nn.Sequential, generator: torch.Generator) -> None:
    """Weights in float64 of a scale drawn for each layer, from too small to matter to saturated softmax."""
    network.double().requires_grad_(False)
    for layer in network:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            scale = 10 ** uniform(generator, -0.5, 0.7) / layer.weight[0].numel() ** 0.5
            for weight in layer.parameters():
                weight.copy_(scale * torch.randn(weight.shape, dtype=torch.float64, generator=generator))


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A number drawn from [low, high)."""
    return low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator).item()


def whole(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number drawn from low .. high."""
    return int(torch.randint(low, high + 1, (), generator=generator))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        app()
    except FaithkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
