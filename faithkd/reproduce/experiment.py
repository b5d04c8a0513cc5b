"""The paper's experiments: what the notebooks call. Each loads what is in the store and makes what is not."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pandas as pd
from torch import nn

from faithkd import paths, workers
from faithkd.core import data, evaluation
from faithkd.core.data import Split
from faithkd.report import figure1, figures, ledger, tables
from faithkd.report.paper import STUDENTS
from faithkd.reproduce import artefacts
from faithkd.reproduce.measuring import (  # noqa: F401  notebooks take `lower_bound` from here
    RUNGS,
    Unmeasured,
    bracketed,
    checked,
    lower_bound,
    measured,
    search,
    to_table,
)
from faithkd.reproduce.networks import (  # noqa: F401  notebooks take them from here
    fingerprint,
    history,
    networks,
    ramps,
    repeats,
    reseeded,
    student,
    students,
    teacher,
    train,
    trained,
)
from faithkd.reproduce.params import Params, Ratio, changed, load

AS_IS = "as in the profile"  # among `readings`, the parameters unchanged


def over_seeds(p: Params, measure: Callable[..., pd.DataFrame], **options) -> pd.DataFrame:
    """What `measure` (robustness, faithfulness, pgd_steps, accuracy) gives for each repeat, with a column `seed`."""
    seeds = repeats(p, alphas=options.get("alphas", False))
    return pd.concat([measure(q, **options).assign(seed=q.seed) for q in seeds], ignore_index=True)


def accuracy(p: Params, methods=STUDENTS) -> pd.DataFrame:
    """Clean accuracies in % on the *whole* test set, as §6 has them: one row with `dataset`, RT and the students."""
    images = data.test(p)
    right = {
        method: evaluation.predictions(network, images.x) == images.y
        for method, network in ({"RT": teacher(p)} | students(p, methods)).items()
    }
    shares = {method: 100 * float(hits.double().mean()) for method, hits in right.items()}
    return pd.DataFrame([{"dataset": p.data.name, **shares}])


def robustness(p: Params, methods=STUDENTS, draw=data.test_subset) -> pd.DataFrame:
    """Per image: `robust` (does PGD fail, eq. 2) and `agrees` with the teacher (eqs 13–14), for ε = 0 and every ε.

    One row per (dataset, eps, method, image), method RT included: what Table 1 averages. With `data.unseen` for `draw`
    only what the repository keeps is read, and no data set is needed.
    """
    guide, radii = teacher(p), (Ratio(0), *p.evaluate.eps)
    return measured(p, ["robustness"], guide, {"RT": guide} | students(p, methods), radii, draw(p))


def faithfulness(
    p: Params, alphas: bool = False, methods=STUDENTS, count: int | None = None, draw=data.test_subset
) -> pd.DataFrame:
    """Per image: EmpLB (§4.1), FaithUB (§4.2, eqs 8–11) and the status of its certificate, for every ε.

    One row per (dataset, eps, method, image): what Table 2 averages and figs 2–3 draw. With `alphas` the students
    are FD at each α of `p.ablation.alpha` instead, in a column `alpha` (Table 5). `count`: of how many test images, the
    first ones; all without it. EmpLB ≤ FaithUB is checked. `draw` as for `robustness`.
    """
    values = [float(alpha) for alpha in p.ablation.alpha] if alphas else []
    nets = {alpha: student(p, "FD", alpha) for alpha in values} or students(p, methods)
    frame = bracketed(p, teacher(p), nets, p.evaluate.eps, draw(p)[:count])
    return frame.assign(alpha=frame["method"], method="FD") if alphas else frame


def bracket(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> pd.DataFrame:
    """EmpLB ≤ δ* ≤ FaithUB for any pair of networks on any images: columns EmpLB, FaithUB, status (N rows).

    Kept on disk where `network` is one of `trained`.
    """
    return bracketed(p, guide, {"student": network}, [eps], images)[["EmpLB", "FaithUB", "status"]]


def pgd_steps(p: Params, draw=data.test_subset) -> pd.DataFrame:
    """EmpLB by number of PGD steps for RSLAD and FD on every test image, at `table3.eps`: what Table 3 samples.

    One row per (steps, method, image).
    """
    guide, nets, parts = teacher(p), students(p, ("RSLAD", "FD")), []
    for steps in p.evaluate.table3.steps:
        q = p.model_copy(update={"evaluate": p.evaluate.model_copy(update={"steps": steps})})
        frame = measured(q, ["EmpLB"], guide, nets, [p.evaluate.table3.eps], draw(p))
        parts.append(frame.assign(steps=steps))
    return pd.concat(parts, ignore_index=True)


def lower_bounds(
    p: Params, guide: nn.Module, networks: dict[str, nn.Module], images: Split, eps: float
) -> dict[str, np.ndarray]:
    """EmpLB (§4.1) of each network of `networks` to `guide` on all images, by name: `lower_bound` on all cores."""
    frame = measured(p, ["EmpLB"], guide, networks, [eps], images)
    return {name: part["EmpLB"].to_numpy() for name, part in frame.groupby("method", sort=False)}


def auto_attack(p: Params) -> pd.DataFrame:
    """Robust accuracy at the radius of training by two attacks, on the first `evaluate.autoattack.images` test images.

    One row per (dataset, method, image), method RT included: whether PGD (eq. 2), AutoAttack and both find nothing.
    """
    images, nets = data.test_subset(p)[: p.evaluate.autoattack.images], {"RT": teacher(p)} | students(p)
    return measured(p, ["AutoAttack"], None, nets, [p.train.attack.eps], images)


def strong(p: Params) -> pd.DataFrame:
    """EmpLB beside a wider search, StrongLB, on the first `evaluate.strong.images` test images, for every ε.

    One row per (dataset, eps, method, image), with FaithUB; EmpLB ≤ StrongLB ≤ FaithUB is checked. As any point found
    counts, StrongLB includes what PGD found in `faithfulness`.
    """
    images, keys = data.test_subset(p)[: p.evaluate.strong.images], ["eps", "method", "image"]
    frame = measured(p, ["StrongLB"], teacher(p), students(p), p.evaluate.eps, images)
    frame = frame.join(faithfulness(p).set_index(keys)[["EmpLB", "FaithUB"]], on=keys)
    frame["StrongLB"] = frame[["EmpLB", "StrongLB"]].max(axis=1)
    return checked(frame, ["StrongLB"], ["FaithUB"])


def best(p: Params) -> pd.DataFrame:
    """Both ends of the bracket as tight as we get them, past the paper, on the first `bounds.best_images` test images.

    One row per (dataset, eps, method, image): EmpLB and FaithUB of `faithfulness`, the ends BestLB and BestUB after
    `bounds.best_nodes` parts of each ball, the `step` that gave the upper one, those of RUNGS on the way to it, and
    whether teacher and student agree on the ball: `agrees` as far as PGD sees (eqs 13-14), `agreement_certified` where
    it is proved (Def. 3). As any point found counts, BestLB includes what PGD found in `faithfulness`.
    """
    images, keys = data.test_subset(p)[: p.bounds.best_images], ["eps", "method", "image"]
    frame = measured(p, ["best"], teacher(p), students(p), p.evaluate.eps, images)
    frame = frame.join(faithfulness(p).set_index(keys)[["EmpLB", "FaithUB"]], on=keys)
    frame = frame.join(robustness(p).set_index(keys)[["agrees"]], on=keys)
    frame["BestLB"] = frame[["EmpLB", "BestLB"]].max(axis=1)
    if (frame["agreement_certified"] & ~frame["agrees"]).any():
        raise AssertionError(f"an agreement is certified where PGD disagrees, please report it\n{frame}")
    return checked(frame, ["EmpLB", "BestLB"], ["FaithUB", "BestUB"])


def ladder(p: Params) -> pd.DataFrame:
    """Upper bounds of the FD student by each step of RUNGS and by `best`, on the images of `best`, for every ε.

    One row per (dataset, eps, rung, image) with `FaithUB`; no step is above the one before.
    """
    frame = best(p).query("method == 'FD'").drop(columns="FaithUB").rename(columns={"BestUB": "best"})
    keys, names = ["dataset", "eps", "image", "label"], {"var_name": "rung", "value_name": "FaithUB"}
    parts = [part.melt(keys, [*RUNGS, "best"], **names) for _, part in frame.groupby("eps", sort=False)]
    return pd.concat(parts, ignore_index=True)


def readings(p: Params) -> pd.DataFrame:
    """Every cell of §6 and of Tables 1 and 2 under each of `ablation.readings`, and from each seed as the profile is.

    One row per (reading, seed, table, eps, measure, method) with `value`, as `ledger.per_seed` has them; `reading` is
    AS_IS for the seeds of `repeats`. Each reading trains its own teacher and `ablation.students`, from one seed. The
    bounds are those of `ablation.images`.
    """
    return _changed(p, p.ablation.readings, (accuracy, robustness, faithfulness), p.ablation.students)


def settings(p: Params) -> pd.DataFrame:
    """Table 2's cells of FD under each of `ablation.settings`, and from each seed as the profile is; as `readings`.

    Only the student is trained anew, from one seed; the teacher and the test images stay.
    """
    return _changed(p, p.ablation.settings, (faithfulness,), ["FD"])


def _changed(p: Params, texts: list[str], measures: tuple, methods: list[str]) -> pd.DataFrame:
    """`ledger.per_seed` of the measures, as the parameters are and with each of the overrides, in column `reading`."""
    parts = []
    for name, q in [(AS_IS, q) for q in repeats(p)] + [(text, changed(p, text)) for text in texts]:
        frames = {}
        for measure in measures:
            few = {"count": p.ablation.images} if measure is faithfulness else {}
            frames[measure.__name__] = measure(q, methods=methods, **few).assign(seed=q.seed)
        parts.append(ledger.per_seed(**frames).assign(reading=name))
    return pd.concat(parts, ignore_index=True)


@workers.one_thread()
def heat_map(p: Params) -> tuple[pd.DataFrame, dict]:
    """Fig. 1: ‖f_RT − f_s‖∞ for SD and FD on a square through an image x and two corners of its ball: `figure1.draw`.

    Returns a frame with columns panel, a, b, difference, margin, disagree, and a dict about the points.
    """
    images, nets = data.test_subset(p), students(p, ("SD", "FD"))
    choice, restarts = p.evaluate.figure1, p.evaluate.restarts
    frame, details = figure1.heat_map(
        teacher(p), nets, images, float(choice.eps), side=choice.points, restarts=restarts, search=search(p)
    )
    return frame, details | {"eps": choice.eps}


# --- measurements that travel with the repository


def judged(p: Params, draw=data.test_subset) -> dict[str, pd.DataFrame | None]:
    """What the paper's claims are judged by, over all seeds, by the names that `ledger.claims` has for it.

    `steps` (Table 3) and `alphas` (Table 5) only for the data sets of those tables; on digits `steps` illustrates.
    """
    seeds = partial(over_seeds, p, draw=draw)
    steps = alphas = None
    if p.data.name in ("fashion_mnist", "digits"):
        steps = seeds(pgd_steps).assign(eps=str(p.evaluate.table3.eps))
    if p.data.name == "cifar10":
        alphas = seeds(faithfulness, alphas=True)
    return {"robustness": seeds(robustness), "faithfulness": seeds(faithfulness), "steps": steps, "alphas": alphas}


def shown(p: Params, name: str) -> tuple[pd.DataFrame, str]:
    """A result on the paper's data to open a notebook with, and where it comes from; MNIST's where `p` has other data.

    Table 1, 2, 5, the claims and the ledger are made from what measurements/ keeps of every test image, without the
    data set and in seconds. Where that does not travel, and for other names, it is figures/<profile>/<name>.csv.
    """
    q = load(p.profile if tables.is_papers(p.data.name) else "mnist")  # as it stands: no network has to be trained
    made = {
        "table1": lambda: tables.table1(robustness(q, draw=data.unseen)),
        "table2": lambda: tables.table2(faithfulness(q, draw=data.unseen)),
        "table5": lambda: tables.table2(faithfulness(q, alphas=True, draw=data.unseen), by="alpha"),
        "claims": lambda: ledger.claims(q.data.name, **judged(q, draw=data.unseen)),
        "ledger": lambda: beside_paper(**judged(q, draw=data.unseen)),
    }
    kept = paths.ROOT / "measurements" / q.profile / f"seed{q.seed}{artefacts.SUFFIX}"
    if name in made and kept.is_file() and not os.environ.get("FAITHKD_FRESH"):
        with contextlib.suppress(Unmeasured):
            return made[name](), f"measurements/{q.profile}"
    drawn = q.profile if (paths.ROOT / "figures" / q.profile / f"{name}.csv").is_file() else "mnist"
    return tables.committed(drawn, name), f"figures/{drawn}"


def beside_paper(**frames) -> pd.DataFrame:
    """`ledger.cells` of `judged`, and of `accuracy` over seeds if it is given too."""
    few = ledger.fewer(frames["robustness"], frames["faithfulness"], frames["alphas"])
    return ledger.cells(ledger.per_seed(**frames), few)


def measure_all(p: Params) -> Iterator[str]:
    """Measure all that the notebooks show; yield the name of each part when it is there."""
    for q in repeats(p):
        yield from measure_seed(q)
    parts = {
        "every α": partial(over_seeds, p, faithfulness, alphas=True),
        "AutoAttack": partial(auto_attack, p),
        "a wider search": partial(strong, p),
        "the best bounds": partial(best, p),
        "settings": partial(settings, p),
        "readings": partial(readings, p),
    }
    for name, part in parts.items():
        part()
        yield name


def measure_seed(p: Params) -> Iterator[str]:
    """Measure what Tables 1 to 3 show of the seed of `p`."""
    for measure in (robustness, faithfulness, pgd_steps):
        measure(p)
    yield f"seed {p.seed}"


def keep(p: Params) -> Iterator[str]:
    """Train and measure what is not there, and write all of it to weights/ and measurements/; yield what is done.

    What was stopped goes on where it was.
    """
    train(p)
    with artefacts.watched() as asked:
        for network in networks(p):
            trained(*network)
        for name in measure_all(p):
            artefacts.keep(asked)
            yield name


def compare(p: Params, everything: bool = False) -> tuple[str, list[str]]:
    """Measure one seed, or `everything`, without the committed measurements and compare: (what was found, complaints).

    Equal are bounds of each image up to the rounding in which processors differ, and yes or no of all but 0.2 %.
    """
    q = random.Random(p.seed).choice(repeats(p))
    with artefacts.watched() as asked, artefacts.without_committed_measurements():
        list(measure_all(p) if everything else measure_seed(q))
        mine = {path: artefacts.load(path, inputs) for path, inputs in asked.items()}
    count, worst, complaints = 0, 0.0, []
    for path, inputs in asked.items():
        if path.startswith("measurements/") and (theirs := artefacts.packed(path, inputs)):
            count += 1
            ours, theirs = to_table(*mine[path]), to_table(*theirs)
            numbers = ours.select_dtypes("number").columns
            worst = max(worst, float((ours[numbers] - theirs[numbers]).abs().to_numpy().max(initial=0.0)))
            flags = ours.select_dtypes("bool").columns
            turned = (ours[flags] != theirs[flags]).sum().max() if len(flags) else 0
            if not np.allclose(ours[numbers], theirs[numbers], **figures.ROUNDING) or turned > 1 + len(ours) / 500:
                complaints.append(path)
    what = "everything" if everything else f"seed {q.seed}"
    found = f"{p.name}: {what} measured anew, {count} measurements compared with the committed ones"
    return f"{found}, largest difference {worst:.1g}" if count else "", complaints
