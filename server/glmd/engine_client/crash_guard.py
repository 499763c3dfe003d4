"""Quarantine of requests that crash the engine.

Any request in flight may have caused a crash, and clients resend all of them. A resent request is
therefore *isolated*: isolated requests run one at a time, beside any number of unaffected
requests. A request is cleared once it produces more tokens than it had when the engine died, or
ends by itself. A second crash while a request is isolated, or the only one in flight, quarantines
the request: it is rejected for `EXPIRY` seconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import msgspec

from glmd.errors import EngineUnavailable, GlmdError, RequestQuarantined
from glmd.ipc import EngineRequest

log = logging.getLogger("glmd.engine_client")

EXPIRY = 600.0
"""Seconds after the latest crash for which a record is kept."""

CAPACITY = 4096
"""Records kept, the latest ones: 200 bytes each."""

MARGIN = 16
"""Extra tokens before a request is cleared: outputs of the last steps before a crash, up to four
tokens each, may be lost."""


@dataclass(slots=True)
class CrashRecord:
    """Crashes with one request in flight.

    Attributes:
        crashes: number of crashes.
        tokens: tokens produced before a crash, the maximum of all crashes.
        expires_at: time at which the record is dropped.
        quarantined: the request is rejected.
    """

    crashes: int = 0
    tokens: int = 0
    expires_at: float = 0.0
    quarantined: bool = False


class TrackedRequest:
    """A request in flight.

    Attributes:
        tokens: tokens produced so far.
        safe_after: tokens after which an isolated request is cleared. None: not isolated.
    """

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.tokens = 0
        self.safe_after: int | None = None

    @cached_property
    def fingerprint(self) -> bytes:
        """Hash of everything that determines the engine's work for the request."""
        work = msgspec.structs.replace(
            self.request, id="", client="", priority=0, prompt_progress=False
        )
        return blake2b(msgspec.msgpack.encode(work), digest_size=16).digest()


class CrashGuard:
    """Requests in flight and records of earlier crashes. Belongs to one event loop.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[bytes, CrashRecord] = OrderedDict()
        self._in_flight: set[TrackedRequest] = set()
        self._isolated: TrackedRequest | None = None
        self._waiting: deque[tuple[TrackedRequest, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def track(self, request: EngineRequest) -> AsyncIterator[TrackedRequest]:
        """Track a request while it is in flight.

        A request with a record waits for isolation.

        Raises:
            RequestQuarantined: the request is quarantined.
            EngineUnavailable: `fail_waiting` was called during the wait.
            GlmdError: the error passed to `withdraw` during the wait.
        """
        tracked = TrackedRequest(request)
        if self._find_record(tracked) is not None:
            await self._isolate(tracked)
        self._in_flight.add(tracked)
        try:
            yield tracked
        finally:
            self._in_flight.discard(tracked)
            self._end_isolation(tracked)

    def advance(self, tracked: TrackedRequest, tokens: int) -> None:
        """Count `tokens` more tokens of a request."""
        tracked.tokens += tokens
        if tracked.safe_after is not None and tracked.tokens > tracked.safe_after:
            self._end_isolation(tracked)

    def clear(self, tracked: TrackedRequest) -> None:
        """Drop the record of a request that ended by itself."""
        if self._records:
            self._records.pop(tracked.fingerprint, None)

    def engine_died(self) -> None:
        """Record a crash with all requests in flight."""
        tokens: dict[bytes, int] = {}
        for tracked in self._in_flight:
            tokens[tracked.fingerprint] = max(tracked.tokens, tokens.get(tracked.fingerprint, 0))
        if len(tokens) > 1:
            log.warning("Engine died: requests=%d, run one at a time when resent", len(tokens))
        isolated = self._isolated.fingerprint if self._isolated in self._in_flight else None
        for fingerprint, produced in tokens.items():
            record = self._records.setdefault(fingerprint, CrashRecord())
            self._records.move_to_end(fingerprint)
            record.crashes += 1
            record.tokens = max(record.tokens, produced)
            record.expires_at = self._clock() + EXPIRY
            is_cause = len(tokens) == 1 or fingerprint == isolated
            record.quarantined = record.crashes > 1 and is_cause
            if record.quarantined:
                ids = (c.request.id for c in self._in_flight if c.fingerprint == fingerprint)
                log.error(
                    "Request quarantined: crashes=%d minutes=%d request_id=%s",
                    record.crashes,
                    EXPIRY / 60,
                    ",".join(ids),
                )
        while len(self._records) > CAPACITY:
            self._records.popitem(last=False)

    def fail_waiting(self, message: str) -> None:
        """Raise EngineUnavailable in all requests that wait for isolation."""
        for _, waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(EngineUnavailable(message))
        self._waiting.clear()

    def withdraw(self, id: str, error: GlmdError) -> None:
        """Raise `error` in a request if it waits for isolation."""
        for tracked, waiter in self._waiting:
            if tracked.request.id == id and not waiter.done():
                waiter.set_exception(error)

    def _find_record(self, tracked: TrackedRequest) -> CrashRecord | None:
        """Return the unexpired record of a request.

        Raises:
            RequestQuarantined: the request is quarantined.
        """
        record = self._records.get(tracked.fingerprint) if self._records else None
        if record is None:
            return None
        if self._clock() > record.expires_at:
            del self._records[tracked.fingerprint]
            return None
        if record.quarantined:
            raise RequestQuarantined(
                f"The engine crashed {record.crashes} times on this request, which is therefore"
                f" rejected for {EXPIRY / 60:.0f} minutes after the last crash. See the server's"
                " log for the cause, or change the request."
            )
        return record

    async def _isolate(self, tracked: TrackedRequest) -> None:
        """Wait until no other request is isolated.

        Isolate this one if its record still exists.
        """
        if self._isolated is not None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((tracked, waiter))
            try:
                await waiter
            except BaseException:
                self._end_isolation(tracked)  # it may have become the isolated one already
                raise
        self._isolated = tracked
        try:
            record = self._find_record(tracked)
        except RequestQuarantined:
            self._end_isolation(tracked)
            raise
        if record is None:
            self._end_isolation(tracked)
        else:
            tracked.safe_after = record.tokens + MARGIN

    def _end_isolation(self, tracked: TrackedRequest) -> None:
        """End the isolation of a request, if it is isolated, and isolate the next one."""
        tracked.safe_after = None
        if self._isolated is not tracked:
            return
        self._isolated = None
        while self._waiting:
            following, waiter = self._waiting.popleft()
            if not waiter.done():
                self._isolated = following
                waiter.set_result(None)
                return
