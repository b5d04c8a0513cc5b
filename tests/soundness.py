"""What every bound must satisfy, as checks that take the package `faithkd.bounds`, or a copy of it with a mistake.

`test_soundness` runs them on the package, `test_mutations` on copies: each planted mistake must fail one of them.
Truth comes from points only: grids, corners and random points run through the networks by torch itself, or from
rational numbers.
"""

import copy
import itertools
import math
from fractions import Fraction

import torch
from torch import nn

ROOM = 1e-11  # what evaluating a network at a point in float64 may be off by


def fully_connected(*widths, seed=0, factor=2.0):
    """Linear layers with ReLU between, all weights and biases times `factor`."""
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return scaled(nn.Sequential(*layers[:-1]), factor)


def scaled(network, factor):
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(factor)
    return network.double()


def convolutional(seed=0, factor=1.5):
    """A deep teacher and a flatter student for images of 1 x 4 x 4, max-pooling of two kinds, three classes."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(
        *(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2, stride=1), nn.Conv2d(2, 3, 2, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2, stride=1, padding=1), nn.Flatten(), nn.Linear(48, 3)),
    )
    student = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return scaled(teacher, factor), scaled(student, factor)


def case(kind, seed=0):
    """Teacher, student, two images and a radius at which the bounds are neither exact nor trivial."""
    if kind == "convolutional":
        pair = convolutional(seed)
        return *pair, torch.randn(2, 1, 4, 4, dtype=torch.float64), 0.2
    pair = fully_connected(2, 6, 5, 3, seed=seed), fully_connected(2, 5, 3, seed=seed + 50)
    return *pair, torch.randn(2, 2, dtype=torch.float64), 0.6


KINDS = ("fully connected", "convolutional")


def gap(teacher, student, x):
    """||f_t(x) - f_s(x)||_inf, eq. (8)."""
    return (teacher(x).softmax(1) - student(x).softmax(1)).abs().amax(1)


def points(x, eps, count=400):
    """Points of the ball around one image: a grid up to two inputs, else corners, random points and the middle."""
    x = x.double()
    if x.numel() <= 2:
        side = torch.linspace(-1, 1, 1001 if x.numel() == 1 else 41, dtype=torch.float64)
        return x + eps * torch.cartesian_prod(*[side] * x.numel()).view(-1, *x.shape[1:])
    noise = torch.rand(count, *x.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    noise[: count // 2] = noise[: count // 2].sign()
    noise[0] = 0
    return x + eps * noise


def layer_inputs(network, z):
    """What reaches every layer of a prepared network, and its logits."""
    found = [z]
    for layer in network.layers:
        found.append(layer(found[-1]))
    return found


def odds(z, label):
    """Log-odds of class `label` at each of the logits `(P, C)`."""
    others = torch.cat([z[:, :label], z[:, label + 1 :]], 1)
    return z[:, label] - others.logsumexp(1)


class Setting:
    """A pair, its balls, the roots of its trees, and the points of every ball with all that the networks make of it."""

    def __init__(self, bounds, kind, seed=0):
        self.teacher, self.student, self.x, self.eps = case(kind, seed)
        self.pair = bounds.network.prepare_pair(self.teacher, self.student, self.x)
        self.box = bounds.network.ball(self.x, self.eps)
        self.roots = tuple(bounds.tree.root(network, q, *self.box) for q, network in enumerate(self.pair))
        self.points = [points(x[None], self.eps) for x in self.x]
        self.inputs = [[layer_inputs(network, z) for network in self.pair] for z in self.points]
        self.logits = [[found[-1] for found in both] for both in self.inputs]
        self.gaps = [gap(self.teacher, self.student, z) for z in self.points]

    def start(self, bounds, steps=3):
        middle = (self.box[0] + self.box[1]) / 2
        return bounds.branch.start(self.roots, middle, bounds.branch.gap(self.pair, self.x), self.x.clone(), steps)

    def members(self, domains, number, room=0.0):
        """Which points of its image lie in all boxes of one domain."""
        image, inside = int(domains["image"][number]), None
        for name in domains:
            what, _, place = name.partition(".")
            if what in ("low", "high") and place:
                q, k = map(int, place.split("."))
                z, end = self.inputs[image][q][k], domains[name][number]
                fine = (z >= end - room) if what == "low" else (z <= end + room)
                inside = fine.flatten(1).all(1) if inside is None else inside & fine.flatten(1).all(1)
        return inside

    def in_phase(self, domains, number):
        """Which points of its image lie in the input box of one domain and satisfy its phases, and nothing else."""
        image = int(domains["image"][number])
        inside = torch.ones(len(self.points[image]), dtype=torch.bool)
        if "low.-1.0" in domains:
            low, high = domains["low.-1.0"][number], domains["high.-1.0"][number]
            inside = ((low <= self.points[image]) & (self.points[image] <= high)).flatten(1).all(1)
        for name in domains:
            if name.startswith("phase."):
                q, k = map(int, name.split(".")[1:])
                inside &= (self.inputs[image][q][k] * domains[name][number] >= 0).flatten(1).all(1)
        return inside


def form_at(rows, total, z):
    """Linear forms `rows` `(R, *image)` plus constants at points `(P, *image)`: `(P, R)`."""
    return z.flatten(1) @ rows.flatten(1).T + total


# linear


def lines_hold(bounds):
    """Lines of ReLU above and below it on the whole box, the upper one through both ends: no other is as tight."""
    torch.manual_seed(0)
    lower, upper = torch.randn(2, 40, 6, dtype=torch.float64).sort(0).values
    line = bounds.linear.relax(nn.ReLU(), lower, upper)
    above, below, shift = line.above[:, 0], line.below[:, 0], line.shift[:, 0]
    for share in torch.linspace(0, 1, 21, dtype=torch.float64):
        z = lower + share * (upper - lower)
        assert (above * z + shift >= z.relu() - ROOM).all() and (below * z <= z.relu() + ROOM).all()
    for end in (lower, upper):
        assert (above * end + shift <= end.relu() + ROOM).all()
    assert torch.equal(line.free[:, 0], (lower < 0) & (upper > 0))


def boxes_hold(bounds):
    """Boxes of every layer and differences of the logits hold all points; crown lies inside interval."""
    for kind in KINDS:
        at = Setting(bounds, kind)
        for q, network in enumerate(at.pair):
            rough = bounds.linear.interval(network, *at.box)
            plain, lines, _ = bounds.linear.crown(network, *at.box)
            differences = [bounds.linear.row_differences(network, lines, plain)[0], at.roots[q].highest]
            for n, inputs in enumerate(z[q] for z in at.inputs):
                for k, z in enumerate(inputs):
                    for low, high in (rough[k], plain[k], at.roots[q].bounds[k]):
                        assert (low[n] <= z.amin(0) + ROOM).all() and (z.amax(0) <= high[n] + ROOM).all()
                    assert (rough[k][0][n] <= plain[k][0][n]).all() and (plain[k][1][n] <= rough[k][1][n]).all()
                reached = (inputs[-1][:, None] - inputs[-1][:, :, None]).amax(0)
                for highest in differences:
                    assert (reached <= highest[n] + ROOM).all() and (highest[n].diagonal() == 0).all()
                assert (reached >= highest[n] - 12 * at.eps).all()  # and is no trivial bound


def pulled_rows_hold(bounds):
    """Rows on the logits and in between, with any slopes, lie below their forms on the input at every point."""
    for kind in KINDS:
        at = Setting(bounds, kind)
        torch.manual_seed(1)
        for q, network in enumerate(at.pair):
            lines = at.roots[q].lines
            for stop in (len(network.layers), max(at.roots[q].relus)):
                rows = torch.randn(2, 9, *network.shapes[stop], dtype=torch.float64)
                slopes = {}
                for k, line in enumerate(lines[:stop]):
                    if isinstance(network.layers[k], bounds.linear.RELAXED):
                        slopes[k] = torch.rand(2, 9, *line.below.shape[2:], dtype=torch.float64) * 1.6 - 0.3
                for chosen in (None, slopes):
                    form, total = bounds.linear.pull(network, lines, rows, stop, chosen)
                    highest = bounds.linear.over_ball(form, total, *at.box)
                    for n, inputs in enumerate(z[q] for z in at.inputs):
                        true = form_at(rows[n], 0.0, inputs[stop])
                        assert (true <= form_at(form[n], total[n], at.points[n]) + ROOM).all()
                        assert (true <= highest[n] + ROOM).all()


def pools_are_as_tight_as_the_paper(bounds):
    """Max-pooling alone: valid with any weights over the window, never looser than the paper's interval rule (§4.2)."""
    torch.manual_seed(0)
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d(3, stride=1, padding=1), nn.MaxPool2d((1, 2), dilation=(1, 2))):
        lower, upper = torch.randn(2, 30, 2, 4, 4, dtype=torch.float64).sort(0).values
        lower, places = torch.where(torch.rand(30, 1, 1, 1) < 0.5, lower, upper - 0.3), pool(upper).shape[1:]
        network = bounds.network.Network((pool,), ((2, 4, 4), tuple(places)))
        unit = torch.eye(math.prod(places), dtype=torch.float64).unflatten(1, places)
        rows = torch.cat([unit, -unit, torch.randn_like(unit)]).expand(30, *[-1] * 4)
        line = bounds.linear.relax_pool(pool, lower, upper)
        weights = torch.rand(30, len(rows[0]), *line.below.shape[2:], dtype=torch.float64) - 0.2
        for chosen in (None, {0: weights}):
            form, total = bounds.linear.pull(network, [line], rows, slopes=chosen)
            for share in (0, 1, torch.rand(30, 2, 4, 4), (torch.rand(30, 2, 4, 4) < 0.5).double()):
                z = lower + share * (upper - lower)
                true = (rows * pool(z)[:, None]).flatten(2).sum(2)
                assert (true <= (form * z[:, None]).flatten(2).sum(2) + total + ROOM).all()
        highest = bounds.linear.over_ball(*bounds.linear.pull(network, [line], rows), lower, upper)
        up, down = highest.split(len(unit), 1)[:2]
        assert (up <= pool(upper).flatten(1) + ROOM).all() and (down <= -pool(lower).flatten(1) + ROOM).all()


