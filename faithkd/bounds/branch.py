"""Branch and bound on top of the joint rows: the bound of an image is the largest of all its leaves.

A *domain* is a part of an image's ball on which some ReLUs of either network are known to be on or off (`tree`; here
with a column phase.q.k: 1 split and on, -1 split and off, 0 not split). A *row* (`joint`) lives in one domain, and may
itself be cut where its own terms are loose: in the range of m_U or m_L, or of one difference z_j - z_r in L. So the
leaves of an image are rows. They cover every point of the ball, both orders of the networks and every class, whenever
the search is stopped; a leaf at or below the image's lower bound needs no more work.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from faithkd.bounds import apart, joint
from faithkd.bounds.joint import Table, join, log_odds, log_odds_range, near_range, pick
from faithkd.bounds.linear import difference_rows, pull, row_differences
from faithkd.bounds.network import Network
from faithkd.bounds.tree import (
    BOTH,
    Root,
    ball_of,
    halve_domains,
    lines_of,
    logit_size,
    loose_units,
    meet,
    rank_in,
    rebox,
    run,
    whole,
    widest_input,
    with_inputs,
)

ROOT_STEPS = 15  # of descent for the rows of the whole ball
STEPS = 8  # of descent for the rows of a part
WIDTH = 8  # domains of one image that are split at once: the largest ones
ALIVE = 3  # rows of a new domain that are worth a descent: the largest ones
FLOOR = 0.5  # a network whose k has vanished is scored with this share of its leverage
REACH = 2.0  # over how many units of m leverage looks ahead
FIRST = 64  # parts made of an image in the first round; later rounds are half of all so far


@dataclass(frozen=True)
class Leaves:
    """The state of a search: open rows in their domains, and per image the bounds so far, `(N,)`."""

    domains: Table
    rows: Table
    closed: Tensor  # largest bound of a leaf that is finished
    lower: Tensor
    witnesses: Tensor

    @property
    def upper(self) -> Tensor:
        image = self.domains["image"][self.rows["domain"]]
        return self.closed.scatter_reduce(0, image, self.rows["value"], "amax")


def start(
    roots: tuple[Root, Root], middle: Tensor, lower: Tensor, witnesses: Tensor, steps: int = ROOT_STEPS
) -> Leaves:
    """One domain per image, the whole ball, and its 2C rows after their descent: the bound "joint"."""
    domains = whole(roots)
    logits = tuple(run(root.network, middle) for root in roots)
    rows = joint.all_rows(tuple(root.highest for root in roots), tuple(root.odds for root in roots), logits)
    for q, root in enumerate(roots):
        for k in root.relus:
            domains[f"phase.{q}.{k}"] = torch.zeros_like(root.bounds[k][0])
            rows[f"slope.{q}.{k}"] = root.lines[k].below[rows["domain"], 0].float()
            rows[f"push.{q}.{k}"] = torch.zeros_like(rows[f"slope.{q}.{k}"])
    rows = descend(roots, domains, rows, steps)
    rows.pop("x")
    return Leaves(domains, rows, torch.zeros_like(lower), lower, witnesses)


def certify(
    roots: tuple[Root, Root],
    leaves: Leaves,
    tolerance: float,
    nodes: int,
    deadline: float = math.inf,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Leaves, Tensor]:
    """The whole search from `start`, on each network `apart` and on the joint rows by turns: both say what they can.

    What one of them gained in the last round decides on its share of the next one, image by image. Returns the leaves
    and the number of parts made per image. `watch` sees the bounds `(N,)` and these numbers after every round.
    """
    trees, whole_roots = apart.plant(roots), roots
    made = torch.zeros(len(leaves.lower), dtype=torch.long)
    share = torch.full_like(leaves.lower, 0.5)
    while True:
        room = torch.minimum((made / 2).clamp(min=FIRST), nodes - made)
        first, goal = leaves.upper, leaves.lower + tolerance
        soon = time.monotonic() + (deadline - time.monotonic()) / 2
        trees, alone = apart.search(whole_roots, trees, worst_rows(leaves), goal, share * room, soon)
        roots = apart.narrowed(whole_roots, trees)
        leaves = inherit(roots, leaves)
        second = leaves.upper
        leaves, together = search(roots, leaves, tolerance, (1 - share) * room, deadline)
        gains = torch.stack([(first - second) / alone.clamp(min=1), (second - leaves.upper) / together.clamp(min=1)])
        gains = gains**2
        share = (gains[0] / gains.sum(0).clamp(min=1e-24)).clamp(0.05, 0.95)
        made = made + alone + together
        if watch is not None:
            watch(leaves.upper, made)
        if not (alone + together).any() or time.monotonic() > deadline:
            return leaves, made


def worst_rows(leaves: Leaves) -> Tensor:
    """The largest open row of each order and class, `(N, 2, C)`; 0 where all are finished."""
    classes = leaves.rows["w"].shape[1]
    image = leaves.domains["image"][leaves.rows["domain"]]
    place = (image * 2 + leaves.rows["order"]) * classes + leaves.rows["label"]
    worst = torch.zeros(len(leaves.lower) * 2 * classes, dtype=torch.float64)
    return worst.scatter_reduce(0, place, leaves.rows["value"], "amax").view(-1, 2, classes)


def inherit(roots: tuple[Root, Root], leaves: Leaves) -> Leaves:
    """The leaves with what `apart` found on the whole balls: narrower ranges of m and of the differences in L."""
    rows = leaves.rows
    image, label = leaves.domains["image"][rows["domain"]], rows["label"]
    teacher, student = (torch.stack([end[image, label] for end in root.odds], 1) for root in roots)
    first = (rows["order"] == 0)[:, None]
    odds = torch.cat([torch.where(first, teacher, student), torch.where(first, student, teacher)], 1)
    of_lower = torch.where(first.unsqueeze(2), roots[1].highest[image], roots[0].highest[image])
    near = near_range(of_lower, rows["ref"])
    ends = [
        meet(torch.maximum(old[0], new[0]), torch.minimum(old[1], new[1]))[:2]
        for old, new in (
            (rows["range"].T[0:2], odds.T[0:2]),
            (rows["range"].T[2:4], odds.T[2:4]),
            (rows["near"].unbind(1), near.unbind(1)),
        )
    ]
    rows = rows | {"range": torch.stack([*ends[0], *ends[1]], 1), "near": torch.stack(ends[2], 1)}
    return replace(leaves, rows=rows | {"value": torch.minimum(rows["value"], joint.separate(rows))})


def gap(pair: tuple[Network, Network], x: Tensor) -> Tensor:
    """||f_t(x) - f_s(x)||_inf of each image, eq. (8); 0, which is always attained, where logits overflow."""
    confidences = [torch.softmax(run(network, x), 1) for network in pair]
    return (confidences[0] - confidences[1]).abs().amax(1).nan_to_num(0.0)


def descend(roots: tuple[Root, Root], domains: Table, rows: Table, steps: int) -> Table:
    """`joint.tighten` for rows in `domains`."""
    mine = pick(domains, rows["domain"])
    lines = tuple(lines_of(root, mine) for root in roots)
    pair = tuple(root.network for root in roots)
    image = mine["image"]
    rows = joint.tighten(pair, lines, ball_of(roots[0], mine), rows, mine, logit_size(roots, image), steps)
    return rows | {"value": torch.minimum(rows["value"], joint.separate(rows))}


def search(
    roots: tuple[Root, Root],
    leaves: Leaves,
    tolerance: float,
    nodes: Tensor,
    deadline: float = math.inf,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Leaves, Tensor]:
    """Split the largest leaves of each image until bound - lower bound <= tolerance, or `nodes` per image are made.

    Also stops at `deadline` (`time.monotonic`). Every image follows its own leaves only, so that a batch gives what
    each image alone would. Returns the leaves and the nodes made for each image.
    """
    made = torch.zeros(len(leaves.lower), dtype=torch.long)
    pair = tuple(root.network for root in roots)
    while True:
        leaves = close(leaves, tolerance)
        if watch is not None:
            watch(leaves.upper, made)
        busy = made < nodes
        chosen = largest_domains(leaves, busy)
        if not len(chosen) or time.monotonic() > deadline:
            return leaves, made
        leaves, fresh = split(roots, leaves, chosen)
        image = leaves.domains["image"][fresh["domain"]]
        made += torch.bincount(image, minlength=len(made))
        leaves = witness(pair, leaves, inside(fresh.pop("x"), *ball_of(roots[0], {"image": image})), image)
        leaves = replace(leaves, rows=join(leaves.rows, fresh))


def inside(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Points of a ball moved inwards by more than its ends were rounded outwards."""
    middle = (lower + upper) / 2
    return (
        middle
        + (x - middle) * (1 - 1e-12)
        - (x - middle).sign() * torch.minimum((x - middle).abs(), 1e-15 * (1 + x.abs()))
    )


