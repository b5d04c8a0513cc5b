"""A caller's networks as functions of images: copies in evaluation mode, computed in one precision, whatever theirs is.

Float16, bfloat16 and float32 numbers are float64 numbers too: `frozen(networks, torch.float64, x)` are the caller's
networks with their own weights, and what they say at an image is right but for the rounding of float64.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from faithkd.arguments import Pieces
from faithkd.errors import FaithkdError


def untouched(module: nn.Module | None, kind: type) -> bool:
    """Whether a module is of this very class, and neither hooks nor a method of its own change what it does."""
    if type(module) is not kind or "forward" in vars(module):
        return False
    hooks = [f"{when}_hooks" for when in ("forward", "forward_pre", "backward", "backward_pre")]
    return not any(vars(module)[f"_{name}"] or getattr(nn.modules.module, f"_global_{name}") for name in hooks)


@contextmanager
def own_settings() -> Iterator[None]:
    """PyTorch's settings as gradients and exact values need them, and afterwards the caller's again."""
    cpu, gpu = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
    with torch.inference_mode(False), torch.enable_grad(), cpu, gpu:
        yield


class Precision(TorchFunctionMode):
    """All that is computed inside is computed in `dtype`: also with a network's constants, and past its own casts."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def _cast(self, value):
        if isinstance(value, torch.dtype):
            return self.dtype if value.is_floating_point else value
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(self._cast, (args, kwargs or {}))
        if function in (Tensor.half, Tensor.bfloat16, Tensor.float):
            return args[0].to(self.dtype)  # whole numbers too
        result = function(*args, **kwargs)
        return result if isinstance(result, torch.dtype) else tree_map(self._cast, result)


def draws(function) -> bool:
    """Whether one of torch's operations draws at random; attention has a dropout of 0."""
    return torch.Tag.nondeterministic_seeded in function.tags and "attention" not in function.overloadpacket.__name__


class Softmaxes(TorchDispatchMode):
    """Notes of what every softmax over classes was taken; refuses what draws at random."""

    NAMES = ("softmax", "_softmax", "log_softmax", "_log_softmax")

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, tuple[Tensor, Tensor, str]] = {}  # by the result's id; held, so that no other gets it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch's compiler is imported, which takes seconds

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        made = function(*arguments, **(options or {}))
        if draws(function):
            raise FaithkdError(f"{name} draws at random, in evaluation too")
        if name in self.NAMES and arguments[0].ndim == 2 and arguments[1] in (1, -1):
            self.taken[id(made)] = made, arguments[0], name.strip("_")
        return made


class Logits(nn.Module):
    """A network g without the softmax at its end, if it has one: f = softmax(g) is what is compared, eq. (8).

    For attacks and bounds alike. `softmax`: what was taken off at the last call, "" for nothing.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.softmax = network, ""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.network, Pieces):
            return self.network.each(partial(self.logits, self.network.program), x)
        return self.logits(self.network, x)

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        with Softmaxes() as seen:
            made = network(x)
        _, logits, self.softmax = seen.taken.get(id(made), (made, made, ""))
        return logits

    def tell(self, name: str, network: nn.Module) -> None:
        """Warn once for each network; not of a log-softmax, of which softmax makes the same f."""
        if self.softmax == "softmax" and network not in TOLD:
            TOLD.add(network)
            warnings.warn(f"{name} ends in a softmax; it is taken off, bounds take the softmax of logits", stacklevel=2)


TOLD = WeakSet()  # networks of which their softmax was said


@dataclass(frozen=True)
class Frozen:
    """Networks that all see the same points: `(N, *shape)` to a tuple of logits `(N, C)`, in `dtype`."""

    networks: tuple[nn.Module, ...]
    names: tuple[str, ...]
    dtype: torch.dtype
    precision: AbstractContextManager

    def __call__(self, z: Tensor) -> tuple[Tensor, ...]:
        found = []
        for network, name in zip(self.networks, self.names, strict=True):
            try:
                with self.precision:
                    found.append(network(z.clone()))  # its first layer may work in place
            except FaithkdError as problem:
                raise FaithkdError(f"{name}: {problem}") from problem
            except Exception as problem:  # whatever a caller's own code raises
                raise FaithkdError(
                    f"{name} cannot be run on images of shape {tuple(z.shape[1:])} in {self.dtype}: "
                    f"{type(problem).__name__}: {problem}"
                ) from problem
        return tuple(found)


def frozen(networks: dict[str, nn.Module], dtype: torch.dtype, x: Tensor) -> Frozen:
    """Copies in evaluation mode, without gradients in the weights, for images `x`, whose device they come to.

    The networks themselves are left alone.
    """
    found = {weight.dtype for net in networks.values() for weight in (*net.parameters(), *net.buffers())}
    uniform = all(each == dtype or not each.is_floating_point for each in (*found, x.dtype))
    copies = tuple(_copy(network, name).to(device=x.device, dtype=dtype) for name, network in networks.items())
    # a search may spare the time that this takes where all is in one precision already
    return Frozen(
        copies, (*networks,), dtype, nullcontext() if uniform and dtype != torch.float64 else Precision(dtype)
    )


@torch.no_grad()  # else a scripted network's copied weights are no leaves
def _copy(network: nn.Module, name: str) -> nn.Module:
    """A frozen copy; of weights that a hook has computed (pruning, weight norm), which forbid it, their values."""
    held = [value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    try:
        copy = deepcopy(network, {id(value): value.detach().clone() for value in held if not value.is_leaf})
    except Exception as problem:
        raise FaithkdError(
            f"{name}, a {type(network).__name__}, cannot be copied, which keeps your own untouched: "
            f"{type(problem).__name__}: {problem}; take out what copy.deepcopy cannot copy"
        ) from problem
    with suppress(NotImplementedError):  # of an exported graph, which has the mode it was exported in
        copy.eval()
    for module in copy.modules():
        for name, child in module._modules.items():
            module._modules[name] = getattr(child, "_orig_mod", child)  # of what torch.compile makes
    for weight in copy.parameters():  # scripted networks cannot do this as a whole
        weight.requires_grad_(False)
    return copy
