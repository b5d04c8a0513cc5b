"""The paper's experiments: what the notebooks call. Each loads what is in the store and makes what is not."""

import hashlib
import inspect
import itertools
import json
import re
from ast import parse, unparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from textwrap import dedent
from types import CodeType

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from faithkd import recipes, workers
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
from faithkd.core import data, evaluation, losses, models, training
from faithkd.core.data import Split
from faithkd.core.losses import METHODS
from faithkd.errors import FaithkdError
from faithkd.report import figure1, ledger
from faithkd.report.paper import STUDENTS
from faithkd.reproduce import artefacts
from faithkd.reproduce.params import Params, Ratio, changed, leaves, plain

# Images bounded in one piece of work: few enough to lose little when a run is stopped and to keep all cores busy to
# the end, enough to be worth sending. Slow methods, which take about a second for an image, have smaller pieces.
# Never a function of the number of processes, on which no result may depend.
PIECE = {"interval": 100, "crown": 100}
SLOW_PIECE = 10

RUNGS = ("interval", "crown", "alpha-crown", "joint")  # steps below `best` that take seconds at most
AS_IS = "as in the profile"  # among `readings`, the parameters unchanged


def reseeded(p: Params, add: int) -> Params:
    """The same parameters with everything drawn anew: the seed raised by `add`."""
    return p.model_copy(update={"seed": p.seed + add})


def repeats(p: Params) -> list[Params]:
    """The parameters of each repeat: `p.repeats` seeds from `p.seed` on, networks and test subset anew."""
    return [reseeded(p, add) for add in range(p.repeats)]


def over_seeds(p: Params, measure: Callable[..., pd.DataFrame], **options) -> pd.DataFrame:
    """What `measure` (robustness, faithfulness, pgd_steps, accuracy) gives for each repeat, with a column `seed`."""
    return pd.concat([measure(q, **options).assign(seed=q.seed) for q in repeats(p)], ignore_index=True)


# --- networks


def teacher(p: Params) -> nn.Sequential:
    """The robust teacher f_RT, trained adversarially by eq. (3), §A."""
    return trained(p, "RT")[0]


def student(p: Params, method: str, alpha: float | None = None, rule: losses.Method | None = None) -> nn.Sequential:
    """The student that `method` (one of SD, ARD, RSLAD, FD: eqs 1, 4, 5, 12) distils from the teacher of `p`.

    `alpha` replaces the loss weighting α of the parameters (Table 5); `rule`, a loss and an attack of your own,
    replaces those of the method, whose learning rate, temperature and so on stay.
    """
    return trained(p, method, alpha, rule)[0]


def students(p: Params, methods=STUDENTS) -> dict[str, nn.Sequential]:
    """The students of `p` by their methods."""
    return {method: student(p, method) for method in methods}


def history(p: Params, method: str) -> pd.DataFrame:
    """Loss, learning rate, held-out accuracy and robust accuracy after each epoch, for "RT" or a student."""
    return trained(p, method)[1]


def trained(
    p: Params, method: str, alpha: float | None = None, rule: losses.Method | None = None, *, bar: bool = True
) -> tuple[nn.Sequential, pd.DataFrame]:
    """A network, "RT" or a student's method, and the history of its training: found among the artefacts, or trained.

    `alpha` and `rule` as for `student`; `bar`: whether training shows one. The network's `place` says where it lies.
    """
    q, guide, rule = _chosen(p, method, alpha, rule)
    settings, architecture = getattr(q.train, method), _architecture(q, method)

    def blank() -> nn.Sequential:
        return models.build(architecture, data.SHAPES[q.data.name], seed=q.seed, initialisation=q.train.initialisation)

    def make(checkpoint):
        with workers.one_thread():
            weights, epochs = training.fit(
                blank(),
                guide,
                data.training(q),
                data.test(q) if q.train.early_stopping == "test" else data.validation(q),
                settings,
                q.train,
                method=losses.reversed_kl(rule) if q.train.kl == "reverse" and guide is not None else rule,
                seed=q.seed,
                device=device(q),
                clip=data.clip_range(q),
                checkpoint=checkpoint,
                description=f"{q.profile}: training {path.removesuffix('.safetensors')}" if bar else None,
            )
        return weights, {"history": epochs}

    path, inputs = place(q, method, guide, rule)
    weights, notes = artefacts.artefact(path, inputs, make)
    network = blank()
    network.load_state_dict(weights)
    network.place = path.removeprefix("weights/").removesuffix(".safetensors")
    return network.eval(), pd.DataFrame(notes["history"])