def pooled(conv, pool, shape):
    """A network that begins with a convolution and a max-pool, for images of `shape`.

    On nearly white images its large weights cancel: outputs are small beside what is summed up for them.
    """
    torch.manual_seed(0)
    layers = [conv, pool, nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1], 4))
    with torch.no_grad():
        conv.weight[:, 0] *= 1e5
        conv.bias.copy_(-conv.weight.flatten(1).sum(1))
    return network.double()


def patches_are_whole_images(bounds):
    """Rows on the first pool, patch by patch: above every point, and what whole images give, to the last few digits.

    In rational numbers too, where the pool is settled and hence exact: the float is never below.
    """
    layers = [
        (nn.Conv2d(2, 3, 3, stride=2), nn.MaxPool2d(2), (2, 12, 11)),  # one pixel shared, some seen by no patch
        (nn.Conv2d(2, 3, 2), nn.MaxPool2d((2, 3), stride=(3, 2)), (2, 7, 8)),  # more shared across, none down
        (nn.Conv2d(2, 3, 1), nn.MaxPool2d(2, stride=3), (2, 5, 8)),  # pixels between patches
    ]
    for conv, pool, shape in layers:
        prepared = bounds.network.prepare(pooled(conv, pool, shape), shape)
        assert bounds.patches.patches(prepared) is not None
        # few binary digits, so that the smaller ball has an exact middle: no slack there hides what the sums lack
        x = 1 + torch.randint(1, 1000, (3, *shape)).double() * 2.0**-28
        for eps in (0.3, 2.0**-42):
            box = bounds.network.ball(x, eps)
            _, lines, _ = bounds.linear.crown(prepared, *box)
            rows = torch.randn(3, 7, *prepared.shapes[2], dtype=torch.float64)
            weights = torch.rand(3, 7, *lines[1].below.shape[2:], dtype=torch.float64) - 0.2
            for chosen in (None, {1: weights}):
                found = bounds.linear.backward(prepared, lines, box, rows, 2, chosen)
                whole = bounds.linear.over_ball(*bounds.linear.pull(prepared, lines, rows, 2, chosen), *box)
                size = whole.abs().amax() + 1e7
                assert (found - whole).abs().amax() <= 1e-11 * size
                for n in range(3):
                    z = layer_inputs(prepared, points(x[n : n + 1], eps, 100))[2]
                    assert (form_at(rows[n], 0.0, z) <= found[n] + 1e-12 * size).all()
        # at the smaller radius every pool is settled: what it selects is one linear layer, in exact terms too
        chosen = lines[1].above[:, 0]
        assert torch.equal(chosen, lines[1].below[:, 0]) and torch.isin(chosen, torch.tensor([0.0, 1.0])).all()
        found = bounds.linear.backward(prepared, lines, box, rows, 2)
        pixels = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        weight = nn.functional.conv2d(pixels, prepared.layers[0].weight, None, conv.stride).flatten(2)
        places = bounds.network.windows(pool, prepared.shapes[1])
        for n in range(3):
            layer = nn.Linear(math.prod(shape), rows[0, 0].numel())
            at = places[chosen[n].argmax(1), torch.arange(places.shape[1])]
            layer.weight = nn.Parameter(torch.stack([weight[:, c, at[c]] for c in range(len(at))], 1).flatten(1).T)
            layer.bias = nn.Parameter(conv.bias.double().repeat_interleave(places.shape[1]))
            inside = tuple(end[n : n + 1].flatten(1) for end in box)
            for row, value in zip(rows[n], found[n].tolist(), strict=True):
                exact = exact_maximum([layer], None, None, inside, [Fraction(part) for part in row.flatten().tolist()])
                assert exact <= Fraction(value) <= exact + Fraction(1e-4)


