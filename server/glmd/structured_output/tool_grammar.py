"""Tool calls in GLM's form, as a grammar of tokens and text.

    <tool_call>NAME<arg_key>K</arg_key><arg_value>V</arg_value>…</tool_call>

Tags are tokens, named by id; no text can become one. Arguments may come in any order, each once,
the required ones all. A string is raw text up to its tag; anything else is JSON by its schema. Text
that the reader of calls (`glmd.chat.glm4_parser`) would take for JSON of another type that
the argument may have is left out of the strings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glmd.chat.special_tokens import SpecialTokens
from glmd.chat.tool_args import FREE, ArgType, ArgTypeReader, type_of
from glmd.structured_output.arguments import Arguments, read_arguments
from glmd.structured_output.disjointness import instance_types
from glmd.structured_output.json_schema import JsonSchemaCompiler
from glmd.structured_output.spec import ToolRule
from glmd.structured_output.string_terminals import ANY_TEXT, UnknownText, quote, texts

MAX_ANY_ORDER = 64
"""Arguments that may come in any order: a bit each of the rule's parameter
(https://github.com/guidance-ai/llguidance/blob/main/docs/parametric.md). With more, the order is
the schema's."""

Node = dict[str, Any]


class CallGrammar:
    """Rules for the calls of one request.

    Attributes:
        relaxed: keywords of schemas that are not enforced.
    """

    def __init__(self, tags: SpecialTokens) -> None:
        self.relaxed: list[str] = []
        self._tags = tags
        self._rules: list[str] = []
        self._names: dict[str, str] = {}

    def rules(self, tools: Sequence[ToolRule], *, parallel: bool, begun: bool) -> list[str]:
        """Rules of the grammar language; `calls` is one call or more and what ends the turn.

        Args:
            parallel: whether there may be more than one call.
            begun: the first `<tool_call>` has been generated.

        Raises:
            InvalidRequest: names the keyword of a strict tool's schema that cannot be enforced.
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
        """The rule of a tool's name and arguments."""
        types = ArgTypeReader(tool.parameters).arguments()
        if not tool.enforced:
            return self._rule(f"{quote(tool.name)} {self._free_arguments()}")
        normaliser = JsonSchemaCompiler(tool.parameters, strict=tool.strict)
        shapes = read_arguments(normaliser, tool.parameters, tool.param)
        if shapes is None:
            arguments = self._free_arguments()
        else:
            rules = [self._arguments(shape, types, normaliser, tool.param) for shape in shapes]
            arguments = f"({' | '.join(rule for rule in rules if rule is not None)})"
            if not any(rules):
                normaliser.relax(tool.param, ": no call could be valid")
                arguments = self._free_arguments()
        self.relaxed += normaliser.relaxed
        return self._rule(f"{quote(tool.name)} {arguments}")

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
        shape: Arguments,
        types: Mapping[str, ArgType],
        normaliser: JsonSchemaCompiler,
        param: str,
    ) -> str | None:
        """A rule for arguments of one shape, or None if a required one has no value."""
        arguments: dict[str, str] = {}
        for name, node in shape.properties.items():
            value = None
            if name == name.strip() and name:
                where = f"{param}.properties.{name}"
                value = self._value(node, types.get(name, FREE), normaliser, where)
            if value is not None:
                arguments[name] = self._argument(quote(name), value)
            elif name in shape.required:
                return None
        required = [name for name in arguments if name in shape.required]
        optional = [name for name in arguments if name not in shape.required]
        other = ""
        if shape.others is not False:
            value = self._value(shape.others, FREE, normaliser, f"{param}.additionalProperties")
            if value is not None:
                taken = types.keys() | shape.properties.keys()
                other = self._argument(self._terminal(_name_pattern(taken)), value)
        if len(arguments) > MAX_ANY_ORDER:
            parts = [
                text if name in shape.required else f"({text})?" for name, text in arguments.items()
            ]
            return self._rule(" ".join(parts) + (f" ({other})*" if other else ""))
        end = f"%if is_ones([0:{len(required)}])" if required else ""
        rule = self._next_name()
        lines = [f'"" {end}']
        for bit, name in enumerate(required + optional):
            lines.append(f"{arguments[name]} {rule}::set_bit({bit}) %if bit_clear({bit})")
        if other:
            lines.append(f"{other} {rule}::_")
        if len(lines) == 1:
            return '""'
        self._rules.append(f"{rule}::_: " + "\n | ".join(lines))
        return f"{rule}::0"

    def _value(
        self, node: Node | bool, kind: ArgType, normaliser: JsonSchemaCompiler, param: str
    ) -> str | None:
        """The symbol of an argument's values, or None if there are none."""
        if node is True or (not node and isinstance(node, dict)):
            return self._terminal(ANY_TEXT)
        allowed = kind.types | {type_of(value) for value in kind.values}
        options: list[str] = []
        if "string" in allowed:
            try:
                terminals = [text.terminal(kind) for text in texts(node, normaliser.definitions)]
            except UnknownText:
                normaliser.relax(
                    param, ": its strings are more involved than raw text can be held to"
                )
                return self._terminal(ANY_TEXT)
            options += [self._terminal(each) for each in terminals if each is not None]
        types = instance_types(node, normaliser.definitions)
        others = types & (allowed - {"string"})
        if others:
            within: Node = {"allOf": [node, {"type": sorted(others)}]}
            document = normaliser.document(within if node is False or others != types else node)
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


def _name_pattern(taken: Iterable[str]) -> str:
    """A terminal of argument names that the reader of calls keeps as they are."""
    edge, inner = r"[^\s\x00-\x20]", r"[^\x00-\x1f]"
    others = "".join(f" & ~{quote(name)}" for name in sorted(taken) if name)
    return f"/{edge}({inner}*{edge})?/{others}"


def _token(id: int) -> str:
    return f"<[{id}]>"
