"""API errors in the format of a path, and exception handlers that build them.

OpenAI's format is the default: `{"error": {"message", "type", "param", "code"}}`
(https://platform.openai.com/docs/guides/error-codes). An API with another format registers it for
its path prefix, so that middleware can answer for an API without importing it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

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
from glmd.utils.memory import exit_if_out_of_memory

log = logging.getLogger("glmd.api")

MAX_MESSAGE_CHARS, MAX_PARAM_CHARS = 1000, 300
"""Both may quote the request, which may be large."""


def to_error(exception: Exception) -> ErrorInfo:
    """Map an exception to the error that the client gets.

    Details of bugs stay in the log.
    """
    exit_if_out_of_memory(exception)
    error = _map_exception(exception)
    message, param = error.message, error.param
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}…"
    if param is not None and len(param) > MAX_PARAM_CHARS:
        param = f"{param[:MAX_PARAM_CHARS]}…"
    return replace(error, message=message, param=param)


def _map_exception(exception: Exception) -> ErrorInfo:  # noqa: PLR0911
    invalid = "invalid_request_error"
    match exception:
        case InvalidRequest(message=message, param=param, code=code):
            return ErrorInfo(400, invalid, message, param, code)
        case ModelNotFound(message=message):
            return ErrorInfo(404, invalid, message, "model", "model_not_found")
        case Overloaded(message=message, retry_after=seconds):
            # 503, not 429: the server is full, whichever client asks. OpenAI's clients retry both.
            return ErrorInfo(
                503, "overloaded_error", message, code="overloaded", retry_after=seconds
            )
        case DeadlineExceeded(message=message, worth_retrying=retry):
            return ErrorInfo(504, "timeout_error", message, code="timeout", final=not retry)
        case EngineUnavailable(message=message):
            return ErrorInfo(
                503, "server_error", message, code="engine_unavailable", retry_after=1.0
            )
        case Cancelled(message=message):
            # Clients retry 409 and 5xx; a cancelled request must not be retried.
            return ErrorInfo(499, invalid, message, code="request_cancelled")
        case RequestQuarantined(message=message):
            # Clients retry 408, 409, 429 and 5xx; this request must not be retried.
            return ErrorInfo(422, invalid, message, code="crashes_engine")
        case GlmdError(message=message):
            return ErrorInfo(500, "server_error", message)
        case RequestValidationError():
            return validation_error(exception.errors(), exception.body)
        case RefusedBody(error=refusal):
            return refusal
        case HTTPException():
            return ErrorInfo(exception.status_code, invalid, str(exception.detail))
        case _:
            return ErrorInfo(500, "server_error", "Internal server error; see the server's log.")


def validation_error(errors: Sequence[Any], body: Any) -> ErrorInfo:
    """Report the pydantic error whose path leads farthest into the body.

    Every member of a union reports an error; the longest path belongs to the member that the client
    meant.
    """
    located = [(_field_path(error, body), error) for error in errors]
    path, error = max(located, key=lambda pair: _path_length(pair[0]))
    name = _format_path(path)
    message = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    text = f"{name or 'The request body'}: {message}."
    return ErrorInfo(400, "invalid_request_error", text, name or None, code)


def _field_path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Return the keys and indices of the body in a pydantic error's location.

    The location also names union members and validators.
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


def _path_length(path: Sequence[str | int]) -> tuple[int, list[int]]:
    """Sort key for paths: the length, then the indices."""
    return len(path), [part for part in path if isinstance(part, int)]


def _format_path(path: Sequence[str | int]) -> str:
    """Format `["messages", 2, "content"]` as `messages[2].content`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def log_unhandled(exception: Exception) -> None:
    """Log an unexpected exception."""
    if not isinstance(exception, GlmdError | HTTPException):
        log.error("Request failed.", exc_info=exception)


async def handle_exception(request: Request, exception: Exception) -> Response:
    """FastAPI exception handler for every exception."""
    error = to_error(exception)
    headers: Mapping[str, str] = {}
    if isinstance(exception, HTTPException):
        path, headers = request.url.path, exception.headers or {}
        if error.status == HTTPStatus.NOT_FOUND and error.message == "Not Found":
            error = replace(error, message=explain_not_found(path))
        if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
            error = replace(error, message=f"{path} does not accept {request.method}.")
    response = error_response(error, request.scope)
    response.headers.update(headers)
    if id := request.scope.get("state", {}).get("request_id"):
        # Starlette answers unexpected exceptions outside of all middleware.
        response.headers["x-request-id"] = response.headers["request-id"] = id
    return response


