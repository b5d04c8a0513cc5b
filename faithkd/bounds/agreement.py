"""Certified distillation agreement, Defs 1 and 3: on which balls both networks provably predict the same class.

Here nothing is gained from the shared input. Let ties count as disagreement, so that the rule by which they are broken
does not matter. Then teacher and student agree on a ball if and only if both keep one and the same class on all of it.
For if they agree, just one class has the largest logit at each point of the ball, the same in both. Where that is class
i is open in the ball, for each i, and no two of these parts meet; as a ball is connected, one of them is all of it.
So each network is asked by itself.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.bounds import rows as trees
from faithkd.bounds.differences import first_parts
from faithkd.bounds.domains import Root

NODES = 256  # parts of a ball, per network, after which nothing is claimed


def agrees(roots: tuple[Root, Root], nodes: int = NODES, asked: Tensor | bool = True) -> Tensor:
    """Whether c_t(x') = c_s(x') on the ball, certified, where that is `asked` `(N,)`: `(N,)`. False says nothing."""
    low, high = roots[0].bounds[0]
    teacher, student = (root.network((low + high) / 2).argmax(1) for root in roots)
    holds = asked & (teacher == student)
    for root in roots:
        holds = keeps(root, teacher, holds, nodes)
    return holds


def keeps(root: Root, label: Tensor, asked: Tensor, nodes: int = NODES) -> Tensor:
    """Whether class i = `label` alone has the largest logit on the ball, certified: max_{j != i} z_j < z_i, `(N,)`.

    By branch and bound where that is `asked` `(N,)`, on the differences z_j - z_i that may reach 0, until `nodes` parts
    are made of a ball, or one of its differences does.
    """
    own = F.one_hot(label, root.network.classes).bool()
    ahead = root.highest[torch.arange(len(label)), label] < 0
    image, rival = (asked[:, None] & ~own & ~ahead).nonzero().unbind(1)
    never = torch.full((len(image),), -torch.inf, dtype=torch.float64)
    rows = trees.about(root, image, rival, label[image], never, -torch.finfo(torch.float64).tiny)
    parts = first_parts(root, image, label[image], rival)
    while True:
        rows, parts = trees.finished(rows, parts)
        reached = (~(torch.maximum(rows.low, rows.closed) < 0)).to(rows.made)
        lost = torch.zeros_like(label).index_add(0, image, reached) > 0
        made = torch.zeros_like(label).index_add(0, image, rows.made)
        chosen = trees.largest(rows, parts, (~lost & (made < nodes))[image])
        if not chosen.any():
            left = torch.zeros_like(label).index_add(0, image[parts.row], torch.ones_like(parts.row))
            return asked & ~lost & (left == 0)
        rows, parts = trees.grow(root, rows, parts, chosen)
