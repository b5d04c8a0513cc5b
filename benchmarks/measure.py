"""One measurement: one contender, one pair of networks, some images, in a process of its own on one thread."""

import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import contenders
from faithkd import data
from faithkd.errors import FaithkdError
from faithkd.reproduce.params import Params

WARM_UP = 1e-3  # share of eps at which first, untimed images are bounded: all is loaded then, and little is to do


@dataclass(frozen=True)
class Job:
    """What to measure: `contender` on the images `x` `(N, *shape)`; `budget` in seconds an image, `nodes` an image."""

    contender: str
    teacher: nn.Sequential
    student: nn.Sequential
    x: Tensor
    eps: float
    clip: tuple | None = None
    budget: float | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class Measurement:
    """Bounds `(N,)` (NaN where there are none), wall and processor seconds of all images, MB of memory, what failed.

    Memory is the peak above what the process held before the first image, with all imports made.
    """

    values: Tensor
    seconds: float = float("nan")
    cpu_seconds: float = float("nan")
    megabytes: float = float("nan")
    note: str = ""


def images_of(p: Params) -> data.Split:
    """The test subset in the order of the test set, as all committed results have it."""
    subset = data.test_subset(p)
    return subset[subset.index.argsort()]


def run(job: Job) -> Measurement:
    """Measure in a new process, so that nobody pays for another's memory or profits from another's caches."""
    nothing = torch.full((len(job.x),), torch.nan, dtype=torch.float64)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measured, job).result()
    except BrokenProcessPool:
        return Measurement(nothing, note="its process died: out of memory?")
    except FaithkdError as refusal:  # not installed, licence too small, a layer that it does not know
        return Measurement(nothing, note=str(refusal))
    except Exception as failure:
        if not contenders.CONTENDERS[job.contender].peer:
            raise
        return Measurement(nothing, note=f"failed: {type(failure).__name__}: {failure}")  # a result, too


def measured(job: Job) -> Measurement:
    """The measurement itself. Raises FaithkdError where the contender cannot run."""
    torch.set_num_threads(1)
    if job.contender != "best":
        os.environ["FAITHKD_JOBS"] = "1"
    bound = contenders.load(job.contender, job.budget, job.nodes)
    before = peak_megabytes()
    few = contenders.load(job.contender, job.budget and min(job.budget, 0.1), job.nodes and 1)
    one_each = os.cpu_count() if job.contender == "best" else 1  # so that its workers are there when time counts
    few(job.teacher, job.student, job.x[:one_each], WARM_UP * job.eps, job.clip)
    start, cpu = time.perf_counter(), time.process_time()
    values = bound(job.teacher, job.student, job.x, job.eps, job.clip)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    megabytes = peak_megabytes() - before + workers_megabytes()
    if job.contender == "best":
        stop_workers()
    return Measurement(values.detach().double(), seconds, cpu_seconds, megabytes)


def stop_workers() -> None:
    """End the worker processes of `best`: joblib keeps them for 300 s, and this process would wait for them."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


def peak_megabytes(process: str = "self") -> float:
    """The most memory that a process ever held.

    Linux keeps it in /proc; `ru_maxrss` would count there what the parent held before the process was started.
    """
    status = Path(f"/proc/{process}/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def workers_megabytes() -> float:
    """The peaks of the processes that this one started and that still live; 0 where /proc does not list them."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = [child for task in tasks for child in task.read_text().split()]
    return sum(peak_megabytes(child) for child in children)
