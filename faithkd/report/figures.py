"""One look for every figure and table, and one place they go: figures/<profile>/ as PDF, PNG and CSV."""

import io
import json
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from faithkd.core import data
from faithkd.errors import FaithkdError
from faithkd.report import ledger, tables
from faithkd.report.decide import MARGIN
from faithkd.report.paper import STUDENTS

if TYPE_CHECKING:
    from faithkd.reproduce.params import Params

# One colour and one marker per network, everywhere (Okabe and Ito's palette, safe for colour-blind readers).
COLOURS = {"RT": "#4d4d4d", "SD": "#E69F00", "ARD": "#56B4E9", "RSLAD": "#009E73", "FD": "#CC3377"}
MARKERS = {"RT": "o", "SD": "s", "ARD": "^", "RSLAD": "D", "FD": "P"}
LOWER, UPPER = "#3B6FB6", "#D1602E"  # EmpLB and FaithUB
# Processors round differently, and then a step of PGD may turn: one image's EmpLB moves by up to 7e-4, means far less.
# One image of a thousand that counts otherwise changes a share by 0.1 %: that is more, and is written.
ROUNDING = {"rtol": 5e-4, "atol": 1e-3}
WIDTH = 9.0  # inches: a notebook's column and a page alike


def style() -> None:
    """Set the look of all figures; notebooks call it once."""
    sns.set_theme(context="notebook", style="ticks", font_scale=0.85)
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 160,
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "pdf.fonttype": 42,
            "figure.constrained_layout.use": True,
        }
    )


def parameters(p: "Params", *names: str):
    """The parameters whose dotted names start with one of `names`, each with the paper's section or a reason."""
    table = pd.DataFrame(p.described(), columns=["name", "value", "reason"])
    chosen = table[table["name"].str.startswith(names)] if names else table
    left = [{"selector": "td, th", "props": "text-align: left; padding: 0.2em 0.8em"}]
    return chosen.style.hide(axis="index").set_table_styles(left)


def save(p: "Params", name: str, figure: Figure, frame: pd.DataFrame) -> None:
    """Write a figure as `<name>.pdf` and `.png` with its data as `<name>.csv` to figures/<profile>/.

    Where the files are there and hold the same numbers, up to the rounding in which processors differ, they are left
    alone. They hold no dates. Raises FaithkdError when the folder cannot be written to.
    """
    files = {kind: p.figures_dir / f"{name}.{kind}" for kind in ("pdf", "png", "csv")}
    fresh = not all(file.is_file() for file in files.values()) or not same(frame, files["csv"])
    try:
        if fresh:
            p.figures_dir.mkdir(parents=True, exist_ok=True)
            # savefig gives a figure without a layout engine the default one for its next drawing: so none is default.
            with plt.rc_context({"figure.constrained_layout.use": figure.get_layout_engine() is not None}):
                figure.savefig(files["pdf"], metadata={"CreationDate": None, "ModDate": None})
                figure.savefig(files["png"], metadata={"Software": None})
            frame.to_csv(files["csv"], index=False, lineterminator="\n")
    except OSError as error:
        raise FaithkdError(
            f"cannot write {name} to {p.figures_dir}: {error.strerror or error}; give permission there"
        ) from None
    if log := os.environ.get("FAITHKD_OUTPUTS"):  # the runner sees later whether they are still there
        with open(log, "a", encoding="utf-8") as notes:
            notes.writelines(json.dumps({"path": str(file), "written": fresh}) + "\n" for file in files.values())


def same(frame: pd.DataFrame, file: Path) -> bool:
    """Whether a CSV file holds the frame's values: text as it stands, numbers up to ROUNDING."""
    new = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    try:
        old = pd.read_csv(file)
        pd.testing.assert_frame_equal(new, old, check_dtype=False, **ROUNDING)
    except (AssertionError, ValueError):  # ValueError: it is no table
        return False
    return True


def save_table(p: "Params", name: str, table: pd.DataFrame, caption: str):
    """Save a table of the paper (CSV, and a picture of it as PDF and PNG) and return it styled for the notebook.

    `name` is one that `tables.layout` knows, such as table1 or proved. Our value
    stands first, the paper's in brackets where it has one; the best student of a row is bold.
    """
    cells, best = tables.layout(table, name)
    figure = _picture(cells, best, caption)
    save(p, name, figure, table)
    plt.close(figure)
    return _styled(cells, best, caption)


