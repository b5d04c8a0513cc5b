"""LP and MILP: right when the solver is right, and still above the truth when the solver is wrong."""

import itertools
import math
import types
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from faithkd.bounds import METHODS, difference_bounds, faithfulness_upper_bound, programs
from faithkd.bounds import linear as lin
from faithkd.bounds import network as net
from faithkd.errors import FaithkdError

cp = pytest.importorskip("cvxpy")


def fully_connected(*widths, factor=2.0, seed=0):
    torch.manual_seed(seed)
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    network = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(factor)
    return network


def pooled(seed=0):
    torch.manual_seed(seed)
    body = [
        nn.Conv2d(1, 2, 2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1, padding=1),
        nn.Conv2d(2, 2, 2, stride=2),
    ]
    return nn.Sequential(*body, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double()


def tiny():
    return fully_connected(2, 5, 4, 3), torch.tensor([[0.3, -0.2]], dtype=torch.float64), 0.8


def inside(x, eps, count=4000):
    noise = torch.rand(count, *x.shape[1:], dtype=torch.float64) * 2 - 1
    noise[: count // 4] = noise[: count // 4].sign()
    return x + eps * noise


def prepared(network, x, eps):
    ready = net.prepare(network, tuple(x.shape[1:]))
    return ready, lin.crown(ready, *net.ball(x, eps))


def exact_maximum(network, x, eps, row):
    """Largest row . z over all activation patterns of two hidden layers, each pattern an LP in x alone."""
    (w1, b1), (w2, b2), (w3, b3) = (
        (network[k].weight.detach().numpy(), network[k].bias.detach().numpy()) for k in (0, 2, 4)
    )
    box = [(value - eps, value + eps) for value in x[0].tolist()]
    best = -math.inf
    for first in itertools.product((0, 1), repeat=len(b1)):
        d1 = np.array(first)
        m2, c2 = w2 * d1 @ w1, w2 * d1 @ b1 + b2
        for second in itertools.product((0, 1), repeat=len(b2)):
            d2 = np.array(second)
            sign1, sign2 = 1 - 2 * d1, 1 - 2 * d2  # active: -(W x + b) <= 0
            rows = np.vstack([sign1[:, None] * w1, sign2[:, None] * m2])
            room = np.concatenate([-sign1 * b1, -sign2 * c2])
            objective = row @ (w3 * d2 @ m2)
            found = linprog(-objective, A_ub=rows, b_ub=room, bounds=box, method="highs")
            if found.status == 0:
                best = max(best, -found.fun + row @ (w3 * d2 @ c2 + b3))
    return best


def lp_by_scipy(ready, bounds, row):
    """The relaxation of eq. (8) once more, for scipy: the variables are all layer inputs and the logits."""
    sizes = [math.prod(shape) for shape in ready.shapes]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    equal, equal_to, below, below_than = [], [], [], []
    for k, layer in enumerate(ready.layers):
        z, y = starts[k], starts[k + 1]
        for unit in range(sizes[k + 1]):
            line = np.zeros(starts[-1])
            line[y + unit] = 1
            if isinstance(layer, nn.Linear):
                line[z : z + sizes[k]] = -layer.weight[unit].numpy()
                equal.append(line)
                equal_to.append(layer.bias[unit].item())
                continue
            low, high = (end.flatten()[unit].item() for end in bounds[k])
            slope = 1.0 if low >= 0 else 0.0 if high <= 0 else high / (high - low)
            shift = -slope * low if low < 0 < high else 0.0
            for coefficient, sign, room in ((0, -1, 0), (1, -1, 0), (slope, 1, shift)):
                piece = line.copy()
                piece[z + unit] = -coefficient
                below.append(sign * piece)
                below_than.append(room)
    box = [(a, b) for a, b in zip(*(end.flatten().tolist() for end in bounds[0]), strict=True)]
    objective = np.zeros(starts[-1])
    objective[starts[-2] :] = -row
    free = [(None, None)] * (starts[-1] - sizes[0])
    found = linprog(objective, below, below_than, equal, equal_to, box + free, method="highs")
    assert found.status == 0
    return -found.fun


def lp_matrix(network, x, eps):
    return difference_bounds(network, x, eps, method="lp")[0]


@pytest.mark.parametrize("seed", range(3))
def test_lp_equals_an_independent_formulation_and_strong_duality_holds(seed):
    network, x, eps = fully_connected(4, 8, 7, 6, 3, seed=seed), torch.randn(1, 4).double(), 0.3
    ready, bounds = prepared(network, x, eps)
    crowned, found = difference_bounds(network, x, eps)[0], lp_matrix(network, x, eps)
    program = programs.build(ready, integer=False)
    programs.set_image(program, bounds)
    rows, pairs = lin.difference_rows(3)
    for row, (i, j) in zip(rows, pairs.tolist(), strict=True):
        primal = lp_by_scipy(ready, bounds, row.numpy())
        assert programs.attempt(program, row, programs.solver_options(program, "highs", None))
        assert program.problem.value == pytest.approx(primal, abs=1e-6)
        assert found[i, j].item() == pytest.approx(primal, abs=1e-6)
        assert found[i, j] <= crowned[i, j]


def test_milp_equals_all_activation_patterns():
    network, x, eps = tiny()
    found = difference_bounds(network, x, eps, method="milp")[0]
    relaxed = lp_matrix(network, x, eps)
    rows, pairs = lin.difference_rows(3)
    gains = 0.0
    for row, (i, j) in zip(rows[::2], pairs[::2].tolist(), strict=True):
        exact = exact_maximum(network, x, eps, row.numpy())
        assert exact <= found[i, j] <= exact + 2e-6
        gains = max(gains, (relaxed[i, j] - found[i, j]).item())
    assert gains > 1e-3  # otherwise this net shows nothing


@pytest.mark.parametrize("kind", ["fc", "pool"])
def test_ladder_and_truth(kind):
    if kind == "fc":
        teacher, student, x, eps = (
            fully_connected(3, 6, 5, 3),
            fully_connected(3, 5, 3, seed=1),
            torch.randn(2, 3),
            0.4,
        )
    else:
        x, eps = torch.randn(1, 1, 3, 3), 0.3
        teacher, student = pooled(0), pooled(1)
        teacher(x.double()), student(x.double())
    found = [faithfulness_upper_bound(teacher, student, x, eps, method=method) for method in METHODS]
    assert [f.method for f in found] == ["interval", "crown", "lp", "milp"]
    for looser, tighter in itertools.pairwise(found):
        assert (tighter.values <= looser.values).all()
    assert found[3].status == ["certified"] * len(x) and found[2].status == found[3].status
    for k in range(len(x)):
        points = inside(x[k : k + 1].double(), eps)
        reached = (teacher(points).softmax(1) - student(points).softmax(1)).abs().amax(1).max()
        assert reached <= found[3].values[k]


def test_pool_milp_is_exact_in_a_decided_and_an_undecided_window():
    network = nn.Sequential(nn.MaxPool2d(2, stride=1), nn.Flatten()).double()  # two overlapping windows, two logits
    x = torch.tensor([[[[0.0, 5.0, 0.3], [0.1, 0.2, 0.0]]]], dtype=torch.float64)
    x[0, 0, 0, 1] = 0.25
    eps = 0.2
    found = difference_bounds(network, x, eps, method="milp")[0, 0, 1].item()
    # second window's own inputs up, all others down: 0.5 against max(-0.2, -0.1, shared 0.05, 0.0)
    assert found == pytest.approx(0.5 - 0.05, abs=1e-6)


def test_eps_zero():
    teacher, student, x = fully_connected(3, 6, 5, 3), fully_connected(3, 5, 3, seed=1), torch.randn(2, 3)
    exact = (teacher(x.double()).softmax(1) - student(x.double()).softmax(1)).abs().amax(1)
    for method in ("lp", "milp"):
        values = faithfulness_upper_bound(teacher, student, x, 0.0, method=method).values
        assert (values >= exact).all() and torch.allclose(values, exact, atol=1e-6, rtol=0)


def test_a_big_output_bias_is_in_the_dual_bound():
    """The objective's constant: with a bias of 3 a bound that loses it would lie far below the truth."""
    network, x, eps = tiny()
    before = difference_bounds(network, x, eps, method="milp")[0]
    with torch.no_grad():
        network[4].bias += torch.tensor([3.0, 0.0, -2.0])
    after = difference_bounds(network, x, eps, method="milp")[0]
    assert after[1, 0].item() == pytest.approx(before[1, 0].item() + 3, abs=1e-5)
    assert after[0, 2].item() == pytest.approx(before[0, 2].item() - 5, abs=1e-5)


def forged(monkeypatch, change):
    """Let every solve be followed by `change(problem)`, which spoils the answer or raises."""
    real = cp.Problem.solve

    def solve(problem, **options):
        real(problem, **options)
        change(problem)

    monkeypatch.setattr(cp.Problem, "solve", solve)


def answer(problem, status, value, **stats):
    """An answer in the form cvxpy gives it."""
    problem._status, problem._value = status, value
    extra = types.SimpleNamespace(**stats)
    problem._solver_stats = types.SimpleNamespace(solver_name="HIGHS", extra_stats=extra)


def incumbent_at_a_limit(problem):
    answer(problem, cp.USER_LIMIT, -100.0, mip_dual_bound=-50.0, objective_function_value=100.0)


def stopped_before_any_point(problem):
    answer(problem, "infeasible_inaccurate", -math.inf, mip_dual_bound=math.inf)


def said_infeasible(problem):
    answer(problem, "infeasible", -math.inf, mip_dual_bound=100.0)


def lost_constant(problem):
    answer(problem, cp.OPTIMAL, 0.0, mip_dual_bound=1000.0)  # an "upper bound" of -1000


def not_a_number(problem):
    answer(problem, cp.OPTIMAL, math.nan, mip_dual_bound=math.nan)
    for constraint in problem.constraints:
        for variable in constraint.dual_variables:
            variable.save_value(np.full(variable.shape, math.nan))


def infinite(problem):
    answer(problem, cp.OPTIMAL, -math.inf, mip_dual_bound=math.inf)


def no_stats(problem):
    problem._solver_stats = None
    for constraint in problem.constraints:
        for variable in constraint.dual_variables:
            variable._value = None


def raises(problem):
    raise cp.SolverError("out of memory")


def wild_multipliers(problem):
    """Wrong but finite duals: signs and sizes of no meaning."""
    for constraint in problem.constraints:
        for variable in constraint.dual_variables:
            variable.save_value(np.random.default_rng(0).normal(size=variable.shape) * 1e6)


FORGERIES = [incumbent_at_a_limit, stopped_before_any_point, said_infeasible, lost_constant, not_a_number]
FORGERIES += [infinite, no_stats, raises, wild_multipliers]


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["lp", "milp"])
def test_no_forged_answer_gets_below_the_truth(monkeypatch, method, forgery):
    network, x, eps = tiny()
    crowned = difference_bounds(network, x, eps)[0]
    z = network(inside(x, eps))
    truth = (z[:, None, :] - z[:, :, None]).amax(0)
    forged(monkeypatch, forgery)
    found = difference_bounds(network, x, eps, method=method)[0]
    assert (truth <= found + 1e-9).all() and (found <= crowned).all()
    student = fully_connected(2, 3, 3, seed=4)
    bound = faithfulness_upper_bound(network, student, x, eps, method=method)
    points = inside(x, eps)
    assert (network(points).softmax(1) - student(points).softmax(1)).abs().max() <= bound.values.item()
    if method == "milp" and forgery is incumbent_at_a_limit:
        assert "node limit: dual bound used for" in bound.status[0]
    elif method == "milp" and forgery is not wild_multipliers:
        assert "without a usable bound" in bound.status[0]
    elif forgery in (not_a_number, no_stats, raises):
        assert "without multipliers" in bound.status[0]


def test_a_stale_answer_is_not_read_after_a_failure(monkeypatch):
    """The second row's solve raises while the problem still shows the first row's optimum."""
    network, x, eps = tiny()
    honest = difference_bounds(network, x, eps, method="interval")[0]
    calls = itertools.count()

    def fail_later(problem):
        if next(calls) > 0:
            raise cp.SolverError("later")

    ready, bounds = prepared(network, x, eps)
    program = programs.build(ready, integer=True)
    options = programs.solver_options(program, "highs", 100)
    forged(monkeypatch, fail_later)
    found, note = programs.milp_differences(ready, program, options, bounds, honest)
    assert (found < honest).sum() <= 1 and "without a usable bound for 5 of 6" in note


def test_a_node_limit_keeps_the_dual_bound():
    network, x, eps = fully_connected(4, 9, 9, 3, factor=2.5, seed=1), torch.zeros(1, 4).double(), 1.0
    crowned = difference_bounds(network, x, eps)[0]
    ready, bounds = prepared(network, x, eps)
    program = programs.build(ready, integer=True)
    options = programs.solver_options(program, "highs", 1)
    options |= {"mip_heuristic_effort": 0.0, "presolve": "off"}
    found, note = programs.milp_differences(ready, program, options, bounds, crowned)
    z = network(inside(x, eps))
    assert ((z[:, None, :] - z[:, :, None]).amax(0) <= found).all() and "node limit" in note


def test_old_highs_is_refused_for_milp(monkeypatch):
    network, x, eps = tiny()
    monkeypatch.setattr(programs.metadata, "version", lambda name: "1.14.0")
    with pytest.raises(FaithkdError, match="upgrade"):
        difference_bounds(network, x, eps, method="milp")
    assert lp_matrix(network, x, eps).isfinite().all()  # duals are checked, so any version will do


def test_highs_canary():
    """min 2a + 3b, a + b >= 4.5, both in [0, 10], b whole: 9. HiGHS 1.14.0 could answer otherwise."""
    a, b = cp.Variable(bounds=[0, 10]), cp.Variable(integer=True, bounds=[0, 10])
    problem = cp.Problem(cp.Minimize(2 * a + 3 * b), [a + b >= 4.5])
    problem.solve(solver="HIGHS")
    assert problem.value == pytest.approx(9)


def test_auto_says_once_that_gurobi_is_not_used(monkeypatch):
    network, x, eps = tiny()
    monkeypatch.setattr(programs, "gurobi_refusal", lambda program: "no licence today")
    programs.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no licence today; HiGHS solves instead"):
        found = difference_bounds(network, x, eps, method="lp", solver="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, difference_bounds(network, x, eps, method="lp", solver="auto"))
    with pytest.raises(FaithkdError, match="no licence today"):
        difference_bounds(network, x, eps, method="lp", solver="gurobi")


def gurobi_or_skip(network, x):
    reason = programs.gurobi_refusal(programs.build(net.prepare(network, tuple(x.shape[1:])), integer=True))
    if reason:
        pytest.skip(f"Gurobi does not work here: {reason}")


@pytest.mark.parametrize("method", ["lp", "milp"])
def test_gurobi_and_highs_agree(method):
    network, x, eps = tiny()
    gurobi_or_skip(network, x)
    found = [difference_bounds(network, x, eps, method=method, solver=name) for name in ("highs", "gurobi", "auto")]
    assert torch.allclose(found[0], found[1], atol=1e-6, rtol=0) and torch.equal(found[1], found[2])


def test_gurobi_stopped_before_a_point_gives_no_wrong_bound():
    network, x, eps = fully_connected(4, 9, 9, 3, factor=2.5, seed=1), torch.zeros(1, 4).double(), 1.0
    gurobi_or_skip(network, x)
    crowned = difference_bounds(network, x, eps)[0]
    ready, bounds = prepared(network, x, eps)
    program = programs.build(ready, integer=True)
    options = programs.solver_options(program, "gurobi", 0) | {"Heuristics": 0, "TimeLimit": 0.0}
    found, note = programs.milp_differences(ready, program, options, bounds, crowned)
    z = network(inside(x, eps))
    assert program.problem.status == "infeasible_inaccurate" and note
    assert ((z[:, None, :] - z[:, :, None]).amax(0) <= found).all()


def test_a_program_past_gurobis_licence_is_refused_by_size():
    gurobi_or_skip(*tiny()[:2])
    wide = fully_connected(20, 1500, 3)
    reason = programs.gurobi_refusal(programs.build(net.prepare(wide, (20,)), integer=False))
    if not reason:
        pytest.skip("this Gurobi licence has no size limit")
    assert "size-limited" in reason


@pytest.mark.parametrize("status", ["infeasible", "infeasible_inaccurate", "unbounded", "solver_error"])
def test_a_dual_bound_is_read_only_beside_a_status_that_gives_it_meaning(status):
    problem = cp.Problem(cp.Maximize(cp.Variable()))
    answer(problem, cp.USER_LIMIT, 0.0, mip_dual_bound=-5.0)
    assert programs.dual_bound(problem) == 5.0
    answer(problem, status, 0.0, mip_dual_bound=-5.0)
    assert programs.dual_bound(problem) == math.inf
