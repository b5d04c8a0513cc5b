"""Something to drag and watch, as HTML that carries its own data: in a notebook, in the book and on slides."""

import json
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE / "data.json"  # made by book/data.py from the committed digits networks
NEEDS = {  # what each takes from there
    "figure1": ("digits", "figure1"),
    "epsilon": ("digits", "epsilon"),
    "attacks": ("digits", "attacks"),
    "ascent": ("drawn",),
    "parts": ("drawn", "parts"),
}
UNSEEN = "Something to drag stands here: run this cell, or open the page in the book, which needs no kernel."


def html(name: str) -> str:
    """One of NEEDS as a piece of HTML; where scripts do not run, as in a preview, it says UNSEEN."""
    everything = json.loads(DATA.read_text(encoding="utf-8"))
    data = json.dumps({key: everything[key] for key in ("looks", *NEEDS[name])}, separators=(",", ":"))
    style, script = ((HERE / f"watch.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<div class="watch" data-watch="{name}"><p>{UNSEEN}</p><script type="application/json">{data}</script></div>\n'
        f"<style>{style}</style>\n<script>{script}</script>"
    )


def show(name: str):
    """One of NEEDS in a notebook: the last line of a cell."""
    from IPython.display import HTML

    return HTML(html(name))
