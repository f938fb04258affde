"""Thirty JSON schemas of the kinds that people constrain answers with."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(properties: dict[str, Schema], **more: Any) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


def _array(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,12}$"}
SHORT: Schema = {"type": "string", "maxLength": 12}
PERCENT: Schema = {"type": "integer", "minimum": 0, "maximum": 100}
COLOUR: Schema = {"enum": ["red", "grün", "青", "🟣 violet", 'a "quoted" one', "back\\slash"]}
POINT = _object({"x": {"type": "number", "minimum": -1, "maximum": 1}, "y": {"type": "number"}})
TREE: Schema = {
    "$ref": "#/$defs/node",
    "$defs": {"node": _object({"name": WORD, "children": _array({"$ref": "#/$defs/node"}, 0, 2)})},
}

SCHEMAS: dict[str, Schema] = {
    "boolean": {"type": "boolean"},
    "null or boolean": {"type": ["null", "boolean"]},
    "integer with bounds": {"type": "integer", "minimum": -17, "maximum": 2048},
    "number with bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2.5},
    "multiples": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 10000},
    "any number": {"type": "number"},
    "short text": {"type": "string", "minLength": 1, "maxLength": 20},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "pattern that is not anchored": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 20},
    "unicode pattern": {"type": "string", "pattern": "^[äöü東京😀]{2,6}$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "enum": COLOUR,
    "enum of all types": {"enum": [None, True, 3, 2.5, "é", [1, "a"], {"k": "v"}]},
    "const": {"const": {"ok": True, "text": "naïve “quoted”"}},
    "flat object": _object({"name": SHORT, "age": PERCENT}),
    "optional properties": {**_object({"a": PERCENT, "b": WORD, "c": COLOUR}), "required": ["b"]},
    "unicode names": _object({"größe": PERCENT, "名前": SHORT, 'with "quotes"': {"type": "boolean"}}),
    "nested object": _object({"a": _object({"b": _object({"c": PERCENT, "d": WORD})}), "e": POINT}),
    "array of integers": _array(PERCENT, 2, 5),
    "array of objects": _array(_object({"id": PERCENT, "tags": _array(WORD, 0, 3)}), 1, 3),
    "tuple": {"type": "array", "prefixItems": [PERCENT, WORD, POINT], "items": False, "minItems": 3},
    "matrix": _array(_array({"type": "integer", "minimum": 0, "maximum": 9}, 3, 3), 3, 3),
    "anyOf": {"anyOf": [PERCENT, WORD, {"type": "null"}]},
    "tagged union": {
        "anyOf": [
            _object({"kind": {"const": "circle"}, "radius": {"type": "number", "minimum": 0}}),
            _object({"kind": {"const": "point"}, "at": POINT}),
        ]
    },
    "oneOf": {"oneOf": [_object({"cat": SHORT}), _object({"dog": PERCENT})]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 20}]},
    "recursive": TREE,
    "free properties": {"type": "object", "additionalProperties": PERCENT, "maxProperties": 3},
    "pattern properties": {
        "type": "object",
        "properties": {"id": PERCENT},
        "required": ["id"],
        "patternProperties": {"^x-": SHORT},
        "additionalProperties": False,
        "maxProperties": 3,
    },
}
