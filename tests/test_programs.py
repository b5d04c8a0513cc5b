"""LP and MILP: right when the solver is right. What happens when it is wrong is in test_solver_traps."""

import itertools
import math
import warnings

import pytest
import torch
from pairs import fully_connected, gap, points, pooled
from torch import nn

from faithkd.bounds import difference_bounds, faithfulness_upper_bound, graph, linear
from faithkd.bounds.domains import root
from faithkd.bounds.softmax import pair_bound
from faithkd.errors import FaithkdError

cp = pytest.importorskip("cvxpy")
from faithkd.bounds import exact, programs  # noqa: E402


def triangle(y, z, low, high):
    return [y >= 0, y >= z, y <= cp.multiply(high / (high - low), z - low)]


def switch(y, z, low, high):
    a = cp.Variable(y.size, boolean=True)
    return [y >= 0, y >= z, y <= z - cp.multiply(low, 1 - a), y <= cp.multiply(high, a)]


def by_hand(network, boxes, row, relu):
    """Largest row . z of a fully connected network, written down once more; `relu` holds y to z on [low, high]."""
    (low, high), rules = (end[0].numpy() for end in boxes[0]), []
    z = cp.Variable(len(low), bounds=[low, high])
    for layer, box in zip(network, boxes, strict=False):
        low, high = (end[0].numpy() for end in box)
        if isinstance(layer, nn.Linear):
            z = layer.weight.detach().numpy() @ z + layer.bias.detach().numpy()
        else:
            y = cp.Variable(len(low))
            rules += relu(y, z, low.clip(max=0), high.clip(min=0))
            z = y
    return cp.Problem(cp.Maximize(row.numpy() @ z), rules).solve(solver="HIGHS")


def opened(network, x, eps, solver="highs"):
    """The boxes that the LP is built on (alpha-CROWN's), and the LP of one image."""
    ready = graph.prepare(network, tuple(x.shape[1:]))
    bounds = root(ready, 0, *graph.outer_ball(x, eps)).bounds
    return bounds, exact.opened(ready, bounds, solver)


KINDS = {
    "fc": lambda: (fully_connected(2, 5, 4, 3), torch.tensor([[0.3, -0.2]]).double(), 0.8),
    "pool": lambda: (pooled(0), torch.randn(1, 1, 3, 3).double(), 0.1),
}


@pytest.mark.parametrize("seed", range(2))
def test_lp_and_milp_equal_an_independent_formulation(seed):
    network, x, eps = fully_connected(3, 6, 5, 3, seed=seed), torch.randn(1, 3).double(), 0.5
    bounds, _ = opened(network, x, eps)
    found = {method: difference_bounds(network, x, eps, method=method)[0] for method in ("lp", "milp")}
    for row, (i, j) in zip(*(part.tolist() for part in linear.difference_rows(3)), strict=True):
        relaxed, true = (by_hand(network, bounds, torch.tensor(row), relu) for relu in (triangle, switch))
        assert found["lp"][i, j].item() == pytest.approx(relaxed, abs=1e-6)
        assert found["milp"][i, j].item() == pytest.approx(true, abs=3e-6)
    assert (found["lp"] - found["milp"]).max() > 1e-3  # otherwise these networks show nothing


@pytest.mark.parametrize("seed", range(2))
def test_max_pooling_loses_nothing(seed):
    """The LP's multipliers as weights over windows reach what the solver says, and the tree what MILP solvers do."""
    network, x, eps = pooled(seed), torch.randn(1, 1, 3, 3).double(), 0.1
    bounds, image = opened(network, x, eps)
    assert sum(pieces.free(image.lines[k]).any() for k, pieces in image.program.pieces.items()) >= 2
    program = programs.build(image.network, integer=True)
    for parameter, end in zip(program.ball, bounds[0], strict=True):
        parameter.value = end.flatten().numpy()
    for k, pieces in program.pieces.items():
        pieces.fill_integer(bounds[image.network.place(k)])
    found = difference_bounds(network, x, eps, method="milp")[0]
    for row, (i, j) in zip(*linear.difference_rows(3), strict=True):
        dual, *_ = exact.visit(image, row, ())
        primal = image.program.problem.value
        assert primal - 1e-6 <= dual <= primal + 1e-6 * (1 + abs(primal))
        program.row.value = row.numpy()
        assert found[i, j].item() == pytest.approx(program.problem.solve(solver="HIGHS"), abs=3e-6)


@pytest.mark.parametrize("kind", ["fc", "pool"])
def test_ladder_and_truth(kind):
    if kind == "fc":
        teacher, student, x, eps = fully_connected(3, 6, 5, 3), fully_connected(3, 5, 3, seed=1), torch.randn(2, 3), 0.4
    else:
        teacher, student, x, eps = pooled(0), pooled(1), torch.randn(1, 1, 3, 3), 0.05
    methods = ("interval", "crown", "alpha-crown", "lp", "milp")
    found = [faithfulness_upper_bound(teacher, student, x, eps, method=method) for method in methods]
    for looser, tighter in itertools.pairwise(found):
        assert (tighter.values <= looser.values).all() and tighter.status == ["certified"] * len(x)
    for k in range(len(x)):
        assert gap(teacher, student, points(x[k : k + 1], eps)).max() <= found[-1].values[k]
        alone = faithfulness_upper_bound(teacher, student, x[k : k + 1], eps, method="milp").values
        assert alone.item() == pytest.approx(found[-1].values[k].item(), abs=1e-6)


