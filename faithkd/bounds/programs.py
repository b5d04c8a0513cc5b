"""FaithUB's linear programs, eqs (8) to (11), by cvxpy: the relaxation as an LP, the exact network as a MILP.

One program per network is compiled once; images and logit differences are parameters of it. No solver is
believed further than needed:

* LP: only the dual multipliers are taken, as lower slopes of the ReLUs, and the bound is computed anew by our
  own backward pass, which is valid for any slopes. By strong duality nothing is lost when they are right.
* MILP: only the dual bound counts. `problem.value` is the best point found: a *lower* bound at any limit.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from faithkd.bounds.linear import Box, as_matrix, backward, difference_rows, relax, relu_lines
from faithkd.bounds.network import AFFINE, Network, affine, forward, windows
from faithkd.errors import FaithkdError

TOLERANCE = 1e-9  # the solvers' tightest feasibility and optimality tolerance
OLDEST_HIGHS = (1, 15, 1)  # older ones can report a sub-optimal MILP as optimal
HIGHS = {
    "primal_feasibility_tolerance": TOLERANCE,
    "dual_feasibility_tolerance": TOLERANCE,
    "mip_feasibility_tolerance": TOLERANCE,
    "mip_rel_gap": TOLERANCE,
    "mip_abs_gap": TOLERANCE,
    "parallel": "off",
}
GUROBI = {
    "FeasibilityTol": TOLERANCE,
    "OptimalityTol": TOLERANCE,
    "IntFeasTol": TOLERANCE,
    "MIPGap": TOLERANCE,
    "Threads": 1,
}
# Model.Status: optimal, or stopped by a limit with a valid ObjBound
GUROBI_LIMITS = {2, 7, 8, 9, 10, 11, 16, 17}


@dataclass(frozen=True)
class Program:
    """One network's program: `row` chooses the objective, `fill` sets an image's boxes, layer by layer."""

    problem: cp.Problem
    row: cp.Parameter
    fill: list[tuple[int, Callable[[np.ndarray, np.ndarray], None]]]
    multipliers: dict[int, tuple[cp.Constraint, cp.Constraint]]


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

        maximise    t
        subject to  t == row . z_last
                    x0 - eps <= z0 <= x0 + eps                        (bounds of the variable, no rows)
                    Linear, Conv2d:   y == W z + b
                    ReLU:             y >= 0,  y >= z                (lower pieces)
                        LP:           y <= u (z - l) / (u - l)       (Ehlers; y <= z or 0 where settled)
                        MILP:         y <= z - min(l, 0) (1 - a),  y <= max(u, 0) a,   a in {0, 1}
                    MaxPool2d:        y >= z_p for every p in the window
                        LP:           y <= max_p u_p                 (the paper's interval rule)
                        MILP:         y <= z_p + (max u - l_p) (1 - b_p),  sum_p b_p == 1,  b_p in {0, 1}
    """
    size = math.prod(network.shapes[0])
    low, high = cp.Parameter(size), cp.Parameter(size)
    z = cp.Variable(size, bounds=[low, high])
    fill = [(0, functools.partial(assign, (low, high)))]
    constraints, multipliers = [], {}
    for k, layer in enumerate(network.layers):
        shape, after = network.shapes[k], network.shapes[k + 1]
        if isinstance(layer, nn.Flatten):
            continue  # every z here is flat already
        y = cp.Variable(math.prod(after))
        if isinstance(layer, AFFINE):
            weight, bias = matrix(layer, shape)
            constraints.append(y == weight @ z + bias)
        elif isinstance(layer, nn.ReLU):
            lower_pieces = (y >= 0, y >= z)
            upper_pieces, setter = relu_milp(y, z) if integer else relu_lp(y, z)
            constraints += [*lower_pieces, *upper_pieces]
            multipliers[k] = lower_pieces
            fill.append((k, setter))
        else:
            pieces, setter = (pool_milp if integer else pool_lp)(y, z, layer, shape)
            constraints += pieces
            fill.append((k, setter))
        z = y
    # t alone is the objective: an objective's constant would be missing from the solvers' dual bounds
    t, row = cp.Variable(), cp.Parameter(network.classes)
    return Program(cp.Problem(cp.Maximize(t), [*constraints, t == row @ z]), row, fill, multipliers)


