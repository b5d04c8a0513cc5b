"""Who bounds: our own methods and the peers that they are measured against."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.common import INSTALLED
from faithkd.bounds import faithfulness_upper_bound, interval_bound, softmax_interval
from faithkd.core.attacks import ball
from faithkd.errors import FaithkdError


@dataclass(frozen=True)
class Contender:
    """`what` it is in a table, a peer's `package` and how to `install` it; if it takes a budget, gets few images."""

    what: str
    package: str = ""
    install: str = ""
    anytime: bool = False
    slow: bool = False


BY_HAND = "by hand (benchmarks/README.md says into what) from https://github.com/Verified-Intelligence/auto_LiRPA"
CONTENDERS = {  # in this order they are measured and shown: each of ours beside the peers like it
    "crown": Contender("linear bounds (CROWN), per network"),
    "lirpa-crown": Contender("auto_LiRPA CROWN, per network", "auto_LiRPA", BY_HAND),
    "alpha-crown": Contender("optimised slopes, per network"),
    "lirpa-optimised": Contender("auto_LiRPA optimised, per network", "auto_LiRPA", BY_HAND),
    "joint": Contender("shared input, optimised"),
    "paper-lp": Contender("the paper's LP by gurobipy", "gurobipy"),
    "lp": Contender("our LP by cvxpy and HiGHS", slow=True),
    "bab": Contender("branch and bound", anytime=True),
    "best": Contender("the ladder of all, all cores", anytime=True),
}
PEERS = [contender.package for contender in CONTENDERS.values()]


def taking_part(names: str) -> list[str]:
    """Those of `names`, given by commas, that are there, after crown; prints who is not, and how to install it."""
    there = ["crown"]
    for name in names.split(","):
        if name not in CONTENDERS:
            raise FaithkdError(f"unknown contender {name!r}: choose from {', '.join(CONTENDERS)}")
        package, install = CONTENDERS[name].package, CONTENDERS[name].install
        if package and package not in INSTALLED:
            print(f"without {name}: {package} is not installed: {install or f'pip install {package}'}")
        else:
            there.append(name)
    return list(dict.fromkeys(there))


def load(name: str) -> Callable:
    """The contender as a function (teacher, student, x, eps, clip=..., **effort) to `(N,)`."""
    if name == "paper-lp":
        from benchmarks import paper_lp

        return paper_lp.upper_bound
    if name.startswith("lirpa"):
        from benchmarks import lirpa

        def upper_bound(teacher, student, x, eps, clip=None):
            ends = ball(x.double(), eps, clip)
            return interval_bound(
                *(softmax_interval(lirpa.differences(net, *ends, name)) for net in (teacher, student))
            )

        return upper_bound
    return lambda *ball, **options: faithfulness_upper_bound(*ball, method=name, **options).values
