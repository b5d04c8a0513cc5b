"""One projected gradient ascent, eq. (2), for training, robust accuracy, agreement and EmpLB alike."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from faithkd import arguments
from faithkd.blocks import fastest
from faithkd.core.losses import difference
from faithkd.errors import FaithkdError
from faithkd.frozen import Logits, frozen, own_settings

CHUNK = 500  # images attacked at once: large enough for fast matrix products, small enough for the cache
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
    x, eps = arguments.images(x), arguments.radius(eps)
    steps, step_size = arguments.whole("steps", steps, 0), arguments.number("step_size", step_size)
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
    x, restarts = arguments.images(x), arguments.whole("restarts", restarts)
    steps, step_size = arguments.whole("steps", steps, 0), arguments.number("step_size", step_size)
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


# --- the same for a caller's networks


@dataclass(frozen=True)
class LowerBound:
    """EmpLB per image: `values` (N,) float64 and the images that attain them, `witnesses` (N, *shape)."""

    values: Tensor
    witnesses: Tensor


@dataclass(frozen=True)
class Attack:
    """What an attack found per image: `holds` (N,) bool is False where it succeeded, at `witnesses` (N, *shape)."""

    holds: Tensor
    witnesses: Tensor


@dataclass(frozen=True)
class Search:
    """How long eq. (2) is followed, and from where: `restarts` runs of `steps` of size `step_factor`·ε/`steps`."""

    steps: int = 50
    restarts: int = 1
    seed: int = 0
    step_factor: float = 2.5

    @staticmethod
    def of(keywords: dict) -> "Search":
        """From a caller's keywords: raises FaithkdError for one that is misspelt, too."""
        arguments.keywords(keywords, [part.name for part in fields(Search)] + ["clip"])
        return Search(**keywords)

    def __post_init__(self) -> None:
        arguments.whole("steps", self.steps)
        arguments.whole("restarts", self.restarts)
        arguments.random_seed(self.seed)
        arguments.number("step_factor", self.step_factor)


class Balls:
    """Balls B_ε(x) and networks on them, checked: searched with `rough` copies, judged by `exact` ones in float64."""

    def __init__(self, x: Tensor, eps: float = 0.0, clip: Clip | None = None, **networks: nn.Module) -> None:
        x, self.eps = arguments.images(x), arguments.radius(eps)
        self.clip = arguments.clip_range(clip, x)
        networks = {name: arguments.as_module(network) for name, network in networks.items()}
        for name, network in networks.items():
            arguments.network(network, name)
        found = (x.dtype, *(weight.dtype for network in networks.values() for weight in network.parameters()))
        tried = frozen({name: Logits(network) for name, network in networks.items()}, torch.float64, x)
        some = x[:CHUNK] if len(x) else x.new_zeros(1, *x.shape[1:])
        with torch.no_grad():
            logits = zip(networks, tried(some.double()), strict=True)
        counts = [arguments.class_count(each, some, name) for name, each in logits]
        arguments.same_classes(counts[0], counts[-1])
        self.count = counts[0]
        two = some[:2].double()
        beside = zip(tried(two), tried(two[:1].expand_as(two).clone().requires_grad_(True)), strict=True)
        for each, (name, network), (said, again) in zip(tried.networks, list(networks.items()), beside, strict=True):
            if not torch.isclose(again[0], said[0], rtol=1e-6, atol=1e-6).all():
                raise FaithkdError(
                    f"{name} answers for an image by the others of its batch: attacks ask about each alone"
                )
            if not again.requires_grad and (said != said[:1]).any():
                why = "perhaps for a torch.no_grad; of attacks only the random starts are left"
                warnings.warn(f"{name} hands no gradient to its images, {why}", stacklevel=4)
            each.tell(name, network)
            networks[name] = Logits(network) if each.softmax else network
        self.rough = frozen(networks, torch.float64 if torch.float64 in found else torch.float32, x)
        self.exact = frozen(networks, torch.float64, x)
        self.x = x.to(self.rough.dtype)

    def labels(self, y) -> Tensor:
        """The labels of the images, checked."""
        return arguments.labels(y, len(self.x), self.count).to(self.x.device)

    @torch.no_grad()
    def logits(self, points: Tensor) -> tuple[Tensor, ...]:
        """The logits of each network at `points`, one per image, in float64: (N, C) each."""
        parts = [self.exact(some.double()) for some in points.split(CHUNK)]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def classes(self, points: Tensor) -> tuple[Tensor, ...]:
        """The classes that each network predicts at `points`: (N,) each."""
        return tuple(logits.argmax(1) for logits in self.logits(points))

    def attack(self, objective: Callable, effort: Search) -> Tensor:
        """The best point that `search` meets in each ball, (N, *shape); one seed draws the same starts on every call.

        `objective(rows, *logits)` gives its (loss, score) from all networks' logits at points of the images `rows`.
        """
        steps = effort.steps if self.eps else 0
        options = {"steps": steps, "step_size": effort.step_factor * self.eps / max(steps, 1)}
        options |= {"restarts": effort.restarts, "generator": torch.Generator().manual_seed(int(effort.seed))}

        def piece(rows: slice) -> Tensor:
            networks, x, clip, back = fastest(self.rough.networks, self.x[rows], tuple(end[rows] for end in self.clip))
            logits = replace(self.rough, networks=networks)
            return back(search(lambda z: objective(rows, *logits(z)), x, self.eps, clip=clip, **options)[0])

        found = [piece(slice(start, start + CHUNK)) for start in range(0, len(self.x), CHUNK)]
        return torch.cat(found) if found else self.x.clone()

    def lower_bound(self, objective: Callable, effort: Search) -> LowerBound:
        """The differences at what `attack` finds, in float64; 0, which is always true, where a network overflows."""
        witnesses = self.attack(objective, effort)
        return LowerBound(difference(*self.logits(witnesses)).nan_to_num(0.0).cpu(), witnesses)
