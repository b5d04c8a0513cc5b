"""Finished work under names that people can read, found again by what it was made from.

An artefact is one safetensors file. Its header holds in JSON the `inputs` that it was made from and whatever else was
noted. It is used where its inputs are those asked for, and made again in its place where they are not.

The store is $FAITHKD_STORE or, without it, .store in the repository. What the repository itself has comes second: the
networks in weights/, and measurements/, where all that a folder of the store would hold is packed into one file of the
folder's name. With $FAITHKD_FRESH=measurements its measurements do not count, with any other value nothing of it.
"""

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor

from faithkd import paths
from faithkd.errors import FaithkdError

SUFFIX = ".safetensors"
OLD_KINDS = ("network", "emp_lb", "robustness", "confidences")  # folders of the store before names could be read
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)

_watches: list[dict] = []


def root() -> Path:
    """The folder of the store: $FAITHKD_STORE or .store in the repository."""
    return Path(os.environ.get("FAITHKD_STORE") or paths.ROOT / ".store").expanduser().absolute()


def artefact(path: str, inputs: dict, make: Callable[[Path], tuple[dict[str, Tensor], dict]]):
    """The tensors of `path` by name, and its notes: read where it was made from `inputs`, else made and written first.

    `make(checkpoint)` returns (tensors, notes); it may keep its progress at the path `checkpoint`, which a run after a
    kill finds again. `inputs` and notes are what JSON holds. Raises FaithkdError where the store cannot be written to.
    """
    if (found := load(path, inputs)) is not None:  # without the lock: a complete store may be read-only
        return found
    with alone(path, f"making {path}"):
        # Another run may have made it meanwhile; and what cannot be read under the lock is really damaged.
        if (found := load(path, inputs, mend=True)) is None:
            file = root() / path
            asked = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
            found = make(file.with_name(f"{file.name}.{asked}.checkpoint"))
            save(path, inputs, *found)
            for old in file.parent.glob(f"{file.name}.*.checkpoint"):
                old.unlink()
    return found


def load(path: str, inputs: dict, mend: bool = False) -> tuple[dict[str, Tensor], dict] | None:
    """(tensors, notes) of the artefact made from `inputs`, from the store or the repository; None where there is none.

    A damaged file counts as none; `mend` tells about it and puts it aside.
    """
    for watch in _watches:
        watch[path] = inputs
    fresh = os.environ.get("FAITHKD_FRESH")
    committed = not fresh or (fresh == "measurements" and path.startswith("weights/"))
    for folder in [root(), paths.ROOT] if committed else [root()]:
        found = _found(folder / path, inputs, mend)
        if found is not None:
            return found
    return None if fresh else packed(path, inputs)


def save(path: str, inputs: dict, tensors: dict[str, Tensor], notes: dict) -> None:
    """Write an artefact to the store, in place of what was there."""
    with writing(root()):
        paths.write(root() / path, encode({"inputs": inputs, "notes": notes}, tensors))


def encode(header: dict, tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a file: tensors, and a header of JSON values, to which their checksum is added."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {**header, "sha256": hashlib.sha256(pack(tensors)).hexdigest()}
    return pack(tensors, {name: json.dumps(value, ensure_ascii=False) for name, value in header.items()})


def read(file: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, header) of a file, whatever its inputs; raises one of DAMAGE where it is not sound."""
    with safe_open(file, framework="pt") as opened:
        header = {name: json.loads(text) for name, text in (opened.metadata() or {}).items()}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dictionary
    if hashlib.sha256(pack(tensors)).hexdigest() != header["sha256"]:
        raise ValueError("its checksum is wrong")
    return tensors, header


def _found(file: Path, inputs: dict, mend: bool) -> tuple[dict[str, Tensor], dict] | None:
    if not os.path.isfile(file):
        return None
    try:
        tensors, header = read(file)
        return (tensors, header["notes"]) if header["inputs"] == _plain(inputs) else None
    except DAMAGE as error:
        if mend:
            _put_aside(file, error)
        return None


# --- committed measurements: a folder of the store as one file


@contextmanager
def watched() -> Iterator[dict[str, dict]]:
    """The path and the inputs of each artefact that is asked for inside."""
    asked: dict[str, dict] = {}
    _watches.append(asked)
    try:
        yield asked
    finally:
        _watches.remove(asked)


@contextmanager
def without_committed_measurements() -> Iterator[None]:
    """Inside, only measurements of the store count; networks are found as before."""
    before = os.environ.get("FAITHKD_FRESH")
    os.environ["FAITHKD_FRESH"] = before or "measurements"
    try:
        yield
    finally:
        os.environ["FAITHKD_FRESH"] = before or ""


def packed(path: str, inputs: dict) -> tuple[dict[str, Tensor], dict] | None:
    """(tensors, notes) of the artefact made from `inputs`, from the repository's file for one of the folders above."""
    for folder in Path(path).parents:
        file = paths.ROOT / f"{folder}{SUFFIX}"
        if folder.name and file.is_file():
            name = _entry(path, folder)
            tensors, entries = _unpacked(file, file.stat().st_mtime_ns)
            if name not in entries:
                continue
            made_from = entries[name]["inputs"]
            if _plain(inputs) in (made_from, made_from | {"images": None}):  # None: `data.unseen`
                return tensors[name], entries[name]["notes"]
    return None


def keep(asked: dict[str, dict]) -> None:
    """Write artefacts of the store to the repository: networks as they are, measurements packed, a seed in one file.

    `asked` are paths with their inputs, as from `watched`. What is packed already and not asked for stays.
    """
    packs: dict[Path, dict] = {}
    for path, inputs in asked.items():
        if path.startswith("weights/"):
            if _found(root() / path, inputs, mend=False):
                paths.write(paths.ROOT / path, (root() / path).read_bytes())
        elif (found := load(path, inputs)) is not None:
            folder = re.match(r".*?/seed\d+(?=/)", path)[0]
            packs.setdefault(paths.ROOT / f"{folder}{SUFFIX}", {})[_entry(path, folder)] = (inputs, *found)
    for file, found in packs.items():
        before, known = _unpacked(file, file.stat().st_mtime_ns) if file.is_file() else ({}, {})
        tensors = before | {name: own for name, (_, own, _) in found.items()}
        entries = known | {name: {"inputs": inputs, "notes": notes} for name, (inputs, _, notes) in found.items()}
        entries = _plain(dict(sorted(entries.items())))
        # the same is not written again, as the order of what safetensors writes into a header is chance
        if entries != known or any(not _equal(tensors[name], before[name]) for name in entries):
            flat = {f"{name}/{part}": tensor for name in entries for part, tensor in tensors[name].items()}
            paths.write(file, encode({"entries": entries}, flat))


@lru_cache(maxsize=64)
def _unpacked(file: Path, _written: int) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The tensors and the inputs of each artefact in a packed file; none, with a warning, of a damaged one."""
    try:
        flat, header = read(file)
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in header["entries"]}
        for name, tensor in flat.items():
            entry, _, part = name.rpartition("/")
            tensors[entry][part] = tensor
        return tensors, header["entries"]
    except DAMAGE as error:
        _put_aside(file, error)
        return {}, {}


def _entry(path: str, folder: str | Path) -> str:
    return path.removeprefix(f"{folder}/").removesuffix(SUFFIX)


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _plain(inputs: dict) -> dict:
    return json.loads(json.dumps(inputs))


# --- around them


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