_TABLE = [
    {"selector": "caption", "props": "caption-side: top; text-align: left; font-size: 1em; padding: 0.4em 0"},
    {"selector": "td, th", "props": "text-align: right; padding: 0.25em 0.5em; white-space: nowrap"},
    {"selector": "th.row_heading", "props": "text-align: left; white-space: pre"},
    {"selector": "th.col_heading.level0", "props": "text-align: center; border-bottom: 1px solid #999"},
]


def _styled(cells: pd.DataFrame, best: pd.DataFrame, caption: str):
    """The table as HTML: the best in <b>, the paper's values small and grey."""

    def html(text: str, is_best: bool) -> str:
        ours, bracket, theirs = text.partition("[")
        ours = ours.rstrip().join(("<b>", "</b>") if is_best else ("", ""))
        line = "<br>" if "\n" in text else " "
        return ours + (f'{line}<small style="color: gray">[{theirs}</small>' if bracket else "")

    marked = pd.DataFrame(
        {column: [html(*pair) for pair in zip(cells[column], best[column], strict=True)] for column in cells},
        index=cells.index.rename(None),
    )
    # the rows' name stands beside the columns' names: an own line for it would waste one
    marked.columns = cells.columns.set_names([None, cells.index.name])
    return marked.style.set_caption(caption).set_table_styles(_TABLE)


def _picture(cells: pd.DataFrame, best: pd.DataFrame, caption: str) -> Figure:
    """The table as a figure of text, at most WIDTH inches wide: groups, column names, a rule, rows; best cells bold."""
    labels = [str(label) for label in cells.index]
    widths = [max(map(len, [*labels, cells.index.name])) + 1]
    widths += [
        max(len(line) for text in (column[1], *cells[column]) for line in text.split("\n")) + 3 for column in cells
    ]
    edges = np.cumsum(widths)
    heights = [1.15 * max(text.count("\n") + 1 for text in row) for row in cells.to_numpy()]
    tops = 2.75 + np.cumsum([0, *heights])
    scale = min(1.0, WIDTH / (0.078 * edges[-1] + 0.2))  # 0.078 inches: a digit at 8.5 points, with air
    size = 8.5 * scale
    shape = (scale * (0.078 * edges[-1] + 0.2), scale * 0.2 * (tops[-1] + 1.2))
    figure = plt.figure(figsize=shape, layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, edges[-1] + 1), ylim=(tops[-1], -1.2))
    axes.axis("off")

    def write(x: float, y: float, text: str, ha: str, **look) -> None:
        axes.text(x, y, text, ha=ha, va="center", fontsize=size, **look)

    write(0.5, -0.6, caption, "left", style="italic")
    groups = cells.columns.get_level_values(0)
    for group in dict.fromkeys(groups):
        places = np.flatnonzero(groups == group)
        start, end = edges[places[0]] + 2, edges[places[-1] + 1]
        write((start + end) / 2, 0.6, group, "center")
        axes.plot([start, end], [1.15, 1.15], color="0.6", lw=0.8)
    write(0.5, 1.7, cells.index.name, "left")
    axes.plot([0, edges[-1] + 1], [2.3, 2.3], color="0.2", lw=1)
    for y, label in zip(tops, labels, strict=False):
        write(0.5, y + 0.3, label, "left")
    for edge, column in zip(edges[1:], cells, strict=True):
        write(edge, 1.7, column[1], "right")
        for y, text, is_best in zip(tops, cells[column], best[column], strict=False):
            for row, line in enumerate(text.split("\n")):
                look = {"weight": "bold"} if is_best and not row else {"color": "0.4"} if row else {}
                write(edge, y + 0.3 + row, line, "right", **look)
    return figure


def images(p: "Params", x, titles: list[str], columns: int = 8) -> Figure:
    """Images `x` (N, channels, height, width) in pixels, with a title each."""
    pixels = data.to_pixels(p, x)
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH * columns / 8, 1.45 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, picture, title in zip(grid.flat, pixels, titles, strict=False):
        _image(axes, picture)
        axes.set_title(title, fontsize=7.5)
    return figure


