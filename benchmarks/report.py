"""From measured values to what people read: summary, table for the README, aims, plot."""

import json
import math
from pathlib import Path

import pandas as pd
import seaborn as sns

from benchmarks.common import conditions, pipes, save
from benchmarks.contenders import CONTENDERS

ROUNDING = 1e-12  # of evaluating EmpLB itself in float64
CASE = ["student", "method", "budget"]
MEANS = ["EmpLB", "crown", "bound", "seconds", "cpu_seconds"]
BOTTOM = -12.0  # % of the gap
FASTER = {  # (ours, peer): times as fast at least, looser at most
    ("crown", "paper-lp"): (100, 0.05),
    ("alpha-crown", "paper-lp"): (5, 0.0),
    ("alpha-crown", "lirpa-optimised"): (5, 0.0),
}
LEGEND = (
    "Mean bound, and the share of the gap between CROWN per network and EmpLB that it closes, both over as many images "
    "as the row says; seconds an image on one thread (`best`: all cores)"
)
AIMED = "How many times faster than the peer, and by how much the mean bound is looser; **bold** misses our aim"


def write(out: Path, profile: str) -> None:
    """Everything that follows from values-<profile>.csv, to the same folder; prints the aims."""
    facts = json.loads((out / f"bounds-{profile}.json").read_text(encoding="utf-8"))
    values = pd.read_csv(out / f"values-{profile}.csv", dtype={"eps": str, "note": str}).fillna({"note": ""})
    values = values.query("method in @CONTENDERS")  # older measurements may hold more
    table = summary(values)
    told = aims(values, table, facts)
    save(out / f"bounds-{profile}.csv", table.round(6))
    save(out / f"bounds-{profile}.md", markdown(table, facts))
    save(out / f"aims-{profile}.md", told)
    sns.set_theme(style="ticks", font_scale=0.85)
    same = values["image"].drop_duplicates().iloc[: facts["frontier_images"]]  # a line mixes no easy images with hard
    grid = frontier(summary(values[values["image"].isin(same)]))
    grid.savefig(out / f"frontier-{profile}.pdf", metadata={"CreationDate": None, "ModDate": None})
    grid.savefig(out / f"frontier-{profile}.png", metadata={"Software": None})
    print(f"{told}\nresults: {out}")


def label(name: str, budget: float | None) -> str:
    """A contender with its budget, as `best at 1 s`."""
    return name if budget is None or math.isnan(budget) else f"{name} at {budget:g} s"


def summary(values: pd.DataFrame) -> pd.DataFrame:
    """One row per student, eps, contender and budget: means over its images, share of the gap closed, cost.

    The gap is CROWN per network minus EmpLB, both meant over the same images. `violations` counts bounds below EmpLB.
    """
    values = values.assign(violations=values["bound"] < values["EmpLB"] - ROUNDING)
    groups = values.groupby([*CASE, "eps"], sort=False, dropna=False)
    table = groups[MEANS].mean().assign(images=groups.size(), violations=groups["violations"].sum())
    gap = table["crown"] - table["EmpLB"]
    table["share"] = ((table["crown"] - table["bound"]) / gap).where(gap > 0)
    table["note"] = groups["note"].first()
    order = list(CONTENDERS)
    return table.reset_index().sort_values("method", key=lambda names: names.map(order.index), kind="stable")


def markdown(table: pd.DataFrame, facts: dict) -> str:
    """A row per student and contender, a column per eps; of the budgets one second and the largest (CSV has all)."""
    table = table[table["budget"].isna() | table["budget"].isin([1.0, table["budget"].max()])]
    lines = []
    for (student, method, budget), rows in table.groupby(CASE, sort=False, dropna=False):
        who = {"student": student, "bound": f"{CONTENDERS[method].what}: `{label(method, budget)}`"}
        cost = {
            "images": str(rows["images"].max()),
            "s/image": f"{rows['seconds'].min():.2g}–{rows['seconds'].max():.2g}",
        }
        if method == "crown":
            lowest = {f"ε = {row.eps}": f"{row.EmpLB:.4f}" for row in rows.itertuples()}
            lines.append({"student": student, "bound": "*EmpLB, lower bound*"} | lowest)
        lines.append(who | {f"ε = {row.eps}": cell(row) for row in rows.itertuples()} | cost)
    notes = dict.fromkeys(f"`{row.method}`: {row.note}." for row in table.itertuples() if row.note)
    return "\n\n".join([f"{LEGEND}; {conditions(facts)}.", pipes(lines, left=2), *notes])


def cell(row) -> str:
    """Bound and share of the gap. A violated bound is shouted."""
    if math.isnan(row.bound):
        return "failed"
    shout = f" **{row.violations} below EmpLB**" if row.violations else ""
    return f"{row.bound:.4f} · {row.share:.0%}{shout}"


def aims(values: pd.DataFrame, table: pd.DataFrame, facts: dict) -> str:
    """Ours beside the peers on the images that both have, a row per aim and a column per eps; what is missed, bold."""
    known = values[values["bound"].notna()]
    both = known.merge(known, on=["student", "eps", "image"], suffixes=("", "_peer"))
    means = both.groupby(["student", "method", "method_peer", "eps"], sort=False).mean(numeric_only=True)
    means["faster"] = means["seconds_peer"] / means["seconds"]
    means["looser"] = means["bound"] / means["bound_peer"] - 1
    lines = []
    for (name, peer), (times, room) in FASTER.items():
        line = {"ours": f"`{name}`", "beside": f"`{peer}`", "aim": f"{times}×, at most {room:+.0%}"}
        for row in means.query("method == @name and method_peer == @peer").reset_index().itertuples():
            told = f"{row.faster:.3g}×, {row.looser:+.2%}"
            line[f"ε = {row.eps}"] = told if row.faster >= times and row.looser <= room else f"**{told}**"
        lines.append(line)
    below = f"{table['violations'].sum()} bounds lie below EmpLB; the aim is none."
    return f"{AIMED}; {conditions(facts)}. {below}\n\n{pipes(lines, left=3)}"


def frontier(table: pd.DataFrame) -> sns.FacetGrid:
    """Share of the gap closed over seconds an image, a panel per eps; what lies below is drawn at the edge."""
    table = table[table["bound"].notna()].assign(closed=(100 * table["share"]).clip(lower=BOTTOM))
    table["contender"] = table["method"].map(lambda name: CONTENDERS[name].what)
    look = {"hue": "contender", "style": "contender", "markers": True, "dashes": False, "estimator": None}
    look |= {"palette": "husl", "markersize": 8}  # no grey, which reads as an axis
    grid = sns.relplot(table, x="seconds", y="closed", col="eps", col_wrap=3, height=3, kind="line", **look)
    sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0), ncols=3, title="")
    grid.set(xscale="log", ylim=(BOTTOM - 3, 103))
    return grid.set_titles("ε = {col_name}").set_axis_labels("seconds an image", "gap closed (%)")
