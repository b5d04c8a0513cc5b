"""The certificates: never below what can be reached, ordered by method, refused where there are none."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=")
CHEAP = ("interval", "crown")


def fully_connected(*widths):
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def scaled(network, factor):
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(factor)
    return network


def gap(teacher, student, x):
    return (teacher(x).softmax(1) - student(x).softmax(1)).abs().amax(1)


def inside(x, eps, count, clip=None):
    """Random points, corners and edges of the ball around one image."""
    noise = torch.rand(count, *x.shape[1:], dtype=torch.float64) * 2 - 1
    noise[: count // 2] = noise[: count // 2].sign()
    points = x + eps * noise
    return points if clip is None else points.clamp(*clip)


def attacked(objective, x, eps, steps=25, starts=20):
    """Largest value of `objective` found by sampling and by a plain projected gradient ascent."""
    points = inside(x, eps, starts)
    best = objective(inside(x, eps, 2000)).max().item()
    for _ in range(steps):
        points.requires_grad_()
        values = objective(points)
        best = max(best, values.max().item())
        step = torch.autograd.grad(values.sum(), points)[0].sign()
        points = (points.detach() + eps / 8 * step).clamp(x - eps, x + eps)
    return best


def convolutional(seed, kind):
    torch.manual_seed(seed)
    first = {
        "plain": [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)],
        "overlapping": [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=1, padding=1)],
        "strided": [
            nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)),
            nn.MaxPool2d(2, 1),
            nn.ReLU(),
        ],
        "grouped": [
            nn.Conv2d(2, 4, 2, padding="same", groups=2, bias=False),
            nn.ReLU(),
            nn.MaxPool2d((2, 1), dilation=2),
        ],
    }[kind]
    body = nn.Sequential(*first, nn.Conv2d(4, 3, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2, stride=1), nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width = body(torch.zeros(1, 2, 7, 6)).shape[1]
    return nn.Sequential(body, nn.Linear(width, 3)).double()


def pairs():
    for seed in range(4):
        torch.manual_seed(seed)
        teacher = scaled(fully_connected(2, 8, 8, 6, 3), 2).double()
        yield pytest.param(
            teacher, scaled(fully_connected(2, 6, 3), 2).double(), torch.randn(2, 2).double(), id=f"fc{seed}"
        )
    for seed, kind in enumerate(("plain", "overlapping", "strided", "grouped")):
        teacher, student = (
            scaled(convolutional(seed, kind), 1.5),
            scaled(convolutional(seed + 9, "plain"), 1.5),
        )
        yield pytest.param(teacher, student, torch.randn(2, 2, 7, 6).double(), id=kind)


@pytest.mark.parametrize(("teacher", "student", "x"), list(pairs()))
@pytest.mark.parametrize("eps", [0.03, 0.2, 1.0])
def test_no_point_of_the_ball_lies_above_the_bound(teacher, student, x, eps):
    found = {method: faithfulness_upper_bound(teacher, student, x, eps, method=method) for method in CHEAP}
    assert (found["crown"].values <= found["interval"].values).all()
    for k in range(len(x)):
        reached = attacked(lambda p: gap(teacher, student, p), x[k : k + 1], eps)
        assert reached <= found["crown"].values[k] <= 1


@pytest.mark.parametrize(("teacher", "student", "x"), list(pairs()))
def test_every_box_and_difference_holds(teacher, student, x):
    for network in (teacher, student):
        prepared = net.prepare(network, tuple(x.shape[1:]))
        lower, upper = net.outer_ball(x, 0.3)
        rough, fine = lin.interval(prepared, lower, upper), lin.crown(prepared, lower, upper)[0]
        highest = difference_bounds(network, x, 0.3)
        low, high = softmax_bounds(network, x, 0.3)
        for k in range(len(x)):
            z = inside(x[k : k + 1], 0.3, 3000)
            for place, values in enumerate(prepared.values(z)):
                for boxes in (rough, fine):
                    assert (boxes[place][0][k] <= values.amin(0)).all() and (values.amax(0) <= boxes[place][1][k]).all()
            z = prepared(z)
            assert ((z[:, None, :] - z[:, :, None]).amax(0) <= highest[k] + 1e-12).all()
            assert (low[k] <= z.softmax(1).amin(0)).all() and (z.softmax(1).amax(0) <= high[k]).all()
        room = 1e-12
        for a, b in zip(rough, fine, strict=True):
            assert (a[0] <= b[0] + room).all() and (b[1] <= a[1] + room).all()


def test_each_difference_row_holds_against_an_attack():
    torch.manual_seed(3)
    for network, x in (
        (fully_connected(5, 9, 9, 9, 4), torch.randn(1, 5)),
        (convolutional(2, "overlapping"), None),
    ):
        x = torch.randn(1, 2, 7, 6) if x is None else x
        network = scaled(network.double(), 1.5)
        highest = difference_bounds(network, x, 0.25)[0]
        for i, j in ((0, 1), (1, 0), (2, 1), (0, 2)):
            assert (
                attacked(lambda p, network=network, i=i, j=j: network(p)[:, j] - network(p)[:, i], x.double(), 0.25)
                <= highest[i, j]
            )


def test_several_students_are_bounded_as_each_of_them():
    torch.manual_seed(3)
    guide, *students = (fully_connected(2, width, 3) for width in (8, 6, 5))
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
    with pytest.raises(TypeError, match="nods"):
        faithfulness_upper_bounds(guide, students, x, 0.3, nods=3)


def test_patches_tell_which_way_their_maximum_falls():
    network = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    cut = patches.patches(net.prepare(network, (2, 11, 12)))
    torch.manual_seed(0)
    c = torch.randn(2, 3, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    at_middle, radius = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.rand(2, 50, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: patches.maximum(cut, c, at_middle, radius), c)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 1.5), st.floats(-2, 3))
def test_backward_is_valid_for_any_slopes(seed, eps, level):
    generator = torch.manual_seed(seed)
    network = fully_connected(3, 7, 6, 3).double()
    x = torch.randn(1, 3, generator=generator).double()
    prepared = net.prepare(network, (3,))
    bounds, lines, _ = lin.crown(prepared, *net.outer_ball(x, eps))
    rows, _ = lin.difference_rows(3)
    slopes = {k: level + torch.rand(1, 6, *prepared.shapes[k], dtype=torch.float64) for k in (1, 3)}
    values = lin.backward(prepared, lines, bounds[0], rows[None], slopes=slopes)[0]
    assert ((network(inside(x, eps, 2000)) @ rows.T).amax(0) <= values).all()


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


@pytest.mark.parametrize("kind", ["plain", "overlapping", "strided", "grouped"])
def test_convolutions_and_decided_pools_are_exact(kind):
    """In a tiny ball every ReLU and window is decided: CROWN must give the first-order range."""
    torch.manual_seed(1)
    network, eps = convolutional(5, kind), 1e-6
    x = torch.randn(1, 2, 7, 6).double().requires_grad_()
    z = network(x)[0]
    highest = difference_bounds(network, x, eps)[0]
    for i, j in ((0, 1), (2, 0)):
        slope = torch.autograd.grad(z[j] - z[i], x, retain_graph=True)[0].abs().sum()
        assert highest[i, j].item() == pytest.approx((z[j] - z[i] + eps * slope).item(), abs=1e-10)


def test_planted_disagreement_is_covered():
    """The student is the teacher plus a spike of 40 in a corner of the ball that no sample meets."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    spike = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        spike[0].weight[:4], spike[0].bias[:4] = teacher[0].weight, teacher[0].bias
        spike[0].weight[4], spike[0].bias[4] = 1.0, -5.9
        spike[2].weight[:, :4], spike[2].bias[:] = teacher[2].weight, teacher[2].bias
        spike[2].weight[:, 4] = torch.tensor([200.0, -200.0])
    x = torch.zeros(1, 6).double()
    assert gap(teacher, spike, inside(x, 1.0, 1000).clamp(-0.98, 0.98)).max() < 1e-9
    reached = gap(teacher, spike, torch.ones(1, 6).double()).item()
    assert reached > 0.3
    for method in CHEAP:
        assert faithfulness_upper_bound(teacher, spike, x, 1.0, method=method).values.item() >= reached


