"""No kind of message, block or item that the official SDKs know ends a conversation."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prompts import Ask, Message, Shown, chat, messages_api, responses
from sdk_unions import ANTHROPIC_MESSAGES, BLOCKS, CALLS, CHAT_MESSAGES, ITEMS, MARK, TOOLS, samples

from glmd.errors import InvalidRequest

ANSWER: Message = {"role": "assistant", "content": "Yes."}
NEXT: Message = {"role": "user", "content": "Go on."}


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


IMAGES: dict[Ask, Message] = {
    chat: {"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}},
    messages_api: {"type": "image", "source": {"type": "base64", "data": "x"}},
    responses: {"type": "input_image", "image_url": "data:image/png;base64,x"},
}
USE = {"type": "tool_use", "id": "a", "name": "load", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "Done."}
LOADED: dict[Ask, list[Message]] = {
    chat: [
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "load"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "Done."},
    ],
    messages_api: [
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [RESULT]},
    ],
    responses: [
        {"type": "function_call", "call_id": "a", "name": "load", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "Done."},
    ],
}
"""A call and its result."""


@pytest.mark.parametrize("ask", IMAGES)
def test_a_direct_image_in_the_newest_user_message_is_refused(ask: Ask) -> None:
    image = {"role": "user", "content": [{"type": "text", "text": "See:"}, IMAGES[ask]]}
    for place in ([], [NEXT], [NEXT, ANSWER], [NEXT, *LOADED[ask]]):
        with pytest.raises(InvalidRequest, match="reads text only") as caught:
            ask([*place, image])
        assert "content[1]" in str(caught.value.param)
        for later in ([NEXT], [ANSWER, NEXT], LOADED[ask]):
            assert "[image omitted" in ask([*place, image, *later]).prompt


def test_an_image_beside_tool_results_is_refused_and_a_document_replaced() -> None:
    """As Claude Code sends what a user adds, and what a tool has read."""
    image = IMAGES[messages_api]
    document = {"type": "document", "source": {"type": "base64", "data": "x"}}
    call, _ = LOADED[messages_api]
    read = messages_api([NEXT, call, {"role": "user", "content": [RESULT, document]}])
    assert "[file omitted" in read.prompt
    for content in ([RESULT, image], [RESULT, document, image]):
        with pytest.raises(InvalidRequest, match="reads text only") as caught:
            messages_api([NEXT, call, {"role": "user", "content": content}])
        assert caught.value.param == f"messages[2].content[{len(content) - 1}]"


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
        shown = responses(in_history([NEXT, sample]))
        if sample["type"] != "configuration_update":  # applied, not shown
            check_shown(shown, sample)
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
