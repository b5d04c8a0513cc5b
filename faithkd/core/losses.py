"""The distillation losses: SD (1), ARD (4), RSLAD (5) and FD (12), each with its inner maximisation.

A loss is a function of two networks, images x and x_adv (N, *shape), labels y (N,), α and T, and gives the mean over
the batch; what an inner maximisation ascends maps images (N, *shape) to one value each (N,).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature

import torch
from torch import Tensor
from torch.nn import functional

from faithkd.errors import FaithkdError

Objective = Callable[[Tensor], Tensor]
Divergence = Callable[..., Tensor]  # of (student's logits, teacher's logits, temperature), one value per image


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student from the teacher at temperature T, per image, L_KL of eq. (1).

    KL(f_t ‖ f_s) = Σ_c f_t^c (log f_t^c − log f_s^c) with f = σ(g/T). Logits (N, C) → (N,). The paper writes
    L_KL(f_s, f_t); this is the reading of Hinton et al. (2015) and of the ARD and RSLAD papers.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The other direction, KL(f_s ‖ f_t), the reading of L_KL(f_s, f_t) in eq. (1) from left to right. As `kl`."""
    return kl(teacher_logits, student_logits, temperature)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with the labels, per image, L_CE of eq. (1). Logits (N, C), labels (N,) → (N,)."""
    return functional.cross_entropy(logits, y, reduction="none")


def difference(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Largest difference in confidence per image, ‖f_t − f_s‖∞ with f = σ(g), in eqs (7)–(8). Logits (N, C) → (N,)."""
    return (torch.softmax(teacher_logits, 1) - torch.softmax(student_logits, 1)).abs().amax(1)


def sd(student, teacher, x, x_adv, y, alpha, temperature, divergence: Divergence = kl) -> Tensor:
    """Standard distillation, α T² L_KL(f_s(x;T), f_t(x;T)) + (1−α) L_CE(f_s(x;1), y), eq. (1). Mean over the batch."""
    logits = student(x)
    soft = temperature**2 * divergence(logits, teacher(x), temperature)
    return (alpha * soft + (1 - alpha) * cross_entropy(logits, y)).mean()


def ard(student, teacher, x, x_adv, y, alpha, temperature, divergence: Divergence = kl) -> Tensor:
    """Adversarially robust distillation, α T² L_KL(f_s(x+δ₀;T), f_t(x;T)) + (1−α) L_CE(f_s(x;1), y), eq. (4)."""
    soft = temperature**2 * divergence(student(x_adv), teacher(x), temperature)
    return (alpha * soft + (1 - alpha) * cross_entropy(student(x), y)).mean()


def rslad(student, teacher, x, x_adv, y, alpha, temperature, divergence: Divergence = kl) -> Tensor:
    """Robust soft label distillation, α L_KL(f_s(x+δ₀), f_t(x)) + (1−α) L_KL(f_s(x), f_t(x)), eq. (5).

    Eq. (5) has temperature 1 throughout and no factor T²; a temperature other than 1 is applied to both terms.
    """
    target = teacher(x)
    perturbed = divergence(student(x_adv), target, temperature)
    clean = divergence(student(x), target, temperature)
    return (alpha * perturbed + (1 - alpha) * clean).mean()


def fd(student, teacher, x, x_adv, y, alpha, temperature, divergence: Divergence = kl) -> Tensor:
    """Faithful distillation, α T² L_KL(f_s(x+δ₀;T), f_t(x+δ₀;T)) + (1−α) L_CE(f_s(x;1), y), eq. (12)."""
    soft = temperature**2 * divergence(student(x_adv), teacher(x_adv), temperature)
    return (alpha * soft + (1 - alpha) * cross_entropy(student(x), y)).mean()


def attack_labels(student, teacher, x, y, divergence: Divergence = kl) -> Objective:
    """What ARD's δ₀ maximises: L_CE(f_s(x+δ), y), below eq. (4); also the inner problem of eq. (3)."""
    return lambda z: cross_entropy(student(z), y)


def attack_soft_labels(student, teacher, x, y, divergence: Divergence = kl) -> Objective:
    """What RSLAD's δ₀ maximises: L_KL(f_s(x+δ), f_t(x)), below eq. (5); the teacher stays at the clean image."""
    with torch.no_grad():
        target = teacher(x)
    return lambda z: divergence(student(z), target)


def attack_difference(student, teacher, x, y, divergence: Divergence = kl) -> Objective:
    """What FD's δ₀ maximises: L_KL(f_s(x+δ), f_t(x+δ)), below eq. (12); both networks see the perturbed image."""
    return lambda z: divergence(student(z), teacher(z))


@dataclass(frozen=True)
class Method:
    """A way to distil: `loss(student, teacher, x, x_adv, y, alpha, temperature)` → scalar, and the objective of δ₀.

    `attack(student, teacher, x, y)` returns what the inner maximisation ascends, or is None where x_adv = x.
    """

    loss: Callable[..., Tensor]
    attack: Callable[..., Objective] | None
    title: str


def reversed_kl(method: Method) -> Method:
    """The method with KL(f_s ‖ f_t) in place of KL(f_t ‖ f_s), in its loss and in what its attack ascends."""
    for part in filter(None, (method.loss, method.attack)):
        if "divergence" not in signature(part).parameters:
            raise FaithkdError(
                f"train.kl=reverse: {part.__name__} of {method.title} has no argument `divergence`; "
                "give it one, as in faithkd/core/losses.py, or set train.kl=forward"
            )
    attack = method.attack and partial(method.attack, divergence=reverse_kl)
    return replace(method, loss=partial(method.loss, divergence=reverse_kl), attack=attack)


METHODS = {
    "SD": Method(sd, None, "standard distillation"),
    "ARD": Method(ard, attack_labels, "adversarially robust distillation"),
    "RSLAD": Method(rslad, attack_soft_labels, "robust soft label adversarial distillation"),
    "FD": Method(fd, attack_difference, "faithful distillation"),
}
