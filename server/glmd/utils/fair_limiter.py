"""Capacity limiter shared fairly among clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class FairLimiter:
    """A capacity that clients reserve and release, with dynamic thresholds per client.

    Each client may use at most as much as is free: one client alone gets 1/2 of the capacity, each
    of n greedy clients 1/(n + 1), and 1/(n + 1) stays free for the next client (Choudhury and
    Hahne, "Dynamic queue length thresholds", 1998, with a factor of 1).

    Attributes:
        used: units in use by all clients.
    """

    def __init__(self, capacity: float) -> None:
        self.used = 0
        self._capacity = capacity
        self._used_by: Counter[str] = Counter()

    def fits(self, client: str, amount: int) -> bool:
        """Return whether `client` may use `amount` more units."""
        return self._used_by[client] + amount <= self._capacity - self.used

    def used_by(self, client: str) -> int:
        """Units in use by one client."""
        return self._used_by[client]

    def add(self, client: str, amount: int) -> None:
        """Change a client's use by `amount` without a check; a negative amount releases."""
        self.used += amount
        self._used_by[client] += amount
        if not self._used_by[client]:
            del self._used_by[client]

    @contextmanager
    def share(self, client: str) -> Iterator[Reservation]:
        """Yield an empty reservation of `client`, held until the end of the block."""
        reservation = Reservation(self, client)
        try:
            yield reservation
        finally:
            reservation.release()


class Reservation:
    """A growing reservation of one client.

    Attributes:
        size: reserved units.
    """

    def __init__(self, limiter: FairLimiter, client: str) -> None:
        self.size = 0
        self._holders = 1
        self._limiter = limiter
        self._client = client

    def grow(self, amount: int) -> bool:
        """Reserve `amount` more units if they fit; return whether they did."""
        fits = self._limiter.fits(self._client, amount)
        if fits:
            self._limiter.add(self._client, amount)
            self.size += amount
        return fits

    def hold(self) -> None:
        """Keep the reservation until one more call of `release`."""
        self._holders += 1

    def release(self) -> None:
        """Give back all units, unless others hold the reservation."""
        self._holders -= 1
        if not self._holders:
            self._limiter.add(self._client, -self.size)
            self.size = 0
