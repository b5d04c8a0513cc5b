"""Branch and bound on top of the joint rows: the bound of an image is the largest of all its leaves.

A *domain* is a part of an image's ball on which some ReLUs of either network are known to be on or off (`domains`). A
*row* (`joint`) lives in one domain, and may itself be cut where its own terms are loose: in the range of m_U or m_L, or
of one difference z_j - z_r in L. So the leaves of an image are rows. They cover every point of the ball, both orders of
the networks and every class, whenever the search is stopped; a leaf at or below the image's lower bound needs no more
work.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds import differences, joint
from faithkd.bounds.domains import (
    BOTH,
    ROUNDING,
    Domain,
    Root,
    Splits,
    Table,
    ball_of,
    full,
    halve,
    lines_of,
    log_odds,
    log_odds_range,
    loosest,
    meet,
    rank_in,
    rebox,
    setting,
    whole,
    with_inputs,
)
from faithkd.bounds.graph import Network
from faithkd.bounds.joint import Row, near_range
from faithkd.bounds.linear import difference_pairs, row_differences
from faithkd.bounds.operators import Box

ROOT_STEPS = 15  # of descent for the rows of the whole ball
STEPS = 12  # of descent for the rows of a part
WIDTH = 16  # domains of one image that are split at once: the largest ones
ALIVE = 3  # rows of a new domain that are worth a descent: the largest ones
FLOOR = 0.5  # a network whose k has vanished is scored with this share of its leverage
REACH = 2.0  # over how many units of m leverage looks ahead
FIRST = 64  # parts made of an image in the first round; later rounds are half of all so far
COST = 4  # a part of both networks takes as long as so many for the differences of one


@dataclass(frozen=True)
class Leaves:
    """The state of a search: open rows in their domains, and per image the bounds so far, `(N,)`."""

    domains: Domain
    rows: Row
    closed: Tensor  # largest bound of a leaf that is finished
    lower: Tensor
    witnesses: Tensor
    reach: Box  # where witnesses may lie, `graph.inner_ball`

    @property
    def upper(self) -> Tensor:
        return self.closed.scatter_reduce(0, self.image, self.rows.value, "amax")

    @property
    def image(self) -> Tensor:
        """The image of each row."""
        return self.domains.image[self.rows.domain]


def start(
    roots: tuple[Root, Root],
    reach: Box,
    lower: Tensor,
    witnesses: Tensor,
    known: Tensor | float = 1.0,
    steps: int = ROOT_STEPS,
) -> Leaves:
    """One domain per image, the whole ball, and its 2C rows, at most as `known`, after a descent: the bound "joint"."""
    rows = joint.all_rows(roots, tuple(root.network(sum(root.bounds[0]) / 2) for root in roots))
    domains = whole(roots)
    rows, _ = joint.tighten(roots, domains, rows, steps)
    rows = replace(rows, value=rows.value.clamp(max=known))
    return Leaves(domains, rows, torch.zeros_like(lower), lower, witnesses, reach)


def certify(
    roots: tuple[Root, Root],
    leaves: Leaves,
    tolerance: float,
    nodes: int,
    deadline: float = math.inf,
) -> tuple[Leaves, Tensor]:
    """The whole search from `start`, on `differences` of each network and on the joint rows by turns.

    Both say what they can. What one of both gained in the last round decides on its share of the next one, image by
    image. Returns the leaves and the number of parts made per image.
    """
    trees = [differences.plant(root) for root in roots]
    made = torch.zeros(len(leaves.lower), dtype=torch.long)
    share = torch.full_like(leaves.lower, 0.5)
    while True:
        room = torch.minimum((made / 2).clamp(min=FIRST), nodes - made)
        first, goal = leaves.upper, leaves.lower + tolerance
        soon = time.monotonic() + (deadline - time.monotonic()) / 2
        trees, first_made = differences.search(trees, worst_rows(leaves), goal, share * room, soon)
        known = tuple(each.root for each in trees)
        leaves = inherit(known, leaves)
        second = leaves.upper
        leaves, then_made = search_jointly(known, leaves, tolerance, (1 - share) * room, deadline)
        gains = (first - second) / first_made.clamp(min=1), (second - leaves.upper) / then_made.clamp(min=1) / COST
        gains = torch.stack(gains) ** 2
        share = (gains[0] / gains.sum(0).clamp(min=1e-24)).clamp(0.05, 0.95)
        made = made + first_made + then_made
        if not (first_made + then_made).any() or time.monotonic() > deadline:
            return leaves, made


def worst_rows(leaves: Leaves) -> Tensor:
    """The largest open row of each order and class, `(N, 2, C)`; 0 where all are finished."""
    rows, classes = leaves.rows, leaves.rows.w.shape[1]
    place = (leaves.image * 2 + rows.order) * classes + rows.label
    worst = torch.zeros(len(leaves.lower) * 2 * classes, dtype=torch.float64)
    return worst.scatter_reduce(0, place, rows.value, "amax").view(-1, 2, classes)


def inherit(roots: tuple[Root, Root], leaves: Leaves) -> Leaves:
    """The leaves with what `differences` found on the whole balls: narrower ranges of m and of the differences in L."""
    rows = leaves.rows
    known, near = joint.known_ranges(roots, rows, leaves.image)
    pairs = zip(rows.range.split(2, 1), known.split(2, 1), strict=True)
    ranges = torch.stack([end for old, new in pairs for end in intersected(old, new)], 1)
    rows = replace(rows, range=ranges, near=torch.stack(intersected(rows.near, near), 1))
    return replace(leaves, rows=rows.capped())


def intersected(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of the intersection of ranges `(B, 2, ...)`."""
    return meet(torch.maximum(old[:, 0], new[:, 0]), torch.minimum(old[:, 1], new[:, 1]))[:2]


