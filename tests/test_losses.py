"""Each loss, and what its attack climbs, equals its formula on cases worked out by hand."""

import math

import pytest
import torch
from torch import nn

from faithkd.core import losses
from faithkd.core.losses import METHODS
from faithkd.errors import FaithkdError


class Fixed(nn.Module):
    """A network whose logits are looked up by the first value of its input: cases become readable."""

    def __init__(self, table: dict[float, list[float]]):
        super().__init__()
        self.table = table

    def forward(self, x):
        return torch.tensor([self.table[round(float(row.flatten()[0]), 3)] for row in x], dtype=torch.float64)


def logit(*confidences):
    """Logits whose softmax is the given confidences."""
    return [math.log(c) for c in confidences]


CLEAN, PERTURBED = torch.tensor([[0.0]] * 2), torch.tensor([[1.0]] * 2)  # twice, as losses are means over a batch
STUDENT = Fixed({0.0: logit(0.5, 0.5), 1.0: logit(0.2, 0.8)})
TEACHER = Fixed({0.0: logit(0.8, 0.2), 1.0: logit(0.6, 0.4)})
LABEL = torch.tensor([0, 0])


def kl_by_hand(teacher, student):
    """KL(teacher ‖ student) of two lists of confidences, written out."""
    return sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))


def sharpened(confidences, temperature):
    """softmax(log(c)/T) by hand."""
    powers = [c ** (1 / temperature) for c in confidences]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_losses_equal_their_formulas(alpha, temperature):
    def soft(teacher, student):
        return kl_by_hand(sharpened(teacher, temperature), sharpened(student, temperature))

    hard = -math.log(0.5)  # the student gives label 0 confidence 0.5 at the clean image
    expected = {
        "SD": alpha * temperature**2 * soft([0.8, 0.2], [0.5, 0.5]) + (1 - alpha) * hard,
        "ARD": alpha * temperature**2 * soft([0.8, 0.2], [0.2, 0.8]) + (1 - alpha) * hard,
        "RSLAD": alpha * soft([0.8, 0.2], [0.2, 0.8]) + (1 - alpha) * soft([0.8, 0.2], [0.5, 0.5]),
        "FD": alpha * temperature**2 * soft([0.6, 0.4], [0.2, 0.8]) + (1 - alpha) * hard,
    }
    for name, method in METHODS.items():
        value = method.loss(STUDENT, TEACHER, CLEAN, PERTURBED, LABEL, alpha, temperature)
        assert float(value) == pytest.approx(expected[name], rel=1e-12), name


def test_attacks_ascend_their_objectives():
    expected = {
        "ARD": -math.log(0.2),
        "RSLAD": kl_by_hand([0.8, 0.2], [0.2, 0.8]),  # the teacher stays at the clean image
        "FD": kl_by_hand([0.6, 0.4], [0.2, 0.8]),  # the teacher sees the perturbed image too
    }
    assert METHODS["SD"].attack is None
    for name, value in expected.items():
        objective = METHODS[name].attack(STUDENT, TEACHER, CLEAN, LABEL)
        assert objective(PERTURBED).tolist() == pytest.approx([value] * 2, rel=1e-12), name


def test_kl_is_teacher_from_student_and_summed_over_classes_averaged_over_images():
    student = torch.tensor([logit(0.5, 0.25, 0.25), logit(0.2, 0.4, 0.4)])
    teacher = torch.tensor([logit(0.25, 0.25, 0.5), logit(0.2, 0.2, 0.6)])
    by_hand = [kl_by_hand([0.25, 0.25, 0.5], [0.5, 0.25, 0.25]), kl_by_hand([0.2, 0.2, 0.6], [0.2, 0.4, 0.4])]
    assert losses.kl(student, teacher).tolist() == pytest.approx(by_hand, rel=1e-5)
    assert losses.reverse_kl(teacher, student).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_other_direction_is_student_from_teacher_in_loss_and_attack():
    by_hand = {  # at α = 1, T = 1: KL of the teacher's confidences from the student's
        "SD": kl_by_hand([0.5, 0.5], [0.8, 0.2]),
        "ARD": kl_by_hand([0.2, 0.8], [0.8, 0.2]),
        "RSLAD": kl_by_hand([0.2, 0.8], [0.8, 0.2]),
        "FD": kl_by_hand([0.2, 0.8], [0.6, 0.4]),
    }
    for name, method in METHODS.items():
        reverse = losses.reversed_kl(method)
        value = reverse.loss(STUDENT, TEACHER, CLEAN, PERTURBED, LABEL, 1.0, 1.0)
        assert float(value) == pytest.approx(by_hand[name], rel=1e-12), name
        if name in ("RSLAD", "FD"):
            found = reverse.attack(STUDENT, TEACHER, CLEAN, LABEL)(PERTURBED)
            assert found.tolist() == pytest.approx([by_hand[name]] * 2, rel=1e-12), name
    assert losses.reversed_kl(METHODS["SD"]).attack is None


def test_a_loss_of_ones_own_without_a_direction_cannot_be_reversed():
    def plain(student, teacher, x, x_adv, y, alpha, temperature):
        return losses.cross_entropy(student(x), y).mean()

    with pytest.raises(FaithkdError, match=r"train.kl=reverse: plain of my own has no argument `divergence`"):
        losses.reversed_kl(losses.Method(plain, None, "my own"))