def _image(axes, picture: np.ndarray) -> None:
    axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def curves(histories: dict[str, pd.DataFrame]) -> Figure:
    """Training curves: loss, and held-out accuracy (solid) with robust accuracy (dashed), one colour per network."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3))
    for name, history in histories.items():
        left.plot(history["epoch"], history["loss"], color=COLOURS[name], label=name)
        for column, line, label in (("accuracy", "-", "clean"), ("robust_accuracy", "--", "under PGD")):
            look = {"color": COLOURS[name], "ls": line, "label": f"{name}, {label}"}
            right.plot(history["epoch"], 100 * history[column], **look)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="held-out accuracy (%)", ylim=(0, 102))
    left.legend()
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def heat_map(p: "Params", frame: pd.DataFrame, details: dict, confidences: pd.DataFrame) -> Figure:
    """Fig. 1: the difference in confidence of SD and of FD from the teacher around an image, and what is at x₁, x₂.

    `frame` and `details` come from `experiment.heat_map`; `confidences` has a row per (point, network, class). Where a
    student predicts another class than the teacher, its map is hatched.
    """
    figure = plt.figure(figsize=(WIDTH, 6.9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 1))
    maps = top.subplots(1, 2, sharex=True, sharey=True)
    side = int(np.sqrt(len(frame) // 2))
    highest = max(0.1, np.ceil(frame["difference"].max() * 10) / 10)
    for axes, (method, part) in zip(maps, frame.groupby("panel", sort=False), strict=True):
        grid = {name: part[name].to_numpy().reshape(side, side) for name in ("a", "b", "difference", "margin")}
        a, b = grid["a"], grid["b"]
        look = {"cmap": "rocket_r", "vmin": 0, "vmax": highest, "shading": "gouraud", "rasterized": True}
        mesh = axes.pcolormesh(a, b, grid["difference"], **look)
        levels = np.arange(0.1, highest, 0.1)
        axes.contour(a, b, grid["difference"], levels=levels, colors="black", alpha=0.25, linewidths=0.6)
        if part["disagree"].any():
            axes.contourf(a, b, grid["margin"], levels=[-1, 0], colors="none", hatches=["////"])
            axes.contour(a, b, grid["margin"], levels=[0], colors="black", linewidths=1.4)
        _mark_points(p, axes, details, confidences[confidences["network"] == method])
        mean, worst = part["difference"].agg(["mean", "max"])
        share = 100 * part["disagree"].mean()
        axes.set_title(f"student {method}", color=COLOURS[method], fontweight="bold", loc="left")
        axes.set_title(f"mean {mean:.2f}, max {worst:.2f}, other class {share:.0f} %", fontsize=9, loc="right")
        axes.set(aspect="equal", xlabel="pixels in which $x_1$ and $x_2$ differ")
        axes.set_xticks([-1, 0, 1], ["−ε", "0", "ε"])
        axes.set_yticks([-1, 0, 1], ["−ε", "0", "ε"])
        axes.spines[:].set_visible(True)
    maps[0].set_ylabel("pixels in which they are the same")
    label = r"difference in confidence  $\|f_{RT} - f_s\|_\infty$"
    top.colorbar(mesh, ax=maps, label=label, shrink=0.8, pad=0.02)
    _confidence_bars(p, bottom, details, confidences)
    return figure


_POINTS = {"x": "$x$", "x1": "$x_1$", "x2": "$x_2$"}


def _mark_points(p: "Params", axes, details: dict, confidences: pd.DataFrame) -> None:
    """On a map of fig. 1: x, x₁ and x₂, each with the class that the student predicts there."""
    classes = data.CLASSES[p.data.name]
    for name, (u, v) in details["where"].items():
        part = confidences[confidences["point"] == name]
        says = classes[part["class"].to_numpy()[part["confidence"].argmax()]]
        axes.plot(u, v, "o", ms=7, mfc="white", mec="black", mew=1.2, clip_on=False, zorder=5)
        axes.annotate(
            f"{_POINTS[name]}: {says}", (u, v), xytext=(-10 if u > 0.5 else 10, -15), textcoords="offset points",
            ha="right" if u > 0.5 else "left", va="center", fontsize=10,
            bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.85},
        )  # fmt: skip


def _confidence_bars(p: "Params", panel, details: dict, confidences: pd.DataFrame) -> None:
    """Under fig. 1: the images x, x₁, x₂, each beside the confidences of teacher, SD and FD; numbers at the highest."""
    grid = panel.subplots(1, 6, width_ratios=(1, 1.3) * 3)
    classes = data.CLASSES[p.data.name]
    networks = {"RT": "teacher RT", "SD": "student SD", "FD": "student FD"}
    table = confidences.set_index(["point", "network", "class"])["confidence"].sort_index().unstack("class")
    likely = table.max()[table.max() > 0.05].nlargest(4).index
    shown = sorted({*likely, *table.idxmax(axis=1)})
    for picture, bars, (name, label) in zip(grid[::2], grid[1::2], _POINTS.items(), strict=True):
        _image(picture, data.to_pixels(p, details[name])[0])
        picture.axis("off")
        picture.set_title(label, fontsize=12)
        for shift, (network, title) in zip((-0.27, 0, 0.27), networks.items(), strict=True):
            values = table.loc[name, network][shown]
            bars.barh(np.arange(len(shown)) + shift, values, 0.25, color=COLOURS[network], label=title)
            place = shown.index(values.idxmax()) + shift
            bars.text(values.max() + 0.02, place, f"{values.max():.2f}", va="center", fontsize=7, weight="bold")
        bars.set_yticks(range(len(shown)), [classes[c] for c in shown])
        bars.set(xlim=(0, 1.2), xticks=[0, 0.5, 1], xlabel="confidence", ylim=(len(shown) - 0.5, -0.5))
    handles, titles = grid[1].get_legend_handles_labels()
    panel.legend(handles, titles, loc="outside upper center", ncols=3, fontsize="small")


def histograms(faithfulness: pd.DataFrame) -> Figure:
    """Figs 2–3: distribution of EmpLB and FaithUB over the test images, by student (rows) and ε (columns)."""
    radii = list(dict.fromkeys(faithfulness["eps"]))
    methods = [m for m in STUDENTS if m in set(faithfulness["method"])]
    size = (WIDTH, 1.45 * len(methods) + 0.8)
    figure, grid = plt.subplots(len(methods), len(radii), figsize=size, sharex=True, sharey=True, squeeze=False)
    bins, count = np.linspace(0, 1, 26), faithfulness["image"].nunique()
    for row, method in zip(grid, methods, strict=True):
        for axes, eps in zip(row, radii, strict=True):
            part = faithfulness[(faithfulness["method"] == method) & (faithfulness["eps"] == eps)]
            for bound, colour in (("EmpLB", LOWER), ("FaithUB", UPPER)):
                weights = np.full(len(part), 100 / count)
                axes.hist(part[bound], bins, weights=weights, color=colour, alpha=0.45, label=bound)
                axes.hist(part[bound], bins, weights=weights, color=colour, histtype="step", lw=1)
                axes.axvline(part[bound].mean(), color=colour, ls=":", lw=1.5)
        row[0].set_ylabel(f"{method}\nimages (%)")
    for axes, eps in zip(grid[0], radii, strict=True):
        axes.set_title(f"ε = {eps}")
    for axes in grid[-1]:
        axes.set(xlabel="bound on δ*", xlim=(0, 1))
        axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    grid[0, 0].legend(fontsize="x-small", loc="upper right")
    return figure


def by_eps(table: pd.DataFrame, by: str = "method") -> Figure:
    """Table 2 (or 5) as a picture: mean EmpLB and FaithUB against ε, a line per student (or α)."""
    figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharex=True)
    radii = list(dict.fromkeys(table["eps"]))
    shades = sns.color_palette("flare", table[by].nunique())
    for axes, bound in zip(grid, tables.BOUNDS, strict=True):
        for shade, (name, part) in zip(shades, table[table["bound"] == bound].groupby(by, sort=False), strict=True):
            colour, marker = (COLOURS[name], MARKERS[name]) if by == "method" else (shade, "o")
            label = str(name) if by == "method" else f"α = {name:g}"
            error = 1.96 * part["std"] / np.sqrt(part["images"])
            axes.errorbar(range(len(part)), part["mean"], error, color=colour, marker=marker, label=label, capsize=2)
        axes.set(title=f"mean {bound}", xlabel="ε", ylim=(0, None))
        axes.set_xticks(range(len(radii)), radii)
    grid[0].legend(fontsize="small")
    return figure


def subsets(whole: pd.DataFrame, parts: pd.DataFrame) -> Figure:
    """How far the means of Table 2 depend on which images are drawn: all of them, and each of its parts.

    `whole`: `tables.table2`, drawn with its 95 % interval; `parts`: `tables.means_of_parts`, a dot each. The paper's
    value, where it has one, is a dash.
    """
    theirs = tables.beside_paper(whole, "table2")
    radii, methods = list(dict.fromkeys(whole["eps"])), list(dict.fromkeys(whole["method"]))
    figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharex=True)
    for axes, bound in zip(grid, tables.BOUNDS, strict=True):
        for shift, method in zip(_spread(len(methods)), methods, strict=True):
            mine, dots = (t[(t["bound"] == bound) & (t["method"] == method)] for t in (theirs, parts))
            places = np.arange(len(radii)) + shift
            beside = dots["eps"].map(radii.index) + shift + 0.08
            axes.plot(beside, dots["mean"], ".", color=COLOURS[method], ms=4, alpha=0.5)
            error, look = 1.96 * mine["std"] / np.sqrt(mine["images"]), {"color": COLOURS[method], "capsize": 2}
            axes.errorbar(places, mine["mean"], error, fmt=MARKERS[method], ms=5, label=method, **look)
            axes.plot(places, mine["mean_paper"], "_", color="black", ms=8, mew=1.6, zorder=4)
        axes.set(title=f"mean {bound}", xlabel="ε", ylim=(0, None))
        axes.set_xticks(range(len(radii)), radii)
    grid[0].legend(fontsize="small", loc="upper left")
    return figure


def brackets(part: pd.DataFrame, title: str) -> Figure:
    """The bracket EmpLB ≤ δ* ≤ FaithUB of each image as a vertical bar, images sorted by EmpLB.

    With the columns BestLB and BestUB (`experiment.best`) theirs is the bar, and the paper's stands lighter behind it.
    """
    part = part.sort_values(["EmpLB", "FaithUB"], ignore_index=True)
    ends = [("EmpLB", "FaithUB", "found", "certified")]
    if "BestUB" in part:
        ends.append(("BestLB", "BestUB", "found by PGD and branching", "certified by branch and bound"))
    figure, axes = plt.subplots(figsize=(WIDTH, 2.8))
    size = 4 if len(part) > 60 else 6
    for place, (low, high, found, certified) in enumerate(ends):
        front = place == len(ends) - 1
        look = {"alpha": 1.0 if front else 0.35, "ms": size, "zorder": 2 + place}
        axes.vlines(part.index, part[low], part[high], color="0.7" if front else "0.9", lw=size / 3, zorder=1 + place)
        axes.plot(part.index, part[high], ".", color=UPPER, label=f"{high} ({certified})", **look)
        axes.plot(part.index, part[low], ".", color=LOWER, label=f"{low} ({found})", **look)
    axes.set(xlabel="test images, sorted by EmpLB", ylabel="δ* lies in the bar", ylim=(0, 1.02), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, fontsize="small")
    return figure


def best_by_eps(table: pd.DataFrame) -> Figure:
    """`tables.best` as a picture: per student and ε our mean bracket, in front of the paper's."""
    radii, methods = list(dict.fromkeys(table["eps"])), list(dict.fromkeys(table["method"]))
    figure, grid = plt.subplots(1, len(methods), figsize=(WIDTH, 3.1), sharey=True, squeeze=False)
    for axes, method in zip(grid[0], methods, strict=True):
        part, places = table[table["method"] == method], range(len(radii))
        axes.vlines(places, part["EmpLB"], part["FaithUB"], color="0.88", lw=11, label="EmpLB to FaithUB")
        axes.vlines(places, part["BestLB"], part["BestUB"], color=COLOURS[method], lw=5, label="BestLB to BestUB")
        axes.plot(places, part["BestUB"], "_", color=UPPER, ms=11, mew=2, label="BestUB")
        axes.plot(places, part["BestLB"], "_", color=LOWER, ms=11, mew=2, label="BestLB")
        axes.set(title=method, xlabel="ε", ylim=(0, 1.02), xlim=(-0.6, len(radii) - 0.4))
        axes.set_xticks(places, radii, rotation=90 if max(map(len, radii)) > 4 else 0)
    grid[0, 0].set_ylabel("mean δ* lies in the bar")
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    return figure


