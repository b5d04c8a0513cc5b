"""Cost of our attacks beside other libraries': python -m benchmarks.attacks

Writes a table of times and ratios to benchmarks/results/; see README.md here.
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import RESULTS, Contender, OnlyReport, Out, Profile, Settings, pipes, save
from faithkd import experiment, params
from faithkd.core import attacks, data
from faithkd.core.evaluation import confidence_difference
from faithkd.core.losses import METHODS, attack_labels
from faithkd.errors import FaithkdError

TASKS = ("RT", *METHODS, "EmpLB")
TOLERANCE = 1e-5  # how far float32 may carry a point out of its ball
CONTENDERS = {
    "ascend": Contender("faithkd, last point (training)"),
    "search": Contender("faithkd, best point (evaluation)"),
    "foolbox": Contender("foolbox LinfPGD", "foolbox"),
}


def main(
    profile: Profile = "mnist",
    settings: Settings = None,
    methods: Annotated[str, typer.Option(help="Who attacks, by commas.")] = ",".join(CONTENDERS),
    tasks: Annotated[str, typer.Option(help="Whom and what to attack, by commas.")] = ",".join(TASKS),
    batches: Annotated[str, typer.Option(help="Images attacked at once, by commas.")] = "128,1000",
    rounds: Annotated[int, typer.Option(help="How often to attack, by turns.")] = 15,
    only_report: OnlyReport = False,
    out: Out = RESULTS,
) -> None:
    """Measure PGD, ours and the libraries', on the same networks and images."""
    p = params.load(profile, settings or [])
    if not only_report:
        out.mkdir(parents=True, exist_ok=True)
        told = common.facts(p, CONTENDERS) | {"steps": p.evaluate.steps, "rounds": rounds}
        save(out / f"attacks-{profile}.json", json.dumps(told, indent=1))
        names, parts = common.taking_part(methods, CONTENDERS, always="ascend"), []
        for size, name in itertools.product(map(int, batches.split(",")), tasks.split(",")):
            parts.append(compare(make_task(p, name, size), names, rounds))
            print(parts[-1].to_string(index=False, float_format="%.4g"), flush=True)
            save(out / f"attacks-{profile}.csv", pd.concat(parts))  # kept if killed
    write(out, profile)


def write(out: Path, profile: str) -> None:
    """A table of all tasks and batch sizes, the contenders of each from the fastest to the slowest."""
    told = json.loads((out / f"attacks-{profile}.json").read_text(encoding="utf-8"))
    lines = []
    for row in pd.read_csv(out / f"attacks-{profile}.csv").query("contender in @CONTENDERS").itertuples():
        who = {"task": row.task, "images": str(row.batch), "": f"{CONTENDERS[row.contender].what}: `{row.contender}`"}
        times = {"median": f"{1000 * row.median:.1f}", "least": f"{1000 * row.minimum:.1f}"}
        lines.append(who | {"loss": f"{row.loss:.4f}"} | times | {"÷ ours": f"{row.to_ours:.2f}"})
    head = f"{told['steps']} steps of PGD, {told['rounds']} rounds, in ms; {common.conditions(told)}, one thread."
    save(out / f"attacks-{profile}.md", f"{head}\n\n{pipes(lines, left=3)}")


@dataclass(frozen=True)
class Task:
    """What to maximise over the eps-balls around `x`: `objective`, `(N, *shape)` to `(N,)`; `sizes` of the steps."""

    name: str
    network: nn.Sequential
    objective: Callable[[Tensor], Tensor]
    x: Tensor
    y: Tensor
    eps: float
    sizes: dict


def make_task(p: params.Params, name: str, size: int) -> Task:
    """The attack by which `name` is trained ("RT" or a student; SD has none: labels), or that of "EmpLB" on FD.

    On the first `size` training images, at the eps of training with the step of evaluation. No gradients in weights.
    """
    if name not in TASKS:
        raise FaithkdError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    images, guide = data.training(p)[slice(0, size)], experiment.teacher(p).requires_grad_(False)
    network = guide if name == "RT" else experiment.student(p, "FD" if name == "EmpLB" else name).requires_grad_(False)
    attack = (METHODS[name].attack if name in METHODS else None) or attack_labels
    objective = attack(network, guide, images.x, images.y)
    if name == "EmpLB":
        objective = partial(confidence_difference, guide, network)
    eps, steps = float(p.train.attack.eps), p.evaluate.steps
    sizes = {"steps": steps, "step_size": float(p.evaluate.step_factor) * eps / steps}
    return Task(name, network, objective, images.x, images.y, eps, sizes)


