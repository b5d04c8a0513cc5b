"""From tidy per-image measurements to the paper's Tables 1, 2, 3 and 5, in the columns of its own CSV files."""

import re

import numpy as np
import pandas as pd

from faithkd import paths
from faithkd.report import paper
from faithkd.report.paper import STUDENTS

MEASURES = ("robust_accuracy", "agreement")
BOUNDS = ("EmpLB", "FaithUB")
CEILING = 0.99  # a FaithUB above it says nothing


def committed(profile: str, name: str) -> pd.DataFrame:
    """figures/<profile>/<name>.csv as it travels with the repository; radii ε stay text, "8/255".

    Raises NotebookError where it is missing or damaged.
    """
    file = paths.ROOT / "figures" / profile / f"{name}.csv"
    with paths.reading(file):
        return pd.read_csv(file, dtype={"eps": str}).astype({"eps": str})  # every table has it


def is_papers(dataset: str) -> bool:
    """Whether the paper reports this data set at all."""
    return dataset in set(paper.table("accuracy")["dataset"])


# --- the paper's tables


def table1(robustness: pd.DataFrame) -> pd.DataFrame:
    """Table 1: robust accuracy and empirical distillation agreement in %, one row per ε.

    `robustness` has a row per (dataset, eps, method, image) with bool `robust`, and `agrees` for students.
    """
    wide = 100 * robustness.pivot_table(["robust", "agrees"], ["dataset", "eps"], "method", sort=False)
    methods = [m for m in ("RT", *STUDENTS) if m in set(robustness["method"])]
    columns = {("robust", m): f"robust_accuracy_{m}" for m in methods}
    columns |= {("agrees", m): f"agreement_{m}" for m in methods if m != "RT"}
    return wide[list(columns)].set_axis(list(columns.values()), axis=1).reset_index()


def table2(faithfulness: pd.DataFrame, by: str = "method") -> pd.DataFrame:
    """Table 2 (or 5, by α): mean and standard deviation of EmpLB and FaithUB over the test images.

    `faithfulness` has a row per (dataset, eps, method or alpha, image) with columns EmpLB and FaithUB. The standard
    deviation is the paper's: over the images, of one teacher and one student (population form).
    """
    long = faithfulness.melt(["dataset", "eps", by], list(BOUNDS), "bound")
    groups = long.groupby(["dataset", "eps", "bound", by], sort=False)["value"]
    result = groups.agg(mean="mean", std=lambda v: float(np.std(v)), images="count").reset_index()
    order = list(faithfulness["eps"].unique())
    return result.sort_values("eps", key=lambda eps: eps.map(order.index), kind="stable", ignore_index=True)


