"""What README says of the committed networks: no profile has to train any, and none lies there for nothing."""

from pathlib import Path

import pytest

from faithkd import experiment, params, store, training

WEIGHTS = Path(__file__).parents[1] / "weights"
IN_NOTEBOOKS = ("FD-own", "RT-own", "SD-alpha0")  # of losses and an α that notebooks 06, 02 and 03 make up


@pytest.mark.parametrize("profile", sorted(path.name for path in WEIGHTS.iterdir()))
def test_all_networks_of_a_profile_are_committed_and_no_others(profile, monkeypatch, tmp_path):
    keys, key = set(), store.key

    def noted(kind, /, **depends):
        keys.add(key(kind, **depends))
        return key(kind, **depends)

    def fit(*_, description, **__):
        pytest.fail(f"{description}: it is not in weights/")

    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path))
    monkeypatch.setattr(store, "key", noted)
    monkeypatch.setattr(training, "fit", fit)
    for network in experiment.networks(params.load(profile)):
        experiment.trained(*network)
    files = [path.stem for path in (WEIGHTS / profile).glob("*.safetensors")]
    others = [name for name in files if name.rpartition("-")[2] not in keys]
    expected = [f"{profile}-{label}-seed{params.load(profile).seed}" for label in IN_NOTEBOOKS]
    assert sorted(name.rpartition("-")[0] for name in others) == sorted(expected)
