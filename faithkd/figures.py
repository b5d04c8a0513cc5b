"""One look for every figure and table, and one place they go: figures/<profile>/ as PDF, PNG and CSV."""

import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from faithkd import data, params, tables
from faithkd.errors import FaithkdError
from faithkd.paper import STUDENTS
from faithkd.params import Params

# One colour and one marker per network, everywhere (Okabe and Ito's palette, safe for colour-blind readers).
COLOURS = {"RT": "#4d4d4d", "SD": "#E69F00", "ARD": "#56B4E9", "RSLAD": "#009E73", "FD": "#CC3377"}
MARKERS = {"RT": "o", "SD": "s", "ARD": "^", "RSLAD": "D", "FD": "P"}
LOWER, UPPER = "#3B6FB6", "#D1602E"  # EmpLB and FaithUB
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


def parameters(p: Params, *names: str):
    """The parameters whose dotted names start with one of `names`, each with the paper's section or a reason."""
    table = params.describe(p)
    chosen = table[table["name"].str.startswith(names)] if names else table
    left = [{"selector": "td, th", "props": "text-align: left; padding: 0.2em 0.8em"}]
    return chosen.style.hide(axis="index").set_table_styles(left)


def save(p: Params, name: str, figure: Figure, frame: pd.DataFrame) -> None:
    """Write a figure as `<name>.pdf` and `.png` with its data as `<name>.csv` to figures/<profile>/.

    The files hold no dates, so that the same numbers give the same bytes. Raises FaithkdError when the folder cannot
    be written to.
    """
    folder = p.figures_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # savefig gives a figure without a layout engine the default one for its next drawing: so none is default here.
        with plt.rc_context({"figure.constrained_layout.use": figure.get_layout_engine() is not None}):
            figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "ModDate": None})
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        frame.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    except OSError as error:
        raise FaithkdError(f"cannot write {name} to {folder}: {error.strerror or error}; give permission there") from None
    _announce([folder / f"{name}.{kind}" for kind in ("pdf", "png", "csv")])


def _announce(paths: list[Path]) -> None:
    """Tell the runner which files this notebook wrote, so that it can see later whether they are still there."""
    if log := os.environ.get("FAITHKD_OUTPUTS"):
        with open(log, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"path": str(path)}) + "\n" for path in paths)


def save_table(p: Params, name: str, table: pd.DataFrame, caption: str):
    """Save a table of the paper (CSV, and a picture of it as PDF and PNG) and return it styled for the notebook.

    `name` is table1, table2, table3 or table5. Our value stands first, the paper's in brackets where it has one; the
    best student of a row is bold.
    """
    cells, best = tables.layout(table, name)
    figure = _picture(cells, best, caption)
    save(p, name, figure, table)
    plt.close(figure)
    bold = best.map(lambda is_best: "font-weight: bold" if is_best else "")
    return cells.style.apply(lambda _: bold, axis=None).set_caption(caption).set_table_styles(_TABLE)


_TABLE = [
    {"selector": "caption", "props": "caption-side: top; text-align: left; font-size: 1em; padding: 0.4em 0"},
    {"selector": "td, th", "props": "text-align: right; padding: 0.25em 0.7em; white-space: nowrap"},
    {"selector": "th.col_heading.level0", "props": "text-align: center; border-bottom: 1px solid #999"},
]


def _picture(cells: pd.DataFrame, best: pd.DataFrame, caption: str) -> Figure:
    """The table as a figure of text: column groups, column names, a rule, rows; best cells bold."""
    rows = [" ".join(map(str, row)) if isinstance(row, tuple) else str(row) for row in cells.index]
    lengths = [max(map(len, rows)) + 2]
    lengths += [max(len(str(column[1])), *cells[column].map(len)) + 3 for column in cells]
    edges = np.cumsum(lengths)
    figure = plt.figure(figsize=(0.075 * edges[-1] + 0.3, 0.24 * (len(rows) + 4.2)), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, edges[-1] + 1), ylim=(len(rows) + 3, -1.2))
    axes.axis("off")
    axes.text(0.5, -0.6, caption, ha="left", va="center", fontsize=8.5, style="italic")
    groups = cells.columns.get_level_values(0)
    for group in dict.fromkeys(groups):
        places = np.flatnonzero(groups == group)
        start, end = edges[places[0]] + 2, edges[places[-1] + 1]
        axes.text((start + end) / 2, 0.6, group, ha="center", va="center", fontsize=8.5)
        axes.plot([start, end], [1.1, 1.1], color="0.6", lw=0.8)
    axes.plot([0, edges[-1] + 1], [2.15, 2.15], color="0.2", lw=1)
    axes.text(0.5, 1.65, ", ".join(filter(None, cells.index.names)), ha="left", va="center", fontsize=8.5)
    for y, label in enumerate(rows):
        axes.text(0.5, y + 2.75, label, ha="left", va="center", fontsize=8.5)
    for edge, column in zip(edges[1:], cells, strict=True):
        axes.text(edge, 1.65, column[1], ha="right", va="center", fontsize=8.5)
        for y, (text, is_best) in enumerate(zip(cells[column], best[column], strict=True)):
            axes.text(
                edge, y + 2.75, text, ha="right", va="center", fontsize=8.5, weight="bold" if is_best else "normal"
            )
    return figure


