"""Mistakes planted in the bounds by replacing a method or a function: a law must notice every one of them.

A mistake that survives means that a law is missing.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import laws
import pytest
import test_operators
import torch
from torch.nn import functional as F

from faithkd.bounds import (
    agreement,
    alone,
    domains,
    graph,
    joint,
    layers,
    linear,
    methods,
    operators,
    patches,
    search,
    softmax,
)
from faithkd.bounds.operators import Affine, Elementwise, Lines, MaxPool2d, ReLU, dot

HERE = "here"  # replaced in its own module only, not where others have imported it


class Mistake(NamedTuple):
    """What `name` of a module or class is replaced by: `change` of the real one."""

    owner: object
    name: str
    change: Callable
    where: str = ""


def after(change):
    """What a function returns, changed."""
    return lambda real: lambda *given, **options: change(real(*given, **options))


def before(change):
    """A function called with other arguments."""
    return lambda real: lambda *given: real(*change(*given))


def steeper_triangle(low, high):
    unsettled, slope = ReLU().loose(low, high), high / (high - low)
    slope = torch.where(unsettled, 1 - slope, (low >= 0).double())
    return slope, torch.where(unsettled, -slope * low, 0.0), slope.round()


def signed_radius(operator, box):
    middle = (box[0] + box[1]) / 2
    slack = operators.gamma(operator.terms) * operator.absolute(operators.largest(*box))
    radius = operator.product(box[1] - middle, operator.weight, None) + slack
    return operator(middle) - radius, operator(middle) + radius


def ends_of_curve(curve, slope, box, sign):
    return torch.stack([sign * (curve(end) - slope * end) for end in box]).amax(0)


def last_reader(pick, rows, shape):
    flat = rows.new_zeros(len(rows), torch.Size(shape).numel() + 1)
    flat[:, pick.index.flatten()] = rows.flatten(1)
    return flat[:, :-1].unflatten(1, shape)


def low_chord(best, slope, shift, low):
    first = low.gather(2, best).squeeze(2)
    return best, slope, torch.where(slope == 1, shift, first - slope * first)


def flat_where_wide(slope, shift, high):
    wide = (high.amax(2) - high.amin(2) > 1e307) | (high.amax(2) > 1e308)
    return torch.where(wide, 0.0, slope), shift


def one_sided(rows, total, lower, upper):
    middle, radius = ((upper + sign * lower).unsqueeze(1) / 2 for sign in (1, -1))
    return total + dot(rows, middle) + dot(rows, radius)


def turned(box, found):
    (lower, upper), slopes = found
    return (torch.where(lower > box[0], torch.maximum(box[0], -lower), lower), upper), slopes


def counted_once(cut, pixels):
    for here, _ in patches._edges(cut, pixels):
        here.zero_()


def wrong_neighbour(cut, pixels):
    colours = len(cut.matrix) // (cut.size[0] * cut.size[1])
    whole = pixels.view(len(pixels), colours, *cut.size, *cut.grid, pixels.shape[-1])
    for axis, (size, shared, count) in enumerate(zip(cut.size, cut.shared, cut.grid, strict=True)):
        if shared and count > 1:
            there = whole.narrow(2 + axis, size - shared, shared)
            yield there.narrow(4 + axis, 0, count - 1), there.narrow(4 + axis, 1, count - 1)


def other_chord(real, near, label, ref, tangent):
    """A chord's line from the wrong end, or with the slope of a tangent."""
    (slope, shift), (low, high) = real(near, label, ref), near.unbind(1)
    if not tangent:
        return slope, torch.where(slope > 0, low.exp() - slope * high, shift)
    steep = torch.where(slope > 0, low.exp(), slope)
    return steep, torch.where(slope > 0, torch.maximum(low.exp() * (1 - low), high.exp() - steep * high), shift)


def ends_only(k, low, high, sign):
    values = torch.stack([torch.sigmoid(m) - k * m for m in (low, high)])
    return values.amax(0) if sign > 0 else values.amin(0)


def changed_forms(what):
    """Forms with another constant, `what(rows, k', chords)`."""
    return lambda real: lambda rows, size: (*real(rows, size)[:2], real(rows, size)[2] + what(rows))


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


