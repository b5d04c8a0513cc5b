"""From any module to operators: it runs once, and every tensor operation on what depends on the image is read.

What runs are torch's core operations, whatever forward calls: layers, functions, views, a graph of torch.fx or of
`torch.export`. OPERATIONS is the only place that knows their names. What was read is compared with the module before
it is used.
"""

import contextlib
import itertools
import linecache
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FrameType, MethodType

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import faithkd
from faithkd.arguments import as_module
from faithkd.bounds.layers import CURVES, AdaptiveMaxPool2d, Add, AvgPool2d, ConvTranspose2d, Pick, Scale, Sums
from faithkd.bounds.operators import Conv2d, Linear, MaxPool2d, Operator, ReLU, Shape, View, pair
from faithkd.errors import FaithkdError
from faithkd.frozen import Logits, Precision, draws, own_settings

LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, faithkd.__file__))  # not the caller's own code


class Place(int):
    """A place in a graph that is being built, to be told from other numbers."""


class Builder:
    """Collects nodes; what does not fit is an error that says `where`."""

    def __init__(self, shape: Shape, batch: int = 2) -> None:
        self.nodes, self.shapes, self.where, self.batch = [], [tuple(shape)], "", batch

    def add(self, operator: Operator, *inputs: int) -> Place:
        """The place of a new node's output."""
        shapes = [self.shapes[place] for place in inputs]
        try:
            operator.check(*shapes)
            after = tuple(operator(*(torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes)).shape[1:])
        except FaithkdError as problem:
            raise FaithkdError(f"{self.where}: {problem}") from None
        except RuntimeError as problem:
            raise FaithkdError(f"{self.where} does not fit an input of shape {shapes[0]}: {problem}") from problem
        if math.prod(after) == 0:
            raise FaithkdError(f"{self.where} leaves nothing of an input of shape {shapes[0]}")
        self.nodes.append((operator, inputs))
        self.shapes.append(after)
        return Place(len(self.nodes))

    def scale(self, z: Place, weight=1.0, bias=0.0, size=None) -> Place:
        """weight z + bias for numbers or tensors that are the same for all images of a batch."""
        shape, parts = self.shapes[z], []
        for part in (weight, bias, size):
            part = None if part is None else torch.as_tensor(part, dtype=torch.float64)
            if part is not None and part.ndim > len(shape) and (part == part[:1]).all():
                part = part[0]
            if isinstance(weight, Place) or part is not None and torch.broadcast_shapes(part.shape, shape) != shape:
                raise FaithkdError(f"{self.where}: only numbers can be multiplied by, or added to, an image's values")
            parts.append(part)
        return self.add(Scale(*parts), z)

    def apply(self, name: str, after: Shape | None, *arguments, **options) -> Place:
        """The place of what an operation of OPERATIONS makes of its arguments; the shape `after`, where it is known.

        A list of places where the operation returns a list.
        """
        if name not in OPERATIONS:
            advice = "README says what is known, CONTRIBUTING how to add a layer"
            raise FaithkdError(f"{self.where}: there is no bound for {name}; {advice}")
        try:
            place = OPERATIONS[name](self, after, *arguments, **options)
        except (TypeError, RuntimeError) as problem:
            raise FaithkdError(f"{self.where}: {name} with these arguments cannot be bounded ({problem})") from problem
        except FaithkdError as problem:
            told = str(problem).startswith(self.where)
            raise problem if told else FaithkdError(f"{self.where}: {problem}") from None
        if after is not None and self.shapes[place] != after:
            raise FaithkdError(f"{self.where}: {name} from {self.shapes[place]} to {after} cannot be bounded")
        return place


def simple(operator: type, builder: Builder, after: Shape, z: Place, *arguments, **options) -> Place:
    """An operator that takes what torch's operation takes behind its input."""
    return builder.add(operator(*arguments, **options), z)


