"""What is wrong with a file, in one message that begins with its path."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from faithkd.errors import FaithkdError
from faithkd.frozen import own_settings

DAMAGED = (zipfile.BadZipFile, EOFError, OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError)
DAMAGED += (MemoryError,)  # sizes that a damaged head claims


@contextmanager
def about(path: str | Path, damaged: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a FaithkdError about `path`; `damaged`: for a file that cannot be parsed.

    Inside, PyTorch works on the CPU and as it does by itself, whatever the caller has set.
    """
    try:
        with own_settings(), torch.device("cpu"):
            yield
    except FileNotFoundError:
        raise FaithkdError(f"{path}: there is no such file") from None
    except ModuleNotFoundError as missing:
        raise FaithkdError(f"{missing.name} is not installed: pip install 'faithkd[onnx]' for ONNX files") from None
    except FaithkdError as problem:
        told = str(problem).startswith(str(path))
        raise problem if told else FaithkdError(f"{path}: {problem}") from problem
    except DAMAGED as problem:
        said = str(problem).strip().partition("\n")[0]
        raise FaithkdError(f"{path}: {damaged} ({type(problem).__name__}: {said})") from problem
