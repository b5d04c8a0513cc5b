"""The bounds satisfy every law; and mistakes planted by replacing a method or a function: a law must notice each.

A mistake that survives means that a law is missing.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import laws
import pytest
import test_operators
import torch
from torch.nn import functional as F

from faithkd.bounds import (
    agreement,
    differences,
    domains,
    graph,
    joint,
    layers,
    linear,
    methods,
    operators,
    rows,
    search,
    softmax,
)
from faithkd.bounds.operators import Affine, Elementwise, Lines, MaxPool2d, ReLU, dot


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law):
    law()


class Mistake(NamedTuple):
    """What `name` of a module or class is replaced by: `change` of the real one; `here`: not where it is imported."""

    owner: object
    name: str
    change: Callable
    here: bool = False


def after(owner, name, change, here=False):
    """What a function returns, changed."""
    return Mistake(owner, name, lambda real: lambda *given, **options: change(real(*given, **options)), here)


def before(owner, name, change):
    """A function called with other arguments."""
    return Mistake(owner, name, lambda real: lambda *given: real(*change(*given)))


def instead(owner, name, change):
    """A function that may call the real one, its first argument."""
    return Mistake(owner, name, lambda real: lambda *given, **options: change(real, *given, **options))


def steeper_triangle(_, low, high):
    unsettled, slope = ReLU().loose(low, high), high / (high - low)
    slope = torch.where(unsettled, 1 - slope, (low >= 0).double())
    return slope, torch.where(unsettled, -slope * low, 0.0), slope.round()


def signed_radius(_, operator, box):
    middle = (box[0] + box[1]) / 2
    slack = operators.gamma(operator.terms) * operator.absolute(operators.largest(*box))
    radius = operator.product(box[1] - middle, operator.weight, None) + slack
    return operator(middle) - radius, operator(middle) + radius


def ends_of_curve(_, curve, slope, box, sign, *__):
    return torch.stack([sign * (curve(end) - slope * end) for end in box]).amax(0)


def one_constant(line):
    many = line.many.clone()
    many[:, :, 1] = many[:, :, 1, many.shape[3] // 2].unsqueeze(2)
    return replace(line, many=many)


def sagging(real, curve, rows, lines, slopes, shape):
    """Constants of the two neighbours are mixed with other shares than their slopes."""
    parts, constant = real(curve, rows, lines, slopes, shape)
    if slopes is None:
        return parts, constant
    count = lines.many.shape[3] - 1
    nearest = (curve.allowed(slopes, lines) * count).round() / count
    return parts, real(curve, rows, lines, nearest, shape)[1]


def last_reader(_, pick, rows, shape):
    flat = rows.new_zeros(len(rows), torch.Size(shape).numel() + 1)
    flat[:, pick.index.flatten()] = rows.flatten(1)
    return flat[:, :-1].unflatten(1, shape)


def low_chord(real, low, high):
    best, slope, shift = real(low, high)
    first = low.gather(2, best).squeeze(2)
    return best, slope, torch.where(slope == 1, shift, first - slope * first)


def flat_where_wide(real, low, high):
    best, slope, shift = real(low, high)
    wide = (high.amax(2) - high.amin(2) > 1e307) | (high.amax(2) > 1e308)
    return best, torch.where(wide, 0.0, slope), shift


def one_sided(_, rows, total, lower, upper):
    middle, radius = ((upper + sign * lower).unsqueeze(1) / 2 for sign in (1, -1))
    return total + dot(rows, middle) + dot(rows, radius)


def turned(real, network, lines, ball, box, *rest, **options):
    (lower, upper), slopes = real(network, lines, ball, box, *rest, **options)
    return (torch.where(lower > box[0], torch.maximum(box[0], -lower), lower), upper), slopes


def other_chord(real, near, label, ref, tangent=False):
    """A chord's line from the wrong end, or with the slope of a tangent."""
    (slope, shift), (low, high) = real(near, label, ref), near.unbind(1)
    if not tangent:
        return slope, torch.where(slope > 0, low.exp() - slope * high, shift)
    steep = torch.where(slope > 0, low.exp(), slope)
    return steep, torch.where(slope > 0, torch.maximum(low.exp() * (1 - low), high.exp() - steep * high), shift)