def same(builder: Builder, after: Shape, z: Place, *_, **__) -> Place:
    return z


def view(builder: Builder, after: Shape | None, z: Place, *_, **__) -> Place:
    after = after or (math.prod(builder.shapes[z]),)  # by itself a flat vector
    return z if after == builder.shapes[z] else builder.add(View(after), z)


def moved(name: str, builder: Builder, after: Shape | None, *arguments, **options) -> Place | list[Place]:
    """What only moves numbers, of one place or several, and puts constants beside them: each of them gets a number, and
    where these are afterwards says it all.
    """
    starts, total = {}, 0
    for part in tree_leaves((arguments, options)):
        if isinstance(part, Place) and part not in starts:
            starts[part], total = total, total + math.prod(builder.shapes[part])

    def run(numbered: bool) -> list[Tensor]:
        def instead(part):
            if not isinstance(part, Place):
                return part
            start, shape = starts[part] + 1, builder.shapes[part]
            image = torch.arange(start, start + math.prod(shape), dtype=torch.float64).view(shape)
            return torch.stack([image + total * number for number in range(builder.batch)]) * numbered

        made = getattr(torch.ops.aten, name)(*tree_map(instead, arguments), **tree_map(instead, options))
        return [made] if isinstance(made, Tensor) else list(made)

    places = []
    for constant, mixed in zip(run(False), run(True), strict=True):
        first, *others = (mixed - constant).long()
        alike = all(torch.equal(first + total * n * (first > 0), other) for n, other in enumerate(others, 1))
        if not alike or len(others) + 1 != builder.batch or not (constant == constant[:1]).all():
            raise FaithkdError(f"{name} mixes the images of a batch")
        parts = []
        for place, start in starts.items():
            index = first - start - 1
            index = index.masked_fill((index < 0) | (index >= math.prod(builder.shapes[place])), -1)
            if (index >= 0).any():
                parts.append(builder.add(Pick(index), place))
        if not parts:
            raise FaithkdError(f"nothing that {name} returns depends on the image")
        sum_ = parts[0]
        for part in parts[1:]:
            sum_ = builder.add(Add(), sum_, part)
        places.append(builder.scale(sum_, bias=constant[0]) if constant.any() else sum_)
    return places if name in LISTS else places[0]


def expanded(builder: Builder, after: Shape | None, z: Place) -> Place:
    return z if after in (None, builder.shapes[z]) else moved("expand", builder, after, z, [builder.batch, *after])


def add(builder: Builder, after: Shape | None, first, second, alpha=1) -> Place:
    if isinstance(first, Place) and isinstance(second, Place):
        first, second = expanded(builder, after, first), expanded(builder, after, second)
        return builder.add(Add(), first, second if alpha == 1 else builder.scale(second, alpha))
    if isinstance(first, Place):
        return builder.scale(expanded(builder, after, first), bias=second * alpha)
    return builder.scale(expanded(builder, after, second), alpha, first)


def multiply(builder: Builder, after: Shape | None, first, second) -> Place:
    for z, gate in ((first, second), (second, first)):
        if isinstance(z, Place) and isinstance(gate, Place) and gate:
            operator, inputs = builder.nodes[gate - 1]
            if inputs == (z,) and getattr(operator, "function", None) is torch.sigmoid:
                return builder.add(CURVES["silu"](), z)  # as many write it
    z, weight = (first, second) if isinstance(first, Place) else (second, first)
    return builder.scale(expanded(builder, after, z), weight)


def divide(builder: Builder, after: Shape | None, first, second) -> Place:
    if isinstance(second, Place):
        raise FaithkdError("only numbers can divide an image's values")
    return builder.scale(expanded(builder, after, first), 1 / second)