def low_half(halves, splits):
    """The lower half of a split ReLU ends 0.1 too early."""
    for n, (q, k, unit) in enumerate(zip(*(part.tolist() for part in vars(splits).values()), strict=True)):
        if q != domains.BOTH:
            halves.boxes[q][k][1].flatten(1)[len(splits.unit) + n, unit] -= 0.1
    return halves


def at_zero(parts, halves, splits):
    for n in (splits.network == domains.BOTH).nonzero()[:, 0].tolist():
        unit, count = splits.unit[n], len(splits.unit)
        low, high = (end.flatten(1)[n, unit] for end in parts.input)
        halves.input[0].flatten(1)[n, unit] = low.clamp(min=0)
        halves.input[1].flatten(1)[count + n, unit] = high.clamp(max=0)
    return halves


def first_half(empty):
    empty[len(empty) // 2 :] = True
    return empty


def no_rows(leaves, split, old):
    """A split that loses the rows in domains that are old, or those in new ones."""
    found, fresh, x = split
    is_old = found.rows.domain < len(leaves.domains.image)
    return replace(found, rows=found.rows[~is_old if old else is_old]), fresh, x


def empty_upper_part(halves, found):
    upper = (found.kind == search.NEAR).nonzero()[:, 0] + len(found.kind)
    halves.near[upper, 1] = halves.near[upper, 0]
    return halves


def same_range(rows, found, which, to):
    mine, here, near = rows[which].near, torch.arange(len(which)), found.near.clone()
    near[which] = (mine - mine[here, :, to][..., None]).sort(1).values
    return replace(found, near=near)


def smallest_leaf(leaves):
    return torch.full_like(leaves.closed, 2.0).scatter_reduce(0, leaves.image, leaves.rows.value, "amin")


def certified(found):
    """Half of what can be, where nothing is known."""
    unknown = torch.tensor([said == methods.NOT_FINITE for said in found.status])
    return replace(found, values=torch.where(unknown, 0.5, found.values))


def wider(leaves):
    return replace(
        leaves, reach=tuple(end * (1 + sign * 1e-9) for sign, end in zip((-1, 1), leaves.reach, strict=True))
    )


MISTAKES = {
    # one operator
    "the upper line's shift has the wrong sign": Mistake(
        ReLU, "triangle", after(lambda found: (found[0], -found[1], found[2]))
    ),
    "the upper line's slope is the other end's": Mistake(ReLU, "triangle", lambda real: steeper_triangle),
    "a settled unit may have any slope": Mistake(
        Elementwise, "allowed", lambda real: lambda slopes, line: torch.where(slopes >= 0, slopes, line.below)
    ),
    "slopes above 1 are allowed": Mistake(
        Elementwise,
        "allowed",
        lambda real: lambda slopes, line: torch.where(line.free & (slopes >= 0), slopes, line.below),
    ),
    "the radius goes through signed weights": Mistake(Affine, "interval", lambda real: signed_radius),
    "a pool's chord begins too low": Mistake(
        MaxPool2d, "chord", lambda real: lambda low, high: low_chord(*real(low, high), low)
    ),
    "a pool forgets its rivals": Mistake(
        MaxPool2d, "chord", after(lambda found: (found[0], torch.ones_like(found[1]), 0 * found[2]))
    ),
    "weights over a window do not sum to 1": Mistake(
        MaxPool2d,
        "allowed",
        lambda real: (
            lambda weights, line: torch.where(
                line.free.any(3, keepdim=True), weights.clamp(min=0) * line.free, line.below
            )
        ),
    ),
    "a sum forgets its second part": Mistake(
        layers.Add, "transpose", lambda real: lambda add, rows, *_: ([rows, 0 * rows], 0.0)
    ),
    "the line above a curve is too low": Mistake(
        layers.Smooth, "relax", after(lambda line: replace(line, high=line.high - 0.05))
    ),
    "a curve is highest at an end": Mistake(layers.Smooth, "most", lambda real: ends_of_curve),
    "a curve bends the other way": Mistake(
        layers.Smooth, "most", lambda real: lambda curve, *rest: real(replace(curve, convex=not curve.convex), *rest)
    ),
    "padding is the last number": Mistake(
        layers.Pick, "product", lambda real: lambda pick, z, *_: z.flatten(1)[:, pick.index]
    ),
    "a number that is repeated counts once": Mistake(layers.Pick, "back", lambda real: last_reader),
    "a mean is transposed as a sum": Mistake(
        layers.AvgPool2d, "back", lambda real: lambda pool, rows, shape: pool.terms * Affine.back(pool, rows, shape)
    ),
    # one network
    "rows above and below are exchanged": Mistake(
        Elementwise,
        "transpose",
        before(
            lambda operator, rows, line, *rest: (
                operator,
                rows,
                replace(line, above=line.below, below=line.above),
                *rest,
            )
        ),
    ),
    "the shift is dropped": Mistake(
        Lines, "constant", before(lambda line, positive, negative: (line, 0 * positive, negative))
    ),
    "the bias is dropped": Mistake(Affine, "constant", lambda real: lambda operator, rows: 0.0),
    "the ball has no radius": Mistake(linear, "over_ball", lambda real: one_sided),
    "no slack for rounding": Mistake(operators, "gamma", lambda real: lambda terms: 0.0),
    "lower ends are not turned round": Mistake(
        linear,
        "refine",
        lambda real: (
            lambda network, lines, ball, box, *rest, **options: turned(
                box, real(network, lines, ball, box, *rest, **options)
            )
        ),
    ),
    "differences are taken the other way round": Mistake(
        linear, "difference_rows", after(lambda found: (-found[0], found[1]))
    ),
    "a box's differences use one end twice": Mistake(
        linear, "box_differences", before(lambda lower, upper: (upper, upper))
    ),
    # one network, patch by patch
    "a shared pixel counts once only": Mistake(patches, "_share", lambda real: counted_once),
    "patches go to the wrong neighbour": Mistake(patches, "_edges", lambda real: wrong_neighbour),
    "a patch has no radius": Mistake(
        patches, "maximum", before(lambda cut, c, middle, radius: (cut, c, middle, 0 * radius))
    ),
    "the middle of a patch is dropped": Mistake(
        patches, "maximum", before(lambda cut, c, middle, radius: (cut, c, 0 * middle, radius))
    ),
    "no noise in patches": Mistake(patches, "terms", lambda real: lambda cut: -16),
    "a pool's shift is dropped in patches": Mistake(
        patches,
        "over_ball",
        before(lambda network, line, *rest: (network, replace(line, high=0 * line.high), *rest)),
        HERE,
    ),
    # softmax and what both networks share
    "lowest and highest differences are exchanged": Mistake(
        softmax, "softmax_interval", after(lambda found: (found[0], found[0]))
    ),
    "the entropy is dropped": Mistake(joint, "weights", after(lambda found: (found[0], 0 * found[1]))),
    "the entropy has the wrong sign": Mistake(joint, "weights", after(lambda found: (found[0], -found[1]))),
    "a chord starts at the wrong end": Mistake(
        joint, "chords", lambda real: lambda *given: other_chord(real, *given, tangent=False)
    ),
    "a chord is a tangent": Mistake(
        joint, "chords", lambda real: lambda *given: other_chord(real, *given, tangent=True)
    ),
    "the extremum inside is forgotten": Mistake(joint, "tangent", lambda real: ends_only),
    "maximum and minimum of the tangent are exchanged": Mistake(
        joint, "tangent", before(lambda k, low, high, sign: (k, low, high, -1))
    ),
    "the tangent of ln has the wrong sign": Mistake(
        joint, "forms", changed_forms(lambda rows: -2 * rows.k.exp()[:, 1] * rows.s)
    ),
    "the tangent of ln lacks its -1": Mistake(joint, "forms", changed_forms(lambda rows: rows.k.exp()[:, 1])),
    "the reference class is dropped": Mistake(
        joint, "forms", lambda real: lambda rows, size: no_reference(real, rows, size)
    ),
    "multipliers take the nearer end": Mistake(
        joint,
        "forms",
        changed_forms(
            lambda rows: -(rows.cut * rows.k.exp().mean(1, keepdim=True) * rows.near.diff(dim=1)[:, 0]).abs().sum(1)
        ),
    ),
    "teacher and student are exchanged": Mistake(
        joint, "forms", after(lambda found: [found[place] for place in (1, 0, 2)])
    ),
    "phases push the wrong way": Mistake(
        joint, "dual", after(lambda dual: linear.Dual(dual.slopes, {k: -push for k, push in dual.push.items()}))
    ),
    "eq. (11) takes the wrong end": Mistake(
        joint.Row, "apart", before(lambda rows: (replace(rows, range=rows.range[:, [0, 1, 3, 2]]),))
    ),
    "the range of m takes one side twice": Mistake(
        domains,
        "log_odds_range",
        lambda real: lambda highest, label: (real(highest, label)[0], real(highest.mT, label)[1]),
    ),
    "the range of z_j - z_r is turned round": Mistake(
        joint, "near_range", before(lambda highest, ref: (highest.mT, ref))
    ),
    "the order of the pair is exchanged in L": Mistake(
        joint, "all_rows", before(lambda roots, logits: (exchanged(roots, "highest"), logits))
    ),
    "ranges of U and L are exchanged": Mistake(
        joint, "all_rows", before(lambda roots, logits: (exchanged(roots, "odds"), logits))
    ),
    # parts of the ball
    "one order of a pair is left out": Mistake(alone, "apart", after(lambda found: found[:, [0, 0]])),
    "on is off": Mistake(
        domains, "halve", after(lambda found: replace(found, phases=domains.mapped(torch.neg, found.phases)))
    ),
    "a half is cut too far": Mistake(
        domains, "halve", lambda real: lambda parts, splits: low_half(real(parts, splits), splits)
    ),
    "an input is halved at 0": Mistake(
        domains, "halve", lambda real: lambda parts, splits: at_zero(parts, real(parts, splits), splits)
    ),
    "the input's boxes are other domains'": Mistake(
        domains,
        "ball_of",
        lambda real: (
            lambda root, parts: tuple(end.flip(0) for end in parts.input) if parts.input else real(root, parts)
        ),
    ),
    "a domain that is nearly empty is dropped": Mistake(
        domains, "meet", lambda real: lambda low, high: (*real(low, high)[:2], low > high - 0.3)
    ),
    "another image's ball": Mistake(
        domains,
        "ball_of",
        lambda real: lambda root, parts: parts.input or tuple(end[0 * parts.image] for end in root.bounds[0]),
    ),
    "the range of a tree is its smallest": Mistake(
        alone,
        "ranges",
        lambda real: (
            lambda trees, images: [
                (alone.over(tree, tree.low, images, "amin"), alone.over(tree, tree.high, images, "amin"))
                for tree in trees
            ]
        ),
    ),
    "differences of a tree are its smallest": Mistake(
        alone,
        "narrowed",
        lambda real: (
            lambda roots, trees: tuple(
                replace(root, highest=alone.over(tree, tree.highest, len(root.highest), "amin"))
                for root, tree in zip(real(roots, trees), trees, strict=True)
            )
        ),
    ),
    "one half of a tree's split is lost": Mistake(alone, "rebox", after(first_half), HERE),
    "a network whose turn it is not loses its tree": Mistake(
        alone,
        "grow",
        lambda real: (
            lambda root, tree, busy, *rest: (
                (tree[torch.zeros(len(tree.low), dtype=torch.bool)], tree.domains.image[:0])
                if not busy.any()
                else real(root, tree, busy, *rest)
            )
        ),
    ),
    "up and down are exchanged": Mistake(
        alone, "backward", after(lambda found: torch.cat(found.chunk(2, 1)[::-1], 1)), HERE
    ),
    # branch and bound
    "the bound is the smallest leaf": Mistake(search.Leaves, "upper", lambda real: property(smallest_leaf)),
    "closed rows are forgotten": Mistake(
        search, "close", lambda real: lambda leaves, tolerance: replace(real(leaves, tolerance), closed=leaves.closed)
    ),
    "one half of a split is lost": Mistake(search, "rebox", after(first_half), HERE),
    "rows not worth a descent are lost": Mistake(
        search,
        "split",
        lambda real: lambda roots, leaves, chosen: no_rows(leaves, real(roots, leaves, chosen), old=False),
    ),
    "rows that were not split are lost": Mistake(
        search,
        "split",
        lambda real: lambda roots, leaves, chosen: no_rows(leaves, real(roots, leaves, chosen), old=True),
    ),
    "one half of a cut is lost": Mistake(
        search, "halve_rows", lambda real: lambda *given: (half := real(*given)[: len(given[2].value)]).join(half)
    ),
    "a difference is cut at the wrong end": Mistake(
        search, "halve_rows", lambda real: lambda *given: empty_upper_part(real(*given), given[3])
    ),
    "a new reference class keeps the old one's range": Mistake(
        search,
        "refer",
        lambda real: (
            lambda roots, parts, rows, which, to: same_range(rows, real(roots, parts, rows, which, to), which, to)
        ),
    ),
    "the other network's range is narrowed": Mistake(
        search,
        "narrow",
        lambda real: (
            lambda roots, parts, rows, network: replace(
                real(roots, parts, replace(rows, order=1 - rows.order), network), order=rows.order
            )
        ),
    ),
    "what is inherited is another order's": Mistake(
        search, "inherit", before(lambda roots, leaves: (exchanged(roots, "odds"), leaves))
    ),
    "a corner outside the ball is a witness": Mistake(
        search,
        "witness",
        lambda real: lambda pair, leaves, *rest: replace(real(pair, wider(leaves), *rest), reach=leaves.reach),
    ),
    "nothing ever underflows": Mistake(operators, "TINY", lambda real: 0.0),
    "a wide ReLU is flat": Mistake(
        ReLU, "triangle", lambda real: lambda low, high: (high / (high - low) * 1.0, *real(low, high)[1:])
    ),
    "a wide pool is flat": Mistake(
        MaxPool2d,
        "chord",
        lambda real: lambda low, high: (real(low, high)[0], *flat_where_wide(*real(low, high)[1:], high)),
    ),
    "each piece is the first one": Mistake(
        linear,
        "difference_rows",
        lambda real: lambda classes, numbers=None: real(classes, None if numbers is None else numbers - numbers[0]),
    ),
    "the inner ball is rounded outwards": Mistake(
        graph, "inner_ball", lambda real: lambda x, eps, clip=None: (x - eps * (1 + 1e-15), x + eps * (1 + 1e-15))
    ),
    "a witness is never moved": Mistake(
        search,
        "witness",
        lambda real: lambda pair, leaves, *rest: replace(real(pair, leaves, *rest), witnesses=leaves.witnesses),
    ),
    # the ends
    "agreement forgives a small disagreement": Mistake(
        agreement, "only", before(lambda highest, label: (highest - 0.5, label))
    ),
    "agreement confuses winner and rival": Mistake(
        agreement, "only", before(lambda highest, label: (highest.mT, label))
    ),
    "agreement looks at one rival": Mistake(
        agreement,
        "only",
        lambda real: lambda highest, label: (highest < 0).any(1).scatter(1, label[:, None], True).sum(1) > 1,
    ),
    "agreement asks the teacher only": Mistake(
        agreement,
        "keeps",
        lambda real: lambda root, label, asked, nodes: asked if root.q else real(root, label, asked, nodes),
    ),
    "agreement is claimed when the nodes run out": Mistake(
        agreement, "keeps", lambda real: lambda root, label, asked, nodes: asked
    ),
    "what is not finite is certified": Mistake(methods, "of_pair", after(certified)),
    "each method stands alone": Mistake(
        torch.Tensor, "cummin", lambda real: lambda table, _: SimpleNamespace(values=table)
    ),
    "the largest rung but one": Mistake(
        methods,
        "shared",
        after(lambda found: found | ({"rungs": found["rungs"] | {"bab": found["lower"]}} if "lower" in found else {})),
    ),
}


def plant(monkeypatch, owner, name, wrap, where=""):
    """Replace what is called so, also where other modules have imported it."""
    kept = vars(owner).get(name, getattr(owner, name))
    real = getattr(owner, name)
    new = wrap(real)
    monkeypatch.setattr(owner, name, staticmethod(new) if isinstance(kept, staticmethod) else new)
    if not isinstance(owner, type) and not where:
        for module in [module for path, module in sys.modules.items() if path.startswith("faithkd.bounds")]:
            if vars(module).get(name) is real:
                monkeypatch.setattr(module, name, new)


def of_operators():
    """The laws of `test_operators` for every operator."""
    for name, (operator, *_) in test_operators.OPERATORS.items():
        test_operators.test_boxes_and_lines_hold(name)
        test_operators.test_transposes(name)
        if not isinstance(operator, layers.Smooth):
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