def close(leaves: Leaves, tolerance: float) -> Leaves:
    """Move finished rows from the open ones into `closed`, and forget domains without rows."""
    image = leaves.domains["image"][leaves.rows["domain"]]
    value = leaves.rows["value"]
    done = value <= leaves.lower[image] + tolerance
    closed = leaves.closed.scatter_reduce(0, image[done], value[done], "amax")
    rows = pick(leaves.rows, ~done)
    used, number = rows["domain"].unique(return_inverse=True)
    return Leaves(pick(leaves.domains, used), rows | {"domain": number}, closed, leaves.lower, leaves.witnesses)


def largest_domains(leaves: Leaves, busy: Tensor) -> Tensor:
    """The open domains with the largest rows: at most WIDTH of each busy image."""
    if not len(leaves.rows["value"]):
        return leaves.rows["domain"]
    count = len(leaves.domains["image"])
    value = torch.zeros(count, dtype=torch.float64).scatter_reduce(
        0, leaves.rows["domain"], leaves.rows["value"], "amax"
    )
    image = leaves.domains["image"]
    # a share of a large tree, so that one image alone is worked on in batches too
    width = (torch.bincount(image) // 8).clamp(min=WIDTH)
    return ((rank_in(image, value) < width[image]) & busy[image]).nonzero()[:, 0]


def witness(pair: tuple[Network, Network], leaves: Leaves, x: Tensor, image: Tensor) -> Leaves:
    """Raise the lower bounds where a leaf's worst point `x` is an actual point of larger difference."""
    lower, witnesses = leaves.lower.clone(), leaves.witnesses.clone()
    found = gap(pair, x)
    best = rank_in(image, found) == 0
    better = best & (found > lower[image])
    lower[image[better]], witnesses[image[better]] = found[better], x[better]
    return replace(leaves, lower=lower, witnesses=witnesses)


# what is split: a domain, at a ReLU or in the input; or one row, in its range of m_U, of m_L or of one z_j - z_r in L
DOMAIN, UPPER, LOWER, NEAR, NOTHING = range(5)


def split(roots: tuple[Root, Root], leaves: Leaves, chosen: Tensor) -> tuple[Leaves, Table]:
    """Split each chosen domain, or only its largest row: the other leaves, and the fresh rows with their points `x`."""
    domains, rows = leaves.domains, leaves.rows
    largest = torch.zeros(len(domains["image"]), dtype=torch.bool)
    largest[chosen] = True
    largest = (largest[rows["domain"]] & (rank_in(rows["domain"], rows["value"]) == 0)).nonzero()[:, 0]
    kind, network, layer, unit, at = decide(roots, domains, pick(rows, largest))

    whole = kind == DOMAIN
    if (network[whole] == BOTH).any():
        domains = with_inputs(roots[0], domains)
    halves = halve_domains(pick(domains, rows["domain"][largest[whole]]), network[whole], layer[whole], unit[whole])
    halves, empty = rebox(roots, halves, network[whole].repeat(2), layer[whole].repeat(2))
    decision = torch.full((len(domains["image"]),), -1)
    decision[rows["domain"][largest[whole]]] = torch.arange(int(whole.sum()))
    moves = decision[rows["domain"]] >= 0
    moved = pick(rows, moves)
    first = decision[moved["domain"]]
    moved = join(moved | {"domain": first}, moved | {"domain": first + int(whole.sum())})
    moved = narrow(roots, halves, pick(moved, ~empty[moved["domain"]]), network[whole].repeat(2))
    moved["domain"] = moved["domain"] + len(domains["image"])
    domains = join(domains, halves)

    cut = (kind != DOMAIN) & (kind != NOTHING)
    pieces = halve_rows(roots, domains, pick(rows, largest[cut]), kind[cut], unit[cut], at[cut])
    done = largest[kind == NOTHING]
    closed = leaves.closed.scatter_reduce(0, domains["image"][rows["domain"][done]], rows["value"][done], "amax")
    stays = ~moves
    stays[largest] = False

    lower = leaves.lower[domains["image"][moved["domain"]]]
    worth = (rank_in(moved["domain"], moved["value"]) < ALIVE) & (moved["value"] > lower)
    fresh = descend(roots, domains, join(pick(moved, worth), pieces), STEPS)
    rows = join(pick(rows, stays), pick(moved, ~worth))
    return replace(leaves, domains=domains, rows=rows, closed=closed), fresh


def decide(roots: tuple[Root, Root], domains: Table, rows: Table) -> tuple[Tensor, ...]:
    """What to split for each row: kind, network, layer, unit (the class j for NEAR) and where to cut, five `(B,)`.

    The loosest term at the point where the row's linear form is largest decides.
    """
    mine = pick(domains, rows["domain"])
    reach = leverage(rows["range"]).log()
    far = rows["value"] > apart.NEARLY * joint.separate(rows)
    scored = rows | {"k": torch.where(far[:, None], reach, torch.maximum(rows["k"], reach + math.log(FLOOR)))}
    low, high = ball_of(roots[0], mine)
    logit_rows = joint.forms(scored, logit_size(roots, mine["image"]))[:2]
    lines, traces, forms = [lines_of(root, mine) for root in roots], ({}, {}), []
    for q, root in enumerate(roots):
        slopes, push = joint.layers_of(scored, "slope", q), joint.pushes(scored, mine, q)
        forms.append(pull(root.network, lines[q], logit_rows[q].unsqueeze(1), None, slopes, push, traces[q])[0][:, 0])
    x = torch.where(forms[0] + forms[1] > 0, high, low)
    # an entry of score 0 first: for pairs without any ReLU
    names, scores, loose, ends = [(BOTH, 0, 0)], [x.new_zeros(len(x), 1)], 0.0, []
    for q, root in enumerate(roots):
        gaps, score, logits = loose_units(root, lines[q], joint.layers_of(scored, "slope", q), traces[q], x)
        ends.append(logits)
        for k in gaps:
            loose = loose + gaps[k].sum(1)
            scores.append(score[k])
            names += [(q, k, unit) for unit in range(score[k].shape[1])]
    best, which = torch.cat(scores, 1).max(1)
    network, layer, unit = torch.tensor(names)[which].unbind(1)
    first = (rows["order"] == 0)[:, None]
    terms, at, classes = loose_terms(scored, torch.where(first, *ends), torch.where(first, *ends[::-1]))
    # where all ReLUs are settled the input is split: cuts alone grow ever thinner there and gain ever less
    settled, (coordinate, moves) = ~(best > 0), widest_input(forms, (low, high))
    terms = torch.where(torch.where(settled, moves, far)[:, None], 0.0, terms)
    sizes = torch.cat([torch.where(settled, 0.0, loose)[:, None], terms], 1).nan_to_num(0.0)
    kind = torch.where(settled & ~moves, NOTHING, DOMAIN)
    kind = torch.where(sizes.amax(1) > 1e-9, sizes.argmax(1), kind)
    at = at.gather(1, (kind - 1).clamp(0, 2)[:, None])[:, 0]
    network, layer = network.masked_fill(settled, BOTH), layer.masked_fill(settled, 0)
    return kind, network, layer, torch.where(kind == NEAR, classes, torch.where(settled, coordinate, unit)), at


def leverage(ranges: Tensor) -> Tensor:
    """How much eq. (11) gains per unit by which b_U falls or a_L rises, over the next REACH units: `(B, 2)`."""
    a_upper, b_upper, a_lower, b_lower = ranges.unbind(1)
    ends = torch.stack([torch.maximum(a_upper, b_upper - REACH), a_lower], 1)
    others = torch.stack([b_upper, torch.minimum(b_lower, a_lower + REACH)], 1)
    rise = (torch.sigmoid(others) - torch.sigmoid(ends)) / (others - ends).clamp(min=1e-6)
    return rise.nan_to_num(0.0).clamp(1e-6, 0.25)


def loose_terms(rows: Table, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much the other terms of a row lose at logits `upper` of U and `lower` of L, and where to cut each.

    Returns `(B, 3)` in the order UPPER, LOWER, NEAR, twice, and the class of NEAR `(B,)`.
    """
    k_upper, k_lower = rows["k"].exp().unbind(1)
    a_upper, b_upper, a_lower, b_lower = rows["range"].unbind(1)
    m_upper = clip(log_odds(upper, rows["label"]), a_upper, b_upper)
    m_lower = clip(log_odds(lower, rows["label"]), a_lower, b_lower)
    lost_upper = joint.tangent(k_upper, a_upper, b_upper, 1) - (torch.sigmoid(m_upper) - k_upper * m_upper)
    lost_lower = (torch.sigmoid(m_lower) - k_lower * m_lower) - joint.tangent(k_lower, a_lower, b_lower, -1)

    low, high = rows["near"].unbind(1)
    slope, shift = joint.chords(rows["near"], rows["label"], rows["ref"])
    d = lower - lower.gather(1, rows["ref"][:, None])
    d = clip(d, low, high)
    own = nn.functional.one_hot(rows["label"], d.shape[1]).bool()
    term = d.exp().masked_fill(own, 0.0)
    over = (slope * d + shift - term).masked_fill(own, 0.0).clamp(min=0)
    # a chord so loose that k' has vanished is as bad as the sigmoid's mean slope says
    lost_near = torch.maximum(k_lower, joint.secants(rows["range"])[:, 1]) * torch.log1p(over.sum(1) / term.sum(1))
    worst = over.argmax(1)
    low, high, slope = (part.gather(1, worst[:, None])[:, 0] for part in (low, high, slope))
    margin = 0.05 * (high - low)
    touch = clip(slope.clamp(min=1e-30).log(), low + margin, high - margin)
    at = torch.where((low < -0.1) & (high > 0.1), 0.0, touch)
    cuts = [inner(m_upper, a_upper, b_upper), inner(m_lower, a_lower, b_lower), at]
    return torch.stack([lost_upper, lost_lower, lost_near], 1), torch.stack(cuts, 1), worst


def inner(m: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """m, moved away from the ends of its range: each part keeps at least 15 % of the range of sig(m)."""
    ends = torch.sigmoid(torch.stack([low, high]))
    inside = torch.logit((ends + 0.15 * (ends.flip(0) - ends)).clamp(1e-12, 1 - 1e-12))
    return clip(clip(m, *inside), low, high)


def clip(m: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """m cut to [low, high]."""
    return torch.minimum(torch.maximum(m, low), high)


def narrow(roots: tuple[Root, Root], domains: Table, rows: Table, network: Tensor) -> Table:
    """The rows' ranges from the differences of what was split in their domain, computed anew: one network, or BOTH."""
    rows = dict(rows)
    for q, root in enumerate(roots):
        split = ((network == q) | (network == BOTH))[rows["domain"]]
        used, number = rows["domain"][split].unique(return_inverse=True)
        if not len(used):
            continue
        mine = pick(domains, used)
        bounds = [ball_of(root, mine), tuple(end[mine["image"]] for end in root.bounds[-1])]
        _, pairs = difference_rows(root.network.classes)
        slopes = {k: part[mine["image"]][:, pairs[:, 0], pairs[:, 1]] for k, part in root.row_slopes.items()}
        highest, _ = row_differences(root.network, lines_of(root, mine), bounds, slopes=slopes)
        highest = torch.minimum(highest, root.highest[mine["image"]])
        hit = split.nonzero()[:, 0]
        of_upper = rows["order"][hit] == q
        low, high = log_odds_range(highest[number], rows["label"][hit])
        place = torch.where(of_upper, 0, 2)
        ranges = rows["range"].clone()
        low, high, _ = meet(torch.maximum(ranges[hit, place], low), torch.minimum(ranges[hit, place + 1], high))
        ranges[hit, place], ranges[hit, place + 1] = low, high
        new = near_range(highest[number[~of_upper]], rows["ref"][hit[~of_upper]])
        near, hit = rows["near"].clone(), hit[~of_upper]
        low, high = torch.maximum(near[hit, 0], new[:, 0]), torch.minimum(near[hit, 1], new[:, 1])
        near[hit, 0], near[hit, 1], _ = meet(low, high)
        rows |= {"range": ranges, "near": near}
    return rows | {"value": torch.minimum(rows["value"], joint.separate(rows))}


def halve_rows(roots: tuple[Root, Root], domains: Table, rows: Table, kind: Tensor, unit: Tensor, at: Tensor) -> Table:
    """Both halves of each row: below and above the cut in a range of m, or in one difference z_j - z_r of L."""
    below, above = ({name: column.clone() for name, column in rows.items()} for _ in range(2))
    for place, what in ((0, UPPER), (2, LOWER)):
        hit = (kind == what).nonzero()[:, 0]
        below["range"][hit, place + 1] = at[hit]
        above["range"][hit, place] = at[hit]
    hit = (kind == NEAR).nonzero()[:, 0]
    below["near"][hit, 1, unit[hit]] = at[hit]
    above["near"][hit, 0, unit[hit]] = at[hit]
    switch = hit[at[hit] >= 0]
    above = refer(roots, domains, above, switch, unit[switch])
    halves = join(below, above)
    return halves | {"value": torch.minimum(halves["value"], joint.separate(halves))}


def refer(roots: tuple[Root, Root], domains: Table, rows: Table, which: Tensor, to: Tensor) -> Table:
    """Rows `which` with the reference class `to`: z_j - z_to from z_j - z_r and z_to - z_r, and from the root."""
    mine = pick(rows, which)
    here = torch.arange(len(which))
    image = domains["image"][mine["domain"]]
    first = (mine["order"] == 0)[:, None, None]
    whole = near_range(torch.where(first, roots[1].highest[image], roots[0].highest[image]), to)
    low, high = mine["near"].unbind(1)
    low, high = low - high[here, to][:, None], high - low[here, to][:, None]
    room = joint.ROUNDING * (1 + low.abs() + high.abs())
    low, high, _ = meet(torch.maximum(low - room, whole[:, 0]), torch.minimum(high + room, whole[:, 1]))
    mine["near"] = torch.stack([low, high], 1)
    mine["near"][here, :, to] = 0.0
    mine["ref"], mine["cut"] = to, torch.zeros_like(mine["cut"])
    mine["s"] = joint.middle_sum(mine).log()
    for name in ("near", "ref", "cut", "s"):
        rows[name][which] = mine[name]
    return rows