def _chosen(p: Params, method: str, alpha: float | None, rule: losses.Method | None):
    """What `trained` trains: the parameters with `alpha` in them, the teacher of a student, the loss and attack."""
    if method not in ("RT", *METHODS):
        raise ValueError(f"no settings for {method!r} in the parameters; there are RT, {', '.join(METHODS)}")
    if alpha is not None:
        settings = getattr(p.train, method).model_copy(update={"alpha": Ratio(alpha)})
        p = p.model_copy(update={"train": p.train.model_copy(update={method: settings})})
    guide = None if method == "RT" else teacher(p)
    return p, guide, rule or METHODS.get(method, training.ADVERSARIAL)


def _architecture(p: Params, method: str):
    return p.models.teacher if method == "RT" else p.models.student


def device(p: Params) -> str:
    """Where to train: `p.device`, with "auto" a GPU where there is one, else the CPU."""
    return p.device if p.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


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
    """Train all of `networks` that are not there, as many at once as there are cores; how many those were.

    Always on this machine, where each keeps its checkpoint: what is stopped goes on where it was.
    """
    count = 0
    for kind in ("teachers", "students"):  # in this order, as a student's inputs hold its teacher's weights
        missing = {}
        for q, method, alpha in networks(p):
            if (method == "RT") == (kind == "teachers"):
                r, guide, rule = _chosen(q, method, alpha, None)
                path, inputs = place(r, method, guide, rule)
                if artefacts.load(path, inputs) is None:
                    missing[path] = partial(_train, q, method, alpha)
        calls = [partial(call, bar=len(missing) == 1 or workers.jobs() == 1) for call in missing.values()]
        bar = {"unit": "network", "total": len(calls), "leave": False, "disable": not calls}
        for _ in tqdm(workers.run(calls, sample=0.0, here=True), f"{p.profile}: training {kind}", **bar):
            count += 1
    return count


def _train(*network, bar: bool) -> None:
    """`trained` for another process: what comes of it is an artefact."""
    trained(*network, bar=bar)


# --- what a network is called, and what it was made from


def place(p: Params, method: str, guide: nn.Module | None, rule: losses.Method) -> tuple[str, dict]:
    """Where a network lies and the inputs that it is made from: ("weights/mnist/alpha=0.75/seed0/FD.safetensors", …).

    The path says what differs from the profile as it stands in its file; a loss of one's own adds its title.
    """
    inputs, usual = network_inputs(p, method, guide, rule), network_inputs(plain(p), method, guide, rule)
    own = rule not in (METHODS.get(method), training.ADVERSARIAL)
    name = f"{method}-{_safe(rule.title)}" if own else method
    return "/".join(["weights", p.profile, *changes(inputs, usual), f"seed{p.seed}", f"{name}.safetensors"]), inputs


def network_inputs(p: Params, method: str, guide: nn.Module | None, rule: losses.Method) -> dict:
    """Everything that decides which weights come out of a training; of a student also its teacher, with its weights."""
    unused = {"RT", *METHODS} | ({"kl"} if guide is None else set())
    own = rule not in (METHODS.get(method), training.ADVERSARIAL)
    return {
        "recipe": recipes.TRAINING,
        "method": method,
        "loss": _written(rule) if own else rule.title,
        "seed": p.seed,
        "data": p.data.model_dump(mode="json", exclude={"test_images"}),
        "architecture": _architecture(p, method).model_dump(mode="json"),
        "settings": getattr(p.train, method).model_dump(mode="json"),
        "schedule": p.train.model_dump(mode="json", exclude=unused),
        "teacher": guide
        and {
            "weights": fingerprint(guide),
            "architecture": p.models.teacher.model_dump(mode="json"),
            "settings": p.train.RT.model_dump(mode="json"),
        },
    }


def changes(inputs: dict, usual: dict) -> list[str]:
    """What differs from the usual inputs, as one name of a folder: ["space=pixel+clip=true"]; [] where nothing does."""
    was, found = leaves(usual), []
    for name, value in leaves(inputs).items():
        if value != was.get(name):
            short = re.sub(r"^(data|architecture|settings|schedule)\.", "", name)
            short = re.sub(r"^teacher\.(architecture|settings)\.", "RT.", short)
            found.append(f"{short}={_safe(value if isinstance(value, str) else json.dumps(value))}")
    return ["+".join(found)] if found else []


