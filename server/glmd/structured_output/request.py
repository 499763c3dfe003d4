"""Read output constraints from requests: formats, tools, `tool_choice`.

An `OutputSpec` states a constraint independently of the API that a request came by.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec

from glmd.chat.tools import is_strict
from glmd.chat.types import MAX_PATTERN, Tool, check_depth, check_length
from glmd.errors import InvalidRequest
from glmd.utils.text import quoted

MAX_SCHEMA_TEXT = 1 << 20
"""Characters of a JSON schema sent as text; the compiler takes as many bytes."""

MAX_CHOICES = 10_000

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
"""Request fields that `read_guided` reads (vLLM's, https://docs.vllm.ai)."""


def read_response_format(
    raw: object, param: str = "response_format", *, flat: bool = False, strict: bool = False
) -> AnswerFormat | None:
    """Read OpenAI's `response_format` or its equivalent in another API.

    Args:
        param: name of the field.
        flat: the schema is in the format itself, as in all APIs but chat completions.
        strict: default of `strict`.

    Returns:
        None for free text.

    Raises:
        InvalidRequest: the field is malformed.
    """
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise _malformed(param, "an object")
    match raw.get("type"):
        case "text":
            return None
        case "json_object":
            return JsonObject()
        case "json_schema":
            where = param if flat else f"{param}.json_schema"
            fields = raw if flat else raw.get("json_schema")
            if not isinstance(fields, Mapping):
                raise _malformed(where, "an object")
            if fields.get("strict") is not None:
                strict = is_strict(fields, where)
            schema = _read_schema(fields.get("schema"), f"{where}.schema")
            return JsonSchema(schema, f"{where}.schema", strict=strict)
    raise _malformed(f"{param}.type", "text, json_object or json_schema")


def read_guided(fields: Mapping[str, Any]) -> AnswerFormat | None:
    """Read a request's `guided_…` fields and `structured_outputs`.

    Returns:
        None if none is set.

    Raises:
        InvalidRequest: a field is malformed, or more than one is set.
    """
    found: list[AnswerFormat] = []
    for name in GUIDED:
        value = fields.get(name)
        if value is None:
            continue
        if name == "structured_outputs":
            found.append(_read_structured_outputs(value, name))
        else:
            found.append(_read_format(name.removeprefix("guided_"), value, name))
    return only_format(*found)


def only_format(*formats: AnswerFormat | None) -> AnswerFormat | None:
    """Return the one format that is not None, if any.

    Raises:
        InvalidRequest: there is more than one.
    """
    found = [form for form in formats if form is not None]
    if len(found) > 1:
        params = [getattr(form, "param", "response_format") for form in found]
        raise InvalidRequest(
            f"{params[1]}: an answer can have only one format, but several are set: "
            f"{', '.join(params)}.",
            param=params[1],
        )
    return found[0] if found else None


def make_structure(
    form: AnswerFormat | None,
    tools: Sequence[Tool],
    *,
    required: bool = False,
    named: str | None = None,
    allowed: Collection[str] | None = None,
    parallel: bool = True,
    param: str = "tool_choice",
) -> OutputSpec:
    """Combine a format, tools and `tool_choice`.

    If the model may choose freely, calls of strict tools follow their schemas. If calls are
    required, or are the alternative to a format, calls of all tools do; keywords that cannot be
    enforced are then refused for strict tools and dropped for others.

    Args:
        form: format of the content; ignored if calls are required.
        tools: tools that may be called; empty with `tool_choice` "none".
        required: the answer must call a tool (`tool_choice` "required").
        named: name of the tool that must be called; None for any.
        allowed: names of the tools that may be called (`tool_choice` "allowed_tools"). None: all.
        parallel: allow more than one call (`parallel_tool_calls`).
        param: name of the field that requires calls, for errors.

    Raises:
        InvalidRequest: a call is required of a tool that is not offered, or must follow a schema
            that is malformed.
    """
    required = required or named is not None
    names = {tool.name for tool in tools}
    for name in allowed or ():
        if name not in names:
            problem = f"the tool {quoted(name)} is not among the tools"
            raise InvalidRequest(f"{param} allows a tool call, but {problem}.", param=param)
    if allowed is not None:
        tools = [tool for tool in tools if tool.name in allowed]
    restricted = len(tools) < len(names)
    rules = tuple(
        ToolRule(
            tool.name,
            tool.parameters,
            tool.param,
            strict=tool.strict,
            enforced=required or restricted or form is not None or tool.strict,
        )
        for tool in tools
        if named in (None, tool.name)
    )
    wrong = {tool.name: tool.schema_error for tool in tools if tool.schema_error is not None}
    for rule in rules:
        if rule.enforced and rule.name in wrong:
            raise wrong[rule.name]
    if required and not rules:
        problem = (
            f"the tool {quoted(named)} is not among the tools" if named else "there are no tools"
        )
        raise InvalidRequest(f"{param} requires a tool call, but {problem}.", param=param)
    if required:
        return OutputSpec(None, "required", rules, parallel)
    if not rules:
        return OutputSpec(form)
    return OutputSpec(form, "free" if form is None else "allowed", rules, parallel)


def _read_structured_outputs(raw: object, param: str) -> AnswerFormat:
    """Read vLLM's `structured_outputs`."""
    if not isinstance(raw, Mapping):
        raise _malformed(param, "an object")
    given = {key: value for key, value in raw.items() if value is not None and value is not False}
    compact = given.pop("disable_any_whitespace", False) is True
    given.pop("disable_fallback", None)  # selects between vLLM's backends; glmd has only one
    if len(given) != 1:
        raise _malformed(param, "one of json, json_object, regex, choice and grammar")
    kind, value = next(iter(given.items()))
    where = f"{param}.{kind}"
    if kind == "json_object" and value is True:
        return JsonObject()
    if kind in ("json", "regex", "choice", "grammar"):
        return _read_format(kind, value, where, whitespace=not compact)
    raise InvalidRequest(f"{where} is not supported.", param=where)


def _read_format(kind: str, value: object, param: str, *, whitespace: bool = True) -> AnswerFormat:
    if kind == "json":
        return JsonSchema(_read_schema(value, param), param, whitespace=whitespace)
    if kind == "choice":
        if (
            not isinstance(value, Sequence)
            or isinstance(value, str)
            or not 0 < len(value) <= MAX_CHOICES
            or not all(isinstance(option, str) for option in value)
        ):
            raise _malformed(param, f"a list of 1 to {MAX_CHOICES} strings")
        return Choice(tuple(value), param)
    if not isinstance(value, str) or not value:
        raise _malformed(param, "a string that is not empty")
    if kind == "grammar":
        return Grammar(value, param)
    check_length(value, MAX_PATTERN, param)
    return Regex(value, param)


def _read_schema(value: object, param: str) -> Schema:
    """Read a schema sent as JSON or as a string of JSON."""
    if isinstance(value, str):
        check_length(value, MAX_SCHEMA_TEXT, param)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param} is not JSON: {error}", param=param) from error
    if not isinstance(value, dict | bool):
        raise _malformed(param, "a JSON schema: an object or a boolean")
    check_depth(value, param)
    return value


def _malformed(param: str, shape: str) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {shape}.", param=param)


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
    """Text that a regular expression matches as a whole (Rust's syntax)."""

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
