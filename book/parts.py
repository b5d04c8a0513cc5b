"""Branch and bound by hand, on the square of notebook 09's two drawn networks: every part, and its bound.

A part is a polygon, its corners (V, 2); a function that is linear on it has its extremes there.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from faithkd import evaluation

CUTS = 30

# The teacher and the student of notebook 09, two inputs, two hidden units, two classes: W1, b1, W2, b2.
DRAWN = {
    "RT": [[[2, 1], [1, 2]], [0, 0], [[-2, 2], [-1, -1]], [1, -1]],
    "SD": [[[1.5, 1.5], [1.5, 2]], [0.5, -0.5], [[-2, 2.5], [-1, -1]], [1, -1]],
}


def drawn(name: str) -> nn.Sequential:
    """One of the networks in DRAWN."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    for parameter, value in zip(net.parameters(), DRAWN[name], strict=True):
        parameter.data = torch.tensor(value, dtype=torch.float64)
    return net.requires_grad_(False)


def outwards(bound: float) -> float:
    """An upper bound with four digits, never lower than it was."""
    return min(1.0, math.ceil(1e4 * bound) / 1e4)


def sig(m: float) -> float:
    return 1 / (1 + math.exp(-m))


def lines(net: nn.Sequential, part: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What lies below and above d = z₂ − z₁ at the corners of a part, (V,) each, for every choice of slopes λ ∈ {0, 1}.

    Below and above are linear on the part, so their extremes lie at its corners. A unit that does not change sign there
    is linear itself; the others have the chord above, and λ z below.
    """
    z = net[0](part)
    low, high = z.amin(0), z.amax(0)
    open_ = (low < 0) & (high > 0)
    row = net[2].weight[1] - net[2].weight[0]
    constant = net[2].bias[1] - net[2].bias[0]
    chord = torch.where(open_, high * (z - low) / (high - low), z * (low >= 0))
    choices = itertools.product(*((0.0, 1.0) if unit else (None,) for unit in open_))
    found = []
    for choice in choices:
        slope = torch.tensor([float(low[k] >= 0) if value is None else value for k, value in enumerate(choice)])
        line = slope * z
        found.append(
            (
                constant + torch.where(row >= 0, line, chord) @ row,
                constant + torch.where(row >= 0, chord, line) @ row,
            )
        )
    return found


def hump(upper: tuple, lower: tuple, D: float) -> float:
    """Largest sig(m_U) − sig(m_L) with m_U and m_L in their ranges and m_U − m_L ≤ D (notebook 13)."""
    m = min(lower[1], max(min(-D / 2, upper[1] - D), lower[0], upper[0] - D))
    return max(0.0, sig(min(upper[1], m + D)) - sig(m))


def bound(nets: tuple, part: Tensor) -> float:
    """Upper bound of |f_t − f_s| on a part: the pair's lines are subtracted at the same x before they are maximised."""
    teacher, student = (lines(net, part) for net in nets)
    ranges = [
        (max(float(below.min()) for below, _ in each), min(float(above.max()) for _, above in each))
        for each in (teacher, student)
    ]
    worst = 0.0
    for first, second, up, down in ((teacher, student, *ranges), (student, teacher, *ranges[::-1])):
        D = min(float((above - below).max()) for (_, above), (below, _) in itertools.product(first, second))
        worst = max(worst, hump(up, down, D))
    return worst + 1e-9  # more than float64 can have rounded away


def difference(nets: tuple, points: Tensor) -> Tensor:
    """|f_t − f_s| at points (N, 2), which counts as a lower bound."""
    return evaluation.confidence_difference(*nets, points)


def halves(part: Tensor, value: Tensor) -> list[Tensor]:
    """The two polygons into which the line where a linear function is 0 cuts a part; `value` (V,) at its corners."""
    both = []
    for side in (value, -value):
        corners = []
        for k in range(len(part)):
            after = (k + 1) % len(part)
            if side[k] >= 0:
                corners.append(part[k])
            if side[k] * side[after] < 0:
                corners.append(part[k] + side[k] / (side[k] - side[after]) * (part[after] - part[k]))
        both.append(torch.stack(corners))
    return both


def cuts(nets: tuple, part: Tensor) -> dict[str, Tensor]:
    """Where a part can be cut: along a ReLU that bends in it; where none does, through the middle of a range of d."""
    found = {}
    for who, net in zip(("teacher", "student"), nets, strict=True):
        z = net[0](part)
        for unit in range(2):
            if z[:, unit].min() < -1e-9 and z[:, unit].max() > 1e-9:
                found[f"the {who}’s unit {unit + 1}"] = z[:, unit]
    if found:
        return found
    for who, net in zip(("teacher", "student"), nets, strict=True):
        logits = net(part)
        d = logits[:, 1] - logits[:, 0]
        if d.max() - d.min() > 1e-6:
            found[f"the {who}’s d, halved"] = d - (d.max() + d.min()) / 2
    return found


def search() -> dict:
    """Every part of a search in which the largest is always cut next, by the cut that helps most."""
    nets = drawn("RT"), drawn("SD")
    square = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    made, leaves, steps, best = [square], {0: bound(nets, square)}, [], float(difference(nets, square).max())
    values, lowers = dict(leaves), [best]
    for _ in range(CUTS):
        widest = max(leaves, key=leaves.get)
        offers = {name: halves(made[widest], value) for name, value in cuts(nets, made[widest]).items()}
        name, pair = min(offers.items(), key=lambda offer: max(bound(nets, half) for half in offer[1]))
        del leaves[widest]
        for half in pair:
            leaves[len(made)] = values[len(made)] = min(values[widest], bound(nets, half))
            made.append(half)
            best = max(best, float(difference(nets, torch.cat([half, half.mean(0, keepdim=True)])).max()))
        steps.append({"cut": widest, "where": name})
        lowers.append(best)
    return {
        "polygons": [part.numpy().round(4).tolist() for part in made],
        "bounds": [outwards(values[k]) for k in range(len(made))],
        "lowers": [math.floor(1e4 * low) / 1e4 for low in lowers],
        "steps": steps,
    }