def ends_only(_, k, low, high, sign):
    values = torch.stack([torch.sigmoid(m) - k * m for m in (low, high)])
    return values.amax(0) if sign > 0 else values.amin(0)


def other_constant(change):
    """Forms with another constant."""
    return instead(joint, "forms", lambda real, rows, size: (*real(rows, size)[:2], real(rows, size)[2] + change(rows)))


def no_reference(real, rows, size):
    slope, _ = joint.chords(rows.near, rows.label, rows.ref)
    lost = rows.k.exp()[:, 1] * (slope * (-rows.s).exp()[:, None]).sum(1)
    lost = lost[:, None] * F.one_hot(rows.ref, slope.shape[1])
    teacher, student, constant = real(rows, size)
    return teacher + torch.where(rows.first, 0.0, lost), student + torch.where(rows.first, lost, 0.0), constant


def exchanged(roots, column):
    return tuple(
        replace(root, **{column: getattr(other, column)}) for root, other in zip(roots, roots[::-1], strict=True)
    )


def low_half(real, parts, splits):
    """The lower half of a split ReLU ends 0.1 too early."""
    halves = real(parts, splits)
    for n, (q, k, unit) in enumerate(zip(*(part.tolist() for part in vars(splits).values()), strict=True)):
        if q != domains.BOTH:
            halves.boxes[q][k][1].flatten(1)[len(splits.unit) + n, unit] -= 0.1
    return halves


def at_zero(real, parts, splits):
    halves = real(parts, splits)
    for n in (splits.network == domains.BOTH).nonzero()[:, 0].tolist():
        unit, count = splits.unit[n], len(splits.unit)
        low, high = (end.flatten(1)[n, unit] for end in parts.input)
        halves.input[0].flatten(1)[n, unit] = low.clamp(min=0)
        halves.input[1].flatten(1)[count + n, unit] = high.clamp(max=0)
    return halves


