"""Request bodies, received within limits and read without stalling the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from email.message import Message as MimeHeaders
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmd.api.body_reader import parse_json
from glmd.api.context import client_id
from glmd.api.errors import ErrorInfo, RefusedBody, error_response, overloaded
from glmd.api.state import AppState
from glmd.utils.fair_limiter import FairLimiter, Reservation
from glmd.utils.memory import return_free_memory

BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})

MAX_BODIES = 16
"""Memory for the bodies of all requests that have not been answered, in bodies of maximum size."""

INLINE_BYTES = 64 * 1024
"""Bodies up to this size are parsed and validated on the event loop, in at most 20 ms."""

INLINE_EXPANSION = 16
"""Memory of such a body once it is parsed, in bytes for each of its bytes: as measured for empty
arrays, and much more than for texts."""

TRIM_BYTES = 1 << 20
"""Memory of a request from which on free memory is returned to the system when it has ended."""

TRIM_SECONDS = 1.0
"""Delay until then, in which the connection lets go of the request."""

NO_MEMORY = overloaded("No memory left for request bodies. Try again later.")


class BodyLimitMiddleware:
    """Read the whole body of a request, or refuse it before it is parsed.

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
        share = self._held_bytes.share(client_id(scope))
        with share as reservation, self._trim_after(reservation):
            scope["state"]["body_memory"] = reservation
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

    @staticmethod
    @contextmanager
    def _trim_after(reservation: Reservation) -> Iterator[None]:
        """After the block return free memory to the system, if the request took much."""
        try:
            yield
        finally:
            if reservation.size > TRIM_BYTES:
                loop = asyncio.get_running_loop()
                loop.call_later(TRIM_SECONDS, loop.run_in_executor, None, return_free_memory)

    async def _read(self, receive: Receive, reservation: Reservation) -> bytes | ErrorInfo | None:
        """Return the body, or an error; None: the client has disconnected."""
        chunks: list[bytes] = []
        size = 0
        more = True
        try:
            async with asyncio.timeout(self._timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    size += len(chunk)
                    if size > self._limit:
                        return self._too_large()
                    if not reservation.grow(len(chunk)):
                        return NO_MEMORY
                    chunks.append(chunk)
        except TimeoutError:
            text = f"The request body did not arrive within {self._timeout:g} s."
            return ErrorInfo(408, "timeout_error", text, code="timeout")
        if size <= INLINE_BYTES:
            return b"".join(chunks)
        return await asyncio.to_thread(b"".join, chunks)  # 30 ms for 32 MiB

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
    """Route that reads its body with `JsonRequest.json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        model: type[BaseModel] | None = None
        if field is not None:
            assert isinstance(field.field_info.annotation, type)
            assert issubclass(field.field_info.annotation, BaseModel)
            model = field.field_info.annotation

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive, model))

        return handle_json


class JsonRequest(Request):
    """Request whose body is an object of class `model`.

    None: a request without a body.
    """

    def __init__(self, scope: Scope, receive: Receive, model: type[BaseModel] | None) -> None:
        super().__init__(scope, receive)
        self._model = model

    async def body(self) -> bytes:
        """The body, which `BodyLimitMiddleware` passes on in one message.

        Starlette copies it.
        """
        if not hasattr(self, "_body"):
            self._body: bytes = (await self.receive()).get("body", b"")
        return self._body

    async def json(self) -> Any:
        """Parse the body, and validate a large one.

        Sets `state.large_body` for a large one.

        Raises:
            RefusedBody: the body is not JSON, or has too many values; it is large and no valid
                request; or there is no room in memory for it.
        """
        body = await self.body()
        if self._model is None or len(body) <= INLINE_BYTES:
            self._reserve(INLINE_EXPANSION * len(body))
            try:
                return parse_json(body)
            except ValueError as error:
                message = f"The body is not valid JSON: {error}."
                raise RefusedBody(ErrorInfo(400, "invalid_request_error", message)) from error
        self.state.large_body = True
        state: AppState = self.app.state.glmd
        async with state.client_lock.acquire(client_id(self.scope)):
            request, size = await state.bodies.read(body, self._model)
        if isinstance(request, ErrorInfo):
            raise RefusedBody(request)
        self._reserve(size)
        return request

    def _reserve(self, size: int) -> None:
        """Count the memory of the parsed body, besides that of its text."""
        reservation: Reservation = self.state.body_memory
        if not reservation.grow(size):
            raise RefusedBody(NO_MEMORY)
