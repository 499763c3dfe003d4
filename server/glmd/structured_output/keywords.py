"""The keywords of schemas: what reads each, and which cannot be enforced."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from glmd.chat.types import Json
from glmd.structured_output.arrays import read_items, read_unique
from glmd.structured_output.combinations import read_branches, read_reference
from glmd.structured_output.numbers import read_bound, read_multiple
from glmd.structured_output.schema_context import SchemaContext, read_count
from glmd.structured_output.strings import read_format, read_pattern

READERS: dict[str, Callable[[SchemaContext, str, Json], None]] = {
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), read_count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), read_bound),
    "multipleOf": read_multiple,
    "pattern": read_pattern,
    "format": read_format,
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), read_branches),
    "$ref": read_reference,
    **dict.fromkeys(("items", "prefixItems", "additionalItems"), read_items),
    "uniqueItems": read_unique,
}
"""By keyword; those of types, values and objects are read together (`values`, `objects`)."""

REFUSED = {
    "not": "",
    "if": "",
    "contains": "",
    "dependentRequired": "",
    "dependentSchemas": "",
    "dependencies": "",
    "unevaluatedItems": "",
    "$dynamicRef": ": only $ref is",
    "$recursiveRef": ": only $ref is",
}
"""Keywords that say something about instances and cannot be enforced."""


def says_nothing(keyword: str, schema: Mapping[str, Json]) -> bool:
    """Whether a keyword of `REFUSED` leaves all instances valid, as it is used here."""
    match keyword:
        case "if":
            return "then" not in schema and "else" not in schema
        case "contains":
            return schema.get("minContains") == 0 and "maxContains" not in schema
        case "unevaluatedItems":
            return schema[keyword] is True
        case "dependentRequired" | "dependentSchemas" | "dependencies":
            return schema[keyword] == {}
    return False
