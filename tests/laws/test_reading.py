"""Modules of any kind are read as the functions that they are, and what cannot be read is an error that says where."""

import math
import resource
import time
import warnings
from fractions import Fraction

import pytest
import torch
from pairs import gap, points
from torch import nn
from torch.nn import functional as F

from faithkd.bounds import faithfulness_upper_bound, graph, linear
from faithkd.errors import FaithkdError


class Residual(nn.Module):
    """Constants, batch normalisation, leaky ReLU, a sum, tanh, a mean and a view, in a function of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.drop, self.last = nn.BatchNorm2d(3), nn.Dropout(), nn.Linear(12, 3)
        self.norm.running_mean.uniform_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        h = F.leaky_relu(self.norm(self.first((x - 0.1) / 0.5)), 0.1)
        h = torch.relu(self.second(h)) + h
        return self.last(self.drop(F.avg_pool2d(torch.tanh(h), 2).view(len(x), -1)))


def flat(*rest):
    """A classifier of three classes behind what goes before it."""
    return nn.Sequential(nn.Linear(16, 6), *rest, nn.Linear(6, 3))


def test_a_residual_network_is_its_function_and_its_bounds_hold():
    teacher, student = Residual(), nn.Sequential(nn.Flatten(), flat(nn.GELU()))
    x = torch.randn(2, 1, 4, 4)
    network = graph.prepare(teacher, (1, 4, 4))
    assert teacher.training and teacher.last.weight.dtype == torch.float32
    exact = teacher.eval().double(), student.double()
    torch.testing.assert_close(network(x.double()), exact[0](x.double()).detach(), rtol=0, atol=1e-12)
    for eps in (0.0, 0.2):
        before = torch.ones(2, dtype=torch.float64)
        for method in ("interval", "crown", "alpha-crown", "lp", "joint", "bab"):
            found = faithfulness_upper_bound(*exact, x, eps, method=method, nodes=12).values
            for n in range(2):
                assert gap(*exact, points(x[n : n + 1], eps)).max() <= found[n] + 1e-12
            assert (found <= before).all() or method == "joint"
            before = found


class Of(nn.Module):
    """A function of an image, with some layers of its own that it may call."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def normalised(layer):
    """The layer with running statistics as training leaves them."""
    torch.manual_seed(1)
    for part, low, high in ((layer.running_mean, -1, 1), (layer.running_var, 0.3, 3)):
        part.uniform_(low, high)
    return layer


