"""The service's files: a definition, and a log that stays bounded."""

from __future__ import annotations

import os
from pathlib import Path

LOG_BYTES = 10_000_000
"""A log beyond this is put aside before the next start."""

TAIL_BYTES = 64 * 1024
"""So much of a log's end is read to find its last lines."""


def holds(file: Path, content: bytes) -> bool:
    return file.exists() and file.read_bytes() == content


def put_aside(log: Path) -> None:
    """Rename a log that has become large, replacing the one put aside before.

    Only while no server has it open: one would go on writing into the renamed file.
    """
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_name(log.name + ".1"))


def tail(log: Path, lines: int) -> str:
    """The last lines of a log; empty if there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return "\n".join(text.splitlines()[-lines:])
