"""Grammars of tool calls: the tool parser reads all accepted calls as valid arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from grammars import CONTROLS, END_IDS, TAGS, accepts, matcher_of, validate, walk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemas import INTEGER, STRING, Schema, obj
from tool_calls import PARAMETERS, Calls, calls_of, tool

from glmd.chat.tokenizer import Tokenizer
from glmd.chat.types import Tool
from glmd.errors import InvalidRequest
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.request import JsonSchema, OutputSpec, make_structure

CALL, END_CALL = CONTROLS["<tool_call>"], CONTROLS["</tool_call>"]
KEY, END_KEY = CONTROLS["<arg_key>"], CONTROLS["</arg_key>"]
VALUE, END_VALUE = CONTROLS["<arg_value>"], CONTROLS["</arg_value>"]
OBSERVATION, USER = CONTROLS["<|observation|>"], CONTROLS["<|user|>"]


def walked_calls(
    tokenizer: Tokenizer, spec: OutputSpec, tools: Sequence[Tool], count: int, seed: int = 0
) -> list[Calls]:
    matcher = matcher_of(spec)
    rng = np.random.default_rng(seed)
    walks = (walk(matcher, rng) for _ in range(count))
    return [calls_of(tokenizer, tokens, tools) for tokens in walks if tokens is not None]


@pytest.mark.parametrize("name", PARAMETERS)
def test_random_arguments_are_valid(tokenizer: Tokenizer, name: str) -> None:
    tools = [tool(name, PARAMETERS[name], strict=True)]
    found = walked_calls(tokenizer, make_structure(None, tools, required=True), tools, 12)
    assert found
    for calls in found:
        for called, arguments in calls:
            assert called == name
            validate(arguments, PARAMETERS[name])


@pytest.mark.parametrize("parallel", [True, False])
def test_200_random_answers_contain_only_valid_calls(tokenizer: Tokenizer, parallel: bool) -> None:
    tools = [tool(name, schema) for name, schema in PARAMETERS.items()]
    spec = make_structure(None, tools, required=True, parallel=parallel)
    found = walked_calls(tokenizer, spec, tools, 100)
    assert len(found) == 100
    assert parallel == any(len(calls) > 1 for calls in found)
    for calls in found:
        for name, arguments in calls:
            validate(arguments, PARAMETERS[name])


def test_only_a_named_tool_is_called(tokenizer: Tokenizer) -> None:
    tools = [tool("get", obj({"a": INTEGER})), tool("get_all", obj({"b": INTEGER}))]
    spec = make_structure(None, tools, named="get")
    names = {name for calls in walked_calls(tokenizer, spec, tools, 20) for name, _ in calls}
    assert names == {"get"}


def test_a_named_tool_must_be_offered() -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_structure(None, [tool("get", {})], named="put")
    assert caught.value.param == "tool_choice"
    with pytest.raises(InvalidRequest):
        make_structure(None, [], required=True)


def structure_of(**parameters: Schema) -> OutputSpec:
    tools = [tool(name, schema) for name, schema in parameters.items()]
    return make_structure(None, tools, required=True)


def argument(name: str, value: str) -> tuple[int | str, ...]:
    return KEY, name, END_KEY, VALUE, value, END_VALUE


def test_arguments_come_in_any_order_each_once_and_all_required_ones() -> None:
    matcher = matcher_of(structure_of(f=obj({"a": STRING, "b": INTEGER, "c": INTEGER}, "a", "c")))
    a, b, c = argument("a", "x"), argument("b", "1"), argument("c", "2")
    for body in ((*a, *b, *c), (*c, *a), (*b, *c, *a)):
        assert accepts(matcher, CALL, "f", *body, END_CALL, OBSERVATION)
    for body in ((*a, *b), (*a, *c, *a), a, (*a, *c, *argument("d", "1"))):
        assert not accepts(matcher, CALL, "f", *body, END_CALL, OBSERVATION)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "two\nlines\n",
        "</arg_value>",
        '{"json": 1}',
        "null",
        '"quoted"',
        "\\n",
        "日本 😀",
        "\x00\x7f",
    ],
)
def test_a_string_may_contain_any_text(text: str) -> None:
    matcher = matcher_of(structure_of(f=obj({"s": STRING})))
    assert accepts(matcher, CALL, "f", *argument("s", text), END_CALL, OBSERVATION)


def test_a_string_contains_no_control_token() -> None:
    matcher = matcher_of(structure_of(f=obj({"s": STRING})))
    for id in set(CONTROLS.values()) - {END_VALUE}:
        assert not accepts(
            matcher,
            CALL,
            "f",
            KEY,
            "s",
            END_KEY,
            VALUE,
            "x",
            id,
            "y",
            END_VALUE,
            END_CALL,
            OBSERVATION,
        )


@pytest.mark.parametrize(
    ("schema", "possible", "impossible"),
    [
        ({"type": ["string", "null"]}, ["null", "nul", "nulls", "0"], [" null", "null\n"]),
        (
            {"type": ["string", "integer"]},
            ["12", "-3", "12a", "null", "1.5.2"],
            [" 12", "1.0", "1e3"],
        ),
        ({"type": ["string", "boolean"]}, ["true", "truely", "True"], ["true "]),
        ({"type": ["string", "array"], "items": INTEGER}, ["[1]", "x[", "a"], ["[x", "[", " [1]"]),
        ({"type": ["string", "integer"], "maximum": 9}, ["9", "x"], ["10"]),
        ({"type": "boolean"}, ["true", "false"], ["True", "", "1"]),
        ({"type": "object"}, ['{"a": 1}', "{}"], ["", "null", "{"]),
        ({"enum": ["1", 1]}, ["1"], ["2"]),
        ({"enum": ["1", 2]}, ["1", "2"], ["3"]),
    ],
)
def test_strings_exclude_text_that_is_read_as_another_type(
    schema: Schema, possible: list[str], impossible: list[str]
) -> None:
    matcher = matcher_of(structure_of(f=obj({"v": schema})))
    for text in possible:
        assert accepts(matcher, CALL, "f", *argument("v", text), END_CALL, OBSERVATION), text
    for text in impossible:
        assert not accepts(matcher, CALL, "f", *argument("v", text), END_CALL, OBSERVATION), text


def test_undeclared_arguments_must_be_allowed() -> None:
    opened = obj({"a": INTEGER}) | {"additionalProperties": True}
    extra = (CALL, "f", *argument("a", "1"), *argument("b", "x"), END_CALL, OBSERVATION)
    again = (CALL, "f", *argument("a", "1"), *argument("a", "x"), END_CALL, OBSERVATION)

    def matcher(parameters: Schema, *, strict: bool = False) -> Any:
        tools = [tool("f", parameters, strict=strict)]
        return matcher_of(make_structure(None, tools, required=True))

    assert accepts(matcher(opened), *extra)
    assert not accepts(matcher(opened), *again)
    assert not accepts(matcher(opened, strict=True), *extra)
    assert not accepts(matcher({"type": "object", "properties": {"a": INTEGER}}), *extra)


def test_calls_end_with_the_observation_token() -> None:
    matcher = matcher_of(structure_of(f=obj({})))
    call = (CALL, "f", END_CALL)
    assert accepts(matcher, *call, OBSERVATION)
    assert accepts(matcher, *call, *call, OBSERVATION)
    for end in set(END_IDS) - {OBSERVATION}:
        assert not accepts(matcher, *call, end)
    assert not accepts(matcher, *call, "text")


def test_free_calls_of_strict_tools_follow_their_schema_and_others_do_not() -> None:
    tools = [tool("strict", obj({"n": INTEGER}), strict=True), tool("loose", obj({"n": INTEGER}))]
    spec = make_structure(None, tools)
    assert spec.calls == "free"
    matcher = matcher_of(spec)
    assert accepts(matcher, "strict", *argument("n", "1"), END_CALL, OBSERVATION)
    assert not accepts(matcher, "strict", *argument("n", "x"), END_CALL, OBSERVATION)
    assert accepts(
        matcher, "loose", *argument("m", "x"), *argument("n", "y"), END_CALL, OBSERVATION
    )
    assert accepts(
        matcher, "loose", END_CALL, CALL, "strict", *argument("n", "1"), END_CALL, OBSERVATION
    )
    assert not accepts(matcher, "other", END_CALL, OBSERVATION)


def test_an_answer_with_format_and_tools_is_content_or_calls() -> None:
    form = JsonSchema(obj({"a": INTEGER}), "schema")
    matcher = matcher_of(make_structure(form, [tool("f", obj({"n": INTEGER}))]))
    assert accepts(matcher, '{"a": 1}')
    assert accepts(matcher, '{"a": 1}', USER)
    assert accepts(matcher, CALL, "f", *argument("n", "1"), END_CALL, OBSERVATION)
    assert not accepts(matcher, CALL, "f", *argument("n", "x"), END_CALL, OBSERVATION)
    assert not accepts(matcher, "text")


TOO_COMPLEX = {
    "allOf": [
        {"anyOf": [{"type": "string", "pattern": f"{letter}{digit}"} for digit in range(5)]}
        for letter in "abc"
    ]
}


@pytest.mark.parametrize(
    ("parameters", "keyword"),
    [
        (obj({"a": {"not": {}}}), ".properties.a.not"),
        (obj({"a": INTEGER}) | {"minProperties": 1, "required": []}, ".minProperties"),
        (obj({"a": TOO_COMPLEX}), ".properties.a"),
        (obj({" a": INTEGER}), ""),
    ],
)
def test_unsupported_keywords_are_refused_for_strict_tools_and_dropped_for_others(
    parameters: Schema, keyword: str
) -> None:
    param = f"tools[0].function.parameters{keyword}"

    def spec(*, strict: bool) -> OutputSpec:
        return make_structure(None, [tool("f", parameters, strict=strict)], required=True)

    with pytest.raises(InvalidRequest) as caught:
        build_grammar(spec(strict=True), TAGS)
    assert caught.value.param == param
    assert build_grammar(spec(strict=False), TAGS).relaxed == (param,)
    matcher_of(spec(strict=False))


# -- random unions ------------------------------------------------------------------------

branches = st.one_of(
    st.sampled_from(["string", "integer", "number", "boolean", "null"]).map(lambda t: {"type": t}),
    st.sampled_from(["^[0-9]{1,3}$", "a|^1", "^(true|x)$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 6}
    ),
    st.integers(0, 3).map(lambda n: {"type": "string", "maxLength": n}),
    st.integers(0, 3).map(lambda n: {"type": "integer", "minimum": n, "maximum": 12}),
    st.lists(
        st.sampled_from(["1", 1, "true", True, "null", None, "[]", "x"]), min_size=1, max_size=3
    ).map(lambda values: {"enum": values}),
    st.sampled_from(["integer", "string"]).map(
        lambda t: {"type": "array", "items": {"type": t, "maxLength": 5}, "maxItems": 2}
    ),
    st.just({"type": "object", "properties": {"k": {"type": "boolean"}}, "required": ["k"]}),
    st.just({"$ref": "#/$defs/shared"}),
)
values = st.one_of(
    branches,
    st.lists(branches, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    st.lists(branches, min_size=1, max_size=2).map(lambda some: {"allOf": some}),
    st.lists(st.sampled_from(["string", "integer", "null", "array"]), min_size=1, unique=True).map(
        lambda types: {"type": types, "maxItems": 2, "maxLength": 4}
    ),
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from("abc"), values, min_size=1), branches, st.integers(0, 2**32))
def test_random_tools_are_refused_or_called_with_valid_arguments(
    tokenizer: Tokenizer, properties: Schema, shared: Schema, seed: int
) -> None:
    if "$ref" in shared:
        shared = {"type": ["null", "string"]}
    parameters = obj(properties) | {"$defs": {"shared": shared}}
    tools = [tool("f", parameters, strict=True)]
    spec = make_structure(None, tools, required=True, parallel=False)
    try:
        build_grammar(spec, TAGS)
    except InvalidRequest:
        return
    for calls in walked_calls(tokenizer, spec, tools, 4, seed):
        for _, arguments in calls:
            assert json.loads(arguments).keys() == properties.keys()
            validate(arguments, parameters)
