"""A network that was read from a file: torch functions in the file's order, its weights as parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faithkd.errors import FaithkdError


class Name(str):
    """A value computed before, to be told from other strings."""


@dataclass(frozen=True)
class Step:
    """One operation of a file: what it is called there, `function(*inputs, **options)`, and the names of its results."""

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


def first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0]


def filled(part: Any, values: Mapping) -> Any:
    """An input of a step, with values in place of names."""
    if isinstance(part, list):
        return [filled(each, values) for each in part]
    return values[part] if isinstance(part, Name) else part


class Program(nn.Module):
    """Steps from images `(N, *shape)` to logits `(N, C)`, for any N."""

    def __init__(
        self, shape: tuple[int, ...], first: str, last: str, steps: list[Step], weights: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.shape, self.first, self.last = shape, first, last
        self.weights = {name: f"weight {name.replace('.', '/')}" for name in weights}
        for name, weight in weights.items():
            if weight.is_floating_point():
                self.register_parameter(self.weights[name], nn.Parameter(weight, requires_grad=False))
            else:
                self.register_buffer(self.weights[name], weight)
        self.places = [f"{number} {step.where.replace('.', '/')}" for number, step in enumerate(steps)]
        for place, step in zip(self.places, steps, strict=True):
            self.add_module(place, Operation(step))

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise FaithkdError(f"it takes images of shape {self.shape}, not {tuple(x.shape[1:])}")
        values = {name: getattr(self, attribute) for name, attribute in self.weights.items()} | {self.first: x}
        for place in self.places:
            operation = self.get_submodule(place)
            found, names = operation(values), operation.step.results
            values.update(zip(names, found, strict=True) if len(names) > 1 else {names[0]: found})
        return values[self.last]


def resized(z: Tensor, size: list[int], batch: int | None) -> Tensor:
    """`z` in another shape; where a file fixes the batch and begins the shape with it, as many images as there are."""
    if batch is not None and len(size) > 1 and size[0] == batch:
        size = [len(z), *size[1:]] if -1 in size[1:] else [-1, *size[1:]]
    return torch.reshape(z, tuple(size))
