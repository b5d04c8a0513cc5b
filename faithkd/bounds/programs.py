"""FaithUB's programs, eqs (8) to (11), in cvxpy: the relaxation as an LP, the exact network as a MILP.

`build` writes one network's program down, once; an image's boxes are parameters of it. cvxpy turns it into its
canonical form, minimise c z subject to A z <= b (or ==), on which `solvers` solves many objectives one after the
other, each from the last basis. No solver is believed in anything:

* LP: only the multipliers are taken. Those of y >= 0 and y >= z say how the solver mixed the two lower pieces of each
  ReLU: their share is a lower slope in [0, 1]. `linear.pull` with these slopes is the LP's dual objective in our own
  arithmetic, and valid for any slopes. By strong duality nothing is lost when they are right.
* MILP: branch and bound of our own (`exact`) over such LPs, which proves its value leaf by leaf.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from faithkd.bounds.linear import Box, Slopes, pool_lines, relu_lines, window_boxes
from faithkd.bounds.network import AFFINE, Network, affine, forward, windows


@dataclass(frozen=True)
class Program:
    """One network's program: `row` chooses the objective, `fill` sets an image's boxes, layer by layer.

    `pieces[k]`: the constraints of layer k that hold y above its lower pieces, and the one that holds it below a line.
    """

    problem: cp.Problem
    row: cp.Parameter
    fill: list[tuple[int, Callable[[Tensor, Tensor], None]]]
    image: cp.Variable
    logits: cp.Variable
    pieces: dict[int, tuple[list[cp.Constraint], cp.Constraint]]


@dataclass(frozen=True)
class Canonical:
    """An image's LP, as cvxpy hands it to a solver: minimise c z, A z + s == b, s == 0 in the first `equal` rows, else
    s >= 0, and `lower` <= z <= `upper`; where the input and the logits are in z; and which rows belong to which layer.

    `pieces[k]` `(outputs, pieces)`: the rows y >= piece, -1 for none; `above[k]` `(outputs,)`: the rows y <= line.
    """

    matrix: sp.csr_array
    right: np.ndarray
    equal: int
    lower: np.ndarray
    upper: np.ndarray
    image: slice
    logits: slice
    pieces: dict[int, np.ndarray]
    above: dict[int, np.ndarray]

    def cost(self, row: np.ndarray) -> np.ndarray:
        """c for the largest row . z_last; solvers minimise."""
        cost = np.zeros(self.matrix.shape[1])
        cost[self.logits] = -row
        return cost


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> tuple[sp.csr_array, np.ndarray]:
    """An affine layer as W, b on flat inputs: the identity pushed through it, in pieces to bound memory."""
    size = math.prod(shape)
    columns = []
    for piece in torch.arange(size).split(max(1, 2**22 // size)):
        unit = torch.zeros(len(piece), size, dtype=torch.float64)
        unit[torch.arange(len(piece)), piece] = 1
        pushed = affine(layer, unit.unflatten(1, shape), layer.weight, None).flatten(1)
        columns.append(sp.csr_array(pushed.numpy().T))
    shift = forward(layer, torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    return sp.hstack(columns, format="csr"), shift.numpy()


def build(network: Network, integer: bool) -> Program:
    """The paper's program for one network, eq. (8), on a ball given later.

    With z0 the input, k a layer, [l, u] the certified box of its input z and y its output:

        maximise    row . z_last
        subject to  x0 - eps <= z0 <= x0 + eps                        (bounds of the variable, no rows)
                    Linear, Conv2d:   y == W z + b
                    ReLU:             y >= 0,  y >= z                (lower pieces)
                        LP:           y <= u (z - l) / (u - l)       (Ehlers; y <= z or 0 where settled)
                        MILP:         y <= z - min(l, 0) (1 - a),  y <= max(u, 0) a,   a in {0, 1}
                    MaxPool2d:        y >= z_p for every p in the window
                        LP:           y <= slope z_i + shift         (the chord of `linear.pool_lines`)
                        MILP:         y <= z_p + (max u - l_p) (1 - b_p),  sum_p b_p == 1,  b_p in {0, 1}

    z_last is a variable, so the objective has no constant; a solver's dual bound would leave it out.
    """
    size = math.prod(network.shapes[0])
    low, high = cp.Parameter(size), cp.Parameter(size)
    image = z = cp.Variable(size, bounds=[low, high])
    fill = [(0, functools.partial(assign, (low, high)))]
    constraints, pieces = [], {}
    if not isinstance(next(layer for layer in network.layers if not isinstance(layer, nn.Flatten)), AFFINE):
        # cvxpy compiles no parameter times a variable whose own bounds are parameters
        z = cp.Variable(size)
        constraints.append(z == image)
    for k, layer in enumerate(network.layers):
        shape, after = network.shapes[k], network.shapes[k + 1]
        if isinstance(layer, nn.Flatten):
            continue  # every z here is flat already
        y = cp.Variable(math.prod(after))
        if isinstance(layer, AFFINE):
            weight, bias = matrix(layer, shape)
            constraints.append(y == weight @ z + bias)
        else:
            if isinstance(layer, nn.ReLU):
                lower_pieces = [y >= 0, y >= z]
                upper_pieces, setter = relu_milp(y, z) if integer else relu_lp(y, z)
            else:
                outputs, inputs = selection(layer, shape)
                lower_pieces = [y[outputs] >= z[inputs]]
                upper_pieces, setter = (pool_milp if integer else pool_lp)(y, z, layer, shape)
            constraints += [*lower_pieces, *upper_pieces]
            pieces[k] = lower_pieces, upper_pieces[0]
            fill.append((k, setter))
        z = y
    row = cp.Parameter(network.classes)
    return Program(cp.Problem(cp.Maximize(row @ z), constraints), row, fill, image, z, pieces)


def assign(parameters: tuple[cp.Parameter, ...], *values: Tensor) -> None:
    """Give each parameter its value."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value.flatten().numpy()


