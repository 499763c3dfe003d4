"""One connection: uvicorn's HTTP/1.1, with an end to every silence that a client can keep.

Uvicorn itself waits for ever for the first request, for the rest of a request's head, and for a
client to read what was written to it.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from glmd.api.errors import ErrorInfo

log = logging.getLogger("glmd.api")

MOST_FILES = 8192
"""Open files that this process asks for; macOS refuses more than 10,240 whatever it promises."""

RESERVED_FILES = 128
"""Of these, what is not for connections: the engine's pipes and sockets, and a restart of it."""


@dataclass(frozen=True, slots=True)
class ConnectionTimeouts:
    """How long a connection may keep the server waiting, in seconds, and how many there may be.

    Attributes:
        head: for a request's head, from the connection's begin or the head's first byte.
        reader: for a client to read anything of what was written to it.
        connections: open at once; further ones are refused.
    """

    head: float
    reader: float
    connections: int


class Connection(H11Protocol):
    """Uvicorn's protocol, watched.

    While a request is read or answered, `glmd.api.middleware` and the routes see to its time;
    between requests uvicorn's keep-alive timer runs. This class watches what is left.
    """

    def __init__(self, *args: Any, patience: ConnectionTimeouts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience = patience
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._unread = 0
        """Bytes not taken by the system when the reader timer was started."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._patience.connections:
            message = "There are too many open connections. Try again later."
            problem = ErrorInfo(
                503, "overloaded_error", message, code="overloaded", retry_after=1.0
            )
            self._refuse(problem)
            return
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_reader_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_head()
        if self._is_answering and not self.flow.write_paused:
            self._stop_reader_timer()  # It asks again, so it is there; what comes is watched anew.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader_timer()
        if not self._is_answering:
            self._watch_reader()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # -- what a client sends --------------------------------------------------------------

    def _watch_head(self) -> None:
        """Bound the time for a head, or for the rest of a body that nobody waits for any more."""
        state = self.conn.their_state
        is_resting = state is h11.IDLE and self.timeout_keep_alive_task is not None
        if self._is_answering or is_resting or state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._patience.head, self._give_up_head)

    def _give_up_head(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            message = f"The request's head was not whole after {self._patience.head:g} s."
            self._refuse(ErrorInfo(408, "timeout_error", message, code="timeout"))
        else:
            self.transport.close()

    def _refuse(self, problem: ErrorInfo) -> None:
        """Answer without a request, whose API is not known, and close."""
        body = problem.json.encode()
        headers = {name.lower(): value for name, value in problem.headers.items()}
        headers |= {"content-type": "application/json", "content-length": str(len(body))}
        response = h11.Response(
            status_code=problem.status,
            headers=list((headers | {"connection": "close"}).items()),
            reason=STATUS_PHRASES[problem.status],
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # -- what a client reads --------------------------------------------------------------

    def _watch_reader(self) -> None:
        """Bound the time in which none of what was written is read.

        Nothing is added to it meanwhile: a stream waits for room, a whole answer is all there.
        """
        self._unread = self.transport.get_write_buffer_size()
        if self._unread and self._reader_timer is None:
            self._reader_timer = self.loop.call_later(self._patience.reader, self._check_reader)

    def _check_reader(self) -> None:
        self._reader_timer = None
        if self.transport.get_write_buffer_size() < self._unread:
            self._watch_reader()
            return
        log.info("A client read nothing for %g s; its connection is cut.", self._patience.reader)
        self.transport.abort()  # `close` would wait for the reader.

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None


def raise_file_limit() -> None:
    """Let this process have as many files open as it may ask for, up to `MOST_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_limit() -> int:
    """How many connections this process has files for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (MOST_FILES if soft == resource.RLIM_INFINITY else soft) - RESERVED_FILES