def rounding_is_outwards(bounds):
    """One backward pass in rational numbers, from the same boxes and slopes: the float bound is never below it.

    Weights of very different size cancel, so that a pass rounded to nearest falls below every other time.
    """
    for seed in range(4):
        network = fully_connected(2, 5, 4, 3, seed=seed)
        with torch.no_grad():
            for layer in network[::2]:
                layer.weight[:, 0] *= 10.0 ** (4 * (seed % 2))
                layer.bias += 1000.0
        prepared = bounds.network.prepare(network, (2,))
        box = bounds.network.ball(torch.randn(1, 2, dtype=torch.float64), 0.1)
        boxes, lines, _ = bounds.linear.crown(prepared, *box)
        rows, _ = bounds.linear.difference_rows(3)
        found = bounds.linear.backward(prepared, lines, box, rows[None])[0]
        first = bounds.linear.interval_step(prepared.layers[0], *box)
        for unit, (low, high) in enumerate(zip(*(end[0].tolist() for end in first), strict=True)):
            row = [Fraction(int(unit == other)) for other in range(5)]
            assert exact_maximum(prepared.layers[:1], None, None, box, row) <= Fraction(high)
            assert -exact_maximum(prepared.layers[:1], None, None, box, [-part for part in row]) >= Fraction(low)
        for value, row in zip(found.tolist(), rows.tolist(), strict=True):
            exact = exact_maximum(prepared.layers, boxes, lines, box, [Fraction(part) for part in row])
            assert exact <= Fraction(value) <= exact + Fraction(1e-10 * (1 + abs(value)))


