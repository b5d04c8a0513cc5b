"""What every bound must satisfy. Truth comes from points only, run through the networks by torch itself, or from
rational numbers.

`test_mistakes` checks the package as it is, and with mistakes planted: each must fail one of these laws.
"""

import copy
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import torch
from pairs import case, chain_of_tiny_weights, fully_connected, gap, odds, points
from torch import nn

from faithkd.bounds import (
    agreement,
    differences,
    domains,
    graph,
    joint,
    linear,
    methods,
    operators,
    rows,
    search,
    softmax,
)

KINDS = ("fully connected", "convolutional")
ROOM = 1e-11  # what evaluating a network at a point in float64 may be off by


class Setting:
    """A pair, its balls, the roots of its trees, and the points of every ball with all that the networks make of it."""

    def __init__(self, kind, seed=0):
        self.teacher, self.student, self.x, self.eps = case(kind, seed)
        self.pair = graph.prepare_pair(self.teacher, self.student, self.x)
        self.box = graph.outer_ball(self.x, self.eps)
        self.roots = tuple(domains.root(network, q, *self.box) for q, network in enumerate(self.pair))
        self.points = [points(x[None], self.eps) for x in self.x]
        self.values = [[network.values(z) for network in self.pair] for z in self.points]
        self.logits = [[net(z) for net in (self.teacher, self.student)] for z in self.points]
        self.gaps = [gap(self.teacher, self.student, z) for z in self.points]

    def start(self, steps=3):
        reach = graph.inner_ball(self.x, self.eps)
        return search.start(self.roots, reach, search.gap(self.pair, self.x), self.x.clone(), steps=steps)

    def inputs(self, image, q, k):
        """What reaches node k of network q at every point of an image."""
        return self.values[image][q][self.pair[q].place(k)]

    def members(self, parts, number, room=0.0):
        """Which points of its image lie in all boxes of one domain."""
        image = int(parts.image[number])
        both = [(self.points[image], parts.input)] if parts.input else []
        both += [(self.inputs(image, q, k), box) for q, boxes in parts.boxes.items() for k, box in boxes.items()]
        inside = torch.ones(len(self.points[image]), dtype=torch.bool)
        for z, (low, high) in both:
            inside &= ((low[number] - room <= z) & (z <= high[number] + room)).flatten(1).all(1)
        return inside

    def in_phase(self, parts, number):
        """Which points of its image lie in the input box of one domain and satisfy its phases, and nothing else."""
        image = int(parts.image[number])
        inside = torch.ones(len(self.points[image]), dtype=torch.bool)
        if parts.input:
            low, high = (end[number] for end in parts.input)
            inside = ((low <= self.points[image]) & (self.points[image] <= high)).flatten(1).all(1)
        for q, phases in parts.phases.items():
            for k, phase in phases.items():
                inside &= (self.inputs(image, q, k) * phase[number] >= 0).flatten(1).all(1)
        return inside


def form_at(rows, total, z):
    """Linear forms `rows` `(R, *image)` plus constants at points `(P, *image)`: `(P, R)`."""
    return z.flatten(1) @ rows.flatten(1).T + total


# linear


def boxes_hold():
    """Boxes of every place and differences of the logits hold all points; crown lies inside interval."""
    for kind in KINDS:
        at = Setting(kind)
        for q, network in enumerate(at.pair):
            rough = linear.interval(network, *at.box)
            plain, lines, _ = linear.crown(network, *at.box)
            differences = [linear.row_differences(network, lines, plain)[0], at.roots[q].highest]
            for n, values in enumerate(z[q] for z in at.values):
                for p, z in enumerate(values):
                    for low, high in (rough[p], plain[p], at.roots[q].bounds[p]):
                        assert (low[n] <= z.amin(0) + ROOM).all() and (z.amax(0) <= high[n] + ROOM).all()
                    assert (rough[p][0][n] <= plain[p][0][n]).all() and (plain[p][1][n] <= rough[p][1][n]).all()
                z = at.logits[n][q]
                reached = (z[:, None] - z[:, :, None]).amax(0)
                for highest in differences:
                    assert (reached <= highest[n] + ROOM).all() and (highest[n].diagonal() == 0).all()
                assert (reached >= highest[n] - 12 * at.eps).all()  # and is no trivial bound


