"""The ledger: verdicts on numbers and claims, what is proved, the claims page; all on frames made by hand."""

import numpy as np
import pandas as pd
import pytest

from faithkd import figures, ledger, tables
from faithkd.report.decide import seeds_needed
from faithkd.report.paper import STUDENTS


def robustness(shares: dict[str, list[float]], radii=("0", "0.1", "0.2"), images: int = 100) -> pd.DataFrame:
    """Per method and seed the share of images that withstand, at every radius; agreement is the same."""
    rows = []
    for method, by_seed in shares.items():
        for seed, share in enumerate(by_seed):
            held = np.arange(images) < share * images
            for eps in radii:
                part = pd.DataFrame({"image": range(images), "robust": held, "agrees": held})
                rows.append(part.assign(dataset="mnist", eps=eps, method=method, seed=seed))
    return pd.concat(rows, ignore_index=True)


def faithfulness(ends: dict[tuple[str, str], tuple[float, float]], seeds: int = 3, images: int = 4) -> pd.DataFrame:
    """Per (eps, method) EmpLB and FaithUB, with a little noise from seed to seed and image to image."""
    noise = np.random.default_rng(0)
    rows = [
        ("mnist", eps, method, seed, image, low + drift, high + drift)
        for (eps, method), (low, high) in ends.items()
        for seed in range(seeds)
        for image in range(images)
        for drift in [1e-4 * noise.standard_normal()]
    ]
    return pd.DataFrame(rows, columns=["dataset", "eps", "method", "seed", "image", "EmpLB", "FaithUB"])


# --- cells


def test_every_cell_of_the_paper_is_named_once():
    cells = ledger.papers()
    assert not cells.duplicated(ledger.KEYS).any() and cells["paper"].notna().all()
    assert cells.groupby("table").size().to_dict() == {
        "accuracy": 15, "table1": 18 * 9, "table2": 2 * 120, "table3": 6, "table5": 2 * 26,
    }  # fmt: skip
    found = cells.set_index(ledger.KEYS)["paper"]
    assert found["table1", "mnist", "0.2", "agreement", "FD"] == 91.1
    assert found["table2", "cifar10", "8/255", "FaithUB", "SD"] == 0.983
    assert found["table5", "cifar10", "8/255", "std of FaithUB", "α = 0.75"] == 0.132
    assert found["table3", "fashion_mnist", "8/255", "PGD-1 of PGD-50", "FD"] == pytest.approx(
        100 * (0.05060 / 0.07111 + 0.1240 / 0.1439) / 2
    )


def cell(values: list[float], theirs: float, monkeypatch, table: str = "table2") -> pd.Series:
    """The ledger's row for one number of the paper and ours of each seed."""
    key = dict(zip(ledger.KEYS, (table, "mnist", "0.1", "EmpLB", "FD"), strict=True))
    monkeypatch.setattr(ledger, "papers", lambda: pd.DataFrame([key | {"paper": theirs}]))
    frame = pd.DataFrame([key | {"seed": seed, "value": value} for seed, value in enumerate(values)])
    return ledger.cells(frame).iloc[0]


@pytest.mark.parametrize(
    ("values", "theirs", "table", "verdict"),
    [
        ([0.100, 0.101, 0.102], 0.102, "table2", "within"),
        ([0.100, 0.101, 0.102], 0.108, "table2", "below"),
        ([0.100, 0.101, 0.102], 0.094, "table2", "above"),
        ([0.05, 0.10, 0.15], 0.11, "table2", "undecided"),  # inside, but anything would be
        ([0.09, 0.10, 0.11], 0.9, "table2", "below"),  # outside of a wide interval is outside
        ([0.1], 0.1, "table2", "undecided"),
        ([1.0, 1.0, 1.0], 1.0, "table2", "within"),
        ([0.9996, 0.9996, 0.9996], 1.0, "table2", "within"),  # as the paper rounds
        ([0.9994, 0.9994, 0.9994], 1.0, "table2", "below"),
        ([0.0, 0.0, 0.0], 0.0, "table2", "within"),
        ([89.8, 90.0, 90.2], 90.9, "table1", "within"),
        ([88.0, 90.0, 92.0], 91.0, "table1", "undecided"),  # ± 9.9 points
        ([89.8, 90.0, 90.2], 92.0, "table1", "below"),
    ],
)
def test_verdicts_on_a_number(values, theirs, table, verdict, monkeypatch):
    assert cell(values, theirs, monkeypatch, table)["verdict"] == verdict


