"""LP and MILP values of logit differences, eqs (8) and (9), each proved by our own backward pass.

The MILP is solved by branch and bound over the LP: where the LP's best point has y above both pieces of a ReLU (or all
inputs of a max-pool's window), the ball is cut into *parts*, in each of which y equals one of them. The LP of a part
only steers: what counts is `linear.pull` with its multipliers, which is valid whatever they are.
"""

import functools
import heapq
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from faithkd.bounds import programs
from faithkd.bounds.graph import Network
from faithkd.bounds.linear import Dual, over_ball, pull
from faithkd.bounds.operators import Box, Lines
from faithkd.bounds.softmax import class_bounds, softmax_interval

TOLERANCE = 1e-6  # a part this close to a value that is attained needs no cut: it moves a confidence by < 2.5e-7
SMALL = 1e-3  # so that a gap counts also where the LP gains nothing from it
Decisions = tuple[tuple[int, int, int], ...]  # output `unit` of node k equals one of its pieces: (k, unit, piece)


@dataclass(frozen=True)
class Image:
    """One network on one ball: certified lines, and the LP on them."""

    network: Network
    ball: Box
    lines: list[Lines]
    program: programs.Program
    solver: str


@functools.lru_cache(maxsize=8)
def compiled(network: Network, name: str) -> tuple[programs.Program, str]:
    """A network's LP, for all its images, and cvxpy's name of the solver `name`."""
    program = programs.build(network)
    return program, programs.choose(name, program)


def opened(network: Network, bounds: list[Box], name: str) -> Image | None:
    """An image's LP from its boxes of every place, for the solver `name`; None if a box is not finite."""
    if not all(bool(torch.isfinite(end).all()) for box in bounds for end in box):
        return None
    lines = [node.operator.relax(*(bounds[place] for place in node.inputs)) for node in network.nodes]
    return Image(network, bounds[0], lines, *compiled(network, name))


def lowered(images: list[Image], highest: list[Tensor], nodes: int) -> tuple[list[Tensor], str]:
    """The largest z_j - z_i `(C, C)` of each network made smaller, and a note: all of one network, or of teacher and
    student those that can change eq. (11).

    Its maximum over both orders and all classes is worked on from the largest term downwards, and done when the
    largest term is: a term below another one's final value needs no LP. `nodes`: LPs for each difference; 0: that of
    the whole ball alone.
    """
    classes = len(highest[0])
    highest = [part.clone() for part in highest]
    gaps = [torch.full_like(part, math.nan) for part in highest]
    if len(images) == 1:
        lower_some(images[0], highest[0], gaps[0], torch.ones(classes, classes, dtype=torch.bool), nodes)
        return highest, note(gaps[0], nodes)
    done = torch.zeros(2 * classes, dtype=torch.bool)
    while not done[place := int(class_bounds(*map(softmax_interval, highest)).flatten().argmax())]:
        done[place] = True
        order, label = divmod(place, classes)
        for q, image in enumerate(images):
            wanted = torch.zeros(classes, classes, dtype=torch.bool)
            # the upper end of class i stands on all z_i - z_j, the lower end on all z_j - z_i
            wanted[(slice(None), label) if q == order else label] = True
            lower_some(image, highest[q], gaps[q], wanted & gaps[q].isnan(), nodes)
    return highest, note(torch.stack(gaps), nodes)


def note(gaps: Tensor, nodes: int) -> str:
    """What to say of the differences that were worked on: "" if all ended as they should."""
    gaps = gaps[~gaps.isnan()]
    failed, loose = gaps.isinf(), gaps[gaps.isfinite() & (gaps > 2 * TOLERANCE)]
    said = []
    if failed.any():
        said.append(f"LP without multipliers for {int(failed.sum())} of {len(gaps)} differences")
    if nodes and len(loose):
        said.append(
            f"MILP not settled at {nodes} nodes for {len(loose)} of {len(gaps)} differences: "
            f"up to {loose.max():.2g} above what is attained"
        )
    return ", ".join(said)


