"""Prefix sharing: no request computes again what another has computed."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from engines import Run, assert_idle, assert_reference_tokens, request, run, tiny_engine, tiny_model
from hypothesis import given, settings

LONG = np.random.default_rng(0).integers(0, 500, 300).tolist()


def _keys(tokens: list[int], mtp: int) -> list[object]:
    """Keys of computed tokens: with an MTP layer, pairs with the next token."""
    return [*itertools.pairwise(tokens)] if mtp else [*tokens[:-1]]


def _shared(a: list[object], b: list[object]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**31),
            st.integers(0, 60),
            st.integers(1, 50),
            st.integers(1, 12),
            st.sampled_from(["", "", "", "x"]),
        ),
        min_size=2,
        max_size=6,
    ),
    st.sampled_from([7, 64, 2048]),
    st.sampled_from([0, 1]),
)
def test_sequential_requests_compute_exactly_the_tokens_not_computed_before(
    requests: list[tuple[int, int, int, int, str]], max_step_tokens: int, mtp: int
) -> None:
    """Compared with a list of everything computed so far."""
    model = tiny_model(num_nextn_predict_layers=mtp)
    engine = tiny_engine(model, max_step_tokens=max_step_tokens)
    done: list[tuple[str, list[int]]] = [("-", [])]
    computed = 0
    for number, (which, kept, more, max_tokens, salt) in enumerate(requests):
        before = done[which % len(done)][1]
        prompt = before[:kept] + np.random.default_rng(which).integers(0, 4, more).tolist()
        known = [_keys(other, mtp) for its, other in done if its in (salt, "-")]
        cached = max(_shared(_keys(prompt, mtp), keys) for keys in known)
        asked = request(
            str(number), prompt, max_tokens=max_tokens, ignore_eos=True, cache_salt=salt
        )
        answer = run(engine, asked).answer(asked.id)
        assert_reference_tokens(model, asked, answer)
        assert answer.cached_tokens == cached
        computed += len(prompt) - cached
        assert engine.stats().prompt_tokens_computed == computed
        # The last token was sampled, but no step ran on it.
        done.append((salt, prompt + answer.tokens))
        stored = [(its, _keys(tokens, mtp)) for its, tokens in done]
        unique = {(s, tuple(keys[:end])) for s, keys in stored for end in range(1, len(keys) + 1)}
        assert engine.stats().kv_tokens == len(unique)
    assert_idle(engine)


def test_eight_requests_with_one_prompt_compute_it_once() -> None:
    engine = tiny_engine(max_step_tokens=64)
    asked = [request(f"{i}", LONG, max_tokens=4, ignore_eos=True, n=1) for i in range(8)]
    running = run(engine, *asked)
    cached = sorted(answer.cached_tokens for answer in running.answers.values())
    assert cached == [0] + [len(LONG) - 1] * 7
    assert engine.stats().prompt_tokens_computed == len(LONG) + 7
    assert engine.stats().prompt_tokens_cached == 7 * (len(LONG) - 1)
    for one in asked:
        assert_reference_tokens(tiny_model(), one, running.answer(one.id))


@pytest.mark.parametrize("mtp", [0, 1])
def test_requests_with_different_ends_compute_the_common_prefix_once(mtp: int) -> None:
    """With an MTP layer except for its last token, whose KV depends on the next one."""
    model = tiny_model(num_nextn_predict_layers=mtp)
    engine = tiny_engine(model, max_step_tokens=64)
    asked = [request(f"{i}", [*LONG[:250], 500 + i, 5, 5], max_tokens=3) for i in range(8)]
    running = run(engine, *asked)
    computed = 250 - mtp + 8 * (3 + mtp)
    assert engine.stats().prompt_tokens_computed == computed
    assert sum(a.prompt_tokens - a.cached_tokens for a in running.answers.values()) == computed
    assert_idle(engine)


@pytest.mark.parametrize("n", [2, 5])
def test_continuations_share_the_prompt(n: int) -> None:
    engine = tiny_engine()
    asked = request("a", LONG, n=n, max_tokens=3, temperature=1.0, seed=3, ignore_eos=True)
    running = run(engine, asked)
    assert engine.stats().prompt_tokens_computed == len(LONG) + n - 1
    for index in range(n):
        assert_reference_tokens(tiny_model(), asked, running.answer("a", index), index)


def test_chunks_of_a_cancelled_prefill_stay_cached() -> None:
    running = Run(tiny_engine(max_step_tokens=20))
    running.submit(request("a", LONG, max_tokens=4, prompt_progress=True))
    while not running.answers or running.answer("a").progress[-1] < 0.8 * len(LONG):
        running.step()
    running.engine.cancel("a")
    running.submit(request("b", LONG, max_tokens=4))
    running.finish()
    assert running.answer("b").cached_tokens >= 0.8 * len(LONG)
    assert_reference_tokens(tiny_model(), request("b", LONG, max_tokens=4), running.answer("b"))


def test_a_growing_conversation_computes_its_new_tokens_only() -> None:
    engine = tiny_engine()
    history = LONG[:40]
    for turn in range(5):
        asked = request(f"{turn}", history, max_tokens=20, ignore_eos=True)
        answer = run(engine, asked).answer(f"{turn}")
        assert_reference_tokens(tiny_model(), asked, answer)
        if turn:
            # All of the earlier turn, except perhaps its last token.
            assert answer.cached_tokens >= len(history) - 6 - 1
        history = history + answer.tokens + [1, 2, 3, 4, 5]


def test_a_running_request_is_shared_before_it_ends() -> None:
    running = Run(tiny_engine(max_step_tokens=32))
    running.submit(request("a", LONG, max_tokens=200, ignore_eos=True))
    while not running.answers:
        running.step()
    running.submit(request("b", LONG, max_tokens=2))
    running.finish()
    assert running.answer("b").cached_tokens == len(LONG) - 1


def test_requests_with_different_salts_share_nothing() -> None:
    engine = tiny_engine()
    for salt in ("", "a", "b"):
        asked = request(f"1{salt}", LONG, max_tokens=2, cache_salt=salt)
        assert run(engine, asked).answer(asked.id).cached_tokens == 0
        asked = request(f"2{salt}", LONG, max_tokens=2, cache_salt=salt)
        assert run(engine, asked).answer(asked.id).cached_tokens == len(LONG) - 1


def test_without_a_prefix_cache_nothing_is_shared_nor_kept() -> None:
    engine = tiny_engine(prefix_cache=False)
    asked = [request(f"{i}", LONG[:70], max_tokens=4, ignore_eos=True) for i in range(3)]
    for _ in range(2):
        running = run(engine, *asked)
        for one in asked:
            assert running.answer(one.id).cached_tokens == 0
            assert_reference_tokens(tiny_model(), one, running.answer(one.id))
        assert engine.stats().kv_tokens == 0
    assert_idle(engine)


def test_tokens_computed_again_after_preemption_count_once_as_uncached() -> None:
    running = Run(tiny_engine(max_step_tokens=20))
    engine = running.engine
    running.submit(request("other", LONG[:50] + LONG[200:260], max_tokens=1))
    running.finish()
    running.submit(request("a", LONG[:200], max_tokens=1))
    for _ in range(3):
        running.step()
    (sequence,) = engine.scheduler.running
    assert 50 < sequence.num_computed_tokens < 200
    engine.scheduler.preempt(sequence)
    while engine.scheduler.tree.tokens > 50:
        engine.scheduler.tree.evict(1)
    running.finish()
    assert running.answer("a").cached_tokens == 50
    assert engine.stats().prompt_tokens_computed > 110 + 150
