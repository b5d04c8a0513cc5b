"""LP and MILP: right when the solver is right. What happens when it is wrong is in test_solver_traps."""

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from faithkd.bounds import difference_bounds, exact, faithfulness_upper_bound, operators, programs, solvers
from faithkd.bounds import graph as net
from faithkd.bounds import linear as lin
from faithkd.bounds.domains import root
from faithkd.bounds.softmax import pair_bound
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


def opened(network, x, eps, solver="highs"):
    """The network, the boxes that the LP is built on (alpha-CROWN's), and the LP of one image."""
    ready = net.prepare(network, tuple(x.shape[1:]))
    bounds = root(ready, 0, *net.outer_ball(x, eps)).bounds
    return ready, bounds, exact.opener(ready, solver)(bounds)


def by_cvxpy(ready, bounds, row, integer=False, solver="HIGHS"):
    """The optimum that cvxpy and a solver report, and the program."""
    program = programs.build(ready, integer)
    programs.set_image(program, bounds)
    program.row.value = row.numpy()
    program.problem.solve(solver=solver)
    assert program.problem.status == "optimal"
    return program.problem.value, program


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
    for k, layer in enumerate(node.operator for node in ready.nodes):
        z, y = starts[k], starts[k + 1]
        for unit in range(sizes[k + 1]):
            line = np.zeros(starts[-1])
            line[y + unit] = 1
            if isinstance(layer, operators.Linear):
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


def lp_matrix(network, x, eps, **choices):
    return difference_bounds(network, x, eps, method="lp", **choices)[0]


@pytest.mark.parametrize("seed", range(3))
def test_lp_equals_an_independent_formulation_and_strong_duality_holds(seed):
    network, x, eps = fully_connected(4, 8, 7, 6, 3, seed=seed), torch.randn(1, 4).double(), 0.3
    ready, bounds, _ = opened(network, x, eps)
    crowned, found = difference_bounds(network, x, eps)[0], lp_matrix(network, x, eps)
    rows, pairs = lin.difference_rows(3)
    for row, (i, j) in zip(rows, pairs.tolist(), strict=True):
        primal = lp_by_scipy(ready, bounds, row.numpy())
        assert by_cvxpy(ready, bounds, row)[0] == pytest.approx(primal, abs=1e-6)
        assert found[i, j].item() == pytest.approx(primal, abs=1e-6)
        assert found[i, j] <= crowned[i, j]


@pytest.mark.parametrize("seed", range(3))
def test_strong_duality_holds_with_max_pooling(seed):
    """Our own pass with the LP's multipliers as window weights reaches what cvxpy and HiGHS say."""
    network, x, eps = pooled(seed), torch.randn(1, 1, 4, 4).double(), 0.4
    network(x)
    ready, bounds, image = opened(network, x, eps)
    undecided = sum(int(image.lines[k].free.any()) for k in image.form.pieces)
    assert undecided >= 2  # the pool and the ReLUs
    rows, _ = lin.difference_rows(3)
    for row in rows:
        primal, _ = by_cvxpy(ready, bounds, row)
        part, _ = exact.visit(image, row, exact.Part(-math.inf, 0, (), np.full(len(image.form.right), np.nan)))
        dual = exact.certified(image, row[None], [part]).item()
        assert dual == pytest.approx(primal, rel=1e-6, abs=1e-6)
        assert dual >= primal - 1e-6


@pytest.mark.parametrize("kind", ["fc", "pool"])
def test_multipliers_are_those_that_cvxpy_reads(kind):
    x = torch.randn(1, 4).double() if kind == "fc" else torch.randn(1, 1, 4, 4).double()
    network = fully_connected(4, 6, 5, 3) if kind == "fc" else pooled(1)
    network(x)
    ready, bounds, image = opened(network, x, 0.3)
    row = lin.difference_rows(3)[0][1]
    none = np.array([], int)
    answer = image.solve(image.form.cost(row.numpy()), none, none)
    _, program = by_cvxpy(ready, bounds, row)
    for k, (_, lower_pieces, upper_piece) in program.pieces.items():
        theirs = np.concatenate([piece.dual_value for piece in lower_pieces])
        rows = image.form.pieces[k]
        ours = answer.multipliers[rows.T.ravel() if kind == "fc" else np.sort(rows[rows >= 0])]
        assert np.allclose(ours, theirs, atol=1e-6)
        assert np.allclose(answer.multipliers[image.form.above[k]], upper_piece.dual_value, atol=1e-6)


def test_milp_equals_all_activation_patterns():
    network, x, eps = tiny()
    found = difference_bounds(network, x, eps, method="milp")[0]
    relaxed = lp_matrix(network, x, eps)
    rows, pairs = lin.difference_rows(3)
    gains = 0.0
    for row, (i, j) in zip(rows[::2], pairs[::2].tolist(), strict=True):
        truth = exact_maximum(network, x, eps, row.numpy())
        assert truth <= found[i, j] <= truth + 2e-6
        gains = max(gains, (relaxed[i, j] - found[i, j]).item())
    assert gains > 1e-3  # otherwise this net shows nothing


