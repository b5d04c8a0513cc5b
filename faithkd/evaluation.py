"""What the paper measures, image by image: robust accuracy, agreement (Defs 1, 3) and EmpLB (§4.1).

Past the paper: two stronger searches, `auto_attack` for robust accuracy and `strong_lower_bound` for EmpLB.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from faithkd import attacks
from faithkd.attacks import Clip, fastest, search
from faithkd.bounds.graph import check_images, outer_ball, prepare_pair
from faithkd.errors import FaithkdError
from faithkd.losses import cross_entropy, kl
from faithkd.models import together

CHUNK = 500  # images attacked at once: large enough for fast matrix products, small enough for the cache


@dataclass(frozen=True)
class LowerBound:
    """EmpLB per image: `values` (N,) float64 and the images that attain them, `witnesses` (N, *shape)."""

    values: Tensor
    witnesses: Tensor


@dataclass(frozen=True)
class Attack:
    """What an attack found per image: `holds` (N,) bool is False where it succeeded, at `witnesses` (N, *shape)."""

    holds: Tensor
    witnesses: Tensor


def confidence_difference(teacher: nn.Module, student: nn.Module, x: Tensor) -> Tensor:
    """‖f_t(x) − f_s(x)‖∞ with f = σ(g), the objective of eq. (8). Images (N, *shape) → (N,) in [0, 1]."""
    return _norm(teacher(x), student(x))


def predictions(network: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes c(x) = arg max_c f^c(x), Def. 1. Images (N, *shape) → (N,)."""
    with torch.no_grad():
        return network(x).argmax(1)


def empirical_lower_bound(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    eps: float,
    *,
    steps: int = 50,
    restarts: int = 5,
    seed: int = 0,
    step_factor: float = 2.5,
    clip: Clip | None = None,
) -> LowerBound:
    """EmpLB: PGD ascends ‖f_t(x') − f_s(x')‖∞ over B_ε(x), a lower bound on δ*, §4.1.

    `x` (N, *shape) in the networks' own input space, `eps` the ℓ∞ radius there; step size `step_factor`·ε/`steps`.
    `values` are evaluated in float64 at `witnesses`, which lie in the ball. Raises FaithkdError for networks or
    inputs that `faithfulness_upper_bound` would refuse too. Source: §4.1, §6.
    """
    images = check_images(x)
    prepare_pair(teacher, student, images)
    outer_ball(images, eps, clip)  # the same refusals as the upper bound's, for eps and clip too
    if steps < 1 or restarts < 1:
        raise FaithkdError(f"steps and restarts must be at least 1, not steps={steps}, restarts={restarts}")
    teacher, student = _frozen(teacher, x), _frozen(student, x)

    def prepare(logits, _x, _rows) -> Callable:
        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            difference = _norm(*logits(z))
            return difference, difference

        return objective

    witnesses = _attack((teacher, student), prepare, x, eps, steps, step_factor, restarts, seed, clip)
    with torch.no_grad():
        exact = confidence_difference(teacher.double(), student.double(), witnesses.double())
    return LowerBound(exact.cpu(), witnesses)


def strong_lower_bound(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    eps: float,
    *,
    classes: int = 3,
    steps: int = 50,
    restarts: int = 5,
    seed: int = 0,
    step_factor: float = 2.5,
    clip: Clip | None = None,
) -> LowerBound:
    """EmpLB by a wider search, past §4.1: the best of PGD on many losses, all judged by ‖f_t(x') − f_s(x')‖∞.

    The norm follows whichever class is on top, and softmax goes flat where a network is sure. So PGD also climbs
    ±(f_t^i − f_s^i), the same of the log-odds log f^i/(1 − f^i), which never go flat, for the `classes` leading classes
    i of an image, and both directions of KL: `restarts` times each, and the norm itself as often as all of them
    together. Never below `empirical_lower_bound` with the same arguments; as valid, some 30 times as expensive.
    """
    options = {"steps": steps, "seed": seed, "step_factor": step_factor, "clip": clip}
    plain = empirical_lower_bound(teacher, student, x, eps, restarts=restarts, **options)
    if classes < 1:
        raise FaithkdError(f"classes must be at least 1, not {classes}")
    single, exact = [[_frozen(net, to) for net in (teacher, student)] for to in (x, x.double())]
    values, witnesses = plain.values.to(x.device), plain.witnesses.clone()
    losses = _wider_losses(classes)
    for loss, times in [(_norm, restarts * len(losses)), *((loss, restarts) for loss in losses)]:
        found = _attack(single, _climb(loss), x, eps, steps, step_factor, times, seed, clip)
        with torch.no_grad():
            value = confidence_difference(*exact, found.double())
        better = value > values
        values[better], witnesses[better] = value[better], found[better]
    return LowerBound(values.cpu(), witnesses)


