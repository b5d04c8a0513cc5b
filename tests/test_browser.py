"""Notebooks 00 and 01 in JupyterLab, driven by a real headless browser: open, Run All Cells, no error."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from conftest import REPOSITORY, in_a_browser

from faithkd import notebooks

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
MINUTES = 10  # for one notebook with nothing computed before, on a slow machine


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab over a copy of the notebooks, with settings, home and store of its own."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(REPOSITORY / "notebooks", folder / "notebooks")
    for name in ("params", "weights"):
        if (REPOSITORY / name).is_dir():
            (folder / name).symlink_to(REPOSITORY / name)
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},  # show every cell, also those out of sight
    }
    for name, content in settings.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jupyter = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "MPLBACKEND"},
        **{name: str(folder / name) for name in jupyter},
        "HOME": str(folder),
        "FAITHKD_HOME": str(folder),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    options = f"--no-browser --allow-root --IdentityProvider.token= --ServerApp.ip=127.0.0.1 --port={port}"
    command = [sys.executable, "-m", "jupyter", "lab", *options.split(), f"{folder}/notebooks"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server, folder / "lab.log")
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str, server: subprocess.Popen, log) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)
    yield page
    page.close()


@in_a_browser
@pytest.mark.parametrize("number", ["00", "01"])
def test_runs_in_jupyterlab(lab, page, number):
    expect = sync_api.expect
    address, folder = lab
    (committed,) = notebooks.pick([number])
    path = folder / "notebooks" / committed.name
    cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in nbformat.read(path, 4).cells)
    page.goto(f"{address}/doc/tree/{path.name}")
    expect(page.locator(".jp-CodeCell")).to_have_count(cells, timeout=120_000)
    page.locator(".jp-NotebookPanel[data-jp-kernel-status=idle], .jp-Notebook-ExecutionIndicator").first.wait_for()
    _choose(page, "Edit", "Clear Outputs of All Cells")
    expect(page.locator(".jp-CodeCell .jp-OutputArea-output")).to_have_count(0)
    _run_all(page)
    # The last cell gets a number when all have run; a cell that fails stops the others: look for both.
    failed = page.locator(".jp-RenderedText pre .ansi-red-fg")
    ended = page.locator(".jp-InputPrompt", has_text=f"[{cells}]:").or_(failed)
    ended.first.wait_for(timeout=MINUTES * 60_000)
    assert not failed.count()
    outputs = [output for cell in nbformat.read(committed, 4).cells for output in cell.get("outputs", [])]
    for kind in ("image/png", "text/html"):
        shown = page.locator(f'.jp-OutputArea-output[data-mime-type="{kind}"]')
        expect(shown).to_have_count(sum(kind in output.get("data", {}) for output in outputs))


@in_a_browser
def test_what_is_dragged_in_the_book_is_dragged_here_too(lab, page):
    address, folder = lab
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("from faithkd import watch\n\nwatch.show('ascent')")]
    )
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "notebooks" / "watch.ipynb")
    page.goto(f"{address}/doc/tree/watch.ipynb")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before, JupyterLab asks which kernel to run it in
    _run_all(page)
    page.locator(".watch").get_by_role("button", name="Step").click()
    sync_api.expect(page.locator(".watch [aria-live]")).to_contain_text("step 1 of 20")


def _choose(page, menu: str, entry: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=menu).first.click()
    page.locator(".lm-Menu-itemLabel", has_text=entry).first.click()


def _run_all(page) -> None:
    """Run All Cells; once more where JupyterLab, still busy with loading, lets the command fall."""
    begun = page.locator(".jp-InputPrompt").filter(has_text=re.compile(r"\[(\*|1)\]:"))
    for _ in range(4):
        _choose(page, "Run", "Run All Cells")
        with contextlib.suppress(sync_api.TimeoutError):
            begun.first.wait_for(timeout=20_000)
            return
    raise AssertionError("JupyterLab does not begin to run the cells")
