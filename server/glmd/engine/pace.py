"""How many prefill rows a step can take without the streams noticing.

Step times are modelled as `base(decoding sequences) + cost · prefill rows`, both estimated from
the steps themselves, so the same rule serves a GPU, where a decode step leaves room for a hundred
rows at no cost, and a CPU, where every row counts.
"""

from __future__ import annotations

_SMOOTHING = 0.2
"""Weight of the newest observation."""

FIRST_CHUNK = 32
"""Rows to try beside decoding sequences before anything has been measured."""

SMALLEST_CHUNK = 4
"""Rows that prefill gets in any case, so that a prompt always gets on. On a CPU behind 2k tokens
eight rows make a step three times as long, four rows less than twice."""


class Pace:
    """Step-time model and the prefill budget that follows from it.

    Args:
        max_slowdown: allowed length of a step with prefill, in steps without.
        max_rows: rows of any step, as far as decoding sequences leave room for the smallest chunk;
            may be changed.
    """

    def __init__(self, max_slowdown: float, max_rows: int) -> None:
        self._max_slowdown = max_slowdown
        self.max_rows = max_rows
        self._base: dict[int, float] = {}
        self._row_cost: float | None = None

    def observe(self, decoding: int, prefill_rows: int, seconds: float) -> None:
        """Learn from one step's duration.

        Args:
            decoding: sequences that decoded in it.
        """
        if prefill_rows == 0:
            if decoding:
                self._base[decoding] = _blend(self._base.get(decoding), seconds)
            return
        base = self._base_for(decoding) if decoding else 0.0
        if base is not None:
            cost = max(seconds - base, 0.05 * seconds) / prefill_rows
            self._row_cost = _blend(self._row_cost, cost)

    def prefill_budget(self, decoding: int) -> int:
        """Prefill rows for the next step, beside that many decoding sequences."""
        if decoding == 0:
            return self.max_rows
        base = self._base_for(decoding)
        if base is None or self._row_cost is None:
            rows = FIRST_CHUNK
        elif self._row_cost == 0:
            rows = self.max_rows
        else:
            rows = int((self._max_slowdown - 1) * base / self._row_cost)
        return max(min(rows, self.max_rows - decoding), SMALLEST_CHUNK)

    def _base_for(self, decoding: int) -> float | None:
        """Seconds of a step with about that many decoding sequences and nothing else."""
        if not self._base:
            return None
        nearest = min(self._base, key=lambda known: abs(known - decoding))
        return self._base[nearest]


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