def assign(parameters: tuple[cp.Parameter, ...], *values: np.ndarray) -> None:
    """Give each parameter its value."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value


def relu_lp(y: cp.Variable, z: cp.Variable):
    """y <= slope z + shift, the upper line of the triangle."""
    slope, shift = cp.Parameter(y.size, nonneg=True), cp.Parameter(y.size, nonneg=True)

    def setter(low, high):
        lines = relu_lines(torch.as_tensor(low), torch.as_tensor(high))
        assign((slope, shift), lines[0].numpy(), lines[1].numpy())

    return [y <= cp.multiply(slope, z) + shift], setter


def relu_milp(y: cp.Variable, z: cp.Variable):
    """The two pieces of y = max(z, 0) from above, chosen by a binary; presolve settles the settled ones."""
    drop, rise = cp.Parameter(y.size, nonneg=True), cp.Parameter(y.size, nonneg=True)
    active = cp.Variable(y.size, boolean=True)

    def setter(low, high):
        assign((drop, rise), np.maximum(-low, 0), np.maximum(high, 0))

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
    """y above each input of its window and below the largest upper bound in it."""
    outputs, inputs = selection(pool, shape)
    ceiling = cp.Parameter(y.size)

    def setter(low, high):
        assign((ceiling,), window_max(high, outputs, inputs, y.size))

    return [y[outputs] >= z[inputs], y <= ceiling], setter


def pool_milp(y: cp.Variable, z: cp.Variable, pool: nn.MaxPool2d, shape: tuple[int, ...]):
    """y equal to one input of its window, chosen by binaries, and above all of them."""
    outputs, inputs = selection(pool, shape)
    room = cp.Parameter(len(inputs), nonneg=True)
    chosen = cp.Variable(len(inputs), boolean=True)
    count = sp.csr_array((np.ones(len(outputs)), (outputs, np.arange(len(outputs)))), shape=(y.size, len(outputs)))

    def setter(low, high):
        assign((room,), window_max(high, outputs, inputs, y.size)[outputs] - low[inputs])

    below = y[outputs] <= z[inputs] + room - cp.multiply(room, chosen)
    return [y[outputs] >= z[inputs], below, count @ chosen == 1], setter


def window_max(values: np.ndarray, outputs: np.ndarray, inputs: np.ndarray, size: int) -> np.ndarray:
    """Largest of `values` in each window."""
    largest = np.full(size, -np.inf)
    np.maximum.at(largest, outputs, values[inputs])
    return largest


def solver(
    network: Network, method: str, name: str, max_nodes: int
) -> Callable[[list[Box], Tensor], tuple[Tensor, str]]:
    """A function from one image's boxes and bounds `(C, C)` so far to better ones and a note, "" for none."""
    program = build(network, integer=method == "milp")
    options = solver_options(program, name, max_nodes if method == "milp" else None)
    improve = milp_differences if method == "milp" else lp_differences
    return functools.partial(improve, network, program, options)


def solver_options(program: Program, name: str, max_nodes: int | None) -> dict:
    """Keyword arguments of `problem.solve` for "highs", "gurobi" or "auto"; warns once without Gurobi."""
    if name != "highs":
        refused = gurobi_refusal(program)
        if not refused:
            limit = {} if max_nodes is None else {"NodeLimit": max_nodes}
            return {"solver": "GUROBI", "warm_start": False, "env": gurobi_environment(), **GUROBI, **limit}
        if name == "gurobi":
            raise FaithkdError(f"Gurobi cannot be used: {refused}; choose solver='highs'")
        warn_once(f"Gurobi is not used: {refused}; HiGHS solves instead")
    check_highs(milp=max_nodes is not None)
    limit = {} if max_nodes is None else {"mip_max_nodes": max_nodes}
    # no warm start: what was solved before must not change an answer
    return {"solver": "HIGHS", "warm_start": False, **HIGHS, **limit}


