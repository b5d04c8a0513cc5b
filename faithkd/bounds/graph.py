"""What the bounds are computed on: a float64 copy of a network as a list of operators, and the ball around each image.

Place 0 is the image, place k + 1 the output of node k; each node says which places it reads. A `torch.nn.Sequential` of
known layers is read layer by layer; of everything else `torch.export` makes a graph of operations (some seconds for
the first one). The two tables below are the only place that knows kinds of layers.
"""

import copy
import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from faithkd.bounds.operators import (
    Add,
    AvgPool2d,
    Conv2d,
    Linear,
    MaxPool2d,
    Operator,
    ReLU,
    Scale,
    Shape,
    SShaped,
    View,
)
from faithkd.errors import FaithkdError


@dataclass(frozen=True)
class Node:
    """An operator and the places that it reads."""

    operator: Operator
    inputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Network:
    """Nodes in an order in which each can be computed, and the shape of one image at every place, `(C,)` at the last."""

    nodes: tuple[Node, ...]
    shapes: tuple[Shape, ...]

    @property
    def classes(self) -> int:
        return self.shapes[-1][0]

    @functools.cached_property
    def splits(self) -> tuple[int, ...]:
        """The nodes at which a branch and bound can split."""
        return tuple(k for k, node in enumerate(self.nodes) if node.operator.splits)

    @functools.cached_property
    def single(self) -> "Network":
        """The same network in float32: twice as fast, for looking around, never for a bound."""
        return replace(self, nodes=tuple(Node(node.operator.rough(), node.inputs) for node in self.nodes))

    def place(self, k: int) -> int:
        """The place that node k reads first."""
        return self.nodes[k].inputs[0]

    def before(self, place: int) -> list[int]:
        """The nodes that a place depends on."""
        needed = {place}
        for k in reversed(range(place)):
            if k + 1 in needed:
                needed.update(self.nodes[k].inputs)
        return [k for k in range(place) if k + 1 in needed]

    def values(self, z: Tensor) -> list[Tensor]:
        """What stands at every place for a batch of images `(N, *shape)`."""
        found = [z]
        for node in self.nodes:
            found.append(node.operator(*(found[place] for place in node.inputs)))
        return found

    def __call__(self, z: Tensor) -> Tensor:
        """The logits `(N, C)`, as the bounds understand the network."""
        return self.values(z)[-1]


class Place(int):
    """A place in a graph that is being built, to be told from other numbers."""


class Builder:
    """Collects nodes; what does not fit is an error that says `where`."""

    def __init__(self, shape: Shape) -> None:
        self.nodes, self.shapes, self.where = [], [tuple(shape)], ""

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
        self.nodes.append(Node(operator, tuple(inputs)))
        self.shapes.append(after)
        return Place(len(self.nodes))

    def scale(self, z: Place, weight=1.0, bias=0.0, size=None) -> Place:
        """weight z + bias for numbers or tensors that are the same for all images of a batch."""
        shape, parts = self.shapes[z], []
        for part in (weight, bias, size):
            part = None if part is None else torch.as_tensor(part, dtype=torch.float64)
            if part is not None and part.ndim > len(shape):
                part = part.squeeze(0)
            if isinstance(weight, Place) or part is not None and torch.broadcast_shapes(part.shape, shape) != shape:
                raise FaithkdError(f"{self.where}: only numbers can be multiplied by, or added to, an image's values")
            parts.append(part)
        return self.add(Scale(*parts), z)

    def apply(self, name: str, after: Shape, *arguments, **options) -> Place:
        """The place of what an operation of OPERATIONS makes of its arguments, of the shape `after` for one image."""
        if name not in OPERATIONS:
            layers = ", ".join(layer.__name__ for layer in LAYERS)
            raise FaithkdError(
                f"{self.where}: there is no bound for {name}; known layers: {layers}; operations: {', '.join(OPERATIONS)}"
            )
        try:
            place = OPERATIONS[name](self, after, *arguments, **options)
        except TypeError as problem:
            raise FaithkdError(f"{self.where}: {name} with these arguments cannot be bounded ({problem})") from problem
        if self.shapes[place] != after:
            raise FaithkdError(f"{self.where}: {name} from {self.shapes[place]} to {after} cannot be bounded")
        return place