def _safe(text: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", re.sub(r"[\[\]\"]|(?<=,) ", "", text))


def _written(rule: losses.Method) -> list:
    """A loss and an attack of one's own as they are written, so that an edited one is trained anew."""
    try:
        return [_source(part) for part in (rule.loss, rule.attack) if part]
    except (OSError, TypeError, SyntaxError):
        raise FaithkdError(
            f"the loss or the attack of {rule.title} cannot be read as source, so its networks could not be told "
            "from others; define both with def in a file or a notebook cell"
        ) from None


def _source(function, seen: tuple = ()) -> list:
    """A function's source without comments, with the plain values and the functions of its own file that it uses."""
    if isinstance(function, partial):
        filled = [*enumerate(function.args), *sorted(function.keywords.items())]
        return [_source(function.func, seen), *([name, _value(value, seen)] for name, value in filled)]
    said = [
        unparse(parse(dedent(inspect.getsource(function)))),
        [_value(each, seen) for each in function.__defaults__ or ()],
    ]
    codes, names = [function.__code__], set()
    while codes:  # of inner functions too, as an attack's is one
        code = codes.pop()
        names |= set(code.co_names)
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    around = function.__globals__ | inspect.getclosurevars(function).nonlocals
    enclosed = set(function.__code__.co_freevars)
    for name in sorted((names | enclosed) & around.keys()):
        value = around[name]
        if isinstance(value, bool | int | float | str | tuple):
            said.append(f"{name} = {value!r}")
        elif inspect.isfunction(value) and value.__module__ == function.__module__ and value not in (function, *seen):
            said.append(_source(value, (function, *seen)))
    return said


def _value(value, seen: tuple):
    return _source(value, seen) if callable(value) else repr(value)


def fingerprint(network: nn.Module) -> str:
    """16 hexadecimal digits that change with a network's layers or any of its weights."""
    digest = hashlib.sha256(repr(network).encode())
    for name, weight in network.state_dict().items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- measurements


def accuracy(p: Params, methods=STUDENTS) -> pd.DataFrame:
    """Clean accuracies in % on the *whole* test set, as §6 has them: one row with `dataset`, RT and the students."""
    images = data.test(p)
    right = {
        method: evaluation.predictions(network, images.x) == images.y
        for method, network in ({"RT": teacher(p)} | students(p, methods)).items()
    }
    shares = {method: 100 * float(hits.double().mean()) for method, hits in right.items()}
    return pd.DataFrame([{"dataset": p.data.name, **shares}])


def robustness(p: Params, methods=STUDENTS) -> pd.DataFrame:
    """Per image: `robust` (does PGD fail, eq. 2) and `agrees` with the teacher (eqs 13–14), for ε = 0 and every ε.

    One row per (dataset, eps, method, image), method RT included: what Table 1 averages.
    """
    images, guide = data.test_subset(p), teacher(p)
    nets = {"RT": guide} | students(p, methods)
    names = [{"eps": str(eps), "method": method} for eps in ("0", *p.evaluate.eps) for method in nets]
    pieces = [
        _piece(p, "robustness", _robustness, (guide, nets[name["method"]]), images, Ratio(name["eps"]))
        for name in names
    ]
    return _together(p, images, names, _contents(p, pieces, "robustness and agreement"))


def faithfulness(p: Params, alphas: bool = False, methods=STUDENTS, count: int | None = None) -> pd.DataFrame:
    """Per image: EmpLB (§4.1), FaithUB (§4.2, eqs 8–11) and the status of its certificate, for every ε.

    One row per (dataset, eps, method, image): what Table 2 averages and figs 2–3 draw. With `alphas` the students
    are FD at each α of `p.ablation.alpha` instead, in a column `alpha` (Table 5). `count`: of how many test images, the
    first ones; all without it. EmpLB ≤ FaithUB is checked.
    """
    images, guide = data.test_subset(p)[:count], teacher(p)
    if alphas:
        chosen = [{"method": "FD", "alpha": float(alpha)} for alpha in p.ablation.alpha]
    else:
        chosen = [{"method": method} for method in methods]
    nets = [student(p, **one) for one in chosen]
    names = [{"eps": str(eps), **one} for eps in p.evaluate.eps for one in chosen]
    pairs = [(network, eps) for eps in p.evaluate.eps for network in nets]
    return _together(p, images, names, _brackets(p, guide, pairs, images))


