"""Prefill budget: prefill rows that a step may have beside decoding sequences.

A step is modelled as taking `base(decoding sequences) + cost · prefill rows` seconds. Both are
estimated from the steps themselves: on a GPU a decode step has room for a hundred rows at no cost,
on a CPU every row counts.
"""

from __future__ import annotations

from collections import deque

import numpy as np

WINDOW = 9
"""Observations kept of each kind. Unlike a running mean, their quantiles forget an outlier soon."""

BASE_QUANTILE = 0.25
"""Of steps without prefill: behind a step with prefill they still insert its chunks."""

COST_QUANTILE = 0.75
"""Of row costs. With the median, every second step would take too long."""

FIRST_CHUNK = 16
"""Most rows beside decoding sequences before the cost of a row is known, and no more than there are
sequences: a row costs no more than one of theirs."""

SMALLEST_CHUNK = 4
"""Least rows of a step with prefill, so that prompts progress. On a CPU behind 2k tokens, eight
rows make a step three times as long, four rows less than twice."""

FIRST_TOKEN_WEIGHT = 8
"""Decoding sequences that each short prompt beyond the first outweighs. Short prompts multiply the
budget by the ratio of both sides, if that is above 1."""

MAX_BUDGET_FACTOR = 32
"""Most that short prompts may multiply the budget by."""

BASE_STEPS = 32
"""Steps with prefill after which a step without prefill is requested, to measure it."""

UNKNOWN_BASE_STEPS = 4
"""Likewise where only other numbers of decoding sequences have been measured."""


class PrefillBudget:
    """Model of step times, and the budget that follows from it.

    Args:
        max_slowdown: duration of a step with prefill, as a multiple of a step without.

    Attributes:
        max_rows: rows of a step. May be changed.
    """

    def __init__(self, max_slowdown: float, max_rows: int) -> None:
        self.max_rows = max_rows
        self._max_slowdown = max_slowdown
        self._base: dict[int, deque[float]] = {}
        self._row_cost: deque[float] = deque(maxlen=WINDOW)
        self._since_base = 0
        """Steps with prefill since a step without, or since one was requested."""

    def observe(self, decoding: int, prefill_rows: int, seconds: float) -> None:
        """Learn from the duration of a step with `decoding` sequences."""
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
        """Prefill rows of the next step.

        Args:
            decoding: sequences that decode in the step.
            prefilling: short prompts in prefill, at least 1. Where they are many beside few
                decoding sequences, their first tokens outweigh a longer step.

        Returns:
            0 where the step must be measured without prefill.
        """
        if decoding == 0:
            return self.max_rows
        base, steps = self._base_for(decoding), BASE_STEPS
        if base is None:
            base, steps = self._lower_bound_for(decoding), UNKNOWN_BASE_STEPS
        if base is None or self._since_base >= steps:
            # Request it once: the next step is scheduled before this one is observed.
            self._since_base = 0
            return 0
        rows = min(FIRST_CHUNK, decoding)
        if self._row_cost:
            cost = float(np.quantile(self._row_cost, COST_QUANTILE))
            factor = FIRST_TOKEN_WEIGHT * (prefilling - 1) / decoding
            slack = (self._max_slowdown - 1) * min(max(1.0, factor), MAX_BUDGET_FACTOR)
            rows = int(min(slack * base / cost, self.max_rows)) if cost else self.max_rows
        return max(min(rows, self.max_rows - decoding), SMALLEST_CHUNK)

    def _base_for(self, decoding: int) -> float | None:
        """Seconds of a step with about `decoding` sequences and no prefill; None if unknown.

        Measured for similar numbers only: extrapolated from one sequence to eight, the difference
        would count as the cost of prefill rows, and prompts would starve.
        """
        nearest = min(self._base, key=lambda known: abs(known - decoding), default=None)
        if nearest is None or abs(nearest - decoding) > decoding // 4:
            return None
        return self._measured(nearest)

    def _lower_bound_for(self, decoding: int) -> float | None:
        """Least seconds of such a step, from other numbers of sequences; None if there are none."""
        known = [self._measured(n) * min(1.0, decoding / n) for n in self._base]
        return max(known, default=None)

    def _measured(self, decoding: int) -> float:
        return float(np.quantile(self._base[decoding], BASE_QUANTILE))
