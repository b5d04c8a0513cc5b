"""All bounds side by side, ours and the peers', on the same networks and images: python -m benchmarks.bounds

Writes tables, ratios and a plot of tightness over time to benchmarks/results/; see README.md here.
"""

import os
from typing import Annotated

import pandas as pd
import typer

from benchmarks import report
from benchmarks.common import RESULTS, Out, Profile, Settings, facts, save_facts, start, taking_part
from benchmarks.measure import CONTENDERS, measure
from faithkd import data, experiment, params
from faithkd.params import Params

DEFAULT = ",".join(name for name in CONTENDERS if name != "interval")
LONG = 1.0  # seconds an image: above, only `best` is measured; `bab` is the same search on one core

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    profile: Profile = "mnist",
    settings: Settings = None,
    student: Annotated[list[str] | None, typer.Option(help="SD, ARD, RSLAD or FD (default); repeatable.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Radii; repeatable; default: evaluate.eps.")] = None,
    images: Annotated[int, typer.Option(help="Images of the test subset.")] = 40,
    methods: Annotated[str, typer.Option(help="Who takes part, by commas.")] = DEFAULT,
    budgets: Annotated[
        str, typer.Option(help="Seconds an image for best, and up to one for bab.")
    ] = "0.1,0.3,1,3,10,30",
    few: Annotated[int, typer.Option(help="Images of the cvxpy LP, of budgets above one second, in the plot.")] = 10,
    rounds: Annotated[int, typer.Option(help="How often to measure what is quick; the median time counts.")] = 3,
    only_report: Annotated[bool, typer.Option("--report", help="Only write tables and plots anew.")] = False,
    out: Out = RESULTS,
) -> None:
    """Measure bounds and cost of our methods and of the peers on the same networks and images."""
    p = params.load(profile, settings or [])
    if only_report:
        report.write(out, profile)
        return
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for all that is started from here; `best` starts its own workers
    names = taking_part(methods, CONTENDERS, always=["crown"])
    offered = [float(budget) for budget in budgets.split(",")]
    specs = [(name, budget) for name in names for budget in budgets_of(name, offered)]
    sizes = {"images": images, "few": few, "rounds": rounds}
    save_facts(out, f"bounds-{profile}", facts(p, CONTENDERS) | sizes)
    parts = []
    for name in student or ["FD"]:
        pair = experiment.teacher(p), experiment.student(p, name)
        for radius in eps or p.evaluate.eps:
            part = measure_ball(p, pair, params.Ratio(radius), specs, sizes)
            parts.append(part.assign(student=name, eps=str(radius)))
            pd.concat(parts).to_csv(out / f"values-{profile}.csv", index=False, lineterminator="\n")  # kept if killed
    report.write(out, profile)


def budgets_of(name: str, offered: list[float]) -> list[float | None]:
    """The budgets at which a contender is measured; [None] for who takes none."""
    if not CONTENDERS[name].anytime:
        return [None]
    return [budget for budget in offered if name == "best" or budget <= LONG]


def measure_ball(p: Params, pair: tuple, eps: params.Ratio, specs: list, sizes: dict) -> pd.DataFrame:
    """All contenders on one pair of networks at one eps: a row per contender, budget and image."""
    images = data.test_subset(p)
    images = images[images.index.argsort()][: sizes["images"]]
    lowest = experiment.lower_bound(p, *pair, images, eps).values
    parts = []
    for name, budget in specs:
        contender = CONTENDERS[name]
        some = images[: sizes["few"]] if contender.slow or (budget or 0) > LONG else images
        rounds = 1 if contender.slow or contender.anytime else sizes["rounds"]
        effort = {} if budget is None else {"budget": budget}
        found = measure(name, pair, some.x, float(eps), data.clip_range(p), rounds, **effort)
        report.say(f"eps {eps}", report.label(name, budget), found)
        about = {"image": some.index, "EmpLB": lowest[: len(some)], "method": name, "budget": budget}
        parts.append(pd.DataFrame(about | found))
    whole = pd.concat(parts, ignore_index=True)
    crown = whole[whole["method"] == "crown"].set_index("image")["bound"]
    return whole.assign(crown=whole["image"].map(crown))


if __name__ == "__main__":
    start(app)
