"""Fairness among clients: the client that was served least goes next.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(https://arxiv.org/abs/2401.00588). A client gains no credit while it is idle.
"""

from __future__ import annotations

from collections import Counter

OUTPUT_WEIGHT = 2
"""Weight of an output token against a prompt token, as in the paper."""


class VirtualTokenCounter:
    """Tokens served to each client. Clients with sequences in the scheduler are active."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._active: Counter[str] = Counter()

    def enter(self, client: str) -> None:
        """Count a sequence of `client` as active, and lift an idle client to the floor."""
        if client not in self._active:
            self._served[client] = max(self._served.get(client, 0), self._floor())
        self._active[client] += 1

    def leave(self, client: str) -> None:
        """Remove a sequence of `client`, and forget idle clients at or below the floor."""
        self._active[client] -= 1
        if self._active[client]:
            return
        del self._active[client]
        floor = self._floor()
        for name in [name for name in self._served if name not in self._active]:
            if not self._active or self._served[name] <= floor:
                del self._served[name]

    def charge(self, client: str, tokens: int) -> None:
        """Add tokens served to an active client."""
        self._served[client] += tokens

    def served(self, client: str) -> int:
        """Tokens served to an active client, and those by which it was lifted."""
        return self._served[client]

    def _floor(self) -> int:
        """Tokens of the active client that was served least."""
        return min((self._served[name] for name in self._active), default=0)

    def __len__(self) -> int:
        """Number of clients remembered."""
        return len(self._served)