IMAGE, LINE = (4, 6, 6), (4, 6)
LAYERS = [  # on an image of 4 x 6 x 6
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(4), nn.Hardtanh(-0.3, 0.4)),
    *(nn.ELU(), nn.SELU(), nn.CELU(2.0), nn.Sigmoid(), nn.Tanh(), nn.Softplus(2.0), nn.SiLU(), nn.Mish()),
    *(nn.GELU(), nn.GELU("tanh"), nn.Identity(), nn.Dropout(), nn.Dropout2d(), nn.Flatten(), nn.Flatten(2)),
    *(nn.Conv2d(4, 3, 3, padding="same", dilation=2), nn.Conv2d(4, 3, 2, padding="same"), nn.Conv2d(4, 2, 2, 2, 1)),
    *(nn.Conv2d(4, 4, (3, 1), groups=2, bias=False), nn.Conv2d(4, 2, 3, padding=2, padding_mode="reflect")),
    *(nn.Conv2d(4, 2, 3, padding=(1, 2), padding_mode="circular"), nn.Hardswish(), nn.Hardsigmoid(), nn.LogSigmoid()),
    *(nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), nn.ConvTranspose2d(4, 2, 2, groups=2), nn.AdaptiveMaxPool2d((4, 5))),
    *(nn.Conv2d(4, 2, 3, padding=1, padding_mode="replicate"), normalised(nn.BatchNorm2d(4))),
    *(normalised(nn.BatchNorm2d(4, affine=False)), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    *(nn.MaxPool2d(2, 1, dilation=2), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, True, False), nn.AdaptiveAvgPool2d(1)),
    *(nn.AdaptiveAvgPool2d((4, 5)), nn.AdaptiveMaxPool2d(3), nn.ZeroPad2d((1, 0, 2, 1)), nn.ConstantPad2d(1, 2.5)),
    *(nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.Unflatten(1, (2, 2)), nn.Linear(6, 2)),
]
LINES = [  # on a line of 4 x 6
    *(nn.Conv1d(4, 3, 3, 2, 1, 1), nn.Conv1d(4, 4, 2, groups=4, padding="same"), normalised(nn.BatchNorm1d(4))),
    *(nn.ConvTranspose1d(4, 3, 3, 2), nn.Conv1d(4, 3, 3, padding=2, padding_mode="circular")),
    *(nn.MaxPool1d(2), nn.AvgPool1d(3, 1, 1), nn.AdaptiveAvgPool1d(2), nn.AdaptiveMaxPool1d(3), nn.Linear(6, 5)),
]
FUNCTIONS = [  # of an image, by whatever means torch has
    lambda x: (1 - x) / torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1) * 2 - x,
    lambda x: -x[:, 1:, ::2, -3:],
    lambda x: x[:, [0, 2]].flip(2) + x[:, 1:2],
    lambda x: torch.cat([x, torch.ones_like(x), 2 * x], 1).chunk(2, 1)[1],
    lambda x: torch.stack([x[:, 0], x.mean(1)], 1).permute(0, 2, 3, 1),
    lambda x: x.permute(0, 2, 3, 1).reshape(len(x), -1).view(-1, 4, 36).transpose(1, 2),
    lambda x: x.flatten(1) @ torch.ones(144, 2, dtype=x.dtype) + 0.5,
    lambda x: x.clamp(min=-0.1) + x.clamp(-0.2, 0.3) + x.sum((2, 3), keepdim=True) + x.clamp(max=0.1),
    lambda x: F.pad(x, (1, 1, 2, 0), value=3.0).repeat(1, 2, 1, 1).squeeze(),
    lambda x: F.relu(x.add_(0.1).mul_(2), inplace=True),
    lambda x: F.interpolate(x, scale_factor=2).unsqueeze(1).expand(-1, 2, -1, -1, -1),
    lambda x: (x * x, x)[1],
]
EVERY = [(layer, IMAGE) for layer in LAYERS] + [(layer, LINE) for layer in LINES]
EVERY += [(Of(function), IMAGE) for function in FUNCTIONS]


def behind(layer, shape):
    """A network with this layer in it."""
    torch.manual_seed(0)
    after = layer.eval()(torch.zeros(2, *shape)).flatten(1)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(after.shape[1], 3)).double().eval()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("layer", "shape"), EVERY, ids=lambda part: str(part)[:40])
def test_every_operation_is_its_function_and_its_boxes_hold(layer, shape):
    network, x = behind(layer, shape), torch.randn(3, *shape, dtype=torch.float64)
    prepared = graph.prepare(network, shape)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), network(x.clone()), rtol=0, atol=1e-11)
        rough = prepared.single(x.float()).double()
    torch.testing.assert_close(rough, prepared(x), rtol=0, atol=1e-4)
    box = graph.outer_ball(x, 0.3)
    bounds, lines, _ = linear.crown(prepared, *box)
    rows, _ = linear.difference_rows(3)
    highest = linear.backward(prepared, lines, box, rows.expand(3, -1, -1))
    single = [line.rough() for line in lines], tuple(end.float() for end in box), rows.float().expand(3, -1, -1)
    rough = linear.backward(prepared.single, *single).double()
    torch.testing.assert_close(rough, highest, rtol=1e-3, atol=1e-3)
    for n in range(3):
        values = prepared.values(points(x[n : n + 1], 0.3, 60))
        for (low, high), value in zip(bounds, values, strict=True):
            assert (low[n] - 1e-10 <= value.amin(0)).all() and (value.amax(0) <= high[n] + 1e-10).all()
        assert ((values[-1] @ rows.T).amax(0) <= highest[n] + 1e-10).all()


