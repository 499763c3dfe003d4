"""Start-up time of `glmd serve`: from the command to `/health` answering 200.

    python benchmarks/startup.py --against b5dcc5e

Starts the server on the demo several times, this checkout and another commit in turn, and prints
medians: CPU seconds of the engine process until ready, wall seconds until `/health` is 200, and
the resident memory of both processes at that moment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).parents[1]

POLL = 0.01
"""Seconds between two questions for `/health`."""

TIMEOUT = 120.0
"""Seconds after which a start has failed."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the server.

    Attributes:
        wall: seconds from the command to `/health` 200.
        engine_cpu: user and system seconds of the engine process by then.
        api_cpu: user and system seconds of the API process by then.
        engine_mib: resident memory of the engine process.
        api_mib: resident memory of the API process.
    """

    wall: float
    engine_cpu: float
    api_cpu: float
    engine_mib: float
    api_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="COMMIT", help="commit to compare this checkout with")
    parser.add_argument("--runs", type=int, default=7, help="starts of each (default 7)")
    parser.add_argument("--model", default=None, help="checkpoint (default: the demo)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        trees = {"this checkout": ROOT / "server"}
        if options.against:
            trees[options.against] = stack.enter_context(checked_out(options.against))
        for tree in trees.values():
            measure_start(tree, options.model)  # Writes byte code and warms the disk cache.
        starts: dict[str, list[Start]] = {name: [] for name in trees}
        for _ in range(options.runs):
            for name, tree in trees.items():
                starts[name].append(measure_start(tree, options.model))
    print_table(starts)


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Extract the package of a commit into a temporary folder, and return the import path."""
    with tempfile.TemporaryDirectory(prefix="glmd-startup-") as folder:
        archive = subprocess.run(
            ["git", "archive", commit, "server"], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder) / "server"


def measure_start(tree: Path, model: str | None) -> Start:
    """Start the server of an import path, wait for `/health` 200, and stop the server."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "glmd", "serve", *([model] if model else [])]
    began = time.perf_counter()
    server = subprocess.Popen(
        [*command, "--port", str(port), "--log-level", "ERROR"],
        env={**os.environ, "PYTHONPATH": str(tree)},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not is_healthy(port):
            if server.poll() is not None or time.perf_counter() - began > TIMEOUT:
                raise SystemExit(f"{tree}: the server does not start.")
            time.sleep(POLL)
        wall = time.perf_counter() - began
        api = psutil.Process(server.pid)
        engine = next(each for each in api.children() if "glmd.engine.main" in each.cmdline())
        return Start(
            wall,
            cpu_seconds(engine),
            cpu_seconds(api),
            engine.memory_info().rss / 2**20,
            api.memory_info().rss / 2**20,
        )
    finally:
        server.terminate()
        server.wait()


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def print_table(starts: dict[str, list[Start]]) -> None:
    """Print medians, and the ratio of the first row to the second."""
    columns = list(Start.__dataclass_fields__)
    print(f"{'':16}" + "".join(f"{column:>12}" for column in columns))
    rows = [
        [median(getattr(start, c) for start in runs) for c in columns] for runs in starts.values()
    ]
    for name, row in zip(starts, rows, strict=True):
        print(f"{name:16}" + "".join(f"{value:12.2f}" for value in row))
    if len(rows) == 2:
        ratios = [mine / other for mine, other in zip(*rows, strict=True)]
        print(f"{'ratio':16}" + "".join(f"{ratio:12.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
