"""What the paper measures, image by image: robust accuracy, agreement (Defs 1, 3) and EmpLB (§4.1).

Past the paper: two stronger searches, `auto_attack` for robust accuracy and `strong_lower_bound` for EmpLB.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from faithkd import arguments
from faithkd.bounds.domains import log_odds
from faithkd.core import attacks
from faithkd.core.attacks import Clip
from faithkd.core.blocks import fastest
from faithkd.core.losses import cross_entropy, kl
from faithkd.frozen import frozen, own_settings

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


@dataclass(frozen=True)
class Search:
    """How long eq. (2) is followed, and from where: `restarts` runs of `steps` of size `step_factor`·ε/`steps`."""

    steps: int = 50
    restarts: int = 1
    seed: int = 0
    step_factor: float = 2.5

    def __post_init__(self) -> None:
        arguments.whole("steps", self.steps)
        arguments.whole("restarts", self.restarts)
        arguments.random_seed(self.seed)
        arguments.number("step_factor", self.step_factor)


def difference(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """‖f_t − f_s‖∞ with f = σ(g), of logits (N, C) → (N,)."""
    return (torch.softmax(teacher_logits, 1) - torch.softmax(student_logits, 1)).abs().amax(1)


def confidence_difference(teacher: nn.Module, student: nn.Module, x: Tensor) -> Tensor:
    """‖f_t(x) − f_s(x)‖∞ with f = σ(g), the objective of eq. (8). Images (N, *shape) → (N,) in [0, 1]."""
    return difference(teacher(x.clone()), student(x.clone()))  # a first layer may work in place


@own_settings()
def predictions(network: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes c(x) = arg max_c f^c(x), Def. 1, in float64. Images (N, *shape) → (N,)."""
    balls = Balls(x, network=network)
    return balls.classes(balls.x)[0]


@own_settings()
def agreement(
    teacher: nn.Module, student: nn.Module, x: Tensor, eps: float, *, clip: Clip | None = None, **search
) -> Attack:
    """Whether teacher and student agree at x and PGD finds no x' in B_ε(x) with c_t(x') ≠ c_s(x'), eqs (13)–(14).

    The mean of `holds` is the empirical distillation agreement: an upper estimate of Def. 3. The attack maximises
    the student's cross-entropy against the teacher's hard prediction at the perturbed image x', which is what
    Def. 1 asks for. Where both disagree already at x, the witness is x. `search`: see `Search`.
    """
    balls = Balls(x, eps, clip, teacher=teacher, student=student)

    def objective(_, teachers: Tensor, students: Tensor) -> tuple[Tensor, Tensor]:
        hard = teachers.argmax(1)
        return cross_entropy(students, hard), (students.argmax(1) != hard).to(students.dtype)

    witnesses = balls.search(objective, Search(**search))
    teachers, students = balls.classes(witnesses)
    return Attack(teachers == students, witnesses)


