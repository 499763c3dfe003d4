"""Weeks in minutes: a real server under mixed load, with faults at random, and an account of it.

`make soak`, or `python tools/soak --seconds 60 --ignore-speed` where other programs run.
Ends with 1 if a request ended as none may, if anything is left behind or has grown, if the canary
changed its answer, if requests heard of their engine's death too late, or if the last minute
without faults was slower than the first.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "server"))

from load import Load
from report import Findings
from server import Server

WORKERS = 6

BETWEEN_DEATHS = 62.0
"""Seconds, at least, between two deaths of the engine in a long run: after a minute of life the
pause before a restart is the shortest again."""


class Deaths:
    """Kills the engine now and then, and watches what comes of it."""

    def __init__(self, server: Server, load: Load, rng: random.Random, pause: float) -> None:
        self.count = 0
        self.slowest_return = 0.0
        self._server = server
        self._load = load
        self._rng = rng
        self._pause = pause

    async def strike_until(self, end: float) -> None:
        while True:
            pause = self._pause * self._rng.uniform(1, 1.2)
            if time.monotonic() + pause > end:
                return
            await asyncio.sleep(pause)
            await self._strike(self._rng.choice([signal.SIGKILL, signal.SIGABRT]))

    async def _strike(self, number: signal.Signals) -> None:
        victims = set(self._load.pending)
        await asyncio.to_thread(self._server.kill_engine, number)
        died = time.monotonic()
        self.count += 1
        if victims:
            await asyncio.wait(victims)
        self._load.account.told = max(self._load.account.told, time.monotonic() - died)
        await asyncio.to_thread(self._server.wait_until_ready)
        self.slowest_return = max(self.slowest_return, time.monotonic() - died)


async def window(load: Load, seconds: float) -> float:
    """Tokens per second of plain requests, without faults."""
    began, tokens = time.monotonic(), load.account.tokens
    await load.run(Load.plain, WORKERS, began + seconds)
    return (load.account.tokens - tokens) / (time.monotonic() - began)


async def soak(seconds: float, seed: int, folder: Path) -> Findings:
    rng = random.Random(seed)
    server = Server(folder, folder / "log")
    began = time.monotonic()
    try:
        load = Load(server.url, seed)
        await load.run(Load.anything, WORKERS, time.monotonic() + seconds / 15)  # warm-up
        span = min(60.0, seconds / 6)
        first = await window(load, span)
        before = server.snapshot()
        end = max(began + seconds - span, time.monotonic() + seconds / 3)
        deaths = Deaths(server, load, rng, min(BETWEEN_DEATHS, seconds / 8))
        await asyncio.gather(
            load.run(Load.anything, WORKERS, end),
            # The last engine lives on long enough to be compared with the first one.
            deaths.strike_until(end - span),
        )
        last = await window(load, span)
        after = server.snapshot()
        engine = server.status()["engine"]
        ending = server.stop()
    except BaseException:
        server.kill()
        print((folder / "log").read_text()[-4000:], file=sys.stderr)
        raise
    return Findings(
        seconds=time.monotonic() - began,
        account=load.account,
        deaths=deaths.count,
        restarts=engine["restarts"],
        stats=engine["stats"],
        load_average=os.getloadavg()[2],
        slowest_return=deaths.slowest_return,
        before=before,
        after=after,
        first=first,
        last=last,
        ending=ending,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None, help="none: a new one, which is printed")
    parser.add_argument(
        "--ignore-speed",
        action="store_true",
        help="print times and throughput; do not judge by them",
    )
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"Soaking for {options.seconds:.0f} s, seed {seed}.", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        findings = asyncio.run(soak(options.seconds, seed, Path(folder)))
    print(*findings.table(), "", *findings.reasons(), sep="\n")
    wrong = list(findings.wrong(judge_speed=not options.ignore_speed))
    print(*(f"WRONG: {sentence}" for sentence in wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
