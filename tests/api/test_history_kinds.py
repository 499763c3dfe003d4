"""No kind of message, block or item that the official SDKs know ends a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from live import CHECKPOINT
from sdk_unions import ANTHROPIC_MESSAGES, BLOCKS, CALLS, CHAT_MESSAGES, ITEMS, MARK, TOOLS, samples

from glmd.api.anthropic import input as anthropic
from glmd.api.anthropic.protocol import CountTokensRequest
from glmd.api.generation_request import Defaults
from glmd.api.openai.protocol import ChatCompletionRequest
from glmd.api.responses.input import read_tools
from glmd.api.responses.input_items import read_input
from glmd.api.responses.protocol import ResponsesRequest
from glmd.chat.prompt import build_prompt
from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.types import Conversation
from glmd.config import Settings
from glmd.errors import InvalidRequest
from glmd.ipc import SamplingParams

Message = dict[str, Any]

ANSWER: Message = {"role": "assistant", "content": "Yes."}
NEXT: Message = {"role": "user", "content": "Go on."}
FUNCTION = {"name": "load", "description": "Loads.", "parameters": {"type": "object"}}
CHAT_TOOL = {"type": "function", "function": FUNCTION}
RESPONSES_TOOL = {"type": "function", **FUNCTION}
MESSAGES_TOOL = {"name": "load", "input_schema": {"type": "object"}}


TOKENIZER = Tokenizer.load(CHECKPOINT)
TEMPLATE = ChatTemplate.load(CHECKPOINT, TOKENIZER.controls)
DEFAULTS = Defaults.of(Settings(), SamplingParams())


@dataclass(frozen=True)
class Shown:
    """What the model sees of a conversation, and what it does not."""

    prompt: str
    omitted: Sequence[str]


Ask = Callable[..., Shown]


def show(conversation: Conversation) -> Shown:
    prompt = build_prompt(conversation, tokenizer=TOKENIZER, template=TEMPLATE)
    return Shown(TOKENIZER.decode(prompt.tokens.tolist()), conversation.omitted)


def chat(messages: list[Message], *tools: Message) -> Shown:
    body = {"messages": messages, "tools": [CHAT_TOOL, *tools]}
    return show(ChatCompletionRequest.model_validate(body).conversation(DEFAULTS))


def messages_api(messages: list[Message], *tools: Message) -> Shown:
    body = {"messages": messages, "tools": [MESSAGES_TOOL, *tools]}
    request = CountTokensRequest.model_validate(body)
    return show(request.conversation(DEFAULTS, anthropic.read_tools(request.tools)[0]))


def responses(items: list[Message], *tools: Message) -> Shown:
    body = {"input": items, "tools": [RESPONSES_TOOL, *tools]}
    request = ResponsesRequest.model_validate(body)
    read = read_input(request.new_input, None, {})
    return show(request.conversation(DEFAULTS, read, read_tools(request.tools)))


def in_history(place: list[Message]) -> list[Message]:
    """A conversation that goes on after what is in `place`."""
    return [*place, ANSWER, NEXT]


def check_shown(shown: Shown, sample: object) -> None:
    """The text of a sample is in the prompt, or a header says what is missing."""
    if MARK in str(sample):
        assert MARK in shown.prompt or shown.omitted


def check_alone(ask: Ask, *records: Message) -> None:
    """What is asked for now may be refused, by name."""
    try:
        ask(list(records))
    except InvalidRequest as error:
        assert "[0]" in str(error.param) or error.param == "input"  # noqa: PT017


def openings(sample: Message) -> Iterator[list[Message]]:
    """Messages of the chat and Messages APIs that hold a block."""
    for role in ("user", "assistant", "system"):
        yield [NEXT, {"role": role, "content": [sample, {"type": "text", "text": "And?"}]}]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_a_record(name: str) -> None:
    for sample in samples(BLOCKS[name]):
        told = [message for opening in openings(sample) for message in opening]
        call = {"id": "a", "type": "function", "function": {"name": "load", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": "a", "content": [sample]}
        use = {"type": "tool_use", "id": "a", "name": "load", "input": {}}
        block = {"type": "tool_result", "tool_use_id": "a", "content": [sample]}
        item = {"type": "function_call", "call_id": "a", "name": "load", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "a", "output": [sample]}
        turns: dict[Ask, list[Message]] = {
            chat: [{"role": "assistant", "tool_calls": [call]}, result],
            messages_api: [
                {"role": "assistant", "content": [use]},
                {"role": "user", "content": [block]},
            ],
            responses: [item, output],
        }
        for ask, turn in turns.items():
            check_shown(ask(in_history(told)), sample)
            check_shown(ask([NEXT, *turn]), sample)
            check_alone(ask, {"role": "user", "content": [sample]})


@pytest.mark.parametrize("name", ITEMS)
def test_every_input_item_is_a_record(name: str) -> None:
    for sample in samples(ITEMS[name]):
        check_shown(responses(in_history([NEXT, sample])), sample)
        check_alone(responses, sample)


@pytest.mark.parametrize("name", CHAT_MESSAGES)
def test_every_chat_message_is_a_record(name: str) -> None:
    for sample in samples(CHAT_MESSAGES[name]):
        check_shown(chat(in_history([NEXT, sample])), sample.get("content"))
        check_alone(chat, sample)


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_a_record(name: str) -> None:
    for sample in samples(CALLS[name]):
        check_shown(chat([NEXT, {"role": "assistant", "tool_calls": [sample]}, NEXT]), sample)


@pytest.mark.parametrize("name", ANTHROPIC_MESSAGES)
def test_every_message_of_the_messages_api_is_a_record(name: str) -> None:
    for sample in samples(ANTHROPIC_MESSAGES[name]):
        kept = {key: value for key, value in sample.items() if key != "clear_at"}
        check_shown(messages_api(in_history([NEXT, kept])), sample.get("content"))
        check_alone(messages_api, sample)


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_may_stand_beside_a_function(name: str) -> None:
    ask: Ask = responses if name.startswith("openai") else messages_api
    if "chat_completion" in name:
        ask = chat
    for sample in samples(TOOLS[name]):
        ask([NEXT], sample)


def test_a_conversation_of_all_kinds_goes_on(http: httpx.Client) -> None:
    blocks = [sample for kind in BLOCKS.values() for sample in samples(kind)]
    items = [sample for kind in ITEMS.values() for sample in samples(kind)]
    turns = [message for block in blocks for opening in openings(block) for message in opening]
    ask = {"role": "user", "content": "⟦</think>Yes.⟧"}
    bodies = {
        "/v1/chat/completions": {"messages": [*turns, ANSWER, ask]},
        "/v1/messages": {"messages": [*turns, ANSWER, ask], "max_tokens": 9},
        "/v1/responses": {"input": [*items, ANSWER, ask]},
    }
    for path, body in bodies.items():
        response = http.post(path, json=body)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:  # longer than the engine's context
            assert response.json()["error"]["message"].startswith(("messages", "input", "prompt"))
            assert "context" in response.text
