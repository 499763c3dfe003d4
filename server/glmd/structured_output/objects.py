"""What a schema says of objects: their properties, declared and others, and how many."""

from __future__ import annotations

import math

from glmd.errors import InvalidRequest
from glmd.structured_output.schema_context import Node, SchemaContext, malformed, read_count
from glmd.structured_output.strings import pattern_problem
from glmd.structured_output.values import OF_OBJECTS

MAX_PROPERTIES = 1_000
"""Of one object. All of them can come next, so masks take longer the more there are: 1 ms each
100."""


def read_object(reading: SchemaContext) -> None:
    """All keywords of objects, which depend on each other."""
    if OF_OBJECTS.isdisjoint(reading.schema):
        return
    properties = _read_properties(reading)
    required = _read_required(reading)
    patterns = _read_pattern_properties(reading)
    others = _read_other_properties(reading, properties, patterns)
    if others is False:
        if not _says_others(reading):
            properties |= {name: {} for name in required if name not in properties}
    elif properties or patterns:
        reading.normaliser.note_open_object()
    if properties:
        reading.node["properties"] = properties
    if required:
        reading.node["required"] = required
    if patterns:
        reading.node["patternProperties"] = patterns
    if others is not None:
        reading.node["additionalProperties"] = others
    _read_size(reading, properties, required, closed=others is False and not patterns)


def _says_others(reading: SchemaContext) -> bool:
    return "additionalProperties" in reading.schema


def _read_properties(reading: SchemaContext) -> Node:
    declared = reading.schema.get("properties", {})
    param = reading.where("properties")
    if not isinstance(declared, dict):
        raise malformed(param, "an object")
    if len(declared) > MAX_PROPERTIES:
        raise InvalidRequest(
            f"{param} declares more than {MAX_PROPERTIES} properties.", param=param
        )
    return {
        name: reading.schema_or_false(schema, f"{param}.{name}")
        for name, schema in declared.items()
    }


def _read_required(reading: SchemaContext) -> list[str]:
    required = reading.schema.get("required", [])
    if isinstance(required, bool):  # draft 3, of the property itself
        return []
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise malformed(reading.where("required"), "a list of names")
    return list(dict.fromkeys(str(name) for name in required))


def _read_pattern_properties(reading: SchemaContext) -> Node:
    param = reading.where("patternProperties")
    declared = reading.schema.get("patternProperties", {})
    if not isinstance(declared, dict):
        raise malformed(param, "an object")
    patterns: Node = {}
    for pattern, schema in declared.items():
        problem = pattern_problem(pattern)
        if problem:
            reading.normaliser.relax(f"{param}.{pattern}", f": {problem}")
        else:
            patterns[pattern] = reading.schema_or_false(schema, f"{param}.{pattern}")
    return patterns


def _read_other_properties(
    reading: SchemaContext, properties: Node, patterns: Node
) -> Node | bool | None:
    """The normal form of `additionalProperties`; None if there is nothing to say."""
    schema = reading.schema
    others: Node | bool | None = None
    if _says_others(reading):
        param = reading.where("additionalProperties")
        others = reading.schema_or_false(schema["additionalProperties"], param)
    elif reading.alone and (properties or patterns):
        others = False
    if schema.get("unevaluatedProperties", True) is not True and others is not False:
        if reading.alone and schema["unevaluatedProperties"] is False and not _says_others(reading):
            others = False
        else:
            reading.relax("unevaluatedProperties")
    return _read_names(reading, others, patterns)


def _read_names(
    reading: SchemaContext, others: Node | bool | None, patterns: Node
) -> Node | bool | None:
    """Apply `propertyNames` to the names that are not declared."""
    names = reading.schema.get("propertyNames", True)
    if names is True or names in ({}, {"type": "string"}) or others is False:
        return others
    pattern = names.get("pattern") if isinstance(names, dict) else None
    if (
        not isinstance(names, dict)
        or not isinstance(pattern, str)
        or names.keys() - {"type", "pattern", "title", "description"}
        or patterns
        or pattern_problem(pattern)
    ):
        reading.relax("propertyNames", " unless it consists of a pattern")
        return others
    patterns[pattern] = {} if others is None else others
    return False


def _read_size(
    reading: SchemaContext, properties: Node, required: list[str], *, closed: bool
) -> None:
    for keyword in ("minProperties", "maxProperties"):
        if keyword in reading.schema:
            read_count(reading, keyword, reading.schema[keyword])
    least = reading.node.pop("minProperties", 0)
    most = reading.node.pop("maxProperties", math.inf)
    if least > len(required):
        # An undeclared name can come twice and then counts once.
        if least == 1 and (closed or not properties):
            reading.node["minProperties"] = 1
        else:
            reading.relax("minProperties", " beyond 1 or the number of required properties")
    if most < len(properties) or not closed:
        optional = properties.keys() - set(required)
        if most is math.inf:
            return
        if not optional or (closed and most <= 1):
            reading.node["maxProperties"] = most
        else:
            reading.relax(
                "maxProperties",
                " where some of the declared properties are optional",
            )
