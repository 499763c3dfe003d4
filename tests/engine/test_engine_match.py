"""Why no more of a prompt was cached: what a request is told when its turn comes."""

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
    """What a request with this prompt is told, once, before it has a token."""
    running = Run(engine)
    running.submit(request("asked", prompt, max_tokens=1, **fields))
    outputs = [output for _ in range(50) if engine.has_work for output in running.step()]
    told = [n for n, output in enumerate(outputs) if output.cache_match is not None]
    (place,) = told
    assert outputs[place].admitted
    assert not any(output.tokens for output in outputs[:place])
    match = outputs[place].cache_match
    assert match is not None
    return match


def test_a_prompt_is_told_where_it_parts_from_what_is_stored() -> None:
    engine = tiny_engine()
    assert match_of(engine, LONG) == CacheMatch(tokens=0, reason="new")
    assert match_of(engine, LONG) == CacheMatch(tokens=199, reason="whole")
    assert match_of(engine, [*LONG, 1, 2, 3]) == CacheMatch(tokens=200, reason="new")
    fork = [*LONG[:60], (LONG[60] + 1) % 500, 4, 5]
    assert match_of(engine, fork) == CacheMatch(tokens=60, reason="differs", diverging_tokens=140)
    # Where another conversation has gone on from the middle, too.
    third = [*LONG[:60], (LONG[60] + 2) % 500, 4, 5]
    match = match_of(engine, third)
    assert (match.tokens, match.reason) == (60, "differs")


def test_a_prompt_is_told_that_another_salt_has_it() -> None:
    engine = tiny_engine()
    match_of(engine, LONG, cache_salt="a")
    assert match_of(engine, LONG, cache_salt="b") == CacheMatch(tokens=0, reason="salt")
    assert match_of(engine, OTHER, cache_salt="c") == CacheMatch(tokens=0, reason="new")


def test_a_prompt_is_told_that_its_prefix_was_evicted() -> None:
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


def test_without_a_cache_a_prompt_is_told_so() -> None:
    engine = tiny_engine(prefix_cache=False)
    assert match_of(engine, LONG) == CacheMatch(tokens=0, reason="off")
    assert match_of(engine, LONG) == CacheMatch(tokens=0, reason="off")


def test_a_conversation_that_grows_is_never_told_that_it_differs() -> None:
    engine = tiny_engine()
    turns = [LONG[:end] for end in (40, 90, 91, 150)]
    assert all(len(a) < len(b) for a, b in pairwise(turns))
    reasons = [match_of(engine, turn).reason for turn in turns]
    assert reasons == ["new", "new", "whole", "new"]
