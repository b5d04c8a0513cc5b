"""Something to drag and watch, as HTML that carries its own data: for the book, for slides and for JupyterLab.

In a cell of a notebook: %run ../book/watch.py figure1
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE / "data.json"  # made by data.py
NEEDS = {  # what each takes from there
    "figure1": ("digits", "figure1"),
    "epsilon": ("digits", "epsilon"),
    "attacks": ("digits", "attacks"),
    "ascent": ("drawn",),
    "parts": ("drawn", "parts"),
}


def html(name: str) -> str:
    """One of NEEDS as a piece of HTML."""
    everything = json.loads(DATA.read_text(encoding="utf-8"))
    data = json.dumps({key: everything[key] for key in ("looks", *NEEDS[name])}, separators=(",", ":"))
    style, script = ((HERE / f"watch.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<div class="watch" data-watch="{name}"><script type="application/json">{data}</script></div>\n'
        f"<style>{style}</style>\n<script>{script}</script>"
    )


if __name__ == "__main__":
    from IPython.display import HTML, display

    display(HTML(html(sys.argv[1])))
