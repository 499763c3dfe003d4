"""From settings to a listening server, and its orderly end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from sse_starlette.sse import AppStatus

from glmd import __version__
from glmd.api import connection
from glmd.api.access import require_key_on_public_bind
from glmd.api.app import create_app
from glmd.api.connection import Connection, ConnectionTimeouts
from glmd.api.middleware import MAX_HEAD
from glmd.api.reload import has_terminal, reload
from glmd.api.state import AppState
from glmd.config import Settings
from glmd.errors import CheckpointError, SettingsError
from glmd.utils.gc import freeze_gc_heap

log = logging.getLogger("glmd")

AFTER_DRAIN = 2.0
"""Seconds for the last error events to leave, after the drain timeout, before connections are
cut."""

IDLE_CONNECTION = 75
"""Seconds that an idle connection stays open: more than the pools of usual clients keep one, so
that none sends a request into a connection that is just being closed."""

BACKLOG = 2048
"""Connections that the system holds until they are accepted."""

SEND_BUFFER = 128 * 1024
"""Bytes that the system may hold of an answer that nobody reads. Left to itself it takes 4 MB, many
minutes of a stream, before it is noticed."""

# Streams that run at shutdown may end in their own time; `Server.shutdown` sets the limit.
AppStatus.enable_automatic_graceful_drain = False


class Server(uvicorn.Server):
    """Uvicorn, except at the end.

    The first SIGINT or SIGTERM stops accepting and lets running requests end, those that
    outlast the drain timeout with an error; the second one leaves at once. Both exit with 0.
    SIGHUP has the settings read anew, unless it says that the server's terminal is gone, which is
    an end like the others.

    Args:
        service: what is served.
        read_settings: gives the settings as they are now; None: they stay as they are.
    """

    def __init__(
        self, service: AppState, read_settings: Callable[[], Settings] | None = None
    ) -> None:
        settings = service.settings
        patience = ConnectionTimeouts(
            settings.header_timeout, settings.reader_timeout, connection.connection_limit()
        )
        super().__init__(
            uvicorn.Config(
                create_app(service),
                lifespan="on",
                loop="asyncio",  # uvloop, where installed, starts no process in a new group.
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                http=cast(type[asyncio.Protocol], partial(Connection, patience=patience)),
                h11_max_incomplete_event_size=MAX_HEAD,
                timeout_keep_alive=IDLE_CONNECTION,
            )
        )
        self._service = service
        self._read_settings = read_settings
        self._had_terminal = has_terminal()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Signals reach the main thread only.
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        # `nohup` has it ignored, and so it stays.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, self.handle_hangup)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    def handle_hangup(self) -> None:
        if self._had_terminal and not has_terminal():
            self.handle_exit(signal.SIGHUP, None)
        elif self._read_settings is not None:
            reload(self._service, self._read_settings)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watch = asyncio.create_task(self._leave_without_engine())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watch.cancel()
        drain = self._service.settings.drain_timeout
        self.config.timeout_graceful_shutdown = int(drain + AFTER_DRAIN)
        deadline = asyncio.get_running_loop().call_later(drain, self._service.engine.abandon)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()

    async def _leave_without_engine(self) -> None:
        """A checkpoint that cannot be served is for its user to mend: say so, and end."""
        await self._service.engine.wait_for("failed")
        self.should_exit = True


def run(service: AppState, read_settings: Callable[[], Settings] | None = None) -> None:
    """Serve until told to stop.

    Args:
        service: what to serve.
        read_settings: gives the settings as they are now, when SIGHUP asks for them.

    Raises:
        SettingsError: the address cannot be listened on, or everybody could reach it.
        CheckpointError: the engine refused the model, or never came up.
    """
    settings = service.settings
    require_key_on_public_bind(settings, service.keys)
    connection.raise_file_limit()
    sockets = listen(settings.host, settings.port)
    url = base_url(settings.host, sockets)
    freeze_gc_heap()
    log.info("glmd %s serves %s at %s/v1", __version__, service.model.id, url)
    Server(service, read_settings).run(sockets)
    if service.engine.state == "failed":
        raise CheckpointError(service.engine.failure or "The engine did not start.")


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of `host` that this machine has.

    Raises:
        SettingsError: the host is unknown, or the port is taken or forbidden.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(addresses):
            # With port 0 the first address draws one, and the others take the same.
            bound_port = port or (sockets[0].getsockname()[1] if sockets else 0)
            try:
                sockets.append(bind(family, (address[0], bound_port, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error  # `localhost` may have an IPv6 address where there is no IPv6.
        if not sockets:
            raise absent or OSError(errno.EADDRNOTAVAIL, "No such address")
    except OSError as error:
        for opened in sockets:
            opened.close()
        reason = error.strerror or str(error)
        raise SettingsError(f"Cannot listen on {host} port {port}: {reason}.") from error
    return sockets


def bind(family: int, address: tuple[Any, ...]) -> socket.socket:
    """A socket that listens on `address`."""
    # With the protocol named: asyncio sets TCP_NODELAY only on connections that say they are TCP.
    # Without it, a response in two writes waits for the client's delayed acknowledgement, 40 ms.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError:
        opened.close()
        raise
    return opened


def base_url(host: str, sockets: list[socket.socket]) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{sockets[0].getsockname()[1]}"
