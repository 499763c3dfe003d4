"""What input items and tools look like, for the OpenAPI document.

The types are not pydantic models, because `glmd.api.responses.input` reads them more leniently
than a model would, and names the field that is wrong more clearly.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "minLength": 1}


def tagged(type: str, required: dict[str, Schema], **optional: Schema) -> Schema:
    """An item, a part or a tool of one type."""
    return {
        "type": "object",
        "required": ["type", *required],
        "properties": {"type": {"enum": [type]}, **required, **optional},
    }


def list_of(*kinds: Schema) -> Schema:
    return {"type": "array", "items": {"anyOf": list(kinds)}}


TEXT_PARTS = list_of(tagged("input_text", {"text": TEXT}), tagged("output_text", {"text": TEXT}))
MESSAGE: Schema = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "type": {"enum": ["message"]},
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [TEXT, TEXT_PARTS]},
    },
}
REASONING = tagged(
    "reasoning",
    {"summary": list_of(tagged("summary_text", {"text": TEXT}))},
    content=list_of(tagged("reasoning_text", {"text": TEXT})),
)
CALL = tagged("function_call", {"call_id": NAME, "name": NAME, "arguments": TEXT}, namespace=TEXT)
OUTPUT = tagged("function_call_output", {"call_id": NAME, "output": {"anyOf": [TEXT, TEXT_PARTS]}})
CUSTOM_CALL = tagged(
    "custom_tool_call", {"call_id": NAME, "name": NAME, "input": TEXT}, namespace=TEXT
)
CUSTOM_OUTPUT = tagged(
    "custom_tool_call_output", {"call_id": NAME, "output": {"anyOf": [TEXT, TEXT_PARTS]}}
)
REFERENCE = tagged("item_reference", {"id": TEXT})

ITEMS = (MESSAGE, REASONING, CALL, OUTPUT, CUSTOM_CALL, CUSTOM_OUTPUT, REFERENCE)
INPUT_SCHEMA: Schema = {"anyOf": [TEXT, list_of(*ITEMS)]}

FUNCTION = tagged(
    "function",
    {"name": NAME},
    description=TEXT,
    parameters={"type": ["object", "null"]},
    strict={"type": ["boolean", "null"]},
)
FORMAT: Schema = {
    "anyOf": [
        tagged("text", {}),
        tagged("grammar", {"syntax": {"enum": ["lark", "regex"]}, "definition": TEXT}),
        {"type": "null"},
    ]
}
CUSTOM = tagged("custom", {"name": NAME}, description=TEXT, format=FORMAT)
NAMESPACE = tagged(
    "namespace", {"name": NAME, "tools": list_of(FUNCTION, CUSTOM)}, description=TEXT
)
TOOLS_SCHEMA: Schema = {"anyOf": [list_of(FUNCTION, CUSTOM, NAMESPACE), {"type": "null"}]}