@pytest.mark.parametrize("kind", ["fc", "pool"])
def test_milp_equals_the_integer_program(kind):
    """The tree's proved value is the optimum of eq. (8) as a solver's own branch and bound finds it."""
    x, eps = (torch.randn(1, 4).double(), 0.5) if kind == "fc" else (torch.randn(1, 1, 3, 3).double(), 0.3)
    network = fully_connected(4, 7, 6, 3, seed=2) if kind == "fc" else pooled(0)
    network(x)
    ready, bounds, _ = opened(network, x, eps)
    found = difference_bounds(network, x, eps, method="milp")[0]
    rows, pairs = lin.difference_rows(3)
    for row, (i, j) in zip(rows, pairs.tolist(), strict=True):
        assert found[i, j].item() == pytest.approx(by_cvxpy(ready, bounds, row, integer=True)[0], abs=3e-6)


@pytest.mark.parametrize("kind", ["fc", "pool"])
def test_ladder_and_truth(kind):
    if kind == "fc":
        teacher, student = fully_connected(3, 6, 5, 3), fully_connected(3, 5, 3, seed=1)
        x, eps = torch.randn(2, 3), 0.4
    else:
        x, eps = torch.randn(1, 1, 3, 3), 0.3
        teacher, student = pooled(0), pooled(1)
        teacher(x.double()), student(x.double())
    methods = ("interval", "crown", "alpha-crown", "lp", "milp")
    found = [faithfulness_upper_bound(teacher, student, x, eps, method=method) for method in methods]
    for looser, tighter in itertools.pairwise(found):
        assert (tighter.values <= looser.values).all()
    assert found[-1].status == ["certified"] * len(x) and found[-2].status == found[-1].status
    for k in range(len(x)):
        points = inside(x[k : k + 1].double(), eps)
        reached = (teacher(points).softmax(1) - student(points).softmax(1)).abs().amax(1).max()
        assert reached <= found[-1].values[k]


@pytest.mark.parametrize("method", ["lp", "milp"])
def test_the_differences_left_out_cannot_change_the_bound(method, monkeypatch):
    teacher, student = fully_connected(3, 6, 5, 6), fully_connected(3, 5, 6, seed=1)
    x, eps = torch.randn(3, 3), 0.3
    whole = [difference_bounds(network, x, eps, method=method) for network in (teacher, student)]
    rows, real = [], exact.tree
    monkeypatch.setattr(exact, "tree", lambda image, row, nodes: (rows.append(row), real(image, row, nodes))[1])
    found = faithfulness_upper_bound(teacher, student, x, eps, method=method).values
    assert torch.allclose(found, pair_bound(*whole), atol=2e-6, rtol=0)
    assert len(rows) < 0.7 * 2 * 30 * len(x) * (1 if method == "lp" else 2)


def test_pool_milp_is_exact_in_a_decided_and_an_undecided_window():
    network = nn.Sequential(nn.MaxPool2d(2, stride=1), nn.Flatten()).double()  # two overlapping windows, two logits
    x = torch.tensor([[[[0.0, 5.0, 0.3], [0.1, 0.2, 0.0]]]], dtype=torch.float64)
    x[0, 0, 0, 1] = 0.25
    eps = 0.2
    found = difference_bounds(network, x, eps, method="milp")[0, 0, 1].item()
    # second window's own inputs up, all others down: 0.5 against max(-0.2, -0.1, shared 0.05, 0.0)
    assert found == pytest.approx(0.5 - 0.05, abs=2e-6)


def test_eps_zero():
    teacher, student, x = fully_connected(3, 6, 5, 3), fully_connected(3, 5, 3, seed=1), torch.randn(2, 3)
    truth = (teacher(x.double()).softmax(1) - student(x.double()).softmax(1)).abs().amax(1)
    for method in ("lp", "milp"):
        values = faithfulness_upper_bound(teacher, student, x, 0.0, method=method).values
        assert (values >= truth).all() and torch.allclose(values, truth, atol=1e-6, rtol=0)


def test_batch_equals_one_by_one():
    """Each image's LPs start afresh: what was solved before changes nothing."""
    teacher, student, x = fully_connected(3, 6, 5, 3), fully_connected(3, 5, 3, seed=1), torch.randn(3, 3)
    together = faithfulness_upper_bound(teacher, student, x, 0.3, method="milp").values
    alone = [faithfulness_upper_bound(teacher, student, one[None], 0.3, method="milp").values for one in x]
    assert torch.allclose(together, torch.cat(alone), atol=1e-9, rtol=0)


