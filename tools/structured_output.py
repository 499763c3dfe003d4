"""Write the keyword table of docs/structured-output.md from measurements.

    python tools/structured_output.py            rewrite the table
    python tools/structured_output.py --check    fail if the table is outdated

Each example is compiled, and jsonschema validates 30 random answers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "tests" / "support")]

from grammars import answers, schema_matcher, validate  # noqa: E402

from glmd.errors import InvalidRequest  # noqa: E402
from glmd.structured_output.alternatives import FORMATS, UNSUPPORTED_FORMATS  # noqa: E402

DOCUMENT = ROOT / "docs" / "structured-output.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
WALKS = 30

Schema = dict[str, Any]

A_B: Schema = {"a": {"type": "integer"}, "b": {"type": "integer"}}
CAT: Schema = {"type": "object", "properties": {"k": {"const": "cat"}}}
DOG: Schema = {"type": "object", "properties": {"k": {"const": "dog"}}}

EXAMPLES: dict[str, list[Schema]] = {
    "`type`": [{"type": "integer"}, {"type": ["string", "null"]}],
    "`enum`, `const`": [{"enum": ["a", 1, None]}, {"const": {"a": [1]}}, {"const": 2**53 + 1}],
    "`properties`, `required`": [
        {"type": "object", "properties": A_B, "required": ["b"]},
        {"type": "object", "properties": A_B, "required": ["z"]},
    ],
    "`additionalProperties`": [
        {"type": "object", "properties": A_B, "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": A_B, "additionalProperties": False},
    ],
    "`patternProperties`": [{"type": "object", "patternProperties": {"^x": {"type": "null"}}}],
    "`propertyNames`": [
        {"type": "object", "propertyNames": {"pattern": "^[a-z]$"}},
        {"type": "object", "propertyNames": {"maxLength": 3}},
    ],
    "`minProperties`": [
        {"type": "object", "properties": A_B, "minProperties": 1},
        {"type": "object", "minProperties": 2},
    ],
    "`maxProperties`": [
        {"type": "object", "maxProperties": 2},
        {"type": "object", "properties": A_B, "maxProperties": 1},
        {"type": "object", "properties": A_B | {"c": {}}, "maxProperties": 2},
    ],
    "`items`, `prefixItems`, `additionalItems`": [
        {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"}},
        {"type": "array", "items": [{"type": "null"}], "additionalItems": False},
    ],
    "`minItems`, `maxItems`": [{"type": "array", "minItems": 2, "maxItems": 3}],
    "`uniqueItems`": [{"type": "array", "maxItems": 3, "uniqueItems": True}],
    "`contains`": [{"type": "array", "contains": {"type": "null"}}],
    "`minLength`, `maxLength`": [{"type": "string", "minLength": 2, "maxLength": 4}],
    "`pattern`": [
        {"type": "string", "pattern": "^[a-z]+(-[0-9]{2})?$"},
        {"type": "string", "pattern": "^(?=.*[0-9])"},
        {"type": "string", "pattern": "\\bword\\b"},
    ],
    "`minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`": [
        {"type": "integer", "minimum": -3, "maximum": 17},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
    ],
    "`multipleOf`": [
        {"type": "integer", "multipleOf": 7},
        {"type": "integer", "multipleOf": 10_001},
    ],
    "`anyOf`": [{"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]}],
    "`oneOf`": [
        {"oneOf": [{"type": "null"}, {"type": "integer"}]},
        {"oneOf": [CAT, DOG]},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    ],
    "`allOf`": [{"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}],
    "`$ref`": [
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]},
        {"$ref": "https://example.com/schema.json"},
    ],
    "`not`": [{"not": {"type": "null"}}],
    "`if`, `then`, `else`": [{"if": {"type": "null"}, "then": {}, "else": {"type": "string"}}],
    "`dependentRequired`": [{"type": "object", "dependentRequired": {"a": ["b"]}}],
    "`dependentSchemas`, `dependencies`": [{"type": "object", "dependentSchemas": {"a": {}}}],
    "`unevaluatedProperties`": [
        {"type": "object", "properties": A_B, "unevaluatedProperties": False},
        {"allOf": [CAT], "type": "object", "unevaluatedProperties": False},
    ],
    "`unevaluatedItems`": [{"type": "array", "unevaluatedItems": False}],
    "`$dynamicRef`": [{"$dynamicRef": "#node"}],
}


def outcome(schema: Schema) -> str:
    """Return whether a strict schema is enforced, or its error."""
    try:
        matcher = schema_matcher(schema)
    except InvalidRequest as error:
        schema_matcher(schema, strict=False)
        return f"400: {error.message.removeprefix('schema.').replace('|', chr(92) + '|')}"
    found = list(answers(matcher, WALKS))
    for text in found:
        validate(text, schema)
    return "enforced"


def rows(examples: dict[str, list[Schema]]) -> Iterable[str]:
    for keyword, schemas in examples.items():
        for index, schema in enumerate(schemas):
            text = json.dumps(schema).replace("|", "\\|")
            yield f"| {'' if index else keyword} | `{text}` | {outcome(schema)} |"


def tables() -> str:
    formats = [f"`{name}`" for name in FORMATS]
    for name in FORMATS:
        assert outcome({"type": "string", "format": name}) == "enforced", name
    refused = [f"`{name}`" for name in sorted(UNSUPPORTED_FORMATS)]
    for name in UNSUPPORTED_FORMATS:
        assert outcome({"type": "string", "format": name}).startswith("400"), name
    lines = [
        "",
        "| keyword | example | with `strict` |",
        "|---|---|---|",
        *rows(EXAMPLES),
        "",
        f"`format` is enforced for {', '.join(formats)}; refused for {' and '.join(refused)}; any"
        " other name is an annotation, as the standard has it.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    text = DOCUMENT.read_text()
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    current = head + BEGIN + tables() + END + tail
    if "--check" in sys.argv[1:]:
        return int(current != text)
    DOCUMENT.write_text(current)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
