"""Rewrite JSON schemas into the subset that llguidance enforces exactly.

llguidance reads some keywords differently from a validator and does not support others. This module
rewrites the former (formats, bounds, `oneOf`, references) and refuses or drops the latter. Every
instance of the result is an instance of the original schema, but not vice versa:

- Objects list their properties in the order of the schema.
- An object that declares properties and says nothing of others has no others, unless another
  schema constrains the same object (`allOf`, keywords beside `$ref`).
- A schema without `type` that has keywords of one type is of that type.
- Numbers above 2^53 that a double cannot hold may not be named.

`benchmarks/json_schema_conformance.py` compares the result with llguidance's own support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from glmd.chat.tool_args import NAMED
from glmd.chat.types import Json
from glmd.errors import InvalidRequest
from glmd.structured_output.alternatives import (
    IMPLIED_TYPE,
    MAX_VALUES,
    READERS,
    Constraint,
    Malformed,
    Unenforceable,
    canonical_text,
    is_exact,
    matches,
    pattern_problem,
    read_bound,
    read_count,
    separate,
    target_name,
)
from glmd.structured_output.request import Schema

MAX_DEPTH = 64
MAX_SCHEMAS = 20_000
MAX_PROPERTIES = 1_000
"""Properties of one object. A mask takes about 1 ms per 100 properties that may come next."""

WHITESPACE = r"[ ]|\r?\n[ \t]{0,60}"
"""Between the parts of JSON: one space, or one line break and indentation. Models get stuck in
unbounded runs of whitespace."""

_OBJECT_KEYWORDS = frozenset(
    ("properties", "required", "additionalProperties", "patternProperties", "minProperties")
) | frozenset(("maxProperties", "propertyNames", "unevaluatedProperties"))
_IMPLIED_TYPES = {
    "object": _OBJECT_KEYWORDS,
    "array": frozenset(("items", "prefixItems", "additionalItems", "minItems", "maxItems")),
    "string": frozenset(("pattern", "minLength", "maxLength")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
    | {"multipleOf"},
}
"""Keywords that imply a type where `type` is absent."""

_UNSUPPORTED: dict[str, Callable[[Mapping[str, Json]], bool]] = {
    "not": lambda schema: False,
    "if": lambda schema: "then" not in schema and "else" not in schema,
    "contains": lambda schema: schema.get("minContains") == 0 and "maxContains" not in schema,
    "dependentRequired": lambda schema: schema["dependentRequired"] == {},
    "dependentSchemas": lambda schema: schema["dependentSchemas"] == {},
    "dependencies": lambda schema: schema["dependencies"] == {},
    "unevaluatedItems": lambda schema: schema["unevaluatedItems"] is True,
    "$dynamicRef": lambda schema: False,
    "$recursiveRef": lambda schema: False,
}
"""Keywords that cannot be enforced, each with a test for uses that constrain nothing."""


class JsonSchemaCompiler:
    """Compiles the schemas of one document.

    Attributes:
        strict: refuse keywords that cannot be enforced.
        definitions: targets of the `$ref`s (`#/$defs/…`) in compiled schemas.
        relaxed: paths of keywords that were dropped because they cannot be enforced (non-strict).
    """

    def __init__(self, root: Json, *, strict: bool) -> None:
        """
        Args:
            root: document that local references are resolved in.
        """
        self.strict = strict
        self.definitions: dict[str, Schema] = {}
        self.relaxed: list[str] = []
        self.has_open_objects = False
        self._root = root
        self._names: dict[tuple[str, bool], str] = {}
        self._schemas = 0
        self._depth = 0

    def compile(self, schema: Json, param: str, *, alone: bool = True) -> Schema:
        """Compile one schema of the document.

        Args:
            param: the client's name of the schema.
            alone: no other schema constrains the same instances.

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
                return schema
            if not isinstance(schema, dict):
                raise _malformed(param, "a JSON schema: an object or a boolean")
            return _SchemaReader(self, schema, param, alone).read()
        finally:
            self._depth -= 1

    def document(self, schema: Schema, *, whitespace: bool = True) -> dict[str, Any]:
        """Return a document for llguidance: a compiled schema with definitions."""
        definitions: dict[str, Schema] = {}
        pending = [schema]
        while pending:
            current = pending.pop()
            if isinstance(current, bool):
                continue
            if "$ref" in current:
                name = target_name(current)
                if name not in definitions:
                    definitions[name] = self.definitions[name]
                    pending.append(definitions[name])
            pending += _subschemas(current)
        # Where undeclared names are allowed, "\u0061" would be a second spelling of a declared "a".
        escapes = 'nrbtf\\"' if self.has_open_objects else 'nrbtf\\"u'
        options = {"json_allowed_escapes": escapes, "whitespace_flexible": whitespace}
        if whitespace:
            options["whitespace_pattern"] = WHITESPACE
        root = {"allOf": [schema]} if isinstance(schema, bool) else schema
        return {"x-guidance": options, **root, "$defs": definitions}

    def reference(self, pointer: Json, param: str, *, alone: bool) -> dict[str, Any]:
        """Compile the target of a `$ref`, once, and return a reference to the result."""
        if not isinstance(pointer, str):
            raise _malformed(param, "a string")
        if not pointer.startswith("#") or (len(pointer) > 1 and pointer[1] != "/"):
            self.relax(param, ": only references within the schema, such as #/$defs/City, are")
            return {}
        key = (pointer, alone)
        if key not in self._names:
            target = self._find(pointer, param)
            name = self._names[key] = str(len(self._names))
            self.definitions[name] = True
            self.definitions[name] = self.compile(target, param, alone=alone)
            self._check_cycle(name, param)
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def relax(self, param: str, reason: str = "") -> None:
        """Record a dropped keyword.

        Args:
            reason: continues the sentence "PARAM cannot be enforced".

        Raises:
            InvalidRequest: the compiler is strict.
        """
        if self.strict:
            raise InvalidRequest(
                f"{param} cannot be enforced{reason}.", param=param, code="unsupported_schema"
            )
        self.relaxed.append(param)

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

    def _check_cycle(self, name: str, param: str) -> None:
        """Refuse a definition that consists of references back to itself."""
        seen = set()
        schema = self.definitions[name]
        while isinstance(schema, dict) and "$ref" in schema:
            if name in seen:
                raise InvalidRequest(f"{param} is a circular reference.", param=param)
            seen.add(name)
            name = target_name(schema)
            schema = self.definitions[name]