def exact_maximum(layers, boxes, lines, box, row):
    """The same pass as `linear.backward` in rational numbers."""
    total = Fraction(0)
    for k in reversed(range(len(layers))):
        if isinstance(layers[k], nn.Linear):
            weight, bias = (
                [[Fraction(w) for w in line] for line in layers[k].weight.tolist()],
                [Fraction(b) for b in layers[k].bias.tolist()],
            )
            total += sum(r * b for r, b in zip(row, bias, strict=True))
            row = [sum(r * line[j] for r, line in zip(row, weight, strict=True)) for j in range(len(weight[0]))]
            continue
        low, high = ([Fraction(part) for part in end[0].tolist()] for end in boxes[k])
        for j, below in enumerate(lines[k].below[0, 0].tolist()):
            settled = low[j] >= 0 or high[j] <= 0
            above = Fraction(int(low[j] >= 0)) if settled else high[j] / (high[j] - low[j])
            total += 0 if settled or row[j] <= 0 else -row[j] * above * low[j]
            row[j] *= above if row[j] > 0 else Fraction(below)
    low, high = ([Fraction(part) for part in end[0].tolist()] for end in box)
    return total + sum(max(r * a, r * b) for r, a, b in zip(row, low, high, strict=True))


# softmax and joint


def confidences_hold(bounds):
    """Eqs (10) and (11) from differences that points attain hold these points, and are exact for one."""
    torch.manual_seed(0)
    for count in (1, 7):
        z = torch.randn(2, count, 50, 4, dtype=torch.float64) * 3
        highest = (z[..., None, :] - z[..., :, None]).amax(1)
        ends = [bounds.softmax.softmax_interval(part) for part in highest]
        for (low, high), p in zip(ends, z.softmax(3), strict=True):
            assert (low <= p).all() and (p <= high).all() and (count > 1 or (high - low).max() < 1e-12)
        true = (z[0].softmax(2) - z[1].softmax(2)).abs().amax((0, 2))
        found = bounds.softmax.pair_bound(*highest)
        assert (true <= found).all() and (count > 1 or (found - true).max() < 1e-12)


def chords_hold(bounds):
    """Chords of exp above it on their ranges, and through both ends."""
    torch.manual_seed(0)
    near = (torch.randn(60, 2, 4, dtype=torch.float64) * 4).sort(1).values
    near[:5, 1] = near[:5, 0]
    near[:, :, 0] = 0
    label, ref = torch.full((60,), 3), torch.zeros(60, dtype=torch.long)
    slope, shift = bounds.joint.chords(near, label, ref)
    assert (slope[:, [0, 3]] == 0).all() and (shift[:, 0] == 1).all() and (shift[:, 3] == 0).all()
    for share in torch.linspace(0, 1, 21, dtype=torch.float64):
        d = near[:, 0] + share * (near[:, 1] - near[:, 0])
        assert (slope * d + shift >= d.exp() * (1 - 1e-14))[:, 1:3].all()
    for d in near.unbind(1):
        assert (slope * d + shift <= d.exp() + 1e-9 * near[:, 1].exp())[:, 1:3].all()


def tangents_hold(bounds):
    """`tangent` is the extremum of sig(m) - k m that a fine grid finds."""
    torch.manual_seed(0)
    low, high = (torch.randn(2, 300, dtype=torch.float64) * 5).sort(0).values
    k = torch.rand(300, dtype=torch.float64) * torch.tensor([0.3, 0.03, 1.5], dtype=torch.float64).repeat(100)
    m = low + torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None] * (high - low)
    values = m.sigmoid() - k * m
    for sign, best in ((1, values.amax(0)), (-1, values.amin(0))):
        found = bounds.joint.tangent(k, low, high, sign)
        assert (sign * (found - best) >= -1e-13).all() and (sign * (found - best) <= 1e-5).all()


def ranges_of_odds_hold(bounds):
    """Ranges of m and of z_j - z_r from differences that points attain hold these points, and are exact for one."""
    torch.manual_seed(0)
    for count in (1, 7):
        z = torch.randn(count, 50, 4, dtype=torch.float64) * 3
        highest = (z[..., None, :] - z[..., :, None]).amax(0)
        label, ref = torch.arange(50) % 4, (torch.arange(50) + 1) % 4
        low, high = bounds.joint.log_odds_range(highest, label)
        near = bounds.joint.near_range(highest, ref)
        all_low, all_high = bounds.tree.all_odds(highest)
        here = torch.arange(50)
        for point in z:
            own = point[here, label]
            others = point.masked_fill(nn.functional.one_hot(label, 4).bool(), -math.inf).logsumexp(1)
            assert (low <= own - others).all() and (own - others <= high).all()
            assert (bounds.joint.log_odds(point, label) - (own - others)).abs().max() < 1e-12
            d = point - point[here, ref][:, None]
            assert (near[:, 0] <= d).all() and (d <= near[:, 1]).all()
            if count == 1:
                assert (high - low).max() < 1e-9 and (near[:, 1] - near[:, 0]).max() < 1e-9
        assert torch.equal(all_low[here, label], low) and torch.equal(all_high[here, label], high)


def random_rows(z, order, label, ref):
    """Rows with random parameters for logits `z` `(2, P, B, C)`, ranges exactly those of the P points."""
    count, classes = z.shape[2:]
    here = torch.arange(count)
    upper, lower = (torch.stack([z[q, :, n] for n, q in enumerate(side)], 1) for side in (order, 1 - order))
    m = [torch.stack([odds(part[:, n], int(label[n])) for n in here], 1) for part in (upper, lower)]
    near = lower - lower[:, here, ref][..., None]
    return {
        "order": order,
        "label": label,
        "ref": ref,
        "range": torch.stack([m[0].amin(0), m[0].amax(0), m[1].amin(0), m[1].amax(0)], 1),
        "near": torch.stack([near.amin(0), near.amax(0)], 1),
        "w": upper[0] + torch.randn(count, classes, dtype=torch.float64),
        "k": torch.rand(count, 2, dtype=torch.float64) * 7 - 6,
        "s": torch.randn(count, dtype=torch.float64),
        "cut": torch.randn(count, classes, dtype=torch.float64),
    }, m


