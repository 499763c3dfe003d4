"""Short memory: evict, preempt, wait; never fail, never leak."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    Run,
    assert_complete,
    assert_idle,
    assert_reference_tokens,
    request,
    run,
    tiny_engine,
    tiny_model,
)

from glmd.engine.core import Engine
from glmd.engine.scheduler import scheduler
from glmd.kv_cache.segment import Segment
from glmd.model.loader import LoadedModel

CONTEXT = 400
PROMPTS = [np.random.default_rng(i).integers(0, 500, 100).tolist() for i in range(8)]


def _model(**config: Any) -> LoadedModel:
    return tiny_model(max_position_embeddings=CONTEXT, **config)


def _small(model: LoadedModel | None = None, **config: Any) -> Engine:
    """Room for one sequence of full length."""
    return tiny_engine(model or _model(), kv_tokens=CONTEXT + 256, **config)


def test_sequences_that_outgrow_the_memory_are_preempted_and_resume_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "ADMISSION_RESERVE", 8)
    engine = _small()
    sampling: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.5, "frequency_penalty": 0.3, "seed": 4},
        {"repetition_penalty": 1.2},
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 1},
    ]
    asked = [
        request(f"{i}", PROMPTS[i], max_tokens=100, ignore_eos=True, **fields)
        for i, fields in enumerate(sampling)
    ]
    running = run(engine, *asked)
    assert engine.stats().preemptions > 0
    for one in asked:
        answer = running.answer(one.id)
        assert_complete(_model(), one, answer, CONTEXT)
        if one.sampling.seed is not None or one.sampling.temperature == 0:
            assert_reference_tokens(_model(), one, answer)
    assert_idle(engine)


def test_drafting_sequences_are_preempted_and_resume_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "ADMISSION_RESERVE", 8)
    model = _model(num_nextn_predict_layers=1)
    engine = _small(model, mtp=3)
    # Noise matters as much as the logits: a part of the drafts is accepted.
    asked = [
        request(f"{i}", PROMPTS[i], max_tokens=120, ignore_eos=True, temperature=8.0, seed=i)
        for i in range(5)
    ]
    running = run(engine, *asked)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.accepted > 0.2 * stats.drafted
    for one in asked:
        assert_reference_tokens(model, one, running.answer(one.id))
    assert_idle(engine)


def test_the_oldest_sequence_is_never_preempted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "ADMISSION_RESERVE", 8)
    engine = _small()
    asked = [request(f"{i}", PROMPTS[i], max_tokens=120, ignore_eos=True) for i in range(4)]
    running = run(engine, *asked)
    assert engine.stats().preemptions > 0
    steps = running.answer("0").steps
    assert steps == list(range(steps[0], steps[0] + 120))


def test_prompts_that_fill_the_memory_together_are_all_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Admitted regardless of each other, they fill the memory, and none can finish."""
    monkeypatch.setattr(scheduler.Scheduler, "_reserved_bytes", lambda self: 0)
    # Prompts fill every step: its duration has no influence.
    engine = _small(max_step_tokens=64, min_stream_rate=1e-9, max_gap=1e9)
    prompts = [np.random.default_rng(i).integers(0, 500, 350).tolist() for i in range(4)]
    asked = [request(f"{i}", prompts[i], max_tokens=10, ignore_eos=True) for i in range(4)]
    running = run(engine, *asked)
    assert engine.stats().preemptions > 0
    for one in asked:
        assert_reference_tokens(_model(), one, running.answer(one.id))
    assert_idle(engine)


def test_requests_that_do_not_fit_wait_and_none_is_preempted() -> None:
    engine = _small()
    prompts = [np.random.default_rng(i).integers(0, 500, 270).tolist() for i in range(5)]
    running = Run(engine)
    running.submit(*(request(f"{i}", prompts[i], max_tokens=5) for i in range(5)))
    while engine.has_work:
        running.step()
        assert engine.stats().running <= 2
    assert engine.stats().preemptions == 0
    assert engine.stats().evicted_tokens > 0


def test_kept_prefixes_stay_within_the_budget_and_the_latest_survives() -> None:
    engine = _small()
    for i in range(16):
        asked = request(f"{i}", PROMPTS[i % 8][: 60 + i], max_tokens=10, ignore_eos=True)
        run(engine, asked)
        stats = engine.stats()
        assert stats.kv_bytes <= (CONTEXT + 256) * engine.info.kv_bytes_per_token
    answer = run(engine, request("last", PROMPTS[15 % 8][:75], max_tokens=1)).answer("last")
    assert answer.cached_tokens == 74
    assert engine.stats().evicted_tokens > 0
    assert_idle(engine)


def test_the_longest_request_is_served_beside_cached_prefixes() -> None:
    engine = _small()
    run(engine, *(request(f"{i}", PROMPTS[i], max_tokens=20) for i in range(8)))
    asked = request("long", PROMPTS[0] + PROMPTS[3] + PROMPTS[5], ignore_eos=True)
    answer = run(engine, asked).answer("long")
    assert (answer.finish, len(answer.tokens)) == ("length", CONTEXT - 300)
    assert_reference_tokens(_model(), asked, answer)


@pytest.mark.parametrize(
    "fields",
    [{"presence_penalty": 0.5}, {"temperature": 0.5, "logprobs": 5, "repetition_penalty": 1.1}],
    ids=str,
)
def test_memory_of_a_running_request_grows_by_its_kv_alone(fields: dict[str, Any]) -> None:
    running = Run(tiny_engine())
    running.submit(request("a", PROMPTS[0], max_tokens=800, ignore_eos=True, **fields))
    overhead = []
    for step in range(230):
        running.step()
        if step in (30, 220):
            gc.collect()
            mx.synchronize()
            overhead.append(mx.get_active_memory() - running.engine.stats().kv_bytes)
    running.engine.close()
    # 190 tokens later; an array of the vocabulary's size per token would be 390 KB.
    assert overhead[1] - overhead[0] < 100_000


def test_memory_at_rest_is_weights_and_tree() -> None:
    model = tiny_model()
    engine = tiny_engine(model, max_running=8, max_step_tokens=100)
    rng = np.random.default_rng(0)

    def load(first: int) -> None:
        running = Run(engine)
        for i in range(first, first + 60):
            prompt = [*PROMPTS[i % 8][: int(rng.integers(1, 100))], i]
            running.submit(request(f"{i}", prompt, max_tokens=6, temperature=1.0, n=1 + i % 2))
            running.step()
            if i % 7 == 0:
                engine.cancel(f"{i}")
        running.finish()
        assert_idle(engine)
        assert engine.stats().kv_tokens > 1000

    def active() -> int:
        gc.collect()
        mx.synchronize()
        return mx.get_active_memory()

    load(0)
    before = active()
    kept = engine.stats().kv_bytes
    assert engine.scheduler.tree.clear() == kept
    # Buffers that the allocator reuses may be somewhat larger than what is put into them.
    assert kept <= before - active() <= 1.3 * kept
    assert engine.stats().kv_bytes == 0
    emptied = active()
    load(100)
    engine.scheduler.tree.clear()
    assert abs(active() - emptied) < 4096


def test_segments_of_the_last_step_are_freed_with_the_tree() -> None:
    engine = tiny_engine(_model())
    run(engine, *(request(f"{i}", PROMPTS[i], max_tokens=40, ignore_eos=True) for i in range(3)))
    seen = {id(node.kv) for node in engine.scheduler.tree.nodes()}
    assert seen
    engine.scheduler.tree.clear()
    alive = {id(found) for found in gc.get_objects() if type(found) is Segment}
    assert not seen & alive
