"""The paper's method as a practitioner would write it: one linear program per logit difference, in gurobipy.

Each ReLU becomes its triangle (Ehlers, 2017) over a box found by CROWN. One model per network and image; the 90
objectives z_j - z_i are solved one after the other on it, so that each starts from the last basis. What it says is
the solver's word: within its tolerances, not rounded outwards.
"""

import functools
import math

import gurobipy as gp
import numpy as np
import torch
from faithkd.bounds.network import AFFINE, Network, affine, ball, check_images, prepare_pair, windows
from gurobipy import GRB
from torch import Tensor, nn

from faithkd.bounds.linear import Box, crown
from faithkd.bounds.softmax import pair_bound
from faithkd.errors import FaithkdError


class LicenceError(FaithkdError):
    """Gurobi's licence does not take a model of this size: pip's takes 2,000 variables and 2,000 rows."""


def upper_bound(teacher: nn.Sequential, student: nn.Sequential, x: Tensor, eps: float, clip=None) -> Tensor:
    """FaithUB by linear programs, eqs (9) to (11): images `(N, *shape)` to `(N,)`.

    Raises LicenceError, and FaithkdError for what `faithfulness_upper_bound` would refuse too.
    """
    x = check_images(x)
    pair = prepare_pair(teacher, student, x)
    lower, upper = ball(x, eps, clip)
    highest = [network_differences(network, crown(network, lower, upper)[0]) for network in pair]
    return pair_bound(*highest)


def network_differences(network: Network, bounds: list[Box], tolerance: float = 1e-6) -> Tensor:
    """Largest z_j - z_i of one network over the relaxation, `(N, C, C)` at (i, j), eq. (9).

    `bounds`: certified boxes of every layer's input. `tolerance`: Gurobi's feasibility and optimality tolerance, by
    default its own default.
    """
    linear = {
        k: matrix(layer, network.shapes[k]) for k, layer in enumerate(network.layers) if isinstance(layer, AFFINE)
    }
    found = []
    for n in range(len(bounds[0][0])):
        boxes = [tuple(end[n].flatten().numpy() for end in box) for box in bounds]
        try:
            found.append(image_differences(network, linear, boxes, tolerance))
        except gp.GurobiError as problem:
            if problem.errno != GRB.Error.SIZE_LIMIT_EXCEEDED:
                raise
            raise LicenceError(
                f"licence too small: Gurobi's licence does not take a network for images of {network.shapes[0]}"
            ) from problem
    return torch.stack(found)


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An affine layer as W, b on flat inputs."""
    size = math.prod(shape)
    unit = torch.eye(size, dtype=torch.float64).unflatten(1, shape)
    shift = affine(layer, torch.zeros(1, *shape, dtype=torch.float64), layer.weight, layer.bias)
    return affine(layer, unit, layer.weight, None).flatten(1).T.numpy(), shift.flatten().numpy()


def image_differences(network: Network, linear: dict, boxes: list, tolerance: float) -> Tensor:
    """The C(C-1) maxima for one image, `(C, C)`; +inf where Gurobi does not say optimal."""
    highest = torch.zeros(network.classes, network.classes, dtype=torch.float64)
    with gp.Model(env=environment()) as model:
        model.Params.FeasibilityTol = model.Params.OptimalityTol = tolerance
        logits = relaxation(model, network, linear, boxes)
        for i, j in np.argwhere(~np.eye(network.classes, dtype=bool)):
            model.setObjective(logits[j] - logits[i], GRB.MAXIMIZE)
            model.optimize()
            highest[i, j] = model.ObjVal if model.Status == GRB.OPTIMAL else math.inf
    return highest


def relaxation(model: gp.Model, network: Network, linear: dict, boxes: list) -> gp.MVar:
    """Adds one network's relaxation to `model`; returns the logits. The ball is bounds of variables, not rows."""
    z = model.addMVar(len(boxes[0][0]), lb=boxes[0][0], ub=boxes[0][1])
    for k, layer in enumerate(network.layers):
        low, high = boxes[k]
        if isinstance(layer, nn.Flatten):
            continue
        if isinstance(layer, AFFINE):
            weight, bias = linear[k]
            y = model.addMVar(len(bias), lb=-GRB.INFINITY)
            model.addConstr(y == weight @ z + bias)
        elif isinstance(layer, nn.ReLU):
            y = triangles(model, z, low, high)
        else:
            y = pools(model, z, layer, network.shapes[k], high)
        z = y
    return z


def triangles(model: gp.Model, z: gp.MVar, low: np.ndarray, high: np.ndarray) -> gp.MVar:
    """y = max(z, 0) where the box settles it, elsewhere 0 <= y, z <= y <= high (z - low) / (high - low)."""
    y = model.addMVar(len(low), ub=np.where(high <= 0, 0.0, GRB.INFINITY))
    (live,), (open_,) = np.nonzero(low >= 0), np.nonzero((low < 0) & (high > 0))
    if len(live):
        model.addConstr(y[live] == z[live])
    if len(open_):
        slope = high[open_] / (high[open_] - low[open_])
        model.addConstr(y[open_] >= z[open_])
        model.addConstr(y[open_] <= slope * z[open_] - slope * low[open_])
    return y


def pools(model: gp.Model, z: gp.MVar, pool: nn.MaxPool2d, shape: tuple[int, ...], high: np.ndarray) -> gp.MVar:
    """y above each input of its window and below the largest upper bound in it: the paper's interval rule."""
    places = windows(pool, shape).numpy()  # (window, outputs), -1 for padding
    channel = np.arange(shape[0])[:, None] * shape[1] * shape[2]
    inputs = np.where(places[:, None] < 0, -1, places[:, None] + channel).reshape(len(places), -1)
    ceiling = np.where(inputs < 0, -np.inf, high[inputs]).max(0)
    y = model.addMVar(len(ceiling), lb=-GRB.INFINITY, ub=ceiling)
    for row in inputs:
        (real,) = np.nonzero(row >= 0)
        model.addConstr(y[real] >= z[row[real]])
    return y


@functools.cache
def environment() -> gp.Env:
    """One silent Gurobi environment on one thread; its start checks the licence."""
    env = gp.Env(empty=True)
    env.setParam("OutputFlag", 0)
    env.setParam("Threads", 1)
    env.start()
    return env
