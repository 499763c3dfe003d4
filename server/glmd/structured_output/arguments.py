"""The arguments that a tool's schema allows, in the shapes that a call can have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from glmd.chat.types import Json
from glmd.structured_output.json_schema import JsonSchemaCompiler

Node = dict[str, Any]

MAX_SHAPES = 16
"""Of one tool: its `anyOf`s multiplied out."""

_MAX_STEPS = 32
_UNDERSTOOD = frozenset(("type", "properties", "required", "additionalProperties"))
_FOLLOWED = frozenset(("$ref", "allOf", "anyOf"))


class _TooMany(Exception):
    pass


@dataclass(frozen=True)
class Arguments:
    """One shape.

    Attributes:
        properties: their schemas in normal form, by name.
        others: the schema of arguments that are not declared; False where there may be none.
    """

    properties: dict[str, Node | bool]
    required: frozenset[str]
    others: Node | bool

    def __and__(self, other: Arguments) -> Arguments:
        names = dict.fromkeys((*self.properties, *other.properties))
        return Arguments(
            {name: _both(self._schema_of(name), other._schema_of(name)) for name in names},
            self.required | other.required,
            _both(self.others, other.others),
        )

    def _schema_of(self, name: str) -> Node | bool:
        return self.properties.get(name, self.others)


def read_arguments(
    normaliser: JsonSchemaCompiler, parameters: dict[str, Json], param: str
) -> list[Arguments] | None:
    """The shapes of a tool's arguments: a call must have one of them.

    Where the schema says nothing of undeclared arguments, there are none; a strict tool has none
    either where it allows any.

    Args:
        param: the client's name of `parameters`.

    Returns:
        None if there are more than a grammar should have, and that may be left unenforced.

    Raises:
        InvalidRequest: a keyword cannot be enforced and the tool is strict.
    """
    if not parameters:
        return [Arguments({}, frozenset(), False)]
    node = normaliser.normalise(parameters, param)
    try:
        shapes = _shapes(node, normaliser, param, 0)
    except _TooMany:
        normaliser.relax(param, f" with more than {MAX_SHAPES} combinations of its schemas")
        return None
    wished = parameters.get("additionalProperties") is True and not normaliser.strict
    return [replace(shape, others=wished) if shape.others is True else shape for shape in shapes]


def _shapes(
    node: Node | bool, normaliser: JsonSchemaCompiler, param: str, step: int
) -> list[Arguments]:
    if step > _MAX_STEPS:
        raise _TooMany
    if isinstance(node, bool):
        return [Arguments({}, frozenset(), True)] if node else []
    for keyword in sorted(node.keys() - _UNDERSTOOD - _FOLLOWED):
        normaliser.relax(f"{param}.{keyword}", " at the top of a tool's parameters")
    others = node.get("additionalProperties", True)
    found = [
        Arguments(
            node.get("properties", {}),
            frozenset(node.get("required", ())),
            True if others == {} else others,
        )
    ]
    if "$ref" in node:
        target = normaliser.definitions[node["$ref"].rpartition("/")[2]]
        found = _meet(found, _shapes(target, normaliser, param, step + 1))
    for branch in node.get("allOf", ()):
        found = _meet(found, _shapes(branch, normaliser, param, step + 1))
    if "anyOf" in node:
        either = [
            shape for each in node["anyOf"] for shape in _shapes(each, normaliser, param, step + 1)
        ]
        found = _meet(found, either)
    return found


def _meet(some: Iterable[Arguments], others: list[Arguments]) -> list[Arguments]:
    found = [one & other for one in some for other in others]
    if len(found) > MAX_SHAPES:
        raise _TooMany
    return found


def _both(one: Node | bool, other: Node | bool) -> Node | bool:
    if one is False or other is False:
        return False
    told = [schema for schema in (one, other) if schema is not True and schema != {}]
    if not told:
        return True
    return told[0] if len(told) == 1 or told[0] == told[1] else {"allOf": told}
