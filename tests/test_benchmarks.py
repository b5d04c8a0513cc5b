"""The benchmarks: right columns, sound bounds, peers that say what our own programs say. Nothing is timed."""

import itertools
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import bounds, common, contenders, kinds, report, violations
from faithkd import experiment, params
from faithkd.bounds import difference_bounds
from faithkd.errors import FaithkdError

SIZES = {"images": 2, "frontier_images": 1, "slow_images": 1, "rounds": 2}


@pytest.fixture(scope="module")
def digits():
    p = params.load("digits")
    return p, (experiment.teacher(p), experiment.student(p, "FD"))


@pytest.fixture(scope="module")
def values(digits):
    """Results of two of ours on two images at two eps, and of a made-up peer, twice as slow and a tenth looser."""
    (p, pair), specs = digits, [("crown", None), ("bab", 0.0)]
    parts = [bounds.measure_ball(p, pair, e, specs, SIZES).assign(student="FD", eps=str(e)) for e in p.evaluate.eps[:2]]
    ours = pd.concat(parts)
    peer = ours.query("method == 'crown'").assign(method="paper-lp")
    return pd.concat([ours, peer.assign(seconds=2 * peer["seconds"], bound=1.1 * peer["bound"])])


def test_bounds_lie_above_EmpLB_and_close_a_share_of_the_gap(values):  # noqa: N802
    assert (values["EmpLB"] <= values["bound"] + 1e-12).all() and (values["seconds"] > 0).all()
    assert not values.duplicated(["eps", "method", "image"]).any()
    table = report.summary(values).set_index("method")
    assert (table["violations"] == 0).all() and (table.loc["crown", "share"] == 0).all()
    assert (table.loc["bab", "share"] >= 0).all() and (table.loc["paper-lp", "share"] < 0).all()


def test_contenders_take_turns_and_who_fails_is_left_out_while_the_run_goes_on(digits, monkeypatch, capsys):
    turns, right = [], contenders.load

    def load(name):
        turns.append(name)
        if name == "lirpa-crown":
            raise ImportError("no such library")
        return right("crown")

    monkeypatch.setattr(bounds, "load", load)
    p, pair = digits
    specs = [("crown", None), ("lirpa-crown", None), ("joint", None)]
    found = bounds.measure_ball(p, pair, p.evaluate.eps[0], specs, SIZES).set_index("method")
    assert turns == ["crown", "lirpa-crown", "joint", "crown", "joint"]
    assert found.loc["lirpa-crown", "bound"].isna().all() and found.loc["crown", "bound"].notna().all()
    assert capsys.readouterr().out.count("ImportError: no such library") == 1
    with pytest.raises(FaithkdError, match="NaN"):  # what fails of ours is an error
        bounds.measure("crown", pair, torch.full((1, 1, 8, 8), torch.nan), 0.1, {})


def test_a_bound_below_EmpLB_is_shown_and_tables_are_written(values, tmp_path, digits, capsys):  # noqa: N802
    broken = values.assign(bound=values["bound"].where(values["method"] != "bab", 0.0))
    broken.to_csv(tmp_path / "values-digits.csv", index=False)
    facts = pd.Series(common.facts(digits[0], contenders.PEERS) | SIZES)
    common.save(tmp_path / "bounds-digits.json", facts.to_json())
    bounds.main(profile="digits", only_report=True, out=tmp_path)
    kinds = {"values": ["csv"], "bounds": ["csv", "json", "md"], "aims": ["md"], "frontier": ["pdf", "png"]}
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}-digits.{e}" for n, ends in kinds.items() for e in ends}
    assert (tmp_path / "bounds-digits.md").read_text().count("**2 below EmpLB**") == 2
    told = capsys.readouterr().out
    assert "4 bounds lie below EmpLB" in told and "**2×, -9.09%**" in told  # the aim is 100 times
    bounds.main(
        profile="digits", methods="crown", images=2, rounds=1, eps=[str(digits[0].evaluate.eps[0])], out=tmp_path
    )
    kept = pd.read_csv(tmp_path / "values-digits.csv").groupby("method").size()
    assert kept.to_dict() == {"bab": 4, "crown": 2, "paper-lp": 4}  # who does not take part stays
    assert "of those that stay" in (tmp_path / "bounds-digits.json").read_text()


