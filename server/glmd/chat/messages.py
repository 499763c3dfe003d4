"""Read messages and tools in the shape of OpenAI's chat API.

The Responses and Anthropic APIs build the same types from their own shapes, with `text_of`,
`arguments_of`, `order_tool_results` and `read_function`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isinf
from typing import Any

from glmd.chat.tool_args import check_schema, reject_constant
from glmd.chat.types import (
    MAX_MESSAGES,
    MAX_TOOLS,
    AssistantMessage,
    Json,
    Message,
    SystemMessage,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
    check_count,
)
from glmd.errors import invalid_field

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the key that holds the text."""


def read_messages(raw: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Check and normalize messages.

    Raises:
        InvalidRequest: names the field, such as `messages[3].tool_calls[0].function.arguments`.
    """
    if not raw:
        raise invalid_field("messages", "at least one message is required.")
    check_count(raw, MAX_MESSAGES, "messages")
    params = [f"messages[{index}]" for index in range(len(raw))]
    messages = [_read_message(message, param) for message, param in zip(raw, params, strict=True)]
    return order_tool_results(messages, params)


def read_tools(raw: Sequence[Mapping[str, Any]] | None) -> list[Tool]:
    """Check and normalize tools.

    Raises:
        InvalidRequest: names the field, such as `tools[0].function.name`.
    """
    check_count(raw, MAX_TOOLS, "tools")
    tools: dict[str, Tool] = {}
    for index, value in enumerate(raw or ()):
        param = f"tools[{index}]"
        tool = _read_tool(value, param)
        if tool.name in tools:
            raise invalid_field(f"{param}.function.name", f"duplicate tool name {tool.name!r}.")
        tools[tool.name] = tool
    return list(tools.values())


def text_of(content: object, param: str) -> str:
    """Text of a message's content: null, a string, or a list of text parts.

    Raises:
        InvalidRequest: a part is not text (an image, audio, a file), or the shape is wrong.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise invalid_field(param, "must be a string or a list of content parts.")
    return "".join(_text_of_part(part, f"{param}[{index}]") for index, part in enumerate(content))


def arguments_of(value: object, param: str) -> dict[str, Json]:
    """Arguments of a call, sent as JSON text or an object; {} for null and blank text.

    Raises:
        InvalidRequest: not a JSON object.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=reject_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise invalid_field(param, f"not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise invalid_field(param, "must be a JSON object.")
    return value


def read_function(
    raw: Mapping[str, Any], param: str, definition: dict[str, Json], schema_key: str = "parameters"
) -> Tool:
    """Check a function's name, JSON schema and `strict`.

    Args:
        definition: the tool in the shape of OpenAI's chat API, for the template.
        schema_key: key of the JSON schema in `raw`.

    Raises:
        InvalidRequest: names the field.
    """
    name, schema = raw.get("name"), raw.get(schema_key)
    param_of_schema = f"{param}.{schema_key}"
    if not isinstance(name, str) or not name.strip():
        raise invalid_field(f"{param}.name", "must be a non-empty string.")
    if schema is None:
        schema = {}
    if not isinstance(schema, dict):
        raise invalid_field(param_of_schema, "must be a JSON schema (an object).")
    check_schema(schema, param_of_schema)
    return Tool(name, schema, definition, is_strict(raw, param), param_of_schema)


def is_strict(function: Mapping[str, Any], param: str) -> bool:
    """The value of a function's `strict`; False for null.

    Raises:
        InvalidRequest: not a boolean or null.
    """
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise invalid_field(f"{param}.strict", "must be true or false.")
    return strict is True


def order_tool_results(
    messages: Sequence[Message], params: Sequence[str], *, id_key: str = "tool_call_id"
) -> list[Message]:
    """Put each run of tool results in the order of their calls.

    The chat template prints results without ids, so only their order tells the model which call
    a result belongs to.

    Args:
        params: the request field of each message, for errors.
        id_key: the request's key for the call id of a result.

    Raises:
        InvalidRequest: a result has no open call, or the result of an earlier call is missing.
    """
    ordered: list[Message] = []
    open_calls: dict[int, str] = {}
    """Ids of the last assistant message's calls without a result, by index."""
    results: dict[int, ToolMessage] = {}
    """Results of the present run, by index of the call."""

    def end_run(param: str) -> None:
        first_open = next(iter(open_calls), None)
        if results and first_open is not None and first_open < max(results):
            problem = f"the result of tool call {open_calls[first_open]!r} is missing before here."
            raise invalid_field(param, problem)
        ordered.extend(results[index] for index in sorted(results))
        results.clear()

    for message, param in zip(messages, params, strict=True):
        if isinstance(message, ToolMessage):
            wanted = message.call_id
            call = next((i for i, id in open_calls.items() if wanted in (None, id)), None)
            if call is None:
                raise invalid_field(
                    f"{param}.{id_key}",
                    "no open tool call has this id. Each result must follow the message with its"
                    " call, once.",
                )
            del open_calls[call]
            results[call] = message
            continue
        end_run(param)
        if isinstance(message, AssistantMessage):
            open_calls = {index: call.id for index, call in enumerate(message.calls)}
        ordered.append(message)
    end_run(params[-1] if params else "")
    return ordered


def _read_message(raw: object, param: str) -> Message:
    if not isinstance(raw, Mapping):
        raise invalid_field(param, "must be an object.")
    text = text_of(raw.get("content"), f"{param}.content")
    match raw.get("role"):
        case "system" | "developer":
            return SystemMessage(text)
        case "user":
            return UserMessage(text)
        case "assistant":
            if raw.get("function_call") is not None:
                raise invalid_field(f"{param}.function_call", "deprecated. Use tool_calls.")
            if raw.get("audio") is not None:
                raise invalid_field(f"{param}.audio", "not supported. The model reads text only.")
            refusal = _optional_string(raw, "refusal", param) or ""
            reasoning = _optional_string(raw, "reasoning_content", param) or _optional_string(
                raw, "reasoning", param
            )
            return AssistantMessage(text + refusal, reasoning, _read_calls(raw, param))
        case "tool":
            return ToolMessage(text, _optional_string(raw, "tool_call_id", param))
        case _:
            raise invalid_field(
                f"{param}.role", "must be system, developer, user, assistant or tool."
            )


def _read_calls(raw: Mapping[str, Any], param: str) -> tuple[ToolCall, ...]:
    calls = raw.get("tool_calls")
    param = f"{param}.tool_calls"
    if calls is None:
        return ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise invalid_field(param, "must be a list.")
    return tuple(_read_call(call, f"{param}[{index}]") for index, call in enumerate(calls))


def _read_call(raw: object, param: str) -> ToolCall:
    if not isinstance(raw, Mapping):
        raise invalid_field(param, "must be an object.")
    function = raw.get("function")
    if not isinstance(function, Mapping):
        raise invalid_field(param, "must have an object `function`. Other calls are not supported.")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise invalid_field(f"{param}.function.name", "must be a non-empty string.")
    arguments = arguments_of(function.get("arguments"), f"{param}.function.arguments")
    return ToolCall(_optional_string(raw, "id", param) or "", name, arguments)


def _read_tool(raw: object, param: str) -> Tool:
    if not isinstance(raw, Mapping):
        raise invalid_field(param, "must be an object.")
    if raw.get("type") not in (None, "function"):
        raise invalid_field(f"{param}.type", 'must be "function".')
    function = raw.get("function")
    param = f"{param}.function"
    if not isinstance(function, Mapping):
        raise invalid_field(param, "must be an object.")
    return read_function(function, param, {"type": "function", **raw})


def _text_of_part(part: object, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None or not isinstance(part, Mapping):
        shown = f"content of type {kind!r}" if isinstance(kind, str) else "this content"
        raise invalid_field(param, f"{shown} is not supported. The model reads text only.")
    text = part.get(key)
    if not isinstance(text, str):
        raise invalid_field(f"{param}.{key}", "must be a string.")
    return text


def _optional_string(raw: Mapping[str, Any], key: str, param: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise invalid_field(f"{param}.{key}", "must be a string.")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"{text} is out of range")
    return number
