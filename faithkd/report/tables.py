"""From tidy per-image measurements to the paper's Tables 1, 2, 3 and 5, in the columns of its own CSV files."""

import numpy as np
import pandas as pd

from faithkd.report import paper
from faithkd.report.paper import STUDENTS

MEASURES = ("robust_accuracy", "agreement")
BOUNDS = ("EmpLB", "FaithUB")
CEILING = 0.99  # a FaithUB above it says nothing


def table1(robustness: pd.DataFrame) -> pd.DataFrame:
    """Table 1: robust accuracy and empirical distillation agreement in %, one row per ε.

    `robustness` has a row per (dataset, eps, method, image) with bool `robust`, and `agrees` for students.
    """
    mean = robustness.groupby(["dataset", "eps", "method"], sort=False)[["robust", "agrees"]].mean() * 100
    wide = mean.unstack("method")
    methods = [m for m in ("RT", *STUDENTS) if m in set(robustness["method"])]
    columns = {("robust", m): f"robust_accuracy_{m}" for m in methods}
    columns |= {("agrees", m): f"agreement_{m}" for m in methods if m != "RT"}
    wide = wide[list(columns)].set_axis(list(columns.values()), axis=1)
    order = list(dict.fromkeys(zip(robustness["dataset"], robustness["eps"], strict=True)))
    return wide.loc[order].reset_index()


def table2(faithfulness: pd.DataFrame, by: str = "method") -> pd.DataFrame:
    """Table 2 (or 5, by α): mean and standard deviation of EmpLB and FaithUB over the test images.

    `faithfulness` has a row per (dataset, eps, method or alpha, image) with columns EmpLB and FaithUB. The standard
    deviation is the paper's: over the images, of one teacher and one student (population form).
    """
    long = faithfulness.melt(
        id_vars=["dataset", "eps", by], value_vars=list(BOUNDS), var_name="bound", value_name="value"
    )
    groups = long.groupby(["dataset", "eps", "bound", by], sort=False)["value"]
    result = groups.agg(mean="mean", std=lambda v: float(np.std(v)), images="count").reset_index()
    order = {value: place for place, value in enumerate(dict.fromkeys(faithfulness["eps"]))}
    return result.sort_values("eps", key=lambda e: e.map(order), kind="stable", ignore_index=True)


