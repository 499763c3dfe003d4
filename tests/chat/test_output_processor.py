"""Output processing: reasoning, content and calls, exactly as the model wrote them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_kit import (
    SPELLINGS,
    answer,
    backend,
    fold,
    ids,
    json_values,
    outputs,
    prompt,
    tag_like,
    text_ids,
    texts,
    tokenizer,
    tool,
    whole_or_pieces,
    written,
)
from hypothesis import given
from hypothesis import strategies as st

from glmd.chat.output_processor import ChatOutputProcessor, CompletionOutputProcessor
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.tools import read_tools
from glmd.chat.types import Prompt, Tool, ToolCallDelta, ToolCallStart

STRING = {"type": "string"}
WRITE = tool("write", path=STRING, content=STRING, mode={"type": ["string", "null"]})
GET = tool("get_weather", city=STRING, days={"type": "integer"})
NOW = tool("now")
TOOLS = [WRITE, GET, NOW]

garbage = st.lists(
    st.one_of(
        st.sampled_from([tokenizer().controls[name] for name in SPELLINGS]),
        st.integers(0, tokenizer().vocab_size - 1),
        st.sampled_from(text_ids("write path content \n mode 1")),
    ),
    max_size=40,
)
finishes = st.sampled_from(["stop", "length"])
splits = st.lists(st.integers(1, 7), max_size=20)


def call(name: str, *arguments: tuple[str, str]) -> str:
    inner = "".join(
        f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in arguments
    )
    return f"<tool_call>{name}{inner}</tool_call>"


# Reasoning and content


def test_reasoning_comes_before_content() -> None:
    whole = answer("Two and two.</think>Four.", in_reasoning=True)
    assert (whole.reasoning, whole.content, whole.finish) == ("Two and two.", "Four.", "stop")


def test_cut_reasoning_is_not_content() -> None:
    whole = answer("Two and", in_reasoning=True, finish="length")
    assert (whole.reasoning, whole.content, whole.finish) == ("Two and", "", "length")


def test_without_thinking_all_text_is_content() -> None:
    assert answer("Four.").content == "Four."


def test_a_generated_think_tag_opens_the_reasoning() -> None:
    whole = answer("<think>Two.</think>Four.<think>Really?</think> Yes.")
    assert (whole.reasoning, whole.content) == ("Two.Really?", "Four. Yes.")


def test_misplaced_tags_are_dropped() -> None:
    whole = answer("a</think>b</arg_value>c<|assistant|>d</tool_call>e<tool_response>f")
    assert whole.content == "abcdef"


@given(tag_like, tag_like)
def test_text_that_spells_tags_is_text_in_reasoning_and_content(one: str, two: str) -> None:
    generated = [*text_ids(one), tokenizer().special_tokens.end_think, *text_ids(two)]
    whole = whole_or_pieces(generated, in_reasoning=True, tools=TOOLS)
    assert (whole.reasoning, whole.content, whole.calls) == (one, two, [])


def test_content_keeps_the_whitespace_around_it() -> None:
    assert answer("\n\n  x = 1\n").content == "\n\n  x = 1\n"
    assert answer("\n").content == "\n"


def test_whitespace_between_tags_and_calls_is_not_content() -> None:
    text = f"</think>\n{call('now')}\n{call('now')}\n\n"
    whole = answer(text, tools=TOOLS, in_reasoning=True)
    assert (whole.content, len(whole.calls)) == ("", 2)
    assert answer(f"Wait.\n{call('now')}\n", tools=TOOLS).content == "Wait.\n"


# Calls


def test_a_call_after_content_has_name_and_arguments() -> None:
    whole = answer("Let me see." + call("get_weather", ("city", "Oslo")), tools=TOOLS)
    assert whole.content == "Let me see."
    assert whole.objects == [("get_weather", {"city": "Oslo"})]
    assert whole.finish == "tool_calls"


@pytest.mark.parametrize("text", ["So", "So</think>"])
def test_a_call_may_follow_the_reasoning_or_stand_inside_it(text: str) -> None:
    whole = answer(text + call("now"), tools=TOOLS, in_reasoning=True)
    assert (whole.reasoning, whole.content) == ("So", "")
    assert whole.calls == [("now", "{}")]


def test_reasoning_continues_after_a_call_inside_it() -> None:
    whole = answer(f"a{call('now')}b</think>c", tools=TOOLS, in_reasoning=True)
    assert (whole.reasoning, whole.content, whole.calls) == ("ab", "c", [("now", "{}")])


def test_several_calls_come_in_order_with_distinct_ids() -> None:
    text = call("get_weather", ("city", "Oslo")) + call("now") + call("write", ("path", "a"))
    whole = answer(text, tools=TOOLS)
    assert [name for name, _ in whole.calls] == ["get_weather", "now", "write"]
    assert len(set(whole.call_ids)) == 3
    assert all(id.startswith("call_") for id in whole.call_ids)


@pytest.mark.parametrize(
    "inner",
    ["now", "now\n", "\nnow\n", "now<arg_key></arg_key><arg_value></arg_value>", " now "],
)
def test_a_call_without_arguments_has_an_empty_object(inner: str) -> None:
    assert answer(f"<tool_call>{inner}</tool_call>", tools=TOOLS).calls == [("now", "{}")]


def test_newlines_between_tags_are_ignored() -> None:
    text = (
        "<tool_call>write\n<arg_key>path</arg_key>\n<arg_value>a b</arg_value>\n"
        "<arg_key> content </arg_key>\n<arg_value>\n x\n</arg_value>\n</tool_call>"
    )
    assert answer(text, tools=TOOLS).objects == [("write", {"path": "a b", "content": "\n x\n"})]


CODE = "\n\tdef f():\n\t    return \"</arg_value>\", '\\n'  \n\n"


def test_a_string_is_verbatim_to_its_last_space_and_newline() -> None:
    whole = whole_or_pieces(written("write", {"content": CODE}), tools=TOOLS)
    assert whole.objects == [("write", {"content": CODE})]


@pytest.mark.parametrize("name", SPELLINGS)
def test_text_that_spells_a_tag_stays_in_its_string(name: str) -> None:
    text = f"a{name}b{name}"
    whole = whole_or_pieces(written("write", {"content": text}), tools=TOOLS)
    assert whole.objects == [("write", {"content": text})]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_control_token_inside_a_string_becomes_its_spelling(name: str) -> None:
    text = f"see {name} there"
    generated = ids("<tool_call>write<arg_key>content</arg_key><arg_value>") + ids(text)
    generated += ids("</arg_value></tool_call>")
    whole = whole_or_pieces(generated, tools=TOOLS)
    assert whole.objects == [("write", {"content": text})]


def test_the_tools_schema_decides_the_types_of_values() -> None:
    tools = [
        tool(
            "f",
            zip=STRING,
            count={"type": "integer"},
            note={"type": ["string", "null"]},
            tags={"type": "array", "items": STRING},
            where={"anyOf": [{"type": "object"}, {"type": "null"}]},
        )
    ]
    arguments = {
        "zip": "01234",
        "count": 3,
        "note": "123",
        "tags": ["1", "b"],
        "where": {"x": None},
    }
    whole = whole_or_pieces(written("f", arguments), tools=tools)
    assert whole.objects == [("f", arguments)]
    assert answer(written("f", {"note": None}), tools=tools).objects == [("f", {"note": None})]


def test_without_a_schema_a_value_is_json_if_it_parses_else_a_string() -> None:
    arguments = {"a": 1, "b": "x y", "c": [None], "d": {"e": True}}
    assert answer(written("unknown", arguments), tools=TOOLS).objects == [("unknown", arguments)]
    assert answer(written("now", arguments), tools=TOOLS).objects == [("now", arguments)]


types = {"string": STRING, "nothing": {}, "union": {"type": ["string", "null", "integer"]}}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["f", "gü", "get_it"]),
            st.dictionaries(
                texts.map(str.strip).filter(bool),
                st.one_of(
                    st.tuples(st.just("string"), st.one_of(texts, tag_like)),
                    st.tuples(st.just("any"), json_values),
                ),
                max_size=4,
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.integers(1, 20)),
)
def test_calls_in_the_templates_format_are_read_unchanged(
    calls: list[tuple[str, dict[str, tuple[str, Any]]]], sizes: list[int]
) -> None:
    """Each value has a schema of its type, and each tool a distinct name."""
    tools: list[Tool] = []
    generated: list[int] = []
    expected = []
    for index, (name, arguments) in enumerate(calls):
        named = f"{name}{index}"
        schema = {
            key: STRING if isinstance(value, str) else {"type": type_name(value)}
            for key, (_, value) in arguments.items()
        }
        values = {key: value for key, (_, value) in arguments.items()}
        tools.append(tool(named, **schema))
        generated += written(named, values)
        expected.append((named, values))
    whole = whole_or_pieces(generated, tools=tools)
    assert whole.objects == expected
    assert [list(read) for _, read in whole.objects] == [list(values) for _, values in expected]
    chunked = answer(generated, tools=tools, sizes=sizes)
    assert chunked.calls == whole.calls
    assert whole.finish == "tool_calls"


def type_name(value: object) -> str:
    names = {type(None): "null", bool: "boolean", int: "integer", float: "number", list: "array"}
    return names.get(type(value), "object")


def test_the_name_is_streamed_first_and_a_string_as_it_arrives() -> None:
    processor = ChatOutputProcessor(tokenizer(), prompt(False), tools=TOOLS)
    events: list[object] = []
    for token in ids(call("write", ("content", "The quick brown fox"), ("mode", "null"))):
        events += processor.feed(outputs([token], None)[0])
    start, *deltas = events
    assert isinstance(start, ToolCallStart)
    assert start.name == "write"
    pieces = [delta.arguments for delta in deltas if isinstance(delta, ToolCallDelta)]
    assert pieces[0] == '{"content": '
    assert len(pieces) >= 5 + len(text_ids("The quick brown fox"))
    assert "".join(pieces) == '{"content": "The quick brown fox", "mode": null}'


def test_one_byte_per_token_gives_the_same_text() -> None:
    text = "Grüße 你好 🙂"
    byte = {tokenizer().token_bytes(id): id for id in range(tokenizer().vocab_size)}
    single = [byte[bytes([one])] for one in text.encode()]
    tags = tokenizer().special_tokens
    key = [tags.tool_call, *text_ids("write"), tags.arg_key, *text_ids("content"), tags.end_arg_key]
    end = [tags.end_arg_value, tags.end_tool_call]
    whole = whole_or_pieces([*single, *key, tags.arg_value, *single, *end], tools=TOOLS)
    assert (whole.content, whole.objects) == (text, [("write", {"content": text})])


# Malformed calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<tool_call></tool_call>", []),
        ("<tool_call>\n<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", []),
        ("<tool_call><tool_call>now</tool_call>", ["now {}"]),
        ("<tool_call>now<tool_call>now</tool_call>", ["now {}", "now {}"]),
        ("<tool_call>f<arg_key>a</arg_key></tool_call>", ["f {}"]),
        ("<tool_call>f<arg_value>1</arg_value></tool_call>", ["f {}"]),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_key>b</arg_key><arg_value>1</arg_value></tool_call>",
            ['f {"b": 1}'],
        ),
        (call("f", ("a", "1"), ("a", "2"), ("b", "3")), ['f {"a": 1, "b": 3}']),
        ("<tool_call>f<arg_key>a<arg_value>1</arg_value></tool_call>", ['f {"a": 1}']),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>\n" + call("g"),
            ['f {"a": 1}', "g {}"],
        ),
        ("<tool_call>f<arg_key>a</arg_key>x<arg_value>1</arg_value></tool_call>", ['f {"a": 1}']),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>x</tool_call>" + call("g"),
            ['f {"a": "x"}', "g {}"],
        ),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value>y</arg_value></tool_call>",
            ['f {"a": "x</arg_value>y"}'],
        ),
    ],
)
def test_a_malformed_call_is_read_as_documented(text: str, calls: list[str]) -> None:
    whole = whole_or_pieces(ids(text), tools=TOOLS)
    assert [f"{name} {arguments}" for name, arguments in whole.calls] == calls
    assert whole.content == ""


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<tool_call>now", ["now {}"]),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>", ['f {"a": 1}']),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>\n", ['f {"a": 1}']),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>1</tool_call>", ['f {"a": 1}']),
        ("<tool_call>write<arg_key>path</arg_key><arg_value>x", ['write {"path": "x']),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>[1, 2", ['f {"a": ']),
        ("<tool_call>f<arg_key>a</arg_key>", ["f "]),
    ],
)
def test_at_an_end_token_a_missing_tag_is_added_but_never_the_end_of_a_value(
    text: str, calls: list[str]
) -> None:
    whole = answer(text, tools=TOOLS)
    assert [f"{name} {arguments}" for name, arguments in whole.calls] == calls
    assert whole.finish == "tool_calls"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<tool_call>get_wea", []),
        ("<tool_call>get_weather", []),
        ("<tool_call>get_weather<arg_key>ci", ["get_weather "]),
        (
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Os",
            ['get_weather {"city": "Os'],
        ),
        (
            "<tool_call>get_weather<arg_key>days</arg_key><arg_value>1",
            ['get_weather {"days": '],
        ),
        # An argument may be missing.
        (
            call("get_weather", ("city", "Oslo")).removesuffix("</tool_call>"),
            ['get_weather {"city": "Oslo"'],
        ),
        # No argument is missing.
        (
            call("get_weather", ("city", "Oslo"), ("days", "2")).removesuffix("</tool_call>"),
            ['get_weather {"city": "Oslo", "days": 2}'],
        ),
        (call("now") + "<tool_call>no", ["now {}"]),
    ],
)
def test_at_the_length_limit_nothing_is_added_and_the_finish_is_length(
    text: str, calls: list[str]
) -> None:
    whole = answer(text, tools=TOOLS, finish="length")
    assert [f"{name} {arguments}" for name, arguments in whole.calls] == calls
    assert whole.finish == "length"


@given(garbage, finishes, splits, st.booleans())
def test_any_output_gives_an_answer_that_does_not_depend_on_its_chunks(
    generated: list[int], finish: Any, sizes: list[int], in_reasoning: bool
) -> None:
    whole = whole_or_pieces(generated, sizes, tools=TOOLS, finish=finish, in_reasoning=in_reasoning)
    assert whole.finish in ("stop", "length", "tool_calls")
    for name, arguments in whole.calls[:-1]:
        assert name
        if arguments.endswith("}"):
            assert isinstance(json.loads(arguments), dict)


@given(garbage, finishes, splits)
def test_without_allowed_tools_no_markup_and_no_call_is_shown(
    generated: list[int], finish: Any, sizes: list[int]
) -> None:
    whole = whole_or_pieces(generated, sizes, finish=finish)
    assert whole.calls == []
    assert whole.finish in ("stop", "length")


def test_a_call_that_is_not_allowed_is_dropped() -> None:
    whole = answer("a" + call("get_weather", ("city", "Oslo")) + "b")
    assert (whole.content, whole.calls, whole.finish) == ("ab", [], "stop")


def test_a_stop_token_that_ends_a_call_is_part_of_it() -> None:
    whole = answer(ids(call("now")), tools=TOOLS, finish="stop")
    assert (whole.calls, whole.finish) == ([("now", "{}")], "tool_calls")


# Ends, counts, log-probabilities


def test_any_end_token_is_hidden() -> None:
    assert answer([*text_ids("ab"), *text_ids("!")], finish="stop").content == "ab"


def test_a_cancelled_answer_gives_its_last_text_and_no_finish() -> None:
    whole = answer(text_ids("🙂")[:1], finish="cancelled")
    assert (whole.content, whole.finish) == ("\ufffd", None)


def test_tokens_are_counted_by_section() -> None:
    processor = ChatOutputProcessor(tokenizer(), prompt(True), tools=TOOLS)
    reasoning, rest = ids("So it is.</think>"), ids("Yes.<|user|>")
    for output in outputs(reasoning + rest, "stop", sizes=[3, 2]):
        processor.feed(output)
    assert processor.reasoning_tokens == len(reasoning)
    assert processor.completion_tokens == len(reasoning + rest)


@given(texts, texts, st.lists(st.integers(1, 5)))
def test_each_token_belongs_to_one_delta(reasoning: str, content: str, sizes: list[int]) -> None:
    first, second = text_ids(reasoning), text_ids(content)
    generated = [*first, tokenizer().special_tokens.end_think, *second]
    whole = answer(generated, in_reasoning=True, sizes=sizes, logprobs=True, stop=["\0\0"])
    assert [info.id for info in whole.reasoning_tokens] == first
    assert [info.id for info in whole.content_tokens] == second
    assert (whole.reasoning, whole.content) == (reasoning, content)


def test_tokens_after_a_stop_string_are_not_reported() -> None:
    before = text_ids("The quick ")
    whole = answer([*before, *text_ids("<STOP> brown")], stop=["<STOP>"], logprobs=True)
    assert whole.content == "The quick "
    assert [info.id for info in whole.content_tokens] == before


def test_half_a_character_at_the_end_is_reported() -> None:
    half = text_ids("🙂")[:1]
    whole = answer(half, finish="length", logprobs=True)
    assert (whole.content, [info.id for info in whole.content_tokens]) == ("\ufffd", half)


@pytest.mark.parametrize("special", [False, True])
def test_tags_mean_the_same_whether_or_not_they_are_marked_special(special: bool) -> None:
    made = Tokenizer(backend(special=special), "tokenizer.json")
    processor = ChatOutputProcessor(made, prompt(True), tools=TOOLS)
    generated = ids("So.</think>" + call("now"))
    whole = fold(event for output in outputs(generated, "stop") for event in processor.feed(output))
    assert (whole.reasoning, whole.calls, whole.finish) == ("So.", [("now", "{}")], "tool_calls")
    assert processor.turn() is not None


# Continued turns


def test_an_answer_starts_where_its_prompt_ends() -> None:
    tokens = tokenizer().encode_markup("<|assistant|><think>Two and")
    continued = Prompt(tokens, in_reasoning=True, turn_start=1, turn_key=b"", reasoning="Two and")
    processor = ChatOutputProcessor(tokenizer(), continued)
    whole = fold(
        event
        for output in outputs(ids(" two.</think>Four."), "length")
        for event in processor.feed(output)
    )
    assert (whole.reasoning, whole.content) == (" two.", "Four.")


# Raw text


@given(st.lists(st.integers(0, tokenizer().vocab_size - 1), max_size=30))
def test_a_raw_completion_is_all_content_without_special_tokens(generated: list[int]) -> None:
    processor = CompletionOutputProcessor(tokenizer())
    events = [event for output in outputs(generated, "length") for event in processor.feed(output)]
    shown = [id for id in generated if id not in tokenizer().special]
    assert fold(events).content == tokenizer().decode(shown)
    assert fold(events).finish == "length"


def test_a_raw_completion_ends_at_its_stop_string_or_end_token() -> None:
    processor = CompletionOutputProcessor(tokenizer(), stop=["fox"])
    events = [
        event for output in outputs(ids("quick brown fox.")) for event in processor.feed(output)
    ]
    assert (fold(events).content, fold(events).stop_sequence) == ("quick brown ", "fox")
    assert processor.stopped
    processor = CompletionOutputProcessor(tokenizer())
    events = [
        event
        for output in outputs(ids("a</think><|user|>b<|endoftext|>"), "stop", logprobs=True)
        for event in processor.feed(output)
    ]
    assert (fold(events).content, fold(events).finish) == ("a</think>b", "stop")


def test_references_in_a_tools_schema_are_resolved() -> None:
    parameters = {
        "properties": {"unit": {"$ref": "#/$defs/Unit"}},
        "$defs": {"Unit": {"enum": ["1", "2"]}},
    }
    tools = read_tools([{"function": {"name": "f", "parameters": parameters}}])
    assert answer(call("f", ("unit", "1")), tools=tools).objects == [("f", {"unit": "1"})]
