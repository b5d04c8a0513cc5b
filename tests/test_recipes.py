"""The recipes' alarm: small results of training, measuring and searching, remembered by the recipe's number.

A test here fails when the same inputs give other results than they did. Is that wanted? Then raise the number in
faithkd/recipes.py and pin anew: `python tests/test_recipes.py`.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from faithkd import bounds, params, recipes
from faithkd.core import data, evaluation, losses, models, training

FIXTURES = Path(__file__).parent / "fixtures"


def trained() -> dict[str, Tensor]:
    """Logits of a teacher and of all four students after a short training."""
    p = params.load("smoke", {"train.epochs": 3, "data.validation": 100})
    held_out, found, guide = data.validation(p), {}, None
    for method in ("RT", *losses.METHODS):
        network = models.build(p.models.student if guide else p.models.teacher, (1, 8, 8), seed=0)
        images, settings = data.training(p)[slice(0, 600)], getattr(p.train, method)
        options = {"method": losses.METHODS.get(method), "seed": p.seed, "description": None}
        network.load_state_dict(training.fit(network, guide, images, held_out, settings, p.train, **options)[0])
        guide = guide or network
        found[method] = network.eval()(held_out.x[:20]).detach()
    return found


def pair():  # two networks with random weights, six images, a radius
    p = params.load("smoke")
    guide, network = (models.build(p.models.student, (1, 8, 8), seed=seed).eval() for seed in (0, 1))
    return guide, network, data.test_subset(p)[slice(0, 6)], 0.1


def measured() -> dict[str, Tensor]:
    """Attacks on a pair and quick bounds of it."""
    (guide, network, images, eps), search = pair(), {"steps": 5, "restarts": 2}
    found = {
        "EmpLB": evaluation.empirical_lower_bound(guide, network, images.x, eps, **search).values,
        "StrongLB": evaluation.strong_lower_bound(guide, network, images.x, eps, classes=1, **search).values,
        "robust": evaluation.robust(network, images.x, images.y, eps, **search).holds.double(),
        "agrees": evaluation.agreement(guide, network, images.x, eps, **search).holds.double(),
    }
    for method in ("interval", "crown"):
        found[method] = bounds.faithfulness_upper_bound(guide, network, images.x, eps, method=method).values
    return found


def searched() -> dict[str, Tensor]:
    """Bounds of a pair by descents and branch and bound."""
    guide, network, images, eps = pair()
    best = bounds.faithfulness_upper_bound(guide, network, images.x, eps, method="best", nodes=8, jobs=1)
    found = {name: best.rungs[name] for name in ("alpha-crown", "joint")} | {"best": best.values, "BestLB": best.lower}
    return {name: values.contiguous() for name, values in found.items()}


# machines add up in different orders; a changed recipe differs by more than that
PINNED = {"training": (recipes.TRAINING, trained, 2e-2), "measuring": (recipes.MEASURING, measured, 1e-5)}
PINNED |= {"searching": (recipes.SEARCHING, searched, 1e-5)}


@pytest.mark.parametrize("stage", PINNED)
def test_the_recipe_is_pinned(stage):
    number, make, tolerance = PINNED[stage]
    file = FIXTURES / f"{stage}-{number}.safetensors"
    assert file.is_file(), f"pin the new recipe: python {Path(__file__).name}"
    pinned, now = load_file(file), make()
    assert pinned.keys() == now.keys()
    for name, values in now.items():
        assert torch.allclose(values, pinned[name], rtol=0, atol=tolerance), f"{name}: see above"


if __name__ == "__main__":
    for stage, (number, make, _) in PINNED.items():
        save_file(make(), FIXTURES / f"{stage}-{number}.safetensors")
