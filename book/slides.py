"""The lectures as one HTML file each, with everything in it. `make slides` writes them to build/slides/.

Sources are slides/*.md: slides between lines of ---, each with its minutes in the title, `## Title (5)`, and after a
line `Notes:` what to say. A line {watch figure1} is something to drag, ![alt](figures/digits/fig1.png) a file of the
repository, and ![alt](notebooks/02-*.ipynb#A heading) the first picture below that heading of a committed notebook.
{EmpLB, 0.1, FD} is our mean ± half its interval on MNIST, and {seeds} over how many seeds. A line
{table figures/mnist/ladder.csv rung eps mean} is a committed table: its file, rows, columns and what stands in them.
"""

import base64
import csv
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
from conf import MATHJAX
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from faithkd import watch

HERE = Path(__file__).parent
ROOT = HERE.parent
TITLE = re.compile(r"^(#+ .*?) \((\d+)\)$", re.MULTILINE)
OURS = re.compile(r"\{(accuracy|robust accuracy|agreement|EmpLB|FaithUB), ([\d./]+), (\w+)\}|\{seeds\}")
TABLE = re.compile(r"^\{table (\S+) (\w+) (\w+) (\w+)\}$", re.MULTILINE)
LEDGER = ROOT / "figures/mnist/ledger.csv"
PICTURE = re.compile(r"!\[(.*?)\]\((.+?)\)", re.DOTALL)
LENGTH = 90  # minutes


def picture(source: str) -> str:
    """A picture as text for an <img>: of a file, or the first below a heading of a notebook."""
    file, _, heading = source.partition("#")
    found = sorted(ROOT.glob(file))
    if len(found) != 1:
        raise SystemExit(f"slides: {source}: {len(found)} files are called so, not one")
    if not heading:
        return base64.b64encode(found[0].read_bytes()).decode()
    below = False
    for cell in nbformat.read(found[0], as_version=4).cells:
        below = below or bool(re.search(rf"^#+ {re.escape(heading)}", cell.source, re.MULTILINE))
        for output in cell.get("outputs", []) if below else []:
            if png := output.get("data", {}).get("image/png"):
                return png.strip().replace("\n", "")
    raise SystemExit(f"slides: {source}: no such heading in {found[0].name}, or no picture below it")


def ours(found: re.Match) -> str:
    """What stands for a match of OURS, from the committed ledger."""
    with open(LEDGER, encoding="utf-8", newline="") as file:
        rows = {(row["measure"], row["eps"], row["method"]): row for row in csv.DictReader(file)}
    if not found[1]:
        return next(iter(rows.values()))["seeds"]
    row = rows[found.groups()]
    digits = 1 if row["unit"] == "%" else 3
    mean, low, high = (float(row[name]) for name in ("ours", "low", "high"))
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def table(found: re.Match) -> str:
    """What stands for a match of TABLE, as HTML, in the order of the file."""
    file, row, column, value = found.groups()
    frame = pd.read_csv(ROOT / file, dtype={column: str})
    cells = frame.pivot(index=row, columns=column, values=value)
    cells = cells.reindex(index=frame[row].unique(), columns=frame[column].unique()).rename_axis(index=None)
    return cells.to_html(border=0, float_format="{:.3f}".format)


def deck(text: str) -> tuple[str, int]:
    """The sections of a lecture, and its minutes."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table").use(
        dollarmath_plugin, renderer=lambda content, options: rf"\[{content}\]"
        if options["display_mode"]
        else rf"\({content}\)",
    )  # fmt: skip
    sections, total = [], 0
    for slide in re.split(r"^---$", text, flags=re.MULTILINE):
        shown, _, notes = slide.partition("\nNotes:\n")
        minutes = sum(int(found[1]) for found in TITLE.findall(shown))
        total += minutes
        shown = PICTURE.sub(
            lambda found: f'<img alt="{found[1]}" src="data:image/png;base64,{picture(found[2])}">', shown
        )
        body = markdown.render(TABLE.sub(table, OURS.sub(ours, TITLE.sub(r"\1", shown))))
        body = re.sub(r"<p>\{watch (\w+)\}</p>", lambda found: watch.html(found[1]), body)
        sections.append(
            f'<section data-minutes="{minutes}"><div>{body}</div><aside>{markdown.render(notes)}</aside></section>'
        )
    return "\n".join(sections), total


def page(file: Path) -> str:
    """A lecture as HTML. Raises SystemExit where its minutes are not LENGTH."""
    text = file.read_text(encoding="utf-8")
    sections, total = deck(text)
    if total != LENGTH:
        raise SystemExit(f"slides: {file.name} takes {total} minutes, not {LENGTH}")
    style, script = ((HERE / f"slides.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    title = re.search(r"^# (.*?)(?: \(\d+\))?$", text, re.MULTILINE)[1]
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{style}</style>\n{sections}\n'
        f"<script>{script}</script>\n<script>{MATHJAX.read_text(encoding='utf-8')}</script>\n</html>\n"
    )


def build(folder: Path) -> list[Path]:
    """Write all lectures to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file in sorted((HERE / "slides").glob("*.md")):
        written.append(folder / f"{file.stem}.html")
        written[-1].write_text(page(file), encoding="utf-8")
    return written


if __name__ == "__main__":
    for made in build(Path(sys.argv[1])):
        print(made)
