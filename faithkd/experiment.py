"""The paper's experiments: what the notebooks call. Each loads what is in the store and makes what is not."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from faithkd import data, evaluation, ledger, losses, models, parallel, source, square, store, training
from faithkd.bounds import (
    ALONE,
    CERTIFIED,
    NOT_FINITE,
    difference_bounds,
    faithfulness_upper_bound,
    faithfulness_upper_bounds,
    interval_bound,
    softmax_interval,
)
from faithkd.data import Split
from faithkd.errors import FaithkdError
from faithkd.losses import METHODS
from faithkd.paper import STUDENTS
from faithkd.params import Params, Ratio, changed

# Part of every measurement's key: no bound made by other code than today's is ever read back. Taken at import, as a
# file may be edited while a long run still works with what it imported.
_PACKAGE = Path(__file__).parent
MEASURE = source.digest_files(
    *(_PACKAGE / name for name in ("arguments.py", "attacks.py", "evaluation.py", "frozen.py", "models.py")),
    *sorted((_PACKAGE / "bounds").glob("*.py")),
)

# Images bounded in one piece of work: few enough to lose little when a run is stopped and to keep all cores busy to
# the end, enough to be worth sending. Slow methods, which take about a second for an image, have smaller pieces.
# Never a function of the number of processes, on which no result may depend.
PIECE = {"interval": 100, "crown": 100}
SLOW_PIECE = 10

RUNGS = ("interval", "crown", "alpha-crown", "joint")  # steps below `best` that take seconds at most
AS_IS = "as in the profile"  # among `readings`, the parameters unchanged

# Networks this small run faster on one thread, and their sums come out the same whatever else the machine does.
torch.set_num_threads(1)


def reseeded(p: Params, add: int) -> Params:
    """The same parameters with everything drawn anew: the seed raised by `add`."""
    return p.model_copy(update={"seed": p.seed + add})


def repeats(p: Params) -> list[Params]:
    """The parameters of each repeat: `p.repeats` seeds from `p.seed` on, networks and test subset anew."""
    return [reseeded(p, add) for add in range(p.repeats)]


def over_seeds(p: Params, measure: Callable[..., pd.DataFrame], **options) -> pd.DataFrame:
    """What `measure` (robustness, faithfulness, pgd_steps, accuracy) gives for each repeat, with a column `seed`."""
    return pd.concat([measure(q, **options).assign(seed=q.seed) for q in repeats(p)], ignore_index=True)


def device(p: Params) -> str:
    """Where to train: `p.device`, with "auto" a GPU where there is one, else the CPU."""
    return p.device if p.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def teacher(p: Params) -> nn.Sequential:
    """The robust teacher f_RT, trained adversarially by eq. (3), §A."""
    return trained(p, "RT")[0]


def student(p: Params, method: str, alpha: float | None = None, rule: losses.Method | None = None) -> nn.Sequential:
    """The student that `method` (one of SD, ARD, RSLAD, FD: eqs 1, 4, 5, 12) distils from the teacher of `p`.

    `alpha` replaces the loss weighting α of the parameters (Table 5); `rule`, a loss and an attack of your own,
    replaces those of the method, whose learning rate, temperature and so on stay.
    """
    return trained(p, method, alpha, rule)[0]


def history(p: Params, method: str) -> pd.DataFrame:
    """Loss, learning rate, held-out accuracy and robust accuracy after each epoch, for "RT" or a student."""
    return trained(p, method)[1]


def trained(
    p: Params, method: str, alpha: float | None = None, rule: losses.Method | None = None, *, bar: bool = True
) -> tuple[nn.Sequential, pd.DataFrame]:
    """A network, "RT" or a student's method, and the history of its training: found in the store, or trained.

    `alpha` and `rule` as for `student`; `bar`: whether training shows one.
    """
    return _training(p, method, alpha, rule, bar)()


def networks(p: Params) -> list[tuple[Params, str, float | None]]:
    """Every network that the notebooks ask for by its method, as arguments of `trained`; teachers first."""
    wanted = [(q, method, None) for q in repeats(p) for method in ("RT", *STUDENTS)]
    wanted += [(q, "FD", float(alpha)) for q in repeats(p) for alpha in p.ablation.alpha]
    wanted += [(changed(p, text), "FD", None) for text in p.ablation.settings]
    for text in p.ablation.readings:
        wanted += [(changed(p, text), method, None) for method in ("RT", *p.ablation.students)]
    wanted += [(q, "RT", None) for _, q in ramps(p)]
    return sorted(wanted, key=lambda network: network[1] != "RT")


def ramps(p: Params) -> list[tuple[str, Params]]:
    """The first epochs of a teacher's training "with ramp" of ε and "without", from two seeds each (notebook 02)."""
    few = f"train.epochs={min(12, p.train.epochs)} train.early_stopping=none"
    return [
        (title, changed(p, f"{few} train.ramp_epochs={ramp} seed={p.seed + add}"))
        for title, ramp in (("with ramp", p.train.ramp_epochs), ("without", 0))
        for add in (0, 1)
    ]


