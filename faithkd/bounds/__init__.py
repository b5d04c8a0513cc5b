"""Upper bounds of the faithfulness gap delta* = max ||f_t(x') - f_s(x')||_inf over the ball B_eps(x) (§4.2).

Read in this order: `graph` (a network as a list of operators), `operators` (all that is known of each kind), `linear`
(intervals, CROWN and alpha-CROWN), `softmax` (eqs 10 and 11); then `programs`, `exact` (LP and MILP, eqs 8
to 11); past the paper, `domains` (parts of a ball), `rows` (branch and bound for hidden units' ends) and `differences`
(for those of logits), `joint` (both networks see the same image), `search` (branch and bound), `agreement`; and
`methods`, which climbs from one to the next. `layers` holds operators of other networks, `reading` finds them in a
torch module, `descent` optimises what is free, `patches` only makes things faster.
"""

from faithkd.bounds.methods import (
    CERTIFIED,
    LADDER,
    METHODS,
    NOT_FINITE,
    UpperBound,
    certified_agreement,
    difference_bounds,
    faithfulness_upper_bound,
    faithfulness_upper_bounds,
)
from faithkd.bounds.softmax import interval_bound, softmax_interval

__all__ = [
    "CERTIFIED",
    "LADDER",
    "METHODS",
    "NOT_FINITE",
    "UpperBound",
    "certified_agreement",
    "difference_bounds",
    "faithfulness_upper_bound",
    "faithfulness_upper_bounds",
    "interval_bound",
    "softmax_bounds",
    "softmax_interval",
]


def softmax_bounds(network, x, eps: float, **choices):
    """Certified lower and upper bound of every confidence over the ball, two `(N, C)`, eq. (10).

    Keyword arguments as in `difference_bounds`.
    """
    return softmax_interval(difference_bounds(network, x, eps, **choices))
