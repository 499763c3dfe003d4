"""Statistics of HTTP requests and of their requests to the engine.

Read by the status, the metrics, the access log and tracing. Updated for each output of the engine,
so an update is a few additions.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from fastapi import Request
from prometheus_client import Histogram, disable_created_metrics
from starlette.datastructures import Headers
from starlette.types import Scope

from glmd.chat.types import FinishReason
from glmd.errors import Cancelled, GlmdError
from glmd.ipc import CacheMatch, EngineRequest, SamplingParams, SequenceOutput, count_tokens

Api = Literal["chat", "completions", "responses", "messages"]
RequestState = Literal["queued", "prefill", "decoding", "finished"]
Finish = FinishReason | Literal["cancelled", "error"]

TRACE_HEADERS = ("traceparent", "tracestate")
"""https://www.w3.org/TR/trace-context/"""

HISTORY = 100
"""Number of finished requests to keep."""

WINDOW_SECONDS = 300

WAIT_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800,
)  # fmt: skip
"""Seconds, for waits and for whole requests."""

GAP_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15,
    0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
"""Seconds, for the time between two tokens."""

# Otherwise every histogram has an additional series.
disable_created_metrics()


@dataclass(slots=True)
class HttpExchange:
    """One HTTP request and its response.

    Moments are in seconds of `time.monotonic()`.

    Attributes:
        id: the client's `x-request-id`, or a random id.
        client: the client's address.
        started: when the headers had arrived.
        started_at: `started` as Unix time.
        trace: the client's trace headers (`TRACE_HEADERS`).
        key: name of the API key; None: no key.
        owner: whose request it is (`Access.owner`).
        api: API of a request that generates; None: other requests.
        model: model name in the request.
        stream: the request asks for a stream.
        background: the response does not wait for the generation.
        is_retry: the answer is that of an earlier request (`glmd.api.retries`).
        route: path template of the route, set at the end; None: no route.
        status: HTTP status, once the response has started.
        ended: when the response was complete, or the client had disconnected.
        stats: the requests to the engine.
    """

    id: str
    method: str
    path: str
    client: str
    started: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    trace: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    owner: str = ""
    api: Api | None = None
    model: str | None = None
    stream: bool = False
    background: bool = False
    is_retry: bool = False
    route: str | None = None
    status: int | None = None
    ended: float | None = None
    stats: list[RequestStats] = field(default_factory=list)

    @classmethod
    def of(cls, scope: Scope, id: str) -> HttpExchange:
        """The exchange of a new ASGI request."""
        client, headers = scope.get("client"), Headers(scope=scope)
        return cls(
            id,
            scope["method"],
            scope["path"],
            client[0] if client else "",
            trace={name: headers[name] for name in TRACE_HEADERS if name in headers},
        )

    def end(self) -> None:
        """Set the end, and status 499 (nginx's code) if the client left before a response."""
        self.ended = time.monotonic()
        self.status = self.status or 499

    def set_request(
        self, api: Api, model: str | None, *, stream: bool | None, background: bool | None = False
    ) -> None:
        """Set the properties of a request that generates."""
        self.api = api
        self.model = model
        self.stream = bool(stream)
        self.background = bool(background)


def get_exchange(request: Request) -> HttpExchange:
    """FastAPI dependency: the request's exchange."""
    exchange: HttpExchange = request.state.exchange
    return exchange


