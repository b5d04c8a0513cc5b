"""What the benchmarks share: what the numbers rest on, and how they are written."""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from faithkd import params
from faithkd.errors import FaithkdError

RESULTS = Path(__file__).parent / "results"
INSTALLED = {package.name: package.version for package in metadata.distributions()}

OnlyReport = Annotated[bool, typer.Option("--report", help="Only write tables and plots anew.")]
Out = Annotated[Path, typer.Option(help="Where the results go.")]


def facts(p: params.Params, peers: Sequence[str] = ()) -> dict:
    """What the numbers rest on, without anything that names a machine or a person."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    versions = {name: INSTALLED[name] for name in ("torch", "numpy", "cvxpy", "highspy", *peers) if name in INSTALLED}
    return {
        "profile": p.profile,
        "overrides": {name: str(value) for name, value in p.overrides.items()},
        "seed": p.seed,
        "processor": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | versions,
    }


def conditions(told: dict) -> str:
    """Profile, changed parameters and machine in a few words, from `facts`."""
    changed = "".join(f", {name}={value}" for name, value in told["overrides"].items())
    return f"profile {told['profile']}{changed}; {told['processor']}, {told['cores']} cores"


def pipes(lines: list[dict[str, str]], left: int = 1) -> str:
    """A markdown table, its first `left` columns left-aligned."""
    table = pd.DataFrame(lines).fillna("")
    rule = ["---"] * left + ["---:"] * (table.shape[1] - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(table), rule, *table.to_numpy().tolist()])


def save(path: Path, content: pd.DataFrame | str) -> None:
    """A frame as CSV, a text as it is; the same bytes on every system."""
    text = content if isinstance(content, str) else content.to_csv(index=False, lineterminator="\n")
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline="\n")


def start(main: Callable) -> None:
    """Run a command on one thread; what a user can mend is one line, without a traceback."""
    torch.set_num_threads(1)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except FaithkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