def pulled_rows_hold():
    """Rows on the logits and in between, with any slopes, lie below their forms on the input at every point."""
    for kind in KINDS:
        at = Setting(kind)
        torch.manual_seed(1)
        for q, network in enumerate(at.pair):
            lines = at.roots[q].lines
            for stop in (len(network.nodes), network.place(network.splits[-1])):
                rows = torch.randn(2, 9, *network.shapes[stop], dtype=torch.float64)
                free = [k for k in range(stop) if lines[k].free is not None]
                slopes = {k: torch.rand(2, 9, *lines[k].below.shape[2:], dtype=torch.float64) * 1.6 - 0.3 for k in free}
                for dual in (None, linear.Dual(slopes)):
                    form, total = linear.pull(network, lines, rows, stop, dual)
                    highest = linear.over_ball(form, total, *at.box)
                    for n, values in enumerate(z[q] for z in at.values):
                        true = form_at(rows[n], 0.0, values[stop])
                        assert (true <= form_at(form[n], total[n], at.points[n]) + ROOM).all()
                        assert (true <= highest[n] + ROOM).all()


def rounding_is_outwards():
    """One backward pass in rational numbers, from the same boxes and slopes: the float bound is never below it.

    Weights of very different size cancel, so that a pass rounded to nearest falls below every other time.
    """
    for seed in range(4):
        network = fully_connected(2, 5, 4, 3, seed=seed)
        with torch.no_grad():
            for layer in network[::2]:
                layer.weight[:, 0] *= 10.0 ** (4 * (seed % 2))
                layer.bias += 1000.0
        prepared = graph.prepare(network, (2,))
        box = graph.outer_ball(torch.randn(1, 2, dtype=torch.float64), 0.1)
        boxes, lines, _ = linear.crown(prepared, *box)
        rows, _ = linear.difference_rows(3)
        found = linear.backward(prepared, lines, box, rows[None])[0]
        first = prepared.nodes[0].operator.interval(box)
        for unit, (low, high) in enumerate(zip(*(end[0].tolist() for end in first), strict=True)):
            row = [Fraction(int(unit == other)) for other in range(5)]
            assert exact_maximum(network[:1], None, None, box, row) <= Fraction(high)
            assert -exact_maximum(network[:1], None, None, box, [-part for part in row]) >= Fraction(low)
        for value, row in zip(found.tolist(), rows.tolist(), strict=True):
            exact = exact_maximum(network, boxes, lines, box, [Fraction(part) for part in row])
            assert exact <= Fraction(value) <= exact + Fraction(1e-10 * (1 + abs(value)))


