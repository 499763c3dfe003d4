"""Single requests: refusals, ends, progress and cancellation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from engines import (
    Run,
    assert_complete,
    assert_idle,
    assert_reference_tokens,
    reference_logits,
    request,
    run,
    tiny_engine,
    tiny_model,
)

from glmd.engine.config import EngineConfig
from glmd.errors import CheckpointError, SettingsError

PROMPT = np.random.default_rng(0).integers(0, 500, 50).tolist()


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 0}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("max_tokens", {"max_tokens": -3}),
        ("min_tokens", {"min_tokens": -1}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": math.inf}),
        ("top_k", {"top_k": -1}),
        ("top_p", {"top_p": 1.1}),
        ("top_p", {"top_p": -0.1}),
        ("min_p", {"min_p": 2.0}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("repetition_penalty", {"repetition_penalty": math.nan}),
        ("presence_penalty", {"presence_penalty": math.inf}),
        ("frequency_penalty", {"frequency_penalty": math.nan}),
        ("logit_bias", {"logit_bias": {512: 1.0}}),
        ("logit_bias", {"logit_bias": {-1: 1.0}}),
        ("logit_bias", {"logit_bias": {1: math.nan}}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": -1}),
        ("stop_token_ids", {"stop_token_ids": (3, 100_000)}),
        ("thinking_close", {"thinking_budget": 3, "thinking_close": (512,)}),
        ("thinking_budget", {"thinking_budget": 3}),
        ("thinking_budget", {"thinking_budget": -1, "thinking_close": (5,)}),
    ],
    ids=str,
)
def test_an_invalid_field_is_refused_by_its_name(param: str, fields: dict[str, Any]) -> None:
    engine = tiny_engine()
    engine.submit(request("a", [1, 2], **fields))
    (output,) = engine.step()
    assert (output.id, output.finish_reason, output.error_kind) == ("a", "error", "invalid_request")
    assert output.error_param == param
    assert output.error is not None
    assert param in output.error
    assert not engine.has_work


@pytest.mark.parametrize("prompt", [[], [512], [-1], [1, 2, 4000, 3]])
def test_an_invalid_prompt_is_refused(prompt: list[int]) -> None:
    answer = run(tiny_engine(), request("a", prompt)).answer("a")
    assert answer.finish == "error"
    assert answer.error is not None
    assert answer.error.startswith("The prompt ")


def test_a_prompt_beyond_the_context_is_refused_with_both_lengths() -> None:
    engine = tiny_engine(max_context=40)
    answer = run(engine, request("a", range(40))).answer("a")
    assert answer.finish == "error"
    assert "40 tokens, but the context is limited to 40" in (answer.error or "")
    answer = run(engine, request("b", range(39))).answer("b")
    assert (answer.finish, len(answer.tokens)) == ("length", 1)


def test_an_id_in_use_is_refused_and_the_first_request_goes_on() -> None:
    running = Run(tiny_engine())
    running.submit(request("a", PROMPT, max_tokens=5, ignore_eos=True))
    for _ in range(3):
        running.step()
    running.engine.submit(request("a", [1, 2, 3]))
    refused, tokens = running.engine.step()
    assert (refused.finish_reason, refused.error_kind) == ("error", "invalid_request")
    assert tokens.finish_reason is None
    running.finish()
    assert running.answer("a").finish == "length"


def test_an_id_may_be_used_again_once_it_is_free() -> None:
    running = Run(tiny_engine())
    for _ in range(3):
        running.submit(request("a", PROMPT, max_tokens=5))
        running.step()
        running.engine.cancel("a")
        running.finish()
        assert running.answers.pop(("a", 0)).finish == "cancelled"
    assert_idle(running.engine)


def test_a_budget_too_small_for_any_request_is_refused_at_start() -> None:
    model = tiny_model(max_position_embeddings=128)
    # With so few rows, working memory cannot be reduced.
    with pytest.raises(CheckpointError, match="KV of 384 tokens"):
        tiny_engine(model, kv_tokens=383, max_step_tokens=128)
    engine = tiny_engine(model, kv_tokens=384, max_step_tokens=128)
    assert engine.info.max_context == 128
    assert len(run(engine, request("a", PROMPT, ignore_eos=True)).answer("a").tokens) == 78


@pytest.mark.parametrize("name", ["max_running", "max_step_tokens", "max_slowdown"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_settings_below_1_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be at least 1"):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["min_stream_rate", "max_gap"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_scheduling_settings_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be greater than 0"):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


# -- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "max_tokens"),
    [(1, 1), (1, 140), (2, 2), (41, 1), (42, 2), (43, 140), (130, 3)],
)
def test_answers_are_the_references_at_any_length(length: int, max_tokens: int) -> None:
    prompt = np.random.default_rng(length).integers(0, 500, length)
    asked = request("a", prompt, max_tokens=max_tokens, ignore_eos=True)
    engine = tiny_engine()
    for _ in range(2):  # the second time everything is cached
        answer = run(engine, asked).answer("a")
        assert_complete(tiny_model(), asked, answer, 4096)
        assert_reference_tokens(tiny_model(), asked, answer)
    assert answer.cached_tokens == length - 1
    assert_idle(engine)


def _first_occurrences(tokens: list[int]) -> list[int]:
    """Positions of tokens that did not occur before."""
    return [i for i, token in enumerate(tokens) if token not in tokens[:i]]


def test_a_stop_token_ends_the_answer_and_is_part_of_it() -> None:
    free = run(tiny_engine(), request("a", PROMPT, max_tokens=12, ignore_eos=True)).answer("a")
    at = _first_occurrences(free.tokens)[-1]
    stop = free.tokens[at]
    answer = run(
        tiny_engine(),
        request("a", PROMPT, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,)),
    ).answer("a")
    assert answer.finish == "stop"
    assert answer.tokens == free.tokens[: at + 1]


def test_the_checkpoints_eos_ends_the_answer_unless_it_is_ignored() -> None:
    free = run(tiny_engine(), request("a", PROMPT, max_tokens=12, ignore_eos=True)).answer("a")
    at = _first_occurrences(free.tokens)[-1]
    model = tiny_model(eos_token_id=[free.tokens[at], 511])
    answer = run(tiny_engine(model), request("a", PROMPT, max_tokens=12)).answer("a")
    assert (answer.finish, answer.tokens) == ("stop", free.tokens[: at + 1])
    asked = request("a", PROMPT, max_tokens=12, ignore_eos=True)
    answer = run(tiny_engine(model), asked).answer("a")
    assert (answer.finish, answer.tokens) == ("length", free.tokens)


def test_min_tokens_keeps_an_answer_from_ending() -> None:
    free = run(tiny_engine(), request("a", PROMPT, max_tokens=9, ignore_eos=True)).answer("a")
    asked = request("a", PROMPT, max_tokens=9, min_tokens=8, stop_token_ids=tuple(free.tokens[:4]))
    answer = run(tiny_engine(), asked).answer("a")
    assert len(answer.tokens) == 9
    assert not set(answer.tokens[:8]) & set(asked.stop_token_ids)
    assert_reference_tokens(tiny_model(), asked, answer)


def test_there_is_one_logprob_per_token() -> None:
    asked = request("a", PROMPT, max_tokens=6, ignore_eos=True, logprobs=2, temperature=3.0, seed=1)
    answer = run(tiny_engine(), asked).answer("a")
    logits = reference_logits(tiny_model(), PROMPT + answer.tokens)[len(PROMPT) - 1 : -1]
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    expected = exact[np.arange(6), answer.tokens]
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-3)


def test_requests_without_a_seed_differ_and_with_one_do_not() -> None:
    def sampled(**fields: Any) -> list[list[int]]:
        asked = [
            request(f"{i}", PROMPT, max_tokens=8, temperature=2.0, ignore_eos=True, n=2, **fields)
            for i in range(2)
        ]
        answers = run(tiny_engine(), *asked).answers
        return [answers[f"{i}", index].tokens for i in range(2) for index in range(2)]

    free = sampled()
    assert len({tuple(tokens) for tokens in free}) == 4
    first, second, again, once_more = sampled(seed=-7)
    assert first != second
    assert (first, second) == (again, once_more)


def test_a_thinking_budget_closes_the_reasoning_and_forces_no_other_token() -> None:
    close = (7, 8, 9)
    for budget in (0, 1, 5, 20):
        asked = request(
            "a", PROMPT, max_tokens=40, ignore_eos=True, thinking_budget=budget,
            thinking_close=close,
        )  # fmt: skip
        answer = run(tiny_engine(), asked).answer("a")
        assert len(answer.tokens) == 40
        assert tuple(answer.tokens[budget : budget + 3]) == close
        free = request("b", PROMPT + answer.tokens[: budget + 3], max_tokens=5, ignore_eos=True)
        after = run(tiny_engine(), free).answer("b").tokens
        assert answer.tokens[budget + 3 :][: len(after)] == after[: 37 - budget]


def test_prompt_progress_counts_up_to_the_prompt() -> None:
    engine = tiny_engine(max_step_tokens=16)
    answer = run(engine, request("a", PROMPT, max_tokens=2, prompt_progress=True)).answer("a")
    assert answer.progress == [16, 32, 48, 50]
    longer = request("b", PROMPT[:40] + [1] * 30, max_tokens=2, prompt_progress=True)
    assert run(engine, longer).answer("b").progress == [56, 70]


# -- cancelling -------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(12))
def test_a_cancelled_request_is_gone_at_once_in_any_phase(after: int) -> None:
    running = Run(tiny_engine(max_step_tokens=16, max_running=1))
    running.submit(
        request("a", PROMPT, max_tokens=30, ignore_eos=True),
        request("waits", PROMPT, max_tokens=30),
    )
    for _ in range(after):
        running.step()
    running.engine.cancel("a")
    running.engine.cancel("waits")
    assert running.engine.stats().running == running.engine.stats().waiting == 0
    assert_idle(running.engine)
    running.finish(limit=2)
    assert {answer.finish for answer in running.answers.values()} == {"cancelled"}
    assert_idle(running.engine)


def test_cancelling_one_continuation_leaves_the_others() -> None:
    running = Run(tiny_engine())
    asked = request("a", PROMPT, n=3, max_tokens=9, ignore_eos=True, temperature=2.0, seed=5)
    running.submit(asked)
    for _ in range(5):
        running.step()
    running.engine.cancel("a", 1)
    running.engine.cancel("a", 1)
    running.engine.cancel("a", 17)
    running.engine.cancel("no such request")
    running.finish()
    finishes = [running.answer("a", index).finish for index in range(3)]
    assert finishes == ["length", "cancelled", "length"]
    for index in range(3):
        assert_reference_tokens(tiny_model(), asked, running.answer("a", index), index)
    assert_idle(running.engine)


def test_closing_drops_everything() -> None:
    running = Run(tiny_engine(max_running=2))
    running.submit(*(request(f"{i}", PROMPT[i:], max_tokens=30) for i in range(4)))
    for _ in range(4):
        running.step()
    running.engine.close()
    stats = running.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_bytes, stats.kv_tokens) == (0, 0, 0, 0)
