"""The command line; `faithkd run` executes the notebooks by papermill and skips what is already there.

Everything heavy is imported inside the functions, so that `faithkd --help` and a mistyped parameter answer at
once.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

from faithkd import errors, paths, workers
from faithkd.errors import FaithkdError

try:
    import typer

    from faithkd.reproduce import notebooks, records
except ModuleNotFoundError as missing:
    sys.exit(f"faithkd: {missing.name} is not installed; the command line needs pip install 'faithkd[notebooks]'")

app = typer.Typer(
    help="Faithful Knowledge Distillation, executable: run the notebooks, look at the parameters.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Profile = Annotated[str, typer.Option(help="Which params/*.yaml.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; repeatable.")]


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a full disk exit code 1."""
    try:
        app()
    except FaithkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or error.filename):
            raise
        remedy = "make room" if full else "correct the folder or its permissions, or name another one"
        print(f"error: {error.filename or 'while writing'}: {error.strerror}; {remedy}", file=sys.stderr)
        sys.exit(1 if full else 2)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"faithkd {_version('faithkd') or '(not installed)'}")
        raise typer.Exit
    for name in ("FAITHKD_DATA", "FAITHKD_HOME", "FAITHKD_RUNS", "FAITHKD_STORE"):
        if os.environ.get(name):  # kernels start in notebooks/, where a relative folder would be another one
            os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())


@app.command()
def run(
    profile: Profile = "digits",
    settings: Sets = None,
    only: Annotated[list[str] | None, typer.Option(help="A notebook (09, or 09-milp-bounds); repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Use nothing that was computed or trained before.")
    ] = False,
    jobs: Annotated[
        str | None, typer.Option(metavar="N", help="Processes for bounds and attacks; without it one on each core.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A dask scheduler whose workers do that work instead.")
    ] = None,
) -> None:
    """Execute the notebooks: tables and figures to figures/<profile>/, the notebooks to runs/<profile>/."""
    from faithkd.reproduce import params

    p = params.load(profile, settings or [])
    chosen = notebooks.pick(only or [])
    _share_out(jobs, cluster)
    folder = Path(os.environ.get("FAITHKD_RUNS") or paths.ROOT / "runs").absolute() / p.name
    record = folder / ("retrain.json" if retrain else "done.json")
    if dry_run:
        done = records.read(record, records.DONE, {})
        todo = [path for path in chosen if not _is_done(path, p, folder, done.get(path.stem))]
        for path in chosen:
            print(f"{path.stem:<28} {'would run' if path in todo else 'already there'}")
        print(f"{len(todo)} of {len(chosen)} notebooks would run; tables and figures: {_short(p.figures_dir)}")
        return
    _make_folder(folder)
    from faithkd.reproduce import artefacts

    artefacts.warn_of_old_store()
    with artefacts.alone(f"run-{p.name}", f"at work on {p.name}"), _stops_politely("nothing finished is lost"):
        with _anew(folder, record) if retrain else contextlib.nullcontext():
            if retrain and not only:  # all networks are missing: one on each core, not one after another
                _train(p)
            changed = _execute_all(p, chosen, folder, record)
        if retrain:
            done = records.read(folder / "done.json", records.DONE, {}) | records.read(record, records.DONE, {})
            records.write(folder / "done.json", records.DONE, done)
            record.unlink()
        about = p.figures_dir / "provenance.json"
        if changed or not about.is_file():
            done = records.read(folder / "done.json", records.DONE, {})
            before = records.read(about, records.PROVENANCE, None)
            records.write(about, records.PROVENANCE, _provenance(p, done, before))
    made = sorted({path.stem for path in p.figures_dir.glob("*") if re.match(r"(fig|table)\d", path.name)})
    print(f"tables and figures: {_short(p.figures_dir)} ({', '.join(made) or 'none'})")
    print(f"executed notebooks: {_short(folder)}")


@app.command()
def train(
    profile: Profile = "digits",
    settings: Sets = None,
    jobs: Annotated[str | None, typer.Option(metavar="N", help="How many at once; without it one a core.")] = None,
) -> None:
    """Train all networks of a profile that are not there yet, several at once; `faithkd run` then finds them."""
    from faithkd.reproduce import params

    p = params.load(profile, settings or [])
    _share_out(jobs, None)
    from faithkd.reproduce import artefacts

    artefacts.warn_of_old_store()
    with _stops_politely("each network goes on from its last epoch"):
        _train(p)


