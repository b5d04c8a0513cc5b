"""ONNX files: each operation becomes the torch function of the same meaning, and that is read like any module.

What depends on no image is left to ONNX's own reference, and what older opsets say otherwise to ONNX's converter.
Before a network is handed out it is compared with onnxruntime, so an operation here need not refuse what it would get
wrong.
"""

import operator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faithkd.bounds.graph import Operators, prepare
from faithkd.errors import FaithkdError
from faithkd.pairs.problems import about

OPSET = 18  # older files are converted to it: from it on, numbers like axes are inputs
TOLERANCE = 1e-4  # of onnxruntime, which computes in float32
POINTS = 16  # at which both are compared


def pad(z, pads, value=0.0, axes=None, *, mode="constant") -> Tensor:
    axes, count = range(z.ndim) if axes is None else [int(axis) % z.ndim for axis in axes], len(pads) // 2
    widths = {axis: (int(pads[k]), int(pads[k + count])) for k, axis in enumerate(axes)}
    while len(widths) > 1 and widths.get(first := min(widths)) == (0, 0):
        del widths[first]
    widths = [part for axis in reversed(range(min(widths), z.ndim)) for part in widths.get(axis, (0, 0))]
    options = {"value": float(value or 0.0)} if mode == "constant" else {}
    return F.pad(z, widths, "replicate" if mode == "edge" else mode, **options)


def window(z, kernel, strides, dilations, pads, auto_pad="", value=0.0) -> tuple[Tensor, list, list, list]:
    """The image, and torch's stride, padding and dilation; padding that differs from side to side is done here."""
    count = len(kernel)
    strides, dilations = list(strides) or [1] * count, list(dilations) or [1] * count
    pads = list(pads) or [0] * 2 * count
    if auto_pad.startswith("SAME"):
        form = zip(z.shape[2:], kernel, strides, dilations, strict=True)
        total = [max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0) for size, k, s, d in form]
        half, rest = [part // 2 for part in total], [part - part // 2 for part in total]
        pads = half + rest if auto_pad == "SAME_UPPER" else rest + half
    if pads[:count] == pads[count:]:
        return z, strides, pads[:count], dilations
    return pad(z, pads, value, range(2, z.ndim)), strides, [0] * count, dilations


def conv(z, weight, bias=None, *, kernel_shape=(), strides=(), dilations=(), pads=(), group=1, auto_pad="") -> Tensor:
    z, strides, padding, dilations = window(z, weight.shape[2:], strides, dilations, pads, auto_pad)
    return torch.convolution(z, weight, bias, strides, padding, dilations, False, [0] * len(padding), group)


def max_pool(z, *, kernel_shape, strides=(), dilations=(), pads=(), ceil_mode=0, auto_pad="", storage_order=0):
    z, *form = window(z, kernel_shape, strides, dilations, pads, auto_pad, -torch.inf)
    return getattr(F, f"max_pool{len(kernel_shape)}d")(z, kernel_shape, *form, bool(ceil_mode))


def avg_pool(z, *, kernel_shape, strides=(), dilations=(), pads=(), ceil_mode=0, auto_pad="", count_include_pad=0):
    z, strides, padding, _ = window(z, kernel_shape, strides, (), pads, auto_pad)
    pool = getattr(F, f"avg_pool{len(kernel_shape)}d")
    return pool(z, kernel_shape, strides, padding, bool(ceil_mode), bool(count_include_pad))


def mean(z, axes=None, *, keepdims=1, noop_with_empty_axes=0) -> Tensor:
    return z.mean(None if axes is None else [int(axis) for axis in axes], keepdim=bool(keepdims))


def batch_norm(z, weight, bias, mean, variance, *, epsilon=1e-5, **_) -> Tensor:
    return F.batch_norm(z, mean, variance, weight, bias, False, 0.0, epsilon)


def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0) -> Tensor:  # noqa: N803, ONNX's names
    weight = alpha * (b if transB else b.T)
    return F.linear(a, weight, None if c is None else beta * c.reshape(-1).expand(len(weight)))


def matmul(a, b) -> Tensor:
    """a b; weights on the left, of images that are columns, go to the right."""
    return a @ b if a.ndim >= b.ndim else (b.transpose(-1, -2) @ a.T).transpose(-1, -2)


def reshape(z, shape, *, allowzero=0) -> Tensor:
    return z.reshape([z.shape[k] if part == 0 and not allowzero else int(part) for k, part in enumerate(shape)])


