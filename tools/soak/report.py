"""What a soak has found, as a table and as a verdict."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from load import Account, Outcome
from server import Snapshot

MEBIBYTE = 1 << 20

API_GROWTH = 64 * MEBIBYTE
"""Of the API process, over a whole run: its stores of turns, responses and grammars fill."""

ENGINE_GROWTH = 64 * MEBIBYTE
"""Of the engine beside the tree, as far as its kernels, grammars and allocator vary."""

FILES = 2
"""File descriptors that may come and go."""

TOLD_WITHIN = 1.0
"""Seconds from the engine's death to the end of what was in flight."""

LEAST_THROUGHPUT = 0.95
"""Of the last window's, in that of the first."""


@dataclass(frozen=True)
class Findings:
    """Everything that a run has measured.

    Attributes:
        first, last: tokens per second in the windows without faults.
        deaths: how often the engine was killed.
        slowest_return: seconds until the next request could be served, the longest.
        stats: the engine's counters at the end, since its last start.
        load_average: of the machine, over the last minutes.
        ending: what was wrong with how the server ended.
    """

    seconds: float
    account: Account
    deaths: int
    restarts: int
    slowest_return: float
    before: Snapshot
    after: Snapshot
    first: float
    last: float
    stats: dict[str, Any]
    load_average: float
    ending: list[str]

    def wrong(self, *, judge_speed: bool) -> Iterator[str]:
        """Sentences on what must not be."""
        for (outcome, reason), count in self.account.reasons.items():
            if outcome == "wrong":
                yield f"{count} × {reason}"
        if len(self.account.canaries) != 1:
            yield f"The canary gave {len(self.account.canaries)} different answers."
        if judge_speed and self.account.told > TOLD_WITHIN:
            yield f"A request was told of its engine's death only after {self.account.told:.2f} s."
        if self.restarts != self.deaths:
            yield f"The engine was killed {self.deaths} times, but restarted {self.restarts} times."
        before, after = self.before, self.after
        if after.api_bytes - before.api_bytes > API_GROWTH:
            yield "The API process has grown."
        if after.engine_bytes - before.engine_bytes > ENGINE_GROWTH:
            yield "The engine has grown beyond its tree."
        for name in ("api_files", "engine_files"):
            if getattr(after, name) > getattr(before, name) + FILES:
                yield f"More {name.replace('_', ' ')} are open than before."
        if judge_speed and self.last < LEAST_THROUGHPUT * self.first:
            yield f"The last window had {self.last / self.first:.2f} of the first one's throughput."
        yield from self.ending

    def table(self) -> Iterator[str]:
        """Markdown."""
        account, before, after = self.account, self.before, self.after
        yield "| requests | completed | refused | failed | left | wrong |"
        yield "|---|---:|---:|---:|---:|---:|"
        outcomes: tuple[Outcome, ...] = get_args(Outcome)
        for kind in sorted({kind for kind, _ in account.counts}):
            yield row(kind, *(account.counts[kind, outcome] for outcome in outcomes))
        yield row("**all**", *(account.total(outcome) for outcome in outcomes))
        yield ""
        yield "| | before | after |"
        yield "|---|---:|---:|"
        yield row("API process, MiB", mib(before.api_bytes), mib(after.api_bytes))
        yield row("engine beside its tree, MiB", mib(before.engine_bytes), mib(after.engine_bytes))
        yield row("API process, file descriptors", before.api_files, after.api_files)
        yield row("engine, file descriptors", before.engine_files, after.engine_files)
        yield row("API process, threads", before.api_threads, after.api_threads)
        yield row("engine, threads", before.engine_threads, after.engine_threads)
        yield row("tokens per second, without faults", f"{self.first:.1f}", f"{self.last:.1f}")
        yield ""
        yield (
            f"{self.seconds:.0f} s on {platform.system()} {platform.machine()}, load average"
            f" {self.load_average:.1f} on {os.cpu_count()} cores. The engine was killed"
            f" {self.deaths} times: all that was in flight was told within"
            f" {account.told * 1000:.0f} ms, and the next request could be served within"
            f" {self.slowest_return:.1f} s. The canary answered {account.canaries.total()} times,"
            f" in {len(account.canaries)} way{'s'[: len(account.canaries) != 1]}. In its last life"
            f" the engine evicted {self.stats['evicted_tokens']:,} tokens and preempted"
            f" {self.stats['preemptions']} times."
        )

    def reasons(self) -> Iterator[str]:
        for (outcome, reason), count in sorted(self.account.reasons.items()):
            yield f"  {outcome:9} {count:5} × {reason}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def mib(nbytes: int) -> str:
    return f"{nbytes / MEBIBYTE:.0f}"