class _SchemaReader:
    """Compiles one schema object, keyword by keyword, into `node`."""

    def __init__(
        self, compiler: JsonSchemaCompiler, schema: Mapping[str, Json], param: str, alone: bool
    ) -> None:
        branches = schema.get("allOf")
        parts = len(branches) if isinstance(branches, list) else 0
        parts += sum(keyword in schema for keyword in ("anyOf", "oneOf", "$ref"))
        parts += not _OBJECT_KEYWORDS.isdisjoint(schema)
        self.alone = alone and parts <= 1
        self.compiler = compiler
        self.schema = schema
        self.param = param
        self.types = self._read_types()
        self.node: Constraint = {}

    def read(self) -> Constraint:
        if self.types is not None:
            self.node["type"] = sorted(self.types)
            if "type" not in self.schema:
                self.node[IMPLIED_TYPE] = True
        self._read_values()
        for keyword, value in self.schema.items():
            if keyword in READERS:
                self._read_scalar(keyword, value)
            elif keyword in ("anyOf", "oneOf", "allOf"):
                self._read_branches(keyword, value)
            elif keyword == "$ref":
                param = self._path(keyword)
                self.node |= self.compiler.reference(value, param, alone=self.alone)
            elif keyword in ("items", "prefixItems", "additionalItems"):
                self._read_items(keyword, value)
            elif keyword == "uniqueItems":
                limit = self.schema.get("maxItems")
                if value is True and not (isinstance(limit, int) and limit <= 1):
                    self._relax(keyword)
            elif keyword in _UNSUPPORTED and not _UNSUPPORTED[keyword](self.schema):
                reference = keyword in ("$dynamicRef", "$recursiveRef")
                self._relax(keyword, ": only $ref is" if reference else "")
        if "object" in (self.types or NAMED) and not _OBJECT_KEYWORDS.isdisjoint(self.schema):
            self._read_object()
        return self.node

    def _path(self, keyword: str) -> str:
        return f"{self.param}.{keyword}"

    def _relax(self, keyword: str, reason: str = "") -> None:
        self.compiler.relax(self._path(keyword), reason)

    def _compile_all(self, keyword: str, value: Json, *, alone: bool = True) -> list[Schema]:
        if not isinstance(value, list):
            raise _malformed(self._path(keyword), "a list of schemas")
        return [
            self.compiler.compile(schema, f"{self._path(keyword)}[{index}]", alone=alone)
            for index, schema in enumerate(value)
        ]

    # -- any type ---------------------------------------------------------------------------

    def _read_types(self) -> frozenset[str] | None:
        """Return the allowed types; None allows any."""
        if "type" not in self.schema:
            for name, keywords in _IMPLIED_TYPES.items():
                if not keywords.isdisjoint(self.schema):
                    return frozenset((name,))
            return None
        kind = self.schema["type"]
        names = kind if isinstance(kind, list) else [kind]
        if not names or not all(isinstance(name, str) and name in NAMED for name in names):
            raise _malformed(self._path("type"), f"one of {', '.join(NAMED)}, or a list of them")
        types = frozenset(str(name) for name in names)
        return types - {"integer"} if "number" in types else types

    def _read_values(self) -> None:
        """Read `enum` and `const` as an `enum` of the values that the types allow."""
        if "enum" not in self.schema and "const" not in self.schema:
            return
        keyword = "enum" if "enum" in self.schema else "const"
        values = self.schema.get("enum", [self.schema.get("const")])
        if not isinstance(values, list):
            raise _malformed(self._path("enum"), "a list")
        if len(values) > MAX_VALUES:
            param = self._path("enum")
            raise InvalidRequest(f"{param} has more than {MAX_VALUES} values.", param=param)
        if "const" in self.schema:
            const = canonical_text(self.schema["const"])
            values = [value for value in values if canonical_text(value) == const]
        exact = [value for value in values if is_exact(value)]
        if len(exact) < len(values):
            self._relax(keyword, ": it names a number that doubles cannot hold")
            if not exact:
                return
        self.node["enum"] = exact

    def _read_branches(self, keyword: str, value: Json) -> None:
        """Read `anyOf`, `allOf` and `oneOf`."""
        branches = self._compile_all(keyword, value, alone=self.alone)
        if not branches:
            raise _malformed(self._path(keyword), "a list of schemas that is not empty")
        if keyword == "oneOf":
            separated = separate(branches, self.compiler.definitions)
            if separated is None:
                self._relax(keyword, " where more than one of its schemas could be valid")
            branches = separated or branches
        self._add(*(branches if keyword == "allOf" else [{"anyOf": branches}]))

    def _read_scalar(self, keyword: str, value: Json) -> None:
        """Read a keyword of numbers or strings, or a count."""
        if keyword == "format" and "string" not in (self.types or NAMED):
            return
        read = READERS[keyword]
        if isinstance(value, bool) and keyword.startswith("exclusive"):  # draft 4
            if not value or (other := keyword.replace("exclusiveM", "m")) not in self.schema:
                return
            value, read = self.schema[other], read_bound
        for name, each in self._checked(read, keyword, value).items():
            if name in self.node:
                self._add({name: each})
            else:
                self.node[name] = each

    def _checked(
        self, read: Callable[[str, Json], Constraint], keyword: str, value: Json
    ) -> Constraint:
        try:
            return read(keyword, value)
        except Malformed as error:
            raise _malformed(self._path(keyword), str(error)) from None
        except Unenforceable as error:
            self._relax(keyword, str(error))
            return {}

    def _add(self, *schemas: Schema) -> None:
        """Add further constraints to the node."""
        self.node["allOf"] = [*self.node.get("allOf", ()), *schemas]

    # -- arrays -----------------------------------------------------------------------------

    def _read_items(self, keyword: str, value: Json) -> None:
        """Read `items`, `prefixItems` and `additionalItems` in the form of 2020-12."""
        if isinstance(value, list) or keyword == "prefixItems":  # a list: before 2020-12
            self.node["prefixItems"] = self._compile_all(keyword, value)
        elif keyword == "items" or isinstance(self.schema.get("items"), list):
            self.node["items"] = self.compiler.compile(value, self._path(keyword))

    # -- objects ----------------------------------------------------------------------------

    def _read_object(self) -> None:
        properties = self._compile_map("properties")
        if len(properties) > MAX_PROPERTIES:
            param = self._path("properties")
            raise InvalidRequest(
                f"{param} declares more than {MAX_PROPERTIES} properties.", param=param
            )
        required = self._read_required()
        patterns = {}
        for pattern, schema in self._compile_map("patternProperties").items():
            problem = pattern_problem(pattern)
            if problem:
                self._relax(f"patternProperties.{pattern}", f": {problem}")
            else:
                patterns[pattern] = schema
        others = self._read_others(bool(properties or patterns))
        forbidden = self.schema.get("unevaluatedProperties") is False
        if others is False and not forbidden and "additionalProperties" not in self.schema:
            properties |= {name: True for name in required if name not in properties}
        others = self._read_names(properties, patterns, others)
        if others is not False and (properties or patterns):
            self.compiler.has_open_objects = True
        if properties:
            self.node["properties"] = properties
        if required:
            self.node["required"] = required
        if patterns:
            self.node["patternProperties"] = patterns
        if others is not None:
            self.node["additionalProperties"] = others
        self._read_size(properties, required, closed=others is False and not patterns)

    def _compile_map(self, keyword: str) -> dict[str, Schema]:
        value = self.schema.get(keyword, {})
        if not isinstance(value, dict):
            raise _malformed(self._path(keyword), "an object")
        return {
            name: self.compiler.compile(schema, f"{self._path(keyword)}.{name}")
            for name, schema in value.items()
        }

    def _read_required(self) -> list[str]:
        required = self.schema.get("required", [])
        if isinstance(required, bool):  # draft 3, of the property itself
            return []
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _malformed(self._path("required"), "a list of names")
        return list(dict.fromkeys(str(name) for name in required))

    def _read_others(self, declares: bool) -> Schema | None:
        """Return the schema of undeclared properties; None where nothing constrains them."""
        explicit = "additionalProperties" in self.schema
        others: Schema | None = None
        if explicit:
            others = self.compiler.compile(
                self.schema["additionalProperties"], self._path("additionalProperties")
            )
        elif self.alone and declares:
            others = False
        unevaluated = self.schema.get("unevaluatedProperties", True)
        if unevaluated is not True and others is not False:
            if self.alone and unevaluated is False and not explicit:
                return False
            self._relax("unevaluatedProperties")
        return others

    def _read_names(
        self, properties: dict[str, Schema], patterns: dict[str, Schema], others: Schema | None
    ) -> Schema | None:
        """Apply `propertyNames`; return the schema of properties that no pattern covers."""
        names = self.schema.get("propertyNames", True)
        if names is True or names in ({}, {"type": "string"}):
            return others
        pattern = names.get("pattern") if isinstance(names, dict) else None
        if (
            not isinstance(names, dict)
            or not isinstance(pattern, str)
            or names.keys() - {"type", "pattern", "title", "description"}
            or patterns
            or pattern_problem(pattern)
        ):
            self._relax("propertyNames", " unless it consists of a pattern")
            return others
        for name in properties:
            if not matches(pattern, name):
                properties[name] = False
        if others is not False:
            patterns[pattern] = True if others is None else others
        return False

    def _read_size(self, declared: Iterable[str], required: list[str], *, closed: bool) -> None:
        """Read `minProperties` and `maxProperties`."""
        size = {
            keyword: self._checked(read_count, keyword, self.schema[keyword])[keyword]
            for keyword in ("minProperties", "maxProperties")
            if keyword in self.schema
        }
        names = set(declared)
        if size.get("minProperties", 0) > len(required):
            # An undeclared name may come twice in the text and counts once.
            if size["minProperties"] == 1 and (closed or not names):
                self.node["minProperties"] = 1
            else:
                self._relax("minProperties", " beyond 1 or the number of required properties")
        most = size.get("maxProperties")
        if most is not None and (most < len(names) or not closed):
            if names <= set(required) or (closed and most <= 1):
                self.node["maxProperties"] = most
            else:
                self._relax("maxProperties", " where some of the declared properties are optional")


def _subschemas(node: Mapping[str, Any]) -> Iterator[Schema]:
    """Yield the schemas directly within a compiled schema."""
    for keyword in ("properties", "patternProperties"):
        yield from node.get(keyword, {}).values()
    for keyword in ("anyOf", "allOf", "prefixItems"):
        yield from node.get(keyword, ())
    for keyword in ("items", "additionalProperties"):
        if keyword in node:
            yield node[keyword]


def _malformed(param: str, shape: str) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {shape}.", param=param)