@app.command("params")
def show_params(profile: Annotated[str, typer.Argument(help="Which params/*.yaml.")] = "digits", settings: Sets = None):
    """Print every parameter of a profile with its value and the reason for it."""
    from faithkd.reproduce import params

    rows = params.describe(params.load(profile, settings or []))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, reason in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip())


@app.command("notebooks")
def committed(
    action: Annotated[str, typer.Argument(metavar="check|refresh", help="check, or execute and normalise.")],
    names: Annotated[list[str] | None, typer.Argument(help="Some of them: 09, 09-milp-bounds; none: all.")] = None,
) -> None:
    """Check the committed notebooks without executing them, or execute them again and write them back."""
    from faithkd.reproduce import params

    if action == "refresh":
        from faithkd.report import pages

        notebooks.refresh(names or [])
        pages.renew(notebooks.listing())
    elif action != "check":
        raise FaithkdError(f"`faithkd notebooks {action}` does not exist; there are `check` and `refresh`")
    p = params.load(notebooks.PROFILE)
    chosen = notebooks.pick(names or [])
    complaints = [f"{path.name} {complaint}" for path in chosen for complaint in notebooks.check(path, p)]
    print("\n".join(complaints) or f"{len(chosen)} notebooks: executed, in order, not stale")
    if complaints:
        print("`make notebooks` executes them again", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def handout(
    folder: Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")],
    names: Annotated[list[str] | None, typer.Argument(help="Notebooks: 02, 02-teacher; none: all.")] = None,
    solutions: Annotated[bool, typer.Option("--solutions", help="Keep the solutions: a teacher's copy.")] = False,
) -> None:
    """Copy notebooks for a course, with stubs in place of solutions, and all their exercises on one sheet."""
    from faithkd.reproduce import teaching

    chosen = notebooks.pick(names or [])
    count = teaching.handout(folder, chosen, solutions)
    kept = "with" if solutions else "without"
    print(f"{_short(folder)}: {_count(chosen, 'notebook')} {kept} solutions, exercises.md with {count} exercises")


def _train(p) -> None:
    from faithkd.reproduce import experiment

    trained = experiment.train(p)
    print(f"{p.name}: {trained or 'no'} network{'' if trained == 1 else 's'} had to be trained", flush=True)


def _share_out(jobs: str | None, cluster: str | None) -> None:
    """Tell the kernels who does the work, and find out now whether that will be possible."""
    if jobs is not None and cluster is not None:
        raise FaithkdError("--jobs counts processes on this machine, --cluster takes all workers of another: give one")
    if jobs is not None:
        os.environ["FAITHKD_JOBS"] = jobs
        os.environ.pop("FAITHKD_CLUSTER", None)
    if cluster is not None:
        os.environ["FAITHKD_CLUSTER"] = cluster
    workers.check()


# --- execution


def _is_done(path: Path, p, folder: Path, entry: records.Executed | None) -> bool:
    """Whether a notebook ran with the same code and parameters and its files are still as it wrote them."""
    if entry is None or entry.key != notebooks.run_key(path, p) or not (folder / path.name).is_file():
        return False
    return all(_hash(p.figures_dir / name) == digest for name, digest in entry.files.items())


def _hash(path: Path) -> str | None:
    """A digest of a table's numbers; of a picture, which is drawn from them, whether it is there."""
    if not os.path.isfile(path):
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".csv" else "there"


def _execute_all(p, chosen: list[Path], folder: Path, record: Path) -> bool:
    """Execute what is not there yet, several notebooks at a time; whether any file of figures/ changed."""
    done = records.read(record, records.DONE, {})
    todo = [path for path in chosen if not _is_done(path, p, folder, done.get(path.stem))]
    width, begin, gone, changed = min(notebooks.at_once(), len(todo)), time.monotonic(), 0.0, False
    together = f", {width} at a time" if width > 1 else ""
    print(f"{p.name}: {_count(chosen, 'notebook')}, {len(todo)} to run{together}", flush=True)
    if record.name == "done.json" and (folder / "retrain.json").is_file():
        print("(an unfinished --retrain is waiting: add --retrain to go on with that instead)")
    places = {path.stem: f"[{number:>2}/{len(chosen)}] {path.stem:<26}" for number, path in enumerate(chosen, 1)}
    for path in chosen:
        if path not in todo:
            print(f"{places[path.stem]} already there, {_count(done[path.stem].files, 'file')}", flush=True)
    calls = [partial(_execute, path, p, folder, alone=width == 1) for path in todo]
    # closed, lest an interrupt in the loop's own lines leave the others running
    with contextlib.closing(workers.run(calls, width, sample=0.0, here=True)) as finished:
        for number, (entry, wrote) in finished:
            path, before, gone = todo[number], gone, time.monotonic() - begin
            made = f"{_count(entry.files, 'file')} in {_clock(entry.seconds)}"
            entry.seconds = round(gone - before, 1)  # as several are executed at a time: what it added to the run
            done[path.stem], changed = entry, changed or wrote
            records.write(record, records.DONE, done)  # at once, so that a kill loses at most the notebooks in work
            print(f"{places[path.stem]} {notebooks.title(path)} · {made} · {_clock(gone)} gone", flush=True)
    return changed


def _execute(path: Path, p, folder: Path, alone: bool) -> tuple[records.Executed, bool]:
    """Execute one notebook by papermill: its entry for done.json, and whether it changed a file of figures/.

    `alone`: whether what its kernel says goes to the terminal; else it goes to a file beside the executed notebook.
    """
    import papermill

    key, target, written = notebooks.run_key(path, p), folder / path.name, folder / f"{path.stem}.outputs"
    written.unlink(missing_ok=True)
    start = time.monotonic()
    environment = {
        "FAITHKD_OUTPUTS": str(written),  # figures.save notes there what it made
        "MPLBACKEND": None,  # a user's own choice would leave the notebooks without pictures
    }
    parameters = {"profile": p.profile, "overrides": p.overrides}
    options = {"cwd": path.parent, "progress_bar": False, "start_timeout": 300, **notebooks.execution()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(**environment))
        said = sys.stderr if alone else stack.enter_context(open(target.with_suffix(".log"), "w", encoding="utf-8"))
        try:
            papermill.execute_notebook(path, target, parameters, stderr_file=said, **options)
        except papermill.PapermillExecutionError as error:
            raise _failed(path, target, error) from None
        except RuntimeError as error:  # of jupyter: a kernel that does not start, or ends
            if "Kernel" not in str(error):
                raise
            print(f"error: {path.stem}: its kernel died (out of memory?): {error}\n{_resume(target)}", file=sys.stderr)
            raise typer.Exit(1) from None
    notes = [json.loads(line) for line in written.read_text("utf-8").splitlines()] if written.is_file() else []
    written.unlink(missing_ok=True)
    files = sorted({Path(os.path.relpath(note["path"], p.figures_dir)).as_posix() for note in notes})
    hashes = {name: _hash(p.figures_dir / name) for name in files}
    entry = records.Executed(key=key, seconds=round(time.monotonic() - start, 1), files=hashes)
    return entry, any(note["written"] for note in notes)


def _failed(path: Path, target: Path, error) -> Exception:
    """Tell what went wrong in a cell; returns what to raise: exit code 2 for a user's mistake, else 1."""
    mistake = hasattr(errors, error.ename)
    where = f"{path.stem}, cell [{error.exec_count}]"
    if mistake:
        print(f"error: {error.evalue}\n  in {where}", file=sys.stderr)
    else:
        last = (error.evalue.strip().splitlines() or [""])[-1]
        print(f"error: {where}: {error.ename}: {last}", file=sys.stderr)
    print(_resume(target), file=sys.stderr)
    return typer.Exit(2 if mistake else 1)


def _resume(target: Path) -> str:
    return (
        f"  the notebook as far as it got, with the whole message: {_short(target)}\n"
        "  finished work is kept: once the cause is mended, the same command goes on from here"
    )


@contextlib.contextmanager
def _stops_politely(kept: str):
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; {kept}: run the same command to go on", file=sys.stderr)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _anew(folder: Path, record: Path):
    """A store of its own for a retraining, also over kills; at its end all of it replaces what was in the store."""
    from faithkd.reproduce import artefacts

    store, scratch = artefacts.root(), artefacts.root() / "retrain" / folder.name
    if record.is_file():
        print("going on with the --retrain that was stopped")
    else:
        shutil.rmtree(scratch, ignore_errors=True)
        records.write(record, records.DONE, {})
    with _environment(FAITHKD_STORE=str(scratch), FAITHKD_FRESH="1"):
        yield
    for file in sorted(scratch.rglob("*.*")):
        if file.is_file() and ".locks" not in file.parts:
            target = store / file.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _environment(**variables: str | None):
    """Environment variables for what is started inside; None removes one."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    for name in [name for name, value in variables.items() if value is None]:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FaithkdError(f"cannot write to {folder} ({error.strerror}): set FAITHKD_RUNS to a folder") from None


# --- what a run leaves behind


def _provenance(p, done: dict[str, records.Executed], before: records.Provenance | None) -> records.Provenance:
    """What made the figures: parameters, versions, machine, seconds that each notebook took.

    `before`: what was said of the same figures so far; where the parameters were the same, the notebooks that only an
    earlier run executed, perhaps in another clone, keep their seconds.
    """
    params = p.model_dump(mode="json")
    earlier = before.seconds if before and before.params == params else {}
    seconds = earlier | {stem: entry.seconds for stem, entry in done.items()}
    versions = {name: _version(name) for name in ("faithkd", "torch", "numpy", "cvxpy", "highspy")}
    return records.Provenance(
        profile=p.profile,
        name=p.name,
        overrides=p.overrides,
        seed=p.seed,
        params=params,
        versions={"python": platform.python_version(), **versions},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        commit=_commit(),
        seconds={path.stem: seconds[path.stem] for path in notebooks.listing() if path.stem in seconds},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source folder that is not installed
        return None


def _commit() -> str | None:
    """The commit of the repository, with a + when the code differs from it; None outside a repository."""
    if not (paths.ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(paths.ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None


def _short(path: Path) -> str:
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _count(things, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


# --- surroundings


@app.command()
def doctor() -> None:
    """Print what there is: Python, torch and its device, solvers, processes, cluster, image sets, store."""
    from faithkd.reproduce import artefacts

    print(f"python    {platform.python_version()} at {sys.prefix}")
    print(f"faithkd   {_version('faithkd') or 'not installed'}, repository {paths.ROOT}")
    print(f"torch     {_torch()}")
    print(f"highs     {_version('highspy') or 'missing: pip install highspy'}")
    print(f"gurobi    {_gurobi()}")
    print(f"jobs      {_told(workers.jobs)} processes at a time")
    print(f"cluster   {_told(workers.cluster) or 'none'}; distributed {_version('distributed') or 'is not installed'}")
    print(f"data      {_data()}")
    files = [path for path in artefacts.root().rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"store     {artefacts.root()}: {_count(files, 'file')}, {size / 1e6:.1f} MB")


def _told(ask) -> str:
    try:
        return ask()
    except FaithkdError as error:
        return str(error)


def _torch() -> str:
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch
        return f"cannot be imported ({error}): install torch and torchvision together, from one source"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    threads = f"{torch.get_num_threads()} threads"
    return f"{torch.__version__} on {device}, {threads}; torchvision {torchvision.__version__}"


def _gurobi() -> str:
    """Whether Gurobi is there and whether its licence takes models of more than 2,000 variables."""
    try:
        import gurobipy
    except ImportError:
        return "not installed; HiGHS does the same, only slower"
    version = ".".join(map(str, gurobipy.gurobi.version()))
    try:
        with gurobipy.Env(params={"OutputFlag": 0}) as env, gurobipy.Model(env=env) as model:
            model.addVars(2001)
            model.optimize()
    except gurobipy.GurobiError as error:
        small = error.errno == gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED
        return f"{version}, {'size-limited licence (2,000 variables): tiny nets only' if small else error}"
    return f"{version}, full licence"


def _data() -> str:
    given = os.environ.get("FAITHKD_DATA")
    if not given:
        return "digits, embedded; the others are downloaded when needed (or set FAITHKD_DATA)"
    places = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "cifar10.npz"}
    found = [name for name, place in places.items() if (Path(given) / place).exists()]
    return f"digits, embedded; in FAITHKD_DATA={given}: {', '.join(found) or 'nothing'}"


if __name__ == "__main__":
    main()
