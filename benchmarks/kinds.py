"""Pairs of many kinds of networks, bounded by us and by auto_LiRPA: python -m benchmarks.kinds --peer PYTHON

Writes a table of tightness and cost to benchmarks/results/; see README.md here.
"""

import copy
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import RESULTS, OnlyReport, Out, conditions, facts, pipes, save, start
from benchmarks.lirpa import METHODS as PEERS
from benchmarks.lirpa import timed
from benchmarks.networks import KINDS
from faithkd import params
from faithkd.bounds import difference_bounds, faithfulness_upper_bound, interval_bound, softmax_interval
from faithkd.core import data
from faithkd.core.attacks import ball

BESIDE = {"crown": "lirpa-crown", "alpha-crown": "lirpa-optimised"}
NEAR = 0.02  # of its weights' sizes, by which a student near its teacher differs
LEGEND = (
    "Bounds of z_j − z_i above their values at x, ours beside auto_LiRPA's: how much looser (+) or tighter (−) in the "
    "mean over both networks, all differences and images, and how many times faster in processor seconds; then mean "
    "bounds of the softmax gap. A student is near its teacher (its weights moved by 2 %) or trained by itself"
)


def main(
    peer: Annotated[str, typer.Option(help="The Python of the environment that holds auto_LiRPA.")] = sys.executable,
    kinds: Annotated[str, typer.Option(help="Some of the kinds, by semicolons.")] = ";".join(KINDS),
    eps: Annotated[float, typer.Option(help="Radius of the balls.")] = 0.05,
    images: Annotated[int, typer.Option(help="Images of the test subset of digits.")] = 10,
    only_report: OnlyReport = False,
    out: Out = RESULTS,
) -> None:
    """Bound pairs of every kind, students near their teacher and others, by our methods and by auto_LiRPA's."""
    if not only_report:
        p = params.load("digits")
        x, split = data.test_subset(p).x[:images], data.training(p)
        triples = {kind: networks(kind, split) for kind in kinds.split(";")}
        theirs, version = asked(peer, triples, *ball(x.double(), eps))
        told = facts(p) | {"eps": eps, "images": images, "auto_LiRPA": version}
        save(out / "kinds.json", json.dumps(told, indent=1))
        lines = [line for kind, triple in triples.items() for line in compare(kind, triple, x, eps, theirs)]
        save(out / "kinds.csv", pd.DataFrame(lines))
    write(out)


def networks(kind: str, images: data.Split) -> dict[str, nn.Module]:
    """A teacher, a student near it and another one trained by itself, all of one kind."""
    teacher = trained(kind, 0, images)
    near = copy.deepcopy(teacher)
    for weight in near.parameters():
        weight.mul_(1 + NEAR * torch.randn_like(weight))
    return {"teacher": teacher, "near": near, "other": trained(kind, 1, images)}


def trained(kind: str, seed: int, images: data.Split, steps: int = 200) -> nn.Module:
    """A network of one kind after a little training on the labels."""
    torch.manual_seed(seed)
    network = KINDS[kind]()
    network(images.x[:2])
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(steps):
        some = torch.randint(len(images), (64,))
        optimiser.zero_grad()
        F.cross_entropy(network(images.x[some]), images.y[some]).backward()
        optimiser.step()
    return network.eval().requires_grad_(False)


def asked(peer: str, triples: dict, low: Tensor, high: Tensor) -> tuple[dict, str]:
    """What the peer finds: by kind, network and method, differences and seconds, or None and why; and its version."""
    names = [(kind, who, name) for kind in triples for who in triples[kind] for name in PEERS]
    questions = [(triples[kind][who], low, high, name) for kind, who, name in names]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.pt"
        torch.save(questions, file)
        subprocess.run([peer, "-m", "benchmarks.lirpa", file], check=True)
        version, answers = torch.load(file, weights_only=True)
    return dict(zip(names, answers, strict=True)), version


