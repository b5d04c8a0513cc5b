"""The command line. Everything heavy is imported inside the functions: help and a mistyped parameter answer at once."""

import contextlib
import errno
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from faithkd import paths, workers
from faithkd.errors import FaithkdError

try:
    import typer

    from faithkd.pairs.command import bound
    from faithkd.reproduce import notebooks
except ModuleNotFoundError as missing:
    sys.exit(f"faithkd: {missing.name} is not installed; the command line needs pip install 'faithkd[notebooks]'")

app = typer.Typer(
    help="Faithful Knowledge Distillation, executable: run the notebooks, look at the parameters.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(bound)
Profile = Annotated[str, typer.Option(help="Which params/*.yaml.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; repeatable.")]
Jobs = Annotated[str | None, typer.Option(metavar="N", help="How many processes; without it one on each core.")]
Cluster = Annotated[str | None, typer.Option(metavar="ADDRESS", help="A dask scheduler whose workers work instead.")]
Retrain = Annotated[bool, typer.Option("--retrain", help="Use nothing that was computed or trained before.")]


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a full disk exit code 1."""
    try:
        app()
    except FaithkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except notebooks.CellFailed as failed:
        print(f"\nerror: {failed}", file=sys.stderr)
        sys.exit(2 if failed.mistake else 1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or error.filename):
            raise
        remedy = "make room" if full else "correct the folder or its permissions, or name another one"
        print(f"error: {error.filename or 'while writing'}: {error.strerror}; {remedy}", file=sys.stderr)
        sys.exit(1 if full else 2)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
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
    retrain: Retrain = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure everything anew and compare it with what is committed.")
    ] = False,
    jobs: Jobs = None,
    cluster: Cluster = None,
) -> None:
    """Execute the notebooks: tables and figures to figures/<profile>/, the notebooks to runs/<profile>/."""
    p, chosen = _load(profile, settings), notebooks.pick(only or [])
    _share_out(jobs, cluster)
    folder = _start_anew("retrain" if retrain else "remeasure" if remeasure else "") / p.name
    record = notebooks.Record(folder / "done.json")
    todo = [path for path in chosen if not record.has(path, p)]
    if dry_run:
        for path in chosen:
            print(f"{path.stem:<28} {'would run' if path in todo else 'already there'}")
        print(f"{len(todo)} of {len(chosen)} notebooks would run; tables and figures: {_short(p.figures_dir)}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    from faithkd.reproduce import artefacts

    artefacts.warn_of_old_store()
    with artefacts.alone(f"run-{p.name}", f"at work on {p.name}"), _stops_politely():
        if retrain and not only:  # all networks are missing: one on each core, not one after another
            _train(p)
        elif remeasure or (todo and not only and (paths.ROOT / "measurements" / profile).is_dir()):
            _compare(p, remeasure)
        print(f"{p.name}: {_count(chosen, 'notebook')}, {len(todo)} to run", flush=True)
        changed = False
        for number, path in enumerate(chosen, 1):
            print(f"[{number:>2}/{len(chosen)}] {path.stem:<26}", end=" ", flush=True)
            if path in todo:
                seconds, made, wrote = notebooks.execute(path, p, folder)
                record.add(path, p, seconds, made)
                changed = changed or wrote
                print(f"{notebooks.title(path)} · {_count(made, 'file')} in {seconds:.0f} s", flush=True)
            else:
                print("already there", flush=True)
        about = p.figures_dir / "provenance.json"
        if changed or not about.is_file():
            notebooks.write_json(about, _provenance(p, record, notebooks.read_json(about)))
    made = sorted({path.stem for path in p.figures_dir.glob("*") if re.match(r"(fig|table)\d", path.name)})
    print(f"tables and figures: {_short(p.figures_dir)} ({', '.join(made) or 'none'})")
    print(f"executed notebooks: {_short(folder)}")


@app.command()
def train(profile: Profile = "digits", settings: Sets = None, jobs: Jobs = None) -> None:
    """Train all networks of a profile that are not there yet, several at once; `faithkd run` then finds them."""
    p = _load(profile, settings)
    _share_out(jobs, None)
    with _stops_politely():
        _train(p)


@app.command()
def keep(
    profile: Profile = "digits",
    settings: Sets = None,
    retrain: Retrain = False,
    jobs: Jobs = None,
    cluster: Cluster = None,
) -> None:
    """Train and measure all that a profile shows, and gather it in weights/ and measurements/, to be committed."""
    p = _load(profile, settings)
    _share_out(jobs, cluster)
    _start_anew("retrain" if retrain else "")
    from faithkd.reproduce import experiment

    with _stops_politely():
        for name in experiment.keep(p):
            print(f"{p.name}: {name}: measured and kept", flush=True)


@app.command("params")
def show_params(profile: Annotated[str, typer.Argument(help="Which params/*.yaml.")] = "digits", settings: Sets = None):
    """Print every parameter of a profile with its value and the reason for it."""
    rows = _load(profile, settings).described()
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, reason in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip())


@app.command("notebooks")
def committed(
    action: Annotated[str, typer.Argument(metavar="check|refresh", help="check, or execute and normalise.")],
    names: Annotated[list[str] | None, typer.Argument(help="Some of them: 09, 09-milp-bounds; none: all.")] = None,
) -> None:
    """Check the committed notebooks without executing them, or execute them again and write them back."""
    if action == "refresh":
        from faithkd.report import pages

        notebooks.refresh(names or [])
        pages.renew(notebooks.listing())
    elif action != "check":
        raise FaithkdError(f"`faithkd notebooks {action}` does not exist; there are `check` and `refresh`")
    p, chosen = _load(notebooks.PROFILE, None), notebooks.pick(names or [])
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


@app.command()
def doctor() -> None:
    """Print what there is: versions, device, processes, image sets, store."""
    import torch

    from faithkd.reproduce import artefacts

    size = sum(path.stat().st_size for path in artefacts.root().rglob("*") if path.is_file())
    print(f"python    {platform.python_version()} at {sys.prefix}")
    print(f"faithkd   {_version('faithkd') or 'not installed'}, repository {paths.ROOT}")
    print(f"torch     {torch.__version__} on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    for name in ("torchvision", "highspy", "gurobipy", "distributed"):
        print(f"{name:<9} {_version(name) or 'not installed'}")
    print(f"jobs      {workers.jobs()} processes at a time")
    print(f"data      {os.environ.get('FAITHKD_DATA') or 'digits, embedded; the others are downloaded when needed'}")
    print(f"store     {artefacts.root()}: {size / 1e6:.1f} MB")


# --- what the commands share


def _load(profile: str, settings: list[str] | None):
    from faithkd.reproduce import params

    return params.load(profile, settings or [])


def _train(p) -> None:
    from faithkd.reproduce import experiment

    trained = experiment.train(p)
    print(f"{p.name}: {trained or 'no'} network{'' if trained == 1 else 's'} had to be trained", flush=True)


def _compare(p, everything: bool) -> None:
    """Measure one seed anew, or everything: exit code 1 where what is committed is something else."""
    from faithkd.reproduce import experiment

    found, complaints = experiment.compare(p, everything)
    print(found or f"{p.name}: no committed measurements to compare with", flush=True)
    if complaints:
        print("error: these differ from the committed measurements by more than rounding:", file=sys.stderr)
        print("\n".join(f"  {path}" for path in complaints), file=sys.stderr)
        raise typer.Exit(1)


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


def _start_anew(what: str) -> Path:
    """The folder of runs; to retrain or remeasure one of its own, with a store of its own, found again after a kill."""
    runs = Path(os.environ.get("FAITHKD_RUNS") or paths.ROOT / "runs").absolute()
    if runs.exists() and not runs.is_dir():
        raise FaithkdError(f"FAITHKD_RUNS is {runs}, which is no folder; name one, or unset it")
    if what:
        from faithkd.reproduce import artefacts

        os.environ["FAITHKD_STORE"] = store = str(artefacts.root() / what)
        os.environ["FAITHKD_FRESH"] = "measurements" if what == "remeasure" else "1"
        print(f"working in {_short(Path(store))} and {_short(runs / what)}: remove both to begin once more")
    return runs / what


@contextlib.contextmanager
def _stops_politely():
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; nothing finished is lost: run the same command to go on", file=sys.stderr)
        raise typer.Exit(130) from None


def _provenance(p, record: notebooks.Record, before: dict) -> dict:
    """What made the figures: parameters, versions, machine, seconds of each notebook, also of earlier runs."""
    params = p.model_dump(mode="json")
    seconds = before.get("seconds", {}) | {stem: entry["seconds"] for stem, entry in record.entries.items()}
    versions = {name: _version(name) for name in ("faithkd", "torch", "numpy", "cvxpy", "highspy")}
    return {
        "profile": p.profile,
        "name": p.name,
        "overrides": p.overrides,
        "seed": p.seed,
        "params": params,
        "versions": {"python": platform.python_version(), **versions},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": _commit(),
        "seconds": {path.stem: seconds[path.stem] for path in notebooks.listing() if path.stem in seconds},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source folder that is not installed
        return None


def _commit() -> str | None:
    """The commit of the repository, with a + when the code differs from it; None outside a repository."""
    command = ["git", "-C", str(paths.ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, no repository, or no commit yet
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def _short(path: Path) -> str:
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def _count(things, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


if __name__ == "__main__":
    main()
