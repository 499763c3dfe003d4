"""Until when a request must have got somewhere, or be given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from glmd.errors import DeadlineExceeded, Overloaded

Phase = Literal["queue", "first_token", "total"]


@dataclass(frozen=True, slots=True)
class RequestTimeouts:
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

    @property
    def limits(self) -> dict[Phase, float]:
        """Those that there are."""
        limits: dict[Phase, float | None] = {
            "queue": self.queue,
            "first_token": self.first_token,
            "total": self.total,
        }
        return {phase: limit for phase, limit in limits.items() if limit is not None}

    @property
    def first(self) -> Phase | None:
        """The one that passes first."""
        limits = self.limits
        return min(limits, key=lambda phase: limits[phase], default=None)

    def time(self, phase: Phase) -> float:
        """When one that there is passes, in the event loop's time."""
        return self.since + self.limits[phase]

    def error(self, phase: Phase, retry_after: float) -> Overloaded | DeadlineExceeded:
        """What to say when it has passed.

        Args:
            retry_after: seconds after which another attempt could find its turn in time.
        """
        limit = f"within {self.limits[phase]:g} s, which is its limit."
        match phase:
            case "queue":
                message = f"The request's turn did not come {limit}"
                return Overloaded(message, retry_after=retry_after)
            case "first_token":
                return DeadlineExceeded(f"The request had no token {limit}", worth_retrying=True)
            case "total":
                return DeadlineExceeded(f"The request was not done {limit}", worth_retrying=False)


class TimeoutTimers:
    """Calls `expire` with the phase whose deadline passes before it is reached.

    A timer and not a wait: whoever reads the request's outputs may be held up by its client.
    """

    def __init__(self, deadlines: RequestTimeouts, expire: Callable[[Phase], None]) -> None:
        loop = asyncio.get_running_loop()
        self._timers = {
            phase: loop.call_at(deadlines.time(phase), expire, phase) for phase in deadlines.limits
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