def simple(operator: type, builder: Builder, after: Shape, z: Place, *arguments, **options) -> Place:
    """An operator that takes what torch's operation takes behind its input."""
    return builder.add(operator(*arguments, **options), z)


def view(builder: Builder, after: Shape, z: Place, *_, **__) -> Place:
    return builder.add(View(after), z)


def same(builder: Builder, after: Shape, z: Place, *_, **__) -> Place:
    return z


def add(builder: Builder, after: Shape, first, second, alpha=1) -> Place:
    if isinstance(first, Place) and isinstance(second, Place):
        return builder.add(Add(), first, second if alpha == 1 else builder.scale(second, alpha))
    if isinstance(first, Place):
        return builder.scale(first, bias=second * alpha)
    return builder.scale(second, alpha, first)


def subtract(builder: Builder, after: Shape, first, second, alpha=1) -> Place:
    return add(builder, after, first, second, -alpha)


def multiply(builder: Builder, after: Shape, first, second) -> Place:
    return builder.scale(*((first, second) if isinstance(first, Place) else (second, first)))


def divide(builder: Builder, after: Shape, first, second) -> Place:
    return builder.scale(first, 1 / second)


def leaky_relu(builder: Builder, after: Shape, z: Place, slope: float = 0.01) -> Place:
    """slope z + (1 - slope) relu(z), which loses nothing: all bounds of ReLU are its own."""
    return add(builder, after, builder.scale(z, slope), builder.scale(builder.add(ReLU(), z), 1 - slope))


def batch_norm(builder, after, z: Place, weight, bias, mean, variance, training, momentum, eps, *_) -> Place:
    if training or mean is None:
        raise FaithkdError(f"{builder.where}: batch normalisation needs its running statistics")
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    weight = weight / (variance + eps).sqrt()
    parts = weight, bias - mean * weight, bias.abs() + (mean * weight).abs()
    return builder.scale(z, *(part.view(-1, *[1] * (len(after) - 1)) for part in parts))


