"""Until when a request must have got somewhere, or be given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["queue", "first_token", "total"]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Limits of one request, in seconds since it arrived; None: none.

    Attributes:
        since: when it arrived, in the event loop's time.
        queue: by when its turn must have come.
        first_token: by when its first token must be there.
        total: by when it must be done.
    """

    since: float = 0.0
    queue: float | None = None
    first_token: float | None = None
    total: float | None = None


class Alarms:
    """Calls `expire` with the phase whose deadline passes before it is reached.

    A timer and not a wait: whoever reads the request's outputs may be held up by its client.
    """

    def __init__(self, deadlines: Deadlines, expire: Callable[[Phase], None]) -> None:
        loop = asyncio.get_running_loop()
        seconds: dict[Phase, float | None] = {
            "queue": deadlines.queue,
            "first_token": deadlines.first_token,
            "total": deadlines.total,
        }
        self._timers = {
            phase: loop.call_at(deadlines.since + limit, expire, phase)
            for phase, limit in seconds.items()
            if limit is not None
        }

    def reached(self, phase: Phase) -> None:
        """This phase's deadline was kept."""
        timer = self._timers.pop(phase, None)
        if timer is not None:
            timer.cancel()

    def stop(self) -> None:
        """Nothing is waited for any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
