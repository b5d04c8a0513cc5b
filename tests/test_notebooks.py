"""The committed notebooks as files: sound, not stale, in normal form, and all of them from nothing."""

import json
import re
import shutil
import time
from pathlib import Path

import nbformat
import pandas
import pytest
from conftest import REPOSITORY

from faithkd import errors, ledger, params, paths, recipes
from faithkd.report import pages
from faithkd.reproduce import notebooks


def test_refreshing_twice_gives_the_same_bytes(home):
    path = home.write(
        "01-first",
        "import sys, pandas\nfrom IPython.display import display",
        'print("10%\\r20%\\r30%  ")\nprint("trouble", file=sys.stderr)\nprint(object())',
        'display(pandas.DataFrame({"a": [1]}).style.set_caption("b"))',
        "3 + 4   \n",
    )
    notebooks.refresh([], report=lambda line: None)
    assert notebooks.check(path, params.load()) == []
    first = path.read_bytes()
    notebooks.refresh(["first"], report=lambda line: None)
    assert path.read_bytes() == first
    streams, table, seven = (output for cell in json.loads(first)["cells"] for output in cell.get("outputs", []))
    assert streams["text"] == ["30%\n", "<object object at 0x0>\n"]
    assert "T_cell4t0" in "".join(table["data"]["text/html"])
    assert seven["execution_count"] == 5 and str(home.folder) not in first.decode()


@pytest.fixture
def sound(tmp_path):
    """A sound notebook, not executed but as if."""
    code = ['profile = "digits"\noverrides = {}', "a = 1", "b = 2", "c = 3", "3 + 4"]
    cells = [nbformat.v4.new_code_cell(source) for source in code]
    cells[0].metadata.tags = ["parameters"]
    cells[-1].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "7"}, execution_count=5)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# First"), *cells])
    path = tmp_path / "01-first.ipynb"
    nbformat.write(notebook, path)
    stamp = notebooks.stamp(path, params.load())
    nbformat.write(notebooks.normalise(notebook, path.stem, stamp), path)
    assert notebooks.check(path, params.load()) == []
    return path


