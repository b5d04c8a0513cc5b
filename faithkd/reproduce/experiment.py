"""The paper's experiments: what the notebooks call. Each loads what is in the store and makes what is not."""

import ast
import hashlib
import inspect
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from textwrap import dedent

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from faithkd import recipes, workers
from faithkd.bounds import faithfulness_upper_bounds
from faithkd.core import data, evaluation, losses, models, training
from faithkd.core.data import Split
from faithkd.core.losses import METHODS
from faithkd.errors import FaithkdError
from faithkd.report import figure1, figures, ledger
from faithkd.report.paper import STUDENTS
from faithkd.reproduce import artefacts
from faithkd.reproduce.params import Params, Ratio, changed, leaves, plain

# CROWN takes milliseconds an image. Slower bounds are measured, and kept, in pieces of a few images, lest much be
# lost when a run is stopped. Never a function of the number of processes, on which no result may depend.
QUICK = ("interval", "crown")
SLOW_PIECE = 10

RUNGS = ("interval", "crown", "alpha-crown", "joint")  # steps below `best` that take seconds at most
LOWER = ("EmpLB", "StrongLB", "BestLB")  # columns with lower bounds; all other numbers are upper bounds
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


def _written(rule: losses.Method) -> list[str]:
    """The source of a loss and an attack of one's own, and of what they name of their own file: functions, values."""
    texts, seen, left = [], [], [part for part in (rule.loss, rule.attack) if part]
    while left:
        function = left.pop(0)
        if isinstance(function, partial):
            filled = [*function.args, *(value for _, value in sorted(function.keywords.items()))]
            texts += [repr(value) for value in filled if not callable(value)]
            left += [function.func, *(value for value in filled if callable(value))]
        elif function not in seen:
            seen.append(function)
            tree = _parsed(function, rule.title)
            texts.append(ast.unparse(tree))  # without comments
            around = function.__globals__ | inspect.getclosurevars(function).nonlocals
            named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            for name in sorted(named & around.keys()):
                value = around[name]
                if isinstance(value, bool | int | float | str | tuple):
                    texts.append(f"{name} = {value!r}")
                elif inspect.isfunction(value) and value.__module__ == function.__module__:
                    left.append(value)
    return texts


