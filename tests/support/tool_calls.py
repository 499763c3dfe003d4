"""Tools of all kinds, and the calls that the parser reads in answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from schemas import INTEGER, SHORT, STRING, Schema, obj

from glmd.chat.output_processor import ChatOutputProcessor
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.types import (
    ContentDelta,
    Finished,
    Json,
    Prompt,
    ReasoningDelta,
    Tool,
    ToolCallDelta,
    ToolCallStart,
)
from glmd.ipc import SequenceOutput

POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}

PARAMETERS: dict[str, Schema] = {
    "none": {},
    "no_properties": obj({}),
    "string": obj({"city": STRING}),
    "optional": obj({"query": STRING, "limit": INTEGER, "deep": {"type": "boolean"}}, "query"),
    "lists": obj({"paths": {"type": "array", "items": SHORT, "maxItems": 3}}),
    "nullable": obj({"note": {"type": ["string", "null"]}}),
    "union": obj({"id": {"anyOf": [STRING, INTEGER, {"type": "array", "items": INTEGER}]}}),
    "union_with_pattern": obj(
        {"at": {"anyOf": [{"type": "string", "pattern": "^[0-9a-c]+$"}, {"type": "number"}]}}
    ),
    "enums": obj(
        {"order": {"enum": ["asc", "desc"]}, "mixed": {"enum": ["a", "1", 1, None, True]}}
    ),
    "texts_like_json": obj({"value": {"enum": ["null", "true", "12", "{}", ""]}}),
    "anything": obj({"value": {}, "other": True}),
    "no_type": obj(
        {"value": {"minLength": 3}, "other": {"maxLength": 3, "type": ["string", "boolean"]}}
    ),
    "formats": obj(
        {
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": r"^[A-Z]{2}-\d+$", "maxLength": 8},
        }
    ),
    "reference": obj({"origin": {"$ref": "#/$defs/p"}}) | {"$defs": {"p": POINT}},
    "optional_object": obj({"origin": {"anyOf": [{"$ref": "#/$defs/p"}, {"type": "null"}, STRING]}})
    | {"$defs": {"p": POINT}},
    "other_strings": {
        "type": "object",
        "properties": {"a": INTEGER},
        "additionalProperties": {"type": "string"},
    },
    "other_values": {"type": "object", "additionalProperties": {"type": ["integer", "null"]}},
    "all_of": {
        "type": "object",
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": STRING}, "required": ["b"]},
        ],
    },
    "either": {
        "type": "object",
        "properties": {"id": STRING, "name": STRING},
        "anyOf": [{"required": ["id"]}, {"required": ["name"]}],
    },
    "tagged": {
        "type": "object",
        "oneOf": [
            obj({"by": {"const": "id"}, "value": INTEGER}),
            obj({"by": {"const": "name"}, "text": STRING}),
        ],
    },
    "many": obj({f"p{i}": INTEGER for i in range(70)}, "p0", "p69"),
    "odd_names": obj({'we"ird\nkey': STRING, "</arg_key>": {"type": "boolean"}}),
    "nested": obj(
        {
            "edits": {
                "type": "array",
                "maxItems": 2,
                "items": obj({"old": STRING, "new": {"type": ["string", "null"]}}),
            }
        }
    ),
}


def tool(name: str, parameters: Schema, *, strict: bool = False) -> Tool:
    function: Json = {"name": name, "parameters": parameters, "strict": strict}
    definition: dict[str, Json] = {"type": "function", "function": function}
    return Tool(name, parameters, definition, strict, "tools[0].function.parameters")


Calls = list[tuple[str, str]]
"""Names and arguments."""


def calls_of(
    tokenizer: Tokenizer, tokens: list[int], tools: Sequence[Tool], *, in_reasoning: bool = False
) -> Calls:
    """The calls in an answer, as the parser reads them."""
    prompt = Prompt(np.zeros(1, np.int32), in_reasoning=in_reasoning, turn_start=1, turn_key=b"")
    events = ChatOutputProcessor(tokenizer, prompt, tools=tools).feed(
        SequenceOutput(id="r", tokens=tokens, finish_reason="stop")
    )
    assert events[-1] == Finished("tool_calls")
    calls: Calls = []
    for event in events[:-1]:
        match event:
            case ToolCallStart(name=name):
                calls.append((name, ""))
            case ToolCallDelta(arguments=arguments):
                calls[-1] = (calls[-1][0], calls[-1][1] + arguments)
            case ReasoningDelta() | ContentDelta():
                assert not calls, f"{event} after a call"
            case _:
                raise AssertionError(event)
    return calls
