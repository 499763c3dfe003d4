"""Answers of a worker's child process that end it, or do not end."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable


def make_answer() -> Callable[[bytes], bytes]:
    """What the child answers: its setup and the message, or what the message asks for."""
    seen: list[bytes] = []

    def answer(data: bytes) -> bytes:
        match data:
            case b"loop":
                while True:
                    pass
            case b"allocate":
                kept = bytearray(240 << 20)
                kept[::4096] = b"x" * len(kept[::4096])
                time.sleep(60)
            case b"overflow":
                ctypes.string_at(0)
            case b"wait":
                time.sleep(60)
            case b"killed":
                os.kill(os.getpid(), signal.SIGKILL)
        seen.append(data)
        return b"|".join((seen[0], data))

    return answer
