"""auto_LiRPA, the library behind the alpha,beta-CROWN verifier, as a peer. Installed by hand, see README.md here.

Per network, its C(C-1) logit differences as rows by CROWN or with its optimised slopes ("CROWN-Optimized", the
library's own number of steps), then eqs (10) and (11) as for our own bounds. It computes in float32 and does not round
outwards.
"""

import contextlib
import io
import warnings

import torch
from torch import Tensor, nn

from faithkd.bounds import interval_bound, softmax_interval
from faithkd.core.attacks import ball
from faithkd.errors import FaithkdError

with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # uses parts of torch that are deprecated


def upper_bound(name: str, teacher: nn.Sequential, student: nn.Sequential, x: Tensor, eps: float, clip=None) -> Tensor:
    """One of the two ways by its name in the benchmark: images `(N, *shape)` to `(N,)`.

    Raises FaithkdError where its optimiser would stand still: torch.clamp must have a gradient at its very ends.
    """
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(ends.clamp(0, 1).sum(), ends)
    if "optimised" in name and not (gradient == 1).all():
        raise FaithkdError(
            f"{name}: auto_LiRPA's slopes start at 0 and 1 and never move with torch {torch.__version__}, in which "
            "clamp has no gradient at its ends; it asks for torch < 2.9"
        )
    method = "CROWN-Optimized" if "optimised" in name else "CROWN"
    highest = (differences(network, x, eps, clip, method) for network in (teacher, student))
    return interval_bound(*map(softmax_interval, highest))


def differences(network: nn.Module, x: Tensor, eps: float, clip, method: str) -> Tensor:
    """Largest z_j - z_i of one network, `(N, C, C)` at (i, j), eq. (9), without the library's messages."""
    unit = torch.eye(network(x[:1]).shape[1])
    i, j = (1 - unit).nonzero(as_tuple=True)
    rows = (unit[j] - unit[i]).expand(len(x), -1, -1)
    low, high = (end.float() for end in ball(x.double(), eps, clip))
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        options = {"conv_mode": "matrix"}  # its default, "patches", refuses to optimise through max-pooling
        bounded = BoundedModule(network.float().eval(), torch.empty_like(low), options, device="cpu")
        images = BoundedTensor(x.float(), PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high))
        _, upper = bounded.compute_bounds(x=(images,), method=method, C=rows, bound_lower=False)
    highest = torch.zeros(len(x), *unit.shape, dtype=torch.float64)
    highest[:, i, j] = upper.detach().double()
    return highest
