"""Reading messages and tools: lenient where the meaning is clear, else errors name the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chat_kit import json_values
from hypothesis import given
from hypothesis import strategies as st

from glmd.chat.messages import read_messages, read_tools
from glmd.chat.types import AssistantMessage, SystemMessage, ToolCall, ToolMessage, UserMessage
from glmd.errors import InvalidRequest


def call(id: str, name: str = "f", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def result(id: str | None, content: Any = "") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def test_each_role_is_read() -> None:
    assert read_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "text", "text": "No jokes."}]},
            {"role": "user", "content": "Weather?", "name": "ann"},
            {**assistant(call("a", "weather", '{"city": "Oslo"}')), "reasoning_content": "Ask."},
            result("a", "rain"),
            {"role": "assistant", "content": "Rain.", "tool_calls": None, "refusal": None},
        ]
    ) == [
        SystemMessage("Be brief."),
        SystemMessage("No jokes."),
        UserMessage("Weather?"),
        AssistantMessage("", "Ask.", (ToolCall("a", "weather", {"city": "Oslo"}),)),
        ToolMessage("rain", "a"),
        AssistantMessage("Rain."),
    ]


@pytest.mark.parametrize("content", [None, "", []])
def test_absent_content_is_empty_text(content: object) -> None:
    assert read_messages([{"role": "user", "content": content}]) == [UserMessage("")]


def test_text_parts_are_joined_as_they_are() -> None:
    parts = [{"type": "text", "text": "a "}, "b", {"type": "input_text", "text": "\nc"}]
    assert read_messages([{"role": "user", "content": parts}]) == [UserMessage("a b\nc")]


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"b": 1, "a": [null, "x"]}', {"b": 1, "a": [None, "x"]}),
        ({"b": 1, "a": 2}, {"b": 1, "a": 2}),
        ("", {}),
        (" \n", {}),
        (None, {}),
    ],
)
def test_arguments_come_as_json_text_or_as_an_object_with_key_order_kept(
    arguments: object, read: dict[str, Any]
) -> None:
    message = read_messages([assistant(call("a", arguments=arguments))])[0]
    assert isinstance(message, AssistantMessage)
    assert message.calls[0].arguments == read
    assert list(message.calls[0].arguments) == list(read)


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", '"x"', 7, '{"a": NaN}', "[" * 100_000])
def test_malformed_arguments_are_named(arguments: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_messages([{"role": "user", "content": "x"}, assistant(call("a", arguments=arguments))])
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages[0]"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "critic", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 7}, "messages[0].content"),
        ({"role": "user", "content": {"text": "x"}}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [3]}, "messages[0].content[0]"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages[0].tool_calls[0]"),
        (assistant(call("a", name="")), "messages[0].tool_calls[0].function.name"),
        (assistant({**call("a"), "id": 1}), "messages[0].tool_calls[0].id"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[0].function_call"),
        ({"role": "assistant", "reasoning_content": 1}, "messages[0].reasoning_content"),
        (result("a"), "messages[0].tool_call_id"),
    ],
)
def test_the_error_for_a_malformed_message_names_the_field(message: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_messages([message])
    assert caught.value.param == param
    assert param.rsplit(".", maxsplit=1)[-1] in caught.value.message


def test_at_least_one_message_is_required() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_messages([])
    assert caught.value.param == "messages"


def texts_of(messages: list[Any]) -> list[str]:
    return [one.text for one in read_messages(messages) if isinstance(one, ToolMessage)]


def test_tool_results_are_put_in_the_order_of_their_calls() -> None:
    calls = assistant(call("a"), call("b"), call("c"))
    assert texts_of([calls, result("c", "3"), result("a", "1"), result("b", "2")]) == list("123")


def test_results_without_ids_answer_calls_in_order() -> None:
    calls = assistant(call("a"), call("b"))
    assert texts_of([calls, result(None, "1"), result(None, "2")]) == ["1", "2"]


def test_calls_with_one_id_are_answered_in_order() -> None:
    calls = assistant(call("x"), call("x"))
    assert texts_of([calls, result("x", "1"), result("x", "2")]) == ["1", "2"]


def test_the_same_id_may_come_again_in_a_later_turn() -> None:
    turn = [assistant(call("x")), result("x", "1")]
    assert texts_of([*turn, *turn]) == ["1", "1"]


def test_the_last_calls_need_no_result() -> None:
    calls = assistant(call("a"), call("b"))
    assert texts_of([calls, result("a", "1"), {"role": "user", "content": "stop"}]) == ["1"]


def test_results_may_come_in_two_runs() -> None:
    calls = assistant(call("a"), call("b"))
    user = {"role": "user", "content": "?"}
    assert texts_of([calls, result("a", "1"), user, result("b", "2")]) == ["1", "2"]


@pytest.mark.parametrize(
    ("results", "param"),
    [
        ([result("z")], "messages[1].tool_call_id"),
        ([result("a"), result("a")], "messages[2].tool_call_id"),
        ([result("b")], "messages[1]"),
        ([result("b"), {"role": "user", "content": "?"}, result("a")], "messages[2]"),
    ],
)
def test_a_result_without_a_call_or_after_a_missing_result_is_refused(
    results: list[Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_messages([assistant(call("a"), call("b")), *results])
    assert caught.value.param == param


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


def test_a_tools_definition_is_kept_as_sent() -> None:
    raw = function(description="d", parameters={"type": "object", "properties": {}}, strict=True)
    tool = read_tools(raw)[0]
    assert tool.definition == raw[0]
    assert list(tool.definition["function"]) == ["name", "description", "parameters", "strict"]  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [None, []])
def test_no_tools_are_an_empty_list(raw: list[Any] | None) -> None:
    assert read_tools(raw) == []


def test_a_tool_needs_no_parameters() -> None:
    assert read_tools(function())[0].parameters == {}
    assert read_tools(function(parameters=None))[0].parameters == {}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        (["f"], "tools[0]"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        (function() + function(), "tools[1].function.name"),
        (function(parameters="x"), "tools[0].function.parameters"),
        (function(parameters={"type": "array"}), "tools[0].function.parameters.type"),
        (function(parameters={"properties": []}), "tools[0].function.parameters.properties"),
        (function(parameters={"required": "a"}), "tools[0].function.parameters.required"),
        (
            function(parameters={"properties": {"a": {"type": "text"}}}),
            "tools[0].function.parameters.properties.a.type",
        ),
        (
            function(parameters={"properties": {"a": "string"}}),
            "tools[0].function.parameters.properties.a",
        ),
        (
            function(parameters={"properties": {"a": {"$ref": "#/$defs/Nope"}}}),
            "tools[0].function.parameters.properties.a.$ref",
        ),
        (
            function(parameters={"properties": {"a": {"$ref": "#/required/7"}}}),
            "tools[0].function.parameters.properties.a.$ref",
        ),
        (
            function(parameters={"properties": {"a": {"anyOf": [{"enum": 3}]}}}),
            "tools[0].function.parameters.properties.a.anyOf[0].enum",
        ),
    ],
)
def test_the_error_for_a_malformed_tool_names_the_field(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_tools(tools)
    assert caught.value.param == param


def test_a_deeply_nested_schema_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        read_tools(function(parameters={"properties": {"a": schema}}))


# Anything

names = st.sampled_from(["", "f", "a", "text", "input_text", "function", "{}", '{"a": NaN}', "["])
odd = json_values | names
parts = st.fixed_dictionaries({}, optional={"type": odd, "text": odd, "refusal": odd})
calls = st.fixed_dictionaries(
    {},
    optional={
        "id": odd,
        "function": odd | st.fixed_dictionaries({}, optional={"name": odd, "arguments": odd}),
    },
)
raw_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | odd},
    optional={
        "content": odd | st.lists(parts | odd, max_size=2),
        "reasoning_content": odd,
        "refusal": odd,
        "function_call": odd,
        "tool_calls": odd | st.lists(calls | odd, max_size=2),
        "tool_call_id": odd,
    },
)


def read_or_refused(read: Callable[[list[Any]], list[Any]], raw: list[Any], name: str) -> None:
    """Fail on every exception but `InvalidRequest`."""
    fault: str | None = name
    try:
        assert len(read(raw)) == len(raw)
    except InvalidRequest as error:
        fault = error.param
    assert (fault or "").startswith(name)


@given(st.lists(raw_messages | odd, max_size=4))
def test_any_messages_are_read_or_refused_by_name(raw: list[Any]) -> None:
    read_or_refused(read_messages, raw, "messages")


@given(
    st.lists(
        odd
        | st.fixed_dictionaries(
            {},
            optional={
                "type": st.just("function") | odd,
                "function": odd
                | st.fixed_dictionaries(
                    {}, optional={"name": odd, "description": odd, "parameters": odd}
                ),
            },
        ),
        max_size=3,
    )
)
def test_any_tools_are_read_or_refused_by_name(raw: list[Any]) -> None:
    read_or_refused(read_tools, raw, "tools")