def train(p: Params) -> int:
    """Train all of `networks` that are not in the store, as many at once as there are cores; how many those were.

    Always on this machine, where each keeps its checkpoint: what is stopped goes on where it was.
    """
    count = 0
    for kind in ("teachers", "students"):  # in this order, as a student's key holds its teacher
        missing = {}
        for network in networks(p):
            if (network[1] == "RT") == (kind == "teachers"):
                entry, depends, *_ = _training(*network).args
                if not store.exists(entry, depends):
                    missing[store.key(entry, **depends)] = network
        alone = len(missing) == 1 or parallel.jobs() == 1
        calls = [partial(_train, *network, bar=alone) for network in missing.values()]
        bar = {"unit": "network", "total": len(calls), "leave": False, "disable": not calls}
        for _ in tqdm(parallel.run(calls, sample=0.0, here=True), f"{p.profile}: training {kind}", **bar):
            count += 1
    return count


def _train(*network, bar: bool) -> None:
    """`trained` for another process: what comes of it is in the store."""
    trained(*network, bar=bar)


def _training(p: Params, method: str, alpha: float | None = None, rule: losses.Method | None = None, bar: bool = True):
    """`store.network` with its arguments for a network: kind, dependencies, what trains it and what builds it."""
    settings = getattr(p.train, method, None)
    if settings is None or method not in ("RT", *METHODS):
        raise ValueError(f"no settings for {method!r} in the parameters; there are RT, {', '.join(METHODS)}")
    if alpha is not None:
        settings = settings.model_copy(update={"alpha": Ratio(alpha)})
    architecture = p.models.teacher if method == "RT" else p.models.student
    shape = data.SHAPES[p.data.name]
    guide = None if method == "RT" else teacher(p)
    own, rule = rule is not None, rule or METHODS.get(method, training.ADVERSARIAL)
    if p.train.kl == "reverse" and method != "RT":
        rule = losses.reversed_kl(rule)

    label = method + ("" if alpha is None else f"-alpha{alpha:g}") + ("-own" if own else "")

    def make() -> nn.Sequential:
        return models.build(architecture, shape, seed=p.seed, initialisation=p.train.initialisation)

    def build(checkpoint):
        return training.fit(
            make(),
            guide,
            data.training(p),
            data.test(p) if p.train.early_stopping == "test" else data.validation(p),
            settings,
            p.train,
            method=rule,
            seed=p.seed,
            device=device(p),
            clip=data.clip_range(p),
            checkpoint=checkpoint,
            description=f"{p.profile}: training {label}" if bar else None,
        )

    depends = {
        "recipe": training.RECIPE,
        "code": _code(rule),
        "method": method,
        "seed": p.seed,
        "data": p.data.model_dump(mode="json", exclude={"test_images"}),
        "architecture": architecture.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
        "schedule": p.train.model_dump(mode="json", exclude={"RT", *METHODS} | ({"kl"} if guide is None else set())),
        "teacher": guide and fingerprint(guide),
    }
    name = f"{p.data.name}-{label}-seed{p.seed}"
    return partial(store.network, "network", depends, build, make, name=name)


def accuracy(p: Params, methods=STUDENTS) -> pd.DataFrame:
    """Clean accuracies in % on the *whole* test set, as §6 has them: one row with `dataset`, RT and the students."""
    images = data.test(p)
    networks = {"RT": teacher(p)} | {method: student(p, method) for method in methods}
    right = {method: evaluation.predictions(network, images.x) == images.y for method, network in networks.items()}
    shares = {method: 100 * float(hits.double().mean()) for method, hits in right.items()}
    return pd.DataFrame([{"dataset": p.data.name, **shares}])


