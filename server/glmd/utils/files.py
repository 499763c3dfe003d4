"""Atomic writes of private files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def atomic_write(file: Path, content: bytes) -> None:
    """Write a file with mode 0600 that readers see complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
