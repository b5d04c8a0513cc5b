"""ONNX files as torch modules: each operation becomes the torch function of the same meaning.

What depends on no image is computed by ONNX's own reference. Before a network is handed out, it is compared with
onnxruntime.
"""

import operator
import warnings
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.errors import FaithkdError
from faithkd.pairs.program import Name, Program, Step, first_line, resized

TOLERANCE = 1e-4  # of onnxruntime, which computes in float32
POINTS = 16  # at which both are compared


def sides(z: Tensor, kernel, strides, dilations, pads, auto_pad: str) -> tuple[list[int], list[int]]:
    """Padding before and after each dimension of an image."""
    if auto_pad in ("NOTSET", "VALID"):
        pads = pads or [0] * 2 * len(kernel)
        return list(pads[: len(kernel)]), list(pads[len(kernel) :])
    form = zip(z.shape[2:], kernel, strides, dilations, strict=True)
    totals = [max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0) for size, k, s, d in form]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def padded(z: Tensor, before: list[int], after: list[int], value: float = 0.0, mode: str = "constant") -> Tensor:
    """Padding before and after the last dimensions, which F.pad takes from the last one on."""
    widths = [width for both in reversed(list(zip(before, after, strict=True))) for width in both]
    return F.pad(z, widths, mode, value) if mode == "constant" else F.pad(z, widths, mode)


def conv(
    z, weight, bias=None, *, kernel_shape=(), strides=(), dilations=(), pads=(), group=1, auto_pad="NOTSET"
) -> Tensor:
    ones = [1] * (weight.ndim - 2)
    strides, dilations = list(strides) or ones, list(dilations) or ones
    before, after = sides(z, weight.shape[2:], strides, dilations, pads, auto_pad)
    if before != after:
        z, before = padded(z, before, after), [0] * len(ones)
    return getattr(F, f"conv{len(ones)}d")(z, weight, bias, strides, before, dilations, group)


def pool(
    kind, z, *, kernel_shape, strides=(), dilations=(), pads=(), ceil_mode=0, auto_pad="NOTSET", storage_order=0,
    count_include_pad=0,
) -> Tensor:  # fmt: skip
    ones = [1] * len(kernel_shape)
    strides, dilations, mean = list(strides) or ones, list(dilations) or ones, kind == "avg"
    before, after = sides(z, kernel_shape, strides, dilations, pads, auto_pad)
    if before != after:
        if mean and not count_include_pad:
            raise ValueError("padding that differs from side to side and is not counted has no equal in torch")
        z, before = padded(z, before, after, 0.0 if mean else -torch.inf), [0] * len(ones)
    function = getattr(F, f"{kind}_pool{len(ones)}d")
    if not mean:
        return function(z, kernel_shape, strides, before, dilations, bool(ceil_mode))
    if dilations != ones:
        raise ValueError(f"an average over windows with gaps (dilations={dilations}) has no equal in torch")
    return function(z, kernel_shape, strides, before, bool(ceil_mode), bool(count_include_pad))


def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0) -> Tensor:  # noqa: N803, ONNX's names
    if transA:
        raise ValueError("transA=1 mixes the images of a batch")
    weight = b if transB else b.T
    bias = None if c is None else torch.as_tensor(c).to(b).reshape(-1).expand(len(weight))
    return F.linear(a, weight if alpha == 1 else alpha * weight, bias if bias is None or beta == 1 else beta * bias)


def batch_norm(z, weight, bias, mean, variance, *, epsilon=1e-5, training_mode=0, **_) -> Tensor:
    if training_mode:
        raise ValueError("it was exported in training mode; call .eval() before exporting")
    return F.batch_norm(z, mean, variance, weight, bias, False, 0.0, epsilon)


def subtract(a, b) -> Tensor:
    return a - b if isinstance(a, Tensor) else b * -1.0 + a


def matmul(a, b) -> Tensor:
    """a b; weights on the left, as of images that are columns, go to the right."""
    constant = isinstance(a, torch.nn.Parameter) and a.ndim == 2
    return (b.transpose(-1, -2) @ a.T).transpose(-1, -2) if constant else a @ b


def global_pool(kind, z) -> Tensor:
    if kind == "max":
        return getattr(F, f"max_pool{z.ndim - 2}d")(z, z.shape[2:])
    return getattr(F, f"adaptive_avg_pool{z.ndim - 2}d")(z, 1)


