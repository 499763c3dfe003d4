"""Where the service listens and how its model is: asked of the process and of `/health`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from glmd.cli.daemon.manager import Manager
from glmd.errors import ServiceError
from glmd.utils.logging import for_people

POLL = 0.25
"""Seconds between two looks while the server comes up."""

ANSWER = 5.0
"""Seconds that a server has to answer `/health`, which waits for nothing."""

LAST_LINES = 12
"""Of the log, shown when the server does not come up."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        pid: of its API process.
        uptime: seconds.
        memory: resident bytes of it and its engine.
        url: where it listens; None: not yet.
        health: what `/health` says; None: nothing yet.
    """

    pid: int
    uptime: float
    memory: int
    url: str | None
    health: dict[str, Any] | None


def look(pid: int) -> Server | None:
    """The server with that process id; None: it has just gone."""
    try:
        process = psutil.Process(pid)
        memory = resident(process) + sum(map(resident, process.children(recursive=True)))
        url = listening_at(process)
        return Server(
            pid=pid,
            uptime=time.time() - process.create_time(),
            memory=memory,
            url=url,
            health=ask(url) if url else None,
        )
    except psutil.NoSuchProcess:
        return None


def resident(process: psutil.Process) -> int:
    """Its resident bytes; 0 once it is gone."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def listening_at(process: psutil.Process) -> str | None:
    """The base URL of the socket that a process listens on; loopback for "all addresses"."""
    for connection in process.net_connections(kind="inet"):
        if connection.status == psutil.CONN_LISTEN:
            address, port = connection.laddr
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104
            return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return None


def ask(url: str) -> dict[str, Any] | None:
    """The body of `/health`; None: there was no answer that is one."""
    try:
        # Straight there: a proxy from the environment has no business on this machine.
        with httpx.Client(trust_env=False, timeout=ANSWER) as http:
            body = http.get(f"{url}/health").json()
    except (httpx.TransportError, ValueError):
        return None
    return body if isinstance(body, dict) and "status" in body else None


def wait_until_ready(
    manager: Manager, seconds: float, progress: Callable[[dict[str, Any]], None] = lambda _: None
) -> Server:
    """Wait until the server serves.

    Args:
        progress: called with what `/health` says, whenever that has changed.

    Raises:
        ServiceError: it ended instead, or is not ready in time.
    """
    deadline = time.monotonic() + seconds
    before = manager.state().starts
    said: dict[str, Any] | None = None
    while True:
        state = manager.state()
        server = look(state.pid) if state.pid is not None else None
        if server is not None and server.health is not None:
            if server.health["status"] == "ready":
                return server
            if server.health != said:
                said = server.health
                progress(said)
        ended = state.pid is None and state.last_exit is not None
        again = None not in (before, state.starts) and state.starts != before
        if ended or again or not state.loaded:
            raise ServiceError(f"The server does not come up: {describe_exit(state.last_exit)}."
                               f"{_last_lines(manager)}")  # fmt: skip
        if time.monotonic() > deadline:
            raise ServiceError(
                f"The server runs, but is not ready after {seconds:g} s; `glmd service status` says"
                " how far it is."
            )
        time.sleep(POLL)


def describe_exit(status: int | None) -> str:
    """The status of a run's end, for people."""
    if status is None:
        return "it has not run"
    return f"it was ended by signal {-status}" if status < 0 else f"it exited with status {status}"


def _last_lines(manager: Manager) -> str:
    lines = manager.log_tail(LAST_LINES).splitlines()
    shown = "\n".join(map(for_people, lines))
    return f" The end of its log:\n{shown}" if lines else " Its log is empty."
