"""From bounds on logit differences to bounds on softmax components, eq. (10), and on the pair, eq. (11).

`highest[..., i, j]` is always an upper bound of z_j - z_i, so `-highest[..., j, i]` is a lower bound.
"""

import math

import torch
from torch import Tensor

Interval = tuple[Tensor, Tensor]


def softmax_interval(highest: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of each softmax component over a box of logit differences, eq. (10).

    `highest`: `(..., C, C)`. Returns lower and upper `(..., C)` in [0, 1]; NaN gives the trivial 0 and 1.
    Written as sigmoid(-log-sum-exp): no overflow for any input, and no guard in a denominator that would
    spoil the bound.
    """
    classes = highest.shape[-1]
    own = torch.eye(classes, dtype=torch.bool)
    lowest = -highest.transpose(-1, -2)
    lower = torch.sigmoid(-highest.masked_fill(own, -math.inf).logsumexp(-1))
    upper = torch.sigmoid(-lowest.masked_fill(own, -math.inf).logsumexp(-1))
    # p(1 - p)|d| < 1/4 for any d, so the rounding of d, exp and log moves p by a few ulps per class at most
    slack = (classes + 16) * 2.0**-52
    return (lower - slack).nan_to_num(0.0).clamp(0, 1), (upper + slack).nan_to_num(1.0).clamp(0, 1)


def class_bounds(teacher: Interval, student: Interval) -> Tensor:
    """Largest f_t^i - f_s^i and f_s^i - f_t^i of each class i, `(..., 2, C)`, eq. (11), from `softmax_interval`."""
    return torch.stack([teacher[1] - student[0], student[1] - teacher[0]], -2)


def pair_bound(teacher: Tensor, student: Tensor) -> Tensor:
    """Upper bound of ||f_t(x) - f_s(x)||_inf over the ball, two `(N, C, C)` to `(N,)` in [0, 1], eq. (11)."""
    unknown = (teacher.isnan() | student.isnan()).flatten(-2).any(-1)
    return interval_bound(softmax_interval(teacher), softmax_interval(student)).masked_fill(unknown, 1.0)


def interval_bound(teacher: Interval, student: Interval) -> Tensor:
    """`pair_bound` from what is known of each network by itself, its `softmax_interval`: `(N,)` in [0, 1], eq. (11)."""
    gap = class_bounds(teacher, student).amax((-2, -1))
    return (gap + 2.0**-52).nan_to_num(1.0).clamp(0, 1)