@dataclass(eq=False, slots=True)
class RequestStats:
    """Statistics of one request to the engine.

    Moments are in seconds of `time.monotonic()`, durations in seconds.

    Attributes:
        id: id of the response (`chatcmpl-…`) and of the engine request.
        sequences: number of answers (`n`).
        sent: the request was sent to the engine.
        computed_tokens: prompt tokens in KV, cached tokens included.
        cached_tokens: prompt tokens found in the cache.
        generated_tokens: over all sequences.
        drafted: verified MTP drafts.
        accepted: accepted MTP drafts.
        reported_usage: the engine has reported `cached_tokens`.
        match: cached prefix at admission, and why no more was cached; None: not admitted.
        queue_seconds: from arrival until the first sequence was admitted; None: not admitted.
        first_token: when the first token arrived; None: no token.
        last_tokens: by sequence, when the last tokens arrived.
        longest_gap: longest time between two outputs with tokens.
        sequence_finish: finish reason of the sequence that finished last; None: all are running.
        ended: when the request ended.
        finish: how the request ended; None: the request is running.
        error: why the request failed or was cancelled.
        running_sequences: sequences that have not finished.
    """

    id: str
    exchange: HttpExchange
    sequences: int
    prompt_tokens: int
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sent: bool = False
    state: RequestState = "queued"
    computed_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    reported_usage: bool = False
    match: CacheMatch | None = None
    queue_seconds: float | None = None
    first_token: float | None = None
    last_tokens: list[float | None] = field(init=False)
    longest_gap: float = 0.0
    sequence_finish: FinishReason | None = None
    ended: float | None = None
    finish: Finish | None = None
    error: str | None = None
    running_sequences: int = field(init=False)

    def __post_init__(self) -> None:
        self.running_sequences = self.sequences
        self.last_tokens = [None] * self.sequences

    @property
    def api(self) -> Api:
        assert self.exchange.api is not None
        return self.exchange.api

    @property
    def seconds(self) -> float:
        """Seconds from arrival to the end, or to now."""
        return (time.monotonic() if self.ended is None else self.ended) - self.exchange.started

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.exchange.started

    @property
    def mean_gap(self) -> float | None:
        """Mean seconds between two tokens of a sequence."""
        moments = [moment for moment in self.last_tokens if moment is not None]
        gaps = self.generated_tokens - len(moments)
        if self.first_token is None or gaps <= 0:
            return None
        return sum(moment - self.first_token for moment in moments) / gaps


def _histogram(name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"glmd_{name}_seconds", description, buckets=buckets, registry=None)


class AggregateStats:
    """Totals of all requests since the start.

    Attributes:
        finished: number of requests by API and finish.
        gaps: seconds between tokens; tokens that arrive together share the time evenly.
        histograms: in the order of the metrics.
    """

    def __init__(self) -> None:
        self.finished: Counter[tuple[Api, Finish]] = Counter()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.ttft = _histogram(
            "time_to_first_token", "Time from arrival to the first token.", WAIT_BUCKETS
        )
        self.gaps = _histogram(
            "inter_token_latency", "Time between two tokens of an answer.", GAP_BUCKETS
        )
        self.queue = _histogram(
            "request_queue_time", "Time from arrival to admission.", WAIT_BUCKETS
        )
        self.prefill = _histogram(
            "request_prefill_time", "Time from admission to the first token.", WAIT_BUCKETS
        )
        self.seconds = _histogram(
            "e2e_request_latency", "Time from arrival to the end.", WAIT_BUCKETS
        )
        self.histograms = (self.ttft, self.gaps, self.queue, self.prefill, self.seconds)


@dataclass(slots=True)
class SecondCount:
    """Tokens of one second.

    Attributes:
        number: the second, in Unix time.
        generated: tokens from the engine.
        computed: prompt tokens computed, not cached.
    """

    number: int
    generated: int = 0
    computed: int = 0


