"""Robust accuracy, agreement and EmpLB on networks simple enough to know the answer; and the stronger searches."""

import re
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

import faithkd
from faithkd import experiment, params, tables
from faithkd.core import evaluation
from faithkd.report.paper import STUDENTS

pytestmark = pytest.mark.usefixtures("brief_auto_attack")


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


def random_pair(seed, classes=5, shape=(1, 4, 4)):
    """Networks sure enough for softmax to go flat, and 25 images."""
    torch.manual_seed(seed)
    size = int(torch.tensor(shape).prod())
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(size, w), nn.ReLU(), nn.Linear(w, classes)) for w in (16, 8)]
    for net in nets:
        net[1].weight.data *= 3
        net[3].weight.data *= 3
    return *nets, torch.randn(25, *shape)


def test_robust_accuracy_is_the_distance_to_the_border():
    x, y = torch.tensor([[0.05, 0.0], [0.25, 0.0], [-0.4, 0.0], [0.4, 0.0]]), torch.tensor([0, 0, 1, 1])
    wanted = {0.0: [True, True, True, False], 0.1: [False, True, True, False], 0.3: [False, False, True, False]}
    for eps, holds in wanted.items():  # the last is misclassified already
        found = evaluation.robust(TEACHER, x, y, eps)
        assert found.holds.tolist() == holds
        assert ((evaluation.predictions(TEACHER, found.witnesses) == y) == found.holds).all()
        assert ((found.witnesses - x).abs() <= eps + 1e-7).all()


def test_agreement_is_lost_where_the_ball_meets_the_strip_between_the_borders():
    """They differ exactly for 0 < x₁ < 0.3 (up to the border itself)."""
    x = torch.tensor([[-0.2, 0.0], [0.15, 0.0], [0.45, 0.0], [0.8, 0.0]])
    # Def. 3: no agreement at the image itself counts as none
    wanted = {0.0: [True, False, True, True], 0.1: [True, False, True, True], 0.25: [False, False, False, True]}
    for eps, holds in wanted.items():
        found = evaluation.agreement(TEACHER, STUDENT, x, eps)
        classes = [evaluation.predictions(network, found.witnesses) for network in (TEACHER, STUDENT)]
        assert found.holds.tolist() == holds == (classes[0] == classes[1]).tolist()


def test_emp_lb_finds_a_maximum_known_in_closed_form():
    """|σ(2x₁) − σ(2x₁ − 0.6)| peaks at x₁ = 0.15, halfway between the borders."""
    x = torch.tensor([[0.1, 0.0], [1.0, 0.0]])
    bound = faithkd.empirical_lower_bound(TEACHER, STUDENT, x, 0.2)
    peak = torch.sigmoid(torch.tensor(0.3)) - torch.sigmoid(torch.tensor(-0.3))
    corner = torch.sigmoid(torch.tensor(1.6)) - torch.sigmoid(torch.tensor(1.0))
    assert bound.values.tolist() == pytest.approx([float(peak), float(corner)], abs=2e-4)
    assert bound.values[0] <= float(peak) + 1e-7 and bound.values.dtype == torch.float64


def test_more_restarts_never_find_less_and_the_seed_repeats():
    teacher, student, x = random_pair(1)
    runs = [faithkd.empirical_lower_bound(teacher, student, x, 0.5, restarts=n, steps=10) for n in (1, 1, 4)]
    assert torch.equal(runs[0].values, runs[1].values)
    assert (runs[2].values >= runs[0].values - 1e-9).all() and (runs[2].values > runs[0].values).any()


def test_hardest_points_are_worse_than_the_image_and_lie_in_the_ball():
    network, _, x = random_pair(5)
    y = evaluation.predictions(network, x)
    hard = evaluation.hardest(network, x, y, 0.2)
    before, after = (nn.functional.cross_entropy(network(z), y, reduction="none") for z in (x, hard))
    assert (after > before).all() and ((hard.double() - x.double()).abs() <= 0.2).all()
    assert torch.equal(evaluation.hardest(network, x, y, 0.0), x)


def test_a_wider_search_lies_between_emp_lb_and_faith_ub():
    teacher, student, x = random_pair(0)
    for eps in (0.0, 0.01, 0.5):
        options = {"steps": 4, "restarts": 2, "seed": 3}
        plain = faithkd.empirical_lower_bound(teacher, student, x, eps, **options)
        wide = evaluation.strong_lower_bound(teacher, student, x, eps, classes=2, **options)
        assert (wide.values >= plain.values).all() and wide.values.dtype == torch.float64
        upper = faithkd.faithfulness_upper_bound(teacher, student, x, eps)
        assert (wide.values <= upper.values + 1e-12).all()
        assert ((wide.witnesses.double() - x.double()).abs() <= eps).all()
        with torch.no_grad():
            nets = [deepcopy(net).double() for net in (teacher, student)]
            assert torch.equal(wide.values, evaluation.confidence_difference(*nets, wide.witnesses.double()))


