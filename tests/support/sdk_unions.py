"""Samples of every kind of message, block, item and tool that the official SDKs know."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import anthropic.types as messages
from anthropic.types import beta
from openai.types import chat, responses
from pydantic import BaseModel
from typing_extensions import is_typeddict

MARK = "marked"
"""Start of every text in a sample."""

OPAQUE = (
    *("data", "signature", "fingerprint", "url", "image_url", "file_data", "result"),
    *("encrypted_content", "encrypted_stdout", "encrypted_index"),
)
"""Fields with text that is not for the model."""

MAX_LEVELS = 6


def members(union: Any) -> list[Any]:
    """The members of a union, of the unions in it, too."""
    if get_origin(union) is typing.Annotated:
        return members(get_args(union)[0])
    if get_origin(union) in (Union, types.UnionType):
        return [member for each in get_args(union) for member in members(each)]
    return [union]


def samples(kind: type[Any]) -> list[dict[str, Any]]:
    """A value with the required fields of a TypedDict or model, and one with all fields."""
    return [_fields(kind, whole=whole, level=0) for whole in (False, True)]


def _fields(kind: Any, *, whole: bool, level: int) -> dict[str, Any]:
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        required = {name for name, hint in hints.items() if get_origin(hint) is Required}
    else:
        fields = {field.alias or name: field for name, field in kind.model_fields.items()}
        hints = {name: field.annotation for name, field in fields.items()}
        required = {name for name, field in fields.items() if field.is_required()}
    return {
        name: _value(hint, whole=whole, level=level + 1, name=name)
        for name, hint in hints.items()
        if name in required or name == "type" or (whole and level < MAX_LEVELS)
        if not name.endswith("safety_checks")  # what was confirmed, before the call ran
    }


def _value(hint: Any, *, whole: bool, level: int, name: str) -> Any:  # noqa: PLR0911
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Annotated, Required, NotRequired):
        return _value(arguments[0], whole=whole, level=level, name=name)
    if origin is Literal:
        return arguments[0]
    if origin in (Union, types.UnionType):
        some = [each for each in arguments if each is not type(None)]
        # The last is the richest: a list of parts rather than a text.
        return _value(some[-1 if whole else 0], whole=whole, level=level, name=name)
    if is_typeddict(hint) or (isinstance(hint, type) and issubclass(hint, BaseModel)):
        return _fields(hint, whole=whole, level=level) if level < 2 * MAX_LEVELS else {}
    if origin is not None and issubclass(origin, Mapping):
        return {"key": f"{MARK} {name}"}
    if arguments:  # a list
        return [_value(arguments[0], whole=whole, level=level, name=name)]
    plain = {bool: True, int: 1, float: 0.5, object: {"key": f"{MARK} {name}"}}
    opaque = name.endswith("id") or name in OPAQUE
    return plain.get(hint, "opaque" if opaque else f"{MARK} {name}")


def named(*unions: Any) -> dict[str, type[Any]]:
    """Members of unions by module and name."""
    found = {}
    for union in unions:
        for kind in members(union):
            if is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel)):
                vendor = kind.__module__.partition(".")[0]
                found[f"{vendor}:{kind.__name__}:{kind.__module__.rpartition('.')[2]}"] = kind
    return found


def _inside(kind: type[Any], field: str) -> Iterator[Any]:
    """Members of the lists in a field."""
    for member in members(get_type_hints(kind)[field]):
        if get_args(member):
            yield from members(get_args(member)[0])


BLOCKS = named(
    messages.ContentBlockParam,
    beta.BetaContentBlockParam,
    *_inside(messages.ToolResultBlockParam, "content"),
    *_inside(beta.BetaToolResultBlockParam, "content"),
    *_inside(beta.BetaSystemMessageParam, "content"),
    chat.ChatCompletionContentPartParam,
    *_inside(chat.ChatCompletionAssistantMessageParam, "content"),
    responses.ResponseInputContentParam,
    responses.ResponseFunctionCallOutputItemParam,
    *_inside(responses.ResponseOutputMessageParam, "content"),
)
"""Content parts and blocks."""

ITEMS = named(responses.ResponseInputItemParam, responses.ResponseOutputItem)
CHAT_MESSAGES = named(chat.ChatCompletionMessageParam, chat.ChatCompletionMessage)
CALLS = named(chat.ChatCompletionMessageToolCallUnionParam)
ANTHROPIC_MESSAGES = named(beta.BetaMessageParam, messages.MessageParam)
TOOLS = named(
    messages.ToolUnionParam,
    beta.BetaToolUnionParam,
    responses.ToolParam,
    chat.ChatCompletionToolUnionParam,
)
