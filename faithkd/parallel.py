"""The same calls in this process, on all cores or on a cluster; which of them changes nothing but the time.

$FAITHKD_JOBS is the number of processes (without it: one for each core); $FAITHKD_CLUSTER is the address of a dask
scheduler, whose workers then do the work instead. Both go through joblib.
"""

import multiprocessing
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib.util import find_spec

from tqdm import tqdm

from faithkd.errors import FaithkdError

# Processes take up to ten seconds to start. So a few calls are made here first, and processes start only where what is
# left would take much longer than that.
SAMPLE, WORTHWHILE = 1.0, 30.0  # seconds: spent on the first calls, and estimated for those that are left
PATIENCE = 5  # seconds until a scheduler must have answered
ADDRESS = re.compile(r"((tcp|tls|ws|wss|ucx)://)?([\w.-]+|\[[\da-fA-F:.]+\]):(\d{1,5})", re.ASCII)
KEPT = "what is finished is kept, and the same command goes on from there"

_clients = {}
_PROCESS = os.getpid()  # that imported this file


def jobs() -> int:
    """How many processes work: $FAITHKD_JOBS, or one for each core that this process may use."""
    text = os.environ.get("FAITHKD_JOBS", "").strip()
    if not text:
        from joblib import cpu_count

        return cpu_count()
    if not re.fullmatch(r"[1-9]\d{0,3}", text, re.ASCII):
        raise FaithkdError(
            f"the number of processes (--jobs or FAITHKD_JOBS) is {text!r}: give a whole number from 1 to 9999, "
            "or nothing for one process on each core"
        )
    return int(text)


def cluster() -> str | None:
    """The address of the dask scheduler in $FAITHKD_CLUSTER, if one is given."""
    text = os.environ.get("FAITHKD_CLUSTER", "").strip()
    found = ADDRESS.fullmatch(text)
    if text and not (found and 0 < int(found[4]) < 2**16):
        raise FaithkdError(
            f"the cluster's address (--cluster or FAITHKD_CLUSTER) is {text!r}: write it as `dask scheduler` prints "
            "it, for example tcp://127.0.0.1:8786"
        )
    return text or None


def check() -> None:
    """Raise FaithkdError where the settings are no good or the scheduler does not answer."""
    jobs()
    if address := cluster():
        _client(address).close()


def run(
    calls: Sequence[Callable[[], object]], count: int | None = None, sample: float | None = None, here: bool = False
) -> Iterator[tuple[int, object]]:
    """Yield the place and the result of every call, each as soon as it is finished, in whatever order that is.

    `calls` must be picklable, as functools.partial of a module's function is. An error of a call ends the run.
    `count` replaces `jobs()`. `sample`: seconds spent on the first calls here (without: SAMPLE); 0 to start processes
    at once. `here`: on this machine also where there is a cluster.
    """
    sample = SAMPLE if sample is None else sample
    count, address, left = count or jobs(), None if here else cluster(), list(enumerate(calls))
    done, spent = 0, 0.0
    while left and not address:
        if count > 1 and len(left) > 1 and spent >= sample and (not sample or spent * len(left) >= WORTHWHILE * done):
            break
        place, call = left.pop(0)
        start = time.perf_counter()
        result = call()
        done, spent = done + 1, spent + time.perf_counter() - start
        yield place, result
    if left:
        yield from _spread(left, min(count, len(left)), address)


def results(calls: Mapping[object, Callable[[], object]], description: str, sample: float | None = None) -> dict:
    """The result of every call by its name, in the order of the calls, with a bar; otherwise as `run`."""
    bar = tqdm(run(list(calls.values()), sample=sample), description, len(calls), leave=False)
    found = dict(bar)
    return {name: found[place] for place, name in enumerate(calls)}


def possible() -> bool:
    """Whether this process should start others: not one that multiprocessing made, nor a forked one.

    A daemonic process may have no children, a pool's worker has a core for itself, and what joblib keeps of its workers
    is dead in a forked copy.
    """
    return multiprocessing.parent_process() is None and os.getpid() == _PROCESS


def _spread(numbered: list, count: int, address: str | None) -> Iterator[tuple[int, object]]:
    """`run` for calls with their places, in `count` processes or on the cluster at `address`."""
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky import get_reusable_executor

    settings = {"backend": _dask(address)} if address else {"backend": "loky", "inner_max_num_threads": 1}
    with parallel_config(**settings):
        # batches of one: each result is there to be stored as soon as it is made
        pool = Parallel(n_jobs=-1 if address else count, batch_size=1, return_as="generator_unordered")
    parent = None if address else os.getpid()
    results = pool(delayed(_alone)(place, call, parent) for place, call in numbered)
    try:
        for result in results:  # noqa: UP028  `yield from` would close them before warnings are off
            yield result
    except BrokenProcessPool as error:
        raise FaithkdError(
            f"a worker process ended abruptly, perhaps for lack of memory; {KEPT}, with fewer processes (--jobs) if "
            f"memory is short ({str(error).splitlines()[0]})"
        ) from error
    finally:
        with warnings.catch_warnings():  # joblib tells that calls were cancelled, which is what is wanted
            warnings.simplefilter("ignore", UserWarning)
            results.close()
        if parent and sys.exc_info()[0]:  # ended early: else Python would complain at its exit of what they held
            get_reusable_executor().shutdown(wait=True, kill_workers=True)


def _alone(place: int, call: Callable[[], object], parent: int | None) -> tuple[int, object]:
    """One call on one thread: all cores have a call of their own, and sums come out the same everywhere."""
    import torch

    if parent != os.getpid():  # joblib may have found reasons to start no process: then nothing here changes
        if parent:
            _follow(parent)
        torch.set_num_threads(1)
    return place, call()


@cache
def _follow(parent: int) -> None:
    """End this process soon after its parent: where that was killed, joblib's workers would stay for minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _client(address: str):
    """The connection to the scheduler at `address`, one for each process."""
    if find_spec("distributed") is None:
        raise FaithkdError("a cluster needs the package distributed: pip install 'faithkd[cluster]'")
    from distributed import Client

    if address not in _clients or _clients[address].status != "running":
        try:
            _clients[address] = Client(address, timeout=PATIENCE, set_as_default=False)
        except OSError as error:
            raise FaithkdError(
                f"no dask scheduler answers at {address} ({type(error).__name__}): start one with `dask scheduler`, "
                "and workers with `dask worker ADDRESS`, or correct the address"
            ) from error
    return _clients[address]


def _dask(address: str):
    """joblib's dask backend, connected to the cluster at `address`."""
    client = _client(address)
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        raise FaithkdError(
            f"the dask scheduler at {address} has no workers: start some with `dask worker {address}`"
        ) from None
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        """Joblib's, which waits for ever where dask itself fails, not the call: when a worker dies, for example."""

        def submit(self, func, callback=None):
            future = super().submit(func, callback)
            future.add_done_callback(lambda done: done.exception() and callback(_lost(address, done.exception())))
            return future

        def retrieve_result_callback(self, out):
            lost = isinstance(out, CancelledError)  # by dask: the scheduler is gone
            return super().retrieve_result_callback(_lost(address, out) if lost else out)

    return Backend(client=client)


def _lost(address: str, error: BaseException) -> FaithkdError:
    return FaithkdError(
        f"the cluster at {address} could not do a piece of the work: {type(error).__name__}: {error}\n"
        f"  are all workers alive, with memory enough, and with the same version of faithkd? {KEPT}"
    )
