"""Who bounds: our own methods and the peers that they are measured against."""

from collections.abc import Callable

from benchmarks.common import Contender
from faithkd.bounds import faithfulness_upper_bound, interval_bound, softmax_interval
from faithkd.core.attacks import ball

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
