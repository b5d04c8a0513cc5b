"""The laws of every operator: boxes and lines hold, rows and values are transposes, and all rounding goes outwards.

A new kind of layer is one line of OPERATORS.
"""

import math
from fractions import Fraction

import pytest
import torch

from faithkd.bounds import layers, linear, operators

torch.manual_seed(0)


def weights(*shape):
    return torch.randn(*shape, dtype=torch.float64)


IMAGE = (2, 4, 5)
OPERATORS = {
    "linear": (operators.Linear(weights(3, 5), weights(3)), (5,)),
    "no bias": (operators.Linear(weights(3, 5)), (5,)),
    "conv": (operators.Conv2d(weights(3, 2, 2, 3), weights(3)), IMAGE),
    "padded": (operators.Conv2d(weights(3, 2, 3, 3), weights(3), padding="same", dilation=2), IMAGE),
    "strided": (operators.Conv2d(weights(4, 1, 3, 2), weights(4), (2, 1), (1, 0), 1, 2), IMAGE),
    "mean": (layers.AvgPool2d(2), IMAGE),
    "padded mean": (layers.AvgPool2d((2, 2), 2, 1, True, False), IMAGE),
    "scale": (layers.Scale(weights(2, 1, 1), weights(2, 1, 1)), IMAGE),
    "view": (operators.View((40,)), IMAGE),
    "sum": (layers.Add(), IMAGE, IMAGE),
    "relu": (operators.ReLU(), IMAGE),
    "tanh": (layers.SShaped("tanh"), IMAGE),
    "sigmoid": (layers.SShaped("sigmoid"), IMAGE),
    "max": (operators.MaxPool2d(2), IMAGE),
    "padded max": (operators.MaxPool2d(3, 1, 1), IMAGE),
    "dilated max": (operators.MaxPool2d((1, 2), dilation=(1, 2)), IMAGE),
}
every = pytest.mark.parametrize("name", OPERATORS)


