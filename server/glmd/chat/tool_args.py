"""Types of tool arguments, read from the tool's JSON schema.

GLM writes string arguments raw and every other value as JSON, so `123` may be a number or a string:
the schema decides. This module is not a validator. It reads the keywords that tell types apart:
`type`, `enum`, `const`, `nullable`, `anyOf`, `oneOf`, `allOf` and local `$ref`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isinf
from typing import Any, NoReturn
from urllib.parse import unquote

from glmd.chat.types import MAX_DEPTH, Json
from glmd.errors import InvalidRequest, invalid_field
from glmd.utils.text import quoted

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
"""First characters of the JSON of each type."""
PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}
JSON_SPACE = " \t\n\r"
NUMBER = frozenset("+-.eE0123456789" + JSON_SPACE)
LITERALS = {"n": "null", "t": "true", "f": "false"}

RAW_ARGUMENTS = "arguments"
"""Name of the only argument of a recorded call whose arguments cannot be read."""

TOO_DEEP = "schema_too_deep"
"""Error code of a schema beyond `MAX_DEPTH`."""

MAX_VALUES = 250_000
"""Values of arguments sent as text that are parsed, counted by brackets and commas: 30 ms."""

MAX_ENCODINGS = 3
"""Times that the arguments of a recorded call may be encoded as JSON."""

dump = json.JSONEncoder(ensure_ascii=False).encode


def reject_constant(name: str) -> NoReturn:
    """For `json.loads(parse_constant=…)`: refuse NaN and Infinity."""
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"{text} is out of range")
    return number


DECODER = json.JSONDecoder(parse_constant=reject_constant, parse_float=_finite)


@dataclass(frozen=True)
class ArgType:
    """Type of an argument: any value of `types`, or one of `values`.

    Attributes:
        types: names in `NAMED`; "number" means numbers that are not integers.
    """

    types: frozenset[str]
    values: tuple[Json, ...] = ()

    def allows(self, value: Json) -> bool:
        return type_of(value) in self.types or any(_same(value, one) for one in self.values)

    @cached_property
    def free(self) -> bool:
        """Every type is allowed: text that parses as JSON is JSON, other text a string."""
        return self.types == TYPES

    @cached_property
    def only_string(self) -> bool:
        return self._all_types == {"string"}

    @cached_property
    def starts(self) -> str | None:
        """First characters of values that may be JSON; None if strings are not allowed."""
        if "string" not in self._all_types:
            return None
        starts = "".join(STARTS.get(name, "") for name in self._all_types)
        return starts + '"' if self.free else starts

    def json_of(self, text: str) -> str:
        """JSON of a complete value, as the model wrote it.

        JSON stays as written (`1.10`, integers of 30 digits), and a string keeps its whitespace.
        Text that is neither JSON nor of an allowed type becomes a string.
        """
        if self.only_string:
            return dump(text)
        stripped = text.strip(JSON_SPACE)
        value: Json
        try:
            value = json.loads(stripped, parse_constant=reject_constant)
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
"""For unknown tools, undeclared arguments and empty schemas."""


class ArgTypeReader:
    """Reads the types of a tool's arguments. Each `$ref` is read once, so cycles end."""

    def __init__(self, root: dict[str, Json]) -> None:
        self._root = root
        self._by_reference: dict[str, ArgType] = {}

    def arguments(self) -> dict[str, ArgType]:
        """Types of the declared arguments, by name."""
        types: dict[str, ArgType] = {}
        for schema in self._combined(self._root, set()):
            properties = schema.get("properties")
            for name, declared in properties.items() if isinstance(properties, dict) else ():
                types.setdefault(name, self.read(declared))
        return types

    def read(self, schema: Json, depth: int = 0) -> ArgType:
        """Type of the values that are valid under `schema`.

        Any type where it is malformed.
        """
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return FREE
        found = _own_type(schema)
        if "$ref" in schema:
            found &= self._referred(schema["$ref"], depth + 1)
        for branch in _list(schema, "allOf"):
            found &= self.read(branch, depth + 1)
        for keyword in ("anyOf", "oneOf"):
            branches = _list(schema, keyword)
            if branches:
                union = ArgType(frozenset())
                for branch in branches:
                    union |= self.read(branch, depth + 1)
                found &= union
        if schema.get("nullable") is True:  # OpenAPI 3.0
            found |= ArgType(frozenset({"null"}))
        return found

    def _referred(self, reference: Json, depth: int) -> ArgType:
        key = str(reference)
        if key not in self._by_reference:
            self._by_reference[key] = FREE  # the result of a reference to itself
            self._by_reference[key] = self.read(self._resolved(reference), depth)
        return self._by_reference[key]

    def _resolved(self, reference: Json) -> Json:
        try:
            return resolve(reference, self._root)
        except KeyError:  # refused by `check_schema` where the schema must be followed
            return True

    def _combined(
        self, schema: Json, seen: set[str], depth: int = 0
    ) -> Iterator[Mapping[str, Json]]:
        """Yield a schema, and those that `$ref`, `allOf`, `anyOf` and `oneOf` add to it."""
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return
        yield schema
        reference = str(schema.get("$ref"))
        if "$ref" in schema and reference not in seen:
            seen.add(reference)
            yield from self._combined(self._resolved(schema["$ref"]), seen, depth + 1)
        for keyword in ("allOf", "anyOf", "oneOf"):
            for branch in _list(schema, keyword):
                yield from self._combined(branch, seen, depth + 1)


