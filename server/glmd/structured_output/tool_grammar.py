"""Grammar of tool calls in GLM's form.

    <tool_call>NAME<arg_key>K</arg_key><arg_value>V</arg_value>…</tool_call>

Tags are tokens, named by id, so no text can spell one. Arguments come in any order, each once, and
all required ones. A string is raw text up to its end tag; other values are JSON under their schema.
Strings exclude text that the tool parser (`glmd.chat.glm4_parser`) would read as another type
that the argument may have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glmd.chat.tokenizer import SpecialTokens
from glmd.chat.tool_args import FREE, ArgType, ArgTypeReader, type_of
from glmd.chat.types import Json
from glmd.structured_output.alternatives import TooManyAlternatives, alternatives, instance_types
from glmd.structured_output.json_schema import JsonSchemaCompiler
from glmd.structured_output.request import Schema, ToolRule
from glmd.structured_output.string_terminals import ANY_TEXT, UnknownText, quote, texts

MAX_ANY_ORDER = 64
"""Arguments that may come in any order, one bit each of a rule's parameter
(https://github.com/guidance-ai/llguidance/blob/main/docs/parametric.md). More arguments come in the
order of the schema."""

MAX_SHAPES = 16
"""Alternatives of one tool's arguments, with its `anyOf`s multiplied out."""

_OTHER_KEYWORDS = frozenset(("patternProperties", "minProperties", "maxProperties", "enum"))
"""Keywords that compiled schemas of objects may have and that calls do not enforce."""


class CallGrammar:
    """Grammar rules for the calls of one request.

    Attributes:
        relaxed: paths of schema keywords that are not enforced.
    """

    def __init__(self, tags: SpecialTokens) -> None:
        self.relaxed: list[str] = []
        self._tags = tags
        self._rules: list[str] = []
        self._names: dict[str, str] = {}

    def rules(self, tools: Sequence[ToolRule], *, parallel: bool, begun: bool) -> list[str]:
        """Return grammar rules; `calls` is one or more calls and the end of the turn.

        Args:
            parallel: allow more than one call.
            begun: the first `<tool_call>` has been generated.

        Raises:
            InvalidRequest: a strict tool's schema cannot be enforced; names the keyword.
        """
        tags = self._tags
        calls = [self._call(tool) for tool in tools]
        first = "call" if begun else f"{_token(tags.tool_call)} call"
        more = f"({_token(tags.tool_call)} call)*" if parallel else ""
        return [
            f"calls: {first} {more} {_token(tags.observation)}",
            f"call: ({' | '.join(calls)}) {_token(tags.end_tool_call)}",
            *self._rules,
        ]

    def _call(self, tool: ToolRule) -> str:
        """Return a rule for a tool's name and arguments."""
        name = quote(tool.name)
        if not tool.enforced:
            return self._rule(f"{name} {self._free_arguments()}")
        types = ArgTypeReader(tool.parameters).arguments()
        compiler = JsonSchemaCompiler(tool.parameters, strict=tool.strict)
        shapes = _shapes(compiler, tool.parameters, tool.param)
        rules = [self._arguments(shape, types, compiler, tool.param) for shape in shapes or ()]
        found = [rule for rule in rules if rule is not None]
        if shapes is not None and not found:
            compiler.relax(tool.param, ": no call could be valid")
        self.relaxed += compiler.relaxed
        arguments = f"({' | '.join(found)})" if found else self._free_arguments()
        return self._rule(f"{name} {arguments}")

    def _free_arguments(self) -> str:
        name = self._terminal(_name_pattern(()))
        return f"({self._argument(name, self._terminal(ANY_TEXT))})*"

    def _argument(self, name: str, value: str) -> str:
        tags = self._tags
        return (
            f"{_token(tags.arg_key)} {name} {_token(tags.end_arg_key)} "
            f"{_token(tags.arg_value)} {value} {_token(tags.end_arg_value)}"
        )

    def _arguments(
        self,
        shape: _Shape,
        types: Mapping[str, ArgType],
        compiler: JsonSchemaCompiler,
        param: str,
    ) -> str | None:
        """Return a rule for arguments of one shape.

        None if a required one cannot have a value.
        """
        arguments: dict[str, str] = {}
        for name, schema in shape.properties.items():
            value = None
            if name and name == name.strip():
                where = f"{param}.properties.{name}"
                value = self._value(schema, types.get(name, FREE), compiler, where)
            if value is not None:
                arguments[name] = self._argument(quote(name), value)
            elif name in shape.required:
                return None
        other = ""
        value = self._value(shape.others, FREE, compiler, f"{param}.additionalProperties")
        if value is not None:
            taken = types.keys() | shape.properties.keys()
            other = self._argument(self._terminal(_name_pattern(taken)), value)
        required = [name for name in arguments if name in shape.required]
        optional = [name for name in arguments if name not in shape.required]
        if len(arguments) > MAX_ANY_ORDER:
            parts = [
                text if name in shape.required else f"({text})?" for name, text in arguments.items()
            ]
            return self._rule(" ".join(parts) + (f" ({other})*" if other else ""))
        if not arguments and not other:
            return '""'
        rule = self._next_name()
        end = f"%if is_ones([0:{len(required)}])" if required else ""
        lines = [f'"" {end}']
        for bit, name in enumerate(required + optional):
            lines.append(f"{arguments[name]} {rule}::set_bit({bit}) %if bit_clear({bit})")
        if other:
            lines.append(f"{other} {rule}::_")
        self._rules.append(f"{rule}::_: " + "\n | ".join(lines))
        return f"{rule}::0"

    def _value(
        self, schema: Schema, kind: ArgType, compiler: JsonSchemaCompiler, param: str
    ) -> str | None:
        """Return the symbol of an argument's values; None if there are none."""
        if schema is True or schema == {}:
            return self._terminal(ANY_TEXT)
        definitions = compiler.definitions
        allowed = kind.types | {type_of(value) for value in kind.values}
        options: list[str] = []
        if "string" in allowed:
            try:
                terminals = [text.terminal(kind) for text in texts(schema, definitions)]
            except UnknownText:
                compiler.relax(param, ": its strings are too complex for raw text")
                return self._terminal(ANY_TEXT)
            options += [self._terminal(each) for each in terminals if each is not None]
        types = instance_types(schema, definitions)
        others = types & (allowed - {"string"})
        if others:
            limited: Schema = {"allOf": [schema, {"type": sorted(others)}]}
            document = compiler.document(schema if others == types else limited)
            options.append(self._rule(f"%json {json.dumps(document)}"))
        if not options:
            return None
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"

    def _terminal(self, body: str) -> str:
        return self._named(body, "T")

    def _rule(self, body: str) -> str:
        return self._named(body, "r")

    def _named(self, body: str, prefix: str) -> str:
        if body not in self._names:
            name = self._names[body] = self._next_name(prefix)
            self._rules.append(f"{name}: {body}")
        return self._names[body]

    def _next_name(self, prefix: str = "r") -> str:
        return f"{prefix}{len(self._rules)}"


@dataclass(frozen=True)
class _Shape:
    """One alternative of a tool's arguments.

    Attributes:
        properties: compiled schemas of declared arguments by name.
        others: compiled schema of undeclared arguments.
    """

    properties: dict[str, Schema] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    others: Schema = True

    def __and__(self, other: _Shape) -> _Shape:
        names = dict.fromkeys((*self.properties, *other.properties))
        return _Shape(
            {name: _both(self._schema_of(name), other._schema_of(name)) for name in names},
            self.required | other.required,
            _both(self.others, other.others),
        )

    def _schema_of(self, name: str) -> Schema:
        return self.properties.get(name, self.others)


def _shapes(
    compiler: JsonSchemaCompiler, parameters: dict[str, Json], param: str
) -> list[_Shape] | None:
    """Return the shapes of a tool's arguments, of which a call must have one.

    Undeclared arguments are allowed only where the schema gives a schema for them, or says
    `additionalProperties: true` and the tool is not strict.

    Returns:
        None if there are more than `MAX_SHAPES`, and the tool is not strict.

    Raises:
        InvalidRequest: a keyword cannot be enforced and the tool is strict.
    """
    if not parameters:
        return [_Shape(others=False)]

    def read(schema: Mapping[str, Any]) -> _Shape:
        for keyword in sorted(schema.keys() & _OTHER_KEYWORDS):
            compiler.relax(f"{param}.{keyword}", " at the top of a tool's parameters")
        others = schema.get("additionalProperties", True)
        return _Shape(
            schema.get("properties", {}),
            frozenset(schema.get("required", ())),
            True if others == {} else others,
        )

    schema = compiler.compile(parameters, param)
    try:
        shapes = alternatives(schema, compiler.definitions, read, MAX_SHAPES)
    except TooManyAlternatives:
        compiler.relax(param, f" with more than {MAX_SHAPES} combinations of its schemas")
        return None
    is_open = parameters.get("additionalProperties") is True and not compiler.strict
    return [replace(shape, others=is_open) if shape.others is True else shape for shape in shapes]


def _both(one: Schema, other: Schema) -> Schema:
    """Return the schema of instances of both schemas."""
    if one is False or other is False:
        return False
    schemas = [schema for schema in (one, other) if schema is not True and schema != {}]
    if not schemas:
        return True
    return schemas[0] if len(schemas) == 1 or one == other else {"allOf": schemas}


def _name_pattern(taken: Iterable[str]) -> str:
    """Return a terminal of the argument names that the tool parser does not change."""
    edge, inner = r"[^\s\x00-\x20]", r"[^\x00-\x1f]"
    others = "".join(f" & ~{quote(name)}" for name in sorted(taken) if name)
    return f"/{edge}({inner}*{edge})?/{others}"


def _token(id: int) -> str:
    return f"<[{id}]>"
