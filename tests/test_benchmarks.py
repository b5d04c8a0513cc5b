"""The benchmarks: right columns, sound bounds, peers that say what our own programs say."""

import dataclasses

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import bounds, contenders, measure, report, scaling, violations
from faithkd import data, experiment, params
from faithkd.bounds import difference_bounds, network
from faithkd.bounds.linear import STEPS, crown
from faithkd.errors import FaithkdError

SIZES = {"images": 2, "frontier_images": 1, "slow_images": 1, "rounds": 1}


@pytest.fixture(scope="module")
def digits():
    """The digits profile with its committed teacher and FD student."""
    p = params.load("digits")
    return p, (experiment.teacher(p), experiment.student(p, "FD"))


@pytest.fixture(scope="module")
def values(digits, request):
    """Results of two contenders on two images at two eps, measured in this process: a new one takes seconds."""
    p, pair = digits
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setattr(bounds, "run", in_process)
    specs = bounds.specifications(bounds.present(["interval", "paper-lp"]), [])
    parts = [
        bounds.measure_ball(p, pair, eps, specs, SIZES).assign(student="FD", eps=str(eps)) for eps in p.evaluate.eps[:2]
    ]
    return pd.concat(parts)


def in_process(job):
    try:
        return measure.measured(job)
    except FaithkdError as refusal:
        return measure.Measurement(torch.full((len(job.x),), torch.nan), note=str(refusal))


def gurobi():
    """gurobipy, or the test is skipped: not there, or no licence."""
    gurobipy = pytest.importorskip("gurobipy")
    try:
        with gurobipy.Env(params={"OutputFlag": 0}):
            return gurobipy
    except gurobipy.GurobiError as problem:
        pytest.skip(f"Gurobi has no licence here: {problem}")


def test_results_have_their_columns_and_lie_above_EmpLB(values):  # noqa: N802
    assert set(values) == {
        *("student", "eps", "method", "budget", "image", "EmpLB", "crown", "bound"),
        *("seconds", "cpu_seconds", "megabytes", "note"),
    }
    known = values[values["note"] == ""]
    assert {"interval", "crown"} <= set(known["method"])
    assert (known["EmpLB"] <= known["bound"] + 1e-12).all()
    assert (known["seconds"] > 0).all()
    table = report.summary(values).set_index(["method", "eps"])
    assert (table["violations"] == 0).all()
    assert (table.loc["crown", "share"] == 0).all()
    assert (table.loc["interval", "share"] <= 0).all()


def test_a_bound_below_EmpLB_is_counted_and_shown(values):  # noqa: N802
    broken = values.assign(bound=values["bound"].where(values["method"] != "interval", 0.0))
    table = report.summary(broken)
    assert table.set_index("method").loc["interval", "violations"].tolist() == [2, 2]
    facts = {"profile": "digits", "overrides": {}, "processor": "some", "cores": 2}
    assert "**2 below EmpLB**" in report.markdown(table, facts)
    assert ("no upper bound below EmpLB", "4 below", False) in list(report.aims(broken, table, facts))


def test_tables_and_plots_are_written(values, tmp_path, digits, capsys):
    p, _ = digits
    values.to_csv(tmp_path / "values-digits.csv", index=False)
    (tmp_path / "bounds-digits.json").write_text(
        pd.Series(report.provenance(p) | {"frontier_images": 2}).to_json(default_handler=str)
    )
    report.write(tmp_path, "digits")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("values-digits.csv", "bounds-digits.json", "bounds-digits.csv", "bounds-digits.md"),
        *("aims-digits.md", "frontier-digits.pdf", "frontier-digits.png"),
    }
    assert "not measured" in capsys.readouterr().out


