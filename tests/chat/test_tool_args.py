"""Argument types: the tool's schema decides whether `123` is a number or a string."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_kit import json_values, texts
from hypothesis import given
from hypothesis import strategies as st

from glmd.chat.tool_args import FREE, ArgType, ArgTypeReader, ValueWriter
from glmd.chat.tools import read_tools

STRING = {"type": "string"}
DEFINITIONS = {
    "Name": {"type": "string"},
    "Count": {"type": ["integer", "null"]},
    "Tree": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/Tree"}}]},
    "Self": {"$ref": "#/$defs/Self"},
    "a/b~c": {"type": "boolean"},
}


def kind(schema: Any) -> ArgType:
    root: dict[str, Any] = {"type": "object", "properties": {"x": schema}, "$defs": DEFINITIONS}
    return ArgTypeReader(root).arguments()["x"]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        # A string keeps its whitespace, and may look like JSON.
        (STRING, "123", "123"),
        (STRING, "null", "null"),
        (STRING, '"quoted"', '"quoted"'),
        (STRING, ' {"a": 1}\n', ' {"a": 1}\n'),
        (STRING, "\n    indented\n", "\n    indented\n"),
        (STRING, "", ""),
        ({"type": "string", "enum": ["1", "2"]}, "1", "1"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "true"}, "true", "true"),
        # Unions with string: JSON only of the other allowed types.
        ({"type": ["string", "null"]}, "123", "123"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, " nullable", " nullable"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"anyOf": [STRING, {"type": "null"}]}, "true", "true"),
        ({"anyOf": [STRING, {"type": "integer"}]}, "123", 123),
        ({"anyOf": [STRING, {"type": "integer"}]}, "1.5", "1.5"),
        ({"anyOf": [STRING, {"type": "integer"}]}, "123 Main St", "123 Main St"),
        ({"oneOf": [STRING, {"type": "object"}]}, '{"a": 1}', {"a": 1}),
        ({"oneOf": [STRING, {"type": "object"}]}, "[1]", "[1]"),
        ({"oneOf": [STRING, {"type": "object"}]}, '{"a": ', '{"a": '),
        ({"type": ["string", "array"]}, "[1, 2]", [1, 2]),
        ({"type": ["string", "boolean"]}, "true", True),
        ({"type": ["string", "boolean"]}, '"x"', '"x"'),
        ({"type": ["string", "integer"], "enum": ["1", 2]}, "1", "1"),
        ({"type": ["string", "integer"], "enum": ["1", 2]}, "2", 2),
        ({"enum": [1, True, "auto", None]}, "auto", "auto"),
        ({"enum": [1, "auto", None]}, "true", "true"),
        ({"enum": [1, "auto", None]}, "null", None),
        # Other types are JSON.
        ({"type": "integer"}, "123", 123),
        ({"type": "integer"}, " 123\n", 123),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "True", True),
        ({"type": ["integer", "null"]}, "None", None),
        ({"type": "array", "items": STRING}, '["a", "1"]', ["a", "1"]),
        ({"type": "array"}, "[]", []),
        ({"type": "object"}, '{"a": {"b": [1, null]}}', {"a": {"b": [1, None]}}),
        ({"properties": {"a": STRING}}, '{"a": "1"}', {"a": "1"}),
        # Text that is not JSON becomes a string.
        ({"type": "integer"}, "a dozen", "a dozen"),
        ({"type": "integer"}, "NaN", "NaN"),
        ({"type": "integer"}, "", ""),
        ({"type": "array"}, "['a']", "['a']"),
        # No type declared: JSON if it parses, else a string.
        ({}, "123", 123),
        ({}, '"x"', "x"),
        ({}, " x ", " x "),
        ({}, "True", "True"),
        (True, "[1]", [1]),
        ({"description": "anything"}, '{"a": 1}', {"a": 1}),
        ({"type": []}, "1", 1),
        # References and combinations.
        ({"$ref": "#/$defs/Name"}, "123", "123"),
        ({"$ref": "#/$defs/Count"}, "null", None),
        ({"$ref": "#/$defs/a~1b~0c"}, "true", True),
        ({"$ref": "#/%24defs/Name"}, "123", "123"),
        ({"$ref": "#/$defs/Tree/anyOf/0"}, "null", None),
        ({"$ref": "#/$defs/Tree"}, "[[null]]", [[None]]),
        ({"$ref": "#anchor"}, "7", 7),
        ({"$ref": "#/$defs/Self"}, "7", 7),
        ({"$ref": "https://example.com/schema"}, "7", 7),
        ({"allOf": [{"$ref": "#/$defs/Name"}, {"description": "d"}]}, "123", "123"),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]}, "1", 1),
        ({"allOf": [{"type": ["string", "null"]}, STRING]}, "null", "null"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}], "default": None}, "2", 2),
    ],
)
def test_the_schema_decides_the_type_of_a_value(schema: Any, text: str, value: Any) -> None:
    read = json.loads(kind(schema).json_of(text))
    assert read == value
    assert type(read) is type(value)


def test_json_stays_as_written() -> None:
    number = "123456789012345678901234567890.10"
    assert kind({"type": "number"}).json_of(number) == number
    assert kind({"type": "object"}).json_of('{"a":1.10}') == '{"a":1.10}'


@given(st.sampled_from([STRING, {"type": ["string", "null", "boolean"]}]), texts)
def test_a_string_is_never_changed(schema: Any, text: str) -> None:
    value = json.loads(kind(schema).json_of(text))
    assert value == text or text.strip() in ("null", "true", "false")


@given(json_values)
def test_without_a_declared_type_any_json_value_is_read(value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    read = json.loads(FREE.json_of(text))
    if not isinstance(value, str):
        assert read == value
        assert type(read) is type(value)


schemas = st.sampled_from(
    [
        STRING,
        {},
        {"type": "integer"},
        {"type": ["string", "null"]},
        {"type": ["string", "boolean"]},
        {"type": ["string", "number"]},
        {"type": ["string", "array", "object"]},
        {"type": ["array", "null"]},
        {"enum": ["a", 1, None]},
    ]
)
awkward = st.one_of(
    texts,
    json_values.map(json.dumps),
    st.lists(st.sampled_from(["nul", "l", "true", " ", "\n", "1", ".5", "e", '"', "{", "}", "x"]))
    .map("".join),
)  # fmt: skip


@given(schemas, awkward, st.lists(st.integers(1, 4)))
def test_a_value_in_pieces_equals_the_whole_value(schema: Any, text: str, cuts: list[int]) -> None:
    writer = ValueWriter(kind(schema))
    pieces, rest = [], text
    for cut in [*cuts, len(text)]:
        if rest:
            pieces.append(writer.feed(rest[:cut]))
        rest = rest[cut:]
    assert "".join(pieces) + writer.close() == kind(schema).json_of(text)


@pytest.mark.parametrize("schema", [STRING, {"type": ["string", "null"]}, {}])
def test_a_string_streams_as_it_arrives(schema: Any) -> None:
    writer = ValueWriter(kind(schema))
    assert writer.feed("So") == '"So'
    assert writer.feed(' "it"\n') == ' \\"it\\"\\n'
    assert writer.close() == '"'


def test_text_is_withheld_only_while_it_may_be_json() -> None:
    writer = ValueWriter(kind({"type": ["string", "null", "number"]}))
    assert [writer.feed(text) for text in (" ", "12", " Oak St")] == ["", "", '" 12 Oak St']
    writer = ValueWriter(kind({"type": ["string", "null"]}))
    assert [writer.feed(text) for text in ("nu", "ll", "able")] == ["", "", '"nullable']


def test_nested_references_take_linear_time() -> None:
    definitions: dict[str, Any] = {"T0": {"enum": ["a", 1]}}
    for level in range(1, 40):
        inner = {"$ref": f"#/$defs/T{level - 1}"}
        definitions[f"T{level}"] = {"anyOf": [inner, inner], "allOf": [inner, inner]}
    parameters = {"properties": {"x": {"$ref": "#/$defs/T39"}}, "$defs": definitions}
    tool = read_tools([{"function": {"name": "f", "parameters": parameters}}])[0]
    assert ArgTypeReader(tool.parameters).arguments()["x"].values == ("a", 1)


def test_arguments_of_combined_schemas_are_all_declared() -> None:
    root: dict[str, Any] = {
        "$ref": "#/$defs/Base",
        "allOf": [{"properties": {"b": {"type": "integer"}}}],
        "anyOf": [{"properties": {"c": STRING}}, {"$ref": "#"}],
        "$defs": {"Base": {"properties": {"a": STRING}}},
    }
    assert sorted(ArgTypeReader(root).arguments()) == ["a", "b", "c"]
