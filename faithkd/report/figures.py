"""One look for every figure and table, and one place they go: figures/<profile>/, pictures as PDF, PNG and CSV."""

import io
import itertools
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
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from faithkd.core import data
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
    """Set the look of all figures, and have notebooks say each in words as well (`described`); they call it once."""
    shell = get_ipython() if "inline" in plt.get_backend() else None
    if shell:
        shell.run_line_magic("matplotlib", "inline")  # else it takes hold after this cell, in place of `described`
        pictures = shell.display_formatter.formatters["image/png"]
        draw = pictures.for_type(Figure)
        pictures.for_type(Figure, lambda figure: (draw(figure), {"alt": described(figure)}))
    look = {
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
    sns.set_theme(style="ticks", font_scale=0.85, rc=look)


def described(figure: Figure) -> str:
    """A figure in words where nobody wrote better ones: of each axes its title, what it shows, and its legend."""
    said = [figure.get_suptitle()]
    for axes in figure.axes:
        shown = " over ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
        names = ", ".join(dict.fromkeys(axes.get_legend_handles_labels()[1]))
        titles = [axes.get_title(place) for place in ("left", "center", "right")]
        said.append(": ".join(filter(None, (*titles, shown, names))))
    return "; ".join(filter(None, dict.fromkeys(said))).replace("\n", " ")


def parameters(p: "Params", *names: str):
    """The parameters whose dotted names start with one of `names`, each with the paper's section or a reason."""
    table = pd.DataFrame(p.described(), columns=["name", "value", "reason"])
    chosen = table[table["name"].str.startswith(names)] if names else table
    left = [{"selector": "td, th", "props": "text-align: left; padding: 0.2em 0.8em"}]
    return chosen.style.hide(axis="index").set_table_styles(left)


def save(p: "Params", name: str, figure: Figure | None, frame: pd.DataFrame) -> None:
    """Write a figure, if there is one, as `<name>.pdf` and `.png`, and its data as `<name>.csv` to figures/<profile>/.

    Where the files are there and hold the same numbers, up to the rounding in which processors differ, they are left
    alone. They hold no dates.
    """
    files = [p.figures_dir / f"{name}.{kind}" for kind in (("pdf", "png", "csv") if figure else ("csv",))]
    fresh = not all(file.is_file() for file in files) or not same(frame, files[-1])
    if fresh:
        p.figures_dir.mkdir(parents=True, exist_ok=True)
        frame.to_csv(files[-1], index=False, lineterminator="\n")
    if fresh and figure:
        # savefig gives a figure without a layout engine the default one for its next drawing: so none is default.
        with plt.rc_context({"figure.constrained_layout.use": figure.get_layout_engine() is not None}):
            figure.savefig(files[0], metadata={"CreationDate": None, "ModDate": None})
            figure.savefig(files[1], metadata={"Software": None})
    if log := os.environ.get("FAITHKD_OUTPUTS"):  # the runner sees later whether they are still there
        with open(log, "a", encoding="utf-8") as notes:
            notes.writelines(json.dumps({"path": str(file), "written": fresh}) + "\n" for file in files)


def same(frame: pd.DataFrame, file: Path) -> bool:
    """Whether a CSV file holds the frame's values: text as it stands, numbers up to ROUNDING."""
    new = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    try:
        old = pd.read_csv(file)
        pd.testing.assert_frame_equal(new, old, check_dtype=False, **ROUNDING)
    except (AssertionError, ValueError):  # ValueError: it is no table
        return False
    return True


def show(figure: Figure, alt: str) -> None:
    """Display a figure with `alt`, which says what is to be seen to those who cannot see it."""
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def save_table(p: "Params", name: str, table: pd.DataFrame, caption: str):
    """Save a table that `tables.layout` knows, such as table1 or proved, as CSV; return it as `table` shows it."""
    save(p, name, None, table)
    return styled(tables.layout(table, name), caption)


def styled(cells: pd.DataFrame, caption: str):
    """The texts of `tables.layout` as HTML: the best students bold, the paper's values small and grey."""

    def html(text: str) -> str:
        text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
        return re.sub(r"\n(.+)", r'<br><small style="color: gray">\1</small>', text)

    narrow = cells.map(html).rename(index=lambda name: textwrap.fill(str(name), 45))
    narrow = narrow.rename(columns=lambda name: textwrap.fill(str(name).replace(" = ", "\xa0=\xa0"), 26))
    heads = [*[None] * (cells.columns.nlevels - 1), cells.index.name]  # beside the columns' names: no line for it alone
    return narrow.rename_axis(index=None, columns=heads).style.set_caption(caption).set_table_styles(_TABLE)


_TABLE = [
    {"selector": "caption", "props": "caption-side: top; text-align: left; font-size: 1em; padding: 0.4em 0"},
    {"selector": "td, th", "props": "text-align: right; padding: 0.25em 0.5em; white-space: nowrap"},
    {"selector": "th", "props": "white-space: pre"},
    {"selector": "th.row_heading", "props": "text-align: left"},
    {"selector": "th.col_heading.level0", "props": "text-align: center; border-bottom: 1px solid #999"},
]


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
        mean, share = part["difference"].mean(), 100 * part["disagree"].mean()
        axes.set_title(f"student {method}", color=COLOURS[method], fontweight="bold", loc="left")
        axes.set_title(f"mean {mean:.2f}, other class (hatched) {share:.0f} %", fontsize=9, loc="right")
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
    networks = {"RT": "teacher RT", "SD": "student SD", "FD": "student FD"}
    table = confidences.pivot(index=["point", "network"], columns="class", values="confidence")
    likely = table.max()[table.max() > 0.05].nlargest(4).index
    shown = sorted({*likely, *table.idxmax(axis=1)})
    for picture, axes, (name, label) in zip(grid[::2], grid[1::2], _POINTS.items(), strict=True):
        _image(picture, data.to_pixels(p, details[name])[0])
        picture.axis("off")
        picture.set_title(label, fontsize=12)
        values = table.loc[name].T.loc[shown, list(networks)].rename(index=dict(enumerate(data.CLASSES[p.data.name])))
        values.plot.barh(ax=axes, width=0.8, color=COLOURS, legend=False)
        for bars in axes.containers:
            high = max(bars.datavalues)
            labels = [f"{value:.2f}" if value == high else "" for value in bars.datavalues]
            axes.bar_label(bars, labels, padding=2, fontsize=7, weight="bold")
        axes.set(xlim=(0, 1.2), xticks=[0, 0.5, 1], xlabel="confidence", ylabel="")
        axes.invert_yaxis()
    panel.legend(axes.containers, networks.values(), loc="outside upper center", ncols=3, fontsize="small")


def histograms(faithfulness: pd.DataFrame) -> Figure:
    """Figs 2–3: distribution of EmpLB and FaithUB over the test images, by student (rows) and ε (columns)."""
    radii, methods = faithfulness["eps"].unique(), faithfulness["method"].unique()
    size = (WIDTH, 1.45 * len(methods) + 0.8)
    figure, grid = plt.subplots(len(methods), len(radii), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, method in zip(grid, methods, strict=True):
        for axes, eps in zip(row, radii, strict=True):
            part = faithfulness[(faithfulness["method"] == method) & (faithfulness["eps"] == eps)]
            for bound, colour in zip(tables.BOUNDS, (LOWER, UPPER), strict=True):
                look = {"binrange": (0, 1), "stat": "percent", "element": "step", "alpha": 0.45}
                sns.histplot(part, x=bound, bins=25, color=colour, label=bound, ax=axes, **look)
                axes.axvline(part[bound].mean(), color=colour, ls=":", lw=1.5)
            axes.set(title=f"ε = {eps}" if method == methods[0] else "", xlabel="bound on δ*", xlim=(0, 1))
            axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        row[0].set_ylabel(f"{method}\nimages (%)")
    grid[0, 0].legend(fontsize="x-small", loc="upper right")
    return figure


def by_eps(table: pd.DataFrame, by: str = "method") -> Figure:
    """Table 2 (or 5) as a picture: mean EmpLB and FaithUB against ε with 95 % intervals, a line per student (or α)."""
    figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    shades = sns.color_palette("flare", table[by].nunique())
    for axes, bound in zip(grid, tables.BOUNDS, strict=True):
        for shade, (name, part) in zip(shades, table[table["bound"] == bound].groupby(by, sort=False), strict=True):
            look = {"color": shade, "marker": "o", "label": f"α = {name:g}"} if by == "alpha" else {"label": name}
            look = {"color": COLOURS.get(name), "marker": MARKERS.get(name)} | look
            axes.errorbar(part["eps"], part["mean"], 1.96 * part["std"] / np.sqrt(part["images"]), capsize=2, **look)
        axes.set(title=f"mean {bound}", xlabel="ε", ylim=(0, None))
    grid[0].legend(fontsize="small")
    return figure


def brackets(part: pd.DataFrame, title: str) -> Figure:
    """The bracket EmpLB ≤ δ* ≤ FaithUB of each image as a vertical bar, images sorted by EmpLB.

    With the columns BestLB and BestUB (`experiment.best`) theirs is the bar, and the paper's stands lighter behind it.
    """
    part = part.sort_values(["EmpLB", "FaithUB"], ignore_index=True)
    ends = [pair for pair in (("EmpLB", "FaithUB"), ("BestLB", "BestUB")) if pair[1] in part]
    figure, axes = plt.subplots(figsize=(WIDTH, 2.8))
    size = 4 if len(part) > 60 else 6
    for place, (low, high) in enumerate(ends):
        front = place == len(ends) - 1
        look = {"alpha": 1.0 if front else 0.35, "ms": size, "zorder": 2 + place}
        axes.vlines(part.index, part[low], part[high], color="0.7" if front else "0.9", lw=size / 3, zorder=1 + place)
        axes.plot(part.index, part[high], ".", color=UPPER, label=f"{high} (certified)", **look)
        axes.plot(part.index, part[low], ".", color=LOWER, label=f"{low} (found)", **look)
    axes.set(xlabel="test images, sorted by EmpLB", ylabel="δ* lies in the bar", ylim=(0, 1.02), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, fontsize="small")
    return figure


def best_by_eps(table: pd.DataFrame) -> Figure:
    """`tables.best` as a picture: per student and ε our mean bracket, in front of the paper's."""
    radii, methods = table["eps"].unique(), table["method"].unique()
    figure, grid = plt.subplots(1, len(methods), figsize=(WIDTH, 3.1), sharey=True, squeeze=False)
    for axes, method in zip(grid[0], methods, strict=True):
        part, places = table[table["method"] == method], range(len(radii))
        axes.vlines(places, part["EmpLB"], part["FaithUB"], color="0.88", lw=11, label="EmpLB to FaithUB")
        axes.vlines(places, part["BestLB"], part["BestUB"], color=COLOURS[method], lw=5)
        axes.plot(places, part["BestUB"], "_", color=UPPER, ms=11, mew=2, label="BestUB")
        axes.plot(places, part["BestLB"], "_", color=LOWER, ms=11, mew=2, label="BestLB")
        axes.set(title=method, xlabel="ε", ylim=(0, 1.02), xlim=(-0.6, len(radii) - 0.4))
        axes.set_xticks(places, radii, rotation=90 if max(map(len, radii)) > 4 else 0)
    grid[0, 0].set_ylabel("mean δ* lies in the bar")
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return figure


def beside_paper(cells: pd.DataFrame) -> Figure:
    """`ledger.cells` as a picture: a panel for each measure of Tables 1, 2 and 5, at each ε the methods side by side.

    Ours is a mark with the 95 % prediction interval for one more run; the paper's a dash, red where it lies outside.
    """
    shown = cells[cells["table"].isin(["table1", "table2", "table5"]) & ~cells["measure"].str.startswith("std")]
    panels = list(shown.groupby(["table", "measure"], sort=False))
    rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(WIDTH, 2.8 * rows + 0.4), squeeze=False)
    handles = {}
    for axes, ((table, measure), part) in zip(grid.flat, panels, strict=False):
        _beside_paper(axes, part.reset_index(drop=True))
        axes.set_title(f"Table {table[-1]}: {measure}" + (" (%)" if (part["unit"] == "%").all() else ""))
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = sorted(handles, key=lambda label: label.startswith("paper"))
    loc = {"loc": "outside upper center", "ncols": min(len(order), 7), "fontsize": "small"}
    figure.legend([handles[label] for label in order], order, **loc)
    return figure


def _beside_paper(axes, part: pd.DataFrame) -> None:
    radii, methods = list(part["eps"].unique()), list(part["method"].unique())
    if methods[0] not in COLOURS:  # values of α
        methods.sort()
    shades = COLOURS | dict(zip(methods, sns.color_palette("flare", len(methods)), strict=True)) | COLOURS
    shift = dict(zip(methods, np.linspace(-0.3, 0.3, len(methods)), strict=True))
    places = part["eps"].map(radii.index) + part["method"].map(shift)
    for method in methods:
        at = part["method"] == method
        axes.vlines(places[at], part["least"][at], part["most"][at], color=shades[method], lw=4, alpha=0.3)
        look = {"color": shades[method], "marker": MARKERS.get(method, "o"), "ms": 5, "ls": "", "label": method}
        axes.plot(places[at], part["ours"][at], **look)
    outside = part["verdict"].isin(["above", "below"])
    for at, colour, label in ((~outside, "black", "paper"), (outside, "red", "paper, outside the interval")):
        if at.any():
            axes.plot(places[at], part["paper"][at], "_", ms=9, mew=1.6, color=colour, label=label, zorder=4)
    low, high = part[["paper", "ours"]].min(axis=None), part[["paper", "ours"]].max(axis=None)
    edge = 0.12 * (high - low)  # a wide interval may leave the panel: the values stay readable
    axes.set(xlabel="ε", ylim=(low - edge, high + edge))
    axes.set_xticks(range(len(radii)), radii)


VERDICT_COLOURS = {"holds": "#117733", "no difference": "#332288", "the opposite": "#882255", "undecided": "0.55"}


def forest(judged: pd.DataFrame, title: str) -> Figure:
    """`ledger.claims` as a forest plot: a block per claim, with a line per ε coloured by its verdict.

    Thin: from the lowest to the highest seed; thick: the 95 % interval of the mean, where there are seeds enough.
    Margins are in units of d, on a symmetric logarithmic axis that is linear within ±d.
    """
    overview, places, y = ledger.overview(judged), {}, 0.0
    figure, axes = plt.subplots(layout="none")
    for row in overview.to_dict("records"):
        part = judged[judged["claim"] == row["claim"]]
        claim = textwrap.fill(f"{row['claim']}  {row['text']}", 30)
        words = textwrap.fill(f"{row['mark']} {row['words']}", 44)
        axes.axhline(y - 1, color="0.85", lw=0.6, xmin=-0.83, xmax=1.94, clip_on=False)
        for x, text in ((-0.82, claim), (1.04, words)):
            axes.text(x, y - 0.5, text, va="top", fontsize=7.5, transform=axes.get_yaxis_transform())
        for place, radius in enumerate(part.to_dict("records")):
            places[y + place] = f"ε = {radius['eps']}"
            _margin(axes, y + place, radius)
        y += max(len(part), 0.9 * (1 + max(claim.count("\n"), words.count("\n")))) + 1
    reach = max(2.0, np.abs(judged[["least", "most"]].div(judged["unit"].map(MARGIN), axis=0)).max(axis=None))
    axes.axvspan(-1, 1, color="0.93", zorder=0)
    axes.axvline(0, color="0.4", lw=0.8, zorder=1)
    axes.set_xscale("symlog", linthresh=1, linscale=0.7)
    ticks = [tick for tick in (-100, -10, -1, 0, 1, 10, 100) if abs(tick) <= reach]
    axes.set_xticks(ticks, [f"{tick:+d}".replace("+0", "0").replace("-", "−") for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(list(places), list(places.values()), fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(-1.4 * reach, 1.4 * reach), ylim=(y - 0.5, -1))
    label = "margin in units of d: 1 point, or 0.01 of confidence; grey: no larger than d\n"
    label += "thin: all seeds; thick: 95 % interval of their mean"
    axes.set_xlabel(label, fontsize=8)
    axes.set_title(title, x=-0.82, ha="left", fontsize=9, style="italic")
    height = 0.17 * y + 1.15
    figure.set_size_inches(WIDTH, height)
    figure.subplots_adjust(left=0.3, right=0.66, bottom=0.7 / height, top=1 - 0.3 / height)
    return figure


def _margin(axes, place: float, row: dict) -> None:
    """A line of the forest: the margin, its interval and its range over the seeds, in units of d."""
    ends = {name: row[name] / MARGIN[row["unit"]] for name in ("least", "most", "low", "high", "margin")}
    colour = next(c for name, c in VERDICT_COLOURS.items() if row["verdict"].startswith(name))
    axes.plot([ends["least"], ends["most"]], [place] * 2, color=colour, lw=0.9)
    axes.plot([ends["low"], ends["high"]], [place] * 2, color=colour, lw=5, alpha=0.45, solid_capstyle="butt")
    axes.plot(ends["margin"], place, "o", color=colour, ms=3.2)


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
    rows, networks = diagrams["points"].unique(), diagrams["network"].unique()
    size = (WIDTH, 2.1 * len(rows) + 0.4)
    figure, grid = plt.subplots(len(rows), len(networks), figsize=size, sharex=True, sharey=True, squeeze=False)
    for place, axes in zip(itertools.product(rows, networks), grid.flat, strict=True):
        part = diagrams[(diagrams["points"] == place[0]) & (diagrams["network"] == place[1])]
        colour, share = COLOURS[place[1]], part["images"] / part["images"].sum()
        axes.plot([0, 1], [0, 1], color="0.7", lw=1, zorder=1)
        axes.vlines(part["confidence"], part["confidence"], part["accuracy"], color=colour, lw=1, alpha=0.6)
        look = {"color": colour, "alpha": 0.75, "lw": 0, "clip_on": False, "zorder": 3}
        axes.scatter(part["confidence"], part["accuracy"], 6 + 180 * share, **look)
        axes.set_title(f"{place[1]}, {place[0]}\nECE {part['ece'].iloc[0]:.3f}", fontsize="x-small")
        axes.set(xlim=(0, 1.04), ylim=(-0.04, 1.06), aspect="equal")
        axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    figure.supxlabel("confidence", fontsize="small")
    figure.supylabel("accuracy", fontsize="small")
    return figure
