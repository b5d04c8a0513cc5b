"""What README says of what is committed: no profile has to train or to measure, and nothing lies there for nothing."""

import re
from pathlib import Path

import pytest

from faithkd import experiment, params
from faithkd.core import training
from faithkd.report.paper import STUDENTS
from faithkd.reproduce import artefacts, measuring

REPOSITORY = Path(__file__).parents[1]
WEIGHTS = REPOSITORY / "weights"
IN_NOTEBOOKS = {"FD-FD-with-the-l2-distance", "RT-ordinary-training", "SD"}  # of what notebooks 06, 02 and 03 make up


@pytest.mark.parametrize("profile", sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir()))
def test_all_networks_of_a_profile_are_committed_and_else_whole_seeds_alone(profile, monkeypatch, tmp_path):
    def fit(*_, description, **__):
        pytest.fail(f"{description}: it is not in weights/")

    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path))
    monkeypatch.setattr(training, "fit", fit)
    p = params.load(profile)
    asked = {experiment.trained(*network)[0].place for network in experiment.networks(p)}
    there = {
        file.relative_to(WEIGHTS).with_suffix("").as_posix() for file in (WEIGHTS / profile).rglob("*.safetensors")
    }
    assert asked <= there
    seeds = {int(found[1]) for place in there if (found := re.fullmatch(rf"{profile}/seed(\d+)/RT", place))}
    for seed in seeds - {q.seed for q in experiment.repeats(p)}:
        q = experiment.reseeded(p, seed - p.seed)
        asked |= {experiment.trained(q, method)[0].place for method in ("RT", *STUDENTS)}
    assert {name.rpartition("/")[2] for name in there - asked} == IN_NOTEBOOKS and len(there - asked) == 3


def test_headers_say_what_the_networks_were_made_from():
    _, header = artefacts.read(WEIGHTS / "mnist" / "alpha=0.75" / "seed0" / "FD.safetensors")
    assert header["inputs"]["settings"]["alpha"] == "0.75" and header["inputs"]["method"] == "FD"
    assert len(header["notes"]["history"]) == header["inputs"]["schedule"]["epochs"] == 64


@pytest.mark.parametrize(
    "profile", sorted(path.name for path in (REPOSITORY / "measurements").iterdir() if path.is_dir())
)
def test_the_committed_measurements_hold_tables_1_to_3_of_every_seed(profile, monkeypatch, tmp_path, real_data):
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path))
    monkeypatch.setattr(measuring, "MAKERS", {})  # whoever measures fails
    seeds = experiment.repeats(params.load(profile))
    assert [name for q in seeds for name in experiment.measure_seed(q)] == [f"seed {q.seed}" for q in seeds]


def test_the_committed_measurements_of_digits_are_all_that_notebooks_show(monkeypatch, tmp_path):
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path))
    monkeypatch.setattr(measuring, "MAKERS", {})
    assert list(experiment.measure_all(params.load("digits")))[-1] == "readings"


def test_a_seed_of_digits_measured_anew_is_what_is_committed(monkeypatch, tmp_path):
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path))
    found, complaints = experiment.compare(params.load("digits"))
    assert not complaints and "measured anew" in found, found


def test_measurements_stay_small():
    files = list((REPOSITORY / "measurements").rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 20e6
    assert all(file.stat().st_size < 1e6 for file in files)
