"""API errors before they take an API's format, and the response in the format of a path.

OpenAI's format is the default: `{"error": {"message", "type", "param", "code"}}`
(https://platform.openai.com/docs/guides/error-codes). An API with another format registers it for
its path prefix, so that middleware can answer for an API without importing it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import Scope


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
        if self.status == HTTPStatus.REQUEST_TIMEOUT:
            headers["Connection"] = "close"  # the rest of the request may still arrive
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def overloaded(message: str) -> ErrorInfo:
    """A refusal for lack of capacity, with a retry after one second."""
    return ErrorInfo(503, "overloaded_error", message, code="overloaded", retry_after=1.0)


_formats: dict[str, Callable[[ErrorInfo, Scope], JSONResponse]] = {}


def register_error_format(prefix: str, build: Callable[[ErrorInfo, Scope], JSONResponse]) -> None:
    """Build the error responses of `prefix` and of the paths below `prefix` with `build`."""
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
