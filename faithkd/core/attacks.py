"""One projected gradient ascent, eq. (2), for training, robust accuracy, agreement and EmpLB alike."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from faithkd import arguments
from faithkd.frozen import own_settings

Clip = tuple[Tensor | float, Tensor | float]


def ball(x: Tensor, eps: float, clip: Clip | None = None) -> tuple[Tensor, Tensor]:
    """Corners of the ball B_ε(x) = {x' : ‖x' − x‖∞ ≤ ε}, Def. 2, rounded inwards; tensors like `x`, float32 or float64.

    A point between them lies in the ball in exact arithmetic: a witness of EmpLB may never profit from a rounding
    error. `clip` = (low, high), numbers or tensors, intersects the ball with valid inputs, in exact arithmetic too.
    Where nothing is left, as for an image that leaves the range by a rounding, both corners are the image.
    """
    eps, (low, high) = arguments.radius(eps), arguments.clip_range(clip, x)
    exact = x.double()
    lower = _inwards(torch.maximum(exact - eps, low).to(x.dtype), 1.0, exact, eps, low)
    upper = _inwards(torch.minimum(exact + eps, high).to(x.dtype), -1.0, exact, eps, high)
    nothing = lower > upper
    return torch.where(nothing, x, lower), torch.where(nothing, x, upper)


def _inwards(corner: Tensor, sign: float, x: Tensor, eps: float, end: Tensor) -> Tensor:
    """A lower (`sign` 1) or upper corner (−1) moved to the next numbers until it lies in the ball and inside `end`."""
    towards = torch.full_like(corner, sign * math.inf)
    while True:
        # the distance and the rounding error of its subtraction, which together are exact (Knuth, 1969)
        a, b = sign * x, -sign * corner.double()
        distance = a + b
        part = distance - a
        error = (a - (distance - part)) + (b - part)
        outside = (distance > eps) | (distance == eps) & (error > 0) | (sign * (corner.double() - end) < 0)
        if not outside.any():
            return corner
        corner = torch.where(outside, torch.nextafter(corner, towards), corner)


def random_start(lower: Tensor, upper: Tensor, generator: torch.Generator) -> Tensor:
    """A uniformly random point of the box. Drawn on the CPU, so that every device starts from the same point."""
    share = torch.rand(lower.shape, generator=generator, dtype=lower.dtype, device="cpu").to(lower.device)
    return torch.clamp(lower + share * (upper - lower), lower, upper)


def step(z: Tensor, loss: Tensor, size: float, lower: Tensor, upper: Tensor) -> Tensor:
    """One step of projected gradient ascent, Π_S(z + η sgn ∇L(z)), eq. (2); z where no loss (N,) depends on z."""
    gradient = torch.autograd.grad(loss.sum(), z, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        return z.detach()
    moved = gradient.sign().mul_(size).add_(z.detach())  # in as little new memory as can be
    return torch.clamp(moved, lower, upper, out=moved)


@own_settings()
def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    clip: Clip | None = None,
) -> Tensor:
    """Last iterate of x^{t+1} = Π_S(x^t + η sgn ∇L(x^t)) from a random start, eq. (2).

    `objective` maps (N, *shape) to one value per image (N,). This is the inner maximisation of training, eq. (3),
    where only the end point counts. Source: Madry et al. (2018).
    """
    x, eps = _check(x, steps, step_size), arguments.radius(eps)
    lower, upper = x - eps, x + eps
    if clip is not None:
        low, high = arguments.clip_range(clip, x)
        lower, upper = torch.maximum(lower, low.to(x)), torch.minimum(upper, high.to(x))
    z = random_start(lower, upper, generator)
    for _ in range(steps):
        z = step(z, objective(z.requires_grad_(True).clone()), step_size, lower, upper)
    return z


@own_settings()
def search(
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float,
    restarts: int,
    generator: torch.Generator,
    clip: Clip | None = None,
) -> tuple[Tensor, Tensor]:
    """Best point met on `restarts` runs of eq. (2): (witnesses (N, *shape), their scores (N,)).

    `objective` maps (N, *shape) to (loss, score), each (N,): the ascent follows the loss, the best point is judged by
    the score (for EmpLB the two are the same; for an attack the score says whether it has succeeded). The image
    itself and every iterate compete, so more steps, seeds or a larger ball only ever add candidates. Where a loss has
    no gradient, the ascent stays where it started.
    """
    x = _check(x, steps, step_size)
    arguments.whole("restarts", restarts)
    lower, upper = ball(x, eps, clip)
    best = torch.clamp(x, lower, upper)
    best_score = objective(best.clone())[1].detach().clone()
    best_score[best_score.isnan()] = -math.inf
    for _ in range(restarts):
        z = random_start(lower, upper, generator)
        for number in range(steps + 1):
            z.requires_grad_(number < steps)
            loss, score = objective(z.clone())
            better = score.detach() > best_score
            best[better], best_score[better] = z.detach()[better], score.detach()[better]
            if number < steps:
                z = step(z, loss, step_size, lower, upper)
    return best, best_score


def _check(x, steps: int, step_size: float) -> Tensor:
    arguments.whole("steps", steps, 0)
    arguments.number("step_size", step_size)
    return arguments.images(x)