def test_eps_zero_is_the_difference_at_the_point():
    torch.manual_seed(0)
    teacher, student, x = fully_connected(4, 9, 9, 5), fully_connected(4, 5, 5), torch.randn(7, 4)
    exact = gap(teacher.double(), student.double(), x.double())
    for method in CHEAP:
        values = faithfulness_upper_bound(teacher, student, x, 0, method=method).values
        assert (values >= exact).all() and torch.allclose(values, exact, atol=1e-6, rtol=0)


def test_bound_grows_with_eps_and_a_batch_is_its_images():
    torch.manual_seed(0)
    teacher, student = scaled(fully_connected(4, 9, 9, 9, 5), 2), scaled(fully_connected(4, 7, 7, 5), 2)
    x = torch.randn(9, 4)
    series = [
        faithfulness_upper_bound(teacher, student, x, eps, method="interval").values for eps in (0, 0.01, 0.1, 0.5)
    ]
    assert all((a <= b).all() for a, b in zip(series, series[1:], strict=False))
    found = faithfulness_upper_bound(teacher, student, x, 0.1)
    for k in range(len(x)):
        one = faithfulness_upper_bound(teacher, student, x[k : k + 1], 0.1).values
        assert one.item() == pytest.approx(found.values[k].item(), abs=1e-9)
    assert found.method == "crown" and found.status == ["certified"] * 9 and found.values.dtype == torch.float64


