"""Anthropic's messages, blocks and tools in neutral form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glmd.api.generation_request import object_schema
from glmd.chat.history import AssistantTurn, HistoryReader, NewestInput
from glmd.chat.tools import numbered, order_tool_results, read_flat_tools
from glmd.chat.types import (
    MAX_BLOCKS,
    MAX_MESSAGES,
    Message,
    SystemMessage,
    Tool,
    ToolMessage,
    UserMessage,
    check_count,
)
from glmd.errors import invalid_field

SEPARATOR = "\n\n"
"""Between text blocks of the system, a user or a tool result. An assistant's text blocks are parts
of one text."""

ATTRIBUTION = "x-anthropic-billing-header:"
"""Start of a system block that Claude Code sends for Anthropic's accounting. It differs in each
request, so it would keep every prefix out of the cache; Anthropic's servers remove it too."""

# -- schemas for the OpenAPI document -----------------------------------------------------

TEXT: dict[str, Any] = {"type": "string"}


def text_or(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [TEXT, {"type": "array", "items": {"oneOf": list(blocks)}}]}


def message_schema(role: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": [role]}, "content": text_or(*blocks)},
    }


TEXT_BLOCK = object_schema("text", {"text": TEXT})
DOCUMENT = object_schema("document", {"source": object_schema("text", {"data": TEXT})})
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "oneOf": [
            message_schema(
                "user",
                TEXT_BLOCK,
                DOCUMENT,
                object_schema(
                    "tool_result",
                    {"tool_use_id": TEXT},
                    content=text_or(TEXT_BLOCK, DOCUMENT),
                    is_error={"type": "boolean"},
                ),
            ),
            message_schema(
                "assistant",
                TEXT_BLOCK,
                object_schema("thinking", {"thinking": TEXT}, signature=TEXT),
                object_schema("redacted_thinking", {"data": TEXT}),
                object_schema("tool_use", {"id": TEXT, "name": TEXT, "input": {"type": "object"}}),
            ),
            message_schema("system", TEXT_BLOCK),
        ]
    },
}
SYSTEM_SCHEMA: dict[str, Any] = {
    "anyOf": [TEXT, {"type": "array", "items": TEXT_BLOCK}, {"type": "null"}]
}
TOOL = {
    "type": "object",
    "required": ["name", "input_schema"],
    "properties": {
        "type": {"enum": ["custom", None]},
        "name": {"type": "string", "minLength": 1},
        "description": TEXT,
        "input_schema": {"type": "object"},
    },
}
TOOLS_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "array", "items": TOOL}, {"type": "null"}]}

# -- readers ------------------------------------------------------------------------------


def read_messages(
    raw: Sequence[Mapping[str, Any]],
    system: str | Sequence[Any] | None,
    reader: HistoryReader,
) -> list[Message]:
    """The system prompt and the messages.

    Raises:
        InvalidRequest: the system prompt or the newest input is malformed, or there is no message.
    """
    if not raw:
        raise invalid_field("messages", "must hold at least one message.")
    check_count(raw, MAX_MESSAGES, "messages")
    messages = _read_system(system, reader)
    newest = NewestInput.of([_kind(message) for message in raw])
    roles = [message.get("role") for message in raw]
    last_user = max((index for index, role in enumerate(roles) if role == "user"), default=-1)
    is_answered = "assistant" in roles[last_user:]
    for index, message in enumerate(raw):
        if message.get("clear_at") == "next_user_message" and index < last_user:
            continue  # a system message for one turn
        param = f"messages[{index}]"
        if index == last_user and not is_answered:  # may hold tool results, too
            reader.refuse_images(message.get("content"), f"{param}.content")
        strict = index >= newest.start and newest.is_strict
        messages += _read_message(message, param, reader, strict=strict)
    return order_tool_results(messages)


def read_tools(raw: Sequence[Mapping[str, Any]] | None) -> tuple[list[Tool], list[str]]:
    """Functions, and the names of tools that are left out.

    Raises:
        InvalidRequest: a tool is malformed or not supported.
    """
    return read_flat_tools(
        numbered(raw), schema_key="input_schema", function_types=(None, "custom")
    )


def _read_system(system: str | Sequence[Any] | None, reader: HistoryReader) -> list[Message]:
    if system is None or isinstance(system, str):
        texts = [system or ""]
    else:
        check_count(system, MAX_BLOCKS, "system")
        texts = [
            reader.part(block, f"system[{index}]", strict=True)
            for index, block in enumerate(system)
        ]
    kept = [text for text in texts if text and not text.startswith(ATTRIBUTION)]
    return [SystemMessage(SEPARATOR.join(kept))] if kept else []


def _kind(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    has_result = isinstance(content, list) and any(map(_is_result, content))
    return "tool" if has_result else str(message.get("role"))


def _is_result(block: object) -> bool:
    return isinstance(block, Mapping) and block.get("type") == "tool_result"


def _read_message(
    raw: Mapping[str, Any], param: str, reader: HistoryReader, *, strict: bool
) -> list[Message]:
    role, content, where = raw.get("role"), raw.get("content"), f"{param}.content"
    if role == "assistant":
        turn = AssistantTurn()
        reader.assistant_parts(content, where, turn)
        return [turn.message()]
    if role == "system":
        return _read_user(content, where, SystemMessage, reader, strict) if content else []
    if strict and role != "user":
        raise invalid_field(f"{param}.role", "must be user, assistant or system.")
    if strict and not isinstance(content, str | list):
        raise invalid_field(where, "must be a string or a list of blocks.")
    return _read_user(content, where, UserMessage, reader, strict)


def _read_user(
    content: object,
    param: str,
    kind: Callable[[str], Message],
    reader: HistoryReader,
    strict: bool,
) -> list[Message]:
    """Tool results, and one message for each run of other blocks, in order."""
    if not isinstance(content, list):
        return [kind(reader.text(content, param, strict=strict))]
    check_count(content, MAX_BLOCKS, param)
    messages: list[Message] = []
    texts: list[str] = []
    for index, block in enumerate(content):
        where = f"{param}[{index}]"
        if _is_result(block):
            if texts:
                messages.append(kind(SEPARATOR.join(texts)))
                texts = []
            messages.append(_read_result(block, where, reader))
        else:
            texts.append(reader.part(block, where, strict=strict))
    if texts or not messages:
        messages.append(kind(SEPARATOR.join(texts)))
    return messages


def _read_result(block: Mapping[str, Any], param: str, reader: HistoryReader) -> ToolMessage:
    text = reader.text(block.get("content"), f"{param}.content", separator=SEPARATOR)
    if block.get("is_error") is True and "error" not in text.lower():
        text = f"Error: {text}" if text else "Error"
    id = block.get("tool_use_id")
    return ToolMessage(text, id if isinstance(id, str) else None)
