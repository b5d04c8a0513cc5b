"""The laws of every operator: boxes and lines hold, rows and values are transposes, and all rounding goes outwards.

A new kind of layer is one line of OPERATORS.
"""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from faithkd.bounds import layers, linear, operators

torch.manual_seed(0)


def weights(*shape):
    return torch.randn(*shape, dtype=torch.float64)


IMAGE = (2, 4, 5)
CURVES = {  # each with its truth in as many digits as one likes
    "tanh": (layers.CURVES["tanh"](), lambda m, z: m.tanh(z)),
    "sigmoid": (layers.CURVES["sigmoid"](), lambda m, z: 1 / (1 + m.exp(-z))),
    "softplus": (layers.CURVES["softplus"](), lambda m, z: m.log(1 + m.exp(z))),
    "steep softplus": (layers.CURVES["softplus"](3.0, 5.0), lambda m, z: m.log(1 + m.exp(3 * z)) / 3),
    "silu": (layers.CURVES["silu"](), lambda m, z: z / (1 + m.exp(-z))),
    "mish": (layers.CURVES["mish"](), lambda m, z: z * m.tanh(m.log(1 + m.exp(z)))),
    "gelu": (layers.CURVES["gelu"](), lambda m, z: z * m.erfc(-z / m.sqrt(2)) / 2),
    "gelu by tanh": (
        layers.CURVES["gelu"]("tanh"),
        lambda m, z: z / 2 * (1 + m.tanh(m.mpf((2 / torch.pi) ** 0.5) * (z + m.mpf(0.044715) * z**3))),
    ),
    "hardswish": (layers.CURVES["hardswish"](), lambda m, z: z * min(max(z + 3, 0), 6) / 6),
    "log of sigmoid": (layers.CURVES["log_sigmoid_forward"](), lambda m, z: -m.log(1 + m.exp(-z))),
    "elu": (layers.CURVES["elu"](), lambda m, z: z if z > 0 else m.expm1(z)),
    "selu": (layers.CURVES["elu"](1.7, 1.05), lambda m, z: m.mpf(1.05) * (z if z > 0 else m.mpf(1.7) * m.expm1(z))),
    "celu": (layers.CURVES["celu"](2.0), lambda m, z: z if z > 0 else 2 * m.expm1(z / 2)),
}
OPERATORS = {
    "linear": (operators.Linear(weights(3, 5), weights(3)), (5,)),
    "no bias": (operators.Linear(weights(3, 5)), (5,)),
    "conv": (operators.Conv2d(weights(3, 2, 2, 3), weights(3)), IMAGE),
    "padded": (operators.Conv2d(weights(3, 2, 3, 3), weights(3), padding="same", dilation=2), IMAGE),
    "strided": (operators.Conv2d(weights(4, 1, 3, 2), weights(4), (2, 1), (1, 0), 1, 2), IMAGE),
    "transposed": (layers.ConvTranspose2d(weights(2, 3, 2, 3), weights(3)), IMAGE),
    "transposed in groups": (layers.ConvTranspose2d(weights(2, 2, 3, 2), None, (2, 3), 1, (1, 2), 2, (3, 1)), IMAGE),
    "mean": (layers.AvgPool2d(2), IMAGE),
    "padded mean": (layers.AvgPool2d((2, 2), 2, 1, True, False), IMAGE),
    "scale": (layers.Scale(weights(2, 1, 1), weights(2, 1, 1)), IMAGE),
    "adaptive mean": (layers.Sums(partial(F.adaptive_avg_pool2d, output_size=3), 4), IMAGE),
    "sum": (layers.Sums(partial(torch.sum, dim=[1, 3], keepdim=True), 10), IMAGE),
    "linear in the last dimension": (operators.Linear(weights(3, 5), weights(3)), IMAGE),
    "view": (operators.View((40,)), IMAGE),
    "moved": (layers.Pick(torch.randperm(40).view(5, 8)), IMAGE),
    "cut and padded": (layers.Pick(torch.tensor([[-1, 3, 7, 39], [0, -1, 12, 1]])), IMAGE),
    "repeated": (layers.Pick(torch.randint(-1, 40, (3, 30))), IMAGE),
    "two branches": (layers.Add(), IMAGE, IMAGE),
    "relu": (operators.ReLU(), IMAGE),
    "max": (operators.MaxPool2d(2), IMAGE),
    "padded max": (operators.MaxPool2d(3, 1, 1), IMAGE),
    "dilated max": (operators.MaxPool2d((1, 2), dilation=(1, 2)), IMAGE),
    "ceiled max": (operators.MaxPool2d((2, 3), (3, 2), (1, 1), ceil_mode=True), IMAGE),
    "adaptive max": (layers.AdaptiveMaxPool2d((3, 3)), IMAGE),
    "ceiled dilated max": (operators.MaxPool2d(2, 3, 0, 2, True), IMAGE),
    **{name: (curve, IMAGE) for name, (curve, _) in CURVES.items()},
}
MIXED = operators.Linear | operators.Conv2d | layers.ConvTranspose2d | layers.AvgPool2d | layers.Sums | layers.Smooth
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
    lines = operator.freed(operator.relax(*boxes), *boxes)
    rows = weights(len(low), 7, *low.shape[1:])
    chosen = [None]
    if lines.free is not None:  # any choice is valid, those outside of [0, 1] are not used
        chosen.append(torch.rand(len(low), 7, *lines.start.shape[2:], dtype=torch.float64) * 1.6 - 0.3)
    for z in points_of(boxes):
        y = operator(*z)
        assert (low <= y + 1e-12).all() and (y <= high + 1e-12).all()
        for slopes in chosen:
            assert (
                operators.dot(rows, y.unsqueeze(1)) <= rows_at(rows, lines, slopes, operator, shapes, z) + 1e-11
            ).all()
    ends = torch.stack([operator(*z) for z in points_of(boxes)])
    if not isinstance(operator, MIXED):
        assert torch.allclose(low, ends.amin(0), atol=1e-9) and torch.allclose(high, ends.amax(0), atol=1e-9)