def matmul(builder: Builder, after: Shape | None, z, weight, bias=None) -> Place:
    if isinstance(weight, Tensor) and weight.ndim == 3 and (weight == weight[:1]).all():
        weight = weight[0]  # the same for all images, as bmm has it
    if not isinstance(z, Place) or isinstance(weight, Place) or weight.ndim != 2:
        raise FaithkdError("only a matrix of numbers can be multiplied by, from the right")
    return builder.add(Linear(weight.T, bias), z)


def convolution(builder: Builder, after: Shape, z: Place, weight, bias, *settings) -> Place:
    """`settings`: stride, padding, dilation, whether it is transposed, padding of the output, groups."""
    flat, (stride, padding, dilation, transposed, output, groups) = weight.ndim == 3, settings
    if weight.ndim not in (3, 4):
        raise FaithkdError("of convolutions only those over one or two dimensions can be bounded")
    if flat:  # one row
        weight, z = weight.unsqueeze(2), builder.add(View((builder.shapes[z][0], 1, builder.shapes[z][1])), z)
        stride, padding, dilation, output = (1, *stride), (0, *padding), (1, *dilation), (0, *output)
    if transposed:
        made = builder.add(ConvTranspose2d(weight, bias, stride, padding, output, groups, dilation), z)
    else:
        made = builder.add(Conv2d(weight, bias, stride, padding, dilation, groups), z)
    return builder.add(View((builder.shapes[made][0], builder.shapes[made][2])), made) if flat else made


def batch_norm(builder: Builder, after: Shape, z: Place, weight, bias, mean, variance, *settings) -> Place:
    """weight (z - mean) / sqrt(variance + eps) + bias as one product and sum; `Scale` has room for its rounding."""
    training, _, eps, *_ = settings
    if training or mean is None:
        raise FaithkdError("batch normalisation needs its running statistics")
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    weight = weight / (variance + eps).sqrt()
    parts = weight, bias - mean * weight, bias.abs() + (mean * weight).abs()
    return builder.scale(z, *(part.view(-1, *[1] * (len(builder.shapes[z]) - 1)) for part in parts))


def leaky_relu(builder: Builder, after: Shape, z: Place, slope: float | Tensor = 0.01) -> Place:
    """slope z + (1 - slope) relu(z), which loses nothing: all bounds of ReLU are its own."""
    return add(builder, None, builder.scale(z, slope), builder.scale(builder.add(ReLU(), z), 1 - slope))


def clamp(builder: Builder, after: Shape, z: Place, low=None, high=None) -> Place:
    """low + relu(z - low), then high - relu(high - z): two ReLUs, each with its phases."""
    if low is not None:
        z = builder.add(ReLU(), builder.scale(z, bias=-low) if low else z)
        z = builder.scale(z, bias=low) if low else z
    if high is not None:
        z = builder.scale(builder.add(ReLU(), builder.scale(z, -1.0, high)), -1.0, high)
    return z


def mean(function, builder: Builder, after: Shape, z: Place, dims=None, keepdim=False, **_) -> Place:
    dims = sorted(dim % (len(builder.shapes[z]) + 1) for dim in dims or [0])
    if 0 in dims:
        raise FaithkdError(f"{function.__name__} mixes the images of a batch")
    terms = math.prod(builder.shapes[z][dim - 1] for dim in dims)
    return builder.add(Sums(partial(function, dim=dims, keepdim=keepdim), terms), z)


def adaptive_avg_pool2d(builder: Builder, after: Shape, z: Place, size) -> Place:
    pool = partial(nn.functional.adaptive_avg_pool2d, output_size=size)
    return builder.add(Sums(pool, math.prod(builder.shapes[z][1:])), z)


