"""Random requests, cancellations and preemptions: every answer is the reference's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
from engines import (
    TINY,
    Run,
    assert_complete,
    assert_idle,
    assert_reference_tokens,
    load,
    refuse_memory,
    request,
    run,
    tiny_engine,
    tiny_model,
)
from hypothesis import Phase, event, given, settings
from mlx_lm.convert import convert

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.engine.core import Engine
from glmd.engine.scheduler import scheduler
from glmd.engine.sequence import SequenceStatus
from glmd.engine.spec_decode import controller
from glmd.ipc import EngineRequest
from glmd.model.loader import LoadedModel

CONTEXT, VOCABULARY = 192, 96
BASES = [np.random.default_rng(k).integers(3, VOCABULARY, 130).tolist() for k in range(3)]


def _model() -> LoadedModel:
    return tiny_model(
        vocab_size=VOCABULARY,
        eos_token_id=[1, 2],
        max_position_embeddings=CONTEXT,
        num_nextn_predict_layers=1,
    )


SAMPLING: list[dict[str, Any]] = [
    {},
    {},
    {"temperature": 1.0},
    # Noise matters as much as the logits: a third of the drafts is accepted.
    {"temperature": 5.0},
    {"temperature": 5.0},
    {"temperature": 8.0, "min_tokens": 12, "frequency_penalty": 0.5},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.2, "top_p": 0.9, "logprobs": 2},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"temperature": 2.0, "frequency_penalty": 0.5, "repetition_penalty": 0.9},
    {"temperature": 1.0, "logit_bias": {1: 6.0, 5: -3.0}, "min_tokens": 6},
    {"temperature": 5.0, "thinking_budget": 9, "thinking_close": (90, 91, 92)},
    {"thinking_budget": 0, "thinking_close": (93,), "repetition_penalty": 1.2},
    {"stop_token_ids": (7, 8, 9, 10, 11, 12), "min_tokens": 3},
]


SHORT_STAGES: dict[str, Any] = {
    "FIRST_TRIAL": 3,
    "HOLD_STEPS": 5,
    "NUM_SAMPLES": 2,
    "PROBE_DRAFTS": 3,
    "SCREEN_STEPS": 1,
    "SCREEN_ACCEPTED": 0,
    "SETTLE_STEPS": 2,
    "STAGE_LIMIT": 6,
}


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it arrives, and the step before which it is cancelled."""

    request: EngineRequest
    arrives: int
    cancelled: int | None
    cancelled_index: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    count = draw(st.integers(1, 7))
    found = []
    for number in range(count):
        prompt = BASES[draw(st.integers(0, 2))][: draw(st.integers(0, 130))]
        own = draw(st.integers(0, 20))
        prompt = [*prompt, *np.random.default_rng(own).integers(3, VOCABULARY, own).tolist()] or [5]
        fields: dict[str, Any] = dict(draw(st.sampled_from(SAMPLING)))
        fields["seed"] = draw(st.integers(0, 3))
        fields["n"] = draw(st.sampled_from([1, 1, 1, 2, 3]))
        fields["max_tokens"] = draw(st.sampled_from([1, 2, 5, 20, 40, 70]))
        fields["ignore_eos"] = draw(st.booleans())
        fields["priority"] = draw(st.sampled_from([0, 0, 0, 1, -1]))
        fields["cache_salt"] = draw(st.sampled_from(["", "", "", "x"]))
        fields["prompt_progress"] = draw(st.booleans())
        found.append(
            Arrival(
                request(str(number), prompt, **fields),
                draw(st.integers(0, 25)),
                draw(st.none() | st.none() | st.integers(0, 50)),
                draw(st.sampled_from([None, 0, 1])),
            )
        )
    return found


def _assert_consistent(engine: Engine, kv_tokens: int) -> None:
    """Invariants between steps."""
    waiting, running = engine.scheduler.waiting, engine.scheduler.running
    tree, tails = engine.scheduler.tree, engine.scheduler.tails
    assert len(running) <= engine.config.max_running
    assert tree.leases == {s.lease for s in running}
    assert all(s.lease is None and s.slot == -1 for s in waiting)
    assert all(s.status is SequenceStatus.RUNNING for s in running)
    assert all(s.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED) for s in waiting)
    assert tails.used == sum(s.slot != -1 for s in running)
    known = [s for sequences in engine._requests.values() for s in sequences]
    assert {id(s) for s in known} == {id(s) for s in [*running, *waiting]}
    for sequence in running:
        assert sequence.lease is not None
        prefix = [k for p in tree.path(sequence.lease) for k in p.node.keys[: p.length].tolist()]
        assert len(prefix) == sequence.num_cached_tokens
        assert prefix == sequence.cache_keys(0, sequence.num_cached_tokens).tolist()
    # Tails for further drafts behind a prompt's end exceed the budget until the next step.
    planned = tree.nbytes + (tails.nbytes if engine.config.mtp in {0, 1, "auto"} else 0)
    over = planned - kv_tokens * engine.info.kv_bytes_per_token
    assert over <= 0 or tree.evictable_tokens == 0
    # The excess is at most the pool's granularity.
    assert over <= 64 * engine.info.kv_bytes_per_token


