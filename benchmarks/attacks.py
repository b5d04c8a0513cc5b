"""Cost of our attacks beside other libraries': python -m benchmarks.attacks

Writes a table of times and ratios to benchmarks/results/; see README.md here.
"""

import itertools
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    Contender,
    Out,
    Profile,
    Settings,
    conditions,
    facts,
    pipes,
    save,
    save_facts,
    start,
    taking_part,
)
from faithkd import attacks, data, experiment, params
from faithkd.errors import FaithkdError
from faithkd.evaluation import confidence_difference
from faithkd.losses import METHODS, attack_labels
from faithkd.params import Params

TASKS = ("RT", *METHODS, "EmpLB")
TOLERANCE = 1e-5  # how far float32, and a change of variables and back, may carry a point out of its ball
CONTENDERS = {
    "ascend": Contender("faithkd, last point (training)"),
    "search": Contender("faithkd, best point (evaluation)"),
    "torchattacks": Contender(
        "torchattacks PGD",
        "torchattacks",
        "pip install --no-deps torchattacks (else it brings an old requests)",
        labels=True,
    ),
    "foolbox": Contender("foolbox LinfPGD", "foolbox"),
}

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    profile: Profile = "mnist",
    settings: Settings = None,
    methods: Annotated[str, typer.Option(help="Who attacks, by commas.")] = ",".join(CONTENDERS),
    tasks: Annotated[str, typer.Option(help="Whom and what to attack, by commas.")] = ",".join(TASKS),
    batches: Annotated[str, typer.Option(help="Images attacked at once, by commas.")] = "128,1000",
    rounds: Annotated[int, typer.Option(help="How often to attack, by turns.")] = 15,
    out: Out = RESULTS,
) -> None:
    """Measure PGD, ours and the libraries', on the same networks and images."""
    p = params.load(profile, settings or [])
    out.mkdir(parents=True, exist_ok=True)
    told = facts(p, CONTENDERS) | {"eps": str(p.train.attack.eps), "steps": p.evaluate.steps, "rounds": rounds}
    save_facts(out, f"attacks-{profile}", told)
    names, parts = taking_part(methods, CONTENDERS, always=["ascend"]), []
    for size, name in itertools.product(map(int, batches.split(",")), tasks.split(",")):
        parts.append(compare(make_task(p, name, size), names, rounds))
        print(parts[-1].to_string(index=False, header=len(parts) == 1, float_format="%.4g"), flush=True)
        save(out, f"attacks-{profile}", pd.concat(parts), markdown(pd.concat(parts), told))  # kept if killed


@dataclass(frozen=True)
class Task:
    """What to maximise, by `steps` steps: `objective` `(N, *shape)` to `(N,)`, over the eps-balls around `x`.

    `labels`: the objective is the cross-entropy of `network` with `y`, which is what all libraries can do.
    """

    name: str
    network: nn.Sequential
    objective: Callable[[Tensor], Tensor]
    x: Tensor
    y: Tensor
    eps: float
    steps: int
    step_size: float
    labels: bool


def make_task(p: Params, name: str, size: int) -> Task:
    """The attack by which `name` is trained ("RT" or a student; SD has none: labels), or that of "EmpLB" on FD.

    On the first `size` training images, at the eps of training and with the step of evaluation.
    """
    if name not in TASKS:
        raise FaithkdError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    images, guide = data.training(p)[slice(0, size)], frozen(experiment.teacher(p))
    network = guide if name == "RT" else frozen(experiment.student(p, "FD" if name == "EmpLB" else name))
    attack = (METHODS[name].attack if name in METHODS else None) or attack_labels
    objective = attack(network, guide, images.x, images.y)
    if name == "EmpLB":
        objective = lambda z: confidence_difference(guide, network, z)  # noqa: E731
    eps, steps = float(p.train.attack.eps), p.evaluate.steps
    about = {"eps": eps, "steps": steps, "step_size": float(p.evaluate.step_factor) * eps / steps}
    labels = attack is attack_labels and name != "EmpLB"
    return Task(name, network, objective, images.x, images.y, labels=labels, **about)


def frozen(network: nn.Sequential) -> nn.Sequential:
    """A copy that asks for no gradients in its weights: nobody is to pay for those."""
    return deepcopy(network).cpu().float().eval().requires_grad_(False)