def test_cells_are_the_tables_of_each_seed():
    frames = {"SD": [0.6, 0.7], "ARD": [0.8, 0.8], "RSLAD": [0.9, 0.9], "FD": [0.9, 0.8], "RT": [1.0, 1.0]}
    held = robustness(frames, radii=("0", "0.1"))
    bounds = faithfulness({("0.1", m): (0.1, 0.3) for m in STUDENTS}, seeds=2)
    clean = pd.DataFrame({"dataset": "mnist", **{m: [97.0, 97.2] for m in ("RT", *STUDENTS)}, "seed": [0, 1]})
    cells = ledger.cells(ledger.per_seed(clean, held, bounds)).set_index(ledger.KEYS)
    assert len(cells) == 5 + 2 * 9 + 2 * 2 * 4
    row = cells.loc[("table1", "mnist", "0.1", "robust accuracy", "SD")]
    assert (row["ours"], row["paper"], row["seeds"]) == (65, 88.7, 2)
    row = cells.loc[("table2", "mnist", "0.1", "std of FaithUB", "FD")]
    spread = bounds.query("method == 'FD'").groupby("seed")["FaithUB"].std(ddof=0)
    assert row["ours"] == pytest.approx(spread.mean()) and row["paper"] == 0.305
    assert cells.loc[("accuracy", "mnist", "0", "accuracy", "FD"), "difference"] == pytest.approx(97.1 - 97.14)
    assert len(ledger.cells(ledger.per_seed(*(f.assign(dataset="digits") for f in (clean, held, bounds))))) == 0


def test_intervals_are_those_of_the_t_distribution(monkeypatch):
    row = cell([0.09, 0.10, 0.11], 0.2, monkeypatch)
    reach = pytest.approx(4.302653 * 0.01 * np.sqrt(4 / 3))
    assert row["high"] - row["ours"] == pytest.approx(4.302653 * 0.01 / np.sqrt(3))
    assert row["most"] - row["ours"] == reach and row["ours"] - row["least"] == reach
    assert row["relative"] == pytest.approx(-0.5)
    rows = [cell(values, 0.1, monkeypatch) for values in ([0.1, 0.101], [0.3, 0.301], [0.1])]
    (row,) = ledger.summary(pd.DataFrame(rows)).to_dict("records")
    assert [row[name] for name in ("cells", *ledger.VERDICTS)] == [3, 1, 1, 0, 1]
    assert row["off"] == pytest.approx((0.5 + 200.5 + 0) / 3)


@pytest.mark.parametrize(
    ("dataset", "images", "share"), [("cifar10", 1000, 0.9), ("mnist", 1000, 0), ("digits", 1000, 0)]
)
def test_fewer_images_in_the_paper_widen_the_interval(dataset, images, share):
    """The paper's CIFAR-10 has 100 images, and draws a mean with ten times the variance of our thousand."""
    chance = np.random.default_rng(3)
    bounds = faithfulness({("8/255", m): (0.1, 0.0) for m in STUDENTS}, seeds=2, images=images)
    bounds = bounds.assign(dataset=dataset, EmpLB=0.0, FaithUB=chance.random(len(bounds)))
    held = robustness({m: [0.5] * 2 for m in STUDENTS}, radii=("8/255",), images=images).assign(dataset=dataset)
    fewer, values = ledger.fewer(held, bounds), ledger.per_seed(None, held, bounds)
    narrow, wide = (ledger.cells(values, more) for more in (None, fewer))
    if not share:
        assert fewer.empty and narrow.equals(wide)
        return
    drawn = fewer.set_index(["measure", "method"])["drawn"]
    # uniform numbers: variance 1/12; 18 degrees of freedom know it to a third or so
    assert drawn["FaithUB"].pow(2).mean() == pytest.approx(share / 12 / 100, rel=0.35)
    assert (drawn["EmpLB"] == 0).all() and (drawn["robust accuracy"] > 0).all()
    reach = [(cells["most"] - cells["ours"]) ** 2 for cells in (narrow, wide)]
    extra = (1.959964 * wide.merge(fewer, on=ledger.KEYS)["drawn"]) ** 2
    assert np.allclose(reach[1] - reach[0], extra) and wide["high"].equals(narrow["high"]), "our own mean is as sure"
    first, second, *_ = (part["image"].unique().tolist() for _, part in tables.parts(bounds, 100))
    assert first + second == bounds["image"].unique()[:200].tolist(), "consecutive images in the order of the subset"