def boxes_of(name, count=12, width=1.0):
    """Random boxes of each input; of the first half all numbers have one sign, so that much is settled."""
    _, *shapes = OPERATORS[name]
    boxes = []
    for shape in shapes:
        lower, upper = (weights(2, count, *shape) * width).sort(0).values
        lower[: count // 4], upper[: count // 4] = lower[: count // 4].abs(), lower[: count // 4].abs() + width
        lower[count // 4 : count // 2] = -upper[count // 4 : count // 2].abs() - width
        upper[count // 4 : count // 2] = -upper[count // 4 : count // 2].abs()
        boxes.append((lower, upper))
    return boxes


def points_of(boxes):
    """Both ends, the middle, corners and random points."""
    for share in (0.0, 1.0, 0.5, *range(6)):
        mixed = [torch.rand_like(low) if isinstance(share, int) else torch.full_like(low, share) for low, _ in boxes]
        mixed = [part.round() if share in (1, 2, 3) and isinstance(share, int) else part for part in mixed]
        yield [low + part * (high - low) for part, (low, high) in zip(mixed, boxes, strict=True)]


def rows_at(rows, lines, slopes, operator, shapes, z):
    """Rows on the output at z by way of their transpose: `(N, R)`, exact in float64 up to rounding."""
    parts, constant = operator.transpose(rows, lines, slopes, *shapes)
    return sum(operators.dot(part, here.unsqueeze(1)) for part, here in zip(parts, z, strict=True)) + constant


@every
def test_boxes_and_lines_hold(name):
    operator, *shapes = OPERATORS[name]
    boxes = boxes_of(name)
    low, high = operator.interval(*boxes)
    lines = operator.relax(*boxes)
    rows = weights(len(low), 7, *low.shape[1:])
    chosen = [None]
    if lines.free is not None:  # any slopes are valid, those outside of [0, 1] are not used
        chosen.append(torch.rand(len(low), 7, *lines.below.shape[2:], dtype=torch.float64) * 1.6 - 0.3)
    for z in points_of(boxes):
        y = operator(*z)
        assert (low <= y + 1e-12).all() and (y <= high + 1e-12).all()
        for slopes in chosen:
            assert (
                operators.dot(rows, y.unsqueeze(1)) <= rows_at(rows, lines, slopes, operator, shapes, z) + 1e-11
            ).all()
    ends = torch.stack([operator(*z) for z in points_of(boxes)])
    if not isinstance(operator, operators.Linear | operators.Conv2d | layers.AvgPool2d):
        assert torch.allclose(low, ends.amin(0), atol=1e-9) and torch.allclose(high, ends.amax(0), atol=1e-9)


@every
def test_transposes(name):
    """<A^T r, z> = <r, A z> where an operator is linear or settled, and never less where it is not."""
    operator, *shapes = OPERATORS[name]
    boxes = [(low, low) for low, _ in boxes_of(name)]  # in a point all is settled
    lines, z = operator.relax(*boxes), [low for low, _ in boxes]
    y = operator(*z)
    rows = weights(len(y), 7, *y.shape[1:])
    expected = operators.dot(rows, y.unsqueeze(1))
    torch.testing.assert_close(rows_at(rows, lines, None, operator, shapes, z), expected, rtol=0, atol=1e-9)
    rough = operator.rough(), lines.rough()
    found = rows_at(rows.float(), rough[1], None, rough[0], shapes, [part.float() for part in z])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    if operator.linear:
        assert operator.relax(*boxes_of(name)).below is None
        moved = [part + weights(*part.shape) for part in z]
        found = rows_at(rows, operator.relax(*((part, part) for part in moved)), None, operator, shapes, moved)
        expected = operators.dot(rows, operator(*moved).unsqueeze(1))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def exact_value(operator, z):
    """What an operator makes of one image in exact terms, as a list of fractions; `z`: lists of floats."""
    if isinstance(operator, layers.Add):
        return [Fraction(a) + Fraction(b) for a, b in zip(*(part.flatten().tolist() for part in z), strict=True)]
    (z,) = z
    if operator.linear and not isinstance(operator, operators.View):
        unit = torch.eye(z.numel(), dtype=torch.float64).view(-1, *z.shape)
        matrix = operator.product(unit, operator.weight, None).flatten(1).T
        shift = operator(torch.zeros_like(z)[None]).flatten().tolist()
        # the coefficients of a mean are ratios of small numbers, all others are the weights as they are
        near = isinstance(operator, layers.AvgPool2d)
        rows = [[Fraction(a).limit_denominator(99) if near else Fraction(a) for a in row] for row in matrix.tolist()]
        return [exact_dot(z, row) + Fraction(c) for row, c in zip(rows, shift, strict=True)]
    return [Fraction(part) for part in operator(z[None]).flatten().tolist()]  # max and views are exact in floats


def exact_dot(row, values):
    return sum(Fraction(a) * b for a, b in zip(row.flatten().tolist(), values, strict=True))


@every
@pytest.mark.parametrize("size", [1.0, 1e8])
def test_rounding_goes_outwards(name, size):
    """In rational numbers, in a box of one point, where nothing but rounding is left: numbers of all sizes cancel."""
    operator, *shapes = OPERATORS[name]
    if isinstance(operator, layers.SShaped):
        pytest.skip("no rational values: see test_s_shaped_in_many_digits")
    for seed in range(4):
        torch.manual_seed(seed)
        z = [weights(1, *shape) * torch.tensor([1.0, size]).double()[torch.randint(2, shape)] for shape in shapes]
        boxes = [(part, part) for part in z]
        exact = exact_value(operator, [part[0] for part in z])
        low, high = (end.flatten().tolist() for end in operator.interval(*boxes))
        for floor, value, ceiling in zip(low, exact, high, strict=True):
            assert Fraction(floor) <= value <= Fraction(ceiling)
        y = operator(*z)
        row = weights(1, 1, *y.shape[1:]) * size
        parts, constant = operator.transpose(row, operator.relax(*boxes), None, *shapes)
        total = Fraction(float(constant)) if isinstance(constant, float) else Fraction(constant.item())
        for part, here in zip(parts, z, strict=True):
            total += exact_dot(part, [Fraction(b) for b in here.flatten().tolist()])
        assert exact_dot(row, exact) <= total


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_s_shaped_in_many_digits(name):
    """Boxes and lines of tanh and sigmoid hold in 40 digits, in wide, narrow and one-sided boxes."""
    mpmath = pytest.importorskip("mpmath")
    operator = layers.SShaped(name)
    ends = weights(2, 1, 60).mul(torch.tensor([0.001, 1.0, 30.0]).double().repeat(20)).sort(0).values
    ends[:, :, :6] = ends[:1, :, :6]
    (low, high), line = operator.interval(ends.unbind(0)), operator.relax(ends.unbind(0))
    floor, ceiling = (line.low - line.noise)[0, 0], line.high[0, 0]
    with mpmath.workdps(40):
        for n in range(60):
            for share in (0, 0.25, 0.5, 0.75, 1):
                z = mpmath.mpf(ends[0, 0, n].item()) + share * (mpmath.mpf(ends[1, 0, n].item()) - ends[0, 0, n].item())
                y = mpmath.tanh(z) if name == "tanh" else 1 / (1 + mpmath.exp(-z))
                assert low[0, n].item() <= y <= high[0, n].item()
                assert line.below[0, 0, n].item() * z + floor[n].item() <= y
                assert y <= line.above[0, 0, n].item() * z + ceiling[n].item()
    wide = (ends[1] - ends[0])[0] > 1e-3
    assert ((line.above[0, 0] * ends[1, 0] + ceiling)[wide] <= high[0, wide] + 1).all()


def test_relus_upper_line_goes_through_both_ends():
    """No other line is as tight; units that are settled are exact."""
    lower, upper = weights(2, 40, 6).sort(0).values
    line = operators.ReLU().relax((lower, upper))
    for end in (lower, upper):
        assert (line.above[:, 0] * end + line.high[:, 0] <= end.relu() + 1e-11).all()
    assert torch.equal(line.free[:, 0], (lower < 0) & (upper > 0))


@pytest.mark.parametrize("name", [name for name in OPERATORS if "max" in name])
def test_pools_are_as_tight_as_the_paper(name):
    """Rows on single outputs are never looser than the paper's interval rule for max-pooling (§4.2)."""
    pool, shape = OPERATORS[name]
    (lower, upper) = boxes_of(name)[0]
    places = pool(upper).shape[1:]
    unit = torch.eye(math.prod(places), dtype=torch.float64).unflatten(1, places)
    rows = torch.cat([unit, -unit]).expand(len(lower), *[-1] * 4)
    (form,), constant = pool.transpose(rows, pool.relax((lower, upper)), None, shape)
    up, down = linear.over_ball(form, constant, lower, upper).chunk(2, 1)
    assert (up <= pool(upper).flatten(1) + 1e-11).all() and (down <= -pool(lower).flatten(1) + 1e-11).all()