@every
def test_transposes(name):
    """<A^T r, z> = <r, A z> where an operator is linear or settled, and never less where it is not."""
    operator, *shapes = OPERATORS[name]
    boxes = [(low, low) for low, _ in boxes_of(name)]  # in a point all is settled
    lines, z = operator.relax(*boxes), [low for low, _ in boxes]
    y = operator(*z)
    rows = weights(len(y), 7, *y.shape[1:])
    expected, room = operators.dot(rows, y.unsqueeze(1)), 1e-9 + 500 * getattr(operator, "off", 0.0)
    torch.testing.assert_close(rows_at(rows, lines, None, operator, shapes, z), expected, rtol=0, atol=room)
    rough = operator.to(torch.float32), lines.rough()
    found = rows_at(rows.float(), rough[1], None, rough[0], shapes, [part.float() for part in z])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3 + room)
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
    if operator.linear and not isinstance(operator, operators.View | layers.Pick):
        unit = torch.eye(z.numel(), dtype=torch.float64).view(-1, *z.shape)
        matrix = operator.product(unit, operator.weight, None).flatten(1).T
        shift = operator(torch.zeros_like(z)[None]).flatten().tolist()
        # the coefficients of a mean are ratios of small numbers, all others are the weights as they are
        near = isinstance(operator, layers.AvgPool2d | layers.Sums)
        rows = [[Fraction(a).limit_denominator(99) if near else Fraction(a) for a in row] for row in matrix.tolist()]
        return [exact_dot(z, row) + Fraction(c) for row, c in zip(rows, shift, strict=True)]
    return [Fraction(part) for part in operator(z[None]).flatten().tolist()]  # max and moves are exact in floats


def exact_dot(row, values):
    return sum(Fraction(a) * b for a, b in zip(row.flatten().tolist(), values, strict=True))


@every
@pytest.mark.parametrize("size", [1.0, 1e8])
def test_rounding_goes_outwards(name, size):
    """In rational numbers, in a box of one point, where nothing but rounding is left: numbers of all sizes cancel."""
    operator, *shapes = OPERATORS[name]
    if isinstance(operator, layers.Smooth):
        pytest.skip("no rational values: see test_curves_in_many_digits")
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