def test_chunks_of_rows_and_images_change_nothing(monkeypatch):
    teacher, student, x = convolutional(0, "plain"), convolutional(1, "overlapping"), torch.randn(5, 2, 7, 6)
    whole = faithfulness_upper_bound(teacher, student, x, 0.05).values
    monkeypatch.setattr(lin, "BUDGET", 300)
    assert torch.allclose(faithfulness_upper_bound(teacher, student, x, 0.05).values, whole, atol=1e-9, rtol=0)


def test_clip_is_used_and_forgives_float32():
    teacher, student, x = (
        fully_connected(3, 8, 4),
        fully_connected(3, 6, 4),
        torch.tensor([[0.0, 0.5, 1.0000001]]),
    )
    clip = (torch.zeros(3), torch.ones(1))
    free, cut = (faithfulness_upper_bound(teacher, student, x, 0.4, clip=c).values.item() for c in (None, clip))
    points = inside(x.double(), 0.4, 3000, (0.0, 1.0))
    assert gap(teacher.double(), student.double(), points).max() <= cut < free
    assert faithfulness_upper_bound(teacher, student, x, 0.0, clip=clip).values.item() < 1
    lower, upper = net.outer_ball(x.double(), 0.4, clip)
    assert lower[0, 0] == 0 and upper[0, 0] == pytest.approx(0.4) and upper[0, 2] == x[0, 2].double()
    for bad in ((torch.full((3,), 0.2), 1.0), (0.0, math.nan), (torch.zeros(2), 1.0), (0.0,)):
        with pytest.raises(FaithkdError, match="clip"):
            faithfulness_upper_bound(teacher, student, x, 0.4, clip=bad)


def test_ball_ends_outside_every_rounding():
    x = torch.tensor([[0.1, 1e10, -1e-300]], dtype=torch.float64)
    lower, upper = net.outer_ball(x, 0.3)
    assert (lower < x - 0.3).all() and (upper > x + 0.3).all()


def test_slack_covers_cancellation():
    """Huge terms that cancel: float64 loses the answer, the bound must not."""
    network = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1e16, 1.0, -1e16], [0.0, 0.0, 0.0]]))
    x = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    assert difference_bounds(network, x, 0)[0, 1, 0] >= 1 and -difference_bounds(network, x, 0)[0, 0, 1] <= 1


def test_weights_past_float64_give_the_trivial_bound_with_a_status():
    torch.manual_seed(0)
    calm, wild = fully_connected(3, 4, 3), scaled(fully_connected(3, *[6] * 14, 3), 1e30)
    x = torch.randn(2, 3)
    for method in CHEAP:
        found = faithfulness_upper_bound(calm, wild, x, 0.1, method=method)
        assert found.values.tolist() == [1.0, 1.0] and found.status == ["not finite: trivial bound 1"] * 2


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


def test_pair_bound_takes_both_orders():
    sure = torch.tensor([[[0.0, -3.0], [3.0, 0.0]]], dtype=torch.float64)
    even = torch.zeros(1, 2, 2, dtype=torch.float64)
    wanted = 1 / (1 + math.exp(-3.0)) - 0.5
    assert pair_bound(sure, even).item() == pytest.approx(wanted, abs=1e-12) == pair_bound(even, sure).item()
    # one network certain of nothing, the other fixed at 1/2: either order may be the larger one
    open_ended = torch.tensor([[[0.0, 2.0], [9.0, 0.0]]], dtype=torch.float64)
    wanted = max(1 / (1 + math.exp(-9.0)) - 0.5, 0.5 - 1 / (1 + math.exp(2.0)))
    assert pair_bound(open_ended, even).item() == pytest.approx(wanted, abs=1e-12)


