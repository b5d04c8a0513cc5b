"""From measured values to what people read: summary, table for the README, ratios to each peer, plots."""

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from benchmarks.common import conditions, pipes, save
from benchmarks.measure import CONTENDERS
from faithkd import figures

ROUNDING = 1e-12  # of evaluating EmpLB itself in float64
CASE = ["student", "eps", "method", "budget"]
BOTTOM = -12.0  # % of the gap: what lies below is drawn at the edge; the table has its number
LEGEND = (
    "Mean bound, and the share of the gap between CROWN per network and EmpLB that it closes (rows on fewer images: "
    "only that, on those); seconds an image on one thread (`best`: all cores) and MB of peak memory above that of the "
    "imports, each the median over ε."
)


def write(out: Path, profile: str) -> None:
    """Everything that follows from values-<profile>.csv, to the same folder; prints the ratios."""
    facts = json.loads((out / f"bounds-{profile}.json").read_text(encoding="utf-8"))
    values = pd.read_csv(out / f"values-{profile}.csv", dtype={"eps": str, "note": str}).fillna({"note": ""})
    table, beside = summary(values), ratios(values)
    save(out, f"bounds-{profile}", table, markdown(table, facts))
    save(out, f"ratios-{profile}", beside, ratios_markdown(beside, facts))
    figures.style()
    save_plot(out / f"frontier-{profile}", frontier(values, facts["few"]))
    print((out / f"ratios-{profile}.md").read_text(encoding="utf-8"))
    print(f"{table['violations'].sum()} bounds below EmpLB; results: {out}")


def say(case: str, name: str, found: dict) -> None:
    """One line of progress."""
    told = found["note"] or f"mean {found['bound'].mean():.4f}, {found['seconds']:.4f} s an image"
    print(f"{case:<11} {name:<28} {told}", flush=True)


def label(name: str, budget: float | None) -> str:
    """A contender with its budget, as `best at 1 s`."""
    return name if budget is None or math.isnan(budget) else f"{name} at {budget:g} s"


def summary(values: pd.DataFrame) -> pd.DataFrame:
    """One row per student, eps, contender and budget: means over its images, share of the gap closed, cost.

    The gap is CROWN per network minus EmpLB, both meant over the same images. `violations` counts bounds below EmpLB.
    """
    values = values.assign(violations=values["bound"] < values["EmpLB"] - ROUNDING)
    groups = values.groupby(CASE, sort=False, dropna=False)
    table = groups[["EmpLB", "crown", "bound", "seconds", "megabytes"]].mean()
    table["images"], table["violations"], table["note"] = (
        groups.size(),
        groups["violations"].sum(),
        groups["note"].first(),
    )
    gap = table["crown"] - table["EmpLB"]
    table["share"] = ((table["crown"] - table["bound"]) / gap).where(gap > 0)
    order = list(CONTENDERS)
    return table.reset_index().sort_values("method", key=lambda names: names.map(order.index), kind="stable")


def markdown(table: pd.DataFrame, facts: dict) -> str:
    """The tables of the README: a row per contender, a column per eps, one table per student.

    Of the budgets only one second and the largest: all are in the CSV file and in the plot.
    """
    table = table[table["budget"].isna() | table["budget"].isin([1.0, table["budget"].max()])]
    blocks = []
    for student, part in table.groupby("student", sort=False):
        lowest, most = part[part["method"] == "crown"].set_index("eps")["EmpLB"], part["images"].max()
        lines = [{"": "*EmpLB, lower bound*"} | {f"ε = {eps}": f"{value:.4f}" for eps, value in lowest.items()}]
        for (method, budget), rows in part.groupby(["method", "budget"], sort=False, dropna=False):
            few = rows["images"].max() < most
            name = f"{CONTENDERS[method].what}: `{label(method, budget)}`"
            name += f" ({rows['images'].max()} of the images)" if few else ""
            cost = {"s/image": f"{rows['seconds'].median():.2g}", "MB": f"{rows['megabytes'].median():.0f}"}
            lines.append({"": name} | {f"ε = {row.eps}": cell(row, few) for row in rows.itertuples()} | cost)
        blocks.append(f"Student {student}, {most} images, {conditions(facts)}.\n\n{pipes(pd.DataFrame(lines))}")
    notes = dict.fromkeys(f"`{row.method}`: {row.note}." for row in table.itertuples() if row.note)
    return "\n\n".join([*blocks, "\n".join([LEGEND, *notes])])


