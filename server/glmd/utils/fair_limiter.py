"""Something that there is only so much of, for clients who do not know of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class FairLimiter:
    """So much of something, taken and given back by clients.

    The bound of each client is what is free: alone it gets half, and beside n others that take all
    they can get, one part in n + 2; so there is always some left for one more client (Choudhury and
    Hahne, "Dynamic queue length thresholds", 1998, with a factor of 1).

    Attributes:
        taken: by all of them.
    """

    def __init__(self, size: float) -> None:
        self.used = 0
        self._size = size
        self._taken_by: Counter[str] = Counter()

    def fits(self, client: str, amount: int) -> bool:
        """Whether `client` may take so much more."""
        return self._taken_by[client] + amount <= self._size - self.used

    def used_by(self, client: str) -> int:
        return self._taken_by[client]

    def take(self, client: str, amount: int) -> None:
        """Take so much, whether or not it fits; give back what is below 0."""
        self.used += amount
        self._taken_by[client] += amount
        if not self._taken_by[client]:
            del self._taken_by[client]

    @contextmanager
    def share(self, client: str) -> Iterator[Reservation]:
        """What `client` takes in the block; it is given back at its end."""
        share = Reservation(self, client)
        try:
            yield share
        finally:
            self.take(client, -share.taken)


class Reservation:
    """A part of a pool that grows."""

    def __init__(self, pool: FairLimiter, client: str) -> None:
        self.taken = 0
        self._pool = pool
        self._client = client

    def grow(self, amount: int) -> bool:
        """Take so much more, if it fits."""
        fits = self._pool.fits(self._client, amount)
        if fits:
            self._pool.take(self._client, amount)
            self.taken += amount
        return fits
