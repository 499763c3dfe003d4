"""Run a workload on one backend of the engine benchmark and record what happens."""

from __future__ import annotations

import gc
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Protocol

import mlx.core as mx
import numpy as np

from glmd.bench.workloads import ENDLESS, Request, Workload, unique_tokens
from glmd.ipc import TokenArray


class NotMeasured(Exception):
    """A number that a run does not show, with the reason."""


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """Progress of one request in one step.

    Attributes:
        prefilled: prompt tokens in the KV cache so far. None: no prefill in this step.
        cached: prompt tokens read from the cache. None: not yet known, or reported before.
    """

    request: int
    tokens: tuple[int, ...] = ()
    prefilled: int | None = None
    cached: int | None = None
    ended: bool = False


class BackendSession(Protocol):
    """An engine with an empty KV cache."""

    def submit(self, request: int, prompt: TokenArray, max_tokens: int) -> None: ...
    def cancel(self, request: int) -> None: ...
    def step(self) -> list[RequestProgress]: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def computed(self) -> int:
        """Prompt tokens run through the model."""
        ...

    @property
    def idle_kv_bytes(self) -> int:
        """KV cache kept for later requests; read when no request runs."""
        ...

    @property
    def idle_kv_arrays(self) -> int:
        """Number of arrays in the idle KV cache."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """An engine with its weights loaded."""

    name: str

    def open(self) -> BackendSession: ...


@dataclass(slots=True)
class RequestTrace:
    """Events of one request. Times are seconds of one monotonic clock.

    Attributes:
        times: arrival of each output token.
        cached: prompt tokens read from the cache.
        prefilled: prompt tokens in the KV cache so far.
        ended: time of the end. None: running, or cancelled at the end of the workload.
    """

    request: Request
    arrived: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached: int = 0
    prefilled: int = 0
    ended: float | None = None

    @property
    def endless(self) -> bool:
        """Whether the request runs until the end of the workload."""
        return self.request.max_tokens == ENDLESS

    def reached(self, tokens: int | None) -> bool:
        """Return whether the request ended or has `tokens` tokens. None: whether it ended."""
        return self.ended is not None or (tokens is not None and len(self.tokens) >= tokens)


@dataclass(slots=True)
class RunTrace:
    """Events of one run of a workload.

    Attributes:
        waves: traces in the workload's order.
        window: tokens that each request of the last wave must have got while all of them decode,
            for a rate of decoding.
        kv_bytes: whole KV cache after the last step in which the entire last wave decoded.
        lengths: output tokens of each request at that step.
        computed: prompt tokens run through the model.
        idle_bytes: live arrays after the run, minus those before.
        idle_kv_bytes: part of `idle_bytes` kept as KV cache for later requests.
        idle_kv_arrays: number of arrays in that KV cache.
    """

    waves: list[list[RequestTrace]] = field(default_factory=list)
    window: int = 1
    kv_bytes: int = 0
    lengths: list[int] = field(default_factory=list)
    computed: int = 0
    idle_bytes: int = 0
    idle_kv_bytes: int = 0
    idle_kv_arrays: int = 0

    @property
    def requests(self) -> list[RequestTrace]:
        """Traces of all waves."""
        return [request for wave in self.waves for request in wave]

    def all_decoding(self) -> bool:
        """Return whether all requests of the last wave decode."""
        return all(request.times and request.ended is None for request in self.waves[-1])

    def least_kv_tokens(self) -> int:
        """Count tokens that the KV cache had to hold when `kv_bytes` was read.

        Each common prefix counts once; the last output token was not in the cache yet.

        Raises:
            NotMeasured: the last wave never decoded as a whole.
        """
        if not self.lengths:
            raise NotMeasured(f"{len(self.waves[-1])} requests never decoded at the same time")
        return unique_tokens(
            np.concatenate([r.request.prompt, np.array(r.tokens[: length - 1], np.int32)])
            for r, length in zip(self.requests, self.lengths, strict=True)
        )

    def _shared_decoding(self) -> tuple[float, list[int]]:
        """Return the time in which all of the last wave decode, and their tokens."""
        wave = self.waves[-1]
        start = max(request.times[0] for request in wave)
        end = max(start, min(request.times[-1] for request in wave))
        tokens = [bisect_right(r.times, end) - bisect_right(r.times, start) for r in wave]
        return end - start, tokens

    def window_full(self) -> bool:
        """Return whether each of the last wave got `window` tokens while all decode."""
        started = all(request.times for request in self.waves[-1])
        return started and min(self._shared_decoding()[1]) >= self.window

    def decode_rate(self) -> float:
        """Tokens per second of the last wave while all of its requests decode.

        Raises:
            NotMeasured: a request ended before each had `window` tokens.
        """
        wave = self.waves[-1]
        _require_tokens(wave)
        seconds, tokens = self._shared_decoding()
        if min(tokens) < self.window:
            raise NotMeasured(
                f"a request had {min(tokens)} of {self.window} tokens while all {len(wave)} decoded"
            )
        return sum(tokens) / seconds

    def overall_rate(self) -> float:
        """Tokens per second of all requests, from the first arrival to the last token.

        Raises:
            NotMeasured: a request has no token.
        """
        _require_tokens(self.requests)
        start = min(request.arrived for request in self.requests)
        end = max(request.times[-1] for request in self.requests)
        return sum(len(request.tokens) for request in self.requests) / (end - start)

    def first_token_seconds(self) -> float:
        """Seconds from the last wave's arrival to its first token.

        Raises:
            NotMeasured: a request has no token.
        """
        _require_tokens(self.waves[-1])
        return min(request.times[0] - request.arrived for request in self.waves[-1])

    def _steps_before(self) -> list[float]:
        """Seconds between tokens of the first wave, before the last wave arrives.

        Raises:
            NotMeasured: there are none.
        """
        _require_tokens(self.waves[0])
        arrival = self.waves[-1][0].arrived
        started = max(request.times[0] for request in self.waves[0])
        steps = [
            after - before
            for request in self.waves[0]
            for before, after in pairwise(request.times)
            if started <= before and after <= arrival
        ]
        if not steps:
            raise NotMeasured("no two tokens of a stream between its start and the next arrival")
        return steps

    def median_step(self) -> float:
        """Median seconds between tokens of the first wave, before the last wave arrives."""
        return median(self._steps_before())

    def longest_step(self) -> float:
        """Longest such time: the machine's own noise."""
        return max(self._steps_before())

    def longest_gap(self) -> float:
        """Longest gap of a first-wave stream until the last wave's first token.

        Raises:
            NotMeasured: a stream ended before that token, or there is no such token.
        """
        _require_tokens([*self.waves[0], self.waves[-1][0]])
        arrival, answered = self.waves[-1][0].arrived, self.waves[-1][0].times[0]
        if any(r.ended is not None and r.ended < answered for r in self.waves[0]):
            raise NotMeasured("a stream ended before the first token of the last prompt")
        return max(
            after - before
            for request in self.waves[0]
            for before, after in pairwise([t for t in request.times if t < answered] + [answered])
            if after > arrival
        )

    def cached_share(self) -> float:
        """Cached share of the last request's prompt.

        Raises:
            NotMeasured: a request that was to be cancelled in its prefill was computed completely.
        """
        for r in self.requests:
            # mlx-lm computes a prompt's last token with the output
            whole = r.prefilled >= len(r.request.prompt) - 1
            if r.request.cancel_at is not None and (r.tokens or whole):
                raise NotMeasured("the prompt was computed before it could be cancelled")
        request = self.waves[-1][-1]
        return request.cached / len(request.request.prompt)