def robustness(p: Params, methods=STUDENTS) -> pd.DataFrame:
    """Per image: `robust` (does PGD fail, eq. 2) and `agrees` with the teacher (eqs 13–14), for ε = 0 and every ε.

    One row per (dataset, eps, method, image), method RT included: what Table 1 averages.
    """
    images, guide = _owned(data.test_subset(p)), teacher(p)
    networks = {"RT": guide} | {method: student(p, method) for method in methods}
    work = [(eps, method) for eps in ("0", *p.evaluate.eps) for method in networks]
    tasks = [
        _Task(
            "robustness",
            _depends(p, images, float(eps), guide, networks[method]) | {"restarts": 1},
            _robustness,
            (p, images, float(eps), guide, networks[method]),
            f"{p.data.name}-{method}-{str(eps).replace('/', '-')}",
        )
        for eps, method in work
    ]
    parts = _tables(p, tasks, "robustness and agreement")
    named = [_named(p, part, images, eps=str(e), method=m) for (e, m), part in zip(work, parts, strict=True)]
    return pd.concat(named, ignore_index=True)


def faithfulness(p: Params, alphas: bool = False, methods=STUDENTS, count: int | None = None) -> pd.DataFrame:
    """Per image: EmpLB (§4.1), FaithUB (§4.2, eqs 8–11) and the status of its certificate, for every ε.

    One row per (dataset, eps, method, image): what Table 2 averages and figs 2–3 draw. With `alphas` the students
    are FD at each α of `p.ablation.alpha` instead, in a column `alpha` (Table 5). `count`: of how many test images, the
    first ones; all without it. EmpLB ≤ FaithUB is checked.
    """
    images, guide = data.test_subset(p)[:count], teacher(p)
    students = [("FD", float(alpha)) for alpha in p.ablation.alpha] if alphas else [(m, None) for m in methods]
    networks = {(method, alpha): student(p, method, alpha) for method, alpha in students}
    work = [(eps, method, alpha) for eps in p.evaluate.eps for method, alpha in students]
    pairs = [(networks[method, alpha], float(eps)) for eps, method, alpha in work]
    parts = []
    for (eps, method, alpha), part in zip(work, _brackets(p, guide, pairs, images), strict=True):
        names = {"eps": str(eps), "method": method} | ({} if alpha is None else {"alpha": alpha})
        parts.append(_named(p, part, images, **names))
    return pd.concat(parts, ignore_index=True)


def readings(p: Params) -> pd.DataFrame:
    """Every cell of §6 and of Tables 1 and 2 under each of `ablation.readings`, and from each seed as the profile is.

    One row per (reading, seed, table, eps, measure, method) with `value`, as `ledger.per_seed` has them; `reading` is
    AS_IS for the seeds of `repeats`. Each reading trains its own teacher and `ablation.students`, from one seed. The
    bounds are those of `ablation.images`.
    """
    return _changes(p, p.ablation.readings, (accuracy, robustness, faithfulness), p.ablation.students)


def settings(p: Params) -> pd.DataFrame:
    """Table 2's cells of FD under each of `ablation.settings`, and from each seed as the profile is; as `readings`.

    Only the student is trained anew, from one seed; the teacher and the test images stay.
    """
    return _changes(p, p.ablation.settings, (faithfulness,), ["FD"])


def _changes(p: Params, texts: list[str], measures: tuple, methods: list[str]) -> pd.DataFrame:
    """`ledger.per_seed` of the measures, as the parameters are and with each of the overrides, in column `reading`."""
    runs = [(AS_IS, q) for q in repeats(p)] + [(text, changed(p, text)) for text in texts]
    parts = []
    for name, q in runs:
        frames = {}
        for measure in measures:
            few = {"count": p.ablation.images} if measure is faithfulness else {}
            frames[measure.__name__] = measure(q, methods=methods, **few).assign(seed=q.seed)
        parts.append(ledger.per_seed(**frames).assign(reading=name))
    return pd.concat(parts, ignore_index=True)


