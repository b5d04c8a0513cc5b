"""Whatever a caller brings: a value that plain torch confirms in float64, or one clear error; and all is left alone."""

import warnings
from copy import deepcopy
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import fully_connected
from torch import nn
from torch.nn.utils import parametrizations, prune

import faithkd
from faithkd import blocks
from faithkd.core import attacks, evaluation
from faithkd.errors import FaithkdError

pytestmark = pytest.mark.usefixtures("brief_auto_attack")
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
QUICK = {"steps": 5, "restarts": 1}


def mlp(*widths, **options):
    return fully_connected(*widths, **options).float()


TEACHER, STUDENT, X, Y = mlp(4, 8, 3), mlp(4, 6, 3, seed=1), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


def gap(teacher, student, z):
    """The difference in confidence, by torch's own modules in float64."""
    teacher, student = (deepcopy(network).double().eval() for network in (teacher, student))
    with torch.no_grad():
        return (teacher(z.double()).softmax(1) - student(z.double()).softmax(1)).abs().amax(1)


def inside(z, x, eps, low=None, high=None):
    """Whether points lie in ball and clip, in exact arithmetic."""
    ends = [None if end is None else torch.as_tensor(end, dtype=DOUBLE).expand(x.shape) for end in (low, high)]
    for place, (a, b) in enumerate(zip(z.flatten().tolist(), x.flatten().tolist(), strict=True)):
        assert abs(Fraction(a) - Fraction(b)) <= Fraction(eps)
        assert ends[0] is None or a >= float(ends[0].flatten()[place])
        assert ends[1] is None or a <= float(ends[1].flatten()[place])
    return True


KINDS = [(HALF, HALF, HALF), (BRAIN, SINGLE, DOUBLE), (SINGLE, DOUBLE, BRAIN), (SINGLE, SINGLE, SINGLE)]


@pytest.mark.parametrize(("first", "second", "images"), KINDS)
def test_a_lower_bound_is_the_value_of_the_callers_weights_in_any_precision(first, second, images):
    teacher, student, x = deepcopy(TEACHER).to(first), deepcopy(STUDENT).to(second), X.to(images)
    with torch.no_grad():
        teacher[2].bias += 1000  # no confidence changes but by rounding
    for eps in (0.0, 0.1):
        found = faithkd.empirical_lower_bound(teacher, student, x, eps, **QUICK)
        wide = evaluation.strong_lower_bound(teacher, student, x, eps, classes=1, **QUICK)
        for bound in (found, wide):
            assert torch.allclose(bound.values, gap(teacher, student, bound.witnesses), rtol=0, atol=1e-12)
            assert inside(bound.witnesses, x, eps)
        upper = faithkd.faithfulness_upper_bound(teacher, student, x, eps)
        assert (found.values <= wide.values).all() and (wide.values <= upper.values).all()


@given(st.floats(-1e3, 1e3), st.floats(0, 10), st.floats(0, 1), st.sampled_from([SINGLE, DOUBLE]))
@settings(max_examples=150, deadline=None)
def test_corners_lie_in_the_exact_ball_and_in_clip(value, eps, share, kind):
    x = torch.tensor([[value]], dtype=kind)
    low, high = x.double() - share * eps, x.double() + (1 - share) * eps / 2
    for clip, ends in ((None, ()), ((low, high), (low, high))):
        lower, upper = attacks.ball(x, eps, clip)
        assert inside(lower, x, eps, *ends) and inside(upper, x, eps, *ends) and lower <= x <= upper


def test_an_image_beyond_clip_by_a_rounding_is_brought_back_as_far_as_the_ball_allows():
    x = torch.tensor([[0.1, 0.9]])  # 0.1 in float32 is above 0.1, and 0.9 below 0.9
    teacher, student = mlp(2, 4, 3), mlp(2, 4, 3, seed=1)
    for clip in ((0.0, torch.tensor([0.1, 0.9], dtype=DOUBLE)), (torch.tensor([[0.0, 0.2]]), np.array([0.1, 0.9]))):
        found = faithkd.empirical_lower_bound(teacher, student, x, 0.05, clip=clip, **QUICK)
        assert inside(found.witnesses, x, 0.05, *clip)
        assert torch.equal(faithkd.empirical_lower_bound(teacher, student, x, 0.0, clip=clip, **QUICK).witnesses, x)


