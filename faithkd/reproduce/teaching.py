"""What a course needs of the notebooks: copies to hand out, without solutions, and their exercises on one sheet."""

import json
import re
from pathlib import Path

from faithkd.errors import FaithkdError
from faithkd.reproduce import notebooks

EXERCISES = re.compile(r"^## Exercises\n+(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SOLUTION = re.compile(r"<details><summary>Solution to (\d+)</summary>\n+(.*?)\n*</details>\n*", re.DOTALL)
HEAD = (
    "# Exercises\n\nEach uses the names of the notebook in the heading above it: run all of its cells, then work in "
    "new ones at its end.\n"
)


def exercises(notebook: dict) -> tuple[str, dict[int, str]]:
    """The exercises of a notebook, a numbered list in Markdown, and its solutions by their numbers."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown" and (found := EXERCISES.search("".join(cell["source"]))):
            solutions = {int(number): text for number, text in SOLUTION.findall(found[1])}
            return SOLUTION.sub("", found[1]).strip(), solutions
    return "", {}


def without_solutions(notebook: dict) -> dict:
    """The same notebook with all solutions left out."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell = cell | {"source": SOLUTION.sub("", "".join(cell["source"])).splitlines(keepends=True)}
        cells.append(cell)
    return notebook | {"cells": cells}


def sheet(chosen: list[Path], solutions: bool = False) -> str:
    """The exercises of the notebooks as one page in Markdown, with `solutions` each list followed by them."""
    parts = [HEAD]
    for path in chosen:
        asked, solved = exercises(_read(path))
        if asked:
            parts.append(f"## {notebooks.title(path)}\n\n{asked}\n")
            parts += [f"**Solution to {number}**\n\n{text}\n" for number, text in solved.items() if solutions]
    return "\n".join(parts)


def handout(folder: Path, chosen: list[Path], solutions: bool = False) -> int:
    """Write the notebooks to `folder`, without `solutions` unless asked for, and `exercises.md`; how many exercises.

    Nothing is written over: raises FaithkdError where one of the files exists.
    """
    files = {"exercises.md": sheet(chosen, solutions)}
    for path in chosen:
        notebook = _read(path)
        files[path.name] = json.dumps(
            notebook if solutions else without_solutions(notebook), indent=1, ensure_ascii=False
        )
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise FaithkdError(
            f"{folder} has {', '.join(sorted(there))} already: give another folder, or remove what is there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return len(re.findall(r"^\d+\. ", sheet(chosen), re.MULTILINE))


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
