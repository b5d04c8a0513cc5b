"""params/*.yaml, the overrides, and what a user reads after a mistake."""

import copy
import json
import pickle
import re

import pandas
import pytest

from faithkd import params
from faithkd.errors import FaithkdError
from faithkd.reproduce.params import ParamsError, Ratio

PROFILES = ["cifar10", "digits", "fashion_mnist", "mnist", "smoke"]


def described(p) -> pandas.DataFrame:
    return pandas.DataFrame(p.described(), columns=["name", "value", "reason"])


def refusal(profile="mnist", overrides=None) -> str:
    with pytest.raises(ParamsError) as caught:
        params.load(profile, overrides)
    return str(caught.value)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An own repository folder whose params/mine.yaml is the digits profile, to be damaged by tests."""
    (tmp_path / "params").mkdir()
    text = (params.ROOT / "params" / "digits.yaml").read_text(encoding="utf-8")
    (tmp_path / "params" / "mine.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(params, "ROOT", tmp_path)
    return tmp_path


def edit(home, old, new):
    path = home / "params" / "mine.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8", errors="surrogateescape")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_value_of_every_profile_has_a_reason(profile):
    p = params.load(profile)
    table = described(p)
    assert len(table) > 50 and table.name.is_unique
    assert list(table.name[table.reason.str.len() < 2]) == []
    assert p.profile == p.name == profile and p.overrides == {} and params.profiles() == PROFILES
    assert p.figures_dir == params.ROOT / "figures" / profile


# The paper's appendix: method -> learning rate, its minimum, weight decay, temperature, alpha.
# RSLAD's temperature is that of eq. (5), not of the prose.
APPENDIX = {
    "mnist": {
        "RT": (0.04, 0.04 / 32, 0.002),
        "SD": (0.04, 0.04 / 16, 0.001, 4, 0.5),
        "ARD": (0.04, 0.04 / 32, 0.001, 2, 0.5),
        "RSLAD": (0.04, 0.04 / 32, 0.001, 1, 0.5),
        "FD": (0.04, 0.04 / 16, 0.001, 2, 0.5),
    },
    "fashion_mnist": {
        "RT": (0.04, 0.04 / 32, 0.002),
        "SD": (0.01, 0.01 / 32, 0, 4, 0.5),
        "ARD": (0.01, 0.01 / 8, 0.001, 2, 0.5),
        "RSLAD": (0.02, 0.02 / 32, 0, 1, 0.5),
        "FD": (0.02, 0.02 / 32, 0.001, 2, 0.5),
    },
    "cifar10": {
        "RT": (0.1, 0.01 / 32, 0.001),
        "SD": (0.1, 0.1 / 32, 0.001, 2, 0.5),
        "ARD": (0.1, 0.1 / 32, 0.001, 2, 0.5),
        "RSLAD": (0.1, 0.1 / 16, 0, 1, 0.5),
        "FD": (0.1, 0.1 / 32, 0, 2, 1.0),
    },
}


@pytest.mark.parametrize("profile", APPENDIX)
def test_training_settings_are_the_papers(profile):
    train = params.load(profile).train
    names = ("learning_rate", "learning_rate_min", "weight_decay", "temperature", "alpha")
    ours = {
        method: tuple(getattr(getattr(train, method), name) for name in names[: len(values)])
        for method, values in APPENDIX[profile].items()
    }
    assert ours == APPENDIX[profile]
    cifar10 = profile == "cifar10"
    assert (train.epochs, train.patience) == ((128, 12) if cifar10 else (64, 8))
    assert (train.momentum, train.attack.steps) == (0.9, 10)
    attack = (0.2, 0.05) if profile == "mnist" else (8 / 255, 2 / 255)
    assert (train.attack.eps, train.attack.step_size) == attack


def test_evaluation_settings_are_the_papers():
    mnist, fashion, cifar10 = (params.load(name) for name in APPENDIX)
    assert mnist.evaluate.eps == [0.025, 0.05, 0.1, 0.15, 0.2]
    assert [str(eps) for eps in fashion.evaluate.eps] == ["4/255", "8/255", "12/255", "16/255", "20/255"]
    assert cifar10.evaluate.eps == fashion.evaluate.eps
    assert [p.data.test_images for p in (mnist, fashion)] == [1000] * 2, "no fewer than paper.IMAGES"
    assert cifar10.data.test_images * cifar10.repeats >= 1000, "and as many over the seeds"
    for p in (mnist, fashion, cifar10):
        assert (p.evaluate.steps, p.evaluate.step_factor, p.evaluate.restarts) == (50, 2.5, 5)
        assert (p.data.space, p.data.clip) == ("standardised", False)
        assert p.evaluate.table3.steps == [1, 5, 25, 50] and p.ablation.alpha == [0.5, 0.75, 1.0]
    assert mnist.models.teacher.hidden == [30] * 5 and mnist.models.student.hidden == [20] * 4
    assert fashion.models.teacher.hidden == [64, 32, 32, 32, 32, 16, 10]
    assert fashion.models.student.hidden == [30, 30, 30, 30, 10]
    assert cifar10.models.teacher.filters == [8, 16, 32] and cifar10.models.teacher.hidden == [128, 64]
    assert cifar10.models.student.filters == [6, 16, 32] and cifar10.models.student.hidden == [64, 32]


def test_overrides_of_all_forms():
    for overrides in ({"train.epochs": 2}, ["train.epochs=2"], "train.epochs=2", ["train.epochs = 2"]):
        p = params.load("mnist", overrides)
        assert p.train.epochs == 2 and p.overrides == {"train.epochs": 2} and p.name == "mnist+train.epochs=2"
    assert all(params.load("mnist", nothing) == params.load("mnist") for nothing in (None, {}, [], ""))
    p = params.load("mnist", ["evaluate.eps=[8/255, 0.1]", "train.FD.learning_rate=0.1/2", "device=cuda:1"])
    assert p.evaluate.eps == [8 / 255, 0.1] and str(p.evaluate.eps[0]) == "8/255"
    assert p.train.FD.learning_rate == 0.05 and p.device == "cuda:1"
    assert params.load("mnist", p.overrides) == p
    assert params.load("mnist", json.loads(json.dumps(p.overrides))) == p  # the way through papermill


def test_an_override_shows_in_the_table_also_of_a_group_given_whole():
    table = described(params.load("mnist", {"train.epochs": 2})).set_index("name")
    assert table.value["train.epochs"] == "2"
    assert table.reason["train.epochs"] == "override (profile: 64; §A.1)"
    assert table.reason["train.patience"] == "§A.1"
    whole = params.load("digits", ["evaluate.histograms={fig2: 7}"])
    assert whole.evaluate.histograms == {"fig2": 7}
    assert params.load("digits", ["evaluate.histograms.fig2=7"]).evaluate.histograms == {"fig2": 7, "fig3": 1}
    reasons = described(whole).set_index("name").reason
    assert reasons["evaluate.histograms.fig2"].startswith("override (profile: 0;")


def test_names_are_safe_for_folders():
    p = params.load("mnist", ["evaluate.eps=[8/255, 0.1]", "device=cuda:1"])
    assert p.name == "mnist+device=cuda-1+evaluate.eps=8-255,0.1"
    many = ["evaluate.eps=[0.011,0.022,0.033,0.044,0.055,0.066]", "train.FD.learning_rate=0.03", "seed=1"]
    names = {params.load("mnist", many).name, params.load("mnist", [*many[:2], "seed=2"]).name}
    assert len(names) == 2 and all(len(name) <= 80 for name in names)
    assert params.load("mnist", many).name == params.load("mnist", many[::-1]).name


def test_typos_are_answered_with_a_suggestion():
    assert refusal("minst").startswith("there is no profile 'minst'; did you mean mnist?")
    message = refusal("mnist", {"train.epoch": 2})
    assert "override train.epoch=2" in message and "did you mean train.epochs?" in message
    assert "did you mean train.epochs?" in refusal("mnist", {"epochs": 2})
    assert "did you mean train.RSLAD.temperature?" in refusal("mnist", ["train.rslad.temprature=1"])
    message = refusal("mnist", ["train.attack=1"])
    assert "a group; set one of train.attack.eps, train.attack.step_size, train.attack.steps" in message
    assert "write name=value, for example train.epochs=2 (it has no =)" in refusal("mnist", ["train.epochs"])
    assert "overrides are 5: give names and values" in refusal("mnist", 5)
    assert "write name=value" in refusal("mnist", ["train.epochs=[1"])
    assert "give it once" in refusal("mnist", ["train.epochs=2", "train.epochs=3"])
    assert issubclass(ParamsError, FaithkdError)
    assert len(refusal("mnist", ["train.epochs=0", "seed=x", "train.SD.alpha=2"]).splitlines()) == 3, "all at once"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.epochs=2.5", "Input should be a valid integer, got 2.5"),
        ("train.epochs=true", "Input should be a valid integer, got True"),
        ("train.epochs=0", "Input should be greater than or equal to 1, got 0"),
        ("data.test_images=10001", "must be at most 10000"),
        ("data.validation=0", "greater than or equal to 1"),  # the accuracies of notebook 02 are those of these images
        ("data.validation=60000", "leaves no images to train on"),
        ("data.clip=yes", "Input should be a valid boolean, got 'yes'"),
        ("data.clip=true", "needs data.space=pixel"),
        ("data.mean=[0.1, 0.2]", "needs one number per channel: 1 for mnist"),
        ("data.mean=[true]", "must be a finite number such as 0.1 or 8/255, got True"),
        ("data.name=mnits", "'fashion_mnist' or 'cifar10', got 'mnits'"),
        ("train.FD.alpha=1.1", "less than or equal to 1, got 1.1"),
        ("train.FD.temperature=0", "Input should be greater than 0, got 0"),
        ("train.FD.temperature=.nan", "must be a finite number"),
        ("train.FD.learning_rate=1/0", "must be a finite number"),
        ("train.FD.learning_rate=0.001", "train.FD.learning_rate_min: must be at most learning_rate (0.001)"),
        ("evaluate.eps=[]", "at least 1 item"),
        ("evaluate.eps=0.1", "Input should be a valid list, got 0.1"),
        ("evaluate.eps=[0.1, x]", "evaluate.eps[1]: must be a finite number such as 0.1 or 8/255, got 'x'"),
        ("evaluate.eps=[0.1, 0.1]", "must increase from value to value"),
        ("evaluate.histograms={fig9: 0}", "Input should be 'fig2' or 'fig3', got 'fig9'"),
        ("models.teacher.hidden=[20, 0]", "models.teacher.hidden[1]: Input should be greater than or equal to 1"),
        ("models.teacher.kind=round", "expected tags: 'fully_connected', 'convolutional'"),
        ("bounds.method=crwon", "got 'crwon'"),
        ("device=gpu", "should match pattern '^(auto|cpu|mps|cuda"),
        (f"seed={2**64}", "Input should be less than"),
        ("seed=" + "9" * 5000, "write name=value, for example train.epochs=2 (Exceeds the limit"),
        ("seed=2024-99-99", "write name=value, for example train.epochs=2 (month must be in 1..12"),
        ("seed=\0", "write name=value, for example train.epochs=2 (unacceptable character"),
        ("seed=", "Input should be a valid integer, got None"),
    ],
)
def test_bad_values_are_refused_in_few_words(override, what):
    message = refusal("mnist", [override])
    assert what in message and override.partition("=")[0].rpartition(".kind")[0] in message
    assert len(message) < 300 and "pydantic" not in message


def test_convolutional_nets_need_colour_images():
    cifar10 = params.load("cifar10", ["models.student.filters=[2, 2, 2]"])
    assert cifar10.models.student.filters == [2, 2, 2]
    message = refusal("cifar10", ["data.name=mnist", "data.mean=[0]", "data.std=[1]"])
    assert "models.teacher.kind: convolutional nets need images of 3x32x32" in message


def test_mistakes_in_a_profile_name_the_file(home):
    edit(home, "  epochs:", "  epoch:")
    message = refusal("mine")
    assert "params/mine.yaml: train.epochs: Field required" in message
    assert "params/mine.yaml: train.epoch: is not a parameter here; did you mean train.epochs?" in message


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("seed: 0", "seed: [0", "params/mine.yaml, line"),
        ("seed: 0", "seed: 0\nseed: 1", 'params/mine.yaml, line 4: found duplicate key "seed"'),
        ("seed: 0", "seed: zero", "params/mine.yaml: seed: Input should be a valid integer, got 'zero'"),
        ("seed: 0", "overrides: {}\nseed: 0", "params/mine.yaml: overrides is not set in a profile"),
        ("seed: 0", "7: x\nseed: 0", "params/mine.yaml: [7]"),
        ("    kind: fully_connected", "    shape: round", "params/mine.yaml: models.teacher: Unable to extract tag"),
        ("seed: 0", "seed: \udcff", "params/mine.yaml: 'utf-8' codec can't decode byte 0xff"),
        ("seed: 0", "seed: 2024-99-99", "params/mine.yaml: month must be in 1..12"),
    ],
)
def test_broken_profiles_are_told_by_line_or_name(home, old, new, what):
    edit(home, old, new)
    assert what in refusal("mine")


def test_empty_profiles_and_missing_folders(home):
    (home / "params" / "mine.yaml").write_text("")
    assert "params/mine.yaml: must hold names and values" in refusal("mine")
    (home / "params" / "mine.yaml").unlink()
    assert "set FAITHKD_HOME" in refusal("mine")


def test_parameters_cannot_be_changed_after_loading():
    p = params.load("mnist")
    with pytest.raises(ValueError, match="frozen"):
        p.train.epochs = 1


def test_readings_are_checked_with_everything_else():
    p = params.load("mnist", {"train.epochs": 2})
    q = params.changed(p.model_copy(update={"seed": 7}), "data.space=pixel data.clip=true")
    assert (q.data.space, q.data.clip, q.train.epochs, q.seed, q.ablation.readings) == ("pixel", True, 2, 7, [])
    assert q.train == p.train
    for wrong, what in (
        ("train.kl=revers", "should be 'forward' or 'reverse'"),
        ("train.kll=reverse", "did you mean train.kl?"),
        ("data.clip=true", "needs data.space=pixel"),
        ("train.kl", "write name=value"),
    ):
        with pytest.raises(ParamsError, match=re.escape(what)) as caught:
            params.load("mnist", {"ablation.readings": ["train.kl=reverse", wrong]})
        assert f"ablation.readings, {wrong!r}" in str(caught.value)


def test_settings_leave_every_other_network_alone():
    wanted = ["train.FD.temperature=9", "models.student.hidden=[7] train.FD.alpha=1"]
    assert params.load("mnist", {"ablation.settings": wanted}).ablation.settings == wanted
    for wrong in ("train.SD.alpha=1", "train.epochs=2", "train.FD.alpha=1 seed=3", "models.teacher.hidden=[7]"):
        with pytest.raises(ParamsError, match="is no setting of FD's alone; put it in ablation.readings"):
            params.load("mnist", {"ablation.settings": [wrong]})


def test_ratio_keeps_its_text_and_is_a_number():
    r = Ratio("8/255")
    assert r == 8 / 255 and hash(r) == hash(8 / 255) and r * 2 == 16 / 255
    assert str(r) == repr(r) == f"{r}" == "8/255" and f"{r:.3f}" == "0.031"
    assert json.dumps(r) == json.dumps(8 / 255)
    for same in (Ratio(r), copy.deepcopy(r), pickle.loads(pickle.dumps(r))):
        assert same == r and str(same) == "8/255"
    assert Ratio("0.04/32") == 0.04 / 32 and str(Ratio(1)) == "1" and str(Ratio(" 0.10 ")) == "0.10"
    assert Ratio(0.1 + 0.2) == 0.1 + 0.2 == Ratio(str(Ratio(0.1 + 0.2)))
    for wrong in ("", "x", "1/0", "1/2/3", "nan", "inf", "1e999", float("nan"), True, None, [1], "1_0"):
        with pytest.raises(ValueError, match="finite number"):
            Ratio(wrong)


def test_dump_keeps_what_was_written():
    dump = params.load("fashion_mnist").model_dump(mode="json")
    assert dump["evaluate"]["eps"][0] == "4/255" and json.loads(json.dumps(dump)) == dump
