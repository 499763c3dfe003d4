"""Drafts in mixed batches: same answers, same distribution, same acceptance."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from distribution import Floats, deviation, exact
from engines import Answer, Run, load, reference_logits, request, run, tiny_engine, tiny_model
from grammars import CONTROLS

from glmd.chat.messages import read_messages
from glmd.chat.prompt import build_prompt
from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import SpecialTokens, Tokenizer
from glmd.chat.tools import read_tools
from glmd.chat.turn_cache import TurnTokenCache
from glmd.chat.types import Conversation
from glmd.checkpoint.hub import DEMO
from glmd.engine.core import Engine
from glmd.ipc import EngineRequest, GrammarSpec, SamplingParams, unpack_tokens
from glmd.kv_cache.stored_keys import dequantize
from glmd.llm import LLM
from glmd.model.loader import LoadedModel
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.request import OutputSpec, Regex
from mtp import WEATHER


@cache
def model_of(name: str) -> LoadedModel:
    return load(DEMO) if name == "demo" else tiny_model(num_nextn_predict_layers=1)


@cache
def demo_prompt(text: str, *, with_tool: bool = False) -> list[int]:
    """The demo's prompt for a first user message."""
    tokenizer = Tokenizer.load(DEMO)
    tools = read_tools([WEATHER] if with_tool else None)
    conversation = Conversation(read_messages([{"role": "user", "content": text}]), tools=tools)
    template = ChatTemplate.load(DEMO, tokenizer.controls)
    prompt = build_prompt(
        conversation, tokenizer=tokenizer, template=template, turn_cache=TurnTokenCache()
    )
    return list(prompt.tokens)


def mixed_batch(name: str) -> list[EngineRequest]:
    """One request of each kind."""
    rng = np.random.default_rng(2)
    if name == "demo":
        controls, prompt = Tokenizer.load(DEMO).controls, demo_prompt("Count from 3 to 30.")
    else:
        controls, prompt = CONTROLS, rng.integers(0, 250, 30).tolist()
    long = rng.integers(0, 250, 300).tolist()
    form = OutputSpec(Regex("[a-c]{2}( [0-9]+,){4,}", "p"))
    grammar = GrammarSpec(
        grammar=build_grammar(form, SpecialTokens.find(controls, "tokenizer.json")).text
    )
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampled": {"temperature": 2.0},
        "filtered": {"temperature": 3.0, "top_k": 12, "top_p": 0.9, "min_p": 0.01},
        "penalised": {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        "greedy and penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        "with logprobs": {"temperature": 1.5, "logprobs": 2},
        "biased": {"logit_bias": {prompt[5]: 3.0}},
        "stopped": {"stop_token_ids": tuple(range(30, 90)), "min_tokens": 4, "temperature": 2.0},
        "held to a grammar": {"grammar": grammar, "temperature": 1.0},
        "held and penalised": {"grammar": grammar, "frequency_penalty": 0.4, "n": 2},
        "thinking": {"thinking_budget": 11, "thinking_close": (40, 41), "temperature": 2.0},
        "many": {"temperature": 2.0, "n": 3},
    }
    rest: dict[str, Any] = {"ignore_eos": True, "max_tokens": 24}
    return [
        *(
            request(kind, prompt, **rest | {"seed": seed} | fields)
            for seed, (kind, fields) in enumerate(kinds.items())
        ),
        request("long", long, **rest),
        request("prefix of long", long[:90], **rest),
    ]


@cache
def answers(name: str, mtp: int) -> Run:
    """Answers to the mixed batch, with long prompts in chunks beside decoding sequences."""
    engine = tiny_engine(model_of(name), mtp=mtp, max_step_tokens=64, max_running=24)
    done = run(engine, *mixed_batch(name))
    stats = engine.stats()
    assert mtp == 0 or 0 < stats.accepted < stats.drafted
    return done


def is_tie(model: LoadedModel, asked: EngineRequest, tokens: list[int], others: list[int]) -> bool:
    """Whether two answers differ first at a tie of two tokens. Prints the place."""
    at = next(i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b)
    whole = [*unpack_tokens(asked.prompt).tolist(), *tokens[:at]]
    row = reference_logits(model, whole)[-1]
    print(f"{asked.id}, token {at}: {tokens[at]} or {others[at]}")
    return bool(abs(row[tokens[at]] - row[others[at]]) < 1e-3)


@pytest.mark.parametrize("name", ["random", "demo"])
@pytest.mark.parametrize("mtp", [1, 2, 3])
def test_every_kind_of_request_answers_as_without_drafts(name: str, mtp: int) -> None:
    model, drafted, undrafted = model_of(name), answers(name, mtp), answers(name, 0)
    for asked in mixed_batch(name):
        for index in range(asked.n):
            one, other = drafted.answer(asked.id, index), undrafted.answer(asked.id, index)
            if one.tokens != other.tokens:
                assert is_tie(model, asked, one.tokens, other.tokens), asked.id
                continue
            assert one.finish == other.finish
            assert np.allclose(one.logprobs, other.logprobs, atol=1e-3)


