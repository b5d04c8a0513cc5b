"""Robust accuracy, agreement and EmpLB on networks simple enough to know the answer."""

import pytest
import torch
from torch import nn

import faithkd
from faithkd import evaluation
from faithkd.errors import FaithkdError


def linear(weight, bias):
    """Logits of a two-class linear network on two inputs, as bounds accept it."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return nn.Sequential(layer)


# Class 0 where x₁ > 0, with log-odds 2x₁; the student moves the border to x₁ > 0.3.
TEACHER = linear([[1.0, 0.0], [-1.0, 0.0]], [0.0, 0.0])
STUDENT = linear([[1.0, 0.0], [-1.0, 0.0]], [-0.3, 0.3])
CONSTANT = linear([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0])


def test_robust_accuracy_is_the_distance_to_the_border():
    x, y = torch.tensor([[0.05, 0.0], [0.25, 0.0], [-0.4, 0.0], [0.4, 0.0]]), torch.tensor([0, 0, 1, 1])
    holds = {eps: evaluation.robust(TEACHER, x, y, eps).holds.tolist() for eps in (0.0, 0.1, 0.3, 0.5)}
    assert holds[0.0] == [True, True, True, False]  # the last is misclassified already
    assert holds[0.1] == [False, True, True, False]
    assert holds[0.3] == [False, False, True, False]
    assert holds[0.5] == [False, False, False, False]


def test_agreement_is_lost_where_the_ball_meets_the_strip_between_the_borders():
    """They differ exactly for 0 < x₁ < 0.3 (up to the border itself)."""
    x = torch.tensor([[-0.2, 0.0], [0.15, 0.0], [0.45, 0.0], [0.8, 0.0]])
    holds = {eps: evaluation.agreement(TEACHER, STUDENT, x, eps).holds.tolist() for eps in (0.0, 0.1, 0.25)}
    assert holds[0.0] == [True, False, True, True]  # Def. 3: no agreement at the image itself counts as none
    assert holds[0.1] == [True, False, True, True]
    assert holds[0.25] == [False, False, False, True]


def test_witnesses_show_what_they_claim():
    x, y = torch.tensor([[0.05, 0.0], [0.6, 0.0]]), torch.tensor([0, 0])
    attack = evaluation.robust(TEACHER, x, y, 0.2)
    assert ((attack.witnesses - x).abs() <= 0.2 + 1e-7).all()
    assert evaluation.predictions(TEACHER, attack.witnesses).tolist() == [1, 0]
    found = evaluation.agreement(TEACHER, STUDENT, torch.tensor([[-0.1, 0.3]]), 0.2)
    classes = [int(evaluation.predictions(net, found.witnesses)) for net in (TEACHER, STUDENT)]
    assert classes[0] != classes[1]


def test_emp_lb_finds_a_maximum_known_in_closed_form():
    """|σ(2x₁) − σ(2x₁ − 0.6)| peaks at x₁ = 0.15, halfway between the borders."""
    x = torch.tensor([[0.1, 0.0], [1.0, 0.0]])
    bound = faithkd.empirical_lower_bound(TEACHER, STUDENT, x, 0.2)
    peak = torch.sigmoid(torch.tensor(0.3)) - torch.sigmoid(torch.tensor(-0.3))
    corner = torch.sigmoid(torch.tensor(1.6)) - torch.sigmoid(torch.tensor(1.0))
    assert bound.values.tolist() == pytest.approx([float(peak), float(corner)], abs=2e-4)
    assert bound.values[0] <= float(peak) + 1e-7 and bound.values.dtype == torch.float64


def test_emp_lb_is_the_value_at_its_witness_which_lies_in_the_ball():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    student = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(7, 2, 3)
    bound = faithkd.empirical_lower_bound(teacher, student, x, 0.13, steps=8, restarts=2)
    assert ((bound.witnesses.double() - x.double()).abs() <= 0.13).all()
    with torch.no_grad():
        z = bound.witnesses.double()
        nets = [nn.Sequential(*net).double() for net in (teacher, student)]
        by_hand = (nets[0](z).softmax(1) - nets[1](z).softmax(1)).abs().amax(1)
    teacher.float(), student.float()
    assert torch.equal(bound.values, by_hand)


def test_the_callers_networks_and_images_are_left_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()
    x = torch.randn(4, 3)
    before, image = {k: v.clone() for k, v in network.state_dict().items()}, x.clone()
    faithkd.empirical_lower_bound(network, network, x, 0.1, steps=3, restarts=1)
    assert network.training and next(network.parameters()).requires_grad and torch.equal(x, image)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_more_restarts_never_find_less_and_the_seed_repeats():
    torch.manual_seed(1)
    teacher, student = (nn.Sequential(nn.Linear(5, w), nn.ReLU(), nn.Linear(w, 3)) for w in (16, 6))
    x = torch.randn(30, 5)
    runs = [faithkd.empirical_lower_bound(teacher, student, x, 0.5, restarts=n, steps=10) for n in (1, 1, 4)]
    assert torch.equal(runs[0].values, runs[1].values)
    assert (runs[2].values >= runs[0].values - 1e-9).all() and (runs[2].values > runs[0].values).any()


def test_at_eps_zero_it_is_the_difference_at_the_image():
    x = torch.tensor([[0.1, 0.2]])
    bound = faithkd.empirical_lower_bound(TEACHER, STUDENT, x, 0.0)
    with torch.no_grad():
        assert float(bound.values) == pytest.approx(
            float(evaluation.confidence_difference(TEACHER, STUDENT, x)), abs=1e-7
        )
    assert torch.equal(bound.witnesses, x)


def test_an_empty_batch_is_an_empty_answer():
    bound = faithkd.empirical_lower_bound(TEACHER, STUDENT, torch.zeros(0, 2), 0.1)
    assert bound.values.shape == (0,) and bound.witnesses.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps must be"),
        ({"eps": float("nan")}, "eps must be"),
        ({"x": torch.tensor([[float("nan"), 0.0]])}, "NaN"),
        ({"x": torch.zeros(1, 3)}, "does not fit"),
        ({"student": nn.Sequential(nn.Linear(2, 3))}, "classes"),
        ({"student": nn.Sequential(nn.Tanh())}, "Tanh"),
        ({"steps": 0}, "at least 1"),
        ({"restarts": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_a_clear_error(change, message):
    arguments = {"teacher": TEACHER, "student": STUDENT, "x": torch.zeros(1, 2), "eps": 0.1} | change
    with pytest.raises(FaithkdError, match=message):
        faithkd.empirical_lower_bound(**arguments)


def test_emp_lb_stays_below_faith_ub_on_random_pairs():
    for seed in range(6):
        torch.manual_seed(seed)
        teacher, student = (
            nn.Sequential(nn.Flatten(), nn.Linear(8, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 4))
            for w in (10, 6)
        )
        x = torch.randn(10, 2, 4)
        for eps in (0.0, 0.01, 0.1, 0.5):
            lower = faithkd.empirical_lower_bound(teacher, student, x, eps, steps=10, restarts=2).values
            for method in ("interval", "crown"):
                upper = faithkd.faithfulness_upper_bound(teacher, student, x, eps, method=method).values
                assert (lower <= upper + 1e-12).all()
