"""Run the HTTP server: listening sockets, connection limits, signals, shutdown.

Uvicorn's own limits do not cover a client that is silent: uvicorn waits without a timeout for the
first request, for the rest of a request's headers, and for a client to read the response. Its
`limit_concurrency` refuses a request after the headers have arrived, in plain text, and does not
bound open connections.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from glmd import __version__
from glmd.api.app import create_app
from glmd.api.errors import ErrorInfo, overloaded
from glmd.api.middleware import MAX_HEAD_BYTES
from glmd.api.sockets import base_url, connection_limit
from glmd.api.state import AppState
from glmd.config import Settings
from glmd.errors import CheckpointError, SettingsError
from glmd.utils.clock import AwakeClock
from glmd.utils.memory import exit_if_out_of_memory, freeze_gc_heap, return_large_blocks

log = logging.getLogger("glmd")

CLOSE_SECONDS = 2.0
"""Time for the last error events to be sent, after the drain timeout."""

KEEP_ALIVE_SECONDS = 75
"""Longer than the connection pools of common clients keep an idle connection, so that no client
sends a request on a connection that the server is closing."""

RELOADABLE = frozenset(
    {
        "aliases", "keep_alive", "drain_timeout", "enable_thinking", "clear_thinking",
        "effort_budgets", "reasoning_alias", "temperature", "top_p", "top_k", "min_p",
        "max_tokens", "profile", "profiles", "log_level", "slow_request", "queue_timeout",
        "first_token_timeout", "request_timeout", "prevent_sleep", "peers",
    }
)  # fmt: skip
"""Settings that take effect on reload: each request reads them, or they can be passed on. The other
settings are used once at startup, for weights, KV and listening sockets."""

# `Server.shutdown` bounds the time of streams that run at shutdown.
AppStatus.enable_automatic_graceful_drain = False


class Connection(H11Protocol):
    """Uvicorn's HTTP/1.1 protocol with timeouts for silent clients.

    Request bodies and responses in progress are bounded by middleware and routes, idle time between
    requests by uvicorn's keep-alive timer.

    Args:
        settings: `header_timeout` bounds a request's headers, from the first byte or from
            connecting; `reader_timeout` the time in which a client reads none of a response.
        max_connections: further connections are refused.
    """

    def __init__(self, *args: Any, settings: Settings, max_connections: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._max_connections = max_connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._unread = 0
        """Buffered bytes when the read timer was started."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self._refuse(overloaded("Too many open connections. Try again later."))
        else:
            self._update_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._update_head_timer()
        if self._is_responding and not self.flow.write_paused:
            self._stop_read_timer()  # A client that sends a request is still connected.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_head_timer()
        self._start_read_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_read_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_read_timer()
        if not self._is_responding:
            self._start_read_timer()

    @property
    def _is_responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _update_head_timer(self) -> None:
        """Bound the time for the headers, or for the rest of a body that is not read."""
        state = self.conn.their_state
        is_idle = state is h11.IDLE and self.timeout_keep_alive_task is not None
        if self._is_responding or is_idle or state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self._settings.header_timeout, self._on_head_timeout
            )

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            seconds = self._settings.header_timeout
            message = f"The request's headers did not arrive within {seconds:g} s."
            self._refuse(ErrorInfo(408, "timeout_error", message, code="timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: ErrorInfo) -> None:
        """Send an error in OpenAI's format, since the path is unknown, and close."""
        body = error.json.encode()
        headers = {name.lower(): value for name, value in error.headers.items()}
        headers |= {"content-type": "application/json", "content-length": str(len(body))}
        response = h11.Response(
            status_code=error.status,
            headers=list((headers | {"connection": "close"}).items()),
            reason=STATUS_PHRASES[error.status],
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_read_timer(self) -> None:
        """Bound the time in which the client reads none of the buffered response.

        Nothing is added to the buffer meanwhile: a stream is paused, another response is complete.
        """
        self._unread = self.transport.get_write_buffer_size()
        if self._unread and self._read_timer is None:
            self._read_timer = self.loop.call_later(
                self._settings.reader_timeout, self._on_read_timeout
            )

    def _on_read_timeout(self) -> None:
        self._read_timer = None
        if self.transport.get_write_buffer_size() < self._unread:
            self._start_read_timer()
            return
        log.info("Connection closed: client read nothing for %g s.", self._settings.reader_timeout)
        self.transport.abort()  # `close` would wait for the client to read.

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


class Server(uvicorn.Server):
    """Uvicorn server that drains on SIGINT and SIGTERM and reloads on SIGHUP.

    The first SIGINT or SIGTERM stops accepting connections and lets running requests finish within
    the drain timeout; remaining requests end with an error. The second signal exits at once. Both
    exit with status 0. A SIGHUP because the terminal was closed counts as SIGTERM.
    """

    def __init__(
        self,
        state: AppState,
        read_settings: Callable[[], Settings] | None = None,
        url: str = "",
    ) -> None:
        """
        Args:
            state: what to serve.
            read_settings: loads the current settings on SIGHUP; None: settings never change.
            url: of the listening socket, for the log.
        """
        settings = state.settings
        connection = partial(Connection, settings=settings, max_connections=connection_limit())
        super().__init__(
            uvicorn.Config(
                create_app(state),
                lifespan="on",
                loop="asyncio",  # uvloop cannot start a process in a new process group.
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                http=cast(type[asyncio.Protocol], connection),
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )
        self._state = state
        self._read_settings = read_settings
        self._url = url
        self._had_terminal = has_terminal()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Only the main thread can handle signals.
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as set by `nohup`
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
            reload_settings(self._state, self._read_settings)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(handle_loop_error)
        AwakeClock().drive(loop)
        await super().startup(sockets)
        self._engine_watch = asyncio.create_task(self._exit_on_engine_failure())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine_watch.cancel()
        drain = self._state.settings.drain_timeout
        self.config.timeout_graceful_shutdown = int(drain + CLOSE_SECONDS)
        timer = asyncio.get_running_loop().call_later(drain, self._state.engine.abandon)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    async def _exit_on_engine_failure(self) -> None:
        """Log that the model is served once it is; exit if it cannot be."""
        engine = self._state.engine
        if await engine.wait_for("ready", "failed") == "ready":
            log.info("glmd serves %s at %s/v1", self._state.model.id, self._url)
        await engine.wait_for("failed")
        self.should_exit = True


def handle_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an exception that nothing has caught."""
    exit_if_out_of_memory(context.get("exception"))
    loop.default_exception_handler(context)


def run(
    state: AppState,
    sockets: list[socket.socket],
    read_settings: Callable[[], Settings] | None = None,
) -> None:
    """Serve until a signal stops the server.

    Args:
        state: what to serve.
        sockets: listening sockets, as of `listen`.
        read_settings: loads the current settings on SIGHUP; None: settings never change.

    Raises:
        CheckpointError: the engine cannot serve the model.
    """
    return_large_blocks()
    freeze_gc_heap()
    url = base_url(state.settings.host, sockets)
    log.info("glmd %s loads %s, and listens at %s", __version__, state.model.id, url)
    log.info("Sampling defaults: %s", state.describe_sampling())
    Server(state, read_settings, url).run(sockets)
    if state.engine.state == "failed":
        raise CheckpointError(state.engine.failure or "The engine did not start.")


def reload_settings(state: AppState, read: Callable[[], Settings]) -> None:
    """Apply settings that can change while the server runs, and log all changes.

    Args:
        read: loads the current settings. If that fails, the server keeps its settings.
    """
    old = state.settings
    try:
        new = read()
    except SettingsError as error:
        log.error("Settings not reloaded; the old settings stay in effect: %s", error.message)
        return
    changed = {name for name in Settings.model_fields if getattr(new, name) != getattr(old, name)}
    values = {name: getattr(new, name) for name in changed & RELOADABLE}
    state.configure(old.model_copy(update=values))
    if "log_level" in values:
        logging.getLogger("glmd").setLevel(new.log_level)
        state.engine.set_log_level(new.log_level)
    log.info("Settings reloaded: changed=%s", _comma_separated(values))
    if pending := changed - RELOADABLE:
        log.warning("Settings that need a restart: changed=%s", _comma_separated(pending))


def _comma_separated(names: Iterable[str]) -> str:
    return ",".join(sorted(names)) or "none"


def has_terminal() -> bool:
    """Whether this process has a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
