"""What a schema says of whole values: `type`, `enum` and `const`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from glmd.chat.tool_args import NAMED, type_of
from glmd.chat.types import Json
from glmd.errors import InvalidRequest
from glmd.structured_output.disjointness import canonical_text
from glmd.structured_output.schema_context import SchemaContext, malformed

MAX_VALUES = 10_000
"""Of one enum: 60 ms to compile."""

_IMPLIED: tuple[tuple[str, frozenset[str]], ...] = (
    (
        "object",
        frozenset(
            (
                "properties",
                "additionalProperties",
                "patternProperties",
                "required",
                "minProperties",
                "maxProperties",
                "propertyNames",
                "unevaluatedProperties",
            )
        ),
    ),
    ("array", frozenset(("items", "prefixItems", "additionalItems", "minItems", "maxItems"))),
    ("string", frozenset(("pattern", "minLength", "maxLength"))),
    (
        "number",
        frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    ),
)
OF_OBJECTS = _IMPLIED[0][1]
"""Keywords that say something of objects only."""


def read_types(schema: Mapping[str, Json], param: str) -> frozenset[str] | None:
    """The types that a schema allows; None: any. Keywords of one type imply it."""
    kind = schema.get("type")
    if kind is None and "type" not in schema:
        for name, keywords in _IMPLIED:
            if not keywords.isdisjoint(schema):
                return frozenset((name,))
        return None
    names = kind if isinstance(kind, list) else [kind]
    if not names or not all(isinstance(name, str) and name in NAMED for name in names):
        raise malformed(f"{param}.type", f"one of {', '.join(NAMED)}, or a list of them")
    types = frozenset(str(name) for name in names)
    return types - {"integer"} if "number" in types else types


def read_values(reading: SchemaContext) -> None:
    """`enum` and `const`, as an `enum` of the values that the types allow."""
    schema = reading.schema
    if "enum" not in schema and "const" not in schema:
        return
    values = schema.get("enum", [schema.get("const")])
    if not isinstance(values, list):
        raise malformed(reading.where("enum"), "a list")
    if len(values) > MAX_VALUES:
        raise InvalidRequest(
            f"{reading.where('enum')} has more than {MAX_VALUES} values.",
            param=reading.where("enum"),
        )
    if "const" in schema:
        const = canonical_text(schema["const"])
        values = [value for value in values if canonical_text(value) == const]
    keyword = "enum" if "enum" in schema else "const"
    exact = [value for value in values if is_exact(value)]
    if len(exact) < len(values):
        reading.relax(keyword, ": it names a number that doubles cannot hold")
        if not exact:
            return
    reading.node["enum"] = [
        value for value in exact if reading.types is None or _has_type(value, reading.types)
    ]


def is_exact(value: Json) -> bool:
    """Whether llguidance, which reads numbers as doubles, sees this very value."""
    match value:
        case bool() | None:
            return True
        case int():
            return abs(value) <= 2**53
        case float():
            return math.isfinite(value)
        case str():
            return True
        case list():
            return all(map(is_exact, value))
        case dict():
            return all(map(is_exact, value.values()))


def _has_type(value: Json, types: frozenset[str]) -> bool:
    name = type_of(value)
    return name in types or (name == "integer" and "number" in types)
