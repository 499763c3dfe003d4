"""The server under test, and the resources of its processes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from glmd.utils.memory import process_memory_bytes

START_TIMEOUT = 300.0

BUDGET = "74MiB"
"""Room for the demo's weights and about 5,500 tokens of KV cache, of which a request may use 4,096:
evictions are constant and preemptions frequent."""

HANG_TIMEOUT = 25.0
"""Seconds after which a stopped engine is restarted. A loaded machine needs a minute to start one,
and it may be silent for five times as long then."""

REQUEST_TIMEOUT = 240.0

DISK_FULL_SECONDS = 3.0

DISK_CACHE = "64MiB"
"""About 50,000 tokens of KV, so that the disk cache evicts, too."""


@dataclass(frozen=True)
class Snapshot:
    """Resources of the idle server's processes.

    Attributes:
        engine_bytes: memory without the KV cache.
    """

    api_bytes: int
    engine_bytes: int
    api_files: int
    engine_files: int
    api_threads: int
    engine_threads: int


class SoakServer:
    """A process `glmd serve` with the demo."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder = folder
        self._config = folder / "config.toml"
        self._config.touch()
        # MLX's compiler on CPUs keeps its results in TMPDIR. Beside other programs, compiling takes
        # longer than an engine may be silent.
        compiled = Path(tempfile.gettempdir()) / "mlx"
        compiled.mkdir(exist_ok=True)
        (folder / "mlx").symlink_to(compiled)
        self.keys = {name: secrets.token_hex() for name in ("alice", "bob")}
        """By client. The admin's key is `admin`."""
        self.admin = {"authorization": f"Bearer {secrets.token_hex()}"}
        key_file = folder / "keys"
        key_file.touch(0o600)
        key_file.write_text("\n".join(self.keys.values()))
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "glmd", "serve", "--port", "0"),
                    *("--memory-budget", BUDGET),
                    *("--config", str(self._config), "--api-key-file", str(key_file)),
                ],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env={
                    **os.environ,
                    "TMPDIR": str(folder),
                    "GLMD_RESPONSE_STORE": "4MiB",
                    "GLMD_API_KEY": self.admin["authorization"].removeprefix("Bearer "),
                    "GLMD_HANG_TIMEOUT": str(HANG_TIMEOUT),
                    "GLMD_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT),
                    "GLMD_DISK_CACHE": DISK_CACHE,
                    "GLMD_DISK_CACHE_FOLDER": str(folder / "kv"),
                },
            )
        self._api = psutil.Process(self._process.pid)
        self.url = self._find_url(log)
        self.wait_until_ready()

    def _find_url(self, log: Path) -> str:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                return found[0]
            time.sleep(0.05)
        self.kill()
        sys.exit(f"glmd serve did not start:\n{log.read_text()}")

    def status(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/glmd/status", timeout=60, headers=self.admin)
        status: dict[str, Any] = answer.raise_for_status().json()
        return status

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while httpx.get(f"{self.url}/health", timeout=30).status_code != httpx.codes.OK:
            if time.monotonic() > deadline:
                self.kill()
                sys.exit("The engine did not become ready.")
            time.sleep(0.05)

    def kill_engine(self, number: signal.Signals) -> None:
        """Kill the engine; after SIGSTOP the server has to notice and to restart it."""
        engine = self._engine()
        engine.send_signal(number)
        if number is signal.SIGSTOP:
            engine.wait(START_TIMEOUT)

    def disturb_helper(self, index: int, number: signal.Signals) -> None:
        """Send a signal to one of the processes for the template, grammars and bodies."""
        engine = self._engine()
        helpers = [child for child in self._api.children() if child != engine]
        if helpers:
            with contextlib.suppress(psutil.NoSuchProcess):
                helpers[index % len(helpers)].send_signal(number)

    def sleep(self, seconds: float) -> None:
        """Stop all processes, as a laptop does that sleeps, and let them go on."""
        group = [self._api, *self._api.children(recursive=True)]
        for number, pause in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0)):
            for process in group:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            time.sleep(pause)

    def press_disk(self) -> None:
        """Damage a file of the disk cache, and let no process write a file for a while.

        The limit of a file's size stands for a full disk: the same calls fail. macOS lets nobody
        set it for another process; there the cache's folder is away instead.
        """
        kept = self._folder / "kv"
        for file in sorted(kept.glob("*.safetensors"))[:1]:
            with contextlib.suppress(OSError):
                os.truncate(file, file.stat().st_size // 2)
        if sys.platform != "linux":
            away = kept.rename(self._folder / "away")
            time.sleep(DISK_FULL_SECONDS)
            shutil.rmtree(kept, ignore_errors=True)
            away.rename(kept)
            return
        processes = (self._api, self._engine())
        for size, pause in ((0, DISK_FULL_SECONDS), (resource.RLIM_INFINITY, 0)):
            for process in processes:
                process.rlimit(psutil.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            time.sleep(pause)

    def reload(self) -> None:
        """Change a setting and have it read."""
        self._config.write_text(f"max_tokens = {random.randrange(500, 1000)}\n")
        self._process.send_signal(signal.SIGHUP)

    def memory(self) -> tuple[int, int]:
        """Bytes of the API process, and of the engine without KV; 0: it does not run."""
        engine = 0
        with contextlib.suppress(psutil.Error, KeyError, TypeError):
            status = self.status()["engine"]
            engine = process_memory_bytes(status["pid"]) - int(status["stats"]["kv_bytes"])
        return process_memory_bytes(self._api.pid), engine

    def _engine(self) -> psutil.Process:
        self.wait_until_ready()
        return psutil.Process(self.status()["engine"]["pid"])

    def snapshot(self) -> Snapshot:
        """Wait until the engine is idle and measure. Clients must have disconnected."""
        deadline = time.monotonic() + 60
        while (stats := self.status()["engine"]["stats"])["running"] or stats["waiting"]:
            if time.monotonic() > deadline:
                sys.exit(f"The engine is busy without requests: {stats}")
            time.sleep(0.2)
        engine = psutil.Process(self.status()["engine"]["pid"])
        files = []
        for _ in range(20):  # closed connections take a moment
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
        """Stop the server with SIGTERM; return errors."""
        children = self._api.children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            return ["The server did not exit within 60 s of SIGTERM."]
        errors = [f"The server exited with code {code} after SIGTERM."] if code else []
        _, alive = psutil.wait_procs(children, timeout=10)
        errors += [f"Process {child.pid} outlived the server." for child in alive]
        errors += [f"{left} was not removed." for left in self._folder.glob("glmd-*")]
        return errors

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
