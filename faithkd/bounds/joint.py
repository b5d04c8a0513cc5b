"""Teacher and student see the same image: linear forms of both, subtracted before the maximum over the ball is taken.

Let U be the network bounded above and L the one bounded below, teacher and student or exchanged, i a class, z their
logits, and m = z_i - LSE_{j != i} z_j the log-odds of i, so that f^i = sig(m). A *row* is one (U, L, i). For any
weights w in the simplex over j != i with entropy H(w), any reference class r != i and any s, k >= 0 and k' >= 0:

    m_U <= z_i - w . z - H(w)                                                         (a tangent of LSE)
    -m_L <= z_r - z_i + e^-s sum_{j != i} chord_j(z_j - z_r) + s - 1        (chords of exp, a tangent of ln)
    f_U^i - f_L^i <= k m_U - k' m_L + max_[a_U, b_U] (sig(m) - k m) - min_[a_L, b_L] (sig(m) - k' m)

where chord_j is above exp on a certified range of z_j - z_r in L, and [a, b] holds m. Together: one linear form in the
logits of both networks, carried back through both, added on x and maximised over the ball once. All of w, s, k, k', the
slopes below unsettled ReLUs and the multipliers of constraints are free: they are found by descent, and every value is
valid. With k = k' = 0 this is eq. (11), in which the two networks may see different images.

A table of rows is a dictionary of columns, one entry per row:
    domain, order (0: U is the teacher), label (i), ref (r), value (the bound so far)
    range `(B, 4)`: a_U, b_U, a_L, b_L;   near `(B, 2, C)`: range of z_j - z_r in L
    w `(B, C)` (log-weights), k `(B, 2)` (ln k, ln k'), s `(B,)`, cut `(B, C)` (multipliers of `near`)
    slope.q.k and push.q.k `(B, *shape)`: of ReLU layer k of network q (0: teacher): its lower slopes, and
    the multipliers of the phases that a branch has fixed; most of a table, so in float32
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.linear import Adam, Box, Lines, keep_better, over_ball, pull
from faithkd.bounds.network import Network, single

Table = dict[str, Tensor]
RATES = {"w": 0.25, "k": 0.25, "s": 0.25, "cut": 0.05, "slope": 0.25, "push": 0.05}
FALL = 0.9
ROUNDING = 2.0**-44  # hundreds of times what the few operations on a row's coefficients can be off by


def pick(table: Table, index: Tensor) -> Table:
    """The entries of a table at `index`, a mask or numbers."""
    return {name: column[index] for name, column in table.items()}


def join(*tables: Table) -> Table:
    """Tables one below the other."""
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


def log_odds(logits: Tensor, label: Tensor) -> Tensor:
    """m = z_i - LSE_{j != i} z_j for the class i = `label` of each row of logits `(B, C)`."""
    own = F.one_hot(label, logits.shape[1]).bool()
    return logits.gather(1, label[:, None])[:, 0] - logits.masked_fill(own, -math.inf).logsumexp(1)


def log_odds_range(highest: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Range of m for class i from the largest z_j - z_i, `(B, C, C)` at (i, j): two `(B,)`, rounded outwards."""
    here = torch.arange(len(label))
    own = F.one_hot(label, highest.shape[1]).bool()
    up, down = highest[here, label], highest[here, :, label]  # z_j - z_i <= up, z_i - z_j <= down
    low = -up.masked_fill(own, -math.inf).logsumexp(1)
    high = -(-down).masked_fill(own, -math.inf).logsumexp(1)
    return low - ROUNDING * (1 + low.abs()), high + ROUNDING * (1 + high.abs())


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


def weights(rows: Table) -> tuple[Tensor, Tensor]:
    """w and its entropy H(w): `(B, C)` with 0 at the row's own class, and `(B,)`."""
    own = F.one_hot(rows["label"], rows["w"].shape[1]).bool()
    logs = rows["w"].masked_fill(own, -math.inf).log_softmax(1)
    return logs.exp(), -(logs.exp() * logs.masked_fill(own, 0.0)).sum(1)


