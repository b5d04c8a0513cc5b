"""What there is to drag and watch, as numbers: data.json, from the committed digits networks. `python book/data.py`."""

import base64
import json
import math

import numpy as np
import torch
from parts import DRAWN, drawn, outwards, search
from torch import Tensor, nn

import faithkd
from faithkd import data, experiment, figures, params
from faithkd.report.watch import DATA

PROFILE = "digits"
RADII = [round(0.05 * k, 2) for k in range(7)]
RUNGS = ("interval", "crown", "alpha-crown", "joint", "bab")
NODES = 20  # parts of a ball for "bab"


def floats(values: Tensor) -> str:
    """Values as float32, little endian, in base 64: short, and exactly what was trained."""
    return base64.b64encode(values.detach().float().numpy().astype("<f4").tobytes()).decode()


def written(network: nn.Module) -> list[dict]:
    """The Linear layers of a network; between them there are ReLUs."""
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    return [{"weight": floats(layer.weight), "bias": floats(layer.bias)} for layer in layers]


def figure1(p) -> dict:
    """The image of figure 1, and the directions along its square: pixels in which x₁ and x₂ differ, and agree."""
    _, details = experiment.heat_map(p)
    signs = [(details[name] > details["x"]).double() * 2 - 1 for name in ("x1", "x2")]
    return {
        "x": floats(details["x"]),
        "across": floats((signs[1] - signs[0]) / 2),
        "along": floats((signs[1] + signs[0]) / 2),
        "where": details["where"],
        "eps": float(details["eps"]),
        "label": details["label"],
    }


def sure_and_apart(p, networks: dict, images: data.Split) -> int:
    """Notebook 00's image: both networks are right and sure, and SD goes farthest from the teacher next door."""
    eps = float(p.evaluate.eps[len(p.evaluate.eps) // 2])
    pair = networks["RT"], networks["SD"]
    found = faithkd.empirical_lower_bound(*pair, images.x, eps)
    sure = [torch.softmax(net(images.x), 1).max(1) for net in pair]
    right = torch.stack([(s.indices == images.y) & (s.values >= 0.9) for s in sure]).all(0)
    return int((found.values + right).argmax())


def bracket(pair: tuple, x: Tensor, radii: list[float]) -> dict:
    """EmpLB with its witnesses, and FaithUB by each rung, for every ε."""
    lower = [faithkd.empirical_lower_bound(*pair, x, eps, restarts=5) for eps in radii]
    upper = [faithkd.faithfulness_upper_bound(*pair, x, eps, method="bab", nodes=NODES) for eps in radii]
    steps = [bound.rungs | {"bab": bound.values} for bound in upper]  # every method on the way
    return {
        "lower": [math.floor(1e4 * float(bound.values)) / 1e4 for bound in lower],
        "upper": {rung: [outwards(float(step[rung])) for step in steps] for rung in RUNGS},
        "witnesses": [floats(bound.witnesses) for bound in lower],
    }


def everything() -> dict:
    """All that watch.js draws."""
    p = params.load(PROFILE)
    networks = {"RT": experiment.teacher(p)} | experiment.students(p)
    networks = {name: network.requires_grad_(False) for name, network in networks.items()}
    images = data.test_subset(p)
    place = sure_and_apart(p, networks, images)
    x = images.x[place : place + 1]
    return {
        "looks": {"colours": figures.COLOURS, "lower": figures.LOWER, "upper": figures.UPPER},
        "digits": {
            "networks": {name: written(network) for name, network in networks.items()},
            "classes": list(data.CLASSES[p.data.name]),
            "mean": p.data.mean[0],
            "std": p.data.std[0],
        },
        "drawn": {name: written(drawn(name)) for name in DRAWN},
        "figure1": figure1(p),
        "epsilon": {
            "x": floats(x),
            "radii": RADII,
            "students": {name: bracket((networks["RT"], networks[name]), x, RADII) for name in ("SD", "FD")},
        },
        "attacks": {
            "images": [floats(each) for each in images.x[[place, *range(4)]]],
            "labels": images.y[[place, *range(4)]].tolist(),
            "eps": float(p.train.attack.eps),
            "steps": p.train.attack.steps,
            "size": float(p.train.attack.step_size),
        },
        "parts": search(),
    }


if __name__ == "__main__":
    DATA.write_text(json.dumps(everything(), separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{DATA.name}: {np.round(DATA.stat().st_size / 1000)} kB")
