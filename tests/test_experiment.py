"""The experiments end to end on the smoke profile: what is stored, what is found again, what is refused."""

import copy
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from faithkd import bounds, experiment, figures, ledger, paper, params, paths, recipes, tables
from faithkd.core import data, evaluation, losses, training
from faithkd.core.losses import Method
from faithkd.errors import FaithkdError
from faithkd.report.paper import STUDENTS
from faithkd.reproduce import artefacts, measuring, networks

LIMIT = 3


@pytest.fixture(scope="module")
def p(tmp_path_factory):
    """The smoke profile, still smaller, in a store of its own."""
    changes = {"evaluate.eps": [0.05, 0.2], "data.test_images": 20, "evaluate.figure1.points": 9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAITHKD_STORE", str(tmp_path_factory.mktemp("store")))
        yield params.load("smoke", changes)


@pytest.fixture(scope="module")
def robustness(p):
    return experiment.robustness(p)


@pytest.fixture(scope="module")
def faithfulness(p):
    return experiment.faithfulness(p)


def count_trainings(monkeypatch):
    calls, fit = [], training.fit

    def counted(*arguments, **options):
        calls.append(options["description"])
        return fit(*arguments, **options)

    monkeypatch.setattr(training, "fit", counted)
    return calls


def weights(p, method="FD", **options) -> str:
    """The fingerprint of a student."""
    return experiment.fingerprint(experiment.student(p, method, **options))


def test_networks_are_found_again_and_follow_what_they_depend_on(p, monkeypatch):
    first = weights(p)
    calls = count_trainings(monkeypatch)
    unrelated = params.load("smoke", {**p.overrides, "evaluate.steps": 7, "train.ARD.temperature": 9})
    assert weights(p) == weights(unrelated) == first and calls == []
    assert weights(params.load("smoke", {**p.overrides, "train.FD.temperature": 9})) != first and len(calls) == 1
    assert weights(p, alpha=float(p.train.FD.alpha)) == first
    assert len(calls) == 1, "an α that equals the parameters' is the same network"


def made(weight, power):
    def helper(z):
        return z**power

    def own(student, teacher, x, x_adv, y, alpha, temperature):
        return weight * helper(student(x)).mean()

    return networks._written(Method(own, None, "own"))


def test_a_loss_of_ones_own_is_known_by_its_source_and_what_it_uses_of_its_file(monkeypatch):
    """A helper beside the loss, or a constant that it names, makes another network: it must not be found as the old."""

    def own_attack(student, teacher, x, y):
        return lambda z: ((student(z) - y) ** LIMIT).sum()

    codes = [made(1.0, 2), made(2.0, 2), made(1.0, 3)]
    assert made(1.0, 2) == codes[0] and len(set(map(str, codes))) == 3
    filled = [networks._written(Method(partial(losses.fd, divergence=d), None, "d")) for d in (losses.kl, losses.sd)]
    attacked = networks._written(Method(losses.fd, own_attack, "own"))
    assert filled[0] != filled[1] and "LIMIT = 3" in attacked and " at 0x" not in str([filled, attacked])
    for parameter in ("y", "z"):
        monkeypatch.setitem(globals(), parameter, 0.5)  # as a notebook may have: not what the attack calls so
    assert networks._written(Method(losses.fd, own_attack, "own")) == attacked


def test_a_loss_of_ones_own_is_trained_once_and_found_again(p, monkeypatch):
    def own(student, teacher, x, x_adv, y, alpha, temperature):
        return losses.cross_entropy(student(x_adv), y).mean()

    usual = weights(p)
    calls = count_trainings(monkeypatch)
    rule = Method(own, losses.attack_labels, "my own")
    first = weights(p, rule=rule)
    assert weights(p, rule=rule) == first != usual
    assert [call.rpartition("/")[2] for call in calls] == ["FD-my-own"]


def test_measurements_follow_the_recipe(p, monkeypatch):
    """A bound measured by another recipe must not be read back."""
    images, guide = data.test_subset(p)[slice(0, 2)], experiment.teacher(p)
    before = experiment.bracket(p, guide, experiment.student(p, "SD"), images, 0.0613)
    monkeypatch.setattr(recipes, "MEASURING", -1)
    trivial = pd.DataFrame({"FaithUB": [1.0, 1.0], "status": [bounds.CERTIFIED, bounds.NOT_FINITE]})
    monkeypatch.setitem(measuring.MAKERS, "FaithUB", lambda *given: [trivial])
    after = experiment.bracket(p, guide, experiment.student(p, "SD"), images, 0.0613)
    assert (after["FaithUB"] == 1).all() and (before["FaithUB"] < 1).all()
    assert after["status"].tolist() == [bounds.CERTIFIED, bounds.NOT_FINITE]
    monkeypatch.setattr(recipes, "SEARCHING", -2)  # one for what is slow, so that a better search keeps all the rest
    pieces = [measuring.cut(p, kind, guide, guide, images, 0.1)[0] for kind in ("EmpLB", "FaithUB", "best")]
    assert [piece.inputs["recipe"] for piece in pieces] == [-1, -1, -2]


def test_a_teacher_is_bounded_once_for_all_students_and_nothing_else_changes(p, faithfulness, monkeypatch):
    calls, alone = [], measuring.faithfulness_upper_bounds
    counted = lambda *given, **options: calls.append(len(given[1])) or alone(*given, **options)  # noqa: E731
    monkeypatch.setattr(measuring, "faithfulness_upper_bounds", counted)
    monkeypatch.setattr(recipes, "MEASURING", -2)
    assert experiment.faithfulness(p)["FaithUB"].equals(faithfulness["FaithUB"])
    assert calls == [len(STUDENTS)] * len(p.evaluate.eps)
    images, eps = data.test_subset(p), str(p.evaluate.eps[-1])
    for method in STUDENTS:
        pair = experiment.teacher(p), experiment.student(p, method)
        whole = bounds.faithfulness_upper_bound(*pair, images.x, float(eps), method=p.bounds.method)
        part = faithfulness[(faithfulness["method"] == method) & (faithfulness["eps"] == eps)]
        assert np.allclose(part["FaithUB"], whole.values, rtol=0, atol=1e-6)
        assert (part["FaithUB"].to_numpy() >= whole.values.numpy()).all(), "rounded so that it still holds"
        assert part["status"].tolist() == whole.status


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.sampled_from("ab")), min_size=1))
def test_tables_become_tensors_and_bounds_stay_bounds(rows):
    frame = pd.DataFrame(rows, columns=["EmpLB", "FaithUB", "robust", "status"])
    found = measuring.to_table(*measuring.to_tensors(frame))
    assert found[["robust", "status"]].equals(frame[["robust", "status"]]) and list(found) == list(frame)
    assert (found["EmpLB"] <= frame["EmpLB"]).all() and (found["FaithUB"] >= frame["FaithUB"]).all()
    assert np.allclose(found[["EmpLB", "FaithUB"]], frame[["EmpLB", "FaithUB"]], rtol=2e-7, atol=1e-44)
    assert measuring.to_table(*measuring.to_tensors(found)).equals(found), "what is read is what was made"


