"""auto_LiRPA, the library behind the alpha,beta-CROWN verifier, as a peer. Installed by hand, see README.md here.

Two ways, each with CROWN and with its optimised slopes ("CROWN-Optimized", the library's own number of steps):
per network, its 90 logit differences as rows, then eqs (10) and (11) as for our own bounds; and directly on the
function softmax(g_t(x)) - softmax(g_s(x)), which is what one would try first. It computes in float32 and does not
round outwards.
"""

import contextlib
import io
import warnings

import torch
from torch import Tensor, nn

from faithkd.bounds.graph import check_images, outer_ball
from faithkd.bounds.linear import as_matrix, difference_rows
from faithkd.bounds.softmax import pair_bound

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")  # it uses parts of torch that newer versions call deprecated
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

# Its default for convolutions, "patches", refuses to optimise through max-pooling and names this mode instead.
OPTIONS = {"conv_mode": "matrix"}


class Difference(nn.Module):
    """softmax(g_t(x)) - softmax(g_s(x)), `(N, C)`, the function whose largest absolute value is delta*."""

    def __init__(self, teacher: nn.Module, student: nn.Module):
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.teacher(x), 1) - torch.softmax(self.student(x), 1)


def per_network(
    teacher: nn.Sequential, student: nn.Sequential, x: Tensor, eps: float, clip=None, *, method: str
) -> Tensor:
    """FaithUB with bounds of z_j - z_i by auto_LiRPA: images `(N, *shape)` to `(N,)`."""
    rows, pairs = difference_rows(10 if not len(x) else teacher(x[:1]).shape[1])
    rows = rows.float().expand(len(x), -1, -1)
    highest = []
    for network in (teacher, student):
        _, upper = bounds(network, x, eps, clip, method, C=rows, bound_lower=False)
        highest.append(as_matrix(upper.double(), pairs, rows.shape[2]))
    return pair_bound(*highest)


def direct(teacher: nn.Sequential, student: nn.Sequential, x: Tensor, eps: float, clip=None, *, method: str) -> Tensor:
    """The larger of |lower| and |upper| of softmax(g_t) - softmax(g_s), at most 1: `(N,)`."""
    lower, upper = bounds(Difference(teacher, student), x, eps, clip, method)
    return torch.maximum(-lower, upper).amax(1).double().nan_to_num(1.0).clamp(max=1)


def bounds(network: nn.Module, x: Tensor, eps: float, clip, method: str, **options) -> tuple[Tensor, Tensor]:
    """compute_bounds of one module over the ball, without the library's messages."""
    low, high = (end.float() for end in outer_ball(check_images(x), eps, clip))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        bounded = BoundedModule(network.float().eval(), torch.empty_like(low), OPTIONS, device="cpu")
        images = BoundedTensor(x.float(), PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high))
        found = bounded.compute_bounds(x=(images,), method=method, **options)
    return tuple(None if end is None else end.detach() for end in found)
