"""Conversations in neutral form: what every API's request is mapped to before rendering.

`read_messages` and `read_tools` (in `glmd.chat.tools`) take the OpenAI chat shape, which most
clients speak; the Responses and Anthropic APIs build these types themselves, with `text_of`,
`arguments_of` and `order_tool_results`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isinf
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from glmd.chat.request_limits import MAX_MESSAGES, check_count
from glmd.errors import InvalidRequest

if TYPE_CHECKING:
    from glmd.chat.tools import Tool

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the key that holds it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made."""

    id: str
    """As the client knows it; "" if it sent none."""
    name: str
    arguments: dict[str, Json]


@dataclass(frozen=True, slots=True)
class SystemMessage:
    text: str


@dataclass(frozen=True, slots=True)
class UserMessage:
    text: str


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    text: str
    reasoning: str | None = None
    """None or "": the client did not send it back."""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolMessage:
    """The result of a call."""

    text: str
    call_id: str | None = None
    """None: of the first call that has no result yet."""


Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything that decides a prompt."""

    messages: Sequence[Message]
    """In order, tool results in the order of their calls (`order_tool_results`)."""
    tools: Sequence[Tool] = ()
    """What the prompt tells the model of, whether or not it may call them now."""
    template_kwargs: Mapping[str, Json] = field(default_factory=dict)
    """`enable_thinking`, `clear_thinking` and any other variable of the template; a null is as
    good as absent."""
    continue_final: bool = False
    """The last message, an assistant's, is the beginning of the answer."""
    cache_salt: str = ""
    """Turns remembered under one salt are not found under another."""


def read_messages(raw: Sequence[Mapping[str, Any]], param: str = "messages") -> list[Message]:
    """Messages in OpenAI's chat shape, normalised and checked.

    Raises:
        InvalidRequest: names the field at fault, such as
            `messages[3].tool_calls[0].function.arguments`.
    """
    if not raw:
        raise InvalidRequest(f"{param} must hold at least one message.", param=param)
    check_count(raw, MAX_MESSAGES, param)
    params = [f"{param}[{index}]" for index in range(len(raw))]
    messages = [_read_message(message, where) for message, where in zip(raw, params, strict=True)]
    return order_tool_results(messages, params)


def text_of(content: object, param: str) -> str:
    """Text of a message's content: null, a string, or a list of text parts.

    Raises:
        InvalidRequest: a part is no text (an image, audio, a file), or the shape is wrong.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{param} must be a string or a list of content parts.", param=param)
    return "".join(_text_of_part(part, f"{param}[{index}]") for index, part in enumerate(content))


def arguments_of(value: object, param: str) -> dict[str, Json]:
    """A call's arguments, sent as JSON text or as an object; nothing at all means none.

    Raises:
        InvalidRequest: not a JSON object.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_no_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param} is not valid JSON: {error}", param=param) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be a JSON object.", param=param)
    return value


def order_tool_results(
    messages: Sequence[Message], params: Sequence[str], *, id_key: str = "tool_call_id"
) -> list[Message]:
    """Put each run of tool results in the order of the calls that they answer.

    The template tells the model nothing but the order, so a result that cannot be placed, or one
    whose predecessor is missing, is refused.

    Args:
        params: where each message stands in the client's request, for errors.
        id_key: what holds a result's call id there.

    Raises:
        InvalidRequest: a result answers no open call, or leaves out an earlier one.
    """
    arranged: list[Message] = []
    calls: tuple[ToolCall, ...] = ()
    results: dict[int, ToolMessage] = {}
    answered = 0
    for message, param in zip(messages, params, strict=True):
        if isinstance(message, ToolMessage):
            call = _call_of(message, calls, answered, results)
            if call is None:
                raise InvalidRequest(
                    f"{param} answers no open tool call: a result must follow the message with the"
                    f" call that its {id_key} names, once.",
                    param=f"{param}.{id_key}",
                )
            results[call] = message
            continue
        answered = _place(results, calls, answered, arranged, param)
        if isinstance(message, AssistantMessage):
            calls, answered = message.calls, 0
        arranged.append(message)
    _place(results, calls, answered, arranged, params[-1] if params else "")
    return arranged


def _call_of(
    message: ToolMessage,
    calls: tuple[ToolCall, ...],
    answered: int,
    results: Mapping[int, ToolMessage],
) -> int | None:
    """Index of the call that a result answers."""
    for index, call in enumerate(calls[answered:], start=answered):
        if index not in results and message.call_id in (None, call.id):
            return index
    return None


def _place(
    results: dict[int, ToolMessage],
    calls: tuple[ToolCall, ...],
    answered: int,
    arranged: list[Message],
    param: str,
) -> int:
    """Move a run of results to `arranged`, in order; returns how many calls are now answered."""
    end = answered + len(results)
    for index in range(answered, end):
        if index not in results:
            raise InvalidRequest(
                f"The result of tool call {calls[index].id!r} is missing before {param}.",
                param=param,
            )
        arranged.append(results.pop(index))
    return end


def _read_message(raw: object, param: str) -> Message:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{param} must be an object.", param=param)
    role = raw.get("role")
    text = text_of(raw.get("content"), f"{param}.content")
    match role:
        case "system" | "developer":
            return SystemMessage(text)
        case "user":
            return UserMessage(text)
        case "assistant":
            if raw.get("function_call") is not None:
                field = f"{param}.function_call"
                raise InvalidRequest(
                    f"{field} is the old form of tool_calls, which is what glmd takes.", param=field
                )
            if raw.get("audio") is not None:
                field = f"{param}.audio"
                raise InvalidRequest(f"{field}: the model reads text only.", param=field)
            refusal = _string(raw, "refusal", param) or ""
            reasoning = _string(raw, "reasoning_content", param) or _string(raw, "reasoning", param)
            return AssistantMessage(text + refusal, reasoning, _read_calls(raw, param))
        case "tool":
            return ToolMessage(text, _string(raw, "tool_call_id", param))
        case _:
            field = f"{param}.role"
            raise InvalidRequest(
                f"{field} must be system, developer, user, assistant or tool.", param=field
            )


def _read_calls(raw: Mapping[str, Any], param: str) -> tuple[ToolCall, ...]:
    calls = raw.get("tool_calls")
    param = f"{param}.tool_calls"
    if calls is None:
        return ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidRequest(f"{param} must be a list.", param=param)
    return tuple(_read_call(call, f"{param}[{index}]") for index, call in enumerate(calls))


def _read_call(raw: object, param: str) -> ToolCall:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{param} must be an object.", param=param)
    function = raw.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(
            f"{param}.function must be an object: only function calls are known here.", param=param
        )
    name = function.get("name")
    if not isinstance(name, str) or not name:
        field = f"{param}.function.name"
        raise InvalidRequest(f"{field} must be a non-empty string.", param=field)
    arguments = arguments_of(function.get("arguments"), f"{param}.function.arguments")
    return ToolCall(_string(raw, "id", param) or "", name, arguments)


def _text_of_part(part: object, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        what = f"of type {kind!r}" if isinstance(kind, str) else "of this shape"
        raise InvalidRequest(f"{param}: the model reads text only, not a part {what}.", param=param)
    text = part[key] if isinstance(part, Mapping) and key in part else None
    if not isinstance(text, str):
        raise InvalidRequest(f"{param}.{key} must be a string.", param=f"{param}.{key}")
    return text


def _string(raw: Mapping[str, Any], key: str, param: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{param}.{key} must be a string.", param=f"{param}.{key}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"{text} is out of range")
    return number
