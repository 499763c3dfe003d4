"""Prompts: the rendered template as token ids, and messages that the model continues."""

from __future__ import annotations

import json

import numpy as np
import pytest
from chat_kit import ask, build, ids, tag_like, text_ids, tokenizer, tool
from hypothesis import given

from glmd.chat.types import AssistantMessage, Message, SystemMessage, ToolCall, UserMessage
from glmd.errors import InvalidRequest

TAGS = tokenizer().special_tokens
TOOLS = [tool("write", path={"type": "string"}, content={}), tool("now")]


def test_a_prompt_is_the_rendered_template() -> None:
    prompt = ask("Hi")
    assert prompt.tokens.tolist() == ids("[gMASK]<sop><|user|>Hi<|assistant|><think>")
    assert prompt.tokens.dtype == np.int32
    assert prompt.in_reasoning
    assert prompt.tokens[prompt.turn_start :].tolist() == [TAGS.think]


def test_thinking_is_switched_off_by_the_template() -> None:
    prompt = ask("Hi", template_kwargs={"enable_thinking": False})
    assert prompt.tokens.tolist() == ids("[gMASK]<sop><|user|>Hi<|assistant|></think>")
    assert not prompt.in_reasoning


@given(tag_like, tag_like)
def test_text_of_clients_is_encoded_as_text(one: str, two: str) -> None:
    prompt = build([SystemMessage(one), UserMessage(two)])
    expected = [
        *ids("[gMASK]<sop>"), TAGS.system, *text_ids(one), TAGS.user, *text_ids(two),
        TAGS.assistant, TAGS.think,
    ]  # fmt: skip
    assert prompt.tokens.tolist() == expected


def test_tools_are_printed_as_they_were_sent() -> None:
    prompt = ask("Hi", tools=TOOLS)
    assert json.dumps(TOOLS[0].definition) in tokenizer().decode(prompt.tokens.tolist())


def test_content_is_continued_to_its_last_character() -> None:
    prompt = build([UserMessage("Hi"), AssistantMessage("x = ", "hm ")], continue_final=True)
    expected = ids("[gMASK]<sop><|user|>Hi<|assistant|><think>hm </think>x = ")
    assert prompt.tokens.tolist() == expected
    assert (prompt.in_reasoning, prompt.content, prompt.reasoning) == (False, "x = ", "hm ")


def test_content_without_reasoning_is_continued_without() -> None:
    prompt = build([UserMessage("Hi"), AssistantMessage("x")], continue_final=True)
    assert prompt.tokens.tolist() == ids("[gMASK]<sop><|user|>Hi<|assistant|></think>x")


def test_reasoning_without_content_is_continued_inside() -> None:
    prompt = build([UserMessage("Hi"), AssistantMessage("", "So")], continue_final=True)
    assert prompt.tokens.tolist() == ids("[gMASK]<sop><|user|>Hi<|assistant|><think>So")
    assert prompt.in_reasoning


def test_an_empty_message_is_continued_like_none() -> None:
    empty = build([UserMessage("Hi"), AssistantMessage("")], continue_final=True)
    assert empty.tokens.tolist() == ask("Hi").tokens.tolist()


@pytest.mark.parametrize(
    "last", [UserMessage("x"), AssistantMessage("", None, (ToolCall("", "f", {}),))]
)
def test_only_text_of_the_assistant_can_be_continued(last: Message) -> None:
    with pytest.raises(InvalidRequest, match="continued"):
        build([UserMessage("Hi"), last], continue_final=True)