def bracket(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> pd.DataFrame:
    """EmpLB ≤ δ* ≤ FaithUB for any pair of networks on any images: columns EmpLB, FaithUB, status (N rows).

    Kept on disk where `network` is one of `trained`.
    """
    return _brackets(p, guide, [(network, eps)], images)[0]


def _brackets(p: Params, guide: nn.Module, pairs: list, images: Split) -> list[pd.DataFrame]:
    """`bracket` for each (student, ε) of `pairs`; the work of all of them is shared out together."""
    # EmpLB is not cut, as all its random starts come from one generator; first, as these are the longest pieces.
    lowers = [_lower_piece(p, guide, network, images, eps) for network, eps in pairs]
    if p.bounds.method in ALONE:  # then eq. (11) takes what is known of each, and a teacher is bounded once for all
        uppers = [
            [_cut(p, "confidences", _confidences, (each,), images, eps) for each in (guide, network)]
            for network, eps in pairs
        ]
    else:
        uppers = [[_cut(p, "FaithUB", _upper_bound, (guide, network), images, eps)] for network, eps in pairs]
    pieces = [*lowers, *(piece for upper in uppers for part in upper for piece in part)]
    contents = iter(_contents(p, pieces, "EmpLB and FaithUB"))
    made = [next(contents) for _ in lowers]
    found = []
    for lower, upper, (_, eps) in zip(made, uppers, pairs, strict=True):
        parts = [[next(contents) for _ in part] for part in upper]
        high = _eq11(*parts) if p.bounds.method in ALONE else pd.concat(parts[0], ignore_index=True)
        found.append(_checked(pd.concat([lower, high], axis=1), ["EmpLB"], ["FaithUB"], f" at ε = {eps}"))
    return found


def pgd_steps(p: Params) -> pd.DataFrame:
    """EmpLB by number of PGD steps for RSLAD and FD on every test image, at `table3.eps`: what Table 3 samples.

    One row per (method, steps, image).
    """
    images, guide, nets = data.test_subset(p), teacher(p), students(p, ("RSLAD", "FD"))
    names = [{"method": method, "steps": steps} for method in nets for steps in p.evaluate.table3.steps]
    pieces = []
    for name in names:
        q = p.model_copy(update={"evaluate": p.evaluate.model_copy(update={"steps": name["steps"]})})
        pieces.append(_lower_piece(q, guide, nets[name["method"]], images, p.evaluate.table3.eps))
    return _together(p, images, names, _contents(p, pieces, "EmpLB by PGD steps"))


def lower_bound(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float):
    """EmpLB (§4.1) with the parameters' attack: 50 steps of 2.5ε/50 and 5 restarts unless they say otherwise."""
    options = {"restarts": p.evaluate.restarts, **_search(p)}
    return evaluation.empirical_lower_bound(guide, network, images.x, float(eps), **options)


def lower_bounds(
    p: Params, guide: nn.Module, networks: dict[str, nn.Module], images: Split, eps: float
) -> dict[str, np.ndarray]:
    """EmpLB (§4.1) of each network of `networks` to `guide` on all images, by name: `lower_bound` on all cores."""
    pieces = [_lower_piece(p, guide, network, images, eps) for network in networks.values()]
    contents = _contents(p, pieces, "EmpLB")
    return {name: table["EmpLB"].to_numpy() for name, table in zip(networks, contents, strict=True)}


def auto_attack(p: Params) -> pd.DataFrame:
    """Robust accuracy at the radius of training by two attacks, on the first `evaluate.autoattack.images` test images.

    One row per (dataset, method, image), method RT included: whether PGD (eq. 2), AutoAttack and both find nothing.
    """
    images, eps = data.test_subset(p)[: p.evaluate.autoattack.images], p.train.attack.eps
    nets = {"RT": teacher(p)} | students(p)
    pieces = [_piece(p, "AutoAttack", _auto_attack, (network,), images, eps) for network in nets.values()]
    names = [{"method": method, "eps": str(eps)} for method in nets]
    return _together(p, images, names, _contents(p, pieces, "AutoAttack"))


def strong(p: Params) -> pd.DataFrame:
    """EmpLB beside a wider search, StrongLB, on the first `evaluate.strong.images` test images, for every ε.

    One row per (dataset, eps, method, image), with FaithUB; EmpLB ≤ StrongLB ≤ FaithUB is checked. As any point found
    counts, StrongLB includes what PGD found in `faithfulness`.
    """
    images, guide, nets = data.test_subset(p)[: p.evaluate.strong.images], teacher(p), students(p)
    work = list(itertools.product(p.evaluate.eps, nets))
    pieces = [_piece(p, "StrongLB", _strong, (guide, nets[method]), images, eps) for eps, method in work]
    names = [{"eps": str(eps), "method": method} for eps, method in work]
    frame = _together(p, images, names, _contents(p, pieces, "EmpLB by a wider search"))
    keys = ["eps", "method", "image"]
    frame = frame.join(faithfulness(p).set_index(keys)[["EmpLB", "FaithUB"]], on=keys)
    frame["StrongLB"] = frame[["EmpLB", "StrongLB"]].max(axis=1)
    return _checked(frame, ["StrongLB"], ["FaithUB"])


def best(p: Params) -> pd.DataFrame:
    """Both ends of the bracket as tight as we get them, past the paper, on the first `bounds.best_images` test images.

    One row per (dataset, eps, method, image): EmpLB and FaithUB of `faithfulness`, the ends BestLB and BestUB after
    `bounds.best_nodes` parts of each ball, the `step` that gave the upper one, those of RUNGS on the way to it, and
    whether teacher and student agree on the ball: `agrees` as far as PGD sees (eqs 13-14), `agreement_certified` where
    it is proved (Def. 3). As any point found counts, BestLB includes what PGD found in `faithfulness`.
    """
    images, guide, nets = data.test_subset(p)[: p.bounds.best_images], teacher(p), students(p)
    # All students of a piece together: for most of the time the teacher is bounded, once for all.
    cuts = [_cut(p, "best", _best, (*nets.values(), guide), images, eps) for eps in p.evaluate.eps]
    contents, parts = iter(_contents(p, [piece for cut in cuts for piece in cut], "best bounds")), []
    names = [{"eps": str(eps), "method": method} for eps in p.evaluate.eps for method in nets]
    for cut in cuts:
        whole = pd.concat([next(contents) for _ in cut], ignore_index=True)
        parts += [whole[whole["student"] == number].drop(columns="student") for number, _ in enumerate(nets)]
    frame, keys = _together(p, images, names, parts), ["eps", "method", "image"]
    frame = frame.join(faithfulness(p).set_index(keys)[["EmpLB", "FaithUB"]], on=keys)
    frame = frame.join(robustness(p).set_index(keys)[["agrees"]], on=keys)
    frame["BestLB"] = frame[["EmpLB", "BestLB"]].max(axis=1)
    if (frame["agreement_certified"] & ~frame["agrees"]).any():
        raise AssertionError(f"an agreement is certified where PGD disagrees, please report it\n{frame}")
    return _checked(frame, ["EmpLB", "BestLB"], ["FaithUB", "BestUB"])


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
        teacher(p), nets, images, float(choice.eps), side=choice.points, restarts=restarts, search=_search(p)
    )
    return frame, details | {"eps": choice.eps}


