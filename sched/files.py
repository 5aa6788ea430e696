"""Files that the control process keeps for itself."""

from __future__ import annotations

import os
from pathlib import Path

from engine.types import UserError


def write(path: Path, data: bytes) -> None:
    """A file, whole or not at all. Raises `UserError`."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as e:
        raise UserError(f"{path} can't be written: {e.strerror}; choose another place, or another DEEPSERVE_HOME") from None
