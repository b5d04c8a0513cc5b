"""One projected gradient ascent, eq. (2), for training, robust accuracy, agreement and EmpLB alike."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from faithkd import models

Clip = tuple[torch.Tensor, torch.Tensor]


def fastest(
    networks: Sequence[nn.Module | None], x: torch.Tensor, clip: Clip | None
) -> tuple[Sequence[nn.Module | None], torch.Tensor, Clip | None, Callable[[torch.Tensor], torch.Tensor]]:
    """Networks, images and clip in the layout that PGD climbs fastest in, and what brings its points back from there.

    That is 2 × 2 blocks of pixels (`models.on_blocks`) if it suits every network, else what was given. Only for
    objectives that do nothing to images but hand them to these networks.
    """
    blocks = [None if network is None else models.on_blocks(network, x.shape[1:]) for network in networks]
    if any((new is None) != (old is None) for new, old in zip(blocks, networks, strict=True)):
        return networks, x, clip, lambda points: points
    clip = clip and tuple(models.to_blocks(end.to(x).expand(1, *x.shape[1:])) for end in clip)
    return blocks, models.to_blocks(x), clip, models.from_blocks


def ball(x: torch.Tensor, eps: float, clip: Clip | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Corners of B_ε(x) = {x' : ‖x' − x‖∞ ≤ ε}, Def. 2, rounded inwards, as tensors like `x`.

    The corners are rounded towards `x`, so that a point between them lies in the ball in exact arithmetic: a witness
    of EmpLB may never profit from a rounding error. `clip` = (low, high) intersects the ball with valid inputs.
    """
    exact = x.double()
    lower, upper = (exact - eps).to(x.dtype), (exact + eps).to(x.dtype)
    lower = torch.where(lower.double() < exact - eps, torch.nextafter(lower, x), lower)
    upper = torch.where(upper.double() > exact + eps, torch.nextafter(upper, x), upper)
    if clip is not None:
        lower, upper = torch.maximum(lower, clip[0].to(x)), torch.minimum(upper, clip[1].to(x))
    return lower, upper


def random_start(lower: torch.Tensor, upper: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A uniformly random point of the box. Drawn on the CPU, so that every device starts from the same point."""
    share = torch.rand(lower.shape, generator=generator, dtype=lower.dtype).to(lower.device)
    return torch.clamp(lower + share * (upper - lower), lower, upper)


def step(
    z: torch.Tensor, gradient: torch.Tensor, size: float, lower: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """One step of projected gradient ascent, Π_S(z + η sgn ∇L(z)), eq. (2), in as little new memory as can be."""
    moved = gradient.sign().mul_(size).add_(z)
    return torch.clamp(moved, lower, upper, out=moved)


@torch.enable_grad()  # also where the caller has switched gradients off
def ascend(
    objective: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    clip: Clip | None = None,
) -> torch.Tensor:
    """Last iterate of x^{t+1} = Π_S(x^t + η sgn ∇L(x^t)) from a random start, eq. (2).

    `objective` maps (N, *shape) to one value per image (N,). This is the inner maximisation of training, eq. (3),
    where only the end point counts. Source: Madry et al. (2018).
    """
    lower, upper = x - eps, x + eps
    if clip is not None:
        lower, upper = torch.maximum(lower, clip[0].to(x)), torch.minimum(upper, clip[1].to(x))
    z = random_start(lower, upper, generator)
    for _ in range(steps):
        z.requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(z).sum(), z)
        z = step(z.detach(), gradient, step_size, lower, upper)
    return z


@torch.enable_grad()
def search(
    objective: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float,
    restarts: int,
    generator: torch.Generator,
    clip: Clip | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best point met on `restarts` runs of eq. (2): (witnesses (N, *shape), their scores (N,)).

    `objective` maps (N, *shape) to (loss, score), each (N,): the ascent follows the loss, the best point is judged by
    the score (for EmpLB the two are the same; for an attack the score says whether it has succeeded). The image
    itself and every iterate compete, so more steps, seeds or a larger ball only ever add candidates.
    """
    lower, upper = ball(x, eps, clip)
    best, best_score = x.clone(), objective(x)[1].detach().clone()
    for _ in range(restarts):
        z = random_start(lower, upper, generator)
        for number in range(steps + 1):
            z.requires_grad_(number < steps)
            loss, score = objective(z)
            score, point = score.detach(), z.detach()
            better = score > best_score
            best[better], best_score[better] = point[better], score[better]
            if number < steps:
                (gradient,) = torch.autograd.grad(loss.sum(), z)
                z = step(point, gradient, step_size, lower, upper)
    return best, best_score
