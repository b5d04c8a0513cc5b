"""Parameters: params/*.yaml read strictly, with overrides, before any other work starts.

>>> from faithkd.reproduce import params
>>> params.load("mnist", ["train.epochs=2"]).train.epochs
2
"""

import difflib
import hashlib
import json
import math
import re
from copy import deepcopy
from functools import lru_cache, reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import core_schema
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from faithkd.errors import ParamsError
from faithkd.images import IMAGES
from faithkd.paths import ROOT

FD_ONLY = re.compile(r"(train\.FD|models\.student)\.")  # what no other network depends on


class Ratio(float):
    """A number that remembers how it was written, "8/255" or 0.1; `str()` gives it back as written.

    Raises ValueError for anything that is not a finite number or a quotient of two.
    """

    __slots__ = ("text",)

    def __new__(cls, number):
        """`number`: text such as "8/255", an int, a float or another Ratio."""
        text = number.strip() if isinstance(number, str) else str(number)
        above, slash, below = text.partition("/")
        try:
            value = float(above) / float(below) if slash else float(above)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        if not math.isfinite(value) or isinstance(number, bool) or "_" in text:  # float() would take 1_0 for 10
            raise ValueError("must be a finite number such as 0.1 or 8/255")
        self = super().__new__(cls, value)
        self.text = text
        return self

    def __getnewargs__(self):
        return (self.text,)

    def __str__(self):
        return self.text

    __repr__ = __str__

    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        to_text = core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        return core_schema.no_info_plain_validator_function(cls, serialization=to_text)


Positive = Annotated[Ratio, Field(gt=0)]
NotNegative = Annotated[Ratio, Field(ge=0)]
Share = Annotated[Ratio, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**62)]  # torch and pandas hold none of 2^63, nor sums above it
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**62)]
Counts = Annotated[list[Count], Field(min_length=1)]
Positives = Annotated[list[Positive], Field(min_length=1)]


