"""FaithUB's programs, eqs (8) to (11), in cvxpy: the relaxation as an LP, the exact network as a MILP.

`build` writes one network's program down, once: the objective, an image's ball and the lines of its ReLUs and
max-pools are parameters, so that cvxpy compiles it once. `solve` reads multipliers and a point off HiGHS or Gurobi,
and nobody believes either: what is certified is `linear.pull` with slopes made of the multipliers, valid whatever they
are. By strong duality nothing is lost when they are right.
"""

import functools
import math
import warnings
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from faithkd.bounds.graph import Network
from faithkd.bounds.operators import Box, Lines, MaxPool2d, Operator, ReLU, Shape, View
from faithkd.errors import FaithkdError

TOLERANCE = 1e-9  # the solvers' tightest feasibility and optimality tolerance
OPTIONS = {  # each LP begins where the last one ended, so that presolve is no help
    "HIGHS": {
        "simplex_strategy": 4,  # primal: the last vertex still satisfies all rows
        "output_flag": False,
        "parallel": "off",
        "presolve": "off",
        "primal_feasibility_tolerance": TOLERANCE,
        "dual_feasibility_tolerance": TOLERANCE,
    },
    "GUROBI": {"Threads": 1, "Presolve": 0, "FeasibilityTol": TOLERANCE, "OptimalityTol": TOLERANCE},
}
PRICE = 1e4  # of 1 by which an output is above the piece that it was decided to equal
ZERO, NOTHING = -1, -2  # in place of an input: the number 0, and no piece at all


