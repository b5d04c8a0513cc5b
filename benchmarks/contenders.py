"""Who takes part: our own methods as faithkd.bounds lists them, and the peers they are measured against.

Each contender is made by `load`, in the process that measures it, and is then a function
bound(teacher, student, x, eps, clip) -> values `(N,)`.
"""

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from faithkd.bounds import METHODS, faithfulness_upper_bound
from faithkd.errors import FaithkdError

LIRPA_PIN = (2, 9)  # auto_LiRPA 0.7.1 asks for a torch below this one
INSTALL_LIRPA = (
    "auto_LiRPA is not installed, so it is left out; install it by hand (benchmarks/README.md says into what) from "
    "https://github.com/Verified-Intelligence/auto_LiRPA"
)


class UnavailableError(FaithkdError):
    """A contender that cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """`what` it is in a table; `peer`: somebody else's method; `slow`: measured on few images and once only;
    `anytime`: takes a budget in seconds an image."""

    what: str
    peer: bool = False
    slow: bool = False
    anytime: bool = False


CONTENDERS = {
    "interval": Contender("interval arithmetic"),
    "crown": Contender("linear bounds (CROWN), per network"),
    "alpha-crown": Contender("optimised slopes, per network"),
    "joint": Contender("shared input, optimised"),
    "bab": Contender("branch and bound", anytime=True),
    "best": Contender("the ladder of all, all cores", anytime=True),
    "lp": Contender("our LP by cvxpy and HiGHS", slow=True),
    "paper-lp": Contender("the paper's LP by gurobipy", peer=True),
    "lirpa-crown": Contender("auto_LiRPA CROWN, per network", peer=True),
    "lirpa-optimised": Contender("auto_LiRPA optimised, per network", peer=True),
    "lirpa-crown-direct": Contender("auto_LiRPA CROWN on the difference", peer=True),
    "lirpa-optimised-direct": Contender("auto_LiRPA optimised on the difference", peer=True),
}
DEFAULT = tuple(name for name in CONTENDERS if name != "interval")


def absent(name: str) -> str:
    """Why a contender cannot take part, "" if it can; asks nothing that takes long."""
    if name not in CONTENDERS:
        return f"unknown; there are {', '.join(CONTENDERS)}"
    if name.startswith("lirpa"):
        return "" if importlib.util.find_spec("auto_LiRPA") else INSTALL_LIRPA
    if name == "paper-lp":
        return "" if importlib.util.find_spec("gurobipy") else "gurobipy is not installed: pip install gurobipy"
    return "" if name in METHODS else "faithkd.bounds.METHODS has no such method"


def load(name: str, budget: float | None = None, nodes: int | None = None) -> Callable:
    """The contender as a function of (teacher, student, x, eps, clip); imports all it needs. Raises UnavailableError.

    `budget`: seconds an image, `nodes`: branch-and-bound nodes an image; both for anytime methods.
    """
    if reason := absent(name):
        raise UnavailableError(f"{name}: {reason}")
    if name == "paper-lp":
        from benchmarks import paper_lp

        return paper_lp.upper_bound
    if name.startswith("lirpa"):
        return load_lirpa(name)
    if name in ("lp", "milp"):
        importlib.import_module("faithkd.bounds.programs")  # cvxpy is no part of what is measured
    options = {"budget": budget, "nodes": nodes} if CONTENDERS[name].anytime else {}
    if "jobs" in inspect.signature(faithfulness_upper_bound).parameters and name == "best":
        options["jobs"] = os.cpu_count()

    def ours(teacher, student, x, eps, clip=None):
        return faithfulness_upper_bound(teacher, student, x, eps, method=name, clip=clip, **options).values

    return ours


def load_lirpa(name: str) -> Callable:
    """auto_LiRPA in one of its four ways; refuses to measure an optimiser that stands still."""
    if "optimised" in name and not clamp_passes_gradients():
        raise UnavailableError(
            f"{name}: auto_LiRPA's slopes start at 0 and 1 and never move with torch {torch.__version__}, in which "
            f"clamp has no gradient at its ends; it asks for torch < {'.'.join(map(str, LIRPA_PIN))}"
        )
    from benchmarks import lirpa

    way = lirpa.direct if name.endswith("direct") else lirpa.per_network
    return functools.partial(way, method="CROWN-Optimized" if "optimised" in name else "CROWN")


def clamp_passes_gradients() -> bool:
    """Whether torch.clamp has a gradient at its very ends, as it had in all versions that auto_LiRPA was made for."""
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(ends.clamp(0, 1).sum(), ends)
    return bool((gradient == 1).all())
