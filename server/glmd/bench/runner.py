"""The two sides of the engine benchmark, behind one small interface, and the run of a workload."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from glmd.bench.trace import Life, Trace
from glmd.bench.workloads import Request, Workload
from glmd.ipc import TokenArray


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step gave one request.

    Attributes:
        prefilled: prompt tokens in the KV by now, if prefill is what it is about.
        cached: prompt tokens that needed no computing, once that is known.
    """

    request: int
    tokens: tuple[int, ...] = ()
    prefilled: int | None = None
    cached: int | None = None
    ended: bool = False


class Session(Protocol):
    """One side with an empty KV store."""

    def submit(self, request: int, prompt: TokenArray, max_tokens: int) -> None: ...
    def cancel(self, request: int) -> None: ...
    def step(self) -> list[Progress]: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def computed(self) -> int:
        """Prompt tokens run through the model."""
        ...

    @property
    def resting_kv_bytes(self) -> int:
        """KV that is kept for requests to come; asked when nothing runs."""
        ...

    @property
    def resting_arrays(self) -> int:
        """Arrays that this KV consists of."""
        ...

    def close(self) -> None: ...


class Side(Protocol):
    """One of the two, with its weights loaded."""

    name: str

    def open(self) -> Session: ...


def run(side: Side, workload: Workload) -> Trace:
    """Run a workload on a fresh session of `side`."""
    at_rest = _alive()
    session = side.open()
    trace = Trace()
    try:
        _drive(session, workload, trace)
        trace.computed = session.computed
        trace.resting_bytes = _alive() - at_rest
        trace.resting_kv_bytes = session.resting_kv_bytes
        trace.resting_arrays = session.resting_arrays
    finally:
        session.close()
    return trace


def _drive(session: Session, workload: Workload, trace: Trace) -> None:
    waiting = list(workload.waves)
    lives: list[Life] = []
    while True:
        if waiting and all(life.has_given(waiting[0].after) for life in lives):
            wave = waiting.pop(0)
            trace.waves.append([_submit(session, lives, request) for request in wave.requests])
        if not waiting and all(life.ended is not None or life.endless for life in lives):
            break
        _book(session, lives, session.step())
        if not waiting and trace.all_decoding():
            trace.kv_bytes = session.kv_bytes
            trace.given_then = [len(life.tokens) for life in lives]
    for number, life in enumerate(lives):
        if life.ended is None:
            session.cancel(number)
    while session.step():
        pass  # The cancelled ones leave, and a step that was under way is read.


def _submit(session: Session, lives: list[Life], request: Request) -> Life:
    life = Life(request, time.perf_counter())
    session.submit(len(lives), request.prompt, request.max_tokens)
    lives.append(life)
    return life


def _book(session: Session, lives: list[Life], step: list[Progress]) -> None:
    now = time.perf_counter()
    for progress in step:
        life = lives[progress.request]
        life.tokens.extend(progress.tokens)
        life.times.extend([now] * len(progress.tokens))
        life.prefilled = progress.prefilled or life.prefilled
        if progress.cached is not None:
            life.cached = progress.cached
        if progress.ended:
            life.ended = now
        share = life.request.cancel_at
        if (
            share is not None
            and life.ended is None
            and (life.tokens or life.prefilled >= share * len(life.request.prompt))
        ):
            session.cancel(progress.request)
            life.ended = now


def _alive() -> int:
    """Bytes of the arrays that are alive."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def same_answers(a: Trace, b: Trace) -> float:
    """The share of requests to which both sides gave the same tokens, as far as both went."""
    pairs = list(zip(a.lives, b.lives, strict=True))
    same = sum(
        bool(np.array_equal(x.tokens[:n], y.tokens[:n]))
        for x, y in pairs
        for n in [min(len(x.tokens), len(y.tokens))]
    )
    return same / len(pairs)
