"""The same calls in this process, on all cores or on a cluster; which of them changes nothing but the time.

$FAITHKD_JOBS is the number of processes (without it: one for each core); $FAITHKD_CLUSTER is the address of a dask
scheduler, whose workers then do the work instead. Both go through joblib.
"""

import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from faithkd.errors import FaithkdError

# Processes take up to ten seconds to start. So a few calls are made here first, and processes start only where what is
# left would take much longer than that.
SAMPLE, WORTHWHILE = 1.0, 30.0  # seconds: spent on the first calls, and estimated for those that are left
PATIENCE = 5  # seconds until a scheduler must have answered

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


def check() -> None:
    """Raise FaithkdError where the settings are no good or the scheduler does not answer."""
    jobs()
    if address := os.environ.get("FAITHKD_CLUSTER"):
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
    count, left, done, spent = count or jobs(), list(enumerate(calls)), 0, 0.0
    address = None if here else os.environ.get("FAITHKD_CLUSTER")
    while left and not address:
        if count > 1 and len(left) > 1 and spent >= sample and (not sample or spent * len(left) >= WORTHWHILE * done):
            break
        start = time.perf_counter()
        yield _alone(*left.pop(0))
        done, spent = done + 1, spent + time.perf_counter() - start
    if left:
        yield from _spread(left, min(count, len(left)), address)


def results(calls: Mapping[object, Callable[[], object]], description: str) -> dict:
    """The result of every call by its name, in the order of the calls, with a bar; otherwise as `run`."""
    found = dict(tqdm(run(list(calls.values())), description, len(calls), leave=False))
    return {name: found[place] for place, name in enumerate(calls)}


def possible() -> bool:
    """Whether this process should start others: not one that multiprocessing made, nor a forked one.

    A daemonic process may have no children, a pool's worker has a core for itself, and what joblib keeps of its workers
    is dead in a forked copy.
    """
    return multiprocessing.parent_process() is None and os.getpid() == _PROCESS


@contextmanager
def one_thread():
    """Inside, torch uses one thread: small networks are faster so, and sums come out the same on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spread(numbered: list, count: int, address: str | None) -> Iterator[tuple[int, object]]:
    """`run` for calls with their places, in `count` processes or on the cluster at `address`."""
    from joblib import Parallel, delayed, parallel_config

    with ExitStack() as stack:
        settings = {"backend": "loky", "inner_max_num_threads": 1}
        if address:
            settings = {"backend": "dask", "client": stack.enter_context(_client(address))}
        with parallel_config(**settings):
            # batches of one: each result is there to be stored as soon as it is made
            pool = Parallel(n_jobs=-1 if address else count, batch_size=1, return_as="generator_unordered")
            results = pool(delayed(_alone)(place, call) for place, call in numbered)
        try:
            for result in results:  # noqa: UP028  `yield from` would close them before warnings are off
                yield result
        except BrokenProcessPool as error:
            raise FaithkdError(
                "a worker process ended abruptly, perhaps for lack of memory; what is finished is kept, and the same "
                "command goes on from there, with fewer processes (--jobs) if memory is short"
            ) from error
        finally:
            with warnings.catch_warnings():  # joblib tells that calls were cancelled, which is what is wanted
                warnings.simplefilter("ignore", UserWarning)
                results.close()


def _alone(place: int, call: Callable[[], object]) -> tuple[int, object]:
    """One call on one thread: all cores have a call of their own."""
    with one_thread():
        return place, call()


def _client(address: str):
    """A connection to the scheduler at `address`, which must have workers."""
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise FaithkdError("a cluster needs the package distributed: pip install 'faithkd[cluster]'") from None
    try:
        if "://" not in address:  # of which dask makes half a client, whose end is a traceback
            raise ValueError(address)
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise FaithkdError(
            f"no dask scheduler answers at {address!r} (--cluster or FAITHKD_CLUSTER; {type(error).__name__}): give "
            "the address that `dask scheduler` prints, for example tcp://127.0.0.1:8786"
        ) from error
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        client.close()
        raise FaithkdError(
            f"the dask scheduler at {address} has no workers: start some with `dask worker {address}`"
        ) from None
    return client
