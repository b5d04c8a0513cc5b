"""Every solution runs: those in code, whose stubs the next cell tells; those in text, whose last claim is true."""

import ast
import json
import linecache
import re

import matplotlib.pyplot as plt
import pytest
import torch

from faithkd import notebooks, paths
from faithkd.report import pages
from faithkd.reproduce import teaching

CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(code: str, names: dict):
    """The value of the last expression of `code`, executed in the namespace `names`, as a notebook would show it."""
    name = f"<cell {len(linecache.cache)}>"
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name  # what inspect.getsource reads
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return eval(compile(ast.Expression(last.value), name, "eval"), names) if last else None


def test_a_notebook_borrows_functions_of_another():
    interval, pair = teaching.functions("09", "interval pair")
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU())
    box = interval(net, torch.tensor([-1.0]), torch.tensor([1.0]))
    assert len(box) == 3 and pair((0.0, 0.5), (0.25, 1.0)) == 1.0
    with pytest.raises(KeyError, match="bracket"):
        teaching.functions("09", "bracket")


@pytest.mark.usefixtures("brief_auto_attack")
@pytest.mark.filterwarnings("default")  # a kernel shows them and goes on
@pytest.mark.parametrize("path", notebooks.listing(), ids=lambda path: path.stem)
def test_solutions_run_and_checks_tell_a_stub(path, tmp_path, monkeypatch):
    """On the quick profile; each in the namespace as the cells left it, whatever another solution did to it."""
    monkeypatch.setenv("FAITHKD_OUTPUTS", str(tmp_path / "log"))
    monkeypatch.chdir(paths.ROOT / "notebooks")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    notebook, names = json.loads(path.read_text(encoding="utf-8")), {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    stubs = [cell for cell in teaching.without_solutions(notebook)["cells"] if cell["cell_type"] == "code"]
    for place, cell in enumerate(code):
        if "solution" in cell["metadata"].get("tags", []):
            unsolved = dict(names)
            run("".join(stubs[place]["source"]), unsolved)
            with pytest.raises(NotImplementedError, match="hint"):
                run("".join(code[place + 1]["source"]), unsolved)
        run("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names["profile"] = pages.QUICK
    _, solutions = teaching.exercises(notebook)
    for number, text in solutions.items():
        left = dict(names)
        value = run("\n".join(CODE.findall(text)), names)
        plt.close("all")
        assert value is not False, f"solution {number} claims what is not so"
        names.clear()
        names.update(left)
