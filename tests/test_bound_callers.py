"""The bounds on whatever a caller brings: networks, images and processes of every kind. Truth is torch's in float64."""

import copy
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from pairs import chain_of_tiny_weights, fully_connected, gap, points
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from faithkd.bounds import domains, faithfulness_upper_bound, linear, reading
from faithkd.errors import FaithkdError

METHODS = ("interval", "crown", "alpha-crown", "lp", "milp", "joint", "bab", "best")


def bound(teacher, student, x, eps, method, **keywords):
    return faithfulness_upper_bound(teacher, student, x, eps, method=method, nodes=6, **{"jobs": 1} | keywords)


def pair():
    return fully_connected(3, 5, 3), fully_connected(3, 4, 3, seed=1)


def assert_right(teacher, student, x, eps=0.2, methods=METHODS):
    """Nothing in the ball above any bound; at eps = 0 the difference itself, of exactly these weights."""
    real = [copy.deepcopy(network).double() for network in (teacher, student)]
    x = x.detach()
    with torch.no_grad():
        for method in methods:
            found = bound(teacher, student, x, eps, method)
            for n in range(len(x)):
                assert gap(*real, points(x[n : n + 1], eps)).max() <= found.values[n] <= 1
            exact = bound(teacher, student, x, 0.0, method).values - gap(*real, x.double())
            assert (exact >= -1e-15).all() and (exact < 1e-9).all()


def test_weights_and_images_of_any_kind():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        teacher, student = (network.to(dtype) for network in pair())
        assert_right(teacher, student, torch.randn(2, 3).to(torch.float16), methods=("crown", "best"))
    teacher, student = pair()
    assert_right(teacher, student, torch.tensor([[0, 1, 2], [3, 1, 0]], dtype=torch.uint8), methods=("crown",))
    assert_right(nn.Sequential(), nn.Sequential(nn.ReLU()), torch.randn(2, 3), methods=("crown", "lp", "milp"))
    with torch.inference_mode():
        made_here, x = copy.deepcopy(teacher), torch.randn(1, 3)
        for method in METHODS:
            assert gap(teacher, student, x.double()) <= bound(made_here, student, x, 0.2, method).values


@pytest.mark.parametrize("eps", [0.2, 1e-9, 1e-15, 0.0])
@pytest.mark.parametrize("end", [0.1, 0.0999])
def test_witnesses_lie_in_ball_and_clip_in_exact_numbers(eps, end):
    """0.1 is no float32, and 0.0999 as float32 lies above it by rounding: there the ball comes before clip."""
    teacher, student = nn.Sequential(nn.Linear(1, 2)).double(), nn.Sequential(nn.Linear(1, 2)).double()
    with torch.no_grad():  # their difference is largest at the upper end of the ball, however far that is
        teacher[0].weight.copy_(torch.tensor([[1e3], [-1e3]]))
        teacher[0].bias.copy_(torch.tensor([-100.0, 100.0]))
        student[0].weight.zero_()
        student[0].bias.copy_(torch.tensor([-50.0, 50.0]))
    x, clip = torch.tensor([[0.0999], [0.05]]), (torch.tensor(-1.0), torch.tensor(end, dtype=torch.float64))
    found = bound(teacher, student, x, eps, "best", clip=clip)
    for image, witness in zip(x.flatten().tolist(), found.witnesses.flatten().tolist(), strict=True):
        assert abs(Fraction(witness) - Fraction(image)) <= Fraction(eps)
        assert Fraction(witness) <= Fraction(end) or Fraction(image) - Fraction(eps) > Fraction(end)
    with torch.no_grad():
        assert (found.lower - gap(teacher, student, found.witnesses)).abs().max() < 1e-12
    assert (found.lower <= found.values).all()


def test_a_layer_may_hold_anything_beside_its_weights():
    teacher, student = pair()
    teacher[0].lock = threading.Lock()  # can be neither copied nor sent to another process
    weight = teacher[2].weight.data
    del teacher[2].weight
    teacher[2].weight = weight  # no Parameter, and torch computes with it all the same
    x = torch.randn(4, 3, dtype=torch.float64)
    found = bound(teacher, student, x, 0.1, "crown")
    with torch.no_grad():
        assert all(
            gap(teacher, student, points(z[None], 0.1)).max() <= top for z, top in zip(x, found.values, strict=True)
        )


class Called(nn.Sequential):
    def __call__(self, z):
        return 2 * super().__call__(z)


class Forward(nn.Sequential):
    def forward(self, z):
        return 2 * super().forward(z)


class Layer(nn.Linear):
    def forward(self, z):
        return 2 * super().forward(z)


class Weight(torch.Tensor):
    pass


