"""What a teacher hands out: nothing given away, nothing lost, nothing written over."""

import ast
import json
import re

import nbformat
import pytest

from faithkd.errors import FaithkdError
from faithkd.reproduce import notebooks, teaching

ALL = notebooks.listing()
EFFORT = re.compile(r"\*\*\((easy|medium|hard), \d+ min\)\*\*")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_its_prose_is_written_not_computed(path):
    cells = notebooks.cells(path)
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 40
    assert sum(len(source.splitlines()) for source in code) <= 300
    page = 'Markdown("\\n".join(ledger.page('  # the claims page of PAPER.md, generated there too
    assert not any("Markdown(" in source.replace(page, "") for source in code)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_notebook_has_the_skeleton_and_each_exercise_its_effort_and_a_hint(path):
    texts = [cell["source"] for cell in notebooks.cells(path) if cell["cell_type"] == "markdown"]
    assert "| you need | you get | minutes |" in texts[0]
    heads = re.findall(r"^## (Checks|Exercises|What we learned)$", "\n".join(texts), re.MULTILINE)
    assert heads == ["Checks", "Exercises", "What we learned"]
    assert "**Predict.**" in "\n".join(texts)
    asked, _ = teaching.exercises(json.loads(path.read_text(encoding="utf-8")))
    turns = [text.partition("### Your turn: ")[2] for text in texts if "### Your turn" in text]
    for task in [*re.split(r"^\d+\. ", asked, flags=re.MULTILINE)[1:], *turns]:
        assert EFFORT.search(task) and "*Hint:" in task, task


def test_what_matters_is_written_by_the_reader():
    """PGD, the training loop, the four losses, eqs (9) and (10), a linear program, a branching step; each once."""
    cells = [cell["source"] for path in ALL for cell in notebooks.cells(path) if cell["cell_type"] == "code"]
    parsed = [node for source in cells if "BEGIN SOLUTION" in source for node in ast.parse(source).body]
    solved = [node.name for node in parsed if isinstance(node, ast.FunctionDef)]
    written = "pgd adversarial_training sd_loss ard_loss rslad_loss fd_loss interval softmax_range program part"
    assert sorted(set(written.split()) - set(solved)) == []
    assert all(solved.count(name) == 1 for name in written.split())


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_exercise_has_a_solution(path):
    asked, solved = teaching.exercises(json.loads(path.read_text(encoding="utf-8")))
    numbers = [int(line.split(".")[0]) for line in asked.splitlines() if line[:1].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 2
    assert sorted(solved) == numbers and all(solved.values())


def test_the_students_edition_has_everything_but_the_solutions(tmp_path):
    count = teaching.handout(tmp_path / "course", ALL)
    page = (tmp_path / "course" / "exercises.md").read_text(encoding="utf-8")
    assert page.count("## ") == len(ALL) and "Solution" not in page and "details>" not in page
    raw = [json.loads(path.read_text("utf-8")) for path in ALL]
    assert count == sum(len(teaching.exercises(one)[1]) + len(teaching.turns(one)) for one in raw)
    for path in ALL:
        ours, theirs = (nbformat.read(file, as_version=4) for file in (path, tmp_path / "course" / path.name))
        nbformat.validate(theirs)
        for one, other in zip(ours.cells, theirs.cells, strict=True):
            assert "Solution to" not in other.source and "SOLUTION" not in other.source
            if one.cell_type == "code":
                solution = "solution" in one.metadata.get("tags", [])
                assert ("BEGIN SOLUTION" in one.source) == ("NotImplementedError" in other.source) == solution
                assert one.metadata.get("jupyter", {}).get("source_hidden") or not solution, "a solution is folded"
                assert not (solution and "jupyter" in other.metadata) and not other.outputs
                ast.parse(other.source)
            assert one.source == other.source or "## Exercises" in one.source or solution
            assert other.source.partition("## What we learned")[2] == one.source.partition("## What we learned")[2]
        tasks = sum("### Your turn" in cell.source for cell in ours.cells)
        assert tasks == sum("solution" in cell.metadata.get("tags", []) for cell in ours.cells), path.stem


def test_a_teachers_copy_has_the_solutions_after_each_list(tmp_path):
    teaching.handout(tmp_path, ALL[:2], solutions=True)
    page = (tmp_path / "exercises.md").read_text(encoding="utf-8")
    first, second = page.split("\n## ")[1:]
    assert first.count("**Solution to") == 3 and second.count("**Solution to") == 4
    assert (tmp_path / ALL[0].name).read_text("utf-8") == ALL[0].read_text("utf-8")


def test_nothing_is_written_over(tmp_path):
    (tmp_path / ALL[1].name).write_text("my own notes")
    with pytest.raises(FaithkdError, match=f"{ALL[1].name} already"):
        teaching.handout(tmp_path, ALL)
    assert [file.name for file in tmp_path.iterdir()] == [ALL[1].name]
    with pytest.raises(FaithkdError, match="already"):
        teaching.handout(ALL[0].parent, ALL)
