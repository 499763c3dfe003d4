"""What the rows of the grammar benchmark are held to: forms that never end by themselves."""

from __future__ import annotations

from typing import Any

from glmd.bench.agent_tools import AGENT_TOOLS
from glmd.chat.messages import read_tools
from glmd.structured_output import JsonSchema, OutputSpec, Regex, make_structure

RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99_999},
        "title": {"type": "string", "minLength": 3, "maxLength": 40},
        "status": {"enum": ["open", "in progress", "blocked", "done"]},
        "price": {"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]},
        "due": {"type": "string", "format": "date"},
        "owner": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 24},
                "email": {"type": "string", "format": "email", "maxLength": 40},
            },
            "required": ["name", "email"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["id", "title", "status", "price", "due", "owner", "tags"],
    "additionalProperties": False,
}
"""What an extraction asks for. Its strings are bounded, so that a model of random weights gets
through all of its parts."""

RECORDS: dict[str, Any] = {
    "type": "object",
    "properties": {"records": {"type": "array", "items": RECORD, "minItems": 1000}},
    "required": ["records"],
    "additionalProperties": False,
}


def agent_tools(suffix: str = "") -> OutputSpec:
    """A call of one of an agent's twenty tools, and then another.

    Args:
        suffix: of the tools' names, to make the structure a new one.
    """
    tools = [
        {**tool, "function": {**tool["function"], "name": tool["function"]["name"] + suffix}}
        for tool in AGENT_TOOLS
    ]
    return make_structure(None, read_tools(tools), required=True)


def forms() -> dict[str, OutputSpec]:
    """By name."""
    return {
        "any text": OutputSpec(Regex("(?s:.*)", "regex")),
        "JSON records": OutputSpec(JsonSchema(RECORDS, "schema")),
        "calls of 20 tools": agent_tools(),
    }
