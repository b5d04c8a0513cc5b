"""The one projected gradient ascent: it stays in the ball, follows eq. (2) and finds maxima known in closed form."""

import torch
from torch import nn

from faithkd import params
from faithkd.core import models
from faithkd.core.attacks import ascend, ball, fastest, random_start, search


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_ball_is_clipped():
    lower, upper = ball(torch.tensor([0.05, 0.5, 0.95]), 0.1, (torch.tensor(0.0), torch.tensor(1.0)))
    assert lower.tolist()[0] == 0.0 and upper.tolist()[2] == 1.0
    assert lower[1] < 0.41 and upper[1] > 0.59


def test_one_step_is_equation_2():
    """x¹ = Π_S(x⁰ + η sgn ∇L(x⁰)), with the projection active in the second coordinate."""
    x, eps, step = torch.tensor([[1.0, -2.0]]), 0.5, 0.4
    start = random_start(x - eps, x + eps, generator(3))
    z = ascend(lambda z: z @ torch.tensor([-1.0, 5.0]), x, eps, steps=1, step_size=step, generator=generator(3))
    expected = torch.minimum(torch.maximum(start + step * torch.tensor([[-1.0, 1.0]]), x - eps), x + eps)
    assert torch.equal(z, expected)


def test_ascend_reaches_the_corner_of_a_linear_objective():
    x, weight = torch.randn(6, 4, generator=generator()), torch.tensor([1.0, -2.0, 0.5, -0.1])
    z = ascend(lambda z: z @ weight, x, 0.3, steps=20, step_size=0.1, generator=generator())
    assert torch.allclose(z, x + 0.3 * weight.sign(), atol=1e-6)


def test_search_returns_the_best_point_met_not_the_last():
    """With a step far too large the iterates jump about; the best one met is what counts."""
    x = torch.full((1, 1), 0.9)
    seen = []

    def objective(z):
        value = -((z - 0.2) ** 2).sum(1)
        seen.append(float(value.detach()))
        return value, value

    point, score = search(objective, x, 1.0, steps=6, step_size=0.9, restarts=1, generator=generator())
    found = list(seen)
    assert float(score) == max(found) and max(found) > found[-1]
    assert float(objective(point)[0]) == float(score)


def test_search_judges_by_the_score_and_climbs_the_loss():
    x = torch.zeros(1, 2)
    wanted = torch.tensor([[0.5, 0.0]])

    def objective(z):
        return z[:, 1], -(z - wanted).abs().amax(1)  # climbs the second coordinate, scores nearness to `wanted`

    point, score = search(objective, x, 1.0, steps=5, step_size=0.2, restarts=8, generator=generator())
    assert float(score) == float(objective(point)[1]) >= float(objective(x)[1])


def test_the_image_itself_competes():
    """Where every move makes it worse the answer is the image, exactly."""
    x = torch.full((2, 3), 0.3)
    point, score = search(
        lambda z: 2 * (-((z - x).abs().sum(1)),), x, 0.1, steps=4, step_size=0.05, restarts=2, generator=generator()
    )
    assert torch.equal(point, x) and score.tolist() == [0, 0]


def test_every_candidate_stays_in_the_ball_and_the_seed_repeats():
    x, eps = torch.randn(20, 5, generator=generator(1)), 0.07
    outside = []

    def objective(z):
        outside.append(((z.detach().double() - x.double()).abs() - eps).max().item())
        value = (z**3).sum(1)
        return value, value

    runs = [search(objective, x, eps, steps=6, step_size=0.05, restarts=2, generator=generator(5)) for _ in range(2)]
    assert max(outside) <= 0
    assert torch.equal(runs[0][0], runs[1][0])
    other = search(objective, x, eps, steps=1, step_size=0.001, restarts=1, generator=generator(6))
    assert not torch.equal(runs[0][0], other[0])


def test_clip_keeps_inputs_valid():
    x, clip = torch.rand(10, 4, generator=generator()), (torch.tensor(0.0), torch.tensor(1.0))
    z = ascend(lambda z: z.sum(1), x, 0.9, steps=5, step_size=0.3, generator=generator(), clip=clip)
    assert float(z.max()) <= 1 and float(z.min()) >= 0


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


def test_attacks_work_where_gradients_are_switched_off():
    with torch.no_grad():
        point, _ = search(
            lambda z: 2 * (z.sum(1),), torch.zeros(1, 2), 0.5, steps=9, step_size=0.2, restarts=1, generator=generator()
        )
        z = ascend(lambda z: z.sum(1), torch.zeros(1, 2), 0.5, steps=9, step_size=0.2, generator=generator())
    assert point.tolist() == z.tolist() == [[0.5, 0.5]]
