"""Training: what comes out is what the parameters say, and killed runs go on bit for bit."""

import math
from contextlib import contextmanager

import pytest
import torch

from faithkd import params
from faithkd.core import data, losses, models, training
from faithkd.core.losses import Method


def small(**changes):
    return params.load("smoke", {"train.epochs": 3, "data.validation": 100, **changes})


def train(p, method=None, teacher=None, checkpoint=None, epochs=None, limit=300):
    schedule = p.train if epochs is None else p.train.model_copy(update={"epochs": epochs})
    architecture = p.models.teacher if teacher is None else p.models.student
    return training.fit(
        models.build(architecture, (1, 8, 8), seed=p.seed),
        teacher,
        data.training(p)[:limit],
        data.validation(p),
        getattr(p.train, method or "RT"),
        schedule,
        method=losses.METHODS.get(method, method),
        seed=p.seed,
        checkpoint=checkpoint,
    )


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def teacher():
    p = small(**{"train.attack.eps": 0.05, "train.RT.learning_rate": 0.1})
    network = models.build(p.models.teacher, (1, 8, 8), seed=0)
    network.load_state_dict(train(p, epochs=15, limit=1200)[0])
    return network


@pytest.mark.parametrize("method", [None, "SD", "ARD", "RSLAD", "FD"])
def test_every_method_learns_and_leaves_its_teacher_alone(method, teacher):
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    _, history = train(small(**{"train.attack.eps": 0.05}), method, teacher if method else None, limit=1200)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.3, "well above chance after three epochs"
    assert same(before, teacher.state_dict()) and next(teacher.parameters()).requires_grad


class KilledError(Exception):
    pass


@contextmanager
def killed_in(number):
    """The training inside is killed in its epoch `number`, counted from 0."""
    learn, calls = training.Run.learn, iter(range(100))

    def dying(run, images):
        if next(calls) == number:
            raise KilledError
        return learn(run, images)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(training.Run, "learn", dying)
        yield


@pytest.mark.parametrize("stop", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, teacher, stop):
    place, undisturbed = tmp_path / "checkpoint", train(small(), "FD", teacher)
    assert not same(undisturbed[0], train(small(seed=1), "FD", teacher)[0]), "the seed decides"
    with killed_in(stop):
        train(small(), "FD", teacher, place)
    resumed = train(small(), "FD", teacher, place)
    assert same(undisturbed[0], resumed[0]) and undisturbed[1] == resumed[1]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-200], lambda b: b"x" * 1000])
def test_a_damaged_checkpoint_is_told_and_trained_anew(tmp_path, teacher, damage):
    place = tmp_path / "checkpoint"
    undisturbed, _ = train(small(), "SD", teacher, place, epochs=2)
    place.write_bytes(damage(place.read_bytes()))
    with pytest.warns(UserWarning, match="checkpoint is damaged .*; the training starts anew"):
        assert same(train(small(), "SD", teacher, place, epochs=2)[0], undisturbed)


@pytest.fixture
def unlucky(monkeypatch):
    """Every first draw of weights has all its ReLUs off."""
    build = models.build

    def dead(*arguments, **options):
        network = build(*arguments, **options)
        network[-3].bias.data.fill_(-1e3)
        return network

    monkeypatch.setattr(models, "build", dead)


def test_a_network_that_dies_in_the_ramp_starts_again(unlucky, teacher, tmp_path, capsys):
    p, place = small(**{"train.ramp_epochs": 2, "train.attack.eps": 0.05}), tmp_path / "checkpoint"
    weights, history = train(p, "FD", teacher, limit=1200)
    assert [row["epoch"] for row in history] == [1, 2, 3] and [row["redraws"] for row in history] == [1, 1, 1]
    assert history[-1]["accuracy"] > 0.3, "well above chance after three epochs"
    assert "once more from other weights" in capsys.readouterr().err
    with killed_in(3):  # in the second epoch of the second start
        train(p, "FD", teacher, place, limit=1200)
    resumed, again = train(p, "FD", teacher, place, limit=1200)
    assert same(weights, resumed) and again == history


@pytest.mark.parametrize("ramp", [0, 1])
def test_a_network_that_stays_dead_ends_its_training_all_the_same(unlucky, teacher, monkeypatch, ramp):
    monkeypatch.setattr(training, "initialise", lambda network, *_, **__: network)  # as dead as before
    _, history = train(small(**{"train.ramp_epochs": ramp}), "FD", teacher)
    assert len(history) == 3 and history[-1]["accuracy"] < 0.2
    assert history[-1].get("redraws") == (training.REDRAWS if ramp else None), "without a ramp nothing starts again"