def gather(z, place, *, axis=0) -> Tensor:
    return z.index_select(axis, torch.tensor(place)) if place.ndim else z.select(axis, int(place))


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


def clip(z, low=None, high=None) -> Tensor:
    """Ends as far out as float32 goes are none."""
    most = float(np.finfo(np.float32).max)
    low, high = (None if end is None or abs(float(end)) >= most else float(end) for end in (low, high))
    return z if low is None and high is None else z.clamp(low, high)


@dataclass(frozen=True)
class Above:
    """z > number."""

    z: Tensor
    number: Tensor


def softplus(z) -> Tensor:
    found = F.softplus(z)
    found.of = z
    return found


def where(condition, z, other) -> Tensor:
    """What torch's exporter writes for softplus: z itself where it is above 20, where they differ by 2e-9."""
    threshold = condition.number if isinstance(condition, Above) and condition.z is z else -1
    if threshold < 20 or getattr(other, "of", None) is not z:
        raise FaithkdError("a Where is known only as part of a softplus")
    return other


OPERATIONS = {  # each takes ONNX's inputs, and its attributes by name
    "Add": operator.add,
    "AveragePool": avg_pool,
    "BatchNormalization": batch_norm,
    "Cast": lambda z, *, to, saturate=1, round_mode="": z,  # all is computed in one precision
    "Celu": lambda z, *, alpha=1.0: F.celu(z, alpha),
    "Clip": clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": conv,
    "Div": operator.truediv,
    "Dropout": lambda z, *_, **__: z,
    "Elu": lambda z, *, alpha=1.0: F.elu(z, alpha),
    "FastGelu": lambda z: F.gelu(z, approximate="tanh"),
    "Flatten": lambda z, *, axis=1: z.flatten(1),
    "Gather": gather,
    "Gelu": lambda z, *, approximate=b"none": F.gelu(z, approximate=approximate),
    "Gemm": gemm,
    "GlobalAveragePool": lambda z: z.mean(list(range(2, z.ndim)), keepdim=True),
    "GlobalMaxPool": lambda z: F.adaptive_max_pool2d(z, 1),
    "Greater": Above,
    "Identity": lambda z: z,
    "LeakyRelu": lambda z, *, alpha=0.01: F.leaky_relu(z, alpha),
    "LogSoftmax": lambda z, *, axis=-1: z.log_softmax(axis),
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mish": F.mish,
    "Mul": operator.mul,
    "Neg": operator.neg,
    "PRelu": lambda z, slope: F.prelu(z, slope.reshape(-1)),
    "Pad": pad,
    "ReduceMean": mean,
    "Relu": F.relu,
    "Reshape": reshape,
    "Selu": lambda z, *, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875: gamma * F.elu(z, alpha),
    "Sigmoid": torch.sigmoid,
    "Slice": slices,
    "Softmax": lambda z, *, axis=-1: z.softmax(axis),
    "Softplus": softplus,
    "Split": split,
    "Squeeze": lambda z, axes: z.squeeze(tuple(int(axis) for axis in axes)),
    "Sub": operator.sub,
    "Sum": lambda *parts: reduce(torch.add, parts),
    "Tanh": torch.tanh,
    "Transpose": lambda z, *, perm: z.permute(perm),
    "Unsqueeze": unsqueeze,
    "Where": where,
}


