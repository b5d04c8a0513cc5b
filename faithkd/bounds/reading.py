"""From a torch module to operators: a `torch.nn.Sequential` of known layers is read layer by layer; of everything else
`torch.export` makes a graph of operations (some seconds for the first one).

The two tables are the only place that knows kinds of layers.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from faithkd.bounds.layers import Add, AvgPool2d, Scale, SShaped
from faithkd.bounds.operators import Conv2d, Linear, MaxPool2d, Operator, ReLU, Shape, View
from faithkd.errors import FaithkdError


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
        self.nodes.append((operator, inputs))
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

    def apply(self, name: str, after: Shape | None, *arguments, **options) -> Place:
        """The place of what an operation of OPERATIONS makes of its arguments; the shape `after`, where it is known."""
        if name not in OPERATIONS:
            layers = ", ".join(layer.__name__ for layer in LAYERS)
            raise FaithkdError(
                f"{self.where}: there is no bound for {name}; known are the layers {layers} and the operations "
                f"{', '.join(OPERATIONS)}"
            )
        try:
            place = OPERATIONS[name](self, after, *arguments, **options)
        except TypeError as problem:
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


def view(builder: Builder, after: Shape | None, z: Place, *dims, **__) -> Place:
    if after is None:
        batch, *after = torch.empty(1, *builder.shapes[z]).flatten(*dims).shape
        if batch != 1 or dims != (1, -1):
            raise FaithkdError(f"{builder.where} must have start_dim=1, end_dim=-1 (an image, nothing of the batch)")
    return builder.add(View(tuple(after)), z)


def same(builder: Builder, after: Shape, z: Place, *_, **__) -> Place:
    return z


def dropout(builder: Builder, after: Shape, z: Place, share: float = 0.5, training: bool = False) -> Place:
    if training and share:
        raise FaithkdError(f"{builder.where}: dropout draws at random here; pass training=self.training")
    return z


def add(builder: Builder, after: Shape, first, second, alpha=1) -> Place:
    if isinstance(first, Place) and isinstance(second, Place):
        return builder.add(Add(), first, second if alpha == 1 else builder.scale(second, alpha))
    if isinstance(first, Place):
        return builder.scale(first, bias=second * alpha)
    return builder.scale(second, alpha, first)


def multiply(builder: Builder, after: Shape, first, second) -> Place:
    return builder.scale(*((first, second) if isinstance(first, Place) else (second, first)))


def divide(builder: Builder, after: Shape, first, second) -> Place:
    if isinstance(second, Place):
        raise FaithkdError(f"{builder.where}: only numbers can divide an image's values")
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
    return builder.scale(z, *(part.view(-1, *[1] * (len(builder.shapes[z]) - 1)) for part in parts))


def adaptive_avg_pool2d(builder: Builder, after: Shape, z: Place, size) -> Place:
    before = builder.shapes[z]
    if any(here % there for here, there in zip(before[1:], after[1:], strict=True)):
        raise FaithkdError(f"{builder.where}: adaptive pooling from {before} to {after} has windows of unequal size")
    return builder.add(AvgPool2d(tuple(here // there for here, there in zip(before[1:], after[1:], strict=True))), z)


OPERATIONS = {  # torch's operations by name
    "linear": partial(simple, Linear),
    "conv2d": partial(simple, Conv2d),
    "avg_pool2d": partial(simple, AvgPool2d),
    "max_pool2d": partial(simple, MaxPool2d),
    "relu": partial(simple, ReLU),
    "tanh": partial(simple, partial(SShaped, "tanh")),
    "sigmoid": partial(simple, partial(SShaped, "sigmoid")),
    "matmul": lambda builder, after, z, weight: builder.add(Linear(weight.T), z),
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "batch_norm": batch_norm,
    "leaky_relu": leaky_relu,
    "add": add,
    "sub": lambda builder, after, first, second, alpha=1: add(builder, after, first, second, -alpha),
    "mul": multiply,
    "div": divide,
    **dict.fromkeys(("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"), view),
    "dropout": dropout,
    **dict.fromkeys(("alias", "clone", "contiguous", "detach"), same),
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
    nn.Flatten: ("flatten", "start_dim end_dim"),
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
    changed = any(part in vars(module) for part in ("forward", "_call_impl", "_conv_forward", "_wrapped_call_impl"))
    return changed or bool(module._forward_hooks or module._forward_pre_hooks)


def plain(module: nn.Module) -> bool:
    """Whether LAYERS says all of this layer."""
    others = getattr(module, "padding_mode", "zeros") != "zeros" or getattr(module, "return_indices", False)
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    usual = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)  # a subclass may compute anything
    return type(module) in LAYERS and not hooked(module) and not others and usual


def read(network: nn.Module, shape: Shape, name: str) -> tuple[list[tuple[Operator, tuple]], list[Shape]]:
    """The operators of a network for images of `shape`, each with the places that it reads, and all places' shapes.

    All in float64 on the CPU, as in evaluation; the network is left alone. `name`: for errors.
    """
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise FaithkdError(f"{name}: a forward hook on all modules is registered; remove it before asking for a bound")
    parts, builder, last = list(layers(network)), Builder(shape), Place(0)
    with torch.no_grad():
        if all(plain(module) for _, module in parts):
            for position, module in parts:
                builder.where = f"{name}, layer {position} ({module})"
                last = from_layer(builder, module, last)
        else:
            last = from_trace(builder, network, name)
    return builder.nodes[:last], builder.shapes[: last + 1]


def from_layer(builder: Builder, module: nn.Module, z: Place) -> Place:
    """The place behind one layer of LAYERS."""
    operation, names = LAYERS[type(module)]
    arguments = []
    for attribute in names.split():
        value = attribute != "training" and getattr(module, attribute, None)
        if attribute == "weight" and value is None and isinstance(module, nn.Linear | nn.Conv2d):
            raise FaithkdError(f"{builder.where}: it has no weight")
        tensor = isinstance(value, Tensor)
        arguments.append(value.detach().to(device="cpu", dtype=torch.float64, copy=True) if tensor else value)
    return builder.apply(operation, None, z, *arguments)


def from_trace(builder: Builder, network: nn.Module, name: str) -> Place:
    """The place of the logits in the graph that `torch.export` makes of any module."""
    batch = torch.zeros(2, *builder.shapes[0], dtype=torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about parts of torch that this network happens to use
            network = copy.deepcopy(network).to(device="cpu", dtype=torch.float64).eval().requires_grad_(False)
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
    compare(builder, found[logits], network, name)
    return found[logits]


def compare(builder: Builder, last: Place, network: nn.Module, name: str) -> None:
    """Refuse a graph that computes something else than its module, as where values are changed in place or drawn."""
    values = [
        torch.rand(2, *builder.shapes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ]
    expected = network(values[0].clone())
    for operator, inputs in builder.nodes[:last]:
        values.append(operator(*(values[place] for place in inputs)))
    if not torch.allclose(values[-1], expected, rtol=1e-9, atol=1e-9):
        raise FaithkdError(
            f"{name}: what torch.export reads of it computes something else than it does; does its forward change "
            "values in place that it uses again, draw at random, or depend on anything but the image?"
        )
