"""All bounds side by side, ours and the peers', on the same networks and images: python -m benchmarks.bounds

Writes tables, the aims and a plot of tightness over time to benchmarks/results/; see README.md here.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from benchmarks import contenders, report, scaling
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import Job, Measurement, images_of, run
from faithkd import data, experiment, params
from faithkd.bounds import faithfulness_upper_bound
from faithkd.errors import FaithkdError
from faithkd.report.paper import STUDENTS
from faithkd.reproduce.params import Params

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # seconds an image
LONG = 1.0  # seconds an image: above, only `best` is measured; `bab` is the same search on one core

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    profile: Annotated[str, typer.Option(help="Which params/*.yaml.")] = "mnist",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; repeatable.")
    ] = None,
    student: Annotated[list[str] | None, typer.Option(help="SD, ARD, RSLAD or FD (default); repeatable.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Radii; repeatable; default: evaluate.eps.")] = None,
    images: Annotated[int, typer.Option(help="Images of the test subset.")] = 40,
    methods: Annotated[str, typer.Option(help="Who takes part, by commas.")] = ",".join(contenders.DEFAULT),
    budgets: Annotated[str, typer.Option(help="Seconds an image for best, and up to one for bab.")] = ",".join(
        map(str, BUDGETS)
    ),
    frontier_images: Annotated[int, typer.Option(help="Images at budgets above one second, and in the plot.")] = 10,
    slow_images: Annotated[int, typer.Option(help="Images of our cvxpy LP.")] = 4,
    rounds: Annotated[int, typer.Option(help="How often to measure; the median time counts.")] = 3,
    scale: Annotated[bool, typer.Option(help="Also measure how cost grows with images, width, depth.")] = True,
    table2: Annotated[bool, typer.Option(help="Also time crown on the whole of Table 2.")] = True,
    only_report: Annotated[bool, typer.Option("--report", help="Only write tables and plots anew.")] = False,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
) -> None:
    """Measure bounds and cost of our methods and of the peers on the same networks and images."""
    p = params.load(profile, settings or [])
    if only_report:
        report.write(out, profile)
        return
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for all that is started from here; `best` starts its own workers
    names = present(methods.split(","))
    specs = specifications(names, [float(budget) for budget in budgets.split(",")])
    radii = [params.Ratio(radius) for radius in eps or p.evaluate.eps]
    pairs = {name: (experiment.teacher(p), experiment.student(p, name)) for name in (student or ["FD"])}
    sizes = {"images": images, "frontier_images": frontier_images, "slow_images": slow_images, "rounds": rounds}
    facts = report.provenance(p) | {"methods": [report.label(*spec) for spec in specs], **sizes}
    parts = []
    for (name, pair), radius in itertools.product(pairs.items(), radii):
        part = measure_ball(p, pair, radius, specs, sizes)
        parts.append(part.assign(student=name, eps=str(radius)))
        pd.concat(parts).to_csv(out / f"values-{profile}.csv", index=False, lineterminator="\n")  # kept if killed
    if table2:
        facts["table2"] = time_table2(p)
    if scale:
        scaling.measure(p, names).to_csv(out / f"scaling-{profile}.csv", index=False, lineterminator="\n")
    (out / f"bounds-{profile}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    report.write(out, profile)


def present(names: list[str]) -> list[str]:
    """The contenders that can take part, crown always; says which cannot, and why. Unknown names are an error."""
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise FaithkdError(f"unknown method {unknown[0]!r}: choose from {', '.join(CONTENDERS)}")
    reasons = {name: contenders.absent(name) for name in names}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        print(f"without {', '.join(name for name in names if reasons[name] == reason)}: {reason}")
    return list(dict.fromkeys(["crown", *(name for name in names if not reasons[name])]))


def specifications(names: list[str], budgets: list[float]) -> list[tuple[str, float | None]]:
    """(contender, budget) in the order of measurement: ours and the peers' by turns, crown first."""
    ours = [(name, budget) for name in names if not CONTENDERS[name].peer for budget in offered(name, budgets)]
    peers = [(name, None) for name in names if CONTENDERS[name].peer]
    return [spec for turn in itertools.zip_longest(ours, peers) for spec in turn if spec is not None]


