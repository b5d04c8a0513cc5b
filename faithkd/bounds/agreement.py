"""Certified distillation agreement, Defs 1 and 3: on which balls both networks provably predict the same class."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds.joint import Table, tighten
from faithkd.bounds.tree import Root, ball_of, lines_of, logit_size, whole

STEPS = 20  # of descent on each pair of classes that the networks' own differences leave open


def agrees(roots: tuple[Root, Root], steps: int = STEPS) -> Tensor:
    """Whether no point of the ball has c_t(x') != c_s(x'), certified: `(N,)`. False says nothing.

    The teacher predicts i and the student j != i somewhere only if t_i >= t_k and s_j >= s_k there for all k. So the
    pair is ruled out where for some weights w, v in the simplex and some mix in [0, 1]

        max over the ball of   mix (t_i - w . t) + (1 - mix) (s_j - v . s)   < 0,

    one linear form in both networks' logits, which see the same x'. Ties count as disagreement, so the rule by which
    they are broken does not matter.
    """
    teacher, student = ((root.highest < 0).any(1) for root in roots)  # [n, i]: some class is always above i
    open_ = ~teacher.unsqueeze(2) & ~student.unsqueeze(1) & ~torch.eye(teacher.shape[1], dtype=torch.bool)
    image, i, j = open_.nonzero().unbind(1)
    if len(image):
        rows = tighten(*problem(roots, image, i, j), steps, forms)
        open_[image, i, j] = ~(rows["value"] < 0)
    return ~open_.flatten(1).any(1)


def problem(roots: tuple[Root, Root], image: Tensor, i: Tensor, j: Tensor) -> tuple:
    """The arguments of `joint.tighten` for one row per pair of classes: networks, lines, ball, rows, domains, size."""
    domains = {name: column[image] for name, column in whole(roots).items()}
    lines = tuple(lines_of(root, domains) for root in roots)
    # the other's class is the natural rival: without it nothing would be gained from the shared input
    classes = roots[0].network.classes
    rows = {"i": i, "j": j, "mix": torch.zeros(len(image), dtype=torch.float64)}
    rows |= {"w": 4.0 * F.one_hot(j, classes).double(), "v": 4.0 * F.one_hot(i, classes).double()}
    rows |= {"value": torch.full((len(image),), math.inf, dtype=torch.float64)}
    for root in roots:
        for k in root.relus:
            rows[f"slope.{root.q}.{k}"] = root.lines[k].below[image, 0]
    pair = tuple(root.network for root in roots)
    return pair, lines, ball_of(roots[0], image), rows, domains, logit_size(roots, image)


def forms(rows: Table, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row as linear forms on the teacher's and the student's logits, two `(B, C)`, and a constant for rounding."""
    mix = torch.sigmoid(rows["mix"])[:, None]
    parts = []
    for own, weights, share in ((rows["i"], rows["w"], mix), (rows["j"], rows["v"], 1 - mix)):
        own = F.one_hot(own, weights.shape[1]).bool()
        others = weights.masked_fill(own, -math.inf).softmax(1)
        parts.append(share * (own.to(weights) - others))
    return *parts, 2.0**-44 * (1 + size)
