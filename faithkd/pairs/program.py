"""A network that was read from a file: torch functions in the file's order, its weights as parameters."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faithkd import arguments
from faithkd.errors import FaithkdError


class Name(str):
    """A value computed before, to be told from other strings."""


@dataclass(frozen=True)
class Step:
    """One operation of a file: its kind and name there, `function(*inputs, **options)`, and its results' names."""

    where: str
    function: Callable
    inputs: list
    options: dict[str, Any]
    results: list[str]


class Operation(nn.Module):
    """A step as a module, so that an error about it in the bounds says its name."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, values: Mapping) -> Any:
        inputs = [filled(part, values) for part in self.step.inputs]
        try:
            return self.step.function(*inputs, **self.step.options)
        except (TypeError, ValueError, IndexError, RuntimeError) as problem:
            raise FaithkdError(f"{self.step.where}: {first_line(problem)}") from problem


def filled(part: Any, values: Mapping) -> Any:
    """An input of a step, with values in place of names."""
    if isinstance(part, list):
        return [filled(each, values) for each in part]
    return values[part] if isinstance(part, Name) else part


def first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0]


class Program(nn.Module):
    """Steps from images `(N, *shape)` to logits `(N, C)`, for any N."""

    def __init__(self, shape: tuple, first: str, last: str, steps: list[Step], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.shape, self.first, self.last = shape, first, last
        self.steps, self.weights, self.names = steps, weights, {}
        for name, weight in weights.items():
            self.names[name] = f"weight {name.replace('.', '/')}"  # a dot would be a part's
            if weight.is_floating_point():
                self.register_parameter(self.names[name], nn.Parameter(weight, requires_grad=False))
            else:
                self.register_buffer(self.names[name], weight)
        arguments.network(self, "network")
        places = [f"{number} {step.where.replace('.', '/')}" for number, step in enumerate(steps)]
        self.nodes = nn.ModuleDict(dict(zip(places, map(Operation, steps), strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise FaithkdError(f"it takes images of shape {self.shape}, not {tuple(x.shape[1:])}")
        values = {name: getattr(self, attribute) for name, attribute in self.names.items()} | {self.first: x}
        for operation in self.nodes.values():
            found, names = operation(values), operation.step.results
            values.update(zip(names, found, strict=True) if len(names) > 1 else {names[0]: found})
        return values[self.last]

    def without_softmax(self, path) -> "Program":
        """The same without a softmax at its end, and a warning where there is one: f = softmax(g) is ours to take."""
        if not self.steps or self.steps[-1].function not in SOFTMAXES or self.steps[-1].results != [self.last]:
            return self
        warnings.warn(f"{path}: its last softmax is taken off; bounds take the softmax of logits", stacklevel=4)
        *steps, end = self.steps
        return Program(self.shape, self.first, end.inputs[0], steps, self.weights).eval()


def softmax(z: Tensor, *, axis: int = -1) -> Tensor:
    return z.softmax(axis)


SOFTMAXES = (softmax, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


def resized(z: Tensor, size: list[int], batch: int | None) -> Tensor:
    """`z` in another shape; where a file fixes the batch and begins the shape with it, as many images as there are."""
    if batch is not None and len(size) > 1 and size[0] == batch:
        size = [len(z), *size[1:]]
    return z.reshape(size)