class Graph(nn.Module):
    """Random operations, each on random earlier results of the same shape; all results are used in the end."""

    def __init__(self, seed, length=7):
        super().__init__()
        torch.manual_seed(seed)
        layers = [
            *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.PReLU(3), nn.Hardtanh(-0.5, 0.5), nn.ELU(), nn.SELU()),
            *(nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish()),
            *(nn.Hardswish(), nn.ConvTranspose2d(3, 3, 3, padding=1)),
            *(normalised(nn.BatchNorm2d(3)), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)),
            *(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
            *(nn.Linear(4, 4), Of(lambda x: x.flip(2) - x), Of(lambda x: x.mean(1, keepdim=True) + 0.5 * x)),
            *(Of(lambda x: torch.cat([x[:, 1:], x[:, :1]], 1)), Of(lambda x: (x - 0.2) / 0.5)),
        ]
        chosen = torch.randperm(len(layers))[:length].tolist()
        self.parts = nn.ModuleList(layers[number] for number in chosen)
        self.reads = torch.randint(0, 10**6, (length, 2)).tolist()
        self.last = nn.Linear(12 * 2, 3)

    def forward(self, x):
        found = [x.expand(-1, 3, -1, -1)]
        for part, (first, second) in zip(self.parts, self.reads, strict=True):
            z = found[max(0, len(found) - 1 - first % 2)]
            found.append(part(z) if second % 3 else part(z) + found[second % len(found)])
        pooled = F.adaptive_avg_pool2d(found[-1], 2), F.adaptive_max_pool2d(sum(found[1:]), 2)
        return self.last(torch.cat(pooled, 1).flatten(1))