def cell(row, few: bool) -> str:
    """Bound (not of few images: their mean is another) and share of the gap, or why there is none.

    A violated bound is shouted.
    """
    if math.isnan(row.bound):
        return row.note.partition(":")[0]
    shout = f" **{row.violations} below EmpLB**" if row.violations else ""
    mean = "" if few else f"{row.bound:.4f} · "
    share = "" if math.isnan(row.share) else f"{round(100 * row.share)} %"
    return f"{mean}{share}{shout}"


def ratios(values: pd.DataFrame) -> pd.DataFrame:
    """Each of ours beside each peer, on the images that both have: how many times faster, by what share looser."""
    known = values[values["bound"].notna()]
    peers = known["method"].isin([name for name, contender in CONTENDERS.items() if contender.package])
    both = known[~peers].merge(known[peers], on=["student", "eps", "image"], suffixes=("", "_peer"))
    means = both.groupby([*CASE, "method_peer"], sort=False, dropna=False).mean(numeric_only=True).reset_index()
    means["faster"] = means["seconds_peer"] / means["seconds"]
    means["looser"] = means["bound"] / means["bound_peer"] - 1
    return means[[*CASE, "method_peer", "faster", "looser"]].rename(columns={"method_peer": "peer"})


def ratios_markdown(beside: pd.DataFrame, facts: dict) -> str:
    """A row for each of ours that takes no budget and each peer, a column per eps."""
    lines = []
    for names, rows in beside[beside["budget"].isna()].groupby(["student", "method", "peer"], sort=False):
        cells = {f"ε = {row.eps}": f"{row.faster:.3g}× · {100 * row.looser:+.2f} %" for row in rows.itertuples()}
        lines.append(dict(zip(["student", "ours", "peer"], names, strict=True)) | cells)
    told = f"How many times faster than the peer, and by how much the mean bound is looser; {conditions(facts)}."
    return f"{told}\n\n{pipes(pd.DataFrame(lines), left=3)}" if lines else f"No peer took part; {conditions(facts)}."


def frontier(values: pd.DataFrame, few: int) -> sns.FacetGrid:
    """Share of the gap closed over seconds an image, a panel per eps, the first student; anytime methods as lines.

    All on the same images, the first `few`, so that a line does not mix easy images with hard ones.
    """
    values = values[values["student"] == values["student"].iloc[0]]
    table = summary(values[values["image"].isin(values["image"].drop_duplicates().iloc[:few])])
    table["closed"] = (100 * table["share"]).clip(lower=BOTTOM)
    table["contender"] = table["method"].map(lambda name: CONTENDERS[name].what)
    look = {"hue": "contender", "style": "contender", "markers": True, "dashes": False, "estimator": None}
    size = {"col": "eps", "col_wrap": 3, "height": 2.9, "aspect": figures.WIDTH / 3 / 2.9}
    with plt.rc_context({"figure.constrained_layout.use": False}):  # seaborn lays its panels out itself
        grid = sns.relplot(table[table["bound"].notna()], x="seconds", y="closed", kind="line", **look, **size)
    sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0), ncols=3, title="")
    grid.set(xscale="log", ylim=(BOTTOM - 3, 103), yticks=range(0, 101, 20))
    return grid.set_titles("ε = {col_name}").set_axis_labels("seconds an image", "gap closed (%)")


def save_plot(path: Path, grid: sns.FacetGrid) -> None:
    """PDF and PNG without dates."""
    grid.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None, "ModDate": None})
    grid.savefig(path.with_suffix(".png"), metadata={"Software": None})
