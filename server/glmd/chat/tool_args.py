"""What a tool's JSON schema says about the type of an argument.

The model writes strings raw and everything else as JSON, so `123` may be a number or a string:
the schema decides. This is no validator; it reads what tells types apart: `type`, `enum`,
`const`, `nullable`, `anyOf`, `oneOf`, `allOf` and local `$ref`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn
from urllib.parse import unquote

from glmd.chat.messages import Json
from glmd.chat.request_limits import MAX_DEPTH
from glmd.errors import InvalidRequest

NAMED = ("null", "boolean", "integer", "number", "string", "array", "object")
TYPES = frozenset(NAMED)
PYTHON_TYPES = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    str: "string",
    list: "array",
    dict: "object",
}
STARTS = {
    "null": "n",
    "boolean": "tf",
    "integer": "-0123456789",
    "number": "-0123456789",
    "array": "[",
    "object": "{",
}
"""The characters that JSON of a type begins with."""
PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}
JSON_SPACE = " \t\n\r"


@dataclass(frozen=True)
class ArgType:
    """What an argument may be: any value of some types, or one of some values."""

    types: frozenset[str]
    """Of NAMED; "number" stands for numbers that are no integers."""
    values: tuple[Json, ...] = ()

    def allows(self, value: Json) -> bool:
        return type_of(value) in self.types or any(_same(value, one) for one in self.values)

    @cached_property
    def free(self) -> bool:
        """Nothing is said: what is JSON is JSON, the rest a string."""
        return self.types == TYPES

    @cached_property
    def only_string(self) -> bool:
        """A string, whatever it looks like."""
        return self._all_types == {"string"}

    @cached_property
    def starts(self) -> str | None:
        """First characters of a value that is not plainly a string; None if strings are not
        allowed, so that no beginning says which it is."""
        if "string" not in self._all_types:
            return None
        starts = "".join(STARTS.get(name, "") for name in self._all_types)
        return starts + '"' if self.free else starts

    def json_of(self, text: str) -> str:
        """JSON for the text of a whole value, as the model wrote it.

        JSON stays as written (`1.10`, integers of 30 digits); a string keeps its last space and
        newline. What is neither what the schema asks for nor JSON is a string, as it stands.
        """
        if self.only_string:
            return dump(text)
        stripped = text.strip(JSON_SPACE)
        value: Json
        try:
            value = json.loads(stripped, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            if stripped in PYTHON_NAMES and self.starts is None:
                return PYTHON_NAMES[stripped]
            return dump(text)
        if self.free or self.starts is None:
            return stripped
        return stripped if not isinstance(value, str) and self.allows(value) else dump(text)

    @cached_property
    def _all_types(self) -> frozenset[str]:
        return self.types | {type_of(value) for value in self.values}

    def __or__(self, other: ArgType) -> ArgType:
        return ArgType(self.types | other.types, _distinct(self.values + other.values))

    def __and__(self, other: ArgType) -> ArgType:
        values = (*filter(other.allows, self.values), *filter(self.allows, other.values))
        return ArgType(self.types & other.types, _distinct(values))


FREE = ArgType(TYPES)
"""For an unknown tool, an undeclared argument, a schema that says nothing."""
NOTHING = ArgType(frozenset())


class ArgTypeReader:
    """Reads the schema of a tool's arguments; each reference once, so that circles end."""

    def __init__(self, root: dict[str, Json]) -> None:
        self._root = root
        self._known: dict[str, ArgType] = {}

    def arguments(self) -> dict[str, ArgType]:
        """The declared arguments' types, by name."""
        types: dict[str, ArgType] = {}
        for schema in self._combined(self._root, set()):
            properties = schema.get("properties")
            for name, declared in properties.items() if isinstance(properties, dict) else ():
                types.setdefault(name, self.read(declared))
        return types

    def read(self, schema: Json) -> ArgType:
        """The type of the values that are valid under `schema`."""
        if not isinstance(schema, dict):
            return FREE
        found = _own_type(schema)
        if "$ref" in schema:
            found &= self._referred(schema["$ref"])
        for branch in _list(schema, "allOf"):
            found &= self.read(branch)
        for keyword in ("anyOf", "oneOf"):
            branches = _list(schema, keyword)
            if branches:
                either = NOTHING
                for branch in branches:
                    either |= self.read(branch)
                found &= either
        if schema.get("nullable") is True:  # OpenAPI 3.0
            found |= ArgType(frozenset({"null"}))
        return found

    def _referred(self, reference: Json) -> ArgType:
        key = str(reference)
        if key not in self._known:
            self._known[key] = FREE  # what a circle says of itself
            self._known[key] = self.read(resolve(reference, self._root))
        return self._known[key]

    def _combined(self, schema: Json, seen: set[str]) -> Iterator[Mapping[str, Json]]:
        """A schema and those that it is put together from."""
        if not isinstance(schema, dict):
            return
        yield schema
        reference = str(schema.get("$ref"))
        if "$ref" in schema and reference not in seen:
            seen.add(reference)
            yield from self._combined(resolve(schema["$ref"], self._root), seen)
        for keyword in ("allOf", "anyOf", "oneOf"):
            for branch in _list(schema, keyword):
                yield from self._combined(branch, seen)