def test_empty_batch():
    for method in METHODS:
        found = faithfulness_upper_bound(
            fully_connected(3, 4, 2), fully_connected(3, 2), torch.zeros(0, 3), 0.1, method=method
        )
        assert found.values.shape == (0,) and found.status == []
    assert difference_bounds(fully_connected(3, 2), torch.zeros(0, 3), 0.1).shape == (0, 2, 2)


def test_networks_are_left_alone_and_modules_may_repeat():
    relu = nn.ReLU(inplace=True)
    shared = nn.Sequential(nn.Linear(3, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 3)).train()
    before = [weight.clone() for weight in shared.parameters()]
    plain = nn.Sequential(*(nn.ReLU() if layer is relu else layer for layer in shared))
    x = torch.randn(3, 3)
    assert torch.equal(difference_bounds(shared, x, 0.2), difference_bounds(plain, x, 0.2))
    assert shared.training and all(torch.equal(a, b) for a, b in zip(before, shared.parameters(), strict=True))
    assert shared[0].weight.dtype == torch.float32 and shared[0].weight.requires_grad


def nan_weight():
    network = fully_connected(3, 4, 2)
    network[2].weight.data[0, 0] = math.nan
    return network


def hooked():
    network = fully_connected(3, 4, 2)
    network[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return network


class Doubled(nn.Linear):
    def forward(self, z):
        return 2 * super().forward(z)


LINE, IMAGE = torch.zeros(1, 3), torch.zeros(1, 1, 6, 6)
BAD_NETWORKS = [
    ([nn.Linear(3, 2)], LINE, "torch.nn.Module"),
    (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), LINE, "layer 1: there is no bound for gelu"),
    (nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ELU()), nn.Linear(4, 2)), LINE, "0.1: there is no bound for elu"),
    (nan_weight(), LINE, "layer 2: the weight holds NaN"),
    (fully_connected(4, 4, 2), LINE, "layer 0.*does not fit"),
    (fully_connected(3, 4, 1), LINE, "C >= 2"),
    (fully_connected(36, 2), IMAGE, "Flatten"),
    (nn.Sequential(nn.Conv2d(1, 2, 3)), IMAGE, "logits of shape"),
    (nn.Sequential(nn.Conv2d(1, 2, 9), nn.Flatten(), nn.Linear(2, 2)), IMAGE, "layer 0.*does not fit"),
    (
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten()),
        IMAGE,
        "layer 0: there is no bound for pad",
    ),
    (nn.Sequential(nn.MaxPool2d(4, ceil_mode=True), nn.Flatten()), IMAGE, "ceil_mode"),
    (nn.Sequential(nn.MaxPool2d(2, return_indices=True), nn.Flatten()), IMAGE, "cannot be traced"),
    (nn.Sequential(nn.Flatten(0), nn.Linear(36, 2)), IMAGE, "start_dim"),
    (nn.Sequential(), LINE[:, :1], "C >= 2"),
]


@pytest.mark.parametrize(("network", "x", "message"), BAD_NETWORKS)
def test_networks_that_cannot_be_bounded_are_errors(network, x, message):
    good = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2))
    for pair, who in (((network, good), "teacher"), ((good, network), "student")):
        with pytest.raises(FaithkdError, match=message) as caught:
            faithfulness_upper_bound(*pair, x, 0.1)
        assert who in str(caught.value)


def test_bad_arguments_are_errors():
    good, other = fully_connected(3, 4, 2), fully_connected(3, 4, 5)
    cases = [
        ((good, other, LINE, 0.1), {}, "classes"),
        ((good, good, LINE * math.nan, 0.1), {}, "image 0"),
        ((good, good, LINE[0], 0.1), {}, "batch"),
        ((good, good, [[0.0]], 0.1), {}, "torch.Tensor"),
        ((good, good, LINE, -0.1), {}, "eps"),
        ((good, good, LINE, math.nan), {}, "eps"),
        ((good, good, LINE, math.inf), {}, "eps"),
        ((good, good, LINE, "a"), {}, "eps"),
        ((good, good, LINE, 0.1), {"method": "crwon"}, "did you mean 'crown'"),
        ((good, good, LINE, 0.1), {"solver": "gurobbi"}, "did you mean 'gurobi'"),
        ((good, good, LINE, 0.1), {"max_nodes": 0}, "max_nodes"),
    ]
    for arguments, keywords, message in cases:
        with pytest.raises(FaithkdError, match=message):
            faithfulness_upper_bound(*arguments, **keywords)


def test_solvers_are_not_imported_before_they_are_needed():
    code = "import sys, faithkd.bounds; sys.exit('cvxpy' in sys.modules or 'gurobipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