CALLS = {
    "empirical_lower_bound": lambda t, s, x, y, *eps, **o: faithkd.empirical_lower_bound(t, s, x, *eps, **QUICK | o),
    "strong_lower_bound": lambda t, s, x, y, *eps, **o: evaluation.strong_lower_bound(t, s, x, *eps, **QUICK | o),
    "agreement": lambda t, s, x, y, *eps, **o: evaluation.agreement(t, s, x, *eps, **o),
    "robust": lambda t, s, x, y, *eps, **o: evaluation.robust(t, x, y, *eps, **o),
    "hardest": lambda t, s, x, y, *eps, **o: evaluation.hardest(t, x, y, *eps, **o),
    "auto_attack": lambda t, s, x, y, *eps, **o: evaluation.auto_attack(t, x, y, *eps, **o),
    "upper bound": lambda t, s, x, y, *eps, **o: faithkd.faithfulness_upper_bound(
        t, s, x, *eps, method="best", nodes=2, jobs=1, **o
    ),
}
PGD, LABELLED = {*CALLS} - {"auto_attack", "upper bound"}, {"robust", "hardest", "auto_attack"}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "upper bound"])
def test_clip_may_differ_from_image_to_image_and_from_chunk_to_chunk(monkeypatch, name):
    monkeypatch.setattr(attacks, "CHUNK", 2)
    high = X + torch.linspace(0, 0.1, 5)[:, None]
    found = CALLS[name](TEACHER, STUDENT, X, Y, 0.3, clip=(-10, high))
    assert inside(found if name == "hardest" else found.witnesses, X, 0.3, -10, high)


# Networks on images of 1 × 8 × 8 that begin with what PGD has a quicker form of, and do something else.
class Shifted(nn.Sequential):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.1)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(10 * x - 5)


class OwnInit(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Conv2d(1, width, 3, 2), nn.Flatten(), nn.Linear(9 * width, 2))


def plain(first=None):
    torch.manual_seed(0)
    return nn.Sequential(first or nn.Conv2d(1, 4, 3, 2), nn.Flatten(), nn.Linear(36, 2))


def changed(change):
    network = plain()
    change(network)
    return network


def patch(network):
    network.forward = lambda x: nn.Sequential.forward(network, 10 * x - 5)


def scaled_input(_, inputs):
    return (10 * inputs[0] - 5,)


LINEAR = {
    "plain": plain,
    "own forward": lambda: Shifted(*plain()),
    "own first layer": lambda: plain(OwnConv(1, 4, 3, 2)),
    "own __init__": lambda: OwnInit(4),
    "hook before": lambda: changed(lambda net: net.register_forward_pre_hook(scaled_input)),
    "hook before the first layer": lambda: changed(lambda net: net[0].register_forward_pre_hook(scaled_input)),
    "hook after": lambda: changed(lambda net: net.register_forward_hook(lambda *found: 3 * found[2].flip(1))),
    "forward replaced": lambda: changed(patch),
    "spectral norm": lambda: changed(lambda net: parametrizations.spectral_norm(net[0])),
    "pruned": lambda: changed(lambda net: prune.l1_unstructured(net[0], "weight", 0.5)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_attacked_is_the_callers_network(name):
    """Logits are affine in x: class 0 keeps its place in the ball if its lead is above ε times the ℓ1 norm of a."""
    network = LINEAR[name]().eval()
    x = torch.rand(12, 1, 8, 8)
    z = x.clone().requires_grad_(True)
    logits = network(z)
    y = logits.argmax(1)
    lead = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None]))[:, 0]
    steep = torch.autograd.grad(lead.sum(), z)[0].flatten(1).abs().sum(1)
    distance = (lead / steep).detach()
    eps = float(distance.median()) * 1.02
    wanted = distance > eps
    assert 0 < int(wanted.sum()) < 12
    assert torch.equal(evaluation.robust(network, x, y, eps).holds, wanted)
    assert torch.equal(evaluation.predictions(network, evaluation.hardest(network, x, y, eps)) == y, wanted)
    assert (blocks.on_blocks(network, (1, 8, 8)) is None) == (name != "plain")


