"""Where the repository lies, and how a file is written so that a kill leaves the old one or the new one."""

import os
import uuid
from contextlib import contextmanager
from pathlib import Path

from faithkd.errors import NotebookError

ROOT = Path(os.environ.get("FAITHKD_HOME") or Path(__file__).resolve().parents[1]).expanduser().absolute()


def write(path: Path, content: bytes | str) -> None:
    """Write a file, with the folders above it, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def reading(path: Path):
    """Inside, whatever shows that a committed file is damaged is one error that names it and the remedy."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotebookError(f"{path} cannot be read ({what}): mend it, or get it anew with git checkout") from None
