"""The requests to the engine: what is known of each in flight, of the last ones, and in total.

Kept up from `Generation.events`, so that it costs a few additions per output of the engine, and
read by the status, the metrics and the log.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from glmd.api.observability.exchange import Api, HttpExchange
from glmd.api.observability.histogram import Histogram
from glmd.api.observability.throughput_window import ThroughputWindow
from glmd.chat.events import FinishReason
from glmd.errors import Cancelled, GlmdError
from glmd.ipc import CacheMatch, EngineRequest, SamplingParams, SequenceOutput, count_tokens

State = Literal["queued", "prefill", "decoding", "finished"]
Finish = FinishReason | Literal["cancelled", "error"]

HISTORY = 100
"""Finished requests that are remembered."""

WAITS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800,
)  # fmt: skip
"""Seconds: bounds for waits and for whole requests."""

GAPS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15,
    0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
"""Seconds: bounds for the time between two tokens."""


@dataclass(eq=False, slots=True)
class RequestStats:
    """What is known of one request to the engine.

    Moments are in `time.monotonic`'s seconds. `generated_tokens` is over all sequences.

    Attributes:
        id: the answer's, as clients read it (`chatcmpl-…`), and the engine's.
        exchange: the HTTP request that it is of.
        sequences: answers to the prompt.
        max_tokens, sampling: what was asked for.
        begun: it was sent to the engine.
        computed_tokens: prompt tokens that are ready, cached ones included.
        cached_tokens: prompt tokens that were not computed for it.
        drafted: MTP drafts verified for it, and `accepted` of them.
        match: how much of its prompt was stored when its turn came, and why not more.
        queue_seconds: from its arrival to the turn of its first sequence.
        first_token: when its first token arrived here.
        longest_gap: the longest time between two outputs with tokens, in seconds.
        error: why it ended, if it did not end by itself.
    """

    id: str
    exchange: HttpExchange
    sequences: int
    prompt_tokens: int
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    begun: bool = False
    state: State = "queued"
    computed_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    announced: bool = False
    match: CacheMatch | None = None
    queue_seconds: float | None = None
    first_token: float | None = None
    last_tokens: list[float | None] = field(init=False)
    """By sequence, when its last tokens arrived."""
    longest_gap: float = 0.0
    ended: float | None = None
    finish: Finish | None = None
    error: str | None = None
    left: int = field(init=False)
    """Sequences that have not ended."""

    def __post_init__(self) -> None:
        self.left = self.sequences
        self.last_tokens = [None] * self.sequences

    @property
    def api(self) -> Api:
        assert self.exchange.api is not None
        return self.exchange.api

    @property
    def seconds(self) -> float:
        """Since the request arrived, to its end or to now."""
        return (time.monotonic() if self.ended is None else self.ended) - self.exchange.began

    @property
    def ttft(self) -> float | None:
        """Seconds from the request's arrival to its first token."""
        return None if self.first_token is None else self.first_token - self.exchange.began

    @property
    def mean_gap(self) -> float | None:
        """Seconds between two tokens of a sequence, on average."""
        moments = [moment for moment in self.last_tokens if moment is not None]
        later = self.generated_tokens - len(moments)
        if self.first_token is None or later <= 0:
            return None
        return sum(moment - self.first_token for moment in moments) / later