class Block(nn.Module):
    """Batch norm, a residual, an activation, and logits by a view."""

    def __init__(self):
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.norm.running_mean += 0.3

    def forward(self, x):
        return self.after(x + nn.functional.gelu(self.norm(self.before(x)))).view(-1, 3)


class Functional(nn.Module):
    """Weights that are no parameters, as in functional training loops."""

    def __init__(self, network):
        super().__init__()
        self.inner = [network]
        self.own = {name: weight.detach() for name, weight in network.state_dict().items()}

    def forward(self, x):
        return torch.func.functional_call(self.inner[0], self.own, (x.float(),))


class Whole(nn.Module):
    """Adds what integers make of the image, here nothing."""

    def forward(self, x):
        return x + ((x * 0).to(torch.uint8).float() - 1) + 1


def exported(network):
    return torch.export.export(network, (X,), dynamic_shapes=({0: torch.export.Dim("images")},))


WRAPPED = {
    "functional": Functional,
    "traced by fx": torch.fx.symbolic_trace,
    "traced": lambda network: torch.jit.trace(network, X),
    "scripted": torch.jit.script,
    "an exported program": exported,
    "a module of one": lambda network: exported(network).module(),
    "exported for two images": lambda network: torch.export.export(network, (X[:2],)),
    "in single precision after whole numbers": lambda network: nn.Sequential(Whole(), network),
    "compiled inside": lambda network: nn.Sequential(torch.compile(network.train(), backend="eager")),
    "on several devices": nn.DataParallel,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_any_module_that_returns_logits_will_do(name):
    torch.manual_seed(0)
    network = Block().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = WRAPPED[name](network)
        found = faithkd.empirical_lower_bound(wrapped, STUDENT, X, 0.1, **QUICK)
        holds = evaluation.robust(wrapped, X, Y, 0.0).holds
    assert torch.allclose(found.values, gap(network, STUDENT, found.witnesses), rtol=0, atol=1e-12)
    assert torch.equal(found.values, faithkd.empirical_lower_bound(network, STUDENT, X, 0.1, **QUICK).values)
    assert torch.equal(holds, network(X).argmax(1) == Y)


def constant():
    network = nn.Sequential(nn.Flatten())
    network.register_forward_hook(lambda _, inputs, z: torch.ones_like(z))
    return network


def test_networks_without_weights_or_slopes_and_no_images_have_values():
    for network in (nn.Sequential(), nn.Sequential(nn.ReLU(inplace=True)), constant()):
        assert faithkd.empirical_lower_bound(network, network, X, 0.1, **QUICK).values.tolist() == [0] * 5
        assert evaluation.robust(network, X, Y, 0.0).holds.shape == (5,)
    bound = faithkd.empirical_lower_bound(TEACHER, STUDENT, X[:0], 0.1)
    assert bound.values.shape == (0,) and bound.witnesses.shape == (0, 4)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_the_callers_process_networks_and_images_are_left_alone(name, mode):
    teacher, student = nn.Sequential(nn.ReLU(inplace=True), *TEACHER), deepcopy(STUDENT)
    if name != "upper bound":  # which needs batch norm to be in evaluation mode
        teacher = nn.Sequential(nn.ReLU(inplace=True), Block(), nn.BatchNorm1d(3)).train()
    student[0].weight.requires_grad_(False)
    with mode():
        x, y = torch.randn(5, 4), Y.clone()
    if mode is torch.enable_grad:
        x.requires_grad_(True)

    def state():
        weights = [(w.requires_grad, w.grad, w.dtype) for n in (teacher, student) for w in n.parameters()]
        values = [value.tolist() for n in (teacher, student) for value in n.state_dict().values()]
        modes = [part.training for n in (teacher, student) for part in n.modules()]
        torch_wide = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        random = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
        return weights, values, modes, torch_wide, random, x.tolist(), x.grad, y.tolist(), torch.get_default_dtype()

    with mode():
        before = state()
        CALLS[name](teacher, student, x, y, 0.1)
        assert state() == before


class Drawn(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return nn.functional.dropout(super().forward(x))


class Beside(Drawn):
    def forward(self, x):
        return nn.functional.linear(x - x.mean(0), self.weight)


WRONG = [
    *(
        ({"eps": eps}, "eps must be")
        for eps in (-0.1, float("nan"), float("inf"), True, np.True_, b"1", "0.1", None, torch.ones(2), 1j)
    ),
    ({"x": X * float("nan")}, "x holds NaN or infinity, first in image 0"),
    ({"x": X[0]}, "give a batch"),
    ({"x": X.numpy()}, "x must be a real torch.Tensor"),
    ({"x": X.to_sparse()}, "x must be a dense tensor"),
    ({"x": torch.randn(5, 3)}, "teacher|network"),
    ({"clip": (0.0, 0.001)}, "x lies outside clip"),
    ({"clip": (float("nan"), 1)}, "clip holds NaN"),
    ({"clip": (9.0, -9.0)}, "low above high"),
    *(({"clip": clip}, "clip must be") for clip in ((-9.0, torch.ones(3)), 9.0, (0, 10**400))),
    *(({"teacher": kind()}, "at random|others of its batch|images of a batch") for kind in (Drawn, Beside)),
    ({"restart": 3}, "unknown keyword 'restart'"),
    *(({"seed": seed}, "seed must be") for seed in (1.5, -1, 2**64)),
    ({"teacher": mlp(4, 3).to("meta")}, "layer 0: the weight has no values"),
    ({"teacher": mlp(4, 2, 3, factor=float("nan"))}, "layer 0: the weight holds NaN"),
    ({"teacher": torch.relu}, "teacher|network"),
    ({"teacher": mlp(4, 1)}, "C >= 2 classes"),
    ({"student": mlp(4, 5, 7)}, "the teacher has 3 classes and the student 7"),
    *(({"y": y}, "y must") for y in (Y[:2], Y + 1, Y - 1, Y + 0.5, nn.functional.one_hot(Y, 3), None, "abcde")),
    *(({name: value}, f"{name} must be") for name in ("steps", "restarts") for value in (0, 1.5, True, "2", None)),
    *(({"y": y}, "y must") for y in (Y.to_sparse(), Y + 1j)),
    ({"version": "fast"}, "choose one of standard, plus"),
    ({"classes": 0}, "classes must be a whole number >= 1"),
]
ONLY = {"y": LABELLED, "student": set(CALLS) - LABELLED, "steps": PGD, "restarts": PGD}
ONLY |= {"version": {"auto_attack"}, "classes": {"strong_lower_bound"}, "restart": PGD}


@pytest.mark.parametrize("name", CALLS)
def test_every_function_refuses_the_same_in_the_same_words(name):
    for change, message in WRONG:
        (argument,) = change
        if name in ONLY.get(argument, CALLS):
            given = {"teacher": TEACHER, "student": STUDENT, "x": X, "y": Y, "eps": 0.1} | change
            first = [given.pop(key) for key in ("teacher", "student", "x", "y", "eps")]
            with pytest.raises(FaithkdError, match=message):
                CALLS[name](*first, **given)


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle a lock")


def test_networks_that_give_no_logits_are_told():
    column = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)))
    whole, norm = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    whole.register_forward_hook(lambda _, inputs, z: z.long())
    norm.forward = lambda z, forward=norm.forward: forward(z)
    cases = {Uncopied(4, 3): "pickle a lock", column: "returns .'N', 3, 1.", nn.LSTM(4, 3): "tuple"}
    for network, told in (cases | {whole: "torch.int64", norm: "replaced, and leads to a network in training"}).items():
        with pytest.raises(FaithkdError, match=told):
            evaluation.robust(network, X, Y, 0.1)


