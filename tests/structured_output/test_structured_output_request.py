"""Output constraints in requests: how they are read, and errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest
from grammars import accepts, matcher_of

from glmd.chat.types import Tool
from glmd.errors import InvalidRequest
from glmd.structured_output.request import (
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    Regex,
    make_structure,
    only_format,
    read_guided,
    read_response_format,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonObject()),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
            JsonSchema(SCHEMA, "response_format.json_schema.schema", strict=True),
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
            JsonSchema(SCHEMA, "response_format.json_schema.schema", strict=False),
        ),
    ],
)
def test_response_formats_are_read(raw: Any, expected: Any) -> None:
    assert read_response_format(raw) == expected


def test_a_flat_format_contains_the_schema_itself() -> None:
    raw: dict[str, Any] = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    for strict in (True, False):
        found = read_response_format(raw, "format", flat=True, strict=strict)
        assert found == JsonSchema(SCHEMA, "format.schema", strict=strict)
    raw["strict"] = True
    assert read_response_format(raw, "format", flat=True) == JsonSchema(SCHEMA, "format.schema")


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ("json", "response_format"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": "yes"}},
            "response_format.json_schema.strict",
        ),
    ],
)
def test_a_malformed_response_format_is_refused_with_its_path(raw: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_response_format(raw)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"guided_json": None}, None),
        ({"guided_json": SCHEMA}, JsonSchema(SCHEMA, "guided_json")),
        ({"guided_json": '{"type": "null"}'}, JsonSchema({"type": "null"}, "guided_json")),
        ({"guided_regex": "[a-z]+"}, Regex("[a-z]+", "guided_regex")),
        ({"guided_choice": ["yes", "no"]}, Choice(("yes", "no"), "guided_choice")),
        ({"guided_grammar": "start: X"}, Grammar("start: X", "guided_grammar")),
        ({"structured_outputs": {"json": SCHEMA}}, JsonSchema(SCHEMA, "structured_outputs.json")),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            JsonSchema(SCHEMA, "structured_outputs.json", whitespace=False),
        ),
        ({"structured_outputs": {"json_object": True, "regex": None}}, JsonObject()),
        ({"structured_outputs": {"regex": "x"}}, Regex("x", "structured_outputs.regex")),
        ({"structured_outputs": {"choice": ["x"]}}, Choice(("x",), "structured_outputs.choice")),
    ],
)
def test_guided_fields_are_read(fields: dict[str, Any], expected: Any) -> None:
    assert read_guided(fields) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "3"}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_grammar": 3}, "guided_grammar"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_json": SCHEMA, "guided_regex": "x"}, "guided_regex"),
    ],
)
def test_malformed_guided_fields_are_refused_with_their_path(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_guided(fields)
    assert caught.value.param == param


def test_two_formats_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        only_format(JsonObject(), None, Regex("x", "guided_regex"))
    assert caught.value.param == "guided_regex"
    assert only_format(None, JsonObject()) == JsonObject()


def test_optional_calls_of_tools_that_are_not_strict_are_not_enforced() -> None:
    spec = make_structure(None, [Tool("f", {}, {"function": {"name": "f"}})])
    assert spec.calls == "free"
    assert not any(tool.enforced for tool in spec.tools)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (Regex(r"\d{3}-(foo|bar)/?", "p"), ["123-foo", "000-bar/"], ["12-foo", "123-foox"]),
        (Regex("^a+$", "p"), ["aa"], ["b"]),
        (Choice(("yes", "yes!", 'a "b"\n'), "p"), ["yes", "yes!", 'a "b"\n'], ["ye", "no"]),
        (Grammar('root ::= "a" | "b" root', "p"), ["a", "bba"], ["b", "ab"]),
        (Grammar("start: X+\nX: /[xy]/", "p"), ["xyx"], ["z"]),
        (JsonObject(), ["{}", '{"a": [1, null]}'], ["[]", "1", '{"a": }']),
    ],
)
def test_grammars_accept_exactly_their_format(
    form: Any, right: list[str], wrong: list[str]
) -> None:
    matcher = matcher_of(form)
    for text in right:
        assert accepts(matcher, text), text
    for text in wrong:
        assert not accepts(matcher, text), text


def test_lexeme_options_that_drafts_would_break_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        matcher_of(Grammar("start: a\na[max_tokens=3]: /x*/", "guided_grammar"))
    assert caught.value.param == "guided_grammar"
    matcher_of(Grammar('start: "max_tokens=" /[0-9]+/', "guided_grammar"))
