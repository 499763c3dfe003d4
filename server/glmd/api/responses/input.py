"""Items of the Responses API in neutral form: messages, reasoning, calls and their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glmd.api.responses.tools import INPUT, full_name
from glmd.chat.messages import arguments_of, order_tool_results, text_of
from glmd.chat.types import (
    AssistantMessage,
    Json,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from glmd.errors import InvalidRequest

Item = dict[str, Any]


def as_items(input: str | Sequence[Item]) -> list[Item]:
    """The request's input as items."""
    if isinstance(input, str):
        return [{"type": "message", "role": "user", "content": input}]
    return list(input)


@dataclass(slots=True)
class _Turn:
    """Items of one turn of the assistant."""

    param: str
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    ends_in_text: bool = False

    def message(self) -> AssistantMessage:
        return AssistantMessage("".join(self.texts), "".join(self.thoughts), tuple(self.calls))


def read_items(items: Sequence[Item], params: Sequence[str]) -> list[Message]:
    """The items as messages.

    What the assistant wrote in one turn is several items; two of its messages in a row are two
    turns.

    Args:
        params: where each item stands in the client's request, for errors.

    Raises:
        InvalidRequest: names the field at fault.
    """
    messages: list[Message] = []
    places: list[str] = []
    turn: _Turn | None = None

    def close() -> None:
        nonlocal turn
        if turn is not None:
            messages.append(turn.message())
            places.append(turn.param)
            turn = None

    for item, param in zip(items, params, strict=True):
        kind = item.get("type") or "message"
        role = item.get("role")
        is_text = kind == "message" and role == "assistant"
        if is_text or kind in ("reasoning", "function_call", "custom_tool_call"):
            if is_text and turn is not None and turn.ends_in_text:
                close()
            turn = turn or _Turn(param)
            turn.ends_in_text = is_text
            if is_text:
                turn.texts.append(text_of(item.get("content"), f"{param}.content"))
            elif kind == "reasoning":
                turn.thoughts.append(_thought(item, param))
            else:
                turn.calls.append(_call(item, param))
            continue
        close()
        messages.append(_message(item, kind, role, param))
        places.append(param)
    close()
    return order_tool_results(messages, places, id_key="call_id")


def _message(item: Item, kind: object, role: object, param: str) -> Message:
    if kind in ("function_call_output", "custom_tool_call_output"):
        return ToolMessage(text_of(item.get("output"), f"{param}.output"), _call_id(item, param))
    if kind != "message":
        field = f"{param}.type"
        raise InvalidRequest(f"{field}: the model cannot read a {kind!r} item.", param=field)
    text = text_of(item.get("content"), f"{param}.content")
    match role:
        case "user":
            return UserMessage(text)
        case "system" | "developer":
            return SystemMessage(text)
        case _:
            field = f"{param}.role"
            raise InvalidRequest(
                f"{field} must be system, developer, user or assistant.", param=field
            )


def _thought(item: Item, param: str) -> str:
    """Reasoning as it came out: as content, or as a summary, which here is all of it.

    An item with neither is another server's, which alone can read it.
    """
    for key, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        parts = item.get(key) or []
        where = f"{param}.{key}"
        if not isinstance(parts, list):
            raise InvalidRequest(f"{where} must be a list.", param=where)
        texts = []
        for index, part in enumerate(parts):
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type") != kind:
                field = f"{where}[{index}]"
                raise InvalidRequest(f"{field} must be a {kind} with a text.", param=field)
            texts.append(text)
        if texts:
            return "".join(texts)
    return ""


def _call(item: Item, param: str) -> ToolCall:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        field = f"{param}.name"
        raise InvalidRequest(f"{field} must be a non-empty string.", param=field)
    arguments: dict[str, Json]
    if item.get("type") == "custom_tool_call":
        text = item.get(INPUT)
        if not isinstance(text, str):
            raise InvalidRequest(f"{param}.input must be a string.", param=f"{param}.input")
        arguments = {INPUT: text}
    else:
        arguments = arguments_of(item.get("arguments"), f"{param}.arguments")
    return ToolCall(_call_id(item, param), full_name(item.get("namespace"), name), arguments)


def _call_id(item: Item, param: str) -> str:
    id = item.get("call_id")
    if not isinstance(id, str) or not id:
        field = f"{param}.call_id"
        raise InvalidRequest(f"{field} must be a non-empty string.", param=field)
    return id
