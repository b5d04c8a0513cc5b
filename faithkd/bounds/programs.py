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
from torch import Tensor

from faithkd.bounds.graph import Network
from faithkd.bounds.layers import Add
from faithkd.bounds.linear import Slopes
from faithkd.bounds.operators import Affine, Box, Lines, MaxPool2d, Operator, ReLU, Shape, View

Setter = Callable[[Tensor, Tensor], None]  # gives a node's parameters their values, from the box of its input


@dataclass(frozen=True)
class Program:
    """One network's program: `row` chooses the objective, `fill` sets an image's boxes, by place.

    `pieces[k]`: what node k is made of, its constraints y >= piece, and the one that holds y below a line.
    """

    problem: cp.Problem
    row: cp.Parameter
    fill: list[tuple[int, Setter]]
    image: cp.Variable
    logits: cp.Variable
    pieces: dict[int, tuple["ReluPieces | PoolPieces", list[cp.Constraint], cp.Constraint]]


@dataclass(frozen=True)
class Canonical:
    """An image's LP, as cvxpy hands it to a solver: minimise c z, A z + s == b, s == 0 in the first `equal` rows, else
    s >= 0, and `lower` <= z <= `upper`; where the input and the logits are in z; and which rows belong to which node.

    `kinds[k]`: what node k is made of; `pieces[k]` `(outputs, pieces)`: the rows y >= piece, -1 for none; `above[k]`
    `(outputs,)`: the rows y <= line.
    """

    matrix: sp.csr_array
    right: np.ndarray
    equal: int
    lower: np.ndarray
    upper: np.ndarray
    image: slice
    logits: slice
    kinds: dict[int, "ReluPieces | PoolPieces"]
    pieces: dict[int, np.ndarray]
    above: dict[int, np.ndarray]

    def cost(self, row: np.ndarray) -> np.ndarray:
        """c for the largest row . z_last; solvers minimise."""
        cost = np.zeros(self.matrix.shape[1])
        cost[self.logits] = -row
        return cost

    def shares(self, multipliers: np.ndarray) -> Slopes:
        """The multipliers `(B, rows)` of the pieces by node, `(B, pieces, outputs)`: 0 for none, NaN if not known."""
        found = {}
        for k, rows in self.pieces.items():
            mine = torch.as_tensor(np.where(rows >= 0, multipliers[:, rows], 0.0)).clamp(min=0)
            found[k] = mine.transpose(1, 2)
        return found


