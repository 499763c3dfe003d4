"""JSON request bodies: read within limits, parsed strictly and without stalling the event loop.

Parsing holds the GIL, in a worker thread too. The time depends on the number of values in the body
and hardly on the length of its strings, so large bodies are counted before they are parsed:
`MAX_PARTS` and `MAX_COMMAS` bound the longest pause of the event loop to 0.1 to 0.5 s
(benchmarks/body_stall.py).
"""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from email.message import Message as MimeHeaders
from typing import Any

import numpy as np
import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmd.api.context import client_id
from glmd.api.errors import ErrorInfo, error_response, overloaded
from glmd.utils.fair_limiter import FairLimiter, Reservation

BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})

MAX_BODIES = 16
"""Memory for the bodies of all requests that have not been answered, in bodies of maximum size."""

INLINE_BYTES = 256 * 1024
"""Bodies up to this size are parsed on the event loop, in at most 25 ms."""

MAX_PARTS = 500_000
"""Strings, arrays and objects in a body. 10,000 messages with ten fields each have 210,000."""

MAX_COMMAS = 6_000_000
"""Commas between values of a body. 32 MiB of token ids have 5.3 million."""

COUNT_BLOCK = 1 << 20

SURROGATE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})"  # a lone surrogate
    rb"|.)",
    re.DOTALL,
)
"""An escape within a JSON string; a lone surrogate is the group."""

# One thread, so that the event loop never waits for more than one parser to release the GIL.
_parser = ThreadPoolExecutor(1, "json")


class BodyLimitMiddleware:
    """Read the whole body of a request, or refuse the request before the body is parsed.

    Refused are bodies that are no JSON by their headers, larger than `limit` bytes, slower than
    `timeout` seconds, or without room in memory beside the bodies of other clients.
    """

    def __init__(self, app: ASGIApp, limit: int, timeout: float) -> None:
        self._app = app
        self._limit = limit
        self._timeout = timeout
        self._held_bytes = FairLimiter(MAX_BODIES * limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
            await self._app(scope, receive, send)
            return
        with self._held_bytes.share(client_id(scope)) as reservation:
            body: bytes | ErrorInfo | None = self._check_headers(Headers(scope=scope))
            if body is None:
                body = await self._read(receive, reservation)
            if isinstance(body, ErrorInfo):
                await error_response(body, scope)(scope, receive, send)
            elif body is not None:
                pending: list[Message] = [{"type": "http.request", "body": body}]
                del body

                async def replay() -> Message:
                    return pending.pop() if pending else await receive()

                await self._app(scope, replay, send)

    async def _read(self, receive: Receive, reservation: Reservation) -> bytes | ErrorInfo | None:
        """Return the body, or an error; None: the client has disconnected."""
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(self._timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) + len(chunk) > self._limit:
                        return self._too_large()
                    if not reservation.grow(len(chunk)):
                        return overloaded("No memory left for request bodies. Try again later.")
                    body += chunk
        except TimeoutError:
            text = f"The request body did not arrive within {self._timeout:g} s."
            return ErrorInfo(408, "timeout_error", text, code="timeout")
        return bytes(body)

    def _check_headers(self, headers: Headers) -> ErrorInfo | None:
        length = headers.get("content-length", "0")
        if length == "0" and "transfer-encoding" not in headers:
            return None
        if not is_json(headers.get("content-type", "")):
            message = "The body must be JSON. Send the header `Content-Type: application/json`."
            return ErrorInfo(415, "invalid_request_error", message)
        return self._too_large() if length.isdecimal() and int(length) > self._limit else None

    def _too_large(self) -> ErrorInfo:
        message = f"The body is larger than the limit of {self._limit} bytes (setting max_body)."
        return ErrorInfo(413, "invalid_request_error", message)


def is_json(content_type: str) -> bool:
    """Whether a Content-Type is JSON in UTF-8, the only encoding that RFC 8259 allows."""
    headers = MimeHeaders()
    headers["content-type"] = content_type
    subtype = headers.get_content_subtype()
    charset = str(headers.get_param("charset", "utf-8")).lower()
    return (
        bool(content_type)
        and headers.get_content_maintype() == "application"
        and (subtype == "json" or subtype.endswith("+json"))
        and charset in ("utf-8", "utf8")
    )


class JsonRoute(APIRoute):
    """Route that parses its body with `JsonRequest.json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


class JsonRequest(Request):
    async def json(self) -> Any:
        """Parse the body.

        Raises:
            HTTPException: 400 with the position of the error, or 413: too many values.
        """
        body = await self.body()
        try:
            if len(body) <= INLINE_BYTES:
                return parse_json(body)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(_parser, parse_large_json, body)
        except ValueError as error:
            raise HTTPException(400, f"The body is not valid JSON: {error}.") from error


def parse_json(body: bytes, *, cache_strings: bool = True) -> Any:
    """Parse JSON without NaN and Infinity, nested at most 200 levels deep.

    A lone surrogate becomes U+FFFD: agents cut the output of tools inside surrogate pairs, and send
    the result with every later request of the conversation.

    Raises:
        ValueError: `body` is not JSON.
    """
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False, cache_strings=cache_strings)
    except ValueError:
        replaced = SURROGATE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], body)
        if replaced == body:
            raise
        return pydantic_core.from_json(replaced, allow_inf_nan=False, cache_strings=cache_strings)


def parse_large_json(body: bytes) -> Any:
    """Parse JSON with a bounded number of values.

    Raises:
        HTTPException: 413: more values than `MAX_PARTS` and `MAX_COMMAS` allow.
        ValueError: `body` is not JSON.
    """
    parts, commas = count_values(body)
    if parts > MAX_PARTS:
        message = f"The body has more than {MAX_PARTS:,} strings, arrays and objects."
        raise HTTPException(413, message)
    if commas > MAX_COMMAS:
        raise HTTPException(413, f"The body has more than {MAX_COMMAS:,} values.")
    # Garbage collection looks at the growing result several times, and a cache of strings is slow
    # where they differ: together up to six times the time of parsing.
    gc.disable()
    try:
        return parse_json(body, cache_strings=False)
    finally:
        gc.enable()


def count_values(body: bytes) -> tuple[int, int]:
    """Count strings, arrays and objects, and the commas between values, without parsing."""
    parts = commas = 0
    rest, in_string = b"", np.uint8(0)
    for start in range(0, len(body), COUNT_BLOCK):
        block = (rest + body[start : start + COUNT_BLOCK]).replace(rb"\\", b"")
        rest = b"\\" if block.endswith(b"\\") else b""  # half an escape
        block = block.removesuffix(rest).replace(rb"\"", b"")
        characters = np.frombuffer(block, np.uint8)
        quotes = characters == ord('"')
        # The number of quotes so far, modulo 256, is odd within strings.
        inside = (np.cumsum(quotes, dtype=np.uint8) + in_string) & 1
        if len(inside):
            in_string = inside[-1]
        opening = quotes & (inside == 1)
        outside = characters[inside == 0]
        parts += int(np.count_nonzero(opening))
        parts += int(np.count_nonzero((outside == ord("[")) | (outside == ord("{"))))
        commas += int(np.count_nonzero(outside == ord(",")))
    return parts, commas