def relu_lp(y: cp.Variable, z: cp.Variable):
    """y <= slope z + shift, the upper line of the triangle."""
    slope, shift = cp.Parameter(y.size, nonneg=True), cp.Parameter(y.size, nonneg=True)

    def setter(low, high):
        assign((slope, shift), *relu_lines(low, high)[:2])

    return [y <= cp.multiply(slope, z) + shift], setter


def relu_milp(y: cp.Variable, z: cp.Variable):
    """The two pieces of y = max(z, 0) from above, chosen by a binary; presolve settles the settled ones."""
    drop, rise = cp.Parameter(y.size, nonneg=True), cp.Parameter(y.size, nonneg=True)
    active = cp.Variable(y.size, boolean=True)

    def setter(low, high):
        assign((drop, rise), (-low).clamp(min=0), high.clamp(min=0))

    return [y <= z + drop - cp.multiply(drop, active), y <= cp.multiply(rise, active)], setter


def selection(pool: nn.MaxPool2d, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Every (output, input) pair of a max-pool as flat indices over all channels, padding left out."""
    places = windows(pool, shape).numpy()
    _, output = np.indices(places.shape)
    channel = np.arange(shape[0])[:, None]
    real = places >= 0
    outputs = channel * places.shape[1] + output[real]
    inputs = channel * shape[1] * shape[2] + places[real]
    return outputs.ravel(), inputs.ravel()


def pool_lp(y: cp.Variable, z: cp.Variable, pool: nn.MaxPool2d, shape: tuple[int, ...]):
    """y <= slope z_i + shift with i the input of largest upper end in its window."""
    outputs, inputs = selection(pool, shape)
    slope, shift = cp.Parameter(len(inputs), nonneg=True), cp.Parameter(y.size)

    def setter(low, high):
        low, high = window_boxes(pool, low, high)
        best, steepness, constant = pool_lines(low, high)
        spread = torch.zeros_like(low).scatter_(2, best, steepness.unsqueeze(2))
        assign((slope, shift), spread[:, :, torch.as_tensor(windows(pool, shape) >= 0)], constant)

    return [y <= summed(outputs, y.size) @ cp.multiply(slope, z[inputs]) + shift], setter


def pool_milp(y: cp.Variable, z: cp.Variable, pool: nn.MaxPool2d, shape: tuple[int, ...]):
    """y equal to one input of its window, chosen by binaries, and above all of them."""
    outputs, inputs = selection(pool, shape)
    room = cp.Parameter(len(inputs), nonneg=True)
    chosen = cp.Variable(len(inputs), boolean=True)

    def setter(low, high):
        largest = pool(high).flatten()
        assign((room,), largest[outputs] - low.flatten()[inputs])

    below = y[outputs] <= z[inputs] + room - cp.multiply(room, chosen)
    return [below, summed(outputs, y.size) @ chosen == 1], setter


def summed(outputs: np.ndarray, size: int) -> sp.csr_array:
    """The matrix that adds up what belongs to the same output."""
    return sp.csr_array((np.ones(len(outputs)), (outputs, np.arange(len(outputs)))), shape=(size, len(outputs)))


def set_image(program: Program, bounds: list[Box]) -> None:
    """Fill the program's parameters from the boxes of one image."""
    for k, setter in program.fill:
        setter(*bounds[k])


def canonical(network: Network, program: Program, solver: str) -> Canonical:
    """What cvxpy would pass to `solver` ("HIGHS" or "GUROBI") for the image set last."""
    program.row.value = np.zeros(network.classes)
    data = program.problem.get_problem_data(solver)[0]
    start = data["param_prob"].var_id_to_col
    image, logits = (slice(start[z.id], start[z.id] + z.size) for z in (program.image, program.logits))
    rows, count = {}, 0
    # cvxpy puts equalities first, and keeps the order otherwise
    for constraint in sorted(program.problem.constraints, key=lambda c: not isinstance(c, cp.constraints.Equality)):
        rows[constraint.id] = np.arange(count, count + constraint.size)
        count += constraint.size
    pieces, above = {}, {}
    for k, (lower_pieces, upper_piece) in program.pieces.items():
        above[k] = rows[upper_piece.id]
        if isinstance(network.layers[k], nn.ReLU):
            pieces[k] = np.stack([rows[piece.id] for piece in lower_pieces], 1)
        else:
            real = (windows(network.layers[k], network.shapes[k]) >= 0).numpy()
            table = np.full((network.shapes[k][0], *real.shape), -1)
            table[:, real] = rows[lower_pieces[0].id].reshape(len(table), -1)
            pieces[k] = table.transpose(0, 2, 1).reshape(-1, len(real))
    return Canonical(
        sp.csr_array(data["A"]),
        data["b"],
        data["dims"].zero,
        data["lower_bounds"],
        data["upper_bounds"],
        image,
        logits,
        pieces,
        above,
    )


def shares(network: Network, form: Canonical, multipliers: np.ndarray) -> Slopes:
    """The multipliers of the lower pieces, by layer: of a ReLU `(B, 2, *shape)`, those of y >= 0 and y >= z; of a
    max-pool `(B, channels, window, outputs)`. From `(B, rows)`; 0 for padding, NaN where there are none."""
    found = {}
    for k, rows in form.pieces.items():
        mine = torch.as_tensor(np.where(rows >= 0, multipliers[:, rows], 0.0)).clamp(min=0)  # (B, outputs, pieces)
        mine = mine.transpose(1, 2)
        if isinstance(network.layers[k], nn.ReLU):
            found[k] = mine.unflatten(2, network.shapes[k])
        else:
            found[k] = mine.unflatten(2, (network.shapes[k][0], -1)).transpose(1, 2)
    return found