def twice(_, inputs, *output):
    return 2 * (output or inputs)[0]


def own_forward(network, layer):
    layer.forward = lambda z: nn.functional.linear(2 * z, layer.weight, layer.bias)


def weighs(change):
    """Another first weight, that is no plain tensor of numbers."""
    return lambda network, layer: setattr(layer, "weight", nn.Parameter(change(layer.weight.detach())))


# what makes a network compute something else than its plain layers would
READ = {
    "hook": lambda network, layer: layer.register_forward_hook(twice),
    "pre-hook": lambda network, layer: network.register_forward_pre_hook(twice),
    "weight norm": lambda network, layer: nn.utils.spectral_norm(layer),
    "parametrization": lambda network, layer: nn.utils.parametrizations.weight_norm(layer),
    "dropout": lambda network, layer: network.insert(1, nn.Dropout()).train(),
    "subclass of Linear": lambda network, layer: network.__setitem__(0, Layer(3, 4)),
    "forward": lambda network, layer: Forward(*network),
    "call": lambda network, layer: Called(*network),
    "own forward": own_forward,
}
REFUSED = {
    "meta": (lambda network, layer: network.to("meta"), "on the meta device"),
    "sparse": (weighs(torch.Tensor.to_sparse), "sparse"),
    "complex": (weighs(lambda weight: weight + 0j), "not a real"),
    "no weight": (lambda network, layer: delattr(layer, "weight"), "no attribute 'weight'"),
    "subclass of Tensor": (weighs(lambda weight: weight.as_subclass(Weight)), "cannot be traced"),
}


def changed(change):
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    made = change(network, network[0])
    return made if isinstance(made, Called | Forward) else network


@pytest.mark.parametrize("what", READ)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_is_what_it_computes(what):
    """Not what its layers would, were they plain: nothing is lost without a word."""
    network, good, x = changed(READ[what]), nn.Sequential(nn.Linear(3, 3)), torch.zeros(1, 3)
    for pair in ((network, good), (good, network)):
        at_x, around = (bound(*pair, x, eps, "crown").values for eps in (0.0, 0.1))
        with torch.no_grad():
            network.eval()
            assert (at_x - gap(*pair, x)).abs() < 1e-6
            assert gap(*pair, points(x, 0.1).float()).max() <= around + 1e-6


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused(what):
    change, message = REFUSED[what]
    network, good = changed(change), nn.Sequential(nn.Linear(3, 3))
    for teacher, student in ((network, good), (good, network)):
        with pytest.raises(FaithkdError, match=message):
            bound(teacher, student, torch.zeros(1, 3), 0.1, "crown")


class Twice(nn.Module):
    """Its sum reads what a ReLU in place has changed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, z):
        z = self.layer(z)
        return torch.relu_(z) + z


class Drawn(Twice):
    def forward(self, z):
        return nn.functional.dropout(self.layer(z))


def test_what_is_changed_in_place_is_read_as_changed():
    torch.manual_seed(0)
    network, good, x = Twice().double(), nn.Sequential(nn.Linear(3, 3)).double(), torch.randn(20, 3).double()
    with torch.no_grad():
        true = gap(network, good, x)
    found = bound(network, good, x, 0.0, "crown").values
    assert (true <= found).all() and (found - true).max() < 1e-9


class Deciding(Twice):
    """Its sign depends on the image's values, in a way that a trace of it may not see."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, z):
        return self.layer(z) * (-1 if np.max(self.how(z.abs())) > 300 else 1)


@pytest.mark.parametrize("how", [torch.Tensor.tolist, torch.Tensor.numpy, np.asarray, lambda z: z.max().item()])
def test_what_decides_by_plain_numbers_is_refused(how):
    with pytest.raises(FaithkdError, match="student"):
        bound(nn.Linear(3, 3), Deciding(how), torch.full((1, 3), 305.0), 1e-3, "crown")


def test_what_depends_on_the_number_of_images_is_refused():
    network = nn.Linear(3, 3)
    network.register_forward_hook(lambda _, inputs, z: z / len(z))
    with pytest.raises(FaithkdError, match="on how many there are"):
        bound(network, nn.Linear(3, 3), torch.rand(1, 3), 0.0, "crown")


def test_layouts_change_no_search():
    """Both halves of a split differ, whichever way an image's numbers and a convolution's weights lie in memory."""
    torch.manual_seed(0)
    pair = [nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)) for _ in range(2)]
    x = torch.randn(2, 2, 4, 4)
    wanted = faithfulness_upper_bound(*pair, x, 0.5, method="bab", nodes=60)
    pair = [network.to(memory_format=torch.channels_last) for network in pair]
    found = faithfulness_upper_bound(
        *pair, x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 0.5, method="bab", nodes=60
    )
    torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=1e-9)
    assert (wanted.values < wanted.rungs["joint"]).all()