def bracket(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> pd.DataFrame:
    """EmpLB ≤ δ* ≤ FaithUB for any pair of networks on any images: columns EmpLB, FaithUB, status (N rows)."""
    return _brackets(p, guide, [(network, float(eps))], images)[0]


def _brackets(p: Params, guide: nn.Module, pairs: list, images: Split) -> list[pd.DataFrame]:
    """`bracket` for each (student, ε) of `pairs`; the work of all of them is shared out together."""
    images = _owned(images)
    parts = [images[rows] for rows in torch.arange(len(images)).split(PIECE.get(p.bounds.method, SLOW_PIECE))]
    # EmpLB is not cut, as all its random starts come from one generator; first, as these are the longest pieces.
    tasks = [_lower_task(p, guide, network, images, eps) for network, eps in pairs]
    if p.bounds.method in ALONE:  # then eq. (11) takes what is known of each, and a teacher is bounded once for all
        needs = [[_alone_task(p, each, part, eps) for each in (guide, net) for part in parts] for net, eps in pairs]
    else:
        needs = [[_pair_task(p, guide, network, part, eps) for part in parts] for network, eps in pairs]
    tables = iter(_tables(p, [*tasks, *chain.from_iterable(needs)], "EmpLB and FaithUB"))
    lowers, found = [next(tables) for _ in tasks], []
    for lower, need, (_, eps) in zip(lowers, needs, pairs, strict=True):
        upper = pd.concat([next(tables) for _ in need], ignore_index=True)
        if p.bounds.method in ALONE:
            upper = _eq11(upper.iloc[: len(images)], upper.iloc[len(images) :])
        both = pd.concat([lower, upper], axis=1)
        # Written so that a NaN fails; 1e-12 is the rounding error of evaluating the lower bound itself in float64.
        if not (both["EmpLB"] <= both["FaithUB"] + 1e-12).all():
            raise AssertionError(f"EmpLB > FaithUB at ε = {eps}: a bound is wrong, please report it\n{both}")
        found.append(both)
    return found


def best(p: Params) -> pd.DataFrame:
    """Both ends of the bracket as tight as we get them, past the paper, on the first `bounds.best_images` test images.

    One row per (dataset, eps, method, image): EmpLB and FaithUB of `faithfulness`, the ends BestLB and BestUB after
    `bounds.best_nodes` parts of each ball, the `step` that gave the upper one, those of RUNGS on the way to it, and
    whether teacher and student agree on the ball: `agrees` as far as PGD sees (eqs 13-14), `agreement_certified` where
    it is proved (Def. 3). As any point found counts, BestLB includes what PGD found in `faithfulness`.
    """
    count = min(p.bounds.best_images, p.data.test_images)
    images, guide = data.test_subset(p)[:count], teacher(p)
    networks = {method: student(p, method) for method in STUDENTS}
    work = [(eps, _owned(images[rows])) for eps in p.evaluate.eps for rows in torch.arange(count).split(SLOW_PIECE)]
    nodes = {"nodes": p.bounds.best_nodes}
    tasks = [  # all students of a piece together: for most of the time the teacher is bounded, once for all
        _Task(
            "best",
            _depends(p, part, float(eps), guide, *networks.values()) | nodes,
            _best,
            (p, guide, list(networks.values()), part, float(eps)),
        )
        for eps, part in work
    ]
    tables, parts = _tables(p, tasks, "best bounds"), []
    for eps in p.evaluate.eps:
        pieces = pd.concat([table for (radius, _), table in zip(work, tables, strict=True) if radius == eps])
        for number, method in enumerate(networks):
            part = pieces[pieces["student"] == number].drop(columns="student")
            parts.append(_named(p, part, images, eps=str(eps), method=method))
    keys = ["eps", "method", "image"]
    frame = pd.concat(parts, ignore_index=True)
    frame = frame.join(faithfulness(p).set_index(keys)[["EmpLB", "FaithUB"]], on=keys)
    frame = frame.join(robustness(p).set_index(keys)[["agrees"]], on=keys)
    frame["BestLB"] = frame[["EmpLB", "BestLB"]].max(axis=1)
    for low in ("EmpLB", "BestLB"):
        for high in ("FaithUB", "BestUB"):
            if not (frame[low] <= frame[high] + 1e-12).all():
                raise AssertionError(f"{low} > {high}: a bound is wrong, please report it\n{frame}")
    if (frame["agreement_certified"] & ~frame["agrees"]).any():
        raise AssertionError(f"an agreement is certified where PGD disagrees, please report it\n{frame}")
    return frame


def ladder(p: Params) -> pd.DataFrame:
    """Upper bounds of the FD student by each step of RUNGS and by `best`, on the images of `best`, for every ε.

    One row per (dataset, eps, rung, image) with `FaithUB`; no step is above the one before.
    """
    frame = best(p).query("method == 'FD'").drop(columns="FaithUB").rename(columns={"BestUB": "best"})
    keys, names = ["dataset", "eps", "image", "label"], {"var_name": "rung", "value_name": "FaithUB"}
    parts = [part.melt(keys, [*RUNGS, "best"], **names) for _, part in frame.groupby("eps", sort=False)]
    return pd.concat(parts, ignore_index=True)


def lower_bound(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float, steps: int | None = None):
    """EmpLB (§4.1) with the parameters' attack: 50 steps of 2.5ε/50 and 5 restarts unless they say otherwise."""
    return evaluation.empirical_lower_bound(
        guide,
        network,
        images.x,
        float(eps),
        steps=steps or p.evaluate.steps,
        restarts=p.evaluate.restarts,
        seed=p.seed,
        step_factor=float(p.evaluate.step_factor),
        clip=data.clip_range(p),
    )


def lower_bounds(
    p: Params, guide: nn.Module, networks: dict[str, nn.Module], images: Split, eps: float
) -> dict[str, np.ndarray]:
    """EmpLB (§4.1) of each network of `networks` to `guide` on all images, by name: `lower_bound` on all cores."""
    images = _owned(images)
    tasks = [_lower_task(p, guide, network, images, float(eps)) for network in networks.values()]
    tables = _tables(p, tasks, "EmpLB")
    return {name: table["EmpLB"].to_numpy() for name, table in zip(networks, tables, strict=True)}


def pgd_steps(p: Params) -> pd.DataFrame:
    """EmpLB by number of PGD steps for RSLAD and FD on every test image, at `table3.eps`: what Table 3 samples.

    One row per (method, steps, image).
    """
    images, guide, eps = _owned(data.test_subset(p)), teacher(p), float(p.evaluate.table3.eps)
    networks = {method: student(p, method) for method in ("RSLAD", "FD")}
    work = [(method, steps) for method in networks for steps in p.evaluate.table3.steps]
    tasks = [_lower_task(p, guide, networks[method], images, eps, steps) for method, steps in work]
    parts = _tables(p, tasks, "EmpLB by PGD steps")
    named = [_named(p, part, images, method=m, steps=steps) for (m, steps), part in zip(work, parts, strict=True)]
    return pd.concat(named, ignore_index=True)


def auto_attack(p: Params) -> pd.DataFrame:
    """Robust accuracy at the radius of training by two attacks, on the first `evaluate.autoattack.images` test images.

    One row per (dataset, method, image), method RT included: whether PGD (eq. 2), AutoAttack and both find nothing.
    """
    count, eps = min(p.evaluate.autoattack.images, p.data.test_images), p.train.attack.eps
    images = _owned(data.test_subset(p)[torch.arange(count)])
    networks = {"RT": teacher(p)} | {method: student(p, method) for method in STUDENTS}
    settings = {"restarts": 1, "version": p.evaluate.autoattack.version}
    tasks = [
        _Task("auto_attack", _depends(p, images, float(eps), network) | settings, _auto_attack, (p, images, network))
        for network in networks.values()
    ]
    parts = _tables(p, tasks, "AutoAttack")
    named = [_named(p, part, images, method=m, eps=str(eps)) for m, part in zip(networks, parts, strict=True)]
    return pd.concat(named, ignore_index=True)


def strong(p: Params) -> pd.DataFrame:
    """EmpLB beside a wider search, StrongLB, on the first `evaluate.strong.images` test images, for every ε.

    One row per (dataset, eps, method, image), with FaithUB; EmpLB ≤ StrongLB ≤ FaithUB is checked. As any point found
    counts, StrongLB includes what PGD found in `faithfulness`.
    """
    count = min(p.evaluate.strong.images, p.data.test_images)
    images, guide = _owned(data.test_subset(p)[torch.arange(count)]), teacher(p)
    networks = {method: student(p, method) for method in STUDENTS}
    work = [(eps, method) for eps in p.evaluate.eps for method in networks]
    effort = p.evaluate.strong.model_dump(mode="json", include={"classes", "restarts"})
    tasks = [
        _Task(
            "strong",
            _depends(p, images, float(eps), guide, networks[method]) | effort,
            _strong,
            (p, guide, networks[method], images, float(eps), effort),
        )
        for eps, method in work
    ]
    parts = _tables(p, tasks, "EmpLB by a wider search")
    named = [_named(p, part, images, eps=str(e), method=m) for (e, m), part in zip(work, parts, strict=True)]
    wide = faithfulness(p).set_index(["eps", "method", "image"])[["EmpLB", "FaithUB"]]
    frame = pd.concat(named, ignore_index=True).join(wide, on=["eps", "method", "image"])
    frame["StrongLB"] = frame[["EmpLB", "StrongLB"]].max(axis=1)
    if not (frame["StrongLB"] <= frame["FaithUB"] + 1e-12).all():
        raise AssertionError(f"StrongLB > FaithUB: a bound is wrong, please report it\n{frame}")
    return frame


def heat_map(p: Params) -> tuple[pd.DataFrame, dict]:
    """Fig. 1: ‖f_RT − f_s‖∞ for SD and FD on a square through an image x and two corners x₁, x₂ of its ball.

    At x₁ the teacher is right and SD is wrong (an adversarial disagreement example, Def. 1); at x₂ both are right,
    with the largest difference in confidence. The image is one that all three networks classify correctly, with the
    clearest disagreement at x₁ and the smallest difference at x, preferring images on which FD never disagrees.
    Returns a frame with columns panel, a, b (see `square.cut`), difference, margin (of the teacher's class in the
    student's confidences: negative where they disagree), disagree; and a dict with `x`, `x1`, `x2` (1, *shape),
    their coordinates `where`, the image's `row`, `label`, and whether a disagreement was `found`.
    """
    images, guide = data.test_subset(p), teacher(p)
    students = {method: student(p, method) for method in ("SD", "FD")}
    eps, sd, restarts = float(p.evaluate.figure1.eps), students["SD"], p.evaluate.restarts
    options = _attack_options(p)
    at, clarity = square.corners(square.clear_disagreement, guide, sd, images, eps, restarts=restarts, **options)
    calm = evaluation.agreement(guide, students["FD"], images.x, eps, **options, restarts=restarts).holds
    right = torch.stack([evaluation.predictions(n, images.x) == images.y for n in (guide, *students.values())]).all(0)
    with torch.no_grad():
        apart = evaluation.confidence_difference(guide, sd, images.x)
    wanted = right & (clarity > 0)
    row = int((clarity - apart + 4.0 * wanted + 2.0 * (wanted & calm)).argmax())
    chosen = images[row : row + 1]
    x, x1 = chosen.x, at[row : row + 1]
    x2, _ = square.corners(square.same_class, guide, sd, chosen, eps, restarts=4 * restarts, **options)
    side = p.evaluate.figure1.points
    frame, points, where = square.cut(x, x1, x2, eps, side=side, seed=p.seed, clip=data.clip_range(p))
    panels = []
    for method, network in students.items():
        with torch.no_grad():
            hard, soft = guide(points).argmax(1), torch.softmax(network(points), 1)
            margin = square.margins(soft, hard).double().numpy()
            difference = evaluation.confidence_difference(guide, network, points).double().numpy()
        panels.append(frame.assign(panel=method, difference=difference, margin=margin, disagree=margin < 0))
    details = {"x": x, "x1": x1, "x2": x2, "where": where, "row": row, "image": int(images.index[row])}
    details |= {"eps": p.evaluate.figure1.eps, "label": int(images.y[row]), "found": bool(wanted[row])}
    return pd.concat(panels, ignore_index=True), details


def fingerprint(network: nn.Module) -> str:
    """16 hexadecimal digits that change with a network's layers or any of its weights."""
    digest = hashlib.sha256(repr(network).encode())
    for name, weight in network.state_dict().items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Task:
    """A table of the store, found by `kind` and `depends`, and what makes it anywhere: `build(*arguments)`."""

    kind: str
    depends: dict
    build: Callable[..., pd.DataFrame]
    arguments: tuple
    name: str = ""

    def stored(self, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        return store.table(self.kind, self.depends, make, name=self.name)


def _tables(p: Params, tasks: list[_Task], description: str) -> list[pd.DataFrame]:
    """The table of each task, in order: read from the store, or made on all cores and stored as soon as it is there."""
    wanted = {store.key(task.kind, **task.depends): task for task in tasks}
    if any(not store.exists(task.kind, task.depends) for task in wanted.values()):
        # One notebook at a time has all cores; what it makes, another that waited need not make again.
        with store.alone("measuring", "measuring on all cores"):
            _measure(p, list(wanted.values()), description)
    return [task.stored(partial(task.build, *task.arguments)) for task in tasks]


def _measure(p: Params, tasks: list[_Task], description: str) -> None:
    """Make and store those of the tables that are not there."""
    missing = [task for task in tasks if not store.exists(task.kind, task.depends)]
    calls = [partial(_make, MEASURE, task.build, *task.arguments) for task in missing]
    done, at_once = len(tasks) - len(missing), p.models.teacher.kind == "convolutional"  # whose pieces take long
    bar = {"desc": f"{p.profile}: {description}", "unit": "piece", "leave": False}
    with tqdm(total=len(tasks), initial=done, **bar) as bar:
        for place, table in parallel.run(calls, sample=0.0 if at_once else None):
            missing[place].stored(lambda table=table: table)
            bar.update()


def _make(measure: str, build: Callable[..., pd.DataFrame], *arguments) -> pd.DataFrame:
    """A task's table; refused where a worker has other code than the key says."""
    if measure != MEASURE:
        raise FaithkdError(
            "a worker has other code than this process: faithkd was edited meanwhile, or is another version there; "
            "start the run again, and the cluster's workers too"
        )
    return build(*arguments)


def _owned(images: Split) -> Split:
    """A copy: what is sent to another process is the whole memory behind a tensor, however little of it is seen."""
    return images[torch.arange(len(images))]


def _lower_task(p: Params, guide, network, images: Split, eps: float, steps: int | None = None) -> _Task:
    depends = _depends(p, images, eps, guide, network) | {"restarts": p.evaluate.restarts}
    depends |= {} if steps is None else {"steps": steps}
    return _Task("emp_lb", depends, _lower_bound, (p, guide, network, images, eps, steps))


def _pair_task(p: Params, guide, network, images: Split, eps: float) -> _Task:
    depends = _depends(p, images, eps, guide, network)
    depends["bounds"] = p.bounds.model_dump(mode="json", include={"method", "solver", "milp_nodes"})
    return _Task("faith_ub", depends, _upper_bound, (p, guide, network, images, eps))


def _alone_task(p: Params, network, images: Split, eps: float) -> _Task:
    depends = _depends(p, images, eps, network) | {"bounds": p.bounds.method}
    return _Task("confidences", depends, _confidences, (p, network, images, eps))


def _confidences(p: Params, network, images: Split, eps: float) -> pd.DataFrame:
    """Bounds of every confidence over the ball, eq. (10): columns lower0 …, upper0 …, and whether all is `finite`."""
    highest = difference_bounds(network, images.x, eps, method=p.bounds.method, clip=data.clip_range(p))
    ends = zip(("lower", "upper"), softmax_interval(highest), strict=True)
    columns = {f"{name}{c}": end[:, c].numpy() for name, end in ends for c in range(end.shape[1])}
    return pd.DataFrame(columns | {"finite": highest.isfinite().flatten(1).all(1).numpy()})


def _eq11(guide: pd.DataFrame, network: pd.DataFrame) -> pd.DataFrame:
    """FaithUB and its status from the `_confidences` of teacher and student, eq. (11)."""
    both = [
        tuple(torch.from_numpy(frame.filter(regex=f"^{end}").to_numpy(copy=True)) for end in ("lower", "upper"))
        for frame in (guide, network)
    ]
    finite = guide["finite"].to_numpy() & network["finite"].to_numpy()
    values = np.where(finite, interval_bound(*both).numpy(), 1.0)
    return pd.DataFrame({"FaithUB": values, "status": np.where(finite, CERTIFIED, NOT_FINITE)})


def _lower_bound(*arguments) -> pd.DataFrame:
    return pd.DataFrame({"EmpLB": lower_bound(*arguments).values})


def _robustness(p: Params, images: Split, eps: float, guide, network) -> pd.DataFrame:
    options = _attack_options(p)
    robust = evaluation.robust(network, images.x, images.y, eps, **options).holds
    agrees = evaluation.agreement(guide, network, images.x, eps, **options).holds
    return pd.DataFrame({"robust": robust.numpy(), "agrees": agrees.numpy()})


def _auto_attack(p: Params, images: Split, network) -> pd.DataFrame:
    eps, options = float(p.train.attack.eps), {"seed": p.seed, "clip": data.clip_range(p)}
    pgd = evaluation.robust(network, images.x, images.y, eps, **_attack_options(p)).holds
    version = p.evaluate.autoattack.version
    auto = evaluation.auto_attack(network, images.x, images.y, eps, version=version, **options).holds
    return pd.DataFrame({"PGD": pgd.numpy(), "AutoAttack": auto.numpy(), "both": (pgd & auto).numpy()})


def _strong(p: Params, guide, network, images: Split, eps: float, effort: dict) -> pd.DataFrame:
    found = evaluation.strong_lower_bound(guide, network, images.x, eps, **_attack_options(p), **effort)
    return pd.DataFrame({"StrongLB": found.values.numpy()})


def _upper_bound(p: Params, guide, network, images: Split, eps: float) -> pd.DataFrame:
    bound = faithfulness_upper_bound(
        guide,
        network,
        images.x,
        eps,
        method=p.bounds.method,
        solver=p.bounds.solver,
        max_nodes=p.bounds.milp_nodes,
        clip=data.clip_range(p),
    )
    return pd.DataFrame({"FaithUB": bound.values.numpy(), "status": bound.status})


def _best(p: Params, guide, students: list, images: Split, eps: float) -> pd.DataFrame:
    options = {"nodes": p.bounds.best_nodes, "seed": p.seed, "clip": data.clip_range(p), "agreement": True, "jobs": 1}
    parts = []
    for number, bound in enumerate(faithfulness_upper_bounds(guide, students, images.x, eps, method="best", **options)):
        columns = {"student": number, "BestLB": bound.lower.numpy(), "BestUB": bound.values.numpy(), "step": bound.step}
        columns |= {name: bound.rungs[name].numpy() for name in RUNGS}
        parts.append(pd.DataFrame(columns | {"agreement_certified": bound.agrees.numpy()}))
    return pd.concat(parts, ignore_index=True)


def _attack_options(p: Params) -> dict:
    return {
        "steps": p.evaluate.steps,
        "step_factor": float(p.evaluate.step_factor),
        "seed": p.seed,
        "clip": data.clip_range(p),
    }


def _depends(p: Params, images: Split, eps: float, *networks: nn.Module) -> dict:
    """What a measurement depends on; the images and networks themselves, so that anyone's pair can be measured."""
    pixels = hashlib.sha256(images.x.contiguous().numpy().tobytes() + images.y.contiguous().numpy().tobytes())
    return {
        "measure": MEASURE,
        "networks": [fingerprint(network) for network in networks],
        "images": pixels.hexdigest()[:16],
        "eps": eps,
        "steps": p.evaluate.steps,
        "step_factor": float(p.evaluate.step_factor),
        "seed": p.seed,
        "clip": p.data.clip,
    }


def _named(p: Params, part: pd.DataFrame, images: Split, **names) -> pd.DataFrame:
    """A piece with what it belongs to in front: dataset, the given names, and the image's place in the raw set."""
    part = part.reset_index(drop=True)
    for place, (name, value) in enumerate({"dataset": p.data.name, **names}.items()):
        part.insert(place, name, value)
    part.insert(len(names) + 1, "image", images.index.numpy())
    part.insert(len(names) + 2, "label", images.y.numpy())
    return part


def _code(method: losses.Method) -> str:
    """A digest of the loss and the attack as written: edit one, and it is trained anew."""
    if not method.code:
        raise FaithkdError(
            f"the loss or the attack of {method.title} cannot be read as source, so its networks could not be told "
            "from others; define both with def in a file or a notebook cell"
        )
    return method.code
