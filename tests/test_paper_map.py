"""PAPER.md's map: every function exists and names its equation, every notebook shows it."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

import faithkd
from faithkd import params

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "PAPER.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its two head lines."""
    section = TEXT.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


EQUATIONS = rows("Equations and definitions")
RESULTS = rows("Tables and figures")


def resolve(name: str):
    """The function; `faithkd.experiment.best` as whoever writes `from faithkd import experiment` has it."""
    module, _, attribute = name.strip("`").rpartition(".")
    short = getattr(faithkd, module.removeprefix("faithkd."), None)
    return getattr(short or import_module(module), attribute)


def source(number: str) -> str:
    (path,) = (ROOT / "notebooks").glob(f"{number}-*.ipynb")
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells)


def test_the_map_is_complete():
    named = set(map(int, re.findall(r"eq\. \((\d+)\)", " ".join(cell for row in EQUATIONS for cell in row))))
    assert named == set(range(1, 15)), "every equation of the paper"
    found = " ".join(row[0] for row in RESULTS)
    assert all(word in found for word in ("fig. 1", "figs 2–3", *(f"Table {n}" for n in range(1, 6))))


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: row[0])
def test_functions_name_their_equation_and_notebooks_show_it(row):
    where, title, function, notebooks = row
    docstring = inspect.getdoc(resolve(function))
    names = re.findall(r"\((\d+)\)", where + title)
    marks = re.findall(r"Def\. \d|§[\d.]+\d", where)
    assert any(f"({n})" in docstring for n in names) or any(mark in docstring for mark in marks), docstring
    for number in notebooks.split(", "):
        text = source(number)
        for name in names:
            assert rf"\tag{{{name}}}" in text, f"notebook {number} lacks \\tag{{{name}}}"


@pytest.mark.parametrize("row", RESULTS, ids=lambda row: row[0])
def test_results_are_made_by_the_functions_named(row):
    _, measured, made, notebook = row
    text = source(notebook)
    for name in (measured, made):
        if name != "–":
            assert callable(resolve(name))
    if measured != "–":
        assert measured.strip("`").removeprefix("faithkd.") in text
        assert made.strip("`").removeprefix("faithkd.") in text


def test_the_ledger_is_made_by_the_functions_named():
    named = [row for row in rows("The paper's numbers and claims beside ours") if "faithkd." in row[1]]
    assert len(named) == 6
    for _, function, notebook in named:
        assert callable(resolve(function)) and function.strip("`").removeprefix("faithkd.") in source(notebook)


def test_parameters_named_in_the_deviations_exist():
    names = {name for name, _, _ in params.load("mnist").described()}
    for row in rows("Where the paper is ambiguous, and what we do"):
        for name in re.findall(r"`([\w.]+)`", row[-1]):
            assert any(known == name or known.startswith(f"{name}.") for known in names), name
