"""From bounds on logit differences to bounds on softmax components, eq. (10), and on the pair, eq. (11).

`highest[..., i, j]` is always an upper bound of z_j - z_i, so `-highest[..., j, i]` is a lower bound.
"""

import math

import torch
from torch import Tensor


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


def class_bounds(teacher: Tensor, student: Tensor) -> Tensor:
    """Largest f_t^i - f_s^i and f_s^i - f_t^i of each class i, two `(..., C, C)` to `(..., 2, C)`, eq. (11)."""
    teacher_lower, teacher_upper = softmax_interval(teacher)
    student_lower, student_upper = softmax_interval(student)
    return torch.stack([teacher_upper - student_lower, student_upper - teacher_lower], -2)


def pair_bound(teacher: Tensor, student: Tensor) -> Tensor:
    """Upper bound of ||f_t(x) - f_s(x)||_inf over the ball, two `(N, C, C)` to `(N,)` in [0, 1], eq. (11)."""
    gap = class_bounds(teacher, student).amax((-2, -1))
    unknown = (teacher.isnan() | student.isnan()).flatten(-2).any(-1)
    return (gap + 2.0**-52).masked_fill(unknown, 1.0).clamp(0, 1)
