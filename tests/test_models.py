"""The architectures: parameter counts that the paper's percentages fix, Table 4 layer by layer."""

import pytest
import torch
from torch import nn

from faithkd import params
from faithkd.core import data, models

COUNTS = {"mnist": (27_580, 17_170), "fashion_mnist": (56_296, 26_760), "cifar10": (31_450, 16_354)}
SMALLER = {"mnist": 37.7, "fashion_mnist": 52.5, "cifar10": 48.0}  # %, §6


@pytest.mark.parametrize("profile", COUNTS)
def test_parameter_counts(profile):
    p = params.load(profile)
    shape = data.SHAPES[p.data.name]
    counts = tuple(models.parameter_count(models.build(a, shape, seed=0)) for a in (p.models.teacher, p.models.student))
    assert counts == COUNTS[profile]
    assert round(100 * (1 - counts[1] / counts[0]), 1) == SMALLER[profile]


def test_table_4_as_printed():
    p = params.load("cifar10")
    for architecture, (one, width) in ((p.models.teacher, (8, 128)), (p.models.student, (6, 64))):
        network = models.build(architecture, (3, 32, 32), seed=0)
        assert [str(layer) for layer in network] == [
            f"Conv2d(3, {one}, kernel_size=(3, 3), stride=(2, 2))",
            "ReLU()",
            "MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)",
            f"Conv2d({one}, 16, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))",
            "ReLU()",
            "Conv2d(16, 32, kernel_size=(3, 3), stride=(1, 1))",
            "Flatten(start_dim=1, end_dim=-1)",
            f"Linear(in_features=128, out_features={width}, bias=True)",
            "ReLU()",
            f"Linear(in_features={width}, out_features={width // 2}, bias=True)",
            "ReLU()",
            f"Linear(in_features={width // 2}, out_features=10, bias=True)",
        ]
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_seed_fixes_the_start_and_leaves_the_global_one_alone():
    p = params.load("digits")
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    nets = [models.build(p.models.teacher, (1, 8, 8), seed=s) for s in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(nets[0][1].weight, nets[1][1].weight)
    assert not torch.equal(nets[0][1].weight, nets[2][1].weight)


def test_initialisations_have_their_spread_and_no_bias():
    """He: deviation √(2 / inputs); Glorot: uniform up to √(6 / (inputs + outputs))."""
    architecture = params.load("mnist", {"models.teacher.hidden": [400, 300]}).models.teacher
    nets = {
        name: models.build(architecture, (1, 28, 28), seed=0, initialisation=name).requires_grad_(False)
        for name in models.INITIALISATIONS
    }
    assert float(nets["he"][1].weight.std()) == pytest.approx((2 / 784) ** 0.5, rel=0.01)
    assert float(nets["glorot"][3].weight.abs().max()) == pytest.approx((6 / 700) ** 0.5, rel=0.001)
    for name in ("he", "glorot"):
        assert all((layer.bias == 0).all() for layer in nets[name] if isinstance(layer, nn.Linear))
    default = models.build(architecture, (1, 28, 28), seed=0).requires_grad_(False)
    assert torch.equal(nets["pytorch"][1].weight, default[1].weight) and (default[1].bias != 0).any()
    assert float(default[1].weight.abs().max()) == pytest.approx((1 / 784) ** 0.5, rel=0.001)
