"""What the benchmarks share: who can take part, what the numbers rest on, and how they are written."""

import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor

from faithkd.errors import FaithkdError
from faithkd.params import Params

RESULTS = Path(__file__).parent / "results"

Profile = Annotated[str, typer.Option(help="Which params/*.yaml.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; repeatable.")
]
Out = Annotated[Path, typer.Option(help="Where the results go.")]


@dataclass(frozen=True)
class Contender:
    """`what` it is in a table; a peer has the `package` that it comes in, and what to say of how to install it.

    `anytime`: takes a budget in seconds an image; `slow`: gets few images; `labels`: attacks the cross-entropy only.
    """

    what: str
    package: str = ""
    install: str = ""
    anytime: bool = False
    slow: bool = False
    labels: bool = False

    @property
    def absent(self) -> str:
        """Why it cannot take part, "" if it can."""
        if not self.package or version(self.package):
            return ""
        return f"{self.package} is not installed: {self.install or f'pip install {self.package}'}"


def taking_part(names: str, known: dict[str, Contender], always: list[str]) -> list[str]:
    """Those of `names`, given by commas, that are there, after `always`; prints who is not, and how to install it."""
    asked = names.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise FaithkdError(f"unknown contender {unknown[0]!r}: choose from {', '.join(known)}")
    reasons = {name: known[name].absent for name in asked}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        print(f"without {', '.join(name for name in asked if reasons[name] == reason)}: {reason}")
    return list(dict.fromkeys([*always, *(name for name in asked if not reasons[name])]))


def version(package: str) -> str | None:
    """The installed version, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def facts(p: Params, contenders: dict[str, Contender]) -> dict:
    """What the numbers rest on, without anything that names a machine or a person."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    peers = (contender.package for contender in contenders.values() if contender.package)
    packages = ("faithkd", "torch", "numpy", "cvxpy", "highspy", *peers)
    return {
        "profile": p.profile,
        "overrides": {name: str(value) for name, value in p.overrides.items()},
        "seed": p.seed,
        "processor": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages if version(name)},
    }


def conditions(told: dict) -> str:
    """Profile, changed parameters and machine in a few words, from `facts`."""
    changed = "".join(f", {name}={value}" for name, value in told["overrides"].items())
    return f"profile {told['profile']}{changed}; {told['processor']}, {told['cores']} cores"


def ball(x: Tensor, eps: float, clip: tuple | None = None) -> tuple[Tensor, Tensor]:
    """Corners of B_eps(x) in float64, cut off at `clip` = (low, high)."""
    low, high = x.double() - eps, x.double() + eps
    return (low, high) if clip is None else (torch.maximum(low, clip[0]), torch.minimum(high, clip[1]))


def pipes(table: pd.DataFrame, left: int = 1) -> str:
    """A frame of text as a markdown table, its first `left` columns left-aligned."""
    rule = ["---"] * left + ["---:"] * (table.shape[1] - left)
    lines = [list(table), rule, *table.fillna("").to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(out: Path, name: str, frame: pd.DataFrame, text: str) -> None:
    """A frame as .csv, and what people read of it as .md."""
    frame.to_csv(out / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8", newline="\n")


def save_facts(out: Path, name: str, told: dict) -> None:
    """What the numbers rest on, as .json."""
    (out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8", newline="\n")


def start(app: typer.Typer) -> None:
    """Run a command on one thread; what a user can mend is one line, without a traceback."""
    torch.set_num_threads(1)
    try:
        app()
    except FaithkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
