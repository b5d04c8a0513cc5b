"""The certificates: never below what can be reached, ordered by method, refused where there are none."""

import math

import pytest
import torch
from pairs import attacked, fully_connected, gap, points, scaled
from torch import nn

from faithkd.bounds import (
    METHODS,
    difference_bounds,
    faithfulness_upper_bound,
    faithfulness_upper_bounds,
    patches,
    softmax_bounds,
)
from faithkd.bounds import graph as net
from faithkd.bounds import linear as lin
from faithkd.bounds.softmax import pair_bound, softmax_interval
from faithkd.errors import FaithkdError

# torch's own forward pass says that padding="same" may need a copy
pytestmark = [pytest.mark.filterwarnings(f"ignore:{said}") for said in ("Using padding=", "Lazy modules")]
CHEAP = ("interval", "crown")


CONVOLUTIONS = {
    "plain": lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)],
    "overlapping": lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=1, padding=1)],
    "strided": lambda: [nn.Conv2d(2, 4, (3, 2), 2, (1, 0), dilation=(1, 2)), nn.MaxPool2d(2, 1), nn.ReLU()],
    "grouped": lambda: [
        *(nn.Conv2d(2, 4, 2, padding="same", groups=2, bias=False), nn.ReLU(), nn.MaxPool2d((2, 1), dilation=2))
    ],
}


def convolutional(seed, kind):
    torch.manual_seed(seed)
    body = [*CONVOLUTIONS[kind](), nn.Conv2d(4, 3, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2, stride=1), nn.Flatten()]
    network = nn.Sequential(*body, nn.LazyLinear(3))
    network(torch.zeros(1, 2, 7, 6))
    return network.double()


def test_several_students_are_bounded_as_each_of_them():
    torch.manual_seed(3)
    guide, *students = (fully_connected(2, width, 3, seed=width) for width in (8, 6, 5))
    x = torch.randn(4, 2)
    for options in ({}, {"method": "lp"}, {"method": "best", "nodes": 4, "jobs": 1, "agreement": True}):
        together = faithfulness_upper_bounds(guide, students, x, 0.3, **options)
        for student, found in zip(students, together, strict=True):
            alone = faithfulness_upper_bound(guide, student, x, 0.3, **options)
            torch.testing.assert_close(found.values, alone.values, rtol=0, atol=3e-3 if options else 0)
            assert (found.method, found.status) == (alone.method, alone.status)
            assert list(found.rungs) == list(alone.rungs)
    assert faithfulness_upper_bounds(guide, [], x, 0.3) == []
    with pytest.raises(FaithkdError, match="classes"):
        faithfulness_upper_bounds(guide, [*students, fully_connected(2, 4, 5)], x, 0.3)


def test_patches_are_two_nodes_in_one():
    network = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    prepared = net.prepare(network, (2, 11, 12))
    bounds, lines, _ = lin.crown(prepared, *net.outer_ball(torch.randn(2, 2, 11, 12).double(), 0.1))
    rows = torch.randn(2, 5, *prepared.shapes[2], dtype=torch.float64)
    weights = torch.rand(2, 5, *lines[1].below.shape[2:], dtype=torch.float64)
    whole = lin.pull(prepared, lines, rows, 2, lin.Dual({1: weights}))  # float64: node by node
    rough = [line.rough() for line in lines]
    assert patches.patches(prepared.single) is not None
    for exact, found in zip(
        whole, lin.pull(prepared.single, rough, rows.float(), 2, lin.Dual({1: weights.float()})), strict=True
    ):
        assert exact.dtype == torch.float64 and (exact - found).abs().max() < 1e-4 * exact.abs().max()


