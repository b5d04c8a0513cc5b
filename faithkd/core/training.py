"""Adversarial training (eqs 2–3) and distillation (eqs 1, 4, 5, 12): one loop, SGD, cosine, early stopping, resume."""

import io
import math
import pickle
import sys
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from faithkd import paths
from faithkd.blocks import fastest
from faithkd.core.attacks import Clip, ascend
from faithkd.core.data import Split
from faithkd.core.losses import METHODS, Method, attack_labels, cross_entropy
from faithkd.core.models import initialise

REDRAWS = 3  # so often at most other initial weights are drawn for a network that has died during the ramp
MONITORED = 1000  # held-out images on which robust accuracy is recorded after each epoch; it decides nothing


def adversarial(labels_only: nn.Module, _teacher, x, x_adv, y, alpha, temperature):
    """Adversarial training, min_Θ E max_δ L_CE(f(x+δ), y), eq. (3); x_adv is the inner maximiser."""
    return cross_entropy(labels_only(x_adv), y).mean()


ADVERSARIAL = Method(adversarial, attack_labels, "adversarial training")
OURS = {attack_labels, *(method.attack for method in METHODS.values())}  # they do nothing to images: `blocks` will do


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
) -> tuple[dict[str, Tensor], list[dict]]:
    """Train `network` in place; return its best weights and one row of history per epoch, eqs (1)–(5), (12).

    `teacher=None` trains adversarially on labels, eq. (3); otherwise `method` (one of `losses.METHODS`, or your own)
    distils from `teacher`. `settings` holds learning_rate, learning_rate_min, weight_decay and, for students, alpha
    and temperature; `schedule` is `Params.train`. Training stops when the accuracy on `held_out` has not risen for
    `patience` epochs, and the weights of the best epoch are returned. With a `checkpoint` path a killed run goes on
    where it was, and ends with the same weights as an undisturbed one. A network that is dead when the ramp of ε is
    over starts again from other initial weights, and `redraws` in its history says how often. No `description`, no bar.
    """
    train, held_out = (Split(part.x.to(device), part.y.to(device), part.index) for part in (train, held_out))
    if teacher is not None:
        teacher = deepcopy(teacher).to(device).eval().requires_grad_(False)
    clip = clip and (clip[0].to(device), clip[1].to(device))
    run = Run(network.to(device), teacher, method or ADVERSARIAL, settings, schedule, clip, seed)
    if checkpoint is not None and checkpoint.exists():
        run.resume(checkpoint)
    bar = {"total": schedule.epochs, "initial": run.state.epoch, "unit": "epoch", "leave": False}
    with tqdm(desc=description, disable=description is None, **bar) as bar:
        while not run.over():
            loss = run.learn(train)
            run.record(held_out, loss)
            if run.started_again(train):
                told = f"{description or 'training'}: one class for all images, so once more from other weights"
                bar.write(told, file=sys.stderr)
                bar.reset()
                continue
            if checkpoint is not None:
                run.save(checkpoint)
            bar.update()
            bar.set_postfix(accuracy=f"{run.state.history[-1]['accuracy']:.3f}", loss=f"{loss:.3f}")
    return run.state.best, run.state.history


