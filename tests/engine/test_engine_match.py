"""`cache_match`: how much of a prompt was cached at its admission, and why not more."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from engines import Run, request, run, tiny_engine, tiny_model

from glmd.engine.core import Engine
from glmd.ipc import CacheMatch

DRAW = np.random.default_rng(7)
LONG = DRAW.integers(0, 500, 200).tolist()
OTHER = DRAW.integers(0, 500, 200).tolist()


def match_of(engine: Engine, prompt: list[int], **fields: object) -> CacheMatch:
    """The match reported for a prompt, exactly once and before any token."""
    running = Run(engine)
    running.submit(request("asked", prompt, max_tokens=1, **fields))
    outputs = [output for _ in range(50) if engine.has_work for output in running.step()]
    reported = [n for n, output in enumerate(outputs) if output.cache_match is not None]
    (at,) = reported
    assert outputs[at].admitted
    assert not any(output.tokens for output in outputs[:at])
    match = outputs[at].cache_match
    assert match is not None
    return match


def test_differs_reports_the_place_of_the_fork() -> None:
    engine = tiny_engine()
    assert match_of(engine, LONG) == CacheMatch(tokens=0, reason="new")
    assert match_of(engine, LONG) == CacheMatch(tokens=199, reason="whole")
    assert match_of(engine, [*LONG, 1, 2, 3]) == CacheMatch(tokens=200, reason="new")
    fork = [*LONG[:60], (LONG[60] + 1) % 500, 4, 5]
    assert match_of(engine, fork) == CacheMatch(tokens=60, reason="differs", diverging_tokens=140)
    # At a place where two continuations are stored.
    third = [*LONG[:60], (LONG[60] + 2) % 500, 4, 5]
    match = match_of(engine, third)
    assert (match.tokens, match.reason) == (60, "differs")


def test_a_match_says_nothing_of_what_is_stored_under_another_salt() -> None:
    engine = tiny_engine()
    match_of(engine, LONG, cache_salt="a")
    for salt in ("b", ""):
        assert match_of(engine, LONG, cache_salt=salt) == CacheMatch(tokens=0, reason="new")


def test_evicted_reports_a_prefix_that_was_evicted() -> None:
    engine = tiny_engine(tiny_model(max_position_embeddings=256), kv_tokens=600)
    run(engine, request("first", [*LONG[:50], *OTHER[:100]], max_tokens=1))
    run(engine, request("kept", LONG, max_tokens=1))
    for n in range(6):
        filler = np.random.default_rng(n).integers(0, 500, 200).tolist()
        run(engine, request(f"{n}", filler, max_tokens=1))
        run(engine, request(f"again {n}", LONG[:60], max_tokens=1))
    assert engine.stats().evicted_tokens > 0
    match = match_of(engine, [*LONG[:50], *OTHER[:100]])
    assert match.reason == "evicted"
    assert match.tokens < 150


def test_off_is_reported_without_a_prefix_cache() -> None:
    engine = tiny_engine(prefix_cache=False)
    assert match_of(engine, LONG) == CacheMatch(tokens=0, reason="off")
    assert match_of(engine, LONG) == CacheMatch(tokens=0, reason="off")


def test_a_growing_conversation_never_differs() -> None:
    engine = tiny_engine()
    turns = [LONG[:end] for end in (40, 90, 91, 150)]
    assert all(len(a) < len(b) for a, b in pairwise(turns))
    reasons = [match_of(engine, turn).reason for turn in turns]
    assert reasons == ["new", "new", "whole", "new"]
