"""What the benchmarks share: who can take part, what the numbers rest on, and how they are written."""

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
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

Profile = Annotated[str, typer.Option(help="Which params/*.yaml.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; repeatable.")
]
OnlyReport = Annotated[bool, typer.Option("--report", help="Only write tables and plots anew.")]
Out = Annotated[Path, typer.Option(help="Where the results go.")]


@dataclass(frozen=True)
class Contender:
    """`what` it is in a table, a peer's `package` and how to `install` it; if it takes a budget, gets few images."""

    what: str
    package: str = ""
    install: str = ""
    anytime: bool = False
    slow: bool = False


def taking_part(names: str, known: dict[str, Contender], always: str) -> list[str]:
    """Those of `names`, given by commas, that are there, after `always`; prints who is not, and how to install it."""
    there = [always]
    for name in names.split(","):
        if name not in known:
            raise FaithkdError(f"unknown contender {name!r}: choose from {', '.join(known)}")
        package, install = known[name].package, known[name].install
        if package and package not in INSTALLED:
            print(f"without {name}: {package} is not installed: {install or f'pip install {package}'}")
        else:
            there.append(name)
    return list(dict.fromkeys(there))


def facts(p: params.Params, contenders: dict[str, Contender]) -> dict:
    """What the numbers rest on, without anything that names a machine or a person."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    peers = [contender.package for contender in contenders.values()]
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
