"""JSON schemas of growing difficulty, in the manner of JSONSchemaBench."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def obj(properties: Schema, *required: str, **more: Any) -> Schema:
    """Return an object schema; all properties are required if none is named."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required or properties),
        "additionalProperties": False,
        **more,
    }


STRING = {"type": "string"}
INTEGER = {"type": "integer"}
SHORT = {"type": "string", "maxLength": 12}

SCALARS: dict[str, Schema] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "length": {"type": "string", "minLength": 3, "maxLength": 8},
    "enum": {"enum": ["red", "green", "blue"]},
    "enum of all types": {"enum": ["a", 1, 2.5, True, None, [1, "x"], {"k": "v"}]},
    "const": {"const": {"version": 2, "tags": ["a"]}},
    "several types": {"type": ["integer", "boolean", "null"]},
    "unicode": {"enum": ["naïve", "日本語", "emoji 😀", 'quote " and \\ and \n']},
    "integer range": {"type": "integer", "minimum": -20, "maximum": 117},
    "number range": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "negative numbers": {"type": "number", "maximum": -0.5},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    "pattern found anywhere": {"type": "string", "pattern": "[0-9]x", "maxLength": 10},
    "pattern with alternatives": {"type": "string", "pattern": "^(yes|no|maybe(-[a-z]+)?)$"},
    "pattern of unicode": {"type": "string", "pattern": "^[àéîôü]{2,6}$"},
}

FORMATS: dict[str, Schema] = {
    f"format {name}": {"type": "string", "format": name}
    for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6")
} | {
    f"format {name}": {"type": "string", "format": name} for name in ("uuid", "uri", "json-pointer")
}

ARRAYS: dict[str, Schema] = {
    "array": {"type": "array", "items": INTEGER, "maxItems": 8},
    "array of bounded length": {"type": "array", "items": SHORT, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [INTEGER, SHORT], "items": False, "minItems": 2},
    "tuple and rest": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}],
        "items": {"type": "null"},
        "maxItems": 4,
    },
    "matrix": {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    },
    "array of enums": {"type": "array", "items": {"enum": ["r", "w", "x"]}, "maxItems": 3},
}

OBJECTS: dict[str, Schema] = {
    "object": obj({"name": SHORT, "age": INTEGER}),
    "optional properties": obj({"a": INTEGER, "b": SHORT, "c": {"type": "boolean"}}, "b"),
    "no property required": obj({"a": INTEGER, "b": INTEGER}) | {"required": []},
    "nested": obj({"user": obj({"name": SHORT, "address": obj({"city": SHORT, "zip": SHORT})})}),
    "array of objects": obj(
        {"items": {"type": "array", "maxItems": 3, "items": obj({"id": INTEGER, "tag": SHORT})}}
    ),
    "map": {"type": "object", "additionalProperties": INTEGER, "maxProperties": 3},
    "declared and other properties": {
        "type": "object",
        "properties": {"id": INTEGER},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^s_": SHORT, "^n_": INTEGER},
        "additionalProperties": False,
    },
    "property names": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z]{1,3}$"},
        "additionalProperties": {"type": "null"},
    },
    "at least one property": obj({"a": INTEGER, "b": INTEGER})
    | {"required": [], "minProperties": 1},
    "names with all characters": obj({'a "b"': INTEGER, "ключ": INTEGER, "line\nbreak": INTEGER}),
    "undeclared required": {"type": "object", "properties": {"a": INTEGER}, "required": ["a", "z"]},
    "object without a type": {"properties": {"a": INTEGER}, "required": ["a"]},
    "any object": {"type": "object", "maxProperties": 2},
}

