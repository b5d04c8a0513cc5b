"""HiGHS and Gurobi on cvxpy's canonical form: one model per image, many objectives, each from the last basis.

Nothing that comes from here is believed: multipliers are evaluated anew in our own arithmetic, and a status or a point
only steers what is tried next.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from faithkd.bounds.programs import Canonical
from faithkd.errors import FaithkdError

TOLERANCE = 1e-9  # the solvers' tightest feasibility and optimality tolerance
HIGHS = {
    "output_flag": False,
    "parallel": "off",
    "presolve": "off",  # of use for the first objective only
    "primal_feasibility_tolerance": TOLERANCE,
    "dual_feasibility_tolerance": TOLERANCE,
}
GUROBI = {
    "Threads": 1,
    "Presolve": 0,
    "FeasibilityTol": TOLERANCE,
    "OptimalityTol": TOLERANCE,
    "InfUnbdInfo": 1,  # a ray for infeasible programs
}
OPTIMAL, INFEASIBLE, FAILED = "optimal", "infeasible", "failed"


@dataclass(frozen=True)
class Answer:
    """What a solver says. `multipliers` `(rows,)`: of the rows A z + s == b; of an infeasible program a ray of them.

    `point`: z, if optimal. Both None where the solver failed.
    """

    status: str
    multipliers: np.ndarray | None = None
    point: np.ndarray | None = None


# minimise cost z, where the rows in the first array hold with equality and those in the second do not count
Solve = Callable[[np.ndarray, np.ndarray, np.ndarray], Answer]


def highs(form: Canonical) -> Solve:
    """HiGHS on one image's program."""
    import highspy

    count = form.matrix.shape[1]
    columns = form.matrix.tocsc()
    base_lower = np.where(np.arange(len(form.right)) < form.equal, form.right, -np.inf)
    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = form.matrix.shape
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = np.zeros(count), form.lower, form.upper
    lp.row_lower_, lp.row_upper_ = base_lower, form.right
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = columns.indptr, columns.indices, columns.data
    model = highspy.Highs()
    for name, value in HIGHS.items():
        model.setOptionValue(name, value)
    model.passModel(lp)
    every_column, every_row = np.arange(count, dtype=np.int32), np.arange(len(form.right), dtype=np.int32)

    def solve(cost: np.ndarray, held: np.ndarray, dropped: np.ndarray) -> Answer:
        lower, upper = base_lower.copy(), form.right.copy()
        lower[held], upper[dropped] = form.right[held], np.inf
        model.changeColsCost(count, every_column, cost)
        model.changeRowsBounds(len(every_row), every_row, lower, upper)
        model.run()
        if model.getModelStatus() not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kInfeasible):
            model.clearSolver()  # a bad last basis: once more from the start
            model.run()
        status = model.getModelStatus()
        if status == highspy.HighsModelStatus.kOptimal:
            solution = model.getSolution()
            return Answer(OPTIMAL, -np.array(solution.row_dual), np.array(solution.col_value))
        if status == highspy.HighsModelStatus.kInfeasible:
            _, exists, ray = model.getDualRay()
            return Answer(INFEASIBLE, -np.array(ray)) if exists else Answer(FAILED)
        return Answer(FAILED)

    return solve


def gurobi(form: Canonical) -> Solve:
    """Gurobi on one image's program."""
    import gurobipy

    model = gurobipy.Model(env=gurobi_environment())
    for name, value in GUROBI.items():
        model.setParam(name, value)
    z = model.addMVar(form.matrix.shape[1], lb=form.lower, ub=form.upper)
    senses = np.where(np.arange(len(form.right)) < form.equal, "=", "<")
    rows = model.addMConstr(form.matrix, z, senses, form.right)

    def solve(cost: np.ndarray, held: np.ndarray, dropped: np.ndarray) -> Answer:
        sense, right = senses.copy(), form.right.copy()
        sense[held], right[dropped] = "=", gurobipy.GRB.INFINITY
        z.Obj, rows.Sense, rows.RHS = cost, sense, right
        model.optimize()
        if model.Status == gurobipy.GRB.OPTIMAL:
            return Answer(OPTIMAL, -rows.Pi, z.X)
        if model.Status == gurobipy.GRB.INFEASIBLE:
            return Answer(INFEASIBLE, rows.FarkasDual)
        return Answer(FAILED)

    return solve


def attempt(solve: Solve, form: Canonical, cost: np.ndarray, held: np.ndarray, dropped: np.ndarray) -> Answer:
    """What `solve` answers, FAILED unless all of it is there and finite."""
    try:
        answer = solve(cost, held, dropped)
    except Exception:  # a solver may raise anything, and whatever it is, the cheaper bound stays
        return Answer(FAILED)
    rows, columns = form.matrix.shape
    parts = [(answer.multipliers, rows), (answer.point, columns)][: 1 if answer.status == INFEASIBLE else 2]
    there = all(part is not None and part.shape == (size,) and np.isfinite(part).all() for part, size in parts)
    return answer if there and answer.status in (OPTIMAL, INFEASIBLE) else Answer(FAILED)


def choose(name: str, rows: int, variables: int) -> tuple[str, Callable[[Canonical], Solve]]:
    """cvxpy's name of a solver and how to start it, for "highs", "gurobi" or "auto"; warns once without Gurobi."""
    if name != "highs":
        refused = gurobi_refusal(rows, variables)
        if not refused:
            return "GUROBI", gurobi
        if name == "gurobi":
            raise FaithkdError(f"Gurobi cannot be used: {refused}; choose solver='highs'")
        warn_once(f"Gurobi is not used: {refused}; HiGHS solves instead")
    try:
        import highspy  # noqa: F401
    except ImportError as problem:
        raise FaithkdError("the solver HiGHS is missing; install it by: pip install 'highspy>=1.15.1'") from problem
    return "HIGHS", highs


@functools.cache
def warn_once(message: str) -> None:
    """One warning per message and process."""
    warnings.warn(message, stacklevel=2)


@functools.cache
def gurobi_environment():
    """One silent Gurobi environment per process."""
    import gurobipy

    environment = gurobipy.Env(empty=True)
    environment.setParam("OutputFlag", 0)
    environment.start()
    return environment


def gurobi_refusal(rows: int, variables: int) -> str:
    """Why Gurobi cannot solve a program of this size here, "" if it can: it is made to try an empty one."""
    try:
        import gurobipy
    except ImportError:
        return "gurobipy is not installed"
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