def mean(z, axes=None, *, keepdims=1, noop_with_empty_axes=0) -> Tensor:
    axes = sorted(int(axis) % z.ndim for axis in (range(z.ndim) if axes is None else axes))
    if axes == list(range(2, z.ndim)) and len(axes) == 2:
        pooled = global_pool("avg", z)
        return pooled if keepdims else pooled.flatten(1)
    return z.mean(axes, keepdim=bool(keepdims))


def flatten(z, *, axis=1) -> Tensor:
    if axis % z.ndim != 1:
        raise ValueError(f"axis={axis} flattens other dimensions than those of one image")
    return z.flatten(1)


def reshape(z, shape, *, allowzero=0, batch=None) -> Tensor:
    size = [z.shape[k] if part == 0 and not allowzero else int(part) for k, part in enumerate(shape)]
    return resized(z, size, batch)


def squeeze(z, axes=None) -> Tensor:
    places = range(1, z.ndim) if axes is None else [int(axis) % z.ndim for axis in axes]
    return z.reshape([size for k, size in enumerate(z.shape) if k not in places or size != 1])


def unsqueeze(z, axes) -> Tensor:
    for axis in sorted(int(axis) % (z.ndim + len(axes)) for axis in axes):
        z = z.unsqueeze(axis)
    return z


def slices(z, starts, ends, axes=None, steps=None) -> Tensor:
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = 1 if steps is None else int(steps[k])
        if step < 0:
            raise ValueError("backwards slices have no equal in torch")
        index = [slice(None)] * z.ndim
        index[k if axes is None else int(axes[k])] = slice(int(start), int(end), step)
        z = z[tuple(index)]
    return z


