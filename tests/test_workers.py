"""One process, several and a cluster: the same tables; what is finished stays; mistakes are told."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec

import pandas as pd
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from faithkd import params, workers
from faithkd.core import data
from faithkd.errors import FaithkdError, ParamsError
from faithkd.reproduce import artefacts, measuring

needs_dask = pytest.mark.skipif(not find_spec("distributed"), reason="distributed is missing: pip install -e '.[dev]'")


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """No settings of the user, a store for each test, and processes as soon as there are two calls."""
    for name in ("FAITHKD_JOBS", "FAITHKD_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(workers, "SAMPLE", 0.0)
    monkeypatch.setattr(measuring, "QUICK", ())


@pytest.fixture(scope="module", autouse=True)
def no_worker_stays():
    """joblib keeps its workers for the next calls; here they end with this file's tests."""
    yield
    get_reusable_executor(reuse=True).shutdown(wait=True)


@pytest.fixture
def cluster(tmp_path):
    """The address of a dask scheduler with two worker processes, each started as a user would."""
    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", "at.json"]
        with open(tmp_path / f"{len(started)}.log", "w") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log))

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
        for _ in range(2):
            start("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
        until((tmp_path / "at.json").is_file)
        address = json.loads((tmp_path / "at.json").read_text())["address"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers, "PATIENCE", 60)
            with workers._client(address) as client:
                client.wait_for_workers(2, timeout=60)
        yield address
    finally:
        for process in reversed(started):  # the workers first: without a scheduler they take long to end
            process.kill()
            process.wait(30)


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def sweep() -> pd.DataFrame:
    """Brackets of an untrained pair at two radii: 2 pieces of EmpLB and 2 × 4 of FaithUB."""
    p = params.load("smoke", {"data.test_images": 33})
    torch.manual_seed(1)
    guide, network = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval() for _ in range(2))
    network.place = "smoke/seed0/network"
    return measuring.bracketed(p, guide, {"network": network}, [0.1, 0.2], data.test_subset(p))


def stored() -> dict[str, tuple]:
    """Every measurement in the store: what it holds, from what it was made."""
    found = {}
    for file in (artefacts.root() / "measurements").rglob("images=*.safetensors"):
        content, header = artefacts.read(file)
        found[file.relative_to(artefacts.root()).as_posix()] = str(sorted(content.items())), header["inputs"]
    return found


def test_every_result_comes_once_with_its_place_and_in_the_order_of_its_name(monkeypatch):
    calls = [partial(int, str(number)) for number in range(20)]
    for count in ("1", "2"):
        monkeypatch.setenv("FAITHKD_JOBS", count)
        assert sorted(workers.run(calls)) == [(number, number) for number in range(20)]
        found = workers.results({(name, 0): partial(str.upper, name) for name in "cabfed"}, "letters")
        assert list(found.items()) == [((name, 0), name.upper()) for name in "cabfed"]
    assert list(workers.run([])) == [] and workers.results({}, "nothing") == {}


def test_one_job_and_little_work_stay_in_this_process_on_one_thread(monkeypatch):
    here = [(0, os.getpid()), (1, os.getpid())]
    monkeypatch.setenv("FAITHKD_JOBS", "1")
    assert list(workers.run([os.getpid] * 2)) == here
    monkeypatch.setenv("FAITHKD_JOBS", "2")
    assert os.getpid() not in dict(workers.run([os.getpid] * 2)).values()
    monkeypatch.setattr(workers, "SAMPLE", 1.0)
    assert list(workers.run([os.getpid] * 2)) == here
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    said = []
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    with workers.one_thread():
        assert said == [1]
    assert said == [1, 7]


@needs_dask
def test_one_process_several_and_a_cluster_make_the_same_table(monkeypatch, tmp_path, cluster):
    tables, files = [], []
    for number, (name, value) in enumerate((("JOBS", "1"), ("JOBS", "2"), ("CLUSTER", cluster))):
        monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / str(number)))
        with monkeypatch.context() as patch:
            patch.setenv(f"FAITHKD_{name}", value)
            tables.append(sweep())
        files.append(stored())
    assert len(tables[0]) == 66 and len(files[0]) == 2 * (1 + 4)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
    assert files[0] == files[1] == files[2]
    monkeypatch.setenv("FAITHKD_CLUSTER", cluster)
    found = dict(workers.run([os.getpid] * 40)).values()
    assert len(set(found)) == 2 and os.getpid() not in found
    with pytest.raises(ParamsError, match="did you mean mnist"):
        list(workers.run([partial(params.load, name) for name in ("smoke", "mnst", "digits")]))


def test_a_stopped_sweep_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setenv("FAITHKD_JOBS", "1")
    made, real = [], measuring.MAKERS["FaithUB"]

    def stopped(*given):
        if given[-1] == 0.2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(measuring.MAKERS, "FaithUB", stopped)
        sweep()
    assert len(stored()) == 2 + 4, "EmpLB at both radii, FaithUB at the first"
    monkeypatch.setitem(measuring.MAKERS, "FaithUB", lambda *given: made.append(given[-1]) or real(*given))
    again = sweep()
    assert made == [0.2] * 4
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / "another"))
    pd.testing.assert_frame_equal(again, sweep(), check_exact=True)


def test_an_error_and_a_dead_worker_are_the_callers(monkeypatch):
    monkeypatch.setenv("FAITHKD_JOBS", "2")
    with pytest.raises(ParamsError, match="did you mean mnist"):
        list(workers.run([partial(params.load, name) for name in ("smoke", "mnst", "digits")]))
    with pytest.raises(FaithkdError, match="worker process ended abruptly"):
        list(workers.run([partial(os._exit, 1)] * 2))
    with pytest.raises(FaithkdError, match="another version of faithkd"):
        measuring._make((-1, 1), "EmpLB", None, None, [])


@pytest.mark.parametrize("text", ["many", "0", "-3", "2.5", "²"])
def test_a_bad_number_of_jobs_is_refused(text, monkeypatch):
    monkeypatch.setenv("FAITHKD_JOBS", text)
    with pytest.raises(FaithkdError, match=r"FAITHKD_JOBS\) is .* whole number"):
        list(workers.run([int]))
    monkeypatch.setenv("FAITHKD_JOBS", "")
    assert 1 <= workers.jobs() <= os.cpu_count()


@needs_dask
def test_a_scheduler_that_does_not_answer_is_told(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    for address in ("tcp://127.0.0.1:9", "nowhere", "tcp://", "a:port"):
        monkeypatch.setenv("FAITHKD_CLUSTER", address)
        with pytest.raises(FaithkdError, match=f"no dask scheduler answers at '{address}' .*tcp://127.0.0.1:8786"):
            workers.check()
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(FaithkdError, match=r"pip install 'faithkd\[cluster\]'"):
        workers.check()