def test_random_graphs_of_all_operators_are_sound():
    """At least 10^5 values, of every place and of the logits' differences, lie in their boxes and below their rows."""
    checks = 0
    for seed in range(24):
        network = Graph(seed).double().eval()
        prepared, x = graph.prepare(network, (1, 4, 4)), torch.randn(2, 1, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(prepared(x), network(x).detach(), rtol=1e-9, atol=1e-9)
        eps = (0.02, 0.1, 0.5)[seed % 3]
        box = graph.outer_ball(x, eps)
        bounds, lines, _ = linear.crown(prepared, *box)
        rows, _ = linear.difference_rows(3)
        highest = linear.backward(prepared, lines, box, rows.expand(2, -1, -1))
        for n in range(2):
            values = prepared.values(points(x[n : n + 1], eps, 40))
            for (low, high), value in zip([*bounds, (None, highest)], [*values, values[-1] @ rows.T], strict=True):
                room = 1e-10 * (1 + value.abs().amax())
                assert low is None or (value >= low[n] - room).all()
                assert (value <= high[n] + room).all()
                checks += value.numel() * (1 if low is None else 2)
    assert checks >= 100_000


def test_pairs_of_random_graphs_are_bounded_by_every_method():
    for seed, method in enumerate(("interval", "crown", "alpha-crown", "joint", "bab", "lp")):
        pair = Graph(seed, 4).double().eval(), Graph(seed + 100, 3).double().eval()
        x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
        found = faithfulness_upper_bound(*pair, x, 0.05, method=method, nodes=4).values
        assert gap(*pair, points(x, 0.05, 200)).max() <= found + 1e-12


def test_batch_normalisation_is_rounded_outwards():
    """In rational numbers, but for the root, which lies between two of them: numbers of all sizes cancel."""
    torch.manual_seed(0)
    for seed in range(30):
        layer = normalised(nn.BatchNorm1d(3)).double().eval()
        with torch.no_grad():
            layer.weight.mul_(10.0 ** (seed % 7 - 3)).add_(torch.rand(3))
            layer.running_mean.mul_(10.0 ** (seed % 5 * 3))
        z = layer.running_mean + torch.randn(1, 3, dtype=torch.float64) * 10.0 ** (seed % 4 - 3)
        operator = graph.prepare(nn.Sequential(layer), (3,)).nodes[0].operator
        low, high = operator.interval((z, z))
        row = torch.eye(3, dtype=torch.float64)[None]
        (form,), constant = operator.transpose(row, operator.relax((z, z)), None, (3,))
        for k in range(3):
            weight, mean, variance, bias, value, eps = (
                Fraction(part)
                for part in (
                    *(part[k].item() for part in (layer.weight, layer.running_mean, layer.running_var, layer.bias)),
                    *(z[0, k].item(), layer.eps),
                )
            )
            square, scale = variance + eps, 10**60
            root = Fraction(math.isqrt(square.numerator * scale**2 // square.denominator), scale)
            exact = [weight * (value - mean) / end + bias for end in (root, root + Fraction(1, scale))]
            assert Fraction(low[0, k].item()) <= min(exact) and max(exact) <= Fraction(high[0, k].item())
            total = Fraction(constant[0, k].item())
            total += sum(Fraction(a) * Fraction(b) for a, b in zip(form[0, k].tolist(), z[0].tolist(), strict=True))
            assert max(exact) <= total


def test_division_by_constants_is_rounded_outwards():
    torch.manual_seed(0)
    divisor = torch.tensor([3.0, 7e-9, 1.1e12, -0.3])
    operator = graph.prepare(Of(lambda x: x / divisor), (4,)).nodes[0].operator
    for _ in range(200):
        z = torch.randn(1, 4, dtype=torch.float64)
        low, high = operator.interval((z, z))
        (form,), constant = operator.transpose(torch.ones(1, 1, 4).double(), operator.relax((z, z)), None, (4,))
        exact = [Fraction(a) / Fraction(b) for a, b in zip(z[0].tolist(), divisor.tolist(), strict=True)]
        for k in range(4):
            assert Fraction(low[0, k].item()) <= exact[k] <= Fraction(high[0, k].item())
        found = sum(Fraction(a) * Fraction(b) for a, b in zip(form[0, 0].tolist(), z[0].tolist(), strict=True))
        assert sum(exact) <= found + Fraction(constant.item())


class Block(nn.Module):
    """Two convolutions and a short cut, all with batch normalisation."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(a, after, 3, s, 1, bias=False), nn.BatchNorm2d(after))
            for a, s in ((before, stride), (after, 1))
        )
        self.short = nn.Sequential()
        if before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        return F.relu(self.two(F.relu(self.one(x))) + self.short(x))


def resnet_2b(seed):
    """Of the size of VNN-COMP's ResNet-2b, 112,094 parameters, with He's weights and statistics of noise."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 16, 2), Block(16, 16, 1)),
        *(nn.Flatten(), nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10)),
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    for _ in range(40):
        network(torch.rand(32, 3, 32, 32))
    return network.eval()


def test_a_pair_the_size_of_resnet_2b_takes_seconds():
    """5 s an image on two cores are 10 s of computing; and not 2 GB."""
    pair, x, eps = (resnet_2b(0), resnet_2b(1)), torch.rand(1, 3, 32, 32), 2e-4
    assert sum(weight.numel() for weight in pair[0].parameters()) == 112_094
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others wait busily where the machine is
    most, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = faithfulness_upper_bound(*pair, x, eps, method="crown").values.item()
    spent = time.process_time() - begin
    torch.set_num_threads(threads)
    assert spent <= 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most <= 2e6
    with torch.no_grad():
        assert gap(*(network.double() for network in pair), points(x, eps, 20)).max() <= found < 1


def test_graphs_of_fx_and_of_torch_export_are_networks():
    """With a batch of any size, or of the one that the program was exported with."""
    network, x = Residual().double().eval(), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    free = nn.Sequential(nn.Flatten(), flat(nn.Tanh())).double()
    fixed = [torch.export.export(network, (x[:count],)) for count in (1, 2, 3)]
    moving = torch.export.export(free, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    fixed.append(fixed[1].run_decompositions())
    for program, real in [(torch.fx.symbolic_trace(free), free), (moving, free), *((part, network) for part in fixed)]:
        found = graph.prepare(program, (1, 4, 4))
        torch.testing.assert_close(found(x), real(x).detach(), rtol=0, atol=1e-12)


def test_a_module_that_is_used_twice_stands_twice():
    layer = nn.Linear(16, 16).double()
    network = Of(lambda x, layer, last: last(layer(torch.relu(layer(x.flatten(1))))), layer, flat()).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    prepared = graph.prepare(network, (1, 4, 4))
    assert len(prepared.nodes) == 6
    torch.testing.assert_close(prepared(x), network(x).detach(), rtol=0, atol=1e-12)


def test_a_softmax_at_the_end_is_taken_off_and_said():
    network = nn.Sequential(nn.Flatten(), flat(nn.Tanh())).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="teacher ends in a softmax"):
        found = graph.prepare(nn.Sequential(network, nn.Softmax(1)), (1, 4, 4), "teacher")
    torch.testing.assert_close(found(x), network(x).detach(), rtol=0, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the softmax of its logarithm is itself
        found = graph.prepare(nn.Sequential(network, nn.LogSoftmax(-1)), (1, 4, 4))
    torch.testing.assert_close(found(x), network(x).detach(), rtol=0, atol=1e-12)


def test_only_a_relu_is_split_and_all_that_is_made_of_it():
    for layer, count in ((nn.LeakyReLU(), 1), (nn.PReLU(), 1), (nn.ReLU6(), 2), (nn.Hardtanh(), 2), (nn.GELU(), 0)):
        assert len(graph.prepare(nn.Sequential(nn.Linear(3, 4), layer), (3,)).splits) == count


def hidden_change(x):
    """In place, in a part that another name has; where it matters, no random image shows it."""
    y = x * 2
    y[:, 0].clamp_(max=100)
    return y


def in_between(x):
    return x.softmax(1) * 2


REFUSED = [
    (nn.LayerNorm(6), r"layer 0 \(LayerNorm\): there is no bound for native_layer_norm"),
    (Of(lambda x: x.flatten(1).softmax(1) * 2), r"test_reading.py, line \d+.*there is no bound for _softmax"),
    (Of(lambda x: x - x.mean(0)), r"test_reading.py, line \d+.*mean mixes the images"),
    (Of(lambda x: x.transpose(0, 1).reshape(len(x), -1)), "mixes the images"),
    (Of(lambda x: x * x), r"only numbers can be multiplied"),
    (Of(hidden_change), r"line \d+: y\[:, 0\].clamp_.max=100.*values are changed in place that are used again"),
    (Of(lambda x: x if x.sum() > 0 else 2 * x), "sum mixes the images"),
    (Of(lambda x: x * torch.rand(6)), "draws at random"),
    (Of(lambda x: F.dropout(x)), "draws at random"),
    (Of(lambda x: x.argmax(1)), "makes numbers of type"),
    (Of(lambda x: (x, x)), "does not return one tensor"),
    (Of(lambda x, layer: layer(x), nn.Linear(5, 3)), r"layer 0.layers.0 \(Linear\).*does not fit images of shape"),
]


@pytest.mark.parametrize(("layer", "message"), REFUSED, ids=lambda part: str(part)[:30])
def test_what_cannot_be_read_says_where(layer, message):
    with pytest.raises(FaithkdError, match=message):
        graph.prepare(nn.Sequential(layer, nn.Flatten()) if message[0] != "d" else layer, IMAGE)


def test_compiled_networks_are_read_and_scripted_ones_refused():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    assert len(graph.prepare(torch.compile(network), (3,)).nodes) == 3
    with warnings.catch_warnings(action="ignore"):
        scripted = torch.jit.trace(network, torch.zeros(2, 3))
    with pytest.raises(FaithkdError, match="network cannot be traced: it is scripted"):
        graph.prepare(nn.Sequential(scripted), (3,))


def test_what_is_not_used_need_not_be_read():
    network = Of(lambda x, last: (x.flatten(1).softmax(1), last(x.flatten(1)))[1], flat()).double()
    assert len(graph.prepare(network, (1, 4, 4)).nodes) == 3
