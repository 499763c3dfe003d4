"""The errors that glmd raises on purpose.

One small hierarchy; `glmd.api` maps each class to the HTTP status and error shape of the
API at hand, `glmd.cli` to one line on stderr and a non-zero exit code.
"""

from __future__ import annotations


class GlmdError(Exception):
    """Base of every error that a user of glmd can cause or should read.

    Attributes:
        message: one sentence for the person who reads it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(GlmdError):
    """The request cannot be honoured as sent (HTTP 400).

    Attributes:
        param: the offending field in the client's spelling (`messages[2].content`), if one is.
        code: a machine-readable code such as `context_length_exceeded`, if one fits.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def invalid_field(param: str, problem: str) -> InvalidRequest:
    """The error for one field of a request: `"{param}: {problem}"`."""
    return InvalidRequest(f"{param}: {problem}", param=param)


class ModelNotFound(GlmdError):
    """No such model is served here (HTTP 404), or no such folder or hub repository (CLI)."""


class Overloaded(GlmdError):
    """There is no room for the request right now (HTTP 503 with `Retry-After`).

    Attributes:
        retry_after: seconds after which another attempt is sensible.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(GlmdError):
    """The request took longer than the server or the client allows (HTTP 504).

    Attributes:
        worth_retrying: another attempt could go faster than this one.
    """

    def __init__(self, message: str, *, worth_retrying: bool) -> None:
        super().__init__(message)
        self.worth_retrying = worth_retrying


class EngineUnavailable(GlmdError):
    """The engine is loading, restarting, or died under the request (HTTP 503)."""


class CrashesEngine(GlmdError):
    """The engine died more than once on this very request, which is not tried again (HTTP 422)."""


class Cancelled(GlmdError):
    """Somebody other than the client ended the request (HTTP 499)."""


class EngineError(GlmdError):
    """The engine failed on this request, by a fault of its own (HTTP 500)."""


class CheckpointError(GlmdError):
    """A checkpoint is missing, damaged, of the wrong kind, or cannot be written.

    Attributes:
        file: the file at fault, if one is.
        tensor: the tensor at fault, if one is.
    """

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor


class ServerRefused(GlmdError):
    """A server that was asked over HTTP says no, breaks off, or does not answer."""


class SettingsError(GlmdError):
    """A setting (flag, environment, configuration file) is unknown or has a bad value."""


class ServiceError(GlmdError):
    """The system's service manager refused something, or the service it runs does not come up."""