def _require_tokens(requests: Sequence[RequestTrace]) -> None:
    without = sum(not request.times for request in requests)
    if without:
        raise NotMeasured(f"{without} of {len(requests)} requests got no token")


def run(backend: Backend, workload: Workload) -> RunTrace:
    """Run a workload in a new session of `backend`."""
    bytes_before = _live_bytes()
    session = backend.open()
    trace = RunTrace(window=workload.window or 1)
    try:
        _drive(session, workload, trace)
        trace.computed = session.computed
        trace.idle_bytes = _live_bytes() - bytes_before
        trace.idle_kv_bytes = session.idle_kv_bytes
        trace.idle_kv_arrays = session.idle_kv_arrays
    finally:
        session.close()
    return trace


def _drive(session: BackendSession, workload: Workload, trace: RunTrace) -> None:
    pending = list(workload.waves)
    requests: list[RequestTrace] = []
    while True:
        if pending and all(r.reached(pending[0].after) for r in requests):
            trace.waves.append([])
            for request in pending.pop(0).requests:
                sent = RequestTrace(request, time.perf_counter())
                session.submit(len(requests), request.prompt, request.max_tokens)
                requests.append(sent)
                trace.waves[-1].append(sent)
        if not pending and _over(workload, trace):
            break
        _record(session, requests, session.step())
        if not pending and trace.all_decoding():
            trace.kv_bytes = session.kv_bytes
            trace.lengths = [len(r.tokens) for r in requests]
    for number, r in enumerate(requests):
        if r.ended is None:
            session.cancel(number)
    while session.step():
        pass  # drain the step in flight and the cancelled requests


def _over(workload: Workload, trace: RunTrace) -> bool:
    if workload.window is not None:
        return trace.window_full() or any(r.ended is not None for r in trace.waves[-1])
    return all(r.ended is not None or r.endless for r in trace.requests)


def _record(
    session: BackendSession, requests: list[RequestTrace], step: list[RequestProgress]
) -> None:
    now = time.perf_counter()
    for progress in step:
        request = requests[progress.request]
        request.tokens.extend(progress.tokens)
        request.times.extend([now] * len(progress.tokens))
        request.prefilled = progress.prefilled or request.prefilled
        if progress.cached is not None:
            request.cached = progress.cached
        if progress.ended:
            request.ended = now
        cancel_at = request.request.cancel_at
        if (
            cancel_at is not None
            and request.ended is None
            and (request.tokens or request.prefilled >= cancel_at * len(request.request.prompt))
        ):
            session.cancel(progress.request)
            request.ended = now


def _live_bytes() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def same_answers(a: RunTrace, b: RunTrace) -> float:
    """Share of requests with equal tokens in both runs, up to the shorter output."""
    pairs = list(zip(a.requests, b.requests, strict=True))
    same = sum(
        bool(np.array_equal(x.tokens[:n], y.tokens[:n]))
        for x, y in pairs
        for n in [min(len(x.tokens), len(y.tokens))]
    )
    return same / len(pairs)
