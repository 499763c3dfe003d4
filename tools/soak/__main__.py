"""Soak test: a server under mixed load with random faults.

`make soak`, or `python tools/soak --seconds 60 --ignore-speed` beside other programs.
Exits with 1 if a request had a wrong outcome, a resource leaked or grew, the canary changed its
answer, requests failed too late after a crash, or the last window without faults was slower than
the first.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "server"))

from load import Load
from report import SoakReport
from server import SoakServer

WORKERS = 6

SLEEP_SECONDS = 30.0
"""Longer than `HANG_TIMEOUT`: the engine must not be restarted for it."""

MEMORY_INTERVAL = 3.0

KILL_INTERVAL = 62.0
"""Minimum seconds between two kills in a long run: a minute resets the delay of a restart."""


class EngineKiller:
    """Kills the engine at random times and measures the recovery."""

    def __init__(self, server: SoakServer, load: Load, rng: random.Random, interval: float) -> None:
        self.count = 0
        self.slowest_restart = 0.0
        self._server = server
        self._load = load
        self._rng = rng
        self._interval = interval
        self.lock = asyncio.Lock()
        """Held while processes are stopped, so that nobody else lets them go on."""

    async def run_until(self, end: float) -> None:
        """Kill at least once, however late."""
        while True:
            pause = self._interval * self._rng.uniform(1, 1.2)
            if self.count and time.monotonic() + pause > end:
                return
            await asyncio.sleep(pause)
            number = self._rng.choice([signal.SIGKILL, signal.SIGABRT, signal.SIGSTOP])
            async with self.lock:
                await self._kill(number)

    async def _kill(self, number: signal.Signals) -> None:
        in_flight = set(self._load.pending)
        await asyncio.to_thread(self._server.kill_engine, number)  # returns once it is dead
        killed_at = time.monotonic()
        self.count += 1
        if in_flight:
            await asyncio.wait(in_flight)
        outcomes = self._load.outcomes
        outcomes.failure_latency = max(outcomes.failure_latency, time.monotonic() - killed_at)
        await asyncio.to_thread(self._server.wait_until_ready)
        self.slowest_restart = max(self.slowest_restart, time.monotonic() - killed_at)
        await self._load.complete_canary()


async def disturb(
    server: SoakServer,
    load: Load,
    rng: random.Random,
    lock: asyncio.Lock,
    interval: float,
    end: float,
) -> int:
    """Disturb everything but the engine alone, at random times; return how often.

    Each fault occurs at least once, however late.
    """
    faults = [
        lambda: server.disturb_helper(rng.randrange(9), signal.SIGKILL),
        lambda: server.disturb_helper(rng.randrange(9), signal.SIGSTOP),
        server.press_disk,
        server.reload,
    ]
    if end - time.monotonic() > 6 * SLEEP_SECONDS:  # else nothing else would be tested
        faults.append(lambda: server.sleep(SLEEP_SECONDS))
    count = 0
    while count < len(faults) or time.monotonic() + 2 * interval < end:
        await asyncio.sleep(interval * rng.uniform(0.5, 1.5))
        async with lock:
            await asyncio.to_thread(faults[count % len(faults)])
            await load.complete_canary()
        count += 1
    return count


async def watch_memory(
    server: SoakServer, load: Load, goes_on: Callable[[], bool]
) -> list[tuple[int, int, int]]:
    """Requests so far, and bytes of both processes, every few seconds."""
    seen = []
    while goes_on():
        memory = await asyncio.to_thread(server.memory)
        seen.append((load.outcomes.counts.total(), *memory))
        await asyncio.sleep(MEMORY_INTERVAL)
    return seen


async def window(load: Load, seconds: float) -> float:
    """Return tokens per second of plain requests, without faults."""
    start, tokens = time.monotonic(), load.outcomes.tokens
    await load.run(Load.plain, WORKERS, lambda: time.monotonic() < start + seconds)
    return (load.outcomes.tokens - tokens) / (time.monotonic() - start)


async def soak(seconds: float, seed: int, folder: Path) -> SoakReport:
    rng = random.Random(seed)
    server = SoakServer(folder, folder / "log")
    start = time.monotonic()
    try:
        load = Load(server.url, seed, list(server.keys.values()))
        warm = start + seconds / 15
        await load.run(Load.anything, WORKERS, lambda: time.monotonic() < warm)
        span = min(60.0, seconds / 6)
        first = await window(load, span)
        before = server.snapshot()
        end = max(start + seconds - span, time.monotonic() + seconds / 3)
        killer = EngineKiller(server, load, rng, min(KILL_INTERVAL, seconds / 8))
        faults = asyncio.gather(
            # the last engine must run as long as the first one before the comparison
            killer.run_until(end - span),
            disturb(server, load, rng, killer.lock, seconds / 40, end - span),
        )

        def goes_on() -> bool:
            return time.monotonic() < end or not faults.done()

        _, memory, (_, disturbances) = await asyncio.gather(
            load.run(Load.anything, WORKERS, goes_on),
            watch_memory(server, load, goes_on),
            faults,
        )
        last = await window(load, span)
        after = server.snapshot()
        engine = server.status()["engine"]
        shutdown_errors = server.stop()
    except BaseException:
        server.kill()
        print((folder / "log").read_text()[-4000:], file=sys.stderr)
        raise
    return SoakReport(
        seconds=time.monotonic() - start,
        outcomes=load.outcomes,
        kills=killer.count,
        disturbances=disturbances,
        memory=memory,
        restarts=engine["restarts"],
        stats=engine["stats"],
        load_average=os.getloadavg()[2],
        slowest_restart=killer.slowest_restart,
        before=before,
        after=after,
        first=first,
        last=last,
        shutdown_errors=shutdown_errors,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None, help="default: random; printed")
    parser.add_argument(
        "--ignore-speed",
        action="store_true",
        help="print times and throughput, but do not fail because of them",
    )
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"Soaking for {options.seconds:.0f} s, seed {seed}.", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report = asyncio.run(soak(options.seconds, seed, Path(folder)))
    print(*report.table(), "", *report.reasons(), sep="\n")
    errors = list(report.errors(judge_speed=not options.ignore_speed))
    print(*(f"WRONG: {sentence}" for sentence in errors), sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
