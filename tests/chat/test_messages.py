"""Reading messages and tools: history is kept, errors in the newest input name the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from chat_kit import INLINE, REASONING_FIELDS, REASONING_PARTS, json_values
from hypothesis import given
from hypothesis import strategies as st

from glmd.chat.history import HistoryReader, split_reasoning
from glmd.chat.messages import read_messages
from glmd.chat.tool_args import ArgTypeReader, record_arguments
from glmd.chat.tools import read_tools
from glmd.chat.types import AssistantMessage, SystemMessage, ToolCall, ToolMessage, UserMessage
from glmd.errors import InvalidRequest
from glmd.structured_output.request import make_structure


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
        AssistantMessage("Rain.", ""),
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


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"path": ', {"arguments": '{"path": '}),
        ('{"path": "a.py", "content": "im', {"path": "a.py"}),
        ('{"a": {"b": 1, "c": 2}, "d": [1', {"a": {"b": 1, "c": 2}}),
        ('{"a": 1, "b": 12', {"a": 1}),
        ('{"a": 1, "b": 1.', {"a": 1}),
        ('{"a": 1, "b": 1e', {"a": 1}),
        ('{"a": true', {"a": True}),
        ('{"a": 1, "b": NaN, "c": 2}', {"a": 1}),
        ("null", {}),
        ("[1]", {"arguments": "[1]"}),
        ("7", {"arguments": "7"}),
        (7, {"arguments": "7"}),
        ("{", {"arguments": "{"}),
        ("ls -l", {"arguments": "ls -l"}),
        ('"ls -l"', {"arguments": "ls -l"}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ('"null"', {}),
        ("[" * 100_000, {"arguments": "[" * 100_000}),
    ],
)
def test_what_can_be_read_of_malformed_arguments_is_kept(arguments: object, read: Any) -> None:
    message = read_messages([assistant(call("a", arguments=arguments))])[0]
    assert isinstance(message, AssistantMessage)
    assert message.calls[0].arguments == read


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4), st.data())
def test_cut_arguments_keep_a_beginning_of_the_arguments(
    arguments: dict[str, Any], data: st.DataObject
) -> None:
    text = json.dumps(arguments)
    cut = text[: data.draw(st.integers(1, len(text)))]
    kept = record_arguments(cut)
    if kept != {"arguments": cut}:
        assert list(kept.items()) == list(arguments.items())[: len(kept)]


REASONED = AssistantMessage("Rain.", "Ask.")


@pytest.mark.parametrize(
    "message",
    [
        *({"content": [part, {"type": "text", "text": "Rain."}]} for part in REASONING_PARTS),
        *({"content": "Rain."} | fields for fields in REASONING_FIELDS),
        *({"content": text} for text in INLINE),
        *({"content": [{"type": "text", "text": text}]} for text in INLINE),
        *({"content": text, "reasoning_content": None} for text in INLINE),
        *({"content": text, "reasoning_content": ""} for text in INLINE),
    ],
)
def test_reasoning_is_read_in_all_spellings(message: dict[str, Any]) -> None:
    assert read_messages([{"role": "assistant", **message}]) == [REASONED]


def test_open_webuis_lines_are_unquoted_and_unescaped() -> None:
    body = "&gt; a &lt; b\n&gt;\n&gt; c"
    block = (
        f'<details type="reasoning" done="true">\n<summary>Thought</summary>\n{body}\n</details>'
    )
    assert split_reasoning(f"{block}\nYes.") == ("a < b\n\nc", "Yes.")


@pytest.mark.parametrize(
    "text",
    [
        "Use </think> to close.",
        "Say <think>this</think>.",
        "<think>never closed",
        '<details type="reasoning">never closed',
        "<details>other</details>",
    ],
)
def test_tags_that_do_not_begin_and_close_are_text(text: str) -> None:
    assert read_messages([{"role": "assistant", "content": text}]) == [AssistantMessage(text, "")]


def test_reasoning_in_a_field_leaves_the_text_alone() -> None:
    text = "<think>x</think>y"
    message = {"role": "assistant", "content": text, "reasoning_content": "Ask."}
    assert read_messages([message]) == [AssistantMessage(text, "Ask.")]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
OMITTED = "[image omitted: this model reads text only]"


def test_images_in_history_are_replaced_and_listed() -> None:
    reader = HistoryReader()
    messages = read_messages(
        [
            {"role": "user", "content": [{"type": "text", "text": "See: "}, IMAGE]},
            assistant(call("a")),
            result("a", [IMAGE]),
        ],
        reader,
    )
    assert [message.text for message in messages] == [f"See: {OMITTED}", "", OMITTED]
    assert reader.omitted == [
        "messages[0].content[1]=image_url",
        "messages[2].content[0]=image_url",
    ]


@pytest.mark.parametrize(
    "earlier",
    [
        [],
        [{"role": "system", "content": "Be brief."}],
        [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": "Yes."}],
    ],
)
def test_an_image_in_the_newest_user_message_is_refused(earlier: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="reads text only") as caught:
        read_messages([*earlier, {"role": "user", "content": [IMAGE]}])
    assert caught.value.param == f"messages[{len(earlier)}].content[0]"


def test_what_a_tool_has_read_is_replaced_behind_its_result_unless_it_is_an_image() -> None:
    turn = [assistant(call("a")), result("a", "read")]
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": "x"}}
    read = read_messages([*turn, {"role": "user", "content": [file]}])
    assert read[-1] == UserMessage("[file a.pdf omitted: this model reads text only]")
    with pytest.raises(InvalidRequest, match="reads text only") as caught:
        read_messages([*turn, {"role": "user", "content": [file, IMAGE]}])
    assert caught.value.param == "messages[2].content[1]"


def test_only_the_newest_user_message_is_new() -> None:
    """A client that keeps a refused message can go on."""
    refused, next = {"role": "user", "content": [IMAGE]}, {"role": "user", "content": "Go on."}
    for earlier in ([], [{"role": "assistant", "content": "Yes."}]):
        assert read_messages([*earlier, refused, next])[-2:] == [
            UserMessage(OMITTED),
            UserMessage("Go on."),
        ]


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
    ("results", "texts"),
    [
        ([result("z", "?")], ["?"]),
        ([result("a", "1"), result("a", "?")], ["1", "?"]),
        ([result("z", "?"), result("a", "1")], ["1", "?"]),
        ([result("b", "2")], ["[no result]", "2"]),
        (
            [result("b", "2"), {"role": "user", "content": "?"}, result("a", "1")],
            ["[no result]", "2", "1"],
        ),
        ([{"role": "function", "name": "f", "content": "1"}], ["1"]),
    ],
)
def test_results_without_a_call_or_after_a_missing_result_are_kept(
    results: list[Any], texts: list[str]
) -> None:
    assert texts_of([assistant(call("a"), call("b")), *results]) == texts


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"tool_calls": {}}, AssistantMessage("", "")),
        ({"tool_calls": ["x"]}, AssistantMessage("", "", (ToolCall("", "unknown_tool", {}),))),
        (
            {"tool_calls": [call("a", name="")]},
            AssistantMessage("", "", (ToolCall("a", "unknown_tool", {}),)),
        ),
        (
            {"tool_calls": [{**call("a"), "id": 1}]},
            AssistantMessage("", "", (ToolCall("", "f", {}),)),
        ),
        (
            {"tool_calls": [{"type": "custom", "id": "a", "custom": {"name": "f", "input": "{x"}}]},
            AssistantMessage("", "", (ToolCall("a", "f", {"input": "{x"}),)),
        ),
        (
            {"function_call": {"name": "f", "arguments": '{"a": 1}'}},
            AssistantMessage("", "", (ToolCall("", "f", {"a": 1}),)),
        ),
        ({"content": 7, "reasoning_content": 1}, AssistantMessage("7", "")),
        (
            {"audio": {"id": "a"}},
            AssistantMessage("[audio omitted: this model reads text only]", ""),
        ),
    ],
)
def test_odd_turns_of_the_assistant_are_kept(message: Any, read: AssistantMessage) -> None:
    assert read_messages([{"role": "assistant", **message}]) == [read]


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
        ([{"type": "functon", "function": {"name": "f"}}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        (function() + function(), "tools[1].function.name"),
    ],
)
def test_the_error_for_a_malformed_tool_names_the_field(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_tools(tools)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("tools", "param"),
    [
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
        (function(parameters={"required": None}), "tools[0].function.parameters.required"),
        (function(parameters={"properties": None}), "tools[0].function.parameters.properties"),
        (function(parameters={"type": None}), "tools[0].function.parameters.type"),
        (function(parameters={"type": ["object", "null"]}), "tools[0].function.parameters.type"),
        (function(parameters={"type": "OBJECT"}), "tools[0].function.parameters.type"),
        (
            function(parameters={"properties": {"a": {"required": True}}}),
            "tools[0].function.parameters.properties.a.required",
        ),
        (
            function(parameters={"properties": {"a": {"type": "any"}}}),
            "tools[0].function.parameters.properties.a.type",
        ),
        (
            function(parameters={"properties": {"a": {"enum": None}}}),
            "tools[0].function.parameters.properties.a.enum",
        ),
    ],
)
def test_a_sloppy_schema_is_an_error_only_where_calls_must_follow_it(
    tools: Any, param: str
) -> None:
    ignored: list[str] = []
    (tool,) = read_tools(tools, ignored)
    assert ignored == [param]
    assert tool.definition == tools[0]
    ArgTypeReader(tool.parameters).arguments()
    assert make_structure(None, [tool]).calls == "free"
    with pytest.raises(InvalidRequest) as forced:
        make_structure(None, [tool], required=True)
    tools[0]["function"]["strict"] = True
    with pytest.raises(InvalidRequest) as strict:
        read_tools(tools)
    assert forced.value.param == strict.value.param == param


def test_the_types_that_a_sloppy_schema_does_tell_are_used() -> None:
    parameters: dict[str, Any] = {
        "type": "OBJECT",
        "required": None,
        "properties": {
            "a": {"type": "string", "required": True},
            "b": {"type": "INTEGER"},
            "c": {"type": "any"},
            "d": {"$ref": "#/$defs/Nope"},
        },
    }
    types = ArgTypeReader(parameters).arguments()
    assert [types[name].json_of("12") for name in "abcd"] == ['"12"', "12", "12", "12"]


def test_a_deeply_nested_schema_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        read_tools(function(parameters={"properties": {"a": schema}}))


LOAD = {"type": "function", "function": {"name": "load", "parameters": {"type": "object"}}}


def deferred(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}, "defer_loading": True}


def referring(*names: str) -> dict[str, Any]:
    return result("a", [{"type": "tool_reference", "tool_name": name} for name in names])


def test_a_deferred_tool_is_described_where_it_is_first_referred_to() -> None:
    reader = HistoryReader(read_tools([LOAD, deferred("paint"), deferred("print")]))
    assert [tool.name for tool in reader.offered] == ["load"]
    turn = [assistant(call("a", "load")), referring("paint")]
    texts = [message.text for message in read_messages([*turn, *turn], reader)]
    assert texts[1] == (
        "These tools can be called from now on:\n<tools>\n"
        '{"type": "function", "function": {"name": "paint"}}\n</tools>'
    )
    assert texts[3] == "Available tools: paint"
    assert [tool.name for tool in reader.offered] == ["load", "paint"]
    assert [tool.name for tool in reader.tools.values()] == ["load", "paint", "print"]
    assert reader.omitted == []


def test_a_reference_to_an_unknown_tool_is_listed() -> None:
    reader = HistoryReader()
    (message,) = read_messages([referring("nope")], reader)
    assert message.text == "Available tools: nope (not defined)"
    assert reader.omitted == ["messages[0].content[0]=tool_reference"]


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