def test_the_rate_follows_one_cosine(teacher):
    p = small(**{"train.patience": 50})
    rates = [row["learning_rate"] for row in train(p, "SD", teacher, epochs=8)[1]]
    low, high = float(p.train.SD.learning_rate_min), float(p.train.SD.learning_rate)
    assert rates == pytest.approx([low + (high - low) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])


def test_eps_and_step_are_ramped_from_zero(monkeypatch):
    p, seen, real = small(**{"train.ramp_epochs": 2}), [], training.ascend

    def spy(objective, x, eps, *, step_size, **rest):
        if len(x) != 100:  # those held out
            seen.append((eps, step_size))
        return real(objective, x, eps, step_size=step_size, **rest)

    monkeypatch.setattr(training, "ascend", spy)
    train(p)
    eps, step = float(p.train.attack.eps), float(p.train.attack.step_size)
    first, last = seen[: len(seen) * 2 // 3], seen[len(seen) * 2 // 3 :]
    assert first[0] == (0, 0) and all(a < b for a, b in zip(first, first[1:], strict=False))
    assert last == [(eps, step)] * len(last)
    assert all(s == pytest.approx(e * step / eps) for e, s in seen)


@pytest.mark.parametrize(("stopping", "epochs", "best"), [("validation", 5, 3), ("none", 6, 6)])
def test_early_stopping_keeps_the_best_epoch(teacher, monkeypatch, stopping, epochs, best):
    """Held-out accuracies are dictated: training stops `patience` epochs after their peak, or at the end, if asked."""
    p = small(**{"train.patience": 2, "train.ramp_epochs": 1, "train.early_stopping": stopping})
    script = [0.9, 0.5, 0.8, 0.7, 0.8, 0.6]  # the first epoch lies in the ramp and does not count
    snapshots, record, accuracy = [], training.Run.record, training.Run.accuracy

    def dictated(run, *arguments):
        snapshots.append({name: weight.clone() for name, weight in run.network.state_dict().items()})
        asked = iter([script[run.state.epoch]])
        monkeypatch.setattr(training.Run, "accuracy", lambda *rest: next(asked, None) or accuracy(*rest))
        record(run, *arguments)

    monkeypatch.setattr(training.Run, "record", dictated)
    found, history = train(p, "SD", teacher, epochs=6)
    assert [row["accuracy"] for row in history] == script[:epochs]
    assert same(found, snapshots[best - 1])


def test_a_loss_of_ones_own(teacher):
    """Swapping in a loss takes a Method and nothing else."""
    p, seen = small(), []

    def squared(student, teacher, x, x_adv, y, alpha, temperature):
        seen.append((alpha, temperature, float((x_adv - x).abs().max())))
        return ((student(x_adv).softmax(1) - teacher(x_adv).softmax(1)) ** 2).sum(1).mean()

    mine = Method(squared, losses.attack_difference, "squared differences")
    student = models.build(p.models.student, (1, 8, 8), seed=0)
    _, history = training.fit(student, teacher, data.training(p), data.validation(p), p.train.FD, p.train, method=mine)
    assert history[-1]["loss"] < history[0]["loss"]
    assert {s[:2] for s in seen} == {(p.train.FD.alpha, p.train.FD.temperature)}
    assert 0 < max(s[2] for s in seen) <= float(p.train.attack.eps) + 1e-6


def test_convolutions_are_attacked_on_blocks_and_end_where_they_would_without(monkeypatch):
    """The quick form of Table 4's first layer: the same function, so the same ascent, but for the last digits."""
    p = params.load("cifar10")
    nets = [models.build(a, (3, 32, 32), seed=0).double() for a in (p.models.student, p.models.teacher)]
    x, y = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6)
    middle = lambda lower, upper, generator: (lower + upper) / 2 + 1e-3  # noqa: E731
    monkeypatch.setattr("faithkd.core.attacks.random_start", middle)  # as numbers are drawn in another order
    attack, seen = losses.attack_difference, []

    def watched(student, teacher, z, label):
        seen.append(tuple(z.shape[1:]))
        return attack(student, teacher, z, label)

    run = training.Run(*nets, losses.METHODS["FD"], p.train.FD, p.train, None, 0)
    quick, plain = (run.perturbed(x, y, each, run.generator) for each in (attack, watched))
    assert seen == [(3, 32, 32)], "an attack of one's own sees images as they are"
    torch.testing.assert_close(quick, plain, rtol=0, atol=1e-9)
    assert float((quick - x).abs().max()) <= float(p.train.attack.eps) + 1e-9
