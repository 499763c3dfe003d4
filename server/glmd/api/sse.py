"""Server-sent events: frames, keep-alive, errors after the first byte, and the client's absence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from glmd.api.error_info import ErrorInfo
from glmd.api.errors import log_unhandled, to_error

T = TypeVar("T")

REFUSAL_PATIENCE = 1.0
"""Seconds to wait for the first frame before the response begins with status 200. Refusals by
the engine come within a step and still get their own status; a long prefill does not hold up
the headers and the keep-alive."""

DONE = b"data: [DONE]\n\n"


def frame(data: str, event: str | None = None) -> bytes:
    """One event with `data`, which must have no line break, as JSON has none."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {data}\n\n".encode()


def error_frame(problem: ErrorInfo) -> bytes:
    """An error after the first byte, in OpenAI's form."""
    return frame(problem.json)


class EventStream(EventSourceResponse):
    """A response of server-sent events, which closes its source however it ends.

    Args:
        keep_alive: seconds between comments; 0: none, because `frames` has its own sign of life.
    """

    def __init__(
        self, frames: PrimedStream, *, keep_alive: float, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(
            frames,
            headers=headers,
            ping=keep_alive,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
        )
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._frames.aclose()


class PrimedStream(AsyncIterator[bytes]):
    """Frames of which the first has been waited for; later errors become a last frame."""

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        first: asyncio.Future[bytes] | None,
        on_error: Callable[[ErrorInfo], bytes],
    ) -> None:
        self._frames = frames
        self._first = first
        self._on_error = on_error
        self._failed = False

    async def __anext__(self) -> bytes:
        if self._failed:
            raise StopAsyncIteration
        try:
            if self._first is not None:
                first, self._first = self._first, None
                return await first
            return await anext(self._frames)
        except StopAsyncIteration:
            raise
        except Exception as error:
            log_unhandled(error)
            self._failed = True
            return self._on_error(to_error(error))

    async def aclose(self) -> None:
        """Stop, at whatever point; the engine hears of it."""
        if self._first is not None:
            self._first.cancel()
            await asyncio.wait([self._first])
        await self._frames.aclose()


async def prime(
    frames: AsyncGenerator[bytes, None], on_error: Callable[[ErrorInfo], bytes] = error_frame
) -> PrimedStream:
    """Wait a moment for the first frame, so that an early error is raised and not streamed.

    Args:
        on_error: makes the last frame of a stream that fails later.
    """
    first = asyncio.ensure_future(anext(frames))
    opened = PrimedStream(frames, first, on_error)
    try:
        done, _ = await asyncio.wait([first], timeout=REFUSAL_PATIENCE)
        if done:
            first.result()
    except BaseException:
        await opened.aclose()
        raise
    return opened


async def with_heartbeat(
    source: AsyncGenerator[T, None], every: float
) -> AsyncGenerator[T | None, None]:
    """The items, and None for each `every` seconds in which there was none.

    The first None comes after no more than `REFUSAL_PATIENCE`, when the stream should begin.
    """
    coming = asyncio.ensure_future(anext(source))
    patience = min(REFUSAL_PATIENCE, every)
    try:
        while True:
            done, _ = await asyncio.wait([coming], timeout=patience)
            patience = every
            if not done:
                yield None
                continue
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            yield item
            coming = asyncio.ensure_future(anext(source))
    finally:
        coming.cancel()
        await asyncio.wait([coming])


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    The request's body must have been read.

    Raises:
        ClientDisconnect: nobody is left to read the result.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait([working])


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