COMBINED: dict[str, Schema] = {
    "nullable": obj({"a": {"type": ["string", "null"], "maxLength": 9}}),
    "anyOf": {"anyOf": [SHORT, INTEGER, obj({"x": {"type": "number"}})]},
    "anyOf of like objects": {"anyOf": [obj({"a": INTEGER}), obj({"a": SHORT, "b": INTEGER})]},
    "oneOf by type": {"oneOf": [{"type": "boolean"}, SHORT, {"type": "array", "maxItems": 0}]},
    "oneOf by tag": {
        "oneOf": [
            obj({"kind": {"const": "circle"}, "r": {"type": "number"}}),
            obj({"kind": {"const": "square"}, "side": {"type": "number"}}),
        ]
    },
    "oneOf of references": {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "$defs": {
            "cat": {"type": "object", "properties": {"pet": {"const": "cat"}, "lives": INTEGER}},
            "dog": {"type": "object", "properties": {"pet": {"const": "dog"}, "tricks": SHORT}},
        },
    },
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": SHORT}, "required": ["b"]},
        ],
    },
    "allOf of one type": {
        "allOf": [
            {"type": "integer", "minimum": 3},
            {"maximum": 90},
            {"multipleOf": 3},
        ]
    },
    "reference": obj({"home": {"$ref": "#/$defs/point"}, "work": {"$ref": "#/$defs/point"}})
    | {"$defs": {"point": obj({"x": {"type": "number"}, "y": {"type": "number"}})}},
    "reference with siblings": {
        "$ref": "#/$defs/named",
        "properties": {"size": INTEGER},
        "required": ["size"],
        "$defs": {"named": {"type": "object", "properties": {"name": SHORT}, "required": ["name"]}},
    },
    "reference by path": {
        "type": "object",
        "properties": {"first": {"enum": ["α", "β"]}, "second": {"$ref": "#/properties/first"}},
        "required": ["first", "second"],
        "additionalProperties": False,
    },
    "escaped reference": {
        "$ref": "#/$defs/a~1b%20c",
        "$defs": {"a/b c": {"type": "array", "items": INTEGER, "maxItems": 2}},
    },
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"id": {"type": "integer", "exclusiveMinimum": 0}},
        "type": "object",
        "properties": {"id": {"$ref": "#/definitions/id"}, "ok": {"type": "boolean"}},
        "required": ["id"],
        "additionalProperties": False,
    },
}

RECURSIVE: dict[str, Schema] = {
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": obj(
                {
                    "value": INTEGER,
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "value",
            )
        },
    },
    "list by reference to the root": obj(
        {"head": INTEGER, "tail": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}
    ),
    "expression": {
        "$ref": "#/$defs/expression",
        "$defs": {
            "expression": {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/sum"}]},
            "sum": obj(
                {
                    "op": {"enum": ["+", "-"]},
                    "left": {"$ref": "#/$defs/expression"},
                    "right": {"$ref": "#/$defs/expression"},
                }
            ),
        },
    },
}

REAL: dict[str, Schema] = {
    "calendar event": obj(
        {
            "title": {"type": "string", "minLength": 1, "maxLength": 40},
            "start": {"type": "string", "format": "date-time"},
            "attendees": {
                "type": "array",
                "maxItems": 2,
                "items": obj(
                    {
                        "email": {"type": "string", "format": "email"},
                        "optional": {"type": "boolean"},
                    }
                ),
            },
            "repeat": {"anyOf": [{"enum": ["daily", "weekly"]}, {"type": "null"}]},
        }
    ),
    "product": obj(
        {
            "sku": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
            "price": {"type": "number", "minimum": 0.01, "maximum": 9999},
            "stock": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": SHORT, "maxItems": 3},
            "dimensions": obj({"w": {"type": "number"}, "h": {"type": "number"}}),
        },
        "sku",
        "price",
    ),
    "package": obj(
        {
            "name": {"type": "string", "pattern": "^[a-z][a-z0-9-]{0,20}$"},
            "version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+(-[a-z]+)?$"},
            "dependencies": {
                "type": "object",
                "patternProperties": {"^[a-z]{1,10}$": {"type": "string", "pattern": r"^\^?\d+$"}},
                "additionalProperties": False,
                "maxProperties": 3,
            },
            "license": {"enum": ["MIT", "Apache-2.0", None]},
        },
        "name",
        "version",
    ),
    "pydantic model": {
        "$defs": {
            "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"},
            "Pixel": {
                "properties": {
                    "x": {"title": "X", "type": "integer"},
                    "color": {"$ref": "#/$defs/Color", "default": "red"},
                    "note": {"anyOf": [SHORT, {"type": "null"}], "default": None, "title": "Note"},
                },
                "required": ["x"],
                "title": "Pixel",
                "type": "object",
            },
        },
        "properties": {
            "pixels": {"items": {"$ref": "#/$defs/Pixel"}, "maxItems": 3, "type": "array"},
            "owner": {"title": "Owner", "type": "string", "maxLength": 10},
        },
        "required": ["pixels", "owner"],
        "title": "Image",
        "type": "object",
    },
}

SCHEMAS: dict[str, Schema] = SCALARS | FORMATS | ARRAYS | OBJECTS | COMBINED | RECURSIVE | REAL
