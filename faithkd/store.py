"""Finished work on disk, found again by a key over exactly what it depends on.

An entry is a payload (safetensors or CSV, never a pickle) and a sidecar in JSON that says what it is and
holds the payload's checksum: `<store>/<kind>/<name>-<key>.safetensors` and `….json`. The sidecar is written
last, so that an entry is there completely or not at all. Networks in the repository's weights/ folder, which
are entries too, are found after the store's.

The store is $FAITHKD_STORE or, without it, .store in the repository. With $FAITHKD_FRESH set to the name of a
run, only what was made by the run of that name counts: everything is made anew once, also when the run is
killed and started again.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import uuid
import warnings
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from platform import python_version
from types import SimpleNamespace

from filelock import FileLock, Timeout

from faithkd.errors import FaithkdError
from faithkd.paths import ROOT

TEXT = ("object", "str", "string")
NUMBER = re.compile(r"float(16|32|64)|u?int(8|16|32|64)|bool")
FORM = 1  # of the entries; a sidecar without a number is of the first form


def root() -> Path:
    """The folder of the store: $FAITHKD_STORE or .store in the repository."""
    return Path(os.environ.get("FAITHKD_STORE") or ROOT / ".store").expanduser().absolute()


def key(kind: str, /, **depends) -> str:
    """16 hexadecimal digits that change with the kind and with every value in `depends`.

    Raises FaithkdError for what JSON cannot hold exactly: NaN, tensors, sets, keys that are not text.
    """
    _check_json(depends, "depends")
    text = json.dumps([kind, depends], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def network(kind: str, depends: dict, build, make, *, name: str = ""):
    """A trained network and the history of its training, loaded or made.

    `build(checkpoint)`: trains and returns (state dict, one dict per epoch); it may save its progress at the
    path `checkpoint`, which a run after a kill finds again. `make()`: the same network, untrained.
    `name`: for people who look into the folder.
    Returns (the network in eval mode, the history as a DataFrame).
    """
    import pandas as pd

    def encode(progress: Path):
        tensors, history = build(progress)
        return _pack(tensors), {"history": history}

    def decode(payload: bytes, sidecar: dict):
        net = make()
        net.load_state_dict(_unpack(payload))
        return net.eval(), pd.DataFrame(sidecar["history"])

    return _entry(kind, depends, name, ".safetensors", encode, decode)


def arrays(kind: str, depends: dict, build, *, name: str = ""):
    """Tensors by name, loaded or made by `build()`."""
    return _entry(kind, depends, name, ".safetensors", lambda _: (_pack(build()), {}), lambda data, meta: _unpack(data))


def table(kind: str, depends: dict, build, *, name: str = ""):
    """A DataFrame, loaded or made by `build()`; always as read from disk, so that every run sees the same.

    Columns hold text, floats, whole numbers or booleans; all come back bit for bit, of the same dtype.
    """
    return _entry(kind, depends, name, ".csv", lambda _: _to_csv(build()), _from_csv)


def exists(kind: str, depends: dict) -> bool:
    """Whether the entry is there and sound, so that it would be loaded and not made."""
    suffixes = (".safetensors", ".csv")
    return any(_find(kind, key(kind, **depends), suffix, lambda *_: True) for suffix in suffixes)


def _entry(kind: str, depends: dict, name: str, suffix: str, encode, decode):
    """The decoded entry, made first where it is missing or damaged.

    `encode(progress)` makes the work and returns (payload, further items of the sidecar);
    `decode(payload, sidecar)` undoes that.
    """
    if not re.fullmatch(r"\w+", kind):
        raise FaithkdError(f"store: a kind is a single word, not {kind!r}")
    number = key(kind, **depends)
    # Without the lock first: a store that is read-only but complete can be used.
    if (found := _find(kind, number, suffix, decode)) is not None:
        return found
    with alone(f"{kind}-{number}", f"making {kind} {name or number}"):
        # Another run may have made it meanwhile; and what cannot be read under the lock is really damaged.
        if (found := _find(kind, number, suffix, decode, _put_aside)) is not None:
            return found
        with _writing(root()):
            (root() / kind).mkdir(exist_ok=True)
        fresh = os.environ.get("FAITHKD_FRESH")
        run = "-" + hashlib.sha256(fresh.encode()).hexdigest()[:8] if fresh else ""
        payload, items = encode(root() / kind / f"{number}{run}.checkpoint")
        versions = {package: _version(package) for package in ("torch", "faithkd")}
        sidecar = {
            "form": FORM,
            "kind": kind,
            "depends": depends,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "versions": {"python": python_version(), **versions},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **({"fresh": fresh} if fresh else {}),
            **items,
        }
        _write(kind, number, name, suffix, payload, sidecar)
        if (found := _find(kind, number, suffix, decode, _put_aside)) is None:
            raise FaithkdError(f"what was just written to {root() / kind} cannot be read again; is the disk sound?")
        return found


def _find(kind: str, number: str, suffix: str, decode, report=None):
    """The decoded entry of that key, from the store or the committed weights; None where there is none."""
    fresh = os.environ.get("FAITHKD_FRESH")
    places = list((root() / kind).glob(f"*{number}.json"))
    if not fresh:
        places += sorted((ROOT / "weights").glob(f"*/*{number}.json"))
    for place in places:
        try:
            sidecar = json.loads(place.read_bytes())
            if sidecar.get("form", 1) != FORM:
                raise FaithkdError(
                    f"{place} is of form {sidecar['form']} of the store, made by another version of faithkd; this one "
                    f"works with form {FORM}: it is left alone; set FAITHKD_STORE to another folder, or move it away"
                )
            if fresh and sidecar.get("fresh") != fresh:
                continue
            payload = place.with_suffix(suffix).read_bytes()
            if hashlib.sha256(payload).hexdigest() != sidecar["sha256"]:
                raise ValueError("its checksum is wrong")
            return decode(payload, sidecar)
        except FaithkdError:
            raise
        except Exception as error:  # whatever damage makes of JSON, CSV and safetensors
            if report:
                report(place, suffix, error)
    return None


def _put_aside(place: Path, suffix: str, error: Exception) -> None:
    """Warn about a damaged entry and rename it, so that it can be made again and looked at."""
    payload = place.with_suffix(suffix)
    if not payload.is_relative_to(root()):
        return _warn(f"{payload} is damaged ({error}) and is not used; get it anew with git checkout")
    _warn(f"{payload} is damaged ({error}); it is kept as {payload.name}.damaged and made again")
    with _writing(payload.parent):
        for file in (place, payload):
            if file.exists():
                os.replace(file, f"{file}.damaged")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


@contextmanager
def alone(name: str, doing: str):
    """Only one process at a time is inside; the lock of a killed one vanishes with it. `doing`: said while waiting."""
    with _writing(root()):
        (root() / ".locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(root() / ".locks" / f"{name}.lock")
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
def _writing(folder: Path):
    """Tell which folder cannot be written to, and what to do."""
    try:
        yield
    except OSError as error:
        raise FaithkdError(
            f"cannot write to the store in {folder}: {error.strerror or error}; make room or give "
            "permission there, or set FAITHKD_STORE to another folder"
        ) from error


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or, after a kill, as it was before."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(kind: str, number: str, name: str, suffix: str, payload: bytes, sidecar: dict) -> None:
    """Write payload, then sidecar; then clear away checkpoints and what killed runs have left."""
    folder = root() / kind
    name = re.sub(r"[^\w.,=+-]+", "-", name)
    stem = f"{name}-{number}" if name else number
    text = json.dumps(sidecar, indent=1)
    with _writing(folder):
        for old in folder.glob(f"*{number}.json"):
            old.unlink()  # first, or a kill would leave the old sidecar beside the new payload
        _replace(folder / f"{stem}{suffix}", payload)
        _replace(folder / f"{stem}.json", text.encode())
        for old in folder.glob(f"*{number}*"):
            if old.stem != stem and old.suffix != ".damaged":
                old.unlink()


def _check_json(value, where: str) -> None:
    """Refuse what JSON would change or cannot hold."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return
    if isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _check_json(item, f"{where}[{place}]")
    elif isinstance(value, dict) and all(isinstance(name, str) for name in value):
        for name, item in value.items():
            _check_json(item, f"{where}.{name}")
    else:
        raise FaithkdError(
            f"store: {where} = {value!r:.80} cannot be part of a key; use text, finite numbers, lists and "
            "dictionaries with text as keys"
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _pack(tensors: dict, **meta: str) -> bytes:
    from safetensors.torch import save

    # Clones, as safetensors refuses tensors that share memory.
    return save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, meta or None)


