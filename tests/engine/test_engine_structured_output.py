"""Structured output of random weights, which follow a grammar only if it is enforced."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from engines import Answer, Run, run, tiny_engine, tiny_model
from engines import request as plain_request
from grammars import CONTROLS, END_IDS, TAGS, text_of, validate
from schemas import INTEGER, SCHEMAS, STRING, obj
from tool_calls import PARAMETERS, calls_of, tool

from glmd.chat.tokenizer import Tokenizer
from glmd.ipc import EngineRequest, GrammarSpec
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.request import JsonSchema, OutputSpec, Regex, make_structure

PROMPT = [CONTROLS["[gMASK]"], *b"Write something."]

CLOSING = dict.fromkeys([*b'"}]', *END_IDS, TAGS.end_arg_value, TAGS.end_tool_call], 4.0)
CLOSING |= {ord(","): -1.0, TAGS.end_think: 4.0}
"""Biases with which a random model ends soon."""


@cache
def spec(structure_json: str, strict: bool = True) -> GrammarSpec:
    structure = OutputSpec(JsonSchema(json.loads(structure_json), "schema", strict=strict))
    return GrammarSpec(grammar=build_grammar(structure, TAGS).text)


def spec_of(schema: Any, *, after: tuple[int, ...] = ()) -> GrammarSpec:
    found = spec(json.dumps(schema))
    return GrammarSpec(grammar=found.grammar, after=after)


def regex(pattern: str, **fields: Any) -> GrammarSpec:
    return GrammarSpec(grammar=build_grammar(OutputSpec(Regex(pattern, "p")), TAGS).text, **fields)


def request(id: str, spec: GrammarSpec | None, seed: int = 0, **fields: Any) -> EngineRequest:
    """A request whose seed chooses one of several sampling parameters."""
    ways = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 1.2, "top_k": 40, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.05, "presence_penalty": 0.2},
    ]
    options = {"logit_bias": CLOSING, "max_tokens": 2500, "seed": seed, **ways[seed % 4]}
    return plain_request(id, PROMPT, grammar=spec, **options | fields)


def content(answer: Answer) -> list[int]:
    """Tokens behind the reasoning."""
    tokens = answer.tokens
    return tokens[tokens.index(TAGS.end_think) + 1 :] if TAGS.end_think in tokens else tokens


@pytest.mark.parametrize(("mtp", "rounds"), [(0, 6), (1, 2)])
def test_over_500_answers_of_random_weights_are_valid(mtp: int, rounds: int) -> None:
    """Over 70 schemas, several sampling parameters, with and without reasoning and drafts."""
    engine = tiny_engine(tiny_model(num_nextn_predict_layers=mtp), mtp=mtp, max_running=32)
    asked = {}
    for number, name in enumerate([*SCHEMAS] * rounds):
        after = (TAGS.end_think,) if number % 3 == 0 else ()
        asked[f"{number} {name}"] = spec_of(SCHEMAS[name], after=after)
    requests = [request(id, each, seed=n) for n, (id, each) in enumerate(asked.items())]
    done = run(engine, *requests)
    for id, each in asked.items():
        answer = done.answer(id)
        assert answer.finish == "stop", f"{id}: {answer.finish} {answer.error}"
        assert each.after == () or TAGS.end_think in answer.tokens
        validate(text_of(content(answer)), SCHEMAS[id.partition(" ")[2]])
    if mtp:
        stats = engine.stats()
        assert 0 < stats.accepted < stats.drafted


@pytest.mark.parametrize(("mtp", "count"), [(0, 150), (1, 50)])
def test_200_answers_hold_valid_calls_required_named_or_begun(
    tokenizer: Tokenizer, mtp: int, count: int
) -> None:
    engine = tiny_engine(tiny_model(num_nextn_predict_layers=mtp), mtp=mtp, max_running=32)
    tools = [tool(name, parameters, strict=True) for name, parameters in PARAMETERS.items()]
    asked: dict[str, tuple[OutputSpec, GrammarSpec]] = {}
    for number in range(count):
        named = tools[number % len(tools)].name
        structure = [
            make_structure(None, tools, required=True),
            make_structure(None, tools, required=True, parallel=False),
            make_structure(None, tools, named=named),
            make_structure(None, tools, parallel=False),
        ][number % 4]
        free = structure.calls == "free"
        each = GrammarSpec(
            grammar=build_grammar(structure, TAGS).text,
            after=(TAGS.tool_call,) if free else (TAGS.end_think,) if number % 8 < 4 else (),
            required=not free,
        )
        asked[str(number)] = structure, each
    bias = CLOSING | {TAGS.tool_call: 6.0, TAGS.arg_value: -100.0}
    requests = [
        request(id, each, seed=int(id), logit_bias=bias | _no_end(each))
        for id, (_, each) in asked.items()
    ]
    done = run(engine, *requests)
    for id, (structure, each) in asked.items():
        answer = done.answer(id)
        assert answer.finish == "stop", f"{id}: {answer.finish} {answer.error}"
        assert answer.tokens[-1] == TAGS.observation
        in_reasoning = TAGS.end_think in each.after
        calls = calls_of(tokenizer, answer.tokens, tools, in_reasoning=in_reasoning)
        assert len(calls) == 1 or structure.parallel
        for name, arguments in calls:
            assert name in {rule.name for rule in structure.tools}
            validate(arguments, PARAMETERS[name])


def _no_end(spec: GrammarSpec) -> dict[int, float]:
    """Bias against end tokens where a call is optional."""
    return {} if spec.required else dict.fromkeys(END_IDS, -100.0)


def test_drafts_change_nothing_about_constrained_answers() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    names = ["nested", "expression", "oneOf by tag", "enum", "format date-time", "nullable"]
    requests = [
        request(name, spec_of(SCHEMAS[name], after=(TAGS.end_think,) if n % 2 else ()), seed=n)
        for n, name in enumerate(names)
    ]
    runs = [run(tiny_engine(model, mtp=mtp, max_running=4), *requests) for mtp in (0, 1, 3)]
    for name in names:
        tokens = [each.answer(name).tokens for each in runs]
        assert tokens[0] == tokens[1] == tokens[2]


def test_other_sequences_of_the_batch_are_not_masked() -> None:
    alone = run(tiny_engine(), request("free", None, seed=5, max_tokens=60))
    others = [request(str(n), spec_of(SCHEMAS["nested"]), seed=n) for n in range(5)]
    together = run(tiny_engine(), *others, request("free", None, seed=5, max_tokens=60))
    assert together.answer("free").tokens == alone.answer("free").tokens


def test_every_continuation_of_a_request_follows_the_grammar() -> None:
    done = run(tiny_engine(), request("r", spec_of(SCHEMAS["object"]), n=3))
    answers = [done.answer("r", index) for index in range(3)]
    for answer in answers:
        validate(text_of(answer.tokens), SCHEMAS["object"])
    assert len({tuple(answer.tokens) for answer in answers}) == 3


def test_preempted_sequences_continue_their_grammars() -> None:
    model = tiny_model(max_position_embeddings=600)
    requests = [request(str(n), regex("(ab){200}"), seed=n) for n in range(6)]
    engine = tiny_engine(model, kv_tokens=1400)
    done = run(engine, *requests)
    assert engine.stats().preemptions
    for one in requests:
        assert text_of(done.answer(one.id).tokens) == "ab" * 200


def test_an_answer_at_max_tokens_finishes_with_length() -> None:
    done = run(tiny_engine(), request("r", spec_of(obj({"s": STRING})), max_tokens=5))
    assert done.answer("r").finish == "length"
    assert len(done.answer("r").tokens) == 5


def test_a_thinking_budget_lets_the_grammar_start() -> None:
    never = {TAGS.end_think: -100.0}
    done = run(
        tiny_engine(),
        request(
            "r",
            spec_of(SCHEMAS["object"], after=(TAGS.end_think,)),
            logit_bias=CLOSING | never,
            thinking_budget=20,
            thinking_close=(*b"So.", TAGS.end_think),
        ),
    )
    answer = done.answer("r")
    assert bytes(answer.tokens[20:23]) == b"So."
    assert answer.tokens[23] == TAGS.end_think
    validate(text_of(answer.tokens[24:]), SCHEMAS["object"])


def test_end_tokens_are_masked_before_a_required_grammar_starts() -> None:
    eager = dict.fromkeys(END_IDS, 20.0) | {TAGS.tool_call: 20.0}
    done = run(
        tiny_engine(),
        request("r", regex("ok", after=(TAGS.end_think,)), logit_bias=CLOSING | eager),
    )
    assert text_of(content(done.answer("r"))) == "ok"


def test_min_tokens_do_not_extend_a_grammar() -> None:
    done = run(
        tiny_engine(),
        request("short", regex("a{2,9}"), min_tokens=6, max_tokens=50),
        request("over", regex("ab"), min_tokens=6, max_tokens=50),
    )
    assert len(done.answer("short").tokens) >= 6
    assert text_of(done.answer("over").tokens) == "ab"


def test_the_end_of_the_grammar_ends_the_answer_even_with_ignore_eos() -> None:
    done = run(tiny_engine(), request("r", regex("a{3}"), ignore_eos=True, max_tokens=50))
    assert text_of(done.answer("r").tokens) == "aaa"
    assert done.answer("r").finish == "stop"


def test_a_grammar_that_is_not_compiled_yet_can_be_cancelled() -> None:
    running = Run(tiny_engine())
    running.submit(request("one", regex("a")), request("two", regex("b"), n=2))
    running.engine.cancel("one")
    running.engine.cancel("two", 1)
    running.finish()
    assert running.answer("one").finish == "cancelled"
    assert running.answer("two", 1).finish == "cancelled"
    assert text_of(running.answer("two", 0).tokens) == "b"


def test_an_invalid_grammar_ends_its_own_request_only() -> None:
    wrong = GrammarSpec(grammar=json.dumps({"grammars": [{"lark_grammar": "start: nope"}]}))
    done = run(tiny_engine(), request("wrong", wrong), request("right", regex("a")))
    assert done.answer("wrong").finish == "error"
    assert "nope" in (done.answer("wrong").error or "")
    assert text_of(done.answer("right").tokens) == "a"


def test_a_grammar_beyond_the_matchers_limits_ends_its_own_sequence_only() -> None:
    names = [f"r{i}" for i in range(5000)]
    lark = "\n".join(
        [f'start: "a" {" ".join(f"{name}?" for name in names)}', *(f'{n}: "x"' for n in names)]
    )
    large = GrammarSpec(grammar=json.dumps({"grammars": [{"lark_grammar": lark}]}))
    done = run(tiny_engine(), request("large", large), request("other", regex("a{5}")))
    assert done.answer("large").finish == "error"
    assert "cannot be followed further" in (done.answer("large").error or "")
    assert text_of(done.answer("other").tokens) == "aaaaa"


def test_logprobs_are_computed_before_the_mask() -> None:
    done = run(tiny_engine(), request("r", regex("ab"), logprobs=0))
    assert done.answer("r").logprobs
    assert all(logprob < -0.01 for logprob in done.answer("r").logprobs)


def test_an_integer_can_end() -> None:
    done = run(tiny_engine(), *(request(str(n), spec_of(INTEGER), seed=n) for n in range(8)))
    for n in range(8):
        assert isinstance(json.loads(text_of(done.answer(str(n)).tokens)), int)