def _parsed(function: Callable, title: str) -> ast.Module:
    try:
        return ast.parse(dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        raise FaithkdError(
            f"the loss or the attack of {title} cannot be read as source, so its networks could not be told "
            "from others; define both with def in a file or a notebook cell"
        ) from None


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
    guide, radii = teacher(p), (Ratio(0), *p.evaluate.eps)
    return _measured(p, ["robustness"], guide, {"RT": guide} | students(p, methods), radii, data.test_subset(p))


def faithfulness(p: Params, alphas: bool = False, methods=STUDENTS, count: int | None = None) -> pd.DataFrame:
    """Per image: EmpLB (§4.1), FaithUB (§4.2, eqs 8–11) and the status of its certificate, for every ε.

    One row per (dataset, eps, method, image): what Table 2 averages and figs 2–3 draw. With `alphas` the students
    are FD at each α of `p.ablation.alpha` instead, in a column `alpha` (Table 5). `count`: of how many test images, the
    first ones; all without it. EmpLB ≤ FaithUB is checked.
    """
    values = [float(alpha) for alpha in p.ablation.alpha] if alphas else []
    nets = {alpha: student(p, "FD", alpha) for alpha in values} or students(p, methods)
    frame = _bracketed(p, teacher(p), nets, p.evaluate.eps, data.test_subset(p)[:count])
    return frame.assign(alpha=frame["method"], method="FD") if alphas else frame


def bracket(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> pd.DataFrame:
    """EmpLB ≤ δ* ≤ FaithUB for any pair of networks on any images: columns EmpLB, FaithUB, status (N rows).

    Kept on disk where `network` is one of `trained`.
    """
    return _bracketed(p, guide, {"student": network}, [eps], images)[["EmpLB", "FaithUB", "status"]]


def pgd_steps(p: Params) -> pd.DataFrame:
    """EmpLB by number of PGD steps for RSLAD and FD on every test image, at `table3.eps`: what Table 3 samples.

    One row per (steps, method, image).
    """
    guide, nets, parts = teacher(p), students(p, ("RSLAD", "FD")), []
    for steps in p.evaluate.table3.steps:
        q = p.model_copy(update={"evaluate": p.evaluate.model_copy(update={"steps": steps})})
        frame = _measured(q, ["EmpLB"], guide, nets, [p.evaluate.table3.eps], data.test_subset(p))
        parts.append(frame.assign(steps=steps))
    return pd.concat(parts, ignore_index=True)


def lower_bound(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> evaluation.LowerBound:
    """EmpLB (§4.1) with the parameters' attack: 50 steps of 2.5ε/50 and 5 restarts unless they say otherwise."""
    options = {"restarts": p.evaluate.restarts, **_search(p)}
    return evaluation.empirical_lower_bound(guide, network, images.x, float(eps), **options)


def lower_bounds(
    p: Params, guide: nn.Module, networks: dict[str, nn.Module], images: Split, eps: float
) -> dict[str, np.ndarray]:
    """EmpLB (§4.1) of each network of `networks` to `guide` on all images, by name: `lower_bound` on all cores."""
    frame = _measured(p, ["EmpLB"], guide, networks, [eps], images)
    return {name: part["EmpLB"].to_numpy() for name, part in frame.groupby("method", sort=False)}


def auto_attack(p: Params) -> pd.DataFrame:
    """Robust accuracy at the radius of training by two attacks, on the first `evaluate.autoattack.images` test images.

    One row per (dataset, method, image), method RT included: whether PGD (eq. 2), AutoAttack and both find nothing.
    """
    images, nets = data.test_subset(p)[: p.evaluate.autoattack.images], {"RT": teacher(p)} | students(p)
    return _measured(p, ["AutoAttack"], None, nets, [p.train.attack.eps], images)


def strong(p: Params) -> pd.DataFrame:
    """EmpLB beside a wider search, StrongLB, on the first `evaluate.strong.images` test images, for every ε.

    One row per (dataset, eps, method, image), with FaithUB; EmpLB ≤ StrongLB ≤ FaithUB is checked. As any point found
    counts, StrongLB includes what PGD found in `faithfulness`.
    """
    images, keys = data.test_subset(p)[: p.evaluate.strong.images], ["eps", "method", "image"]
    frame = _measured(p, ["StrongLB"], teacher(p), students(p), p.evaluate.eps, images)
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
    images, keys = data.test_subset(p)[: p.bounds.best_images], ["eps", "method", "image"]
    frame = _measured(p, ["best"], teacher(p), students(p), p.evaluate.eps, images)
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


# --- pieces of measurements: one artefact each


@dataclass(frozen=True)
class Piece:
    """A measurement of `kind` of a network, beside a teacher or alone, on images; `first`: the place of the first."""

    p: Params
    kind: str
    guide: nn.Module | None
    network: nn.Module
    images: Split
    eps: float
    first: int = 0

    @property
    def path(self) -> str | None:
        """Where it lies; nowhere, and is measured each time, if its network has no name."""
        if not (home := getattr(self.network, "place", None)):
            return None
        chosen, usual = ({"settings": _settings(self.kind, each)} for each in (self.p, plain(self.p)))
        last = f"images={self.first}-{self.first + len(self.images) - 1}{artefacts.SUFFIX}"
        return "/".join(["measurements", home, self.kind, *changes(chosen, usual), f"eps={_safe(str(self.eps))}", last])

    @property
    def inputs(self) -> dict:
        pixels = self.images.x.contiguous().numpy().tobytes() + self.images.y.contiguous().numpy().tobytes()
        return {
            "recipe": recipes.MEASURING,
            "networks": [fingerprint(network) for network in (self.guide, self.network) if network is not None],
            "images": hashlib.sha256(pixels).hexdigest()[:16],
            "eps": float(self.eps),
            "settings": _settings(self.kind, self.p),
        }

    @property
    def company(self) -> tuple:
        """What is the same for pieces that one call makes: in bounds the teacher is bounded once for all students."""
        alone = self.kind not in ("FaithUB", "best")
        return self.kind, self.eps, self.first, id(self.guide), id(self if alone else None)


def _bracketed(p: Params, guide: nn.Module, nets: dict, radii, images: Split) -> pd.DataFrame:
    """EmpLB, first, as its pieces are the longest, and FaithUB; EmpLB ≤ FaithUB is checked."""
    return _checked(_measured(p, ["EmpLB", "FaithUB"], guide, nets, radii, images), ["EmpLB"], ["FaithUB"])


def _measured(p: Params, kinds: list[str], guide: nn.Module | None, nets: dict, radii, images: Split) -> pd.DataFrame:
    """What all `kinds` say of each network for each ε; one row per (dataset, eps, method, image)."""
    work = [(eps, method) for eps in radii for method in nets]
    cuts = [_cut(p, kind, guide, nets[method], images, eps) for kind in kinds for eps, method in work]
    contents = iter(_contents(p, [piece for cut in cuts for piece in cut], " and ".join(kinds)))
    tables = [pd.concat([next(contents) for _ in cut], ignore_index=True) for cut in cuts]
    frames = []
    for place, (eps, method) in enumerate(work):
        front = {"dataset": p.data.name, "eps": str(eps), "method": method}
        front |= {"image": images.index.numpy(), "label": images.y.numpy()}
        frames.append(pd.concat([pd.DataFrame(front), *tables[place :: len(work)]], axis=1))
    return pd.concat(frames, ignore_index=True)


def _cut(p: Params, kind: str, guide: nn.Module | None, network: nn.Module, images: Split, eps: float) -> list[Piece]:
    """A measurement in pieces: of a few images each where it is slow, else of all."""
    slow = kind == "best" or (kind == "FaithUB" and p.bounds.method not in QUICK)
    size = SLOW_PIECE if slow else len(images)
    firsts = range(0, len(images), size)
    return [Piece(p, kind, guide, network, images[first : first + size], eps, first) for first in firsts]


def _settings(kind: str, p: Params) -> dict:
    """The parameters that decide a measurement, beside networks, images and ε."""
    bounds = p.bounds.model_dump(mode="json")
    more = {
        "robustness": {"restarts": 1},
        "EmpLB": {"restarts": p.evaluate.restarts},
        "FaithUB": {name: bounds[name] for name in ("method", "solver", "milp_nodes")},
        "AutoAttack": {"version": p.evaluate.autoattack.version},
        "StrongLB": p.evaluate.strong.model_dump(mode="json", include={"classes", "restarts"}),
        "best": {"nodes": bounds["best_nodes"]},
    }
    return {**_search(p), "clip": p.data.clip, **more[kind]}  # instead of the tensors at which it clips


def _search(p: Params) -> dict:
    """The parameters' attack, as keyword arguments of the functions of `evaluation`."""
    options = {"steps": p.evaluate.steps, "step_factor": float(p.evaluate.step_factor)}
    return {**options, "seed": p.seed, "clip": data.clip_range(p)}


def _contents(p: Params, pieces: list[Piece], description: str) -> list[pd.DataFrame]:
    """What each piece measures, in order: read where it is there, else made on all cores and kept as soon as made."""
    named = [(piece.path, piece.inputs) for piece in pieces]
    found = [_kept(*name) for name in named]
    if any(frame is None for frame in found):
        # One notebook at a time has all cores; what it makes, another that waited need not make again.
        with artefacts.alone("measuring", "measuring on all cores"):
            found = [
                _kept(*name, mend=True) if frame is None else frame for frame, name in zip(found, named, strict=True)
            ]
            groups: dict[tuple, list[int]] = {}
            for place, piece in enumerate(pieces):
                if found[place] is None:
                    groups.setdefault(piece.company, []).append(place)
            calls = [_call([pieces[place] for place in places]) for places in groups.values()]
            long = p.models.teacher.kind == "convolutional"
            done = workers.run(calls, sample=0.0 if long else None)
            for number, frames in tqdm(done, f"{p.profile}: {description}", len(calls), leave=False):
                for place, frame in zip(list(groups.values())[number], frames, strict=True):
                    tensors, notes = _packed(frame)
                    path, inputs = named[place]
                    if path:
                        artefacts.save(path, inputs, tensors, notes)
                    found[place] = _frame(tensors, notes)
    return found


def _kept(path: str | None, inputs: dict, mend: bool = False) -> pd.DataFrame | None:
    found = path and artefacts.load(path, inputs, mend)
    return _frame(*found) if found else None


def _packed(frame: pd.DataFrame) -> tuple[dict[str, Tensor], dict]:
    """A table as tensors: bounds in float32, rounded so that they hold; words as numbers, none where all are one."""
    tensors, columns = {}, {}
    for name, values in frame.items():
        values, columns[name] = values.to_numpy(), None
        if values.dtype == object:
            codes, words = pd.factorize(values)
            columns[name] = list(words)
            if len(words) > 1:
                tensors[name] = torch.tensor(codes, dtype=torch.uint8)
        elif values.dtype == bool:
            tensors[name] = torch.tensor(values)
        else:
            rough, down = values.astype(np.float32), name in LOWER
            wrong = rough > values if down else rough < values
            towards = np.float32(-np.inf if down else np.inf)
            tensors[name] = torch.tensor(np.where(wrong, np.nextafter(rough, towards), rough))
    return tensors, {"columns": columns, "images": len(frame)}


def _frame(tensors: dict[str, Tensor], notes: dict) -> pd.DataFrame:
    """The table that `_packed` made tensors of, numbers in float64."""
    columns = {}
    for name, words in notes["columns"].items():
        values = tensors[name].numpy() if name in tensors else np.zeros(notes["images"], int)
        if words:
            columns[name] = np.array(words, dtype=object)[values]
        else:
            columns[name] = values if values.dtype == bool else values.astype(np.float64)
    return pd.DataFrame(columns)


def _call(pieces: list[Piece]) -> Callable[[], list[pd.DataFrame]]:
    """What makes some pieces of one company, in whatever process."""
    one = pieces[0]
    images = one.images[torch.arange(len(one.images))]  # a copy: a tensor's whole memory would go along
    given = one.p, one.guide, [piece.network for piece in pieces], images, float(one.eps)
    return partial(_make, recipes.MEASURING, MAKERS[one.kind], *given)


def _make(recipe: int, make: Callable, *given) -> list[pd.DataFrame]:
    """The content of pieces; refused where a worker has another version of the package than this process."""
    if recipe != recipes.MEASURING:
        raise FaithkdError("a worker has another version of faithkd than this process: start the cluster anew")
    return make(*given)


def _checked(frame: pd.DataFrame, lows: list[str], highs: list[str]) -> pd.DataFrame:
    """The frame, in which every lower bound is at most every upper bound; AssertionError where one is not."""
    for low, high in itertools.product(lows, highs):
        # Written so that a NaN fails; 1e-12 is the rounding error of evaluating the lower bound itself in float64.
        if not (frame[low] <= frame[high] + 1e-12).all():
            raise AssertionError(f"{low} > {high}: a bound is wrong, please report it\n{frame}")
    return frame


# --- what makes the pieces, a table for each network


def _lower_bound(p: Params, guide: nn.Module, networks: list, images: Split, eps: float) -> list[pd.DataFrame]:
    return [pd.DataFrame({"EmpLB": lower_bound(p, guide, each, images, eps).values.numpy()}) for each in networks]


def _robustness(p: Params, guide: nn.Module, networks: list, images: Split, eps: float) -> list[pd.DataFrame]:
    frames = []
    for network in networks:
        robust = evaluation.robust(network, images.x, images.y, eps, **_search(p)).holds
        agrees = evaluation.agreement(guide, network, images.x, eps, **_search(p)).holds
        frames.append(pd.DataFrame({"robust": robust.numpy(), "agrees": agrees.numpy()}))
    return frames


def _auto_attack(p: Params, _guide, networks: list, images: Split, eps: float) -> list[pd.DataFrame]:
    options, frames = {"seed": p.seed, "clip": data.clip_range(p), "version": p.evaluate.autoattack.version}, []
    for network in networks:
        pgd = evaluation.robust(network, images.x, images.y, eps, **_search(p)).holds
        auto = evaluation.auto_attack(network, images.x, images.y, eps, **options).holds
        frames.append(pd.DataFrame({"PGD": pgd.numpy(), "AutoAttack": auto.numpy(), "both": (pgd & auto).numpy()}))
    return frames


def _strong(p: Params, guide: nn.Module, networks: list, images: Split, eps: float) -> list[pd.DataFrame]:
    options = {**_search(p), **p.evaluate.strong.model_dump(include={"classes", "restarts"})}
    found = [evaluation.strong_lower_bound(guide, network, images.x, eps, **options) for network in networks]
    return [pd.DataFrame({"StrongLB": bound.values.numpy()}) for bound in found]


def _upper_bound(p: Params, guide: nn.Module, networks: list, images: Split, eps: float) -> list[pd.DataFrame]:
    options = {"method": p.bounds.method, "solver": p.bounds.solver, "max_nodes": p.bounds.milp_nodes}
    found = faithfulness_upper_bounds(guide, networks, images.x, eps, **options, clip=data.clip_range(p))
    return [pd.DataFrame({"FaithUB": bound.values.numpy(), "status": bound.status}) for bound in found]


def _best(p: Params, guide: nn.Module, networks: list, images: Split, eps: float) -> list[pd.DataFrame]:
    options = {"nodes": p.bounds.best_nodes, "seed": p.seed, "clip": data.clip_range(p), "agreement": True, "jobs": 1}
    frames = []
    for bound in faithfulness_upper_bounds(guide, networks, images.x, eps, method="best", **options):
        columns = {"BestLB": bound.lower.numpy(), "BestUB": bound.values.numpy(), "step": bound.step}
        columns |= {name: bound.rungs[name].numpy() for name in RUNGS}
        frames.append(pd.DataFrame(columns | {"agreement_certified": bound.agrees.numpy()}))
    return frames


MAKERS = {
    "robustness": _robustness,
    "EmpLB": _lower_bound,
    "FaithUB": _upper_bound,
    "AutoAttack": _auto_attack,
    "StrongLB": _strong,
    "best": _best,
}


# --- measurements that travel with the repository


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
            ours, theirs = _frame(*mine[path]), _frame(*theirs)
            numbers = ours.select_dtypes("number").columns
            worst = max(worst, float((ours[numbers] - theirs[numbers]).abs().to_numpy().max(initial=0.0)))
            flags = ours.select_dtypes("bool").columns
            turned = (ours[flags] != theirs[flags]).sum().max() if len(flags) else 0
            if not np.allclose(ours[numbers], theirs[numbers], **figures.ROUNDING) or turned > 1 + len(ours) / 500:
                complaints.append(path)
    what = "everything" if everything else f"seed {q.seed}"
    found = f"{p.name}: {what} measured anew, {count} measurements compared with the committed ones"
    return f"{found}, largest difference {worst:.1g}" if count else "", complaints
