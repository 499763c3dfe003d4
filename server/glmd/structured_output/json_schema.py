"""JSON schemas, put into the form in which llguidance enforces them to the letter.

What it would enforce only in part, or read differently from a validator, is rewritten (formats,
`oneOf`, references) or refused. The result describes valid instances only, though not all of them:

- Objects list their properties in the order of the schema.
- An object that declares properties and does not say whether others are allowed has no others,
  unless other schemas have a say in it (`allOf`, keywords beside `$ref`).
- A schema without a type that has keywords of one type is of that type.
- Numbers beyond 2^53 that doubles cannot hold may not be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from glmd.chat.tool_args import NAMED
from glmd.chat.types import Json
from glmd.errors import InvalidRequest
from glmd.structured_output.keywords import READERS, REFUSED, says_nothing
from glmd.structured_output.objects import read_object
from glmd.structured_output.schema_context import Node, SchemaContext, malformed
from glmd.structured_output.values import OF_OBJECTS, read_types, read_values

MAX_DEPTH = 64
MAX_SCHEMAS = 20_000

WHITESPACE = r"[ ]|\r?\n[ \t]{0,60}"
"""Between the parts of JSON: a space, or a line's end and indentation. Never a run of them, into
which models fall."""


class JsonSchemaCompiler:
    """Normal forms of the schemas within one document.

    Attributes:
        strict: keywords that cannot be enforced are refused.
        definitions: what `$ref`s in normal forms point to (`#/$defs/…`).
        relaxed: keywords that were left out since they cannot be enforced (only if not strict).
    """

    def __init__(self, root: Json, *, strict: bool) -> None:
        """
        Args:
            root: what local references start from.
        """
        self.definitions: dict[str, Node] = {}
        self.relaxed: list[str] = []
        self._root = root
        self.strict = strict
        self._names: dict[tuple[str, bool], str] = {}
        self._schemas = 0
        self._depth = 0
        self._open_objects = False

    def normalise(self, schema: Json, param: str, *, alone: bool = True) -> Node:
        """The normal form of `schema`.

        Args:
            param: the client's name of it.
            alone: no other schema has a say in the same instances.

        Raises:
            InvalidRequest: names the keyword that is malformed, unsupported or beyond a limit.
        """
        self._schemas += 1
        self._depth += 1
        if self._depth > MAX_DEPTH or self._schemas > MAX_SCHEMAS:
            raise InvalidRequest(
                f"{param}: the schema is nested more than {MAX_DEPTH} deep, or consists of more "
                f"than {MAX_SCHEMAS} schemas.",
                param=param,
            )
        try:
            if isinstance(schema, bool):
                return {} if schema else {"enum": []}
            if not isinstance(schema, dict):
                raise malformed(param, "a JSON schema: an object or a boolean")
            return _read(self, schema, param, alone)
        finally:
            self._depth -= 1

    def document(self, node: Node, *, whitespace: bool = True) -> Node:
        """A normal form made self-contained, for llguidance's `json_schema`."""
        definitions: Node = {}
        pending: list[Any] = [node]
        while pending:
            item = pending.pop()
            if isinstance(item, list):
                pending += item
            elif isinstance(item, dict):
                name = str(item.get("$ref", "")).rpartition("/")[2]
                if name and name not in definitions:
                    definitions[name] = self.definitions[name]
                    pending.append(definitions[name])
                pending += item.values()
        # An undeclared name could be a declared one in disguise, "\u0061" for "a".
        escapes = 'nrbtf\\"' if self._open_objects else 'nrbtf\\"u'
        options: Node = {"json_allowed_escapes": escapes, "whitespace_flexible": whitespace}
        if whitespace:
            options["whitespace_pattern"] = WHITESPACE
        return {"x-guidance": options, **node, "$defs": definitions}

    def reference(self, pointer: Json, param: str, *, alone: bool) -> Node:
        """Normal form of a `$ref`, whose target is normalised once."""
        if not isinstance(pointer, str):
            raise malformed(param, "a string")
        if not pointer.startswith("#") or (len(pointer) > 1 and pointer[1] != "/"):
            self.relax(param, ": only references within the schema, such as #/$defs/City, are")
            return {}
        target = self._find(pointer, param)
        key = (pointer, alone)
        if key not in self._names:
            name = self._names[key] = str(len(self._names))
            self.definitions[name] = {}
            self.definitions[name] = self.normalise(target, param, alone=alone)
            _check_circle(name, self.definitions, param)
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def relax(self, param: str, only: str = "") -> None:
        """Note that a keyword is left out; if strict, refuse it."""
        if self.strict:
            raise InvalidRequest(
                f"{param} cannot be enforced{only}.", param=param, code="unsupported_schema"
            )
        self.relaxed.append(param)

    def note_open_object(self) -> None:
        self._open_objects = True

    def _find(self, pointer: str, param: str) -> Json:
        found = self._root
        for step in pointer.split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                raise InvalidRequest(f"{param} points nowhere: {pointer}.", param=param)
        return found


def _read(
    normaliser: JsonSchemaCompiler, schema: Mapping[str, Json], param: str, alone: bool
) -> Node:
    """The normal form of a schema object."""
    branches = schema.get("allOf")
    parts = len(branches) if isinstance(branches, list) else 0
    parts += sum(keyword in schema for keyword in ("anyOf", "oneOf", "$ref"))
    parts += not OF_OBJECTS.isdisjoint(schema)
    reading = SchemaContext(
        normaliser, schema, param, alone and parts <= 1, read_types(schema, param)
    )
    if reading.types is not None:
        names = sorted(reading.types)
        reading.node["type"] = names[0] if len(names) == 1 else names
    read_values(reading)
    for keyword, value in schema.items():
        reader = READERS.get(keyword)
        if reader is not None:
            reader(reading, keyword, value)
        elif keyword in REFUSED and not says_nothing(keyword, schema):
            reading.relax(keyword, REFUSED[keyword])
    if "object" in (reading.types or NAMED):
        read_object(reading)
    if reading.also:
        reading.node["allOf"] = reading.node.get("allOf", []) + reading.also
    return reading.node


def _check_circle(name: str, definitions: Mapping[str, Node], param: str) -> None:
    """Refuse a definition that is nothing but a way back to itself."""
    seen = set()
    while "$ref" in definitions[name]:
        if name in seen:
            raise InvalidRequest(f"{param} goes round in a circle.", param=param)
        seen.add(name)
        name = definitions[name]["$ref"].rpartition("/")[2]
