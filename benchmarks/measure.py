"""Who bounds, our own methods and the peers, and one measurement: in a process of its own, on one thread."""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib.externals.loky import get_reusable_executor
from torch import Tensor

from benchmarks.common import Contender
from faithkd.bounds import faithfulness_upper_bound
from faithkd.errors import FaithkdError

WARM_UP = 1e-3  # share of eps at which first, untimed images are bounded: all is loaded then, and little is to do
BY_HAND = "by hand (benchmarks/README.md says into what) from https://github.com/Verified-Intelligence/auto_LiRPA"
CONTENDERS = {  # in this order they are measured and shown: each of ours beside the peers like it
    "interval": Contender("interval arithmetic"),
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


def measure(name: str, pair: tuple, x: Tensor, eps: float, clip: tuple | None, budget: float | None) -> dict:
    """Bounds `(N,)`, wall and processor seconds an image, MB, and in `note` why there are none.

    In a new process, so that nobody pays for another's memory or profits from another's caches.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measured, name, pair, x, eps, clip, budget).result()
    except BrokenProcessPool:
        note = "its process died: out of memory?"
    except FaithkdError as refusal:  # licence too small, a layer that it does not know
        note = str(refusal)
    except Exception as failure:  # a peer's is a result, too
        if not CONTENDERS[name].package:
            raise
        note = f"failed: {type(failure).__name__}: {failure}"
    nothing = dict.fromkeys(["seconds", "cpu_seconds", "megabytes"], np.nan)
    return nothing | {"bound": np.full(len(x), np.nan), "note": note}


def measured(name: str, pair: tuple, x: Tensor, eps: float, clip: tuple | None, budget: float | None) -> dict:
    """The measurement itself. Memory is the peak above what the process held before, with all imports made."""
    torch.set_num_threads(1)
    bound = load(name)
    before = peak_megabytes()
    effort = {} if budget is None else {"budget": budget}
    one_each = os.cpu_count() if name == "best" else 1  # so that its workers are there when time counts
    bound(*pair, x[:one_each], WARM_UP * eps, clip, **dict.fromkeys(effort, 0.1))
    start, cpu = time.perf_counter(), time.process_time()
    values = bound(*pair, x, eps, clip, **effort)
    seconds, cpu_seconds = (time.perf_counter() - start) / len(x), (time.process_time() - cpu) / len(x)
    children = [child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()]
    megabytes = peak_megabytes() - before + sum(map(peak_megabytes, children))
    get_reusable_executor().shutdown(wait=True)  # the workers of `best`: joblib keeps them for 300 s
    costs = {"seconds": seconds, "cpu_seconds": cpu_seconds, "megabytes": megabytes}
    return costs | {"bound": values.double().numpy(), "note": ""}


def load(name: str) -> Callable:
    """The contender as a function (teacher, student, x, eps, clip, **effort) to `(N,)`; imports all that it needs."""
    if name == "paper-lp":
        from benchmarks import paper_lp

        return paper_lp.upper_bound
    if name.startswith("lirpa"):
        from benchmarks import lirpa

        return partial(lirpa.upper_bound, name)
    if name == "lp":
        import cvxpy  # noqa: F401  no part of what is measured

    def ours(teacher, student, x, eps, clip, **effort) -> Tensor:
        return faithfulness_upper_bound(teacher, student, x, eps, method=name, clip=clip, **effort).values

    return ours


def peak_megabytes(process: str = "self") -> float:
    """The most memory that a process ever held, as Linux says it; NaN elsewhere."""
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        return float("nan")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024
