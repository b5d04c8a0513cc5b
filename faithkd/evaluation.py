"""What the paper measures, image by image: robust accuracy, agreement (Defs 1, 3) and EmpLB (§4.1)."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from faithkd.attacks import Clip, search
from faithkd.bounds.network import ball, check_images, prepare_pair
from faithkd.errors import FaithkdError
from faithkd.losses import cross_entropy

CHUNK = 500  # images attacked at once: large enough for fast matrix products, small enough for the cache


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


def confidence_difference(teacher: nn.Module, student: nn.Module, x: Tensor) -> Tensor:
    """‖f_t(x) − f_s(x)‖∞ with f = σ(g), the objective of eq. (8). Images (N, *shape) → (N,) in [0, 1]."""
    return (torch.softmax(teacher(x), 1) - torch.softmax(student(x), 1)).abs().amax(1)


def predictions(network: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes c(x) = arg max_c f^c(x), Def. 1. Images (N, *shape) → (N,)."""
    with torch.no_grad():
        return network(x).argmax(1)


def empirical_lower_bound(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    eps: float,
    *,
    steps: int = 50,
    restarts: int = 5,
    seed: int = 0,
    step_factor: float = 2.5,
    clip: Clip | None = None,
) -> LowerBound:
    """EmpLB: PGD ascends ‖f_t(x') − f_s(x')‖∞ over B_ε(x), a lower bound on δ*, §4.1.

    `x` (N, *shape) in the networks' own input space, `eps` the ℓ∞ radius there; step size `step_factor`·ε/`steps`.
    `values` are evaluated in float64 at `witnesses`, which lie in the ball. Raises FaithkdError for networks or
    inputs that `faithfulness_upper_bound` would refuse too. Source: §4.1, §6.
    """
    images = check_images(x)
    prepare_pair(teacher, student, images)
    ball(images, eps, clip)  # the same refusals as the upper bound's, for eps and clip too
    if steps < 1 or restarts < 1:
        raise FaithkdError(f"steps and restarts must be at least 1, not steps={steps}, restarts={restarts}")
    teacher, student = _frozen(teacher, x), _frozen(student, x)

    def objective(z: Tensor) -> tuple[Tensor, Tensor]:
        difference = confidence_difference(teacher, student, z)
        return difference, difference

    witnesses = _attack(lambda rows: objective, x, eps, steps, step_factor, restarts, seed, clip)
    with torch.no_grad():
        exact = confidence_difference(teacher.double(), student.double(), witnesses.double())
    return LowerBound(exact.cpu(), witnesses)


def robust(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
    step_factor: float = 2.5,
    clip: Clip | None = None,
) -> Attack:
    """Whether PGD on L_CE(f(x'), y) finds no misclassified point of B_ε(x), eq. (2); its mean is robust accuracy, §6.

    `holds` is an upper estimate of robustness: an attack that fails proves nothing. At ε = 0 it is clean accuracy.
    """
    network = _frozen(network, x)

    def prepare(rows: slice) -> Callable:
        labels = y[rows]

        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            logits = network(z)
            return cross_entropy(logits, labels), (logits.argmax(1) != labels).to(z.dtype)

        return objective

    witnesses = _attack(prepare, x, eps, steps if eps else 0, step_factor, restarts, seed, clip)
    return Attack(predictions(network, witnesses) == y, witnesses)


def agreement(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    eps: float,
    *,
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
    step_factor: float = 2.5,
    clip: Clip | None = None,
) -> Attack:
    """Whether teacher and student agree at x and PGD finds no x' in B_ε(x) with c_t(x') ≠ c_s(x'), eqs (13)–(14).

    The mean of `holds` is the empirical distillation agreement: an upper estimate of Def. 3. The attack maximises
    the student's cross-entropy against the teacher's hard prediction at the perturbed image x', which is what
    Def. 1 asks for. Where both disagree already at x, the witness is x.
    """
    teacher, student = _frozen(teacher, x), _frozen(student, x)

    def objective(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            hard = teacher(z).argmax(1)
        logits = student(z)
        return cross_entropy(logits, hard), (logits.argmax(1) != hard).to(z.dtype)

    witnesses = _attack(lambda rows: objective, x, eps, steps if eps else 0, step_factor, restarts, seed, clip)
    return Attack(predictions(teacher, witnesses) == predictions(student, witnesses), witnesses)


def _attack(prepare, x, eps, steps, step_factor, restarts, seed, clip) -> Tensor:
    """Witnesses of the best of `restarts` searches, in chunks; one seed draws the same starts on every run."""
    generator = torch.Generator().manual_seed(seed)
    step_size = step_factor * float(eps) / max(steps, 1)
    found = [
        search(
            prepare(slice(start, start + CHUNK)),
            x[start : start + CHUNK],
            float(eps),
            steps=steps,
            step_size=step_size,
            restarts=restarts,
            generator=generator,
            clip=clip,
        )[0]
        for start in range(0, len(x), CHUNK)
    ]
    return torch.cat(found) if found else x.clone()


def _frozen(network: nn.Module, x: Tensor) -> nn.Module:
    """A copy without weight gradients, in the images' precision and place; the caller's network is left alone."""
    return deepcopy(network).to(x).eval().requires_grad_(False)
