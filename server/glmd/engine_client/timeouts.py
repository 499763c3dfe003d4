"""Timeouts of one request: queue, first token, total."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from glmd.errors import DeadlineExceeded, Overloaded

Phase = Literal["queue", "first_token", "total"]


@dataclass(frozen=True, slots=True)
class RequestTimeouts:
    """Timeouts of one request, in seconds after its arrival. None: no timeout.

    Attributes:
        since: arrival, in the event loop's time.
        queue: until the engine admits the request.
        first_token: until the first token.
        total: until the last token.
    """

    since: float = 0.0
    queue: float | None = None
    first_token: float | None = None
    total: float | None = None

    @property
    def limits(self) -> dict[Phase, float]:
        """Seconds by phase, without the phases that have no timeout."""
        limits: dict[Phase, float | None] = {
            "queue": self.queue,
            "first_token": self.first_token,
            "total": self.total,
        }
        return {phase: limit for phase, limit in limits.items() if limit is not None}

    @property
    def first(self) -> Phase | None:
        """Phase with the shortest timeout. None: no timeout is set."""
        limits = self.limits
        return min(limits, key=lambda phase: limits[phase], default=None)

    def time(self, phase: Phase) -> float:
        """Deadline of a phase that has a timeout, in the event loop's time."""
        return self.since + self.limits[phase]

    def error(self, phase: Phase, retry_after: float) -> Overloaded | DeadlineExceeded:
        """Return the error for an expired phase.

        Args:
            retry_after: seconds to suggest to the client, for a queue timeout.
        """
        limit = f"timeout ({self.limits[phase]:g} s) exceeded"
        match phase:
            case "queue":
                return Overloaded(
                    f"Queue {limit}. Retry later or raise the limit.", retry_after=retry_after
                )
            case "first_token":
                return DeadlineExceeded(f"First-token {limit}.", worth_retrying=True)
            case "total":
                return DeadlineExceeded(
                    f"Request {limit}. Ask for fewer tokens or raise the limit.",
                    worth_retrying=False,
                )


NO_TIMEOUTS = RequestTimeouts()


class TimeoutTimers:
    """Timers that call `expire(phase)` at the deadline of each phase not reached by then.

    Timers rather than `asyncio.timeout` around the reader, because a slow client can block the
    reader.
    """

    def __init__(self, timeouts: RequestTimeouts, expire: Callable[[Phase], None]) -> None:
        loop = asyncio.get_running_loop()
        self._timers = {
            phase: loop.call_at(timeouts.time(phase), expire, phase) for phase in timeouts.limits
        }

    def reached(self, phase: Phase) -> None:
        """Cancel the timer of a phase."""
        timer = self._timers.pop(phase, None)
        if timer is not None:
            timer.cancel()

    def stop(self) -> None:
        """Cancel all timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