class ValueWriter:
    """JSON of one value in pieces: strings as they arrive, other values when complete."""

    def __init__(self, type: ArgType) -> None:
        self._type = type
        self._is_string = type.only_string
        self._is_open = False
        """The opening quote of the string was written."""
        self._start = ""
        """First character that is not whitespace; "" if none arrived."""
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        """Take the next text, and return the JSON that no further text can change."""
        if self._is_string:
            return self._string(text)
        self._held.append(text)
        if not self._must_be_string(text):
            return ""
        self._is_string = True
        return self._string("".join(self._held))

    def close(self) -> str:
        """Return the rest of the JSON."""
        if self._is_string:
            return self._string("") + '"'
        return self._type.json_of("".join(self._held))

    def _string(self, text: str) -> str:
        escaped = dump(text)[1:-1]
        if self._is_open:
            return escaped
        self._is_open = True
        return '"' + escaped

    def _must_be_string(self, text: str) -> bool:
        """Whether the value, which `text` continues, cannot be JSON of any allowed type."""
        if self._type.starts is None:
            return False
        if not self._start:
            text = text.lstrip(JSON_SPACE)
            if not text:
                return False
            self._start = text[0]
        if self._start not in self._type.starts:
            return True
        literal = LITERALS.get(self._start)
        if literal is not None:
            return not literal.startswith("".join(self._held).strip(JSON_SPACE))
        return self._start in NUMBER and not NUMBER.issuperset(text)


