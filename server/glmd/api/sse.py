"""Server-sent events: frames, heartbeats, late errors, and clients that disconnect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from glmd.api.error_info import ErrorInfo
from glmd.api.errors import log_unhandled, to_error

T = TypeVar("T")

FIRST_FRAME_TIMEOUT = 1.0
"""Seconds to wait for the first frame before the response begins with status 200. The engine's
refusals come within a step and so keep their own status; during a long prefill, headers and
heartbeats are sent."""


def sse_frame(data: str, event: str | None = None) -> bytes:
    """One event.

    Args:
        data: Text without line breaks, such as JSON.
    """
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {data}\n\n".encode()


class EventStream(EventSourceResponse):
    """Response of server-sent events. An error after the first frame becomes the last frame."""

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        on_error: Callable[[ErrorInfo], bytes],
        *,
        comments: float,
        headers: Mapping[str, str],
    ) -> None:
        """
        Args:
            on_error: Makes the frame of an error.
            comments: Seconds between keep-alive comments. 0: no comments.
        """
        super().__init__(
            self._body(),
            headers=headers,
            ping=comments,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
        )
        self._frames = frames
        self._first = asyncio.ensure_future(anext(frames))
        self._on_error = on_error

    async def prime(self) -> EventStream:
        """Wait at most `FIRST_FRAME_TIMEOUT` for the first frame; raise an earlier error."""
        try:
            done, _ = await asyncio.wait([self._first], timeout=FIRST_FRAME_TIMEOUT)
            if done:
                self._first.result()
        except BaseException:
            await self._close()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close()

    async def _body(self) -> AsyncGenerator[bytes, None]:
        try:
            yield await self._first
            async for frame in self._frames:
                yield frame
        except Exception as error:
            log_unhandled(error)
            yield self._on_error(to_error(error))

    async def _close(self) -> None:
        """Cancel the request in the engine, unless the stream has ended."""
        self._first.cancel()
        await asyncio.wait([self._first])
        await self._frames.aclose()


async def with_heartbeat(
    source: AsyncGenerator[T, None], interval: float
) -> AsyncGenerator[T | None, None]:
    """Items of `source`, and None after each `interval` seconds without an item.

    The first None comes after at most `FIRST_FRAME_TIMEOUT`, when the response begins.
    """
    item = asyncio.ensure_future(anext(source))
    timeout = min(FIRST_FRAME_TIMEOUT, interval)
    try:
        while True:
            done, _ = await asyncio.wait([item], timeout=timeout)
            timeout = interval
            if not done:
                yield None
                continue
            try:
                result = item.result()
            except StopAsyncIteration:
                return
            yield result
            item = asyncio.ensure_future(anext(source))
    finally:
        item.cancel()
        await asyncio.wait([item])


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when the client disconnects.

    The request's body must have been read.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    working = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait([working, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        disconnect.cancel()
        working.cancel()
        await asyncio.wait([working])


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
