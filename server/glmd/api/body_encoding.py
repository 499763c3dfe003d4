"""Encodings of request bodies: gzip, zstd, and a byte order mark.

Bodies are decompressed in pieces, so that the limits on bodies hold for what comes out: a kilobyte
may stand for a megabyte.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmd.api.errors import ErrorInfo, error_response

PIECE = 1 << 20
"""Bytes that are decompressed at once: 1 to 5 ms."""

MAX_WINDOW_LOG = 23
"""Memory of a zstd decoder, as a power of two: 8 MiB, which RFC 8878 recommends as the limit."""

BOM = b"\xef\xbb\xbf"

ENCODINGS = "gzip or zstd"

MAX_MEMBERS = 1000
"""Members of a gzip body, or frames of zstd. Nearly all bodies have one; each takes time."""


class MalformedBody(Exception):
    """A body is not in its encoding."""


class OversizedBody(Exception):
    """A body is too large while it is compressed."""


class Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Decompressed bytes of `data`, at most `PIECE` at a time.

        Raises:
            MalformedBody: `data` is not in the encoding.
        """


class Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def pieces(self, data: bytes) -> Iterator[bytes]:
        piece = b"?"
        while piece and not self.eof:
            try:
                piece = self._inner.decompress(data, PIECE)
            except zlib.error as error:
                raise MalformedBody(str(error)) from error
            data = self._inner.unconsumed_tail
            yield piece


class Zstd:
    def __init__(self) -> None:
        # Loaded by the first request that needs it.
        if sys.version_info >= (3, 14):
            from compression import zstd  # noqa: PLC0415
        else:
            from backports import zstd  # noqa: PLC0415
        limit = {int(zstd.DecompressionParameter.window_log_max): MAX_WINDOW_LOG}
        self._inner = zstd.ZstdDecompressor(options=limit)
        self._error = zstd.ZstdError

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data or not (self.eof or self._inner.needs_input):
            try:
                piece = self._inner.decompress(data, PIECE)
            except self._error as error:
                raise MalformedBody(str(error)) from error
            data = b""
            yield piece


DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {"gzip": Gzip, "x-gzip": Gzip, "zstd": Zstd}


class BodyEncodingMiddleware:
    """Decompress request bodies, and drop a byte order mark, which JSON must not have.

    Args:
        limit: bytes of a compressed body, which may stand for nothing at all.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = "identity"
        if scope["type"] == "http":
            encoding = Headers(scope=scope).get("content-encoding", encoding).strip().lower()
        if encoding in ("", "identity"):
            await self._app(scope, without_mark(receive), send)
            return
        if encoding not in DECOMPRESSORS:
            message = f"Content-Encoding {encoding[:40]!r} is not supported. Send {ENCODINGS}."
            error = ErrorInfo(415, "invalid_request_error", message)
            await error_response(error, scope)(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        del headers["content-encoding"], headers["content-length"]
        headers["transfer-encoding"] = "chunked"  # a body of unknown length
        async with aclosing(decompress(receive, DECOMPRESSORS[encoding], self._limit)) as messages:

            async def receive_next() -> Message:
                return await anext(messages, None) or await receive()

            try:
                await self._app(scope, without_mark(receive_next), send)
                return
            except MalformedBody as error:
                status, problem = 400, f"The body is not valid {encoding}: {error}."
            except OversizedBody:
                status = 413
                problem = f"The body is larger than the limit of {self._limit} bytes (max_body)."
        refusal = ErrorInfo(status, "invalid_request_error", problem)
        await error_response(refusal, scope)(scope, receive, send)


async def decompress(
    receive: Receive, make: Callable[[], Decompressor], limit: int
) -> AsyncGenerator[Message, None]:
    """The messages of a compressed body, decompressed.

    Raises:
        MalformedBody: the body is not in its encoding, incomplete, or has too many members.
        OversizedBody: it has more than `limit` bytes.
    """
    decompressor, is_empty, more = make(), True, True
    size, members = 0, 1
    while more:
        message = await receive()
        if message["type"] != "http.request":
            yield message
            return
        data, more = message.get("body", b""), message.get("more_body", False)
        size += len(data)
        if size > limit:
            raise OversizedBody
        while data:
            if decompressor.eof:  # gzip's next member, zstd's next frame
                decompressor, members = make(), members + 1
                if members > MAX_MEMBERS:
                    raise MalformedBody(f"it has more than {MAX_MEMBERS} members")
            is_empty = False
            for piece in decompressor.pieces(data):
                yield {"type": "http.request", "body": piece, "more_body": True}
                await asyncio.sleep(0)  # others run between the pieces of a large body
            data = decompressor.unused_data if decompressor.eof else b""
    if not (is_empty or decompressor.eof):
        raise MalformedBody("it is incomplete")
    yield {"type": "http.request", "body": b"", "more_body": False}


def without_mark(receive: Receive) -> Receive:
    """Drop a byte order mark at the beginning of a body."""
    is_first = True

    async def receive_body() -> Message:
        nonlocal is_first
        message = await receive()
        if is_first and message["type"] == "http.request" and message.get("body"):
            is_first = False
            if message["body"].startswith(BOM):
                return {**message, "body": message["body"][len(BOM) :]}
        return message

    return receive_body