class Group(BaseModel):
    """Named parameters; unknown names are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Group):
    """Which images, and the space in which eps is measured."""

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10"]
    space: Literal["standardised", "pixel"]
    mean: list[Ratio]
    std: list[Positive]
    clip: Flag
    validation: Count  # at least one: accuracies during training are theirs, with early stopping or without
    test_images: Count


class FullyConnected(Group):
    """Widths of the hidden layers; input and output layers follow from the data."""

    kind: Literal["fully_connected"]
    hidden: Counts


class Convolutional(Group):
    """A net of the form of Table 4: filters of its three convolutions, widths of its hidden linear layers."""

    kind: Literal["convolutional"]
    filters: Annotated[Counts, Field(min_length=3, max_length=3)]
    hidden: Counts


Network = Annotated[FullyConnected | Convolutional, Field(discriminator="kind")]


class Models(Group):
    """The two architectures."""

    teacher: Network
    student: Network


class Attack(Group):
    """The inner maximisation while training, eq. (2)."""

    eps: Positive
    step_size: Positive
    steps: Count


class Teacher(Group):
    """How the robust teacher (RT) is trained, eq. (3)."""

    learning_rate: Positive
    learning_rate_min: NotNegative
    weight_decay: NotNegative


class Student(Teacher):
    """How one method distils, eqs (1), (4), (5), (12)."""

    temperature: Positive
    alpha: Share


class Train(Group):
    """Training of the teacher and of the students of all four methods."""

    epochs: Count
    patience: Count
    batch_size: Count
    ramp_epochs: Whole
    momentum: Annotated[Ratio, Field(ge=0, lt=1)]
    early_stopping: Literal["validation", "test", "none"]
    initialisation: Literal["pytorch", "he", "glorot"]
    kl: Literal["forward", "reverse"]
    attack: Attack
    RT: Teacher
    SD: Student
    ARD: Student
    RSLAD: Student
    FD: Student


class Table3(Group):
    """EmpLB of a few images by number of PGD steps."""

    eps: Positive
    images: Count
    steps: Counts


class Figure1(Group):
    """The heat map through x, x1 and x2."""

    eps: Positive
    points: Annotated[int, Field(strict=True, ge=2)]


class AutoAttack(Group):
    """Robust accuracy by AutoAttack, at the eps of training."""

    version: Literal["standard", "plus"]
    images: Count


class Strong(Group):
    """EmpLB by a wider search: on how many images, classes a network leads with, restarts of each loss."""

    images: Count
    classes: Count
    restarts: Count


class Evaluate(Group):
    """Attacks on trained networks: robust accuracy, agreement and EmpLB."""

    eps: Positives
    steps: Count
    step_factor: Positive
    restarts: Count
    histograms: dict[Literal["fig2", "fig3"], Whole]
    table3: Table3
    figure1: Figure1
    autoattack: AutoAttack
    strong: Strong


class Bounds(Group):
    """FaithUB, and how many images the slower bounds are shown on."""

    method: Literal["interval", "crown", "alpha-crown", "lp", "milp", "joint", "bab", "best"]
    solver: Literal["auto", "highs", "gurobi"]
    lp_images: Whole
    milp_images: Whole
    milp_nodes: Count
    best_images: Count
    best_nodes: Count


class Ablation(Group):
    """Table 5, and what else notebook 11 varies, as overrides in a text: "data.space=pixel data.clip=true".

    FD is trained with each `alpha` for the first `repeats` seeds of the profile: Table 5 needs fewer than the claims.
    `settings` change the FD student alone, `readings` anything; of each reading the `students` are trained. Bounds for
    them are computed on the first `images` of the test images.
    """

    alpha: Annotated[list[Share], Field(min_length=1)]
    repeats: Count
    settings: list[str]
    readings: list[str]
    students: Annotated[list[Literal["SD", "ARD", "RSLAD", "FD"]], Field(min_length=1)]
    images: Count


class Params(Group):
    """All parameters of one profile, with the overrides they were loaded with."""

    profile: str
    overrides: dict
    seed: Whole
    repeats: Count
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    data: Data
    models: Models
    train: Train
    evaluate: Evaluate
    bounds: Bounds
    ablation: Ablation

    @property
    def name(self) -> str:
        """Profile and overrides as a safe folder name of at most 80 characters: "mnist+train.epochs=2"."""
        settings = [
            f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
            for key, value in sorted(self.overrides.items())
        ]
        full = "+".join([self.profile, *settings])
        safe = re.sub(r"[^\w.,=+-]+", "-", re.sub(r"[\[\]{}\"\s]", "", full))
        return safe if len(safe) <= 80 else f"{safe[:71]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"

    @property
    def figures_dir(self) -> Path:
        """Where this profile's figures and tables go."""
        return ROOT / "figures" / self.name

    def described(self) -> list[tuple[str, str, str]]:
        """Every parameter as (name, value, reason); the reason is the comment beside it in the YAML file."""
        text = _path(self.profile).read_text(encoding="utf-8")
        written, lines = YAML().load(text), text.splitlines()
        was, now = leaves(written), leaves(self.model_dump(exclude={"profile", "overrides"}))
        rows = []
        for name in [*(name for name in was if name in now), *(name for name in now if name not in was)]:
            *above, last = name.split(".")
            group = reduce(getitem, above, written)
            reason = lines[group.lc.key(last)[0]].partition(" # ")[2].strip() if name in was else ""
            if any(name == key or name.startswith(key + ".") for key in self.overrides):
                reason = f"override (profile: {was.get(name, 'not set')}; {reason})"
            rows.append((name, str(now[name]), reason))
        return rows

    @model_validator(mode="after")
    def _consistent(self):
        if problems := [f"{name}: {what}" for name, what in _contradictions(self)]:
            raise ValueError("\n".join(problems))
        return self


