"""What a teacher hands out: nothing given away, nothing lost, nothing written over."""

import json

import nbformat
import pytest

from faithkd.errors import FaithkdError
from faithkd.reproduce import notebooks, teaching

ALL = notebooks.listing()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_exercise_has_a_solution(path):
    asked, solved = teaching.exercises(json.loads(path.read_text(encoding="utf-8")))
    numbers = [int(line.split(".")[0]) for line in asked.splitlines() if line[:1].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 2
    assert sorted(solved) == numbers and all(solved.values())


def test_a_handout_has_everything_but_the_solutions(tmp_path):
    count = teaching.handout(tmp_path / "course", ALL)
    page = (tmp_path / "course" / "exercises.md").read_text(encoding="utf-8")
    assert page.count("## ") == len(ALL) and "Solution" not in page and "details>" not in page
    assert count == sum(len(teaching.exercises(json.loads(path.read_text("utf-8")))[1]) for path in ALL)
    for path in ALL:
        ours, theirs = (nbformat.read(file, as_version=4) for file in (path, tmp_path / "course" / path.name))
        nbformat.validate(theirs)
        assert len(ours.cells) == len(theirs.cells)
        for one, other in zip(ours.cells, theirs.cells, strict=True):
            assert "Solution to" not in other.source
            assert one == other or "## Exercises" in one.source
            assert other.source.partition("## What we learned")[2] == one.source.partition("## What we learned")[2]


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
