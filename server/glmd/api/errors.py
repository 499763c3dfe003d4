"""What a client is told when something is wrong: one mapping for every error and every API.

Any exception becomes a `ErrorInfo`; a problem becomes a response, or an event of a stream that
has begun, in the shape of the API at hand: Anthropic's under `/v1/messages`
(`glmd.api.anthropic.errors`), else OpenAI's, `{"error": {"message", "type", "param", "code"}}`
(https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from glmd.api import unsupported_routes as absent
from glmd.api.anthropic import errors as anthropic
from glmd.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineUnavailable,
    GlmdError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestQuarantined,
)

log = logging.getLogger("glmd.api")

MAX_MESSAGE, MAX_PARAM = 1000, 300
"""Characters of what a client is told."""


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error, before it takes an API's shape.

    Attributes:
        status: of the HTTP response, if the response has not begun.
        type: OpenAI's error type.
        param: the offending field (`messages[2].content`).
        code: machine-readable.
        retry_after: seconds after which another attempt is sensible.
        final: another attempt is not sensible, though the status alone would suggest it.
    """

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    final: bool = False

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def json(self) -> str:
        """`body` on one line."""
        return json.dumps(self.body, ensure_ascii=False)

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.final:
            headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's clients obey it.
        if self.status == HTTPStatus.REQUEST_TIMEOUT:
            headers["Connection"] = "close"  # What else the client sends is not waited for.
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def respond(problem: ErrorInfo, scope: Scope) -> JSONResponse:
    """The response in the shape of the API that the request's path belongs to."""
    if anthropic.is_path(scope["path"]):
        body = anthropic.body(problem, scope["state"]["request_id"])
        return JSONResponse(body, anthropic.status(problem), problem.headers)
    return JSONResponse(problem.body, problem.status, problem.headers)


def to_error(error: Exception) -> ErrorInfo:
    """What to tell the client about an exception; a bug's details stay in the log.

    What the client sent may be part of it, but not all of what it sent.
    """
    problem = to_error_response_info(error)
    message, param = problem.message, problem.param
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}…"
    if param is not None and len(param) > MAX_PARAM:
        param = f"{param[:MAX_PARAM]}…"
    return replace(problem, message=message, param=param)


def to_error_response_info(error: Exception) -> ErrorInfo:
    match error:
        case GlmdError():
            return problem_of_ours(error)
        case RequestValidationError():
            return validation_problem(error.errors(), error.body)
        case HTTPException():
            return ErrorInfo(error.status_code, "invalid_request_error", str(error.detail))
        case _:
            message = "The server failed on this request; its log says why."
            return ErrorInfo(500, "server_error", message)


def problem_of_ours(error: GlmdError) -> ErrorInfo:
    message = error.message
    match error:
        case InvalidRequest(param=param, code=code):
            return bad_request(message, param=param, code=code)
        case ModelNotFound():
            return ErrorInfo(404, "invalid_request_error", message, "model", "model_not_found")
        case Overloaded() | DeadlineExceeded() | EngineUnavailable():
            return unserved(error)
        case Cancelled():
            # Clients send a 409 or a 5xx again by themselves; this must not come back.
            return ErrorInfo(499, "invalid_request_error", message, code="request_cancelled")
        case RequestQuarantined():
            # Not 4xx that clients send again by themselves (408, 409, 429), and not 5xx.
            return ErrorInfo(422, "invalid_request_error", message, code="crashes_engine")
        case _:
            return ErrorInfo(500, "server_error", message)


def unserved(error: Overloaded | DeadlineExceeded | EngineUnavailable) -> ErrorInfo:
    """What is nobody's fault, and passes.

    503 and not 429: it is the server that is full, whoever asks, and OpenAI's own clients try
    again after either, when `Retry-After` says. Anthropic's word for it is 529.
    """
    message = error.message
    match error:
        case Overloaded(retry_after=seconds):
            return ErrorInfo(
                503, "overloaded_error", message, code="overloaded", retry_after=seconds
            )
        case DeadlineExceeded(worth_retrying=again):
            return ErrorInfo(504, "timeout_error", message, code="timeout", final=not again)
        case EngineUnavailable():
            return ErrorInfo(
                503, "server_error", message, code="engine_unavailable", retry_after=1.0
            )


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ErrorInfo:
    return ErrorInfo(400, "invalid_request_error", message, param, code)


def validation_problem(errors: Sequence[Any], body: Any) -> ErrorInfo:
    """The most telling of pydantic's errors, with its field's path in the client's spelling.

    A union's members all complain; the complaint that leads farthest into the body is about the
    member that the client meant.
    """
    located = [(field_path(error, body), error) for error in errors]
    path, error = max(located, key=lambda pair: reach(pair[0]))
    name = spell_path(path)
    message = str(error["msg"]).removeprefix("Value error, ")
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    if not name:
        return bad_request(f"The request body: {message}.", code=code)
    return bad_request(f"{name}: {message.rstrip('.')}.", param=name, code=code)


def field_path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The parts of a pydantic error's location that are keys and indices of the body.

    The others are names of union members and validators.
    """
    place: str | int
    parts: list[str | int]
    place, *parts = error["loc"]
    if place != "body":
        return parts
    path: list[str | int] = []
    for depth, part in enumerate(parts, start=1):
        is_key = isinstance(body, dict) and part in body
        is_index = isinstance(body, list) and isinstance(part, int) and part < len(body)
        is_missing = error["type"] == "missing" and depth == len(parts)
        if is_key or is_index:
            body = body[part]
        if is_key or is_index or is_missing:
            path.append(part)
    return path


def reach(path: Sequence[str | int]) -> tuple[int, list[int]]:
    """How far into a body a path leads, for comparison."""
    return len(path), [part for part in path if isinstance(part, int)]


def spell_path(path: Sequence[str | int]) -> str:
    """`["messages", 2, "content"]` as `messages[2].content`."""
    spelt = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return spelt.removeprefix(".")


def log_unhandled(error: Exception) -> None:
    """Write down an exception that no client should be the only one to hear of."""
    if not isinstance(error, GlmdError | HTTPException):
        log.error("A request failed.", exc_info=error)


async def answer_problem(request: Request, error: Exception) -> Response:
    """FastAPI's exception handler for everything."""
    problem = to_error(error)
    if isinstance(error, HTTPException):
        path = request.url.path
        if error.status_code == HTTPStatus.NOT_FOUND and error.detail == "Not Found":
            problem = replace(problem, message=absent.explain(path))
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            problem = replace(problem, message=f"{path} does not take {request.method}.")
        response = respond(problem, request.scope)
        response.headers.update(error.headers or {})
        return response
    return respond(problem, request.scope)


async def handle_client_disconnect(request: Request, error: Exception) -> Response:
    """The client has gone: 499, as nginx calls it, for the log alone."""
    return Response(status_code=499)


def install(app: FastAPI) -> None:
    """Let every error of `app` leave in this module's shape."""
    for kind in (GlmdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_problem)
    app.add_exception_handler(ClientDisconnect, handle_client_disconnect)