# --- pieces of measurements: what one call makes, and one artefact keeps


@dataclass(frozen=True)
class Piece:
    """A measurement of networks on images: where it lies (nowhere for networks without a name), from what, by what."""

    path: str | None
    inputs: dict
    make: Callable[[], object]

    @property
    def key(self) -> str:
        return json.dumps([self.path, self.inputs])

    def load(self, mend: bool = False):
        found = self.path and artefacts.load(self.path, self.inputs, mend)
        return found and found[0]

    def keep(self, content):
        if self.path is None:
            return content
        artefacts.save(self.path, self.inputs, content, {})
        return self.load()


def _piece(p: Params, kind: str, build: Callable, nets: tuple, images: Split, eps: float, first: int = 0) -> Piece:
    """What `build(p, nets, images, eps)` measures; the last of `nets` gives its name, `first` the images' place."""
    images = images[torch.arange(len(images))]  # a copy: the whole memory behind a tensor would go to other processes
    chosen, usual = _settings(kind, p), _settings(kind, plain(p))
    pixels = images.x.contiguous().numpy().tobytes() + images.y.contiguous().numpy().tobytes()
    inputs = {
        "recipe": recipes.MEASURING,
        "networks": [fingerprint(network) for network in nets],
        "images": hashlib.sha256(pixels).hexdigest()[:16],
        "eps": float(eps),
        "settings": chosen,
    }
    path = None
    if home := getattr(nets[-1], "place", None):
        steps = [kind, *changes({"settings": chosen}, {"settings": usual}), f"eps={_safe(str(eps))}"]
        form = "safetensors" if kind == "confidences" else "csv"
        path = "/".join(["measurements", home, *steps, f"images={first}-{first + len(images) - 1}.{form}"])
    return Piece(path, inputs, partial(build, p, nets, images, float(eps)))


