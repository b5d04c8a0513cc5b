"""Who attacks: our own PGD, the libraries it is measured against, and the bare matrix products that nobody can avoid.

Each contender is made by `load` from a task, and is then a function without arguments that attacks once and returns
the points it ends at `(N, *shape)`; the bare products return None.
"""

import itertools
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.report import version
from faithkd.attacks import ascend, search
from faithkd.errors import FaithkdError


@dataclass(frozen=True)
class Task:
    """What to maximise, by `steps` steps: `objective` `(N, *shape)` to `(N,)`, over the eps-balls around `x`.

    `networks` are those that every step passes through. `labels`: the objective is the cross-entropy of the first of
    them with `y`, which is what all libraries can do.
    """

    name: str
    networks: tuple[nn.Sequential, ...]
    objective: Callable[[Tensor], Tensor]
    x: Tensor
    y: Tensor
    eps: float
    steps: int
    step_size: float
    labels: bool
    seed: int = 0


@dataclass(frozen=True)
class Attacker:
    """`what` it is in a table; `package` and `install`: of a library; `labels`: it knows the cross-entropy only."""

    what: str
    package: str = ""
    install: str = ""
    labels: bool = False


PRODUCTS, OURS = "products", "ascend"
ATTACKERS = {
    PRODUCTS: Attacker("the bare matrix products"),
    OURS: Attacker("faithkd, last point (training)"),
    "search": Attacker("faithkd, best point (evaluation)"),
    "torchattacks": Attacker(
        "torchattacks PGD",
        "torchattacks",
        "pip install --no-deps torchattacks (without --no-deps it brings requests of 2020)",
        labels=True,
    ),
    "adv-lib": Attacker(
        "adversarial-library pgd_linf",
        "adv-lib",
        "pip install adv-lib (benchmarks/README.md, if visdom does not build)",
        labels=True,
    ),
    "foolbox": Attacker("foolbox LinfPGD", "foolbox", "pip install foolbox"),
    "art": Attacker(
        "adversarial-robustness-toolbox PGD",
        "adversarial-robustness-toolbox",
        "pip install adversarial-robustness-toolbox",
        labels=True,
    ),
}


def absent(name: str) -> str:
    """Why a contender cannot take part, "" if it can."""
    attacker = ATTACKERS[name]
    if not attacker.package or version(attacker.package):
        return ""
    return f"{attacker.package} is not installed: {attacker.install}"