def split(z, split=None, *, axis=0, num_outputs=None) -> tuple[Tensor, ...]:
    size = -(-z.shape[axis] // num_outputs) if split is None else [int(part) for part in split]
    return torch.split(z, size, axis)


def gather(z, indices, *, axis=0) -> Tensor:
    if np.ndim(indices) == 0:
        return z.select(axis, int(indices))
    return z.index_select(axis, torch.as_tensor(np.asarray(indices).reshape(-1), device=z.device))


def pad(z, pads, value=0.0, axes=None, *, mode="constant") -> Tensor:
    count = len(pads) // 2
    places = range(z.ndim) if axes is None else [int(axis) % z.ndim for axis in axes]
    before, after = [0] * z.ndim, [0] * z.ndim
    for k, place in enumerate(places):
        before[place], after[place] = int(pads[k]), int(pads[k + count])
    first = next((k for k in range(z.ndim) if before[k] or after[k]), z.ndim - 1)
    return padded(z, before[first:], after[first:], value or 0.0, "replicate" if mode == "edge" else mode)


def clip(z, low=None, high=None, *, min=None, max=None) -> Tensor:  # noqa: A002, ONNX's names
    low, high = min if low is None else low, max if high is None else high
    return F.hardtanh(z, low, high) if None not in (low, high) else z.clamp(low, high)


OPERATIONS = {
    "Add": operator.add,
    "AveragePool": partial(pool, "avg"),
    "BatchNormalization": batch_norm,
    "Cast": lambda z, *, to, saturate=1: z,  # all is computed in one precision
    "Celu": lambda z, *, alpha=1.0: F.celu(z, alpha),
    "Clip": clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": conv,
    "Div": operator.truediv,
    "Dropout": lambda z, *_, **__: z,
    "Elu": lambda z, *, alpha=1.0: F.elu(z, alpha),
    "Flatten": flatten,
    "Gather": gather,
    "Gelu": lambda z, *, approximate="none": F.gelu(z, approximate=approximate),
    "Gemm": gemm,
    "GlobalAveragePool": partial(global_pool, "avg"),
    "GlobalMaxPool": partial(global_pool, "max"),
    "HardSwish": F.hardswish,
    "Identity": lambda z: z,
    "LeakyRelu": lambda z, *, alpha=0.01: F.leaky_relu(z, alpha),
    "MatMul": matmul,
    "MaxPool": partial(pool, "max"),
    "Mish": F.mish,
    "Mul": operator.mul,
    "Neg": lambda z: z * -1.0,
    "PRelu": lambda z, slope: F.prelu(z, slope.reshape(-1)),
    "Pad": pad,
    "ReduceMean": mean,
    "Relu": F.relu,
    "Reshape": reshape,
    "Selu": lambda z, **_: F.selu(z),
    "Shape": lambda z, *, start=0, end=None: np.array(z.shape[start:end], dtype=np.int64),
    "Sigmoid": torch.sigmoid,
    "Slice": slices,
    "Softplus": lambda z: F.softplus(z),
    "Softsign": F.softsign,
    "Split": split,
    "Squeeze": squeeze,
    "Sub": subtract,
    "Sum": lambda *parts: reduce(torch.add, parts),
    "Swish": lambda z, *, alpha=1.0: F.silu(z * alpha) / alpha,
    "Tanh": torch.tanh,
    "Transpose": lambda z, *, perm: z.permute(perm),
    "Unsqueeze": unsqueeze,
}


class Folded:
    """A node on what depends on no image but its size, as ONNX's own reference computes it."""

    def __init__(self, node, opsets) -> None:
        self.node, self.opsets = node, opsets

    def __call__(self, *arrays):
        from onnx import TypeProto, helper, reference

        given = {name: array for name, array in zip(self.node.input, arrays, strict=True) if name}
        graph = helper.make_graph(
            [self.node],
            "folded",
            [helper.make_value_info(name, TypeProto()) for name in given],
            [helper.make_value_info(name, TypeProto()) for name in self.node.output],
        )
        model = helper.make_model(graph, opset_imports=self.opsets)
        found = reference.ReferenceEvaluator(model).run(None, given)
        return found if len(found) > 1 else found[0]


def load_onnx(path: str | Path) -> Program:
    """A network g from an ONNX file, to be attacked and bounded like any torch module: x `(N, *shape)` to `(N, C)`.

    A last Softmax is taken off, with a warning: the bounds put one on themselves. What is returned agrees with
    onnxruntime to 1e-4 (of 1 + |g|) at random points. Raises FaithkdError for a file that is missing, damaged or cut, for
    several inputs or outputs, for sizes that are not fixed besides the batch, and for operations without an equal.
    """
    try:
        import onnxruntime  # noqa: F401, asked for now, used in the end
        from onnx import inliner
    except ModuleNotFoundError as missing:
        raise FaithkdError(f"{missing.name} is not installed: pip install 'faithkd[onnx]' to read ONNX files") from None
    path = Path(path)
    model = inliner.inline_local_functions(parsed(path))
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [each for each in graph.input if each.name not in stored]
    if graph.sparse_initializer:
        raise FaithkdError(f"{path}: it has sparse weights; export it with dense ones")
    if len(inputs) != 1 or len(graph.output) != 1:
        names = [", ".join(each.name for each in ends) or "none" for ends in (inputs, graph.output)]
        raise FaithkdError(
            f"{path}: needed is one input, images, and one output, logits; its inputs are {names[0]}, "
            f"its outputs {names[1]}"
        )
    batch, *shape = fixed_shape(path, inputs[0])
    nodes, last, off = without_softmax(list(graph.node), graph.output[0].name)
    steps, weights = translated(path, model, nodes, inputs[0].name, batch)
    program = Program(tuple(shape), inputs[0].name, last, steps, weights).eval()
    compare(path, program, inputs[0], batch, off)
    if off:
        warnings.warn(f"{path}: its last {off} is taken off; bounded are the confidences, as ever", stacklevel=2)
    return program


def parsed(path: Path):
    """The model in a file, its weights from the files beside it."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FaithkdError(f"{path}: there is no such file")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except DecodeError:
        raise FaithkdError(f"{path}: this is no ONNX file, or it is cut or damaged; copy or export it again") from None
    except (onnx.checker.ValidationError, OSError, ValueError) as problem:
        text = first_line(problem)
        beside = (
            "; copy the file with its weights, .onnx.data, to the same folder" if "external" in text.lower() else ""
        )
        raise FaithkdError(f"{path}: {text or 'it is not valid'}{beside}") from problem
    return model


def fixed_shape(path: Path, value) -> list[int | None]:
    """The shape of the input; None first where any number of images may come."""
    form = value.type.tensor_type
    sizes = [part.dim_value if part.HasField("dim_value") else None for part in form.shape.dim]
    named = ", ".join(str(part.dim_value or part.dim_param or "?") for part in form.shape.dim)
    if len(sizes) < 2 or None in sizes[1:]:
        raise FaithkdError(
            f"{path}: its input {value.name!r} has shape ({named}); needed is (N, *image) with fixed sizes, besides N: "
            "export it again for images of one size"
        )
    return sizes


def without_softmax(nodes: list, last: str) -> tuple[list, str, str | None]:
    """The nodes without a softmax at the very end: nodes, the name of the logits, and what was taken off."""
    (end,) = [node for node in nodes if last in node.output] or (None,)
    if end is None or end.op_type not in ("Softmax", "LogSoftmax"):
        return nodes, last, None
    return [node for node in nodes if node is not end], end.input[0], end.op_type


def translated(path: Path, model, nodes: list, first: str, batch: int | None) -> tuple[list[Step], dict[str, Tensor]]:
    """Steps for the nodes that depend on the image, and the weights that they use."""
    from onnx import helper, numpy_helper

    fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer} | {"": None}
    sizes, steps, weights, made = set(), [], {}, {}
    for node in nodes:
        where = f"{node.op_type} {node.name or node.output[0]}"
        options = {each.name: plain(helper.get_attribute_value(each)) for each in node.attribute}
        folded = Folded(node, model.opset_import)
        made.update(dict.fromkeys(node.output, node))
        if all(name in fixed for name in node.input):
            found = folded(*(fixed[name] for name in node.input))
            fixed.update(zip(node.output, found if len(node.output) > 1 else [found], strict=True))
            continue
        if node.op_type == "Shape" or all(name in fixed or name in sizes for name in node.input):
            sizes.update(node.output)
        function = folded if sizes.issuperset(node.output) and node.op_type != "Shape" else None
        inputs = [Name(name) if name not in fixed else fixed[name] for name in node.input]
        if function is None:
            if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATIONS:
                newer = "; export it with opset_version=20, which knows Gelu" if node.op_type == "Erf" else ""
                raise FaithkdError(
                    f"{path}: node {node.name or node.output[0]!r} is {node.op_type}, which cannot be read{newer}; known "
                    f"are {', '.join(OPERATIONS)}"
                )
            function, inputs = swish(node, made, inputs) or (OPERATIONS[node.op_type], inputs)
            for place, (name, value) in enumerate(zip(node.input, inputs, strict=False)):
                if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    inputs[place] = Name(name) if value.ndim else float(value)
                    weights |= {name: torch.from_numpy(value.copy())} if value.ndim else {}
            if node.op_type == "Reshape":
                options["batch"] = batch
        else:
            options = {}
        steps.append(Step(where, function, inputs, options, [name for name in node.output if name]))
    return steps, weights


def plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def swish(node, made: dict, inputs: list):
    """z sigmoid(z), in two nodes, as the one function that it is; otherwise None."""
    if node.op_type != "Mul":
        return None
    for z, gate in (node.input, reversed(node.input)):
        if gate in made and made[gate].op_type == "Sigmoid" and made[gate].input[0] == z:
            return F.silu, [Name(z)]
    return None


def compare(path: Path, program: Program, value, batch: int | None, off: str | None) -> None:
    """Refuse a program that computes something else than onnxruntime at random points."""
    import onnxruntime
    from onnx import helper

    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if dtype.kind != "f":
        raise FaithkdError(f"{path}: its input {value.name!r} is of type {dtype}; needed are floating-point images")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(-(-POINTS // (batch or 1)) * (batch or 1), *program.shape, generator=generator)
    x[::2] = x[::2].sigmoid()  # half of them in [0, 1]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        parts = [session.run(None, {value.name: part.numpy().astype(dtype)})[0] for part in x.split(batch or 1)]
    except Exception as problem:  # of its own kinds, which it does not export
        raise FaithkdError(f"{path}: onnxruntime cannot run it: {first_line(problem)}") from problem
    theirs = torch.from_numpy(np.concatenate(parts)).double()
    try:
        with torch.no_grad():
            ours = program(x.to(torch.from_numpy(np.zeros(0, dtype)).dtype)).double()
    except FaithkdError as problem:
        raise FaithkdError(f"{path}: {problem}") from problem
    ours = {"Softmax": torch.softmax, "LogSoftmax": torch.log_softmax, None: lambda z, _: z}[off](ours, -1)
    if ours.shape != theirs.shape or not ((ours - theirs).abs() <= TOLERANCE * (1 + theirs.abs())).all():
        worst = f"{(ours - theirs).abs().max():.2g}" if ours.shape == theirs.shape else f"{ours.shape}, {theirs.shape}"
        raise FaithkdError(
            f"{path}: what was read differs from what onnxruntime computes ({worst}), so it is not used; does it mix "
            "the images of a batch? Please report it, with the file"
        )
