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
import subprocess
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from faithkd import errors, notebooks, parallel, paths, records
from faithkd.errors import FaithkdError

BAR_EVERY = 20.0  # seconds between two states of a progress bar where they cannot overwrite each other

app = typer.Typer(
    help="Faithful Knowledge Distillation, executable: run the notebooks, look at the parameters.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
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
    profile: Annotated[str, typer.Option(help="Which params/*.yaml.")] = "digits",
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
    from faithkd import params

    p = params.load(profile, settings or [])
    chosen = notebooks.pick(only or [])
    _share_out(jobs, cluster)
    folder = _runs_folder() / p.name
    if dry_run:
        _plan(p, chosen, folder, _open_retrain(folder) or "new" if retrain else None)
        return
    with _alone(folder):
        fresh = _start_retrain(folder) if retrain else None
        try:
            if retrain and not only:  # all networks are missing: one on each core, not one after another
                with _environment(FAITHKD_FRESH=fresh):
                    _train(p)
            executed = _execute_all(p, chosen, folder, fresh)
        except KeyboardInterrupt:
            print("\nstopped; nothing finished is lost: run the same command to go on", file=sys.stderr)
            raise typer.Exit(130) from None
        if retrain:
            (folder / "retrain.id").unlink()
        about = p.figures_dir / "provenance.json"
        if executed or not about.is_file():
            done, before = _done(folder), records.read(about, records.PROVENANCE, None)
            records.write(about, records.PROVENANCE, _provenance(p, done, before))
    _say_where(p, folder)


@app.command()
def train(
    profile: Annotated[str, typer.Option(help="Which params/*.yaml.")] = "digits",
    settings: Sets = None,
    jobs: Annotated[str | None, typer.Option(metavar="N", help="How many at once; without it one a core.")] = None,
) -> None:
    """Train all networks of a profile that are not there yet, several at once; `faithkd run` then finds them."""
    from faithkd import params

    p = params.load(profile, settings or [])
    _share_out(jobs, None)
    try:
        _train(p)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last epoch of each network", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command("params")
def show_params(profile: Annotated[str, typer.Argument(help="Which params/*.yaml.")] = "digits", settings: Sets = None):
    """Print every parameter of a profile with its value and the reason for it."""
    from faithkd import params

    table = params.describe(params.load(profile, settings or []))
    rows = [[str(row["name"]), str(row["value"]), str(row["reason"])] for _, row in table.iterrows()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, reason in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip())


@app.command("notebooks")
def committed(
    action: Annotated[str, typer.Argument(metavar="check|refresh", help="check, or execute and normalise.")],
    names: Annotated[list[str] | None, typer.Argument(help="Some of them: 09, 09-milp-bounds; none: all.")] = None,
) -> None:
    """Check the committed notebooks without executing them, or execute them again and write them back."""
    from faithkd import params

    if action == "refresh":
        notebooks.refresh(names or [])
    elif action != "check":
        raise FaithkdError(f"`faithkd notebooks {action}` does not exist; there are `check` and `refresh`")
    p = params.load(notebooks.PROFILE)
    chosen = notebooks.pick(names or [])
    complaints = [f"{path.name} {complaint}" for path in chosen for complaint in notebooks.check(path, p)]
    print("\n".join(complaints) or f"{len(chosen)} notebooks: executed, in order, not stale")
    if complaints:
        print("`make notebooks` executes them again", file=sys.stderr)
        raise typer.Exit(1)


def _train(p) -> None:
    from faithkd import experiment

    trained = experiment.train(p)
    print(f"{p.name}: {trained or 'no'} network{'' if trained == 1 else 's'} had to be trained", flush=True)


@app.command()
def handout(
    folder: Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")],
    names: Annotated[list[str] | None, typer.Argument(help="Notebooks: 02, 02-teacher; none: all.")] = None,
    solutions: Annotated[bool, typer.Option("--solutions", help="Keep the solutions: a teacher's copy.")] = False,
) -> None:
    """Copy notebooks for a course, without their solutions, with all their exercises on one sheet."""
    from faithkd import teaching

    chosen = notebooks.pick(names or [])
    count = teaching.handout(folder, chosen, solutions)
    kept = "with" if solutions else "without"
    print(f"{_short(folder)}: {_count(chosen, 'notebook')} {kept} solutions, exercises.md with {count} exercises")


def _share_out(jobs: str | None, cluster: str | None) -> None:
    """Tell the kernels who does the work, and find out now whether that will be possible."""
    if jobs is not None and cluster is not None:
        raise FaithkdError("--jobs counts processes on this machine, --cluster takes all workers of another: give one")
    if jobs is not None:
        os.environ["FAITHKD_JOBS"] = jobs
        os.environ.pop("FAITHKD_CLUSTER", None)
    if cluster is not None:
        os.environ["FAITHKD_CLUSTER"] = cluster
    parallel.check()


# --- what is done and what is to do


def _runs_folder() -> Path:
    return Path(os.environ.get("FAITHKD_RUNS") or paths.ROOT / "runs").absolute()


def _done(folder: Path) -> dict[str, records.Executed]:
    """The notebooks of a run's folder that were executed to their end."""
    return records.read(folder / "done.json", records.DONE, {})


def _is_done(path: Path, p, folder: Path, entry: records.Executed | None, fresh: str | None) -> bool:
    """Whether a notebook ran with the same code and parameters and its files are still as it wrote them."""
    if entry is None or entry.key != notebooks.stamp(path, p) or (fresh and entry.fresh != fresh):
        return False
    if not (folder / path.name).is_file():
        return False
    return all(_hash(p.figures_dir / name) == digest for name, digest in entry.files.items())


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if os.path.isfile(path) else None


def _expected(p, done: dict[str, records.Executed]) -> dict[str, float]:
    """Seconds that each notebook took before: in these runs, else when the committed figures were made."""
    places = (p.figures_dir.parent / name / "provenance.json" for name in (p.profile, p.name))
    made = [records.read(place, records.PROVENANCE, None) for place in places]
    before = next((about.seconds for about in reversed(made) if about and about.seconds), {})
    return before | {stem: entry.seconds for stem, entry in done.items()}


def _remaining(todo: list[str], expected: dict[str, float], took: dict[str, float]) -> float | None:
    """Seconds that `todo` will add, by earlier times at this run's pace, else by its mean; None: unknown."""
    known = [stem for stem in took if stem in expected]
    before = sum(expected[stem] for stem in known)
    pace = sum(took[stem] for stem in known) / before if before else 1.0
    guesses = [expected[stem] * pace for stem in todo if stem in expected]
    others = [*guesses, *took.values()]
    if not others:
        return None
    return sum(guesses) + (len(todo) - len(guesses)) * sum(others) / len(others)


def _plan(p, chosen: list[Path], folder: Path, fresh: str | None) -> None:
    done = _done(folder)
    todo = [path for path in chosen if not _is_done(path, p, folder, done.get(path.stem), fresh)]
    for path in chosen:
        print(f"{path.stem:<28} {'would run' if path in todo else 'already there'}")
    print(f"{len(todo)} of {len(chosen)} notebooks would run; tables and figures: {_short(p.figures_dir)}")
    if todo:
        print(_about(_remaining([path.stem for path in todo], _expected(p, done), {})))


# --- execution


def _execute_all(p, chosen: list[Path], folder: Path, fresh: str | None) -> int:
    """Execute what is not there yet, several notebooks at a time; returns how many that were."""
    done = _done(folder)
    todo = [path for path in chosen if not _is_done(path, p, folder, done.get(path.stem), fresh)]
    expected, took, begin, gone = _expected(p, done), {}, time.monotonic(), 0.0
    width = min(notebooks.at_once(), len(todo))

    def left() -> str:
        stems = [path.stem for path in todo if path.stem not in took]
        return f", {_about(_remaining(stems, expected, took))}" if stems else ""

    together = f", {width} at a time" if width > 1 else ""
    print(f"{p.name}: {_count(chosen, 'notebook')}, {len(todo)} to run{together}{left()}", flush=True)
    if not fresh and _open_retrain(folder):
        print("(an unfinished --retrain is waiting: add --retrain to go on with that instead)")
    places = {path.stem: f"[{number:>2}/{len(chosen)}] {path.stem:<26}" for number, path in enumerate(chosen, 1)}
    for path in chosen:
        if path not in todo:
            print(f"{places[path.stem]} already there, {_count(done[path.stem].files, 'file')}", flush=True)
    calls = [partial(_execute, path, p, folder, fresh, alone=width == 1) for path in todo]
    # closed, lest an interrupt in the loop's own lines leave the others running
    with contextlib.closing(parallel.run(calls, width, sample=0.0, here=True)) as finished:
        for number, entry in finished:
            path, before, gone = todo[number], gone, time.monotonic() - begin
            made = f"{_count(entry.files, 'file')} in {_clock(entry.seconds)}"
            took[path.stem] = entry.seconds = round(gone - before, 1)  # as several are executed at a time
            done[path.stem] = entry
            records.write(
                folder / "done.json", records.DONE, done
            )  # at once, so that a kill loses at most the notebooks in work
            print(f"{places[path.stem]} {notebooks.title(path)} · {made} · {_clock(gone)} gone{left()}", flush=True)
    return len(todo)


def _execute(path: Path, p, folder: Path, fresh: str | None, alone: bool) -> records.Executed:
    """Execute one notebook by papermill; returns its entry for done.json. `alone`: whether it has the terminal."""
    import papermill

    key, target, written = notebooks.stamp(path, p), folder / path.name, folder / f"{path.stem}.outputs"
    written.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        with _environment(
            FAITHKD_OUTPUTS=str(written),  # figures.save notes there what it wrote
            FAITHKD_FRESH=fresh,  # the store then takes nothing made outside this retraining
            MPLBACKEND=None,  # a user's own choice would leave the notebooks without pictures
        ):
            papermill.execute_notebook(
                path,
                target,
                {"profile": p.profile, "overrides": p.overrides},
                **notebooks.execution(),
                cwd=path.parent,
                progress_bar=False,
                start_timeout=300,
                stderr_file=_Relay(sys.stderr) if alone else _Relay(sys.stderr, f"{path.stem[:2]} | "),
            )
    except papermill.PapermillExecutionError as error:
        raise _failed(path, target, error) from None
    except RuntimeError as error:  # of jupyter: a kernel that does not start, or ends
        if "Kernel" not in str(error):
            raise
        print(f"error: {path.stem}: its kernel died (out of memory?): {error}\n{_resume(target)}", file=sys.stderr)
        raise typer.Exit(1) from None
    lines = written.read_text(encoding="utf-8").splitlines() if written.is_file() else []
    written.unlink(missing_ok=True)
    files = sorted({os.path.relpath(json.loads(line)["path"], p.figures_dir) for line in lines})
    hashes = {Path(name).as_posix(): _hash(p.figures_dir / name) for name in files}
    return records.Executed(key=key, fresh=fresh, seconds=round(time.monotonic() - start, 1), files=hashes)


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


class _Relay:
    """A kernel's stderr (bars of long trainings, warnings): live on a terminal, now and then in a log.

    `name`: put before every line where several kernels share the terminal, which then is treated like a log.
    """

    def __init__(self, stream, name: str = ""):
        self.stream, self.live, self.name = stream, stream.isatty() and not name, name
        self.line, self.shown = "", time.monotonic()

    def write(self, text: str) -> None:
        if self.live:
            self.stream.write(text)
            return
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self._show(line)
        if time.monotonic() - self.shown > BAR_EVERY:
            self._show(self.line)
            self.line = ""

    def _show(self, line: str) -> None:
        pieces = [piece for piece in line.split("\r") if piece.strip()]  # all but the last were overwritten
        if pieces:
            self.stream.write(f"{self.name}{pieces[-1].rstrip()}\n")
            self.shown = time.monotonic()

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def _environment(**variables: str | None):
    """Environment variables for the kernels started inside; None removes one."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _alone(folder: Path):
    """Hold the run folder's lock; a second run of the same profile says so and waits."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another run of {folder.name} is at work; waiting until it ends", flush=True)
        lock.acquire()
    except OSError as error:
        raise FaithkdError(f"cannot write to {folder} ({error.strerror}): set FAITHKD_RUNS to a folder") from None
    try:
        yield
    finally:
        lock.release()


def _open_retrain(folder: Path) -> str | None:
    """The name of a retraining that was begun and not finished."""
    path = folder / "retrain.id"
    name = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    return name if re.fullmatch(r"[0-9a-f]{12}", name) else None


def _start_retrain(folder: Path) -> str:
    """The name of this retraining: new, or that of one that was stopped, whose finished pieces then count."""
    begun = _open_retrain(folder)
    if begun:
        print("going on with the --retrain that was stopped")
        return begun
    name = uuid.uuid4().hex[:12]
    (folder / "retrain.id").write_text(name, encoding="utf-8")
    return name


# --- what a run leaves behind


def _provenance(p, done: dict, before: records.Provenance | None) -> records.Provenance:
    """What made the figures: parameters, versions, machine, seconds that each notebook added to its run.

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
    git = ["git", "-C", str(paths.ROOT)]
    changed = ["status", "--porcelain", "faithkd", "notebooks", "params"]
    options = {"capture_output": True, "text": True, "check": True}
    try:
        head, status = (subprocess.run([*git, *what], **options) for what in (["rev-parse", "HEAD"], changed))
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _say_where(p, folder: Path) -> None:
    made = sorted({path.stem for path in p.figures_dir.glob("*") if re.match(r"(fig|table)\d", path.name)})
    print(f"tables and figures: {_short(p.figures_dir)} ({', '.join(made) or 'none'})")
    print(f"executed notebooks: {_short(folder)}")


def _short(path: Path) -> str:
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "how long is not known yet"
    return f"about {round(seconds / 60)} min left" if seconds > 90 else f"about {round(seconds) or 1} s left"


def _count(things, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


# --- surroundings


@app.command()
def doctor() -> None:
    """Print what there is: Python, torch and its device, solvers, processes, cluster, image sets, store."""
    print(f"python    {platform.python_version()} at {sys.prefix}")
    print(f"faithkd   {_version('faithkd') or 'not installed'}, repository {paths.ROOT}")
    print(f"torch     {_torch()}")
    print(f"highs     {_version('highspy') or 'missing: pip install highspy'}")
    print(f"gurobi    {_gurobi()}")
    print(f"jobs      {_jobs()}")
    print(f"cluster   {_cluster()}")
    print(f"data      {_data()}")
    from faithkd import store

    files = [path for path in Path(store.root()).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"store     {store.root()}: {_count(files, 'file')}, {size / 1e6:.1f} MB")


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
        return f"{version}, " + (
            "size-limited licence (2,000 variables): tiny nets only" if small else f"no licence ({error})"
        )
    return f"{version}, full licence"


def _jobs() -> str:
    try:
        count = parallel.jobs()
    except FaithkdError as error:
        return str(error)
    whose = "as FAITHKD_JOBS says" if os.environ.get("FAITHKD_JOBS") else "one on each core"
    return f"{count} process{'es' * (count > 1)}, {whose}"


def _cluster() -> str:
    version = _version("distributed")
    there = f"distributed {version}" if version else "distributed is not installed: pip install 'faithkd[cluster]'"
    try:
        return f"{parallel.cluster() or 'none'}; {there}"
    except FaithkdError as error:
        return f"{error}; {there}"


def _data() -> str:
    given = os.environ.get("FAITHKD_DATA")
    if not given:
        return "digits, embedded; the others are downloaded when needed (or set FAITHKD_DATA)"
    places = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "cifar10.npz"}
    found = [name for name, place in places.items() if (Path(given) / place).exists()]
    return f"digits, embedded; in FAITHKD_DATA={given}: {', '.join(found) or 'nothing'}"


if __name__ == "__main__":
    main()
