"""The paper's method as a practitioner would write it: one linear program per logit difference, in gurobipy.

Each ReLU becomes its triangle (Ehlers, 2017) over a box found by CROWN (Zhang et al., 2018). One model per network and
image; the C(C-1) objectives z_j - z_i are solved one after the other on it, so that each starts from the last basis.
What it says is the solver's word: within its tolerances, not rounded outwards.
"""

import math

import gurobipy as gp
import numpy as np
import torch
from gurobipy import GRB
from torch import Tensor, nn

from faithkd.bounds import interval_bound, softmax_interval
from faithkd.core.attacks import ball
from faithkd.errors import FaithkdError

Layers = list[tuple[np.ndarray, np.ndarray]]  # W, b of each linear layer; a ReLU between any two


def upper_bound(teacher: nn.Sequential, student: nn.Sequential, x: Tensor, eps: float, clip=None) -> Tensor:
    """FaithUB by linear programs, eqs (9) to (11): images `(N, *shape)` to `(N,)`. Raises as `differences`."""
    return interval_bound(*(softmax_interval(differences(net, x, eps, clip)) for net in (teacher, student)))


def differences(network: nn.Sequential, x: Tensor, eps: float, clip=None, tolerance: float = 1e-6) -> Tensor:
    """Largest z_j - z_i of one network over the relaxation, `(N, C, C)` at (i, j), eq. (9).

    `tolerance`: Gurobi's feasibility and optimality tolerance, by default its own default. Raises FaithkdError for
    other networks than fully connected ones, and GurobiError where the licence does not take a model of this size.
    """
    kinds = [type(layer) for layer in network if not isinstance(layer, nn.Flatten)]
    if kinds != [nn.Linear, nn.ReLU] * (len(kinds) // 2) + [nn.Linear]:
        raise FaithkdError("the paper's LP is written for linear layers with ReLU between them; leave paper-lp out")
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    layers = [tuple(part.detach().double().numpy() for part in (layer.weight, layer.bias)) for layer in linear]
    corners = (end.flatten(1).numpy() for end in ball(x.double(), eps, clip))
    with gp.Env(params={"OutputFlag": 0, "Threads": 1, "FeasibilityTol": tolerance, "OptimalityTol": tolerance}) as env:
        found = [image_differences(layers, low, high, env) for low, high in zip(*corners, strict=True)]
    return torch.from_numpy(np.stack(found))


def crown(layers: Layers, low: np.ndarray, high: np.ndarray) -> Layers:
    """The least and largest input of each ReLU over the box [low, high], each by rows passed back to the image."""
    boxes = []
    for weight, bias in layers[:-1]:
        rows, total = np.vstack([weight, -weight]), np.concatenate([bias, -bias])  # maxima of z and of -z
        for (before, shift), (least, most) in reversed(list(zip(layers, boxes, strict=False))):
            above = chords(least, most)
            below = np.where(most > -least, 1.0, 0.0)
            total = total - rows.clip(min=0) @ (above * least.clip(max=0))
            rows = rows.clip(min=0) * above + rows.clip(max=0) * below
            rows, total = rows @ before, total + rows @ shift
        ends = total + rows.clip(min=0) @ high + rows.clip(max=0) @ low
        boxes.append((-ends[len(bias) :], ends[: len(bias)]))
    return boxes


def chords(least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The slope of each ReLU's chord over its box: 1 where it is on, 0 where it is off."""
    width = np.maximum(most, 0) - np.minimum(least, 0)
    return np.divide(np.maximum(most, 0), width, out=np.zeros_like(most), where=width > 0)


def image_differences(layers: Layers, low: np.ndarray, high: np.ndarray, env: gp.Env) -> np.ndarray:
    """The C(C-1) maxima for one image, `(C, C)`; +inf where Gurobi does not say optimal."""
    boxes = crown(layers, low, high)
    with gp.Model(env=env) as model:
        z = model.addMVar(len(low), lb=low, ub=high)  # the ball is bounds of variables, not rows
        for k, (weight, bias) in enumerate(layers):
            if k:
                z = triangles(model, z, *boxes[k - 1])
            y = model.addMVar(len(bias), lb=-GRB.INFINITY)
            model.addConstr(y == weight @ z + bias)
            z = y
        highest = np.zeros((len(bias), len(bias)))
        for i, j in np.argwhere(~np.eye(len(bias), dtype=bool)):
            model.setObjective(z[j] - z[i], GRB.MAXIMIZE)
            model.optimize()
            highest[i, j] = model.ObjVal if model.Status == GRB.OPTIMAL else math.inf
    return highest


def triangles(model: gp.Model, z: gp.MVar, least: np.ndarray, most: np.ndarray) -> gp.MVar:
    """y = max(z, 0) where the box settles it, elsewhere 0 <= y, z <= y <= most (z - least) / (most - least)."""
    y = model.addMVar(len(least), ub=np.where(most <= 0, 0.0, GRB.INFINITY))
    (live,), (open_,) = np.nonzero(least >= 0), np.nonzero((least < 0) & (most > 0))
    if len(live):
        model.addConstr(y[live] == z[live])
    if len(open_):
        slope = chords(least, most)[open_]
        model.addConstr(y[open_] >= z[open_])
        model.addConstr(y[open_] <= slope * z[open_] - slope * least[open_])
    return y
