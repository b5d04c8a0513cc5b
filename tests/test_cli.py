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

from faithkd import cli, paths, records

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


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """`faithkd ...` in this process and the real repository, with runs of its own; returns what it printed."""
    for name, value in {"RUNS": str(tmp_path / "runs"), "JOBS": "1", "CLUSTER": ""}.items():
        monkeypatch.setenv(f"FAITHKD_{name}", value)

    def call(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["faithkd", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = "".join(capsys.readouterr())
        assert ended.value.code == code, printed
        return printed

    return call


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--profile", "mnst"], "did you mean mnist"),
        (["run", "--set", "train.epoch=2"], "did you mean train.epochs"),
        (["run", "--set", "train.epochs=two"], "train.epochs: must be a whole number"),
        (["run", "--set", f"seed={2**64}"], "seed: must be less than 9223372036854775808"),
        (["run", "--only", "01-motivatoin"], "did you mean 01-motivation"),
        (["run", "--only", "resnet"], "there are 00-quickstart"),
        (["run", "--jobs", "many"], "whole number"),
        (["run", "--jobs", "1.5"], "whole number"),
        (["run", "--cluster", "nowhere"], "tcp://127.0.0.1:8786"),
        (["run", "--jobs", "2", "--cluster", "tcp://127.0.0.1:8786"], "give one"),
        (["run", "--dryrun"], "--dry-run"),
        (["rnu"], "Did you mean 'run'"),
        (["train", "--profile", "smoke", "--jobs", "0"], "whole number"),
        (["params", "mnst"], "did you mean mnist"),
        (["notebooks", "chek"], "there are `check` and `refresh`"),
        (["handout", os.devnull, "00"], f"error: {os.devnull}: File exists; correct the folder"),
        (["handout", os.devnull + "/x", "00"], "Not a directory; correct the folder"),
    ],
)
def test_a_mistake_is_one_message_before_any_kernel_starts(call, tmp_path, arguments, told):
    printed = call(*arguments, code=2)
    assert printed.lower().count("error: ") == 1 and told in printed and "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_without_notebooks_it_says_where_to_work(call, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert "clone" in call("run", code=2)


ENTRY = {"key": "0", "fresh": None, "seconds": 1.0, "files": {"a": None}}
OTHERS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b"\xff\xfe{}",
    b"[" * 10**5,
    b'{"00-quickstart": {}}',
    b'{"00-quickstart": 3}',
]
OTHERS += [
    json.dumps({"00-quickstart": ENTRY | other}).encode()
    for other in ({"key": 1}, {"seconds": "1"}, {"seconds": float("nan")}, {"seconds": -1}, {"files": ["a"]})
]


@pytest.mark.parametrize("text", OTHERS, ids=range(len(OTHERS)))
def test_records_of_another_form_are_said_once_and_made_again(call, capsys, monkeypatch, tmp_path, text):
    record = tmp_path / "runs" / "smoke" / "done.json"
    records.write(record, records.DONE, {"00-quickstart": records.Executed(**ENTRY)})
    plan = ("run", "--profile", "smoke", "--only", "00", "--dry-run")
    assert "ignored" not in call(*plan), "a sound one, of other code"
    record.write_bytes(text)
    assert f"{record} is damaged or of another version; it is ignored and made again\n" in call(*plan)
    (tmp_path / "provenance.json").write_bytes(text)
    for count in (1, 0):
        assert records.read(tmp_path / "provenance.json", records.PROVENANCE, "none") == "none"
        assert capsys.readouterr().err.count("is ignored") == count


@pytest.mark.parametrize("place", ["runs", "runs/below", "runs/smoke/done.json", "runs/smoke/lock"])
def test_folders_of_runs_that_cannot_be_used(call, monkeypatch, tmp_path, place):
    monkeypatch.setenv("FAITHKD_RUNS", str(tmp_path / ("runs/below" if "below" in place else "runs")))
    blocked = tmp_path / place.removesuffix("/below")
    blocked.mkdir(parents=True) if "smoke" in place else blocked.write_text("in the way")
    assert "FAITHKD_RUNS to a folder" in call("run", "--profile", "smoke", "--only", "00", code=2)


