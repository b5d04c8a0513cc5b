"""Measurements of networks in pieces, an artefact each: read where they are there, else made on all cores."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from faithkd import recipes, workers
from faithkd.bounds import faithfulness_upper_bounds
from faithkd.core import data, evaluation
from faithkd.core.data import Split
from faithkd.errors import FaithkdError
from faithkd.reproduce import artefacts
from faithkd.reproduce.networks import changes, fingerprint, safe
from faithkd.reproduce.params import Params, plain

# CROWN takes milliseconds an image. Slower bounds are measured, and kept, in pieces of a few images, lest much be
# lost when a run is stopped. Never a function of the number of processes, on which no result may depend.
QUICK = ("interval", "crown")
SLOW_PIECE = 10
RUNGS = ("interval", "crown", "alpha-crown", "joint")  # steps below `best` that take seconds at most
TOGETHER = ("FaithUB", "best")  # kinds in which the teacher is bounded once for all students
LOWER = ("EmpLB", "StrongLB", "BestLB")  # columns with lower bounds; all other numbers are upper bounds


class Unmeasured(FaithkdError):  # noqa: N818  what is missing is no error of its own
    """Asked of images that are not here (`data.unseen`), and not kept in the repository."""


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
        return "/".join(["measurements", home, self.kind, *changes(chosen, usual), f"eps={safe(str(self.eps))}", last])

    @property
    def inputs(self) -> dict:
        seen = self.images.x.contiguous().numpy().tobytes()
        pixels = seen and seen + self.images.y.contiguous().numpy().tobytes()
        return {
            "recipe": recipes.SEARCHING if _searches(self.kind, self.p) else recipes.MEASURING,
            "networks": [fingerprint(network) for network in (self.guide, self.network) if network is not None],
            "images": hashlib.sha256(pixels).hexdigest()[:16] if pixels else None,  # `data.unseen`: whichever they were
            "eps": float(self.eps),
            "settings": _settings(self.kind, self.p),
        }

    @property
    def company(self) -> tuple:
        """What is the same for pieces that one call makes."""
        return self.kind, self.eps, self.first, id(self.guide), None if self.kind in TOGETHER else id(self)


def bracketed(p: Params, guide: nn.Module, nets: dict, radii, images: Split) -> pd.DataFrame:
    """EmpLB, first, as its pieces are the longest, and FaithUB; EmpLB ≤ FaithUB is checked."""
    return checked(measured(p, ["EmpLB", "FaithUB"], guide, nets, radii, images), ["EmpLB"], ["FaithUB"])


def measured(p: Params, kinds: list[str], guide: nn.Module | None, nets: dict, radii, images: Split) -> pd.DataFrame:
    """What all `kinds` say of each network for each ε; one row per (dataset, eps, method, image)."""
    work = [(eps, method) for eps in radii for method in nets]
    cuts = [cut(p, kind, guide, nets[method], images, eps) for kind in kinds for eps, method in work]
    contents = iter(_contents(p, [piece for some in cuts for piece in some], " and ".join(kinds)))
    tables = [pd.concat([next(contents) for _ in some], ignore_index=True) for some in cuts]
    frames = []
    for place, (eps, method) in enumerate(work):
        front = {"dataset": p.data.name, "eps": str(eps), "method": method}
        front |= {"image": images.index.numpy(), "label": images.y.numpy()}
        frames.append(pd.concat([pd.DataFrame(front), *tables[place :: len(work)]], axis=1))
    return pd.concat(frames, ignore_index=True)


def cut(p: Params, kind: str, guide: nn.Module | None, network: nn.Module, images: Split, eps: float) -> list[Piece]:
    """A measurement in pieces: of a few images each where it is slow, else of all."""
    size = SLOW_PIECE if _searches(kind, p) else len(images)
    firsts = range(0, len(images), size)
    return [Piece(p, kind, guide, network, images[first : first + size], eps, first) for first in firsts]


def _searches(kind: str, p: Params) -> bool:
    return kind == "best" or (kind == "FaithUB" and p.bounds.method not in QUICK)


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
    return {**search(p), "clip": p.data.clip, **more[kind]}  # instead of the tensors at which it clips


def lower_bound(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> evaluation.LowerBound:
    """EmpLB (§4.1) with the parameters' attack: 50 steps of 2.5ε/50 and 5 restarts unless they say otherwise."""
    options = {"restarts": p.evaluate.restarts, **search(p)}
    return evaluation.empirical_lower_bound(guide, network, images.x, float(eps), **options)


