"""Calibration, and what a bound on the difference of two networks says about it: the corollary of §4.2.

A network is calibrated when it is right in 80 % of the cases in which it is 80 % sure. Confidences f = σ(g) are tensors
(N, C); `delta` (N,) bounds ‖f_t − f_s‖∞ image by image: FaithUB, or the difference itself.
"""

import pandas as pd
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from faithkd.errors import FaithkdError

BINS = 15  # of equal width, as is usual since Guo et al. (2017)
BELOW_ONE = 1 - 2.0**-24  # the last float32 before 1: torchmetrics gives the confidence 1 itself a bin of its own


def ece(confidences: Tensor, y: Tensor, bins: int = BINS) -> float:
    """Expected calibration error, ECE, in bins b of max_c f^c: Σ_b |Σ_{i in b} (max_c f^c(x_i) − 1[c(x_i) = y_i])| / N.

    Confidences (N, C), labels (N,) → a number in [0, 1]. Raises FaithkdError for an empty batch or for logits.
    """
    _check(confidences, y)
    capped = confidences.float().clamp(0, BELOW_ONE)
    return float(multiclass_calibration_error(capped, y, num_classes=confidences.shape[1], n_bins=bins))


def reliability(confidences: Tensor, y: Tensor, bins: int = BINS) -> pd.DataFrame:
    """What a reliability diagram shows: `images`, mean `confidence` and `accuracy` of each bin with images in it.

    Columns `low` and `high` are the bin's ends. The mean of |confidence − accuracy|, weighted by images, is `ece`.
    """
    _check(confidences, y)
    sure, predicted = confidences.max(1)
    rows = pd.DataFrame(
        {
            "bin": bin_of(sure, bins).numpy(),
            "confidence": sure.double().numpy(),
            "accuracy": (predicted == y).double().numpy(),
        }
    )
    table = rows.groupby("bin").agg(
        images=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    table.insert(0, "low", table.index / bins)
    table.insert(1, "high", (table.index + 1) / bins)
    return table.reset_index()


def ece_by_teacher(teacher: Tensor, student: Tensor, y: Tensor, bins: int = BINS) -> float:
    """A student's ECE in its teacher's bins and classes, Σ_b |Σ_{i in b} (f_s^{c_t}(x_i) − 1[c_t(x_i) = y_i])| / N.

    The class is the teacher's prediction c_t(x_i), the bin that of the teacher's confidence: every image counts in the
    same bin and for the same class in both. So the corollary holds as it stands: |this − `ece` of the teacher| is at
    most the mean of delta.
    """
    _check(teacher, y)
    sure, predicted = teacher.max(1)
    gaps = student.gather(1, predicted[:, None])[:, 0].double() - (predicted == y).double()
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of(sure, bins), gaps)
    return float(sums.abs().sum() / len(y))


def steady(teacher: Tensor, delta: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor]:
    """Where any student within delta has its teacher's predicted class, and where its teacher's bin: two (N,) bool.

    The class, if the teacher's two highest confidences are more than 2 delta apart; the bin, if its highest confidence
    plus and minus delta lie in one bin.
    """
    high, second = teacher.double().topk(2, dim=1).values.T
    room = delta + 2.0**-23  # confidences may have been rounded to float32
    return high - second > 2 * room, bin_of(high - room, bins) == bin_of(high + room, bins)


def ece_bound(teacher: Tensor, y: Tensor, delta: Tensor, bins: int = BINS) -> float:
    """The largest |ece(f_s) − ece(f_t)| of any student with ‖f_t − f_s‖∞ ≤ delta, from the teacher alone, §4.2.

    An image whose class and bin are `steady` moves its bin's sum by at most delta. Any other one may take its own
    r = |max f_t − 1[c_t = y]| from its bin and bring to another r + delta, or 1 if its class may change. Never above 1.
    """
    _check(teacher, y)
    sure, predicted = teacher.double().max(1)
    takes = (sure - (predicted == y).double()).abs()
    same_class, same_bin = steady(teacher, delta, bins)
    brings = torch.where(same_class, (takes + delta).clamp(max=1), 1.0)
    moves = torch.where(same_class & same_bin, delta.double(), takes + brings)
    return min(1.0, float(moves.mean()))


def bin_of(confidence: Tensor, bins: int = BINS) -> Tensor:
    """The bin [k/bins, (k + 1)/bins) of each confidence, the last with 1: as torchmetrics counts, in float32."""
    ends = torch.linspace(0, 1, bins + 1)
    return torch.bucketize(confidence.float().clamp(0, BELOW_ONE), ends, right=True) - 1


def _check(confidences: Tensor, y: Tensor) -> None:
    if confidences.ndim != 2 or len(confidences) != len(y) or not len(y):
        raise FaithkdError(
            f"confidences must have a row of classes for each of at least one label, not shape "
            f"{tuple(confidences.shape)} for {len(y)} labels"
        )
    if not ((confidences >= 0) & (confidences <= 1 + 1e-6)).all():
        raise FaithkdError("confidences must lie in [0, 1]: apply torch.softmax to the logits first")
