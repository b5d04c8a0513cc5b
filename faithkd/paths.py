"""Where the repository lies, and how a file is written so that a kill leaves the old one or the new one."""

import os
import uuid
from pathlib import Path

ROOT = Path(os.environ.get("FAITHKD_HOME") or Path(__file__).resolve().parents[1]).expanduser().absolute()


def write(path: Path, content: bytes | str) -> None:
    """Write a file, with the folders above it, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(unfinished, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