def adaptive_avg_pool2d(builder: Builder, after: Shape, z: Place, size) -> Place:
    before = builder.shapes[z]
    if any(here % there for here, there in zip(before[1:], after[1:], strict=True)):
        raise FaithkdError(f"{builder.where}: adaptive pooling from {before} to {after} has windows of unequal size")
    return builder.add(AvgPool2d(tuple(here // there for here, there in zip(before[1:], after[1:], strict=True))), z)


def matmul(builder: Builder, after: Shape, z: Place, weight: Tensor) -> Place:
    return builder.add(Linear(weight.T), z)


OPERATIONS = {  # torch's operations by name
    "linear": partial(simple, Linear),
    "conv2d": partial(simple, Conv2d),
    "avg_pool2d": partial(simple, AvgPool2d),
    "max_pool2d": partial(simple, MaxPool2d),
    "relu": partial(simple, ReLU),
    "tanh": partial(simple, partial(SShaped, "tanh")),
    "sigmoid": partial(simple, partial(SShaped, "sigmoid")),
    "matmul": matmul,
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "batch_norm": batch_norm,
    "leaky_relu": leaky_relu,
    **{"add": add, "sub": subtract, "mul": multiply, "div": divide},
    **dict.fromkeys(("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"), view),
    **dict.fromkeys(("dropout", "alias", "clone", "contiguous", "detach"), same),
}
LAYERS = {  # layers that need no tracing: their operation, and which of their attributes it takes
    nn.Linear: ("linear", "weight bias"),
    nn.Conv2d: ("conv2d", "weight bias stride padding dilation groups"),
    nn.ReLU: ("relu", ""),
    nn.MaxPool2d: ("max_pool2d", "kernel_size stride padding dilation ceil_mode"),
    nn.AvgPool2d: ("avg_pool2d", "kernel_size stride padding ceil_mode count_include_pad divisor_override"),
    nn.BatchNorm1d: ("batch_norm", "weight bias running_mean running_var training momentum eps"),
    nn.BatchNorm2d: ("batch_norm", "weight bias running_mean running_var training momentum eps"),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.Tanh: ("tanh", ""),
    nn.Sigmoid: ("sigmoid", ""),
    nn.Flatten: ("flatten", ""),
    nn.Dropout: ("dropout", ""),
    nn.Identity: ("alias", ""),
}


def layers(module: nn.Module, position: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a (nested) `nn.Sequential` consists of, each part with its position such as `2.0`."""
    if type(module) is not nn.Sequential or hooked(module):
        yield position.removesuffix("."), module
        return
    # not .children(): that leaves out a module object that is used twice
    for key, part in module._modules.items():
        yield from layers(part, f"{position}{key}.")


def hooked(module: nn.Module) -> bool:
    """Whether something changes what the module's class computes: then its attributes are not all of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def plain(module: nn.Module) -> bool:
    """Whether LAYERS says all of this layer."""
    others = getattr(module, "padding_mode", "zeros") != "zeros" or getattr(module, "return_indices", False)
    return type(module) in LAYERS and not hooked(module) and not others


def prepare(network: nn.Module, shape: Shape, name: str = "network") -> Network:
    """The operators of `network` for images of `shape`, in float64 on the CPU; the original is left alone.

    Raises FaithkdError, with the layer's position, for anything that cannot be bounded.
    """
    check_weights(network, name)
    network = copy.deepcopy(network).to(device="cpu", dtype=torch.float64).eval().requires_grad_(False)
    parts = list(layers(network))
    builder = Builder(shape)
    with torch.no_grad():
        if all(plain(module) for _, module in parts):
            last = Place(0)
            for position, module in parts:
                builder.where = f"{name}, layer {position} ({module})"
                last = from_layer(builder, module, last)
        else:
            last = from_trace(builder, network, name)
    logits = builder.shapes[last]
    if len(logits) != 1 or logits[0] < 2:
        raise FaithkdError(
            f"{name} returns {('N', *logits)} for images of shape {tuple(shape)}; "
            "bounds need logits of shape (N, C) with C >= 2 classes"
        )
    return behind_pools(builder.nodes[:last], builder.shapes[: last + 1])


def from_layer(builder: Builder, module: nn.Module, z: Place) -> Place:
    """The place behind one layer of LAYERS."""
    operation, names = LAYERS[type(module)]
    shape = builder.shapes[z]
    try:
        after = tuple(module(torch.zeros(1, *shape, dtype=torch.float64)).shape)
    except (RuntimeError, ValueError) as problem:
        raise FaithkdError(f"{builder.where} does not fit an input of shape {shape}: {problem}") from problem
    if after[0] != 1:
        raise FaithkdError(f"{builder.where} mixes the images of a batch (start_dim must be 1)")
    return builder.apply(operation, after[1:], z, *(getattr(module, attribute) for attribute in names.split()))


def from_trace(builder: Builder, network: nn.Module, name: str) -> Place:
    """The place of the logits in the graph that `torch.export` makes of any module."""
    batch = torch.zeros(2, *builder.shapes[0], dtype=torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about parts of torch that this network happens to use
            program = torch.export.export(network, (batch,))
    except Exception as problem:  # whatever the network's own code raises
        text = str(problem).strip().partition("\n")[0]
        raise FaithkdError(f"{name} cannot be traced for images of shape {builder.shapes[0]}: {text}") from problem
    signature, found = program.graph_signature, {}
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored |= signature.inputs_to_lifted_tensor_constants
    tensors = {**program.constants, **program.state_dict}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = tensors[stored[node.name]] if node.name in stored else Place(0)
        elif node.op == "call_function" and node.users:
            arguments, options = torch.fx.map_arg((node.args, node.kwargs), found.__getitem__)
            if not any(isinstance(found[part], Place) for part in node.all_input_nodes):
                found[node] = node.target(*arguments, **options)  # of weights alone
                continue
            operation = getattr(node.target, "overloadpacket", node.target).__name__
            stack = list(node.meta.get("nn_module_stack", {}).values())
            builder.where = f"{name}, layer {stack[-1][0]}" if stack and stack[-1][0] else f"{name}, {operation}"
            after = getattr(node.meta["val"], "shape", (0,))
            if after[0] != 2:
                raise FaithkdError(f"{builder.where}: {operation} mixes the images of a batch")
            found[node] = builder.apply(operation.removesuffix("_"), tuple(after[1:]), *arguments, **options)
    (logits,) = program.graph.output_node().args[0] or (None,)
    if not isinstance(found.get(logits), Place):
        raise FaithkdError(f"{name} does not return one tensor of logits that depend on the image")
    return found[logits]


def behind_pools(nodes: list[Node], shapes: list[Shape]) -> Network:
    """The network with max-pools before ReLUs: max(relu(z)) = relu(max(z)), where fewer units are not settled."""
    nodes, shapes = list(nodes), list(shapes)
    readers = [place for node in nodes for place in node.inputs]
    for k in range(1, len(nodes)):
        first, second = nodes[k - 1], nodes[k]
        kinds = type(first.operator), type(second.operator)
        if kinds == (ReLU, MaxPool2d) and second.inputs == (k,) and readers.count(k) == 1:
            nodes[k - 1], nodes[k] = replace(second, inputs=first.inputs), replace(first, inputs=(k,))
            shapes[k] = shapes[k + 1]
    return Network(tuple(nodes), tuple(shapes))


def check_weights(network: nn.Module, name: str) -> None:
    """Refuse what is no network, and weights that are not finite real numbers."""
    if not isinstance(network, nn.Module):
        raise FaithkdError(f"{name} is a {type(network).__name__}; bounds need a torch.nn.Module that returns logits")
    for path, weight in (*network.named_parameters(), *network.named_buffers()):
        layer, _, kind = path.rpartition(".")
        where = f"{name}, layer {layer}: the {kind}"
        if isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            raise FaithkdError(f"{where} is of type {weight.dtype}, not a real floating-point number")
        if not torch.isfinite(weight).all():
            raise FaithkdError(f"{where} holds NaN or infinity; train or load the network again")


def prepare_pair(teacher: nn.Module, student: nn.Module, x: Tensor) -> tuple[Network, Network]:
    """Both networks checked for the images `x` `(N, *shape)` and against each other."""
    shape = tuple(x.shape[1:])
    both = prepare(teacher, shape, "teacher"), prepare(student, shape, "student")
    if both[0].classes != both[1].classes:
        raise FaithkdError(
            f"the teacher has {both[0].classes} classes and the student {both[1].classes}; they must agree"
        )
    return both


def check_images(x: Tensor) -> Tensor:
    """The images as float64 on the CPU, all finite, `(N, *shape)`."""
    if not isinstance(x, Tensor) or x.is_complex():
        raise FaithkdError(f"x must be a real torch.Tensor of shape (N, *image), not {type(x).__name__}")
    if x.ndim < 2:
        raise FaithkdError(f"x has shape {tuple(x.shape)}; give a batch (N, *image), for one image x[None]")
    x = x.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise FaithkdError(f"x holds NaN or infinity, first in image {bad}")
    return x


def outer_ball(x: Tensor, eps: float, clip: tuple | None = None) -> tuple[Tensor, Tensor]:
    """Ends of the ball B_eps(x) of Def. 2, each one ulp outwards: two tensors like `x`.

    `clip=(low, high)`, broadcastable to `x`, cuts the ball to the range of valid images. An image that leaves
    that range by no more than rounding keeps its own point; one that leaves it further is an error.
    """
    try:
        eps = float(eps)
    except (TypeError, ValueError) as problem:
        raise FaithkdError(f"eps must be one number, not {eps!r}") from problem
    if not 0 <= eps < math.inf:
        raise FaithkdError(f"eps must be a finite number >= 0, not {eps}")
    infinity = torch.full_like(x, math.inf)
    lower, upper = torch.nextafter(x - eps, -infinity), torch.nextafter(x + eps, infinity)
    if clip is None:
        return lower, upper
    try:
        low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device).broadcast_to(x.shape) for end in clip)
    except (RuntimeError, TypeError, ValueError) as problem:
        raise FaithkdError(f"clip must be (low, high), each broadcastable to x of shape {tuple(x.shape)}") from problem
    # images are made in float32, so their values may lie a few of its roundings outside the range
    room = 1e-5 * (1 + x.abs())
    if not ((low - room <= x) & (x <= high + room)).all():
        raise FaithkdError("x lies outside clip=(low, high), or clip holds NaN; are both in the networks' input space?")
    return torch.maximum(lower, torch.minimum(low, x)), torch.minimum(upper, torch.maximum(high, x))