def test_the_ladder_begins_at_intervals_and_ends_at_best(p, faithfulness):
    table = tables.ladder(experiment.ladder(p)).set_index(["eps", "rung"])
    summary = tables.best(experiment.best(p)).query("method == 'FD'").set_index("eps")
    for eps in map(str, p.evaluate.eps):
        assert table["mean"][eps, "best"] == pytest.approx(summary["BestUB"][eps])
        assert table["mean"][eps, "crown"] == pytest.approx(summary["FaithUB"][eps], abs=1e-9)
        assert table["mean"][eps, "interval"] >= table["mean"][eps, "crown"]
    cells = tables.layout(table.reset_index(), "ladder")
    assert list(cells.index) == [*experiment.RUNGS, "best"] and cells.map(lambda text: "%" in text).all(axis=None)
    odd = pd.DataFrame({"dataset": "digits", "eps": "1", "rung": "crown", "FaithUB": [0.5, 0.995]})
    assert tables.ladder(odd)["informative"].item() == 50


def test_settings_change_the_student_alone(p):
    frame = experiment.settings(p)
    assert frame["reading"].unique().tolist() == [experiment.AS_IS, *p.ablation.settings]
    assert set(frame["method"]) == {"FD"} and set(frame["table"]) == {"table2"}
    own = frame[(frame["reading"] == experiment.AS_IS) & (frame["seed"] == p.seed)]
    means = tables.table2(experiment.faithfulness(p)).query("method == 'FD'").set_index(["eps", "bound"])["mean"]
    found = own[own["measure"].isin(tables.BOUNDS)].set_index(["eps", "measure"])["value"]
    assert np.allclose(found, means.loc[found.index])
    q = params.changed(p, p.ablation.settings[0])
    assert experiment.fingerprint(experiment.teacher(q)) == experiment.fingerprint(experiment.teacher(p))
    assert weights(q) != weights(p)