def _contradictions(p: Params):
    """Yield (dotted name, what is wrong) for values that are fine alone but not together."""
    data, (train_images, test_images, shape) = p.data, IMAGES[p.data.name]
    for name in ("mean", "std"):
        if len(getattr(data, name)) != shape[0]:
            yield f"data.{name}", f"needs one number per channel: {shape[0]} for {data.name}"
    if data.clip and data.space != "pixel":
        yield "data.clip", "needs data.space=pixel: standardised inputs have no common range to clip to"
    if data.test_images > test_images:
        yield "data.test_images", f"must be at most {test_images}, all there are in {data.name}"
    if data.validation + (data.test_images if data.name == "digits" else 0) >= train_images:
        yield "data.validation", f"leaves no images to train on: {data.name} has {train_images}"
    for name in ("teacher", "student"):
        if getattr(p.models, name).kind == "convolutional" and shape != (3, 32, 32):
            yield f"models.{name}.kind", f"convolutional nets need images of 3x32x32; {data.name} has {shape}"
    for name in ("RT", "SD", "ARD", "RSLAD", "FD"):
        method = getattr(p.train, name)
        if method.learning_rate_min > method.learning_rate:
            yield f"train.{name}.learning_rate_min", f"must be at most learning_rate ({method.learning_rate})"
    for name, values in {"evaluate.eps": p.evaluate.eps, "evaluate.table3.steps": p.evaluate.table3.steps}.items():
        if any(a >= b for a, b in pairwise(values)):
            yield name, f"must increase from value to value, without repeats; got {values}"


def profiles() -> list[str]:
    """Names of the profiles in params/."""
    found = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))
    if not found:
        raise ParamsError(f"no profiles in {ROOT / 'params'}: set FAITHKD_HOME to your clone of faithkd")
    return found


def load(profile: str = "digits", overrides=None) -> Params:
    """Read params/<profile>.yaml, apply overrides and check everything.

    `overrides`: {"train.epochs": 2} or ["train.epochs=2"], by dotted leaf names. Raises ParamsError.
    """
    path = _path(profile)
    raw, changes = deepcopy(_read(path, path.stat().st_mtime_ns)), _parse(overrides)
    for name in {"profile", "overrides"} & raw.keys():
        raise ParamsError(f"{_short(path)}: {name} is not set in a profile")
    for name, value in changes.items():
        _set(raw, name, value, path)
    try:
        p = Params.model_validate({**raw, "profile": profile, "overrides": changes})
    except ValidationError as error:
        raise ParamsError(_explain(error, path, changes)) from None
    for kind in ("settings", "readings"):
        for text in getattr(p.ablation, kind):
            try:
                changed(p, text)
                if kind == "settings" and (other := [name for name in _parse(text.split()) if not FD_ONLY.match(name)]):
                    raise ParamsError(f"{other[0]} is no setting of FD's alone; put it in ablation.readings")
            except ParamsError as error:
                raise ParamsError(f"{_short(path)}: ablation.{kind}, {text!r}:\n{error}") from None
    return p


def plain(p: Params) -> Params:
    """The profile of `p` as it stands in its file, but with the seed of `p`."""
    path = _path(p.profile)
    return _plain(p.profile, path, path.stat().st_mtime_ns).model_copy(update={"seed": p.seed})


@lru_cache(maxsize=8)
def _plain(profile: str, _path: Path, _written: int) -> Params:
    return load(profile)


def changed(p: Params, text: str) -> Params:
    """The parameters with the overrides in `text`, as in "data.space=pixel data.clip=true", and no further changes."""
    none = {"ablation.settings": [], "ablation.readings": []}
    return load(p.profile, {**p.overrides, "seed": p.seed, **_parse(text.split()), **none})


def _path(profile: str) -> Path:
    names = profiles()
    if profile not in names:
        hint = _did_you_mean(str(profile), names)
        raise ParamsError(f"there is no profile {profile!r}{hint}; profiles: {', '.join(names)}")
    return ROOT / "params" / f"{profile}.yaml"


def _short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _yaml(text: str):
    return YAML(typ="safe", pure=True).load(text)  # YAML 1.2: 8/255 stays text, and so does yes


