"""Cost of our attacks beside other libraries' and the bare matrix products: python -m benchmarks.attacks

Writes tables of the attacks and of training to benchmarks/results/; see README.md here.
"""

import contextlib
import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import attackers, report
from benchmarks.attackers import ATTACKERS, OURS, PRODUCTS, Task
from benchmarks.bounds import RESULTS
from faithkd import data, experiment, models, params, training
from faithkd.errors import FaithkdError
from faithkd.evaluation import confidence_difference
from faithkd.losses import METHODS, attack_labels
from faithkd.reproduce.params import Params

TASKS = ("RT", *METHODS, "EmpLB")
BATCHES = "128,1000"  # that of training (MNIST), and more than an evaluation attacks at once
TOLERANCE = 1e-5  # how far float32, and a change of variables and back, may carry a point out of its ball
PACKAGES = ("faithkd", "torch", "numpy", *(attacker.package for attacker in ATTACKERS.values() if attacker.package))

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    profile: Annotated[str, typer.Option(help="Which params/*.yaml.")] = "mnist",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; repeatable.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Who attacks, by commas.")] = ",".join(ATTACKERS),
    tasks: Annotated[str, typer.Option(help="Whom and what to attack, by commas.")] = ",".join(TASKS),
    batches: Annotated[str, typer.Option(help="Images attacked at once, by commas.")] = BATCHES,
    steps: Annotated[int | None, typer.Option(help="Of an attack; default: evaluate.steps.")] = None,
    rounds: Annotated[int, typer.Option(help="How often to attack, by turns.")] = 15,
    attacks: Annotated[bool, typer.Option(help="Measure the attacks.")] = True,
    train: Annotated[bool, typer.Option("--training/--no-training", help="Measure training.")] = True,
    train_batches: Annotated[int, typer.Option(help="Batches of training that are timed.")] = 200,
    train_rounds: Annotated[int, typer.Option(help="How often to time them, by turns.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
) -> None:
    """Measure PGD, ours and the libraries', on the same networks and images; and epochs of training."""
    torch.set_num_threads(1)
    p = params.load(profile, settings or [])
    out.mkdir(parents=True, exist_ok=True)
    facts = {name: fact for name, fact in report.provenance(p, PACKAGES).items() if name != "EmpLB"}
    if attacks:
        steps = steps or p.evaluate.steps
        eps, factor = str(p.train.attack.eps), str(p.evaluate.step_factor)
        about = {"eps": eps, "steps": steps, "step_factor": factor, "restarts": 1, "rounds": rounds}
        names, parts = present(methods.split(",")), []
        for size, name in itertools.product(map(int, batches.split(",")), tasks.split(",")):
            parts.append(compare(task(p, name, size, steps), names, rounds))
            say(parts[-1])
            write(out, f"attacks-{profile}", pd.concat(parts), facts | about, attacks_markdown)  # kept if killed
    if train:
        about = {"steps": p.train.attack.steps, "rounds": train_rounds}
        found = time_training(p, train_batches, train_rounds)
        write(out, f"training-{profile}", found, facts | about, training_markdown)
    print(f"results: {out}")


def present(names: list[str]) -> list[str]:
    """The contenders that can take part, the bare products and ours always; says which cannot, and why."""
    if unknown := [name for name in names if name not in ATTACKERS]:
        raise FaithkdError(f"unknown contender {unknown[0]!r}: choose from {', '.join(ATTACKERS)}")
    for reason in filter(None, map(attackers.absent, names)):
        print(f"left out, as {reason}")
    return list(dict.fromkeys([PRODUCTS, OURS, *(name for name in names if not attackers.absent(name))]))


def task(p: Params, name: str, size: int, steps: int) -> Task:
    """The attack by which `name` is trained ("RT" or a student; SD has none: labels), or that of "EmpLB" on FD.

    On the first `size` training images, of which even the digits have a thousand, at the eps of training and with the
    step of evaluation, `evaluate.step_factor` eps / `steps`.
    """
    if name not in TASKS:
        raise FaithkdError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    images = data.training(p)[slice(0, size)]
    if len(images) < size:
        raise FaithkdError(f"a batch of {size} needs as many training images, but {p.data.name} has {len(images)}")
    guide = frozen(experiment.teacher(p))
    network = guide if name == "RT" else frozen(experiment.student(p, "FD" if name == "EmpLB" else name))
    attacks = {name: method.attack or attack_labels for name, method in METHODS.items()}
    attack = attacks.get(name, attack_confidences if name == "EmpLB" else attack_labels)
    eps = float(p.train.attack.eps)
    return Task(
        name,
        (network, guide) if name in ("FD", "EmpLB") else (network,),
        attack(network, guide, images.x, images.y),
        images.x,
        images.y,
        eps,
        steps,
        float(p.evaluate.step_factor) * eps / steps,
        labels=attack is attack_labels,
        seed=p.seed,
    )


def attack_confidences(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """What EmpLB maximises, in the form of the methods' attacks."""
    return lambda z: confidence_difference(teacher, student, z)


def frozen(network: nn.Sequential) -> nn.Sequential:
    """A copy that asks for no gradients in its weights: nobody is to pay for those."""
    return deepcopy(network).cpu().float().eval().requires_grad_(False)


def compare(job: Task, names: list[str], rounds: int) -> pd.DataFrame:
    """A row for each contender that knows the objective: its work, checked once, and its times by turns."""
    names = [name for name in names if job.labels or not ATTACKERS[name].labels]
    ready, work = {}, {}
    for name in names:
        try:
            attack = attackers.load(name, job)
            work[name] = checked(name, job, attack)
            ready[name] = attack
        except Exception as failure:  # a library that changed, or that does less than it was asked to
            if not ATTACKERS[name].package:
                raise
            print(f"left out: {name}: {type(failure).__name__}: {failure}")
    spent = by_turns(ready, rounds, job.seed)
    frame = pd.DataFrame([work[name] | {"median": median(spent[name]), "minimum": min(spent[name])} for name in ready])
    times = frame.set_index("contender")["median"]
    frame.insert(0, "task", job.name)
    frame.insert(1, "batch", len(job.x))
    return frame.assign(to_products=frame["median"] / times[PRODUCTS], to_ours=frame["median"] / times[OURS])


def by_turns(ready: dict[str, Callable], rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the order moves on by one each time, so that nobody always follows one."""
    spent = {name: [] for name in ready}
    names = list(ready)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seeded(seed)
            start = time.perf_counter()
            ready[name]()
            spent[name].append(time.perf_counter() - start)
    return spent


def seeded(seed: int) -> None:
    """The generators from which libraries draw their starts."""
    torch.manual_seed(seed)
    np.random.seed(seed)


@dataclass
class Work:
    """What passed through a network: `gradients` taken, `passes` forwards, the `highest` loss met per image."""

    y: Tensor
    gradients: int = 0
    passes: int = 0
    highest: Tensor = field(default_factory=lambda: torch.tensor(-torch.inf))

    def see(self, _module, _inputs, logits: Tensor) -> None:
        """A forward hook of the network's last layer."""
        self.passes += 1
        if logits.requires_grad:
            logits.register_hook(self.count)
        if len(logits) == len(self.y):
            self.highest = torch.maximum(self.highest, F.cross_entropy(logits.detach(), self.y, reduction="none"))

    def count(self, _gradient: Tensor) -> None:
        self.gradients += 1


def checked(name: str, job: Task, attack: Callable[[], Tensor | None]) -> dict:
    """One untimed attack, which is also the warm-up: that it takes all steps, stays in the ball, and what it reaches.

    `loss` is the mean objective at the points that it returns, `highest` the mean over images of the largest
    cross-entropy on the way; blank for the products, and for other objectives.
    """
    seen = Work(job.y)
    hook = job.networks[0][-1].register_forward_hook(seen.see)
    seeded(job.seed)
    points = attack()
    hook.remove()
    if points is None:
        return {"contender": name, "gradients": job.steps, "passes": job.steps, "loss": np.nan, "highest": np.nan}
    points = points.detach()
    if seen.gradients != job.steps:
        raise FaithkdError(f"{name} took {seen.gradients} gradients where {job.steps} were asked for")
    outside = float((points - job.x).abs().max()) - job.eps
    if not outside <= TOLERANCE:
        raise FaithkdError(f"{name} ends {outside:.2g} outside the ball of radius {job.eps:g}")
    with torch.no_grad():
        values = job.objective(points)
    highest = float(torch.maximum(seen.highest, values).mean()) if job.labels else np.nan
    about = {"contender": name, "gradients": seen.gradients, "passes": seen.passes}
    return about | {"loss": float(values.mean()), "highest": highest}


def time_training(p: Params, batches: int, rounds: int) -> pd.DataFrame:
    """A row for the teacher and for each student: seconds a batch and an epoch, at the full eps from the start.

    `plainly` is how many times as long the same epoch takes as textbooks write it (`train_plainly`).
    """
    images, size = data.training(p), p.train.batch_size
    part, guide = images[slice(0, batches * size)], frozen(experiment.teacher(p))
    names = ("RT", *METHODS)
    ready = {(name, train): partial(train, p, name, guide, part) for name in names for train in TRAINERS}
    for train in ready.values():
        train()  # untimed: all is loaded then
    spent = by_turns(ready, rounds, p.seed)
    rows = []
    for name in names:
        ours, plain = (spent[name, train] for train in TRAINERS)
        row = epoch_row(name, ours, len(part), len(images), size)
        rows.append(row | {"plainly": median(plain) / median(ours)})
    return pd.DataFrame(rows)


def train_once(p: Params, name: str, guide: nn.Module | None, images: data.Split) -> None:
    """One epoch on some images; its accuracies are taken on one held-out image, so that only the batches count."""
    schedule = p.train.model_copy(update={"epochs": 1, "ramp_epochs": 0, "early_stopping": "none"})
    architecture = p.models.teacher if name == "RT" else p.models.student
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        training.fit(
            models.build(architecture, data.SHAPES[p.data.name], seed=p.seed),
            None if name == "RT" else guide,
            images,
            data.validation(p)[slice(0, 1)],
            getattr(p.train, name),
            schedule,
            method=METHODS.get(name),
            seed=p.seed,
            clip=data.clip_range(p),
        )


def train_plainly(p: Params, name: str, guide: nn.Module, images: data.Split) -> None:
    """The same epoch as textbooks write it: a DataLoader, and an attack whose backward pass reaches the weights too."""
    architecture = p.models.teacher if name == "RT" else p.models.student
    network = models.build(architecture, data.SHAPES[p.data.name], seed=p.seed)
    method, settings = METHODS.get(name, training.ADVERSARIAL), getattr(p.train, name)
    eps, size = float(p.train.attack.eps), float(p.train.attack.step_size)
    rates = {"lr": settings.learning_rate, "momentum": p.train.momentum, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.SGD(network.parameters(), **rates)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images.x, images.y), batch_size=p.train.batch_size, shuffle=True
    )
    for x, y in loader:
        x_adv = x
        if method.attack:
            objective = method.attack(network, guide, x, y)
            x_adv = x + torch.empty_like(x).uniform_(-eps, eps)
            for _ in range(p.train.attack.steps):
                x_adv = x_adv.detach().requires_grad_(True)
                objective(x_adv).sum().backward()
                x_adv = torch.min(torch.max(x_adv + size * x_adv.grad.sign(), x - eps), x + eps)
        alpha, temperature = (getattr(settings, setting, None) for setting in ("alpha", "temperature"))
        loss = method.loss(network, guide, x, x_adv.detach(), y, alpha, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


TRAINERS = (train_once, train_plainly)


def epoch_row(name: str, spent: list[float], timed: int, images: int, size: int) -> dict:
    """Seconds of some images as seconds a batch and an epoch of all of them."""
    count = -(-timed // size)
    epochs = [seconds * images / timed for seconds in spent]
    row = {"network": name, "batch": size, "batches": count, "batches_an_epoch": -(-images // size)}
    row |= {"batch_median": median(spent) / count, "batch_minimum": min(spent) / count}
    row |= {"epoch_median": median(epochs), "epoch_minimum": min(epochs)}
    return row | {"epochs_per_second": 1 / median(epochs)}


def median(numbers: list[float]) -> float:
    """The middle one."""
    return float(np.median(numbers))


def say(frame: pd.DataFrame) -> None:
    """A line for each contender."""
    for row in frame.itertuples():
        loss = "" if np.isnan(row.loss) else f", loss {row.loss:.4f}"
        ratio = f"{row.to_products:.2f} x products, {row.to_ours:.2f} x ours"
        print(
            f"{row.task:<6} {row.batch:<5} {row.contender:<13} {1000 * row.median:8.2f} ms, {ratio}{loss}", flush=True
        )


def write(out: Path, name: str, frame: pd.DataFrame, facts: dict, markdown: Callable) -> None:
    """The table as .csv and .md, and what it rests on as .json."""
    frame.to_csv(out / f"{name}.csv", index=False, lineterminator="\n", float_format="%.6g")
    report.save_text(out / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    report.save_text(out / f"{name}.md", markdown(frame, facts))


def attacks_markdown(frame: pd.DataFrame, facts: dict) -> str:
    """A table per batch size, the contenders of each task from the fastest to the slowest."""
    blocks = []
    for size, part in frame.groupby("batch", sort=False):
        head = ["task", "", "gradients", "loss", "highest", "ms", "least ms", "÷ products", "÷ ours"]
        lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
        for _, rows in part.groupby("task", sort=False):
            lines += attack_lines(rows.sort_values("median"))
        blocks.append(f"{size} images at once, {report.conditions(facts)}, one thread.\n\n{report.pipes(lines)}")
    return "\n\n".join(blocks) + "\n\n" + ATTACKS_LEGEND + "\n"


ATTACKS_LEGEND = (
    "Milliseconds of one attack, median and least of all rounds; ratios are of medians. Loss: mean objective at the "
    "points returned; highest: mean over images of the largest cross-entropy met on the way. adversarial-library "
    "returns the last misclassified point, and the image itself where there was none, so its loss is lower than what "
    "it met. Starts are drawn at random, and not by all in the same way: that alone moves a loss by a few per cent."
)


def attack_lines(rows: pd.DataFrame) -> Iterator[list[str]]:
    """One task's lines; its name stands in the first."""
    for place, row in enumerate(rows.itertuples()):
        known = ["" if np.isnan(value) else f"{value:.4f}" for value in (row.loss, row.highest)]
        times = [f"{1000 * seconds:.1f}" for seconds in (row.median, row.minimum)]
        ratios = [f"{value:.2f}" for value in (row.to_products, row.to_ours)]
        yield [
            "" if place else row.task,
            f"{ATTACKERS[row.contender].what}: `{row.contender}`",
            str(row.gradients),
            *known,
            *times,
            *ratios,
        ]


TRAINING_LEGEND = (
    "Plainly written: epochs a second with a DataLoader and an attack whose backward pass also reaches the weights, as "
    "textbooks have it."
)


def training_markdown(frame: pd.DataFrame, facts: dict) -> str:
    """A line per network."""
    head = ["network", "ms a batch", "least", "s an epoch", "least", "epochs a second", "plainly written"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in frame.itertuples():
        batch = [f"{1000 * seconds:.2f}" for seconds in (row.batch_median, row.batch_minimum)]
        epoch = [report.digits(seconds) for seconds in (row.epoch_median, row.epoch_minimum)]
        plain = f"{report.digits(row.epochs_per_second / row.plainly)}: {row.plainly:.2f} times as long"
        lines.append([row.network, *batch, *epoch, report.digits(row.epochs_per_second), plain])
    first = frame.iloc[0]
    told = f"{first.batches} batches of {first.batch} timed, {first.batches_an_epoch} make an epoch"
    return f"Training, {told}; {report.conditions(facts)}, one thread.\n\n{report.pipes(lines)}\n\n{TRAINING_LEGEND}\n"


if __name__ == "__main__":
    try:
        app()
    except FaithkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
