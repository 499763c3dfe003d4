"""JsonSchemaCompiler: generated JSON is valid, and unsupported keywords are refused by path."""

from __future__ import annotations

from typing import Any

import pytest
from grammars import accepts, answers, schema_matcher, validate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemas import INTEGER, SCHEMAS, obj

from glmd.errors import InvalidRequest
from glmd.structured_output.alternatives import FORMATS
from glmd.structured_output.backend import GrammarError
from glmd.structured_output.json_schema import JsonSchemaCompiler


def refusal(schema: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        JsonSchemaCompiler(schema, strict=True).compile(schema, "schema")
    return caught.value


def relaxed(schema: Any) -> list[str]:
    compiler = JsonSchemaCompiler(schema, strict=False)
    compiler.compile(schema, "schema")
    return compiler.relaxed


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_are_valid(name: str) -> None:
    schema = SCHEMAS[name]
    found = list(answers(schema_matcher(schema), 8))
    assert found
    for text in found:
        validate(text, schema)


@pytest.mark.parametrize("name", FORMATS)
def test_random_strings_of_enforced_formats_are_valid(name: str) -> None:
    assert name in Draft202012Validator.FORMAT_CHECKER.checkers
    schema = {"type": "string", "format": name}
    for text in answers(schema_matcher(schema), 30):
        validate(text, schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (obj({"a": INTEGER}), '{"a": 1}'),
        (obj({"a": INTEGER}), '{\n    "a": 1\n}'),
        ({"type": "string"}, '"any \\"text\\" – with \\n and \\u001b"'),
        ({"type": "string", "format": "date"}, '"2024-02-29"'),
        ({"type": "string", "format": "date-time"}, '"2024-12-31T23:59:59.5+05:30"'),
        ({"type": "string", "format": "email"}, '"first.last+tag@mail.example.com"'),
        ({"type": "string", "format": "uri"}, '"https://example.com:8080/a/b?x=1&y=%20#top"'),
        ({"type": "string", "format": "uri"}, '"mailto:someone@example.com"'),
        ({"type": "string", "format": "ipv6"}, '"2001:db8::ff00:42:8329"'),
        ({"type": "string", "format": "duration"}, '"P3DT12H30M"'),
        ({"type": "string", "format": "hostname"}, '"db-1.internal.example.com"'),
        ({"type": "number"}, "-1.5e-10"),
        ({"type": "object"}, '{"anything": [1, {"deep": null}]}'),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, '{"b": []}'),
        ({"enum": [1.0, 2]}, "1"),
        ({"type": "string", "pattern": "b"}, '"abc"'),
        ({"properties": {"$ref": {"type": "string"}}}, '{"$ref": "a"}'),
        ({"enum": [{"$ref": "#/$defs/a"}]}, '{"$ref": "#/$defs/a"}'),
        ({"type": ["string", "null"], "format": "date"}, "null"),
        ({"properties": {"a": INTEGER}, "propertyNames": {"pattern": "^[a-z]$"}}, '{"a": 1}'),
        (True, '[{"x": "y"}]'),
    ],
)
def test_common_spellings_are_accepted(schema: Any, text: str) -> None:
    validate(text, schema)
    assert accepts(schema_matcher(schema), text)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        # An escaped spelling would evade the schema of a declared property.
        (
            {
                "type": "object",
                "properties": {"a": INTEGER},
                "additionalProperties": {"type": "string"},
            },
            '{"\\u0061": "x"}',
        ),
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "format": "date"}, '"0000-01-01"'),
        ({"type": "string", "format": "time"}, '"23:59:60Z"'),
        (obj({"a": INTEGER, "b": INTEGER}), '{"a": 1, "a": 2, "b": 3}'),
        ({"type": "object"}, '{"a":  1}'),
        ({"type": "object"}, '{\n\n"a": 1}'),
        ({"type": "object", "properties": {"a": INTEGER}}, '{"b": 1}'),
        ({"properties": {"a": INTEGER}}, '"not an object"'),
        ({"minLength": 1}, "3"),
        # llguidance alone accepts an excluded bound, a repeated name, and names that
        # propertyNames excludes.
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0"),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0"),
        ({"type": "object", "minProperties": 1}, "{}"),
        ({"properties": {"A": {}}, "propertyNames": {"pattern": "^[a-z]$"}}, '{"A": 1}'),
        (
            {"properties": {"A": {}}, "propertyNames": {"pattern": "^[a-z]$"}}
            | {"additionalProperties": True},
            '{"A": 1}',
        ),
    ],
)
def test_invalid_or_unwanted_text_is_rejected(schema: Any, text: str) -> None:
    assert not accepts(schema_matcher(schema), text)


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"not": {"type": "null"}}, "schema.not"),
        ({"if": {}, "then": {}}, "schema.if"),
        (obj({"a": {"type": "array", "uniqueItems": True}}), "schema.properties.a.uniqueItems"),
        (obj({"a": {"items": {"contains": {}}}}), "schema.properties.a.items.contains"),
        ({"anyOf": [{}, {"dependentRequired": {"a": ["b"]}}]}, "schema.anyOf[1].dependentRequired"),
        ({"type": "object", "minProperties": 2}, "schema.minProperties"),
        (
            obj({"a": INTEGER, "b": INTEGER}, "a", maxProperties=1, additionalProperties=True),
            "schema.maxProperties",
        ),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "schema.propertyNames"),
        ({"type": "string", "pattern": "(?=x)y"}, "schema.pattern"),
        ({"type": "string", "pattern": r"\bword\b"}, "schema.pattern"),
        ({"type": "string", "format": "regex"}, "schema.format"),
        ({"type": "integer", "minimum": 2**53 + 1}, "schema.minimum"),
        ({"const": 2**60 + 1}, "schema.const"),
        ({"type": "integer", "multipleOf": 1_000_003}, "schema.multipleOf"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "schema.oneOf"),
        # The number 5 is valid under both, since minLength applies to strings only.
        ({"oneOf": [{"minLength": 3}, {"type": "integer"}]}, "schema.oneOf"),
        ({"$ref": "https://example.com/schema.json"}, "schema.$ref"),
        ({"$ref": "#anchor"}, "schema.$ref"),
        (
            {"allOf": [{"unevaluatedProperties": False}, {}]},
            "schema.allOf[0].unevaluatedProperties",
        ),
    ],
)
def test_unsupported_keywords_are_refused_by_path_or_left_out(schema: Any, param: str) -> None:
    error = refusal(schema)
    assert error.param == param
    assert error.message.startswith(f"{param} cannot be enforced")
    assert relaxed(schema) == [param]
    schema_matcher(schema, strict=False)


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        (3, "schema"),
        ({"type": "text"}, "schema.type"),
        ({"type": []}, "schema.type"),
        ({"properties": []}, "schema.properties"),
        ({"properties": {"a": 1}}, "schema.properties.a"),
        ({"required": "a"}, "schema.required"),
        ({"items": 3}, "schema.items"),
        ({"anyOf": []}, "schema.anyOf"),
        ({"enum": "a"}, "schema.enum"),
        ({"minLength": -1}, "schema.minLength"),
        ({"maxItems": 1.5}, "schema.maxItems"),
        ({"minimum": "0"}, "schema.minimum"),
        ({"multipleOf": 0}, "schema.multipleOf"),
        ({"pattern": 3}, "schema.pattern"),
        ({"$ref": 3}, "schema.$ref"),
        ({"$ref": "#/$defs/nowhere"}, "schema.$ref"),
        ({"$ref": "#"}, "schema.$ref"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "schema.properties.a.$ref"),
        ({"properties": {f"p{i}": {} for i in range(1001)}}, "schema.properties"),
        ({"enum": list(range(10_001))}, "schema.enum"),
    ],
)
def test_malformed_or_oversized_schemas_are_refused_always(schema: Any, param: str) -> None:
    for strict in (True, False):
        with pytest.raises(InvalidRequest) as caught:
            JsonSchemaCompiler(schema, strict=strict).compile(schema, "schema")
        assert caught.value.param == param


