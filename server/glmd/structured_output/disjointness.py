"""What the instances of a schema have in common, as far as its keywords say so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from glmd.chat.tool_args import NAMED, type_of
from glmd.chat.types import Json

Node = dict[str, Any]

_MAX_STEPS = 32
"""References and combinations followed one after the other; beyond, nothing is known."""


@dataclass(frozen=True)
class _Facts:
    """What every instance of a schema has in common; None or nothing where that is unknown."""

    types: frozenset[str]
    """Of NAMED; "number" stands for numbers that are no integers."""
    values: frozenset[str] | None
    """All there can be, as canonical JSON."""
    tags: Mapping[str, frozenset[str]]
    """Of objects: the values that a property has, if it is there."""
    required: frozenset[str]

    def __and__(self, other: _Facts) -> _Facts:
        if self.values is None or other.values is None:
            values = other.values if self.values is None else self.values
        else:
            values = self.values & other.values
        tags = dict(self.tags)
        for name, allowed in other.tags.items():
            tags[name] = tags[name] & allowed if name in tags else allowed
        return _Facts(self.types & other.types, values, tags, self.required | other.required)

    def __or__(self, other: _Facts) -> _Facts:
        both = self.values is not None and other.values is not None
        return _Facts(
            self.types | other.types,
            (self.values or frozenset()) | (other.values or frozenset()) if both else None,
            {
                name: self.tags[name] | other.tags[name]
                for name in self.tags.keys() & other.tags.keys()
            },
            self.required & other.required,
        )

    def excludes(self, other: _Facts, required: str | None = None) -> bool:
        """Whether no instance of one is an instance of the other.

        Args:
            required: a property that both are taken to require.
        """
        if self.types.isdisjoint(other.types):
            return True
        if self.values is not None and other.values is not None:
            return self.values.isdisjoint(other.values)
        if self.types & other.types != {"object"}:
            return False
        needed = self.required | other.required
        if required is not None:
            needed |= {required}
        return any(
            self.tags[name].isdisjoint(other.tags[name])
            for name in self.tags.keys() & other.tags.keys()
            if name in needed
        )


_ANYTHING = _Facts(frozenset(NAMED), None, {}, frozenset())


def instance_types(node: Node | bool, definitions: Mapping[str, Node]) -> frozenset[str]:
    """The types (of NAMED) that instances of a schema in normal form may have.

    "integer" is there wherever "number" is.
    """
    return _facts(node, definitions, 0).types


def separate(nodes: Sequence[Node], definitions: Mapping[str, Node]) -> list[Node] | None:
    """The branches of a `oneOf`, such that no instance is valid under two of them.

    `oneOf` asks for exactly one, which no grammar can count; after this it is `anyOf`. Where they
    differ in a property of theirs that is not required (pydantic's discriminators with a default
    are not), it is made so.

    Args:
        nodes: in normal form.
        definitions: what their references point to.

    Returns:
        None if they cannot be told apart.
    """
    facts = [_facts(node, definitions, 0) for node in nodes]
    if _all_exclude(facts):
        return list(nodes)
    for tag in facts[0].tags:
        if _all_exclude(facts, tag):
            return [_require(node, tag, definitions) for node in nodes]
    return None


def _all_exclude(facts: Sequence[_Facts], required: str | None = None) -> bool:
    return all(one.excludes(other, required) for one, other in combinations(facts, 2))


def _require(node: Node, name: str, definitions: Mapping[str, Node]) -> Node:
    while node.keys() == {"$ref"}:
        node = _target(node, definitions)
    required = node.get("required", [])
    return node if name in required else node | {"required": [*required, name]}


def _facts(node: Node | bool, definitions: Mapping[str, Node], step: int) -> _Facts:
    if step > _MAX_STEPS or node is True:
        return _ANYTHING
    if node is False:
        return _Facts(frozenset(), frozenset(), {}, frozenset())
    found = _own(node)
    if "$ref" in node:
        found &= _facts(_target(node, definitions), definitions, step + 1)
    for branch in node.get("allOf", ()):
        found &= _facts(branch, definitions, step + 1)
    if "anyOf" in node:
        first, *others = (_facts(branch, definitions, step + 1) for branch in node["anyOf"])
        for other in others:
            first |= other
        found &= first
    return found


def _own(node: Node) -> _Facts:
    kind = node.get("type", NAMED)
    types = {kind} if isinstance(kind, str) else set(kind)
    if "number" in types:
        types.add("integer")
    values = None
    if "enum" in node:
        types &= {type_of(value) for value in node["enum"]}
        values = frozenset(map(canonical_text, node["enum"]))
    tags = {
        name: frozenset(map(canonical_text, schema["enum"]))
        for name, schema in node.get("properties", {}).items()
        if isinstance(schema, dict) and "enum" in schema
    }
    return _Facts(frozenset(types), values, tags, frozenset(node.get("required", ())))


def _target(node: Node, definitions: Mapping[str, Node]) -> Node:
    return definitions[node["$ref"].rpartition("/")[2]]


def canonical_text(value: Json) -> str:
    """JSON that is the same for equal values: 3.0 is 3, and the order of keys is nothing."""
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Json) -> Json:
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [_canonical(item) for item in value]
        case dict():
            return {key: _canonical(item) for key, item in value.items()}
    return value