def test_readings_lie_beside_the_paper():
    theirs = ledger.papers().query("dataset == 'mnist'").rename(columns={"paper": "value"})
    own = [theirs.assign(reading="as is", seed=seed, value=theirs["value"] + seed) for seed in range(2)]
    other = theirs.assign(reading="b", seed=0, value=theirs["value"] - 2.0)
    readings = pd.concat([*own, other])
    found = ledger.distances(readings)
    assert list(found.index) == ["as is", "b"] and not any(name.startswith("std") for name in found)
    assert np.allclose(found.loc["as is"], 0.5) and np.allclose(found.loc["b"], 2.0), "the mean over the paper's cells"
    assert ledger.distances(readings.assign(dataset="digits")).empty
    cells = ledger.changes(readings, [("accuracy", "RT", "0"), ("EmpLB", "FD", "0.1"), ("EmpLB", "FD", "7")])
    assert cells["RT: accuracy"].tolist() == ["97.9", "97.9 to 98.9", "**95.9**"], "bold is outside the seeds"
    assert len(cells.columns) == 2 and cells["FD: EmpLB, ε = 0.1"].tolist() == ["0.061", "0.061 to 1.061", "**-1.939**"]


# --- claims


def test_a_claim_is_as_good_as_its_worst_pair():
    """At a radius the row is that of the worst pair, with the seeds until all pairs are decided."""
    shares = {"SD": [0.2] * 6, "ARD": [0.6] * 6, "RSLAD": [0.5, 0.8] * 3, "FD": [0.9] * 6, "RT": [1.0] * 6}
    held, bounds = robustness(shares), faithfulness({("0.1", m): (0.1, 0.999) for m in STUDENTS}, seeds=6)
    found = ledger.claims("digits", held, bounds).set_index(["claim", "eps"])
    assert found.loc[("C2", "0.1"), "pair"] == "robust: RSLAD against FD"
    assert found.loc[("C2", "0.1"), "margin"] == pytest.approx(-25)
    against_ard = seeds_needed(5.0, 100 * np.std([0.5, 0.8] * 3, ddof=1), 1.0, tests=6, beyond=6)
    assert found.loc["C2", "needed"].tolist() == pytest.approx([against_ard] * 2), "the pair that takes longest"
    assert (found.loc["C2", "verdict"] == "undecided").all() and not found["claimed"].any()


def test_leads_are_paired_and_keep_the_order_of_the_radii():
    ends = {(eps, m): (0.1 * k, 0.2 * k) for eps in ("8/255", "16/255") for k, m in enumerate(STUDENTS)}
    frame = faithfulness(ends)
    found = ledger.lead(frame, "EmpLB", ["SD"])
    assert found.index.get_level_values("eps").unique().tolist() == ["8/255", "16/255"] and list(found) == [0, 1, 2]
    assert np.allclose(found.loc["8/255"].T, [[0.1, 0.2, 0.3]] * 3, atol=1e-3), "against ARD, RSLAD, FD"
    means = frame.groupby(["eps", "method", "seed"], sort=False)[["EmpLB", "FaithUB"]].mean().reset_index()
    assert np.allclose(found, ledger.lead(means, "EmpLB", ["SD"])), "the means of each seed say the same"
    assert (ledger.lead(robustness({"SD": [0.5], "FD": [0.75]}), "robust", ["FD"], ["SD"]) == 25).all(axis=None)
    ceiling = faithfulness({("0.2", m): (0.1, 0.9 if m == "ARD" else 0.999) for m in STUDENTS})
    assert list(ledger.lead(ceiling, "FaithUB", ["FD"]).loc["0.2"].index) == ["FaithUB: FD against ARD"]