def parts(frame: pd.DataFrame, size: int):
    """The measurements of the first `size` images, of the next, and so on: yield (number from 0, frame).

    `frame` has a row per image and whatever else it measures (ε, method, α), each with the images in the same order; a
    last part with fewer images is left out. As test subsets are in random order, every part is a sample of its own.
    """
    place = frame["image"].map({image: place for place, image in enumerate(frame["image"].unique())})
    for number in range(frame["image"].nunique() // size):
        yield number, frame[place // size == number]


def means_of_parts(faithfulness: pd.DataFrame, size: int) -> pd.DataFrame:
    """Table 2's means from each of `parts`: columns dataset, eps, bound, method, mean, std, images, `part`."""
    made = [table2(part).assign(part=number) for number, part in parts(faithfulness, size)]
    return pd.concat(made, ignore_index=True)


def table3(steps: pd.DataFrame, images: list[int]) -> pd.DataFrame:
    """Table 3: EmpLB by number of PGD steps for a few examples, RSLAD beside FD.

    `steps` has a row per (image, method, steps) with EmpLB; `images` are the examples x1, x2, ….
    """
    chosen = steps[steps["image"].isin(images)]
    wide = chosen.pivot(index=["image", "method"], columns="steps", values="EmpLB").reset_index()
    wide.insert(0, "example", wide["image"].map({image: f"x{n + 1}" for n, image in enumerate(images)}))
    wide = wide.rename(columns={n: f"pgd{n}" for n in steps["steps"].unique()})
    wide["method"] = pd.Categorical(wide["method"], STUDENTS)
    wide = wide.sort_values(["example", "method"], ignore_index=True).astype({"method": str})
    wide.columns.name = None
    return wide[["example", "method", *(c for c in wide if str(c).startswith("pgd")), "image"]]


def flips(steps: pd.DataFrame) -> pd.DataFrame:
    """How often the order of RSLAD and FD changes with the number of PGD steps, per image (claim C6).

    Returns `image`, `flips` (sign changes of EmpLB_RSLAD − EmpLB_FD from one number of steps to the next) and
    `margin`, the smallest of those differences in size: a flip by float noise has a tiny margin.
    """
    wide = steps.pivot(index="image", columns=["method", "steps"], values="EmpLB")
    difference = wide["RSLAD"] - wide["FD"]
    changes = (np.sign(difference).diff(axis=1).abs() == 2).sum(axis=1)
    return pd.DataFrame({"flips": changes, "margin": difference.abs().min(axis=1)}).reset_index()


def examples(steps: pd.DataFrame, count: int) -> list[int]:
    """The examples of Table 3: images with the most flips, the clearest (largest margin) first."""
    ranked = flips(steps).sort_values(["flips", "margin", "image"], ascending=[False, False, True])
    return [int(image) for image in ranked["image"].head(count)]


def accuracies(robustness: pd.DataFrame) -> pd.DataFrame:
    """Clean test accuracies in % (§6), one row per data set: the ε = 0 rows of Table 1's measurement."""
    clean = robustness[robustness["eps"] == "0"]
    wide = clean.groupby(["dataset", "method"], sort=False)["robust"].mean().mul(100).unstack("method")
    wide.columns.name = None
    return wide[["RT", *STUDENTS]].reset_index()


def best(frame: pd.DataFrame) -> pd.DataFrame:
    """Table 2's bracket beside ours: means of EmpLB, BestLB, BestUB and FaithUB per (dataset, eps, method).

    `frame` is that of `experiment.best`. `closed`: the share (in %) of FaithUB − EmpLB, in the mean, by which BestUB
    lies below FaithUB; what is left is BestUB − EmpLB, and PGD's share of it is unknown.
    """
    groups = frame.groupby(["dataset", "eps", "method"], sort=False)
    means = groups[["EmpLB", "BestLB", "BestUB", "FaithUB"]].mean()
    gap = means["FaithUB"] - means["EmpLB"]
    means["closed"] = 100 * (means["FaithUB"] - means["BestUB"]) / gap.where(gap > 0)
    means["images"] = groups.size()
    return means.reset_index()


def ladder(frame: pd.DataFrame) -> pd.DataFrame:
    """How far each step of the bounds gets, per (dataset, eps, rung); `frame` is that of `experiment.ladder`.

    `mean`, and `informative`, the share of images in % whose bound is below CEILING, so that it says something.
    """
    groups = frame.assign(informative=100.0 * (frame["FaithUB"] < CEILING)).groupby(
        ["dataset", "eps", "rung"], sort=False
    )
    columns = {"mean": ("FaithUB", "mean"), "informative": ("informative", "mean"), "images": ("FaithUB", "size")}
    return groups.agg(**columns).reset_index()


def agreement_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """Def. 3 between a certified and an empirical value, in %, per (dataset, eps, method).

    `frame` is that of `experiment.best`. The agreement on its images, eqs (13) and (14), lies between the two.
    """
    groups = frame.groupby(["dataset", "eps", "method"], sort=False)
    shares = 100 * groups[["agreement_certified", "agrees"]].mean()
    shares = shares.set_axis(["certified", "empirical"], axis=1)
    return shares.assign(images=groups.size()).reset_index()


def auto_attack(frame: pd.DataFrame) -> pd.DataFrame:
    """Robust accuracy in % by PGD, AutoAttack and both together (the worst case per image), a row per network.

    `frame` is that of `experiment.auto_attack`. `missed`: images on which PGD fails and AutoAttack does not.
    """
    groups = frame.groupby(["dataset", "eps", "method"], sort=False)
    shares = 100 * groups[["PGD", "AutoAttack", "both"]].mean()
    missed = groups.apply(lambda part: int((part["PGD"] & ~part["AutoAttack"]).sum()))
    return shares.assign(missed=missed, images=groups.size()).reset_index()


def strong(frame: pd.DataFrame) -> pd.DataFrame:
    """By how much a wider search raises EmpLB, per (dataset, eps, method); `frame` is that of `experiment.strong`.

    `raised`: the share of images, in %, on which StrongLB − EmpLB exceeds 0.01.
    """
    gains = frame.assign(gain=frame["StrongLB"] - frame["EmpLB"])
    groups = gains.assign(raised=100.0 * (gains["gain"] > 0.01)).groupby(["dataset", "eps", "method"], sort=False)
    columns = {"EmpLB": ("EmpLB", "mean"), "StrongLB": ("StrongLB", "mean"), "mean": ("gain", "mean")}
    columns |= {"largest": ("gain", "max"), "raised": ("raised", "mean"), "images": ("gain", "size")}
    return groups.agg(**columns).reset_index()


def beside_paper(ours: pd.DataFrame, name: str) -> pd.DataFrame:
    """`ours` with the paper's values in columns `<column>_paper`, matched on what names a row.

    Rows that the paper does not print, as for data sets it does not use, get no value (NaN), never a made-up one.
    """
    theirs = paper.table(name)
    keys = [c for c in ("dataset", "eps", "bound", "method", "alpha", "example") if c in ours and c in theirs]
    return ours.merge(theirs, on=keys, how="left", suffixes=("", "_paper"))


def is_papers(dataset: str) -> bool:
    """Whether the paper reports this data set at all."""
    return dataset in set(paper.table("accuracy")["dataset"])


def layout(table: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table for people: (text of the cells, which cells are the best of their group), paper's value in brackets.

    `name` is "table1", "table2", "table3", "table5", "sample" (`table2` of few images), "best", "ladder", "agreement",
    "autoattack", "strong" or "proved"; `table` comes from the function of that name, from `agreement_intervals`,
    `auto_attack` or `ledger.proved`.
    """
    layouts = {"table1": _layout1, "table2": _layout2, "table3": _layout3, "table5": _layout5}
    layouts |= {"best": _layout_best, "agreement": _layout_agreement, "proved": _layout_proved}
    layouts |= {"autoattack": _layout_auto_attack, "strong": _layout_strong, "sample": _layout2}
    layouts |= {"ladder": _layout_ladder}
    return layouts[name](table)


def _cell(value: float, theirs: float, digits: int, spread: float | None = None) -> str:
    text = f"{value:.{digits}f}" + (f" ±{spread:.{digits}f}" if spread is not None else "")
    return text if pd.isna(theirs) else f"{text} [{theirs:.{digits}f}]"


def _layout1(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    both = beside_paper(table, "table1")
    cells, best = {}, {}
    for measure, title in zip(MEASURES, ("robust accuracy (%)", "agreement with RT (%)"), strict=True):
        methods = [m for m in ("RT", *STUDENTS) if f"{measure}_{m}" in table]
        values = table[[f"{measure}_{m}" for m in STUDENTS]]
        for method in methods:
            column = f"{measure}_{method}"
            theirs = both.get(f"{column}_paper", pd.Series(np.nan, both.index))
            cells[title, method] = [_cell(v, t, 1) for v, t in zip(table[column], theirs, strict=True)]
            best[title, method] = (table[column] == values.max(axis=1)).to_numpy() & (method != "RT")
    return _frames(cells, best, pd.Index(table["eps"], name="ε"))


def _spread(mean: float, std: float) -> str:
    return f"{mean:.3f} ±{std:.3f}"


def _layout2(table: pd.DataFrame, by: str = "method", name: str = "table2"):
    both = beside_paper(table, name).set_index(["eps", "bound", by])
    radii, columns = list(dict.fromkeys(table["eps"])), list(dict.fromkeys(table[by]))
    cells, best = {}, {}
    for bound in BOUNDS:
        lowest = [min(both.loc[(eps, bound, column)]["mean"] for column in columns) for eps in radii]
        for column in columns:
            rows = [both.loc[(eps, bound, column)] for eps in radii]
            title = str(column) if by == "method" else f"α = {column:g}"
            cells[bound, title] = [
                _spread(r["mean"], r["std"])
                # two lines: eight columns of both side by side do not fit a page
                + ("" if pd.isna(r.get("mean_paper")) else f"\n[{_spread(r['mean_paper'], r['std_paper'])}]")
                for r in rows
            ]
            best[bound, title] = [r["mean"] == low for r, low in zip(rows, lowest, strict=True)]
    return _frames(cells, best, pd.Index(radii, name="ε"))


def _layout5(table: pd.DataFrame):
    return _layout2(table, by="alpha", name="table5")


def _layout3(table: pd.DataFrame):
    columns = [c for c in table if c.startswith("pgd")]
    lowest = table.groupby("example")[columns].transform("min")
    cells = {("EmpLB", f"PGD-{c[3:]}"): [f"{value:.4f}" for value in table[c]] for c in columns}
    best = {("EmpLB", f"PGD-{c[3:]}"): (table[c] == lowest[c]).to_numpy() for c in columns}
    index = pd.Index([f"{e}  {m}" for e, m in zip(table["example"], table["method"], strict=True)], name="example")
    return _frames(cells, best, index)


def _by_method(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The rows by (eps, method), and both in their order."""
    return table.set_index(["eps", "method"]), list(dict.fromkeys(table["eps"])), list(dict.fromkeys(table["method"]))


def _layout_best(table: pd.DataFrame):
    """Our bracket, with the paper's EmpLB and FaithUB on the same images in brackets."""
    rows, radii, methods = _by_method(table)
    cells, best = {}, {}
    for title, ours, theirs in (("δ* is at least", "BestLB", "EmpLB"), ("δ* is at most", "BestUB", "FaithUB")):
        values = rows[ours].unstack().loc[radii]
        for method in methods:
            pairs = [rows.loc[(eps, method), [ours, theirs]] for eps in radii]
            cells[title, method] = [f"{mine:.3f}\n[{other:.3f}]" for mine, other in pairs]
            best[title, method] = (values[method] == values.min(axis=1)).to_numpy()
    for method in methods:
        closed = [rows.loc[(eps, method), "closed"] for eps in radii]
        cells["gap closed (%)", method] = ["–" if pd.isna(value) else f"{value:.0f}" for value in closed]
        best["gap closed (%)", method] = [False] * len(radii)
    return _frames(cells, best, pd.Index(radii, name="ε"))


def _layout_ladder(table: pd.DataFrame):
    rows, radii = table.set_index(["rung", "eps"]), list(dict.fromkeys(table["eps"]))
    rungs, title = list(dict.fromkeys(table["rung"])), f"mean bound [images below {CEILING}] at ε"
    cells, best = {}, {}
    for eps in radii:
        pairs = [rows.loc[(rung, eps), ["mean", "informative"]] for rung in rungs]
        cells[title, eps] = [f"{mean:.3f} [{share:.0f} %]" for mean, share in pairs]
        best[title, eps] = [rung == "best" for rung in rungs]
    return _frames(cells, best, pd.Index(rungs, name="step"))


def _layout_agreement(table: pd.DataFrame):
    rows, radii, methods = _by_method(table)
    cells, best, title = {}, {}, "agreement with RT on the ball (%)"
    highest = rows["certified"].unstack().max(axis=1)
    for method in methods:
        ends = [rows.loc[(eps, method), ["certified", "empirical"]] for eps in radii]
        cells[title, method] = [f"{low:.1f} … {high:.1f}" for low, high in ends]
        best[title, method] = [low == highest[eps] for (low, _), eps in zip(ends, radii, strict=True)]
    return _frames(cells, best, pd.Index(radii, name="ε"))


def _layout_proved(table: pd.DataFrame):
    """A row per ordered pair of students: at each ε the images (%) proved for the first, and those that stay open."""
    rows, cells, best = table.set_index(["student", "rival", "eps"]), {}, {}
    pairs = list(dict.fromkeys(zip(table["student"], table["rival"], strict=True)))
    title = "images (%) on which it is proved [open] at ε"
    for eps in dict.fromkeys(table["eps"]):
        there = [rows.loc[(*pair, eps)] for pair in pairs]
        cells[title, eps] = [f"{row['proved']:.1f} [{row['open']:.1f}]" for row in there]
        best[title, eps] = [row["proved"] > row["lost"] for row in there]
    return _frames(cells, best, pd.Index([f"{one} nearer to RT than {other}" for one, other in pairs], name="pair"))


def _layout_auto_attack(table: pd.DataFrame):
    cells, best, title = {}, {}, "robust accuracy (%)"
    students = table["method"] != "RT"
    for column in ("PGD", "AutoAttack", "both"):
        cells[title, column] = [f"{value:.1f}" for value in table[column]]
        best[title, column] = (students & (table[column] == table[column][students].max())).to_numpy()
    cells["images", "PGD missed"] = [f"{row.missed} of {row.images}" for row in table.itertuples()]
    best["images", "PGD missed"] = [False] * len(table)
    return _frames(cells, best, pd.Index(table["method"], name="network"))


def _layout_strong(table: pd.DataFrame):
    rows, radii, methods = _by_method(table)
    cells, best = {}, {}
    titles = {"mean": ("mean gain", 3), "largest": ("largest gain", 2), "raised": ("raised by > 0.01 (%)", 0)}
    for column, (title, digits) in titles.items():
        for method in methods:
            cells[title, method] = [f"{rows.loc[(eps, method), column]:.{digits}f}" for eps in radii]
            best[title, method] = [False] * len(radii)
    return _frames(cells, best, pd.Index(radii, name="ε"))


def _frames(cells: dict, best: dict, index: pd.Index) -> tuple[pd.DataFrame, pd.DataFrame]:
    columns = pd.MultiIndex.from_tuples(list(cells))
    return (
        pd.DataFrame(np.array(list(cells.values()), dtype=object).T, index=index, columns=columns),
        pd.DataFrame(np.array(list(best.values()), dtype=bool).T, index=index, columns=columns),
    )