def compare(task: Task, names: list[str], rounds: int) -> pd.DataFrame:
    """A row for each contender: its loss, checked once, and its times by turns. A library that fails is left out."""
    ready, losses = {}, {}
    for name in names:
        try:
            attack = MAKERS[name](task)
            losses[name], ready[name] = checked(name, task, attack), attack
        except Exception as failure:
            if not CONTENDERS[name].package:
                raise
            print(f"{task.name} without {name}: {failure or type(failure).__name__}")
    spent = {name: [] for name in ready}
    for turn in range(rounds):
        first = turn % len(ready)
        for name in [*ready][first:] + [*ready][:first]:  # so that nobody always follows the same one
            begin = time.perf_counter()
            ready[name]()
            spent[name].append(time.perf_counter() - begin)
    median, minimum = pd.DataFrame(spent).median(), pd.DataFrame(spent).min()
    columns = {"loss": losses, "median": median, "minimum": minimum, "to_ours": median / median["ascend"]}
    frame = pd.DataFrame(columns).rename_axis("contender").reset_index().sort_values("median")
    return frame.assign(task=task.name, batch=len(task.x))


def by_ascend(task: Task) -> Callable[[], Tensor]:
    """The inner maximisation of training, which returns the last point."""
    draw = torch.Generator()
    return lambda: attacks.ascend(task.objective, task.x, task.eps, **task.sizes, generator=draw)


def by_search(task: Task) -> Callable[[], Tensor]:
    """The attack of evaluation, which keeps the best point: it looks at the image and the last point, too."""
    options = task.sizes | {"restarts": 1, "generator": torch.Generator()}
    return lambda: attacks.search(lambda z: (task.objective(z),) * 2, task.x, task.eps, **options)[0]


def by_foolbox(task: Task) -> Callable[[], Tensor]:
    """foolbox's LinfPGD, with our objective in the place that it keeps for one; its images may lie in any range."""
    import eagerpy
    import foolbox

    class Attack(foolbox.attacks.LinfPGD):
        def get_loss_fn(self, model, labels):
            return lambda z: eagerpy.astensor(task.objective(z.raw).sum())

    reach = float(task.x.abs().max()) + 2 * task.eps
    model = foolbox.PyTorchModel(task.network, bounds=(-reach, reach), device="cpu")
    attack = Attack(abs_stepsize=task.sizes["step_size"], steps=task.sizes["steps"], random_start=True)
    return lambda: attack(model, task.x, task.y, epsilons=task.eps)[1]


MAKERS = {"ascend": by_ascend, "search": by_search, "foolbox": by_foolbox}


def checked(name: str, task: Task, attack: Callable[[], Tensor]) -> float:
    """One untimed attack: that it takes all steps and ends in the ball; the mean objective that it reaches."""
    gradients = []

    def see(_module, _inputs, logits: Tensor) -> None:
        if logits.requires_grad:
            logits.register_hook(lambda _gradient: gradients.append(1))

    hook = task.network[-1].register_forward_hook(see)
    torch.manual_seed(0)  # from which the libraries draw
    points = attack().detach()
    hook.remove()
    if len(gradients) != task.sizes["steps"]:
        raise FaithkdError(f"{name} took {len(gradients)} gradients where {task.sizes['steps']} were asked for")
    outside = float((points - task.x).abs().max()) - task.eps
    if not outside <= TOLERANCE:
        raise FaithkdError(f"{name} ends {outside:.2g} outside the ball of radius {task.eps:g}")
    with torch.no_grad():
        return float(task.objective(points).mean())


if __name__ == "__main__":
    common.start(main)
