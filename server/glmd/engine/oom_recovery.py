"""When the device refuses memory that the budget had promised, as it may where other programs
want it too: all KV is given up, and what ran is computed anew, with less at once.

Only what MLX raises can be survived. Metal ends the process where memory runs out in the midst of
a kernel; then the supervisor starts another one.
"""

from __future__ import annotations

import logging
import re

from glmd.engine.scheduler.scheduler import Scheduler
from glmd.engine.sequence import Sequence

log = logging.getLogger(__name__)

CALM = 256
"""Steps without another failure after which the limits are lifted: enough for a long prompt to be
computed alone, in chunks of a quarter."""

ALONE_FROM, END_FROM = 2, 3
"""Failures from which on sequences run alone, and from which on even that is given up."""

KV_SHARE = 7 / 8
"""Of the KV that was held at a failure, so much may be held from then on."""

_WORDS = re.compile(r"malloc|allocat|out of memory|insufficient memory|resource limit", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX says with this error that it was refused memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None
    )


class OOMRecovery:
    """Counts failures, and tightens and lifts the scheduler's limits accordingly.

    Attributes:
        failures: of all times.
    """

    def __init__(self, scheduler: Scheduler, *, least_kv: int) -> None:
        """
        Args:
            least_kv: bytes that the longest sequence needs, below which the KV budget stays not.
        """
        self.failures = 0
        self._scheduler = scheduler
        self._least_kv = least_kv
        self._max_running = scheduler.max_running
        self._max_rows = scheduler.prefill_budget.max_rows
        self._recent = 0
        self._calm = 0

    def step_succeeded(self) -> None:
        if not self._recent:
            return
        self._calm += 1
        if self._calm == CALM:
            self._recent = 0
            self._scheduler.max_running = self._max_running
            self._scheduler.prefill_budget.max_rows = self._max_rows

    def step_failed(self, error: BaseException) -> list[Sequence]:
        """Give up all KV and tighten the limits; what ran waits, and no step may be in flight.

        Returns:
            the sequences that are beyond help.
        """
        scheduler = self._scheduler
        held = scheduler.kv_bytes
        scheduler.kv_budget = max(
            self._least_kv, int(min(scheduler.kv_budget, KV_SHARE * max(held, self._least_kv)))
        )
        dropped = scheduler.reset_kv()
        self.failures += 1
        self._recent += 1
        self._calm = 0
        scheduler.prefill_budget.max_rows = max(1, scheduler.prefill_budget.max_rows // 2)
        if self._recent >= ALONE_FROM:
            scheduler.max_running = 1
        log.warning(
            "The device refused memory (%s). %d sequences are computed anew, with up to %d rows"
            " per step, and KV is limited to %.2f GiB from now on.",
            error,
            len(dropped),
            scheduler.prefill_budget.max_rows,
            scheduler.kv_budget / 2**30,
        )
        return dropped if self._recent >= END_FROM else []