def images(p: Params, x, titles: list[str], columns: int = 8) -> Figure:
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
        right.plot(history["epoch"], 100 * history["accuracy"], color=COLOURS[name], label=f"{name}, clean")
        right.plot(
            history["epoch"], 100 * history["robust_accuracy"], color=COLOURS[name], ls="--", label=f"{name}, under PGD"
        )
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="held-out accuracy (%)", ylim=(0, 102))
    left.legend()
    right.legend(loc="lower right", ncols=1 if len(histories) < 3 else 2, fontsize="small")
    return figure


def heat_map(p: Params, frame: pd.DataFrame, details: dict, confidences: pd.DataFrame) -> Figure:
    """Fig. 1: the difference in confidence of SD and of FD from the teacher around an image, and what happens at x₁, x₂.

    `frame` and `details` come from `experiment.heat_map`; `confidences` has a row per (point, network, class).
    """
    figure = plt.figure(figsize=(WIDTH, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.55, 1))
    maps = top.subplots(1, 2, sharex=True, sharey=True)
    side = int(np.sqrt(len(frame) // 2))
    for axes, (method, part) in zip(maps, frame.groupby("panel", sort=False), strict=True):
        shape = (side, side)
        a, b = (part[name].to_numpy().reshape(shape) for name in "ab")
        inside = part["inside"].to_numpy().reshape(shape)
        difference = np.where(inside, part["difference"].to_numpy().reshape(shape), np.nan)
        disagree = np.where(inside, part["disagree"].to_numpy().reshape(shape), 0).astype(float)
        mesh = axes.pcolormesh(a, b, difference, cmap="magma", vmin=0, vmax=1, shading="nearest", rasterized=True)
        if disagree.any():
            axes.contour(a, b, disagree, levels=[0.5], colors="white", linewidths=1.2, linestyles="--")
        axes.contour(a, b, inside.astype(float), levels=[0.5], colors="0.4", linewidths=0.8)
        for name, (u, v) in details["where"].items():
            axes.plot(u, v, "o", ms=6, mfc="white", mec="black", mew=1)
            label = {"x": "$x$", "x1": "$x_1$", "x2": "$x_2$"}[name]
            axes.annotate(
                label, (u, v), xytext=(7, 5), textcoords="offset points", color="black", fontsize=10,
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
            )  # fmt: skip
        axes.set_title(f"teacher and {method} student: mean {np.nanmean(difference):.2f}, max {np.nanmax(difference):.2f}")
        axes.set(xlabel="along $x_1 - x$, in units of ε", aspect="equal")
    maps[0].set_ylabel("at right angles, in units of ε")
    top.colorbar(mesh, ax=maps, label=r"$\|f_t - f_s\|_\infty$", shrink=0.85)
    _confidence_bars(p, bottom, details, confidences)
    return figure


def _confidence_bars(p: Params, panel, details: dict, confidences: pd.DataFrame) -> None:
    """Under fig. 1: the images x, x₁, x₂, each beside the confidences of teacher, SD and FD."""
    grid = panel.subplots(1, 6, width_ratios=(1, 1.9) * 3)
    names = {"x": "$x$", "x1": "$x_1$", "x2": "$x_2$"}
    classes = data.CLASSES[p.data.name]
    for place, name in enumerate(names):
        picture, bars = grid[2 * place], grid[2 * place + 1]
        _image(picture, data.to_pixels(p, details[name])[0])
        picture.set_title(names[name])
        part = confidences[confidences["point"] == name]
        shown = sorted(part.groupby("class")["confidence"].max().nlargest(3).index)
        part = part[part["class"].isin(shown)].assign(label=lambda f: f["class"].map(lambda c: classes[c]))
        sns.barplot(part, x="label", y="confidence", hue="network", palette=COLOURS, ax=bars, legend=place == 2)
        bars.set(ylim=(0, 1.05), xlabel="", ylabel="confidence" if place == 0 else "")
        if len(max((classes[c] for c in shown), key=len)) > 3:
            bars.tick_params(axis="x", rotation=30)
        if place == 2:
            sns.move_legend(bars, "upper left", bbox_to_anchor=(1, 1), title=None, fontsize="small")


def histograms(faithfulness: pd.DataFrame) -> Figure:
    """Figs 2–3: distribution of EmpLB and FaithUB over the test images, by student (rows) and ε (columns)."""
    radii = list(dict.fromkeys(faithfulness["eps"]))
    methods = [m for m in STUDENTS if m in set(faithfulness["method"])]
    size = (WIDTH, 1.45 * len(methods) + 0.8)
    figure, grid = plt.subplots(len(methods), len(radii), figsize=size, sharex=True, sharey=True, squeeze=False)
    bins, count = np.linspace(0, 1, 26), faithfulness["image"].nunique()
    for row, method in zip(grid, methods, strict=True):
        for axes, eps in zip(row, radii, strict=True):
            part = faithfulness.query("method == @method and eps == @eps")
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
    grid[0, -1].legend(fontsize="small", loc="upper right")
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


def brackets(part: pd.DataFrame, title: str) -> Figure:
    """The bracket EmpLB ≤ δ* ≤ FaithUB of each image as a vertical bar, images sorted by EmpLB."""
    part = part.sort_values(["EmpLB", "FaithUB"], ignore_index=True)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.8))
    axes.vlines(part.index, part["EmpLB"], part["FaithUB"], color="0.75", lw=1.2)
    axes.plot(part.index, part["FaithUB"], ".", color=UPPER, ms=4, label="FaithUB (certified)")
    axes.plot(part.index, part["EmpLB"], ".", color=LOWER, ms=4, label="EmpLB (found)")
    axes.set(xlabel="test images, sorted by EmpLB", ylabel="δ* lies in the bar", ylim=(0, 1.02), title=title)
    axes.legend(loc="upper left")
    return figure
