"""Read messages in the shape of OpenAI's chat API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmd.chat.history import (
    REASONING_FIELDS,
    AssistantTurn,
    HistoryReader,
    NewestInput,
    reasoning_of,
)
from glmd.chat.tools import order_tool_results
from glmd.chat.types import (
    MAX_MESSAGES,
    AssistantMessage,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
    check_count,
)
from glmd.errors import invalid_field


def read_messages(
    raw: Sequence[Mapping[str, Any]], reader: HistoryReader | None = None
) -> list[Message]:
    """Messages in the order of the prompt.

    Args:
        reader: takes what is left out, and has the tools. None: there are no tools.

    Raises:
        InvalidRequest: the newest input is malformed; names the field, such as
            `messages[3].content[1]`.
    """
    if not raw:
        raise invalid_field("messages", "at least one message is required.")
    check_count(raw, MAX_MESSAGES, "messages")
    reader = reader or HistoryReader()
    newest = NewestInput.of([_kind(message) for message in raw])
    messages = []
    for index, message in enumerate(raw):
        param, is_new = f"messages[{index}]", index >= newest.start
        if is_new and _kind(message) == "user":
            reader.refuse_images(message.get("content"), f"{param}.content")
        strict = is_new and newest.is_strict
        messages.append(_read_message(message, param, reader, strict=strict))
    return order_tool_results(messages)


def _kind(raw: object) -> str:
    role = raw.get("role") if isinstance(raw, Mapping) else None
    return "tool" if role == "function" else str(role)


def _read_message(raw: object, param: str, reader: HistoryReader, *, strict: bool) -> Message:
    if not isinstance(raw, Mapping):
        raise invalid_field(param, "must be an object.")
    role, content, where = raw.get("role"), raw.get("content"), f"{param}.content"
    match role:
        case "assistant":
            return _read_assistant(raw, param, reader)
        case "tool" | "function":
            id = raw.get("tool_call_id")
            return ToolMessage(reader.text(content, where), id if isinstance(id, str) else None)
        case "system" | "developer":
            return SystemMessage(reader.text(content, where, strict=strict))
        case _ if role != "user" and strict:
            raise invalid_field(
                f"{param}.role", "must be system, developer, user, assistant or tool."
            )
        case _:
            return UserMessage(reader.text(content, where, strict=strict))


def _read_assistant(raw: Mapping[str, Any], param: str, reader: HistoryReader) -> AssistantMessage:
    turn = AssistantTurn()
    reader.assistant_parts(raw.get("content"), f"{param}.content", turn)
    if isinstance(raw.get("refusal"), str):
        turn.texts.append(raw["refusal"])
    if isinstance(raw.get("audio"), Mapping):
        transcript = raw["audio"].get("transcript")
        turn.texts.append(
            transcript
            if isinstance(transcript, str)
            else reader.part({"type": "audio"}, f"{param}.audio")
        )
    if not any(turn.reasoning):
        found = (reasoning_of(raw.get(name)) for name in REASONING_FIELDS)
        turn.reasoning = [next(filter(None, found), "")]
    calls = raw.get("tool_calls")
    if isinstance(calls, list):
        turn.calls += [
            reader.call(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    elif calls is not None:
        reader.omit("tool_calls", f"{param}.tool_calls")
    if isinstance(raw.get("function_call"), Mapping):  # deprecated by OpenAI
        turn.calls.append(reader.call(raw["function_call"], f"{param}.function_call"))
    return turn.message()