class RequestRegistry:
    """Statistics of running and recent requests to the engine, and totals.

    Attributes:
        running: by id, in order of arrival.
        recent: finished requests, latest last.
        first_tokens: Unix time and seconds since arrival of recent first tokens, latest last.
        on_start: called with the statistics of each request that has been added to `running`.
        on_end: called with the statistics of each request that has ended.
    """

    def __init__(self) -> None:
        self.running: dict[str, RequestStats] = {}
        self.recent: deque[RequestStats] = deque(maxlen=HISTORY)
        self.totals = AggregateStats()
        self.first_tokens: deque[tuple[float, float]] = deque(maxlen=HISTORY)
        self.on_start: list[Callable[[RequestStats], None]] = []
        self.on_end: list[Callable[[RequestStats], None]] = []
        self._window: deque[SecondCount] = deque(maxlen=WINDOW_SECONDS)
        """Seconds with tokens, latest last."""

    def record(self, exchange: HttpExchange, request: EngineRequest) -> RequestStats:
        """Add the statistics of a request that has not been sent to `exchange`."""
        stats = RequestStats(
            request.id,
            exchange,
            request.n,
            count_tokens(request.prompt),
            max_tokens=request.max_tokens,
            sampling=request.sampling,
        )
        exchange.stats.append(stats)
        return stats

    def find(self, id: str) -> list[RequestStats]:
        """Return the running requests whose own id or x-request-id is `id`."""
        return [stats for stats in self.running.values() if id in (stats.id, stats.exchange.id)]

    @contextmanager
    def in_flight(self, stats: RequestStats) -> Iterator[None]:
        """Count the request as running in the block; the block's exception is its outcome."""
        stats.sent = True
        self.running[stats.id] = stats
        for notify in self.on_start:
            notify(stats)
        try:
            yield
        except (GeneratorExit, asyncio.CancelledError):
            self._end(stats, "cancelled", "The client disconnected.")
            raise
        except Cancelled as error:
            self._end(stats, "cancelled", error.message)
            raise
        except Exception as error:
            message = error.message if isinstance(error, GlmdError) else type(error).__name__
            self._end(stats, "error", message)
            raise
        else:
            self._end(stats, stats.sequence_finish or "stop", None)

    def observe(self, stats: RequestStats, output: SequenceOutput) -> None:
        """Update statistics with an output of the engine."""
        if output.admitted and stats.queue_seconds is None:
            stats.match = output.cache_match
            if output.cache_match is not None:
                stats.computed_tokens = output.cache_match.tokens
            stats.queue_seconds = time.monotonic() - stats.exchange.started
            stats.state = "prefill"
            self.totals.queue.observe(stats.queue_seconds)
        if output.computed_tokens > stats.computed_tokens:
            self._count_computed(stats, output.computed_tokens)
        if output.prompt_tokens and not stats.reported_usage:
            stats.reported_usage = True
            stats.cached_tokens = output.cached_tokens
            # A last prompt token that is computed alone is not reported as progress.
            self._count_computed(stats, stats.prompt_tokens)
            self.totals.prompt_tokens += stats.prompt_tokens
            self.totals.cached_tokens += output.cached_tokens
        stats.drafted += output.drafted
        stats.accepted += output.accepted
        if output.tokens:
            self._count_generated(stats, output.index, len(output.tokens))

    def finished(self, stats: RequestStats, reason: FinishReason) -> None:
        """Note that one of the request's sequences has finished."""
        stats.sequence_finish = reason
        stats.running_sequences -= 1

    def last_seconds(self, count: int) -> list[SecondCount]:
        """Return the last `count` complete seconds, oldest first."""
        end = int(time.time())
        counts = {second.number: second for second in self._window}
        return [counts.get(number) or SecondCount(number) for number in range(end - count, end)]

    def current_second(self) -> SecondCount:
        number = int(time.time())
        if not self._window or self._window[-1].number != number:  # smaller: the clock was set back
            self._window.append(SecondCount(number))
        return self._window[-1]

    def _count_computed(self, stats: RequestStats, computed: int) -> None:
        self.current_second().computed += computed - stats.computed_tokens
        stats.computed_tokens = computed

    def _count_generated(self, stats: RequestStats, index: int, count: int) -> None:
        now = time.monotonic()
        stats.generated_tokens += count
        self.totals.generated_tokens += count
        self.current_second().generated += count
        if stats.first_token is None:
            stats.state = "decoding"
            stats.first_token = now
            ttft = now - stats.exchange.started
            self.totals.ttft.observe(ttft)
            self.totals.prefill.observe(ttft - (stats.queue_seconds or 0.0))
            self.first_tokens.append((time.time(), ttft))
        last = stats.last_tokens[index]
        if last is not None:
            gap = now - last
            stats.longest_gap = max(stats.longest_gap, gap)
            for _ in range(count):
                self.totals.gaps.observe(gap / count)
        stats.last_tokens[index] = now

    def _end(self, stats: RequestStats, finish: Finish, error: str | None) -> None:
        if finish == "cancelled" and not stats.running_sequences and stats.sequence_finish:
            finish, error = stats.sequence_finish, None  # The answer was complete.
        stats.state = "finished"
        stats.finish = finish
        stats.error = error
        stats.ended = time.monotonic()
        self.totals.finished[stats.api, finish] += 1
        self.totals.seconds.observe(stats.seconds)
        del self.running[stats.id]
        self.recent.append(stats)
        for notify in self.on_end:
            notify(stats)
