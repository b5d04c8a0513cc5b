"""What the paper measures, image by image: robust accuracy, agreement (Defs 1, 3) and EmpLB (§4.1).

Past the paper: two stronger searches, `auto_attack` for robust accuracy and `strong_lower_bound` for EmpLB.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from faithkd import arguments
from faithkd.bounds.domains import log_odds
from faithkd.core import attacks
from faithkd.core.attacks import Clip
from faithkd.core.losses import cross_entropy, kl
from faithkd.devices import follows_images
from faithkd.frozen import Frozen, frozen, own_settings

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
    return _norm(teacher(x.clone()), student(x.clone()))  # a first layer may work in place


@own_settings()
def predictions(network: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes c(x) = arg max_c f^c(x), Def. 1, in float64. Images (N, *shape) → (N,)."""
    return _classes(_given(x, network=network))[0]


@follows_images
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
    given = _given(x, eps, clip, teacher=teacher, student=student)
    witnesses = _attack(given, lambda _, *logits: (_norm(*logits),) * 2, Search(steps, restarts, seed, step_factor))
    return LowerBound(_differences(given, witnesses), witnesses)


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
    plain = empirical_lower_bound(teacher, student, x, eps, restarts=restarts, clip=clip, **search)
    given = _given(x, eps, clip, teacher=teacher, student=student)
    losses, leading = _wider_losses(arguments.whole("classes", classes)), _leading(given)
    values, witnesses = plain.values.clone(), plain.witnesses.clone()
    for loss, times in [(_norm, restarts * len(losses)), *((loss, restarts) for loss in losses)]:

        def objective(rows: slice, *logits: Tensor, loss: Loss = loss) -> tuple[Tensor, Tensor]:
            return loss(*logits, leading[rows]), _norm(*logits)

        found = _attack(given, objective, Search(restarts=times, **search))
        value = _differences(given, found)
        better = value > values
        values[better], witnesses[better] = value[better], found[better.to(found.device)]
    return LowerBound(values, witnesses)


