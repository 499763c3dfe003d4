"""The server under test: a real `glmd serve`, and what the system says of its processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from glmd.utils.memory import process_memory_bytes

STARTS_WITHIN = 120.0

BUDGET = "56MiB"
"""Room for some 5,500 tokens of KV beside the demo's weights, of which one answer may take 4,096:
there is always something to evict, and often something to preempt."""


@dataclass(frozen=True)
class Snapshot:
    """What the server's processes hold at one moment, at rest."""

    api_bytes: int
    engine_bytes: int
    """Without what the tree holds."""
    api_files: int
    engine_files: int
    api_threads: int
    engine_threads: int


class Server:
    """`glmd serve` on the demo, with its temporary files in `folder` and its log in `log`."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder = folder
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "glmd", "serve", "--port", "0", "--memory-budget", BUDGET],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env={**os.environ, "TMPDIR": str(folder), "GLMD_RESPONSE_STORE": "4MiB"},
            )
        self._api = psutil.Process(self._process.pid)
        self.url = self._find_url(log)
        self.wait_until_ready()

    def _find_url(self, log: Path) -> str:
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline and self._process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                return found[0]
            time.sleep(0.05)
        self.kill()
        sys.exit(f"glmd serve did not start:\n{log.read_text()}")

    def status(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/glmd/status", timeout=30)
        status: dict[str, Any] = answer.raise_for_status().json()
        return status

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTS_WITHIN
        while httpx.get(f"{self.url}/health", timeout=30).status_code != httpx.codes.OK:
            if time.monotonic() > deadline:
                self.kill()
                sys.exit("The engine did not come up.")
            time.sleep(0.05)

    def kill_engine(self, number: signal.Signals) -> None:
        pid = self.status()["engine"]["pid"]
        if pid is not None:
            os.kill(pid, number)

    def snapshot(self) -> Snapshot:
        """Wait for rest, then look. Clients must have closed their connections."""
        deadline = time.monotonic() + 60
        while (stats := self.status()["engine"]["stats"])["running"] or stats["waiting"]:
            if time.monotonic() > deadline:
                sys.exit(f"Nobody asks for anything any more, but the engine works: {stats}")
            time.sleep(0.2)
        engine = psutil.Process(self.status()["engine"]["pid"])
        files = []
        for _ in range(20):  # Closed connections take a moment to be noticed.
            files.append(self._api.num_fds())
            time.sleep(0.1)
        return Snapshot(
            api_bytes=process_memory_bytes(self._api.pid),
            engine_bytes=process_memory_bytes(engine.pid) - int(stats["kv_bytes"]),
            api_files=min(files),
            engine_files=engine.num_fds(),
            api_threads=self._api.num_threads(),
            engine_threads=engine.num_threads(),
        )

    def stop(self) -> list[str]:
        """End the server as a service manager does; returns what is wrong with how it ended."""
        children = self._api.children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            return ["SIGTERM did not end the server within a minute."]
        wrong = [f"SIGTERM ended the server with exit code {code}."] if code else []
        _, alive = psutil.wait_procs(children, timeout=10)
        wrong += [f"Process {child.pid} outlived the server." for child in alive]
        wrong += [f"{left} is left behind." for left in self._folder.glob("glmd-*")]
        return wrong

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
