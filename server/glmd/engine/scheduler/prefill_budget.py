"""How many prefill rows a step can take without the streams noticing.

Step times are modelled as `base(decoding sequences) + cost · prefill rows`, both estimated from
the steps themselves, so the same rule serves a GPU, where a decode step leaves room for a hundred
rows at no cost, and a CPU, where every row counts.
"""

from __future__ import annotations

from collections import deque

import numpy as np

WINDOW = 9
"""Observations kept of each kind. Their quantiles do not mind an odd step (a page fault, segments
that were joined), where a running mean remembers it for a long time."""

LEAST = 0.25
"""Quantile of the steps without prefill: right behind one with, they still pay for sealing it."""

CAUTION = 0.75
"""Quantile of the row costs to reckon with: half would have every second step take too long."""

FIRST_CHUNK = 16
"""Rows to try beside decoding sequences before the cost of a row has been measured, but no more
than there are of those: at worst a row costs as much as one of theirs."""

SMALLEST_CHUNK = 4
"""Rows of a step with prefill in any case, so that a prompt always gets on. On a CPU behind 2k
tokens eight rows make a step three times as long, four rows less than twice."""

FIRST_TOKENS_WORTH = 8
"""For each short prompt in prefill beyond the first, so many of those that decode may wait one step
without prefill longer for their next token."""

MOST_WAITING = 32
"""How many times the usual share of a step a crowd of prompts gets at most."""

BASE_STEPS = 32
"""Steps with prefill after which one without measures anew what a step takes without."""

STRANGE_STEPS = 4
"""The same, where that has been measured for other numbers of streams only."""


class PrefillBudget:
    """Step-time model and the prefill budget that follows from it.

    Args:
        max_slowdown: allowed length of a step with prefill, in steps without; beside few streams
            a crowd of short prompts gets more (`FIRST_TOKENS_WORTH`).
        max_rows: rows of any step, as far as decoding sequences leave room for the smallest chunk;
            may be changed.
    """

    def __init__(self, max_slowdown: float, max_rows: int) -> None:
        self._max_slowdown = max_slowdown
        self.max_rows = max_rows
        self._base: dict[int, deque[float]] = {}
        self._row_cost: deque[float] = deque(maxlen=WINDOW)
        self._since_base = 0
        """Steps with prefill since the last one without, or since one was asked for."""

    def observe(self, decoding: int, prefill_rows: int, seconds: float) -> None:
        """Learn from one step's duration.

        Args:
            decoding: sequences that decoded in it.
        """
        if prefill_rows == 0:
            if decoding:
                self._since_base = 0
                self._base.setdefault(decoding, deque(maxlen=WINDOW)).append(seconds)
            return
        self._since_base += decoding > 0
        base = self._base_for(decoding) if decoding else 0.0
        if base is not None:
            self._row_cost.append(max(seconds - base, 0.05 * seconds) / prefill_rows)

    def prefill_budget(self, decoding: int, prefilling: int) -> int:
        """Prefill rows for the next step, beside that many decoding sequences.

        Where many short prompts are in prefill for the sequences that decode, prefill has so many
        times the share of the step: waiting for a first token counts more than for the next.

        Args:
            decoding: sequences that decode in that step.
            prefilling: short prompts in prefill; 1 where there are none but long ones.

        Returns:
            0 where it has to be measured what a step takes without prefill.
        """
        if decoding == 0:
            return self.max_rows
        base, patience = self._base_for(decoding), BASE_STEPS
        if base is None:
            base, patience = self._bound_for(decoding), STRANGE_STEPS
        if base is None or self._since_base >= patience:
            # Asked for once: the next step is planned before this one has been observed.
            self._since_base = 0
            return 0
        rows = min(FIRST_CHUNK, decoding)
        if self._row_cost:
            cost = float(np.quantile(self._row_cost, CAUTION))
            share = FIRST_TOKENS_WORTH * (prefilling - 1) / decoding
            slack = (self._max_slowdown - 1) * min(max(1.0, share), MOST_WAITING)
            rows = int(min(slack * base / cost, self.max_rows)) if cost else self.max_rows
        return max(min(rows, self.max_rows - decoding), SMALLEST_CHUNK)

    def _base_for(self, decoding: int) -> float | None:
        """Seconds of a step with about that many decoding sequences and nothing else.

        It is measured, not extrapolated: taking what one stream needs for what eight need, the
        difference would count as the cost of prefill rows, and prompts would starve.
        """
        nearest = min(self._base, key=lambda known: abs(known - decoding), default=None)
        if nearest is None or abs(nearest - decoding) > decoding // 4:
            return None
        return self._measured(nearest)

    def _bound_for(self, decoding: int) -> float | None:
        """Seconds that such a step takes at least, by what other numbers of sequences take."""
        known = [self._measured(n) * min(1.0, decoding / n) for n in self._base]
        return max(known, default=None)

    def _measured(self, decoding: int) -> float:
        return float(np.quantile(self._base[decoding], LEAST))
