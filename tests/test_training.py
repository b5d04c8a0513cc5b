"""Training: what comes out is what the parameters say, killed runs go on bit for bit, the recipe is pinned."""

import pytest
import torch
from torch import nn

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
        data.training(p)[slice(0, limit)],
        data.validation(p),
        getattr(p.train, method or "RT"),
        schedule,
        method=losses.METHODS.get(method),
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
def test_every_method_learns(method, teacher):
    p = small(**{"train.attack.eps": 0.05})
    _, history = train(p, method, teacher if method else None, limit=1200)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.3, "well above chance after three epochs"


def test_the_seed_decides(teacher):
    runs = [train(small(seed=s), "FD", teacher)[0] for s in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_the_teacher_is_left_alone(teacher):
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    train(small(), "FD", teacher)
    assert same(before, teacher.state_dict()) and next(teacher.parameters()).requires_grad


class KilledError(Exception):
    pass


@pytest.fixture
def unlucky(monkeypatch):
    """Every first draw of weights has all its ReLUs off."""
    build = models.build

    def dead(*arguments, **options):
        network = build(*arguments, **options)
        network[-3].bias.data.fill_(-1e3)
        return network

    monkeypatch.setattr(models, "build", dead)


def test_a_network_that_dies_in_the_ramp_starts_again(unlucky, teacher, tmp_path, monkeypatch, capsys):
    p = small(**{"train.ramp_epochs": 2, "train.attack.eps": 0.05})
    weights, history = train(p, "FD", teacher, limit=1200)
    assert [row["epoch"] for row in history] == [1, 2, 3] and [row["redraws"] for row in history] == [1, 1, 1]
    assert history[-1]["accuracy"] > 0.3, "well above chance after three epochs"
    assert "once more from other weights" in capsys.readouterr().err

    place, epoch = tmp_path / "progress.safetensors", training._epoch
    calls = iter(range(10))

    def dying(*arguments):
        if next(calls) == 3:  # in the second epoch of the second start
            raise KilledError
        return epoch(*arguments)

    monkeypatch.setattr(training, "_epoch", dying)
    with pytest.raises(KilledError):
        train(p, "FD", teacher, place, limit=1200)
    monkeypatch.setattr(training, "_epoch", epoch)
    resumed, again = train(p, "FD", teacher, place, limit=1200)
    assert same(weights, resumed) and again == history


def test_a_network_that_stays_dead_ends_its_training_all_the_same(unlucky, teacher, monkeypatch):
    monkeypatch.setattr(training, "initialise", lambda network, *_, **__: network)  # as dead as before
    _, history = train(small(**{"train.ramp_epochs": 1}), "FD", teacher)
    assert len(history) == 3 and history[-1]["redraws"] == training.REDRAWS and history[-1]["accuracy"] < 0.2


def test_without_a_ramp_nothing_starts_again(unlucky, teacher):
    _, history = train(small(**{"train.ramp_epochs": 0}), "FD", teacher)
    assert len(history) == 3 and "redraws" not in history[-1] and history[-1]["accuracy"] < 0.2


@pytest.mark.parametrize("stop", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, teacher, monkeypatch, stop):
    p = small()
    undisturbed, history = train(p, "FD", teacher)
    place, epoch = tmp_path / "progress.safetensors", training._epoch

    def dying(*arguments):
        if arguments[6] == stop:
            raise KilledError
        return epoch(*arguments)

    monkeypatch.setattr(training, "_epoch", dying)
    with pytest.raises(KilledError):
        train(p, "FD", teacher, place)
    monkeypatch.setattr(training, "_epoch", epoch)
    resumed, resumed_history = train(p, "FD", teacher, place)
    assert same(undisturbed, resumed)
    assert history == resumed_history


def test_the_rate_follows_one_cosine(teacher):
    p = small(**{"train.patience": 50})
    rates = [row["learning_rate"] for row in train(p, "SD", teacher, epochs=8)[1]]
    low, high = float(p.train.SD.learning_rate_min), float(p.train.SD.learning_rate)
    expected = [low + (high - low) * (1 + torch.cos(torch.tensor(torch.pi * k / 8))) / 2 for k in range(8)]
    assert rates == pytest.approx([float(value) for value in expected], rel=1e-5)


def test_eps_and_step_are_ramped_from_zero(monkeypatch):
    p, seen = small(**{"train.ramp_epochs": 2}), []
    real = training.ascend

    def spy(objective, x, eps, *, step_size, **rest):
        seen.append((eps, step_size))
        return real(objective, x, eps, step_size=step_size, **rest)

    monkeypatch.setattr(training, "ascend", spy)
    monkeypatch.setattr(training, "_robust_accuracy", lambda *arguments: 0.0)
    train(p)
    eps, step = float(p.train.attack.eps), float(p.train.attack.step_size)
    first, last = seen[: len(seen) * 2 // 3], seen[len(seen) * 2 // 3 :]
    assert first[0] == (0, 0) and all(a < b for a, b in zip(first, first[1:], strict=False))
    assert last == [(eps, step)] * len(last)
    assert all(s == pytest.approx(e * step / eps) for e, s in seen)


def test_early_stopping_keeps_the_best_epoch(teacher, monkeypatch):
    """The held-out accuracy is dictated; training must stop `patience` epochs after its peak and return its weights."""
    p = small(**{"train.patience": 2, "train.ramp_epochs": 1})
    script = [0.9, 0.5, 0.8, 0.7, 0.8, 0.95]  # epoch 1 lies in the ramp and does not count; 3 is the best; stop after 5
    snapshots, record = [], training._record

    def dictated(state, network, held_out, *rest):
        wanted = script[state.epoch]
        labels = held_out.y.clone()
        predicted = network(held_out.x).argmax(1)
        right = int(round(wanted * len(labels)))
        labels[:right], labels[right:] = predicted[:right], (predicted[right:] + 1) % 10
        record(state, network, data.Split(held_out.x, labels, held_out.index), *rest)
        snapshots.append({name: weight.clone() for name, weight in network.state_dict().items()})

    monkeypatch.setattr(training, "_record", dictated)
    best, history = train(p, "SD", teacher, epochs=6)
    assert [row["accuracy"] for row in history] == pytest.approx(script[:5])
    assert same(best, snapshots[2])


def test_without_early_stopping_the_last_epoch_wins(teacher):
    p = small(**{"train.early_stopping": "none", "train.patience": 1})
    best, history = train(p, "SD", teacher, epochs=5)
    network = models.build(p.models.student, (1, 8, 8), seed=0)
    network.load_state_dict(best)
    held_out = data.validation(p)
    accuracy = float((network(held_out.x).argmax(1) == held_out.y).double().mean())
    assert len(history) == 5 and history[-1]["accuracy"] == accuracy


def test_a_loss_of_ones_own(teacher):
    """Swapping in a loss takes a Method and nothing else."""
    seen = []

    def squared(student, teacher, x, x_adv, y, alpha, temperature):
        seen.append((alpha, temperature, float((x_adv - x).abs().max())))
        return ((student(x_adv).softmax(1) - teacher(x_adv).softmax(1)) ** 2).sum(1).mean()

    mine, p = Method(squared, losses.attack_difference, "squared differences"), small()
    _, history = training.fit(
        models.build(p.models.student, (1, 8, 8), seed=0),
        teacher,
        data.training(p),
        data.validation(p),
        p.train.FD,
        p.train,
        method=mine,
    )
    assert history[-1]["loss"] < history[0]["loss"]
    assert {s[:2] for s in seen} == {(p.train.FD.alpha, p.train.FD.temperature)}
    assert 0 < max(s[2] for s in seen) <= float(p.train.attack.eps) + 1e-6


@pytest.mark.parametrize("method", ["ARD", "RSLAD", "FD"])
def test_convolutions_are_attacked_on_blocks_and_end_where_they_would_without(method, monkeypatch):
    """The quick form of Table 4's first layer: the same function, so the same ascent, but for the last digits."""
    p = params.load("cifar10")
    nets = [models.build(a, (3, 32, 32), seed=0).double() for a in (p.models.student, p.models.teacher)]
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6)
    for net in nets:
        blocks = models.to_blocks(x)
        assert torch.equal(models.from_blocks(blocks), x)
        torch.testing.assert_close(models.on_blocks(net, (3, 32, 32))(blocks), net(x), rtol=0, atol=1e-12)
    start = torch.rand(x.shape, dtype=torch.float64)

    def same_start(lower, upper, generator):
        share = start if lower.shape == x.shape else models.to_blocks(start)
        return lower + share * (upper - lower)

    monkeypatch.setattr("faithkd.core.attacks.random_start", same_start)
    attack, seen = losses.METHODS[method].attack, []

    def watched(student, teacher, z, label):
        seen.append(tuple(z.shape[1:]))
        return attack(student, teacher, z, label)

    arguments = (p.train.attack, 1.0, None, torch.Generator())
    quick = training._maximise(*nets, x, y, attack, *arguments)
    plain = training._maximise(*nets, x, y, watched, *arguments)
    assert seen == [(3, 32, 32)], "an attack of one's own sees images as they are"
    torch.testing.assert_close(quick, plain, rtol=0, atol=1e-9)
    assert float((quick - x).abs().max()) <= float(p.train.attack.eps) + 1e-9


def test_other_networks_are_attacked_as_they_are():
    layers = [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(3, 4, 3, stride=1), nn.Conv2d(3, 4, 2, stride=2)]
    layers += [nn.Conv2d(3, 4, 3, stride=2, dilation=2), nn.Flatten()]
    nets = [nn.Sequential(layer, nn.ReLU()) for layer in layers]
    assert all(models.on_blocks(net, (3, 32, 32)) is None for net in [*nets, nn.Linear(3, 2), nn.Sequential()])
    assert models.on_blocks(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2)), (3, 31, 32)) is None
