"""Schemas made of others: `anyOf`, `oneOf`, `allOf` and `$ref`."""

from __future__ import annotations

from glmd.chat.types import Json
from glmd.structured_output.disjointness import separate
from glmd.structured_output.schema_context import SchemaContext, malformed


def read_branches(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`anyOf`, `allOf`, and `oneOf` where its branches exclude each other."""
    param = reading.where(keyword)
    if not isinstance(value, list) or not value:
        raise malformed(param, "a list of schemas")
    nodes = [
        reading.normaliser.normalise(branch, f"{param}[{index}]", alone=reading.alone)
        for index, branch in enumerate(value)
    ]
    if keyword == "oneOf":
        separated = separate(nodes, reading.normaliser.definitions)
        if separated is None:
            reading.relax(keyword, " where more than one of its schemas could be valid")
        nodes = separated or nodes
        keyword = "anyOf"
    if keyword in reading.node:  # anyOf and oneOf
        reading.also.append({keyword: nodes})
    else:
        reading.node[keyword] = nodes


def read_reference(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`$ref`."""
    reading.node |= reading.normaliser.reference(value, reading.where(keyword), alone=reading.alone)
