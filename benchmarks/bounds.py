"""All bounds side by side, ours and the peers', on the same networks and images: python -m benchmarks.bounds"""

import itertools
import json
import math
import os
import time
from typing import Annotated

import pandas as pd
import typer
from torch import Tensor

from benchmarks import report
from benchmarks.common import RESULTS, OnlyReport, Out, facts, save, start
from benchmarks.contenders import CONTENDERS, PEERS, load, taking_part
from faithkd import experiment, params
from faithkd.core import data

WARM_UP = 1e-3  # share of eps
LONG = 1.0  # seconds an image: above, only `best` is measured; `bab` is the same search on one core


def main(
    profile: Annotated[str, typer.Option(help="Which params/*.yaml.")] = "mnist",
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a parameter; repeatable.")] = None,
    student: Annotated[list[str] | None, typer.Option(help="SD, ARD, RSLAD or FD (default); repeatable.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Radii; repeatable; default: evaluate.eps.")] = None,
    images: Annotated[int, typer.Option(help="Images of the test subset.")] = 40,
    methods: Annotated[str, typer.Option(help="Who takes part, by commas.")] = ",".join(CONTENDERS),
    budgets: Annotated[str, typer.Option(help="Seconds an image for best, to one for bab.")] = "0.1,0.3,1,3,10,30",
    frontier_images: Annotated[int, typer.Option(help="Images at budgets above one second, and in the plot.")] = 10,
    slow_images: Annotated[int, typer.Option(help="Images of our cvxpy LP.")] = 4,
    rounds: Annotated[int, typer.Option(help="How often to measure what is quick; the median time counts.")] = 3,
    only_report: OnlyReport = False,
    out: Out = RESULTS,
) -> None:
    """Measure bounds and cost of our methods and of the peers on the same networks and images.

    Values of methods that do not take part this time stay in the folder's tables.
    """
    p = params.load(profile, settings or [])
    if only_report:
        report.write(out, profile)
        return
    out.mkdir(parents=True, exist_ok=True)
    specs = []
    for name in taking_part(methods):
        offered = [float(budget) for budget in budgets.split(",")] if CONTENDERS[name].anytime else [None]
        specs += [(name, budget) for budget in offered if name == "best" or (budget or 0) <= LONG]
    sizes = {"images": images, "frontier_images": frontier_images, "slow_images": slow_images, "rounds": rounds}
    told, file, now = out / f"bounds-{profile}.json", out / f"values-{profile}.csv", facts(p, PEERS) | sizes
    known = pd.read_csv(file, dtype={"eps": str}) if file.is_file() else pd.DataFrame({"method": []})
    parts = [known[~known["method"].isin([name for name, _ in specs])]]  # of whom nothing is measured anew
    if len(parts[0]):
        now["of those that stay"] = json.loads(told.read_text(encoding="utf-8"))
    save(told, json.dumps(now, indent=1))
    for name in student or ["FD"]:
        pair = experiment.teacher(p), experiment.student(p, name)
        for radius in eps or p.evaluate.eps:
            part = measure_ball(p, pair, params.Ratio(radius), specs, sizes)
            parts.append(part.assign(student=name, eps=str(radius)))
            save(file, pd.concat(parts))  # kept if killed
    report.write(out, profile)


def measure_ball(p: params.Params, pair: tuple, eps: params.Ratio, specs: list, sizes: dict) -> pd.DataFrame:
    """All by turns on one pair of networks at one eps, what is slow or fails once: a row per contender and image."""
    images = data.test_subset(p)
    images = images[images.index.argsort()][: sizes["images"]]
    lowest = experiment.lower_bound(p, *pair, images, eps).values
    whose = pd.DataFrame({"image": images.index.tolist(), "EmpLB": lowest.tolist()})
    parts, done = [], set()
    for _, (name, budget) in itertools.product(range(sizes["rounds"]), specs):
        if (name, budget) in done:
            continue
        contender = CONTENDERS[name]
        few = (
            sizes["slow_images"]
            if contender.slow
            else sizes["frontier_images"]
            if (budget or 0) > LONG
            else len(images)
        )
        effort = {"clip": data.clip_range(p)} | ({} if budget is None else {"budget": budget})
        found = measure(name, pair, images.x[:few], float(eps), effort)
        parts.append(whose[:few].assign(method=name, budget=budget, **found))
        if contender.slow or contender.anytime or found["note"]:
            done.add((name, budget))
        told = found["note"] or f"mean {found['bound'].mean():.4f}, {found['seconds']:.4f} s an image"
        print(f"eps {eps}  {report.label(name, budget):<28} {told}", flush=True)
    whole, times = pd.concat(parts, ignore_index=True), ["seconds", "cpu_seconds"]
    whole[times] = whole.groupby(["method", "budget"], dropna=False)[times].transform("median")
    whole = whole.drop_duplicates(["method", "budget", "image"])
    crown = whole[whole["method"] == "crown"].set_index("image")["bound"]
    return whole.assign(crown=whole["image"].map(crown))


def measure(name: str, pair: tuple, x: Tensor, eps: float, effort: dict) -> dict:
    """Bounds, wall and processor seconds an image, and in `note` why there are none: what a peer cannot is a result.

    First some images are bounded untimed in tiny balls, so that all is loaded and all workers are there.
    """
    little = effort | dict.fromkeys(effort.keys() & {"budget"}, 0.1)
    try:
        bound = load(name)
        bound(*pair, x[: os.cpu_count()], WARM_UP * eps, **little)
        start, cpu = time.perf_counter(), time.process_time()
        values = bound(*pair, x, eps, **effort)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    except Exception as failure:
        if not CONTENDERS[name].package:
            raise
        nothing = dict.fromkeys(["bound", "seconds", "cpu_seconds"], math.nan)
        return nothing | {"note": f"{type(failure).__name__}: {failure}"}
    costs = {"seconds": seconds / len(x), "cpu_seconds": cpu_seconds / len(x)}
    return {"bound": values.double().numpy(), **costs, "note": ""}


if __name__ == "__main__":
    start(main)
