"""The statistics of `ledger.RULE`: comparisons of students over several seeds, each with a verdict."""

from bisect import bisect_left

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, nct, permutation_test
from scipy.stats import t as student_t

from faithkd.errors import FaithkdError

ALPHA = 0.05  # how often a test may err; intervals are of 1 − ALPHA
MARGIN = {"%": 1.0, "confidence": 0.01}  # d, the smallest difference that matters, by unit
LEAST_SEEDS = 6  # 2 / 2⁶ < .05 < 2 / 2⁵, and fewer are no basis for a bootstrap
POWER, MOST_SEEDS = 0.8, 1000
NOISE = 1e-9  # rounding of a mean: values no farther apart are equal
RESAMPLES = 9999  # so all sign flips of up to 13 seeds, of more a sample

OPPOSITE, OPPOSITE_SMALL = "the opposite holds", "the opposite holds, real but negligible"
UNDECIDED, SAME = "undecided", "no difference larger than d"
SMALL, HOLDS, MORE = "holds, real but negligible", "holds", "holds, by more than d"
JUDGED = (OPPOSITE, OPPOSITE_SMALL, UNDECIDED, SAME, SMALL, HOLDS, MORE)  # the worst for a claim first


def decide(margins: pd.DataFrame, unit: str) -> pd.DataFrame:
    """The rule for a family of comparisons: a row each, a column per seed, values favourite − rival in `unit`.

    Returns the same rows with `margin`, the mean; `low` and `high`, its 95 % interval; `least` and `most` of the
    seeds; `seeds`; `better`; `p`, corrected for the number of rows; `verdict`, one of JUDGED;
    `supported`, the smallest margin that the difference is shown not to exceed; `needed`, the seeds that an undecided
    one would take. Below LEAST_SEEDS there is no interval and no p (NaN). Raises FaithkdError where a value is missing.
    """
    values, d = margins.to_numpy(dtype=float), MARGIN[unit]
    if not np.isfinite(values).all():
        raise FaithkdError("a seed lacks one of the comparisons: measure the same students and radii for every seed")
    low, high = _interval(values, ALPHA)
    supported = np.abs(_interval(values, 2 * ALPHA)).max(axis=0)
    p = _holm(np.minimum(1.0, 2 * np.minimum(_flips(values), _flips(-values))))
    alike = (supported < d) & (np.maximum(_flips(d - values), _flips(d + values)) < ALPHA)
    above, below = (p < ALPHA) & (low > 0), (p < ALPHA) & (high < 0)
    far = (low > d) & (_flips(values - d) < ALPHA / 2)
    cases = {OPPOSITE_SMALL: below & alike, OPPOSITE: below, SMALL: above & alike, MORE: above & far}
    cases |= {HOLDS: above, SAME: alike}
    verdict = np.select(list(cases.values()), list(cases), UNDECIDED)
    better = ((values > 0) + 0.5 * (values == 0)).mean(axis=1)
    mean, spread, count = values.mean(axis=1), margins.std(axis=1), values.shape[1]
    needed = [
        seeds_needed(*row, d, len(values), beyond=count) if said == UNDECIDED else np.nan
        for *row, said in zip(mean, spread, verdict, strict=True)
    ]
    columns = {"margin": mean, "low": low, "high": high}
    columns |= {"least": values.min(axis=1), "most": values.max(axis=1), "seeds": count, "better": better, "p": p}
    columns |= {"verdict": verdict, "supported": supported, "needed": needed}
    return pd.DataFrame(columns, index=margins.index)


def worst_first(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `decide`, from those that speak most against a claim to those that support it most."""
    ranked = rows.assign(rank=rows["verdict"].map(JUDGED.index))
    return ranked.sort_values(["rank", "margin"], kind="stable").drop(columns="rank")


def seeds_needed(mean: float, spread: float, d: float, tests: int = 1, beyond: int = 1) -> float:
    """The fewest seeds, more than `beyond`, that decide in POWER of all repetitions, by the noncentral t distribution.

    `mean` and `spread` (standard deviation) of the margins are taken for the truth; `tests`: for how many comparisons p
    is corrected. Infinite if MOST_SEEDS are too few, NaN for the `spread` of a single seed.
    """
    if np.isnan(spread):
        return np.nan
    tried = range(max(LEAST_SEEDS, beyond + 1), MOST_SEEDS + 1)

    def power(n: int, distance: float, level: float) -> float:
        if 0.5**n >= level:  # no p of a sign-flip test is smaller
            return 0.0
        shift = np.clip(distance * np.sqrt(n) / max(spread, 1e-12), -30, 30)  # farther out nothing changes
        return nct.sf(student_t.isf(level, n - 1), n - 1, shift)

    def decides(n: int) -> float:
        alike = power(n, d - abs(mean), ALPHA) + power(n, d + abs(mean), ALPHA) - 1
        return max(alike, power(n, abs(mean), ALPHA / 2 / tests))

    place = bisect_left(tried, POWER, key=decides)  # more seeds decide more often
    return float(tried[place]) if place < len(tried) else np.inf


def _interval(values: np.ndarray, alpha: float) -> np.ndarray:
    """Both ends of the BCa interval of each row's mean, (2, rows); where all seeds are equal, that value."""
    if values.shape[1] < LEAST_SEEDS:
        return np.full((2, len(values)), np.nan)
    ends, differ = np.stack([values[:, 0]] * 2), np.ptp(values, axis=1) > NOISE
    if differ.any():
        some = values[differ]
        found = bootstrap((some,), np.mean, confidence_level=1 - alpha, method="BCa", **_resampling(some))
        ends[:, differ] = found.confidence_interval
    return ends


def _flips(values: np.ndarray) -> np.ndarray:
    """A p-value per row: how often random signs give its seeds so high a mean, if they are symmetric around 0."""
    if values.shape[1] < LEAST_SEEDS:
        return np.full(len(values), np.nan)
    how = {"permutation_type": "samples", "alternative": "greater", **_resampling(values)}
    return permutation_test((values,), np.mean, **how).pvalue


def _resampling(values: np.ndarray) -> dict:
    batch = max(1, 2_000_000 // values.size)  # for memory
    return {"n_resamples": RESAMPLES, "axis": 1, "vectorized": True, "rng": 0, "batch": batch}


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction: the smallest p times their number, the next times one less, and so on, never falling."""
    order, corrected = np.argsort(p), np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected
