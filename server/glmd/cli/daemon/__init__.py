"""The background service: its manager, and the server process that it runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from glmd.cli.daemon.launchd import Launchd
from glmd.cli.daemon.spec import ServiceManager
from glmd.cli.daemon.systemd import Systemd
from glmd.errors import ServiceError
from glmd.utils.logging import json_line_to_text

BOOTED = Path("/run/systemd/system")
"""Exists if the machine was booted with systemd (sd_booted(3))."""

POLL = 0.25
"""Seconds between two looks at a server that starts."""

HEALTH_TIMEOUT = 5.0
"""Seconds for a response of `/health`, which waits for nothing."""

LOG_LINES = 12
"""Lines of the log to show when the server does not start."""


def find_manager() -> ServiceManager:
    """Return the service manager of this system.

    Raises:
        ServiceError: neither launchd nor systemd runs here.
    """
    if sys.platform == "darwin":
        return Launchd()
    if BOOTED.is_dir():
        return Systemd()
    raise ServiceError(
        "`glmd service` needs launchd (macOS) or systemd (Linux), and neither runs here. Have your"
        " own supervisor run `glmd serve` and restart it when it fails."
    )


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server.

    Attributes:
        pid: of the API process.
        uptime: seconds.
        memory: resident bytes, child processes included.
        url: base URL; None: the server does not listen yet.
        health: the body of `/health`; None: no response yet.
    """

    pid: int
    uptime: float
    memory: int
    url: str | None
    health: dict[str, Any] | None

    @classmethod
    def find(cls, pid: int) -> ServerProcess | None:
        """Inspect the server with a process id; None if the process has ended."""
        try:
            process = psutil.Process(pid)
            memory = sum(map(resident, (process, *process.children(recursive=True))))
            url = listening_url(process)
            uptime = time.time() - process.create_time()
            return cls(pid, uptime, memory, url, get_health(url) if url else None)
        except psutil.NoSuchProcess:
            return None


def resident(process: psutil.Process) -> int:
    """Return a process's resident bytes, 0 if it has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def listening_url(process: psutil.Process) -> str | None:
    """Return the base URL of a process's socket; loopback for "all addresses"."""
    for connection in process.net_connections(kind="inet"):
        if connection.status == psutil.CONN_LISTEN:
            address, port = connection.laddr
            loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
            return base_url(loopback.get(address, address), port)
    return None


def base_url(host: str, port: int) -> str:
    """Return the URL of a server, with an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def get_health(url: str) -> dict[str, Any] | None:
    """Return the body of `/health`; None without a valid response."""
    try:
        # Proxies of the environment are not for servers on this machine.
        with httpx.Client(trust_env=False, timeout=HEALTH_TIMEOUT) as http:
            body = http.get(f"{url}/health").json()
    except (httpx.TransportError, ValueError):
        return None
    return body if isinstance(body, dict) and "status" in body else None


def loading_progress(health: dict[str, Any]) -> str | None:
    """Format the progress of loading the model; None if `/health` reports none."""
    if not (loading := health.get("loading")):
        return None
    done, total = (loading[name] / 2**30 for name in ("done_bytes", "total_bytes"))
    return f"Loading {health['model']}: {done:.1f} of {total:.1f} GiB"


def wait_until_ready(
    manager: ServiceManager, seconds: float, progress: Callable[[str], None] = lambda _: None
) -> ServerProcess:
    """Wait until the server is ready.

    Args:
        seconds: time limit.
        progress: called with `loading_progress`.

    Raises:
        ServiceError: the server ended, or is not ready in time.
    """
    deadline = time.monotonic() + seconds
    starts = manager.state().starts
    while True:
        state = manager.state()
        server = ServerProcess.find(state.pid) if state.pid is not None else None
        if server is not None and server.health is not None:
            if server.health["status"] == "ready":
                return server
            if line := loading_progress(server.health):
                progress(line)
        ended = state.pid is None and state.last_exit is not None
        restarted = None not in (starts, state.starts) and state.starts != starts
        if ended or restarted or not state.loaded:
            raise ServiceError(
                f"The server did not start: {describe_exit(state.last_exit)}. End of its log:\n"
                + log_tail(manager)
            )
        if time.monotonic() > deadline:
            raise ServiceError(
                f"The server is not ready after {seconds:g} s, but still runs. See"
                " `glmd service status`."
            )
        time.sleep(POLL)


def log_tail(manager: ServiceManager) -> str:
    """Return the last lines of the service's log, as text."""
    command = manager.log_command(LOG_LINES, follow=False)
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    return "\n".join(map(json_line_to_text, done.stdout.splitlines())) or "(empty)"


def describe_exit(status: int | None) -> str:
    """Describe the exit status of a run, as in `subprocess`; None: never ran."""
    if status is None:
        return "it has not run"
    return f"ended by signal {-status}" if status < 0 else f"exited with status {status}"
