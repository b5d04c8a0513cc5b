"""The notebooks as files: found in order, checked without execution, executed again and normalised.

The committed notebooks are what most readers see, so each must be executed, in order, with outputs that
belong to the present code, and hold nothing that differs from machine to machine.
"""

import ast
import difflib
import functools
import hashlib
import json
import os
import re
from functools import partial
from pathlib import Path

from faithkd import parallel, paths
from faithkd.errors import FaithkdError
from faithkd.source import structure

PROFILE = "digits"  # what the committed notebooks are executed on
QUICK = "smoke"  # its figures are made everywhere and committed nowhere
AT_ONCE = 4  # notebooks, each of which takes up to 2 GB
SIZE_LIMIT = 1_500_000  # bytes; beyond it a repository's web page no longer shows a notebook well
# modules of the package that no notebook's output depends on
TOOLS = {"cli.py", "notebooks.py", "source.py", "teaching.py"}
KERNEL = {  # for every execution; the level, because a kernel reports to the terminal also when we stop it
    "kernel_name": "python3",
    "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"],
}
LOCAL_PATH = re.compile(r"(?<![\w.:/<-])/(?:home|Users|root|tmp|private|mnt|opt|var|usr)/|\b[A-Z]:\\Users")
STYLER_ID = re.compile(r"\bT_([0-9a-f]{5})(?![0-9A-Za-z])")  # random, one for each styled table of pandas


class NotebookError(FaithkdError):
    """A notebook that is missing, unknown or cannot be executed."""


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
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        heading = re.search(r"^#\s+(.+)", "".join(cell["source"]), re.MULTILINE)
        if cell["cell_type"] == "markdown" and heading:
            return heading[1].strip()
    return path.stem


# --- what a notebook's outputs depend on


def stamp(path: Path, p) -> str:
    """What a notebook's outputs depend on, as 16 hex digits: its code, the package's code, the parameters."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [_normal_source("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    parts = [code, code_digest(Path(__file__).parent), p.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache  # a run asks once for every notebook
def code_digest(folder: Path) -> str:
    """Hash of the package's code without comments, docstrings and layout, the same in all Python versions."""
    modules = sorted(path for path in folder.rglob("*.py") if path.name not in TOOLS)
    try:
        trees = [structure(ast.parse(path.read_bytes(), path)) for path in modules]
    except SyntaxError as error:
        raise NotebookError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    names = [path.relative_to(folder).as_posix() for path in modules]
    return hashlib.sha256(json.dumps([names, trees]).encode()).hexdigest()


# --- checks without execution


