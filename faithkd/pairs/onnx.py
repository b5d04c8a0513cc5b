"""ONNX files as torch modules: each operation becomes the torch function of the same meaning.

What depends on no image, or on nothing of it but its size, is left to ONNX's own reference. Before a network is handed
out it is compared with onnxruntime, so an operation here need not refuse what it would get wrong.
"""

import operator
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from faithkd.errors import FaithkdError
from faithkd.pairs.program import Name, Program, Step, first_line, resized, softmax

TOLERANCE = 1e-4  # of onnxruntime, which computes in float32
POINTS = 16  # at which both are compared


def pad(z, pads, value=0.0, axes=None, *, mode="constant") -> Tensor:
    axes, count = range(z.ndim) if axes is None else [int(axis) % z.ndim for axis in axes], len(pads) // 2
    widths = {axis: (int(pads[k]), int(pads[k + count])) for k, axis in enumerate(axes)}
    while len(widths) > 1 and widths.get(first := min(widths)) == (0, 0):
        del widths[first]
    widths = [part for axis in reversed(range(min(widths), z.ndim)) for part in widths.get(axis, (0, 0))]
    options = {"value": value or 0.0} if mode == "constant" else {}
    return F.pad(z, widths, "replicate" if mode == "edge" else mode, **options)


def around(z, kernel, strides, dilations, pads, auto_pad: str, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The image, and the padding that torch shall add: none where it differs from side to side, and is done here."""
    count = len(kernel)
    pads = list(pads) or [0] * 2 * count
    if auto_pad.startswith("SAME"):
        form = zip(z.shape[2:], kernel, strides, dilations, strict=True)
        total = [max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0) for size, k, s, d in form]
        half = [part // 2 for part in total]
        rest = [part - part // 2 for part in total]
        pads = half + rest if auto_pad == "SAME_UPPER" else rest + half
    if pads[:count] == pads[count:]:
        return z, pads[:count]
    return pad(z, pads, value, range(2, z.ndim)), [0] * count


def conv(z, weight, bias=None, *, kernel_shape=(), strides=(), dilations=(), pads=(), group=1, auto_pad=""):
    ones = [1] * (weight.ndim - 2)
    strides, dilations = list(strides) or ones, list(dilations) or ones
    z, padding = around(z, weight.shape[2:], strides, dilations, pads, auto_pad)
    return getattr(F, f"conv{len(ones)}d")(z, weight, bias, strides, padding, dilations, group)


def max_pool(z, *, kernel_shape, strides=(), dilations=(), pads=(), ceil_mode=0, auto_pad="", storage_order=0):
    ones = [1] * len(kernel_shape)
    strides, dilations = list(strides) or ones, list(dilations) or ones
    z, padding = around(z, kernel_shape, strides, dilations, pads, auto_pad, -torch.inf)
    return getattr(F, f"max_pool{len(ones)}d")(z, kernel_shape, strides, padding, dilations, bool(ceil_mode))


def avg_pool(z, *, kernel_shape, strides=(), dilations=(), pads=(), ceil_mode=0, auto_pad="", count_include_pad=0):
    ones = [1] * len(kernel_shape)
    strides = list(strides) or ones
    z, padding = around(z, kernel_shape, strides, ones, pads, auto_pad)
    return getattr(F, f"avg_pool{len(ones)}d")(
        z, kernel_shape, strides, padding, bool(ceil_mode), bool(count_include_pad)
    )


def global_avg_pool(z) -> Tensor:
    return getattr(F, f"adaptive_avg_pool{z.ndim - 2}d")(z, 1)


def mean(z, axes, *, keepdims=1, noop_with_empty_axes=0) -> Tensor:
    axes = sorted(int(axis) % z.ndim for axis in axes)
    if axes != [2, 3]:
        return z.mean(axes, keepdim=bool(keepdims))
    return global_avg_pool(z) if keepdims else global_avg_pool(z).flatten(1)


def batch_norm(z, weight, bias, mean, variance, *, epsilon=1e-5, **_) -> Tensor:
    return F.batch_norm(z, mean, variance, weight, bias, False, 0.0, epsilon)


def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0) -> Tensor:  # noqa: N803, ONNX's names
    weight = b if transB else b.T
    bias = None if c is None else c.reshape(-1).expand(len(weight))
    return F.linear(a, weight if alpha == 1 else alpha * weight, bias if c is None or beta == 1 else beta * bias)


def matmul(a, b) -> Tensor:
    """a b; weights on the left, of images that are columns, go to the right."""
    return a @ b if a.ndim >= b.ndim else (b.transpose(-1, -2) @ a.T).transpose(-1, -2)


def reshape(z, shape, *, allowzero=0, batch=None) -> Tensor:
    return resized(z, [z.shape[k] if part == 0 else int(part) for k, part in enumerate(shape)], batch)


def unsqueeze(z, axes) -> Tensor:
    for axis in sorted(int(axis) % (z.ndim + len(axes)) for axis in axes):
        z = z.unsqueeze(axis)
    return z


def slices(z, starts, ends, axes=None, steps=None) -> Tensor:
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        index = [slice(None)] * z.ndim
        index[k if axes is None else int(axes[k])] = slice(int(start), int(end), 1 if steps is None else int(steps[k]))
        z = z[tuple(index)]
    return z


def split(z, split=None, *, axis=0, num_outputs=None) -> tuple[Tensor, ...]:
    return z.split(-(-z.shape[axis] // num_outputs) if split is None else [int(part) for part in split], axis)


def clip(z, low=None, high=None, *, min=None, max=None) -> Tensor:  # noqa: A002, ONNX's names
    low, high = min if low is None else low, max if high is None else high
    return z.clamp(low, high) if None in (low, high) else F.hardtanh(z, low, high)


OPERATIONS = {  # each takes ONNX's inputs, and its attributes by name, of all versions
    "Add": operator.add,
    "AveragePool": avg_pool,
    "BatchNormalization": batch_norm,
    "Cast": lambda z, *, to, saturate=1: z,  # all is computed in one precision
    "Clip": clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": conv,
    "Div": operator.truediv,
    "Dropout": lambda z, *_, **__: z,
    "Elu": lambda z, *, alpha=1.0: F.elu(z, alpha),
    "Flatten": lambda z, *, axis=1: z.flatten(1),
    "Gather": lambda z, place, *, axis=0: z.select(axis, int(place)),
    "Gelu": lambda z, *, approximate="none": F.gelu(z, approximate=approximate),
    "Gemm": gemm,
    "GlobalAveragePool": global_avg_pool,
    "Greater": torch.gt,
    "Identity": lambda z: z,
    "LeakyRelu": lambda z, *, alpha=0.01: F.leaky_relu(z, alpha),
    "LogSoftmax": lambda z, *, axis=-1: z.log_softmax(axis),
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mul": operator.mul,
    "Neg": lambda z: z * -1.0,
    "PRelu": lambda z, slope: F.prelu(z, slope.reshape(-1)),
    "Pad": pad,
    "ReduceMean": mean,
    "Relu": F.relu,
    "Reshape": reshape,
    "Shape": lambda z, *, start=0, end=None: np.array(z.shape[start:end]),
    "Sigmoid": torch.sigmoid,
    "Slice": slices,
    "Softmax": softmax,
    "Softplus": lambda z: F.softplus(z),
    "Split": split,
    "Squeeze": lambda z, axes: z.squeeze(tuple(int(axis) for axis in axes)),
    "Sub": lambda a, b: a + b * -1.0,
    "Sum": lambda *parts: reduce(torch.add, parts),
    "Tanh": torch.tanh,
    "Transpose": lambda z, *, perm: z.permute(perm),
    "Unsqueeze": unsqueeze,
    "Where": torch.where,
}


def load_onnx(path: str | Path) -> Program:
    """A network g from an ONNX file, to be attacked and bounded like any torch module: x `(N, *shape)` to `(N, C)`.

    A last Softmax is taken off, with a warning: f = softmax(g) is what bounds are about. What is returned agrees with
    onnxruntime to 1e-4 (of 1 + |g|) at random points. Raises FaithkdError for a file that is missing, damaged or cut,
    for several inputs or outputs, for sizes that are not fixed besides N, and for operations without an equal.
    """
    path = Path(path)
    if not path.is_file():
        raise FaithkdError(f"{path}: there is no such file")
    try:
        return read(path)
    except ModuleNotFoundError as missing:
        raise FaithkdError(f"{missing.name} is not installed: pip install 'faithkd[onnx]' to read ONNX files") from None
    except FaithkdError as problem:
        raise FaithkdError(f"{path}: {problem}") from problem


def read(path: Path) -> Program:
    model = parsed(path)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in stored]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        names = [", ".join(each.name for each in ends) or "none" for ends in (inputs, model.graph.output)]
        raise FaithkdError(f"needed is one input and one output, logits; it has inputs {names[0]}, outputs {names[1]}")
    form = inputs[0].type.tensor_type
    batch, *shape = [part.dim_value or None for part in form.shape.dim] or [None]
    if not shape or None in shape or form.elem_type not in (1, 11):  # float, double
        sizes = ", ".join(str(part.dim_value or part.dim_param or "?") for part in form.shape.dim)
        raise FaithkdError(
            f"its input {inputs[0].name!r} has shape ({sizes}), type {form.elem_type}; needed are (N, *image) in "
            "float32 or float64, of a fixed size but for N: export it again for images of one size"
        )
    steps, weights = translated(model, batch)
    program = Program(tuple(shape), inputs[0].name, model.graph.output[0].name, steps, weights).eval()
    count = -(-POINTS // (batch or 1)) * (batch or 1)
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    x[::2] = x[::2].sigmoid()  # half of them in [0, 1]
    compare(path, program, x.double() if form.elem_type == 11 else x, batch)
    return program.without_softmax(path)


def parsed(path: Path):
    """The model in a file, with weights from files beside it, and without functions of its own."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import inliner

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as problem:
        raise FaithkdError(
            f"this is no whole ONNX file ({first_line(problem)}); copy or export it again, with its .onnx.data if "
            "there is one"
        ) from problem
    return inliner.inline_local_functions(model)


def translated(model, batch: int | None) -> tuple[list[Step], dict[str, Tensor]]:
    """Steps for the nodes that depend on the image, and the weights that they use."""
    from onnx import helper, numpy_helper, reference

    opsets = {each.domain: each.version for each in model.opset_import}
    fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer} | {"": None}
    made, sizes, steps, weights = {}, set(), [], {}
    for node in model.graph.node:
        name = node.name or node.output[0]
        made.update(dict.fromkeys(node.output, node))
        inputs = [fixed[each] if each in fixed else Name(each) for each in node.input]
        if sizes.issuperset(each for each in inputs if isinstance(each, Name)):
            function, options = partial(folded, reference.ReferenceEvaluator, node, opsets), {}
            if not any(isinstance(each, Name) for each in inputs):
                results = function(*inputs)
                fixed.update(zip(node.output, results if len(node.output) > 1 else [results], strict=True))
                continue
        elif node.op_type not in OPERATIONS or node.domain not in ("", "ai.onnx"):
            newer = "; export it with opset_version=20, where GELU is one operation" if node.op_type == "Erf" else ""
            raise FaithkdError(
                f"node {name!r} is {node.op_type}, which cannot be read{newer}; known are {', '.join(OPERATIONS)}"
            )
        else:
            function = OPERATIONS[node.op_type]
            options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            options = {key: value.decode() if isinstance(value, bytes) else value for key, value in options.items()}
            options |= {"batch": batch} if node.op_type == "Reshape" else {}
            if (one := fused(node, made, fixed)) is not None:
                function, inputs = one[0], [Name(one[1])]
            for place, value in enumerate(inputs):
                if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    inputs[place] = Name(node.input[place]) if value.ndim else float(value)
                    weights |= {node.input[place]: torch.from_numpy(value.copy())} if value.ndim else {}
        if node.op_type == "Shape" or isinstance(function, partial):
            sizes.update(node.output)
        steps.append(Step(f"{node.op_type} {name}", function, inputs, options, [each for each in node.output if each]))
    return needed(steps, model.graph.output[0].name), weights


