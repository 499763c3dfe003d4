"""Requests under which the engine died: tried one at a time, and refused if it dies again.

When the engine dies, any of the requests in flight may have caused it, and clients send all of
them again by themselves. So each that comes back is a suspect and waits for its turn to be on
trial: one suspect at a time, beside as many unsuspected requests as there are. A suspect is off
trial once it gets beyond the place where the engine died, so innocent ones hold each other up for
no longer than it takes to get there, and forgotten once it ends. If the engine dies during a
trial, that suspect is guilty, and refused for a while.
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

from glmd.errors import CrashesEngine, EngineUnavailable, GlmdError
from glmd.ipc import EngineRequest

log = logging.getLogger("glmd.supervisor")

MEMORY = 600.0
"""Seconds for which a request stays suspected, or refused, after the engine died under it."""

CAPACITY = 4096
"""Requests remembered, the latest ones: 200 bytes each."""

MARGIN = 16
"""Tokens by which a suspect must get beyond where it was: of the last steps before the death, of
up to four tokens each, nothing was heard."""


@dataclass(slots=True)
class CrashRecord:
    """What is held against one request.

    Attributes:
        deaths: how often the engine died while it was in flight.
        place: tokens that it had yielded then, the most of all times.
        until: when this is forgotten.
    """

    deaths: int = 0
    tokens: int = 0
    until: float = 0.0
    refused: bool = False


class TrackedRequest:
    """A request in flight.

    Attributes:
        tokens: what it has yielded.
        beyond: on trial: tokens from which on it is not; None: not on trial.
    """

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.tokens = 0
        self.safe_after: int | None = None

    @cached_property
    def fingerprint(self) -> bytes:
        """Equal for requests that ask the engine for the same work."""
        work = msgspec.structs.replace(
            self.request, id="", client="", priority=0, prompt_progress=False
        )
        return blake2b(msgspec.msgpack.encode(work), digest_size=16).digest()


class CrashGuard:
    """The requests in flight, and those under which the engine died. For one event loop.

    Args:
        clock: seconds, from any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[bytes, CrashRecord] = OrderedDict()
        self._open: set[TrackedRequest] = set()
        self._tried: TrackedRequest | None = None
        self._waiting: deque[tuple[TrackedRequest, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def track(self, request: EngineRequest) -> AsyncIterator[TrackedRequest]:
        """For as long as a request is in flight. A suspect waits for its turn first.

        Raises:
            CrashesEngine: the engine died on it more than once.
            EngineUnavailable: `fail_waiting` was called while it waited.
            GlmdError: what `withdraw` was given.
        """
        case = TrackedRequest(request)
        if self._record(case) is not None:
            await self._turn(case)
        self._open.add(case)
        try:
            yield case
        finally:
            self._open.discard(case)
            self._end_trial(case)

    def advance(self, case: TrackedRequest, tokens: int) -> None:
        """Note that a request has yielded so many more tokens."""
        case.tokens += tokens
        if case.safe_after is not None and case.tokens > case.safe_after:
            self._end_trial(case)

    def clear(self, case: TrackedRequest) -> None:
        """Note that a request has ended by itself."""
        if self._records:
            self._records.pop(case.fingerprint, None)

    def engine_died(self) -> None:
        """Note that the engine died with all that is in flight."""
        places: dict[bytes, int] = {}
        for case in self._open:
            places[case.fingerprint] = max(case.tokens, places.get(case.fingerprint, 0))
        if len(places) > 1:
            log.warning(
                "%d requests were in flight; where they come back, they are tried in turn.",
                len(places),
            )
        tried = self._tried.fingerprint if self._tried in self._open else None
        for fingerprint, place in places.items():
            record = self._records.setdefault(fingerprint, CrashRecord())
            self._records.move_to_end(fingerprint)
            record.deaths += 1
            record.tokens = max(record.tokens, place)
            record.until = self._clock() + MEMORY
            record.refused = record.deaths > 1 and (len(places) == 1 or fingerprint == tried)
            if record.refused:
                log.error(
                    "The engine died %d times on one and the same request, the last time as %s:"
                    " it is refused for %d minutes.",
                    record.deaths,
                    ", ".join(c.request.id for c in self._open if c.fingerprint == fingerprint),
                    MEMORY / 60,
                )
        while len(self._records) > CAPACITY:
            self._records.popitem(last=False)

    def fail_waiting(self, message: str) -> None:
        """Fail those that wait for their turn with an EngineUnavailable."""
        for _, turn in self._waiting:
            if not turn.done():
                turn.set_exception(EngineUnavailable(message))
        self._waiting.clear()

    def withdraw(self, id: str, error: GlmdError) -> None:
        """Let `error` end a request if it waits for its turn."""
        for case, turn in self._waiting:
            if case.request.id == id and not turn.done():
                turn.set_exception(error)

    def _record(self, case: TrackedRequest) -> CrashRecord | None:
        """What is held against a request, unless it is too old.

        Raises:
            CrashesEngine: it is guilty.
        """
        if not self._records:
            return None
        record = self._records.get(case.fingerprint)
        if record is None:
            return None
        if self._clock() > record.until:
            del self._records[case.fingerprint]
            return None
        if record.refused:
            raise CrashesEngine(
                f"The engine died {record.deaths} times while it worked on this very request,"
                f" which is therefore refused for {MEMORY / 60:.0f} minutes after the last time."
                " The server's log says how it died."
            )
        return record

    async def _turn(self, case: TrackedRequest) -> None:
        """Wait until no other suspect is on trial; then this one is, if it is suspected still."""
        if self._tried is not None:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((case, turn))
            try:
                await turn
            except BaseException:
                self._end_trial(case)  # It may have been this one's turn already.
                raise
        self._tried = case
        try:
            record = self._record(case)
        except CrashesEngine:
            self._end_trial(case)
            raise
        if record is None:
            self._end_trial(case)
        else:
            case.safe_after = record.tokens + MARGIN

    def _end_trial(self, case: TrackedRequest) -> None:
        """Take a request off trial, if it is on, and put the next one on."""
        case.safe_after = None
        if self._tried is not case:
            return
        self._tried = None
        while self._waiting:
            following, turn = self._waiting.popleft()
            if not turn.done():
                self._tried = following
                turn.set_result(None)
                return