def check(path: Path, p) -> list[str]:
    """What is wrong with a committed notebook that ran with the parameters `p`, a sentence for each fault."""
    text = path.read_text(encoding="utf-8")
    try:
        notebook = json.loads(text)
        cells = [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        return [f"is no notebook: {error}"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and cell["source"].strip()]
    metadata = notebook["metadata"]
    complaints = _check_parameters(cells)
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
    for number, cell in enumerate(cells, 1):
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
    for place, _ in parallel.run([partial(_refresh, path) for path in chosen], at_once(), sample=0.0, here=True):
        report(f"executed {chosen[place].stem}")
    for name, renew in (("README.md", readme), ("PAPER.md", paper_page)):
        page = paths.ROOT / name
        if page.is_file():
            page.write_text(renew(page.read_text(encoding="utf-8")), encoding="utf-8")


def at_once() -> int:
    """How many notebooks are executed at a time: while one computes on all cores, others start, or draw on one."""
    return min(parallel.jobs(), AT_ONCE)


def _refresh(path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    from faithkd import params

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's python3, not another of the user's
    os.environ.pop("MPLBACKEND", None)  # a user's own choice would leave the notebooks without pictures
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(notebook, **KERNEL, timeout=None, resources=folder).execute()
    except (CellExecutionError, DeadKernelError) as error:
        raise NotebookError(f"{path.name} was left as it was, because it failed:\n{error}") from None
    text = nbformat.writes(normalise(notebook, path.stem, stamp(path, params.load(PROFILE)))) + "\n"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


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


# --- the generated parts of README.md and PAPER.md


def readme(text: str) -> str:
    """README.md with its tables of notebooks and of profiles made anew from the notebooks and the committed figures."""
    for name, rows in (("notebooks", _contents()), ("numbers", _expectations())):
        block = re.compile(rf"(<!-- {name}: [^\n]*-->\n\|[^\n]*\n\|[^\n]*\n)(?:\|[^\n]*\n)*(?=<!-- end of {name} -->)")
        text, found = block.subn(lambda match, rows=rows: match[1] + "".join(rows), text)
        if found != 1:
            raise NotebookError(f"README.md must hold one block `<!-- {name}: … -->` with a table's two head lines")
    return _renewed("README.md", text, "bounds", _measured())


def _renewed(page: str, text: str, name: str, lines: list[str]) -> str:
    """The page's text with what stands between the comments of its block `name` replaced."""
    block = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    text, found = block.subn(lambda match: match[1] + "".join(f"{line}\n" for line in lines), text)
    if found != 1:
        raise NotebookError(f"{page} must hold one block `<!-- {name}: … -->` up to `<!-- end of {name} -->`")
    return text


def _measured() -> list[str]:
    """What the benchmarks found on MNIST: bounds and cost, tightness over time, aims, attacks; see there."""
    folder = paths.ROOT / "benchmarks" / "results"
    if not (folder / "bounds-mnist.md").is_file():
        return []
    bounds, aims = ((folder / f"{name}-mnist.md").read_text(encoding="utf-8").strip() for name in ("bounds", "aims"))
    what = "Share of the gap closed over seconds an image, a panel for each radius"
    shown = [f"![{what}](benchmarks/results/frontier-mnist.png)\n"]
    folded = {"What we had set out to reach": aims}
    if (page := folder / "attacks-mnist.md").is_file():
        folded["PGD beside foolbox"] = page.read_text(encoding="utf-8").strip()
    details = [f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" for title, text in folded.items()]
    return [f"{bounds}\n", *shown, *details]


def _contents() -> list[str]:
    """A row for each notebook: number, title and link, and what its own first table says one gets."""
    rows = []
    for path in listing():
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        head = re.search(r"^# (\d+) · (.+)$", first, re.MULTILINE)
        gets = re.search(r"^\|---\|---\|---\|\n\|[^|]*\|([^|]*)\|", first, re.MULTILINE)
        if not (head and gets):
            raise NotebookError(f"{path.name} must begin with «# NN · title» and a table you need | you get | time")
        rows.append(f"| {head[1]} | [{head[2]}](notebooks/{path.name}) | {gets[1].strip()} |\n")
    return rows


def _expectations() -> list[str]:
    """A row for each profile whose figures are committed: data, time it took, FD's bounds in the middle of Table 2."""
    import csv

    rows = []
    for source in sorted((paths.ROOT / "figures").glob("*/provenance.json")):
        made = json.loads(source.read_text(encoding="utf-8"))
        whole = source.with_name("table2.csv").is_file()  # else a run of some notebooks
        if made["overrides"] or made["profile"] == QUICK or not whole:
            continue
        with open(source.with_name("table2.csv"), encoding="utf-8", newline="") as file:
            table = [row for row in csv.DictReader(file) if row["method"] == "FD"]
        radii = list(dict.fromkeys(row["eps"] for row in table))
        eps = radii[len(radii) // 2]
        mean = {row["bound"]: float(row["mean"]) for row in table if row["eps"] == eps}
        minutes = sum(made["seconds"].values()) / 60
        rows.append(
            f"| `{made['profile']}` | {made['params']['data']['name']} | {minutes:.0f} min | "
            f"FD at ε = {eps}: mean EmpLB {mean['EmpLB']:.3f}, mean FaithUB {mean['FaithUB']:.3f} |\n"
        )
    return rows


def paper_page(text: str) -> str:
    """PAPER.md with its blocks `ledger` and `readings` made anew from the committed figures: its claims and numbers
    beside ours, and what the paper leaves open, filled in other ways."""
    text = _renewed("PAPER.md", text, "ledger", [*_claims(), "", *_numbers()])
    return _renewed("PAPER.md", text, "readings", _readings())


def _committed(name: str) -> dict:
    """figures/<profile>/<name>.csv as a DataFrame for every profile that has one, without overrides and but QUICK."""
    import pandas as pd

    files = sorted((paths.ROOT / "figures").glob(f"*/{name}.csv"))
    known = {file.stem for file in (paths.ROOT / "params").glob("*.yaml")} - {QUICK}
    files = [file for file in files if file.parent.name in known]
    return {file.parent.name: pd.read_csv(file, dtype={"eps": str}) for file in files}


def _claims() -> list[str]:
    """A row for each claim, a column for each profile: the verdict and at how many radii the claim holds."""
    found = _committed("claims")
    texts: dict[str, list[str]] = {}
    cells = {}
    for profile, table in found.items():
        for claim, part in table.groupby("claim"):
            texts.setdefault(claim, []).append(part["text"].iloc[0])
            count = f"{(part['holds'] == 'yes').sum()} of {len(part)} ε"
            cells[claim, profile] = f"{part['verdict'].iloc[0]} ({count})"
    heads = [
        f"`{name}`, {_seeds(table)}" + ("" if table["claimed"].all() else ", illustration")
        for name, table in found.items()
    ]
    lines = [_row(["claim", *heads]), "|---" * (len(heads) + 1) + "|"]
    for claim in sorted(texts):
        title = f"{claim}: {' / '.join(dict.fromkeys(texts[claim]))}"
        lines.append(_row([title, *(cells.get((claim, profile), "") for profile in found)]))
    return lines


def _numbers() -> list[str]:
    """How the cells of each table compare, then the rows that say most, ours ± half the interval [the paper's]."""
    from faithkd import ledger

    found = _committed("ledger")
    if not found:
        return ["No data set of the paper has been run to `figures/` yet, so no number stands beside the paper's here."]
    lines = [_row(["profile", "cells of", *("cells", *ledger.VERDICTS), "mean difference"]), "|---" * 8 + "|"]
    for profile, table in found.items():
        for row in ledger.summary(table).to_dict("records"):
            off = f"{row['off']:.1f} " + ("points" if row["unit"] == "%" else "%")
            lines.append(
                _row(
                    [
                        f"`{profile}`",
                        f"{row['table']}: {row['measure']}",
                        *(row[n] for n in ("cells", *ledger.VERDICTS)),
                        off,
                    ]
                )
            )
    methods = ("RT", "SD", "ARD", "RSLAD", "FD")
    lines += ["", _row(["profile, seeds", "ours ± 95 % of the mean [paper]", *methods]), "|---" * 7 + "|"]
    for profile, table in found.items():
        for title, part in _key_rows(table):
            values = {row["method"]: _beside(row) for row in part.to_dict("records")}
            lines.append(
                _row([f"`{profile}`, {_seeds(table)}", title, *(values.get(method, "–") for method in methods)])
            )
    return lines


def _key_rows(table):
    """The clean accuracies, Table 1 at the largest and Table 2 at the middle radius: yield (title, rows)."""
    radii = list(dict.fromkeys(table[table["table"] == "table2"]["eps"]))
    wanted = [
        ("accuracy", "accuracy", "0"),
        ("table1", "robust accuracy", radii[-1]),
        ("table1", "agreement", radii[-1]),
    ]
    wanted += [("table2", bound, radii[len(radii) // 2]) for bound in ("EmpLB", "FaithUB")]
    for name, measure, eps in wanted:
        part = table[(table["table"] == name) & (table["measure"] == measure) & (table["eps"] == eps)]
        yield f"{measure}{' (%)' if name != 'table2' else ''} at ε = {eps}", part


def _readings() -> list[str]:
    """A table for each data set of the paper: a line for each reading with what says most, and its distances."""
    from faithkd import ledger, tables

    lines = []
    for profile, table in _committed("readings").items():
        off = ledger.distances(table)
        if len(off) < 2:  # a data set that the paper does not use, or a profile without other readings
            continue
        eps = table["eps"].iloc[-1]
        shown = [("accuracy", "RT", "0")] + [
            ("robust accuracy", method, eps) for method in ("RT", "SD", "FD") if method in set(table["method"])
        ]
        heads = [f"{method}: {measure}" + (f", ε = {e}" if e != "0" else "") for measure, method, e in shown]
        lines += ["", _row([f"`{profile}`", *heads, *(f"off: {measure}" for measure in off)])]
        lines.append("|---" * (1 + len(heads) + len(off.columns)) + "|")
        for reading, distance in off.iterrows():
            part = table[table["reading"] == reading]
            cells = []
            for measure, method, e in shown:
                at = (part["measure"] == measure) & (part["method"] == method) & (part["eps"] == e)
                low, high = part["value"][at].min(), part["value"][at].max()
                cells.append(f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}")
            cells += [f"{value:.{3 if measure in tables.BOUNDS else 1}f}" for measure, value in distance.items()]
            lines.append(_row([f"`{reading}`" if "=" in reading else f"{reading}, all seeds", *cells]))
    return lines[1:] or ["No data set of the paper has been run with other readings yet."]


def _beside(row: dict) -> str:
    digits = 1 if row["unit"] == "%" else 3
    half = (row["high"] - row["low"]) / 2
    interval = f" ±{half:.{digits}f}" if half == half else ""  # one seed has none
    return f"{row['ours']:.{digits}f}{interval} [{row['paper']:.{digits}f}]"


def _seeds(table) -> str:
    count = table["seeds"].max()
    return f"{count} seed{'s' if count != 1 else ''}"


def _row(cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
