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
from functools import partial
from pathlib import Path

from faithkd import paths, recipes, workers
from faithkd.errors import NotebookError

PROFILE = "digits"  # what the committed notebooks are executed on
AT_ONCE = 4  # notebooks, each of which takes up to 2 GB
SIZE_LIMIT = 1_500_000  # bytes; beyond it a repository's web page no longer shows a notebook well
LOCAL_PATH = re.compile(r"(?<![\w.:/<-])/(?:home|Users|root|tmp|private|mnt|opt|var|usr)/|\b[A-Z]:\\Users")
STYLER_ID = re.compile(r"\bT_([0-9a-f]{5})(?![0-9A-Za-z])")  # random, one for each styled table of pandas


def execution() -> dict:
    """Options of nbclient for every execution: this environment's own kernel, whatever kernels a user has installed."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class Own(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _no_other(self):
            return KernelSpecManager(parent=self, kernel_dirs=[])  # what is left is ipykernel's own, by sys.executable

    return {
        "kernel_name": "python3",
        "kernel_manager_class": Own,
        "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"],  # else it reports to the terminal when we stop it
    }


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
    everything = listing()
    known = {alias: path for path in everything for alias in _aliases(path)}
    chosen = set()
    for name in names:
        wanted = Path(name).name.removesuffix(".ipynb")
        if wanted not in known:
            near = difflib.get_close_matches(wanted, known, n=1)
            there = ", ".join(path.stem for path in everything)
            hint = f"did you mean {near[0]}?" if near else f"there are {there}"
            raise NotebookError(f"there is no notebook {name!r}; {hint}")
        chosen.add(known[wanted])
    return [path for path in everything if path in chosen] if names else everything


def _aliases(path: Path) -> set[str]:
    number, _, title = path.stem.partition("-")
    return {path.stem, number, str(int(number)), title}


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
    return _digest([_code(path), p.model_dump(mode="json"), recipes.TRAINING, recipes.MEASURING])


def run_key(path: Path, p) -> str:
    """As `stamp`, for the notebooks that `faithkd run` executes: an edit anywhere in the package runs them again."""
    package = Path(__file__).parents[1]
    files = {file.relative_to(package).as_posix(): file.read_text("utf-8") for file in package.rglob("*.py")}
    return _digest([stamp(path, p), files])


def _code(path: Path) -> list[str]:
    return [_normal_source(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]


def _digest(parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# --- checks without execution


def check(path: Path, p) -> list[str]:
    """What is wrong with a committed notebook that ran with the parameters `p`, a sentence for each fault."""
    try:
        return _faults(path, path.read_text(encoding="utf-8"), p)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"is no notebook: {error}"]


def _faults(path: Path, text: str, p) -> list[str]:
    notebook, found = json.loads(text), cells(path)
    code = [cell for cell in found if cell["cell_type"] == "code" and cell["source"].strip()]
    metadata = notebook["metadata"]
    complaints = _check_parameters(found)
    if metadata.get("kernelspec", {}).get("name") != "python3":
        complaints.append("its kernel is not python3")
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        complaints.append("was not executed from top to bottom in a fresh kernel")
    if not any(cell["outputs"] for cell in code):
        complaints.append("has no outputs")
    if metadata.get("faithkd", {}).get("stamp") != stamp(path, p):
        complaints.append("is stale: its code, the package or the parameters changed after it was executed")
    if extra := set(metadata) - {"kernelspec", "language_info", "faithkd"}:
        complaints.append(f"has metadata of a tool or machine: {', '.join(sorted(extra))}")
    if set(metadata.get("language_info", {})) - {"name"}:
        complaints.append("names the version of Python in its metadata")
    if len(text.encode()) > SIZE_LIMIT:
        complaints.append(f"is larger than {SIZE_LIMIT / 1e6} MB: save smaller pictures")
    for number, cell in enumerate(found, 1):
        complaints += [f"cell {number} {complaint}" for complaint in _check_cell(cell)]
    return complaints


def _check_parameters(cells: list[dict]) -> list[str]:
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    first = next((cell for cell in cells if cell["cell_type"] == "code"), None)
    if len(tagged) != 1 or tagged[0] is not first:
        return ["must tag its first code cell, and no other, as `parameters`"]
    try:
        lines = ast.parse(first["source"]).body
        values = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (SyntaxError, ValueError, AttributeError):  # papermill does not compute derived values again
        return ["has a parameters cell with more than `name = literal` lines"]
    if values != {"profile": PROFILE, "overrides": {}}:
        return [f'must have exactly profile = "{PROFILE}" and overrides = {{}} in its parameters cell']
    return []


def _check_cell(cell: dict) -> list[str]:
    complaints = []
    outputs = cell.get("outputs", [])
    if extra := set(cell["metadata"]) - {"tags", "jupyter"}:
        complaints.append(f"has metadata of a tool or machine: {', '.join(sorted(extra))}")
    if any(output["output_type"] == "error" for output in outputs):
        complaints.append("ends in an error")
    if any(output.get("name") == "stderr" for output in outputs):
        complaints.append("shows a warning or a progress bar (stderr)")
    if any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs):
        complaints.append("shows a widget, empty without a kernel (tqdm.tqdm in place of tqdm.notebook?)")
    here = [f"{folder}{os.sep}" for folder in (paths.ROOT.resolve(), Path.home()) if len(folder.parts) > 1]
    for text in [cell["source"], *(text for output in outputs for text in _texts(output))]:
        if LOCAL_PATH.search(text) or any(folder in text for folder in here):
            complaints.append("has a path of the machine that it was written on")
    return complaints


def _texts(output: dict) -> list[str]:
    data = output.get("data", {})
    texts = [output.get("text", ""), *(data[kind] for kind in data if "image/" not in kind)]
    return ["".join(text) if isinstance(text, list) else str(text) for text in texts]


# --- execution and normal form


def refresh(names: list[str], report=print) -> None:
    """Execute the committed notebooks called `names` (none: all) on digits and write them back normalised."""
    chosen = pick(names)
    for place, _ in workers.run([partial(_refresh, path) for path in chosen], at_once(), sample=0.0, here=True):
        report(f"executed {chosen[place].stem}")


def at_once() -> int:
    """How many notebooks are executed at a time: while one computes on all cores, others start, or draw on one."""
    return min(workers.jobs(), AT_ONCE)


def _refresh(path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from faithkd.reproduce import params

    os.environ.pop("MPLBACKEND", None)  # a user's own choice would leave the notebooks without pictures
    with paths.reading(path):
        notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(notebook, **execution(), timeout=None, resources=folder).execute()
    except (CellExecutionError, RuntimeError) as error:  # the second: its kernel died
        raise NotebookError(f"{path.name} was left as it was, because it failed:\n{error}") from None
    made = normalise(notebook, path.stem, stamp(path, params.load(PROFILE)))
    paths.write(path, nbformat.writes(made) + "\n")


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
