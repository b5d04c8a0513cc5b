"""The notebooks as files: found in order, checked without execution, executed again and normalised.

The committed notebooks are what most readers see, so each must be executed, in order, with outputs that
belong to the present code, and hold nothing that differs from machine to machine.
"""

import ast
import difflib
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

from faithkd import errors, paths, recipes
from faithkd.errors import NotebookError

PROFILE = "digits"  # what the committed notebooks are executed on
SIZE_LIMIT = 1_500_000  # bytes; beyond it a repository's web page no longer shows a notebook well
LOCAL_PATH = re.compile(r"(?<![\w.:/<-])/(?:home|Users|root|tmp|private|mnt|opt|var|usr)/|\b[A-Z]:\\Users")
STYLER_ID = re.compile(r"\bT_([0-9a-f]{5})(?![0-9A-Za-z])")  # random, one for each styled table of pandas
KERNEL = {  # options of nbclient; the second: else it reports to the terminal when we stop it
    "kernel_name": "python3",
    "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"],
}


class CellFailed(Exception):  # noqa: N818  what is raised in the cell is the error
    """A cell raised an error, or its kernel died: told in a few lines; `mistake`: whether it is the user's."""

    def __init__(self, what: str, mistake: bool, target: Path):
        super().__init__(
            f"{what}\n  the notebook as far as it got, with the whole message: {target}\n"
            "  finished work is kept: once the cause is mended, the same command goes on from here"
        )
        self.mistake = mistake


def cells(path: Path) -> list[dict]:
    """The cells of a notebook, the source of each as one text."""
    with paths.reading(path):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "cell_type": cell["cell_type"], "source": "".join(cell["source"])} for cell in cells]


