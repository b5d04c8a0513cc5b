"""What README says of the committed networks: no profile has to train any, and none lies there for nothing."""

from pathlib import Path

import pytest

from faithkd import experiment, params
from faithkd.core import training
from faithkd.reproduce import artefacts

WEIGHTS = Path(__file__).parents[1] / "weights"
IN_NOTEBOOKS = {"FD-FD-with-the-l2-distance", "RT-ordinary-training", "SD"}  # of what notebooks 06, 02 and 03 make up


@pytest.mark.parametrize("profile", sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir()))
def test_all_networks_of_a_profile_are_committed_and_no_others(profile, monkeypatch, tmp_path):
    def fit(*_, description, **__):
        pytest.fail(f"{description}: it is not in weights/")

    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path))
    monkeypatch.setattr(training, "fit", fit)
    asked = set()
    for network in experiment.networks(params.load(profile)):
        asked.add(experiment.trained(*network)[0].place)
    there = {
        file.relative_to(WEIGHTS).with_suffix("").as_posix() for file in (WEIGHTS / profile).rglob("*.safetensors")
    }
    assert asked <= there
    assert {name.rpartition("/")[2] for name in there - asked} == IN_NOTEBOOKS and len(there - asked) == 3


def test_headers_say_what_the_networks_were_made_from():
    _, header = artefacts.read(WEIGHTS / "mnist" / "alpha=0.75" / "seed0" / "FD.safetensors")
    assert header["inputs"]["settings"]["alpha"] == "0.75" and header["inputs"]["method"] == "FD"
    assert len(header["notes"]["history"]) == header["inputs"]["schedule"]["epochs"] == 64
