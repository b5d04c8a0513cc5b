"""Gradient descent over whatever may be chosen freely in a bound: every value met on the way is valid."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Range:
    """How one entry moves: its first step, and between which ends."""

    rate: float
    low: float | None = None
    high: float | None = None


def minimise(value_of: Callable[[dict], Tensor], now: dict, steps: int, ranges: dict, fall: float) -> dict:
    """The entries of `now`, tensors that begin with the shape of `value_of(now)`, where that was smallest on a descent.

    They are changed in place, each within its range; steps become shorter by the factor `fall` each time.
    """
    kept, value = {name: part.clone() for name, part in now.items()}, math.inf
    adam = Adam(list(now.values()))
    for step in range(steps + 1):
        for part in now.values():
            part.requires_grad_(step < steps)
        with torch.enable_grad():
            found = value_of(now)
            if step < steps:
                gradients = torch.autograd.grad(found[found.isfinite()].sum(), list(now.values()))
        found = found.detach()
        better = found < value
        value = torch.where(better, found, value)
        for name, part in now.items():
            chosen = better.view(*better.shape, *[1] * (part.ndim - better.ndim)).to(part)
            kept[name].lerp_(part.detach(), chosen)  # as kept[better] = part[better], but many times faster
        if step < steps:
            adam.step([part.nan_to_num(0.0) for part in gradients], [ranges[name].rate * fall**step for name in now])
            for name, part in now.items():
                low, high = ranges[name].low, ranges[name].high
                if low is not None or high is not None:
                    part.clamp_(low, high)
    return kept


class Adam:
    """Kingma & Ba (2015) in place. Not torch.optim's, whose import takes longer than a student's first bound."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.count = parameters, 0
        self.moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in parameters]

    def step(self, gradients: list[Tensor], rates: list[float]) -> None:
        self.count += 1
        for part, gradient, rate, (first, second) in zip(self.parameters, gradients, rates, self.moments, strict=True):
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            size = (second / (1 - 0.999**self.count)).sqrt_().add_(1e-12)
            part.detach_().addcdiv_(first, size, value=-rate / (1 - 0.9**self.count))
