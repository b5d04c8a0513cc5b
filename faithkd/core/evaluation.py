"""What the paper measures, image by image: robust accuracy, agreement (Defs 1, 3) and EmpLB (§4.1).

Past the paper there are two stronger searches, `auto_attack` for robust accuracy and `strong_lower_bound` for EmpLB.
"""

from torch import Tensor, nn

from faithkd.core.attacks import Attack, Balls, Clip, LowerBound, Search
from faithkd.core.losses import cross_entropy, difference
from faithkd.devices import follows_images
from faithkd.frozen import own_settings
from faithkd.stronger import auto_attack, strong_lower_bound  # noqa: F401  those who measure look for them here


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
    """Whether teacher and student agree at x and PGD finds no x' in B_ε(x) with c_t(x') ≠ c_s(x'), eqs (6), (13), (14).

    The mean of `holds` is the empirical distillation agreement: an upper estimate of Def. 3. The attack maximises
    the student's cross-entropy against the teacher's hard prediction at the perturbed image x', which is what
    Def. 1 asks for. Where both disagree already at x, the witness is x. `search`: see `Search`.
    """
    balls = Balls(x, eps, clip, teacher=teacher, student=student)

    def objective(_, teachers: Tensor, students: Tensor) -> tuple[Tensor, Tensor]:
        hard = teachers.argmax(1)
        return cross_entropy(students, hard), (students.argmax(1) != hard).to(students.dtype)

    witnesses = balls.attack(objective, Search.of(search))
    teachers, students = balls.classes(witnesses)
    return Attack(teachers == students, witnesses)


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

    witnesses = balls.attack(objective, Search.of(search))
    return Attack(balls.classes(witnesses)[0] == labels, witnesses)


@own_settings()
def hardest(network: nn.Module, x: Tensor, y: Tensor, eps: float, *, clip: Clip | None = None, **search) -> Tensor:
    """The point of each B_ε(x) with the largest L_CE(f(x'), y) that PGD meets, eq. (2): (N, *shape).

    Unlike the witnesses of `robust` it is as bad as can be also where the attack fails, or has succeeded already.
    `search`: see `Search`.
    """
    balls = Balls(x, eps, clip, network=network)
    labels = balls.labels(y)
    return balls.attack(lambda rows, logits: (cross_entropy(logits, labels[rows]),) * 2, Search.of(search))
