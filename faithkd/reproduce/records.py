"""What runs leave on disk as JSON: done.json beside executed notebooks, provenance.json beside figures."""

import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from faithkd import paths
from faithkd.errors import FaithkdError

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Executed(BaseModel):
    """A notebook that ran: what it depended on, seconds, the files it made, with checksums of their numbers."""

    model_config = ConfigDict(strict=True)
    key: str
    seconds: Seconds
    files: dict[str, str | None]


class Provenance(BaseModel):
    """What made the figures of one folder: parameters, versions, machine, seconds that each notebook took."""

    model_config = ConfigDict(strict=True)
    profile: str
    name: str
    overrides: dict[str, Any]
    seed: int
    params: dict[str, Any]
    versions: dict[str, str | None]
    machine: str
    commit: str | None
    seconds: dict[str, Seconds]


DONE = TypeAdapter(dict[str, Executed])
PROVENANCE = TypeAdapter(Provenance)


def read(path: Path, form: TypeAdapter, otherwise):
    """The record in `path`; `otherwise` where there is none or, said once, where it is no record of that form."""
    try:
        return form.validate_json(path.read_bytes())
    except FileNotFoundError:
        return otherwise
    except ValueError:  # written atomically, so edited or of another version: what it said is then made again
        _say_ignored(path)
        return otherwise
    except OSError as error:
        raise FaithkdError(
            f"{path} cannot be read ({error.strerror}): move away what is in its place, or set FAITHKD_RUNS to a folder"
        ) from None


@cache
def _say_ignored(path: Path) -> None:
    print(f"{path} is damaged or of another version; it is ignored and made again", file=sys.stderr)


def write(path: Path, form: TypeAdapter, content) -> None:
    """Write a record so that after a kill it is there as it was before or completely."""
    paths.write(path, form.dump_json(content, indent=1) + b"\n")
