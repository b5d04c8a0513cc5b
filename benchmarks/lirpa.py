"""auto_LiRPA, the library behind the alpha,beta-CROWN verifier, as a peer. Installed by hand, see README.md here.

Per network, its C(C-1) logit differences as rows by CROWN or with its optimised slopes ("CROWN-Optimized", the
library's own number of steps). It computes in float32 and does not round outwards. Needs torch alone, so that it also
works in an environment of its own: `python -m benchmarks.lirpa FILE` answers what `kinds` has written to the file.
"""

import contextlib
import io
import sys
import time
import warnings
from importlib import metadata

import torch
from torch import Tensor, nn

METHODS = {"lirpa-crown": "CROWN", "lirpa-optimised": "CROWN-Optimized"}


def differences(network: nn.Module, low: Tensor, high: Tensor, name: str) -> Tensor:
    """Largest z_j - z_i of one network on boxes `(N, *shape)`, `(N, C, C)` at (i, j), without the library's messages.

    Raises RuntimeError where its optimiser would stand still: torch.clamp must have a gradient at its very ends.
    """
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(ends.clamp(0, 1).sum(), ends)
    if "optimised" in name and not (gradient == 1).all():
        raise RuntimeError(
            f"{name}: auto_LiRPA's slopes start at 0 and 1 and never move with torch {torch.__version__}, in which "
            "clamp has no gradient at its ends; it asks for torch < 2.9"
        )
    low, high = low.float(), high.float()
    unit = torch.eye(network.float()(low[:1]).shape[1])
    i, j = (1 - unit).nonzero(as_tuple=True)
    rows = (unit[j] - unit[i]).expand(len(low), -1, -1)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses parts of torch that are deprecated
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

        options = {"conv_mode": "matrix"}  # its default, "patches", refuses to optimise through max-pooling
        bounded = BoundedModule(network.eval(), torch.empty_like(low), options, device="cpu")
        ball = PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
        images = BoundedTensor((low + high) / 2, ball)
        _, upper = bounded.compute_bounds(x=(images,), method=METHODS[name], C=rows, bound_lower=False)
    highest = torch.zeros(len(low), *unit.shape, dtype=torch.float64)
    highest[:, i, j] = upper.detach().double()
    return highest


def timed(function, *arguments) -> tuple:
    """What a function returns, and the processor seconds that it takes; or None, and why it fails."""
    begin = time.process_time()
    try:
        return function(*arguments), time.process_time() - begin
    except Exception as failure:  # what a peer cannot is a result
        return None, f"{type(failure).__name__}: {failure}"


def one_by_one(network: nn.Module, low: Tensor, high: Tensor, name: str) -> Tensor:
    """`differences`, an image at a time: of some networks it takes no batch."""
    return torch.cat([differences(network, *ends, name) for ends in zip(low.split(1), high.split(1), strict=True)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    questions = torch.load(sys.argv[1])
    for network, low, high, name in questions[:1]:
        timed(differences, network, low, high, name)  # loads whatever is loaded on first use
    answers = [timed(differences, *question) for question in questions]
    for place, (found, _) in enumerate(answers):
        if found is None:
            answers[place] = timed(one_by_one, *questions[place])
    torch.save((metadata.version("auto_LiRPA"), answers), sys.argv[1])
