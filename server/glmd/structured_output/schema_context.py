"""One schema object on its way to normal form, and what all of its keywords need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glmd.chat.types import Json
from glmd.errors import InvalidRequest

if TYPE_CHECKING:
    from glmd.structured_output.json_schema import JsonSchemaCompiler

Node = dict[str, Any]
"""A schema in normal form."""


@dataclass(slots=True)
class SchemaContext:
    """A schema that is being read.

    Attributes:
        normaliser: of the document that it is part of.
        schema: as the client wrote it.
        param: the client's name of it.
        alone: no other schema has a say in the same instances, nor does a part of this one apart
            from its other keywords.
        types: the types that it allows; None: any.
        node: its normal form, as far as it has been read.
        also: further normal forms that must hold.
    """

    normaliser: JsonSchemaCompiler
    schema: Mapping[str, Json]
    param: str
    alone: bool
    types: frozenset[str] | None
    node: Node = field(default_factory=dict)
    also: list[Node] = field(default_factory=list)

    def where(self, keyword: str) -> str:
        """The client's name of a keyword's value."""
        return f"{self.param}.{keyword}"

    def relax(self, keyword: str, only: str = "") -> None:
        """Leave a keyword out, or refuse it; see `JsonSchemaCompiler.relax`."""
        self.normaliser.relax(self.where(keyword), only)

    def schema_or_false(self, value: Json, param: str) -> Node | bool:
        """The normal form of a schema within this one, or False."""
        return value if value is False else self.normaliser.normalise(value, param)


def malformed(param: str, shape: str) -> InvalidRequest:
    """What is to be raised where a value has not the shape that it must have."""
    return InvalidRequest(f"{param} must be {shape}.", param=param)


def read_count(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`minItems`, `maxLength` and the like."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
        raise malformed(reading.where(keyword), "a whole number, not negative")
    count = int(value)
    if keyword == "maxLength":
        count = min(count, reading.node.get(keyword, count))
    reading.node[keyword] = count