def _lower_piece(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> Piece:
    return _piece(p, "EmpLB", _lower_bound, (guide, network), images, eps)


def _cut(p: Params, kind: str, build: Callable, nets: tuple, images: Split, eps: float) -> list[Piece]:
    """The same measurement in pieces of a few images each."""
    size = SLOW_PIECE if kind == "best" else PIECE.get(p.bounds.method, SLOW_PIECE)
    return [
        _piece(p, kind, build, nets, images[first : first + size], eps, first) for first in range(0, len(images), size)
    ]


def _settings(kind: str, p: Params) -> dict:
    """The parameters that decide a measurement, beside networks, images and ε."""
    bounds = p.bounds.model_dump(mode="json")
    more = {
        "robustness": {"restarts": 1},
        "EmpLB": {"restarts": p.evaluate.restarts},
        "FaithUB": {name: bounds[name] for name in ("method", "solver", "milp_nodes")},
        "confidences": {"method": bounds["method"]},
        "AutoAttack": {"version": p.evaluate.autoattack.version},
        "StrongLB": p.evaluate.strong.model_dump(mode="json", include={"classes", "restarts"}),
        "best": {"nodes": bounds["best_nodes"]},
    }
    return {**_search(p), "clip": p.data.clip, **more[kind]}  # instead of the tensors at which it clips


def _search(p: Params) -> dict:
    """The parameters' attack, as keyword arguments of the functions of `evaluation`."""
    options = {"steps": p.evaluate.steps, "step_factor": float(p.evaluate.step_factor)}
    return {**options, "seed": p.seed, "clip": data.clip_range(p)}


def _contents(p: Params, pieces: list[Piece], description: str) -> list:
    """The content of each piece, in order: read where it is there, else made on all cores and kept as soon as made."""
    wanted = {piece.key: piece for piece in pieces}
    found = {key: piece.load() for key, piece in wanted.items()}
    if any(content is None for content in found.values()):
        # One notebook at a time has all cores; what it makes, another that waited need not make again.
        with artefacts.alone("measuring", "measuring on all cores"):
            found |= {key: wanted[key].load(mend=True) for key, content in found.items() if content is None}
            missing = [key for key, content in found.items() if content is None]
            calls = [partial(_make, recipes.MEASURING, wanted[key].make) for key in missing]
            long = p.models.teacher.kind == "convolutional"
            bar = {"desc": f"{p.profile}: {description}", "unit": "piece", "leave": False}
            with tqdm(total=len(found), initial=len(found) - len(missing), **bar) as bar:
                for number, content in workers.run(calls, sample=0.0 if long else None):
                    found[missing[number]] = wanted[missing[number]].keep(content)
                    bar.update()
    return [found[piece.key] for piece in pieces]


def _make(recipe: int, make: Callable[[], object]):
    """A piece's content; refused where a worker has another version of the package than this process."""
    if recipe != recipes.MEASURING:
        raise FaithkdError("a worker has another version of faithkd than this process: start the cluster anew")
    return make()


def _together(p: Params, images: Split, names: list[dict], parts: list[pd.DataFrame]) -> pd.DataFrame:
    """All parts as one frame, each with what it belongs to in front: dataset, names, the image's place and label."""
    frames = []
    for name, part in zip(names, parts, strict=True):
        front = {"dataset": p.data.name, **name, "image": images.index.numpy(), "label": images.y.numpy()}
        frames.append(pd.concat([pd.DataFrame(front), part.reset_index(drop=True)], axis=1))
    return pd.concat(frames, ignore_index=True)


def _checked(frame: pd.DataFrame, lows: list[str], highs: list[str], where: str = "") -> pd.DataFrame:
    """The frame, in which every lower bound is at most every upper bound; AssertionError where one is not."""
    for low, high in itertools.product(lows, highs):
        # Written so that a NaN fails; 1e-12 is the rounding error of evaluating the lower bound itself in float64.
        if not (frame[low] <= frame[high] + 1e-12).all():
            raise AssertionError(f"{low} > {high}{where}: a bound is wrong, please report it\n{frame}")
    return frame


# --- what makes the pieces, in whatever process


def _lower_bound(p: Params, nets: tuple, images: Split, eps: float) -> pd.DataFrame:
    return pd.DataFrame({"EmpLB": lower_bound(p, *nets, images, eps).values})


def _robustness(p: Params, nets: tuple, images: Split, eps: float) -> pd.DataFrame:
    guide, network = nets
    robust = evaluation.robust(network, images.x, images.y, eps, **_search(p)).holds
    agrees = evaluation.agreement(guide, network, images.x, eps, **_search(p)).holds
    return pd.DataFrame({"robust": robust.numpy(), "agrees": agrees.numpy()})


def _auto_attack(p: Params, nets: tuple, images: Split, eps: float) -> pd.DataFrame:
    (network,), options = nets, {"seed": p.seed, "clip": data.clip_range(p), "version": p.evaluate.autoattack.version}
    pgd = evaluation.robust(network, images.x, images.y, eps, **_search(p)).holds
    auto = evaluation.auto_attack(network, images.x, images.y, eps, **options).holds
    return pd.DataFrame({"PGD": pgd.numpy(), "AutoAttack": auto.numpy(), "both": (pgd & auto).numpy()})


def _strong(p: Params, nets: tuple, images: Split, eps: float) -> pd.DataFrame:
    effort = p.evaluate.strong.model_dump(include={"classes", "restarts"})
    found = evaluation.strong_lower_bound(*nets, images.x, eps, **_search(p), **effort)
    return pd.DataFrame({"StrongLB": found.values.numpy()})


def _confidences(p: Params, nets: tuple, images: Split, eps: float) -> dict[str, torch.Tensor]:
    """Bounds of every confidence over the ball, eq. (10): `lower`, `upper` (N, C), and whether all is `finite` (N,)."""
    highest = difference_bounds(*nets, images.x, eps, method=p.bounds.method, clip=data.clip_range(p))
    lower, upper = softmax_interval(highest)
    return {"lower": lower, "upper": upper, "finite": highest.isfinite().flatten(1).all(1)}


def _eq11(guide: list[dict], network: list[dict]) -> pd.DataFrame:
    """FaithUB and its status from the pieces of `_confidences` of teacher and student, eq. (11)."""
    lower, upper, finite = (
        [torch.cat([part[name] for part in parts]) for parts in (guide, network)]
        for name in ("lower", "upper", "finite")
    )
    values = interval_bound((lower[0], upper[0]), (lower[1], upper[1]))
    certified = (finite[0] & finite[1]).numpy()
    return pd.DataFrame(
        {"FaithUB": np.where(certified, values.numpy(), 1.0), "status": np.where(certified, CERTIFIED, NOT_FINITE)}
    )


def _upper_bound(p: Params, nets: tuple, images: Split, eps: float) -> pd.DataFrame:
    options = {"method": p.bounds.method, "solver": p.bounds.solver, "max_nodes": p.bounds.milp_nodes}
    bound = faithfulness_upper_bound(*nets, images.x, eps, **options, clip=data.clip_range(p))
    return pd.DataFrame({"FaithUB": bound.values.numpy(), "status": bound.status})


def _best(p: Params, nets: tuple, images: Split, eps: float) -> pd.DataFrame:
    *pupils, guide = nets
    options = {"nodes": p.bounds.best_nodes, "seed": p.seed, "clip": data.clip_range(p), "agreement": True, "jobs": 1}
    parts = []
    for number, bound in enumerate(faithfulness_upper_bounds(guide, pupils, images.x, eps, method="best", **options)):
        columns = {"student": number, "BestLB": bound.lower.numpy(), "BestUB": bound.values.numpy(), "step": bound.step}
        columns |= {name: bound.rungs[name].numpy() for name in RUNGS}
        parts.append(pd.DataFrame(columns | {"agreement_certified": bound.agrees.numpy()}))
    return pd.concat(parts, ignore_index=True)
