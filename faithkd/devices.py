"""Where it is computed: on the device of the images, or on the one that a caller names."""

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from faithkd import arguments
from faithkd.errors import FaithkdError


def follows_images(function: Callable) -> Callable:
    """Adds the keyword `device`, to which the images are brought; all else is computed, and made, where they are.

    Inside, tensors are made there by default: no constructor has to say so. On the CPU nothing changes.
    """
    signature = inspect.signature(function)
    known = None if "choices" in signature.parameters else [*signature.parameters, "device"]  # these know their own

    @functools.wraps(function)
    def run(*given, device: torch.device | str | None = None, **options):
        if known:
            arguments.keywords(options, known)
        bound = signature.bind(*given, **options)
        x = bound.arguments.get("x")
        if isinstance(x, Tensor) and device is not None:
            try:
                bound.arguments["x"] = x = x.to(device)
            except (RuntimeError, AssertionError) as problem:
                raise FaithkdError(
                    f"device {device!r} cannot be used: {str(problem).partition(chr(10))[0]}"
                ) from problem
        elsewhere = isinstance(x, Tensor) and x.device != torch.get_default_device()
        with x.device if elsewhere else nullcontext():
            return function(*bound.args, **bound.kwargs)

    return run
