"""Two searches past the paper: AutoAttack in place of PGD for robust accuracy, and EmpLB by many losses."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from faithkd import arguments
from faithkd.bounds.domains import log_odds
from faithkd.core.attacks import CHUNK, Attack, Balls, Clip, LowerBound, Search, ball
from faithkd.core.losses import difference, kl
from faithkd.frozen import own_settings


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
    balls, search = Balls(x, eps, clip, teacher=teacher, student=student), Search.of({"restarts": restarts, **search})
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
    lower, upper = ball(x, eps, balls.clip)
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

    # its own numbers are in the caller's usual precision
    u = ((x[rows] - low) / width).to(torch.get_default_dtype())
    u = u if u.ndim == 4 else u.reshape(len(u), -1, 1, 1)  # it expects images (N, channels, height, width)
    options = {"eps": eps / float(width), "version": version, "seed": seed}
    found = _auto_attack(lambda u: balls.rough(unscaled(u))[0].to(u.dtype), u, labels[rows], balls.count, **options)
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