def listing() -> list[Path]:
    """The notebooks notebooks/NN-*.ipynb in reading order."""
    found = sorted((paths.ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
    if not found:
        raise NotebookError(
            "no notebooks are here: work in a clone of the repository installed with `pip install -e .`, "
            "or set FAITHKD_HOME to one"
        )
    return found


def pick(names: list[str]) -> list[Path]:
    """The notebooks called `names` ("09", "9", "09-milp-bounds", "milp-bounds") in order; no names: all."""
    known = {}
    for path in listing():
        number, _, title = path.stem.partition("-")
        known |= dict.fromkeys((path.stem, number, str(int(number)), title), path)
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(path.stem for path in listing())}"
            raise NotebookError(f"there is no notebook {name!r}; {hint}")
    return sorted({known[name] for name in wanted}) if names else listing()


def title(path: Path) -> str:
    """The notebook's first heading."""
    for cell in cells(path):
        heading = re.search(r"^#\s+(.+)", cell["source"], re.MULTILINE)
        if cell["cell_type"] == "markdown" and heading:
            return heading[1].strip()
    return path.stem


# --- what a notebook's outputs depend on


def stamp(path: Path, p) -> str:
    """What a committed notebook's outputs depend on, as 16 hex digits: its code, the parameters, the recipes' numbers.

    What else of the package they show is compared in `make test`, which executes the notebooks again.
    """
    numbers = recipes.TRAINING, recipes.MEASURING, recipes.SEARCHING
    return _digest([_code(path), p.model_dump(mode="json"), *numbers])


def run_key(path: Path, p) -> str:
    """As `stamp`, for the notebooks that `faithkd run` executes: an edit anywhere in the package runs them again."""
    package = Path(__file__).parents[1]
    files = {file.relative_to(package).as_posix(): file.read_text("utf-8") for file in package.rglob("*.py")}
    return _digest([stamp(path, p), files])


def _code(path: Path) -> list[str]:
    return [_normal_source(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]


def _digest(parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# --- execution for a reader, by papermill


class Record:
    """done.json beside executed notebooks: by the name of each what it depended on, seconds, the files it made."""

    def __init__(self, file: Path):
        self.file, self.entries = file, read_json(file)

    def has(self, path: Path, p) -> bool:
        """Whether a notebook ran with the same code and parameters, and what it made is still there."""
        entry = self.entries.get(path.stem, {})
        made = [self.file.with_name(path.name), *(p.figures_dir / name for name in entry.get("files", []))]
        return entry.get("key") == run_key(path, p) and all(os.path.isfile(file) for file in made)

    def add(self, path: Path, p, seconds: float, files: list[str]) -> None:
        """Note at once, so that a kill loses at most the notebook in work."""
        self.entries[path.stem] = {"key": run_key(path, p), "seconds": round(seconds, 1), "files": files}
        write_json(self.file, self.entries)


def read_json(file: Path) -> dict:
    """What a run left behind; nothing, which is said, where it is damaged or of another version."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError):
        print(f"{file} is damaged or of another version; it is ignored and made again", file=sys.stderr)
        return {}


def write_json(file: Path, content: dict) -> None:
    paths.write(file, json.dumps(content, indent=1) + "\n")


def execute(path: Path, p, folder: Path) -> tuple[float, list[str], bool]:
    """Execute a notebook into `folder`: seconds, the files of figures/ it made, whether any changed.

    Raises CellFailed; the notebook as far as it got is there then, too.
    """
    import papermill

    start, target = time.monotonic(), folder / path.name
    written = folder / f"{path.stem}.outputs"  # figures.save notes there what it made
    written.unlink(missing_ok=True)
    os.environ["FAITHKD_OUTPUTS"] = str(written)
    os.environ.pop("MPLBACKEND", None)  # a user's own choice would leave the notebooks without pictures
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, whatever kernels a user has installed
    parameters = {"profile": p.profile, "overrides": p.overrides}
    options = {"cwd": path.parent, "progress_bar": False, "start_timeout": 300, "stderr_file": sys.stderr}
    try:
        papermill.execute_notebook(path, target, parameters, **options, **KERNEL)
    except papermill.PapermillExecutionError as error:
        where, last = f"{path.stem}, cell [{error.exec_count}]", (error.evalue.strip().splitlines() or [""])[-1]
        mistake = hasattr(errors, error.ename)
        told = f"{error.evalue}\n  in {where}" if mistake else f"{where}: {error.ename}: {last}"
        raise CellFailed(told, mistake, target) from None
    except RuntimeError as error:  # of jupyter: a kernel that does not start, or ends
        raise CellFailed(f"{path.stem}: its kernel died (out of memory?): {error}", False, target) from None
    notes = [json.loads(line) for line in written.read_text("utf-8").splitlines()] if written.is_file() else []
    written.unlink(missing_ok=True)
    files = sorted({Path(os.path.relpath(note["path"], p.figures_dir)).as_posix() for note in notes})
    return time.monotonic() - start, files, any(note["written"] for note in notes)


# --- the committed notebooks: checked without execution


def check(path: Path, p) -> list[str]:
    """What is wrong with a committed notebook that ran with the parameters `p`, a sentence for each fault."""
    try:
        return list(_faults(path, path.read_text(encoding="utf-8"), p))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"is no notebook: {error}"]


def _faults(path: Path, text: str, p):
    notebook, found = json.loads(text), cells(path)
    code = [cell for cell in found if cell["cell_type"] == "code" and cell["source"].strip()]
    given = f"profile = {PROFILE!r}\noverrides = {{}}"  # papermill computes no derived values again
    if code[0]["metadata"].get("tags") != ["parameters"] or ast.unparse(ast.parse(code[0]["source"])) != given:
        yield f"must have profile = {PROFILE!r} and overrides = {{}} alone in its first code cell, tagged `parameters`"
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "its kernel is not python3"
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        yield "was not executed from top to bottom in a fresh kernel"
    if notebook["metadata"].get("faithkd", {}).get("stamp") != stamp(path, p):
        yield "is stale: its code, the package or the parameters changed after it was executed"
    if len(text.encode()) > SIZE_LIMIT:
        yield f"is larger than {SIZE_LIMIT / 1e6} MB: save smaller pictures"
    for number, cell in enumerate(found, 1):
        outputs = cell.get("outputs", [])
        if any(output["output_type"] == "error" for output in outputs):
            yield f"cell {number} ends in an error"
        if any(output.get("name") == "stderr" for output in outputs):
            yield f"cell {number} shows a warning or a progress bar (stderr)"
        if any(_is_local(text) for text in [cell["source"], *(text for output in outputs for text in _texts(output))]):
            yield f"cell {number} has a path of the machine that it was written on"


def _is_local(text: str) -> bool:
    here = [f"{folder}{os.sep}" for folder in (paths.ROOT.resolve(), Path.home()) if len(folder.parts) > 1]
    return bool(LOCAL_PATH.search(text)) or any(folder in text for folder in here)


def _texts(output: dict) -> list[str]:
    data = output.get("data", {})
    texts = [output.get("text", ""), *(data[kind] for kind in data if "image/" not in kind)]
    return ["".join(text) if isinstance(text, list) else str(text) for text in texts]


# --- the committed notebooks: executed again and brought to normal form


def refresh(names: list[str], report=print) -> None:
    """Execute the committed notebooks called `names` (none: all) on digits and write them back normalised."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from faithkd.reproduce import params

    os.environ.pop("MPLBACKEND", None)  # as in `execute`
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    for path in pick(names):
        with paths.reading(path):
            notebook = nbformat.read(path, as_version=4)
        folder = {"metadata": {"path": str(path.parent)}}
        try:
            NotebookClient(notebook, timeout=None, resources=folder, **KERNEL).execute()
        except (CellExecutionError, RuntimeError) as error:  # the second: its kernel died
            raise NotebookError(f"{path.name} was left as it was, because it failed:\n{error}") from None
        made = normalise(notebook, path.stem, stamp(path, params.load(PROFILE)))
        paths.write(path, nbformat.writes(made) + "\n")
        report(f"executed {path.stem}")


def normalise(notebook, stem: str, stamp: str):
    """Take out of a notebook, in place, what differs from run to run: cell ids, timings, bars, addresses."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = {
        "faithkd": {"stamp": stamp},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{stem[:60]}-{number:02d}"
        cell.metadata = {name: cell.metadata[name] for name in ("jupyter", "tags") if cell.metadata.get(name)}
        if cell.cell_type != "code":
            continue
        cell.source = _normal_source(cell.source)
        executed = bool(cell.source.strip())
        count += executed
        cell.execution_count = count if executed else None
        cell.outputs = _normal_outputs(cell.outputs, count)
    return notebook


def _normal_source(source: str) -> str:
    return "\n".join(line.rstrip() for line in source.strip("\n").split("\n"))


def _normal_outputs(outputs: list, count: int) -> list:
    normal = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if output.output_type == "stream" and normal and normal[-1].output_type == "stream":
            normal[-1].text += output.text  # where a kernel cuts its text into pieces is chance
            continue
        if output.output_type == "execute_result":
            output.execution_count = count
        normal.append(output)
    styles: dict[str, str] = {}
    for output in normal:
        if output.output_type == "stream":
            output.text = _normal_text(output.text)
        for kind, value in output.get("data", {}).items():
            if isinstance(value, str) and "image/" not in kind:
                for found in STYLER_ID.findall(value):
                    styles.setdefault(found, f"T_cell{count}t{len(styles)}")
                output.data[kind] = _normal_text(STYLER_ID.sub(lambda match: styles[match[1]], value))
            elif kind == "image/png":
                output.data[kind] = value.strip()
    return [output for output in normal if output.output_type != "stream" or output.text.strip()]


def _normal_text(text: str) -> str:
    """Text without overwritten progress (what a carriage return wipes out), trailing blanks and addresses."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = [piece for piece in line.split("\r") if piece.strip()] or [""]
        lines.append(shown[-1].rstrip())
    return re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x0", "\n".join(lines))
