"""Calibration by hand, and the corollary of §4.2 as far as it is true."""

import pytest
import torch

from faithkd import calibration
from faithkd.errors import FaithkdError


def pair(seed: int):
    """Confidences of a teacher and of a student with ‖f_t − f_s‖∞ ≤ delta, labels and delta."""
    torch.manual_seed(seed)
    teacher = torch.softmax(2 * torch.randn(300, 4, dtype=torch.float64), 1)
    other = torch.softmax(3 * torch.randn_like(teacher), 1)
    delta = 0.1 * torch.rand(300, dtype=torch.float64)
    share = delta / (other - teacher).abs().amax(1).clamp(min=1e-12)
    student = teacher + share.clamp(max=1)[:, None] * (other - teacher)
    return teacher, student, torch.multinomial(teacher, 1)[:, 0], delta


def test_ece_of_two_bins_by_hand():
    """Bin [.5, .75): 0.6 and 0.7, one right, gap .65 − .5. Bin [.75, 1]: 0.9 and 1, both right, gap .05."""
    top = torch.tensor([0.6, 0.7, 0.9, 1.0])
    confidences, y = torch.stack([top, 1 - top], 1), torch.tensor([0, 1, 0, 0])
    assert calibration.ece(confidences, y, bins=4) == pytest.approx(0.5 * 0.15 + 0.5 * 0.05, abs=1e-6)
    table = calibration.reliability(confidences, y, bins=4)
    assert table["low"].tolist() == [0.5, 0.75] and table["images"].tolist() == [2, 2]
    assert table["accuracy"].tolist() == [0.5, 1.0] and table["confidence"].tolist() == pytest.approx([0.65, 0.95])


@pytest.mark.parametrize("seed", range(5))
def test_the_diagram_adds_up_to_the_error(seed):
    confidences, _, y, _ = pair(seed)
    table = calibration.reliability(confidences, y)
    gaps = (table["confidence"] - table["accuracy"]).abs() * table["images"]
    assert table["images"].sum() == len(y) and gaps.sum() / len(y) == pytest.approx(calibration.ece(confidences, y))


@pytest.mark.parametrize("seed", range(5))
def test_in_the_teachers_bins_and_classes_the_corollary_holds_as_it_stands(seed):
    teacher, student, y, delta = pair(seed)
    apart = abs(calibration.ece_by_teacher(teacher, student, y) - calibration.ece(teacher, y))
    assert 0 < apart <= float(delta.mean()) + 1e-9


def test_in_a_students_own_bins_it_does_not():
    """Three images before a bin's edge, which a student moves beyond it by 0.002: from no error to a large one."""
    teacher = torch.tensor([[0.749, 0.251]] * 4)
    student = teacher + torch.tensor([[0.002, -0.002]] * 3 + [[0, 0]])
    y = torch.tensor([0, 0, 0, 1])
    errors = [calibration.ece(confidences, y, bins=4) for confidences in (teacher, student)]
    assert errors[0] < 0.002 and errors[1] > 0.3


@pytest.mark.parametrize(
    ("confidences", "y", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "at least one label"),
        (torch.ones(2, 3) / 3, torch.zeros(3, dtype=torch.long), "3 labels"),
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "softmax"),
        (torch.tensor([[float("nan"), 0.5]]), torch.tensor([0]), "softmax"),
    ],
)
def test_what_is_no_confidence_is_a_clear_error(confidences, y, message):
    with pytest.raises(FaithkdError, match=message):
        calibration.ece(confidences, y)
