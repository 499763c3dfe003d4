"""Report of a soak test: table and errors."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any, get_args

from load import Outcome, Outcomes
from server import Snapshot

MEBIBYTE = 1 << 20

API_GROWTH = 64 * MEBIBYTE
"""Allowed growth of the API process: its caches of turns, responses and grammars fill."""

ENGINE_GROWTH = 64 * MEBIBYTE
"""Allowed growth of the engine process without the KV cache: kernels, grammars, allocator."""

FILES = 2
"""Allowed additional file descriptors."""

MAX_FAILURE_LATENCY = 1.0
"""Maximum seconds from a crash of the engine to the end of the requests in flight."""

MIN_THROUGHPUT = 0.95
"""Minimum throughput of the last window, relative to the first."""


@dataclass(frozen=True)
class SoakReport:
    """Measurements of one run.

    Attributes:
        kills: number of times the engine was killed, or stopped until the server did so.
        disturbances: faults of other processes, sleeps of all, damaged files and reloads.
        memory: requests so far, and bytes of the API process and of the engine without KV.
        slowest_restart: maximum seconds from a kill until the engine was ready.
        first: tokens per second in the first window without faults.
        last: tokens per second in the last window without faults.
        stats: the engine's counters since its last start.
        load_average: load average of the machine over 15 minutes.
        shutdown_errors: errors during the shutdown.
    """

    seconds: float
    outcomes: Outcomes
    kills: int
    disturbances: int
    memory: list[tuple[int, int, int]]
    restarts: int
    slowest_restart: float
    before: Snapshot
    after: Snapshot
    first: float
    last: float
    stats: dict[str, Any]
    load_average: float
    shutdown_errors: list[str]

    def errors(self, *, judge_speed: bool) -> Iterator[str]:
        """Yield a sentence for each error."""
        for (outcome, reason), count in self.outcomes.reasons.items():
            if outcome == "wrong":
                yield f"{count} × {reason}"
        if len(self.outcomes.canaries) != 1:
            yield f"The canary gave {len(self.outcomes.canaries)} different answers."
        if judge_speed and self.outcomes.failure_latency > MAX_FAILURE_LATENCY:
            seconds = self.outcomes.failure_latency
            yield f"A request failed only {seconds:.2f} s after the engine's crash."
        if self.restarts != self.kills:
            yield f"The engine was killed {self.kills} times, but restarted {self.restarts} times."
        before, after = self.before, self.after
        if after.api_bytes - before.api_bytes > API_GROWTH:
            yield "The API process grew."
        if after.engine_bytes - before.engine_bytes > ENGINE_GROWTH:
            yield "The engine process grew, without its KV cache."
        for name in ("api_files", "engine_files"):
            if getattr(after, name) > getattr(before, name) + FILES:
                yield f"More {name.replace('_', ' ')} are open than before."
        if judge_speed and self.last < MIN_THROUGHPUT * self.first:
            yield f"The last window had {self.last / self.first:.2f} of the first one's throughput."
        yield from self.shutdown_errors

    def table(self) -> Iterator[str]:
        """Yield lines of Markdown."""
        outcomes, before, after = self.outcomes, self.before, self.after
        yield "| requests | completed | refused | failed | left | wrong |"
        yield "|---|---:|---:|---:|---:|---:|"
        names: tuple[Outcome, ...] = get_args(Outcome)
        for kind in sorted({kind for kind, _ in outcomes.counts}):
            yield row(kind, *(outcomes.counts[kind, outcome] for outcome in names))
        yield row("**all**", *(outcomes.total(outcome) for outcome in names))
        yield ""
        yield "| | before | after |"
        yield "|---|---:|---:|"
        yield row("API process, MiB", mib(before.api_bytes), mib(after.api_bytes))
        yield row("engine without KV cache, MiB", mib(before.engine_bytes), mib(after.engine_bytes))
        yield row("API process, file descriptors", before.api_files, after.api_files)
        yield row("engine, file descriptors", before.engine_files, after.engine_files)
        yield row("API process, threads", before.api_threads, after.api_threads)
        yield row("engine, threads", before.engine_threads, after.engine_threads)
        yield row("tokens per second, without faults", f"{self.first:.1f}", f"{self.last:.1f}")
        yield ""
        yield (
            f"Growth per 1,000 requests: API process {self.slope(1):+.1f} MiB, engine without KV"
            f" {self.slope(2):+.1f} MiB. {self.disturbances} times a helper process was killed or"
            " stopped, all processes slept, a file of the disk cache was cut or the settings were"
            " reloaded."
        )
        yield ""
        yield (
            f"{self.seconds:.0f} s on {platform.system()} {platform.machine()}, load average"
            f" {self.load_average:.1f} on {os.cpu_count()} cores. The engine was killed"
            f" {self.kills} times: requests in flight failed within"
            f" {outcomes.failure_latency * 1000:.0f} ms, and the engine was ready within"
            f" {self.slowest_restart:.1f} s. The canary ran {outcomes.canaries.total()} times,"
            f" with {len(outcomes.canaries)} distinct answer(s). Since its last start"
            f" the engine evicted {self.stats['evicted_tokens']:,} tokens and preempted"
            f" {self.stats['preemptions']} times, and restored"
            f" {self.stats['disk_restored_tokens']:,} from disk."
        )

    def slope(self, process: int) -> float:
        """Growth in MiB per 1,000 requests, by the median of the slopes of all pairs (Theil-Sen).

        Args:
            process: 1: API process. 2: engine.
        """
        points = [(each[0], each[process]) for each in self.memory if each[process]]
        slopes = [
            (after - before) / (later - earlier)
            for (earlier, before), (later, after) in combinations(points, 2)
            if later > earlier
        ]
        return 1000 * median(slopes or [0.0]) / MEBIBYTE

    def reasons(self) -> Iterator[str]:
        for (outcome, reason), count in sorted(self.outcomes.reasons.items()):
            yield f"  {outcome:9} {count:5} × {reason}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def mib(nbytes: int) -> str:
    return f"{nbytes / MEBIBYTE:.0f}"