def test_everything_can_be_trained_ahead(p, robustness, faithfulness, monkeypatch):
    experiment.train(p)
    calls = count_trainings(monkeypatch)
    for measure in (experiment.accuracy, experiment.robustness, experiment.faithfulness):
        experiment.over_seeds(p, measure)
    experiment.over_seeds(p, experiment.faithfulness, alphas=True)
    experiment.settings(p)
    experiment.readings(p)
    assert calls == [] and experiment.train(p) == 0


def test_a_loss_without_source_is_refused(p):
    nameless = Method(eval("lambda *arguments: 0.0"), None, "typed in")
    with pytest.raises(FaithkdError, match="cannot be read as source"):
        experiment.student(p, "SD", rule=nameless)


def test_readings_train_only_the_students_they_are_asked_for(p, monkeypatch):
    few = params.load("smoke", {**p.overrides, "ablation.students": ["FD"], "ablation.readings": ["train.epochs=1"]})
    calls = count_trainings(monkeypatch)
    frame = experiment.readings(few)
    assert {call.rpartition("/")[2] for call in calls} == set(frame["method"]) == {"RT", "FD"}


def test_readings_change_one_thing_and_everything_is_trained_anew(p):
    frame = experiment.readings(p)
    assert frame["reading"].unique().tolist() == [experiment.AS_IS, *p.ablation.readings]
    as_is = frame[frame["reading"] == experiment.AS_IS]
    assert sorted(as_is["seed"].unique()) == list(range(p.seed, p.seed + p.repeats))
    own = ledger.per_seed(*(f(p).assign(seed=p.seed) for f in (experiment.accuracy, experiment.robustness)), None)
    wide = {name: part.set_index([*ledger.KEYS, "seed"])["value"] for name, part in frame.groupby("reading")}
    assert (wide[experiment.AS_IS].loc[own.set_index([*ledger.KEYS, "seed"]).index] == own["value"].to_numpy()).all()
    reverse = params.changed(p, "train.kl=reverse")
    assert experiment.fingerprint(experiment.teacher(reverse)) == experiment.fingerprint(experiment.teacher(p))
    assert all(weights(p, method) != weights(reverse, method) for method in ("SD", "FD"))
    he = experiment.teacher(params.changed(p, "train.initialisation=he"))
    assert experiment.fingerprint(he) != experiment.fingerprint(experiment.teacher(p))


def test_unknown_methods_are_refused(p):
    with pytest.raises(ValueError, match="there are RT, SD, ARD, RSLAD, FD"):
        experiment.student(p, "XD")


def test_fingerprints_see_every_weight(p):
    network = experiment.teacher(p)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed[-1].bias[3] += 1e-6
    assert experiment.fingerprint(changed) != experiment.fingerprint(network)


def test_robustness_has_every_row_and_is_stored(p, robustness):
    assert len(robustness) == 3 * 5 * p.data.test_images  # ε = 0 and two radii, teacher and four students
    assert robustness.groupby("method")["robust"].count().nunique() == 1
    pd.testing.assert_frame_equal(robustness, experiment.robustness(p))
    assert robustness.loc[robustness["method"] == "RT", "agrees"].all(), "the teacher agrees with itself"
    images, network = data.test_subset(p), experiment.student(p, "ARD")
    clean = robustness.query("eps == '0' and method == 'ARD'")["robust"].to_numpy()
    assert (clean == (evaluation.predictions(network, images.x) == images.y).numpy()).all(), "at ε = 0 clean accuracy"