def gap(pair: tuple[Network, Network], x: Tensor) -> Tensor:
    """||f_t(x) - f_s(x)||_inf of each image, eq. (8); 0, which is always attained, where logits overflow."""
    confidences = [torch.softmax(network(x), 1) for network in pair]
    return (confidences[0] - confidences[1]).abs().amax(1).nan_to_num(0.0)


def search_jointly(
    roots: tuple[Root, Root], leaves: Leaves, tolerance: float, nodes: Tensor, deadline: float = math.inf
) -> tuple[Leaves, Tensor]:
    """Split the largest leaves of each image until bound - lower bound <= tolerance, or `nodes` per image are made.

    Also stops where an image's leaves fill their ROOM, and at `deadline` (`time.monotonic`). Every image follows its
    own leaves only, so that a batch gives what each image alone would. Returns the leaves and the nodes made for each.
    """
    made = torch.zeros(len(leaves.lower), dtype=torch.long)
    pair = tuple(root.network for root in roots)
    while True:
        leaves = close(leaves, tolerance)
        large = full(leaves.domains.image, len(made), leaves.domains) | full(leaves.image, len(made), leaves.rows)
        busy = (made < nodes) & ~large
        chosen = largest_domains(leaves, busy)
        if not len(chosen) or time.monotonic() > deadline:
            return leaves, made
        leaves, fresh, x = split(roots, leaves, chosen)
        image = leaves.domains.image[fresh.domain]
        made += torch.bincount(image, minlength=len(made))
        leaves = witness(pair, leaves, x, image)
        leaves = replace(leaves, rows=leaves.rows.join(fresh))


def close(leaves: Leaves, tolerance: float) -> Leaves:
    """Move finished rows from the open ones into `closed`, and forget domains without rows."""
    image, value = leaves.image, leaves.rows.value
    done = value <= leaves.lower[image] + tolerance
    closed = leaves.closed.scatter_reduce(0, image[done], value[done], "amax")
    rows = leaves.rows[~done]
    used, number = rows.domain.unique(return_inverse=True)
    return replace(leaves, domains=leaves.domains[used], rows=replace(rows, domain=number), closed=closed)


