"""The queue before the engine: who waits in it, how many may, and when it is worth coming back.

The sequences themselves wait in the engine's scheduler, which decides whose turn it is; here they
are counted, so that one too many is refused at once and not kept for an hour.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from glmd.errors import Overloaded

FIRST_GUESS = 1.0
"""Seconds between two admissions, before any has been seen."""

SMOOTHING = 0.3
"""Weight of the newest admission in the average time between two."""


@dataclass(slots=True, eq=False)
class Place:
    """What a request has in the queue.

    Attributes:
        answers: of its sequences, those that wait.
        tokens: of its prompt, until the first of them leaves.
    """

    client: str
    answers: int
    tokens: int


class Queue:
    """Answers and prompt tokens that wait, by client.

    The bound of each client is what is free: alone it gets half of the queue, and beside n others
    that take all they can get, one part in n + 2; so there is always room for one more client
    (Choudhury and Hahne, "Dynamic queue length thresholds", 1998, with a factor of 1).

    Attributes:
        answers: how many wait.
        tokens: prompt tokens that wait with them.
        refused: how many were turned away.
    """

    def __init__(
        self,
        max_answers: float = math.inf,
        max_tokens: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.answers = 0
        self.tokens = 0
        self.refused = 0
        self._max_answers = max_answers
        self._max_tokens = max_tokens
        self._clock = clock
        self._answers_of: Counter[str] = Counter()
        self._tokens_of: Counter[str] = Counter()
        self._interval: float | None = None
        """Average time between two admissions, while others wait."""
        self._last_admission = 0.0
        self._next_chance = 0.0

    def require_room(self, client: str, answers: int = 1, tokens: int = 0) -> None:
        """Raise Overloaded if so much more of `client` may not wait.

        Whatever is asked, it is let in while nothing waits: else it never would be.
        """
        if not self.answers:
            return
        free = self._max_answers - self.answers
        free_tokens = self._max_tokens - self.tokens
        if self._answers_of[client] + answers > free:
            what = f"{self.answers} answers wait for their turn"
        elif self._tokens_of[client] + tokens > free_tokens:
            what = f"{self.tokens} prompt tokens wait for their turn"
        else:
            return
        self.refused += answers
        own = self._answers_of[client]
        whose = f", {own} of them yours" if own else ""
        raise Overloaded(
            f"There is no room: {what}{whose}. Try again later.", retry_after=self.retry_after()
        )

    def enter(self, client: str, answers: int, tokens: int) -> Place:
        """Take a place.

        Raises:
            Overloaded: as `require_room`.
        """
        self.require_room(client, answers, tokens)
        if not self.answers:
            self._last_admission = self._clock()
        place = Place(client, answers, tokens)
        self._count(place, answers, tokens)
        return place

    def admit(self, place: Place) -> None:
        """The turn of one of a place's answers has come."""
        if not place.answers:
            return
        now = self._clock()
        seconds = now - self._last_admission
        old = self._interval
        self._interval = seconds if old is None else old + SMOOTHING * (seconds - old)
        self._last_admission = now
        self._leave(place, 1)

    def give_up(self, place: Place) -> None:
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

    def _leave(self, place: Place, answers: int) -> None:
        self._count(place, -answers, -place.tokens)
        place.answers -= answers
        place.tokens = 0

    def _count(self, place: Place, answers: int, tokens: int) -> None:
        self.answers += answers
        self.tokens += tokens
        for counter, change in ((self._answers_of, answers), (self._tokens_of, tokens)):
            counter[place.client] += change
            if not counter[place.client]:
                del counter[place.client]
