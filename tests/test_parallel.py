"""One process, several and a cluster: the same tables; what is finished stays; mistakes are told."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec

import pandas as pd
import psutil
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from faithkd import data, experiment, parallel, params, store
from faithkd.errors import FaithkdError

needs_dask = pytest.mark.skipif(not find_spec("distributed"), reason="distributed is missing: pip install -e '.[dev]'")


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """No settings of the user, a store for each test, and processes as soon as there are two calls."""
    for name in ("FAITHKD_JOBS", "FAITHKD_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(parallel, "SAMPLE", 0.0)
    monkeypatch.setattr(experiment, "PIECE", {"crown": 5})


@pytest.fixture(scope="module", autouse=True)
def no_worker_stays():
    """joblib keeps its workers for the next calls; here they end with this file's tests."""
    yield
    get_reusable_executor(reuse=True).shutdown(wait=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a dask scheduler with two worker processes, each started as a user would."""
    folder = tmp_path_factory.mktemp("dask")
    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", "at.json"]
        with open(folder / f"{len(started)}.log", "w") as log:
            started.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log))

    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
    for _ in range(2):
        start("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
    try:
        until((folder / "at.json").is_file)
        address = json.loads((folder / "at.json").read_text())["address"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "PATIENCE", 60)
            client = parallel._client(address)
        client.wait_for_workers(2, timeout=60)
        yield address
        client.close()
    finally:
        for process in reversed(started):  # the workers first: without a scheduler they take long to end
            process.kill()
            process.wait(30)


def until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def small_pair():
    """Parameters, images and an untrained pair of networks."""
    p = params.load("smoke", {"data.test_images": 33})
    torch.manual_seed(1)
    nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval() for _ in range(2)]
    return p, data.test_subset(p), nets


def sweep():
    p, images, (guide, network) = small_pair()
    return pd.concat(experiment._brackets(p, guide, [(network, 0.1), (network, 0.2)], images), ignore_index=True)


def stored() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.root().glob("*/*.csv")}


def test_two_notebooks_at_once_measure_once(monkeypatch, capsys):
    monkeypatch.setenv("FAITHKD_JOBS", "1")  # what is patched must be called in this process
    pieces, make = [], experiment._make

    def slow(*arguments):
        pieces.append(arguments)
        time.sleep(0.1)  # so that the other asks for the same meanwhile
        return make(*arguments)

    monkeypatch.setattr(experiment, "_make", slow)
    p, images, (guide, network) = small_pair()
    with ThreadPoolExecutor(2) as notebooks:
        first, second = (notebooks.submit(experiment.bracket, p, guide, network, images, 0.1) for _ in range(2))
        pd.testing.assert_frame_equal(first.result(), second.result())
    assert len(pieces) == len(stored()) > 3  # not twice as many
    assert "another run is measuring on all cores; waiting" in capsys.readouterr().err


def test_every_result_comes_once_with_its_place(monkeypatch):
    calls = [partial(int, str(number)) for number in range(20)]
    for count in ("1", "2"):
        monkeypatch.setenv("FAITHKD_JOBS", count)
        assert sorted(parallel.run(calls)) == [(number, number) for number in range(20)]
    assert list(parallel.run([])) == []


@pytest.mark.parametrize("count", ["1", "2"])
def test_results_have_the_names_of_their_calls_in_order(monkeypatch, count):
    monkeypatch.setenv("FAITHKD_JOBS", count)
    calls = {(name, 0): partial(str.upper, name) for name in "cabfed"}
    for sample in (None, 0.0):
        found = parallel.results(calls, "letters", sample)
        assert list(found) == list(calls) and all(found[name, 0] == name.upper() for name, _ in calls)
    assert parallel.results({}, "nothing") == {}


def test_one_job_and_little_work_stay_in_this_process(monkeypatch):
    here = [(0, os.getpid()), (1, os.getpid())]
    monkeypatch.setenv("FAITHKD_JOBS", "1")
    assert list(parallel.run([os.getpid] * 2)) == here
    monkeypatch.setenv("FAITHKD_JOBS", "2")
    assert os.getpid() not in dict(parallel.run([os.getpid] * 2)).values()
    monkeypatch.setattr(parallel, "SAMPLE", 1.0)
    assert list(parallel.run([os.getpid] * 2)) == here


@needs_dask
def test_one_process_several_and_a_cluster_make_the_same_table(monkeypatch, tmp_path, cluster):
    tables, files = [], []
    for number, (name, value) in enumerate((("JOBS", "1"), ("JOBS", "2"), ("CLUSTER", cluster))):
        monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / str(number)))
        with monkeypatch.context() as patch:
            patch.setenv(f"FAITHKD_{name}", value)
            tables.append(sweep())
        files.append(stored())
    assert len(tables[0]) == 66 and len(files[0]) == 2 * (1 + 2 * 7)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
    assert files[0] == files[1] == files[2]
    monkeypatch.setenv("FAITHKD_CLUSTER", cluster)
    workers = dict(parallel.run([os.getpid] * 40)).values()
    assert len(set(workers)) == 2 and os.getpid() not in workers


def test_pieces_are_the_whole():
    p, images, (guide, network) = small_pair()
    whole = experiment._upper_bound(p, guide, network, images, 0.1)
    cut = experiment.bracket(p, guide, network, images, 0.1)
    assert cut["status"].tolist() == whole["status"].tolist()
    assert (cut["FaithUB"] - whole["FaithUB"]).abs().max() <= 1e-12


def test_a_sweep_that_failed_goes_on_where_it_was(monkeypatch):
    monkeypatch.setenv("FAITHKD_JOBS", "1")
    made, real = [], experiment._confidences

    def third_fails(*arguments):
        made.append(arguments)
        if len(made) == 3:
            raise OSError("pulled the plug")
        return real(*arguments)

    monkeypatch.setattr(experiment, "_confidences", third_fails)
    with pytest.raises(OSError, match="plug"):
        sweep()
    assert len(stored()) == 2 + 2, "two EmpLB and two finished pieces"
    first = sweep()
    assert len(made) == 3 + 26
    pd.testing.assert_frame_equal(sweep(), first)
    assert len(made) == 3 + 26


STUCK = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_parallel
from faithkd import experiment, parallel
real = experiment._confidences
def stuck(*arguments):
    if arguments[-1] == 0.2:
        time.sleep(600)
    return real(*arguments)
if __name__ == "__main__":
    experiment._confidences, experiment.PIECE, parallel.SAMPLE = stuck, {"crown": 5}, 0.0
    test_parallel.sweep()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_sweep_leaves_its_pieces_and_no_process(number, monkeypatch, tmp_path):
    """Nothing depends on timing: all pieces of the second radius are stuck, so that just the others are finished."""
    script, finished = tmp_path / "stuck.py", 2 + 2 * 7
    script.write_text(STUCK)
    environment = {**os.environ, "FAITHKD_JOBS": "2"}
    launch = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", launch, str(script), os.path.dirname(__file__)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: len(list(store.root().glob("*/*.json"))) == finished or process.poll() is not None)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(60) != 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
    until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    assert children and len(stored()) == finished
    made, real = [], experiment._confidences
    monkeypatch.setattr(experiment, "_confidences", lambda *arguments: made.append(arguments) or real(*arguments))
    monkeypatch.setenv("FAITHKD_JOBS", "1")
    again = sweep()
    assert len(made) == 2 * 7
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / "another"))
    pd.testing.assert_frame_equal(again, sweep(), check_exact=True)


@pytest.mark.parametrize("where", ["processes", pytest.param("cluster", marks=needs_dask)])
def test_an_error_in_a_worker_is_the_callers(where, monkeypatch, request):
    if where == "cluster":
        monkeypatch.setenv("FAITHKD_CLUSTER", request.getfixturevalue("cluster"))
    else:
        monkeypatch.setenv("FAITHKD_JOBS", "2")
    calls = [partial(params.load, name) for name in ("smoke", "mnst", "digits")]
    with pytest.raises(params.ParamsError, match="did you mean mnist"):
        list(parallel.run(calls))


@needs_dask
def test_what_other_code_would_make_is_refused(monkeypatch, cluster):
    monkeypatch.setenv("FAITHKD_CLUSTER", cluster)
    monkeypatch.setattr(experiment, "MEASURE", "another engine")
    with pytest.raises(FaithkdError, match="a worker has other code"):
        sweep()
    assert not stored()


@needs_dask
def test_a_caller_that_stops_early_is_not_warned(monkeypatch, cluster):
    monkeypatch.setenv("FAITHKD_CLUSTER", cluster)
    results = parallel.run([partial(int, "1")] * 9)
    assert next(results)[1] == 1
    results.close()
    assert len(list(parallel.run([int] * 3))) == 3


def test_a_worker_that_dies_is_told(monkeypatch):
    monkeypatch.setenv("FAITHKD_JOBS", "2")
    with pytest.raises(FaithkdError, match="worker process ended abruptly"):
        list(parallel.run([partial(os._exit, 1)] * 2))


@pytest.mark.parametrize("text", ["many", "0", "-3", "2.5", "²"])
def test_a_bad_number_of_jobs_is_refused(text, monkeypatch):
    monkeypatch.setenv("FAITHKD_JOBS", text)
    with pytest.raises(FaithkdError, match=r"FAITHKD_JOBS\) is .* whole number"):
        list(parallel.run([int]))


def test_without_a_number_every_core_has_a_process(monkeypatch):
    monkeypatch.setenv("FAITHKD_JOBS", "")
    assert 1 <= parallel.jobs() <= os.cpu_count()


@pytest.mark.parametrize("text", ["nowhere", "tcp://", "http://a:8786", "a:port", "a:0", "a:70000", "a b:8786"])
def test_a_bad_address_is_refused(text, monkeypatch):
    monkeypatch.setenv("FAITHKD_CLUSTER", text)
    with pytest.raises(FaithkdError, match=r"FAITHKD_CLUSTER\) is .*tcp://127.0.0.1:8786"):
        list(parallel.run([int]))


@pytest.mark.parametrize("text", ["a:1", "tcp://10.0.0.1:8786", "tls://host.name-1.org:8786", "tcp://[::1]:8786"])
def test_good_addresses(text, monkeypatch):
    monkeypatch.setenv("FAITHKD_CLUSTER", text)
    assert parallel.cluster() == text


def test_without_distributed_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("FAITHKD_CLUSTER", "tcp://127.0.0.1:8786")
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    with pytest.raises(FaithkdError, match=r"pip install 'faithkd\[cluster\]'"):
        parallel.check()


@needs_dask
def test_a_scheduler_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", 0.5)
    monkeypatch.setenv("FAITHKD_CLUSTER", "tcp://127.0.0.1:1")
    with pytest.raises(FaithkdError, match="no dask scheduler answers at tcp://127.0.0.1:1.*`dask scheduler`"):
        parallel.check()


@needs_dask
def test_a_cluster_without_workers_is_told(monkeypatch):
    from distributed import LocalCluster

    options = {"protocol": "tcp://", "host": "127.0.0.1", "dashboard_address": None}
    with LocalCluster(n_workers=0, processes=False, **options) as empty:
        monkeypatch.setattr(parallel, "PATIENCE", 0.5)
        monkeypatch.setenv("FAITHKD_CLUSTER", empty.scheduler_address)
        with pytest.raises(FaithkdError, match="no workers.*`dask worker"):
            list(parallel.run([int, int]))