@dataclass(slots=True)
class AggregateStats:
    """What all requests since the start add up to.

    Attributes:
        finished: requests by API and the way they ended.
        ttft: seconds to the first token, of requests that had one.
        queue: seconds until their turn came.
        prefill: seconds from then to the first token.
        gaps: seconds between tokens; drafts that arrive together share the time since the last.
        seconds: of whole requests.
    """

    finished: Counter[tuple[Api, Finish]] = field(default_factory=Counter)
    ttft: Histogram = field(default_factory=lambda: Histogram(WAITS))
    queue: Histogram = field(default_factory=lambda: Histogram(WAITS))
    prefill: Histogram = field(default_factory=lambda: Histogram(WAITS))
    gaps: Histogram = field(default_factory=lambda: Histogram(GAPS))
    seconds: Histogram = field(default_factory=lambda: Histogram(WAITS))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class RequestRegistry:
    """Keeps the records.

    Attributes:
        running: those in flight, by id, in order of arrival.
        recent: the last ones that ended, the latest last.
        totals: over all of them.
        timeline: tokens by second.
        watchers: called with each record when its request has ended.
        first_tokens: of the last requests, when (Unix time) a first token came, and how long
            that took.
    """

    def __init__(self) -> None:
        self.running: dict[str, RequestStats] = {}
        self.recent: deque[RequestStats] = deque(maxlen=HISTORY)
        self.totals = AggregateStats()
        self.timeline = ThroughputWindow()
        self.watchers: list[Callable[[RequestStats], None]] = []
        self.first_tokens: deque[tuple[float, float]] = deque(maxlen=HISTORY)

    def record(self, exchange: HttpExchange, request: EngineRequest) -> RequestStats:
        """A record of a request that has not begun."""
        record = RequestStats(
            request.id,
            exchange,
            request.n,
            count_tokens(request.prompt),
            max_tokens=request.max_tokens,
            sampling=request.sampling,
        )
        exchange.records.append(record)
        return record

    def find(self, id: str) -> list[RequestStats]:
        """Those in flight whose id, or whose HTTP request's id, is `id`."""
        return [record for record in self.running.values() if id in (record.id, record.exchange.id)]

    @contextmanager
    def in_flight(self, record: RequestStats) -> Iterator[None]:
        """Count a request as running; how the block ends is how the request does."""
        record.begun = True
        self.running[record.id] = record
        try:
            yield
        except (GeneratorExit, asyncio.CancelledError):
            self._end(record, "cancelled", "The client went away.")
            raise
        except Cancelled as error:
            self._end(record, "cancelled", error.message)
            raise
        except Exception as error:
            message = error.message if isinstance(error, GlmdError) else type(error).__name__
            self._end(record, "error", message)
            raise
        else:
            self._end(record, record.finish or "stop", None)

    def observe(self, record: RequestStats, output: SequenceOutput) -> None:
        """Note what an output brings."""
        if output.admitted and record.queue_seconds is None:
            record.match = output.cache_match
            if output.cache_match is not None:
                record.computed_tokens = output.cache_match.tokens
            record.queue_seconds = time.monotonic() - record.exchange.began
            record.state = "prefill"
            self.totals.queue.add(record.queue_seconds)
        if output.computed_tokens > record.computed_tokens:
            self._advance(record, output.computed_tokens)
        if output.prompt_tokens and not record.announced:
            self._announce(record, output.cached_tokens)
        if output.drafted:
            record.drafted += output.drafted
            record.accepted += output.accepted
            self.totals.drafted += output.drafted
            self.totals.accepted += output.accepted
        count = len(output.tokens)
        if count:
            now = time.monotonic()
            record.generated_tokens += count
            self.totals.generated_tokens += count
            self.timeline.now().generated += count
            if record.first_token is None:
                self._begin(record, now)
            last = record.last_tokens[output.index]
            if last is not None:
                gap = now - last
                record.longest_gap = max(record.longest_gap, gap)
                self.totals.gaps.add(gap / count, count)
            record.last_tokens[output.index] = now

    def finished(self, record: RequestStats, reason: FinishReason) -> None:
        """Note that one of a request's sequences has ended by itself."""
        record.finish = reason
        record.left -= 1

    def _announce(self, record: RequestStats, cached: int) -> None:
        record.announced = True
        record.cached_tokens = cached
        # A last token that was alone is no chunk, and nothing was told of it.
        self._advance(record, record.prompt_tokens)
        self.totals.prompt_tokens += record.prompt_tokens
        self.totals.cached_tokens += cached

    def _advance(self, record: RequestStats, computed: int) -> None:
        """Note that so many of a prompt's tokens are ready."""
        self.timeline.now().computed += computed - record.computed_tokens
        record.computed_tokens = computed

    def _begin(self, record: RequestStats, now: float) -> None:
        record.state = "decoding"
        record.first_token = now
        wait = now - record.exchange.began
        self.totals.ttft.add(wait)
        self.totals.prefill.add(wait - (record.queue_seconds or 0.0))
        self.first_tokens.append((time.time(), wait))

    def _end(self, record: RequestStats, finish: Finish, error: str | None) -> None:
        if finish == "cancelled" and not record.left and record.finish is not None:
            finish, error = record.finish, None  # Everything had been said.
        record.state = "finished"
        record.finish = finish
        record.error = error
        record.ended = time.monotonic()
        self.totals.finished[record.api, finish] += 1
        self.totals.seconds.add(record.seconds)
        del self.running[record.id]
        self.recent.append(record)
        for watch in self.watchers:
            watch(record)