def arguments_of(value: object, param: str) -> dict[str, Json]:
    """Arguments of a call, sent as JSON text or an object; {} for null and blank text.

    Raises:
        InvalidRequest: not a JSON object.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            value = DECODER.decode(value)
        except (ValueError, RecursionError) as error:
            raise invalid_field(param, f"not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise invalid_field(param, "must be a JSON object.")
    return value


def record_arguments(given: Any) -> dict[str, Json]:
    """Arguments of a call in the history, whose JSON may be cut or malformed.

    Of text that is not JSON the complete arguments are kept; without any, the text is the only
    argument, as is text with more than `MAX_VALUES` values. JSON may be encoded twice.
    """
    value = given
    for _ in range(MAX_ENCODINGS):
        if value is None or (isinstance(value, str) and not value.strip()):
            return {}
        if isinstance(value, dict):
            return (
                value if value is not given or _is_finite(value) else {RAW_ARGUMENTS: dump(value)}
            )
        if not isinstance(value, str) or sum(map(value.count, "[{,")) > MAX_VALUES:
            break
        try:
            value = DECODER.decode(value)
        except (ValueError, RecursionError):
            return _complete_members(value) or {RAW_ARGUMENTS: value}
    return {RAW_ARGUMENTS: given if isinstance(given, str) else dump(given)}


def _complete_members(text: str) -> dict[str, Json]:
    """Members of a JSON object up to where the text is cut or malformed."""
    members: dict[str, Json] = {}
    place = _after_space(text, 0)
    opening = "{"
    try:
        while text[place : place + 1] == opening:
            key, place = DECODER.raw_decode(text, _after_space(text, place + 1))
            place = _after_space(text, place)
            if not isinstance(key, str) or text[place : place + 1] != ":":
                break
            value, place = DECODER.raw_decode(text, _after_space(text, place + 1))
            place = _after_space(text, place)
            if type(value) in (int, float) and text[place : place + 1] not in (",", "}"):
                break  # the rest of the number may be missing: of 1.5 `1.` reads as 1
            members[key] = value
            opening = ","
    except (ValueError, RecursionError):
        pass  # the rest is what is malformed
    return members


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] and text[place] in JSON_SPACE:
        place += 1
    return place


def _is_finite(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def check_schema(root: Json, param: str) -> None:
    """Refuse a schema of arguments that is malformed in the keywords read here.

    Raises:
        InvalidRequest: names the keyword.
    """
    if not isinstance(root, dict):
        raise invalid_field(param, "must be a JSON schema (an object).")
    if root.get("type", "object") != "object":
        raise invalid_field(f"{param}.type", 'must be "object".')
    _check(root, root, param, 0, set())


def resolve(reference: Json, root: dict[str, Json]) -> Json:
    """The schema at a reference such as `#/$defs/City`.

    Returns: True, which allows any value, for references outside `root`.

    Raises:
        KeyError: there is no schema at `reference`.
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
    """JSON schema's name of a value's type; 3.0 is an integer in JSON schema."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return PYTHON_TYPES[type(value)]


def _distinct(values: tuple[Json, ...]) -> tuple[Json, ...]:
    return tuple({json.dumps(value, sort_keys=True): value for value in values}.values())


def _same(one: Json, other: Json) -> bool:
    return one == other and type_of(one) == type_of(other)


def _list(schema: Mapping[str, Json], keyword: str) -> list[Json]:
    branches = schema.get(keyword)
    return branches if isinstance(branches, list) else []


def _own_type(schema: Mapping[str, Json]) -> ArgType:
    """The type that `type`, `enum` and `const` declare, or that other keywords imply."""
    declared = schema.get("type")
    named = [declared] if isinstance(declared, str) else _list(schema, "type")
    names = {name.lower() for name in named if isinstance(name, str)} & TYPES
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
        raise invalid_field(param, "must be a JSON schema (an object).")
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{param}: nested too deeply.", param=param, code=TOO_DEEP)
    declared = schema.get("type", [])
    names = declared if isinstance(declared, list) else [declared]
    if not all(isinstance(name, str) and name in TYPES for name in names):
        raise invalid_field(f"{param}.type", f"must be one of {', '.join(NAMED)}, or a list.")
    for keyword in ("properties", "$defs", "definitions"):
        if not isinstance(schema.get(keyword, {}), dict):
            raise invalid_field(f"{param}.{keyword}", "must be an object.")
    for keyword in ("enum", "required", "allOf", "anyOf", "oneOf"):
        if not isinstance(schema.get(keyword, []), list):
            raise invalid_field(f"{param}.{keyword}", "must be a list.")
    for where, inner in _inner_schemas(schema):
        _check(inner, root, f"{param}.{where}", depth + 1, seen)
    reference = str(schema.get("$ref"))
    if "$ref" in schema and reference not in seen:
        seen.add(reference)
        try:
            referred = resolve(schema["$ref"], root)
        except KeyError:
            raise invalid_field(f"{param}.$ref", f"{quoted(reference)} does not exist.") from None
        _check(referred, root, f"{param}.$ref", depth + 1, seen)


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