def test_a_deeply_nested_schema_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"items": schema}
    assert "nested more than 64 deep" in refusal(schema).message


@pytest.mark.parametrize(
    "schema",
    [
        {"uniqueItems": False},
        {"type": "array", "maxItems": 1, "uniqueItems": True},
        {"if": {"type": "null"}},
        {"unevaluatedProperties": True},
        {"type": "object", "propertyNames": {"type": "string"}},
        obj({"a": INTEGER}, unevaluatedProperties=False),
        obj({"a": INTEGER}, minProperties=1),
        obj({"a": INTEGER}, maxProperties=1),
        {"type": "integer", "format": "int64"},
        {"type": "string", "format": "password", "x-order": 3, "example": "x"},
        {"title": "T", "description": "D", "default": 1, "deprecated": True, "$comment": "c"},
    ],
)
def test_keywords_that_constrain_nothing_are_accepted(schema: Any) -> None:
    assert not relaxed(schema)
    schema_matcher(schema)


def test_a_required_name_is_not_declared_where_unevaluated_properties_are_forbidden() -> None:
    schema = {"properties": {"a": INTEGER}, "required": ["z"], "unevaluatedProperties": False}
    with pytest.raises(GrammarError, match="required property 'z'"):
        schema_matcher(schema)
    assert accepts(schema_matcher(schema | {"unevaluatedProperties": True}), '{"z": 1}')