def offered(name: str, budgets: list[float]) -> list[float | None]:
    """The budgets at which one of our methods is measured; [None] for a method without."""
    if not CONTENDERS[name].anytime:
        return [None]
    return budgets if name == "best" else [budget for budget in budgets if budget <= LONG]


def measure_ball(p: Params, pair, eps: params.Ratio, specs: list, sizes: dict) -> pd.DataFrame:
    """All contenders on one pair of networks at one eps: a row per contender, budget and image."""
    images = images_of(p)[: sizes["images"]]
    lowest = experiment.lower_bound(p, *pair, images, eps).values
    frame = pd.DataFrame({"image": images.index.tolist(), "EmpLB": lowest.tolist()})
    done = {}
    for turn, (name, budget) in itertools.product(range(sizes["rounds"]), specs):
        once = CONTENDERS[name].slow or CONTENDERS[name].anytime
        if turn and (once or done[name, budget][0].note):
            continue
        found = run(Job(name, *pair, images.x[: count(name, budget, sizes)], float(eps), data.clip_range(p), budget))
        done.setdefault((name, budget), []).append(found)
        say(eps, name, budget, found)
    parts = [rows(frame, name, budget, found) for (name, budget), found in done.items()]
    whole = pd.concat(parts, ignore_index=True)
    crown = whole[whole["method"] == "crown"].set_index("image")["bound"]
    return whole.assign(crown=whole["image"].map(crown))


def count(name: str, budget: float | None, sizes: dict) -> int:
    """How many images a contender gets."""
    if CONTENDERS[name].slow:
        return min(sizes["slow_images"], sizes["images"])
    return min(sizes["frontier_images"] if (budget or 0) > LONG else sizes["images"], sizes["images"])


def rows(frame: pd.DataFrame, name: str, budget: float | None, found: list[Measurement]) -> pd.DataFrame:
    """One contender's part of the results; its times are medians over the rounds, per image."""
    first, number = found[0], len(found[0].values)
    return frame[:number].assign(
        method=name,
        budget=budget,
        bound=first.values.tolist(),
        seconds=pd.Series([m.seconds for m in found]).median() / number,
        cpu_seconds=pd.Series([m.cpu_seconds for m in found]).median() / number,
        megabytes=max(m.megabytes for m in found),
        note=first.note,
    )


def say(eps: params.Ratio, name: str, budget: float | None, found: Measurement) -> None:
    """One line of progress."""
    told = found.note or f"mean {found.values.mean():.4f}, {found.seconds / len(found.values):.4f} s an image"
    print(f"eps {eps}  {report.label(name, budget):<28} {told}", flush=True)


def time_table2(p: Params) -> dict[str, float]:
    """Seconds of all bounds and of all lower bounds of Table 2, in one process on one thread."""
    images, guide = data.test_subset(p), experiment.teacher(p)
    students = [experiment.student(p, name) for name in STUDENTS]
    spent = {"images": len(images), "EmpLB": 0.0, "FaithUB": 0.0}
    for network, eps in itertools.product(students, p.evaluate.eps):
        start = time.perf_counter()
        experiment.lower_bound(p, guide, network, images, float(eps))
        middle = time.perf_counter()
        faithfulness_upper_bound(guide, network, images.x, float(eps), method="crown", clip=data.clip_range(p))
        spent["EmpLB"] += middle - start
        spent["FaithUB"] += time.perf_counter() - middle
    print(f"Table 2 with crown: {spent['FaithUB']:.0f} s, and EmpLB {spent['EmpLB']:.0f} s", flush=True)
    return spent


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        app()
    except FaithkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