def adaptive_max_pool2d(builder: Builder, after: Shape, z: Place, size) -> Place:
    before = builder.shapes[z][1:]
    if any(here % there for here, there in zip(before, pair(size), strict=True)):
        return builder.add(AdaptiveMaxPool2d(size), z)
    return builder.add(MaxPool2d(tuple(here // there for here, there in zip(before, pair(size), strict=True))), z)


LISTS = ("split", "split_with_sizes", "unbind")
MOVES = (
    *("permute", "transpose", "slice", "select", "narrow", "index", "index_select", "flip", "roll", "expand", "repeat"),
    *("cat", "stack", "constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d"),
    *("replication_pad2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "upsample_nearest2d", *LISTS),
)
VIEWS = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
OPERATIONS = {  # torch's operations by name
    "linear": partial(simple, Linear),
    **dict.fromkeys(("matmul", "mm", "bmm"), matmul),
    "addmm": lambda builder, after, bias, z, weight: matmul(builder, after, z, weight, bias),
    "convolution": convolution,
    "native_batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": lambda *given: batch_norm(*given[:-2], False, *given[-2:]),
    "avg_pool2d": partial(simple, AvgPool2d),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), partial(simple, MaxPool2d)),
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), adaptive_avg_pool2d),
    "adaptive_max_pool2d": adaptive_max_pool2d,
    "mean": partial(mean, torch.mean),
    "sum": partial(mean, torch.sum),
    "relu": partial(simple, ReLU),
    **dict.fromkeys(("leaky_relu", "_prelu_kernel"), leaky_relu),
    "clamp": clamp,
    "clamp_min": clamp,
    "clamp_max": lambda builder, after, z, high: clamp(builder, after, z, None, high),
    "hardtanh": lambda builder, after, z, low=-1, high=1: clamp(builder, after, z, low, high),
    "relu6": lambda builder, after, z: clamp(builder, after, z, 0, 6),
    "hardsigmoid": lambda builder, after, z: builder.scale(clamp(builder, after, z, -3, 3), 1 / 6, 0.5),
    **{name: partial(simple, curve) for name, curve in CURVES.items()},
    "add": add,
    "sub": lambda builder, after, first, second, alpha=1: add(builder, after, first, second, -alpha),
    "rsub": lambda builder, after, first, second, alpha=1: add(builder, after, second, first, -alpha),
    "neg": lambda builder, after, z: builder.scale(z, -1.0),
    "mul": multiply,
    "div": divide,
    **{name: partial(moved, name) for name in MOVES},
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "_to_copy", "lift_fresh"), same),
}
SHAPES_ONLY = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}


UNSEEN = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage)  # by a Recorder


