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
    if name == "table1":
        return _layout1(table)
    if name in ("table2", "table5", "sample"):
        return _layout2(table, "alpha" if name == "table5" else "method", "table5" if name == "table5" else "table2")
    if name == "table3":
        steps = [column for column in table if column.startswith("pgd")]
        long = table.melt(["example", "method"], steps, var_name="steps")
        long["row"], long["steps"] = long["example"] + "  " + long["method"], "PGD-" + long["steps"].str[3:]
        best = _is("min", long, "value", ["example", "steps"])
        return _grid(long, "row", "steps", "example", {"EmpLB": ("{value:.4f}", best)})
    if name == "autoattack":
        long = table.melt(["method"], ["PGD", "AutoAttack", "both"])
        best = long["value"] == long["variable"].map(table[table["method"] != "RT"].max())
        groups = {"robust accuracy (%)": ("{value:.1f}", best & (long["method"] != "RT"))}
        missed = {"images": ("{missed} of {images}", False)}
        shares = _grid(long, "method", "variable", "network", groups)
        return _beside(shares, _grid(table.assign(head="PGD missed"), "method", "head", "network", missed))
    if name == "ladder":
        groups = {
            f"mean bound [images below {CEILING}] at ε": ("{mean:.3f} [{informative:.0f} %]", table["rung"] == "best")
        }
        return _grid(table, "rung", "eps", "step", groups)
    if name == "proved":  # a row per ordered pair of students
        pairs = table["student"] + " nearer to RT than " + table["rival"]
        proved = ("{proved:.1f} [{open:.1f}]", table["proved"] > table["lost"])
        groups = {"images (%) on which it is proved [open] at ε": proved}
        return _grid(table.assign(pair=pairs), "pair", "eps", "pair", groups)
    if name == "best":  # the paper's EmpLB and FaithUB on the same images in brackets
        table = table.assign(closed=table["closed"].map("{:.0f}".format).where(table["closed"].notna(), "–"))
        groups = {
            "δ* is at least": ("{BestLB:.3f}\n[{EmpLB:.3f}]", _is("min", table, "BestLB", "eps")),
            "δ* is at most": ("{BestUB:.3f}\n[{FaithUB:.3f}]", _is("min", table, "BestUB", "eps")),
            "gap closed (%)": ("{closed}", False),
        }
    elif name == "agreement":
        best = _is("max", table, "certified", "eps")
        groups = {"agreement with RT on the ball (%)": ("{certified:.1f} … {empirical:.1f}", best)}
    elif name == "strong":
        groups = {
            "mean gain": ("{mean:.3f}", False),
            "largest gain": ("{largest:.2f}", False),
            "raised by > 0.01 (%)": ("{raised:.0f}", False),
        }
    else:
        raise ValueError(f"there is no table {name!r}")
    return _grid(table, "eps", "method", "ε", groups)


def _layout1(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    both, found = beside_paper(table, "table1"), []
    for measure, title in zip(MEASURES, ("robust accuracy (%)", "agreement with RT (%)"), strict=True):
        columns = [f"{measure}_{m}" for m in ("RT", *STUDENTS) if f"{measure}_{m}" in table]
        long = both.melt(["eps"], columns, var_name="column")
        printed = both.reindex(columns=[f"{column}_paper" for column in columns])
        long["theirs"] = [_bracket("{:.1f}", value) for value in printed.to_numpy().T.flat]
        long["method"] = long["column"].str.removeprefix(f"{measure}_")
        best = _is("max", long.assign(value=long["value"].where(long["method"] != "RT")), "value", "eps")
        found.append(_grid(long, "eps", "method", "ε", {title: ("{value:.1f}{theirs}", best)}))
    return _beside(*found)


def _layout2(table: pd.DataFrame, by: str, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    both, found = beside_paper(table, name), []
    both["column"] = both[by] if by == "method" else both[by].map("α = {:g}".format)
    # two lines: eight columns of both side by side do not fit a page
    pairs = both.reindex(columns=["mean_paper", "std_paper"]).to_numpy()
    both["theirs"] = [_bracket("{:.3f} ±{:.3f}", *pair).replace(" ", "\n", 1) for pair in pairs]
    for bound in BOUNDS:
        part = both[both["bound"] == bound]
        text = ("{mean:.3f} ±{std:.3f}{theirs}", _is("min", part, "mean", "eps"))
        found.append(_grid(part, "eps", "column", "ε", {bound: text}))
    return _beside(*found)


def _bracket(form: str, *theirs: float) -> str:
    """The paper's values in brackets, a blank before them; nothing where it prints none."""
    return "" if pd.isna(theirs[0]) else f" [{form.format(*theirs)}]"


def _is(extreme: str, table: pd.DataFrame, column: str, by) -> pd.Series:
    """In which rows a column has the least ("min") or largest ("max") value among those with the same `by`."""
    return table[column] == table.groupby(by)[column].transform(extreme)


def _grid(table: pd.DataFrame, row: str, column: str, name: str, groups: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of `layout` from a table with a row per cell: `row` and `column` say where each stands.

    `groups` holds the columns' groups: title → (text of a cell, a format with the table's columns; which are best).
    """
    rows, columns = pd.Index(table[row].unique(), name=name), table[column].unique()
    frames = ({}, {})
    for title, (text, best) in groups.items():
        texts = pd.Series([text.format(**record) for record in table.to_dict("records")], table.index, dtype=object)
        for found, values in zip(frames, (texts, best), strict=True):
            placed = table.assign(cell=values).pivot(index=row, columns=column, values="cell")
            found[title] = placed.reindex(index=rows, columns=columns)
    cells, best = (pd.concat(found, axis=1).rename_axis(columns=(None, None)) for found in frames)
    return cells, best


def _beside(*parts: tuple[pd.DataFrame, pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    cells, best = (pd.concat(frames, axis=1) for frames in zip(*parts, strict=True))
    return cells, best
