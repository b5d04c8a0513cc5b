"""The square of fig. 1: two corners of an image's ball, found by attack, and the cut through all three."""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

from faithkd.blocks import fastest
from faithkd.core import evaluation
from faithkd.core.attacks import Clip, ball, search
from faithkd.core.data import Split
from faithkd.core.losses import cross_entropy


def heat_map(
    teacher: nn.Module,
    students: dict[str, nn.Module],
    images: Split,
    eps: float,
    *,
    side: int,
    restarts: int,
    search: dict,
) -> tuple[pd.DataFrame, dict]:
    """‖f_RT − f_s‖∞ of SD and FD on a square through an image x and two corners x₁, x₂ of its ball.

    At x₁ the teacher is right and SD is wrong (an adversarial disagreement example, Def. 1); at x₂ both are right,
    with the largest difference in confidence. The image is one that all three networks classify correctly, with the
    clearest disagreement at x₁ and the smallest difference at x, preferring images on which FD never disagrees.
    `search` holds steps, step_factor, seed and clip. Returns a frame with columns panel, a, b (see `cut`), difference,
    margin (of the teacher's class in the student's confidences: negative where they disagree), disagree; and a dict
    with `x`, `x1`, `x2` (1, *shape), their coordinates `where`, the image's `row` and `label`, and whether a
    disagreement was `found`.
    """
    sd = students["SD"]
    at, clarity = corners(clear_disagreement, (teacher, sd), images, eps, search | {"restarts": restarts})
    calm = evaluation.agreement(teacher, students["FD"], images.x, eps, restarts=restarts, **search).holds
    networks = (teacher, *students.values())
    right = torch.stack([evaluation.predictions(network, images.x) == images.y for network in networks]).all(0)
    with torch.no_grad():
        apart = evaluation.confidence_difference(teacher, sd, images.x)
    wanted = right & (clarity > 0)
    row = int((clarity - apart + 4.0 * wanted + 2.0 * (wanted & calm)).argmax())
    chosen = images[row : row + 1]
    x, x1 = chosen.x, at[row : row + 1]
    x2, _ = corners(same_class, (teacher, sd), chosen, eps, search | {"restarts": 4 * restarts})
    frame, points, where = cut((x, x1, x2), eps, side=side, seed=search["seed"], clip=search["clip"])
    panels = []
    for method, network in students.items():
        with torch.no_grad():
            hard, soft = teacher(points).argmax(1), torch.softmax(network(points), 1)
            margin = margins(soft, hard).double().numpy()
            difference = evaluation.confidence_difference(teacher, network, points).double().numpy()
        panels.append(frame.assign(panel=method, difference=difference, margin=margin, disagree=margin < 0))
    details = {"x": x, "x1": x1, "x2": x2, "where": where, "row": row, "image": int(images.index[row])}
    return pd.concat(panels, ignore_index=True), details | {"label": int(images.y[row]), "found": bool(wanted[row])}


def margins(soft: Tensor, y: Tensor) -> Tensor:
    """How far each row's confidence (N, C) in class y is above the next: f^y − max of f^i over i ≠ y."""
    return soft.gather(1, y[:, None])[:, 0] - soft.scatter(1, y[:, None], -1.0).amax(1)


def clear_disagreement(teacher_logits: Tensor, student_logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For x₁, Def. 1: a loss to climb, and the smaller margin by which the teacher is right and the student wrong."""
    loss = cross_entropy(student_logits, y) - cross_entropy(teacher_logits, y)
    right, wrong = (margins(torch.softmax(logits, 1), y) for logits in (teacher_logits, student_logits))
    return loss, torch.minimum(right, -wrong)


def same_class(teacher_logits: Tensor, student_logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For x₂, Def. 2: the difference in confidence, and the same where both networks are right, −1 elsewhere."""
    difference = (torch.softmax(teacher_logits, 1) - torch.softmax(student_logits, 1)).abs().amax(1)
    both = (teacher_logits.argmax(1) == y) & (student_logits.argmax(1) == y)
    return difference, torch.where(both, difference, -torch.ones_like(difference))


def corners(
    criterion: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    pair: tuple[nn.Module, nn.Module],
    images: Split,
    eps: float,
    effort: dict,
) -> tuple[Tensor, Tensor]:
    """The corner of each image's ball that PGD finds best: corners (N, *shape) and scores (N,) of `criterion`, eq. (2).

    `pair`: teacher and student; `effort`: steps, step_factor, restarts, seed and clip. The ascent walks through the
    ball; every point on its way is judged at the corner of its own orthant.
    """
    networks, x, clip, back = fastest(pair, images.x, effort["clip"])
    lower, upper = ball(x, eps, clip)

    def logits(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(z) for network in networks)

    def corner(z: Tensor) -> Tensor:
        return torch.where(z >= x, upper, lower)

    def objective(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            score = criterion(*logits(corner(z)), images.y)[1]
        return criterion(*logits(z), images.y)[0], score

    steps = effort["steps"]
    options = {"steps": steps, "step_size": effort["step_factor"] * eps / steps, "restarts": effort["restarts"]}
    generator = torch.Generator().manual_seed(effort["seed"])
    found, score = search(objective, x, eps, generator=generator, clip=clip, **options)
    return back(corner(found)), score


def cut(
    points: tuple[Tensor, Tensor, Tensor], eps: float, *, side: int, seed: int, clip: Clip | None = None
) -> tuple[pd.DataFrame, Tensor, dict[str, tuple[float, float]]]:
    """The ball's cut through x and its corners x₁, x₂: coordinates (a, b) in [−1, 1]², points, and who is where.

    `a` moves the pixels in which x₁ and x₂ differ (x₁ at −1, x₂ at 1), `b` those in which they are the same, so that
    max(|a|, |b|) is the distance ‖x' − x‖∞ in units of ε: the ball's cut is the whole square, `side` points wide. With
    clipping, the unit of a pixel is as far as it can go in its direction.
    """
    x, x1, x2 = points
    lower, upper = ball(x, eps, clip)
    first = torch.where(x1 >= upper, 1.0, -1.0).flatten().double()
    second = torch.where(x2 >= upper, 1.0, -1.0).flatten().double()
    other = second
    if (first * second).sum().abs() == len(first):  # x₂ is x₁ or opposite to it: any other corner spans the square
        coins = torch.rand(len(first), generator=torch.Generator().manual_seed(seed))
        other = first * torch.where(coins < 0.5, 1.0, -1.0)
    across, along = (other - first) / 2, (other + first) / 2
    ticks = torch.linspace(-1, 1, side, dtype=torch.float64)
    a, b = (axis.flatten() for axis in torch.meshgrid(ticks, ticks, indexing="xy"))
    share = (a[:, None] * across + b[:, None] * along).to(x.dtype).view(-1, *x.shape[1:])
    grid = x + share.clamp(min=0) * (upper - x) + share.clamp(max=0) * (x - lower)
    where = {"x": (0.0, 0.0)}
    for name, corner in (("x1", first), ("x2", second)):
        where[name] = tuple(float(corner @ axis / axis.abs().sum()) for axis in (across, along))
    return pd.DataFrame({"a": a.numpy(), "b": b.numpy()}), torch.clamp(grid, lower, upper), where
