"""Tokens by second, of the last few minutes."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

SECONDS = 300
"""How far back it goes."""


@dataclass(slots=True)
class SecondCount:
    """What one second gave.

    Attributes:
        number: the second, in Unix time.
        generated: tokens that came from the engine.
        computed: prompt tokens that became ready by computation.
    """

    number: int
    generated: int = 0
    computed: int = 0


class ThroughputWindow:
    """The seconds in which there was something, the latest last."""

    def __init__(self) -> None:
        self._seconds: deque[SecondCount] = deque(maxlen=SECONDS)

    def now(self) -> SecondCount:
        """The present second, to be added to."""
        number = int(time.time())
        if not self._seconds or self._seconds[-1].number < number:
            self._seconds.append(SecondCount(number))
        return self._seconds[-1]

    def last(self, count: int) -> list[SecondCount]:
        """The last `count` seconds that are over, also those in which there was nothing."""
        end = int(time.time())
        there = {second.number: second for second in self._seconds}
        return [there.get(number) or SecondCount(number) for number in range(end - count, end)]