def _serve(engine: Engine, coming: list[Arrival], kv_tokens: int) -> Run:
    running = Run(engine)
    left = sorted(coming, key=lambda arrival: arrival.arrives)
    for step in range(4000):
        while left and left[0].arrives <= step:
            running.submit(left.pop(0).request)
        for arrival in coming:
            if arrival.cancelled == step:
                engine.cancel(arrival.request.id, arrival.cancelled_index)
        if not left and not engine.has_work:
            return running
        running.step()
        _assert_consistent(engine, kv_tokens)
    raise AssertionError(f"work left: {engine.stats()}")


@settings(
    max_examples=10,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
)
@given(
    arrivals(),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([9, 48, 2048]),
    st.sampled_from([CONTEXT + 256, 600, 800, 5000]),
    st.sampled_from([0, 1, 2, 3, "auto"]),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([256, 4]),
    st.sets(st.integers(0, 60), max_size=2),
    st.booleans(),
)
def test_every_answer_is_the_references_and_nothing_is_left(
    coming: list[Arrival],
    max_running: int,
    max_step_tokens: int,
    kv_tokens: int,
    mtp: Any,
    prefix_cache: bool,
    reserve: int,
    refused: set[int],
    late: bool,
) -> None:
    """With a small reserve at admission, sequences are preempted. Up to two steps fail for lack of
    memory, and everything is computed again."""
    engine = tiny_engine(
        _model(),
        kv_tokens=kv_tokens,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        mtp=mtp,
        prefix_cache=prefix_cache,
    )
    refuse_memory(engine, refused, late=late)
    with (
        patch.object(scheduler, "ADMISSION_RESERVE", reserve),
        # The MTP layer's KV is deferred and caught up every few steps.
        patch.multiple(controller, **SHORT_STAGES),
    ):
        served = _serve(engine, coming, kv_tokens)
    assert_idle(engine)
    stats = engine.stats()
    event(f"preempted: {stats.preemptions > 0}")
    event(f"evicted: {stats.evicted_tokens > 0}")
    event(f"accepted: {stats.accepted > 0}")
    event(f"refused memory: {engine.stats().out_of_memory}")
    for arrival in coming:
        for index in range(arrival.request.n):
            if (arrival.request.id, index) not in served.answers:
                assert arrival.cancelled is not None
                assert arrival.cancelled < arrival.arrives
                continue
            answer = served.answer(arrival.request.id, index)
            assert_complete(_model(), arrival.request, answer, CONTEXT)
            assert_reference_tokens(_model(), arrival.request, answer, index)
            if not prefix_cache:
                assert answer.cached_tokens == 0
    if not prefix_cache:
        assert stats.kv_tokens == 0


@pytest.mark.parametrize("mtp", [0, 1])
def test_the_last_of_many_needs_no_more_memory_than_one(mtp: Any) -> None:
    """Its tail is in the highest slot; in the lower ones are those that have ended."""
    kv_tokens = CONTEXT + 256
    engine = tiny_engine(_model(), kv_tokens=kv_tokens, max_running=4, mtp=mtp)
    asked = [request(str(i), [5 + i], max_tokens=60, ignore_eos=True) for i in range(3)]
    asked.append(request("last", [9], max_tokens=180, ignore_eos=True))
    with patch.object(scheduler, "ADMISSION_RESERVE", 4):
        served = _serve(engine, [Arrival(one, 0, None, None) for one in asked], kv_tokens)
    assert_reference_tokens(_model(), asked[-1], served.answer("last"))
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize("mtp", [0, 2])
def test_answers_alone_and_among_sixteen_are_the_same(mtp: Any) -> None:
    """And equal to the reference's."""
    rng = np.random.default_rng(6)
    asked = []
    for number in range(16):
        fields = SAMPLING[number % len(SAMPLING)] | {"seed": number, "max_tokens": 12 + number}
        base = BASES[number % 3][: int(rng.integers(0, 130))]
        own = rng.integers(3, VOCABULARY, 1 + number).tolist()
        asked.append(request(str(number), [*base, *own], ignore_eos=number % 2 == 0, **fields))
    engine = tiny_engine(_model(), max_step_tokens=100, mtp=mtp)
    together = run(engine, *asked)
    for one in asked:
        answer = together.answer(one.id)
        assert_complete(_model(), one, answer, CONTEXT)
        assert_reference_tokens(_model(), one, answer)
    assert_idle(engine)
    for one in asked[:11]:
        alone = run(tiny_engine(_model(), mtp=mtp), one).answer(one.id)
        assert_reference_tokens(_model(), one, alone)


def test_answers_of_quantised_files_are_the_references(tmp_path: Path) -> None:
    config = TINY | {"qk_nope_head_dim": 64, "v_head_dim": 64}
    write_random_checkpoint(tmp_path / "a", **config)
    convert(str(tmp_path / "a"), str(tmp_path / "b"), quantize=True, q_group_size=64, q_bits=5)
    model = load(tmp_path / "b")
    asked = [request(str(i), BASES[0][: 30 * (i + 1)], max_tokens=20) for i in range(4)]
    together = run(tiny_engine(model, max_step_tokens=64), *asked)
    for one in asked:
        assert_reference_tokens(model, one, together.answer(one.id))