def ends_of_many_sizes(count):
    """Boxes `(count,)` twice: narrow, wide, far from 0, of one sign and of both, and points."""
    width = torch.tensor([1e-9, 0.001, 1.0, 5.0, 40.0, 1e3]).double().repeat(count // 6)
    low, high = (weights(2, count) * width + weights(count) * 3).sort(0).values
    return low, torch.where(torch.arange(count) < 6, low, high)


@pytest.mark.parametrize("name", CURVES)
def test_curves_in_many_digits(name):
    """Boxes and lines of curves hold in 40 digits; at both ends, inside, and at their own lowest point."""
    mpmath = pytest.importorskip("mpmath")
    operator, truth = CURVES[name]
    ends = ends_of_many_sizes(120)
    box = tuple(end.view(1, -1) for end in ends)
    (low, high), line = operator.interval(box), operator.freed(operator.relax(box), box)
    one = [(line.below, line.low - line.noise, line.above, line.high)]
    below, above = line.many[0].unbind(0)
    many = [*one, *zip(*below.unbind(0), *above.unbind(0), strict=True)]
    many = [[part.flatten().tolist() for part in parts] for parts in many]
    low, high = (end[0].tolist() for end in (low, high))
    with mpmath.workdps(40):
        for n, (first, last) in enumerate(zip(*(end.tolist() for end in ends), strict=True)):
            inside = [mpmath.mpf(first) + share * (mpmath.mpf(last) - first) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
            inside += [z for z in (-1.2785, -0.7518, 0.0, *operator.turns) if first <= z <= last]
            for z in map(mpmath.mpf, inside):
                y = truth(mpmath, z)
                assert low[n] <= y <= high[n]
                for below, floor, above, ceiling in many:
                    assert below[n] * z + floor[n] <= y <= above[n] * z + ceiling[n]


@pytest.mark.parametrize("name", CURVES)
def test_what_lies_between_two_lines_of_a_curve_holds(name):
    """On single numbers, where no other one hides it."""
    operator, _ = CURVES[name]
    box = tuple(end.view(1, -1) for end in ends_of_many_sizes(60))
    lines, shape = operator.freed(operator.relax(box), box), box[0].shape[1:]
    unit = torch.eye(*shape, dtype=torch.float64)
    rows = torch.cat([unit, -unit])[None]
    for share in torch.linspace(0, 1, 21).double():
        z = box[0] + share * (box[1] - box[0])
        y = operator(z)
        for choice in torch.linspace(0, 1, 20).double():
            found = rows_at(rows, lines, choice.expand(rows.shape), operator, [shape], [z])
            assert (operators.dot(rows, y.unsqueeze(1)) <= found + 1e-13 * (1 + y.abs().amax())).all()


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_as_tight_as_can_be(name):
    """Boxes end where the curve does; over the middle no line can be lower than the hull of the curve."""
    operator, _ = CURVES[name]
    low, high = ends = ends_of_many_sizes(600)
    few = (high - low < 20) & (high > low + 1e-3)
    low, high = ends = low[few], high[few]
    z = low + (high - low) * torch.linspace(0, 1, 201).double().unsqueeze(1)
    y, half = operator(z), 100
    room = 2e-5 * (high - low) ** 2 + 1e-8 + operator.off
    for found, sampled in zip(operator.interval(ends), (y.amin(0), y.amax(0)), strict=True):
        assert ((found - sampled).abs() <= room).all()
    line = operator.relax(ends)
    far = torch.arange(1, half + 1).double()  # steps from the middle
    left, right = far.flip(0).view(-1, 1, 1), far.view(1, -1, 1)
    hull = (y[:half].unsqueeze(1) * right + y[half + 1 :].unsqueeze(0) * left) / (left + right)
    for found, best in (
        (line.above[:, 0] * z[half] + line.high[:, 0], torch.maximum(hull.amax((0, 1)), y[half])),
        (line.below[:, 0] * z[half] + line.low[:, 0], torch.minimum(hull.amin((0, 1)), y[half])),
    ):
        assert ((found - best).abs() <= 0.005 * (high - low) + room).all()


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