def test_numbers_labels_and_images_of_other_forms_are_taken():
    wanted = faithkd.empirical_lower_bound(TEACHER, STUDENT, X, 0.5, **QUICK)
    for eps in (Fraction(1, 2), np.float32(0.5), torch.tensor([0.5]), np.array(0.5)):
        assert torch.equal(faithkd.empirical_lower_bound(TEACHER, STUDENT, X, eps, **QUICK).values, wanted.values)
    for kind in (torch.uint8, torch.int64, torch.bool):
        x = torch.ones(2, 4).to(kind)
        found = faithkd.empirical_lower_bound(TEACHER, STUDENT, x, 0.0, **QUICK)
        assert torch.allclose(found.values, gap(TEACHER, STUDENT, x), rtol=0, atol=1e-12)
    backwards = np.ascontiguousarray(Y.numpy()[::-1])[::-1]
    for y in (Y.int(), Y.to(torch.uint8), Y.float(), Y.tolist(), Y.numpy(), backwards):
        assert torch.equal(evaluation.robust(TEACHER, X, y, 0.0).holds, TEACHER(X).argmax(1) == Y)


def test_what_hands_no_gradient_is_told():
    network = deepcopy(TEACHER)
    network.forward = torch.no_grad()(network.forward)
    with pytest.warns(UserWarning, match="student hands no gradient to its images"):
        faithkd.empirical_lower_bound(TEACHER, network, X, 0.1, **QUICK)


