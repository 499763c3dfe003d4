"""Outputs of one request, between the socket and a reader that may be slower."""

from __future__ import annotations

import asyncio

from glmd.errors import EngineError, GlmdError, InvalidRequest, Overloaded
from glmd.ipc import SequenceOutput


class OutputCollector:
    """The outputs of one request that its reader has not taken yet: at most one per sequence.

    Args:
        n: the request's sequences.
        limit: unread tokens at which the stream gives up on its reader.
    """

    def __init__(self, n: int, limit: int) -> None:
        self._running = set(range(n))
        self._limit = limit
        self._unread: dict[int, SequenceOutput] = {}
        self._unread_tokens = 0
        self._error: GlmdError | None = None
        self._news = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Every sequence has ended, and every output has been taken."""
        return not self._running and not self._unread

    @property
    def running(self) -> bool:
        """More outputs are to come."""
        return bool(self._running) and not self.failed

    @property
    def failed(self) -> bool:
        """It ended before its sequences did."""
        return self._error is not None

    def put(self, output: SequenceOutput) -> None:
        """Add an output, joined to the same sequence's unread one."""
        if output.index not in self._running or self._error is not None:
            return
        if output.finish_reason is not None:
            self._running.discard(output.index)
        unread = self._unread.get(output.index)
        if unread is None:
            self._unread[output.index] = output
        else:
            join(unread, output)
        self._unread_tokens += len(output.tokens)
        if self._unread_tokens > self._limit:
            self._unread.clear()
            self.fail(Overloaded(f"The reader is more than {self._limit} tokens behind."))
        self._news.set()

    def end(self, index: int) -> bool:
        """Forget one sequence; true if it was still running."""
        self._unread.pop(index, None)
        running = index in self._running
        self._running.discard(index)
        self._news.set()
        return running

    def fail(self, error: GlmdError) -> None:
        """Let the reader find `error` after what has arrived, unless that is everything."""
        if self._running and self._error is None:
            self._error = error
            self._news.set()

    async def get(self) -> list[SequenceOutput]:
        """Wait for news; what has arrived since the last call, by sequence.

        Raises:
            GlmdError: the one that `fail` was given.
        """
        await self._news.wait()
        if self._error is not None and not self._unread:
            raise self._error
        if self._error is None:
            self._news.clear()
        outputs = list(self._unread.values())
        self._unread.clear()
        self._unread_tokens = 0
        return outputs


def join(earlier: SequenceOutput, later: SequenceOutput) -> None:
    """Append to an output what the same sequence gave next."""
    earlier.tokens += later.tokens
    if later.logprobs is not None:
        earlier.logprobs = (earlier.logprobs or []) + later.logprobs
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


def error_of(output: SequenceOutput) -> GlmdError:
    """The exception that says what an output with finish "error" says."""
    message = output.error or "The engine gave up on this request."
    match output.error_kind:
        case "invalid_request":
            return InvalidRequest(message, param=output.error_param)
        case "overloaded":
            return Overloaded(message)
        case _:
            return EngineError(message)
