"""Rows of one network by branch and bound: nothing that is reached lies outside, and all is tighter."""

from dataclasses import replace

import pytest
import torch
from pairs import attacked, convolutional, fully_connected, gap, points
from torch import nn

from faithkd.bounds import differences, domains, faithfulness_upper_bound, rows
from faithkd.bounds import graph as net


class Branches(nn.Module):
    """Two ReLUs beside each other, a smooth unit and a residual sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.a(x).relu()
        return self.d((self.b(x).relu() + self.c(x).relu() + x).tanh())


def networks():
    torch.manual_seed(4)
    branches = Branches().double()
    for part in branches.parameters():
        part.data.mul_(2)
    yield "branches", branches, (2,)
    yield "pools", convolutional(3)[0], (1, 4, 4)
    for seed in range(4):
        yield f"dense {seed}", fully_connected(2, 6, 6, 5, 3, seed=seed), (2,)


def roots_of(network, shape, eps=0.6, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(2, *shape, dtype=torch.float64)
    return x, domains.root(net.prepare(network, shape), 0, *net.outer_ball(x, eps))


def outside(root, found, x, eps=0.6):
    """By how much values of points leave the boxes and differences that are found, at most."""
    worst = -1.0
    for n in range(len(x)):
        values = root.network.values(points(x[n : n + 1], eps, 2000))
        for (low, high), z in zip(found.bounds, values, strict=True):
            worst = max(worst, (low[n] - z).max().item(), (z - high[n]).max().item())
        z = values[-1]
        worst = max(worst, ((z[:, None, :] - z[:, :, None]).amax(0) - found.highest[n]).max().item())
    return worst


def decided(root, nodes=200):
    """The root with its differences by trees, those that decide on eq. (11) of the network beside itself."""
    nodes = torch.full((len(root.highest),), nodes)
    cap, both = torch.ones(len(nodes), 2, root.network.classes), [differences.plant(replace(root, q=q)) for q in (0, 1)]
    (trees, _), made = differences.search(both, cap.double(), torch.zeros(len(nodes)), nodes)
    assert ((made > 0) & (made < 4 * nodes)).all()
    return trees.root


@pytest.mark.parametrize(("name", "network", "shape"), list(networks()))
def test_nothing_that_is_reached_lies_outside(name, network, shape):
    x, root = roots_of(network, shape)
    found = decided(first := rows.narrowed(root, 16))
    assert outside(root, found, x) < 1e-12 and found.highest.sum() < first.highest.sum()
    for (low, high), (old_low, old_high) in zip(found.bounds, root.bounds, strict=True):
        assert (low >= old_low).all() and (high <= old_high).all()
    assert (found.highest <= root.highest).all()


def test_rows_of_small_trees_are_nearly_exact():
    """With parts enough every phase is fixed, and what is left is a convex program."""
    network = fully_connected(2, 4, 4, 3, seed=2)
    x, root = roots_of(network, (2,))
    found, place = rows.narrowed(root, 64), root.network.place(root.network.splits[1])
    z = root.network.values(points(x[:1], 0.6))[place]
    loose = (root.bounds[place][0][0] < 0) & (root.bounds[place][1][0] > 0)
    both = (z.amin(0) < 0) & (z.amax(0) > 0)
    for end, reached in ((1, z.amax(0)), (0, z.amin(0))):
        old, new = ((part.bounds[place][end][0] - reached).abs()[loose & both] for part in (root, found))
        assert (new <= 0.5 * old.clamp(min=0.06)).all()


def test_what_was_known_is_kept():
    """Logits and differences are intersected with what was known, here more than any bound could find."""
    _, root = roots_of(fully_connected(2, 6, 6, 5, 3), (2,))
    low, high = root.bounds[-1]
    shrunk = low + 0.3 * (high - low), high - 0.3 * (high - low)
    root = replace(root, bounds=[*root.bounds[:-1], shrunk], highest=0.5 * root.highest.abs())
    found = rows.narrowed(root, 4)
    for (low, high), (known_low, known_high) in zip(found.bounds, root.bounds, strict=True):
        assert (low >= known_low - 1e-12).all() and (high <= known_high + 1e-12).all()
    assert (found.highest <= root.highest).all()


def test_what_is_no_number_never_tightens():
    _, root = roots_of(fully_connected(2, 5, 5, 3), (2,))
    wild = [tuple(end * torch.nan for end in box) if k > 1 else box for k, box in enumerate(root.bounds)]
    each = rows.about(root, *torch.tensor([[0, 0], [0, 1], [2, rows.NONE]]), torch.zeros(2), 0.0)
    values = torch.tensor([[torch.nan, 0.0, 1.0], [3.0, torch.inf, 1.0]])
    assert each.at(values).tolist() == [-torch.inf] * 2 and each.at(values.nan_to_num(5, 7)).tolist() == [4.0, 7.0]
    assert not (rows.narrowed(replace(root, bounds=wild), 4).highest < root.highest - 1e-9).any()


def test_the_ladder_with_rows():
    """Tightness by parts, which repeat: rows close a share of alpha-crown's gap on a fixed pair, best a larger one."""
    teacher, student = fully_connected(4, 8, 8, 8, 3, seed=5), fully_connected(4, 6, 6, 3, seed=6)
    x = torch.randn(2, 4, dtype=torch.float64)
    options = {"jobs": 1, "nodes": 60}
    plain, full = (
        faithfulness_upper_bound(teacher, student, x, 0.8, method="best", parts=parts, **options) for parts in (0, 16)
    )
    assert "rows" not in plain.rungs and list(full.rungs)[2:] == ["alpha-crown", "joint", "rows", "bab"]
    reached = max(attacked(lambda z: gap(teacher, student, z), x[:1], 0.8), full.lower[0].item())
    assert reached <= full.values[0]
    alpha, by_rows = (full.rungs[name] - full.lower for name in ("alpha-crown", "rows"))
    assert (by_rows <= alpha).all() and by_rows.sum() < 0.8 * alpha.sum()
    assert full.values.sum() <= plain.values.sum() + 1e-3
    assert (full.nodes <= 60 + 40).all()