def largest_domains(leaves: Leaves, busy: Tensor) -> Tensor:
    """The open domains with the largest rows: at most WIDTH of each busy image."""
    rows, image = leaves.rows, leaves.domains.image
    if not len(rows.value):
        return rows.domain
    value = rows.value.new_zeros(len(image)).scatter_reduce(0, rows.domain, rows.value, "amax")
    # a share of a large tree, so that one image alone is worked on in batches too
    width = (torch.bincount(image) // 8).clamp(min=WIDTH)
    return ((rank_in(image, value) < width[image]) & busy[image]).nonzero()[:, 0]


def witness(pair: tuple[Network, Network], leaves: Leaves, x: Tensor, image: Tensor) -> Leaves:
    """Raise the lower bounds where a leaf's worst point `x` is an actual point of larger difference."""
    lower, witnesses = leaves.lower.clone(), leaves.witnesses.clone()
    x = torch.clamp(x, *(end[image] for end in leaves.reach))  # a leaf's ends are rounded outwards
    found = gap(pair, x)
    best = rank_in(image, found) == 0
    better = best & (found > lower[image])
    lower[image[better]], witnesses[image[better]] = found[better], x[better]
    return replace(leaves, lower=lower, witnesses=witnesses)


# what is split: a domain, at a ReLU or in the input; or one row, in its range of m_U, of m_L or of one z_j - z_r in L
DOMAIN, UPPER, LOWER, NEAR, NOTHING = range(5)


@dataclass(frozen=True)
class Decision(Table):
    """What to split for each row, `(B,)`: a DOMAIN where, or the row itself `at` what, for NEAR of class `label`."""

    kind: Tensor
    splits: Splits
    label: Tensor
    at: Tensor


def split(roots: tuple[Root, Root], leaves: Leaves, chosen: Tensor) -> tuple[Leaves, Row, Tensor]:
    """Split each chosen domain, or only its largest row: the other leaves, fresh rows, and where these are worst."""
    domains, rows = leaves.domains, leaves.rows
    largest = torch.zeros(len(domains.image), dtype=torch.bool)
    largest[chosen] = True
    largest = (largest[rows.domain] & (rank_in(rows.domain, rows.value) == 0)).nonzero()[:, 0]
    found = decide(roots, domains, rows[largest])

    whole = found.kind == DOMAIN
    count, splits, parents = int(whole.sum()), found.splits[whole], rows.domain[largest[whole]]
    if (splits.network == BOTH).any():
        domains = with_inputs(roots[0], domains)
    halves, both = halve(domains[parents], splits), splits.join(splits)
    empty = rebox(roots, halves, both)
    number = torch.full((len(domains.image),), -1)
    number[parents] = torch.arange(count)
    moves = number[rows.domain] >= 0
    moved = rows[moves]
    first = replace(moved, domain=number[moved.domain])
    moved = first.join(replace(first, domain=first.domain + count))
    moved = narrow(roots, halves, moved[~empty[moved.domain]], both.network)
    moved = replace(moved, domain=moved.domain + len(domains.image))
    domains = domains.join(halves)

    cut = (found.kind != DOMAIN) & (found.kind != NOTHING)
    pieces = halve_rows(roots, domains, rows[largest[cut]], found[cut])
    done = rows[largest[found.kind == NOTHING]]
    closed = leaves.closed.scatter_reduce(0, domains.image[done.domain], done.value, "amax")
    stays = ~moves
    stays[largest] = False

    lower = leaves.lower[domains.image[moved.domain]]
    worth = (rank_in(moved.domain, moved.value) < ALIVE) & (moved.value > lower)
    fresh, x = joint.tighten(roots, domains, moved[worth].join(pieces), STEPS)
    return replace(leaves, domains=domains, rows=rows[stays].join(moved[~worth]), closed=closed), fresh, x


def decide(roots: tuple[Root, Root], domains: Domain, rows: Row) -> Decision:
    """What to split for each row: the loosest term at the point where the row's linear form is largest decides."""
    at = setting(roots, domains[rows.domain])
    reach = leverage(rows.range).log()
    far = rows.value > differences.NEARLY * rows.apart()
    scored = replace(rows, k=torch.where(far[:, None], reach, torch.maximum(rows.k, reach + math.log(FLOOR))))
    logit_rows = joint.forms(scored, at.size)[:2]
    duals = [joint.dual(scored, at.domains, root.q) for root in roots]
    place = loosest(roots, at, logit_rows, duals)
    terms, cuts, label = loose_terms(scored, *rows.sorted(*place.logits))
    # where all ReLUs are settled the input is split: cuts alone grow ever thinner there and gain ever less
    terms = torch.where(torch.where(place.settled, place.moves, far)[:, None], 0.0, terms)
    sizes = torch.cat([torch.where(place.settled, 0.0, place.loss)[:, None], terms], 1).nan_to_num(0.0)
    kind = torch.where(place.settled & ~place.moves, NOTHING, DOMAIN)
    kind = torch.where(sizes.amax(1) > 1e-9, sizes.argmax(1), kind)
    return Decision(kind, place.splits, label, cuts.gather(1, (kind - 1).clamp(0, 2)[:, None])[:, 0])


def leverage(ranges: Tensor) -> Tensor:
    """How much eq. (11) gains per unit by which b_U falls or a_L rises, over the next REACH units: `(B, 2)`."""
    a_upper, b_upper, a_lower, b_lower = ranges.unbind(1)
    ends = torch.stack([torch.maximum(a_upper, b_upper - REACH), a_lower], 1)
    others = torch.stack([b_upper, torch.minimum(b_lower, a_lower + REACH)], 1)
    rise = (torch.sigmoid(others) - torch.sigmoid(ends)) / (others - ends).clamp(min=1e-6)
    return rise.nan_to_num(0.0).clamp(1e-6, 0.25)


def loose_terms(rows: Row, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much the other terms of a row lose at logits `upper` of U and `lower` of L, and where to cut each.

    Returns `(B, 3)` in the order UPPER, LOWER, NEAR, twice, and the class of NEAR `(B,)`.
    """
    k_upper, k_lower = rows.k.exp().unbind(1)
    a_upper, b_upper, a_lower, b_lower = rows.range.unbind(1)
    m_upper = torch.clamp(log_odds(upper, rows.label), a_upper, b_upper)
    m_lower = torch.clamp(log_odds(lower, rows.label), a_lower, b_lower)
    lost_upper = joint.tangent(k_upper, a_upper, b_upper, 1) - (torch.sigmoid(m_upper) - k_upper * m_upper)
    lost_lower = (torch.sigmoid(m_lower) - k_lower * m_lower) - joint.tangent(k_lower, a_lower, b_lower, -1)

    low, high = rows.near.unbind(1)
    slope, shift = joint.chords(rows.near, rows.label, rows.ref)
    d = lower - lower.gather(1, rows.ref[:, None])
    d = torch.clamp(d, low, high)
    own = F.one_hot(rows.label, d.shape[1]).bool()
    term = d.exp().masked_fill(own, 0.0)
    over = (slope * d + shift - term).masked_fill(own, 0.0).clamp(min=0)
    # a chord so loose that k' has vanished is as bad as the sigmoid's mean slope says
    lost_near = torch.maximum(k_lower, joint.secants(rows.range)[:, 1]) * torch.log1p(over.sum(1) / term.sum(1))
    worst = over.argmax(1)
    low, high, slope = (part.gather(1, worst[:, None])[:, 0] for part in (low, high, slope))
    margin = 0.05 * (high - low)
    touch = torch.clamp(slope.clamp(min=1e-30).log(), low + margin, high - margin)
    at = torch.where((low < -0.1) & (high > 0.1), 0.0, touch)
    cuts = [inner(m_upper, a_upper, b_upper), inner(m_lower, a_lower, b_lower), at]
    return torch.stack([lost_upper, lost_lower, lost_near], 1), torch.stack(cuts, 1), worst


def inner(m: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """m, moved away from the ends of its range: each part keeps at least 15 % of the range of sig(m)."""
    ends = torch.sigmoid(torch.stack([low, high]))
    inside = torch.logit((ends + 0.15 * (ends.flip(0) - ends)).clamp(1e-12, 1 - 1e-12))
    return torch.clamp(torch.clamp(m, *inside), low, high)


def narrow(roots: tuple[Root, Root], domains: Domain, rows: Row, network: Tensor) -> Row:
    """The rows' ranges from the differences of what was split in their domain, computed anew: one network, or BOTH."""
    ranges, near = rows.range.clone(), rows.near.clone()
    for q, root in enumerate(roots):
        hit = ((network == q) | (network == BOTH))[rows.domain].nonzero()[:, 0]
        used, number = rows.domain[hit].unique(return_inverse=True)
        if not len(used):
            continue
        highest = differences_in(root, domains[used])[number]
        of_upper = rows.order[hit] == q
        place = torch.where(of_upper, 0, 2)
        low, high = log_odds_range(highest, rows.label[hit])
        old = torch.stack([ranges[hit, place], ranges[hit, place + 1]], 1)
        ranges[hit, place], ranges[hit, place + 1] = intersected(old, torch.stack([low, high], 1))
        new, hit = near_range(highest[~of_upper], rows.ref[hit[~of_upper]]), hit[~of_upper]
        near[hit] = torch.stack(intersected(near[hit], new), 1)
    return replace(rows, range=ranges, near=near).capped()


def differences_in(root: Root, domains: Domain) -> Tensor:
    """Largest z_j - z_i of one network in each domain, `(D, C, C)`, with the slopes of the whole ball."""
    image, pairs = domains.image, difference_pairs(root.network.classes)
    bounds = [ball_of(root, domains), tuple(end[image] for end in root.bounds[-1])]
    slopes = {k: part[image][:, pairs[:, 0], pairs[:, 1]] for k, part in root.row_slopes.items()}
    highest, _ = row_differences(root.network, lines_of(root, domains), bounds, slopes=slopes)
    return torch.minimum(highest, root.highest[image])


def halve_rows(roots: tuple[Root, Root], domains: Domain, rows: Row, found: Decision) -> Row:
    """Both halves of each row: below and above the cut in a range of m, or in one difference z_j - z_r of L."""
    below, above = (replace(rows, range=rows.range.clone(), near=rows.near.clone()) for _ in range(2))
    for place, what in ((0, UPPER), (2, LOWER)):
        hit = (found.kind == what).nonzero()[:, 0]
        below.range[hit, place + 1] = found.at[hit]
        above.range[hit, place] = found.at[hit]
    hit = (found.kind == NEAR).nonzero()[:, 0]
    below.near[hit, 1, found.label[hit]] = found.at[hit]
    above.near[hit, 0, found.label[hit]] = found.at[hit]
    switch = hit[found.at[hit] >= 0]
    return below.join(refer(roots, domains, above, switch, found.label[switch])).capped()


def refer(roots: tuple[Root, Root], domains: Domain, rows: Row, which: Tensor, to: Tensor) -> Row:
    """Rows `which` with the reference class `to`: z_j - z_to from z_j - z_r and z_to - z_r, and from the root."""
    mine, here = replace(rows[which], ref=to), torch.arange(len(which))
    _, known = joint.known_ranges(roots, mine, domains.image[mine.domain])
    low, high = mine.near.unbind(1)
    low, high = low - high[here, to][:, None], high - low[here, to][:, None]
    room = ROUNDING * (1 + low.abs() + high.abs())
    near = torch.stack(intersected(torch.stack([low - room, high + room], 1), known), 1)
    near[here, :, to] = 0.0
    mine = replace(mine, near=near, cut=torch.zeros_like(mine.cut))
    mine = replace(mine, s=joint.middle_sum(mine).log())
    columns = {name: getattr(rows, name).clone() for name in ("near", "ref", "cut", "s")}
    for name, column in columns.items():
        column[which] = getattr(mine, name)
    return replace(rows, **columns)