def agreement_intervals(table: pd.DataFrame) -> Figure:
    """`tables.agreement_intervals` as a picture: per ε and student a bar from the certified to the empirical value."""
    radii, methods = list(dict.fromkeys(table["eps"])), list(dict.fromkeys(table["method"]))
    figure, axes = plt.subplots(figsize=(WIDTH, 2.9))
    for shift, method in zip(np.linspace(-0.3, 0.3, len(methods)), methods, strict=True):
        part, places = table[table["method"] == method], np.arange(len(radii)) + shift
        axes.vlines(places, part["certified"], part["empirical"], color=COLOURS[method], lw=5, alpha=0.45)
        look = {"color": COLOURS[method], "marker": MARKERS[method], "ls": "", "ms": 6}
        axes.plot(places, part["certified"], label=method, **look)
        axes.plot(places, part["empirical"], mfc="white", **look)
    axes.set(xlabel="ε", ylabel="agreement with the teacher (%)", ylim=(-3, 103))
    axes.set_xticks(range(len(radii)), radii)
    axes.legend(title="certified (empirical: open)", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def beside_paper(cells: pd.DataFrame) -> Figure:
    """`ledger.cells` as a picture: a panel for each measure of Tables 1, 2 and 5, at each ε the methods side by side.

    Ours is a dot with the 95 % prediction interval for one more run, the paper's a dash, red where it lies outside.
    """
    shown = cells[cells["table"].isin(["table1", "table2", "table5"]) & ~cells["measure"].str.startswith("std")]
    panels = list(shown.groupby(["table", "measure"], sort=False))
    rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(WIDTH, 2.8 * rows + 0.4), squeeze=False)
    for axes, ((table, measure), part) in zip(grid.flat, panels, strict=False):
        _beside_paper(axes, part.reset_index(drop=True), table == "table5")
        percent = (part["unit"] == "%").all()
        axes.set_title(f"Table {table[-1]}: {measure}" + (" (%)" if percent else ""))
    found = [axes.get_legend_handles_labels() for axes in grid.flat]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True) if label != "paper"}
    handles["paper"] = found[0][0][-1]
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), fontsize="small")
    return figure


