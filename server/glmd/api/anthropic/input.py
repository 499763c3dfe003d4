"""From Anthropic's messages, blocks and tools to a neutral conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glmd.api.anthropic.request import CountTokensRequest
from glmd.api.defaults import Defaults
from glmd.api.tools import numbered, read_flat_tools
from glmd.chat.messages import arguments_of, order_tool_results
from glmd.chat.request_limits import MAX_MESSAGES, check_count
from glmd.chat.types import (
    AssistantMessage,
    Conversation,
    Message,
    SystemMessage,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from glmd.errors import InvalidRequest

SEPARATOR = "\n\n"
"""Between the text blocks of a user, of the system, and of a tool's result, which are pieces of
their own. An assistant's are parts of one text."""

ATTRIBUTION = "x-anthropic-billing-header:"
"""How a system block begins that Claude Code means for Anthropic's accounting. It differs from
request to request, so as the prompt's first line it would keep every prefix out of the cache;
Anthropic's own servers take it out, too."""

HOSTED = ("web_search", "web_fetch", "code_execution", "tool_search", "advisor")
"""How the types of tools begin that Anthropic's servers run."""


def read_conversation(body: CountTokensRequest, defaults: Defaults) -> Conversation:
    """What decides the prompt; a last message of the assistant is the answer's beginning.

    Raises:
        InvalidRequest: something in it cannot be honoured.
    """
    if body.thread is not None:
        raise InvalidRequest(
            "thread: conversations are not kept here; send all messages, without thread.",
            param="thread",
            code="thread_unsupported_request",  # Anthropic's clients then do so by themselves.
        )
    if not body.messages:
        raise InvalidRequest("messages must hold at least one message.", param="messages")
    check_count(body.messages, MAX_MESSAGES, "messages")
    messages, params = _read_system(body.system)
    for index, raw in enumerate(body.messages):
        where = f"messages[{index}]"
        for message in _read_message(raw, where):
            messages.append(message)
            params.append(where)
    tools, _ = read_tools(body)
    return Conversation(
        messages=order_tool_results(messages, params, id_key="tool_use_id"),
        tools=tools,
        template_kwargs={
            "enable_thinking": body.thinks(defaults),
            "clear_thinking": defaults.clear_thinking,
        },
        continue_final=isinstance(messages[-1], AssistantMessage),
    )


def read_tools(body: CountTokensRequest) -> tuple[list[Tool], list[str]]:
    """The functions that the model is told of, and the names of tools that are left out.

    Raises:
        InvalidRequest: a tool is malformed, or is none that can be left out.
    """
    return read_flat_tools(
        numbered(body.tools),
        schema_key="input_schema",
        function_types=(None, "custom"),
        is_hosted=lambda type: type.startswith(HOSTED),
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
        field = f"{param}.content"
        raise InvalidRequest(f"{field} must be a string or a list of blocks.", param=field)
    numbered = [(block, f"{param}.content[{index}]") for index, block in enumerate(blocks)]
    match role:
        case "assistant":
            return [_read_assistant(numbered)]
        case "user":
            return _read_user(numbered, UserMessage)
        case "system":
            return _read_user(numbered, SystemMessage)
        case _:
            field = f"{param}.role"
            raise InvalidRequest(f"{field} must be user, assistant or system.", param=field)


def _read_assistant(blocks: Sequence[tuple[Any, str]]) -> AssistantMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for raw, where in blocks:
        match type_of(raw, where):
            case "thinking":
                thoughts.append(_string(raw, "thinking", where))
            case "redacted_thinking":
                pass  # Another model's, which nobody but its maker can read.
            case "tool_use":
                arguments = arguments_of(raw.get("input"), f"{where}.input")
                name = _string(raw, "name", where)
                calls.append(ToolCall(_string(raw, "id", where), name, arguments))
            case _:
                texts.append(_text_of_block(raw, where))
    return AssistantMessage("".join(texts), "".join(thoughts), tuple(calls))


def _read_user(blocks: Sequence[tuple[Any, str]], kind: Callable[[str], Message]) -> list[Message]:
    """Tool results, and runs of text as one message each, in order."""
    messages: list[Message] = []
    texts: list[str] = []
    for raw, where in blocks:
        if kind is UserMessage and type_of(raw, where) == "tool_result":
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
        raise InvalidRequest(f"{param} must be a string or a list of blocks.", param=param)
    return SEPARATOR.join(
        _text_of_block(block, f"{param}[{index}]") for index, block in enumerate(content)
    )


def _text_of_block(raw: Any, param: str) -> str:
    type = type_of(raw, param)
    if type == "text":
        return _string(raw, "text", param)
    source = raw.get("source")
    if type == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        return _string(source, "data", f"{param}.source")
    raise InvalidRequest(
        f"{param}: the model reads text only, no block of type {type!r}.", param=param
    )


def type_of(raw: Any, param: str) -> str:
    """A block's type.

    Raises:
        InvalidRequest: it is no block.
    """
    if not isinstance(raw, Mapping) or not isinstance(raw.get("type"), str):
        raise InvalidRequest(f"{param} must be a block: an object with a type.", param=param)
    return str(raw["type"])


def _string(raw: Mapping[str, Any], key: str, param: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{param}.{key} must be a string.", param=f"{param}.{key}")
    return value
