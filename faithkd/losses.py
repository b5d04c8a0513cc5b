"""The distillation losses: SD (1), ARD (4), RSLAD (5) and FD (12), each with its inner maximisation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from faithkd import source

Objective = Callable[[Tensor], Tensor]


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student from the teacher at temperature T, per image, L_KL of eq. (1).

    KL(f_t ‖ f_s) = Σ_c f_t^c (log f_t^c − log f_s^c) with f = σ(g/T). Logits (N, C) → (N,). The paper writes
    L_KL(f_s, f_t); this is the reading of Hinton et al. (2015) and of the ARD and RSLAD papers.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with the labels, per image, L_CE of eq. (1). Logits (N, C), labels (N,) → (N,)."""
    return functional.cross_entropy(logits, y, reduction="none")


def sd(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, alpha: float, temperature: float):
    """Standard distillation, α T² L_KL(f_s(x;T), f_t(x;T)) + (1−α) L_CE(f_s(x;1), y), eq. (1). Mean over the batch."""
    logits = student(x)
    soft = temperature**2 * kl(logits, teacher(x), temperature)
    return (alpha * soft + (1 - alpha) * cross_entropy(logits, y)).mean()


def ard(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, alpha: float, temperature: float):
    """Adversarially robust distillation, α T² L_KL(f_s(x+δ₀;T), f_t(x;T)) + (1−α) L_CE(f_s(x;1), y), eq. (4)."""
    soft = temperature**2 * kl(student(x_adv), teacher(x), temperature)
    return (alpha * soft + (1 - alpha) * cross_entropy(student(x), y)).mean()


def rslad(
    student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, alpha: float, temperature: float
):
    """Robust soft label distillation, α L_KL(f_s(x+δ₀), f_t(x)) + (1−α) L_KL(f_s(x), f_t(x)), eq. (5).

    Eq. (5) has temperature 1 throughout and no factor T²; a temperature other than 1 is applied to both terms.
    """
    target = teacher(x)
    soft = alpha * kl(student(x_adv), target, temperature) + (1 - alpha) * kl(student(x), target, temperature)
    return soft.mean()


def fd(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, alpha: float, temperature: float):
    """Faithful distillation, α T² L_KL(f_s(x+δ₀;T), f_t(x+δ₀;T)) + (1−α) L_CE(f_s(x;1), y), eq. (12)."""
    soft = temperature**2 * kl(student(x_adv), teacher(x_adv), temperature)
    return (alpha * soft + (1 - alpha) * cross_entropy(student(x), y)).mean()


def attack_labels(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """What ARD's δ₀ maximises: L_CE(f_s(x+δ), y), below eq. (4); also the inner problem of eq. (3)."""
    return lambda z: cross_entropy(student(z), y)


def attack_soft_labels(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """What RSLAD's δ₀ maximises: L_KL(f_s(x+δ), f_t(x)), below eq. (5); the teacher stays at the clean image."""
    with torch.no_grad():
        target = teacher(x)
    return lambda z: kl(student(z), target)


def attack_difference(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """What FD's δ₀ maximises: L_KL(f_s(x+δ), f_t(x+δ)), below eq. (12); both networks see the perturbed image."""
    return lambda z: kl(student(z), teacher(z))


@dataclass(frozen=True)
class Method:
    """A way to distil: `loss(student, teacher, x, x_adv, y, alpha, temperature)` → scalar, and the objective of δ₀.

    `attack(student, teacher, x, y)` returns what the inner maximisation ascends, or is None where x_adv = x. `code`
    is a digest of both as written when the method was made; it is empty where the source cannot be read.
    """

    loss: Callable[..., Tensor]
    attack: Callable[..., Objective] | None
    title: str
    code: str = field(init=False)

    def __post_init__(self) -> None:
        # Now, not when it is asked for: the file may be edited while a long run still works with what it imported.
        parts = filter(None, (self.loss, self.attack, kl, cross_entropy))
        object.__setattr__(self, "code", source.digest(*parts))


METHODS = {
    "SD": Method(sd, None, "standard distillation"),
    "ARD": Method(ard, attack_labels, "adversarially robust distillation"),
    "RSLAD": Method(rslad, attack_soft_labels, "robust soft label adversarial distillation"),
    "FD": Method(fd, attack_difference, "faithful distillation"),
}