def compare(task: Task, names: list[str], rounds: int) -> pd.DataFrame:
    """A row for each contender that knows the objective: the loss it reaches, checked once, and its times by turns."""
    ready = {name: load(name, task) for name in names if task.labels or not CONTENDERS[name].labels}
    losses = {name: checked(name, task, attack) for name, attack in ready.items()}
    spent = {name: [] for name in ready}
    for turn in range(rounds):
        first = turn % len(ready)
        for name in [*ready][first:] + [*ready][:first]:  # so that nobody always follows the same one
            torch.manual_seed(0)
            begin = time.perf_counter()
            ready[name]()
            spent[name].append(time.perf_counter() - begin)
    seconds = pd.DataFrame(spent).median()
    frame = pd.DataFrame({"loss": losses, "ms": 1000 * seconds, "to_ours": seconds / seconds["ascend"]})
    frame = frame.rename_axis("contender").reset_index().sort_values("ms")
    return frame.assign(task=task.name, batch=len(task.x))


def load(name: str, task: Task) -> Callable[[], Tensor]:
    """The contender as a function that attacks once and returns the points it ends at."""
    if name in ("torchattacks", "foolbox"):
        return {"torchattacks": by_torchattacks, "foolbox": by_foolbox}[name](task)
    steps = {"steps": task.steps, "step_size": task.step_size}

    def ours() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if name == "ascend":
            return attacks.ascend(task.objective, task.x, task.eps, **steps, generator=generator)
        both = {"restarts": 1, "generator": generator}
        return attacks.search(lambda z: (task.objective(z),) * 2, task.x, task.eps, **steps, **both)[0]

    return ours


def by_torchattacks(task: Task) -> Callable[[], Tensor]:
    """torchattacks.PGD clips to [0, 1]: it gets the images moved there, so far from the ends that it never does.

    The network undoes that by the weights of its first layer, which costs nothing.
    """
    import torchattacks

    low, width = float(task.x.min()) - 2 * task.eps, float(task.x.max() - task.x.min()) + 4 * task.eps
    network, images = rescaled(task.network, low, width), (task.x - low) / width
    attack = torchattacks.PGD(network, eps=task.eps / width, alpha=task.step_size / width, steps=task.steps)
    return lambda: attack(images, task.y) * width + low


def rescaled(network: nn.Sequential, low: float, width: float) -> nn.Sequential:
    """The network as a function of (x - low) / width, by new weights of its first layer."""
    place = next(k for k, layer in enumerate(network) if not isinstance(layer, nn.Flatten))
    first = deepcopy(network[place])
    if not isinstance(first, nn.Linear | nn.Conv2d) or first.bias is None or any(getattr(first, "padding", ())):
        raise FaithkdError("the first layer must be linear with a bias, or a convolution without padding")
    first.bias += low * first.weight.flatten(1).sum(1)
    first.weight *= width
    return nn.Sequential(*network[:place], first, *network[place + 1 :])


def by_foolbox(task: Task) -> Callable[[], Tensor]:
    """foolbox's LinfPGD, with our objective in the place that it keeps for one; its images may lie in any range."""
    import eagerpy
    import foolbox

    class Attack(foolbox.attacks.LinfPGD):
        def get_loss_fn(self, model, labels):
            return lambda z: eagerpy.astensor(task.objective(z.raw).sum())

    reach = float(task.x.abs().max()) + 2 * task.eps
    model = foolbox.PyTorchModel(task.network, bounds=(-reach, reach), device="cpu")
    attack = Attack(abs_stepsize=task.step_size, steps=task.steps, random_start=True)
    return lambda: attack(model, task.x, task.y, epsilons=task.eps)[1]


def checked(name: str, task: Task, attack: Callable[[], Tensor]) -> float:
    """One untimed attack: that it takes all steps and ends in the ball; the mean objective that it reaches."""
    gradients = []

    def see(_module, _inputs, logits: Tensor) -> None:
        if logits.requires_grad:
            logits.register_hook(lambda _gradient: gradients.append(1))

    hook = task.network[-1].register_forward_hook(see)
    points = attack().detach()
    hook.remove()
    if len(gradients) != task.steps:
        raise FaithkdError(f"{name} took {len(gradients)} gradients where {task.steps} were asked for")
    outside = float((points - task.x).abs().max()) - task.eps
    if not outside <= TOLERANCE:
        raise FaithkdError(f"{name} ends {outside:.2g} outside the ball of radius {task.eps:g}")
    with torch.no_grad():
        return float(task.objective(points).mean())


def markdown(frame: pd.DataFrame, told: dict) -> str:
    """A table of all tasks and batch sizes, the contenders of each from the fastest to the slowest."""
    lines = [
        {"task": row.task, "images": str(row.batch), "": f"{CONTENDERS[row.contender].what}: `{row.contender}`"}
        | {"loss": f"{row.loss:.4f}", "ms": f"{row.ms:.1f}", "÷ ours": f"{row.to_ours:.2f}"}
        for row in frame.itertuples()
    ]
    head = f"PGD, median of {told['rounds']} rounds; {conditions(told)}, one thread."
    return f"{head}\n\n{pipes(pd.DataFrame(lines), left=3)}"


if __name__ == "__main__":
    start(app)
