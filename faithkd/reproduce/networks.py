"""Trained networks: found among the artefacts by what they were made from, or trained."""

import ast
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from textwrap import dedent
from types import CodeType

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from faithkd import recipes, workers
from faithkd.core import data, losses, models, training
from faithkd.core.losses import METHODS
from faithkd.errors import FaithkdError
from faithkd.report.paper import STUDENTS
from faithkd.reproduce import artefacts
from faithkd.reproduce.params import Params, Ratio, changed, leaves, plain


def reseeded(p: Params, add: int) -> Params:
    """The same parameters with everything drawn anew: the seed raised by `add`."""
    return p.model_copy(update={"seed": p.seed + add})


def repeats(p: Params, alphas: bool = False) -> list[Params]:
    """The parameters of each repeat: `p.repeats` seeds from `p.seed` on, networks and test subset anew.

    With `alphas` those for which FD has every α: the first `p.ablation.repeats`.
    """
    return [reseeded(p, add) for add in range(min(p.repeats, p.ablation.repeats) if alphas else p.repeats)]


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
    wanted += [(q, "FD", float(alpha)) for q in repeats(p, alphas=True) for alpha in p.ablation.alpha]
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
                    missing[path] = partial(trained, q, method, alpha)
        calls = [partial(call, bar=len(missing) == 1 or workers.jobs() == 1) for call in missing.values()]
        bar = {"unit": "network", "total": len(calls), "leave": False, "disable": not calls}
        for _ in tqdm(workers.run(calls, sample=0.0, here=True), f"{p.profile}: training {kind}", **bar):
            count += 1
    return count


# --- what a network is called, and what it was made from


def place(p: Params, method: str, guide: nn.Module | None, rule: losses.Method) -> tuple[str, dict]:
    """Where a network lies and the inputs that it is made from: ("weights/mnist/alpha=0.75/seed0/FD.safetensors", …).

    The path says what differs from the profile as it stands in its file; a loss of one's own adds its title.
    """
    inputs, usual = network_inputs(p, method, guide, rule), network_inputs(plain(p), method, guide, rule)
    own = rule not in (METHODS.get(method), training.ADVERSARIAL)
    name = f"{method}-{safe(rule.title)}" if own else method
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
            found.append(f"{short}={safe(value if isinstance(value, str) else json.dumps(value))}")
    return ["+".join(found)] if found else []


def safe(text: str) -> str:
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
            named &= {*_from_outside(function.__code__), *function.__code__.co_freevars}  # no parameters of its own
            for name in sorted(named & around.keys()):
                value = around[name]
                if isinstance(value, bool | int | float | str | tuple):
                    texts.append(f"{name} = {value!r}")
                elif inspect.isfunction(value) and value.__module__ == function.__module__:
                    left.append(value)
    return texts


def _from_outside(code: CodeType) -> set[str]:
    """The names of globals and attributes in a function and in what is defined in it."""
    return set(code.co_names).union(*(_from_outside(each) for each in code.co_consts if isinstance(each, CodeType)))


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
