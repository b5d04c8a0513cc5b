"""What all tests share: no settings of the user, a store of their own, the real image sets."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GIVEN_DATA = os.environ.pop("FAITHKD_DATA", None)

# Before the package is imported: a user's settings must not change what the tests see, and everything that
# they start must import this checkout, whatever else is installed.
for name in ("FAITHKD_HOME", "FAITHKD_STORE", "FAITHKD_RUNS", "FAITHKD_FRESH", "FAITHKD_OUTPUTS", "FAITHKD_CLUSTER"):
    os.environ.pop(name, None)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
os.environ["MPLBACKEND"] = "agg"
os.environ["FAITHKD_JOBS"] = "1"  # what a test patches must be called in this process
os.environ.setdefault("OMP_NUM_THREADS", "1")  # nets this small are slower with more

import nbformat  # noqa: E402  after the environment is set, as all that follows
import pytest  # noqa: E402

from faithkd import cli, paths  # noqa: E402
from faithkd.reproduce import params  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory):
    os.environ["FAITHKD_STORE"] = str(tmp_path_factory.mktemp("store"))


@pytest.fixture
def real_data(monkeypatch) -> Path:
    """The folder with the real MNIST, Fashion-MNIST and CIFAR-10; the test is skipped where there is none."""
    for folder in (GIVEN_DATA, REPOSITORY.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            monkeypatch.setenv("FAITHKD_DATA", str(Path(folder).absolute()))
            return Path(folder).absolute()
    pytest.skip("the real image sets are not here: set FAITHKD_DATA to a folder that holds them")


def in_a_browser(test):
    """Marks a test that drives a real browser."""
    none = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")
    return pytest.mark.browser(none(test))


@pytest.fixture(scope="module")
def chromium():
    """The browser; pages lie next to what they load, as after `make book`, and a file may ask for another file."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    flags += " disable-sync allow-file-access-from-files"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, headless=True, args=[f"--{flag}" for flag in flags.split()]
        )
        yield browser
        browser.close()


@pytest.fixture
def brief_auto_attack(monkeypatch):
    """AutoAttack with a fraction of its steps: what is tested is what we make of its points."""
    from pyautoattack import AutoAttack

    whole = AutoAttack.run_standard_evaluation

    def run(suite, *arguments, **options):
        for attack in (suite.apgd, suite.apgd_targeted, suite.fab):
            attack.n_iter = 8
        suite.square.n_queries = 20
        return whole(suite, *arguments, **options)

    monkeypatch.setattr(AutoAttack, "run_standard_evaluation", run)


class Home:
    """A repository in a temporary folder: the real params/, and the notebooks that a test puts into it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "notebooks").mkdir(parents=True)
        (folder / "params").symlink_to(REPOSITORY / "params")
        self.environment = {
            "FAITHKD_HOME": str(folder),
            "FAITHKD_STORE": str(folder / ".store"),
            "FAITHKD_RUNS": str(folder / "runs"),
        }

    def write(self, name: str, *code: str) -> Path:
        """A notebook with a title, the parameters cell and `code`."""
        parameters = nbformat.v4.new_code_cell('profile = "digits"\noverrides = {}', metadata={"tags": ["parameters"]})
        cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}"), parameters]
        notebook = nbformat.v4.new_notebook(cells=cells + [nbformat.v4.new_code_cell(source) for source in code])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path = self.folder / "notebooks" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """`faithkd ...` as a process, both outputs in one pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "faithkd.cli", *arguments],
            env={**os.environ, **self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """`faithkd ...` in this process and the real repository, with runs of its own; returns what it printed."""
    for name, value in {"RUNS": str(tmp_path / "runs"), "JOBS": "1", "CLUSTER": ""}.items():
        monkeypatch.setenv(f"FAITHKD_{name}", value)

    def call(*arguments, code=0):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["faithkd", *arguments])
            for name in ("DATA", "JOBS", "CLUSTER", "STORE", "FRESH", "OUTPUTS"):  # which the command line changes
                patch.setenv(f"FAITHKD_{name}", os.environ.get(f"FAITHKD_{name}", ""))
            cli.main()
        printed = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == code, printed
        return printed

    return call


@pytest.fixture
def home(tmp_path, monkeypatch, call) -> Home:
    """An empty repository in a temporary folder; this process and its kernels work there."""
    home = Home(tmp_path / "home")
    for module in (paths, params):
        monkeypatch.setattr(module, "ROOT", home.folder)
    for name, value in home.environment.items():
        monkeypatch.setenv(name, value)
    home.call = call
    return home