def test_help_needs_no_heavy_packages():
    code = "import sys; from faithkd import cli; print({'torch', 'papermill', 'pandas'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


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

    (home.folder / "runs" / "digits" / "done.json").write_text("[]")
    (figures / "provenance.json").write_text("[]")
    printed = home.call("run", "--only", "1")
    assert printed.count("is ignored") == 2 and "1 to run" in printed and set(done(home)) == {"01-first"}
    assert set(json.loads((figures / "provenance.json").read_text())["seconds"]) == {"01-first"}


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


def test_what_reaches_the_kernel(home, tmp_path):
    """Overrides, the number of processes, absolute folders; and it is this environment's, whatever a user has."""
    spec = {"argv": ["/gone/python", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    home.write("01-first", "1 / 0")
    seen = (
        "f\"{p.train.epochs} {p.train.attack.eps} {os.environ['FAITHKD_JOBS']} {os.environ['FAITHKD_DATA']} {p.seed}\""
    )
    home.write("09-milp", SAVE, f'save("table2.csv", {seen})')
    settings = (
        "--only",
        "9",
        "--set",
        "train.epochs=2",
        "--set",
        "train.attack.eps=8/255",
        "--set",
        f"seed={2**63 - 9}",
    )
    home.call("run", *settings, "--jobs", "3", FAITHKD_DATA="notebooks", JUPYTER_PATH=str(tmp_path))
    (folder,) = (home.folder / "figures").iterdir()
    assert folder.name.startswith("digits+") and [path.name for path in (home.folder / "runs").iterdir()] == [
        folder.name
    ]
    assert (folder / "table2.csv").read_text() == f"2 8/255 3 {home.folder / 'notebooks'} {2**63 - 9}"
    assert "jobs" not in (folder / "provenance.json").read_text().lower()
    assert "0 of 1" in home.call("run", *settings, "--dry-run", FAITHKD_JOBS="2"), "what is done does not depend on it"


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


@pytest.mark.parametrize(("stop", "jobs"), [(signal.SIGINT, "1"), (signal.SIGKILL, "2")])
def test_stopped_it_loses_only_the_notebook_in_work(home, stop, jobs):
    home.write("00-quick", "1")
    home.write("01-slow", WAIT)
    process = home.start("run", FAITHKD_JOBS=jobs)
    pid_file = home.folder / "notebooks" / "kernel.pid"
    until(lambda: set(done(home)) == {"00-quick"} and pid_file.exists() and pid_file.read_text())
    process.send_signal(stop)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == (130 if stop == signal.SIGINT else -stop) and "Traceback" not in printed
    assert ("run the same command to go on" in printed) == (stop == signal.SIGINT)
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


@pytest.mark.parametrize(
    ("source", "code", "told"),
    [
        # papermill adds one cell, its parameters
        ('raise ValueError("first line\\nthe end")', 1, "error: 01-fails, cell [4]: ValueError: the end\n"),
        ('from faithkd.params import ParamsError\nraise ParamsError("another eps")', 2, "error: another eps\n  in 01-"),
        ("import os\nos._exit(1)", 1, "error: 01-fails: its kernel died"),
    ],
)
def test_a_failing_cell_is_named_once(home, source, code, told):
    home.write("01-fails", "x = 1", source)
    printed = home.call("run", code=code)
    assert told in printed and printed.count("error: ") == 1 and "Traceback" not in printed and not done(home)
    assert "runs/digits/01-fails.ipynb" in printed and (home.folder / "runs" / "digits" / "01-fails.ipynb").is_file()


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


def test_params_are_shown_with_reasons(call):
    printed = call("params", "mnist", "--set", "train.epochs=2")
    assert any(line.split()[:2] == ["train.epochs", "2"] and "override" in line for line in printed.splitlines())
    assert "§A" in printed


def test_doctor_and_version(call, monkeypatch):
    for jobs, told in (("3", "jobs      3 processes"), ("many", "whole number")):
        monkeypatch.setenv("FAITHKD_JOBS", jobs)
        printed = call("doctor")
        assert all(f"\n{word} " in f"\n{printed}" for word in ("python", "torch", "highs", "gurobi", "data", "store"))
        assert told in printed
    assert call("--version").startswith("faithkd ")