def edited(path, change) -> list[str]:
    """The complaints about a notebook after `change` was made to its JSON."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    change(notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return notebooks.check(path, params.load())


def test_committed_notebooks_are_sound_and_not_stale():
    numbers = [path.name[:2] for path in notebooks.listing()]
    assert numbers == [f"{number:02d}" for number in range(14)]
    p, start = params.load(notebooks.PROFILE), time.perf_counter()
    complaints = [f"{path.name} {text}" for path in notebooks.listing() for text in notebooks.check(path, p)]
    assert not complaints, "\n".join([*complaints, "`make notebooks` executes them again"])
    assert time.perf_counter() - start < 5  # a second on an idle machine


def test_prose_may_change_but_neither_code_nor_parameters(sound):
    assert edited(sound, lambda notebook: notebook["cells"][0].update(source="# Better prose")) == []
    (complaint,) = notebooks.check(sound, params.load("digits", ["train.epochs=2"]))
    assert "stale" in complaint
    (complaint,) = edited(sound, lambda notebook: notebook["cells"][-1].update(source="3 + 5"))
    assert "stale" in complaint


def test_a_raised_recipe_makes_it_stale_and_any_edit_of_the_package_runs_it_again(sound, tmp_path, monkeypatch):
    p = params.load()
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "MEASURING", -1)
        assert "stale" in notebooks.check(sound, p)[0]
    (tmp_path / "package" / "reproduce").mkdir(parents=True)
    (tmp_path / "package" / "losses.py").write_text("a = 1")
    monkeypatch.setattr(notebooks, "__file__", str(tmp_path / "package" / "reproduce" / "notebooks.py"))
    first = notebooks.run_key(sound, p)
    assert notebooks.run_key(sound, p) == first
    (tmp_path / "package" / "losses.py").write_text("a = 2")
    assert notebooks.run_key(sound, p) != first and notebooks.check(sound, p) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda n: n["metadata"].update(kernelspec={"name": "mine"}), "its kernel is not python3"),
        (lambda n: n["cells"][2].update(execution_count=7), "from top to bottom"),
        (lambda n: n["cells"][1]["metadata"].update(tags=[]), "tagged `parameters`"),
        (lambda n: n["cells"][1].update(source='profile = "mnist"\noverrides = {}'), "must have profile = 'digits'"),
        (lambda n: n["cells"][0].update(source="see /home/me/x"), "cell 1 has a path of the machine"),
        (lambda n: n["cells"][-1]["outputs"][0]["data"].update({"text/html": "<p>/tmp/x"}), "cell 6 has a path"),
        (lambda n: n["cells"][0].update(source="x" * notebooks.SIZE_LIMIT), "larger than 1.5 MB"),
        (lambda n: n["cells"][3]["outputs"].append({"output_type": "error"}), "cell 4 ends in an error"),
        (
            lambda n: n["cells"][3]["outputs"].append({"output_type": "stream", "name": "stderr", "text": "!"}),
            "cell 4 shows a warning",
        ),
        (lambda n: n.pop("cells"), "is no notebook"),
        (lambda n: n["cells"][2].pop("execution_count"), "is no notebook"),
    ],
)
def test_every_fault_is_told(sound, change, told):
    assert any(told in complaint for complaint in edited(sound, change))


DAMAGED = [b"", b"<<<<<<< HEAD\n{}", b"[]", b'{"cells": {"a": 1}}', b'{"cells": [{}]}', b"\xff\xfe", b'{"seconds": {}}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_are_named_with_a_remedy(home, sound, content):
    """A notebook, what made the figures, a table: not taken for something else, and no bare error."""
    (home.folder / "figures" / "mnist").mkdir(parents=True)
    about, table = (home.folder / "figures" / "mnist" / name for name in ("provenance.json", "claims.csv"))
    sound.write_bytes(content)
    (complaint,) = notebooks.check(sound, params.load())
    assert complaint.startswith("is no notebook")
    about.with_name("table2.csv").write_text("method,eps,bound,mean\nFD,0.1,EmpLB,0.1\n")
    uses = {
        sound: lambda: notebooks.title(sound),
        about: lambda: pages._expectations([]),
        table: lambda: pages._committed("claims"),
    }
    for path, use in uses.items():
        path.write_bytes(content)
        with pytest.raises(errors.NotebookError, match=f"{path} cannot be read .*get it anew with git checkout"):
            use()
        if path != sound:
            path.unlink()


def test_refresh_leaves_a_failing_notebook_as_it_was(home):
    path = home.write("01-fails", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(notebooks.NotebookError, match="ZeroDivisionError"):
        notebooks.refresh([], report=lambda line: None)
    assert path.read_bytes() == before


def test_the_readme_lists_the_notebooks_and_the_committed_figures():
    """Stale tables in README.md: `make notebooks` writes them anew."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert pages.readme(text, notebooks.listing()) == text
    assert text.count("](notebooks/") == len(notebooks.listing())
    assert "| `digits` |" in text
    measured = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert pages.benchmarks_page(measured) == measured


def test_a_profile_of_which_only_some_notebooks_ran_has_no_row(home):
    figures = home.folder / "figures" / "mnist"
    about = {"params": {"data": {"name": "mnist"}}, "seconds": {"10-x": 125.0}}
    paths.write(figures / "provenance.json", json.dumps(about))
    ran, other = Path("10-x.ipynb"), Path("11-y.ipynb")
    assert len(pages._expectations([ran])) == 2, "the heads alone"
    (figures / "table2.csv").write_text("eps,method,bound,mean\n0.1,FD,EmpLB,0.1\n0.1,FD,FaithUB,0.25\n")
    told = "| `mnist` | mnist | 2 min | FD at ε = 0.1: mean EmpLB 0.100, mean FaithUB 0.250 |"
    assert pages._expectations([ran])[2:] == [told]
    assert pages._expectations([ran, other])[2:] == [told.replace("2 min", "over 2 min")]


def test_the_page_of_the_weights_lists_what_lies_there():
    page = (REPOSITORY / "weights" / "README.md").read_text(encoding="utf-8")
    assert pages.weights_page("") == page and "| `mnist/alpha=0.75` | 0, 1, 2 | FD |" in page


def test_the_papers_page_says_what_the_committed_figures_say():
    """A stale ledger in PAPER.md: `make notebooks` writes it anew."""
    text = (REPOSITORY / "PAPER.md").read_text(encoding="utf-8")
    assert pages.paper_page(text) == text
    with pytest.raises(notebooks.NotebookError, match="must hold one block"):
        pages.paper_page("# nothing here")