def test_a_node_limit_keeps_a_valid_bound_and_says_so():
    network, x, eps = fully_connected(4, 9, 9, 3, factor=2.5, seed=1), torch.zeros(1, 4).double(), 1.0
    z = network(inside(x, eps))
    truth, before = (z[:, None, :] - z[:, :, None]).amax(0), math.inf
    _, _, image = opened(network, x, eps)
    for nodes in (0, 5, 50, 2000):
        highest, note = exact.lowered([image], [torch.full((3, 3), math.inf).double()], nodes)
        value = highest[0].fill_diagonal_(0).sum().item()
        assert (truth <= highest[0]).all() and value <= before + 1e-9
        assert ("MILP not settled" in note) == (nodes in (5, 50))
        before = value


@pytest.mark.parametrize("solver", ["highs", "gurobi"])
def test_an_empty_part_is_proved_to_be_empty(solver):
    """Two units with z_1 = z_0 - 1: the part where z_0 <= 0 and z_1 >= 0 has no point, and the ray shows it."""
    network, x, eps = fully_connected(2, 2, 2), torch.zeros(1, 2).double(), 1.0
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.copy_(torch.tensor([0.0, -1.0]))
    gurobi_or_skip(network, x, solver)
    _, _, image = opened(network, x, eps, solver)
    row = torch.tensor([1.0, -1.0]).double()
    first, _ = exact.visit(image, row, exact.Part(-math.inf, 0, (), np.full(len(image.form.right), np.nan)))
    parts = [
        exact.visit(image, row, exact.Part(0.0, 1, ((1, 0, a), (1, 1, b)), first.multipliers))[0]
        for a, b in itertools.product((0, 1), repeat=2)
    ]
    values = exact.certified(image, row.expand(4, -1), parts)
    assert values.isfinite().tolist() == [True, False, True, True]
    # what a ray does not prove is not believed
    values = exact.certified(image, row[None], [replace(parts[0], ray=parts[1].ray)])
    assert values.isfinite().all()


def test_highs_canary():
    """min 2a + 3b, a + b >= 4.5, both in [0, 10], b whole: 9. HiGHS 1.14.0 could answer otherwise."""
    a, b = cp.Variable(bounds=[0, 10]), cp.Variable(integer=True, bounds=[0, 10])
    problem = cp.Problem(cp.Minimize(2 * a + 3 * b), [a + b >= 4.5])
    problem.solve(solver="HIGHS")
    assert problem.value == pytest.approx(9)


def test_auto_says_once_that_gurobi_is_not_used(monkeypatch):
    network, x, eps = tiny()
    monkeypatch.setattr(solvers, "gurobi_refusal", lambda rows, variables: "no licence today")
    solvers.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no licence today; HiGHS solves instead"):
        found = lp_matrix(network, x, eps, solver="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, lp_matrix(network, x, eps, solver="auto"))
    with pytest.raises(FaithkdError, match="no licence today"):
        lp_matrix(network, x, eps, solver="gurobi")


def size(network, x):
    problem = programs.build(net.prepare(network, tuple(x.shape[1:])), integer=False).problem
    return sum(part.size for part in problem.constraints), sum(part.size for part in problem.variables())


def gurobi_or_skip(network, x, solver="gurobi"):
    reason = solvers.gurobi_refusal(*size(network, x)) if solver == "gurobi" else ""
    if reason:
        pytest.skip(f"Gurobi does not work here: {reason}")


@pytest.mark.parametrize("method", ["lp", "milp"])
@pytest.mark.parametrize("kind", ["fc", "pool"])
def test_gurobi_and_highs_agree(method, kind):
    network, x, eps = tiny() if kind == "fc" else (pooled(0), torch.randn(1, 1, 3, 3).double(), 0.3)
    network(x)
    gurobi_or_skip(network, x)
    found = [difference_bounds(network, x, eps, method=method, solver=name) for name in ("highs", "gurobi", "auto")]
    assert torch.allclose(found[0], found[1], atol=1e-6 if method == "lp" else 2e-6, rtol=0)
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    "widths", [(784, *[30] * 5, 10), (784, 64, 32, 32, 32, 32, 16, 10, 10)], ids=["mnist", "fmnist"]
)
def test_the_papers_networks_fit_gurobis_licence_as_the_ball_is_no_row(widths):
    rows, variables = size(fully_connected(*widths), torch.zeros(1, 784))
    assert max(rows, variables) <= 2000 < rows + 2 * 784
    gurobi_or_skip(*tiny()[:2])
    assert solvers.gurobi_refusal(rows, variables) == ""


def test_a_program_past_gurobis_licence_is_refused_by_size():
    gurobi_or_skip(*tiny()[:2])
    reason = solvers.gurobi_refusal(*size(fully_connected(20, 1500, 3), torch.zeros(1, 20)))
    if not reason:
        pytest.skip("this Gurobi licence has no size limit")
    assert "size-limited" in reason