def load_onnx(path: str | Path) -> Operators:
    """A network g from an ONNX file, to be attacked and bounded like any torch module: x `(N, *shape)` to `(N, C)`.

    A last softmax is taken off, with a warning: f = softmax(g) is what bounds are about. What is returned agrees with
    onnxruntime to 1e-4 (of 1 + |g|) at random points. Raises FaithkdError for a file that is missing, damaged or cut,
    for several inputs or outputs, for sizes that are not fixed besides N, and for operations that cannot be bounded.
    """
    with about(path, "this is no whole ONNX file; copy or export it again, with its .onnx.data if there is one"):
        model = parsed(path)
        batch, shape, single = images(model)
        graph = Graph(model, batch)
        network = Operators(prepare(graph, shape, str(path)))
        count, generator = -(-POINTS // (batch or 1)) * (batch or 1), torch.Generator().manual_seed(0)
        x = torch.randn(count, *shape, generator=generator, dtype=torch.float32)
        x[::2] = x[::2].sigmoid()  # half of them in [0, 1]
        compare(path, graph, x if single else x.double(), batch)
        return network


def parsed(path: str | Path):
    """The model in a file, with weights from files beside it, of one of the later opsets and without own functions."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import inliner, version_converter

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError) as problem:
        raise ValueError(str(problem)) from problem
    model = inliner.inline_local_functions(model)
    old = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx") and each.version < OPSET]
    try:
        model = version_converter.convert_version(model, OPSET) if old else model
    except RuntimeError as problem:
        raise FaithkdError(
            f"it is of opset {old[0]}, which ONNX's own converter cannot bring to {OPSET}; export it again with "
            f"opset_version={OPSET} or later"
        ) from problem
    if not {"Erf", "Pow"} & {node.op_type for node in model.graph.node}:
        return model
    from onnxscript.rewriter import rewrite  # before opset 20, GELU was written as several operations
    from onnxscript.rewriter.ort_fusions import erfgelu, gelu

    return rewrite(model, pattern_rewrite_rules=[*gelu.gelu_rules, *erfgelu.rules])


def images(model) -> tuple[int | None, tuple, bool]:
    """Of a model's one input: how many images at once, None for any number, their shape, and whether in float32."""
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
    return batch, tuple(shape), form.elem_type == 1


class Graph(nn.Module):
    """What a model computes of `batch` images (None: any number), node by node; `where` says at which node.

    Arrays depend on no image, tensors do.
    """

    where = ""

    def __init__(self, model, batch: int | None) -> None:
        from onnx import numpy_helper

        super().__init__()
        self.graph, self.batch = model.graph, batch
        self.opsets = {each.domain: each.version for each in model.opset_import}
        self.fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for name, weight in self.fixed.items():
            if weight.dtype.kind == "f" and weight.ndim and not np.isfinite(weight).all():
                raise FaithkdError(f"the weight {name} holds NaN or infinity; train or export the network again")

    def forward(self, x: Tensor) -> Tensor:
        (first,) = {each.name for each in self.graph.input} - self.fixed.keys()
        values = {"": None, **self.fixed, first: x}
        for node in self.graph.node:
            self.where = f"node {node.name or node.output[0]!r} ({node.op_type})"
            found = self.computed(node, [values[name] for name in node.input])
            values.update(zip(node.output, found if isinstance(found, list | tuple) else [found], strict=False))
        return values[self.graph.output[0].name]

    def computed(self, node, given: list):
        """What a node makes of its inputs."""
        from onnx import helper, reference

        options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        options = {key: value.decode() if isinstance(value, bytes) else value for key, value in options.items()}
        if node.op_type == "Shape":
            return np.array(given[0].shape)[options.get("start", 0) : options.get("end")]
        if not any(isinstance(each, Tensor | Above) for each in given):
            inputs = {name: value for name, value in zip(node.input, given, strict=True) if name}
            return reference.ReferenceEvaluator(node, opsets=self.opsets).run(None, inputs)
        if node.op_type not in OPERATIONS or node.domain not in ("", "ai.onnx", "com.microsoft"):
            newer = "; export it with opset_version=20, where GELU is one operation" if node.op_type == "Erf" else ""
            raise FaithkdError(f"{self.where} cannot be read{newer}; known are {', '.join(OPERATIONS)}")
        # whole numbers say how, others take part
        given = [torch.tensor(z) if isinstance(z, np.ndarray) and z.dtype.kind == "f" else z for z in given]
        return OPERATIONS[node.op_type](*given, **options)


def compare(path: str | Path, network: nn.Module, x: Tensor, batch: int | None) -> None:
    """Refuse a file of which onnxruntime, with as many images at once as the file takes, makes something else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        parts = x.split(batch or len(x))
        theirs = torch.from_numpy(np.concatenate([session.run(None, {name: part.numpy()})[0] for part in parts]))
    except Exception as problem:  # of its own kinds
        said = str(problem).strip().partition("\n")[0]
        raise FaithkdError(f"onnxruntime cannot run it: {said}") from problem
    with torch.no_grad():
        ours = torch.cat([network(part) for part in parts])
    if ours.shape != theirs.shape or not ((ours - theirs).abs() <= TOLERANCE * (1 + theirs.abs())).all():
        raise FaithkdError(
            "what torch computes of it differs from what onnxruntime computes, so it is not used; does it mix the "
            "images of a batch, or was it exported in training mode?"
        )
