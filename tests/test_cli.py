"""The command line: what it refuses, runs, skips, resumes and says; in this process, but for one kill."""

import json
import os
import re
import shutil
import signal
import time

import pytest

from faithkd import cli, paths
from faithkd.reproduce import artefacts, notebooks

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
import pathlib, time
pathlib.Path("started").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--profile", "mnst"], "did you mean mnist"),
        (["run", "--set", "train.epoch=2"], "did you mean train.epochs"),
        (["run", "--set", "train.epochs=two"], "train.epochs: Input should be a valid integer, got 'two'"),
        (["run", "--only", "01-motivatoin"], "did you mean 01-motivation"),
        (["run", "--only", "resnet"], "there are 00-quickstart"),
        (["run", "--jobs", "many"], "whole number"),
        (["run", "--cluster", "nowhere"], "tcp://127.0.0.1:8786"),
        (["run", "--jobs", "2", "--cluster", "tcp://127.0.0.1:8786"], "give one"),
        (["run", "--dryrun"], "--dry-run"),
        (["rnu"], "Did you mean 'run'"),
        (["train", "--profile", "smoke", "--jobs", "0"], "whole number"),
        (["keep", "--profile", "smok"], "did you mean smoke"),
        (["params", "mnst"], "did you mean mnist"),
        (["notebooks", "chek"], "there are `check` and `refresh`"),
        (["handout", os.devnull, "00"], f"error: {os.devnull}: File exists; correct the folder"),
    ],
)
def test_a_mistake_is_one_message_before_any_kernel_starts(call, tmp_path, arguments, told):
    printed = call(*arguments, code=2)
    assert printed.lower().count("error: ") == 1 and told in printed and "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_without_notebooks_it_says_where_to_work(call, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert "clone" in call("run", code=2)


def test_a_folder_of_runs_that_cannot_be_used_is_told(call, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    told = call("run", "--profile", "smoke", "--only", "00", code=2)
    assert f"error: FAITHKD_RUNS is {tmp_path / 'runs'}, which is no folder; name one, or unset it" in told


def test_runs_skips_and_remakes(home):
    home.write("00-start", "print(profile)")
    second = home.write("01-first", SAVE, 'save("fig1.csv", "a"); save("fig1.png", "b")')
    figures = home.folder / "figures" / "digits"

    assert "2 of 2" in home.call("run", "--dry-run") and not figures.exists()
    printed = home.call("run")
    assert re.search(r"\[ 1/2\] 00-start .*\[ 2/2\] 01-first .*Title of 01-first · 2 files in", printed, re.DOTALL)
    assert "figures/digits (fig1)" in printed
    provenance = json.loads((figures / "provenance.json").read_text())
    assert provenance["params"]["train"]["epochs"] and set(provenance["seconds"]) == {"00-start", "01-first"}
    assert str(home.folder) not in (figures / "provenance.json").read_text()
    printed = home.call("run")
    assert "0 to run" in printed and printed.count("already there") == 2
    (figures / "fig1.csv").unlink()
    assert home.call("run").count("already there") == 1 and (figures / "fig1.csv").read_text() == "a"
    second.write_text(second.read_text().replace("Title of", "Better title of"))
    assert "0 of 2" in home.call("run", "--dry-run"), "prose may change"

    shutil.rmtree(home.folder / "runs")  # as in a fresh clone
    about = provenance | {"seconds": {"00-start": 1234.5, "01-first": 1234.5, "99-gone": 1.0}}
    (figures / "provenance.json").write_text(json.dumps(about))
    home.write("01-first", SAVE, 'save("fig1.csv", "a", written=False)')
    home.call("run", "--only", "1")
    assert json.loads((figures / "provenance.json").read_text()) == about, "no figure changed: the tree stays clean"
    home.write("01-first", SAVE, 'save("fig1.csv", "c")')
    (home.folder / "runs" / "digits" / "done.json").write_text("[]")
    assert "is ignored and made again" in home.call("run", "--only", "1")
    seconds = json.loads((figures / "provenance.json").read_text())["seconds"]
    assert set(seconds) == {"00-start", "01-first"} and seconds["01-first"] < seconds["00-start"] == 1234.5


def test_what_reaches_the_kernel(home, monkeypatch):
    """Overrides, the number of processes, absolute folders."""
    home.write("01-first", "1 / 0")
    seen = (
        "f\"{p.train.epochs} {p.train.attack.eps} {os.environ['FAITHKD_JOBS']} {os.environ['FAITHKD_DATA']} {p.seed}\""
    )
    home.write("09-milp", SAVE, f'save("table2.csv", {seen})')
    changes = ("train.epochs=2", "train.attack.eps=8/255", f"seed={2**62 - 9}")
    settings = ["--only", "9", *(part for change in changes for part in ("--set", change))]
    monkeypatch.setenv("FAITHKD_DATA", "notebooks")
    monkeypatch.chdir(home.folder)
    home.call("run", *settings, "--jobs", "3")
    (folder,) = (home.folder / "figures").iterdir()
    assert folder.name.startswith("digits+")
    assert [path.name for path in (home.folder / "runs").iterdir()] == [folder.name]
    assert (folder / "table2.csv").read_text() == f"2 8/255 3 {home.folder / 'notebooks'} {2**62 - 9}"
    assert "jobs" not in (folder / "provenance.json").read_text().lower()
    monkeypatch.setenv("FAITHKD_JOBS", "2")
    assert "0 of 1" in home.call("run", *settings, "--dry-run"), "what is done does not depend on it"


def test_killed_it_loses_only_the_notebook_in_work(home):
    home.write("00-quick", "1")
    home.write("01-slow", WAIT)
    process, end = home.start("run", FAITHKD_JOBS="1"), time.monotonic() + 240
    while not (home.folder / "notebooks" / "started").exists():
        assert time.monotonic() < end and process.poll() is None, "nothing happened"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    (home.folder / "notebooks" / "go").touch()
    assert home.call("run").count("already there") == 1


def test_control_c_says_that_nothing_is_lost(home, monkeypatch):
    home.write("00-quick", "1")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "execute", interrupted)
    assert "nothing finished is lost: run the same command to go on" in home.call("run", code=130)