def compare(kind: str, triple: dict[str, nn.Module], x: Tensor, eps: float, theirs: dict) -> list[dict]:
    """For each student and method: how far bounds of differences lie `above` their values, mean gap, seconds an image.

    A peer's failure is in `note`, one of ours an error.
    """
    found = {(who, name): theirs[kind, who, name] for who in triple for name in PEERS}
    for who, network in triple.items():
        for name in ("crown", *BESIDE):  # the first one loads what is loaded on first use
            found[who, name] = timed(partial(difference_bounds, network, x, eps, method=name))
    lines = []
    for student in ("near", "other"):
        pair = [triple["teacher"], triple[student]]
        for name in [*BESIDE, *PEERS]:
            ends, seconds = zip(found["teacher", name], found[student, name], strict=True)
            line = {"kind": kind, "student": student, "method": name}
            if any(highest is None for highest in ends):
                lines.append(line | {"note": seconds[0]})
                continue
            above = [highest - at(network, x) for highest, network in zip(ends, pair, strict=True)]
            line["above"] = torch.stack(above).sum().item() / (180 * len(x))
            line["gap"] = interval_bound(*map(softmax_interval, ends)).mean().item()
            lines.append(line | {"seconds": sum(seconds) / len(x)})
        bound, seconds = timed(partial(faithfulness_upper_bound, *pair, x, eps, method="joint"))
        line = {"kind": kind, "student": student, "method": "joint", "gap": bound.values.mean().item()}
        lines.append(line | {"seconds": seconds / len(x)})
    print(pd.DataFrame(lines).to_string(index=False), flush=True)
    return lines


def at(network: nn.Module, x: Tensor) -> Tensor:
    """z_j - z_i at x, `(N, C, C)` at (i, j)."""
    z = copy.deepcopy(network).double()(x.double())
    return z.unsqueeze(1) - z.unsqueeze(2)


def write(out: Path) -> None:
    """The table: a row for each kind and student, what misses the aim in bold."""
    told, lines = json.loads((out / "kinds.json").read_text(encoding="utf-8")), []
    table = pd.read_csv(out / "kinds.csv").set_index(["kind", "student", "method"])
    notes = table["note"].dropna().groupby(level="kind").first()
    for (kind, student), rows in table.groupby(level=["kind", "student"], sort=False):
        rows, line = rows.loc[kind, student], {"kind": kind, "student": student}
        for (name, peer), (looser, faster) in zip(BESIDE.items(), ((1.0, 0.0), (0.0, 4.0)), strict=True):
            more = round(100 * (rows["above"][name] / rows["above"][peer] - 1), 2)
            times = rows["seconds"][peer] / rows["seconds"][name]
            shown = f"{more:+.2f} %, {times:.1f}×"
            line[f"`{name}`"] = "–" if more != more else shown if more <= looser and times >= faster else f"**{shown}**"
        gaps = rows["gap"].map("{:.4f}".format).replace("nan", "–")
        line |= {f"gap: `{name}`": gaps[name] for pair in BESIDE.items() for name in pair}
        least = rows["gap"][rows.index != "joint"].min()
        missed = student == "near" and not rows["gap"]["joint"] < least
        lines.append(line | {"gap: `joint`": f"**{gaps['joint']}**" if missed else gaps["joint"]})
    head = f"{LEGEND}. ε = {told['eps']}, {told['images']} images, auto_LiRPA {told['auto_LiRPA']}; {conditions(told)}."
    failed = [f"{kind}: {note.split(': ')[0]}" for kind, note in notes.items()]
    without = f"auto_LiRPA fails or refuses with {'; '.join(failed)}." if failed else ""
    aimed = (
        "**Bold** misses our aim: `crown` at most 1 % looser, `alpha-crown` no looser and 4× faster, `joint` below all"
    )
    save(out / "kinds.md", f"{head}\n\n{pipes(lines, left=2)}\n\n{aimed} for students near their teacher. {without}")


if __name__ == "__main__":
    start(main)
