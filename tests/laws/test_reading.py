"""Modules of any kind are read as the functions that they are, and what cannot be read is an error that says where."""

import pytest
import torch
from pairs import gap, points
from torch import nn
from torch.nn import functional as F

from faithkd.bounds import faithfulness_upper_bound, graph
from faithkd.errors import FaithkdError


class Residual(nn.Module):
    """Constants, batch normalisation, leaky ReLU, a sum, tanh, a mean and a view, in a function of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.drop, self.last = nn.BatchNorm2d(3), nn.Dropout(), nn.Linear(12, 3)
        self.norm.running_mean.uniform_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        h = F.leaky_relu(self.norm(self.first((x - 0.1) / 0.5)), 0.1)
        h = torch.relu(self.second(h)) + h
        return self.last(self.drop(F.avg_pool2d(torch.tanh(h), 2).view(len(x), -1)))


def test_a_residual_network_is_its_function_and_its_bounds_hold():
    teacher, student = Residual(), nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Sigmoid(), nn.Linear(6, 3))
    x = torch.randn(2, 1, 4, 4)
    network = graph.prepare(teacher, (1, 4, 4))
    assert teacher.training and teacher.last.weight.dtype == torch.float32
    exact = teacher.eval().double(), student.double()
    torch.testing.assert_close(network(x.double()), exact[0](x.double()).detach(), rtol=0, atol=1e-12)
    for eps in (0.0, 0.2):
        before = torch.ones(2, dtype=torch.float64)
        for method in ("interval", "crown", "alpha-crown", "lp", "joint", "bab"):
            found = faithfulness_upper_bound(*exact, x, eps, method=method, nodes=12).values
            for n in range(2):
                assert gap(*exact, points(x[n : n + 1], eps)).max() <= found[n] + 1e-12
            assert (found <= before).all() or method == "joint"
            before = found


class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), "layer 1: there is no bound for gelu"),
        (nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Softmax(1))), "layer 1.0: there is no bound for softmax"),
        (nn.Sequential(Mixing(3, 2)), "layer 0: mean mixes the images"),
    ],
)
def test_what_cannot_be_read_says_where(network, message):
    with pytest.raises(FaithkdError, match=message):
        graph.prepare(network, (3,))