def test_to_retrain_has_a_store_of_its_own_that_a_stopped_run_finds_again(home, monkeypatch):
    """What is trained first, all networks of the profile, has a test of its own."""
    trained = []
    monkeypatch.setattr(cli, "_train", lambda p: trained.append((p.name, artefacts.root().name)))
    note = (
        "from faithkd.reproduce import artefacts\n"
        "made = artefacts.artefact('weights/a.safetensors', {}, lambda _: (print('made') or {}, {}))\n"
        'open("fresh.txt", "a").write(artefacts.root().name + " ")'
    )
    home.write("00-quick", note)
    home.write("01-fails", 'import os\nassert os.path.exists("go")', note)
    home.call("run", "--retrain", code=1)
    (home.folder / "notebooks" / "go").touch()
    printed = home.call("run", "--retrain")
    assert trained == [("digits", "retrain")] * 2 and printed.count("already there") == 1
    assert "2 to run" in home.call("run"), "and without it nothing of that counts"
    assert (home.folder / "notebooks" / "fresh.txt").read_text() == "retrain retrain .store .store "
    texts = [file.read_text() for file in (home.folder / "runs").rglob("*.ipynb")]
    assert sum("made\\n" in text for text in texts) == 2, "once in each store"


def test_what_differs_from_the_committed_measurements_ends_the_run(home, monkeypatch):
    from faithkd.reproduce import experiment

    home.write("00-quick", "1")
    asked = []

    def compare(p, everything):
        asked.append((everything, os.environ.get("FAITHKD_FRESH")))
        return "seed 1 measured anew", ["measurements/a"] if len(asked) == 3 else []

    monkeypatch.setattr(experiment, "compare", compare)
    home.call("run", "--only", "0")
    assert asked == [], "there is nothing to compare with"
    (home.folder / "measurements" / "smoke").mkdir(parents=True)
    assert "seed 1 measured anew" in home.call("run", "--profile", "smoke")
    home.call("run", "--profile", "smoke", "--remeasure")
    assert [everything for everything, _ in asked] == [False, True] and asked[1][1] == "measurements"
    printed = home.call("run", "--profile", "smoke", "--set", "seed=5", code=1)
    assert "differ from the committed measurements by more than rounding:\n  measurements/a" in printed


@pytest.mark.parametrize(
    ("source", "code", "told"),
    [
        # papermill adds one cell, its parameters
        ('raise ValueError("first line\\nthe end")', 1, "error: 01-fails, cell [4]: ValueError: the end\n"),
        ('from faithkd.errors import ParamsError\nraise ParamsError("another eps")', 2, "error: another eps\n  in 01-"),
        ("import os\nos._exit(1)", 1, "its kernel died"),
    ],
)
def test_a_failing_cell_is_named_once(home, source, code, told):
    home.write("01-fails", "x = 1", source)
    printed = home.call("run", code=code)
    assert told in printed and printed.count("error: ") == 1 and "Traceback" not in printed
    assert "runs/digits/01-fails.ipynb" in printed and (home.folder / "runs" / "digits" / "01-fails.ipynb").is_file()
    assert not notebooks.read_json(home.folder / "runs" / "digits" / "done.json")


def test_params_are_shown_with_reasons(call):
    printed = call("params", "mnist", "--set", "train.epochs=2")
    assert any(line.split()[:2] == ["train.epochs", "2"] and "override" in line for line in printed.splitlines())
    assert "§A" in printed


def test_doctor_and_version(call):
    printed = call("doctor")
    assert all(f"\n{word} " in f"\n{printed}" for word in ("python", "torch", "highspy", "gurobipy", "data", "store"))
    assert call("--version").startswith("faithkd ")