def parts(frame: pd.DataFrame, size: int):
    """The measurements of the first `size` images, of the next, and so on: yield (number from 0, frame).

    `frame` has a row per image and whatever else it measures (ε, method, α), each with the images in the same order; a
    last part with fewer images is left out. As test subsets are in random order, every part is a sample of its own.
    """
    place = frame["image"].map({image: place for place, image in enumerate(frame["image"].unique())})
    for number in range(frame["image"].nunique() // size):
        yield number, frame[place // size == number]


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


# --- past the paper: a row per (dataset, eps, method), with the number of `images`


def _means(frame: pd.DataFrame, columns: list[str], by: str = "method") -> pd.DataFrame:
    groups = frame.groupby(["dataset", "eps", by], sort=False)
    return groups[columns].mean().assign(images=groups.size())


def best(frame: pd.DataFrame) -> pd.DataFrame:
    """Table 2's bracket beside ours: means of EmpLB, BestLB, BestUB and FaithUB; `frame`: `experiment.best`.

    `closed`: the share (in %) of FaithUB − EmpLB, in the mean, by which BestUB lies below FaithUB; what is left is
    BestUB − EmpLB, and PGD's share of it is unknown.
    """
    means = _means(frame, ["EmpLB", "BestLB", "BestUB", "FaithUB"])
    gap = means["FaithUB"] - means["EmpLB"]
    means.insert(4, "closed", 100 * (means["FaithUB"] - means["BestUB"]) / gap.where(gap > 0))
    return means.reset_index()


def ladder(frame: pd.DataFrame) -> pd.DataFrame:
    """How far each step of the bounds gets, per `rung`: `mean`, and `informative`, the share (%) below CEILING.

    `frame`: `experiment.ladder`.
    """
    shown = frame.assign(mean=frame["FaithUB"], informative=100.0 * (frame["FaithUB"] < CEILING))
    return _means(shown, ["mean", "informative"], by="rung").reset_index()


def agreement_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """Def. 3 between a certified and an empirical value, in %; `frame`: `experiment.best`.

    The agreement on its images, eqs (13) and (14), lies between the two.
    """
    shown = frame.assign(certified=100.0 * frame["agreement_certified"], empirical=100.0 * frame["agrees"])
    return _means(shown, ["certified", "empirical"]).reset_index()


def auto_attack(frame: pd.DataFrame) -> pd.DataFrame:
    """Robust accuracy in % by PGD, AutoAttack and both together (the worst case per image), a row per network.

    `frame`: `experiment.auto_attack`. `missed`: images on which PGD fails and AutoAttack does not.
    """
    shown = frame.assign(missed=frame["PGD"] & ~frame["AutoAttack"]).astype({"missed": float})
    means = _means(shown, ["PGD", "AutoAttack", "both", "missed"])
    means["missed"] = (means["missed"] * means["images"]).round().astype(int)
    means[["PGD", "AutoAttack", "both"]] *= 100
    return means.reset_index()


def strong(frame: pd.DataFrame) -> pd.DataFrame:
    """By how much a wider search raises EmpLB: `mean`, `largest`, and `raised`, the share (%) by more than 0.01.

    `frame`: `experiment.strong`.
    """
    gain = frame["StrongLB"] - frame["EmpLB"]
    shown = frame.assign(mean=gain, largest=gain, raised=100.0 * (gain > 0.01))
    means = _means(shown, ["EmpLB", "StrongLB", "mean", "largest", "raised"])
    means["largest"] = shown.groupby(["dataset", "eps", "method"], sort=False)["largest"].max()
    return means.reset_index()


# --- for people


def beside_paper(ours: pd.DataFrame, name: str) -> pd.DataFrame:
    """`ours` with the paper's values in columns `<column>_paper`, matched on what names a row.

    Rows that the paper does not print, as for data sets it does not use, get no value (NaN), never a made-up one.
    """
    theirs = paper.table(name)
    keys = [c for c in ("dataset", "eps", "bound", "method", "alpha", "example") if c in ours and c in theirs]
    return ours.merge(theirs, on=keys, how="left", suffixes=("", "_paper"))


# What stands where: what names a row and a column of the table; then for each group of columns its title, the text of a
# cell and which end of a row is its best, if any.
_BRACKETS = {bound: (f"{{{bound}:.3f}} ±{{{bound}_std:.3f}}", "min") for bound in BOUNDS}
LAYOUTS = {
    "table1": ("eps", "method", {"robust accuracy (%)": ("{robust_accuracy:.1f}", "max"),
                                 "agreement with RT (%)": ("{agreement:.1f}", "max")}),
    "table2": ("eps", "method", _BRACKETS),
    "sample": ("eps", "method", _BRACKETS),
    "table3": ("example", "method", {}),  # a group for each number of steps
    "table5": ("eps", "alpha", _BRACKETS),
    "autoattack": ("attack", "method", {"robust accuracy (%)": ("{value:.1f}", "max")}),
    "strong": ("eps", "method", {"mean gain": ("{mean:.3f}", None), "largest gain": ("{largest:.2f}", None),
                                 "raised by > 0.01 (%)": ("{raised:.0f}", None)}),
    "best": ("eps", "method", {"δ* is at least": ("{BestLB:.3f}", "min"), "δ* is at most": ("{BestUB:.3f}", "min"),
                               "gap closed (%)": ("{closed:.0f}", None)}),
    "ladder": ("rung", "eps", {f"mean bound · images below {CEILING}": ("{mean:.3f} · {informative:.0f} %", None)}),
    "agreement": ("eps", "method", {"certified … empirical (%)": ("{certified:.1f} … {empirical:.1f}", "max")}),
    "proved": ("pair", "eps", {"images (%): proved · open": ("{proved:.1f} · {open:.1f}", None)}),
}  # fmt: skip


def layout(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table for people: the text of its cells, the paper's value below ours in brackets.

    `name` is one of LAYOUTS; `table` comes from the function of that name (`sample`: `table2` of few images), from
    `agreement_intervals`, `auto_attack` or `ledger.proved`. The best student of a row stands between two stars, of
    ours and of the paper's; with "best" the brackets hold EmpLB and FaithUB of the same images.
    """
    row, column, groups = LAYOUTS[name]
    if name == "table3":
        groups = {f"PGD-{one[3:]}": (f"{{{one}:.4f}}", "min") for one in table if one.startswith("pgd")}
    cells = _tidy(table, name)
    rows, columns = ((table if one in table else cells)[one].unique() for one in (row, column))
    found = {}
    for title, (form, end) in groups.items():
        value = re.search(r"{(\w+)", form)[1]
        text = _texts(cells, form, value, (row, column, end))
        if f"{value}_paper" in cells:
            theirs = re.sub(r"{(\w+)", r"{\1_paper", form)
            text += _texts(cells, f"\n[{theirs}]", f"{value}_paper", (row, column, end)).fillna("")
        found[title] = cells.assign(text=text).pivot(index=row, columns=column, values="text").loc[rows, columns]
    shown = pd.concat(found, axis=1).dropna(axis=1, how="all").fillna("–")
    if column == "alpha":
        shown = shown.rename(columns="α = {:g}".format, level=1)
    return shown.rename_axis(index="ε" if row == "eps" else row, columns=(None, None))


def _tidy(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The table with one row per cell of each group in `layout`."""
    if name == "table1":
        keys, sides = ["dataset", "eps", "method"], (table, paper.table("table1"))
        ours, theirs = (pd.wide_to_long(t, MEASURES, keys[:2], "method", "_", "[A-Z]+").reset_index() for t in sides)
        return ours.merge(theirs, "left", on=keys, suffixes=("", "_paper"))
    if name in ("table2", "table5", "sample"):
        by = LAYOUTS[name][1]
        both = beside_paper(table, "table5" if by == "alpha" else "table2")
        values = {"mean": "", "std": "_std", "mean_paper": "_paper", "std_paper": "_std_paper"}
        wide = both.pivot(index=["eps", by], columns="bound", values=list(values))
        return wide.set_axis([bound + values[what] for what, bound in wide], axis=1).reset_index()
    if name == "autoattack":
        return table.melt(["method"], ["PGD", "AutoAttack", "both"], var_name="attack")
    if name == "best":
        return table.assign(BestLB_paper=table["EmpLB"], BestUB_paper=table["FaithUB"])
    if name == "proved":
        return table.assign(pair=table["student"] + " nearer to RT than " + table["rival"])
    return table


def _texts(cells: pd.DataFrame, form: str, value: str, where: tuple) -> pd.Series:
    """`form` filled in for each of `cells` that has the value, the `end` of its row among the students in bold."""
    row, column, end = where
    running = cells[value].round(int(re.search(r"\.(\d)f", form)[1]))  # what reads the same is the same
    running = running.mask(cells[column].eq("RT") | (end is None))
    wins = running == running.groupby(cells[row]).transform(end or "max")
    texts = [form.format(**record) for record in cells.to_dict("records")]
    bold = [
        re.sub(r"[\w.]+", r"**\g<0>**", text, count=1) if won else text for text, won in zip(texts, wins, strict=True)
    ]
    return pd.Series(bold, cells.index, dtype=object).where(cells[value].notna())