def steps_frame(values: dict[str, list[float]], seed: int) -> pd.DataFrame:
    """EmpLB of one image by steps, for RSLAD and FD."""
    rows = [(m, n, 7, v) for m, found in values.items() for n, v in zip((1, 5), found, strict=True)]
    frame = pd.DataFrame(rows, columns=["method", "steps", "image", "EmpLB"])
    return frame.assign(seed=seed, eps="8/255", dataset="fashion_mnist")


def whole(dataset: str, steps=None, alphas=None, seeds: int = 12) -> pd.DataFrame:
    shares = {"RT": 0.9, "SD": 0.2, "ARD": 0.6, "RSLAD": 0.95, "FD": 0.7}
    size = {"SD": 0.3, "ARD": 0.2, "RSLAD": 0.15, "FD": 0.1}
    ends = {(eps, m): (size[m] * k, 2 * size[m] * k) for k, eps in enumerate(("0.1", "0.2"), 1) for m in STUDENTS}
    held = robustness({method: [share] * seeds for method, share in shares.items()})
    return ledger.claims(dataset, held, faithfulness(ends, seeds), steps, alphas)


def test_the_claims_are_those_of_the_data_set():
    mnist = ledger.overview(whole("mnist")).set_index("claim")
    assert mnist["mark"].to_dict() == {"C1": "✓", "C2": "✓", "C3": "✗", "C4": "✓", "C5": "✓", "C8": "✓"}
    assert mnist["claimed"].all() and mnist.loc["C1", "words"] == "holds, by more than 1 point, at 2 of 2 ε"
    assert whole("mnist").query("claim == 'C3'")["eps"].tolist() == ["0.2"], "all but the smallest ε"
    cifar = whole("cifar10")
    assert cifar.query("claim == 'C3'")["eps"].tolist() == ["0.1", "0.2"] and "C2" not in set(cifar["claim"])
    fashion = ledger.overview(whole("fashion_mnist")).set_index("claim")
    assert fashion.loc["C3", "mark"] == "✓" and fashion.loc["C4", "mark"] == "✗" and "RSLAD" in fashion["text"]["C4"]


def test_one_order_that_flips_is_enough():
    clear, calm = {"RSLAD": [0.1, 0.3], "FD": [0.2, 0.2]}, {"RSLAD": [0.1, 0.1], "FD": [0.2, 0.2]}
    noise = {"RSLAD": [0.1, 0.30000001], "FD": [0.2, 0.3]}
    for kinds, verdict in (((clear, calm), "holds"), ((calm, calm), "undecided"), ((noise,), "undecided")):
        steps = pd.concat([steps_frame(values, seed) for seed, values in enumerate(kinds)], ignore_index=True)
        (row,) = whole("fashion_mnist", steps, seeds=1).query("claim == 'C6'").to_dict("records")
        assert row["verdict"] == verdict and row["eps"] == "8/255" and np.isnan(row["needed"])


def test_what_cannot_be_compared_is_left_out():
    held = robustness({m: [0.5] * 2 for m in ("RT", *STUDENTS)}, radii=("0", "0.1"))
    found = ledger.claims("digits", held, faithfulness({("0.1", m): (0.1, 0.999) for m in STUDENTS}, seeds=2))
    assert list(dict.fromkeys(found["claim"])) == ["C1", "C2", "C4"], "no smaller ε for C3 and C8, all at the ceiling"
    judged = whole("mnist").query("claim in ['C4', 'C5']").reset_index(drop=True)
    judged.loc[judged["eps"] == "0.2", "verdict"] = "the opposite holds"
    assert ledger.overview(judged)["mark"].tolist() == ["✗", "✓"], "C5 says nearly always"


def test_a_larger_alpha_must_lower_both_bounds():
    ends = {("0.1", 0.5): (0.3, 0.6), ("0.1", 0.75): (0.4, 0.7), ("0.1", 1.0): (0.2, 0.65)}
    alphas = faithfulness(ends, seeds=12).rename(columns={"method": "alpha"})
    (row,) = whole("cifar10", alphas=alphas).query("claim == 'C7'").to_dict("records")
    assert row["verdict"] == "the opposite holds" and row["margin"] == pytest.approx(-0.05, abs=1e-3)
    assert row["pair"] == "FaithUB: 1.0 against 0.5"


# --- proved, image by image


