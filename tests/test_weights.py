"""What README says of the committed networks: no profile has to train any, and none lies there for nothing."""

from pathlib import Path

import pytest

from faithkd import experiment, params, store, training
from faithkd.paper import STUDENTS

WEIGHTS = Path(__file__).parents[1] / "weights"
IN_NOTEBOOKS = ("FD-own", "RT-own", "SD-alpha0")  # of losses and an α that notebooks 06, 02 and 03 make up


def needed(p):
    """Parameters, method and α of every network that the notebooks ask the package for."""
    for q in experiment.repeats(p):
        yield from ((q, method, None) for method in ("RT", *STUDENTS))
        yield from ((q, "FD", float(alpha)) for alpha in p.ablation.alpha)
    yield from ((params.changed(p, text), "FD", None) for text in p.ablation.settings)
    for text in p.ablation.readings:
        yield from ((params.changed(p, text), method, None) for method in ("RT", *p.ablation.students))
    for ramp in (0, p.train.ramp_epochs):  # notebook 02
        text = f"train.ramp_epochs={ramp} train.epochs={min(12, p.train.epochs)} train.early_stopping=none"
        yield from ((params.changed(p, f"{text} seed={p.seed + add}"), "RT", None) for add in (0, 1))


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
    for p, method, alpha in needed(params.load(profile)):
        experiment.trained(p, method, alpha)
    files = [path.stem for path in (WEIGHTS / profile).glob("*.safetensors")]
    others = [name for name in files if name.rpartition("-")[2] not in keys]
    expected = [f"{profile}-{label}-seed{params.load(profile).seed}" for label in IN_NOTEBOOKS]
    assert sorted(name.rpartition("-")[0] for name in others) == sorted(expected)
