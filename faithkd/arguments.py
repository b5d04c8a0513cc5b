"""What a caller brings, checked in one place: attacks, evaluation and bounds refuse the same in the same words."""

import difflib
import math
from collections.abc import Callable, Iterable
from numbers import Integral
from types import MethodType

import numpy as np
import torch
from torch import Tensor, nn

from faithkd.errors import FaithkdError, KeywordError

ROOM = 1e-5  # images are made in float32, so their values may lie a few of its roundings outside `clip`


def number(name: str, value, least: float = 0.0) -> float:
    """One finite number from `least` on, given as a number or as a tensor or array with one element."""
    kind = str(getattr(value, "dtype", ""))
    try:
        found = math.nan if isinstance(value, bool | str | bytes) or kind.endswith("bool") else float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        found = math.nan
    if not least <= found < math.inf:
        raise FaithkdError(f"{name} must be one finite number >= {least:g}, not {value!r}")
    return found


def radius(eps) -> float:
    """The radius ε of the ball of Def. 2."""
    return number("eps", eps)


def whole(name: str, value, least: int = 1, below: int | None = None) -> int:
    """A whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least or (below and value >= below):
        end = f" and < {below}" if below else ""
        raise FaithkdError(f"{name} must be a whole number >= {least}{end}, not {value!r}")
    return int(value)


def random_seed(value) -> int:
    """A seed as torch takes it, of 64 bits."""
    return whole("seed", value, 0, 2**64)


def _tensor(values, **options) -> Tensor:
    """Numbers in whatever form as a tensor; arrays of numpy may run backwards."""
    return torch.as_tensor(values.copy() if isinstance(values, np.ndarray) else values, **options).detach()


def choice(what: str, given: str, known: Iterable[str], error: type[FaithkdError] = FaithkdError) -> None:
    """Refuse an unknown name with the nearest known one."""
    if not isinstance(given, str) or given not in known:
        near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.4)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise error(f"unknown {what} {given!r}: choose one of {', '.join(known)}{meant}")


def keywords(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a misspelt keyword: an error of ours, and a TypeError as Python's own."""
    for name in given:
        choice("keyword", name, known, KeywordError)


def images(x: Tensor) -> Tensor:
    """A batch of images `(N, *shape)` as the caller has it, all finite, without a history of gradients.

    Whole numbers become floating-point ones, in float32 where that holds them exactly.
    """
    if not isinstance(x, Tensor) or x.is_complex() or x.is_nested:
        raise FaithkdError(f"x must be a real torch.Tensor of shape (N, *image), not {_kind(x)}")
    if x.ndim < 2:
        raise FaithkdError(f"x has shape {tuple(x.shape)}; give a batch (N, *image), for one image x[None]")
    if x.layout != torch.strided or x.is_quantized or x.is_meta:
        raise FaithkdError(f"x must be a dense tensor of numbers that are there, not {_kind(x)}")
    x = x.detach().as_subclass(Tensor)
    if not x.is_floating_point():
        rough = x.float()
        x = rough if (rough.double() == x.double()).all() else x.double()
    if not (finite := torch.isfinite(x)).all():
        raise FaithkdError(f"x holds NaN or infinity, first in image {int((~finite).flatten(1).any(1).nonzero()[0])}")
    return x


