"""The demo checkpoint's tokenizer and chat template keep GLM-4.7-Flash's conventions."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from tokenizers import Tokenizer

CHECKPOINT = ROOT / "demo" / "glm-4.7-flash-demo"
SPECIAL = [
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>",
]  # fmt: skip
ADDED = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
]  # fmt: skip
PREFIX = "[gMASK]<sop>"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}

tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def compiled(**options: Any) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)
    return environment.from_string((CHECKPOINT / "chat_template.jinja").read_text())


PLAIN = compiled()
TRIMMED = compiled(trim_blocks=True, lstrip_blocks=True)


def render(*messages: dict[str, Any], **settings: Any) -> str:
    """Render a conversation; the result must not depend on Jinja's whitespace settings."""
    text = PLAIN.render(messages=list(messages), **settings)
    assert text == TRIMMED.render(messages=list(messages), **settings)
    return text


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def encoded(text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@given(st.text())
def test_tokenizer_round_trips_any_text(text: str) -> None:
    assert tokenizer.decode(encoded(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("tag", SPECIAL + ADDED)
def test_every_tag_is_one_token(tag: str) -> None:
    tokens = tokenizer.encode(f"a{tag}b", add_special_tokens=False).tokens
    assert tokens == ["a", tag, "b"]


def test_role_tags_are_special_and_think_and_tool_tags_are_not() -> None:
    added = tokenizer.get_added_tokens_decoder().values()
    flags = {token.content: token.special for token in added}
    assert all(flags[tag] for tag in SPECIAL)
    assert not any(flags[tag] for tag in ADDED)


def test_each_digit_is_one_token() -> None:
    assert encoded("2031") == [encoded(digit)[0] for digit in "2031"]


@pytest.mark.parametrize("before", ["", " ", '"', "<arg_value>", "("])
def test_a_name_has_the_same_tokens_in_any_context(before: str) -> None:
    assert encoded(before + "Kavira") == encoded(before) + encoded("Kavira")


def test_generation_prompt_opens_or_closes_the_reasoning() -> None:
    asked = PREFIX + "<|user|>Hi<|assistant|>"
    assert render(user("Hi"), add_generation_prompt=True) == asked + "<think>"
    on = render(user("Hi"), add_generation_prompt=True, enable_thinking=True)
    off = render(user("Hi"), add_generation_prompt=True, enable_thinking=False)
    assert (on, off) == (asked + "<think>", asked + "</think>")


def test_null_is_different_from_the_default() -> None:
    text = render(user("Hi"), add_generation_prompt=True, enable_thinking=None)
    assert text.endswith("<|assistant|></think>")


def test_tools_are_one_per_line_in_a_system_block_before_the_system_message() -> None:
    text = render({"role": "system", "content": "Be brief."}, user("Hi"), tools=[TOOL, TOOL])
    head, _, rest = text.partition("<tools>\n")
    assert head.startswith(PREFIX + "<|system|># Tools\n")
    listed, _, rest = rest.partition("\n</tools>")
    assert [json.loads(line) for line in listed.splitlines()] == [TOOL, TOOL]
    assert rest.endswith("</tool_call><|system|>Be brief.<|user|>Hi")


def test_reasoning_of_earlier_turns_is_kept_only_on_request() -> None:
    turns = [user("1"), assistant(" one ", reasoning_content=" r "), user("2")]
    bare = PREFIX + "<|user|>1<|assistant|></think>one<|user|>2"
    assert render(*turns) == bare
    assert render(*turns, clear_thinking=True) == bare
    kept = PREFIX + "<|user|>1<|assistant|><think>r</think>one<|user|>2"
    assert render(*turns, clear_thinking=False) == kept


def test_reasoning_after_the_last_user_message_is_always_kept() -> None:
    call = {"function": {"name": "now", "arguments": {}}}
    text = render(
        user("1"),
        assistant("", reasoning_content="r", tool_calls=[call]),
        {"role": "tool", "content": "12"},
        clear_thinking=True,
    )
    assert text == (
        PREFIX + "<|user|>1<|assistant|><think>r</think><tool_call>now</tool_call>"
        "<|observation|><tool_response>12</tool_response>"
    )


def test_reasoning_tags_in_the_content_are_reasoning() -> None:
    text = render(user("1"), assistant("<think>r</think>\n\nx"), clear_thinking=False)
    assert text == PREFIX + "<|user|>1<|assistant|><think>r</think>x"


def test_string_arguments_are_raw_and_all_others_are_json() -> None:
    arguments = {"s": 'a "b" \\n', "n": 3, "x": 1.5, "b": True, "z": None, "l": ["p", 1], "o": {}}
    call = {"function": {"name": "f", "arguments": arguments}}
    values = ['a "b" \\n', "3", "1.5", "true", "null", '["p", 1]', "{}"]
    pairs = "".join(
        f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"
        for key, value in zip(arguments, values, strict=True)
    )
    text = render(user("1"), assistant("So: ", tool_calls=[call, call]))
    made = f"<tool_call>f{pairs}</tool_call>"
    assert text == f"{PREFIX}<|user|>1<|assistant|></think>So:{made}{made}"


def test_consecutive_tool_results_share_one_observation() -> None:
    result = {"role": "tool", "content": "12"}
    text = render(user("1"), result, result, user("2"), result)
    response = "<tool_response>12</tool_response>"
    both = f"<|observation|>{response}{response}"
    assert text == f"{PREFIX}<|user|>1{both}<|user|>2<|observation|>{response}"


def test_text_parts_are_joined_and_unknown_roles_dropped() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(user(parts), {"role": "developer", "content": "x"}) == PREFIX + "<|user|>ab"
