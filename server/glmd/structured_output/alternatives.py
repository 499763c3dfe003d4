"""Keywords of numbers and strings; alternatives of compiled schemas.

Readers of keywords return a keyword as llguidance enforces it, or raise `Malformed` or
`Unenforceable`. Compiled schemas come from `glmd.structured_output.json_schema`. An alternative
describes instances by the keywords of one branch per `anyOf`: an instance of the schema fulfils at
least one.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from itertools import permutations
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from llguidance import LLMatcher

from glmd.chat.tool_args import NAMED, type_of
from glmd.chat.types import Json
from glmd.structured_output.backend import LIMITS
from glmd.structured_output.request import Schema

_MAX_STEPS = 32
"""Nested references and combinations."""
_MAX_FACTS = 64


IMPLIED_TYPE = "x-implied-type"
"""Marks a compiled schema whose `type` is not in the client's schema. llguidance ignores it."""


class TooManyAlternatives(Exception):
    """A schema has more alternatives than the caller can use."""


class _Constraint(Protocol):
    def __and__(self, other: Self) -> Self: ...


T = TypeVar("T", bound=_Constraint)


def alternatives(
    schema: Schema,
    definitions: Mapping[str, Schema],
    read: Callable[[Mapping[str, Any]], T],
    limit: int,
) -> list[T]:
    """Multiply out the `anyOf`s, `allOf`s and `$ref`s of a compiled schema.

    Args:
        definitions: targets of references.
        read: reads the other keywords of one schema; results are joined by `&`.
        limit: largest number of alternatives.

    Raises:
        TooManyAlternatives: there are more than `limit`, or references are nested too deep.
    """

    def expand(schema: Schema, step: int) -> list[T]:
        if step > _MAX_STEPS:
            raise TooManyAlternatives
        if isinstance(schema, bool):
            return [read({})] if schema else []
        found = [read(schema)]
        unions = [[branch] for branch in schema.get("allOf", ())]
        if "$ref" in schema:
            unions.insert(0, [definitions[target_name(schema)]])
        if "anyOf" in schema:
            unions.append(schema["anyOf"])
        for branches in unions:
            either = [one for branch in branches for one in expand(branch, step + 1)]
            if len(found) * len(either) > limit:
                raise TooManyAlternatives
            found = [one & other for one in found for other in either]
        return found

    return expand(schema, 0)


def target_name(schema: Mapping[str, Any]) -> str:
    """Return the name of the definition that a compiled `$ref` points to."""
    return str(schema["$ref"]).rpartition("/")[2]


