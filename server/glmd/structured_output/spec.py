"""What an answer has to be, in neutral form: what every API's request is mapped to."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class JsonObject(msgspec.Struct, tag="json_object", frozen=True):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, tag="json_schema", frozen=True):
    """JSON that is valid under a schema."""

    schema: dict[str, Any] | bool
    param: str
    """The client's name of the schema, for errors: `response_format.json_schema.schema`."""
    strict: bool = True
    """Refuse keywords that cannot be enforced; else they are left out, and the answer is JSON that
    fulfils the others."""
    whitespace: bool = True
    """Allow spaces and line breaks between the parts."""


class Regex(msgspec.Struct, tag="regex", frozen=True):
    """Text that a regular expression (Rust's, as in RE2: no lookaround) matches as a whole."""

    pattern: str
    param: str


class Choice(msgspec.Struct, tag="choice", frozen=True):
    """One of some texts."""

    options: tuple[str, ...]
    param: str


class Grammar(msgspec.Struct, tag="grammar", frozen=True):
    """Text of a language, defined in llguidance's variant of Lark, or in GBNF."""

    text: str
    param: str


AnswerFormat = JsonObject | JsonSchema | Regex | Choice | Grammar


class ToolRule(msgspec.Struct, frozen=True):
    """A tool that may be called."""

    name: str
    parameters: dict[str, Any]
    param: str
    """The client's name of `parameters`, for errors: `tools[0].function.parameters`."""
    strict: bool
    """Refuse keywords of the schema that cannot be enforced."""
    enforced: bool
    """Hold its arguments to the schema."""


class OutputSpec(msgspec.Struct, frozen=True):
    """All that is required of one answer's form.

    With a format and `calls` "allowed", the answer is either the one or the other.
    """

    format: AnswerFormat | None = None
    """Of the content."""
    calls: Literal["none", "free", "allowed", "required"] = "none"
    """"free": text and calls as the model likes, but a call that begins follows the rules."""
    tools: tuple[ToolRule, ...] = ()
    parallel: bool = True
    """Whether there may be more than one call."""