def robust(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
    step_factor: float = 2.5,
    clip: Clip | None = None,
) -> Attack:
    """Whether PGD on L_CE(f(x'), y) finds no misclassified point of B_ε(x), eq. (2); its mean is robust accuracy, §6.

    `holds` is an upper estimate of robustness: an attack that fails proves nothing. At ε = 0 it is clean accuracy.
    """
    network = _frozen(network, x)

    def prepare(logits, _x, rows: slice) -> Callable:
        labels = y[rows]

        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            (own,) = logits(z)
            return cross_entropy(own, labels), (own.argmax(1) != labels).to(z.dtype)

        return objective

    witnesses = _attack((network,), prepare, x, eps, steps if eps else 0, step_factor, restarts, seed, clip)
    return Attack(predictions(network, witnesses) == y, witnesses)


def hardest(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
    step_factor: float = 2.5,
    clip: Clip | None = None,
) -> Tensor:
    """The point of each B_ε(x) with the largest L_CE(f(x'), y) that PGD meets, eq. (2): (N, *shape).

    Unlike the witnesses of `robust` it is as bad as can be also where the attack fails, or has succeeded already.
    """
    network = _frozen(network, x)

    def prepare(logits, _x, rows: slice) -> Callable:
        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            loss = cross_entropy(*logits(z), y[rows])
            return loss, loss

        return objective

    return _attack((network,), prepare, x, eps, steps if eps else 0, step_factor, restarts, seed, clip)


def auto_attack(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    version: str = "standard",
    seed: int = 0,
    clip: Clip | None = None,
) -> Attack:
    """Whether AutoAttack finds no misclassified point of B_ε(x): robust accuracy, §6, by more than eq. (2).

    `version`, its authors' words: "standard" is APGD on cross-entropy and on nine targets, FAB on nine targets, and
    Square, which asks for no gradient; "plus" has more restarts and untargeted APGD and FAB too. What it finds counts
    where *our* network errs after a projection to *our* ball, rounded inwards. Source: Croce and Hein (2020).
    """
    images = check_images(x)
    outer_ball(images, eps, clip)  # the same refusals as everywhere, for eps and clip
    network, eps = _frozen(network, x), float(eps)
    holds, witnesses = predictions(network, x) == y, x.clone()
    if not eps or not holds.any():
        return Attack(holds, witnesses)
    # It takes inputs in [0, 1] for granted and clips to them. Either that range is our clip, or it holds every ball
    # with room to spare, so that its clipping never binds.
    low, high = (x.amin() - 2 * eps, x.amax() + 2 * eps) if clip is None else (end.to(x) for end in clip)
    width = (high - low).amax()
    scaled = _Scaled(network, low, width, x.shape[1:])
    rows = holds.nonzero()[:, 0]
    found = _run_auto_attack(scaled, scaled.scale(x[rows]), y[rows], eps / float(width), version, seed)
    lower, upper = attacks.ball(x[rows], eps, clip)
    points = torch.clamp(scaled.unscale(found), lower, upper)
    fooled = predictions(network, points) != y[rows]
    holds[rows[fooled]], witnesses[rows[fooled]] = False, points[fooled]
    return Attack(holds, witnesses)


def agreement(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    eps: float,
    *,
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
    step_factor: float = 2.5,
    clip: Clip | None = None,
) -> Attack:
    """Whether teacher and student agree at x and PGD finds no x' in B_ε(x) with c_t(x') ≠ c_s(x'), eqs (13)–(14).

    The mean of `holds` is the empirical distillation agreement: an upper estimate of Def. 3. The attack maximises
    the student's cross-entropy against the teacher's hard prediction at the perturbed image x', which is what
    Def. 1 asks for. Where both disagree already at x, the witness is x.
    """
    teacher, student = _frozen(teacher, x), _frozen(student, x)

    def prepare(logits, _x, _rows) -> Callable:
        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            teachers, students = logits(z)
            hard = teachers.argmax(1)
            return cross_entropy(students, hard), (students.argmax(1) != hard).to(z.dtype)

        return objective

    witnesses = _attack((teacher, student), prepare, x, eps, steps if eps else 0, step_factor, restarts, seed, clip)
    return Attack(predictions(teacher, witnesses) == predictions(student, witnesses), witnesses)


