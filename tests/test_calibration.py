"""Calibration by hand and by torchmetrics, and the corollary of §4.2 as far as it is true."""

import pytest
import torch

from faithkd import calibration
from faithkd.errors import FaithkdError


def nearby(teacher, delta):
    """A student's confidences with ‖f_t − f_s‖∞ ≤ delta: the teacher's, moved towards other confidences."""
    other = torch.softmax(3 * torch.randn_like(teacher), 1)
    share = delta / (other - teacher).abs().amax(1).clamp(min=1e-12)
    return teacher + share.clamp(max=1)[:, None] * (other - teacher)


def pair(seed, delta=0.1, images=300, classes=4, sharpness=2.0):
    torch.manual_seed(seed)
    teacher = torch.softmax(sharpness * torch.randn(images, classes, dtype=torch.float64), 1)
    y = torch.multinomial(teacher, 1)[:, 0]
    deltas = delta * torch.rand(images, dtype=torch.float64)
    return teacher, nearby(teacher, deltas), y, deltas


def test_ece_of_two_bins_by_hand():
    """Bin [.5, .75): 0.6 and 0.7, one right, gap .65 − .5. Bin [.75, 1]: 0.9 and 1, both right, gap .05."""
    top = torch.tensor([0.6, 0.7, 0.9, 1.0])
    confidences, y = torch.stack([top, 1 - top], 1), torch.tensor([0, 1, 0, 0])
    assert calibration.ece(confidences, y, bins=4) == pytest.approx(0.5 * 0.15 + 0.5 * 0.05, abs=1e-6)
    table = calibration.reliability(confidences, y, bins=4)
    assert table["low"].tolist() == [0.5, 0.75] and table["high"].tolist() == [0.75, 1.0]
    assert table["images"].tolist() == [2, 2] and table["accuracy"].tolist() == [0.5, 1.0]
    assert table["confidence"].tolist() == pytest.approx([0.65, 0.95], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_diagram_adds_up_to_the_error(seed):
    confidences, _, y, _ = pair(seed)
    table = calibration.reliability(confidences, y)
    gaps = (table["confidence"] - table["accuracy"]).abs() * table["images"]
    assert table["images"].sum() == len(y)
    assert gaps.sum() / len(y) == pytest.approx(calibration.ece(confidences, y), abs=1e-5)


def test_a_network_that_is_as_sure_as_it_is_right_has_no_error():
    confidences, y = torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1])
    assert calibration.ece(confidences, y) == pytest.approx(0, abs=1e-6)
    assert calibration.ece(1 - confidences, 1 - y) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_in_the_teachers_bins_and_classes_the_corollary_holds_as_it_stands(seed):
    teacher, student, y, delta = pair(seed)
    assert calibration.ece_by_teacher(teacher, teacher, y) == pytest.approx(calibration.ece(teacher, y), abs=1e-5)
    apart = abs(calibration.ece_by_teacher(teacher, student, y) - calibration.ece(teacher, y))
    assert apart <= float(delta.mean()) + 1e-5


def test_in_a_students_own_bins_it_does_not():
    """Two images on either side of a bin's edge, which a student moves by 0.002: from no error to a large one."""
    teacher = torch.tensor([[0.749, 0.251], [0.749, 0.251], [0.749, 0.251], [0.749, 0.251]])
    student = teacher + torch.tensor([[0.002, -0.002], [0.002, -0.002], [0.002, -0.002], [0, 0]])
    y, delta = torch.tensor([0, 0, 0, 1]), (teacher - student).abs().amax(1)
    errors = [calibration.ece(confidences, y, bins=4) for confidences in (teacher, student)]
    assert errors[0] < 0.002 and errors[1] > 0.3 > 100 * float(delta.mean())
    assert errors[1] - errors[0] <= calibration.ece_bound(teacher, y, delta, bins=4) + 1e-6


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("delta", [0.0, 0.003, 0.03, 0.3, 1.0])
def test_the_bound_of_the_error_holds_for_students_within_delta(sharpness, delta):
    for seed in range(20):
        teacher, student, y, deltas = pair(seed, delta, sharpness=sharpness)
        apart = abs(calibration.ece(student, y) - calibration.ece(teacher, y))
        bound = calibration.ece_bound(teacher, y, deltas)
        assert apart <= bound + 1e-5 and 0 <= bound <= 1
        same_class, same_bin = calibration.steady(teacher, deltas)
        classes = [confidences.argmax(1) for confidences in (teacher, student)]
        bins = [calibration.bin_of(confidences.amax(1)) for confidences in (teacher, student)]
        assert (classes[0] == classes[1])[same_class].all() and (bins[0] == bins[1])[same_bin].all()


def test_the_bound_says_something_for_a_sure_teacher_and_nothing_for_a_large_delta():
    teacher, _, y, _ = pair(0, sharpness=8.0)
    small, large = (torch.full((len(y),), d, dtype=torch.float64) for d in (1e-4, 1.0))
    assert calibration.ece_bound(teacher, y, small) < 0.1
    assert calibration.ece_bound(teacher, y, large) == 1.0


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
