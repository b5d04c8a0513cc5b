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
from pairs import fully_connected, gap, points
from torch import nn

from faithkd.bounds import difference_bounds, faithfulness_upper_bound

pytest.importorskip("cvxpy")
from faithkd.bounds import solvers  # noqa: E402


def pooled(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*body).double()


NETWORKS = {
    "fc": (fully_connected(2, 5, 4, 3), fully_connected(2, 3, 3, seed=4), torch.tensor([[0.3, -0.2]]).double(), 0.8),
    "pool": (pooled(0), pooled(1), torch.tensor([[[[0.3, -0.2], [0.1, 0.5]]]]).double(), 1.0),
}


def raises(answer):
    raise MemoryError("out of memory")


def multiplied(change):
    """An answer whose multipliers are changed."""
    return lambda answer: replace(answer, multipliers=change(answer.multipliers))


SILENT = {
    "multipliers are nan": multiplied(lambda those: those * math.nan),
    "multipliers are infinite": multiplied(lambda those: those + math.inf),
    "the point is nan": lambda answer: replace(answer, point=answer.point * math.nan),
    "nothing but optimal": lambda answer: solvers.Answer(solvers.OPTIMAL),
    "unknown status": lambda answer: replace(answer, status="unbounded"),
    "raises": raises,
    "wrong length": multiplied(lambda those: those[:-1]),
}
SPEAKING = {
    # trap 1: the best point found, far below the maximum, sold as the optimum
    "incumbent at a limit": lambda answer: replace(answer, status=solvers.OPTIMAL, point=answer.point * 0 - 100),
    # trap 2: "infeasible" where there is a point; the multipliers are no ray
    "stopped early, called infeasible": lambda answer: solvers.Answer(solvers.INFEASIBLE, answer.multipliers),
    "made-up ray": lambda answer: solvers.Answer(solvers.INFEASIBLE, np.full_like(answer.multipliers, -1e3)),
    # trap 3: every value 1000 too low
    "lost constant": lambda answer: replace(answer, point=answer.point - 1000),
    "multipliers are wild": multiplied(lambda those: np.random.default_rng(0).normal(size=those.shape) * 1e6),
    "multipliers are zero": multiplied(lambda those: those * 0),
    "multipliers are swapped": multiplied(lambda those: -those[::-1]),
}
FORGERIES = SILENT | SPEAKING


def forge(monkeypatch, change):
    """Let `change` spoil every answer of HiGHS."""
    real = solvers.highs

    def start(form):
        solve = real(form)
        return lambda *program: change(solve(*program))

    monkeypatch.setattr(solvers, "highs", start)


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", ["lp", "milp"])
def test_no_forged_answer_gets_below_the_truth(monkeypatch, method, kind, forgery):
    network, student, x, eps = NETWORKS[kind]
    before = difference_bounds(network, x, eps, method="alpha-crown")[0]
    at = points(x, eps, 4000)
    z = network(at)
    truth = (z[:, None, :] - z[:, :, None]).amax(0)
    forge(monkeypatch, FORGERIES[forgery])
    found = difference_bounds(network, x, eps, method=method, max_nodes=100)[0]
    assert (truth <= found + 1e-9).all() and (found <= before).all()
    bound = faithfulness_upper_bound(network, student, x, eps, method=method, max_nodes=100)
    assert gap(network, student, at).max() <= bound.values.item()
    if forgery in SILENT:
        assert torch.equal(found, before) and "LP without multipliers" in bound.status[0]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_answers_inside_the_tree(monkeypatch, forgery):
    """The first answers are honest, so that the tree is cut; all later ones are forged."""
    network, _, x, eps = NETWORKS["fc"]
    z = network(points(x, eps))
    calls = itertools.count()
    forge(monkeypatch, lambda answer: FORGERIES[forgery](answer) if next(calls) % 4 else answer)
    found = difference_bounds(network, x, eps, method="milp", max_nodes=100)[0]
    assert ((z[:, None, :] - z[:, :, None]).amax(0) <= found + 1e-9).all()


def test_an_honest_solver_gains_here():
    """Otherwise the tests above would show nothing."""
    for network, _, x, eps in NETWORKS.values():
        found = [difference_bounds(network, x, eps, method=method)[0] for method in ("alpha-crown", "milp")]
        assert (found[0] - found[1]).max() > 1e-3