def clip_range(clip, x: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of `clip` = (low, high) in float64, each like `x`; infinite where `clip` is None.

    Numbers or tensors that broadcast to `x`. An image that leaves the range by more than rounding is an error.
    """
    try:
        low, high = (
            _tensor(end, dtype=torch.float64, device=x.device).broadcast_to(x.shape)
            for end in ((-math.inf, math.inf) if clip is None else clip)
        )
    except (OverflowError, RuntimeError, TypeError, ValueError) as problem:
        raise FaithkdError(f"clip must be (low, high), each broadcastable to x of shape {tuple(x.shape)}") from problem
    if (low > high).any():
        raise FaithkdError("clip=(low, high) must not have low above high; are the two swapped?")
    value, room = x.double(), ROOM * (1 + x.double().abs())
    if not ((low - room <= value) & (value <= high + room)).all():
        raise FaithkdError("x lies outside clip=(low, high), or clip holds NaN; are both in the networks' input space?")
    return low, high


def labels(y, count: int, classes: int) -> Tensor:
    """Labels `(N,)` in int64, from whole numbers of any type."""
    try:
        values = _tensor(y)
    except (RuntimeError, TypeError, ValueError) as problem:
        raise FaithkdError(f"y must be a tensor of {count} labels, not {type(y).__name__}") from problem
    if values.shape != (count,) or values.layout != torch.strided or values.is_meta or values.is_complex():
        raise FaithkdError(f"y must hold one label for each of {count} images, ({count},), not {_kind(values)}")
    values = values.double()
    if (wrong := ~((values >= 0) & (values < classes) & (values == values.floor()))).any():
        raise FaithkdError(f"y must hold whole numbers from 0 to {classes - 1}, the classes, not {values[wrong][0]:g}")
    return values.long()


class Pieces(nn.Module):
    """A program that was exported for `batch` images, for any number of them: so many at once."""

    def __init__(self, program: nn.Module, batch: int) -> None:
        super().__init__()
        self.program, self.batch = program, batch

    def forward(self, x: Tensor) -> Tensor:
        return self.each(self.program, x)

    def each(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What a function makes of the images, so many at once, the last of them again to fill up."""
        if len(x) == self.batch:
            return function(x)
        filled = torch.cat([x, x[-1:].expand(-len(x) % self.batch, *x.shape[1:])])
        return torch.cat([function(part) for part in filled.split(self.batch)])[: len(x)]


def as_module(network) -> nn.Module:
    """A network as a module; `batch` is an attribute of those that take a fixed number of images at once."""
    network = getattr(network, "_orig_mod", network)  # of what torch.compile makes
    if type(network).__name__ != "ExportedProgram":  # its class is in a part of torch that takes seconds to import
        return network
    inputs = network.graph_signature.user_inputs
    sizes = [node.meta["val"].shape[:1] for node in network.graph.nodes if node.name in inputs]
    fixed = len(sizes) == 1 and len(sizes[0]) == 1 and isinstance(sizes[0][0], int)
    return Pieces(network.module(), sizes[0][0]) if fixed else network.module()


def network(module: nn.Module, name: str) -> None:
    """Refuse what is no module with finite weights; whether it returns logits, `class_count` sees."""
    if not isinstance(module, nn.Module):
        raise FaithkdError(f"{name} must be a torch.nn.Module that returns logits (N, C), not {_kind(module)}")
    for path, layer in module.named_modules():
        own = vars(layer).get("forward")
        known = isinstance(own, MethodType) or hasattr(layer, "_orig_mod")  # the second: made by torch.compile
        norms = any(isinstance(each, nn.modules.batchnorm._NormBase) for each in layer.modules())
        if layer.training and own and not known and norms:
            where = f"{name}, layer {path}" if path else name
            raise FaithkdError(f"{where}: forward was replaced, and leads to a network in training mode: call .eval()")
    for path, weight in module.named_parameters(remove_duplicate=False):
        *layer, kind = path.split(".")
        where = f"{name}, layer {'.'.join(layer)}: the {kind}" if layer else f"{name}: the {kind}"
        if nn.parameter.is_lazy(weight) or weight.is_meta:
            raise FaithkdError(f"{where} has no values yet (lazy or on the meta device); load or make them")
        if not weight.is_floating_point():
            raise FaithkdError(f"{where} is of type {weight.dtype}, not a real floating-point number")
        if weight.layout != torch.strided:
            raise FaithkdError(f"{where} is sparse ({weight.layout}); make it dense, weight.to_dense()")
        if not torch.isfinite(weight.detach()).all():
            raise FaithkdError(f"{where} holds NaN or infinity; train or load the network again")


def class_count(logits, x: Tensor, name: str) -> int:
    """The number of classes C in what a network returns for the images `x`."""
    real = isinstance(logits, Tensor) and logits.is_floating_point()
    if not real or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        returned = ("N", *logits.shape[1:]) if real else _kind(logits)
        raise FaithkdError(
            f"{name} returns {returned} for images of shape {tuple(x.shape[1:])}; "
            "needed are logits of shape (N, C) with C >= 2 classes"
        )
    if (nothing := logits.softmax(1).isnan().any(1)).any():
        first = int(nothing.nonzero()[0])
        raise FaithkdError(f"{name} returns logits that are NaN or infinite, first for image {first}")
    return logits.shape[1]


def same_classes(teacher: int, student: int) -> None:
    """Refuse a pair that does not choose among the same classes."""
    if teacher != student:
        raise FaithkdError(f"the teacher has {teacher} classes and the student {student}; they must agree")


def _kind(value) -> str:
    """What a value is, for a message."""
    if not isinstance(value, Tensor) or value.is_nested:
        return "a nested tensor" if isinstance(value, Tensor) else type(value).__name__
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    return f"a tensor of {value.dtype}, shape {tuple(value.shape)}, on {value.device}{layout}"