def folded(evaluator: type, node, opsets: dict, *values):
    """What a node makes of arrays."""
    given = {name: value for name, value in zip(node.input, values, strict=True) if name}
    found = evaluator(node, opsets=opsets).run(None, given)
    return found if len(found) > 1 else found[0]


def fused(node, made: dict, fixed: dict) -> tuple[Callable, str] | None:
    """The function, and the name of its input, of which exporters make several nodes that bounds know only as one."""

    def is_of(name: str, kind: str, z: str) -> bool:
        return name in made and made[name].op_type == kind and made[name].input[0] == z

    if node.op_type == "Mul":
        for z, gate in (node.input, node.input[::-1]):
            if is_of(gate, "Sigmoid", z):
                return F.silu, z
    if node.op_type == "Where" and is_of(node.input[2], "Softplus", node.input[1]):
        condition, z = node.input[:2]
        if is_of(condition, "Greater", z) and np.all(fixed.get(made[condition].input[1], 0) >= 20):
            return F.softplus, z  # there it is z but for 2e-9
    return None


def needed(steps: list[Step], last: str) -> list[Step]:
    """The steps that the result depends on."""
    names, kept = {last}, []
    for step in reversed(steps):
        if names.intersection(step.results):
            kept.append(step)
            names.update(part for part in step.inputs if isinstance(part, Name))
    return kept[::-1]


def compare(path: Path, network: torch.nn.Module, x: Tensor, batch: int | None) -> None:
    """Refuse a file of which onnxruntime, with as many images at once as the file takes, makes something else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        parts = [session.run(None, {name: part.numpy()})[0] for part in x.split(batch or 1)]
    except Exception as problem:  # of its own kinds
        raise FaithkdError(f"onnxruntime cannot run it: {first_line(problem)}") from problem
    theirs = torch.from_numpy(np.concatenate(parts))
    with torch.no_grad():
        ours = network(x)
    if ours.shape != theirs.shape or not ((ours - theirs).abs() <= TOLERANCE * (1 + theirs.abs())).all():
        raise FaithkdError(
            "what torch computes of it differs from what onnxruntime computes, so it is not used; does it mix the "
            "images of a batch, or was it exported in training mode?"
        )