class _Scaled(nn.Module):
    """A network on u = (x − low)/width, with every image as (channels, height, width), as AutoAttack expects them."""

    def __init__(self, network: nn.Module, low: Tensor, width: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.low, self.width, self.shape = network, low, width, shape

    def forward(self, u: Tensor) -> Tensor:
        return self.network(self.unscale(u))

    def scale(self, x: Tensor) -> Tensor:
        u = (x - self.low) / self.width
        return u if u.ndim == 4 else u.reshape(len(u), -1, 1, 1)

    def unscale(self, u: Tensor) -> Tensor:
        return self.low + self.width * u.to(self.low.dtype).reshape(-1, *self.shape)


def _run_auto_attack(scaled: nn.Module, u: Tensor, y: Tensor, eps: float, version: str, seed: int) -> Tensor:
    """AutoAttack's points for inputs `u` in [0, 1]; it leaves the random numbers and the debugger of others alone."""
    if version not in ("standard", "plus"):
        raise FaithkdError(f"version must be standard or plus, not {version!r}")
    suite = AutoAttack(scaled, eps=eps, norm="Linf", version=version, seed=seed, device=u.device)
    with torch.no_grad():
        others = scaled(u[:1]).shape[1] - 1
    # Its losses on targets and on ratios of logits need four and three classes.
    needs = {"apgd-t": 3, "apgd-dlr": 2}
    suite.attacks_to_run = [name for name in suite.attacks_to_run if others >= needs.get(name, 1)]
    for attack in (suite.apgd_targeted, suite.fab):
        attack.n_target_classes = min(attack.n_target_classes, others)
    suite.logger.setLevel("ERROR")  # its advice to those who defend by hiding gradients
    trace = sys.gettrace()
    try:
        with torch.random.fork_rng(devices=[]):
            return suite.run_standard_evaluation(u, y, batch_size=CHUNK)[0].to(u.device)
    finally:
        sys.settrace(trace)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits of teacher and student (N, C), leading classes (N, k) → (N,)


def _norm(teacher_logits: Tensor, student_logits: Tensor, leading: Tensor | None = None) -> Tensor:
    return (torch.softmax(teacher_logits, 1) - torch.softmax(student_logits, 1)).abs().amax(1)


def _confidence(logits: Tensor, i: Tensor) -> Tensor:
    return torch.softmax(logits, 1).gather(1, i)[:, 0]


def _log_odds(logits: Tensor, i: Tensor) -> Tensor:
    return (logits.gather(1, i) - logits.scatter(1, i, -torch.inf).logsumexp(1, keepdim=True))[:, 0]


def _wider_losses(classes: int) -> list[Loss]:
    """What `strong_lower_bound` climbs besides the norm itself."""

    def signed(measure: Callable, sign: int, place: int) -> Loss:
        def loss(teacher_logits: Tensor, student_logits: Tensor, leading: Tensor) -> Tensor:
            i = leading[:, [min(place, leading.shape[1] - 1)]]
            return sign * (measure(teacher_logits, i) - measure(student_logits, i))

        return loss

    choices = [(m, sign, place) for m in (_confidence, _log_odds) for sign in (1, -1) for place in range(classes)]
    return [signed(*choice) for choice in choices] + [lambda t, s, _: kl(s, t), lambda t, s, _: kl(t, s)]


def _climb(loss: Loss) -> Callable:
    """For `_attack`: climbs `loss` and is judged by the norm."""

    def prepare(logits, x: Tensor, _rows) -> Callable:
        with torch.no_grad():
            sure = torch.maximum(*(torch.softmax(each, 1) for each in logits(x)))
        leading = sure.argsort(1, descending=True)

        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            both = logits(z)
            return loss(*both, leading), _norm(*both)

        return objective

    return prepare


def _attack(networks, prepare, x, eps, steps, step_factor, restarts, seed, clip) -> Tensor:
    """Witnesses of the best of `restarts` searches, in chunks; one seed draws the same starts on every run.

    `prepare(logits, x, rows)` gives the objective of `search` for the images `rows` of all, `x` in whatever layout;
    `logits` are those of all networks at the same points.
    """
    generator = torch.Generator().manual_seed(seed)
    step_size = step_factor * float(eps) / max(steps, 1)
    found = []
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        nets, images, range_, back = fastest(networks, x[rows], clip)
        objective = prepare(together(nets), images, rows)
        options = {"steps": steps, "step_size": step_size, "restarts": restarts, "generator": generator}
        found.append(back(search(objective, images, float(eps), clip=range_, **options)[0]))
    return torch.cat(found) if found else x.clone()


def _frozen(network: nn.Module, x: Tensor) -> nn.Module:
    """A copy without weight gradients, in the images' precision and place; the caller's network is left alone."""
    return deepcopy(network).to(x).eval().requires_grad_(False)
