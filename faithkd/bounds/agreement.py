"""Certified distillation agreement, Defs 1 and 3: on which balls both networks provably predict the same class.

Here nothing is gained from the shared input. Let ties count as disagreement, so that the rule by which they are broken
does not matter. Then teacher and student agree on a ball if and only if both keep one and the same class on all of it.
For if they agree, just one class has the largest logit at each point of the ball, the same in both. Where that is class
i is open in the ball, for each i, and no two of these parts meet; as a ball is connected, one of them is all of it.
So each network is asked by itself.
"""

import torch
from torch import Tensor

from faithkd.bounds import alone
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

    By branch and bound where that is `asked` `(N,)`: parts where i is least ahead are split, until `nodes` are made.
    """
    tree = alone.plant(root)
    made, busy = torch.zeros(len(label), dtype=torch.long), asked
    while True:
        tree = tree[~only(tree.highest, label[tree.domains.image])]
        left = torch.bincount(tree.domains.image, minlength=len(label))
        busy = busy & (left > 0) & (made < nodes)
        if not busy.any():
            return asked & (left == 0)
        tree, image = alone.grow(root, tree, busy, torch.zeros_like(busy), label)
        fresh = torch.bincount(image, minlength=len(label))
        made, busy = made + fresh, busy & (fresh > 0)


def only(highest: Tensor, label: Tensor) -> Tensor:
    """Whether every class but `label` always has another one above it, from the largest z_j - z_i `(D, C, C)`: `(D,)`.

    A class has the largest logit at every point; it is none of those.
    """
    below = (highest < 0).any(1)
    return below.scatter(1, label[:, None], True).all(1)
