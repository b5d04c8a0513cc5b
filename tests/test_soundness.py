"""The bounds past the paper are never below what can be reached, found by grids, attacks, enumeration or by design."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import KINDS, attacked, case, convolutional, fully_connected, gap, points
from torch import nn

from faithkd.bounds import certified_agreement, faithfulness_upper_bound, graph, methods
from faithkd.errors import FaithkdError

CHEAP = ("interval", "crown")
BEYOND = ("alpha-crown", "rows", "joint", "bab", "best")


def bound(teacher, student, x, eps, method, nodes=12, **keywords):
    """`faithfulness_upper_bound` with so few nodes that it is quick."""
    return faithfulness_upper_bound(teacher, student, x, eps, method=method, nodes=nodes, **keywords)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10**6),
    st.one_of(st.none(), st.tuples(*[st.lists(st.integers(1, 7), max_size=3)] * 2)),
    st.sampled_from([0.05, 0.3, 1.0]),
    st.sampled_from([0.5, 2.0, 4.0]),
)
def test_nothing_reached_lies_above_a_bound_of_random_pairs(seed, widths, eps, factor):
    """Fully connected pairs of any depth, and convolutional ones: every bound is ordered and above an attack."""
    if widths is None:
        (teacher, student), x = convolutional(seed, factor), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    else:
        teacher, student = (fully_connected(3, *hidden, 3, seed=seed, factor=factor) for hidden in widths)
        x = torch.randn(1, 3, dtype=torch.float64)
    reached = attacked(lambda z: gap(teacher, student, z), x, eps)
    found = {method: bound(teacher, student, x, eps, method) for method in ("alpha-crown", "joint", "bab")}
    assert found["bab"].values <= found["joint"].values <= found["alpha-crown"].values <= 1
    assert max(reached, found["bab"].lower.item()) <= found["bab"].values.item()
    assert not (certified_agreement(teacher, student, x, eps).item() and disagree(teacher, student, x, eps))


def disagree(teacher, student, x, eps):
    """Whether different classes are found in the ball."""
    z = points(x, eps, 2000)
    return bool((teacher(z).argmax(1) != student(z).argmax(1)).any())


def breakpoints(net, low, high):
    """Ends of all intervals on which a network of one input is linear."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    for k, layer in enumerate(net):
        if isinstance(layer, nn.ReLU):
            z = net[:k](ends[:, None])
            left, right, cross = ends[:-1, None], ends[1:, None], z[:-1] * z[1:] < 0
            zero = left + (right - left) * z[:-1] / (z[:-1] - z[1:])
            ends = torch.cat([ends, zero[cross]]).sort().values
    return ends


@pytest.mark.parametrize("seed", range(3))
def test_one_input_enumerated(seed):
    """Between neighbouring breakpoints both networks are linear: their largest difference is known to 1e-4."""
    pair = fully_connected(1, 5, 4, 3, seed=seed), fully_connected(1, 4, 3, seed=seed + 9)
    ends = torch.cat([breakpoints(net, -1.5, 1.5) for net in pair]).sort().values
    share = torch.linspace(0, 1, 301, dtype=torch.float64)
    truth = gap(*pair, (ends[:-1, None] + share * ends.diff()[:, None]).view(-1, 1)).max().item()
    x = torch.zeros(1, 1, dtype=torch.float64)
    for method in BEYOND:
        found = bound(*pair, x, 1.5, method, nodes=1000, tolerance=1e-3)
        assert truth <= found.values.item()
        if method in ("bab", "best"):
            assert found.status == ["certified"] and found.lower <= truth + 1e-4
            assert found.values <= found.lower + 1e-3


def with_bump(net, at, width, height):
    """The network plus a triangle of `height` on class 0, where the mean of the inputs is within `width` of `at`."""
    inputs, hidden, classes = net[0].in_features, net[0].out_features, net[2].out_features
    grown = nn.Sequential(nn.Linear(inputs, hidden + 3), nn.ReLU(), nn.Linear(hidden + 3, classes)).double()
    with torch.no_grad():
        grown[0].weight[:hidden], grown[0].bias[:hidden] = net[0].weight, net[0].bias
        grown[0].weight[hidden:] = 1 / (width * inputs)
        grown[0].bias[hidden:] = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64) - at / width
        grown[2].weight[:, :hidden], grown[2].bias[:] = net[2].weight, net[2].bias
        grown[2].weight[:, hidden:] = 0
        grown[2].weight[0, hidden:] = height * torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    return grown


