"""Recovery from memory that the device refuses, although the budget allows for it.

Other programs may use the device's memory, too. After a refusal all KV is dropped, and the running
sequences are computed again under tighter limits.

Only errors that MLX raises can be handled. MLX's CPU allocator does not check for refusals: the
process ends with a segmentation fault, and the API process starts another.
"""

from __future__ import annotations

import logging
import re

from glmd.engine.scheduler.scheduler import Scheduler
from glmd.engine.sequence import Sequence

log = logging.getLogger(__name__)

CALM_STEPS = 256
"""Steps without a failure after which the limits are lifted: enough for a long prompt to be
computed alone, in chunks of a quarter."""

RUN_ALONE_AFTER, DROP_AFTER = 2, 3
"""Recent failures from which on one sequence runs at a time, and from which on it is dropped."""

KV_SHARE = 7 / 8
"""KV budget after a failure, as a share of the KV held at the failure."""

_MESSAGES = re.compile(
    # mlx/backend/metal/allocator.cpp and mlx/backend/cuda/allocator.cpp
    r"\[(metal::malloc|malloc_or_wait|malloc)\] Unable to allocate \d+ bytes"
    r"|\[metal::malloc\] Attempting to allocate \d+ bytes which is greater than the maximum"
    r"|\[metal::malloc\] Resource limit \(\d+\) exceeded"
    # mlx/backend/metal/device.cpp, with Metal's description of the error
    r"|\[METAL\] Command buffer execution failed: .*"
    r"(Insufficient Memory|kIOGPUCommandBufferCallbackErrorOutOfMemory)"
    # mlx/backend/cuda/utils.cpp: the failed call, with CUDA's description of the error
    r"|cu\w+\(.*\) failed: out of memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX raised this error because it was refused memory.

    MLX raises RuntimeError with one of a few messages for device memory (checked with MLX 0.32),
    and MemoryError for its own C++ objects.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _MESSAGES.match(str(error)) is not None
    )


class OOMRecovery:
    """Tightens the scheduler's limits after failures, and lifts them later.

    Args:
        least_kv: bytes of KV that the longest sequence needs, the least KV budget.

    Attributes:
        failures: number of failures since the start.
    """

    def __init__(self, scheduler: Scheduler, *, least_kv: int) -> None:
        self.failures = 0
        self._scheduler = scheduler
        self._least_kv = least_kv
        self._max_running = scheduler.max_running
        self._max_rows = scheduler.prefill_budget.max_rows
        self._recent = 0
        self._calm = 0

    def step_succeeded(self) -> None:
        """Count a calm step; after `CALM_STEPS` lift the limits."""
        if not self._recent:
            return
        self._calm += 1
        if self._calm == CALM_STEPS:
            self._recent = 0
            self._scheduler.max_running = self._max_running
            self._scheduler.prefill_budget.max_rows = self._max_rows

    def step_failed(self, error: BaseException) -> list[Sequence]:
        """Drop all KV, send the running sequences back to wait, and tighten the limits.

        No step may be in flight.

        Returns:
            sequences to end with an error, since they failed even with the device to themselves.
        """
        scheduler = self._scheduler
        held = max(scheduler.kv_bytes, self._least_kv)
        scheduler.kv_budget = max(self._least_kv, min(scheduler.kv_budget, int(KV_SHARE * held)))
        dropped = scheduler.reset_kv()
        self.failures += 1
        self._recent += 1
        self._calm = 0
        scheduler.prefill_budget.max_rows = max(1, scheduler.prefill_budget.max_rows // 2)
        if self._recent >= RUN_ALONE_AFTER:
            scheduler.max_running = 1
        log.warning(
            "Out of memory: KV dropped, sequences=%d max_prefill_rows=%d kv_budget_gib=%.2f"
            " error=%s",
            len(dropped),
            scheduler.prefill_budget.max_rows,
            scheduler.kv_budget / 2**30,
            error,
        )
        return dropped if self._recent >= DROP_AFTER else []
