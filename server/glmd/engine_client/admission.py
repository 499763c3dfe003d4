"""The queue before the engine: who waits in it, how many may, and when it is worth coming back.

The sequences themselves wait in the engine's scheduler, which decides whose turn it is; here they
are counted, so that one too many is refused at once and not kept for an hour.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from glmd.errors import Overloaded
from glmd.utils.fair_limiter import FairLimiter

FIRST_GUESS = 1.0
"""Seconds between two admissions, before any has been seen."""

SMOOTHING = 0.3
"""Weight of the newest admission in the average time between two."""


@dataclass(slots=True, eq=False)
class Ticket:
    """What a request has in the queue.

    Attributes:
        answers: of its sequences, those that wait.
        tokens: of its prompt, until the first of them leaves.
    """

    client: str
    answers: int
    tokens: int


class AdmissionQueue:
    """Answers and prompt tokens that wait, each a `FairLimiter` that clients share.

    Attributes:
        refused: how many were turned away.
    """

    def __init__(
        self,
        max_answers: float = math.inf,
        max_tokens: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused = 0
        self._answers = FairLimiter(max_answers)
        self._tokens = FairLimiter(max_tokens)
        self._clock = clock
        self._interval: float | None = None
        """Average time between two admissions, while others wait."""
        self._last_admission = 0.0
        self._next_chance = 0.0

    @property
    def answers(self) -> int:
        """How many wait."""
        return self._answers.used

    @property
    def tokens(self) -> int:
        """Prompt tokens that wait with them."""
        return self._tokens.used

    def admit_or_reject(self, client: str, answers: int, tokens: int) -> Ticket:
        """Take a place. While nothing waits, any will do: what is larger than the queue could
        never wait in it.

        Raises:
            Overloaded: so much more of `client` may not wait.
        """
        if not self.answers:
            self._last_admission = self._clock()
        elif not self._answers.fits(client, answers):
            raise self._refusal(client, answers, f"{self.answers} answers wait for their turn")
        elif not self._tokens.fits(client, tokens):
            raise self._refusal(client, answers, f"{self.tokens} prompt tokens wait for their turn")
        place = Ticket(client, answers, tokens)
        self._answers.take(client, answers)
        self._tokens.take(client, tokens)
        return place

    def _refusal(self, client: str, answers: int, what: str) -> Overloaded:
        self.refused += answers
        own = self._answers.used_by(client)
        whose = f", {own} of the answers yours" if own else ""
        return Overloaded(
            f"There is no room: {what}{whose}. Try again later.", retry_after=self.retry_after()
        )

    def leave(self, place: Ticket) -> None:
        """The turn of one of a place's answers has come."""
        if not place.answers:
            return
        now = self._clock()
        seconds = now - self._last_admission
        old = self._interval
        self._interval = seconds if old is None else old + SMOOTHING * (seconds - old)
        self._last_admission = now
        self._leave(place, 1)

    def release(self, place: Ticket) -> None:
        """What is left of a place waits no longer."""
        self._leave(place, place.answers)

    def retry_after(self) -> float:
        """Seconds after which another attempt is sensible.

        A place is free at the next admission, as the last ones went, or as long as the present one
        takes already. Those who are told so one after another are told of successive admissions,
        lest they come back all at once; none is told to wait for longer than the queue takes.
        """
        now = self._clock()
        interval = FIRST_GUESS if self._interval is None else self._interval
        interval = max(interval, now - self._last_admission)
        self._next_chance = max(self._next_chance, now) + interval
        self._next_chance = min(self._next_chance, now + interval * max(1, self.answers))
        return self._next_chance - now

    def _leave(self, place: Ticket, answers: int) -> None:
        self._answers.take(place.client, -answers)
        self._tokens.take(place.client, -place.tokens)
        place.answers -= answers
        place.tokens = 0
