"""Errors in Anthropic's shape (https://docs.anthropic.com/en/api/errors):

    {"type": "error", "error": {"type", "message", "details": {"error_code"}}, "request_id"}

where `details` is there if the error has a code.
"""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import Scope

from glmd.api.error_info import ErrorInfo, register_error_format

PATH = "/v1/messages"

OVERLOADED = 529
"""Anthropic's own status, which its clients wait out; other APIs say 503."""

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""Other statuses below 500 are an `invalid_request_error`, those above an `api_error`."""


def status(problem: ErrorInfo) -> int:
    return OVERLOADED if problem.type == "overloaded_error" else problem.status


def body(problem: ErrorInfo, request_id: str) -> dict[str, Any]:
    code = status(problem)
    type = TYPES.get(code, "invalid_request_error" if code < 500 else "api_error")
    error: dict[str, Any] = {"type": type, "message": problem.message}
    if problem.code is not None:
        error["details"] = {"error_code": problem.code}
    return {"type": "error", "error": error, "request_id": request_id}


def error_response(error: ErrorInfo, scope: Scope) -> JSONResponse:
    return JSONResponse(body(error, scope["state"]["request_id"]), status(error), error.headers)


register_error_format(PATH, error_response)
