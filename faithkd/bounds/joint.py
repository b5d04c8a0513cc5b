"""Teacher and student see the same image: linear forms of both, subtracted before the maximum over the ball is taken.

Let U be the network bounded above and L the one bounded below, teacher and student or exchanged, i a class, z their
logits, and m = z_i - LSE_{j != i} z_j the log-odds of i, so that f^i = sig(m). A *row* is one (U, L, i). For any
weights w in the simplex over j != i with entropy H(w), any reference class r != i and any s, k >= 0 and k' >= 0:

    m_U <= z_i - w . z - H(w)                                                         (a tangent of LSE)
    -m_L <= z_r - z_i + e^-s sum_{j != i} chord_j(z_j - z_r) + s - 1        (chords of exp, a tangent of ln)
    f_U^i - f_L^i <= k m_U - k' m_L + max_[a_U, b_U] (sig(m) - k m) - min_[a_L, b_L] (sig(m) - k' m)

where chord_j is above exp on a certified range of z_j - z_r in L, and [a, b] holds m. Together: one linear form in the
logits of both networks, carried back through both, added on x and maximised over the ball once. All of w, s, k, k', the
slopes below unsettled ReLUs, the lines of curves and the multipliers of constraints are free: found by descent, and
every value is valid. With k = k' = 0 this is eq. (11), in which the two networks may see different images.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.domains import ROUNDING, Domain, Root, Setting, Table, farthest, phased, setting, summed
from faithkd.bounds.linear import Dual, Slopes, with_choices


@dataclass(frozen=True)
class Row(Table):
    """Rows, each in one domain: order (0: U is the teacher), label (i), ref (r), value (the bound so far).

    `range` `(B, 4)`: a_U, b_U, a_L, b_L; `near` `(B, 2, C)`: range of z_j - z_r in L. What is free: `w` `(B, C)` (log-
    weights), `k` `(B, 2)` (ln k, ln k'), `s` `(B,)`, `cut` `(B, C)` (multipliers of `near`), and by network q and ReLU
    node k `slopes[q][k]` and `push[q][k]` `(B, *shape)`: its lower slopes, and the multipliers of the phases that a
    branch has fixed; most of a table, so in float32.
    """

    FREE: ClassVar = ("w", "k", "s", "cut", "slopes", "push")
    domain: Tensor
    order: Tensor
    label: Tensor
    ref: Tensor
    range: Tensor
    near: Tensor
    w: Tensor
    k: Tensor
    s: Tensor
    cut: Tensor
    value: Tensor
    slopes: dict[int, Slopes]
    push: dict[int, Slopes]

    @property
    def first(self) -> Tensor:
        """Whether U is the teacher, `(B, 1)`."""
        return (self.order == 0)[:, None]

    def sorted(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """What is given for teacher and student, `(B, ...)` each, as that of U and that of L."""
        first = self.first.view(-1, *[1] * (teacher.ndim - 1))
        return torch.where(first, teacher, student), torch.where(first, student, teacher)

    def apart(self) -> Tensor:
        """sig(b_U) - sig(a_L): the bound of a row from its ranges alone, eq. (11)."""
        return (torch.sigmoid(self.range[:, 1]) - torch.sigmoid(self.range[:, 2]) + 2.0**-50).clamp(0, 1)

    def capped(self) -> "Row":
        """The rows with values no larger than `apart`."""
        return replace(self, value=torch.minimum(self.value, self.apart()))


def known_ranges(roots: tuple[Root, Root], rows: Row, image: Tensor) -> tuple[Tensor, Tensor]:
    """`range` and `near` of rows on the whole balls of the images `(B,)`."""
    odds = rows.sorted(*(torch.stack([end[image, rows.label] for end in root.odds], 1) for root in roots))
    _, lower = rows.sorted(*(root.highest[image] for root in roots))
    return torch.cat(odds, 1), near_range(lower, rows.ref)


def near_range(highest: Tensor, ref: Tensor) -> Tensor:
    """Range of z_j - z_r for the reference class of each row: `(B, C, C)` to `(B, 2, C)`."""
    here = torch.arange(len(ref))
    return torch.stack([-highest[here, :, ref], highest[here, ref]], 1)


def chords(near: Tensor, label: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and shift of lines above exp(z_j - z_r) on the ranges `near`: two `(B, C)`; 1 for r itself, 0 for i."""
    low, high = near.unbind(1)
    slope = torch.where(high - low > 1e-9, (high.exp() - low.exp()) / (high - low).clamp(min=1e-9), high.exp())
    shift = torch.maximum(low.exp() - slope * low, high.exp() - slope * high)
    shift = shift + ROUNDING * (high.exp() + slope * torch.maximum(low.abs(), high.abs()))
    own, reference = (F.one_hot(which, near.shape[2]).bool() for which in (label, ref))
    slope = slope.masked_fill(own | reference, 0.0)
    return slope, shift.masked_fill(reference, 1.0).masked_fill(own, 0.0)


def tangent(k: Tensor, low: Tensor, high: Tensor, sign: int) -> Tensor:
    """max (sign 1) or min (sign -1) of sig(m) - k m on [low, high].

    It is at an end or where sig(m) = (1 + sign sqrt(1 - 4k)) / 2, clipped to the range.
    """
    root = ((1 + sign * (1 - 4 * k).clamp(min=0).sqrt()) / 2).clamp(1e-12, 1 - 1e-12)
    inside = torch.minimum(torch.maximum(torch.logit(root).detach(), low), high)
    values = torch.stack([torch.sigmoid(m) - k * m for m in (low, high, inside)])
    return values.amax(0) if sign > 0 else values.amin(0)


def weights(rows: Row) -> tuple[Tensor, Tensor]:
    """w and its entropy H(w): `(B, C)` with 0 at the row's own class, and `(B,)`."""
    own = F.one_hot(rows.label, rows.w.shape[1]).bool()
    logs = rows.w.masked_fill(own, -math.inf).log_softmax(1)
    return logs.exp(), -(logs.exp() * logs.masked_fill(own, 0.0)).sum(1)


def forms(rows: Row, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row as linear forms on the teacher's and the student's logits, two `(B, C)`, and a constant `(B,)`.

    `size` `(B,)`: no logit of either network is larger; the rounding of all that happens here is in the constant.
    """
    classes = rows.w.shape[1]
    k_upper, k_lower = rows.k.exp().unbind(1)
    own, ref = (F.one_hot(which, classes).to(rows.w) for which in (rows.label, rows.ref))
    w, entropy = weights(rows)
    upper = k_upper[:, None] * (own - w)
    slope, shift = (part * (-rows.s).exp()[:, None] for part in chords(rows.near, rows.label, rows.ref))
    lower = k_lower[:, None] * (ref - own + slope - ref * slope.sum(1, keepdim=True))
    # what is >= 0 on the domain may be added: c (high - d) or c (d - low) for d = z_j - z_r in [low, high] and c >= 0
    cut = rows.cut * rows.k.exp().mean(1, keepdim=True)
    lower = lower - cut + ref * cut.sum(1, keepdim=True)
    constant = torch.maximum(cut * rows.near[:, 0], cut * rows.near[:, 1]).sum(1)
    constant = constant - k_upper * entropy + k_lower * (shift.sum(1) + rows.s - 1)
    a_upper, b_upper, a_lower, b_lower = rows.range.unbind(1)
    constant = constant + tangent(k_upper, a_upper, b_upper, 1) - tangent(k_lower, a_lower, b_lower, -1)
    terms = upper.abs().sum(1) + lower.abs().sum(1) + k_upper + k_lower * (1 + shift.sum(1)) + cut.abs().sum(1)
    constant = constant + ROUNDING * (1 + terms) * (1 + size + rows.s.abs() + rows.near.abs().amax((1, 2)))
    return *rows.sorted(upper, lower), constant


def dual(rows: Row, domains: Domain, q: int) -> Dual:
    """The rows' slopes and multipliers for network q, see `phased`; `domains`: that of each row."""
    scale = rows.k.exp().mean(1)  # multipliers are kept relative to the size of the row
    push = {k: part * scale.view(-1, *[1] * (part.ndim - 1)) for k, part in rows.push[q].items()}
    return phased(rows.slopes[q], push, domains.phases[q], like=rows.k)


def bound(at: Setting, rows: Row) -> tuple[Tensor, Tensor]:
    """Upper bound of each row, `(B,)`, and its linear form on x, `(B, *image)`."""
    *logit_rows, constant = forms(rows, at.size)
    return summed(at, logit_rows, [dual(rows, at.domains, q) for q in (0, 1)], constant)


def tighten(roots: tuple[Root, Root], domains: Domain, rows: Row, steps: int) -> tuple[Row, Tensor]:
    """The rows with the smallest bound met on `steps` of descent over all that is free, and the points that attain it.

    Such a point is the corner of the ball at which the row's linear form is largest. `domains`: those that rows name.
    """
    at = setting(roots, domains[rows.domain])
    rough = at.rough()
    rows = rows.descended(lambda tried: bound(rough, tried)[0], steps)
    value, form = bound(at, rows)
    return replace(rows, value=torch.minimum(value, rows.value)).capped(), farthest(at, form)


def all_rows(roots: tuple[Root, Root], logits: tuple[Tensor, Tensor]) -> Row:
    """The 2C rows of each image before any descent: from what is known of both networks on its whole ball.

    `logits` `(N, C)`: at the middle of the ball, where the first tangents touch.
    """
    images, classes = logits[0].shape
    image, order, label = torch.cartesian_prod(*(torch.arange(size) for size in (images, 2, classes))).unbind(1)
    nothing = torch.zeros(len(image), dtype=torch.float64)
    slopes = {
        root.q: {k: root.lines[k].start[image, 0].float() for k in with_choices(root.network, root.lines)}
        for root in roots
    }
    push = {root.q: {k: torch.zeros_like(slopes[root.q][k]) for k in root.network.splits} for root in roots}
    rows = Row(image, order, label, label, *[nothing] * 7, slopes, push)
    at_upper, at_lower = rows.sorted(*(part[image] for part in logits))
    ref = at_lower.masked_fill(F.one_hot(label, classes).bool(), -math.inf).argmax(1)
    rows = replace(rows, ref=ref, w=at_upper)
    ranges, near = known_ranges(roots, rows, image)
    rows = replace(rows, range=ranges, near=near, k=secants(ranges).log())
    rows = replace(rows, s=middle_sum(rows).log(), cut=torch.zeros_like(at_upper))
    return replace(rows, value=rows.apart())


def secants(ranges: Tensor) -> Tensor:
    """Mean slope of sig over the ranges of m_U and m_L: `(B, 4)` to `(B, 2)`."""
    low, high = ranges[:, 0::2], ranges[:, 1::2]
    rise = torch.sigmoid(high) - torch.sigmoid(low)
    return (rise / (high - low).clamp(min=1e-6)).nan_to_num(0.0).clamp(1e-4, 0.25)


def middle_sum(rows: Row) -> Tensor:
    """The sum of chords in the middle of their ranges: e^s starts there."""
    slope, shift = chords(rows.near, rows.label, rows.ref)
    return (slope * rows.near.mean(1) + shift).sum(1).nan_to_num(1.0).clamp(1e-3, 1e30)