@dataclass(frozen=True)
class _Facts:
    """Common properties of all instances of an alternative.

    Attributes:
        types: of NAMED; "number" stands for numbers that are not integers.
        declared_types: types of the client's schema, which may imply fewer types.
        values: all possible values, as canonical JSON; None if unknown.
        tags: possible values of an object's properties, where present, by name.
        required: names of properties that are always present.
    """

    types: frozenset[str] = frozenset(NAMED)
    declared_types: frozenset[str] = frozenset(NAMED)
    values: frozenset[str] | None = None
    tags: Mapping[str, frozenset[str]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()

    def __and__(self, other: _Facts) -> _Facts:
        if self.values is None or other.values is None:
            values = other.values if self.values is None else self.values
        else:
            values = self.values & other.values
        tags = dict(self.tags)
        for name, allowed in other.tags.items():
            tags[name] = tags.get(name, allowed) & allowed
        return _Facts(
            self.types & other.types,
            self.declared_types & other.declared_types,
            values,
            tags,
            self.required | other.required,
        )

    def excludes(self, other: _Facts, tag: str | None) -> bool:
        """Return whether no instance is valid under the client's schema of `other`.

        Args:
            tag: a property that is always present.
        """
        types = self.types & other.declared_types
        if not types:
            return True
        if self.values is not None and other.values is not None:
            return self.values.isdisjoint(other.values)
        names = self.tags.keys() & other.tags.keys() & (self.required | {tag})
        return types == {"object"} and any(
            self.tags[name].isdisjoint(other.tags[name]) for name in names
        )


def instance_types(schema: Schema, definitions: Mapping[str, Schema]) -> frozenset[str]:
    """Return the types (of NAMED) that instances of a compiled schema may have.

    "integer" is included wherever "number" is.
    """
    return frozenset().union(*(facts.types for facts in _facts(schema, definitions)))


def separate(branches: Sequence[Schema], definitions: Mapping[str, Schema]) -> list[Schema] | None:
    """Make the branches of a `oneOf` exclusive, so that `anyOf` is equivalent.

    Where the branches differ in an optional property (such as a pydantic discriminator with a
    default), the property becomes required.

    Returns:
        None if an instance of two branches cannot be ruled out.
    """
    facts = [_facts(branch, definitions) for branch in branches]
    tags = dict.fromkeys(name for each in facts[0] for name in each.tags)
    for tag in (None, *tags):
        if all(
            one.excludes(other, tag)
            for some, others in permutations(facts, 2)
            for one in some
            for other in others
        ):
            return [_require(branch, tag, definitions) for branch in branches]
    return None


def _require(schema: Schema, name: str | None, definitions: Mapping[str, Schema]) -> Schema:
    """Return the schema with one more required property."""
    while isinstance(schema, dict) and schema.keys() == {"$ref"} and name is not None:
        schema = definitions[target_name(schema)]
    if isinstance(schema, bool) or name is None or name in schema.get("required", ()):
        return schema
    return schema | {"required": [*schema.get("required", ()), name]}


def _facts(schema: Schema, definitions: Mapping[str, Schema]) -> list[_Facts]:
    try:
        return alternatives(schema, definitions, _read_facts, _MAX_FACTS)
    except TooManyAlternatives:
        return [_Facts()]


def _read_facts(schema: Mapping[str, Any]) -> _Facts:
    types = frozenset(schema.get("type", NAMED))
    if "number" in types:
        types |= {"integer"}
    declared_types = frozenset(NAMED) if IMPLIED_TYPE in schema else types
    values = None
    if "enum" in schema:
        types &= {type_of(value) for value in schema["enum"]}
        values = frozenset(map(canonical_text, schema["enum"]))
    tags = {
        name: frozenset(map(canonical_text, each["enum"]))
        for name, each in schema.get("properties", {}).items()
        if isinstance(each, dict) and "enum" in each
    }
    return _Facts(types, declared_types, values, tags, frozenset(schema.get("required", ())))


Constraint = dict[str, Any]
"""Keywords in the form that llguidance enforces."""

MAX_VALUES = 10_000
"""Values of one `enum`; 10,000 take 60 ms to compile."""
MAX_MULTIPLE = 10_000
"""`multipleOf` without its decimal point; compiling takes 20 ms per 1,000."""


class Malformed(Exception):
    """The value of a keyword has the wrong shape; the message completes "must be …"."""


class Unenforceable(Exception):
    """A keyword cannot be enforced; the message continues "cannot be enforced"."""


# -- values -------------------------------------------------------------------------------


def is_exact(value: Json) -> bool:
    """Return whether llguidance, which reads doubles, reads exactly this value."""
    match value:
        case bool() | None | str():
            return True
        case int():
            return abs(value) <= 2**53
        case float():
            return math.isfinite(value)
        case list():
            return all(map(is_exact, value))
        case dict():
            return all(map(is_exact, value.values()))


def canonical_text(value: Json) -> str:
    """Return JSON that is the same for equal values (3.0 and 3, any key order)."""
    parsed = json.loads(json.dumps(value), parse_float=_parse_float)
    return json.dumps(parsed, sort_keys=True)


def _parse_float(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number


# -- numbers ------------------------------------------------------------------------------


def read_count(keyword: str, value: Json) -> Constraint:
    """Read `minItems`, `maxLength` and the like."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
        raise Malformed("a whole number, not negative")
    return {keyword: int(value)}


def read_bound(keyword: str, value: Json) -> Constraint:
    """Read `minimum`, `exclusiveMaximum` and the like."""
    number = _number(value)
    if not is_exact(number):
        raise Unenforceable(": doubles cannot hold it")
    if keyword.startswith("exclusive") and number == int(number) and abs(number) < 1e11:
        # llguidance accepts 0 as a number above 0 and below 0.5.
        step = 1e-9 if abs(number) < 1e6 else 1e-3
        number += step if keyword == "exclusiveMinimum" else -step
        keyword = keyword.removeprefix("exclusive").lower()
    return {keyword: number}


def read_multiple(keyword: str, value: Json) -> Constraint:
    """Read `multipleOf`."""
    number = _number(value)
    if number <= 0:
        raise Malformed("a number above 0")
    digits = Decimal(str(number)).normalize().as_tuple().digits
    if int("".join(map(str, digits))) > MAX_MULTIPLE:
        raise Unenforceable(f" beyond {MAX_MULTIPLE}, or with as many decimals")
    return {keyword: number}


def _number(value: Json) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed("a number")
    if not abs(value) <= sys.float_info.max:  # `isfinite` cannot take a larger integer
        raise Malformed("a number")
    return value


# -- strings ------------------------------------------------------------------------------


def read_pattern(keyword: str, value: Json) -> Constraint:
    """Read `pattern`."""
    if not isinstance(value, str):
        raise Malformed("a string")
    problem = pattern_problem(value)
    if problem:
        raise Unenforceable(f": {problem}")
    return {keyword: value}


def read_format(keyword: str, value: Json) -> Constraint:
    """Read `format` as a pattern. Unknown formats are annotations."""
    if not isinstance(value, str):
        raise Malformed("a string")
    if value in UNSUPPORTED_FORMATS:
        raise Unenforceable(f" if it is {value}")
    if value not in FORMATS:
        return {}
    pattern, max_length = FORMATS[value]
    found: Constraint = {"pattern": f"^(?:{pattern})$"}
    return found if max_length is None else found | {"maxLength": max_length}


READERS: dict[str, Callable[[str, Json], Constraint]] = {
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), read_count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), read_bound),
    "multipleOf": read_multiple,
    "pattern": read_pattern,
    "format": read_format,
}
"""Readers by keyword."""


@lru_cache(maxsize=1024)
def pattern_problem(pattern: str) -> str:
    """Return why a regular expression cannot be enforced, or ""."""
    return _compile_error({"type": "string", "pattern": pattern})


@lru_cache(maxsize=1024)
def matches(pattern: str, text: str) -> bool:
    """Return whether a pattern, as llguidance reads it, is found in a text."""
    return not _compile_error({"type": "string", "pattern": pattern, "enum": [text]})


def _compile_error(schema: Constraint) -> str:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if not failed:
        return ""
    reason = messages[0].rpartition("\nerror: ")[2]  # follows a drawing of the place in the pattern
    return re.sub(r"\s+", " ", reason).strip()[:200]


# -- formats ------------------------------------------------------------------------------


class Format(NamedTuple):
    pattern: str
    max_length: int | None = None


_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_DURATION_TIME = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DURATION_DATE = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"

_LABEL = "[a-zA-Z0-9](?:-?[a-zA-Z0-9]){0,31}"
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL})*"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_GROUP = "[0-9a-fA-F]{1,4}"
_IPV6 = "(?:{})".format(
    "|".join(
        [
            f"(?:{_GROUP}:){{7}}{_GROUP}",
            f"(?:{_GROUP}:){{1,7}}:",
            *(f"(?:{_GROUP}:){{1,{7 - n}}}(?::{_GROUP}){{1,{n}}}" for n in range(1, 7)),
            f":(?::{_GROUP}){{1,7}}",
            "::",
        ]
    )
)

_ATEXT = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]"
_EMAIL = rf"{_ATEXT}+(?:\.{_ATEXT}+)*@{_LABEL}(?:\.{_LABEL})+"

_PCHAR = "(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_AUTHORITY = f"{_HOSTNAME}(?::[0-9]{{1,4}})?"
_SUFFIX = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_PATH = f"(?:/{_PCHAR}*)*"
_URI = rf"[a-zA-Z][a-zA-Z0-9+.-]*:(?://{_AUTHORITY}{_PATH}|{_PCHAR}+{_PATH}){_SUFFIX}"
_URI_REFERENCE = rf"(?:{_URI}|/(?:{_PCHAR}+{_PATH})?{_SUFFIX}|[a-zA-Z0-9._~-]+{_PATH}{_SUFFIX})"
_POINTER = "(?:/(?:[^/~]|~[01])*)*"

_H = "[0-9a-fA-F]"

FORMATS: dict[str, Format] = {
    "date-time": Format(f"{_DATE}T{_TIME}"),
    "date": Format(_DATE),
    "time": Format(_TIME),
    "duration": Format(f"P(?:{_DURATION_DATE}(?:{_DURATION_TIME})?|{_DURATION_TIME}|[0-9]+W)"),
    "email": Format(_EMAIL, 254),
    "idn-email": Format(_EMAIL, 254),
    "hostname": Format(_HOSTNAME, 253),
    "idn-hostname": Format(_HOSTNAME, 253),
    "ipv4": Format(_IPV4),
    "ipv6": Format(_IPV6),
    "uuid": Format(f"{_H}{{8}}-{_H}{{4}}-{_H}{{4}}-{_H}{{4}}-{_H}{{12}}"),
    "uri": Format(_URI),
    "iri": Format(_URI),
    "uri-reference": Format(_URI_REFERENCE),
    "iri-reference": Format(_URI_REFERENCE),
    "json-pointer": Format(_POINTER),
    "relative-json-pointer": Format(f"(?:0|[1-9]{{1,3}})(?:#|{_POINTER})"),
}
"""Enforced string formats by name (JSON Schema 2020-12, Validation, section 7.3).

Each pattern describes a part of the format, so that every validator accepts what is generated: no
leap seconds, no year 0, no IPv6 zones, no `xn--` labels.
"""

UNSUPPORTED_FORMATS = frozenset({"regex", "uri-template"})
"""Standard formats that cannot be enforced. Any other name is an annotation."""