def test_a_wider_search_climbs_where_softmax_is_flat():
    """Both are sure of class 0 at x₁ = 1, the student no longer below 0, where float32's softmax shows no slope."""
    sure, unsure = (linear([[0.0, 0.0], [-80.0, 0.0]], [0.0, -40.0]), linear([[0.0, 0.0], [-200.0, 0.0]], [0.0, 0.0]))
    x = torch.tensor([[1.0, 0.0]])
    options = {"restarts": 1, "steps": 20, "step_factor": 2.5}
    plain = faithkd.empirical_lower_bound(sure, unsure, x, 1.05, **options)
    wide = evaluation.strong_lower_bound(sure, unsure, x, 1.05, **options)
    assert float(plain.values) < 0.01 < 0.9 < float(wide.values)


# --- AutoAttack


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_auto_attack_counts_only_what_errs_in_our_ball_and_knows_nothing_of_pixels(classes):
    network, _, x = random_pair(classes, classes)
    y = evaluation.predictions(network, x)
    y[:3] = (y[:3] + 1) % classes  # misclassified already: the witness is the image
    attack = evaluation.auto_attack(network, x, y, 0.2)
    assert not attack.holds[:3].any() and torch.equal(attack.witnesses[:3], x[:3])
    assert 0 < int((~attack.holds[3:]).sum()) < len(x) - 3
    assert ((attack.witnesses.double() - x.double()).abs() <= 0.2).all()
    assert torch.equal(evaluation.predictions(network, attack.witnesses) == y, attack.holds)
    moved = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), *list(network)[1:])  # far out of [0, 1]: the same verdicts
    with torch.no_grad():
        moved[1].weight.copy_(torch.eye(16) / 8)
        moved[1].bias.fill_(-32.0)
    there = evaluation.auto_attack(moved, 8 * x + 256, y, 1.6)
    assert torch.equal(attack.holds, there.holds) and (there.witnesses > 200).all()


def test_auto_attack_is_a_distance_to_the_border_and_stays_inside_clip():
    x, y = torch.tensor([[0.05, 0.9], [0.25, 0.5], [0.4, 0.0]]), torch.tensor([0, 0, 0])
    border = linear([[1.0, 0.0], [-1.0, 0.0]], [-0.02, 0.02])  # class 0 where x₁ > 0.02
    assert evaluation.auto_attack(border, x, y, 0.1).holds.tolist() == [False, True, True]
    clipped = evaluation.auto_attack(border, x, y, 0.3, clip=(0.0, 1.0))
    assert clipped.holds.tolist() == [False, False, True]
    assert ((clipped.witnesses >= 0) & (clipped.witnesses <= 1)).all()
    beyond = linear([[1.0, 0.0], [-1.0, 0.0]], [0.02, -0.02])  # class 0 where x₁ > −0.02, which no valid input leaves
    assert evaluation.auto_attack(beyond, x, y, 0.3, clip=(0.0, 1.0)).holds.all()


def test_auto_attack_repeats_and_leaves_others_alone():
    network, _, x = random_pair(4)
    y, state = evaluation.predictions(network, x), torch.random.get_rng_state()
    trace = sys.gettrace()
    runs = [evaluation.auto_attack(network, x, y, 0.2, seed=1) for _ in range(2)]
    assert torch.equal(runs[0].witnesses, runs[1].witnesses)
    assert torch.equal(state, torch.random.get_rng_state()) and sys.gettrace() is trace
    assert torch.equal(evaluation.auto_attack(network, x, y, 0.0).witnesses, x)
    assert evaluation.auto_attack(network, x[:0], y[:0], 0.2).holds.shape == (0,)


def test_the_tables_of_both_stronger_searches():
    few = {"data.test_images": 4, "evaluate.autoattack.images": 4, "evaluate.strong.images": 4, "evaluate.steps": 3}
    p = params.load("digits", few | {"evaluate.strong.restarts": 1, "evaluate.eps": [0.1]})
    attacked, wider = experiment.auto_attack(p), experiment.strong(p)
    assert (attacked["both"] == attacked["PGD"] & attacked["AutoAttack"]).all()
    assert attacked.groupby("method").size().to_dict() == dict.fromkeys(("RT", *STUDENTS), 4)
    table, fd = tables.auto_attack(attacked).set_index("method"), attacked[attacked["method"] == "FD"]
    assert table.loc["FD", "both"] == pytest.approx(100 * fd["both"].mean())
    assert table.loc["FD", "missed"] == (fd["PGD"] & ~fd["AutoAttack"]).sum()
    assert (wider["EmpLB"] <= wider["StrongLB"]).all() and (wider["StrongLB"] <= wider["FaithUB"] + 1e-12).all()
    gains = tables.strong(wider)
    assert len(gains) == len(STUDENTS) and (gains["mean"] <= gains["largest"] + 1e-12).all()
    for name, frame in (("autoattack", tables.auto_attack(attacked)), ("strong", gains)):
        assert tables.layout(frame, name).map(lambda text: bool(re.search(r"\d", text))).all(axis=None)
