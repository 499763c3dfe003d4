"""Admission control: bounds of the queue, and timeouts of requests.

The engine's scheduler holds the queue itself and chooses the order. This module only counts, so
that a request beyond the bounds is rejected at once, and watches the clock for each request.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from glmd.errors import DeadlineExceeded, Overloaded
from glmd.utils.fair_limiter import FairLimiter

INITIAL_INTERVAL = 1.0
"""Assumed seconds between two admissions before any has been measured."""

SMOOTHING = 0.3
"""Weight of the newest interval in the moving average."""


@dataclass(slots=True, eq=False)
class Ticket:
    """Queue space held by one request.

    Attributes:
        sequences: sequences that still wait.
        tokens: prompt tokens; 0 once the first sequence is admitted.
    """

    client: str
    sequences: int
    tokens: int


class AdmissionQueue:
    """Waiting sequences and prompt tokens, each bounded by a `FairLimiter`.

    Attributes:
        refused: sequences rejected so far.
    """

    def __init__(
        self,
        max_sequences: float = math.inf,
        max_tokens: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused = 0
        self._sequences = FairLimiter(max_sequences)
        self._tokens = FairLimiter(max_tokens)
        self._clock = clock
        self._interval: float | None = None
        """Moving average of seconds between two admissions while others wait."""
        self._last_admission = 0.0
        self._last_suggestion = 0.0

    @property
    def sequences(self) -> int:
        """Waiting sequences."""
        return self._sequences.used

    @property
    def tokens(self) -> int:
        """Prompt tokens of the waiting sequences."""
        return self._tokens.used

    def admit_or_reject(self, client: str, sequences: int, tokens: int) -> Ticket:
        """Reserve queue space. An empty queue accepts a request of any size.

        Raises:
            Overloaded: the client's share of the queue is full.
        """
        if not self.sequences:
            self._last_admission = self._clock()
        elif not self._sequences.fits(client, sequences):
            raise self._rejection(client, sequences, f"{self.sequences} sequences are waiting")
        elif not self._tokens.fits(client, tokens):
            raise self._rejection(client, sequences, f"{self.tokens} prompt tokens are waiting")
        self._sequences.add(client, sequences)
        self._tokens.add(client, tokens)
        return Ticket(client, sequences, tokens)

    def _rejection(self, client: str, sequences: int, reason: str) -> Overloaded:
        self.refused += sequences
        own = self._sequences.used_by(client)
        share = f", {own} of them from this client" if own else ""
        return Overloaded(
            f"The queue is full: {reason}{share}. Retry later.", retry_after=self.retry_after()
        )

    def mark_admitted(self, ticket: Ticket) -> None:
        """Note that the engine admitted one sequence of a ticket."""
        if not ticket.sequences:
            return
        now = self._clock()
        seconds = now - self._last_admission
        old = self._interval
        self._interval = seconds if old is None else old + SMOOTHING * (seconds - old)
        self._last_admission = now
        self._free(ticket, 1)

    def release(self, ticket: Ticket) -> None:
        """Give back the rest of a ticket's space."""
        self._free(ticket, ticket.sequences)

    def retry_after(self) -> float:
        """Suggest seconds to wait before a retry.

        The estimate is the mean interval between admissions, or the age of the latest admission
        if that is longer. Successive calls are spread over successive admissions so that clients
        do not retry all at once, up to the time in which the whole queue is admitted.
        """
        now = self._clock()
        interval = INITIAL_INTERVAL if self._interval is None else self._interval
        interval = max(interval, now - self._last_admission)
        self._last_suggestion = min(
            max(self._last_suggestion, now) + interval, now + interval * max(1, self.sequences)
        )
        return self._last_suggestion - now

    def _free(self, ticket: Ticket, sequences: int) -> None:
        self._sequences.add(ticket.client, -sequences)
        self._tokens.add(ticket.client, -ticket.tokens)
        ticket.sequences -= sequences
        ticket.tokens = 0


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
    """Timers that call `expire(phase)` at the deadline of each unreached phase.

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
