"""Expand compiled schemas into alternatives, and compare the instances of schemas.

Compiled schemas come from `glmd.structured_output.json_schema`. An alternative describes instances
by the keywords of one branch per `anyOf`: an instance of the schema fulfils at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, Protocol, Self, TypeVar

from glmd.chat.tool_args import NAMED, type_of
from glmd.structured_output.scalars import canonical_text
from glmd.structured_output.spec import Schema

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
    """What all instances of an alternative have in common.

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
    """Make the branches of a `oneOf` exclude each other, so that `anyOf` is equivalent.

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