def _beside_paper(axes, part: pd.DataFrame, by_alpha: bool) -> None:
    radii, methods = list(dict.fromkeys(part["eps"])), list(dict.fromkeys(part["method"]))
    methods = sorted(methods) if by_alpha else methods
    shades = dict(zip(methods, sns.color_palette("flare", len(methods)), strict=True)) if by_alpha else COLOURS
    places = part["eps"].map(radii.index) + part["method"].map(dict(zip(methods, _spread(len(methods)), strict=True)))
    for method in methods:
        at = part["method"] == method
        look = {"color": shades[method], "marker": MARKERS.get(method, "o"), "ms": 5, "ls": ""}
        axes.vlines(places[at], part["least"][at], part["most"][at], color=shades[method], lw=4, alpha=0.3)
        axes.plot(places[at], part["ours"][at], label=method, **look)
    outside = part["verdict"].isin(["above", "below"])
    for at, colour, label in ((outside, "red", None), (~outside, "black", "paper")):
        axes.plot(places[at], part["paper"][at], "_", ms=9, mew=1.6, color=colour, label=label, zorder=4)
    low, high = part[["paper", "ours"]].min(axis=None), part[["paper", "ours"]].max(axis=None)
    edge = 0.12 * (high - low)  # a wide interval may leave the panel: the values stay readable
    axes.set(xlabel="ε", ylim=(low - edge, high + edge))
    axes.set_xticks(range(len(radii)), radii)


