"""What a course needs of the notebooks: the students' edition, with stubs, and the exercises on one sheet.

Solutions stand in the committed notebooks, folded: in code between nbgrader's marks, in text as `<details>`.
"""

import ast
import json
import re
from pathlib import Path

from faithkd.errors import FaithkdError
from faithkd.reproduce import notebooks

EXERCISES = re.compile(r"^## Exercises\n+(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SOLUTION = re.compile(r"<details><summary>Solution to (\d+)</summary>\n+(.*?)\n*</details>\n*", re.DOTALL)
REGION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.MULTILINE | re.DOTALL)
STUB = r'\1# YOUR CODE HERE\n\1raise NotImplementedError("your turn: a hint stands above this cell")'
TURN = re.compile(r"^### Your turn: (.+)\n+\*\*\((.+?)\)\*\*", re.MULTILINE)
HEAD = (
    "# Exercises\n\nEach uses the names of the notebook in the heading above it: run all of its cells, then work in "
    "new ones at its end. What is to be written in the notebook itself comes first.\n"
)


def functions(number: str, names: str) -> list:
    """Functions that another notebook defines, so that each opens alone and nothing is written twice.

    Only its imports and function definitions are executed; `names` are separated by blanks.
    """
    (path,), space = notebooks.pick([number]), {}
    for cell in notebooks.cells(path):
        if cell["cell_type"] == "code":
            body = ast.parse(cell["source"]).body
            kept = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)]
            exec(compile(ast.Module(kept, []), path.name, "exec"), space)
    return [space[name] for name in names.split()]


def exercises(notebook: dict) -> tuple[str, dict[int, str]]:
    """The exercises of a notebook, a numbered list in Markdown, and its solutions by their numbers."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown" and (found := EXERCISES.search("".join(cell["source"]))):
            solutions = {int(number): text for number, text in SOLUTION.findall(found[1])}
            return SOLUTION.sub("", found[1]).strip(), solutions
    return "", {}


def turns(notebook: dict) -> list[tuple[str, str]]:
    """What a reader writes in the notebook itself: (title, "level, minutes") of each."""
    texts = ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return [found for text in texts for found in TURN.findall(text)]


def without_solutions(notebook: dict) -> dict:
    """The students' edition: stubs in place of solutions, and no outputs, so that there is something to predict."""
    return notebook | {"cells": [_to_solve(cell) for cell in notebook["cells"]]}


def _to_solve(cell: dict) -> dict:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return cell | {"source": SOLUTION.sub("", source).splitlines(keepends=True)}
    cell = cell | {"source": REGION.sub(STUB, source).splitlines(keepends=True), "outputs": [], "execution_count": None}
    if "solution" in cell["metadata"].get("tags", []):  # unfolded
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name != "jupyter"}
    return cell


def sheet(chosen: list[Path], solutions: bool = False) -> str:
    """The exercises of the notebooks as one page in Markdown, with `solutions` each list followed by them."""
    parts = [HEAD]
    for path in chosen:
        asked, solved = exercises(notebook := _read(path))
        if asked:
            first = "".join(f"* {title} ({how})\n" for title, how in turns(notebook))
            parts.append(f"## {notebooks.title(path)}\n\n{first}\n{asked}\n")
            parts += [f"**Solution to {number}**\n\n{text}\n" for number, text in solved.items() if solutions]
    return "\n".join(parts)


def handout(folder: Path, chosen: list[Path], solutions: bool = False) -> int:
    """Write the notebooks to `folder`, with stubs unless `solutions` is set, and `exercises.md`; how many exercises.

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
    return len(re.findall(r"^(?:\d+\.|\*) ", sheet(chosen), re.MULTILINE))


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
