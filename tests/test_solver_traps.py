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
from pairs import fully_connected, gap, points, pooled

from faithkd.bounds import difference_bounds, faithfulness_upper_bound

cp = pytest.importorskip("cvxpy")
from faithkd.bounds import programs  # noqa: E402

NETWORKS = {
    "fc": (fully_connected(2, 5, 4, 3), fully_connected(2, 3, 3, seed=4), torch.tensor([[0.3, -0.2]]).double(), 0.8),
    "pool": (pooled(0), pooled(1), torch.tensor([[[[0.3, -0.2], [0.1, 0.5]]]]).double(), 1.0),
}


def multiplied(change):
    """An answer whose multipliers are changed."""
    return lambda answer: replace(answer, multipliers={k: change(part) for k, part in answer.multipliers.items()})


FORGERIES = {
    "multipliers are nan": multiplied(lambda those: those * math.nan),
    "multipliers are infinite": multiplied(lambda those: those + math.inf),
    "multipliers are wild": multiplied(lambda those: np.random.default_rng(0).normal(size=those.shape) * 1e6),
    "multipliers are zero": multiplied(lambda those: those * 0),
    "multipliers are swapped": multiplied(lambda those: those[::-1]),
    # traps 1 and 3: the best point found, far below the maximum, sold as the optimum; every value too low
    "incumbent at a limit": lambda answer: replace(answer, image=answer.image * 0 - 100),
    "the point is nan": lambda answer: replace(answer, image=answer.image * math.nan),
    "everything is loose": lambda answer: replace(answer, over={k: part + 1 for k, part in answer.over.items()}),
    "nothing": lambda answer: None,
}


def forge(monkeypatch, change):
    """Let `change` spoil every answer."""
    real = programs.solve
    monkeypatch.setattr(programs, "solve", lambda *given: change(real(*given)))


def truth(network, x, eps):
    z = network(points(x, eps, 2000))
    return (z[:, None, :] - z[:, :, None]).amax(0)


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_no_forged_answer_gets_below_the_truth(monkeypatch, kind, forgery):
    network, student, x, eps = NETWORKS[kind]
    before = difference_bounds(network, x, eps, method="alpha-crown")[0]
    forge(monkeypatch, FORGERIES[forgery])
    for method in ("lp", "milp") if kind == "fc" else ("lp",):
        found = difference_bounds(network, x, eps, method=method, max_nodes=7)[0]
        assert (truth(network, x, eps) <= found + 1e-9).all() and (found <= before).all()
    bound = faithfulness_upper_bound(network, student, x, eps, method="lp")
    assert gap(network, student, points(x, eps, 2000)).max() <= bound.values.item()
    if forgery == "nothing":
        assert torch.equal(found, before) and "LP without multipliers" in bound.status[0]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_answers_inside_the_tree(monkeypatch, forgery):
    """The first answers are honest, so that the tree is cut; all later ones are forged."""
    network, _, x, eps = NETWORKS["fc"]
    calls = itertools.count()
    forge(monkeypatch, lambda answer: FORGERIES[forgery](answer) if next(calls) % 4 else answer)
    found = difference_bounds(network, x, eps, method="milp", max_nodes=12)[0]
    assert (truth(network, x, eps) <= found + 1e-9).all()


@pytest.mark.parametrize("status", ["infeasible", "infeasible_inaccurate", "user_limit", "unbounded", "raises"])
def test_whatever_is_not_optimal_gains_nothing(monkeypatch, status):
    """Trap 2: "infeasible" where there is a point."""
    network, _, x, eps = NETWORKS["fc"]
    before = difference_bounds(network, x, eps, method="alpha-crown")

    def solve(problem, **_):
        problem._status, problem._value = status, -math.inf
        if status == "raises":
            raise MemoryError("out of memory")

    monkeypatch.setattr(cp.Problem, "solve", solve)
    assert torch.equal(difference_bounds(network, x, eps, method="milp"), before)


def test_an_honest_solver_gains_here():
    """Otherwise the tests above would show nothing."""
    for network, _, x, eps in NETWORKS.values():
        relaxed, exact = (
            difference_bounds(network, x, eps, method=name, max_nodes=20) for name in ("alpha-crown", "milp")
        )
        assert (relaxed - exact).max() > 1e-3
