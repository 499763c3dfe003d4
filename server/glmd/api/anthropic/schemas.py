"""What messages and tools look like, for the OpenAPI document.

The types are not pydantic models, because `glmd.api.anthropic.input` reads them more
leniently than a model would, and names the field that is wrong more clearly.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}


def block(type: str, required: dict[str, Schema], **optional: Schema) -> Schema:
    """A block of one type."""
    return {
        "type": "object",
        "required": ["type", *required],
        "properties": {"type": {"enum": [type]}, **required, **optional},
    }


def text_or(blocks: list[Schema]) -> Schema:
    """A string, or a list of blocks."""
    return {"anyOf": [TEXT, {"type": "array", "items": {"oneOf": blocks}}]}


TEXT_BLOCK = block("text", {"text": TEXT})
DOCUMENT = block("document", {"source": block("text", {"data": TEXT})})
TOOL_RESULT = block(
    "tool_result",
    {"tool_use_id": TEXT},
    content=text_or([TEXT_BLOCK, DOCUMENT]),
    is_error={"type": "boolean"},
)
THINKING = block("thinking", {"thinking": TEXT}, signature=TEXT)
REDACTED = block("redacted_thinking", {"data": TEXT})
TOOL_USE = block("tool_use", {"id": TEXT, "name": TEXT, "input": {"type": "object"}})


def message(role: str, blocks: list[Schema]) -> Schema:
    """A message of one role."""
    return {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": [role]}, "content": text_or(blocks)},
    }


MESSAGES_SCHEMA: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "oneOf": [
            message("user", [TEXT_BLOCK, DOCUMENT, TOOL_RESULT]),
            message("assistant", [TEXT_BLOCK, THINKING, REDACTED, TOOL_USE]),
            message("system", [TEXT_BLOCK]),
        ]
    },
}
SYSTEM_SCHEMA: Schema = {"anyOf": [TEXT, {"type": "array", "items": TEXT_BLOCK}, {"type": "null"}]}
TOOLS_SCHEMA: Schema = {
    "anyOf": [
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "input_schema"],
                "properties": {
                    "type": {"enum": ["custom", None]},
                    "name": {"type": "string", "minLength": 1},
                    "description": TEXT,
                    "input_schema": {"type": "object"},
                },
            },
        },
        {"type": "null"},
    ]
}