def forms_hold(bounds):
    """A row's form at the true logits is never below f_U^i - f_L^i, whatever its parameters; at best, it is that."""
    torch.manual_seed(0)
    count, classes = 240, 4
    order, label = torch.arange(count) % 2, torch.arange(count) // 2 % classes
    ref = (label + 1 + torch.arange(count) // 8 % 3) % classes
    for spread, many in ((0.0, 1), (0.3, 9), (2.0, 9)):
        z = torch.randn(2, 1, count, classes) * 2 + spread * torch.randn(2, many, count, classes)
        z = z.double()
        rows, m = random_rows(z, order, label, ref)
        size = z.abs().amax((0, 1, 3))
        for trial in range(2):
            if trial:  # the best parameters for the first point
                lower = torch.stack([z[1 - q, 0, n] for n, q in enumerate(order)])
                others = lower.masked_fill(nn.functional.one_hot(label, classes).bool(), -math.inf).logsumexp(1)
                upper = torch.stack([z[q, 0, n] for n, q in enumerate(order)])
                rows |= {"w": upper, "s": others - lower.gather(1, ref[:, None])[:, 0], "cut": 0 * rows["cut"]}
            teacher, student, constant = bounds.joint.forms(rows, size)
            for p in range(many):
                found = (teacher * z[0, p] + student * z[1, p]).sum(1) + constant
                true = m[0][p].sigmoid() - m[1][p].sigmoid()
                assert (found >= true - 1e-13).all()
                assert (bounds.joint.separate(rows) >= true - 1e-13).all()
                assert many > 1 or not trial or (found <= true + 1e-9).all()


# tree


def split_at_random(bounds, at, domains, generator):
    """Both halves of every domain at a random unit not settled there, or an input: domains, halves, which are empty."""
    networks, layers, units, keep = [], [], [], []
    domains = bounds.tree.with_inputs(at.roots[0], domains)
    for number in range(len(domains["image"])):
        coordinate = int(torch.randint(at.x[0].numel(), (1,), generator=generator))
        open_ = [(bounds.tree.BOTH, 0, coordinate)] * 3
        for name in [name for name in domains if name.startswith("low.") and name != "low.-1.0"]:
            q, k = map(int, name.split(".")[1:])
            low, high = domains[name][number].flatten(), domains[f"high.{q}.{k}"][number].flatten()
            open_ += [(q, k, int(unit)) for unit in ((low < 0) & (high > 0)).nonzero()]
        if open_:
            q, k, unit = open_[int(torch.randint(len(open_), (1,), generator=generator))]
            networks, layers, units = [*networks, q], [*layers, k], [*units, unit]
            keep.append(number)
    network, layer, unit = (torch.tensor(part) for part in (networks, layers, units))
    domains = bounds.joint.pick(domains, torch.tensor(keep))
    halves = bounds.tree.halve_domains(domains, network, layer, unit)
    halves, empty = bounds.tree.rebox(at.roots, halves, network.repeat(2), layer.repeat(2))
    return domains, halves, empty


def halves_cover_their_domain(bounds):
    """Every point of a domain lies in one half, in all its boxes, and none in a half that is dropped as empty.

    In the halves, `joint.bound` with random parameters, multipliers of the phases among them, holds at every point.
    """
    for kind in KINDS:
        at, generator = Setting(bounds, kind), torch.Generator().manual_seed(3)
        leaves = at.start(bounds, steps=0)
        domains = leaves.domains
        for _ in range(3):
            parents, halves, empty = split_at_random(bounds, at, domains, generator)
            count = len(parents["image"])
            for number in range(count):
                before = at.in_phase(parents, number)
                after = [at.in_phase(halves, half) for half in (number, number + count)]
                assert torch.equal(before, after[0] | after[1])
                for half, inside in zip((number, number + count), after, strict=True):
                    assert (at.members(halves, half, ROOM) | ~inside).all()
                    assert not (empty[half] and inside.any())
            domains = bounds.joint.pick(halves, ~empty)
        rows_hold_in(bounds, at, leaves, domains, generator)


def rows_hold_in(bounds, at, leaves, domains, generator):
    """`joint.bound` of random rows in `domains`, at every point of theirs."""
    count = len(domains["image"])
    first = torch.stack([(leaves.rows["domain"] == n).nonzero()[0, 0] for n in domains["image"]])
    rows = bounds.joint.pick(leaves.rows, first + torch.randint(6, (count,), generator=generator))
    rows["domain"] = torch.arange(count)
    for name, column in rows.items():
        noise = torch.rand(column.shape, generator=generator, dtype=torch.float64)
        kind = name.partition(".")[0]
        if kind in ("slope", "push"):
            rows[name] = noise if kind == "slope" else 2 * noise
        elif kind in ("w", "k", "s", "cut"):
            rows[name] = column + noise - 0.5
    lines = tuple(bounds.tree.lines_of(root, domains) for root in at.roots)
    box = bounds.tree.ball_of(at.roots[0], domains)
    size = bounds.tree.logit_size(at.roots, domains["image"])
    value, form = bounds.joint.bound(at.pair, lines, box, rows, domains, size)
    assert form.shape == box[0].shape
    pushed = [bounds.joint.pushes(rows, domains, q) for q in (0, 1)]
    for number in range(count):
        image, inside = int(domains["image"][number]), at.in_phase(domains, number)
        for q, k in [(0, k) for k in pushed[0]] + [(1, k) for k in pushed[1]]:
            assert (at.inputs[image][q][k][inside] * pushed[q][k][number] >= 0).all()
        assert (row_truth(at, rows, number, image)[inside] <= value[number] + ROOM).all()


def row_truth(at, rows, number, image):
    """f_U^i - f_L^i of one row at every point of an image."""
    label, order = int(rows["label"][number]), int(rows["order"][number])
    confidences = [z.softmax(1)[:, label] for z in at.logits[image]]
    return confidences[order] - confidences[1 - order]


def row_members(at, domains, rows, number):
    """Which points of its image lie in one row: the phases of its domain, and its own cuts."""
    domain = int(rows["domain"][number])
    image, label, order = int(domains["image"][domain]), int(rows["label"][number]), int(rows["order"][number])
    inside = at.in_phase(domains, domain)
    m = [odds(z, label) for z in at.logits[image]]
    a_upper, b_upper, a_lower, b_lower = rows["range"][number]
    inside &= (a_upper - ROOM <= m[order]) & (m[order] <= b_upper + ROOM)
    inside &= (a_lower - ROOM <= m[1 - order]) & (m[1 - order] <= b_lower + ROOM)
    z = at.logits[image][1 - order]
    d = z - z[:, int(rows["ref"][number]), None]
    low, high = rows["near"][number]
    return inside & ((low - ROOM <= d) & (d <= high + ROOM)).all(1)


# apart and branch


def cuts_cover_their_rows(bounds):
    """Every point of a row lies in one of the halves of any cut, whose reference class may be another one."""
    switched = 0
    for kind, seed in itertools.product(KINDS, range(3)):
        at, generator = Setting(bounds, kind, seed), torch.Generator().manual_seed(seed)
        leaves = at.start(bounds, steps=0)
        rows, here = leaves.rows, torch.arange(len(leaves.rows["value"]))
        unit = 3 - rows["label"] - rows["ref"]
        for place, what in enumerate((bounds.branch.UPPER, bounds.branch.LOWER, bounds.branch.NEAR)):
            ranges = (
                rows["near"][here, :, unit] if what == bounds.branch.NEAR else rows["range"].view(-1, 2, 2)[:, place]
            )
            low, high = ranges.unbind(1)
            cut = low + (0.2 + 0.7 * torch.rand(len(here), generator=generator)) * (high - low)
            cut = torch.where((high > 0) & (cut < 0), 0.5 * high, cut)
            halves = bounds.branch.halve_rows(
                at.roots, leaves.domains, rows, torch.full_like(unit, what), unit, cut.double()
            )
            switched += int((halves["ref"][len(here) :] != rows["ref"]).sum())
            for number in here.tolist():
                before = row_members(at, leaves.domains, rows, number)
                after = [row_members(at, leaves.domains, halves, half) for half in (number, number + len(here))]
                assert torch.equal(before, before & (after[0] | after[1]))
                for half, inside in zip((number, number + len(here)), after, strict=True):
                    true = row_truth(at, halves, half, int(leaves.domains["image"][rows["domain"][number]]))
                    assert (true[inside] <= halves["value"][half] + ROOM).all()
    assert switched >= 20


def trees_hold(bounds):
    """Of each network alone: every point lies in a domain, and each domain's claims hold at all its points."""
    for kind in KINDS:
        at = Setting(bounds, kind)
        cap, goal = torch.ones(2, 2, 3).double(), torch.zeros(2).double()
        trees, made = bounds.apart.plant(at.roots), 0
        for nodes in (2, 10, 48):
            trees, more = bounds.apart.search(at.roots, trees, cap, goal, torch.full((2,), nodes))
            made = made + more
            for q, tree in enumerate(trees):
                tree_holds(at, q, tree)
        for q, root in enumerate(bounds.apart.narrowed(at.roots, trees)):
            for n in range(2):
                z = at.logits[n][q]
                assert ((z[:, None] - z[:, :, None]).amax(0) <= root.highest[n] + ROOM).all()
                for i in range(3):
                    m = odds(z, i)
                    assert root.odds[0][n, i] <= m.min() + ROOM and m.max() <= root.odds[1][n, i] + ROOM
        separate = bounds.apart.separate(bounds.apart.ranges(trees, 2)).flatten(1).amax(1)
        before = bounds.apart.separate(tuple(root.odds for root in at.roots)).flatten(1).amax(1)
        assert (made >= 12).all() and (separate < before).all()
        assert all((true <= bound).all() for true, bound in zip(at.gaps, separate, strict=True))


def tree_holds(at, q, tree):
    """Claims of one tree of network q at all points of its domains, and that these cover every ball."""
    covered = [torch.zeros(len(z), dtype=torch.bool) for z in at.points]
    for number, n in enumerate(tree["image"].tolist()):
        inside = at.members(tree, number, ROOM)
        covered[n] |= inside
        z = at.logits[n][q][at.members(tree, number)]
        if len(z):
            assert ((z[:, None] - z[:, :, None]).amax(0) <= tree["highest"][number] + ROOM).all()
            m = torch.stack([odds(z, i) for i in range(3)], 1)
            assert (tree["low"][number] <= m.amin(0) + ROOM).all()
            assert (m.amax(0) <= tree["high"][number] + ROOM).all()
    assert all(each.all() for each in covered)


def leaves_cover(at, leaves):
    """The invariant of the search: the leaves of an image hold everywhere, and together are everywhere.

    At every point, for both orders and every class, a row that holds the point, or what is closed, is at least
    f_U^i - f_L^i; and no row is below that at any of its points.
    """
    domains, rows = leaves.domains, leaves.rows
    best = leaves.closed[:, None, None].repeat(1, 2, 3).unsqueeze(3).repeat(1, 1, 1, len(at.points[0]))
    for number in range(len(domains["image"])):
        inside = at.in_phase(domains, number)
        assert (at.members(domains, number, ROOM) | ~inside).all()
    for number, value in enumerate(rows["value"]):
        n = int(domains["image"][rows["domain"][number]])
        inside = row_members(at, domains, rows, number)
        assert (row_truth(at, rows, number, n)[inside] <= value + ROOM).all()
        place = best[n, int(rows["order"][number]), int(rows["label"][number])]
        place[inside] = place[inside].clamp(min=value)
    for n, (teacher, student) in enumerate(at.logits):
        true = (teacher.softmax(1) - student.softmax(1)).T
        assert (best[n] >= torch.stack([true, -true]) - ROOM).all()
        assert leaves.upper[n] >= at.gaps[n].max() - ROOM and leaves.lower[n] <= leaves.upper[n] + ROOM


def at_random(bounds, generator):
    """A `branch.decide` that splits anything: ReLUs that are not settled, inputs, ranges, differences, anywhere."""
    inner = bounds.branch.decide

    def decide(roots, domains, rows):
        kind, network, layer, unit, at = inner(roots, domains, rows)
        for n in range(len(kind)):
            pick = int(torch.randint(1, 6, (1,), generator=generator))
            if pick == 4:  # what it would have been
                continue
            if pick == 5:
                kind[n], network[n], layer[n] = bounds.branch.DOMAIN, bounds.tree.BOTH, 0
                unit[n] = int(torch.randint(roots[0].bounds[0][0][0].numel(), (1,), generator=generator))
                continue
            j = int(torch.randint(rows["w"].shape[1], (1,), generator=generator))
            if pick == bounds.branch.NEAR and j in (int(rows["ref"][n]), int(rows["label"][n])):
                continue
            low, high = rows["near"][n, :, j] if pick == bounds.branch.NEAR else rows["range"][n].view(2, 2)[pick - 1]
            kind[n], unit[n] = pick, j if pick == bounds.branch.NEAR else unit[n]
            at[n] = low + (0.1 + 0.8 * torch.rand(1, generator=generator).double()) * (high - low)
        return kind, network, layer, unit, at

    return decide


def searches_keep_every_point(bounds):
    """The invariant before and after each round of the search, with its own splits and with any others.

    With a tolerance below 0 nothing is ever finished, so that every point must be in a row that is open.
    """
    inner, kinds, inputs = bounds.branch.decide, set(), 0
    for kind, seed, tolerance in itertools.product(KINDS, (1, 0), (-1.0, 0.02)):
        if (tolerance < 0) != (seed == 1) and kind == "convolutional":
            continue
        at, generator = Setting(bounds, kind, seed), torch.Generator().manual_seed(seed)
        decide = at_random(bounds, generator) if seed else inner

        def noted(*arguments, decide=decide):
            nonlocal inputs
            found = decide(*arguments)
            kinds.update(found[0].tolist())
            inputs += int((found[1] == bounds.tree.BOTH).sum())
            return found

        leaves = at.start(bounds)
        bounds.branch.decide = noted
        try:
            leaves_cover(at, leaves)
            if tolerance < 0:
                leaves_cover(at, bounds.branch.certify(at.roots, leaves, tolerance, 12)[0])
            for _ in range(5):
                leaves, _ = bounds.branch.search(at.roots, leaves, tolerance, torch.ones(2, dtype=torch.long))
                leaves_cover(at, leaves)
        finally:
            bounds.branch.decide = inner
        assert (leaves.witnesses - at.x).abs().max() <= at.eps
        assert (gap(at.teacher, at.student, leaves.witnesses) - leaves.lower).abs().max() < 1e-12
    assert kinds >= {bounds.branch.DOMAIN, bounds.branch.UPPER, bounds.branch.LOWER, bounds.branch.NEAR} and inputs


def search_ends_at_the_truth(bounds):
    """Small nets, to the end: the bound is at most the tolerance above what is attained, and nothing is above it."""
    for inputs, seed, eps, tolerance in ((1, 0, 1.5, 1e-4), (2, 2, 0.5, 1e-6)):
        pair = fully_connected(inputs, 4, 3, 2, seed=seed), fully_connected(inputs, 3, 2, seed=seed + 5)
        x = torch.randn(2, inputs, dtype=torch.float64)
        prepared, box = bounds.network.prepare_pair(*pair, x), bounds.network.ball(x, eps)
        roots = tuple(bounds.tree.root(network, q, *box) for q, network in enumerate(prepared))
        leaves = bounds.branch.start(roots, x, bounds.branch.gap(prepared, x), x.clone())
        leaves, made = bounds.branch.certify(roots, leaves, tolerance, 1000)
        for n in range(2):
            reached = gap(*pair, points(x[n : n + 1], eps)).max()
            assert reached <= leaves.upper[n] <= leaves.lower[n] + tolerance and made[n] < 1000
            assert leaves.lower[n] <= reached + 0.01
        assert len(leaves.rows["value"]) == 0


# agreement and ladder


def shared_change(margin):
    """Two networks of different depth that predict the sign of x1, or with a `margin` of x1 + margin / 2."""
    teacher = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    student = nn.Sequential(nn.Linear(2, 2)).double()
    with torch.no_grad():
        teacher[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        teacher[0].bias.zero_()
        teacher[2].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        teacher[2].bias.copy_(torch.tensor([margin, 0.0]))
        student[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        student[0].bias.copy_(torch.tensor([margin, 0.0]))
    return teacher, student


def agreement_is_never_claimed_in_vain(bounds):
    """Where a grid finds different classes, never; where it finds none, here always: the nets are small."""
    claims = bounds.ladder.certified_agreement
    differ, agree = 0, 0
    for seed, eps in itertools.product(range(5), (0.05, 0.2)):
        teacher = fully_connected(2, 6, 6, 3, seed=seed)
        near = copy.deepcopy(teacher)
        with torch.no_grad():
            for weight in near.parameters():
                weight += 0.05 * torch.randn_like(weight)
        for student in (near, fully_connected(2, 5, 3, seed=seed + 50)):
            x = torch.randn(5, 2, dtype=torch.float64)
            found = claims(teacher, student, x, eps)
            for n, z in enumerate(points(one[None], eps) for one in x):
                same = bool((teacher(z).argmax(1) == student(z).argmax(1)).all())
                differ, agree = differ + (not same), agree + same
                assert found[n] == same
    assert differ >= 20 and agree >= 20
    x = torch.tensor([[0.05, 0.0], [0.4, 0.0]], dtype=torch.float64)
    assert claims(*shared_change(0.0), x, 0.2).tolist() == [False, True]  # both change at 0 together: ties count
    assert claims(shared_change(0.0)[0], shared_change(3.0)[1], x, 2.0).tolist() == [False, False]


def ladder_is_in_order(bounds):
    """Every method: nothing in the ball above it, none of its rungs below it; at eps = 0 the difference itself."""
    upper_bound, last = bounds.ladder.faithfulness_upper_bound, {}
    for kind in KINDS:
        teacher, student, x, eps = case(kind)
        for method in ("interval", "crown", "alpha-crown", "joint", "bab"):
            keywords = {"method": method, "nodes": 12}
            point = upper_bound(teacher, student, x, 0.0, **keywords)
            exact = gap(teacher, student, x)
            assert (point.values >= exact - 1e-15).all() and (point.values - exact).max() < 1e-6
            found = upper_bound(teacher, student, x, eps, **keywords)
            for n in range(len(x)):
                assert gap(teacher, student, points(x[n : n + 1], eps)).max() <= found.values[n] <= 1
            values = torch.cat([point.values, found.values])
            for rung in bounds.ladder.LADDER[method]:
                assert rung == method or (values <= last[kind, rung]).all()
            last[kind, method] = values
            if method == "bab":
                assert (found.lower <= found.values).all() and ((found.witnesses - x).abs() <= eps).all()
                assert (gap(teacher, student, found.witnesses) - found.lower).abs().max() < 1e-12
                assert (found.lower >= exact - 1e-12).all()


def wild_weights_are_trivial(bounds):
    """Logits past float64: the trivial bound, with a status that says so, also beside an image that is fine."""
    teacher, student = fully_connected(2, 4, 3), fully_connected(2, 4, 3, seed=1)
    with torch.no_grad():
        student[0].weight[:] = torch.tensor([1e-150, 1e200], dtype=torch.float64)
        student[0].bias.zero_()
        student[2].weight[:] = 1e150 * torch.arange(12).view(3, 4).double()
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    for method in ("interval", "crown", "alpha-crown", "joint", "bab"):
        found = bounds.ladder.faithfulness_upper_bound(teacher, student, x, 0.0, method=method, nodes=8)
        assert found.values[1] == 1 and found.status[1] == bounds.ladder.NOT_FINITE
        assert found.values.isfinite().all() and (found.values <= 1).all() and (found.values >= 0).all()
        if found.lower is not None:
            assert (found.lower >= 0).all() and (found.lower <= found.values).all()


CHECKS = {  # and the module that each looks at first of all
    lines_hold: "linear",
    pools_are_as_tight_as_the_paper: "linear",
    rounding_is_outwards: "linear",
    patches_are_whole_images: "patches",
    pulled_rows_hold: "linear",
    boxes_hold: "linear",
    confidences_hold: "softmax",
    chords_hold: "joint",
    tangents_hold: "joint",
    ranges_of_odds_hold: "joint",
    forms_hold: "joint",
    halves_cover_their_domain: "tree",
    trees_hold: "apart",
    cuts_cover_their_rows: "branch",
    searches_keep_every_point: "branch",
    search_ends_at_the_truth: "branch",
    agreement_is_never_claimed_in_vain: "agreement",
    wild_weights_are_trivial: "ladder",
    ladder_is_in_order: "ladder",
}
