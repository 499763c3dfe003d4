"""What happens to every HTTP request before its route sees it: an id, bounds, a whole body.

Plain ASGI, because Starlette's `BaseHTTPMiddleware` would stand between a stream and the news
that its client has gone.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Sequence
from email.message import Message as Headers

from starlette.datastructures import Headers as RequestHeaders
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmd.api.client_id import client_id
from glmd.api.errors import ErrorInfo, respond
from glmd.api.observability.exchange import HttpExchange
from glmd.utils.fair_limiter import FairLimiter, Reservation
from glmd.utils.logging import request_id

BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})

MAX_URL = 8192
MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 * 1024
"""Of names and values together. A browser's cookies of all that runs on localhost, which are sent
to every port, may be a few KiB."""

MAX_HEAD = 2 * MAX_HEADER_BYTES
"""Bytes that the HTTP server reads of a request before its head must be whole."""

HELD_BODIES = 16
"""Largest bodies that all requests in flight may hold together. What is read of a body is held
until its request is answered, by whoever waits in the queue."""

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""What a client's `x-request-id` may look like to be taken over."""


class RequestIdMiddleware:
    """Give every request an id, the client's own if it sent one, and return it.

    It goes back as `x-request-id`, and as `request-id`, which is Anthropic's name for it.

    Args:
        watchers: called with every exchange when it is over.
    """

    def __init__(self, app: ASGIApp, watchers: Sequence[Callable[[HttpExchange], None]]) -> None:
        self._app = app
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = RequestHeaders(scope=scope).get("x-request-id", "")
        id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange = HttpExchange.of(scope, id)
        scope.setdefault("state", {}).update(request_id=id, exchange=exchange)

        token = request_id.set(id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = id
                exchange.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if exchange.status is None:
                exchange.status = 500  # Whoever catches it outside of here answers so.
            raise
        finally:
            exchange.route = getattr(scope.get("route"), "path", None)
            exchange.key = scope["state"].get("key_name")
            exchange.end()
            for watch in self._watchers:
                watch(exchange)
            request_id.reset(token)


class HeaderLimitMiddleware:
    """Refuse an address or headers larger than any client of ours has reason to send.

    The HTTP server's own bound on what it holds of a request, twice this one, ends a connection
    without much of an explanation.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = head_problem(scope) if scope["type"] == "http" else None
        if problem is not None:
            await respond(problem, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def head_problem(scope: Scope) -> ErrorInfo | None:
    """What is too large about a request before its body."""
    kind = "invalid_request_error"
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL:
        return ErrorInfo(414, kind, f"The address is longer than {MAX_URL} bytes.", "url")
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > MAX_HEADERS:
        return ErrorInfo(431, kind, f"There are more than {MAX_HEADERS} headers.", "headers")
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        name = max(headers, key=lambda header: len(header[1]))[0].decode("latin-1")[:100]
        return ErrorInfo(
            431,
            kind,
            f"The headers are larger than {MAX_HEADER_BYTES} bytes; the largest is {name}.",
            f"headers.{name}",
        )
    return None


class HeadAsGetMiddleware:
    """Answer HEAD as GET; the HTTP server leaves the body out.

    Clients ask so whether anyone is there, before they send a prompt.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            answered = {**scope, "method": "GET"}
            await self._app(answered, receive, send)
            scope["route"] = answered.get("route")
            return
        await self._app(scope, receive, send)


class BodyLimitMiddleware:
    """Read a request's body, of a type that the routes understand, up to a limit.

    A request that is too large or no JSON is refused before anything parses it; so is one that
    takes longer than `seconds` to arrive, and one for which there is no room beside the others.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds
        self._held = FairLimiter(HELD_BODIES * limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
            await self._app(scope, receive, send)
            return
        with self._held.share(client_id(scope)) as share:
            body: bytes | ErrorInfo | None = self._refusal(RequestHeaders(scope=scope))
            if body is None:
                body = await self._read(receive, share)
            if isinstance(body, ErrorInfo):
                await respond(body, scope)(scope, receive, send)
            elif body is not None:
                pending: list[Message] = [{"type": "http.request", "body": body}]
                del body

                async def replay() -> Message:
                    return pending.pop() if pending else await receive()

                await self._app(scope, replay, send)

    async def _read(self, receive: Receive, share: Reservation) -> bytes | ErrorInfo | None:
        """The body, or what is wrong with it; None: the client has gone."""
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(self._seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) + len(piece) > self._limit:
                        return self._too_large()
                    if not share.grow(len(piece)):
                        return self._no_room()
                    body += piece
        except TimeoutError:
            return self._too_slow()
        return bytes(body)

    def _refusal(self, headers: RequestHeaders) -> ErrorInfo | None:
        """What is wrong by the headers alone."""
        length = headers.get("content-length", "0")
        if length == "0" and "transfer-encoding" not in headers:
            return None
        if not is_json(headers.get("content-type", "")):
            return ErrorInfo(
                415,
                "invalid_request_error",
                "The body must be JSON: send the header `Content-Type: application/json`.",
            )
        if headers.get("content-encoding", "identity") != "identity":
            return ErrorInfo(415, "invalid_request_error", "Compressed bodies are not supported.")
        return self._too_large() if length.isdecimal() and int(length) > self._limit else None

    def _no_room(self) -> ErrorInfo:
        return ErrorInfo(
            503,
            "overloaded_error",
            "The requests in flight hold as much memory as they may. Try again later.",
            code="overloaded",
            retry_after=1.0,
        )

    def _too_slow(self) -> ErrorInfo:
        return ErrorInfo(
            408,
            "timeout_error",
            f"The body has not arrived within {self._seconds:g} s.",
            code="timeout",
        )

    def _too_large(self) -> ErrorInfo:
        return ErrorInfo(
            413,
            "invalid_request_error",
            f"The body is larger than this server's limit of {self._limit} bytes.",
        )


def is_json(content_type: str) -> bool:
    """Whether a Content-Type says JSON, in UTF-8 (the only encoding that RFC 8259 allows)."""
    headers = Headers()
    headers["content-type"] = content_type
    subtype = headers.get_content_subtype()
    charset = str(headers.get_param("charset", "utf-8")).lower()
    return (
        bool(content_type)
        and headers.get_content_maintype() == "application"
        and (subtype == "json" or subtype.endswith("+json"))
        and charset in ("utf-8", "utf8")
    )
