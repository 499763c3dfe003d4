"""Exceptions raised by glmd.

`glmd.api` maps each class to an HTTP status and the API's error shape; `glmd.cli` prints the
message and exits with a non-zero code.
"""

from __future__ import annotations


class GlmdError(Exception):
    """Base class of all errors with a message for the user.

    Attributes:
        message: one sentence for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(GlmdError):
    """A field of the request is invalid (HTTP 400).

    Attributes:
        param: the field's path in the request (`messages[2].content`). None: no single field.
        code: error code such as `context_length_exceeded`. None: no specific code.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def invalid_field(param: str, problem: str) -> InvalidRequest:
    """The error for one field of a request: `"{param}: {problem}"`."""
    return InvalidRequest(f"{param}: {problem}", param=param)


class ModelNotFound(GlmdError):
    """The model is not served (HTTP), or no such folder or repository exists (CLI)."""


class Overloaded(GlmdError):
    """The server has no capacity for the request (HTTP 503 with `Retry-After`).

    Attributes:
        retry_after: suggested seconds before a retry.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(GlmdError):
    """A timeout of the request expired (HTTP 504).

    Attributes:
        worth_retrying: a retry may be faster.
    """

    def __init__(self, message: str, *, worth_retrying: bool) -> None:
        super().__init__(message)
        self.worth_retrying = worth_retrying


class EngineUnavailable(GlmdError):
    """The engine is loading or restarting, or stopped during the request (HTTP 503)."""


class RequestQuarantined(GlmdError):
    """The engine crashed repeatedly on the request, which is rejected (HTTP 422)."""


class Cancelled(GlmdError):
    """The request was cancelled at the server (HTTP 499)."""


class EngineError(GlmdError):
    """The engine failed on the request because of an internal error (HTTP 500)."""


class CheckpointError(GlmdError):
    """A checkpoint is missing, damaged or unsupported, or cannot be written.

    Attributes:
        file: name of the faulty file. None: unknown.
        tensor: name of the faulty tensor. None: unknown.
    """

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor


class ServerRefused(GlmdError):
    """A server rejected an HTTP request, broke the connection, or did not respond."""


class SettingsError(GlmdError):
    """A setting is unknown or invalid: flag, environment or configuration file."""


class ServiceError(GlmdError):
    """The system's service manager reported an error, or the service did not start."""