def load(name: str, task: Task) -> Callable[[], Tensor | None]:
    """The contender, ready to attack. Raises FaithkdError where it is absent, or cannot be imported."""
    if reason := absent(name):
        raise FaithkdError(f"{name}: {reason}")
    make = {
        PRODUCTS: products,
        OURS: ours,
        "search": best_met,
        "torchattacks": torchattacks,
        "adv-lib": adversarial_library,
        "foolbox": foolbox,
        "art": toolbox,
    }[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries use may be deprecated by now
        try:
            return make(task)
        except ImportError as error:
            raise FaithkdError(f"{name}: installed, but it cannot be imported: {error}") from error


def ours(task: Task) -> Callable[[], Tensor]:
    """The inner maximisation of training."""

    def attack() -> Tensor:
        generator = torch.Generator().manual_seed(task.seed)
        options = {"steps": task.steps, "step_size": task.step_size, "generator": generator}
        return ascend(task.objective, task.x, task.eps, **options)

    return attack


def best_met(task: Task) -> Callable[[], Tensor]:
    """The attack of evaluation, which keeps the best point: it looks at the image and the last point, too."""

    def objective(z: Tensor) -> tuple[Tensor, Tensor]:
        value = task.objective(z)
        return value, value

    def attack() -> Tensor:
        generator = torch.Generator().manual_seed(task.seed)
        options = {"steps": task.steps, "step_size": task.step_size, "restarts": 1, "generator": generator}
        return search(objective, task.x, task.eps, **options)[0]

    return attack


def products(task: Task) -> Callable[[], None]:
    """The floor: for each step, each layer's product forwards, and its product backwards to the gradient in x.

    Without biases, ReLU, pooling, loss, sign, projection and the bookkeeping of gradients; a fully connected layer's
    results go into memory that is there already.
    """
    calls = [call for network in task.networks for call in layer_products(network, task.x)]

    @torch.no_grad()
    def multiply() -> None:
        for _ in range(task.steps):
            for call in calls:
                call()

    return multiply


def layer_products(network: nn.Sequential, x: Tensor) -> list[Callable[[], object]]:
    """A network's products on the batch `x`, forwards first, then backwards."""
    forwards, backwards, z = [], [], x
    with torch.no_grad():
        for layer in network:
            before, z = z, layer(z)
            if isinstance(layer, nn.Linear):
                pair = linear_products(layer.weight, before.clone(), z.clone())
            elif isinstance(layer, nn.Conv2d):
                pair = convolution_products(layer, before.clone(), z.clone())
            else:
                continue
            forwards.append(pair[0])
            backwards.insert(0, pair[1])
    return forwards + backwards


def linear_products(weight: Tensor, before: Tensor, after: Tensor) -> tuple[Callable, Callable]:
    """x Wᵀ and g W, into memory that is there."""
    product, gradient = torch.empty_like(after), torch.empty_like(before)
    return (lambda: torch.mm(before, weight.T, out=product)), (lambda: torch.mm(after, weight, out=gradient))


def convolution_products(layer: nn.Conv2d, before: Tensor, after: Tensor) -> tuple[Callable, Callable]:
    """The convolution, and its transpose on a gradient."""
    place = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    weight = layer.weight

    def backwards() -> Tensor:
        return torch.nn.grad.conv2d_input(before.shape, weight, after, **place)

    return (lambda: F.conv2d(before, weight, **place)), backwards


def torchattacks(task: Task) -> Callable[[], Tensor]:
    """torchattacks.PGD, on images in [0, 1]."""
    import torchattacks

    low, width = free_range(task)
    network, images = rescaled(task.networks[0], low, width), (task.x - low) / width
    attack = torchattacks.PGD(network, eps=task.eps / width, alpha=task.step_size / width, steps=task.steps)
    return lambda: attack(images, task.y) * width + low


def adversarial_library(task: Task) -> Callable[[], Tensor]:
    """adv_lib's pgd_linf, on images in [0, 1]; it returns the image itself where no point is misclassified."""
    from adv_lib.attacks import pgd_linf

    low, width = free_range(task)
    network, images = rescaled(task.networks[0], low, width), (task.x - low) / width
    options = {"ε": task.eps / width, "steps": task.steps, "absolute_step_size": task.step_size / width}
    return lambda: pgd_linf(network, images, task.y, **options) * width + low


def foolbox(task: Task) -> Callable[[], Tensor]:
    """foolbox's LinfPGD, with our objective in the place that it keeps for one; its images may lie in any range."""
    import eagerpy
    import foolbox

    class Attack(foolbox.attacks.LinfPGD):
        """Its own loss for cross-entropy, ours for all else."""

        def get_loss_fn(self, model, labels):
            if task.labels:
                return super().get_loss_fn(model, labels)
            return lambda z: eagerpy.astensor(task.objective(z.raw).sum())

    low, width = free_range(task)
    model = foolbox.PyTorchModel(task.networks[0], bounds=(low, low + width), device="cpu")
    attack = Attack(abs_stepsize=task.step_size, steps=task.steps, random_start=True)
    return lambda: attack(model, task.x, task.y, epsilons=task.eps)[1]


def toolbox(task: Task) -> Callable[[], Tensor]:
    """ART's PGD for PyTorch, which takes and gives NumPy arrays; without bounds, it does not clip."""
    import numpy as np
    from art.attacks.evasion.projected_gradient_descent import projected_gradient_descent_pytorch as pgd
    from art.estimators.classification import PyTorchClassifier

    classes = task.networks[0](task.x[:1]).shape[1]
    about = {"input_shape": tuple(task.x.shape[1:]), "nb_classes": classes, "device_type": "cpu"}
    classifier = PyTorchClassifier(task.networks[0], loss=nn.CrossEntropyLoss(), **about)
    steps = {"eps": task.eps, "eps_step": task.step_size, "max_iter": task.steps, "num_random_init": 1}
    attack = pgd.ProjectedGradientDescentPyTorch(
        classifier, norm=np.inf, batch_size=len(task.x), verbose=False, **steps
    )
    x, y = task.x.numpy(), task.y.numpy()
    return lambda: torch.as_tensor(attack.generate(x, y))


def free_range(task: Task) -> tuple[float, float]:
    """(lowest value, width) of a range in which every ball lies, so that a library that clips never does."""
    low, high = float(task.x.min()) - 2 * task.eps, float(task.x.max()) + 2 * task.eps
    return low, high - low


def rescaled(network: nn.Sequential, low: float, width: float) -> nn.Sequential:
    """The network as a function of (x - low) / width, by new weights of its first layer: it costs nothing."""
    place = next((k for k, layer in enumerate(network) if isinstance(layer, (nn.Linear, nn.Conv2d))), None)
    first = deepcopy(network[place]) if place is not None else None
    plain = all(isinstance(layer, nn.Flatten) for layer in itertools.islice(network, place))
    if first is None or not plain or first.bias is None or any(getattr(first, "padding", ())):
        raise FaithkdError("the first layer must be linear with a bias, or a convolution without padding")
    with torch.no_grad():
        first.bias += low * first.weight.flatten(1).sum(1)
        first.weight *= width
    return nn.Sequential(*network[:place], first, *network[place + 1 :])