def test_a_crossed_bracket_stops_everything(p, faithfulness, monkeypatch):
    """Should a bound ever be wrong, the experiment must not go on with it."""
    assert faithfulness["FaithUB"].between(0, 1).all() and (faithfulness["EmpLB"] >= 0).all()
    images, guide = data.test_subset(p)[slice(0, 3)], experiment.teacher(p)
    wrong = pd.DataFrame({"FaithUB": [0.0, float("nan"), 0.0], "status": ["certified"] * 3})
    monkeypatch.setitem(measuring.MAKERS, "FaithUB", lambda *given: [wrong])
    with pytest.raises(AssertionError, match="EmpLB > FaithUB"):
        experiment.bracket(p, guide, experiment.student(p, "SD"), images, 0.0871)


def test_slow_bounds_are_kept_in_pieces(p):
    images, pair = data.test_subset(p), (experiment.teacher(p), experiment.student(p, "SD"))
    assert [len(measuring.cut(p, kind, *pair, images, 0.1)) for kind in ("EmpLB", "FaithUB", "best")] == [1, 1, 2]
    slow = params.load("smoke", {**p.overrides, "bounds.method": "joint"})
    assert [piece.first for piece in measuring.cut(slow, "FaithUB", *pair, images, 0.1)] == [0, 10]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of its own to keep in; profiles are the usual ones."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return tmp_path


def test_measurements_travel_and_are_compared_when_measured_anew(p, repository, monkeypatch, tmp_path):
    small = {"evaluate.strong.images": 2, "bounds.best_images": 2, "bounds.best_nodes": 2}
    few = params.load("smoke", {**p.overrides, **small, "ablation.readings": [], "ablation.settings": []})
    never = pd.DataFrame({"PGD": [True] * 20, "AutoAttack": True, "both": True})  # seconds a network, without this
    monkeypatch.setitem(measuring.MAKERS, "AutoAttack", lambda *given: never)
    parts = list(experiment.keep(few))
    assert parts[:2] == ["seed 0", "seed 1"] and "the best bounds" in parts
    file = repository / "measurements" / "smoke" / "seed0.safetensors"
    assert file.is_file() and (repository / "weights" / "smoke" / "seed1" / "FD.safetensors").is_file()
    before = {path: path.read_bytes() for path in repository.rglob("*.safetensors")}
    list(experiment.keep(few))
    assert before == {path: path.read_bytes() for path in repository.rglob("*.safetensors")}, "kept once is kept"

    table = experiment.over_seeds(few, experiment.faithfulness)
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / "elsewhere"))
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "MAKERS", {})  # whoever measures fails
        assert experiment.over_seeds(few, experiment.faithfulness).equals(table)
    found, complaints = experiment.compare(few)
    assert "measured anew, 39 measurements compared" in found and complaints == []

    content, header = artefacts.read(file)
    content["FD/FaithUB/eps=0.2/images=0-19/FaithUB"][3] += 0.01
    file.write_bytes(artefacts.encode(header, content))
    found, complaints = experiment.compare(few, everything=True)
    assert complaints == ["measurements/smoke/seed0/FD/FaithUB/eps=0.2/images=0-19.safetensors"]


def test_table_1_counts_percent_in_the_papers_columns(robustness):
    table = tables.table1(robustness)
    assert list(table.columns) == list(paper.table("table1").columns)
    assert table["eps"].tolist() == ["0", "0.05", "0.2"]
    part = robustness.query("eps == '0.2' and method == 'FD'")
    row = table.set_index("eps").loc["0.2"]
    assert row["robust_accuracy_FD"] == 100 * part["robust"].sum() / len(part)
    assert row["agreement_FD"] == 100 * part["agrees"].sum() / len(part)


def test_tables_2_and_5_are_mean_and_deviation_in_the_papers_columns(p, faithfulness):
    table = tables.table2(faithfulness)
    theirs = paper.table("table2")
    assert list(table.columns[: len(theirs.columns)]) == list(theirs.columns)
    values = faithfulness.query("eps == '0.2' and method == 'SD'")["FaithUB"].to_numpy()
    row = table.query("eps == '0.2' and method == 'SD' and bound == 'FaithUB'").iloc[0]
    assert row["mean"] == pytest.approx(values.mean()) and row["std"] == pytest.approx(np.std(values))
    assert row["images"] == len(values)
    table = tables.table2(experiment.faithfulness(p, alphas=True), by="alpha")
    assert set(paper.table("table5").columns) <= set(table.columns)
    assert table["alpha"].unique().tolist() == [float(a) for a in p.ablation.alpha]