def test_auto_attack_takes_double_images_and_seeds_of_numpy():
    y = TEACHER(X).argmax(1)
    wanted = evaluation.auto_attack(TEACHER, X, y, 0.3, seed=3).holds
    assert torch.equal(evaluation.auto_attack(TEACHER, X.double(), y, 0.3, seed=np.int64(3)).holds, wanted)
    assert evaluation.robust(TEACHER, X, y, 0.3, seed=np.int64(3), **QUICK).holds.shape == (5,)


class Confident(nn.Module):
    """A network that returns its confidences, by a softmax of its own."""

    def __init__(self, network, softmax):
        super().__init__()
        self.inner, self.softmax = network, softmax

    def forward(self, x):
        return self.softmax(self.inner(x))


SOFTMAXES = [nn.Softmax(1), lambda z: z.softmax(-1), lambda z: nn.functional.softmax(z, 1), torch.nn.LogSoftmax(1)]


@pytest.mark.parametrize("softmax", SOFTMAXES, ids=["layer", "method", "function", "log"])
def test_a_last_softmax_is_taken_off_for_attacks_and_bounds_alike(softmax):
    for name in ("teacher", "student"):
        whole = Confident(TEACHER, softmax)
        teacher, student = (whole, STUDENT) if name == "teacher" else (STUDENT, whole)
        plain = [STUDENT if each is STUDENT else TEACHER for each in (teacher, student)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            lower = faithkd.empirical_lower_bound(teacher, student, X, 0.3, **QUICK)
            again = faithkd.empirical_lower_bound(teacher, student, X, 0.3, **QUICK)
            upper = faithkd.faithfulness_upper_bound(teacher, student, X, 0.3, method="joint")
        told = [str(each.message) for each in said]
        assert len(told) == (not isinstance(softmax, nn.LogSoftmax))  # once for all three
        assert all(each.startswith(f"{name} ends in a softmax; it is taken off") for each in told)
        expected = faithkd.empirical_lower_bound(*plain, X, 0.3, **QUICK)
        assert torch.equal(lower.values, expected.values) and torch.equal(lower.values, again.values)
        assert torch.allclose(lower.values, gap(TEACHER, STUDENT, lower.witnesses), rtol=0, atol=1e-12)
        assert (lower.values <= upper.values).all() and lower.values.max() > 0.1


def test_attacks_on_a_network_with_a_softmax_climb_its_logits():
    whole = Confident(TEACHER, nn.Softmax(1))
    with pytest.warns(UserWarning, match="network ends in a softmax"):
        found = evaluation.hardest(whole, X, Y, 0.3)
    assert torch.equal(found, evaluation.hardest(TEACHER, X, Y, 0.3))
