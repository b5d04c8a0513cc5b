"""The benchmarks: right columns, sound bounds, peers that say what our own programs say."""

import dataclasses
import json
from functools import partial

import pandas as pd
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from torch import nn

from benchmarks import attackers, attacks, bounds, contenders, measure, report, scaling, violations
from faithkd import data, experiment, losses, models, params
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


def test_only_best_has_more_than_a_second():
    specs = bounds.specifications(["crown", "bab", "best", "paper-lp"], [0.1, 1.0, 30.0])
    assert {spec for spec in specs if spec[0] != "best"} == {
        *(("crown", None), ("paper-lp", None)),
        *(("bab", 0.1), ("bab", 1.0)),
    }
    assert [budget for name, budget in specs if name == "best"] == [0.1, 1.0, 30.0]


def test_workers_are_stopped_for_which_a_process_would_wait():
    executor = get_reusable_executor(max_workers=1)
    assert executor.submit(abs, -1).result() == 1
    workers = list(executor._processes.values())
    measure.stop_workers()
    assert workers and not any(worker.is_alive() for worker in workers)


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


def task(net, x):
    """Cross-entropy of a network, in a few steps that are large enough to reach the end of the ball."""
    y = net(x).argmax(1)
    sizes = {"eps": 0.1, "steps": 3, "step_size": 0.1}
    return attackers.Task("some", (net,), losses.attack_labels(net, None, x, y), x, y, **sizes, labels=True)


def small_networks():
    """A fully connected and a convolutional one, and images for both."""
    torch.manual_seed(0)
    flat = models.fully_connected(27, [5])
    layers = [nn.Conv2d(3, 2, 2, bias=True), nn.ReLU(), nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(2, 4)]
    return [attacks.frozen(net) for net in (flat, nn.Sequential(*layers))], torch.randn(6, 3, 3, 3)


def test_attacks_are_measured_and_written(tmp_path, capsys):
    main = partial(attacks.main, profile="digits", settings=None, out=tmp_path, attacks=True, train=True)
    main(
        methods=",".join(attackers.ATTACKERS),
        tasks="SD,FD,EmpLB",
        batches="5",
        steps=2,
        rounds=2,
        train_batches=1,
        train_rounds=1,
    )
    names = {f"{part}-digits.{end}" for part in ("attacks", "training") for end in ("csv", "json", "md")}
    assert {path.name for path in tmp_path.iterdir()} == names
    found = pd.read_csv(tmp_path / "attacks-digits.csv")
    there = {name for name in attackers.ATTACKERS if not attackers.absent(name)}
    assert set(found.loc[found["task"] == "SD", "contender"]) == there
    assert {"products", "ascend", "search"} <= set(found.loc[found["task"] == "FD", "contender"])
    assert (found["gradients"] == 2).all() and (found["minimum"] <= found["median"]).all()
    loss = found[found["task"] == "SD"].set_index("contender")["loss"]
    assert loss["search"] >= loss["ascend"] - 1e-6 and pd.isna(loss["products"])
    trained = pd.read_csv(tmp_path / "training-digits.csv")
    assert trained["network"].tolist() == ["RT", *losses.METHODS] and (trained["batches_an_epoch"] == 19).all()
    assert (trained["plainly"] > 0).all() and "plainly written" in (tmp_path / "training-digits.md").read_text()
    assert json.loads((tmp_path / "attacks-digits.json").read_text())["versions"]["torch"] == report.version("torch")
    printed = capsys.readouterr().out
    assert all(attackers.absent(name) in printed for name in attackers.ATTACKERS)


def test_attackers_that_are_absent_or_unknown(monkeypatch, capsys):
    monkeypatch.setattr(attackers, "version", lambda package: None)
    assert attacks.present(["foolbox", "art"]) == ["products", "ascend"]
    assert "foolbox is not installed: pip install foolbox" in capsys.readouterr().out
    with pytest.raises(FaithkdError, match="foolbox is not installed"):
        attackers.load("foolbox", None)
    with pytest.raises(FaithkdError, match="unknown contender 'fgsm'"):
        attacks.present(["fgsm"])
    with pytest.raises(FaithkdError, match="unknown task 'AD'"):
        attacks.task(params.load("digits"), "AD", 5, 2)


def test_a_change_of_variables_in_the_first_layer_changes_no_logits():
    networks, x = small_networks()
    for net in networks:
        low, width = attackers.free_range(task(net, x))
        assert low < (x - 0.1).min() and (x + 0.1).max() < low + width
        torch.testing.assert_close(attackers.rescaled(net, low, width)((x - low) / width), net(x))
    with pytest.raises(FaithkdError, match="without padding"):
        attackers.rescaled(nn.Sequential(nn.Conv2d(3, 2, 2, padding=1)), 0.0, 1.0)


def test_the_products_are_those_of_the_layers():
    networks, x = small_networks()
    for net in networks:
        calls = attackers.layer_products(net, x)
        assert len(calls) == 4  # two layers, forwards and backwards
        last = net[-1]
        torch.testing.assert_close(calls[1]() + last.bias, last(net[:-1](x)))
        torch.testing.assert_close(calls[2](), net(x) @ last.weight)
        assert calls[3]().numel() == x.numel()


def test_who_does_less_or_leaves_the_ball_is_not_measured():
    (net, _), x = small_networks()
    job = task(net, x)
    lazy = attackers.ours(dataclasses.replace(job, steps=2))
    with pytest.raises(FaithkdError, match="2 gradients where 3 were asked for"):
        attacks.checked("lazy", job, lazy)
    far = attackers.ours(dataclasses.replace(job, eps=0.2))
    with pytest.raises(FaithkdError, match="outside the ball"):
        attacks.checked("far", job, far)


def test_a_library_that_fails_is_left_out_and_our_own_failure_is_not(monkeypatch, capsys):
    (net, _), x = small_networks()
    job, right = task(net, x), attackers.load

    def broken(name, job):
        if name == failing:
            raise AttributeError("no such function")
        return right(name, job)

    monkeypatch.setattr(attackers, "load", broken)
    failing = "foolbox"
    assert attacks.compare(job, ["products", "ascend", "foolbox"], 1)["contender"].tolist() == ["products", "ascend"]
    assert "left out: foolbox: AttributeError: no such function" in capsys.readouterr().out
    failing = "ascend"
    with pytest.raises(AttributeError):
        attacks.compare(job, ["products", "ascend"], 1)
