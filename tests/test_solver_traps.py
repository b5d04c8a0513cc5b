"""A solver may say what it likes: with forged answers the bounds still hold, and say so where nothing was gained.

The four traps of solvers that were met in practice: the value of the best point found taken for a bound at a limit, a
program that is stopped early called infeasible with value -inf, an objective's constant lost, the ball written as rows
(`test_programs` for the last). None can matter here, as no value, status or point enters a bound: these tests forge
them all.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from faithkd.bounds import difference_bounds, faithfulness_upper_bound

pytest.importorskip("cvxpy")
from faithkd.bounds import solvers  # noqa: E402


def fully_connected(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    network = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(2)
    return network


def pooled(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*body).double()


NETWORKS = {
    "fc": (fully_connected(2, 5, 4, 3), fully_connected(2, 3, 3, seed=4), torch.tensor([[0.3, -0.2]]).double(), 0.8),
    "pool": (pooled(0), pooled(1), torch.tensor([[[[0.3, -0.2], [0.1, 0.5]]]]).double(), 1.0),
}


def incumbent_at_a_limit(answer):
    """Trap 1: the best point found, far below the maximum, sold as the optimum."""
    return replace(answer, status=solvers.OPTIMAL, point=answer.point * 0 - 100)


def stopped_early_and_called_infeasible(answer):
    """Trap 2: "infeasible" where there is a point; the multipliers are no ray."""
    return solvers.Answer(solvers.INFEASIBLE, answer.multipliers)


def infeasible_with_a_made_up_ray(answer):
    return solvers.Answer(solvers.INFEASIBLE, np.full_like(answer.multipliers, -1e3))


def lost_constant(answer):
    """Trap 3: every value 1000 too low."""
    return replace(answer, point=answer.point - 1000)


def nan_multipliers(answer):
    return replace(answer, multipliers=answer.multipliers * math.nan)


def infinite_multipliers(answer):
    return replace(answer, multipliers=answer.multipliers + math.inf)


def nan_point(answer):
    return replace(answer, point=answer.point * math.nan)


def wild_multipliers(answer):
    return replace(answer, multipliers=np.random.default_rng(0).normal(size=answer.multipliers.shape) * 1e6)


def zero_multipliers(answer):
    return replace(answer, multipliers=answer.multipliers * 0)


def swapped_multipliers(answer):
    return replace(answer, multipliers=-answer.multipliers[::-1])


def wrong_length(answer):
    return replace(answer, multipliers=answer.multipliers[:-1])


def nothing_but_optimal(answer):
    return solvers.Answer(solvers.OPTIMAL)


def unknown_status(answer):
    return replace(answer, status="unbounded")


def raises(answer):
    raise MemoryError("out of memory")


SILENT = [nan_multipliers, infinite_multipliers, nan_point, nothing_but_optimal, unknown_status, raises, wrong_length]
SPEAKING = [incumbent_at_a_limit, stopped_early_and_called_infeasible, infeasible_with_a_made_up_ray, lost_constant]
SPEAKING += [wild_multipliers, zero_multipliers, swapped_multipliers]


def forge(monkeypatch, change):
    """Let `change` spoil every answer of HiGHS."""
    real = solvers.highs

    def start(form):
        solve = real(form)
        return lambda *program: change(solve(*program))

    monkeypatch.setattr(solvers, "highs", start)


def inside(x, eps, count=4000):
    noise = torch.rand(count, *x.shape[1:], dtype=torch.float64) * 2 - 1
    noise[: count // 4] = noise[: count // 4].sign()
    return x + eps * noise


@pytest.mark.parametrize("forgery", SILENT + SPEAKING, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", ["lp", "milp"])
def test_no_forged_answer_gets_below_the_truth(monkeypatch, method, kind, forgery):
    network, student, x, eps = NETWORKS[kind]
    before = difference_bounds(network, x, eps, method="alpha-crown")[0]
    points = inside(x, eps)
    z = network(points)
    truth = (z[:, None, :] - z[:, :, None]).amax(0)
    gap = (z.softmax(1) - student(points).softmax(1)).abs().max()
    forge(monkeypatch, forgery)
    found = difference_bounds(network, x, eps, method=method, max_nodes=100)[0]
    assert (truth <= found + 1e-9).all() and (found <= before).all()
    bound = faithfulness_upper_bound(network, student, x, eps, method=method, max_nodes=100)
    assert gap <= bound.values.item()
    if forgery in SILENT:
        assert torch.equal(found, before) and "LP without multipliers" in bound.status[0]


@pytest.mark.parametrize("forgery", SILENT + SPEAKING, ids=lambda change: change.__name__)
def test_forged_answers_inside_the_tree(monkeypatch, forgery):
    """The first answers are honest, so that the tree is cut; all later ones are forged."""
    network, _, x, eps = NETWORKS["fc"]
    points = inside(x, eps)
    z = network(points)
    calls = itertools.count()
    forge(monkeypatch, lambda answer: forgery(answer) if next(calls) % 4 else answer)
    found = difference_bounds(network, x, eps, method="milp", max_nodes=100)[0]
    assert ((z[:, None, :] - z[:, :, None]).amax(0) <= found + 1e-9).all()


def test_an_honest_solver_gains_here():
    """Otherwise the tests above would show nothing."""
    for network, _, x, eps in NETWORKS.values():
        found = [difference_bounds(network, x, eps, method=method)[0] for method in ("alpha-crown", "milp")]
        assert (found[0] - found[1]).max() > 1e-3