def test_the_ledger_of_a_page_is_made_from_the_figures(home):
    """Claims and cells, the key rows beside the paper's; runs with overrides are left out."""
    blocks = "".join(
        f"<!-- {name}: x -->\n| old |\n<!-- end of {name} -->\n" for name in ("claims", "ledger", "readings")
    )
    page = f"before\n{blocks}after\n"
    radius = {"claim": "C1", "text": "A beats B", "claimed": True, "eps": "0.1", "unit": "%", "margin": 2.0, "low": 1.5}
    radius |= {"high": 2.5, "seeds": 9, "verdict": "holds", "needed": None, "supported": 2.4}
    figures = home.folder / "figures" / "mnist"
    for name in ("mnist", "mnist+seed=1"):
        paths.write(figures.with_name(name) / "claims.csv", pandas.DataFrame([radius]).to_csv(index=False))
    assert "no number stands beside the paper's" in pages.paper_page(page)
    assert "No data set of the paper has been run with other readings yet." in pages.paper_page(page)
    theirs = ledger.papers().query("dataset == 'mnist'").rename(columns={"paper": "value"})
    values = pandas.concat([theirs.assign(seed=seed, value=theirs["value"] + 0.001 * seed) for seed in range(3)])
    ledger.cells(values).to_csv(figures / "ledger.csv", index=False)
    parts = [theirs.assign(reading="as in the profile", seed=seed, value=theirs["value"] + seed) for seed in range(2)]
    parts.append(theirs.assign(reading="train.kl=reverse", seed=0, value=theirs["value"] - 3))
    pandas.concat(parts).to_csv(figures / "readings.csv", index=False)
    made = pages.paper_page(page)
    assert made.startswith("before\n<!-- claims: x -->\n<details>") and "mnist+seed=1" not in made
    assert "| ✓ C1: A beats B | `mnist`, 9 | +2.0 [+1.5, +2.5] points at ε = 0.1 | holds, at 1 of 1 ε |" in made
    assert "| `mnist` | table1: agreement | 24 | 24 | 0 | 0 | 0 | 0.0 points |" in made
    assert "| `mnist`, 3 seeds | EmpLB at ε = 0.1 | – | 0.107 ±0.002 [0.106] |" in made
    assert "| old |" not in made and made.endswith("<!-- end of readings -->\nafter\n")
    assert "| as in the profile, all seeds | 97.9 to 98.9 | 90.0 to 91.0 | 65.6 to 66.6 |" in made
    assert "| paper | 97.9 | 90.0 | 65.6 | 86.0 | – |" in made
    assert re.search(r"`train.kl=reverse` \| \*\*94.9\*\* \| \*\*87.0\*\* \| \*\*62.6\*\* .* 3\.0 \|.*3\.000", made)
    assert pages.paper_page(made) == made
    trained = pandas.concat(parts).query("method != 'SD'")  # ablation.students need not be all
    trained.to_csv(figures / "readings.csv", index=False)
    made = pages.paper_page(page)
    assert "SD: robust" not in made and "nan" not in made
    trained.query("reading == 'as in the profile'").to_csv(figures / "readings.csv", index=False)
    assert "No data set of the paper has been run with other readings yet." in pages.paper_page(page)


@pytest.mark.slow
def test_everything_regenerates_from_an_empty_store(home):
    """All notebooks by papermill on the smoke profile with nothing computed or trained before."""
    (home.folder / "notebooks").rmdir()
    for folder in ("notebooks", "figures/mnist"):  # 07, 10 and 11 open on what was found on MNIST
        shutil.copytree(REPOSITORY / folder, home.folder / folder)
    process = home.start("run", "--profile", "smoke")
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    made = {path.name for path in (home.folder / "figures" / "smoke").iterdir()}
    pictures = {f"{name}.{kind}" for name in ("fig1", "fig2", "fig3", "claims") for kind in ("pdf", "png", "csv")}
    assert pictures | {f"table{number}.csv" for number in (1, 2, 3, 5)} <= made, printed
    assert "provenance.json" in made and "14 to run" in printed
    assert home.call("run", "--profile", "smoke", "--dry-run").count("already there") == 14
