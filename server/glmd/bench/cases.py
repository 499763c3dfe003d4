"""The engine benchmark's rows: which workload, what is read from it, and what it must be."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from glmd.bench import workloads
from glmd.bench.trace import Trace
from glmd.bench.workloads import Prompts, Workload

STRAY_BYTES = 1 << 20
"""Arrays that may outlive all requests beside weights and stored KV: none by design, but MLX
itself keeps a few constants."""

SLACK_BYTES = 2 * mmap.PAGESIZE
"""MLX's allocator serves an array from a freed buffer that is up to two pages too large, and
counts the buffer."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One number of a workload and its target.

    Attributes:
        ratio: glmd must be so many times better than mlx-lm, if set.
        bound: glmd's number must be at least (or at most) so much, if set.
    """

    what: str
    unit: str
    better: Literal["higher", "lower"]
    read: Callable[[Trace], float]
    ratio: float | None = None
    bound: float | None = None

    def advantage(self, glmd: float, other: float) -> float | None:
        """How many times better glmd is; None where one has nothing to compare with."""
        good, worse = (glmd, other) if self.better == "higher" else (other, glmd)
        return good / worse if good > 0 and worse > 0 else None

    def met(self, glmd: float, advantage: float | None) -> bool:
        """Whether both targets are reached."""
        within = self.bound is None or (
            glmd >= self.bound if self.better == "higher" else glmd <= self.bound
        )
        faster = self.ratio is None or (advantage is not None and advantage >= self.ratio)
        return within and faster


@dataclass(frozen=True, slots=True)
class Case:
    workload: Workload
    goals: tuple[Goal, ...]


def _faster(ratio: float) -> Goal:
    return Goal("decode", "tokens/s", "higher", Trace.decode_rate, ratio=ratio)


def cases(prompts: Prompts, kv_bytes_per_token: int) -> Iterator[Case]:
    """All rows of the table in docs/benchmarks.md, in its order."""
    for rows in (1, 8, 32):
        # Few rows are quick: 48 tokens of a small model's single stream are a third of a second.
        new = max(48, 256 // rows)
        yield Case(workloads.decode(prompts, rows, new=new), (_faster(1.0),))
    yield Case(workloads.ragged(prompts), (_faster(4.0),))

    def kv_overhead(trace: Trace) -> float:
        return trace.kv_bytes / (trace.least_kv_tokens() * kv_bytes_per_token)

    kv = Goal("KV held / KV needed", "×", "lower", kv_overhead, bound=1.15)
    yield Case(workloads.shared_prefix(prompts), (kv, _faster(1.0)))
    yield Case(workloads.long_context(prompts), (_faster(1.0),))

    first = Goal("first token", "s", "lower", Trace.first_token_seconds, ratio=1.5)
    yield Case(workloads.returning(prompts), (first,))

    def stall(trace: Trace) -> float:
        return trace.longest_gap() / trace.median_step()

    def undisturbed(trace: Trace) -> float:
        return trace.longest_step() / trace.median_step()

    in_steps = Goal("longest gap / median step", "×", "lower", stall, bound=3.0)
    gap = Goal("longest gap", "s", "lower", Trace.longest_gap, ratio=5.0)
    answer = Goal("first token of that prompt", "s", "lower", Trace.first_token_seconds)
    before = Goal("longest gap before it / median step", "×", "lower", undisturbed)
    yield Case(workloads.interrupted(prompts), (in_steps, before, gap, answer))

    overall = Goal("arrival to end", "tokens/s", "higher", Trace.overall_rate, ratio=1.0)
    yield Case(workloads.joining(prompts), (overall,))

    crowd = workloads.together(prompts)
    least = workloads.unique_tokens(r.prompt for r in crowd.waves[0].requests)
    yield Case(crowd, (Goal("prompt tokens computed", "", "lower", _computed, bound=least),))

    kept = Goal("cached", "of the prompt", "higher", Trace.cached_share, bound=0.8)
    yield Case(workloads.cancelled(prompts), (kept,))

    stray = Goal(
        "memory at rest beside weights and stored KV", "MiB", "lower", _stray_mib,
        bound=STRAY_BYTES / 2**20,
    )  # fmt: skip
    yield Case(workloads.mixed(prompts), (stray,))


def _computed(trace: Trace) -> float:
    return float(trace.computed)


def _stray_mib(trace: Trace) -> float:
    slack = SLACK_BYTES * trace.resting_arrays
    return max(0, trace.resting_bytes - trace.resting_kv_bytes - slack) / 2**20