def underflow_is_outwards():
    """Where products underflow, in whole networks and in single passes: no float bound below the exact value."""
    teacher, student, truth = chain_of_tiny_weights()
    for method in ("interval", "crown", "alpha-crown", "joint"):
        found = methods.faithfulness_upper_bound(teacher, student, torch.ones(1, 1), 0.1, method=method)
        assert found.values.item() >= truth
    # the coefficient of x, 2e-324, is rounded to 0; what it is multiplied by is not small
    row, weight = torch.zeros(1, 1, 2, dtype=torch.float64), 2e-104
    row[..., 0] = 1e-220
    layers = [nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)]
    with torch.no_grad():
        layers[0].weight = nn.Parameter(torch.full((1, 1), 1e250, dtype=torch.float64))
        layers[1].weight = nn.Parameter(torch.tensor([[weight], [0.0]], dtype=torch.float64))
    network = graph.prepare(nn.Sequential(*layers), (1,))
    box = (torch.ones(1, 1, dtype=torch.float64),) * 2
    _, lines, _ = linear.crown(network, *box)
    found = linear.backward(network, lines, box, row).item()
    assert Fraction(found) >= Fraction(1e-220) * Fraction(weight) * Fraction(1e250)
    found = linear.over_ball(row[..., :1], torch.zeros(1, 1).double(), weight * box[0], weight * box[1]).item()
    assert Fraction(found) >= Fraction(1e-220) * Fraction(weight)
    # the least of a pool, where each of its inputs may be -weight 1e250
    conv, weight = nn.Conv2d(1, 2, 1, bias=False).double(), 2e-94
    with torch.no_grad():
        conv.weight.fill_(weight)
    network = graph.prepare(nn.Sequential(conv, nn.MaxPool2d(2), nn.Flatten()), (1, 2, 2))
    box = tuple(torch.full((1, 1, 2, 2), end, dtype=torch.float64) for end in (-1e250, 1e250))
    _, lines, _ = linear.crown(network, *box)
    row = torch.tensor([-1e-230, 0.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    found = linear.backward(network, lines, box, row, 2).item()
    assert Fraction(found) >= Fraction(1e-230) * Fraction(weight) * Fraction(1e250)


def boxes_wider_than_float64_hold():
    """Where upper - lower overflows, lines above are still above both ends of ReLU and max-pool."""
    ends = torch.tensor([-1.2e308, 1.2e308], dtype=torch.float64)
    slope, shift, _ = operators.ReLU.triangle(*ends)
    assert (slope * ends / 4 + shift / 4 >= ends.relu() / 4).all()
    low = ends[:1].expand(1, 1, 2, 1)
    high = torch.tensor([1.2e308, 1e300], dtype=torch.float64).view(1, 1, 2, 1)
    _, slope, shift = operators.MaxPool2d.chord(low, high)
    assert (slope * ends / 4 + shift / 4 >= torch.maximum(ends, high.amin()) / 4 - 1e293).all()


def pieces_change_nothing():
    """Differences bounded one at a time are those of all at once, each in its place."""
    for kind in KINDS:
        at = Setting(kind)
        for network in at.pair:
            boxes, lines, _ = linear.crown(network, *at.box)
            whole, _ = linear.row_differences(network, lines, boxes)
            budget, linear.BUDGET = linear.BUDGET, 1
            try:
                pieces, _ = linear.row_differences(network, lines, boxes)
            finally:
                linear.BUDGET = budget
            assert (pieces - whole).abs().max() < 1e-12


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


def confidences_hold():
    """Eqs (10) and (11) from differences that points attain hold these points, and are exact for one."""
    torch.manual_seed(0)
    for count in (1, 7):
        z = torch.randn(2, count, 50, 4, dtype=torch.float64) * 3
        highest = (z[..., None, :] - z[..., :, None]).amax(1)
        ends = [softmax.softmax_interval(part) for part in highest]
        for (low, high), p in zip(ends, z.softmax(3), strict=True):
            assert (low <= p).all() and (p <= high).all() and (count > 1 or (high - low).max() < 1e-12)
        true = (z[0].softmax(2) - z[1].softmax(2)).abs().amax((0, 2))
        found = softmax.pair_bound(*highest)
        assert (true <= found).all() and (count > 1 or (found - true).max() < 1e-12)


def chords_hold():
    """Chords of exp above it on their ranges, and through both ends."""
    torch.manual_seed(0)
    near = (torch.randn(60, 2, 4, dtype=torch.float64) * 4).sort(1).values
    near[:5, 1] = near[:5, 0]
    near[:, :, 0] = 0
    label, ref = torch.full((60,), 3), torch.zeros(60, dtype=torch.long)
    slope, shift = joint.chords(near, label, ref)
    assert (slope[:, [0, 3]] == 0).all() and (shift[:, 0] == 1).all() and (shift[:, 3] == 0).all()
    for share in torch.linspace(0, 1, 21, dtype=torch.float64):
        d = near[:, 0] + share * (near[:, 1] - near[:, 0])
        assert (slope * d + shift >= d.exp() * (1 - 1e-14))[:, 1:3].all()
    for d in near.unbind(1):
        assert (slope * d + shift <= d.exp() + 1e-9 * near[:, 1].exp())[:, 1:3].all()


def tangents_hold():
    """`tangent` is the extremum of sig(m) - k m that a fine grid finds."""
    torch.manual_seed(0)
    low, high = (torch.randn(2, 300, dtype=torch.float64) * 5).sort(0).values
    k = torch.rand(300, dtype=torch.float64) * torch.tensor([0.3, 0.03, 1.5], dtype=torch.float64).repeat(100)
    m = low + torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None] * (high - low)
    values = m.sigmoid() - k * m
    for sign, best in ((1, values.amax(0)), (-1, values.amin(0))):
        found = joint.tangent(k, low, high, sign)
        assert (sign * (found - best) >= -1e-13).all() and (sign * (found - best) <= 1e-5).all()


def ranges_of_odds_hold():
    """Ranges of m and of z_j - z_r from differences that points attain hold these points, and are exact for one."""
    torch.manual_seed(0)
    for count in (1, 7):
        z = torch.randn(count, 50, 4, dtype=torch.float64) * 3
        highest = (z[..., None, :] - z[..., :, None]).amax(0)
        label, ref = torch.arange(50) % 4, (torch.arange(50) + 1) % 4
        low, high = domains.log_odds_range(highest, label)
        near = joint.near_range(highest, ref)
        all_low, all_high = domains.all_odds(highest)
        here = torch.arange(50)
        for point in z:
            own = point[here, label]
            others = point.masked_fill(nn.functional.one_hot(label, 4).bool(), -math.inf).logsumexp(1)
            assert (low <= own - others).all() and (own - others <= high).all()
            assert (domains.log_odds(point, label) - (own - others)).abs().max() < 1e-12
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
    rows = joint.Row(
        domain=here,
        order=order,
        label=label,
        ref=ref,
        range=torch.stack([m[0].amin(0), m[0].amax(0), m[1].amin(0), m[1].amax(0)], 1),
        near=torch.stack([near.amin(0), near.amax(0)], 1),
        w=upper[0] + torch.randn(count, classes, dtype=torch.float64),
        k=torch.rand(count, 2, dtype=torch.float64) * 7 - 6,
        s=torch.randn(count, dtype=torch.float64),
        cut=torch.randn(count, classes, dtype=torch.float64),
        value=torch.ones(count, dtype=torch.float64),
        slopes={},
        push={},
    )
    return rows, m


def forms_hold():
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
                free = {"w": upper, "s": others - lower.gather(1, ref[:, None])[:, 0], "cut": 0 * rows.cut}
                rows = replace(rows, **free)
            teacher, student, constant = joint.forms(rows, size)
            for p in range(many):
                found = (teacher * z[0, p] + student * z[1, p]).sum(1) + constant
                true = m[0][p].sigmoid() - m[1][p].sigmoid()
                assert (found >= true - 1e-13).all()
                assert (rows.apart() >= true - 1e-13).all()
                assert many > 1 or not trial or (found <= true + 1e-9).all()


# domains


def split_at_random(at, parts, generator):
    """Both halves of every domain at a random unit not settled there, or an input: domains, halves, who is empty."""
    found = []
    parts = domains.with_inputs(at.roots[0], parts)
    for number in range(len(parts.image)):
        coordinate = int(torch.randint(at.x[0].numel(), (1,), generator=generator))
        open_ = [(domains.BOTH, 0, coordinate)] * 3
        for q, boxes in parts.boxes.items():
            for k, box in boxes.items():
                low, high = (end[number].flatten() for end in box)
                open_ += [(q, k, int(unit)) for unit in ((low < 0) & (high > 0)).nonzero()]
        found.append(open_[int(torch.randint(len(open_), (1,), generator=generator))])
    splits = domains.Splits(*torch.tensor(found).unbind(1))
    halves = domains.halve(parts, splits)
    return parts, halves, domains.rebox(at.roots, halves, splits.join(splits))


def inputs_are_halved(parents, halves):
    """Where an input is split, the halves share the volume of the box: none is as large as before."""
    first, second = (tuple(end[some] for end in halves.input) for some in torch.arange(len(halves.image)).chunk(2))
    volumes = [(high - low).flatten(1).prod(1) for low, high in (parents.input, first, second)]
    split = torch.zeros(len(parents.image), dtype=torch.bool)
    for half in (first, second):
        for end, before in zip(half, parents.input, strict=True):
            split |= (end != before).flatten(1).any(1)
    assert ((volumes[1] + volumes[2] - volumes[0])[split].abs() < 1e-9).all()


def halves_cover_their_domain():
    """Every point of a domain lies in one half, in all its boxes, and none in a half that is dropped as empty.

    In the halves, `joint.bound` with random parameters, multipliers of the phases among them, holds at every point.
    """
    for kind in KINDS:
        at, generator = Setting(kind), torch.Generator().manual_seed(3)
        leaves = at.start(steps=0)
        parts = leaves.domains
        for _ in range(3):
            parents, halves, empty = split_at_random(at, parts, generator)
            inputs_are_halved(parents, halves)
            count = len(parents.image)
            for number in range(count):
                before = at.in_phase(parents, number)
                after = [at.in_phase(halves, half) for half in (number, number + count)]
                assert torch.equal(before, after[0] | after[1])
                for half, inside in zip((number, number + count), after, strict=True):
                    assert (at.members(halves, half, ROOM) | ~inside).all()
                    assert not (empty[half] and inside.any())
            parts = halves[~empty]
        rows_hold_in(at, leaves, parts, generator)


def rows_hold_in(at, leaves, parts, generator):
    """`joint.bound` of random rows in some domains, at every point of theirs."""
    count = len(parts.image)
    first = torch.stack([(leaves.rows.domain == n).nonzero()[0, 0] for n in parts.image])
    rows = replace(leaves.rows[first + torch.randint(6, (count,), generator=generator)], domain=torch.arange(count))
    free = {}
    for name, column in rows.free().items():
        noise = torch.rand(column.shape, generator=generator, dtype=torch.float64)
        free[name] = {"slopes": noise, "push": 2 * noise}.get(name[0], column + noise - 0.5)
    rows, setting = rows.having(free), joint.setting(at.roots, parts)
    value, form = joint.bound(setting, rows)
    assert form.shape == setting.box[0].shape
    for number in range(count):
        image, inside = int(parts.image[number]), at.in_phase(parts, number)
        for q in (0, 1):
            for k, push in joint.dual(rows, parts, q).push.items():
                assert (at.inputs(image, q, k)[inside] * push[number] >= 0).all()
        assert (row_truth(at, rows, number, image)[inside] <= value[number] + ROOM).all()


def row_truth(at, rows, number, image):
    """f_U^i - f_L^i of one row at every point of an image."""
    label, order = int(rows.label[number]), int(rows.order[number])
    confidences = [z.softmax(1)[:, label] for z in at.logits[image]]
    return confidences[order] - confidences[1 - order]


def row_members(at, parts, rows, number):
    """Which points of its image lie in one row: the phases of its domain, and its own cuts."""
    domain = int(rows.domain[number])
    image, label, order = int(parts.image[domain]), int(rows.label[number]), int(rows.order[number])
    inside = at.in_phase(parts, domain)
    m = [odds(z, label) for z in at.logits[image]]
    a_upper, b_upper, a_lower, b_lower = rows.range[number]
    inside &= (a_upper - ROOM <= m[order]) & (m[order] <= b_upper + ROOM)
    inside &= (a_lower - ROOM <= m[1 - order]) & (m[1 - order] <= b_lower + ROOM)
    z = at.logits[image][1 - order]
    d = z - z[:, int(rows.ref[number]), None]
    low, high = rows.near[number]
    return inside & ((low - ROOM <= d) & (d <= high + ROOM)).all(1)


# searches


def cuts_cover_their_rows():
    """Every point of a row lies in one of the halves of any cut."""
    switched = 0
    for kind, seed in itertools.product(KINDS, range(3)):
        at, generator = Setting(kind, seed), torch.Generator().manual_seed(seed)
        leaves = at.start(steps=0)
        rows, here = leaves.rows, torch.arange(len(leaves.rows.value))
        unit, nowhere = 3 - rows.label - rows.ref, torch.zeros_like(here)
        for place, what in enumerate((search.UPPER, search.LOWER, search.NEAR)):
            ranges = rows.near[here, :, unit] if what == search.NEAR else rows.range.view(-1, 2, 2)[:, place]
            low, high = ranges.unbind(1)
            cut = low + (0.2 + 0.7 * torch.rand(len(here), generator=generator)) * (high - low)
            cut = torch.where((high > 0) & (cut < 0), 0.5 * high, cut).double()
            splits = domains.Splits(nowhere, nowhere, nowhere)
            found = search.Decision(torch.full_like(unit, what), splits, unit, cut)
            halves = search.halve_rows(at.roots, leaves.domains, rows, found)
            switched += int((halves.ref[len(here) :] != rows.ref).sum())
            for number in here.tolist():
                before = row_members(at, leaves.domains, rows, number)
                after = [row_members(at, leaves.domains, halves, half) for half in (number, number + len(here))]
                assert torch.equal(before, before & (after[0] | after[1]))
                for half, inside in zip((number, number + len(here)), after, strict=True):
                    true = row_truth(at, halves, half, int(leaves.image[number]))
                    assert (true[inside] <= halves.value[half] + ROOM).all()
    assert switched >= 20


def trees_hold():
    """Of each network's differences: each part holds at its points, and a row's parts and what is closed everywhere."""
    for kind in KINDS:
        at = Setting(kind)
        cap, goal = torch.ones(2, 2, 3).double(), torch.zeros(2).double()
        trees, made = [differences.plant(root) for root in at.roots], 0
        for nodes in (2, 10, 48):
            trees, more = differences.search(trees, cap, goal, torch.full((2,), nodes))
            made = made + more
            for q, tree in enumerate(trees):
                tree_holds(at, q, tree)
        apart = differences.apart([tree.root.odds for tree in trees]).flatten(1).amax(1)
        before = differences.apart([root.odds for root in at.roots]).flatten(1).amax(1)
        assert (made >= 12).all() and (apart < before).all()
        assert all((true <= bound).all() for true, bound in zip(at.gaps, apart, strict=True))


def tree_holds(at, q, tree):
    """Claims of the trees of network q at all points of its parts, and that these cover every ball."""
    rows, parts, covered = tree.rows, tree.parts, {}
    for row, value in enumerate(rows.closed):
        z = at.logits[int(rows.image[row])][q]
        true = z[:, rows.plus[row]] - z[:, rows.minus[row]]
        covered[row] = true <= value + ROOM
        for number in (parts.row == row).nonzero()[:, 0].tolist():
            inside = at.in_phase(parts.domains, number)
            assert (true[inside] <= parts.value[number] + ROOM).all()
            covered[row] |= inside
        assert covered[row].all() or not rows.made[row]
        assert (
            rows.low[row] <= tree.root.highest.flatten()[row] + ROOM
            and true.max() <= tree.root.highest.flatten()[row] + ROOM
        )
    for n, logits in enumerate(at.logits):
        m = torch.stack([odds(logits[q], i) for i in range(3)], 1)
        assert (tree.root.odds[0][n] <= m.amin(0) + ROOM).all() and (m.amax(0) <= tree.root.odds[1][n] + ROOM).all()


def leaves_cover(at, leaves):
    """The invariant of the search: the leaves of an image hold everywhere, and together are everywhere.

    At every point, for both orders and every class, a row that holds the point, or what is closed, is at least
    f_U^i - f_L^i; and no row is below that at any of its points.
    """
    parts, rows = leaves.domains, leaves.rows
    best = leaves.closed[:, None, None].repeat(1, 2, 3).unsqueeze(3).repeat(1, 1, 1, len(at.points[0]))
    for number in range(len(parts.image)):
        inside = at.in_phase(parts, number)
        assert (at.members(parts, number, ROOM) | ~inside).all()
    for number, value in enumerate(rows.value):
        n = int(leaves.image[number])
        inside = row_members(at, parts, rows, number)
        assert (row_truth(at, rows, number, n)[inside] <= value + ROOM).all()
        place = best[n, int(rows.order[number]), int(rows.label[number])]
        place[inside] = place[inside].clamp(min=value)
    for n, (teacher, student) in enumerate(at.logits):
        true = (teacher.softmax(1) - student.softmax(1)).T
        assert (best[n] >= torch.stack([true, -true]) - ROOM).all()
        assert leaves.upper[n] >= at.gaps[n].max() - ROOM and leaves.lower[n] <= leaves.upper[n] + ROOM


def at_random(inner, generator):
    """A `search.decide` that splits anything: ReLUs that are not settled, inputs, ranges, differences, anywhere."""

    def decide(roots, parts, rows):
        found = inner(roots, parts, rows)
        for n in range(len(found.kind)):
            pick = int(torch.randint(1, 6, (1,), generator=generator))
            if pick == 4:  # what it would have been
                continue
            if pick == 5:
                coordinate = int(torch.randint(roots[0].bounds[0][0][0].numel(), (1,), generator=generator))
                found.kind[n] = search.DOMAIN
                found.splits.network[n], found.splits.node[n], found.splits.unit[n] = domains.BOTH, 0, coordinate
                continue
            j = int(torch.randint(rows.w.shape[1], (1,), generator=generator))
            if pick == search.NEAR and j in (int(rows.ref[n]), int(rows.label[n])):
                continue
            low, high = rows.near[n, :, j] if pick == search.NEAR else rows.range[n].view(2, 2)[pick - 1]
            found.kind[n], found.label[n] = pick, j
            found.at[n] = low + (0.1 + 0.8 * torch.rand(1, generator=generator).double()) * (high - low)
        return found

    return decide


def inside_exactly(z, x, eps):
    pairs = zip(z.flatten().tolist(), x.flatten().tolist(), strict=True)
    return all(abs(Fraction(a) - Fraction(b)) <= Fraction(eps) for a, b in pairs)


def searches_keep_every_point():
    """The invariant before and after each round of the search, with its own splits and with any others.

    With a tolerance below 0 nothing is ever finished, so that every point must be in a row that is open.
    """
    inner, kinds, inputs = search.decide, set(), 0
    for kind, seed, tolerance in itertools.product(KINDS, (1, 0), (-1.0, 0.02)):
        if (tolerance < 0) != (seed == 1) and kind == "convolutional":
            continue
        at, generator = Setting(kind, seed), torch.Generator().manual_seed(seed)
        decide = at_random(inner, generator) if seed else inner

        def noted(*arguments, decide=decide):
            nonlocal inputs
            found = decide(*arguments)
            kinds.update(found.kind.tolist())
            inputs += int((found.splits.network == domains.BOTH).sum())
            return found

        leaves = at.start()
        search.decide = noted
        try:
            leaves_cover(at, leaves)
            if tolerance < 0:
                leaves_cover(at, search.certify(at.roots, leaves, tolerance, 12)[0])
            for _ in range(5):
                leaves, _ = search.search_jointly(at.roots, leaves, tolerance, torch.ones(2, dtype=torch.long))
                leaves_cover(at, leaves)
        finally:
            search.decide = inner
        assert inside_exactly(leaves.witnesses, at.x, at.eps)
        assert (gap(at.teacher, at.student, leaves.witnesses) - leaves.lower).abs().max() < 1e-12
    assert kinds >= {search.DOMAIN, search.UPPER, search.LOWER, search.NEAR} and inputs


def search_ends_at_the_truth():
    """Small nets, to the end: the bound is at most the tolerance above what is attained, and nothing is above it."""
    for inputs, seed, eps, tolerance in ((1, 0, 1.5, 1e-4), (2, 2, 0.5, 1e-6)):
        pair = fully_connected(inputs, 4, 3, 2, seed=seed), fully_connected(inputs, 3, 2, seed=seed + 5)
        x = torch.randn(2, inputs, dtype=torch.float64)
        prepared, box = graph.prepare_pair(*pair, x), graph.outer_ball(x, eps)
        roots = tuple(domains.root(network, q, *box) for q, network in enumerate(prepared))
        leaves = search.start(roots, graph.inner_ball(x, eps), search.gap(prepared, x), x.clone())
        leaves, made = search.certify(roots, leaves, tolerance, 1000)
        for n in range(2):
            reached = gap(*pair, points(x[n : n + 1], eps)).max()
            assert reached <= leaves.upper[n] <= leaves.lower[n] + tolerance and made[n] < 1000
            assert leaves.lower[n] <= reached + 0.01
        assert len(leaves.rows.value) == 0


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


def agreement_is_never_claimed_in_vain():
    """Where a grid finds different classes, never; where it finds none, here always: the nets are small."""
    claims = methods.certified_agreement
    differ, agree = 0, 0
    for seed, eps in itertools.product(range(5), (0.05, 0.2, 0.6)):
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


def ladder_is_in_order():
    """Every method: nothing in the ball above it, none of its rungs below it; at eps = 0 the difference itself."""
    upper_bound, last = methods.faithfulness_upper_bound, {}
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
            for rung in set(methods.LADDER[method]) - {"rows"}:
                assert rung == method or (values <= last[kind, rung]).all()
            last[kind, method] = values
            if method == "bab":
                assert (found.lower <= found.values).all() and ((found.witnesses - x).abs() <= eps).all()
                assert (gap(teacher, student, found.witnesses) - found.lower).abs().max() < 1e-12
                assert (found.lower >= exact - 1e-12).all()


def wild_weights_are_trivial():
    """Logits past float64: the trivial bound, with a status that says so, also beside an image that is fine."""
    teacher, student = fully_connected(2, 4, 3), fully_connected(2, 4, 3, seed=1)
    with torch.no_grad():
        student[0].weight[:] = torch.tensor([1e-150, 1e200], dtype=torch.float64)
        student[0].bias.zero_()
        student[2].weight[:] = 1e150 * torch.arange(12).view(3, 4).double()
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    for method in ("interval", "crown", "alpha-crown", "joint", "bab"):
        found = methods.faithfulness_upper_bound(teacher, student, x, 0.0, method=method, nodes=8)
        assert found.values[1] == 1 and found.status[1] == methods.NOT_FINITE
        assert found.values.isfinite().all() and (found.values <= 1).all() and (found.values >= 0).all()
        if found.lower is not None:
            assert (found.lower >= 0).all() and (found.lower <= found.values).all()


LAWS = {  # and the modules that each looks at first of all
    rounding_is_outwards: (linear, operators),
    underflow_is_outwards: (linear, operators),
    boxes_wider_than_float64_hold: (operators,),
    pieces_change_nothing: (linear,),
    pulled_rows_hold: (linear, operators),
    boxes_hold: (linear, operators),
    confidences_hold: (softmax,),
    chords_hold: (joint,),
    tangents_hold: (joint,),
    ranges_of_odds_hold: (domains, joint),
    forms_hold: (joint,),
    halves_cover_their_domain: (domains, joint),
    trees_hold: (rows, differences),
    cuts_cover_their_rows: (search,),
    searches_keep_every_point: (search,),
    search_ends_at_the_truth: (search, graph),
    agreement_is_never_claimed_in_vain: (agreement,),
    wild_weights_are_trivial: (methods,),
    ladder_is_in_order: (methods,),
}
