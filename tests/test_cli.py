"""The command line: what it refuses, runs, skips, resumes and says; in this process, but for one kill."""

import json
import os
import re
import shutil
import signal
import time

import nbformat
import pytest

from faithkd import cli, paths
from faithkd.reproduce import records

SAVE = """
import json, os
from faithkd import params
p = params.load(profile, overrides)
p.figures_dir.mkdir(parents=True, exist_ok=True)
def save(name, text, written=True):
    path = p.figures_dir / name
    path.write_text(text)
    with open(os.environ["FAITHKD_OUTPUTS"], "a") as noted:
        noted.write(json.dumps({"path": str(path), "written": written}) + "\\n")
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


def done(home, name="digits") -> dict:
    path = home.folder / "runs" / name / "done.json"
    return json.loads(path.read_text()) if path.is_file() else {}


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


ENTRY = {"key": "0", "seconds": 1.0, "files": {"a": None}}
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


@pytest.mark.parametrize("place", ["runs", "runs/below", "runs/smoke/done.json"])
def test_folders_of_runs_that_cannot_be_used(call, monkeypatch, tmp_path, place):
    monkeypatch.setenv("FAITHKD_RUNS", str(tmp_path / ("runs/below" if "below" in place else "runs")))
    blocked = tmp_path / place.removesuffix("/below")
    blocked.mkdir(parents=True) if "smoke" in place else blocked.write_text("in the way")
    assert "FAITHKD_RUNS to a folder" in call("run", "--profile", "smoke", "--only", "00", code=2)


def test_runs_skips_and_remakes(home):
    home.write("00-start", "print(profile)")
    second = home.write("01-first", SAVE, 'save("fig1.csv", "a"); save("fig1.png", "b")')
    figures = home.folder / "figures" / "digits"

    assert "2 of 2" in home.call("run", "--dry-run") and not figures.exists()
    printed = home.call("run")
    assert "[ 1/2] 00-start" in printed and "[ 2/2] 01-first" in printed and "Title of 01-first" in printed
    assert "2 files in" in printed and "figures/digits (fig1)" in printed
    assert set(done(home)["01-first"]["files"]) == {"fig1.csv", "fig1.png"}
    provenance = json.loads((figures / "provenance.json").read_text())
    assert provenance["params"]["train"]["epochs"] and set(provenance["seconds"]) == {"00-start", "01-first"}
    assert str(home.folder) not in (figures / "provenance.json").read_text()
    printed = home.call("run")
    assert "0 to run" in printed and printed.count("already there") == 2

    (figures / "fig1.csv").write_text("changed by hand")
    assert home.call("run").count("already there") == 1 and (figures / "fig1.csv").read_text() == "a"
    notebook = nbformat.read(second, as_version=4)
    notebook.cells[0].source = "# Better prose"
    nbformat.write(notebook, second)
    assert "0 of 2" in home.call("run", "--dry-run")

    shutil.rmtree(home.folder / "runs")  # as in a fresh clone
    about = provenance | {"seconds": {"00-start": 1234.5, "01-first": 1234.5, "99-gone": 1.0}}
    (figures / "provenance.json").write_text(json.dumps(about))
    notebook.cells[-1].source = 'save("fig1.csv", "a", written=False)'
    nbformat.write(notebook, second)
    home.call("run", "--only", "1")
    assert json.loads((figures / "provenance.json").read_text()) == about, "no figure changed: the tree stays clean"
    notebook.cells[-1].source = 'save("fig1.csv", "c")'
    nbformat.write(notebook, second)
    home.call("run", "--only", "1")
    seconds = json.loads((figures / "provenance.json").read_text())["seconds"]
    assert set(seconds) == {"00-start", "01-first"} and seconds["01-first"] < seconds["00-start"] == 1234.5

    (home.folder / "runs" / "digits" / "done.json").write_text("[]")
    (figures / "provenance.json").write_text("[]")
    printed = home.call("run", "--only", "1")
    assert printed.count("is ignored") == 2 and "1 to run" in printed and set(done(home)) == {"01-first"}


def test_what_reaches_the_kernel(home, tmp_path, monkeypatch):
    """Overrides, the number of processes, absolute folders; and it is this environment's, whatever a user has."""
    spec = {"argv": ["/gone/python", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    home.write("01-first", "1 / 0")
    seen = (
        "f\"{p.train.epochs} {p.train.attack.eps} {os.environ['FAITHKD_JOBS']} {os.environ['FAITHKD_DATA']} {p.seed}\""
    )
    home.write("09-milp", SAVE, f'save("table2.csv", {seen})')
    changes = ("train.epochs=2", "train.attack.eps=8/255", f"seed={2**63 - 9}")
    settings = ["--only", "9", *(part for change in changes for part in ("--set", change))]
    monkeypatch.setenv("FAITHKD_DATA", "notebooks")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.chdir(home.folder)
    home.call("run", *settings, "--jobs", "3")
    (folder,) = (home.folder / "figures").iterdir()
    assert folder.name.startswith("digits+")
    assert [path.name for path in (home.folder / "runs").iterdir()] == [folder.name]
    assert (folder / "table2.csv").read_text() == f"2 8/255 3 {home.folder / 'notebooks'} {2**63 - 9}"
    assert "jobs" not in (folder / "provenance.json").read_text().lower()
    monkeypatch.setenv("FAITHKD_JOBS", "2")
    assert "0 of 1" in home.call("run", *settings, "--dry-run"), "what is done does not depend on it"


def test_several_notebooks_are_executed_at_a_time(home, monkeypatch):
    home.write("00-waits", 'import sys\nprint("hello", file=sys.stderr)', WAIT)
    home.write("01-goes", 'import pathlib\npathlib.Path("go").touch()')
    monkeypatch.setenv("FAITHKD_JOBS", "2")
    printed = home.call("run")  # one after another, the first would wait for ever
    assert "2 to run, 2 at a time" in printed and re.search(r"\[ 1/2\] 00-waits [^\n]*gone\n", printed)
    assert (home.folder / "runs" / "digits" / "00-waits.log").read_text() == "hello\n"


def test_killed_it_loses_only_the_notebook_in_work(home):
    home.write("00-quick", "1")
    home.write("01-slow", WAIT)
    process = home.start("run", FAITHKD_JOBS="1")
    pid_file = home.folder / "notebooks" / "kernel.pid"
    until(lambda: set(done(home)) == {"00-quick"} and pid_file.exists() and pid_file.read_text())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    (home.folder / "notebooks" / "go").touch()
    assert home.call("run").count("already there") == 1


def test_control_c_says_that_nothing_is_lost(home, monkeypatch, capsys):
    home.write("00-quick", "1")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_execute", interrupted)
    assert "nothing finished is lost: run the same command to go on" in home.call("run", code=130)


def test_retrain_is_one_run_even_when_it_was_stopped(home):
    note = (
        "import os\nfrom faithkd import experiment, params\n"
        'kept = experiment.fingerprint(experiment.student(params.load("smoke"), "FD"))\n'
        'open("fresh.txt", "a").write(os.environ.get("FAITHKD_FRESH", "0") + kept + "\\n")'
    )
    smoke = ("--profile", "smoke")  # as --retrain begins with all networks of the profile
    home.write("00-quick", note)
    home.write("01-fails", 'import os\nassert os.path.exists("go")')
    assert re.search(r"smoke: \d+ networks had", home.call("train", *smoke))
    assert "no networks had to be trained" in home.call("train", *smoke)
    store = home.folder / ".store" / "weights" / "smoke" / "seed0" / "FD.safetensors"
    before = store.stat().st_mtime_ns
    assert re.search(r"smoke: \d+ networks had", home.call("run", *smoke, "--retrain", code=1))
    assert store.stat().st_mtime_ns == before, "until all is made anew, what was there stays"
    assert "--retrain is waiting" in home.call("run", *smoke, "--only", "0")
    (home.folder / "notebooks" / "go").touch()
    printed = home.call("run", *smoke, "--retrain")
    assert "going on" in printed and "no networks had to be trained" in printed and "already there" in printed
    assert store.stat().st_mtime_ns != before and not (home.folder / ".store" / "retrain" / "smoke").exists()
    assert home.call("run", *smoke).count("already there") == 2
    first, second = (home.folder / "notebooks" / "fresh.txt").read_text().split()
    assert (first[0], second[0]) == ("1", "0") and first[1:] == second[1:]


@pytest.mark.parametrize(
    ("source", "code", "told"),
    [
        # papermill adds one cell, its parameters
        ('raise ValueError("first line\\nthe end")', 1, "error: 01-fails, cell [4]: ValueError: the end\n"),
        ('from faithkd.errors import ParamsError\nraise ParamsError("another eps")', 2, "error: another eps\n  in 01-"),
        ("import os\nos._exit(1)", 1, "error: 01-fails: its kernel died"),
    ],
)
def test_a_failing_cell_is_named_once(home, source, code, told):
    home.write("01-fails", "x = 1", source)
    printed = home.call("run", code=code)
    assert told in printed and printed.count("error: ") == 1 and "Traceback" not in printed and not done(home)
    assert "runs/digits/01-fails.ipynb" in printed and (home.folder / "runs" / "digits" / "01-fails.ipynb").is_file()


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