def test_crown_by_hand():
    """|x| = relu(x) + relu(-x) on [-1, 3]: the upper lines 3/4 (x + 1) and 1/4 (3 - x) reach 3 at x = 3."""
    network = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        network[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    highest = difference_bounds(network, torch.tensor([[1.0]]), 2.0)[0]
    assert highest[1, 0].item() == pytest.approx(3.0, abs=1e-9)
    # below, the larger half decides: relu(x) >= x and relu(-x) >= 0, so -|x| <= -x <= 1; interval arithmetic
    # knows 0
    prepared = net.prepare(network, (1,))
    down = torch.tensor([[[-1.0, 1.0]]], dtype=torch.float64)
    bounds, lines, _ = lin.crown(prepared, *net.outer_ball(torch.ones(1, 1).double(), 2.0))
    assert lin.backward(prepared, lines, bounds[0], down).item() == pytest.approx(1.0, abs=1e-9)
    assert highest[0, 1].item() == pytest.approx(0.0, abs=1e-9)


def test_an_affine_network_is_exact():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    x, rows = torch.randn(1, 2, 3).double(), lin.difference_rows(3)
    weight = rows[0] @ network[2].weight @ network[1].weight
    exact = (network(x) @ rows[0].T)[0] + 0.3 * weight.abs().sum(1)
    highest = difference_bounds(network, x, 0.3)[0]
    assert torch.allclose(highest[rows[1][:, 0], rows[1][:, 1]], exact, atol=1e-9, rtol=0)


@pytest.mark.parametrize("eps", [0.03, 0.2, 1.0])
@pytest.mark.parametrize("kind", ["fully connected", *CONVOLUTIONS])
def test_no_point_of_the_ball_lies_above_the_bound(kind, eps):
    if kind in CONVOLUTIONS:
        pair = scaled(convolutional(1, kind), 1.5), scaled(convolutional(9, "plain"), 1.5)
        x = torch.randn(2, 2, 7, 6).double()
    else:
        pair, x = (fully_connected(2, 8, 8, 6, 3), fully_connected(2, 6, 3)), torch.randn(2, 2).double()
    found = {method: faithfulness_upper_bound(*pair, x, eps, method=method) for method in CHEAP}
    assert (found["crown"].values <= found["interval"].values).all()
    for k in range(len(x)):
        reached = attacked(lambda p: gap(*pair, p), x[k : k + 1], eps)
        assert reached <= found["crown"].values[k] <= 1
        for network in pair:
            z = network(points(x[k : k + 1], eps, 2000))
            low, high = (end[k] for end in softmax_bounds(network, x, eps))
            assert (low <= z.softmax(1).amin(0)).all() and (z.softmax(1).amax(0) <= high).all()
            highest = difference_bounds(network, x, eps)[k]
            assert ((z[:, None, :] - z[:, :, None]).amax(0) <= highest + 1e-12).all()


def test_softmax_interval_is_exact_and_never_breaks():
    highest = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    lower, upper = softmax_interval(highest)
    assert lower[0].item() == pytest.approx(1 / (1 + math.e + math.e**2), abs=1e-12)
    assert upper[0].item() == pytest.approx(1 / (1 + math.exp(-0.5) + math.exp(0.0)), abs=1e-12)
    for extreme in (math.inf, -math.inf, 1e308, -1e308, 800.0):
        low, high = softmax_interval(torch.full((1, 2, 2), extreme, dtype=torch.float64))
        assert torch.equal(low, low.clamp(0, 1)) and torch.equal(high, high.clamp(0, 1))
    wide = torch.tensor([[0.0, 40.0], [40.0, 0.0]], dtype=torch.float64)
    assert (softmax_interval(wide)[1] >= 1 / (1 + math.exp(-40.0))).all()  # a guard in the denominator would fail here
    low, high = softmax_interval(torch.full((2, 2), math.nan, dtype=torch.float64))
    assert low.tolist() == [0, 0] and high.tolist() == [1, 1]
    assert pair_bound(torch.full((1, 2, 2), math.nan), torch.zeros(1, 2, 2)).item() == 1.0


LINE, IMAGE = torch.zeros(1, 3), torch.zeros(1, 1, 6, 6)
BAD_NETWORKS = [
    ([nn.Linear(3, 2)], LINE, "torch.nn.Module"),
    (nn.Sequential(nn.Linear(3, 4), nn.Hardshrink(), nn.Linear(4, 2)), LINE, "layer 1 .*: there is no bound for hards"),
    (nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))), LINE, "0.1 .LayerNorm.: there is no bound for"),
    (fully_connected(4, 4, 2), LINE, "layer 0.*does not fit"),
    (fully_connected(3, 4, 1), LINE, "C >= 2"),
    (fully_connected(36, 2), IMAGE, "Flatten"),
    (nn.Sequential(nn.Conv2d(1, 2, 3)), IMAGE, "logits of shape"),
    (nn.Sequential(nn.Conv2d(1, 2, 9), nn.Flatten(), nn.Linear(2, 2)), IMAGE, "layer 0.*does not fit"),
    (nn.Sequential(nn.MaxPool2d(2, return_indices=True), nn.Flatten()), IMAGE, "cannot be traced"),
    (nn.Sequential(nn.Flatten(0), nn.Linear(36, 2)), IMAGE, "layer 1 .*does not fit"),
    (nn.Sequential(), LINE[:, :1], "C >= 2"),
]


@pytest.mark.parametrize(("network", "x", "message"), BAD_NETWORKS)
def test_networks_that_cannot_be_bounded_are_errors(network, x, message):
    good = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2))
    for pair, who in (((network, good), "teacher"), ((good, network), "student")):
        with pytest.raises(FaithkdError, match=message) as caught:
            faithfulness_upper_bound(*pair, x, 0.1)
        assert who in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "crwon"}, "did you mean 'crown'"),
        ({"solver": "gurobbi"}, "did you mean 'gurobi'"),
        ({"max_nodes": 0}, "max_nodes"),
    ],
)
def test_bad_arguments_are_errors(keywords, message):
    with pytest.raises(FaithkdError, match=message):
        faithfulness_upper_bound(fully_connected(3, 2), fully_connected(3, 2), LINE, 0.1, **keywords)


def test_misspelt_keywords_are_errors_of_both_kinds():
    network = fully_connected(3, 2)
    for call in (
        lambda **choices: faithfulness_upper_bound(network, network, LINE, 0.1, **choices),
        lambda **choices: faithfulness_upper_bounds(network, [network], LINE, 0.1, **choices),
        lambda **choices: difference_bounds(network, LINE, 0.1, **choices),
        lambda **choices: softmax_bounds(network, LINE, 0.1, **choices),
    ):
        for kind in (FaithkdError, TypeError):
            with pytest.raises(kind, match="unknown keyword 'nodez'.*did you mean 'nodes'"):
                call(nodez=3)
        with pytest.raises(FaithkdError, match="unknown keyword 'clipp'.*did you mean 'clip'"):
            call(clipp=(0, 1))


def test_empty_batch():
    pair, none = (fully_connected(3, 4, 2), fully_connected(3, 2)), torch.zeros(0, 3)
    for method in METHODS:
        found = faithfulness_upper_bound(*pair, none, 0.1, method=method)
        assert found.values.shape == (0,) and found.status == []
    assert difference_bounds(pair[0], none, 0.1).shape == (0, 2, 2)