def test_what_is_proved():
    """Two radii, three images: FD is proved better on one, worse on none at the first; tighter ends prove more."""
    rows = [("4/255", "FD", 1, 0.1, 0.2), ("4/255", "SD", 1, 0.3, 0.9), ("4/255", "FD", 2, 0.1, 0.4)]
    rows += [("4/255", "SD", 2, 0.4, 0.9), ("4/255", "FD", 3, 0.0, 1.0), ("4/255", "SD", 3, 0.0, 1.0)]
    rows += [("12/255", m, image, 0.5, 0.6) for m in ("FD", "SD") for image in (1, 2, 3)]
    bounds = pd.DataFrame(rows, columns=["eps", "method", "image", "EmpLB", "FaithUB"])
    found = ledger.proved(bounds)
    assert found["eps"].tolist() == ["4/255"] * 2 + ["12/255"] * 2 and (found["images"] == 3).all()
    names = ["student", "proved", "lost", "open"]
    assert np.allclose(found.set_index("student").loc["FD", names[1:]], [[100 / 3, 0, 200 / 3], [0, 0, 100]])
    assert np.allclose(found.set_index("student").loc["SD", names[1:]], [[0, 100 / 3, 200 / 3], [0, 0, 100]])
    tight = bounds.assign(BestUB=[0.2, 0.9, 0.39, 0.9, *[1.0] * 8], StrongLB=[0.0] * 6 + [0.5] * 6)
    assert ledger.proved(tight)["proved"].tolist() == pytest.approx([200 / 3, 0, 0, 0])
    assert ledger.proved(pd.concat([bounds.assign(seed=0), bounds.assign(seed=1)]))["images"].tolist() == [6] * 4
    assert tables.layout(found, "proved").iloc[0].tolist() == ["33.3 · 66.7", "0.0 · 100.0"]
    for wrong in (0.05, np.nan):
        with pytest.raises(AssertionError, match="report"):
            ledger.proved(tight.assign(BestUB=wrong, FaithUB=wrong))


# --- what is shown


def test_the_claims_page_has_a_row_a_claim_and_data_set():
    few, many = whole("mnist", seeds=3), whole("fashion_mnist")
    lines = ledger.page({"fashion_mnist": many, "mnist": few, "digits": whole("digits", seeds=3)})
    assert ledger.RULE.splitlines()[0] in lines and not any("digits" in line for line in lines)
    rows = [line for line in lines if line.startswith("| ") and " C" in line[:5]]
    assert [row[4:6] for row in rows] == [f"C{n}" for n in (1, 2, 3, 4, 5, 8) for _ in range(2)]
    assert rows[0] == (
        "| ✓ C1: ARD, RSLAD, FD are more robust than SD | `fashion_mnist`, 12 | +40.0 [+40.0, +40.0] points at ε = 0.1 "
        "| holds, by more than 1 point, at 2 of 2 ε |"
    )
    assert rows[1].endswith("3 | +40.0 points at ε = 0.1 | undecided, at 2 of 2 ε (it would take 8 seeds) |")
    unsure = many.assign(verdict="undecided", needed=np.inf, supported=0.0234)
    assert (
        ledger.overview(unsure)["words"]
        .iloc[3]
        .endswith("(it would take over 1000 seeds; so far: at most 0.023 apart)")
    )


@pytest.mark.parametrize(("dataset", "panels"), [("mnist", 4), ("cifar10", 6)])
def test_the_pictures_show_every_cell_and_every_radius(dataset, panels):
    theirs = ledger.papers().query("dataset == @dataset")
    values = [theirs.rename(columns={"paper": "value"}).assign(seed=seed) for seed in range(2)]
    cells = ledger.cells(pd.concat(values))
    cells.loc[cells["method"] == "FD", "verdict"] = "above"
    figure = figures.beside_paper(cells)
    drawn = sum(len(line.get_xdata()) for axes in figure.axes for line in axes.lines if line.get_marker() == "_")
    shown = cells[~cells["measure"].str.startswith("std") & ~cells["table"].isin(["accuracy", "table3"])]
    assert len(figure.axes) == panels and drawn == len(shown)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["paper", "paper, outside the interval"], "red has a legend"
    (axes,) = figures.forest(judged := whole(dataset), "title").axes
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert np.allclose(drawn, judged["margin"] / judged["unit"].map({"%": 1.0, "confidence": 0.01}))
