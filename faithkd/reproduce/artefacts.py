"""Finished work under names that people can read, found again by what it was made from.

An artefact is one file: tensors as safetensors or a table as CSV, never a pickle. Its header (safetensors' own, the
first line of a CSV) holds in JSON the `inputs` that it was made from, whatever else was noted, and a checksum. It is
used where its inputs are those asked for, and made again in its place where they are not.

The store is $FAITHKD_STORE or, without it, .store in the repository; the repository itself comes second, so that its
committed weights/ are found. With $FAITHKD_FRESH set, only the store counts.
"""

import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as unpack
from safetensors.torch import save as pack

from faithkd import paths
from faithkd.errors import FaithkdError

OLD_KINDS = ("network", "emp_lb", "robustness", "confidences")  # folders of the store before names could be read
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


def root() -> Path:
    """The folder of the store: $FAITHKD_STORE or .store in the repository."""
    return Path(os.environ.get("FAITHKD_STORE") or paths.ROOT / ".store").expanduser().absolute()


def artefact(path: str, inputs: dict, make: Callable[[Path], tuple[object, dict]]):
    """The content of `path` and its notes: read where it was made from `inputs`, else made and written first.

    `path` ends in .safetensors (content: tensors by name) or .csv (a DataFrame). `make(checkpoint)` returns (content,
    notes); it may keep its progress at the path `checkpoint`, which a run after a kill finds again. `inputs` and notes
    are what JSON holds. Raises FaithkdError where the store cannot be written to.
    """
    if (found := load(path, inputs)) is not None:  # without the lock: a complete store may be read-only
        return found
    with alone(path, f"making {path}"):
        # Another run may have made it meanwhile; and what cannot be read under the lock is really damaged.
        if (found := load(path, inputs, mend=True)) is None:
            file = root() / path
            asked = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
            content, notes = make(file.with_name(f"{file.name}.{asked}.checkpoint"))
            save(path, inputs, content, notes)
            for old in file.parent.glob(f"{file.name}.*.checkpoint"):
                old.unlink()
            found = load(path, inputs)
    if found is None:
        raise FaithkdError(f"what was just written to {root() / path} cannot be read again; is the disk sound?")
    return found


def load(path: str, inputs: dict, mend: bool = False):
    """(content, notes) of the artefact made from `inputs`, from the store or the repository; None where there is none.

    A damaged file counts as none; `mend` tells about it and puts it aside.
    """
    for folder in [root()] if os.environ.get("FAITHKD_FRESH") else [root(), paths.ROOT]:
        try:
            content, header = read(folder / path)
            if header["inputs"] == json.loads(json.dumps(inputs)):
                return content, header["notes"]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except DAMAGE as error:
            if mend:
                _put_aside(folder / path, error)
    return None


def save(path: str, inputs: dict, content, notes: dict) -> None:
    """Write an artefact to the store, in place of what was there."""
    with writing(root()):
        paths.write(root() / path, encode(path, {"inputs": inputs, "notes": notes, "made": _made()}, content))


def encode(path: str, header: dict, content) -> bytes:
    """The bytes of an artefact's file; the checksum is added to `header`."""
    if path.endswith(".csv"):
        body = content.to_csv(index=False, lineterminator="\n", na_rep="nan").encode()  # floats by repr: exact
        header |= {"dtypes": {name: str(dtype) for name, dtype in content.dtypes.items()}, "sha256": _digest(body)}
        return b"# " + json.dumps(header).encode() + b"\n" + body
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in content.items()}
    header["sha256"] = _digest(pack(tensors))
    return pack(tensors, {name: json.dumps(value, ensure_ascii=False) for name, value in header.items()})


def read(file: Path):
    """(content, header) of an artefact's file, whatever its inputs; raises one of DAMAGE where it is not sound."""
    data = file.read_bytes()
    if file.suffix == ".csv":
        first, _, body = data.partition(b"\n")
        header = json.loads(first.removeprefix(b"# "))
        digest = _digest(body)
        content = _table(body, header["dtypes"])
    else:
        length = int.from_bytes(data[:8], "little")  # of the JSON header, safetensors' format
        header = {name: json.loads(text) for name, text in json.loads(data[8 : 8 + length])["__metadata__"].items()}
        content = unpack(data)
        digest = _digest(pack(content))
    if digest != header["sha256"]:
        raise ValueError("its checksum is wrong")
    return content, header


def _table(body: bytes, dtypes: dict) -> pd.DataFrame:
    """A table bit for bit as it was written; text that looks like a number or like NaN stays text."""
    frame = pd.read_csv(io.BytesIO(body), dtype=str, keep_default_na=False)
    for name, dtype in dtypes.items():
        frame[name] = frame[name] == "True" if dtype == "bool" else frame[name].astype(dtype)
    return frame


def warn_of_old_store() -> None:
    """Say, once, that the store has entries of a version with other names; they are left alone."""
    said = root() / ".old-entries-told"
    if any((root() / kind).is_dir() for kind in OLD_KINDS) and not said.exists():
        print(
            f"{root()} has entries of an older version of faithkd ({', '.join(OLD_KINDS)}, …): they are left alone and "
            "not used; delete those folders when you no longer need them",
            file=sys.stderr,
        )
        with writing(root()):
            said.touch()


@contextmanager
def alone(name: str, doing: str):
    """Only one process at a time is inside; the lock of a killed one vanishes with it. `doing`: said while waiting."""
    with writing(root()):
        file = root() / ".locks" / f"{name}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"another run is {doing}; waiting", file=sys.stderr, flush=True)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(folder: Path):
    """Tell which folder cannot be written to, and what to do."""
    try:
        yield
    except OSError as error:
        raise FaithkdError(
            f"cannot write to the store in {folder}: {error.strerror or error}; make room or give "
            "permission there, or set FAITHKD_STORE to another folder"
        ) from error


def _put_aside(file: Path, error: Exception) -> None:
    """Warn about a damaged artefact and rename it, so that it can be made again and looked at."""
    if not file.is_relative_to(root()):
        warnings.warn(f"{file} is damaged ({error}) and is not used; get it anew with git checkout", stacklevel=2)
        return
    warnings.warn(f"{file} is damaged ({error}); it is kept as {file.name}.damaged and made again", stacklevel=2)
    with writing(file.parent):
        os.replace(file, f"{file}.damaged")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _made() -> dict:
    """By what and when: for people, nothing depends on it."""
    versions = {package: metadata.version(package) for package in ("faithkd", "torch")}
    return versions | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