class Seen(TorchFunctionMode):
    """Refuses what a recorder would not see: the image's values as plain numbers, on which a forward may decide.

    Circular padding becomes parts of the image set beside each other: torch itself fills an empty tensor in place.
    """

    def __init__(self, recorder: "Recorder") -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in UNSEEN and id(arguments[0]) in self.recorder.known:
            raise FaithkdError(f"{self.recorder.position()}: what depends on the image is read as plain numbers")
        named = dict(zip(("input", "pad", "mode"), arguments, strict=False)) | (options or {})
        if function not in (nn.functional.pad, torch._C._nn.pad) or named.get("mode") != "circular":
            return function(*arguments, **(options or {}))
        image, ends = named["input"], list(named["pad"])
        for dim in range(len(ends) // 2):
            before, after = ends[2 * dim : 2 * dim + 2]
            size = image.shape[-1 - dim]
            image = image.index_select(-1 - dim, torch.arange(-before, size + after).remainder(size))
        return image


class Recorder(TorchDispatchMode):
    """Tells a builder what is done to all that depends on the image."""

    def __init__(self, builder: Builder, image: Tensor, position: Callable[[], str]) -> None:
        super().__init__()
        self.builder, self.position = builder, position
        # by id: the tensor, so that no other one gets its id, and its place, or the error of whoever needs it
        self.known: dict[int, tuple[Tensor, Place | FaithkdError]] = {id(image): (image, Place(0))}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch's compiler is imported, which takes seconds

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, name = options or {}, function.overloadpacket.__name__
        made = function(*arguments, **options)
        if draws(function):
            raise FaithkdError(f"{self.position()}: {name} draws at random, in evaluation too")
        given = [part for part in tree_leaves((arguments, options)) if id(part) in self.known]
        if not given or name in SHAPES_ONLY:
            return made
        self.builder.where = self.position()
        outputs = [part for part in tree_leaves(made) if isinstance(part, Tensor)]
        problems = [problem for part in given if isinstance(problem := self.known[id(part)][1], FaithkdError)]
        if problems and not outputs:
            raise problems[0]
        if function._schema.is_mutable:
            self.forget_views(options.get("out", arguments[0]))
        try:
            places = problems or self.places(name.removesuffix("_"), arguments, options, made, given)
        except FaithkdError as problem:
            places = [problem]
        unread = FaithkdError(f"{self.builder.where}: only the first output of {name} can be bounded")
        for part, place in itertools.zip_longest(outputs, places[: len(outputs)], fillvalue=unread):
            self.known[id(part)] = part, place
        return made

    def places(self, name: str, arguments: tuple, options: dict, made, given: list[Tensor]) -> list[Place]:
        """The places of an operation's outputs."""
        arguments, options = tree_map(lambda part: self.known.get(id(part), (0, part))[1], (arguments, options))
        if isinstance(made, list):
            return self.builder.apply(name, None, *arguments, **options)
        first, batch = made if isinstance(made, Tensor) else made[0], self.builder.batch
        size, *after = first.shape or (0,)
        if size % batch == 0 and (name in VIEWS or len(given[0]) != batch):
            # parts of an image that stand beside those of others, as a linear layer has them
            size, after = batch, after if size == batch else [size // batch, *after]
        if size != batch or first.dtype != torch.float64:
            what = "mixes the images of a batch" if size != batch else f"makes numbers of type {first.dtype}"
            raise FaithkdError(f"{self.builder.where}: {name} {what}")
        return [self.builder.apply(name, tuple(after), *arguments, **options)]

    def forget_views(self, changed: Tensor) -> None:
        """Of what an operation in place changes nothing is known any more where it has another name."""
        if id(changed) not in self.known:
            raise FaithkdError(f"{self.builder.where}: a constant is changed in place by what depends on the image")
        problem = FaithkdError(f"{self.builder.where}: values are changed in place that are used again elsewhere")
        for key, (part, _) in self.known.items():
            if part is not changed and part.untyped_storage().data_ptr() == changed.untyped_storage().data_ptr():
                self.known[key] = part, problem


def read(network, shape: Shape, name: str) -> tuple[list[tuple[Operator, tuple]], list[Shape]]:
    """The operators of a network for images of `shape`, each with the places that it reads, and all places' shapes.

    All in float64 on the CPU, as in evaluation; the network is left alone. `name`: for errors. A softmax at the end is
    taken off, with a warning: bounds are of the softmax of logits.
    """
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise FaithkdError(f"{name}: a forward hook on all modules is registered; remove it before asking for a bound")
    given = as_module(network)
    batch = getattr(given, "batch", None) or 2
    own, builder = in_float64(given, {}, name), Builder(shape, batch)
    network = Logits(own)
    images = torch.zeros(batch, *shape, dtype=torch.float64)
    paths = {id(module): path for path, module in own.named_modules()}

    def where(frames: Iterable[FrameType]) -> str:
        """Networks of files say it themselves."""
        return f"{name}, {own.where}" if getattr(own, "where", "") else position(frames, paths, name)

    recorder = Recorder(builder, images, lambda: where(frame for frame, _ in traceback.walk_stack(sys._getframe())))
    # torch's own warnings are about parts of it that this network happens to use
    with own_settings(), torch.no_grad(), Precision(torch.float64), warnings.catch_warnings(action="ignore"):
        try:
            with recorder, Seen(recorder):
                logits = network(images)
        except FaithkdError:
            raise
        except Exception as problem:  # whatever the network's own code raises
            frames = [frame for frame, _ in traceback.walk_tb(problem.__traceback__)]
            place, text = where(frames[::-1]), str(problem).strip().partition("\n")[0]
            hint = " (is nn.Flatten() missing before it?)" if place.endswith("(Linear)") else ""
            raise FaithkdError(
                f"{place}{hint} does not fit images of shape {shape}, or cannot be traced: {text}"
            ) from problem
        last = recorder.known.get(id(logits), (None, None))[1]
        if isinstance(last, FaithkdError):
            raise last
        if last is None:
            raise FaithkdError(f"{name} does not return one tensor of logits that depend on the image")
        compare(builder, last, network, name, getattr(given, "batch", None) is None)
    network.tell(name, given)
    return builder.nodes[:last], builder.shapes[: last + 1]


def in_float64(module: nn.Module, made: dict[int, nn.Module], name: str) -> nn.Module:
    """The module with all its tensors in float64 on the CPU, in evaluation; what else it has is shared with it."""

    def converted(value):
        if isinstance(value, nn.Module):
            return in_float64(value, made, name)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, converted(value.__self__))
        if not isinstance(value, Tensor):
            return value
        if type(value) not in (Tensor, nn.Parameter):
            raise FaithkdError(
                f"{name} cannot be traced: a {type(value).__name__} among its weights may compute anything"
            )
        value = value.detach().contiguous()
        return value.to("cpu", torch.float64 if value.is_floating_point() else None, copy=True)

    if isinstance(module, torch.jit.ScriptModule):
        raise FaithkdError(f"{name} cannot be traced: it is scripted; give the module that it was made from")
    module = getattr(module, "_orig_mod", module)  # of what torch.compile makes
    if id(module) not in made:
        made[id(module)] = copy = object.__new__(type(module))
        for attribute, value in vars(module).items():
            copy.__dict__[attribute] = tree_map(converted, value)
        copy.__dict__ |= {"training": False, "_compiled_call_impl": None}
    return made[id(module)]


def position(frames: Iterable[FrameType], paths: dict[int, str], name: str) -> str:
    """Which layer of a network computes in these frames, innermost first, and the line of its author's code."""
    layer = line = None
    for frame in itertools.takewhile(lambda frame: frame.f_code is not read.__code__, frames):
        module, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if not layer and paths.get(id(module)):
            layer = f", layer {paths[id(module)]} ({type(module).__name__})"
        if not line and not file.startswith(LIBRARIES):
            line = f" ({file}, line {frame.f_lineno}: {linecache.getline(file, frame.f_lineno).strip()})"
    return f"{name}{layer or ''}{line or ''}"


def compare(builder: Builder, last: Place, network: nn.Module, name: str, alone: bool) -> None:
    """Refuse operators that compute something else than their module, as where values depend on more than the image.

    `alone`: whether it is asked about one image by itself, too.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(builder.batch, *builder.shapes[0], dtype=torch.float64, generator=generator) * 2 - 1
    image[0] *= 100  # what is done to large values only is seen too

    def computed(image: Tensor) -> Tensor:
        values = [image]
        for operator, inputs in builder.nodes[:last]:
            values.append(operator(*(values[place] for place in inputs)))
        return values[-1]

    found, expected = computed(image), network(image.clone())
    with contextlib.suppress(Exception):  # some take several images only
        if alone and (one := network(image[:1].clone())).shape == found[:1].shape:
            found, expected = torch.cat([found, computed(image[:1])]), torch.cat([expected, one])
    beyond = ~found.isfinite() & ~expected.isfinite()  # where weights are so large, no order of sums is right
    if not (torch.isclose(found, expected, rtol=1e-9, atol=1e-9) | beyond).all():
        raise FaithkdError(
            f"{name}: what was read of it computes something else than it does; does its forward change values in "
            "place that it uses again, draw at random, or depend on anything but the image, as on how many there are?"
        )