def test_the_differences_left_out_cannot_change_the_bound(monkeypatch):
    teacher, student = fully_connected(3, 6, 5, 6), fully_connected(3, 5, 6, seed=1)
    x, eps = torch.randn(2, 3), 0.3
    whole = [difference_bounds(network, x, eps, method="lp") for network in (teacher, student)]
    rows, real = [], exact.maximum
    monkeypatch.setattr(exact, "maximum", lambda image, row, *rest: (rows.append(row), real(image, row, *rest))[1])
    found = faithfulness_upper_bound(teacher, student, x, eps, method="lp").values
    assert torch.allclose(found, pair_bound(*whole), atol=2e-6, rtol=0)
    assert len(rows) < 0.7 * 2 * 30 * len(x)


def test_a_node_limit_keeps_a_valid_bound_and_says_so():
    network, x, eps = fully_connected(4, 8, 8, 2, factor=2.5, seed=1), torch.zeros(1, 4).double(), 1.0
    z = network(points(x, eps))
    truth, before = (z[:, None, :] - z[:, :, None]).amax(0), math.inf
    _, image = opened(network, x, eps)
    for nodes in (0, 5, 500):
        highest, note = exact.lowered([image], [torch.full((2, 2), 1e6).double()], nodes)
        value = highest[0].fill_diagonal_(0).sum().item()
        assert (truth <= highest[0]).all() and value <= before + 1e-9
        assert ("MILP not settled" in note) == (nodes == 5)
        before = value


@pytest.mark.parametrize("solver", ["highs", "gurobi"])
def test_an_empty_part_is_worth_little(solver):
    """Two units with z_1 = z_0 - 1: the part where z_0 <= 0 and z_1 >= 0 has no point, and its bound says so."""
    network, x, eps = fully_connected(2, 2, 2), torch.zeros(1, 2).double(), 1.0
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.copy_(torch.tensor([0.0, -1.0]))
    gurobi_or_skip(network, x, solver)
    _, image = opened(network, x, eps, solver)
    row, z = torch.tensor([1.0, -1.0]).double(), network[:2](points(x, eps))
    for first, second in itertools.product((0, 1), repeat=2):
        value, met, _ = exact.visit(image, row, ((1, 0, first), (1, 1, second)))
        inside = ((z[:, 0] > 0) | (first == 0)) & ((z[:, 0] <= 0) | (first == 1)) & ((z[:, 1] > 0) == (second == 1))
        assert (value < -100) == (not inside.any()) and math.isfinite(met)
        assert not inside.any() or (network(points(x, eps))[inside] @ row).max() <= value


def test_highs_canary():
    """min 2a + 3b, a + b >= 4.5, both in [0, 10], b whole: 9. HiGHS 1.14.0 could answer otherwise."""
    a, b = cp.Variable(bounds=[0, 10]), cp.Variable(integer=True, bounds=[0, 10])
    assert cp.Problem(cp.Minimize(2 * a + 3 * b), [a + b >= 4.5]).solve(solver="HIGHS") == pytest.approx(9)


def test_auto_says_once_that_gurobi_is_not_used(monkeypatch):
    network, x, eps = KINDS["fc"]()
    monkeypatch.setattr(programs, "gurobi_refusal", lambda rows, variables: "no licence today")
    programs.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no licence today; HiGHS solves instead"):
        found = difference_bounds(network, x, eps, method="lp", solver="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, difference_bounds(network, x, eps, method="lp", solver="auto"))
    with pytest.raises(FaithkdError, match="no licence today"):
        difference_bounds(network, x, eps, method="lp", solver="gurobi")


def size(network, x):
    problem = programs.build(graph.prepare(network, tuple(x.shape[1:]))).problem
    return sum(part.size for part in problem.constraints), sum(part.size for part in problem.variables())


def gurobi_or_skip(network, x, solver="gurobi"):
    reason = programs.gurobi_refusal(*size(network, x)) if solver == "gurobi" else ""
    if reason:
        pytest.skip(f"Gurobi does not work here: {reason}")


@pytest.mark.parametrize("method", ["lp", "milp"])
@pytest.mark.parametrize("kind", KINDS)
def test_gurobi_and_highs_agree(method, kind):
    network, x, eps = KINDS[kind]()
    gurobi_or_skip(network, x)
    found = [difference_bounds(network, x, eps, method=method, solver=name) for name in ("highs", "gurobi", "auto")]
    assert torch.allclose(found[0], found[1], atol=2e-6, rtol=0) and torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    "widths", [(784, *[30] * 5, 10), (784, 64, 32, 32, 32, 32, 16, 10, 10)], ids=["mnist", "fmnist"]
)
def test_the_papers_networks_fit_gurobis_licence_as_the_ball_is_no_row(widths):
    rows, variables = size(fully_connected(*widths), torch.zeros(1, 784))
    assert max(rows, variables) <= 2000 < rows + 2 * 784
    gurobi_or_skip(*KINDS["fc"]()[:2])
    assert programs.gurobi_refusal(rows, variables) == ""


def test_a_program_past_gurobis_licence_is_refused_by_size():
    gurobi_or_skip(*KINDS["fc"]()[:2])
    rows, variables = size(fully_connected(20, 1500, 3), torch.zeros(1, 20))
    reason = programs.gurobi_refusal(rows, variables)
    if not reason:
        pytest.skip("this Gurobi licence has no size limit")
    assert f"{variables} variables, {rows} rows" in reason