def lower_some(image: Image, highest: Tensor, gaps: Tensor, wanted: Tensor, nodes: int) -> None:
    """Lower the `wanted` entries of `highest` `(C, C)` by trees of `nodes` LPs each, in place.

    `gaps` becomes the distance to a value that is attained, +inf if there was nothing to be had from the solver.
    """
    unit = torch.eye(len(wanted), dtype=torch.float64)
    for i, j in wanted.nonzero().tolist():
        if i != j:
            bound, attained = maximum(image, unit[j] - unit[i], highest[i, j].item(), nodes)
            highest[i, j], gaps[i, j] = bound, bound - attained
            if gaps[i, j] < -1e-9 * (1 + abs(attained)):
                raise AssertionError("a bound lies below a value that is attained: please report it")


def maximum(image: Image, row: Tensor, known: float, nodes: int) -> tuple[float, float]:
    """A certified upper bound of row . z over the ball, at most the `known` one, and a value that is attained.

    -inf in place of the latter if the solver says nothing at all. Best first: the part with the largest bound is cut.
    """
    attained = (row @ image.network(sum(image.ball) / 2)[0]).item()
    if known - attained <= TOLERANCE:
        return known, attained
    value, met, cut = visit(image, row, ())
    if not math.isfinite(value):
        return known, -math.inf
    attained, made, numbers = max(attained, met), 1, itertools.count()
    queue = [(-min(known, value), next(numbers), (), cut)]
    while True:
        negative, _, decisions, cut = queue[0]
        choices = [] if cut is None else np.flatnonzero(image.program.pieces[cut[0]].real[:, cut[1]])
        if -negative <= attained + TOLERANCE or not len(choices) or made + len(choices) > nodes:
            return -negative, attained
        heapq.heappop(queue)
        for piece in choices.tolist():
            part = (*decisions, (*cut, piece))
            value, met, next_cut = visit(image, row, part)
            attained, made = max(attained, met), made + 1
            heapq.heappush(queue, (-min(-negative, value), next(numbers), part, next_cut))


def visit(image: Image, row: Tensor, decisions: Decisions) -> tuple[float, float, tuple[int, int] | None]:
    """Certified maximum of row . z over a part, a value of it attained in the ball, and the node and unit to cut at.

    inf, -inf and None where the LP fails; no cut where every output equals one of its pieces.
    """
    image.program.fill(image.ball, image.lines, decisions)
    image.program.row.value = row.numpy()
    answer = programs.solve(image.program, image.solver)
    if answer is None:
        return math.inf, -math.inf, None
    lines, slopes, push = list(image.lines), {}, {}
    for k, unit, piece in decisions:
        lines[k] = image.program.pieces[k].decided(lines[k], unit, piece)
    for k, pieces in image.program.pieces.items():
        slopes[k], push[k] = pieces.dual(lines[k], answer.multipliers[k])
    form = pull(image.network, lines, row[None, None], dual=Dual(slopes, push))
    x = torch.as_tensor(answer.image).view_as(image.ball[0]).clamp(*image.ball)
    met = (row @ image.network(x)[0]).item()
    return over_ball(*form, *image.ball).item(), met, loosest(image.program, lines, answer)


def loosest(program: programs.Program, lines: list[Lines], answer: programs.Answer) -> tuple[int, int] | None:
    """The node and unit whose line above costs the LP most at its best point, None if y equals a piece everywhere."""
    best, where = 0.0, None
    for k, pieces in program.pieces.items():
        gap = np.where(pieces.free(lines[k]), answer.over[k].min(0), 0.0)
        gap = np.where(gap > 1e-9, gap * (SMALL + answer.upper[k].clip(min=0)), 0.0)
        if gap.max() > best:
            best, where = gap.max(), (k, int(gap.argmax()))
    return where