def first_half(empty):
    empty[len(empty) // 2 :] = True
    return empty


def no_rows(real, roots, leaves, chosen, old=False):
    """A split that loses the rows in domains that are old, or those in new ones."""
    found, fresh, x = real(roots, leaves, chosen)
    is_old = found.rows.domain < len(leaves.domains.image)
    return replace(found, rows=found.rows[~is_old if old else is_old]), fresh, x


def empty_upper_part(real, *given):
    halves, found = real(*given), given[3]
    upper = (found.kind == search.NEAR).nonzero()[:, 0] + len(found.kind)
    halves.near[upper, 1] = halves.near[upper, 0]
    return halves


def same_range(real, roots, parts, rows, which, to):
    found, mine, here = real(roots, parts, rows, which, to), rows[which].near, torch.arange(len(which))
    near = found.near.clone()
    near[which] = (mine - mine[here, :, to][..., None]).sort(1).values
    return replace(found, near=near)


def smallest_leaf(leaves):
    return torch.full_like(leaves.closed, 2.0).scatter_reduce(0, leaves.image, leaves.rows.value, "amin")


def certified(found):
    """Half of what can be, where nothing is known."""
    unknown = torch.tensor([said == methods.NOT_FINITE for said in found.status])
    return replace(found, values=torch.where(unknown, 0.5, found.values))


def out_of_reach(real, pair, leaves, *rest):
    wide = tuple(end * (1 + sign * 1e-9) for sign, end in zip((-1, 1), leaves.reach, strict=True))
    return replace(real(pair, replace(leaves, reach=wide), *rest), reach=leaves.reach)


def smallest_part(rows, parts):
    return rows.closed.scatter_reduce(0, parts.row, parts.value, "amin", include_self=False)


def lost_half(real, root, rows, parents):
    rows, children = real(root, rows, parents)
    return rows, children[: len(children.row) // 2]


def lost_tree(real, trees, wanted):
    found = real(trees, wanted)
    return found if wanted.any() else replace(found, parts=found.parts[:0])


def other_network(real, roots, parts, rows, network):
    found = real(roots, parts, replace(rows, order=1 - rows.order), network)
    return replace(found, order=rows.order)


def any_weights(_, weights, line):
    return torch.where(line.free.any(3, keepdim=True), weights.clamp(min=0) * line.free, line.below)


def from_the_first(real, classes, numbers=None):
    return real(classes, None if numbers is None else numbers - numbers[0])


def lines_exchanged(operator, rows, line, *rest):
    return operator, rows, replace(line, above=line.below, below=line.above), *rest


def not_below(found):
    """The rung "bab" is what is attained."""
    return found | ({"rungs": found["rungs"] | {"bab": found["lower"]}} if "lower" in found else {})


MISTAKES = {
    # one operator
    "the upper line's shift has the wrong sign": after(ReLU, "triangle", lambda f: (f[0], -f[1], f[2])),
    "the upper line's slope is the other end's": instead(ReLU, "triangle", steeper_triangle),
    "a settled unit may have any slope": instead(
        Elementwise, "allowed", lambda _, slopes, line: torch.where(slopes >= 0, slopes, line.below)
    ),
    "slopes above 1 are allowed": instead(
        Elementwise, "allowed", lambda _, slopes, line: torch.where(line.free & (slopes >= 0), slopes, line.below)
    ),
    "the radius goes through signed weights": instead(Affine, "interval", signed_radius),
    "a pool's chord begins too low": instead(MaxPool2d, "chord", low_chord),
    "a pool forgets its rivals": after(MaxPool2d, "chord", lambda f: (f[0], torch.ones_like(f[1]), 0 * f[2])),
    "weights over a window do not sum to 1": instead(MaxPool2d, "allowed", any_weights),
    "a sum forgets its second part": instead(
        layers.Add, "transpose", lambda _, add, rows, *__: ([rows, 0 * rows], 0.0)
    ),
    "the line above a curve is too low": after(
        layers.Smooth, "relax", lambda line: replace(line, high=line.high - 0.05)
    ),
    "a curve is highest at an end": instead(layers.Smooth, "most", ends_of_curve),
    "a curve bends the other way": instead(
        layers.Smooth, "most", lambda real, curve, *rest: real(replace(curve, convex=not curve.convex), *rest)
    ),
    "all of a curve's lines have one constant": after(layers.Smooth, "freed", one_constant),
    "a curve's lines are between its own": after(
        layers.Smooth, "freed", lambda line: replace(line, many=line.many.flip(1))
    ),
    "a mixture of lines lies below both": instead(layers.Smooth, "transpose", sagging),
    "a window of unequal size ends too early": after(layers.AdaptiveMaxPool2d, "windows", lambda f: f[: len(f) - 2]),
    "a transposed convolution is carried back upside down": instead(
        layers.ConvTranspose2d, "back", lambda real, conv, rows, shape: real(conv, rows.flip(2), shape)
    ),
    "padding is the last number": instead(layers.Pick, "product", lambda _, pick, z, *__: z.flatten(1)[:, pick.index]),
    "a number that is repeated counts once": instead(layers.Pick, "back", last_reader),
    "a mean is transposed as a sum": instead(
        layers.AvgPool2d, "back", lambda _, pool, rows, shape: pool.terms * Affine.back(pool, rows, shape)
    ),
    "a wide ReLU is flat": instead(
        ReLU, "triangle", lambda real, low, high: (high / (high - low), *real(low, high)[1:])
    ),
    "a wide pool is flat": instead(MaxPool2d, "chord", flat_where_wide),
    "no slack for rounding": instead(operators, "gamma", lambda _, terms: 0.0),
    "nothing ever underflows": Mistake(operators, "TINY", lambda real: 0.0),
    # one network
    "rows above and below are exchanged": before(Elementwise, "transpose", lines_exchanged),
    "the shift is dropped": before(Lines, "constant", lambda line, above, below: (line, 0 * above, below)),
    "the bias is dropped": instead(Affine, "constant", lambda _, operator, rows: 0.0),
    "the ball has no radius": instead(linear, "over_ball", one_sided),
    "lower ends are not turned round": instead(linear, "refine", turned),
    "differences are taken the other way round": after(linear, "difference_rows", lambda f: (-f[0], f[1])),
    "a box's differences use one end twice": before(linear, "box_differences", lambda lower, upper: (upper, upper)),
    "each piece is the first one": instead(
        linear,
        "difference_rows",
        lambda real, classes, some=None: real(classes, None if some is None else some - some[0]),
    ),
    "the inner ball is rounded outwards": instead(
        graph, "inner_ball", lambda _, x, eps, clip=None: (x - eps * (1 + 1e-15), x + eps * (1 + 1e-15))
    ),
    # softmax and what both networks share
    "lowest and highest differences are exchanged": after(softmax, "softmax_interval", lambda f: (f[0], f[0])),
    "the entropy is dropped": after(joint, "weights", lambda f: (f[0], 0 * f[1])),
    "the entropy has the wrong sign": after(joint, "weights", lambda f: (f[0], -f[1])),
    "a chord starts at the wrong end": instead(joint, "chords", other_chord),
    "a chord is a tangent": instead(joint, "chords", partial(other_chord, tangent=True)),
    "the extremum inside is forgotten": instead(joint, "tangent", ends_only),
    "maximum and minimum of the tangent are exchanged": before(
        joint, "tangent", lambda k, low, high, sign: (k, low, high, -1)
    ),
    "the tangent of ln has the wrong sign": other_constant(lambda rows: -2 * rows.k.exp()[:, 1] * rows.s),
    "the tangent of ln lacks its -1": other_constant(lambda rows: rows.k.exp()[:, 1]),
    "multipliers take the nearer end": other_constant(
        lambda rows: -(rows.cut * rows.k.exp().mean(1, keepdim=True) * rows.near.diff(dim=1)[:, 0]).abs().sum(1)
    ),
    "the reference class is dropped": instead(joint, "forms", no_reference),
    "teacher and student are exchanged": after(joint, "forms", lambda f: (f[1], f[0], f[2])),
    "phases push the wrong way": after(
        joint, "dual", lambda dual: replace(dual, push={k: -push for k, push in dual.push.items()})
    ),
    "eq. (11) takes the wrong end": before(
        joint.Row, "apart", lambda rows: (replace(rows, range=rows.range[:, [0, 1, 3, 2]]),)
    ),
    "the range of m takes one side twice": instead(
        domains, "log_odds_range", lambda real, d, label: (real(d, label)[0], real(d.mT, label)[1])
    ),
    "the range of z_j - z_r is turned round": before(joint, "near_range", lambda highest, ref: (highest.mT, ref)),
    "the order of the pair is exchanged in L": before(
        joint, "all_rows", lambda roots, logits: (exchanged(roots, "highest"), logits)
    ),
    "ranges of U and L are exchanged": before(
        joint, "all_rows", lambda roots, logits: (exchanged(roots, "odds"), logits)
    ),
    # parts of the ball
    "on is off": after(domains, "halve", lambda f: replace(f, phases=domains.mapped(torch.neg, f.phases))),
    "a half is cut too far": instead(domains, "halve", low_half),
    "an input is halved at 0": instead(domains, "halve", at_zero),
    "the input's boxes are other domains'": instead(
        domains,
        "ball_of",
        lambda real, r, parts: tuple(e.flip(0) for e in parts.input) if parts.input else real(r, parts),
    ),
    "a domain that is nearly empty is dropped": instead(
        domains, "meet", lambda real, low, high: (*real(low, high)[:2], low > high - 0.3)
    ),
    "another image's ball": instead(
        domains, "ball_of", lambda _, r, parts: parts.input or tuple(end[0 * parts.image] for end in r.bounds[0])
    ),
    # rows of one network
    "one order of a pair is left out": after(differences, "apart", lambda found: found[:, [0, 0]]),
    "the bound of a row is its smallest part's": instead(rows.Rows, "upper", lambda _, *of: smallest_part(*of)),
    "finished parts are forgotten": instead(rows.Rows, "closing", lambda _, of, parts: of),
    "one half of a row's split is lost": instead(rows, "halved", lost_half),
    "a row that does not grow loses its tree": instead(differences, "grown", lost_tree),
    "a row has the wrong sign": before(
        rows.Rows, "forms", lambda of, shape: (replace(of, plus=of.minus, minus=of.plus), shape)
    ),
    "phases push a row the wrong way": after(
        rows, "dual", lambda dual: replace(dual, push={k: -push for k, push in dual.push.items()})
    ),
    "a row is not attained": after(rows.Rows, "at", lambda found: found + 1),
    # branch and bound
    "the bound is the smallest leaf": Mistake(search.Leaves, "upper", lambda real: property(smallest_leaf)),
    "closed rows are forgotten": instead(
        search, "close", lambda real, leaves, tolerance: replace(real(leaves, tolerance), closed=leaves.closed)
    ),
    "one half of a split is lost": after(search, "rebox", first_half, here=True),
    "rows not worth a descent are lost": instead(search, "split", no_rows),
    "rows that were not split are lost": instead(search, "split", partial(no_rows, old=True)),
    "one half of a cut is lost": instead(
        search, "halve_rows", lambda real, *given: (half := real(*given)[: len(given[2].value)]).join(half)
    ),
    "a difference is cut at the wrong end": instead(search, "halve_rows", empty_upper_part),
    "a new reference class keeps the old one's range": instead(search, "refer", same_range),
    "the other network's range is narrowed": instead(search, "narrow", other_network),
    "what is inherited is another order's": before(
        search, "inherit", lambda roots, leaves: (exchanged(roots, "odds"), leaves)
    ),
    "a corner outside the ball is a witness": instead(search, "witness", out_of_reach),
    "a witness is never moved": instead(
        search, "witness", lambda real, pair, leaves, *at: replace(real(pair, leaves, *at), witnesses=leaves.witnesses)
    ),
    # the ends
    "agreement forgives a small disagreement": before(
        agreement, "keeps", lambda root, *rest: (replace(root, highest=root.highest - 0.5), *rest)
    ),
    "agreement looks at one rival": after(agreement, "first_parts", lambda parts: parts[:1]),
    "agreement asks the teacher only": instead(
        agreement, "keeps", lambda real, root, label, asked, nodes: asked if root.q else real(root, label, asked, nodes)
    ),
    "agreement is claimed when the nodes run out": instead(
        agreement, "keeps", lambda _, root, label, asked, nodes: asked
    ),
    "what is not finite is certified": after(methods, "of_pair", certified),
    "each method stands alone": Mistake(
        torch.Tensor, "cummin", lambda real: lambda table, _: SimpleNamespace(values=table)
    ),
    "the largest rung but one": after(methods, "shared", not_below),
}


def plant(monkeypatch, owner, name, change, here=False):
    """Replace what is called so, also where other modules have imported it."""
    kept = vars(owner).get(name, getattr(owner, name))
    real = getattr(owner, name)
    new = change(real)
    monkeypatch.setattr(owner, name, staticmethod(new) if isinstance(kept, staticmethod) else new)
    if not isinstance(owner, type) and not here:
        for module in [module for path, module in sys.modules.items() if path.startswith("faithkd.bounds")]:
            if vars(module).get(name) is real:
                monkeypatch.setattr(module, name, new)


def of_operators():
    """The laws of `test_operators` for every operator."""
    for name, (operator, *_) in test_operators.OPERATORS.items():
        test_operators.test_boxes_and_lines_hold(name)
        test_operators.test_transposes(name)
        if isinstance(operator, layers.Smooth):
            test_operators.test_what_lies_between_two_lines_of_a_curve_holds(name)
        else:
            test_operators.test_rounding_goes_outwards(name, 1e8)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_noticed(monkeypatch, mistake):
    """By an assertion: a mistake must not be found because it happens to crash."""
    owner = MISTAKES[mistake].owner
    plant(monkeypatch, *MISTAKES[mistake])
    module = sys.modules.get(owner.__module__, owner) if isinstance(owner, type) else owner
    every = {of_operators: (operators, layers)} | laws.LAWS
    for law in sorted(every, key=lambda law: module not in every[law]):
        try:
            law()
        except AssertionError:
            return
    pytest.fail("no law notices")
