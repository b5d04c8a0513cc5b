"""Calibration, and what a bound on the difference of two networks says about it: the corollary of §4.2.

A network is calibrated when it is right in 80 % of the cases in which it is 80 % sure. Confidences f = σ(g) are tensors
(N, C) with labels y (N,); a `bin` b holds those in [b, b + 1)/BINS, the last one 1 as well.
"""

import numpy as np
import pandas as pd
from torch import Tensor

from faithkd.errors import FaithkdError

BINS = 15  # of equal width, as is usual since Guo et al. (2017)


def reliability(confidences: Tensor, y: Tensor, bins: int = BINS) -> pd.DataFrame:
    """What a reliability diagram shows: `images`, mean `confidence` and `accuracy` of each `bin` with images in it.

    `low` and `high` are the bin's ends. Raises FaithkdError for an empty batch or for logits.
    """
    sure, predicted = _checked(confidences, y).max(1)
    rows = pd.DataFrame({"confidence": sure.double(), "accuracy": (predicted == y).double()})
    groups = rows.assign(bin=_bin(sure, bins)).groupby("bin", as_index=False)
    means = groups.agg(images=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean"))
    means.insert(1, "low", means["bin"] / bins)
    means.insert(2, "high", (means["bin"] + 1) / bins)
    return means


def ece(confidences: Tensor, y: Tensor, bins: int = BINS) -> float:
    """Expected calibration error, ECE, in bins b of max_c f^c: Σ_b |Σ_{i in b} (max_c f^c(x_i) − 1[c(x_i) = y_i])| / N.

    A number in [0, 1]. Raises FaithkdError for an empty batch or for logits.
    """
    return ece_by_teacher(confidences, confidences, y, bins)


def ece_by_teacher(teacher: Tensor, student: Tensor, y: Tensor, bins: int = BINS) -> float:
    """A student's ECE in its teacher's bins and classes, Σ_b |Σ_{i in b} (f_s^{c_t}(x_i) − 1[c_t(x_i) = y_i])| / N.

    The class is the teacher's prediction c_t(x_i), the bin that of the teacher's confidence: every image counts in the
    same bin and for the same class in both. So the corollary of §4.2 holds as it stands: |this − `ece` of the teacher|
    is at most the mean of ‖f_t − f_s‖∞. Of a student's own bins and classes it does not.
    """
    sure, predicted = _checked(teacher, y).max(1)
    gaps = student.gather(1, predicted[:, None])[:, 0].double() - (predicted == y).double()
    return float(pd.Series(gaps).groupby(_bin(sure, bins)).sum().abs().sum() / len(y))


def _bin(sure: Tensor, bins: int) -> pd.Series:
    ends = np.linspace(0, 1, bins + 1, dtype=np.float32)
    return pd.Series(np.digitize(sure.float(), ends[:-1]) - 1)


def _checked(confidences: Tensor, y: Tensor) -> Tensor:
    if confidences.ndim != 2 or len(confidences) != len(y) or not len(y):
        raise FaithkdError(
            f"confidences must have a row of classes for each of at least one label, not shape "
            f"{tuple(confidences.shape)} for {len(y)} labels"
        )
    if not ((confidences >= 0) & (confidences <= 1 + 1e-6)).all():
        raise FaithkdError("confidences must lie in [0, 1]: apply torch.softmax to the logits first")
    return confidences