@dataclass(frozen=True)
class ReluPieces:
    """ReLU as y >= 0 and y >= z, below a line or equal to one of both."""

    operator: ReLU
    shape: Shape

    def lower(self, y: cp.Variable, z: cp.Variable) -> list[cp.Constraint]:
        return [y >= 0, y >= z]

    def lp(self, y: cp.Variable, z: cp.Variable) -> tuple[list[cp.Constraint], Setter]:
        """y <= slope z + shift, the upper line of the triangle."""
        slope, shift = cp.Parameter(y.size, nonneg=True), cp.Parameter(y.size, nonneg=True)

        def setter(low, high):
            assign((slope, shift), *self.operator.triangle(low, high)[:2])

        return [y <= cp.multiply(slope, z) + shift], setter

    def milp(self, y: cp.Variable, z: cp.Variable) -> tuple[list[cp.Constraint], Setter]:
        """The two pieces from above, chosen by a binary; presolve settles the settled ones."""
        drop, rise = cp.Parameter(y.size, nonneg=True), cp.Parameter(y.size, nonneg=True)
        active = cp.Variable(y.size, boolean=True)

        def setter(low, high):
            assign((drop, rise), (-low).clamp(min=0), high.clamp(min=0))

        return [y <= z + drop - cp.multiply(drop, active), y <= cp.multiply(rise, active)], setter

    def table(self, rows: list[np.ndarray]) -> np.ndarray:
        """The rows of `lower` as `(outputs, pieces)`, -1 for none."""
        return np.stack(rows, 1)

    def free(self, line: Lines) -> Tensor:
        """Which outputs may equal several pieces, `(outputs,)`."""
        return line.free[0, 0].flatten()

    def decided(self, line: Lines, box: Box, chosen: tuple[Tensor, Tensor, Tensor], parts: int) -> Lines:
        """The line of each of so many parts, the piece alone where it is `chosen`: number of the part, unit, piece."""
        part, unit, piece = chosen
        low, high = (end.repeat(parts, *[1] * (end.ndim - 1)) for end in box)
        low.flatten(1)[part[piece == 1], unit[piece == 1]] = 0.0
        high.flatten(1)[part[piece == 0], unit[piece == 0]] = 0.0
        return self.operator.relax((low, high))

    def dual(self, line: Lines, share: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes of free units and, for all others, what is added to the row on the input, `(B, *shape)` twice.

        From the multipliers `(B, pieces, outputs)`. What is added is >= 0: z where a ReLU is on, -z where it is off.
        """
        share, above = share.unflatten(2, self.shape), line.above[:, 0]
        zero, identity = share.nan_to_num(0.0).unbind(1)
        push = torch.where(above > 0, zero, -identity).masked_fill(line.free[:, 0], 0.0)
        return share[:, 1] / share.sum(1), push


@dataclass(frozen=True)
class PoolPieces:
    """Max-pooling as y >= z_p for every place p of a window, below a chord or equal to one of them."""

    operator: MaxPool2d
    shape: Shape

    @property
    def places(self) -> np.ndarray:
        return self.operator.windows(self.shape).numpy()

    def selection(self) -> tuple[np.ndarray, np.ndarray]:
        """Every (output, input) pair as flat indices over all channels, padding left out."""
        places = self.places
        _, output = np.indices(places.shape)
        channel = np.arange(self.shape[0])[:, None]
        real = places >= 0
        outputs = channel * places.shape[1] + output[real]
        inputs = channel * self.shape[1] * self.shape[2] + places[real]
        return outputs.ravel(), inputs.ravel()

    def lower(self, y: cp.Variable, z: cp.Variable) -> list[cp.Constraint]:
        outputs, inputs = self.selection()
        return [y[outputs] >= z[inputs]]

    def lp(self, y: cp.Variable, z: cp.Variable) -> tuple[list[cp.Constraint], Setter]:
        """y <= slope z_i + shift with i the input of largest upper end in its window."""
        outputs, inputs = self.selection()
        slope, shift = cp.Parameter(len(inputs), nonneg=True), cp.Parameter(y.size)

        def setter(low, high):
            low, high = self.operator.boxes(low, high)
            best, steepness, constant = self.operator.chord(low, high)
            spread = torch.zeros_like(low).scatter_(2, best, steepness.unsqueeze(2))
            assign((slope, shift), spread[:, :, torch.as_tensor(self.places >= 0)], constant)

        return [y <= summed(outputs, y.size) @ cp.multiply(slope, z[inputs]) + shift], setter

    def milp(self, y: cp.Variable, z: cp.Variable) -> tuple[list[cp.Constraint], Setter]:
        """y equal to one input of its window, chosen by binaries, and above all of them."""
        outputs, inputs = self.selection()
        room = cp.Parameter(len(inputs), nonneg=True)
        chosen = cp.Variable(len(inputs), boolean=True)

        def setter(low, high):
            assign((room,), self.operator(high).flatten()[outputs] - low.flatten()[inputs])

        below = y[outputs] <= z[inputs] + room - cp.multiply(room, chosen)
        return [below, summed(outputs, y.size) @ chosen == 1], setter

    def table(self, rows: list[np.ndarray]) -> np.ndarray:
        real = self.places >= 0
        table = np.full((self.shape[0], *real.shape), -1)
        table[:, real] = rows[0].reshape(len(table), -1)
        return table.transpose(0, 2, 1).reshape(-1, len(real))

    def free(self, line: Lines) -> Tensor:
        return line.free[0, 0].any(1).flatten()

    def decided(self, line: Lines, box: Box, chosen: tuple[Tensor, Tensor, Tensor], parts: int) -> Lines:
        part, unit, piece = chosen
        noise, high, above, below, free = (
            column.repeat(parts, *[1] * (column.ndim - 1))
            for column in (line.noise, line.high, line.above, line.below, line.free)
        )
        channel, place = unit // above.shape[4], unit % above.shape[4]
        for weights in (above, below, free):
            weights[part, 0, channel, :, place] = 0
        for weights in (above, below):
            weights[part, 0, channel, piece, place] = 1.0
        high[part, 0, channel, place] = noise[part, 0, channel, place]
        return Lines(noise, high, above, below, free)

    def dual(self, line: Lines, share: Tensor) -> tuple[Tensor, Tensor]:
        """As of ReLU; what is added is z_p - z_q >= 0, where p is the largest input of a window."""
        share = share.unflatten(2, (self.shape[0], -1)).transpose(1, 2)
        usable = share.nan_to_num(0.0)
        spread = (line.above[:, 0] > 0) * usable.sum(2, keepdim=True) - usable
        spread = torch.where(line.free[:, 0].any(2, keepdim=True), 0.0, spread)
        return share, self.operator.gathered(spread, self.shape)


PIECES = {ReLU: ReluPieces, MaxPool2d: PoolPieces}  # what an output is the largest of


def matrix(operator: Affine, shape: Shape) -> tuple[sp.csr_array, np.ndarray]:
    """An affine operator as W, b on flat inputs: the identity pushed through it, in pieces to bound memory."""
    size = math.prod(shape)
    columns = []
    for piece in torch.arange(size).split(max(1, 2**22 // size)):
        unit = torch.zeros(len(piece), size, dtype=torch.float64)
        unit[torch.arange(len(piece)), piece] = 1
        pushed = operator.product(unit.unflatten(1, shape), operator.weight, None).flatten(1)
        columns.append(sp.csr_array(pushed.numpy().T))
    shift = operator(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    return sp.hstack(columns, format="csr"), shift.numpy()


def build(network: Network, integer: bool) -> Program:
    """The paper's program for one network, eq. (8), on a ball given later.

    With z0 the input, k a node, [l, u] the certified box of its input z and y its output:

        maximise    row . z_last
        subject to  x0 - eps <= z0 <= x0 + eps                        (bounds of the variable, no rows)
                    Linear, Conv2d:   y == W z + b
                    ReLU:             y >= 0,  y >= z                (lower pieces)
                        LP:           y <= u (z - l) / (u - l)       (Ehlers; y <= z or 0 where settled)
                        MILP:         y <= z - min(l, 0) (1 - a),  y <= max(u, 0) a,   a in {0, 1}
                    MaxPool2d:        y >= z_p for every p in the window
                        LP:           y <= slope z_i + shift         (the chord of `operators.MaxPool2d`)
                        MILP:         y <= z_p + (max u - l_p) (1 - b_p),  sum_p b_p == 1,  b_p in {0, 1}
                    all others:       y between the two lines of `operators`

    z_last is a variable, so the objective has no constant; a solver's dual bound would leave it out.
    """
    size = math.prod(network.shapes[0])
    low, high = cp.Parameter(size), cp.Parameter(size)
    image = first = cp.Variable(size, bounds=[low, high])
    fill = [(0, functools.partial(assign, (low, high)))]
    constraints, pieces = [], {}
    if not isinstance(
        next((node.operator for node in network.nodes if not isinstance(node.operator, View)), None), Affine
    ):
        # cvxpy compiles no parameter times a variable whose own bounds are parameters
        first = cp.Variable(size)
        constraints.append(first == image)
    values = [first]
    for k, node in enumerate(network.nodes):
        z, shape = [values[place] for place in node.inputs], network.shapes[network.place(k)]
        if isinstance(node.operator, View):
            values.append(z[0])  # every z here is flat already
            continue
        y = cp.Variable(math.prod(network.shapes[k + 1]))
        values.append(y)
        if type(node.operator) in PIECES:
            kind = PIECES[type(node.operator)](node.operator, shape)
            upper, setter = (kind.milp if integer else kind.lp)(y, *z)
            lower = kind.lower(y, *z)
            constraints += [*lower, *upper]
            pieces[k] = kind, lower, upper[0]
            fill.append((network.place(k), setter))
        elif isinstance(node.operator, Add):
            constraints.append(y == z[0] + z[1])
        elif isinstance(node.operator, Affine):
            weight, bias = matrix(node.operator, shape)
            constraints.append(y == weight @ z[0] + bias)
        else:
            found, setter = between(node.operator, y, *z)
            constraints += found
            fill.append((network.place(k), setter))
    row = cp.Parameter(network.classes)
    problem = cp.Problem(cp.Maximize(row @ values[-1]), constraints)
    return Program(problem, row, fill, image, values[-1], pieces)


def between(operator: Operator, y: cp.Variable, z: cp.Variable) -> tuple[list[cp.Constraint], Setter]:
    """below z + low <= y <= above z + high, the lines of an operator on single numbers."""
    below, above, low, high = (cp.Parameter(y.size) for _ in range(4))

    def setter(lower, upper):
        line = operator.relax((lower, upper))
        assign((below, above, low, high), line.below, line.above, line.low - line.noise, line.high)

    return [y >= cp.multiply(below, z) + low, y <= cp.multiply(above, z) + high], setter


def assign(parameters: tuple[cp.Parameter, ...], *values: Tensor) -> None:
    """Give each parameter its value."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value.flatten().numpy()


def summed(outputs: np.ndarray, size: int) -> sp.csr_array:
    """The matrix that adds up what belongs to the same output."""
    return sp.csr_array((np.ones(len(outputs)), (outputs, np.arange(len(outputs)))), shape=(size, len(outputs)))


def set_image(program: Program, bounds: list[Box]) -> None:
    """Fill the program's parameters from the boxes of one image."""
    for place, setter in program.fill:
        setter(*bounds[place])


def canonical(program: Program, solver: str) -> Canonical:
    """What cvxpy would pass to `solver` ("HIGHS" or "GUROBI") for the image set last."""
    program.row.value = np.zeros(program.row.size)
    data = program.problem.get_problem_data(solver)[0]
    start = data["param_prob"].var_id_to_col
    image, logits = (slice(start[z.id], start[z.id] + z.size) for z in (program.image, program.logits))
    rows, count = {}, 0
    # cvxpy puts equalities first, and keeps the order otherwise
    for constraint in sorted(program.problem.constraints, key=lambda c: not isinstance(c, cp.constraints.Equality)):
        rows[constraint.id] = np.arange(count, count + constraint.size)
        count += constraint.size
    kinds = {k: kind for k, (kind, *_) in program.pieces.items()}
    pieces = {k: kind.table([rows[piece.id] for piece in lower]) for k, (kind, lower, _) in program.pieces.items()}
    above = {k: rows[upper.id] for k, (*_, upper) in program.pieces.items()}
    matrix, ends = sp.csr_array(data["A"]), (data["lower_bounds"], data["upper_bounds"])
    return Canonical(matrix, data["b"], data["dims"].zero, *ends, image, logits, kinds, pieces, above)
