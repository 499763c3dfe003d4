"""Output specs: constraints on an answer, independent of the API that a request came by."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Schema = dict[str, Any] | bool
"""A JSON schema."""


class JsonObject(msgspec.Struct, tag="json_object", frozen=True):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, tag="json_schema", frozen=True):
    """JSON that is valid under a schema.

    Attributes:
        param: the client's name of the schema, for errors: `response_format.json_schema.schema`.
        strict: refuse keywords that cannot be enforced; otherwise they are dropped.
        whitespace: allow spaces and line breaks between the parts.
    """

    schema: Schema
    param: str
    strict: bool = True
    whitespace: bool = True


class Regex(msgspec.Struct, tag="regex", frozen=True):
    """Text that a regular expression matches as a whole (Rust's syntax: no lookaround)."""

    pattern: str
    param: str


class Choice(msgspec.Struct, tag="choice", frozen=True):
    """One of several texts."""

    options: tuple[str, ...]
    param: str


class Grammar(msgspec.Struct, tag="grammar", frozen=True):
    """Text of a grammar in llguidance's variant of Lark, or in GBNF."""

    text: str
    param: str


AnswerFormat = JsonObject | JsonSchema | Regex | Choice | Grammar


class ToolRule(msgspec.Struct, frozen=True):
    """A tool that may be called.

    Attributes:
        param: the client's name of `parameters`, for errors: `tools[0].function.parameters`.
        strict: refuse schema keywords that cannot be enforced.
        enforced: hold the arguments to the schema.
    """

    name: str
    parameters: dict[str, Any]
    param: str
    strict: bool
    enforced: bool


class OutputSpec(msgspec.Struct, frozen=True):
    """Constraints on one answer.

    With both a format and `calls` "allowed", the answer is either content or calls.

    Attributes:
        format: of the content; None for free text.
        calls: "free" allows text and calls in any order, where a call follows its tool's rule.
        parallel: allow more than one call.
    """

    format: AnswerFormat | None = None
    calls: Literal["none", "free", "allowed", "required"] = "none"
    tools: tuple[ToolRule, ...] = ()
    parallel: bool = True