@own_settings()
def robust(network: nn.Module, x: Tensor, y: Tensor, eps: float, *, clip: Clip | None = None, **search) -> Attack:
    """Whether PGD on L_CE(f(x'), y) finds no misclassified point of B_ε(x), eq. (2); its mean is robust accuracy, §6.

    `holds` is an upper estimate of robustness: an attack that fails proves nothing. At ε = 0 it is clean accuracy.
    `search`: `steps`, `restarts`, `seed` and `step_factor`, see `Search`.
    """
    given = _given(x, eps, clip, network=network)
    labels = given.labels(y)

    def objective(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(logits, labels[rows]), (logits.argmax(1) != labels[rows]).to(logits.dtype)

    witnesses = _attack(given, objective, Search(**search))
    return Attack(_classes(given, witnesses)[0] == labels, witnesses)


@own_settings()
def hardest(network: nn.Module, x: Tensor, y: Tensor, eps: float, *, clip: Clip | None = None, **search) -> Tensor:
    """The point of each B_ε(x) with the largest L_CE(f(x'), y) that PGD meets, eq. (2): (N, *shape).

    Unlike the witnesses of `robust` it is as bad as can be also where the attack fails, or has succeeded already.
    `search`: see `Search`.
    """
    given = _given(x, eps, clip, network=network)
    labels = given.labels(y)
    return _attack(given, lambda rows, logits: (cross_entropy(logits, labels[rows]),) * 2, Search(**search))


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
    given, seed = _given(x, eps, clip, network=network), arguments.random_seed(seed)
    x, eps, labels = given.x, given.eps, given.labels(y)
    lower, upper = attacks.ball(x, eps, given.clip)
    witnesses = torch.clamp(x, lower, upper)
    holds = _classes(given, witnesses)[0] == labels
    # It takes inputs in [0, 1] for granted and clips to them. Either that range is our clip, or it holds every ball
    # with room to spare, so that its clipping never binds.
    low, high = (end[:1].to(x) for end in given.clip)
    if not all((end == end[:1]).all() and end.isfinite().all() for end in given.clip):
        low, high = x.min() - 2 * eps, x.max() + 2 * eps
    if not eps or not holds.any() or not (width := (high - low).max()) > 0:
        return Attack(holds, witnesses)
    scaled = _Scaled(given.rough, low, width, x.shape[1:])
    rows = holds.nonzero()[:, 0]
    found = _run_auto_attack(scaled, scaled.scale(x[rows]), labels[rows], eps / float(width), version, seed)
    points = torch.clamp(scaled.unscale(found), lower[rows], upper[rows])
    fooled = _classes(given, points)[0] != labels[rows]
    holds[rows[fooled]], witnesses[rows[fooled]] = False, points[fooled]
    return Attack(holds, witnesses)


@own_settings()
def agreement(
    teacher: nn.Module, student: nn.Module, x: Tensor, eps: float, *, clip: Clip | None = None, **search
) -> Attack:
    """Whether teacher and student agree at x and PGD finds no x' in B_ε(x) with c_t(x') ≠ c_s(x'), eqs (13)–(14).

    The mean of `holds` is the empirical distillation agreement: an upper estimate of Def. 3. The attack maximises
    the student's cross-entropy against the teacher's hard prediction at the perturbed image x', which is what
    Def. 1 asks for. Where both disagree already at x, the witness is x. `search`: see `Search`.
    """
    given = _given(x, eps, clip, teacher=teacher, student=student)

    def objective(_, teachers: Tensor, students: Tensor) -> tuple[Tensor, Tensor]:
        hard = teachers.argmax(1)
        return cross_entropy(students, hard), (students.argmax(1) != hard).to(students.dtype)

    witnesses = _attack(given, objective, Search(**search))
    teachers, students = _classes(given, witnesses)
    return Attack(teachers == students, witnesses)


class _Scaled(nn.Module):
    """A network on u = (x − low)/width, with every image as (channels, height, width), as AutoAttack expects them."""

    def __init__(self, logits: Frozen, low: Tensor, width: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.logits, self.low, self.width, self.shape = logits, low, width, shape

    def forward(self, u: Tensor) -> Tensor:
        return self.logits(self.unscale(u))[0]

    def scale(self, x: Tensor) -> Tensor:
        u = (x - self.low) / self.width
        return u if u.ndim == 4 else u.reshape(len(u), -1, 1, 1)

    def unscale(self, u: Tensor) -> Tensor:
        return self.low + self.width * u.to(self.low.dtype).reshape(-1, *self.shape)


def _run_auto_attack(scaled: nn.Module, u: Tensor, y: Tensor, eps: float, version: str, seed: int) -> Tensor:
    """AutoAttack's points for inputs `u` in [0, 1]; it leaves the random numbers and the debugger of others alone."""
    from pyautoattack import AutoAttack  # an extra: bounds alone must not need it

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


def _confidence(logits: Tensor, label: Tensor) -> Tensor:
    return torch.softmax(logits, 1).gather(1, label[:, None])[:, 0]


def _wider_losses(classes: int) -> list[Loss]:
    """What `strong_lower_bound` climbs besides the norm itself."""

    def signed(measure: Callable, sign: int, place: int) -> Loss:
        def loss(teacher_logits: Tensor, student_logits: Tensor, leading: Tensor) -> Tensor:
            label = leading[:, min(place, leading.shape[1] - 1)]
            return sign * (measure(teacher_logits, label) - measure(student_logits, label))

        return loss

    choices = [(m, sign, place) for m in (_confidence, log_odds) for sign in (1, -1) for place in range(classes)]
    return [signed(*choice) for choice in choices] + [lambda t, s, _: kl(s, t), lambda t, s, _: kl(t, s)]


def _leading(given: "_Given") -> Tensor:
    """The classes of each image, those first that either network is most sure of: (N, C)."""
    with torch.no_grad():
        sure = [torch.maximum(*(torch.softmax(each, 1) for each in logits(x))) for _, x, _, logits, _ in _chunks(given)]
    return torch.cat(sure).argsort(1, descending=True) if sure else given.x.new_zeros(0, given.classes).long()


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


@dataclass(frozen=True)
class _Given:
    """What a caller gave, checked: `rough` networks for the search, `exact` ones in float64 for what is reported."""

    rough: Frozen
    exact: Frozen
    x: Tensor
    eps: float
    clip: tuple[Tensor, Tensor]
    classes: int

    def labels(self, y) -> Tensor:
        return arguments.labels(y, len(self.x), self.classes).to(self.x.device)


def _given(x, eps=0.0, clip=None, **networks: nn.Module) -> _Given:
    """Check all of it, and copy the networks; searches are in float32 if nothing given is in float64."""
    x, eps = arguments.images(x), arguments.radius(eps)
    clip = arguments.clip_range(clip, x)
    for name, network in networks.items():
        arguments.network(network, name)
    weights = [weight.dtype for network in networks.values() for weight in network.parameters()]
    single = torch.float64 not in (x.dtype, *weights)
    rough = frozen(networks, torch.float32 if single else torch.float64, x)
    exact = frozen(networks, torch.float64, x)
    some = x[:CHUNK] if len(x) else x.new_zeros(1, *x.shape[1:])
    with torch.no_grad():
        logits = exact(some.double())
    counts = [arguments.class_count(found, some, name) for name, found in zip(networks, logits, strict=True)]
    arguments.same_classes(counts[0], counts[-1])
    return _Given(rough, exact, x.to(rough.dtype), eps, clip, counts[0])


def _logits(given: _Given, points: Tensor) -> tuple[Tensor, ...]:
    """The logits of each network at `points` (one per image), in float64: (N, C) each."""
    with torch.no_grad():
        parts = [given.exact(some.double()) for some in points.split(CHUNK)]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _classes(given: _Given, points: Tensor | None = None) -> tuple[Tensor, ...]:
    """The classes that each network predicts, (N,) each: at `points`, or at the images."""
    return tuple(logits.argmax(1) for logits in _logits(given, given.x if points is None else points))


def _differences(given: _Given, points: Tensor) -> Tensor:
    """‖f_t − f_s‖∞ at `points`, on the CPU; 0, which is always true, where a network overflows: (N,)."""
    return _norm(*_logits(given, points)).nan_to_num(0.0).cpu()


def _chunks(given: _Given) -> Iterator[tuple]:
    """Pieces of the images: which, and in the layout of `attacks.fastest` themselves, their clip, the networks' logits
    as a function, and the way back."""
    for start in range(0, len(given.x), CHUNK):
        rows = slice(start, start + CHUNK)
        clip = tuple(end[rows] for end in given.clip)
        networks, x, clip, back = attacks.fastest(tuple(given.rough.networks.values()), given.x[rows], clip)
        yield rows, x, clip, replace(given.rough, networks=dict(zip(given.rough.networks, networks, strict=True))), back


def _attack(given: _Given, objective: Callable, search: Search) -> Tensor:
    """Witnesses of the best of `restarts` runs, in chunks; one seed draws the same starts on every call.

    `objective(rows, *logits)` is that of `attacks.search`, from all networks' logits at points of the images `rows`.
    """
    steps, found = search.steps if given.eps else 0, []
    settings = {
        "steps": steps,
        "step_size": search.step_factor * given.eps / max(steps, 1),
        "restarts": search.restarts,
        "generator": torch.Generator().manual_seed(search.seed),
    }
    for rows, x, clip, logits, back in _chunks(given):

        def climbed(z: Tensor, rows: slice = rows, logits: Frozen = logits) -> tuple[Tensor, Tensor]:
            return objective(rows, *logits(z))

        found.append(back(attacks.search(climbed, x, given.eps, clip=clip, **settings)[0]))
    return torch.cat(found) if found else given.x.clone()