def test_the_papers_lp_is_our_lp_on_the_same_boxes(digits):
    gurobi()
    from benchmarks import paper_lp

    p, pair = digits
    x, eps = data.test_subset(p).x[:1].double(), float(p.evaluate.eps[1])
    for net in pair:
        prepared = network.prepare(net, tuple(x.shape[1:]))
        boxes = crown(prepared, *network.ball(x, eps), STEPS)[0]  # alpha-CROWN's, on which our LP stands
        theirs = paper_lp.network_differences(prepared, boxes, tolerance=1e-9)
        torch.testing.assert_close(theirs, difference_bounds(net, x, eps, method="lp"), atol=1e-6, rtol=0)
    lowest = experiment.lower_bound(p, *pair, data.test_subset(p)[:2], eps).values
    assert (lowest <= paper_lp.upper_bound(*pair, data.test_subset(p).x[:2], eps) + 1e-12).all()


def test_the_papers_lp_says_when_the_licence_is_too_small():
    gurobipy = gurobi()
    from benchmarks import paper_lp

    with gurobipy.Env(params={"OutputFlag": 0}) as env, gurobipy.Model(env=env) as model:
        model.addVars(2001)
        try:
            model.optimize()
            pytest.skip("this licence takes models of any size")
        except gurobipy.GurobiError:
            pass
    big = nn.Sequential(nn.Linear(2, 1500), nn.ReLU(), nn.Linear(1500, 2))
    with pytest.raises(paper_lp.LicenceError, match="licence too small"):
        paper_lp.upper_bound(big, big, torch.zeros(1, 2), 0.1)


def test_the_papers_lp_pools_as_our_lp_does():
    gurobi()
    from benchmarks import paper_lp

    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 2, padding=1), nn.MaxPool2d(2, stride=1, padding=1), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(50, 3)).double()
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    prepared = network.prepare(net, (1, 3, 3))
    theirs = paper_lp.network_differences(prepared, crown(prepared, *network.ball(x, 0.1))[0], tolerance=1e-9)
    # ours may relax the maximum more tightly than the paper's interval rule, never less
    assert (difference_bounds(net, x, 0.1, method="lp") <= theirs + 1e-6).all()


def test_a_process_of_its_own_measures_time_and_memory(digits):
    p, pair = digits
    found = measure.run(measure.Job("crown", *pair, data.test_subset(p).x[:2], 0.1))
    assert found.note == "" and found.seconds > 0 and 0 <= found.megabytes < 1000
    absent = measure.run(dataclasses.replace(measure.Job("crown", *pair, torch.full((1, 1, 8, 8), torch.nan), 0.1)))
    assert "NaN" in absent.note and absent.values.isnan().all()


def test_unknown_and_absent_contenders(capsys):
    with pytest.raises(FaithkdError, match="unknown method 'crwn'"):
        bounds.present(["crwn"])
    patch = pytest.MonkeyPatch()
    with patch.context() as here:
        here.setattr(contenders.importlib.util, "find_spec", lambda name: None)
        assert bounds.present(["lirpa-crown", "crown"]) == ["crown"]
    assert "auto_LiRPA is not installed" in capsys.readouterr().out


def test_quickly_trained_networks_are_the_same_every_time(digits, monkeypatch):
    monkeypatch.setattr(scaling, "STEPS", 5)
    one, two = (scaling.quickly_trained(digits[0], [4], seed=1) for _ in range(2))
    assert all(torch.equal(*weights) for weights in zip(one.parameters(), two.parameters(), strict=True))


def test_random_checks_find_no_violation_of_our_bounds():
    made, wrong = violations.run(200, seed=0, names=["interval", "crown"])
    assert made.total() >= 200 and wrong.total() == 0


def test_random_checks_find_a_bound_that_is_too_low(monkeypatch, capsys):
    right = violations.upper_bound
    monkeypatch.setattr(violations, "upper_bound", lambda *arguments: 0.5 * right(*arguments))
    _, wrong = violations.run(2000, seed=0, names=["crown"])
    assert wrong["crown"] > 0 and "VIOLATION: crown" in capsys.readouterr().out