def _unpack(data: bytes) -> dict:
    from safetensors.torch import load

    return load(data)


def _to_csv(frame) -> tuple[bytes, dict]:
    """A DataFrame as CSV with exact floats, and its dtypes, which CSV cannot hold."""
    if list(frame.index) != list(range(len(frame))):
        raise FaithkdError("store: a table's index would be lost; call reset_index() first")
    if frame.columns.has_duplicates or not all(isinstance(name, str) for name in frame.columns):
        raise FaithkdError(f"store: a table's columns need different names in text, not {list(frame.columns)}")
    for name, column in frame.items():
        text = str(column.dtype) in TEXT and all(isinstance(value, str) for value in column)
        if not text and not NUMBER.fullmatch(str(column.dtype)):
            raise FaithkdError(f"store: column {name!r} must hold only text, or only numbers, or only booleans")
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(frame.columns)
    writer.writerows(zip(*(column.tolist() for _, column in frame.items()), strict=True))  # floats by repr: exact
    dtypes = {name: str(dtype) for name, dtype in frame.dtypes.items()}
    return file.getvalue().encode(), {"dtypes": dtypes}


def _from_csv(data: bytes, sidecar: dict):
    """The DataFrame of `_to_csv`."""
    import pandas as pd

    names, *rows = csv.reader(io.StringIO(data.decode(), newline=""))
    columns = {}
    for place, name in enumerate(names):
        texts, dtype = [row[place] for row in rows], sidecar["dtypes"][name]
        if dtype.startswith("float"):
            texts = [float(text) for text in texts]
        elif dtype.startswith(("int", "uint")):
            texts = [int(text) for text in texts]
        elif dtype == "bool":
            texts = [text == "True" for text in texts]
        columns[name] = pd.Series(texts, dtype=dtype)
    return pd.DataFrame(columns)


def _save_checkpoint(path: Path, tensors: dict, meta: dict) -> None:
    """Write tensors and `meta` (what JSON can hold) as one safetensors file, completely or not at all."""
    text = json.dumps(meta)
    digest = hashlib.sha256(_pack(tensors) + text.encode()).hexdigest()
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, _pack(tensors, meta=text, sha256=digest))


def _load_checkpoint(path: Path) -> tuple[dict, dict] | None:
    """(tensors, meta) of a checkpoint; None where there is none or, with a warning, where it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        length = int.from_bytes(data[:8], "little")  # of the JSON header, safetensors' format
        header = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = _unpack(data)
        if hashlib.sha256(_pack(tensors) + header["meta"].encode()).hexdigest() != header["sha256"]:
            raise ValueError("its checksum is wrong")
        return tensors, json.loads(header["meta"])
    except Exception as error:  # as in `_find`
        _warn(f"{path} is damaged ({error}); it is kept as {path.name}.damaged and the work starts anew")
        with _writing(path.parent):
            os.replace(path, f"{path}.damaged")
        return None


checkpoint = SimpleNamespace(save=_save_checkpoint, load=_load_checkpoint)