def forms(rows: Table, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row as linear forms on the teacher's and the student's logits, two `(B, C)`, and a constant `(B,)`.

    `size` `(B,)`: no logit of either network is larger; the rounding of all that happens here is in the constant.
    """
    classes = rows["w"].shape[1]
    k_upper, k_lower = rows["k"].exp().unbind(1)
    own, ref = (F.one_hot(rows[name], classes).to(rows["w"]) for name in ("label", "ref"))
    w, entropy = weights(rows)
    upper = k_upper[:, None] * (own - w)
    slope, shift = (part * (-rows["s"]).exp()[:, None] for part in chords(rows["near"], rows["label"], rows["ref"]))
    lower = k_lower[:, None] * (ref - own + slope - ref * slope.sum(1, keepdim=True))
    # what is >= 0 on the domain may be added: c (high - d) or c (d - low) for d = z_j - z_r in [low, high] and c >= 0
    cut = rows["cut"] * rows["k"].exp().mean(1, keepdim=True)
    lower = lower - cut + ref * cut.sum(1, keepdim=True)
    constant = torch.maximum(cut * rows["near"][:, 0], cut * rows["near"][:, 1]).sum(1)
    constant = constant - k_upper * entropy + k_lower * (shift.sum(1) + rows["s"] - 1)
    a_upper, b_upper, a_lower, b_lower = rows["range"].unbind(1)
    constant = constant + tangent(k_upper, a_upper, b_upper, 1) - tangent(k_lower, a_lower, b_lower, -1)
    terms = upper.abs().sum(1) + lower.abs().sum(1) + k_upper + k_lower * (1 + shift.sum(1)) + cut.abs().sum(1)
    constant = constant + ROUNDING * (1 + terms) * (1 + size + rows["s"].abs() + rows["near"].abs().amax((1, 2)))
    first = (rows["order"] == 0)[:, None]
    return torch.where(first, upper, lower), torch.where(first, lower, upper), constant


def layers_of(rows: Table, kind: str, q: int) -> dict[int, Tensor]:
    """The columns `kind`.q.k of a table by layer k, `(B, 1, *shape)`."""
    found = {}
    for name, column in rows.items():
        what, _, place = name.partition(".")
        if what == kind and place.startswith(f"{q}."):
            found[int(place.partition(".")[2])] = column.unsqueeze(1)
    return found


def pushes(rows: Table, phases: Table, q: int) -> dict[int, Tensor]:
    """What the fixed phases of network q add to its rows: multiplier times z >= 0, or times -z where z <= 0."""
    found = layers_of(rows, "push", q)
    if not found:
        return {}
    scale = rows["k"].exp().mean(1)  # multipliers are kept relative to the size of the row
    signs = layers_of(phases, "phase", q)
    return {k: push * signs[k] * scale.view(-1, *[1] * (push.ndim - 1)) for k, push in found.items()}


def bound(
    pair: tuple[Network, Network],
    lines: tuple[list[Lines], ...],
    box: Box,
    rows: Table,
    phases: Table,
    size: Tensor,
) -> tuple[Tensor, Tensor]:
    """Upper bound of each row, `(B,)`, and its linear form on x, `(B, *image)`. All arguments are per row."""
    *logit_rows, constant = forms(rows, size)
    form, total = 0.0, constant[:, None]
    for q, (network, line, row) in enumerate(zip(pair, lines, logit_rows, strict=True)):
        pulled, shift = pull(
            network, line, row.unsqueeze(1), slopes=layers_of(rows, "slope", q), push=pushes(rows, phases, q)
        )
        form, total = form + pulled, total + shift
    return over_ball(form, total, *box)[:, 0], form[:, 0].detach()


def separate(rows: Table) -> Tensor:
    """sig(b_U) - sig(a_L): the bound of a row from its ranges alone, eq. (11)."""
    return (torch.sigmoid(rows["range"][:, 1]) - torch.sigmoid(rows["range"][:, 2]) + 2.0**-50).clamp(0, 1)


def tighten(
    pair: tuple[Network, Network],
    lines: tuple[list[Lines], ...],
    box: Box,
    rows: Table,
    phases: Table,
    size: Tensor,
    steps: int,
) -> Table:
    """The rows with the smallest bound met on `steps` of descent over all that is free, and the point that attains it.

    The new column `x` holds the corner of the ball at which the row's linear form is largest.
    """
    free = {name: column.float() for name, column in rows.items() if name.partition(".")[0] in RATES}
    rough = {name: column.float() if column.is_floating_point() else column for name, column in rows.items()}
    rough_phases = {name: column.float() for name, column in phases.items() if name.startswith("phase")}
    rough_pair = tuple(single(network) for network in pair)
    rough_lines = tuple([None if line is None else line.rough() for line in part] for part in lines)
    rough_box = tuple(end.float() for end in box)
    value = torch.full(rows["value"].shape, math.inf)
    kept = {name: column.clone() for name, column in free.items()}
    adam = Adam(list(free.values()))
    for step in range(steps + 1):
        for part in free.values():
            part.requires_grad_(step < steps)
        with torch.enable_grad():
            found, _ = bound(rough_pair, rough_lines, rough_box, rough | free, rough_phases, size.float())
            if step < steps:
                gradients = torch.autograd.grad(found[found.isfinite()].sum(), list(free.values()))
        value = keep_better(value, found.detach(), kept, free)
        if step < steps:
            rates = [RATES[name.partition(".")[0]] * FALL**step for name in free]
            adam.step([part.nan_to_num(0.0) for part in gradients], rates)
            project(free)
    exact = rows | {name: part.double() for name, part in kept.items()}
    value, form = bound(pair, lines, box, exact, phases, size)
    rows = rows | {name: part.to(rows[name]) for name, part in kept.items()}
    return rows | {"value": torch.minimum(value, rows["value"]), "x": torch.where(form > 0, box[1], box[0])}


def project(free: Table) -> None:
    """Back to what is allowed, in place: slopes in [0, 1], multipliers of phases >= 0, k neither 0 nor huge."""
    for name, part in free.items():
        kind = name.partition(".")[0]
        part.detach_()
        if kind == "slope":
            part.clamp_(0, 1)
        elif kind == "push":
            part.clamp_(min=0)
        elif kind == "k":
            part.clamp_(-12, 2)


def all_rows(highest: tuple[Tensor, Tensor], odds: tuple[Box, Box], logits: tuple[Tensor, Tensor]) -> Table:
    """The 2C rows of each image before any descent: from the certified differences `(N, C, C)` of both networks and the
    ranges of all their log-odds, `(N, C)` twice.

    `logits` `(N, C)`: at the middle of the ball, where the first tangents touch. `branch` adds the columns of slopes.
    """
    images, classes = logits[0].shape
    image, order, label = torch.cartesian_prod(*(torch.arange(size) for size in (images, 2, classes))).unbind(1)
    first = (order == 0)[:, None]
    at_upper, at_lower = (torch.where(first, logits[q][image], logits[1 - q][image]) for q in (0, 1))
    first = first.unsqueeze(2)
    of_lower = torch.where(first, highest[1][image], highest[0][image])
    ref = at_lower.masked_fill(F.one_hot(label, classes).bool(), -math.inf).argmax(1)
    teacher, student = (torch.stack([end[image, label] for end in ends], 1) for ends in odds)
    first = first[:, :, 0]
    ranges = torch.cat([torch.where(first, teacher, student), torch.where(first, student, teacher)], 1)
    rows = {"domain": image, "order": order, "label": label, "ref": ref, "range": ranges}
    rows |= {"near": near_range(of_lower, ref), "w": at_upper, "k": secants(ranges).log()}
    rows |= {"s": middle_sum(rows).log(), "cut": torch.zeros_like(at_upper)}
    return rows | {"value": separate(rows)}


def secants(ranges: Tensor) -> Tensor:
    """Mean slope of sig over the ranges of m_U and m_L: `(B, 4)` to `(B, 2)`."""
    low, high = ranges[:, 0::2], ranges[:, 1::2]
    rise = torch.sigmoid(high) - torch.sigmoid(low)
    return (rise / (high - low).clamp(min=1e-6)).nan_to_num(0.0).clamp(1e-4, 0.25)


def middle_sum(rows: Table) -> Tensor:
    """The sum of chords in the middle of their ranges: e^s starts there."""
    slope, shift = chords(rows["near"], rows["label"], rows["ref"])
    return (slope * rows["near"].mean(1) + shift).sum(1).nan_to_num(1.0).clamp(1e-3, 1e30)
