"""What clients write to have an answer's form enforced, read into neutral form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmd.chat.messages import is_strict
from glmd.chat.request_limits import MAX_PATTERN, check_depth, check_length
from glmd.chat.types import Tool
from glmd.errors import InvalidRequest
from glmd.structured_output.spec import (
    AnswerFormat,
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    OutputSpec,
    Regex,
    ToolRule,
)

MAX_CHOICES = 10_000

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
"""Request fields that `read_guided` reads (vLLM's, https://docs.vllm.ai)."""


def read_response_format(
    raw: object, param: str = "response_format", *, flat: bool = False, strict: bool = False
) -> AnswerFormat | None:
    """OpenAI's `response_format`, or what other APIs call format; None for plain text.

    Args:
        flat: the schema is in the format itself, as outside of the chat API.
        strict: what is meant where `strict` is not said: whether keywords that cannot be enforced
            are refused rather than left out.

    Raises:
        InvalidRequest: names the field at fault.
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
            schema = _schema(fields.get("schema"), f"{where}.schema")
            return JsonSchema(schema, f"{where}.schema", strict=strict)
    raise _malformed(f"{param}.type", "text, json_object or json_schema")


def read_guided(fields: Mapping[str, Any]) -> AnswerFormat | None:
    """The `guided_…` fields and `structured_outputs` of a request; None if there are none.

    Raises:
        InvalidRequest: names the field at fault; there is more than one.
    """
    found = [_read_guided(name, fields[name]) for name in GUIDED if fields.get(name) is not None]
    return only_format(*found)


def only_format(*formats: AnswerFormat | None) -> AnswerFormat | None:
    """The one format among what several fields say.

    Raises:
        InvalidRequest: there is more than one.
    """
    found = [form for form in formats if form is not None]
    if len(found) > 1:
        names = ", ".join(getattr(form, "param", "response_format") for form in found)
        raise InvalidRequest(
            f"An answer can have one form only, but there are several: {names}.",
            param=getattr(found[1], "param", "response_format"),
        )
    return found[0] if found else None


def make_structure(
    form: AnswerFormat | None,
    tools: Sequence[Tool],
    *,
    required: bool = False,
    named: str | None = None,
    parallel: bool = True,
    param: str = "tool_choice",
) -> OutputSpec:
    """What `response_format`, `tools` and `tool_choice` say together.

    Where the model may choose, calls of strict tools follow their schemas. Where calls are
    required, or are what there may be instead of a form, all follow them; keywords that cannot be
    enforced are refused for strict tools and left out for others.

    Args:
        form: of the content, unless calls are required.
        tools: that may be called; none with `tool_choice` "none".
        required: the answer must call a tool (`tool_choice` "required").
        named: ... this tool.
        parallel: ... or several (`parallel_tool_calls`).
        param: the client's name of what asks for calls.

    Raises:
        InvalidRequest: a call is required but there is no such tool.
    """
    required = required or named is not None
    rules = tuple(
        ToolRule(
            tool.name,
            tool.parameters,
            tool.param,
            strict=tool.strict,
            enforced=required or form is not None or tool.strict,
        )
        for tool in tools
        if named in (None, tool.name)
    )
    if required and not rules:
        what = f"the tool {named!r}, which is not among the tools" if named else "a call of a tool"
        raise InvalidRequest(f"{param} asks for {what}.", param=param)
    if required:
        return OutputSpec(None, "required", rules, parallel)
    if not rules:
        return OutputSpec(form)
    return OutputSpec(form, "free" if form is None else "allowed", rules, parallel)


def _read_guided(name: str, value: object) -> AnswerFormat:
    match name:
        case "guided_json":
            return JsonSchema(_schema(value, name), name)
        case "structured_outputs":
            return _read_structured(value, name)
    return _read_text(name.removeprefix("guided_"), value, name)


def _read_structured(raw: object, param: str) -> AnswerFormat:
    """vLLM's `structured_outputs`."""
    if not isinstance(raw, Mapping):
        raise _malformed(param, "an object")
    given = {key: value for key, value in raw.items() if value is not None and value is not False}
    compact = given.pop("disable_any_whitespace", False) is True
    given.pop("disable_fallback", None)  # there is nothing to fall back to
    if len(given) != 1:
        raise _malformed(param, "one of json, json_object, regex, choice and grammar")
    kind, value = next(iter(given.items()))
    where = f"{param}.{kind}"
    match kind:
        case "json":
            return JsonSchema(_schema(value, where), where, whitespace=not compact)
        case "json_object" if value is True:
            return JsonObject()
        case "regex" | "choice" | "grammar":
            return _read_text(kind, value, where)
    raise InvalidRequest(f"{where} is not supported.", param=where)


def _read_text(kind: str, value: object, param: str) -> AnswerFormat:
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
    if kind == "regex":
        check_length(value, MAX_PATTERN, param)
    return Regex(value, param) if kind == "regex" else Grammar(value, param)


def _schema(value: object, param: str) -> dict[str, Any] | bool:
    """A schema sent as JSON or as a string of JSON."""
    if isinstance(value, str):
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