@pytest.mark.parametrize("mtp", [1, 3])
def test_a_stop_string_that_ends_within_a_draft_ends_the_answer_there(mtp: int) -> None:
    """Tokens of the same step behind the stop string are not part of the answer."""
    asked: dict[str, Any] = {
        "conversations": [[{"role": "user", "content": "Count from 3 to 30."}]],
        "template": {"enable_thinking": False},
        "temperature": 0.0,
        "max_tokens": 30,
    }
    with_drafts, without = LLM(mtp=mtp), LLM(mtp=0)
    whole = without.chat_batch(**asked)[0].text
    assert len(whole) > 20
    for end in range(8, 12):
        stop = whole[end : end + 2]
        (one,), (other,) = (llm.chat_batch(**asked, stop=[stop]) for llm in (with_drafts, without))
        assert one.text == other.text == whole[: whole.index(stop)]
        assert one.finish_reason == other.finish_reason == "stop"
    assert with_drafts.engine.stats().accepted


FILTERED = SamplingParams(
    temperature=8.0,
    top_k=6,
    top_p=0.95,
    min_p=0.1,
    repetition_penalty=1.3,
    frequency_penalty=3.0,
    presence_penalty=-2.0,
    logit_bias={7: 4.0},
)
"""At this temperature the noise counts for as much as the logits."""


@pytest.mark.parametrize("mtp", [1, 2])
def test_three_tokens_are_distributed_as_the_model_has_them(mtp: int) -> None:
    """All 216 continuations, with filters and penalties that refuse many drafts."""
    model = tiny_model(num_nextn_predict_layers=1, vocab_size=16, eos_token_id=[1])
    prompt = np.array([5, 9, 9, 3, 7, 11, 12, 5], np.int32)
    draws = 700
    fields = {name: getattr(FILTERED, name) for name in FILTERED.__struct_fields__} | {"seed": 3}
    asked = request("r", prompt, n=draws, max_tokens=3, ignore_eos=True, **fields)
    engine = tiny_engine(model, mtp=mtp, max_running=200)
    done = run(engine, asked)
    stats = engine.stats()
    assert 0.1 * draws < stats.accepted < 0.9 * stats.drafted
    expected = _probabilities(model, prompt)
    drawn = [tuple(done.answer("r", index).tokens) for index in range(draws)]
    assert set(drawn) <= expected.keys()
    observed = np.array([drawn.count(continuation) for continuation in expected])
    assert deviation(observed, draws * np.array([*expected.values()])) < 3.5


def _probabilities(model: LoadedModel, prompt: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of every continuation by three tokens."""
    continuations: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for continuation, probability in continuations.items():
            output = np.array(continuation, np.int32)
            logits = reference_logits(model, [*prompt.tolist(), *continuation])[-1]
            next_: Floats = exact(logits, FILTERED, prompt, output)
            for token in np.flatnonzero(next_).tolist():
                longer[*continuation, token] = probability * float(next_[token])
        continuations = longer
    return continuations


def count_drafts(engine: Engine, asked: EngineRequest) -> tuple[Answer, int, int]:
    """An answer, its number of drafts, and of accepted drafts."""
    before = engine.stats()
    answer = run(engine, asked).answer(asked.id)
    after = engine.stats()
    return answer, after.drafted - before.drafted, after.accepted - before.accepted


def clear_mtp_kv(engine: Engine) -> None:
    for node in engine.scheduler.tree.nodes():
        assert node.kv is not None
        node.kv.layers[-1] = mx.zeros_like(dequantize(node.kv.layers[-1]))


def test_a_prefix_hit_keeps_acceptance() -> None:
    """The MTP layer's KV is cached like that of the others. With zeros in its place, acceptance
    falls and answers stay the same."""
    model = model_of("demo")
    cached = tiny_engine(model, mtp=1)
    prompt = demo_prompt("Count from 4 to 20.", with_tool=True)
    for turn in range(2):
        asked = request(f"turn {turn}", prompt, max_tokens=40)
        first, *counts = count_drafts(cached, asked)
        assert first.cached_tokens >= 100 * turn
        alone, *cold = count_drafts(tiny_engine(model, mtp=1), asked)
        assert (first.tokens, counts) == (alone.tokens, cold)
        again, *counts = count_drafts(cached, asked)
        assert again.cached_tokens == len(prompt) - 1
        assert (again.tokens, counts) == (alone.tokens, cold)
        said = [token for token in first.tokens if token not in model.eos_token_ids]
        prompt = [*prompt, *said, *demo_prompt("Count from 7 to 30.")[2:]]
    clear_mtp_kv(cached)
    without, drafted, accepted = count_drafts(cached, asked)
    assert without.tokens == alone.tokens
    assert accepted / drafted < cold[1] / cold[0]


def test_forked_prefixes_keep_acceptance() -> None:
    """The MTP layer's KV of the last common token depends on the next one, and is not shared."""
    model, shared = model_of("demo"), tiny_engine(model_of("demo"), mtp=1)
    cities = ("Lisbon", "Turin", "Bergen", "Porto")
    asked = [
        request(city, demo_prompt(f"What is the weather in {city}?", with_tool=True), max_tokens=40)
        for city in cities
    ]
    cold = [count_drafts(tiny_engine(model, mtp=1), one) for one in asked]
    forked = [count_drafts(shared, one) for one in asked]
    clear_mtp_kv(shared)
    without = [count_drafts(shared, one) for one in asked]
    assert min(answer.cached_tokens for answer, *_ in forked[1:]) > 100
    for (alone, *cold_counts), (answer, *counts) in zip(cold, forked, strict=True):
        assert (answer.tokens, counts) == (alone.tokens, cold_counts)
    assert sum(accepted for *_, accepted in without) < sum(accepted for *_, accepted in cold)
    assert [answer.tokens for answer, *_ in without] == [answer.tokens for answer, *_ in cold]