def _spread(count: int) -> np.ndarray:
    return np.linspace(-0.3, 0.3, count)


VERDICT_COLOURS = {"holds": "#009E73", "no difference": LOWER, "the opposite": UPPER, "undecided": "0.55"}


def forest(judged: pd.DataFrame, title: str) -> Figure:
    """`ledger.claims` as a forest plot: a block per claim, with a line per ε coloured by its verdict.

    Thin: from the lowest to the highest seed; thick: the 95 % interval of the mean, where there are seeds enough.
    Margins are in units of d, on a symmetric logarithmic axis that is linear within ±d.
    """
    blocks, lines, y = [], [], 0.0
    for row in ledger.overview(judged).to_dict("records"):
        texts = [
            textwrap.fill(f"{row['claim']}  {row['text']}", 30),
            textwrap.fill(f"{row['mark']} {row['words']}", 46),
        ]
        part = judged[judged["claim"] == row["claim"]]
        lines += [(y + place, radius) for place, radius in enumerate(part.to_dict("records"))]
        height = max(len(part), *(1.1 * text.count("\n") + 1 for text in texts))
        blocks.append((y, *texts))
        y += height + 0.9
    size = (WIDTH, 0.17 * y + 1.15)
    figure = plt.figure(figsize=size, layout="none")
    axes = figure.add_axes((0.3, 0.77 / size[1], 0.36, 1 - 1.15 / size[1]), ylim=(y - 0.6, -0.9))
    axes.axvspan(-1, 1, color="0.93", zorder=0)
    axes.axvline(0, color="0.4", lw=0.8, zorder=1)
    for place, row in lines:
        d = MARGIN[row["unit"]]
        ends = {name: row[name] / d for name in ("least", "most", "low", "high", "margin")}
        colour = next(c for name, c in VERDICT_COLOURS.items() if row["verdict"].startswith(name))
        axes.plot([ends["least"], ends["most"]], [place] * 2, color=colour, lw=0.9)
        axes.plot([ends["low"], ends["high"]], [place] * 2, color=colour, lw=5, alpha=0.45, solid_capstyle="butt")
        axes.plot(ends["margin"], place, "o", color=colour, ms=3.2)
    for top, claim, words in blocks:
        axes.axhline(top - 0.9, color="0.85", lw=0.6, xmin=-0.83, xmax=1.94, clip_on=False)
        look = {"va": "top", "fontsize": 7.5, "linespacing": 1.15}
        figure.text(0.005, 1 - (0.38 + 0.17 * (top + 0.4)) / size[1], claim, **look)
        figure.text(0.675, 1 - (0.38 + 0.17 * (top + 0.4)) / size[1], words, **look)
    reach = max(2.0, np.abs(judged[["least", "most"]].div(judged["unit"].map(MARGIN), axis=0)).max(axis=None))
    axes.set_xscale("symlog", linthresh=1, linscale=0.7)
    axes.set_xlim(-1.4 * reach, 1.4 * reach)
    ticks = [tick for tick in (-100, -10, -1, 0, 1, 10, 100) if abs(tick) <= reach]
    axes.set_xticks(ticks, [f"{tick:+d}".replace("+0", "0").replace("-", "−") for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks([place for place, _ in lines], [f"ε = {row['eps']}" for _, row in lines], fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    label = "margin in units of d: 1 point, or 0.01 of confidence\nthin: all seeds; thick: 95 % interval of their mean"
    axes.set_xlabel(label, fontsize=8)
    figure.text(0.005, 1 - 0.2 / size[1], title, va="center", fontsize=9, style="italic")
    return figure


def readings(frame: pd.DataFrame, panels: list[tuple[str, str, str]]) -> Figure:
    """`experiment.readings` as a picture: a panel for each (measure, method, ε), a row for each reading.

    The grey band is the range over the seeds of the unchanged profile, the line the paper's value where it has one. A
    value below half or above twice the unchanged one would squeeze all others: an arrow tells it in figures.
    """
    names, papers = list(dict.fromkeys(frame["reading"])), ledger.papers()
    labels = [names[0], *map(_change_label, names[1:])]
    height = max(0.27, 0.17 * max(label.count("\n") + 1 for label in labels))
    size = (WIDTH, height * len(names) + 1.1)
    figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axes, (measure, method, eps) in zip(grid[0], panels, strict=True):
        part = _cells(frame, measure, method, eps)
        theirs = _cells(papers[papers["dataset"] == part["dataset"].iloc[0]], measure, method, eps)["paper"]
        own = part["value"][part["reading"] == names[0]]
        far = ~part["value"].between(0.5 * own.mean(), 2 * own.mean())
        values, places = part["value"].where(~far), part["reading"].map(names.index)
        least, most = pd.concat([values, theirs]).min(), pd.concat([values, theirs]).max()
        digits = 3 if measure in tables.BOUNDS else 1
        edge = 0.12 * (most - least) if most - least > 10**-digits else 2 * 10**-digits
        axes.axvspan(own.min(), own.max(), color="0.9", zorder=0)
        axes.plot(values, places, MARKERS[method], color=COLOURS[method], ms=5)
        for value in theirs:
            axes.axvline(value, color=UPPER, lw=1.2, zorder=1)
        for value, place in zip(part["value"][far], places[far], strict=True):
            text, end, side = (f"◂ {value:.{digits}f}", least, "left")
            if value > own.mean():
                text, end, side = (f"{value:.{digits}f} ▸", most, "right")
            axes.text(end, place, text, color=COLOURS[method], ha=side, va="center", fontsize="x-small")
        axes.set(xlim=(least - edge, most + edge), ylim=(len(names) - 0.4, -0.6))
        axes.set_title(f"{method}: {measure.replace(' accuracy', '')}\n" + (f"ε = {eps}" if eps != "0" else "clean"))
        axes.xaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))
        axes.tick_params(axis="x", labelsize="x-small")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    grid[0, 0].set_yticks(range(len(names)), labels)
    return figure


def _change_label(overrides: str) -> str:
    """Overrides as a narrow label: a line for each, and what is the same for several networks said once."""
    changes: dict[str, list[str]] = {}
    for override in re.sub(r"\b(train|data|models)\.", "", overrides).split():
        network, _, change = override.partition(".")
        if network in COLOURS:
            changes.setdefault(change, []).append(network)
        else:
            changes[override] = []
    joined = {change: f"{change}\n{', '.join(networks)}" for change, networks in changes.items() if len(networks) > 1}
    return "\n".join(joined.get(change) or ".".join([*networks, change]) for change, networks in changes.items())


def _cells(cells: pd.DataFrame, measure: str, method: str, eps: str) -> pd.DataFrame:
    return cells[(cells["measure"] == measure) & (cells["method"] == method) & (cells["eps"] == eps)]


def strong(frame: pd.DataFrame) -> Figure:
    """`experiment.strong` at one ε: each image's EmpLB against what a wider search found, a panel per student."""
    methods = [m for m in STUDENTS if m in set(frame["method"])]
    figure, grid = plt.subplots(1, len(methods), figsize=(WIDTH, 2.6), sharex=True, sharey=True, squeeze=False)
    for axes, method in zip(grid[0], methods, strict=True):
        part = frame[frame["method"] == method]
        axes.plot([0, 1], [0, 1], color="0.7", lw=1, zorder=1)
        axes.vlines(part["EmpLB"], part["EmpLB"], part["StrongLB"], color=COLOURS[method], lw=0.8, alpha=0.5)
        axes.plot(part["EmpLB"], part["StrongLB"], ".", color=COLOURS[method], ms=5)
        axes.set(title=method, xlabel="EmpLB", xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    grid[0, 0].set_ylabel("by a wider search")
    return figure


def reliability(diagrams: pd.DataFrame) -> Figure:
    """Reliability diagrams: accuracy against confidence by bin, a row of panels per `points`, a column per `network`.

    `diagrams` holds `calibration.reliability` of each with `points`, `network` and its `ece`. A dot's area grows with
    the images in its bin; on the diagonal a network is as often right as it says.
    """
    rows, networks = list(dict.fromkeys(diagrams["points"])), list(dict.fromkeys(diagrams["network"]))
    size = (WIDTH, 1.95 * len(rows) + 0.4)
    figure, grid = plt.subplots(len(rows), len(networks), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, points in zip(grid, rows, strict=True):
        for axes, network in zip(line, networks, strict=True):
            part = diagrams[(diagrams["points"] == points) & (diagrams["network"] == network)]
            colour, share = COLOURS[network], part["images"] / part["images"].sum()
            axes.plot([0, 1], [0, 1], color="0.7", lw=1, zorder=1)
            axes.vlines(part["confidence"], part["confidence"], part["accuracy"], color=colour, lw=1, alpha=0.6)
            look = {"color": colour, "alpha": 0.75, "lw": 0, "clip_on": False, "zorder": 3}
            axes.scatter(part["confidence"], part["accuracy"], 6 + 180 * share, **look)
            axes.set_title(f"ECE {part['ece'].iloc[0]:.3f}", loc="right", fontsize="x-small")
            axes.set(xlim=(0, 1.04), ylim=(-0.04, 1.06), aspect="equal")
            axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])
        line[0].set_ylabel(f"{points}\naccuracy")
    for axes, network in zip(grid[0], networks, strict=True):
        axes.set_title(network, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("confidence")
    return figure
