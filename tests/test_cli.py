"""The command line: what it refuses, runs, skips, resumes and says."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from faithkd import cli

SAVE = """
import json, os
from faithkd import params
p = params.load(profile, overrides)
p.figures_dir.mkdir(parents=True, exist_ok=True)
def save(name, text):
    path = p.figures_dir / name
    path.write_text(text)
    with open(os.environ["FAITHKD_OUTPUTS"], "a") as noted:
        noted.write(json.dumps({"path": str(path)}) + "\\n")
"""
WAIT = """
import os, pathlib, time
pathlib.Path("kernel.pid").write_text(str(os.getpid()))
while not pathlib.Path("go").exists():
    time.sleep(0.05)
"""


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process is there and at work; one that ended but is not yet collected is not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not os.path.isdir("/proc")


def done(home, name="digits") -> dict:
    path = home.folder / "runs" / name / "done.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--profile", "mnst"], "did you mean mnist"),
        (["--set", "train.epoch=2"], "did you mean train.epochs"),
        (["--set", "train.epochs=two"], "train.epochs"),
        (["--only", "01-frist"], "did you mean 01-first"),
        (["--only", "77"], "there are 01-first"),
        (["--jobs", "many"], "whole number"),
        (["--cluster", "nowhere"], "tcp://127.0.0.1:8786"),
        (["--jobs", "2", "--cluster", "tcp://127.0.0.1:8786"], "give one"),
    ],
)
def test_a_mistake_is_one_message_before_any_kernel_starts(home, arguments, told):
    home.write("01-first", "1 / 0")
    printed = home.call("run", *arguments, code=2)
    assert printed.startswith("error: ") and told in printed and "Traceback" not in printed
    assert not (home.folder / "runs").exists()


def test_without_notebooks_it_says_where_to_work(home):
    assert "clone" in home.call("run", code=2)


def test_help_needs_no_heavy_packages():
    code = "import sys; from faithkd import cli; print({'torch', 'papermill', 'pandas'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_dry_run_runs_nothing(home):
    home.write("01-first", "1 / 0")
    printed = home.call("run", "--dry-run")
    assert "01-first" in printed and "would run" in printed
    assert not (home.folder / "runs").exists() and not (home.folder / "figures").exists()


def test_runs_skips_and_remakes(home):
    home.write("00-start", "print(profile)")
    second = home.write("01-first", SAVE, 'save("fig1.csv", "a"); save("fig1.png", "b")')
    figures = home.folder / "figures" / "digits"

    printed = home.call("run")
    assert "[ 1/2] 00-start" in printed and "[ 2/2] 01-first" in printed and "Title of 01-first" in printed
    assert "not known yet" in printed and "2 files in" in printed and "figures/digits (fig1)" in printed
    assert set(done(home)["01-first"]["files"]) == {"fig1.csv", "fig1.png"}
    provenance = json.loads((figures / "provenance.json").read_text())
    assert provenance["params"]["train"]["epochs"] and set(provenance["seconds"]) == {"00-start", "01-first"}
    assert str(home.folder) not in (figures / "provenance.json").read_text()

    printed = home.call("run")
    assert "0 to run" in printed and printed.count("already there") == 2

    (figures / "fig1.csv").write_text("changed by hand")
    printed = home.call("run")
    assert printed.count("already there") == 1 and "left" in printed and "not known" not in printed
    assert (figures / "fig1.csv").read_text() == "a"

    notebook = nbformat.read(second, as_version=4)
    notebook.cells[0].source = "# Better prose"
    nbformat.write(notebook, second)
    assert "0 of 2" in home.call("run", "--dry-run")
    notebook.cells[-1].source = 'save("fig1.csv", "c")'
    nbformat.write(notebook, second)
    assert "1 of 2" in home.call("run", "--dry-run")
    home.call("run", "--only", "1")
    assert (figures / "fig1.csv").read_text() == "c"
    assert set(json.loads((figures / "provenance.json").read_text())["seconds"]) == {"00-start", "01-first"}


def test_a_run_of_one_notebook_leaves_the_times_of_the_others(home):
    home.write("00-start", "print(profile)")
    home.write("01-first", SAVE, 'save("fig1.csv", "a")')
    about = home.folder / "figures" / "digits" / "provenance.json"
    home.call("run")
    shutil.rmtree(home.folder / "runs")  # as in a fresh clone
    made = json.loads(about.read_text())
    about.write_text(json.dumps(made | {"seconds": {"00-start": 1234.5, "01-first": 1234.5, "99-gone": 1.0}}))
    home.call("run", "--only", "1")
    seconds = json.loads(about.read_text())["seconds"]
    assert set(seconds) == {"00-start", "01-first"} and seconds["01-first"] < seconds["00-start"] == 1234.5
    about.write_text(json.dumps(made | {"params": made["params"] | {"seed": 9}}))
    home.write("01-first", SAVE, 'save("fig1.csv", "b")')
    home.call("run", "--only", "1")
    assert set(json.loads(about.read_text())["seconds"]) == {"01-first"}


def test_only_and_overrides_reach_the_kernel(home):
    home.write("01-first", "1 / 0")
    home.write("09-milp", SAVE, 'save("table2.csv", f"{p.train.epochs} {p.train.attack.eps}")')
    home.call("run", "--only", "9", "--set", "train.epochs=2", "--set", "train.attack.eps=8/255")
    (folder,) = (home.folder / "figures").iterdir()
    assert folder.name.startswith("digits+") and "train.epochs=2" in folder.name
    assert (folder / "table2.csv").read_text() == "2 8/255"
    assert [path.name for path in (home.folder / "runs").iterdir()] == [folder.name]


def test_kernels_get_absolute_folders(home):
    home.write("01-first", 'import os\nassert os.path.isabs(os.environ["FAITHKD_DATA"]), os.environ["FAITHKD_DATA"]')
    home.call("run", FAITHKD_DATA="notebooks")


def test_a_kill_loses_only_the_notebook_in_work(home):
    home.write("00-quick", "1")
    home.write("01-slow", WAIT)
    process = home.start("run")
    pid_file = home.folder / "notebooks" / "kernel.pid"
    until(lambda: pid_file.exists() and pid_file.read_text())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: not lives(int(pid_file.read_text())), 20)
    assert set(done(home)) == {"00-quick"}

    (home.folder / "notebooks" / "go").touch()
    printed = home.call("run")
    assert printed.count("already there") == 1 and set(done(home)) == {"00-quick", "01-slow"}


def test_control_c_says_that_nothing_is_lost(home):
    home.write("00-quick", "1")
    home.write("01-slow", WAIT)
    process = home.start("run")
    pid_file = home.folder / "notebooks" / "kernel.pid"
    until(lambda: pid_file.exists() and pid_file.read_text())
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "run the same command to go on" in printed
    assert "Traceback" not in printed
    until(lambda: not lives(int(pid_file.read_text())), 20)


def test_several_notebooks_are_executed_at_a_time(home):
    home.write("00-waits", 'import sys\nprint("hello", file=sys.stderr)', WAIT)
    home.write("01-goes", 'import pathlib\npathlib.Path("go").touch()')
    home.write("02-last", "1")
    printed = home.call("run", FAITHKD_JOBS="2")  # one after another, the first would wait for ever
    assert "3 to run, 2 at a time" in printed and "00 | hello\n" in printed
    assert re.search(r"\[ 1/3\] 00-waits .*\[ 3/3\] 02-last [^\n]*gone\n", printed, re.DOTALL), printed
    seconds = json.loads((home.folder / "figures" / "digits" / "provenance.json").read_text())["seconds"]
    gone = re.findall(r"(\d+):(\d\d) gone", printed)[-1]
    assert abs(sum(seconds.values()) - 60 * int(gone[0]) - int(gone[1])) < 1, "together they are the whole run's"


def test_where_one_of_several_notebooks_fails_the_run_ends(home):
    home.write("00-waits", WAIT)
    home.write("01-fails", 'from faithkd.params import ParamsError\nraise ParamsError("choose another eps")')
    printed = home.call("run", code=2, FAITHKD_JOBS="2")
    assert "error: choose another eps\n  in 01-fails" in printed and "Traceback" not in printed
    pid_file = home.folder / "notebooks" / "kernel.pid"
    until(lambda: not pid_file.exists() or not lives(int(pid_file.read_text())), 20)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_several_are_executed(home, stop):
    home.write("00-quick", "1")
    home.write("01-slow", WAIT)
    process = home.start("run", FAITHKD_JOBS="2")
    pid_file = home.folder / "notebooks" / "kernel.pid"
    until(lambda: set(done(home)) == {"00-quick"} and pid_file.exists() and pid_file.read_text())
    process.send_signal(stop)
    printed, _ = process.communicate(timeout=120)
    assert "Traceback" not in printed and ("to go on" in printed) == (stop == signal.SIGINT)
    until(lambda: not lives(int(pid_file.read_text())), 20)
    (home.folder / "notebooks" / "go").touch()
    assert home.call("run").count("already there") == 1


def test_two_runs_at_once_wait_for_each_other(home):
    home.write("01-slow", WAIT)
    first = home.start("run")
    until((home.folder / "notebooks" / "kernel.pid").exists)
    second = home.start("run")
    assert "waiting" in second.stdout.readline()
    (home.folder / "notebooks" / "go").touch()
    assert first.wait(120) == 0 and second.wait(120) == 0
    assert "already there" in second.stdout.read()
    first.stdout.close()
    second.stdout.close()


def test_retrain_is_one_run_even_when_it_was_stopped(home):
    note = 'import os\nopen("fresh.txt", "a").write(os.environ.get("FAITHKD_FRESH", "none") + "\\n")'
    smoke = ("--profile", "smoke")  # as --retrain begins with all networks of the profile
    home.write("00-quick", note)
    home.write("01-fails", 'import os\nassert os.path.exists("go")\n' + note)
    home.call("run", *smoke, "--only", "0")
    assert re.search(r"smoke: \d+ networks had", home.call("run", *smoke, "--retrain", code=1))
    assert "--retrain is waiting" in home.call("run", *smoke, "--only", "0")
    (home.folder / "notebooks" / "go").touch()
    said = home.call("run", *smoke, "--retrain")
    assert "going on" in said and "no networks had to be trained" in said
    home.call("run", *smoke)
    before, first, second = (home.folder / "notebooks" / "fresh.txt").read_text().split()
    assert before == "none" and first == second != "none"
    home.call("run", *smoke, "--retrain", "--only", "0")
    assert (home.folder / "notebooks" / "fresh.txt").read_text().split()[-1] not in ("none", first)


def test_train_makes_all_networks_once(home):
    assert re.search(r"smoke: \d+ networks had", home.call("train", "--profile", "smoke"))
    assert "no networks had to be trained" in home.call("train", "--profile", "smoke")
    home.write("00-student", 'from faithkd import experiment, params\nexperiment.student(params.load("smoke"), "FD")')
    made = sorted((home.folder / ".store" / "network").iterdir())
    home.call("run", "--profile", "smoke")
    assert sorted((home.folder / ".store" / "network").iterdir()) == made


def test_jobs_reach_the_kernels_and_nothing_else(home):
    home.write("01-first", SAVE, 'save("fig1.csv", "a"); open("jobs.txt", "a").write(os.environ["FAITHKD_JOBS"])')
    provenance = home.folder / "figures" / "digits" / "provenance.json"
    left = []
    for jobs in ("3", "1"):
        home.call("run", "--jobs", jobs)
        left.append((provenance.read_bytes(), done(home)["01-first"]["key"]))
        assert "0 of 1" in home.call("run", "--dry-run", FAITHKD_JOBS="2"), "what is done does not depend on it"
        (home.folder / "figures" / "digits" / "fig1.csv").unlink()
    assert (home.folder / "notebooks" / "jobs.txt").read_text() == "31"
    assert left[0][1] == left[1][1] and b"jobs" not in left[0][0].lower()


def test_a_failing_cell_is_named_once(home):
    home.write("01-fails", "x = 1", 'raise ValueError("first line\\nthe end")')
    printed = home.call("run", code=1)
    assert "error: 01-fails, cell [4]: ValueError: the end" in printed  # papermill adds one cell, its parameters
    assert "runs/digits/01-fails.ipynb" in printed and "Traceback" not in printed
    assert (home.folder / "runs" / "digits" / "01-fails.ipynb").is_file() and not done(home)


def test_a_users_mistake_in_a_kernel_shows_its_message_only(home):
    home.write("01-fails", 'from faithkd.params import ParamsError\nraise ParamsError("choose another eps")')
    printed = home.call("run", code=2)
    assert "error: choose another eps\n" in printed and "ParamsError" not in printed


def test_a_dead_kernel_is_told(home):
    home.write("01-dies", "import os\nos._exit(1)")
    assert "its kernel died" in home.call("run", code=1)


def test_progress_of_kernels_is_tame_in_a_log():
    log = io.StringIO()
    relay = cli._Relay(log)
    for percent in range(100):
        relay.write(f"\repoch 1: {percent}%")
    relay.write("\repoch 1: 100%\n")
    relay.write("a warning\n\r   \r")
    assert log.getvalue() == "epoch 1: 100%\na warning\n"


def test_remaining_time():
    assert cli._remaining(["a"], {}, {}) is None
    assert cli._remaining(["a", "b"], {"a": 10, "b": 20}, {}) == 30
    assert cli._remaining(["b"], {"a": 10, "b": 20}, {"a": 5}) == 10  # twice as fast as before
    assert cli._remaining(["b", "c"], {}, {"a": 5}) == 10  # nothing known: as long as those so far
    assert cli._about(None) == "how long is not known yet" and cli._about(600) == "about 10 min left"


def test_all_errors_of_the_package_count_as_mistakes():
    assert {"FaithkdError", "ParamsError", "NotebookError"} <= cli._mistakes()


def test_params_are_shown_with_reasons(home):
    printed = home.call("params", "mnist", "--set", "train.epochs=2")
    assert any(line.split()[:2] == ["train.epochs", "2"] and "override" in line for line in printed.splitlines())
    assert "§A" in printed


def test_doctor_and_version(home):
    printed = home.call("doctor")
    assert all(f"\n{word} " in f"\n{printed}" for word in ("python", "torch", "highs", "gurobi", "data", "store"))
    assert "jobs      3 processes" in home.call("doctor", FAITHKD_JOBS="3")
    assert "whole number" in home.call("doctor", FAITHKD_JOBS="many")
    assert home.call("--version").startswith("faithkd ")


def test_a_corrupt_record_is_made_again(home):
    home.write("01-first", "1")
    home.call("run")
    (home.folder / "runs" / "digits" / "done.json").write_text("{")
    printed = home.call("run")
    assert "is ignored" in printed and "1 to run" in printed