class Pieces:
    """The outputs y of one node, each the largest of its pieces: 0 and z for ReLU, the numbers in a max-pool's window.

    A table `(pieces, outputs)` has an entry for each: `inputs` says which input it is, or ZERO, or NOTHING where there
    is no piece. Constraints and parameters have one entry for each that is `real`; `over` is y minus the piece.
    """

    def __init__(self, operator: Operator, shape: Shape, y: cp.Variable, z: cp.Expression) -> None:
        self.relu, self.shape, self.y = isinstance(operator, ReLU), shape, y
        if self.relu:
            self.inputs = np.stack([np.full(y.size, ZERO), np.arange(y.size)])
        else:
            places = operator.windows(shape).numpy()[:, None]
            channels = np.arange(shape[0])[:, None] * math.prod(shape[1:])
            self.inputs = np.where(places < 0, NOTHING, places + channels).reshape(len(places), -1)
        self.real = self.inputs != NOTHING
        inputs, outputs = self.inputs[self.real], np.nonzero(self.real)[1]
        some, self.rows = np.flatnonzero(inputs >= 0), len(inputs)
        self.sums = sp.csr_array((np.ones(self.rows), (outputs, np.arange(self.rows))))
        self.values = sp.csr_array((np.ones(len(some)), (some, inputs[some])), shape=(self.rows, z.size)) @ z
        self.over = y[outputs] - self.values
        self.lower = self.over >= 0

    def linear(self) -> list[cp.Constraint]:
        """The LP: y above all pieces and below a line on them; the objective pays a price for `over`."""
        self.slope, self.price = cp.Parameter(self.rows), cp.Parameter(self.rows)
        self.shift = cp.Parameter(self.y.size)
        self.upper = self.y <= self.sums @ cp.multiply(self.slope, self.values) + self.shift
        return [self.lower, self.upper]

    def integer(self) -> list[cp.Constraint]:
        """The MILP: y above all pieces and equal to one that binaries choose, at most `room` above the others."""
        self.room = cp.Parameter(self.rows)
        chosen = cp.Variable(self.y.size if self.relu else self.rows, boolean=True)
        rules = [] if self.relu else [self.sums @ chosen == 1]
        chosen = cp.hstack([1 - chosen, chosen]) if self.relu else chosen
        return [self.lower, self.over <= self.room - cp.multiply(self.room, chosen), *rules]

    def fill_linear(self, line: Lines, decided: list[tuple[int, int]]) -> None:
        """Set the LP's parameters: an output that is decided, (unit, piece), has a price in place of its line."""
        price, shift = np.zeros(self.inputs.shape), line.high.flatten().numpy().copy()
        for unit, piece in decided:
            price[piece, unit], shift[unit] = PRICE, np.inf
        self.slope.value, self.shift.value = self.table(line.above)[self.real], shift
        self.price.value = price[self.real]

    def fill_integer(self, box: Box) -> None:
        """Set the MILP's parameter, by how much another piece of the same output can be larger."""
        low, high = (np.append(end.flatten().numpy(), (-np.inf, 0.0))[self.inputs] for end in box)
        others = [np.delete(high, piece, 0).max(0, initial=-np.inf) for piece in range(len(high))]
        self.room.value = (np.stack(others) - low)[self.real].clip(min=0)

    def table(self, slopes: Tensor) -> np.ndarray:
        """Slopes of `Lines`, `(1, 1, ...)`, for each piece."""
        if self.relu:
            return np.stack([np.zeros(slopes.numel()), slopes.flatten().numpy()])
        return slopes[0, 0].transpose(0, 1).flatten(1).numpy().copy()

    def slopes(self, table: np.ndarray) -> Tensor:
        """What `table` undoes."""
        table = torch.as_tensor(table)
        if self.relu:
            return table[1].view(1, 1, *self.shape)
        return table.unflatten(1, (self.shape[0], -1)).transpose(0, 1)[None, None]

    def free(self, line: Lines) -> np.ndarray:
        """Which outputs may equal several pieces, `(outputs,)`."""
        return self.table(line.free).any(0)

    def decided(self, line: Lines, unit: int, piece: int) -> Lines:
        """The line where output `unit` equals a piece."""
        above, below, free = (self.table(part) for part in (line.above, line.below, line.free))
        above[:, unit], below[:, unit], free[:, unit] = 0, 0, 0
        above[piece, unit], below[piece, unit] = 1, 1
        high = line.high.clone()
        high.view(-1)[unit] = line.noise.reshape(-1)[unit]
        return Lines(line.noise, high, self.slopes(above), self.slopes(below), self.slopes(free).bool())

    def dual(self, line: Lines, multipliers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Slopes of free outputs and, for all others, what is added to the row on the input: `(1, 1, ...)` twice.

        From the multipliers of `lower`, a table. What is added is >= 0: the piece that an output equals minus any
        other one, for ReLU z where it is on and -z where it is off.
        """
        equal, total = self.table(line.above) > 0, multipliers.sum(0)
        if self.relu:
            equal[0] = ~equal[1]
        with np.errstate(invalid="ignore"):  # where a solver says inf or NaN, the bound becomes one or the other
            spread = np.where(self.free(line), 0.0, equal * total - multipliers)
            slopes = self.slopes(multipliers / np.where(total > 0, total, np.nan))
        some = self.inputs >= 0
        push = np.bincount(self.inputs[some], spread[some], math.prod(self.shape))
        return slopes, torch.as_tensor(push).view(1, 1, *self.shape)


@dataclass(frozen=True)
class Program:
    """One network's program: the objective's `row`, the ends of the `ball` and, by node, what else has parameters.

    `between`: the slopes and shifts below and above of operators that have no pieces.
    """

    problem: cp.Problem
    row: cp.Parameter
    ball: tuple[cp.Parameter, cp.Parameter]
    image: cp.Variable
    pieces: dict[int, Pieces]
    between: dict[int, tuple[cp.Parameter, ...]]

    def fill(self, ball: Box, lines: list[Lines], decisions: tuple[tuple[int, int, int], ...] = ()) -> None:
        """Set an image's parameters. A decision (k, unit, piece) says which piece an output of node k equals."""
        for parameter, end in zip(self.ball, ball, strict=True):
            parameter.value = end.flatten().numpy()
        for k, parameters in self.between.items():
            parts = lines[k].below, lines[k].low - lines[k].noise, lines[k].above, lines[k].high
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.value = part.flatten().numpy()
        for k, pieces in self.pieces.items():
            pieces.fill_linear(lines[k], [(unit, piece) for node, unit, piece in decisions if node == k])


@dataclass(frozen=True)
class Answer:
    """What a solver says: the image of its best point `(inputs,)`, and by node the tables `multipliers`, of y >= piece,
    and `over`, how far y is above each piece, and `upper` `(outputs,)`, the multipliers of the lines above."""

    image: np.ndarray
    multipliers: dict[int, np.ndarray]
    over: dict[int, np.ndarray]
    upper: dict[int, np.ndarray]


def build(network: Network, integer: bool = False) -> Program:
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

    A *part* of the ball, where some outputs equal one of their pieces, is the same LP with a price in its objective:
    -PRICE (y - piece), in place of the line above. So no part is infeasible, and an empty one is worth little.
    """
    size = math.prod(network.shapes[0])
    ball = cp.Parameter(size), cp.Parameter(size)
    image = cp.Variable(size, bounds=list(ball))
    values, constraints, pieces, between = [image], [], {}, {}
    for k, node in enumerate(network.nodes):
        z, shapes = [values[place] for place in node.inputs], [network.shapes[place] for place in node.inputs]
        if isinstance(node.operator, View):
            values.append(z[0])  # every z here is flat already
            continue
        y = cp.Variable(math.prod(network.shapes[k + 1]))
        values.append(y)
        if node.operator.linear:
            shift = node.operator(*(torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes))
            parts = [matrix(node.operator, shapes, place) @ part for place, part in enumerate(z)]
            constraints.append(y == sum(parts) + shift.flatten().numpy())
            continue
        if z[0] is image:  # cvxpy compiles no parameter times a variable whose own bounds are parameters
            z = [cp.Variable(size)]
            constraints.append(z[0] == image)
        if isinstance(node.operator, ReLU | MaxPool2d):
            pieces[k] = Pieces(node.operator, *shapes, y, *z)
            constraints += pieces[k].integer() if integer else pieces[k].linear()
        else:
            between[k] = below, low, above, high = [cp.Parameter(y.size) for _ in range(4)]
            constraints += [y >= cp.multiply(below, *z) + low, y <= cp.multiply(above, *z) + high]
    row = cp.Parameter(network.classes)
    prices = [part.price @ part.over for part in pieces.values() if not integer]
    problem = cp.Problem(cp.Maximize(row @ values[-1] - sum(prices)), constraints)
    return Program(problem, row, ball, image, pieces, between)


def matrix(operator: Operator, shapes: list[Shape], place: int) -> sp.csr_array:
    """W of a linear operator for one of its inputs, flat: the identity pushed through it, in pieces to bound memory."""
    size, columns = math.prod(shapes[place]), []
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
    for some in torch.arange(size).split(max(1, 2**22 // size)):
        unit = torch.zeros(len(some), size, dtype=torch.float64)
        unit[torch.arange(len(some)), some] = 1
        inputs = [*zeros[:place], unit.unflatten(1, shapes[place]), *zeros[place + 1 :]]
        columns.append(sp.csr_array((operator(*inputs) - operator(*zeros)).flatten(1).numpy().T))
    return sp.hstack(columns, format="csr")


def solve(program: Program, solver: str) -> Answer | None:
    """What the solver says to the LP as it is filled; None where it fails or anything is missing."""
    settings = {"env": gurobi_environment()} if solver == "GUROBI" else {}
    try:
        program.problem.solve(solver=solver, **OPTIONS[solver], **settings)
    except Exception:  # a solver may raise anything, and whatever it is, the cheaper bound stays
        return None
    if program.problem.status != cp.OPTIMAL:
        return None
    multipliers, over, upper = {}, {}, {}
    for k, pieces in program.pieces.items():
        multipliers[k], over[k] = np.zeros(pieces.inputs.shape), np.full(pieces.inputs.shape, np.inf)
        multipliers[k][pieces.real], over[k][pieces.real] = pieces.lower.dual_value.clip(min=0), pieces.over.value
        upper[k] = pieces.upper.dual_value
    return Answer(program.image.value, multipliers, over, upper)


def choose(name: str, program: Program) -> str:
    """cvxpy's name of the solver for "highs", "gurobi" or "auto"; warns once where Gurobi is not used."""
    if name == "highs":
        return "HIGHS"
    rows = sum(constraint.size for constraint in program.problem.constraints)
    refused = gurobi_refusal(rows, sum(variable.size for variable in program.problem.variables()))
    if not refused:
        return "GUROBI"
    if name == "gurobi":
        raise FaithkdError(f"Gurobi cannot be used: {refused}; choose solver='highs'")
    warn_once(f"Gurobi is not used: {refused}; HiGHS solves instead")
    return "HIGHS"


def gurobi_refusal(rows: int, variables: int) -> str:
    """Why Gurobi cannot solve a program of this size here, "" if it can: it is made to try an empty one."""
    z = cp.Variable(variables, bounds=[0, 1])
    trial = cp.Problem(cp.Minimize(cp.sum(z)), [np.ones((rows, 1)) @ z[:1] >= 0])
    try:
        trial.solve(solver="GUROBI", env=gurobi_environment())
    except Exception as problem:  # not installed, no licence, or one for smaller programs
        said = str(problem).partition("\n")[0].rstrip(".")
        return f"{said} ({variables} variables, {rows} rows; pip's licence is for 2,000 of each)"
    return ""


@functools.cache
def gurobi_environment():
    """One silent Gurobi environment per process."""
    import gurobipy

    environment = gurobipy.Env(empty=True)
    environment.setParam("OutputFlag", 0)
    environment.start()
    return environment


@functools.cache
def warn_once(message: str) -> None:
    """One warning per message and process."""
    warnings.warn(message, stacklevel=2)
