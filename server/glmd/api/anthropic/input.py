"""Anthropic's messages, blocks and tools in neutral form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glmd.api.generation_request import numbered_tools, object_schema, read_flat_tools
from glmd.chat.messages import arguments_of, order_tool_results
from glmd.chat.types import (
    MAX_MESSAGES,
    AssistantMessage,
    Message,
    SystemMessage,
    Tool,
    ToolCall,
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

HOSTED = ("web_search", "web_fetch", "code_execution", "tool_search", "advisor")
"""Prefixes of the types of tools that Anthropic's servers run."""

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
    raw: Sequence[Mapping[str, Any]], system: str | Sequence[Any] | None
) -> list[Message]:
    """The system prompt and the messages.

    Raises:
        InvalidRequest: a message is malformed, or there is none.
    """
    if not raw:
        raise invalid_field("messages", "must hold at least one message.")
    check_count(raw, MAX_MESSAGES, "messages")
    messages, params = _read_system(system)
    for index, message in enumerate(raw):
        where = f"messages[{index}]"
        read = _read_message(message, where)
        messages += read
        params += [where] * len(read)
    return order_tool_results(messages, params, id_key="tool_use_id")


def read_tools(raw: Sequence[Mapping[str, Any]] | None) -> tuple[list[Tool], list[str]]:
    """Functions, and the names of hosted tools, which are ignored.

    Raises:
        InvalidRequest: a tool is malformed or not supported.
    """
    return read_flat_tools(
        numbered_tools(raw),
        schema_key="input_schema",
        function_types=(None, "custom"),
        hosted=HOSTED,
    )


def _read_system(system: str | Sequence[Any] | None) -> tuple[list[Message], list[str]]:
    if system is None or isinstance(system, str):
        texts = [system or ""]
    else:
        texts = [_text_of_block(raw, f"system[{index}]") for index, raw in enumerate(system)]
    kept = [text for text in texts if text and not text.startswith(ATTRIBUTION)]
    return ([SystemMessage(SEPARATOR.join(kept))], ["system"]) if kept else ([], [])


def _read_message(raw: Mapping[str, Any], param: str) -> list[Message]:
    role, content = raw.get("role"), raw.get("content")
    if isinstance(content, str):
        blocks: list[Any] = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        blocks = content
    else:
        raise invalid_field(f"{param}.content", "must be a string or a list of blocks.")
    placed = [(block, f"{param}.content[{index}]") for index, block in enumerate(blocks)]
    match role:
        case "assistant":
            return [_read_assistant(placed)]
        case "user":
            return _read_user(placed, UserMessage)
        case "system":
            return _read_user(placed, SystemMessage)
        case _:
            raise invalid_field(f"{param}.role", "must be user, assistant or system.")


def _read_assistant(blocks: Sequence[tuple[Any, str]]) -> AssistantMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for raw, where in blocks:
        match _type_of(raw, where):
            case "thinking":
                thoughts.append(_string(raw, "thinking", where))
            case "redacted_thinking":
                pass  # Only Anthropic's servers can read it.
            case "tool_use":
                arguments = arguments_of(raw.get("input"), f"{where}.input")
                name = _string(raw, "name", where)
                calls.append(ToolCall(_string(raw, "id", where), name, arguments))
            case _:
                texts.append(_text_of_block(raw, where))
    return AssistantMessage("".join(texts), "".join(thoughts), tuple(calls))


def _read_user(blocks: Sequence[tuple[Any, str]], kind: Callable[[str], Message]) -> list[Message]:
    """Tool results, and one message for each run of text blocks, in order."""
    messages: list[Message] = []
    texts: list[str] = []
    for raw, where in blocks:
        if kind is UserMessage and _type_of(raw, where) == "tool_result":
            if texts:
                messages.append(kind(SEPARATOR.join(texts)))
                texts = []
            text = _text_of_result(raw.get("content"), f"{where}.content")
            if raw.get("is_error") is True and "error" not in text.lower():
                text = f"Error: {text}" if text else "Error"
            messages.append(ToolMessage(text, _string(raw, "tool_use_id", where)))
        else:
            texts.append(_text_of_block(raw, where))
    if texts or not messages:
        messages.append(kind(SEPARATOR.join(texts)))
    return messages


def _text_of_result(content: object, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid_field(param, "must be a string or a list of blocks.")
    return SEPARATOR.join(
        _text_of_block(block, f"{param}[{index}]") for index, block in enumerate(content)
    )


def _text_of_block(raw: Any, param: str) -> str:
    type = _type_of(raw, param)
    if type == "text":
        return _string(raw, "text", param)
    source = raw.get("source")
    if type == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        return _string(source, "data", f"{param}.source")
    raise invalid_field(param, f"{type!r} blocks are not supported; the model reads text.")


def _type_of(raw: Any, param: str) -> str:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("type"), str):
        raise invalid_field(param, "must be a block: an object with a type.")
    return str(raw["type"])


def _string(raw: Mapping[str, Any], key: str, param: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise invalid_field(f"{param}.{key}", "must be a string.")
    return value