def test_a_planted_bump_that_the_attack_misses():
    """So narrow that no gradient leads there: the attack sees equal networks, the certificate must not."""
    teacher = fully_connected(4, 5, 3)
    x, eps, at = torch.zeros(1, 4, dtype=torch.float64), 0.5, 0.3137
    student = with_bump(teacher, at, 1e-5, -12.0)
    reached = gap(teacher, student, torch.full((1, 4), at, dtype=torch.float64)).item()
    assert reached > 0.3 and disagree(teacher, student, x + at, 1e-7)
    for method in BEYOND:
        found = bound(teacher, student, x, eps, method, nodes=40)
        assert found.values >= reached
    pair = graph.prepare_pair(teacher, student, x)
    assert methods.attained(pair, methods.Balls.around(x, eps, None), methods.Choices("best"))[0] < 1e-6
    assert not certified_agreement(teacher, student, x, eps)


@pytest.mark.parametrize("kind", KINDS)
def test_best_is_a_bracket(kind):
    teacher, student, x, eps = case(kind)
    before = bound(teacher, student, x, eps, "bab")
    for radius in (0.0, eps):
        found = bound(teacher, student, x, radius, "best")
        exact = gap(teacher, student, x)
        assert (found.lower <= found.values).all() and (found.lower >= exact - 1e-12).all()
        assert (gap(teacher, student, found.witnesses) - found.lower).abs().max() < 1e-12
        if not radius:
            assert (found.values - exact).abs().max() < 1e-6
    for n in range(len(x)):
        reached = attacked(lambda z: gap(teacher, student, z), x[n : n + 1], eps)
        assert reached <= found.values[n] and found.lower[n] >= reached - 0.02
    assert (found.values <= faithfulness_upper_bound(teacher, student, x, eps, method="joint").values).all()
    assert before.lower.shape == found.lower.shape and found.step[0] in methods.LADDER["best"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_methods_on_the_way_say_what_they_say_alone(kind):
    teacher, student, x, eps = case(kind)
    found = bound(teacher, student, x, eps, "best", agreement=True)
    *below, last = methods.LADDER["best"]
    assert list(found.rungs) == [*below, last] and torch.equal(found.rungs[last], found.values)
    for method in set(below) - {"rows"}:
        assert torch.equal(found.rungs[method], bound(teacher, student, x, eps, method).values)


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_comes_with_a_bound(kind):
    teacher, student, x, _ = case(kind)
    for eps in (0.0, 0.01, 0.1, 0.4):
        alone = certified_agreement(teacher, student, x, eps)
        for method in BEYOND:
            found = bound(teacher, student, x, eps, method, agreement=True)
            met = x if found.witnesses is None else found.witnesses
            alike = teacher.double()(met).argmax(1) == student.double()(met).argmax(1)
            assert torch.equal(found.agrees, alone) and not (found.agrees & ~alike).any()
    assert bound(teacher, student, x, 0.1, "joint").agrees is None
    with pytest.raises(FaithkdError, match="alpha-crown, lp, milp, rows, joint, bab, best, not crown"):
        bound(teacher, student, x, 0.1, "crown", agreement=True)


@pytest.mark.parametrize("method", (*CHEAP, *BEYOND))
def test_bounds_grow_with_the_ball(method):
    teacher, student, x, _ = case("fully connected", 3)
    series = [bound(teacher, student, x, eps, method, nodes=30).values for eps in (0, 0.05, 0.2, 0.6, 2.0)]
    assert all((a <= b).all() for a, b in itertools.pairwise(series))


# Slopes are looked for in float32, where a sum depends on the size of the batch on some processors: its last digits
# are other ones then, and a search may split another unit.
ALIKE = {"crown": 1e-9, "alpha-crown": 1e-6, "joint": 1e-6, "bab": 3e-3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ALIKE)
def test_a_batch_is_its_images(kind, method):
    teacher, student, x, eps = case(kind, 1)
    x = torch.cat([x, x + 0.3, x.flip(0) - 1])
    found = bound(teacher, student, x, eps / 2, method)
    for n in range(len(x)):
        one = bound(teacher, student, x[n : n + 1], eps / 2, method)
        assert one.values.item() == pytest.approx(found.values[n].item(), abs=ALIKE[method])
        assert one.status == found.status[n : n + 1]
        if method == "bab":
            assert one.lower.item() == pytest.approx(found.lower[n].item(), abs=ALIKE[method])
    claims = certified_agreement(teacher, student, x, eps / 4)
    assert claims.tolist() == [certified_agreement(teacher, student, one[None], eps / 4).item() for one in x]


def test_processes_change_at_most_what_batches_do():
    teacher, student, x, eps = case("fully connected", 2)
    clip = (x.clone() - 0.3, torch.full((1,), 9.0))
    alone, apart_ = (bound(teacher, student, x, eps, "best", nodes=8, jobs=jobs, clip=clip) for jobs in (1, 2))
    for name in ("values", "lower"):
        assert torch.allclose(getattr(alone, name), getattr(apart_, name), atol=ALIKE["bab"], rtol=0)
    assert alone.status == apart_.status and alone.nodes.tolist() == apart_.nodes.tolist()


@pytest.mark.parametrize("method", (*CHEAP, *BEYOND))
def test_clip_cuts_the_ball(method):
    teacher, student = fully_connected(2, 6, 4, 3), fully_connected(2, 4, 3, seed=1)
    x, clip = torch.tensor([[0.0, 1.0 + 1e-7], [0.9, 0.5]], dtype=torch.float64), (torch.zeros(1), torch.ones(2))
    free, cut = (bound(teacher, student, x, 0.8, method, clip=choice) for choice in (None, clip))
    for n in range(2):
        valid = gap(teacher, student, points(x[n : n + 1], 0.8).clamp(0, 1)).max()
        assert valid <= cut.values[n] and cut.values[n] < free.values[n]
    if cut.lower is not None:
        assert (cut.witnesses >= 0).all() and (cut.witnesses <= 1 + 1e-7).all()
    claims = certified_agreement(teacher, student, x, 0.2, clip=clip)
    assert (claims | ~certified_agreement(teacher, student, x, 0.2)).all()


@pytest.mark.parametrize("method", BEYOND)
def test_weights_that_are_no_numbers_or_too_large(method):
    good, bad, wild = fully_connected(2, 4, 3), fully_connected(2, 4, 3), fully_connected(2, *[9] * 12, 3, factor=1e30)
    x = torch.randn(2, 2)
    for value in (math.nan, math.inf):
        bad[2].weight.data[0, 0] = value
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(FaithkdError, match="layer 2: the weight holds NaN or infinity"):
                bound(*pair, x, 0.1, method)
            with pytest.raises(FaithkdError, match="layer 2: the weight holds NaN or infinity"):
                certified_agreement(*pair, x, 0.1)
    found = bound(good, wild, x, 0.1, method)
    assert found.values.tolist() == [1, 1] and found.status == [methods.NOT_FINITE] * 2
    assert found.lower is None or (found.lower >= 0).all() and (found.lower <= 1).all()
    assert not certified_agreement(good, wild, x, 0.1).any()
    for factor in (1e3, 1e6, 1e12):  # steps rather than slopes, but numbers still
        steep = fully_connected(2, 5, 4, 3, factor=factor)
        found = bound(good, steep, x, 0.3, method)
        for n in range(2):
            assert gap(good, steep, points(x[n : n + 1], 0.3)).max() <= found.values[n] <= 1


def test_no_time_at_all_still_gives_a_bound():
    teacher, student, x, eps = case("fully connected")
    found = faithfulness_upper_bound(teacher, student, x, eps, method="bab", budget=0.0)
    first = faithfulness_upper_bound(teacher, student, x, eps, method="joint")
    assert torch.equal(found.values, first.values) and found.nodes.tolist() == [0, 0]
    assert found.status == ["stopped at 0 nodes"] * 2


def test_identical_networks_differ_by_nothing():
    """The joint rows see that both are one network as far as their relaxations go; every method sees it at eps 0."""
    net, x = fully_connected(2, 5, 3), torch.randn(3, 2)
    assert (bound(net, net, x, 0.0, "joint").values < 1e-6).all()
    small = bound(net, net, x, 0.01, "joint").values
    assert (small < 0.2 * bound(net, net, x, 0.01, "alpha-crown").values + 1e-9).all()
    sure = (net(x.double()).topk(2).values.diff(dim=1).abs() > 1.0)[:, 0]
    assert certified_agreement(net, net, x, 0.01)[sure].all()
