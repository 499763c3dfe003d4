"""Who has had how much of the engine, so that clients take turns.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(https://arxiv.org/abs/2401.00588): the client that was served least goes next, and one that
comes back after a pause has saved nothing up.
"""

from __future__ import annotations

from collections import Counter

OUTPUT_WEIGHT = 2
"""What a token of output counts against a token of prompt, as in the paper."""


class VirtualTokenCounter:
    """Tokens served to each client; those with sequences in the scheduler are active."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._active: Counter[str] = Counter()

    def enter(self, client: str) -> None:
        """A sequence of `client` has arrived."""
        if client not in self._active:
            self._served[client] = max(self._served.get(client, 0), self._floor())
        self._active[client] += 1

    def leave(self, client: str) -> None:
        """A sequence of `client` has left for good."""
        self._active[client] -= 1
        if self._active[client]:
            return
        del self._active[client]
        # Who is no further than the floor would be lifted to it on return: nothing to remember.
        floor = self._floor()
        idle = [name for name in self._served if name not in self._active]
        for name in idle:
            if not self._active or self._served[name] <= floor:
                del self._served[name]

    def charge(self, client: str, tokens: int) -> None:
        """Count what `client` is served."""
        self._served[client] += tokens

    def served(self, client: str) -> int:
        """What an active client has been served, and was lifted by."""
        return self._served[client]

    def _floor(self) -> int:
        return min((self._served[name] for name in self._active), default=0)

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._served)
