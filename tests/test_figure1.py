"""Fig. 1's square: the corners lie in the ball, the cut goes through them."""

import pytest
import torch
from torch import nn

from faithkd.core import attacks
from faithkd.core.data import Split
from faithkd.report import figure1

EPS = 0.1
EFFORT = {"steps": 10, "step_factor": 2.5, "restarts": 2, "seed": 0}


@pytest.fixture
def images() -> Split:
    x = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    return Split(x, torch.arange(6) % 3, torch.arange(6))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tuple(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))


def test_a_clear_disagreement_needs_a_teacher_who_is_right_and_a_student_who_is_wrong():
    right, wrong, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([0])
    scores = [float(figure1.clear_disagreement(*both, y)[1]) for both in ((right, wrong), (wrong, right))]
    assert scores[0] > 0.7 and scores[1] < -0.7
    assert float(figure1.clear_disagreement(right, right, y)[1]) < 0
    assert float(figure1.same_class(right, right, y)[1]) == 0 and float(figure1.same_class(right, wrong, y)[1]) == -1


@pytest.mark.parametrize("clip", [None, (torch.tensor(0.0), torch.tensor(1.0))])
def test_corners_are_corners_and_their_scores_are_theirs(pair, images, clip):
    found, scores = figure1.corners(figure1.same_class, pair, images, EPS, EFFORT | {"clip": clip})
    lower, upper = attacks.ball(images.x, EPS, clip)
    assert ((found == lower) | (found == upper)).all()
    with torch.no_grad():
        again = figure1.same_class(pair[0](found), pair[1](found), images.y)[1]
    assert torch.allclose(scores.to(again), again)


@pytest.mark.parametrize("second", ["another", "the same", "the opposite"])
def test_the_cut_goes_through_the_image_and_both_corners(images, second):
    x, side = images.x[:1], 5
    lower, upper = attacks.ball(x, EPS, None)
    signs = torch.arange(12)
    x1 = torch.where(signs % 2 == 0, upper, lower)
    x2 = {"another": torch.where(signs < 5, upper, lower), "the same": x1, "the opposite": lower + upper - x1}[second]
    frame, points, where = figure1.cut((x, x1, x2), EPS, side=side, seed=0)
    assert len(frame) == len(points) == side**2 and frame.abs().max().tolist() == [1, 1]
    for name, corner in {"x": x, "x1": x1, "x2": x2}.items():
        place = (frame[["a", "b"]] - list(where[name])).abs().sum(axis=1)
        assert place.min() < 1e-6, f"{name} is a point of the grid"
        assert torch.allclose(points[int(place.argmin())], corner[0], atol=1e-6)
    distance = (points - x).abs().amax(1) / EPS
    assert distance.tolist() == pytest.approx(frame.abs().max(axis=1).tolist(), abs=1e-5)
