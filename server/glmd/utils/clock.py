"""Time that passes only while this process runs.

The monotonic clocks of macOS and Linux stand still while the machine sleeps, but not while the
process is stopped, in a container that was frozen, or on a virtual machine that was paused.
Deadlines are for clients that wait and processes that should answer, and nobody did either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICK_SECONDS = 1.0
"""Interval in which a running process reads its clock."""

MAX_PAUSE = 3.0
"""Seconds between two readings beyond which the process did not run."""


class AwakeClock:
    """Monotonic clock that advances by `TICK_SECONDS` over pauses of the process.

    Args:
        source: monotonic seconds.
    """

    def __init__(self, source: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._last = source()
        self._skipped = 0.0

    def __call__(self) -> float:
        now = self._source()
        pause = now - self._last
        if not 0 <= pause <= MAX_PAUSE:
            self._skipped += pause - TICK_SECONDS
        self._last = now
        return now - self._skipped

    def drive(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make this the clock of all timers of an event loop that is running."""
        loop.time = self  # type: ignore[method-assign]

        def tick() -> None:
            loop.call_later(TICK_SECONDS, tick)

        tick()


def loop_time() -> float:
    """The time of the running event loop."""
    return asyncio.get_running_loop().time()