@lru_cache(maxsize=32)
def _read(path: Path, _written: int) -> dict:
    try:
        raw = _yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, ValueError, OSError, RecursionError) as error:  # ValueError: not UTF-8, no date, 5000 digits
        where = f", line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise ParamsError(f"{_short(path)}{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{_short(path)}: must hold names and values, such as 'seed: 0'")
    return raw


def _parse(overrides) -> dict:
    """Overrides of any form as {dotted name: plain value}."""
    if isinstance(overrides, dict):
        return {str(name): value for name, value in overrides.items()}
    if not isinstance(overrides, str | list | tuple | None):
        raise ParamsError(f"overrides are {overrides!r:.60}: give names and values, such as {{'train.epochs': 2}}")
    changes = {}
    for item in [overrides] if overrides and isinstance(overrides, str) else overrides or []:
        name, equals, text = (part.strip() for part in str(item).partition("="))
        problem = "" if name and equals else " (it has no =)"
        try:
            value = _yaml(text)
        except (YAMLError, ValueError, RecursionError) as error:
            problem = f" ({getattr(error, 'problem', None) or error})"
        if problem:
            raise ParamsError(f"override {item!r:.60}: write name=value, for example train.epochs=2{problem}")
        if repr(changes.setdefault(name, value)) != repr(value):
            raise ParamsError(f"override {item!r}: {name} is already set to {changes[name]!r}; give it once")
    return changes


def leaves(tree: dict, prefix: str = "") -> dict:
    """{"a.b": value} for every value that is not itself a mapping."""
    found = {}
    for name, value in tree.items():
        inside = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return found


def _set(raw: dict, name: str, value, path: Path) -> None:
    """Replace one leaf of `raw` in place, or a group by a mapping."""
    known = list(leaves(raw))
    inside = [leaf for leaf in known if leaf.startswith(name + ".")]
    if name not in known and not (inside and isinstance(value, dict)):
        hint = f" but a group; set one of {', '.join(inside[:4])}" if inside else _did_you_mean(name, known)
        raise ParamsError(f"override {name}={value}: {name} is not a parameter of {_short(path)}{hint}")
    *above, last = name.split(".")
    reduce(getitem, above, raw)[last] = value


def _did_you_mean(name: str, names) -> str:
    """'; did you mean …?' by likeness of the whole dotted name or, failing that, of its last part."""
    by_case = {known.lower(): known for known in names}
    by_end = {known.lower().split(".")[-1]: known for known in reversed(names)}
    for text, known in ((name.lower(), by_case), (name.lower().split(".")[-1], by_end)):
        if close := difflib.get_close_matches(text, known, n=1):
            return f"; did you mean {known[close[0]]}?"
    return ""


def _explain(error: ValidationError, path: Path, changes: dict) -> str:
    """One line per problem, in pydantic's words: where it stands, its dotted name, what is wrong, what was meant."""
    lines, found = [], error.errors()
    missing = [_dotted(e) for e in found if e["type"] == "missing"]
    for e in found:
        name, what = _dotted(e), str(e.get("ctx", {}).get("error", e["msg"]))
        if not name:  # contradictions carry their names themselves
            settings = ", ".join(f"{key}={value}" for key, value in changes.items())
            where = f"{_short(path)} with override {settings}" if changes else _short(path)
            lines += [f"{where}: {problem}" for problem in what.split("\n")]
            continue
        setter = next((key for key in changes if re.match(re.escape(key) + r"(?![^.\[])", name)), None)
        where = _short(path) if setter is None else f"override {setter}={changes[setter]!s:.60}"
        if e["type"] == "extra_forbidden":
            what = "is not a parameter here" + _did_you_mean(name, missing)
        given = "" if e["type"] in ("missing", "extra_forbidden") else f", got {e['input']!r:.60}"
        lines.append(f"{where}: {name}: {what}{given}")
    return "\n".join(dict.fromkeys(lines))


def _dotted(e: dict) -> str:
    """Where a pydantic error lies, as written in the file: without the network's kind, places as [2]."""
    parts = [part for part in e["loc"] if part not in ("fully_connected", "convolutional", "[key]")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