@functools.cache
def warn_once(message: str) -> None:
    """One warning per message and process."""
    warnings.warn(message, stacklevel=2)


def check_highs(milp: bool) -> None:
    """Refuse a missing HiGHS, and for MILPs one that is known to be wrong."""
    try:
        version = metadata.version("highspy")
    except metadata.PackageNotFoundError as problem:
        raise FaithkdError("the solver HiGHS is missing; install it by: pip install 'highspy>=1.15.1'") from problem
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:3])
    if milp and numbers < OLDEST_HIGHS:
        raise FaithkdError(
            f"HiGHS {version} can give a wrong optimum of a MILP; upgrade it: pip install 'highspy>=1.15.1'"
        )


@functools.cache
def gurobi_environment():
    """One silent Gurobi environment per process."""
    import gurobipy

    environment = gurobipy.Env(empty=True)
    environment.setParam("OutputFlag", 0)
    environment.start()
    return environment


def gurobi_refusal(program: Program) -> str:
    """Why Gurobi cannot solve a program of this size here, "" if it can: it is made to try an empty one.

    cvxpy swallows the licence error, so it has to be provoked outside of it.
    """
    try:
        import gurobipy
    except ImportError:
        return "gurobipy is not installed"
    variables = sum(variable.size for variable in program.problem.variables())
    rows = sum(constraint.size for constraint in program.problem.constraints)
    try:
        with gurobipy.Model(env=gurobi_environment()) as model:
            x = model.addMVar(variables, ub=1.0)
            ones = np.ones(rows)
            some = sp.csr_array((ones, (np.arange(rows), np.zeros(rows, int))), shape=(rows, variables))
            model.addMConstr(some, x, "<", ones)
            model.optimize()
    except gurobipy.GurobiError as problem:
        return f"{problem} ({variables} variables, {rows} rows)"
    return ""


def set_image(program: Program, bounds: list[Box]) -> None:
    """Fill the program's parameters from the boxes of one image."""
    for k, setter in program.fill:
        setter(*(end.flatten().numpy() for end in bounds[k]))


def all_finite(bounds: list[Box]) -> bool:
    """Whether every box has finite ends, as the solvers need."""
    return all(bool(torch.isfinite(end).all()) for box in bounds for end in box)


def attempt(program: Program, row: Tensor, options: dict) -> bool:
    """Solve for one row; False if the solver or cvxpy gave up: nothing in the problem may be read then."""
    program.row.value = row.numpy()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cvxpy warns of inaccurate solutions; none is used here
            program.problem.solve(**options)
    except Exception:  # a solver may raise anything, and whatever it is, the cheaper bound stays
        return False
    return True


def lp_differences(
    network: Network, program: Program, options: dict, bounds: list[Box], highest: Tensor
) -> tuple[Tensor, str]:
    """The LP's maxima of z_j - z_i, certified from its multipliers: `highest` `(C, C)` or smaller.

    The multipliers of y >= 0 and y >= z say how the solver mixed the two lower pieces of each ReLU: their
    share is a lower slope in [0, 1]. `backward` with these slopes is the LP's dual objective, in our own
    arithmetic.
    """
    if not all_finite(bounds):
        return highest, "LP not tried: boxes not finite"
    if not any(((bounds[k][0] < 0) & (bounds[k][1] > 0)).any() for k in program.multipliers):
        return highest, ""  # no lower slope is free, so CROWN's choice is the only one
    set_image(program, bounds)
    rows, pairs = difference_rows(network.classes)
    slopes = {
        k: relu_lines(*bounds[k])[2].repeat(len(rows), *[1] * (bounds[k][0].ndim - 1)) for k in program.multipliers
    }
    missing = 0
    for r, row in enumerate(rows):
        found = read_slopes(program) if attempt(program, row, options) else None
        missing += found is None
        for k, share in (found or {}).items():
            share = torch.as_tensor(share).view(network.shapes[k])
            slopes[k][r] = torch.where(share.isnan(), slopes[k][r], share)
    lines = [relax(layer, *bounds[k]) for k, layer in enumerate(network.layers)]
    slopes = {k: slope.unsqueeze(0) for k, slope in slopes.items()}
    values = backward(network, lines, bounds[0], rows.unsqueeze(0), slopes=slopes)
    note = f"LP without multipliers for {missing} of {len(rows)} differences: CROWN's bound stays"
    return torch.minimum(highest, as_matrix(values, pairs, network.classes)[0]), note if missing else ""