def check_schema(root: dict[str, Json], param: str) -> None:
    """Refuse a schema of arguments that is broken where it would be read.

    Raises:
        InvalidRequest: names the keyword at fault.
    """
    if root.get("type", "object") != "object":
        raise InvalidRequest(f'{param}.type must be "object".', param=f"{param}.type")
    _check(root, root, param, 0, set())


def resolve(reference: Json, root: dict[str, Json]) -> Json:
    """The schema that `#/$defs/City` points to; True, which allows anything, for other documents.

    Raises:
        KeyError: there is none.
    """
    if not isinstance(reference, str) or not (reference + "/").startswith("#/"):
        return True
    found: Json = root
    for step in unquote(reference).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            raise KeyError(reference)
    return found


def type_of(value: Json) -> str:
    """JSON schema's name for the type of a value; 3.0 is an integer there."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return PYTHON_TYPES[type(value)]


dump = json.JSONEncoder(ensure_ascii=False).encode


def _distinct(values: tuple[Json, ...]) -> tuple[Json, ...]:
    return tuple({json.dumps(value, sort_keys=True): value for value in values}.values())


def _same(one: Json, other: Json) -> bool:
    return one == other and type_of(one) == type_of(other)


def _list(schema: Mapping[str, Json], keyword: str) -> list[Json]:
    branches = schema.get(keyword)
    return branches if isinstance(branches, list) else []


def _own_type(schema: Mapping[str, Json]) -> ArgType:
    """What `type`, `enum` and `const` say, and failing these the keywords that imply a type."""
    kind = schema.get("type")
    names = {kind} if isinstance(kind, str) else set(map(str, _list(schema, "type")))
    if "number" in names:
        names.add("integer")
    if not names and not schema.keys().isdisjoint(("properties", "additionalProperties")):
        names = {"object"}
    if not names and "items" in schema:
        names = {"array"}
    found = ArgType(frozenset(names)) if names else FREE
    values = [schema["const"]] if "const" in schema else _list(schema, "enum")
    return found & ArgType(frozenset(), tuple(values)) if values else found


def _check(schema: Json, root: dict[str, Json], param: str, depth: int, seen: set[str]) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param} must be a JSON schema: an object.", param=param)
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{param} is nested too deeply.", param=param)
    _check_own(schema, param)
    for where, inner in _inner_schemas(schema):
        _check(inner, root, f"{param}.{where}", depth + 1, seen)
    reference = str(schema.get("$ref"))
    if "$ref" in schema and reference not in seen:
        seen.add(reference)
        try:
            referred = resolve(schema["$ref"], root)
        except KeyError:
            field = f"{param}.$ref"
            raise InvalidRequest(f"{field} points nowhere: {reference}.", param=field) from None
        _check(referred, root, f"{param}.$ref", depth + 1, seen)


def _check_own(schema: Mapping[str, Json], param: str) -> None:
    kind = schema.get("type", [])
    names = kind if isinstance(kind, list) else [kind]
    if not all(isinstance(name, str) and name in TYPES for name in names):
        raise InvalidRequest(
            f"{param}.type must be one of {', '.join(NAMED)}, or a list of them.",
            param=f"{param}.type",
        )
    for keyword, shape, said in (
        ("properties", dict, "an object"),
        ("$defs", dict, "an object"),
        ("definitions", dict, "an object"),
        ("enum", list, "a list"),
        ("required", list, "a list"),
        ("allOf", list, "a list"),
        ("anyOf", list, "a list"),
        ("oneOf", list, "a list"),
    ):
        if not isinstance(schema.get(keyword, shape()), shape):
            raise InvalidRequest(f"{param}.{keyword} must be {said}.", param=f"{param}.{keyword}")


def _inner_schemas(schema: Mapping[str, Json]) -> Iterable[tuple[str, Json]]:
    for keyword in ("properties", "$defs", "definitions"):
        inner = schema.get(keyword)
        for name, value in inner.items() if isinstance(inner, dict) else ():
            yield f"{keyword}.{name}", value
    for keyword in ("allOf", "anyOf", "oneOf"):
        for index, value in enumerate(_list(schema, keyword)):
            yield f"{keyword}[{index}]", value
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            yield keyword, schema[keyword]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
