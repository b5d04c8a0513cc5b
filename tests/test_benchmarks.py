"""The benchmarks: right columns, sound bounds, peers that say what our own programs say. Nothing is timed."""

import dataclasses

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import attacks, bounds, common, measure, report, violations
from faithkd import data, experiment, models, params
from faithkd.bounds import difference_bounds
from faithkd.errors import FaithkdError


@pytest.fixture(scope="module")
def digits():
    """The digits profile with its committed teacher and FD student."""
    p = params.load("digits")
    return p, (experiment.teacher(p), experiment.student(p, "FD"))


@pytest.fixture(scope="module")
def values(digits):
    """Results of two of ours on two images at two eps, and of a made-up peer, twice as slow and a tenth looser."""
    p, pair = digits
    specs, sizes = [("crown", None), ("interval", None)], {"images": 2, "few": 1, "rounds": 1}
    with pytest.MonkeyPatch.context() as patch:  # in this process: a new one takes seconds
        patch.setattr(bounds, "measure", lambda *job, **effort: measure.measured(*job, **effort) | {"note": ""})
        parts = [bounds.measure_ball(p, pair, e, specs, sizes).assign(student="FD", eps=str(e)) for e in p.evaluate.eps]
    ours = pd.concat(parts)
    peer = ours[ours["method"] == "crown"].assign(method="paper-lp")
    return pd.concat([ours, peer.assign(seconds=2 * peer["seconds"], bound=1.1 * peer["bound"])])


def test_bounds_lie_above_EmpLB_and_are_compared_with_the_peers(values):  # noqa: N802
    assert (values["EmpLB"] <= values["bound"] + 1e-12).all()
    table = report.summary(values).set_index("method")
    assert (table["violations"] == 0).all() and (table.loc["crown", "share"] == 0).all()
    assert (table.loc["interval", "share"] <= 0).all()
    beside = report.ratios(values).set_index("method").loc["crown"]
    assert beside["faster"].tolist() == pytest.approx([2.0] * len(beside))
    assert beside["looser"].tolist() == pytest.approx([1 / 1.1 - 1] * len(beside))


def test_a_bound_below_EmpLB_is_counted_and_shown(values):  # noqa: N802
    table = report.summary(values.assign(bound=values["bound"].where(values["method"] != "interval", 0.0)))
    assert (table.set_index("method").loc["interval", "violations"] == 2).all()
    facts = {"profile": "digits", "overrides": {}, "processor": "some", "cores": 2}
    assert "**2 below EmpLB**" in report.markdown(table, facts)


def test_tables_and_plots_are_written(values, tmp_path, digits, capsys):
    values.to_csv(tmp_path / "values-digits.csv", index=False)
    common.save_facts(tmp_path, "bounds-digits", common.facts(digits[0], measure.CONTENDERS) | {"few": 2})
    bounds.main(profile="digits", only_report=True, out=tmp_path)
    kinds = {"values": ["csv"], "bounds": ["csv", "json", "md"], "ratios": ["csv", "md"], "frontier": ["pdf", "png"]}
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}-digits.{e}" for n, ends in kinds.items() for e in ends}
    assert "2× · -9.09 %" in capsys.readouterr().out


def test_the_papers_lp_is_our_lp_on_the_same_boxes():
    gurobipy = pytest.importorskip("gurobipy")
    from benchmarks import paper_lp

    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 3)]
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    try:
        shallow, deep = nn.Sequential(*layers[:4]).double(), nn.Sequential(*layers).double()
        theirs = [paper_lp.differences(net, x, 0.1, tolerance=1e-9) for net in (shallow, deep)]
        with pytest.raises(FaithkdError, match="not written for Tanh"):
            paper_lp.differences(nn.Sequential(nn.Tanh()), x, 0.1)
    except gurobipy.GurobiError as problem:
        pytest.skip(f"Gurobi has no licence here: {problem}")
    # one layer of ReLU: its boxes are exact and everybody's; with two, ours stand on tighter boxes
    torch.testing.assert_close(theirs[0], difference_bounds(shallow, x, 0.1, method="lp"), atol=1e-6, rtol=0)
    assert (difference_bounds(deep, x, 0.1, method="lp") <= theirs[1] + 1e-6).all()
    assert (theirs[1] <= difference_bounds(deep, x, 0.1, method="crown") + 1e-6).all()


def test_a_process_of_its_own_measures_and_tells_refusals(digits):
    p, pair = digits
    found = measure.measure("crown", pair, data.test_subset(p).x[:2], 0.1, None)
    assert found["note"] == "" and found["seconds"] > 0
    refused = measure.measure("crown", pair, torch.full((1, 1, 8, 8), torch.nan), 0.1, None)
    assert "NaN" in refused["note"] and pd.isna(refused["bound"]).all()


def test_unknown_and_absent_contenders(monkeypatch, capsys):
    monkeypatch.setattr(common, "version", lambda package: None)
    assert common.taking_part("lirpa-crown,joint", measure.CONTENDERS, ["crown"]) == ["crown", "joint"]
    assert "without lirpa-crown: auto_LiRPA is not installed: by hand" in capsys.readouterr().out
    with pytest.raises(FaithkdError, match="unknown contender 'crwn'"):
        common.taking_part("crwn", measure.CONTENDERS, [])


def test_random_checks_find_a_bound_that_is_too_low_and_no_other(monkeypatch, capsys):
    made, wrong = violations.run(2000, seed=0, names=["interval", "crown"])
    assert made.total() >= 2000 and wrong.total() == 0
    right = violations.upper_bound
    monkeypatch.setattr(violations, "upper_bound", lambda *arguments: 0.5 * right(*arguments))
    _, wrong = violations.run(4000, seed=0, names=["crown"])
    assert wrong["crown"] > 0 and "VIOLATION: crown" in capsys.readouterr().out


def test_attacks_are_compared_and_who_does_less_is_refused(digits):
    task = attacks.make_task(digits[0], "SD", 5)
    found = attacks.compare(task, ["ascend", "search"], rounds=1).set_index("contender")
    assert found.loc["search", "loss"] >= found.loc["ascend", "loss"] - 1e-6 and found.loc["ascend", "to_ours"] == 1
    for change, reason in (({"steps": 2}, "took 2 gradients"), ({"eps": 9.0, "step_size": 9.0}, "outside the ball")):
        other = attacks.load("ascend", dataclasses.replace(task, **change))
        with pytest.raises(FaithkdError, match=reason):
            attacks.checked("other", task, other)
    low, width = -3.0, 8.0
    net = attacks.frozen(models.fully_connected(64, [5]))
    torch.testing.assert_close(attacks.rescaled(net, low, width)((task.x - low) / width), net(task.x))