def cosine(settings, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch, on one run of cosine annealing from the first rate to the last, §A."""
    low, high = float(settings.learning_rate_min), float(settings.learning_rate)
    return low + (high - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@dataclass
class State:
    """Where a training stands after an epoch: beside its tensors, what a resumed run needs to go on bit for bit."""

    epoch: int = 0
    best_score: float = -1.0
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    redraws: int = 0


@dataclass
class Run:
    """A training under way: `network` learns from `teacher` or labels by `method`, as `settings` and `schedule` say."""

    network: nn.Module
    teacher: nn.Module | None
    method: Method
    settings: object
    schedule: object
    clip: Clip | None
    seed: int

    def __post_init__(self):
        self.state = State()
        self.generator = torch.Generator().manual_seed(self.seed)
        options = {"momentum": float(self.schedule.momentum), "weight_decay": float(self.settings.weight_decay)}
        self.optimizer = torch.optim.SGD(self.network.parameters(), **options)

    def over(self) -> bool:
        """Whether all epochs are done, or the best one was `patience` epochs ago."""
        impatient = self.schedule.early_stopping != "none" and len(self.state.best) > 0
        given_up = impatient and self.state.epoch - self.state.best_epoch >= self.schedule.patience
        return given_up or self.state.epoch >= self.schedule.epochs

    def learn(self, train: Split) -> float:
        """One epoch: SGD on the method's loss at x and x_adv of every batch; returns the mean loss."""
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(self.settings, self.state.epoch, self.schedule.epochs)
        options = [getattr(self.settings, name, None) for name in ("alpha", "temperature")]
        order = torch.randperm(len(train), generator=self.generator).to(train.y.device)
        batches = order.split(self.schedule.batch_size)
        total = torch.zeros((), device=train.y.device)
        for number, rows in enumerate(batches):
            x, y = train.x[rows], train.y[rows]
            # From a random start the full ε keeps the network at chance for ever: ε and the step grow from 0.
            done, ramp = self.state.epoch + number / len(batches), self.schedule.ramp_epochs
            share = min(1.0, done / ramp) if ramp else 1.0
            x_adv = self.perturbed(x, y, self.method.attack, self.generator, share)
            loss = self.method.loss(self.network, self.teacher, x, x_adv, y, *options)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.detach() * len(y)
        return float(total) / len(train)

    def perturbed(self, x: Tensor, y: Tensor, attack, generator: torch.Generator, share: float = 1.0) -> Tensor:
        """x_adv, where PGD on `share` of the ball finds `attack(network, teacher, x, y)` highest, eq. (2), if any."""
        if attack is None:
            return x
        pair, clip, back = (self.network, self.teacher), self.clip, lambda points: points
        if getattr(attack, "func", attack) in OURS:
            pair, x, clip, back = fastest(pair, x, clip)
        # Only the gradient in x is wanted; freezing the weights spares every backward step the one in W.
        trainable = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.network.requires_grad_(False)
        sizes = self.schedule.attack
        options = {"steps": sizes.steps, "step_size": float(sizes.step_size) * share, "clip": clip}
        end = ascend(attack(*pair, x, y), x, float(sizes.eps) * share, generator=generator, **options)
        for weight in trainable:
            weight.requires_grad_(True)
        return back(end)

    def record(self, held_out: Split, loss: float) -> None:
        """Append this epoch's row to the history and keep the weights when they are the best so far."""
        self.network.eval()
        few, generator = held_out[:MONITORED], torch.Generator().manual_seed(self.seed)
        accuracy = self.accuracy(held_out.x, held_out.y)
        row = {
            "epoch": self.state.epoch + 1,
            "learning_rate": cosine(self.settings, self.state.epoch, self.schedule.epochs),
            "loss": loss,
            "accuracy": accuracy,
        }
        row |= {"redraws": self.state.redraws} if self.state.redraws else {}
        row["robust_accuracy"] = self.accuracy(self.perturbed(few.x, few.y, attack_labels, generator), few.y)
        self.state.epoch += 1
        self.state.history.append(row)
        # Scores during the ramp, an easier problem, do not count. Without early stopping the last epoch wins.
        ramping = self.state.epoch <= self.schedule.ramp_epochs and self.state.epoch < self.schedule.epochs
        if not ramping and (accuracy > self.state.best_score or self.schedule.early_stopping == "none"):
            self.state.best_score, self.state.best_epoch = accuracy, self.state.epoch
            self.state.best = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The share of images that the network classifies as labelled."""
        return float((self.network(x).argmax(1) == y).double().mean())

    @torch.no_grad()
    def started_again(self, train: Split) -> bool:
        """Whether it is dead after the ramp, its ReLUs off and with them all gradients: if so, from other weights."""
        asked = self.state.epoch == self.schedule.ramp_epochs and self.state.redraws < REDRAWS
        if not asked or len(self.network(train.x[:1000]).argmax(1).unique()) > 1:
            return False
        self.state = State(redraws=self.state.redraws + 1)
        fresh, seed = deepcopy(self.network).cpu(), self.seed + 1000 * self.state.redraws  # no seed of `repeats`
        self.network.load_state_dict(initialise(fresh, self.schedule.initialisation, seed=seed).state_dict())
        self.optimizer.state.clear()
        return True

    def save(self, checkpoint: Path) -> None:
        """Write all that changes from epoch to epoch."""
        content = {"state": vars(self.state), "generator": self.generator.get_state()}
        content |= {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        file = io.BytesIO()
        torch.save(content, file)
        paths.write(checkpoint, file.getvalue())

    def resume(self, checkpoint: Path) -> None:
        """Go to where the checkpoint was written; nowhere if it is damaged."""
        file = io.BytesIO(checkpoint.read_bytes())
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            state, generator, optimizer = State(**content["state"]), content["generator"], content["optimizer"]
            self.network.load_state_dict(content["network"])
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, RuntimeError) as error:
            warnings.warn(f"{checkpoint} is damaged ({type(error).__name__}); the training starts anew", stacklevel=3)
            checkpoint.unlink()
            return
        self.optimizer.load_state_dict(optimizer)
        self.generator.set_state(generator)
        self.state = state