def test_the_papers_lp_is_our_lp_on_the_same_boxes():
    pytest.importorskip("gurobipy")  # it comes with a licence for small models
    from benchmarks import paper_lp

    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)]
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    shallow, deep = nets = nn.Sequential(*layers[:4]).double(), nn.Sequential(*layers).double()
    theirs = [paper_lp.differences(net, x, 0.1, tolerance=1e-9) for net in nets]
    # one layer of ReLU: its boxes are exact and everybody's; with two, ours stand on tighter boxes
    torch.testing.assert_close(theirs[0], difference_bounds(shallow, x, 0.1, method="lp"), atol=1e-6, rtol=0)
    assert (difference_bounds(deep, x, 0.1, method="lp") <= theirs[1] + 1e-6).all()
    assert (theirs[1] <= difference_bounds(deep, x, 0.1, method="crown") + 1e-6).all()
    with pytest.raises(FaithkdError, match="written for linear layers"):
        paper_lp.differences(nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3)), x, 0.1)


def test_unknown_and_absent_contenders(monkeypatch, capsys):
    monkeypatch.setattr(contenders, "INSTALLED", {})
    assert contenders.taking_part("lirpa-crown,joint") == ["crown", "joint"]
    assert "without lirpa-crown: auto_LiRPA is not installed: by hand" in capsys.readouterr().out
    with pytest.raises(FaithkdError, match="unknown contender 'crwn'"):
        contenders.taking_part("crwn")


def test_pairs_of_other_kinds_are_compared_and_what_misses_the_aim_is_bold(monkeypatch, tmp_path, digits):
    """With a peer that says what we say in a tenth of the time, and fails with one kind."""

    def asked(_peer, triples, low, high):
        x, answers = (low + high) / 2, {}
        for (kind, triple), (name, peer) in itertools.product(triples.items(), kinds.BESIDE.items()):
            for who, network in triple.items():
                highest = difference_bounds(network, x, 0.05, method=name)
                answers[kind, who, peer] = (highest, 1e-6) if kind == "Tanh" else (None, "ValueError: no")
        return answers, "9.9"

    monkeypatch.setattr(kinds, "asked", asked)
    monkeypatch.setattr(kinds, "trained", partial(kinds.trained, steps=5))
    kinds.main(kinds="Tanh;conv, residual", images=1, out=tmp_path, eps=0.05, only_report=False)
    table = pd.read_csv(tmp_path / "kinds.csv").set_index(["kind", "student", "method"])
    ours, theirs = (table.loc[("Tanh", "near", name)] for name in ("crown", "lirpa-crown"))
    assert ours["gap"] == pytest.approx(theirs["gap"], abs=1e-5) and ours["above"] > 0
    assert (table["gap"].unstack()["joint"] <= table["gap"].unstack()["alpha-crown"] + 1e-12).all()
    told = (tmp_path / "kinds.md").read_text()
    assert (
        told.count("| – | – |") == 2 and told.count("**+0.00 %, 0.0×**") == 2 and "conv, residual: ValueError" in told
    )


def test_random_checks_find_a_bound_that_is_too_low_and_no_other(monkeypatch, capsys):
    made, wrong = violations.run(2000, seed=0, names=["interval", "crown"])
    assert made.total() >= 2000 and wrong.total() == 0
    right = violations.largest_difference
    monkeypatch.setattr(violations, "largest_difference", lambda *arguments: 2 * right(*arguments))
    assert violations.run(4000, seed=0, names=["crown"])[1]["crown"] > 0
    assert "VIOLATION: crown" in capsys.readouterr().out
