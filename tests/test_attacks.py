"""The one projected gradient ascent: it stays in the ball, follows eq. (2) and finds maxima known in closed form."""

import pytest
import torch
from torch import nn

from faithkd import params
from faithkd.blocks import fastest, on_blocks
from faithkd.core import models
from faithkd.core.attacks import ascend, ball, random_start, search
from faithkd.errors import FaithkdError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_one_step_is_equation_2():
    """x¹ = Π_S(x⁰ + η sgn ∇L(x⁰)), with the projection active in the second coordinate."""
    x, eps, step = torch.tensor([[1.0, -2.0]]), 0.5, 0.4
    start = random_start(x - eps, x + eps, generator(3))
    z = ascend(lambda z: z @ torch.tensor([-1.0, 5.0]), x, eps, steps=1, step_size=step, generator=generator(3))
    expected = torch.minimum(torch.maximum(start + step * torch.tensor([[-1.0, 1.0]]), x - eps), x + eps)
    assert torch.equal(z, expected)


def test_ascend_reaches_the_corner_of_a_linear_objective_also_without_gradients_and_inside_clip():
    x, weight = torch.rand(6, 4, generator=generator()), torch.tensor([1.0, -2.0, 0.5, -0.1])
    options = {"steps": 20, "step_size": 0.1}
    with torch.no_grad():
        z = ascend(lambda z: z @ weight, x, 0.3, generator=generator(), **options)
        best, _ = search(lambda z: 2 * (z @ weight,), x, 0.3, restarts=1, generator=generator(), **options)
    assert torch.allclose(z, x + 0.3 * weight.sign(), atol=1e-6) and torch.allclose(z, best, atol=1e-6)
    clipped = ascend(lambda z: z @ weight, x, 0.3, generator=generator(), clip=(0.0, 1.0), **options)
    assert torch.allclose(clipped, z.clamp(0, 1), atol=1e-6)


def test_search_returns_the_best_point_met_not_the_last():
    """With a step far too large the iterates jump about; the best one met is what counts."""
    x, seen = torch.full((1, 1), 0.9), []

    def objective(z):
        value = -((z - 0.2) ** 2).sum(1)
        seen.append(float(value.detach()))
        return value, value

    point, score = search(objective, x, 1.0, steps=6, step_size=0.9, restarts=1, generator=generator())
    found = list(seen)
    assert float(score) == max(found) and max(found) > found[-1]
    assert float(objective(point)[0]) == float(score)


def test_search_judges_by_the_score_and_climbs_the_loss():
    x, wanted = torch.zeros(1, 2), torch.tensor([[0.5, 0.0]])

    def objective(z):
        return z[:, 1], -(z - wanted).abs().amax(1)  # climbs the second coordinate, scores nearness to `wanted`

    point, score = search(objective, x, 1.0, steps=5, step_size=0.2, restarts=8, generator=generator())
    assert float(score) == float(objective(point)[1]) >= float(objective(x)[1])


def test_the_image_itself_competes():
    """Where every move makes it worse the answer is the image, exactly."""
    x, options = torch.full((2, 3), 0.3), {"steps": 4, "step_size": 0.05, "restarts": 2}
    point, score = search(lambda z: 2 * (-((z - x).abs().sum(1)),), x, 0.1, generator=generator(), **options)
    assert torch.equal(point, x) and score.tolist() == [0, 0]


def test_every_candidate_stays_in_the_ball_and_the_seed_repeats():
    x, eps, outside = torch.randn(20, 5, generator=generator(1)), 0.07, []

    def objective(z):
        outside.append(((z.detach().double() - x.double()).abs() - eps).max().item())
        return 2 * ((z**3).sum(1),)

    options = {"steps": 2, "step_size": 0.03, "restarts": 2}
    runs = [search(objective, x, eps, generator=generator(seed), **options)[0] for seed in (5, 5, 6)]
    assert max(outside) <= 0
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -1}, "eps"),
        ({"steps": 1.5}, "steps"),
        ({"step_size": float("nan")}, "step_size"),
        ({"x": torch.ones(3)}, "batch"),
    ],
)
def test_bad_input_is_told(change, message):
    options = {"x": torch.ones(2, 3), "eps": 0.1, "steps": 2, "step_size": 0.1, "generator": generator()} | change
    for function, more in ((ascend, {}), (search, {"restarts": 1})):
        with pytest.raises(FaithkdError, match=message):
            function(lambda z: z.sum(1), **options, **more)


def test_convolutions_are_climbed_on_blocks_and_the_ball_stays_the_same():
    p = params.load("cifar10")
    nets = [models.build(a, (3, 32, 32), seed=0) for a in (p.models.student, p.models.teacher)]
    x = 0.2 + 0.6 * torch.rand(4, 3, 32, 32)
    clip = tuple(torch.tensor(ends).view(3, 1, 1) for ends in ([0.1, 0.0, 0.2], [0.9, 1.0, 0.8]))
    fast, blocks, inside, back = fastest((nets[0], None, nets[1]), x, clip)
    assert fast[1] is None and blocks.shape == (4, 12, 16, 16) and torch.equal(back(blocks), x)
    for quick, network in zip((fast[0], fast[2]), nets, strict=True):
        torch.testing.assert_close(quick(blocks), network(x), rtol=0, atol=1e-5)
    for corner, plain in zip(ball(blocks, 0.05, inside), ball(x, 0.05, clip), strict=True):
        assert torch.equal(back(corner), plain)
    other = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    assert fastest((nets[0], other), x, clip)[:3] == ((nets[0], other), x, clip), "all or none"


@pytest.mark.parametrize("other", [{"padding": 1}, {"stride": 1}, {"kernel_size": 2}, {"dilation": 2}])
def test_other_networks_are_climbed_as_they_are(other):
    form = {"kernel_size": 3, "stride": 2}
    assert on_blocks(nn.Sequential(nn.Conv2d(3, 4, **form | other)), (3, 32, 32)) is None
    assert on_blocks(nn.Sequential(nn.Conv2d(3, 4, **form)), (3, 31, 32)) is None
    assert on_blocks(nn.Linear(3, 2), (3, 32, 32)) is None and on_blocks(nn.Sequential(), (3, 32, 32)) is None
