"""Random requests that come, go and crowd each other out: every answer is the reference's."""

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
    assert_at_rest,
    assert_true,
    assert_whole,
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
    # Noise counts for as much as the logits: a third of the MTP layer's drafts is taken.
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


@dataclass(frozen=True)
class Visit:
    """A request, the step before which it comes, and the one before which it is cancelled."""

    request: EngineRequest
    arrives: int
    cancelled: int | None
    cancelled_index: int | None


@st.composite
def visits(draw: st.DrawFn) -> list[Visit]:
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
            Visit(
                request(str(number), prompt, **fields),
                draw(st.integers(0, 25)),
                draw(st.none() | st.none() | st.integers(0, 50)),
                draw(st.sampled_from([None, 0, 1])),
            )
        )
    return found


def _assert_consistent(engine: Engine, kv_tokens: int) -> None:
    """What holds between any two steps."""
    waiting, running = engine._scheduler.waiting, engine._scheduler.running
    tree, tails = engine._tree, engine._tails
    assert len(running) <= engine._config.max_running
    assert tree.leases == {s.lease for s in running}
    assert all(s.lease is None and s.slot == -1 for s in waiting)
    assert tails.used == sum(s.slot != -1 for s in running)
    known = [s for sequences in engine._requests.values() for s in sequences]
    assert {id(s) for s in known} == {id(s) for s in [*running, *waiting]}
    for sequence in running:
        prefix = [k for p in tree.path(sequence.lease) for k in p.node.keys[: p.length].tolist()]
        assert len(prefix) == sequence.num_cached_tokens
        assert prefix == sequence.cache_keys(0, sequence.num_cached_tokens).tolist()
    # Tails for further drafts behind a prompt's end come unplanned; the next plan makes room.
    planned = tree.nbytes + (tails.nbytes if engine._config.mtp in {0, 1, "auto"} else 0)
    over = planned - kv_tokens * engine.info.kv_bytes_per_token
    assert over <= 0 or tree.evictable_tokens == 0
    # What cannot be evicted is over by no more than the pool's granularity.
    assert over <= 64 * engine.info.kv_bytes_per_token


def _serve(engine: Engine, coming: list[Visit], kv_tokens: int) -> Run:
    running = Run(engine)
    left = sorted(coming, key=lambda visit: visit.arrives)
    for step in range(4000):
        while left and left[0].arrives <= step:
            running.submit(left.pop(0).request)
        for visit in coming:
            if visit.cancelled == step:
                engine.cancel(visit.request.id, visit.cancelled_index)
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
    visits(),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([9, 48, 2048]),
    st.sampled_from([CONTEXT + 256, 600, 800, 5000]),
    st.sampled_from([0, 1, 2, 3, "auto"]),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([256, 4]),
    st.sets(st.integers(0, 60), max_size=2),
    st.booleans(),
)
def test_every_request_ends_with_the_references_tokens_and_leaves_nothing(
    coming: list[Visit],
    max_running: int,
    max_step_tokens: int,
    kv_tokens: int,
    mtp: Any,
    prefix_cache: bool,
    reserve: int,
    refused: set[int],
    late: bool,
) -> None:
    """With little reserve at admission, sequences crowd each other out. Twice the device may refuse
    memory, and everything is computed anew."""
    engine = tiny_engine(
        _model(),
        kv_tokens=kv_tokens,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        mtp=mtp,
        prefix_cache=prefix_cache,
    )
    refuse_memory(engine, refused, late=late)
    with patch.object(scheduler, "ADMISSION_RESERVE", reserve):
        served = _serve(engine, coming, kv_tokens)
    assert_at_rest(engine)
    stats = engine.stats()
    event(f"preempted: {stats.preemptions > 0}")
    event(f"evicted: {stats.evicted_tokens > 0}")
    event(f"accepted: {stats.accepted > 0}")
    event(f"refused memory: {engine._relief.failures}")
    for visit in coming:
        for index in range(visit.request.n):
            if (visit.request.id, index) not in served.answers:
                assert visit.cancelled is not None
                assert visit.cancelled < visit.arrives
                continue
            answer = served.answer(visit.request.id, index)
            assert_whole(_model(), visit.request, answer, CONTEXT)
            assert_true(_model(), visit.request, answer, index)
            if not prefix_cache:
                assert answer.cached_tokens == 0
    if not prefix_cache:
        assert stats.kv_tokens == 0


@pytest.mark.parametrize("mtp", [0, 2])
def test_answers_alone_and_among_sixteen_are_the_same(mtp: Any) -> None:
    """All of them are the reference's, which knows of no others."""
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
        assert_whole(_model(), one, answer, CONTEXT)
        assert_true(_model(), one, answer)
    assert_at_rest(engine)
    for one in asked[:11]:
        alone = run(tiny_engine(_model(), mtp=mtp), one).answer(one.id)
        assert_true(_model(), one, alone)


def test_quantised_files_are_served_true(tmp_path: Path) -> None:
    config = TINY | {"qk_nope_head_dim": 64, "v_head_dim": 64}
    write_random_checkpoint(tmp_path / "a", **config)
    convert(str(tmp_path / "a"), str(tmp_path / "b"), quantize=True, q_group_size=64, q_bits=5)
    model = load(tmp_path / "b")
    asked = [request(str(i), BASES[0][: 30 * (i + 1)], max_tokens=20) for i in range(4)]
    together = run(tiny_engine(model, max_step_tokens=64), *asked)
    for one in asked:
        assert_true(model, one, together.answer(one.id))
