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
from torch import Tensor

from benchmarks.common import Contender
from faithkd.bounds import faithfulness_upper_bound
from faithkd.errors import FaithkdError

WARM_UP = 1e-3  # share of eps at which first, untimed images are bounded: all is loaded then, and little is to do
BY_HAND = "by hand (benchmarks/README.md says into what) from https://github.com/Verified-Intelligence/auto_LiRPA"
CONTENDERS = {
    "interval": Contender("interval arithmetic"),
    "crown": Contender("linear bounds (CROWN), per network"),
    "alpha-crown": Contender("optimised slopes, per network"),
    "joint": Contender("shared input, optimised"),
    "bab": Contender("branch and bound", anytime=True),
    "best": Contender("the ladder of all, all cores", anytime=True),
    "lp": Contender("our LP by cvxpy and HiGHS", slow=True),
    "paper-lp": Contender("the paper's LP by gurobipy", "gurobipy"),
    "lirpa-crown": Contender("auto_LiRPA CROWN, per network", "auto_LiRPA", BY_HAND),
    "lirpa-optimised": Contender("auto_LiRPA optimised, per network", "auto_LiRPA", BY_HAND),
    "lirpa-crown-direct": Contender("auto_LiRPA CROWN on the difference", "auto_LiRPA", BY_HAND),
    "lirpa-optimised-direct": Contender("auto_LiRPA optimised on the difference", "auto_LiRPA", BY_HAND),
}


def measure(name: str, pair: tuple, x: Tensor, eps: float, clip: tuple | None, rounds: int = 1, **effort) -> dict:
    """Bounds `(N,)`, seconds an image (median of the rounds), MB, and in `note` why there are none.

    `effort`: `budget` in seconds or `nodes` an image, for who takes one. In a new process, so that nobody pays for
    another's memory or profits from another's caches.
    """
    nothing = {"bound": np.full(len(x), np.nan), "seconds": np.nan, "megabytes": np.nan}
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measured, name, pair, x, eps, clip, rounds, **effort).result() | {"note": ""}
    except BrokenProcessPool:
        return nothing | {"note": "its process died: out of memory?"}
    except FaithkdError as refusal:  # licence too small, a layer that it does not know
        return nothing | {"note": str(refusal)}
    except Exception as failure:  # a peer's is a result, too
        if not CONTENDERS[name].package:
            raise
        return nothing | {"note": f"failed: {type(failure).__name__}: {failure}"}


def measured(name: str, pair: tuple, x: Tensor, eps: float, clip: tuple | None, rounds: int, **effort) -> dict:
    """The measurement itself. Memory is the peak above what the process held before, with all imports made."""
    torch.set_num_threads(1)
    bound = load(name)
    before = peak_megabytes()
    little = {key: min(most, {"budget": 0.1, "nodes": 1}[key]) for key, most in effort.items()}
    one_each = os.cpu_count() if name == "best" else 1  # so that its workers are there when time counts
    bound(*pair, x[:one_each], WARM_UP * eps, clip, **little)
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        values = bound(*pair, x, eps, clip, **effort)
        spent.append(time.perf_counter() - start)
    megabytes = peak_megabytes() - before + workers_megabytes()
    if name == "best":
        stop_workers()
    return {"bound": values.double().numpy(), "seconds": np.median(spent) / len(x), "megabytes": megabytes}


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


def stop_workers() -> None:
    """End the worker processes of `best`: joblib keeps them for 300 s, and this process would wait for them."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


def peak_megabytes(process: str = "self") -> float:
    """The most memory that a process ever held, as Linux says it; NaN elsewhere."""
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        return float("nan")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def workers_megabytes() -> float:
    """The peaks of the processes that this one started and that still live."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return sum(peak_megabytes(child) for task in tasks for child in task.read_text().split())