async def handle_client_disconnect(request: Request, exception: Exception) -> Response:
    """Record status 499 (nginx's code) for a client that disconnected."""
    return Response(status_code=499)


def add_exception_handlers(app: FastAPI) -> None:
    """Answer every exception of `app` in an API's error format."""
    for kind in (GlmdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle_exception)
    app.add_exception_handler(ClientDisconnect, handle_client_disconnect)


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error, independent of an API's format.

    Attributes:
        status: HTTP status, used unless the response has started.
        type: OpenAI's error type.
        message: text for the person who reads the error.
        param: path of the invalid field (`messages[2].content`); None: no single field.
        code: machine-readable reason.
        retry_after: seconds until a retry is sensible; None: unknown.
        final: tell clients not to retry, even though the status suggests a retry.
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
        """JSON body in OpenAI's format."""
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
        """`body` as one line of JSON."""
        return json.dumps(self.body, ensure_ascii=False)

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that belong to the error."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.final:
            headers["x-should-retry"] = "false"  # read by OpenAI's and Anthropic's clients
        if self.status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.INTERNAL_SERVER_ERROR):
            # The rest of the request may still arrive; after an exception uvicorn closes anyway.
            headers["Connection"] = "close"
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def overloaded(message: str) -> ErrorInfo:
    """A refusal for lack of capacity, with a retry after one second."""
    return ErrorInfo(503, "overloaded_error", message, code="overloaded", retry_after=1.0)


class RefusedBody(HTTPException):
    """A body that is no valid request.

    FastAPI passes on no other exception of `Request.json`.
    """

    def __init__(self, error: ErrorInfo) -> None:
        super().__init__(error.status, error.message, error.headers)
        self.error = error


_formats: dict[str, Callable[[ErrorInfo, Scope], JSONResponse]] = {}


def register_error_format(prefix: str, build: Callable[[ErrorInfo, Scope], JSONResponse]) -> None:
    """Build the error responses of `prefix` and the paths below it with `build`."""
    _formats[prefix] = build


def is_below(path: str, prefix: str) -> bool:
    """Whether `path` is `prefix` or a path below `prefix`."""
    return path == prefix or path.startswith(prefix + "/")


def error_response(error: ErrorInfo, scope: Scope) -> JSONResponse:
    """Build the response in the format of the API that the request's path belongs to."""
    for prefix, build in _formats.items():
        if is_below(scope["path"], prefix):
            return build(error, scope)
    return JSONResponse(error.body, error.status, error.headers)


REASONS = {
    "/v1/embeddings": "the server runs a chat model, which computes no embeddings",
    "/v1/rerank": "the server runs a chat model, which ranks no documents",
    "/v1/moderations": "the server runs a chat model, which moderates no content",
    "/v1/images": "the model generates text only",
    "/v1/videos": "the model generates text only",
    "/v1/audio": "the model reads and generates text only",
    "/v1/realtime": "the model reads and generates text only",
    "/v1/files": "the server stores no files",
    "/v1/uploads": "the server stores no files",
    "/v1/vector_stores": "the server stores no files",
    "/v1/batches": "the server runs no batches; send requests in parallel",
    "/v1/messages/batches": "the server runs no batches; send requests in parallel",
    "/v1/fine_tuning": "the server trains no models",
    "/v1/assistants": "the Assistants API is not served; use the Responses API",
    "/v1/threads": "the Assistants API is not served; use the Responses API",
    "/v1/conversations": "the server stores no conversations; send previous_response_id to"
    " /v1/responses",
    "/api/v0/embeddings": "the server runs a chat model, which computes no embeddings",
    "/api/v1": "of LM Studio's newer API only /api/v1/models is served; use /api/v0, or OpenAI's"
    " API under /v1",
    **dict.fromkeys(
        (f"/api/{name}" for name in ("chat", "generate", "tags", "show", "ps", "version", "embed")),
        "Ollama's API is not served; use OpenAI's API under /v1",
    ),
    "/messages": "use /v1/messages",
    "/v1/v1": "only OpenAI clients take a base URL that ends in /v1, and it ends in /v1 once",
}
"""By path prefix."""


def explain_not_found(path: str) -> str:
    """Explain why `path` is not found."""
    prefix = path.rstrip("/") or path
    while prefix:
        if prefix in REASONS:
            return f"{path} is not available on this server: {REASONS[prefix]}."
        prefix = prefix.rpartition("/")[0]
    return f"Path {path} not found."