def search(p: Params) -> dict:
    """The parameters' attack, as keyword arguments of the functions of `evaluation`."""
    options = {"steps": p.evaluate.steps, "step_factor": float(p.evaluate.step_factor)}
    return {**options, "seed": p.seed, "clip": data.clip_range(p)}


def _contents(p: Params, pieces: list[Piece], description: str) -> list[pd.DataFrame]:
    """What each piece measures, in order: read where it is there, else made on all cores and kept as soon as made."""
    named = [(piece.path, piece.inputs) for piece in pieces]
    found = [_kept(*name) for name in named]
    if any(frame is None for frame in found):
        if any(piece.inputs["images"] is None for piece in pieces):
            raise Unmeasured(f"measurements/ does not hold all {description} of {p.name}; `make evidence` makes them")
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
                    tensors, notes = to_tensors(frame)
                    path, inputs = named[place]
                    if path:
                        artefacts.save(path, inputs, tensors, notes)
                    found[place] = to_table(tensors, notes)
    return found


def _kept(path: str | None, inputs: dict, mend: bool = False) -> pd.DataFrame | None:
    found = path and artefacts.load(path, inputs, mend)
    return to_table(*found) if found else None


def to_tensors(frame: pd.DataFrame) -> tuple[dict[str, Tensor], dict]:
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


def to_table(tensors: dict[str, Tensor], notes: dict) -> pd.DataFrame:
    """The table that `to_tensors` made tensors of, numbers in float64."""
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
    return partial(_make, (recipes.MEASURING, recipes.SEARCHING), one.kind, *given)


def _make(numbers: tuple, kind: str, p: Params, guide: nn.Module | None, networks: list, *where) -> list[pd.DataFrame]:
    """The content of pieces; refused where a worker has another version of the package than this process."""
    if numbers != (recipes.MEASURING, recipes.SEARCHING):
        raise FaithkdError("a worker has another version of faithkd than this process: start the cluster anew")
    if kind in TOGETHER:
        return MAKERS[kind](p, guide, networks, *where)
    return [MAKERS[kind](p, guide, network, *where) for network in networks]


def checked(frame: pd.DataFrame, lows: list[str], highs: list[str]) -> pd.DataFrame:
    """The frame, in which every lower bound is at most every upper bound; AssertionError where one is not."""
    for low, high in itertools.product(lows, highs):
        # Written so that a NaN fails; 1e-12 is the rounding error of evaluating the lower bound itself in float64.
        if not (frame[low] <= frame[high] + 1e-12).all():
            raise AssertionError(f"{low} > {high}: a bound is wrong, please report it\n{frame}")
    return frame


# --- what makes the pieces: a table of one network, or one for each of those bounded together


def _lower_bound(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> pd.DataFrame:
    return pd.DataFrame({"EmpLB": lower_bound(p, guide, network, images, eps).values.numpy()})


def _robustness(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> pd.DataFrame:
    robust = evaluation.robust(network, images.x, images.y, eps, **search(p)).holds
    agrees = evaluation.agreement(guide, network, images.x, eps, **search(p)).holds
    return pd.DataFrame({"robust": robust.numpy(), "agrees": agrees.numpy()})


def _auto_attack(p: Params, _guide, network: nn.Module, images: Split, eps: float) -> pd.DataFrame:
    options = {"seed": p.seed, "clip": data.clip_range(p), "version": p.evaluate.autoattack.version}
    pgd = evaluation.robust(network, images.x, images.y, eps, **search(p)).holds
    auto = evaluation.auto_attack(network, images.x, images.y, eps, **options).holds
    return pd.DataFrame({"PGD": pgd.numpy(), "AutoAttack": auto.numpy(), "both": (pgd & auto).numpy()})


def _strong(p: Params, guide: nn.Module, network: nn.Module, images: Split, eps: float) -> pd.DataFrame:
    options = {**search(p), **p.evaluate.strong.model_dump(include={"classes", "restarts"})}
    found = evaluation.strong_lower_bound(guide, network, images.x, eps, **options)
    return pd.DataFrame({"StrongLB": found.values.numpy()})


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
