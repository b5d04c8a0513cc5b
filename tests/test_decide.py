"""Verdicts over seeds: each on numbers made by hand, and how often they are wrong on numbers drawn."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from faithkd.errors import FaithkdError
from faithkd.report import decide as statistics
from faithkd.report.decide import HOLDS, MORE, OPPOSITE, OPPOSITE_SMALL, SAME, SMALL, UNDECIDED, decide, seeds_needed

DRAWS = 300
STEPS = np.linspace(-1, 1, 10)  # ten seeds around 0


def decided(values) -> pd.Series:
    return decide(pd.DataFrame([values]), "%").iloc[0]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (3 + STEPS, MORE),
        (1.2 + STEPS, HOLDS),
        (0.5 + 0.3 * STEPS, SMALL),
        (0.5 * STEPS, SAME),
        (np.zeros(10), SAME),
        (0.5 + 2 * STEPS, UNDECIDED),
        (-0.5 + 0.3 * STEPS, OPPOSITE_SMALL),
        (-1.2 + STEPS, OPPOSITE),
        (3 + STEPS[:5], UNDECIDED),  # p ≥ 2 / 2⁵
        ([3.0], UNDECIDED),
    ],
)
def test_verdicts(values, verdict):
    row = decided(values)
    assert row["verdict"] == verdict and row["margin"] == pytest.approx(np.mean(values))
    assert (row["needed"] > len(values)) == (verdict == UNDECIDED and len(values) > 1)
    assert row[["low", "high", "p", "supported"]].isna().all() == (len(values) < 6)


def test_the_numbers_beside_a_verdict():
    row = decided([-1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert (row["least"], row["most"], row["seeds"], row["better"]) == (-1, 5, 8, (5 + 2 * 0.5) / 8)
    assert row["low"] < row["margin"] < row["high"] and row["supported"] < row["high"]
    flips = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T @ [-1, 0, 0, 1, 2, 3, 4, 5]
    assert row["p"] == pytest.approx(2 * (flips >= 14).mean())
    with pytest.raises(FaithkdError, match="every seed"):
        decided([1.0, np.nan, 2.0])


def test_p_is_corrected_by_holms_method():
    assert statistics._holm(np.array([0.04, 0.01, 0.03, 0.005])).tolist() == pytest.approx([0.06, 0.03, 0.06, 0.02])
    alone, fifteen = 0.8 + 1.2 * STEPS, np.vstack([0.8 + 1.2 * STEPS, *np.tile(10 * STEPS, (14, 1))])
    assert decided(alone)["verdict"] == HOLDS and decide(pd.DataFrame(fifteen), "%")["verdict"][0] == UNDECIDED


@pytest.fixture
def single(monkeypatch):
    """Each row is a comparison of its own, not one of a family; the verdicts on many drawn at random, as shares."""
    monkeypatch.setattr(statistics, "_holm", lambda p: p)
    monkeypatch.setattr(statistics, "RESAMPLES", 1100)
    monkeypatch.setattr(statistics, "seeds_needed", lambda *_, **__: np.inf)  # for speed

    def shares(mean: float, spread: float, seeds: int) -> pd.Series:
        drawn = np.random.default_rng(seeds).normal(mean, spread, (DRAWS, seeds))
        counts = decide(pd.DataFrame(drawn), "%")["verdict"].value_counts(normalize=True)
        return counts.reindex(statistics.JUDGED, fill_value=0.0)

    return shares


def most(rate: float) -> float:
    """What a share may be, drawn DRAWS times, if it is at most `rate` in truth."""
    return binom.ppf(0.999, DRAWS, rate) / DRAWS


@pytest.mark.parametrize("seeds", [6, 10, 16])
def test_how_often_a_verdict_is_wrong(single, seeds):
    none, just = single(0.0, 0.7, seeds), single(1.0, 0.7, seeds)
    assert none[[HOLDS, SMALL, MORE, OPPOSITE, OPPOSITE_SMALL]].sum() <= most(0.05), "there is no difference"
    assert just[[SAME, SMALL, OPPOSITE_SMALL]].sum() <= most(0.05), "the difference is d, no smaller"
    assert just[MORE] <= most(0.025), "the difference is d, no larger"
    assert single(3.0, 0.7, seeds)[MORE] > 0.8 and single(0.0, 0.3, seeds)[SAME] > 0.8, "what is clear is seen"


@pytest.mark.parametrize(("mean", "spread"), [(2.0, 2.0), (0.0, 1.2), (0.4, 1.0), (-1.5, 2.0)])
def test_the_seeds_needed_decide_as_often_as_promised(single, mean, spread):
    needed = int(seeds_needed(mean, spread, 1.0))
    assert single(mean, spread, needed)[UNDECIDED] <= most(1 - statistics.POWER)
    assert single(mean, spread, needed // 2)[UNDECIDED] > 1 - statistics.POWER


def test_seeds_needed_at_the_ends():
    assert seeds_needed(5.0, 0.0, 1.0) == statistics.LEAST_SEEDS and seeds_needed(5.0, 0.0, 1.0, beyond=9) == 10
    assert seeds_needed(5.0, 0.1, 1.0, tests=15) == 10, "15 · 2 / 2⁹ > .05"
    assert seeds_needed(0.9999, 50.0, 1.0) == np.inf and np.isnan(seeds_needed(1.0, np.nan, 1.0))
