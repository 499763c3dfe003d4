"""Prefill budget: prefill rows that a step may have beside decoding sequences.

A reader needs some ten tokens a second and no long gaps; the rest of the time belongs to prompts.
Chunks have the number of rows with which the device computes prompts fastest, within the longest
gap. After a chunk come as many steps without prefill as the rate of the streams asks for.
"""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from glmd.engine.config import EngineConfig
from glmd.engine.scheduler.step_times import GROUPED_ROWS, StepTimes

log = logging.getLogger(__name__)

FIRST_CHUNK = 16
"""Most rows beside decoding sequences before a step with prefill has been measured, and no more
than there are sequences: a row costs no more than one of theirs."""

SMALLEST_CHUNK = 4
"""Least rows of a step with prefill, so that prompts progress."""

GAP_MARGIN = 0.9
"""Share of `max_gap` that a step is planned to take, as durations vary."""

PREFILL_SHARE = 0.25
"""Least share of the time for prefill, where the device is too slow for the streams' rate."""

NEAR_BEST = 0.99
"""Share of the highest prefill rate that a smaller chunk must reach to be preferred for its shorter
gaps."""

UNMEASURED_FACTOR = 0.93
"""Expected time of more rows than were measured, as a share of the time in proportion."""

PROBE_FACTOR = 4
"""Multiple of the longest gap that a step may take to measure `GROUPED_ROWS` rows for the first
time. Below, each row may cost so much that a larger chunk seems impossible."""

MIN_SECONDS = 1e-6
"""Seconds that a step takes at least, whatever the clock says."""

FIRST_TOKEN_WEIGHT = 8
"""Decoding sequences that each short prompt beyond the first outweighs. Short prompts lower the
streams' rate by the ratio of both sides, if that is above 1."""

MAX_RATE_FACTOR = 32
"""Most that short prompts may divide the rate by."""

BASE_STEPS = 128
"""Steps with prefill after which a step without prefill is requested, to measure it."""

UNKNOWN_BASE_STEPS = 4
"""Likewise where only other numbers of decoding sequences have been measured."""

_SIZES = np.concatenate(
    [np.arange(4, 256, 4), np.arange(256, 1024, 32), np.arange(1024, 8193, 128)]
)
"""Chunks to choose from, in rows."""


class PrefillBudget:
    """Divides time between decoding sequences and prefill.

    Attributes:
        max_rows: rows of a step. May be changed.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.max_rows = config.max_step_tokens
        self._interval = 1 / config.min_stream_rate
        self._max_gap = config.max_gap
        self._max_slowdown = config.max_slowdown
        if config.max_slowdown is not None:
            log.warning("deprecated setting: name=max_slowdown use=max_gap")
        self._times = StepTimes()
        self._since_base = 0
        """Steps with prefill since a step without, or since one was requested."""
        self._deficit = 0.0
        """Seconds by which the streams are behind their rate."""
        self._pending_plain_steps = 0
        """Steps without prefill scheduled for the rate and not observed yet."""

    def observe(self, decoding: int, prefill_rows: int, seconds: float) -> None:
        """Learn from the duration of a step with `decoding` sequences."""
        if decoding:
            self._since_base = self._since_base + 1 if prefill_rows else 0
            self._correct(decoding, prefill_rows, seconds)
        self._times.observe(decoding, prefill_rows, seconds)

    def _correct(self, decoding: int, prefill_rows: int, seconds: float) -> None:
        """Replace the estimate in the deficit by the measured seconds."""
        base = self._times.base(decoding)
        if base is None:
            return
        if prefill_rows and self._times.has_prefill:
            rows = np.array([prefill_rows])
            self._add_deficit(seconds - float(self._times.with_prefill(decoding, rows, base)[0]))
        elif not prefill_rows and self._pending_plain_steps:
            self._pending_plain_steps -= 1
            self._add_deficit(seconds - base)

    def prefill_budget(self, decoding: int, prefilling: int) -> int:
        """Prefill rows of the next step.

        Args:
            decoding: sequences that decode in the step.
            prefilling: short prompts in prefill, at least 1. Where they are many beside few
                decoding sequences, their first tokens outweigh the streams' rate.

        Returns:
            0 for a step without prefill.
        """
        if decoding == 0:
            return self.max_rows
        base, steps = self._times.base(decoding), BASE_STEPS
        if base is None:
            base, steps = self._times.lower_bound(decoding), UNKNOWN_BASE_STEPS
        if base is None or self._since_base >= steps:
            # Request it once: the next step is scheduled before this one is observed.
            self._since_base = 0
            return 0
        factor = FIRST_TOKEN_WEIGHT * (prefilling - 1) / decoding
        interval = max(self._interval, base / (1 - PREFILL_SHARE))
        interval *= min(max(1.0, factor), MAX_RATE_FACTOR)
        if self._deficit > 0:
            self._pending_plain_steps += 1
            self._add_deficit(base - interval)
            return 0
        if not self._times.has_prefill:
            return max(min(FIRST_CHUNK, decoding, self.max_rows - decoding), SMALLEST_CHUNK)
        rows, seconds = self._choose(decoding, base, interval)
        self._add_deficit(seconds - interval)
        return rows

    def _choose(self, decoding: int, base: float, interval: float) -> tuple[int, float]:
        """The number of rows with which prompts are computed fastest; seconds of such a step."""
        sizes = _SIZES[self.max_rows - decoding >= _SIZES]
        if not len(sizes):
            sizes = _SIZES[:1]
        total = self._times.with_prefill(decoding, sizes, base)
        longest = max(GAP_MARGIN * self._max_gap, 2 * base)
        if self._max_slowdown is not None:
            longest = min(longest, self._max_slowdown * base)
        grouped = decoding + sizes >= GROUPED_ROWS
        if self._times.few_grouped and grouped.any():
            first = int(grouped.argmax())
            if total[first] <= PROBE_FACTOR * longest:
                return int(sizes[first]), float(total[first])
        allowed = total <= longest
        if not self._times.has_ungrouped and (allowed & grouped).any():
            allowed &= grouped
        if not allowed.any():
            return int(sizes[0]), float(total[0])
        # Steps up to `interval` keep the rate. After longer ones, steps without prefill follow.
        # Larger chunks than were measured are expected to be a little faster, so they are tried.
        hoped = self._times.with_prefill(decoding, sizes, base, beyond=UNMEASURED_FACTOR)
        added = np.maximum(hoped - base, MIN_SECONDS)
        rate = sizes * np.minimum(1 / np.maximum(hoped, MIN_SECONDS), (1 - base / interval) / added)
        rate[~allowed] = 0
        chosen = int((rate >= NEAR_BEST * rate.max()).argmax())
        return int(sizes[chosen]), float(total[chosen])

    def _add_deficit(self, seconds: float) -> None:
        """Change the deficit within bounds, so that a single long step is soon forgotten."""
        most = 2 * max(self._max_gap, self._interval)
        self._deficit = min(max(self._deficit + seconds, -self._interval), most)


OUTPUT_WEIGHT = 2
"""Weight of an output token against a prompt token, as in the paper."""

MAX_CLIENTS = 10_000
"""Clients remembered while one of them waits on; without keys, each address is one."""


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
            forget = not self._active or self._served[name] <= floor
            if forget or len(self._served) > MAX_CLIENTS:
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