def read_slopes(program: Program) -> dict[int, np.ndarray] | None:
    """Lower slopes from the multipliers, NaN where a unit has none; None unless all are there and finite."""
    slopes = {}
    for k, pieces in program.multipliers.items():
        zero, identity = (piece.dual_value for piece in pieces)
        if zero is None or identity is None or not (np.isfinite(zero).all() and np.isfinite(identity).all()):
            return None
        zero, identity = np.maximum(zero, 0), np.maximum(identity, 0)
        both = zero + identity
        slopes[k] = np.divide(identity, both, out=np.full(both.shape, np.nan), where=both > 1e-12)
    return slopes


def milp_differences(
    network: Network, program: Program, options: dict, bounds: list[Box], highest: Tensor
) -> tuple[Tensor, str]:
    """The MILP's maxima of z_j - z_i: `highest` `(C, C)` made smaller by the solver's dual bounds."""
    if not all_finite(bounds):
        return highest, "MILP not tried: boxes not finite"
    set_image(program, bounds)
    highest, limited, failed = highest.clone(), 0, 0
    rows, pairs = difference_rows(network.classes)
    reached = logits_inside(network, bounds)
    loosen = margin(bounds)
    for row, (i, j) in zip(rows, pairs.tolist(), strict=True):
        attained = (reached @ row).max().item()
        if highest[i, j] - attained <= loosen:
            continue  # nothing left to gain
        bound = dual_bound(program.problem) if attempt(program, row, options) else math.inf
        bound += loosen * (1 + abs(bound))
        # a bound below a value that is attained is no bound, whatever the solver says of it
        if not attained <= bound < math.inf:
            failed += 1
            continue
        limited += program.problem.status != cp.OPTIMAL
        highest[i, j] = min(highest[i, j].item(), bound)
    notes = []
    if limited:
        notes.append(f"node limit: dual bound used for {limited} of {len(rows)} differences")
    if failed:
        notes.append(f"MILP without a usable bound for {failed} of {len(rows)} differences: the LP's stays")
    return highest, ", ".join(notes)


def dual_bound(problem: cp.Problem) -> float:
    """The solver's own upper bound of the maximum, +inf if it has none that can be used.

    cvxpy minimises -t, so the solvers' bounds come with the opposite sign. A program that holds at least the
    image itself cannot be infeasible: such an answer is a failure, and its bound (an infinity) is not read.
    """
    stats = problem.solver_stats
    if stats is None or stats.extra_stats is None:
        return math.inf
    if stats.solver_name == "GUROBI":
        usable = stats.extra_stats.Status in GUROBI_LIMITS
        bound = stats.extra_stats.ObjBound if usable else -math.inf
    else:
        usable = problem.status in (cp.OPTIMAL, cp.USER_LIMIT)
        bound = stats.extra_stats.mip_dual_bound if usable else -math.inf
    return -bound if math.isfinite(bound) else math.inf


def margin(bounds: list[Box]) -> float:
    """What a dual bound is loosened by, relative to 1 + |bound|: solvers compute within tolerances only.

    Reduced costs and rows may each be off by TOLERANCE, which a variable's range multiplies; so TOLERANCE
    times (1 + the sum of all ranges in the program), and never less than 1e-7. This is a margin, not a proof:
    MILP values rest on it.
    """
    ranges = sum((upper - lower).sum().item() for lower, upper in bounds)
    return max(1e-7, TOLERANCE * (1 + ranges))


def logits_inside(network: Network, bounds: list[Box]) -> Tensor:
    """Logits `(3, C)` at the ball's middle and its two extreme corners."""
    lower, upper = bounds[0]
    z = torch.cat([(lower + upper) / 2, lower, upper])
    for layer in network.layers:
        z = forward(layer, z)
    return z
