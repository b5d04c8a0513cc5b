"""Adversarial training (eqs 2–3) and distillation (eqs 1, 4, 5, 12): one loop, SGD, cosine, early stopping, resume."""

import json
import math
import sys
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from faithkd import paths
from faithkd.core.attacks import Clip, ascend, fastest
from faithkd.core.data import Split
from faithkd.core.losses import Method, attack_difference, attack_labels, attack_soft_labels, cross_entropy
from faithkd.core.models import initialise

REDRAWS = 3  # so often at most other initial weights are drawn for a network that has died during the ramp
MONITORED = 1000  # held-out images on which robust accuracy is recorded after each epoch; it decides nothing


def adversarial(labels_only: nn.Module, _teacher, x, x_adv, y, alpha, temperature):
    """Adversarial training, min_Θ E max_δ L_CE(f(x+δ), y), eq. (3); x_adv is the inner maximiser."""
    return cross_entropy(labels_only(x_adv), y).mean()


ADVERSARIAL = Method(adversarial, attack_labels, "adversarial training")


def cosine(settings, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (from 0) on one run of cosine annealing from `learning_rate` to its minimum, §A."""
    low, high = float(settings.learning_rate_min), float(settings.learning_rate)
    return low + (high - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@dataclass
class State:
    """Where a training stands after an epoch: everything a resumed run needs to go on bit for bit."""

    epoch: int = 0
    best_score: float = -1.0
    best_epoch: int = 0
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    redraws: int = 0


def fit(
    network: nn.Module,
    teacher: nn.Module | None,
    train: Split,
    held_out: Split,
    settings,
    schedule,
    *,
    method: Method | None = None,
    seed: int = 0,
    device: str = "cpu",
    clip: Clip | None = None,
    checkpoint: Path | None = None,
    description: str | None = "training",
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Train `network` in place; return its best weights and one row of history per epoch, eqs (1)–(5), (12).

    `teacher=None` trains adversarially on labels, eq. (3); otherwise `method` (one of `losses.METHODS`, or your own)
    distils from `teacher`. `settings` holds learning_rate, learning_rate_min, weight_decay and, for students, alpha
    and temperature; `schedule` is `Params.train`. Training stops when the accuracy on `held_out` has not risen for
    `patience` epochs, and the weights of the best epoch are returned. With a `checkpoint` path a killed run goes on
    where it was, and ends with the same weights as an undisturbed one. A network that is dead when the ramp of ε is
    over starts again from other initial weights, and `redraws` in its history says how often. No `description`, no bar.
    """
    method = method or ADVERSARIAL
    network, train, held_out = network.to(device), _to(train, device), _to(held_out, device)
    if teacher is not None:
        teacher = deepcopy(teacher).to(device).eval().requires_grad_(False)
    clip = clip and (clip[0].to(device), clip[1].to(device))
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings.learning_rate, momentum=schedule.momentum, weight_decay=settings.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    state = _resume(checkpoint, network, optimizer, generator) or State()

    quiet = description is None
    bar = tqdm(total=schedule.epochs, initial=state.epoch, desc=description, unit="epoch", leave=False, disable=quiet)
    while state.epoch < schedule.epochs and not _out_of_patience(state, schedule):
        rate = cosine(settings, state.epoch, schedule.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _epoch(network, teacher, train, method, settings, schedule, state.epoch, optimizer, clip, generator)
        _record(state, network, held_out, schedule, clip, loss, rate, seed)
        if state.epoch == schedule.ramp_epochs and state.redraws < REDRAWS and _dead(network, train):
            state = State(redraws=state.redraws + 1)
            fresh = deepcopy(network).cpu()
            initialise(fresh, schedule.initialisation, seed=seed + 1000 * state.redraws)  # no seed of `repeats`
            network.load_state_dict(fresh.state_dict())
            optimizer.state.clear()
            bar.write(
                f"{description or 'training'}: one class for all images, so once more from other weights",
                file=sys.stderr,
            )
            bar.reset()
            continue
        if checkpoint is not None:
            _save(checkpoint, state, network, optimizer, generator)
        bar.update()
        bar.set_postfix(accuracy=f"{state.history[-1]['accuracy']:.3f}", loss=f"{loss:.3f}")
    bar.close()
    return state.best, state.history


def _dead(network, train: Split) -> bool:
    """Whether it says the same class to a thousand training images: its ReLUs are off, and with them all gradients."""
    with torch.no_grad():
        return len(network(train.x[:1000]).argmax(1).unique()) == 1


def _epoch(network, teacher, train, method, settings, schedule, epoch, optimizer, clip, generator) -> float:
    """One pass over the training images; returns the mean loss."""
    network.train()
    order = torch.randperm(len(train), generator=generator).to(train.y.device)
    batches = order.split(schedule.batch_size)
    total = torch.zeros((), device=train.y.device)
    for number, rows in enumerate(batches):
        x, y = train.x[rows], train.y[rows]
        # From a random start the full ε keeps the network at chance for ever: ε and the step grow from 0.
        ramp = min(1.0, (epoch + number / len(batches)) / schedule.ramp_epochs) if schedule.ramp_epochs else 1.0
        x_adv = _maximise(network, teacher, x, y, method.attack, schedule.attack, ramp, clip, generator)
        loss = method.loss(
            network, teacher, x, x_adv, y, getattr(settings, "alpha", None), getattr(settings, "temperature", None)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(y)
    return float(total) / len(train)


def _maximise(network, teacher, x, y, objective, attack, ramp: float, clip, generator) -> torch.Tensor:
    """Where PGD finds `objective(network, teacher, x, y)` highest on the training ball, eq. (2); x for None."""
    if objective is None:
        return x
    pair, start, back = (network, teacher), x, None
    if _blind(objective):
        pair, start, clip, back = fastest(pair, x, clip)
    # Only the gradient in x is wanted; freezing the weights spares every backward step the one in W.
    trainable = [weight for weight in network.parameters() if weight.requires_grad]
    network.requires_grad_(False)
    end = ascend(
        objective(*pair, start, y),
        start,
        float(attack.eps) * ramp,
        steps=attack.steps,
        step_size=float(attack.step_size) * ramp,
        generator=generator,
        clip=clip,
    )
    for weight in trainable:
        weight.requires_grad_(True)
    return back(end) if back else end


def _blind(objective) -> bool:
    """Whether an attack only hands images to the networks, so that their layout is nobody else's business."""
    return getattr(objective, "func", objective) in (attack_labels, attack_soft_labels, attack_difference)


def _record(state: State, network, held_out: Split, schedule, clip, loss: float, rate: float, seed: int) -> None:
    """Append this epoch's row and keep the weights when they are the best so far."""
    network.eval()
    with torch.no_grad():
        accuracy = float((network(held_out.x).argmax(1) == held_out.y).double().mean())
    row = {"epoch": state.epoch + 1, "learning_rate": rate, "loss": loss, "accuracy": accuracy}
    row |= {"redraws": state.redraws} if state.redraws else {}
    row["robust_accuracy"] = _robust_accuracy(network, held_out[slice(0, MONITORED)], schedule.attack, clip, seed)
    state.epoch += 1
    state.history.append(row)
    # Scores during the ramp are those of an easier problem: they do not count. Without early stopping the last wins.
    ramping = state.epoch <= schedule.ramp_epochs and state.epoch < schedule.epochs
    if not ramping and (accuracy > state.best_score or schedule.early_stopping == "none"):
        state.best_score, state.best_epoch = accuracy, state.epoch
        state.best = {name: weight.detach().cpu().clone() for name, weight in network.state_dict().items()}


def _robust_accuracy(network, held_out: Split, attack, clip, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    z = _maximise(network, None, held_out.x, held_out.y, attack_labels, attack, 1.0, clip, generator)
    with torch.no_grad():
        return float((network(z).argmax(1) == held_out.y).double().mean())


def _out_of_patience(state: State, schedule) -> bool:
    if schedule.early_stopping == "none" or not state.best:
        return False
    return state.epoch - state.best_epoch >= schedule.patience


def _to(split: Split, device: str) -> Split:
    return Split(split.x.to(device), split.y.to(device), split.index)


def _save(path: Path, state: State, network, optimizer, generator) -> None:
    tensors = {f"network.{name}": weight for name, weight in network.state_dict().items()}
    tensors |= {f"best.{name}": weight for name, weight in state.best.items()}
    for number, parameter in enumerate(network.parameters()):
        tensors[f"momentum.{number}"] = optimizer.state[parameter]["momentum_buffer"]
    tensors["generator"] = generator.get_state()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    meta = {name: getattr(state, name) for name in ("epoch", "best_score", "best_epoch", "history", "redraws")}
    paths.write(path, safetensors.torch.save(tensors, {"state": json.dumps(meta)}))


def _resume(path: Path | None, network, optimizer, generator) -> State | None:
    """Bring network, optimiser and generator to where the checkpoint was written; None where there is no sound one."""
    if path is None or not path.exists():
        return None

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    try:
        with safe_open(path, framework="pt") as file:
            state = State(**json.loads(file.metadata()["state"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        momenta = [tensors[f"momentum.{number}"] for number, _ in enumerate(network.parameters())]
        generator.set_state(tensors["generator"])
        network.load_state_dict(part("network."))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        warnings.warn(f"{path} is damaged ({error}); the training starts anew", stacklevel=2)
        path.unlink()
        return None
    for parameter, momentum in zip(network.parameters(), momenta, strict=True):
        optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
    state.best = part("best.")
    return state