def test_what_draws_at_random_is_refused():
    with pytest.raises(FaithkdError, match=r"teacher.*at random"):
        bound(Drawn(), nn.Sequential(nn.Linear(3, 3)), torch.rand(2, 3), 0.1, "crown")


def test_a_wrong_reading_is_noticed(monkeypatch):
    """Whatever may be read wrongly: the graph is compared with its module before it is used."""
    monkeypatch.setitem(reading.OPERATIONS, "relu", reading.same)
    network, good = Forward(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 3)), nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(FaithkdError, match=r"teacher: what was read of it"):
        bound(network, good, torch.rand(2, 3), 0.1, "crown")


def test_lower_ends_stay_below_where_logits_cancel():
    """Logits of 1e17 hold no digit of their differences: float64's values at a point may lie above the truth."""
    for seed in range(6):
        teacher, student = fully_connected(3, 4, 3, seed=seed), fully_connected(3, 4, 3, seed=seed + 9)
        with torch.no_grad():
            teacher[2].bias += 1e17
            student[2].bias -= 1e16
        found = bound(teacher, student, torch.randn(3, 3), 0.1, "best")
        assert (found.lower <= found.values).all() and (found.lower >= 0).all()
    teacher, student = fully_connected(1, 3, 2), nn.Sequential(nn.Linear(1, 2)).double()
    with torch.no_grad():  # of both the logits are 3 and 0 everywhere, for the teacher 1e17 + 3 - 1e17
        for layer in (teacher[0], teacher[2], student[0]):
            layer.weight.zero_()
            layer.bias.zero_()
        teacher[0].bias.fill_(1.0)
        teacher[2].weight[0] = torch.tensor([1e17, 3.0, -1e17])
        student[0].bias[0] = 3.0
    assert bound(teacher, student, torch.zeros(1, 1), 0.0, "best").lower == 0


@pytest.mark.parametrize("method", METHODS)
def test_underflow(method):
    teacher, student, truth = chain_of_tiny_weights()
    found = bound(teacher, student, torch.ones(1, 1), 0.1, method)
    assert truth <= found.values.item() <= 1 and (found.lower is None or found.lower <= found.values)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **keywords or {})
        if isinstance(made, torch.Tensor) and not made._is_view():  # an expanded one takes no memory
            self.numbers = max(self.numbers, made.untyped_storage().nbytes() // made.element_size())
        return made


def test_memory_grows_with_the_square_of_the_classes(monkeypatch):
    """All rows of 60 classes at once are 212,400 numbers; what must be there are the 3,600 differences, some times."""
    monkeypatch.setattr(linear, "BUDGET", 2**12)
    x = torch.randn(1, 4)
    with Largest() as largest:
        found = bound(fully_connected(4, 5, 60), fully_connected(4, 60, seed=1), x, 0.1, "crown")
    assert largest.numbers <= 16_000 and 0 < found.values.item() <= 1


def test_a_search_ends_where_its_memory_does(monkeypatch):
    """And what it found by then is a bound like any other."""
    monkeypatch.setattr(domains, "ROOM", 20_000)
    teacher, student = pair()
    x = torch.randn(2, 3, dtype=torch.float64)
    found = faithfulness_upper_bound(teacher, student, x, 0.8, method="bab", nodes=5000, tolerance=0.0)
    assert (found.nodes < 1000).all() and all(said.startswith("stopped at") for said in found.status)
    with torch.no_grad():
        assert all(gap(teacher, student, points(x[n : n + 1], 0.8)).max() <= found.values[n] for n in range(2))


def best_of_four():
    teacher, student = pair()
    x = torch.randn(4, 3, dtype=torch.float64)
    found = bound(teacher, student, x, 0.1, "best", jobs=2)
    with torch.no_grad():
        assert (gap(teacher, student, x) <= found.values).all() and (found.values <= 1).all()


SCRIPT = """
import multiprocessing, os, threading
from test_bound_callers import best_of_four

best_of_four()  # in two processes, without if __name__ == "__main__"
done = []
threads = [threading.Thread(target=lambda: done.append(best_of_four())) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(done) == 2
for daemon in (True, False):  # joblib's workers are still there, but not for a forked copy
    process = multiprocessing.get_context("fork").Process(target=best_of_four, daemon=daemon)
    process.start()
    process.join(120)
    assert process.exitcode == 0, process.exitcode
if not (child := os.fork()):
    best_of_four()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("all done")
"""


def test_best_in_scripts_threads_and_forks(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": ""}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "script.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.stdout.endswith("all done\n"), ran.stderr