def test_an_optional_tag_that_separates_branches_becomes_required() -> None:
    matcher = schema_matcher(SCHEMAS["oneOf of references"])
    assert accepts(matcher, '{"pet": "dog", "tricks": "sits"}')
    assert not accepts(matcher, '{"tricks": "sits"}')


# -- random schemas -----------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c d", "é", 'q"'])
small = st.integers(0, 4)
bounds = st.one_of(st.integers(-50, 50), st.decimals(-9, 9, places=2).map(float))


def ranges(low: str, high: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    both = st.tuples(values, values).map(sorted)
    return both.map(lambda pair: {low: pair[0], high: pair[1]})


def with_type(name: str) -> Any:
    return lambda rest: {"type": name, **rest}


strings = st.one_of(
    ranges("minLength", "maxLength", small),
    st.sampled_from(["^a|b$", "[0-9]+", "^(x|yy){1,3}$", "(^é|z)", r"^\w\s\S$", ""]).map(
        lambda pattern: {"pattern": pattern, "maxLength": 9}
    ),
    st.sampled_from(["date", "ipv4", "uuid", "time"]).map(lambda name: {"format": name}),
).map(with_type("string"))
numbers: st.SearchStrategy[dict[str, Any]] = st.one_of(
    ranges("minimum", "maximum", bounds),
    ranges("exclusiveMinimum", "maximum", bounds),
    st.just({}),
)
scalars = st.one_of(
    strings,
    numbers.map(with_type("number")),
    numbers.map(with_type("integer")),
    st.integers(1, 9).map(lambda n: {"type": "integer", "multipleOf": n}),
    st.sampled_from(["null", "boolean"]).map(lambda name: {"type": name}),
    st.lists(st.one_of(st.integers(-3, 3), names, st.none(), st.booleans()), min_size=1).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"minLength": 1, "maxLength": 4}, {"minimum": 3}, {"multipleOf": 2}]),
    st.just({"$ref": "#/$defs/shared"}),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(names, inner, max_size=3)
    return st.one_of(
        st.fixed_dictionaries(
            {"properties": properties},
            optional={
                "type": st.just("object"),
                "required": st.lists(names, unique=True, max_size=2),
                "additionalProperties": st.one_of(st.booleans(), inner),
                "unevaluatedProperties": st.booleans(),
                "patternProperties": st.fixed_dictionaries({"^[a-c]": inner}),
                "propertyNames": st.just({"pattern": "^[a-z]$"}),
                "minProperties": st.integers(0, 1),
                "maxProperties": st.integers(3, 5),
            },
        ),
        st.fixed_dictionaries(
            {"maxItems": small},
            optional={
                "type": st.just("array"),
                "items": inner,
                "minItems": st.integers(0, 2),
                "prefixItems": st.lists(inner, min_size=1, max_size=2),
            },
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches}),
        st.lists(inner, min_size=2, max_size=3).map(lambda branches: {"oneOf": branches}),
        st.lists(inner, min_size=1, max_size=2).map(lambda branches: {"allOf": branches}),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.recursive(scalars, larger, max_leaves=8), scalars, st.integers(0, 2**32))
def test_random_schemas_are_refused_or_enforced(schema: Any, shared: Any, seed: int) -> None:
    if shared == {"$ref": "#/$defs/shared"}:
        shared = {"type": "boolean"}
    whole = {**schema, "$defs": {"shared": shared}}
    try:
        matcher = schema_matcher(whole)
    except (InvalidRequest, GrammarError):
        return
    for text in answers(matcher, 4, seed):
        validate(text, whole)
