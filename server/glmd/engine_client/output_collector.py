"""Buffer of one request's outputs, between the engine's socket and the reader."""

from __future__ import annotations

import asyncio

from glmd.errors import EngineError, GlmdError, InvalidRequest, Overloaded
from glmd.ipc import SequenceOutput


class OutputCollector:
    """Unread outputs of one request, merged to at most one per sequence.

    Args:
        n: sequences of the request.
        limit: unread tokens above which an unfinished request fails with `Overloaded`.
    """

    def __init__(self, n: int, limit: int) -> None:
        self._running = set(range(n))
        self._limit = limit
        self._unread: dict[int, SequenceOutput] = {}
        self._unread_tokens = 0
        self._error: GlmdError | None = None
        self._changed = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended and all outputs have been read."""
        return not self._running and not self._unread

    @property
    def running(self) -> bool:
        """Whether more outputs can arrive."""
        return bool(self._running) and not self.failed

    @property
    def failed(self) -> bool:
        """Whether the request failed before all of its sequences ended."""
        return self._error is not None

    def put(self, output: SequenceOutput) -> None:
        """Add an output; merge it into the sequence's unread output, if there is one."""
        if output.index not in self._running or self._error is not None:
            return
        if output.finish_reason is not None:
            self._running.discard(output.index)
        unread = self._unread.get(output.index)
        if unread is None:
            self._unread[output.index] = output
        else:
            merge(unread, output)
        self._unread_tokens += len(output.tokens)
        # Complete answers are delivered whatever their size: no more output can pile up.
        if self._running and self._unread_tokens > self._limit:
            self._unread.clear()
            self.fail(Overloaded(f"The client reads too slowly: {self._limit} tokens are unread."))
        self._changed.set()

    def end(self, index: int) -> bool:
        """Drop one sequence and its unread output; return whether it was running."""
        unread = self._unread.pop(index, None)
        if unread is not None:
            self._unread_tokens -= len(unread.tokens)
        running = index in self._running
        self._running.discard(index)
        self._changed.set()
        return running

    def fail(self, error: GlmdError) -> None:
        """Raise `error` in the reader after unread outputs, unless all have ended."""
        if self._running and self._error is None:
            self._error = error
            self._changed.set()

    async def get(self) -> list[SequenceOutput]:
        """Wait for outputs; return and remove all unread ones.

        Raises:
            GlmdError: the error passed to `fail`.
        """
        await self._changed.wait()
        if self._error is not None and not self._unread:
            raise self._error
        if self._error is None:
            self._changed.clear()
        outputs = list(self._unread.values())
        self._unread.clear()
        self._unread_tokens = 0
        return outputs


def merge(earlier: SequenceOutput, later: SequenceOutput) -> None:
    """Append the next output of the same sequence to `earlier`."""
    earlier.tokens += later.tokens
    if later.logprobs is not None:
        earlier.logprobs = (earlier.logprobs or []) + later.logprobs
    if later.prompt_logprobs is not None:
        earlier.prompt_logprobs = (earlier.prompt_logprobs or []) + later.prompt_logprobs
    earlier.finish_reason = later.finish_reason
    earlier.error = later.error
    earlier.error_kind = later.error_kind
    earlier.error_param = later.error_param
    earlier.prompt_tokens = earlier.prompt_tokens or later.prompt_tokens
    earlier.cached_tokens = earlier.cached_tokens or later.cached_tokens
    earlier.admitted = earlier.admitted or later.admitted
    earlier.cache_match = earlier.cache_match or later.cache_match
    earlier.computed_tokens = later.computed_tokens or earlier.computed_tokens
    earlier.drafted += later.drafted
    earlier.accepted += later.accepted


def output_error(output: SequenceOutput) -> GlmdError:
    """Return the exception for an output with finish reason "error"."""
    message = output.error or "The engine ended the request with an error."
    match output.error_kind:
        case "invalid_request":
            return InvalidRequest(message, param=output.error_param)
        case "overloaded":
            return Overloaded(message)
        case _:
            return EngineError(message)