def test_table_3_and_flips():
    def frame(method, by_steps):
        rows = [(n, image, value) for n, values in by_steps.items() for image, value in enumerate(values)]
        return pd.DataFrame(rows, columns=["steps", "image", "EmpLB"]).assign(method=method)

    steps = pd.concat(
        [frame("RSLAD", {1: [0.1, 0.5], 5: [0.3, 0.6]}), frame("FD", {1: [0.2, 0.1], 5: [0.25, 0.2]})],
        ignore_index=True,
    )
    assert tables.flips(steps).set_index("image")["flips"].to_dict() == {0: 1, 1: 0}
    assert tables.examples(steps, 1) == [0]
    table = tables.table3(steps, [0])
    assert list(table.columns) == ["example", "method", "pgd1", "pgd5", "image"]
    assert table["method"].tolist() == ["RSLAD", "FD"] and table["pgd5"].tolist() == [0.3, 0.25]
    assert tables.layout(table, "table3").loc["x1"].tolist() == ["**0.1000**", "0.2000", "0.3000", "**0.2500**"]


def best_frame() -> pd.DataFrame:
    """Two images, ε and students, by hand."""
    rows = [
        # eps, method, EmpLB, FaithUB, BestLB, BestUB, agrees, agreement_certified
        ("0.1", "SD", 0.1, 0.5, 0.1, 0.2, True, True),
        ("0.1", "SD", 0.3, 0.9, 0.3, 0.5, True, False),
        ("0.1", "FD", 0.2, 0.2, 0.2, 0.2, True, True),
        ("0.1", "FD", 0.2, 0.2, 0.2, 0.2, True, True),
        ("0.2", "SD", 0.4, 1.0, 0.5, 0.9, False, False),
        ("0.2", "SD", 0.4, 1.0, 0.4, 0.8, True, False),
        ("0.2", "FD", 0.1, 0.7, 0.2, 0.4, True, False),
        ("0.2", "FD", 0.1, 0.9, 0.2, 0.4, True, True),
    ]
    columns = ["eps", "method", "EmpLB", "FaithUB", "BestLB", "BestUB", "agrees", "agreement_certified"]
    return pd.DataFrame(rows, columns=columns).assign(dataset="digits", image=[5, 7] * 4, step="bab")


def test_the_best_bounds_stand_beside_the_papers():
    table = tables.best(best_frame())
    assert table[["eps", "method"]].to_numpy().tolist() == [["0.1", "SD"], ["0.1", "FD"], ["0.2", "SD"], ["0.2", "FD"]]
    assert table["BestUB"].tolist() == pytest.approx([0.35, 0.2, 0.85, 0.4])
    closed = table["closed"].tolist()
    assert closed[0] == pytest.approx(100 * 0.35 / 0.5) and closed[2:] == pytest.approx([25, 100 * 0.4 / 0.7])
    assert pd.isna(closed[1]), "where there is no gap, no share of it is closed"
    assert set(table["images"]) == {2}
    cells = tables.layout(table, "best")
    assert cells.loc["0.1", ("δ* is at most", "SD")] == "0.350\n[0.700]"
    assert cells.loc["0.1", ("δ* is at least", "SD")] == "**0.200**\n[**0.200**]", "a tie with FD"
    assert cells["gap closed (%)"].to_numpy().tolist() == [["70", "–"], ["25", "57"]]
    assert cells["δ* is at most"]["FD"].tolist() == ["**0.200**\n[**0.200**]", "**0.400**\n[**0.800**]"]


def test_agreement_lies_between_its_certified_and_its_empirical_value():
    table = tables.agreement_intervals(best_frame())
    assert table["certified"].tolist() == [50, 100, 0, 50] and table["empirical"].tolist() == [100, 100, 50, 100]
    cells = tables.layout(table, "agreement").to_numpy().tolist()
    assert cells == [["50.0 … 100.0", "**100.0** … 100.0"], ["0.0 … 50.0", "**50.0** … 100.0"]]