@own_settings()
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
    `values` are those of the networks' own weights, evaluated in float64 at `witnesses`, which lie in the ball and in
    `clip` = (low, high), numbers or tensors like `x`. Any modules will do that return logits (N, C); both are evaluated
    in evaluation mode, from copies. Raises FaithkdError for arguments that make no sense. Source: §4.1, §6.
    """
    balls = Balls(x, eps, clip, teacher=teacher, student=student)
    return balls.lower_bound(lambda _, *logits: (difference(*logits),) * 2, Search(steps, restarts, seed, step_factor))


@own_settings()
def robust(network: nn.Module, x: Tensor, y: Tensor, eps: float, *, clip: Clip | None = None, **search) -> Attack:
    """Whether PGD on L_CE(f(x'), y) finds no misclassified point of B_ε(x), eq. (2); its mean is robust accuracy, §6.

    `holds` is an upper estimate of robustness: an attack that fails proves nothing. At ε = 0 it is clean accuracy.
    `search`: `steps`, `restarts`, `seed` and `step_factor`, see `Search`.
    """
    balls = Balls(x, eps, clip, network=network)
    labels = balls.labels(y)

    def objective(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(logits, labels[rows]), (logits.argmax(1) != labels[rows]).to(logits.dtype)

    witnesses = balls.search(objective, Search(**search))
    return Attack(balls.classes(witnesses)[0] == labels, witnesses)


@own_settings()
def hardest(network: nn.Module, x: Tensor, y: Tensor, eps: float, *, clip: Clip | None = None, **search) -> Tensor:
    """The point of each B_ε(x) with the largest L_CE(f(x'), y) that PGD meets, eq. (2): (N, *shape).

    Unlike the witnesses of `robust` it is as bad as can be also where the attack fails, or has succeeded already.
    `search`: see `Search`.
    """
    balls = Balls(x, eps, clip, network=network)
    labels = balls.labels(y)
    return balls.search(lambda rows, logits: (cross_entropy(logits, labels[rows]),) * 2, Search(**search))


class Balls:
    """Balls B_ε(x) and networks on them, checked: searched with `rough` copies, judged by `exact` ones in float64."""

    def __init__(self, x: Tensor, eps: float = 0.0, clip: Clip | None = None, **networks: nn.Module) -> None:
        x, self.eps = arguments.images(x), arguments.radius(eps)
        self.clip = arguments.clip_range(clip, x)
        for name, network in networks.items():
            arguments.network(network, name)
        found = (x.dtype, *(weight.dtype for network in networks.values() for weight in network.parameters()))
        self.rough = frozen(networks, torch.float64 if torch.float64 in found else torch.float32, x)
        self.exact = frozen(networks, torch.float64, x)
        self.x = x.to(self.rough.dtype)
        some = x[:CHUNK] if len(x) else x.new_zeros(1, *x.shape[1:])
        with torch.no_grad():
            logits = zip(networks, self.exact(some.double()), strict=True)
        counts = [arguments.class_count(each, some, name) for name, each in logits]
        arguments.same_classes(counts[0], counts[-1])
        self.count = counts[0]

    def labels(self, y) -> Tensor:
        """The labels of the images, checked."""
        return arguments.labels(y, len(self.x), self.count).to(self.x.device)

    @torch.no_grad()
    def logits(self, points: Tensor) -> tuple[Tensor, ...]:
        """The logits of each network at `points`, one per image, in float64: (N, C) each."""
        parts = [self.exact(some.double()) for some in points.split(CHUNK)]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def classes(self, points: Tensor) -> tuple[Tensor, ...]:
        """The classes that each network predicts at `points`: (N,) each."""
        return tuple(logits.argmax(1) for logits in self.logits(points))

    def search(self, objective: Callable, search: Search) -> Tensor:
        """The best point that eq. (2) meets in each ball; one seed draws the same starts on every call.

        `objective(rows, *logits)` is that of `attacks.search`, from all networks' logits at points of images `rows`.
        """
        steps = search.steps if self.eps else 0
        options = {"steps": steps, "step_size": search.step_factor * self.eps / max(steps, 1)}
        options |= {"restarts": search.restarts, "generator": torch.Generator().manual_seed(search.seed)}

        def piece(rows: slice) -> Tensor:
            networks, x, clip, back = fastest(self.rough.networks, self.x[rows], tuple(end[rows] for end in self.clip))
            logits = replace(self.rough, networks=networks)
            return back(attacks.search(lambda z: objective(rows, *logits(z)), x, self.eps, clip=clip, **options)[0])

        found = [piece(slice(start, start + CHUNK)) for start in range(0, len(self.x), CHUNK)]
        return torch.cat(found) if found else self.x.clone()

    def lower_bound(self, objective: Callable, search: Search) -> LowerBound:
        """The differences at what is found, in float64; 0, which is always true, where a network overflows."""
        witnesses = self.search(objective, search)
        return LowerBound(difference(*self.logits(witnesses)).nan_to_num(0.0).cpu(), witnesses)


# --- past the paper


@own_settings()
def strong_lower_bound(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    eps: float,
    *,
    classes: int = 3,
    restarts: int = 5,
    clip: Clip | None = None,
    **search,
) -> LowerBound:
    """EmpLB by a wider search, past §4.1: the best of PGD on many losses, all judged by ‖f_t(x') − f_s(x')‖∞.

    The norm follows whichever class is on top, and softmax goes flat where a network is sure. So PGD also climbs
    ±(f_t^i − f_s^i), the same of the log-odds log f^i/(1 − f^i), which never go flat, for the `classes` leading classes
    i of an image, and both directions of KL: `restarts` times each, and the norm itself as often as all of them
    together. Never below `empirical_lower_bound` with the same arguments; as valid, some 30 times as expensive.
    `search`: see `Search`.
    """
    balls, search = Balls(x, eps, clip, teacher=teacher, student=student), Search(restarts=restarts, **search)
    sure = torch.maximum(*(torch.softmax(logits, 1) for logits in balls.logits(balls.x)))
    leading = sure.argsort(1, descending=True)[:, : arguments.whole("classes", classes)]
    norm, *others = _wider_losses(leading.shape[1])

    def judged(loss: Callable) -> Callable:
        return lambda rows, *logits: (loss(*logits, leading[rows]), difference(*logits))

    best = balls.lower_bound(judged(norm), search)
    for loss, times in [(norm, restarts * len(others)), *((loss, restarts) for loss in others)]:
        found = balls.lower_bound(judged(loss), replace(search, restarts=times))
        better = found.values > best.values
        best.values[better], best.witnesses[better] = found.values[better], found.witnesses[better]
    return best


def _wider_losses(classes: int) -> list[Callable]:
    """What is climbed, the norm first: functions of teacher's and student's logits (N, C) and the leading classes."""

    def signed(measure: Callable, sign: int, place: int) -> Callable:
        return lambda t, s, leading: sign * (measure(t, leading[:, place]) - measure(s, leading[:, place]))

    losses = [lambda t, s, _: difference(t, s), lambda t, s, _: kl(s, t), lambda t, s, _: kl(t, s)]
    return losses + [signed(*each) for each in itertools.product((_confidence, log_odds), (1, -1), range(classes))]


def _confidence(logits: Tensor, label: Tensor) -> Tensor:
    return torch.softmax(logits, 1).gather(1, label[:, None])[:, 0]


@own_settings()
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
    arguments.choice("version", version, ("standard", "plus"))
    balls, seed = Balls(x, eps, clip, network=network), arguments.random_seed(seed)
    x, eps, labels = balls.x, balls.eps, balls.labels(y)
    lower, upper = attacks.ball(x, eps, balls.clip)
    witnesses = torch.clamp(x, lower, upper)
    holds = balls.classes(witnesses)[0] == labels
    rows = holds.nonzero()[:, 0]
    # It takes inputs in [0, 1] for granted and clips to them. Either that range is our clip, or it holds every ball
    # with room to spare, so that its clipping never binds.
    low, high = (end[:1].to(x) for end in balls.clip)
    if not all((end == end[:1]).all() and end.isfinite().all() for end in balls.clip):
        low, high = x.min() - 2 * eps, x.max() + 2 * eps
    if not eps or not len(rows) or not (width := (high - low).max()) > 0:
        return Attack(holds, witnesses)

    def unscaled(u: Tensor) -> Tensor:
        return low + width * u.to(x.dtype).reshape(-1, *x.shape[1:])

    u = (x[rows] - low) / width
    u = u if u.ndim == 4 else u.reshape(len(u), -1, 1, 1)  # it expects images (N, channels, height, width)
    options = {"eps": eps / float(width), "version": version, "seed": seed}
    found = _auto_attack(lambda u: balls.rough(unscaled(u))[0], u, labels[rows], balls.count, **options)
    points = torch.clamp(unscaled(found), lower[rows], upper[rows])
    fooled = balls.classes(points)[0] != labels[rows]
    holds[rows[fooled]], witnesses[rows[fooled]] = False, points[fooled]
    return Attack(holds, witnesses)


def _auto_attack(logits: Callable, u: Tensor, y: Tensor, classes: int, **options) -> Tensor:
    """The points that AutoAttack finds from inputs `u` in [0, 1]."""
    from pyautoattack import AutoAttack  # an extra: bounds alone must not need it

    suite = AutoAttack(logits, norm="Linf", device=u.device, **options)
    # Its losses on targets and on ratios of logits need four and three classes.
    needs = {"apgd-t": 4, "apgd-dlr": 3}
    suite.attacks_to_run = [name for name in suite.attacks_to_run if classes >= needs.get(name, 2)]
    for attack in (suite.apgd_targeted, suite.fab):
        attack.n_target_classes = min(attack.n_target_classes, classes - 1)
    suite.logger.setLevel("ERROR")  # its advice to those who defend by hiding gradients
    trace = sys.gettrace()  # of a debugger, which it would switch off
    try:
        with torch.random.fork_rng(devices=[]):
            return suite.run_standard_evaluation(u, y, batch_size=CHUNK)[0].to(u.device)
    finally:
        sys.settrace(trace)