def test_figures_past_the_paper_draw_the_same_rows():
    frame = best_frame()
    table = tables.best(frame)
    panels = figures.best_by_eps(table).axes
    assert [axes.get_title() for axes in panels] == ["SD", "FD"]
    theirs, ours = (lines.get_segments() for lines in panels[0].collections)
    assert np.allclose([segment[:, 1] for segment in ours], [[0.2, 0.35], [0.45, 0.85]])
    assert np.allclose([segment[:, 1] for segment in theirs], [[0.2, 0.7], [0.4, 1.0]])
    (both,) = figures.brackets(frame[frame["method"] == "SD"], "two brackets").axes
    (one,) = figures.brackets(frame[frame["method"] == "SD"].drop(columns=["BestLB", "BestUB"]), "one").axes
    assert (len(both.collections), len(one.collections)) == (2, 1)


def test_the_papers_values_stand_beside_ours_only_where_it_has_them():
    ours = paper.table("table1").query("dataset == 'mnist'").copy()
    both = tables.beside_paper(ours, "table1")
    assert (both["agreement_FD_paper"] == ours["agreement_FD"].to_numpy()).all()
    cells = tables.layout(ours.assign(robust_accuracy_FD=99.0), "table1")["robust accuracy (%)"]
    assert cells["RT"].iloc[0] == "97.9\n[97.9]", "the teacher does not compete"
    assert cells.loc["0.2", ["RSLAD", "FD"]].tolist() == ["87.0\n[**87.0**]", "**99.0**\n[86.0]"]
    unknown = tables.beside_paper(ours.assign(dataset="digits"), "table1")
    assert unknown.filter(like="_paper").isna().all(axis=None)


def test_the_heat_map_holds_what_it_claims(p):
    frame, details = experiment.heat_map(p)
    assert len(frame) == 2 * p.evaluate.figure1.points**2
    eps = float(details["eps"])
    for name in ("x1", "x2"):
        assert float((details[name] - details["x"]).abs().max()) <= eps * (1 + 1e-6)
    assert frame["difference"].between(0, 1).all() and (frame["disagree"] == (frame["margin"] < 0)).all()
    assert frame[["a", "b"]].abs().max().tolist() == [1, 1], "the ball's cut fills the square"
    teacher, student = experiment.teacher(p), experiment.student(p, "SD")
    classes = [int(evaluation.predictions(net, details["x2"])) for net in (teacher, student)]
    assert classes[0] == classes[1], "x₂ is where both still agree"
    if details["found"]:
        classes = [int(evaluation.predictions(net, details["x1"])) for net in (teacher, student)]
        assert classes[0] != classes[1]


def test_files_change_with_their_numbers_alone(p, faithfulness, tmp_path, monkeypatch):
    """The same numbers give the same bytes; what differs by a processor's rounding leaves all three files alone."""
    figures.style()
    monkeypatch.setenv("FAITHKD_OUTPUTS", str(tmp_path / "log.jsonl"))
    table, found = tables.table2(faithfulness), []

    def saved(folder: str, frame) -> tuple[dict, set]:
        monkeypatch.setattr(type(p), "figures_dir", tmp_path / folder)
        figures.save(p, "table2", figures.by_eps(table), frame)
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        return {file.name: file.read_bytes() for file in p.figures_dir.iterdir()}, {n["written"] for n in log[-3:]}

    found = [saved(folder, table) for folder in ("one", "two", "one")]
    assert set(found[0][0]) == {f"table2.{kind}" for kind in ("pdf", "png", "csv")}
    assert found[0] == found[1] and found[2] == (found[0][0], {False}) and found[0][1] == {True}
    assert saved("one", table.assign(mean=table["mean"] + 1e-4)) == (found[0][0], {False})
    for other in (table.assign(mean=table["mean"] + 0.01), table.iloc[1:], table.assign(method="FD")):
        files, written = saved("one", other)
        assert written == {True} and files["table2.csv"] != found[0][0]["table2.csv"]
        assert saved("one", table) == (found[0][0], {True})
    (tmp_path / "one" / "table2.png").unlink()
    assert saved("one", table) == (found[0][0], {True})
