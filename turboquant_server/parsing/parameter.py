"""The parameters of a function where each is written by itself: as text if it may be text, else as JSON."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

UNIONS = ("anyOf", "oneOf")
ANNOTATIONS = frozenset(
    {"$comment", "default", "deprecated", "description", "examples", "format", "nullable", "title"}
)
DEFINITIONS = frozenset({"$defs", "definitions"})
OBJECT_KEYWORDS = frozenset({"$id", "$schema", "additionalProperties", "properties", "required", "type"})
TEXT_KEYWORDS = frozenset({"const", "enum", "maxLength", "minLength", "pattern", "type"})

_TYPES: Mapping[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
# A slash ends a regex where it is to stand.
_SLASH_OR_ESCAPE = re.compile(r"\\?/|\\.", re.DOTALL)


class Parameter(NamedTuple):
    """One parameter.

    Attributes:
        key: Its name.
        is_required: It may not be left out.
        value: A JSON schema; or of a text tuples of regexes, all of one of which match the whole text.
    """

    key: str
    is_required: bool
    value: str | tuple[tuple[str, ...], ...]


def find_types(schema: object, root: Mapping[str, Any]) -> set[str]:
    """Return the types that a schema allows, as far as it names them.

    Args:
        schema: Of a value.
        root: Where the schema stands, which it may refer to.
    """
    return {name for one in _spread(schema, root) for name in _own_types(one)}


def read_parameters(schema: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """Return the parameters that a JSON schema of an object describes.

    Raises:
        ValueError: It asks for more than that.
    """
    _refuse_others(schema, OBJECT_KEYWORDS | DEFINITIONS)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise ValueError("properties must be an object and required a list")
    if not all(isinstance(key, str) for key in required):
        raise ValueError("required must be a list of names")
    definitions = {name: schema[name] for name in DEFINITIONS & schema.keys()}
    properties = {key: one for key, one in properties.items() if one is not False}
    parameters = []
    for key, one in {**properties, **{key: {} for key in required if key not in properties}}.items():
        if key != key.strip() or not re.fullmatch(r"[^<>\n]+", key):
            raise ValueError(f"{key!r} cannot be written as the name of a parameter")
        types = find_types(one, schema)
        if types and "string" not in types:
            value: str | tuple[tuple[str, ...], ...] = json.dumps({**one, **definitions})
        else:
            value = _describe_text(one, schema)
        parameters.append(Parameter(key, key in required, value))
    return tuple(parameters)


def _describe_text(schema: object, root: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    found: list[tuple[str, ...]] = []
    for one in _spread(schema, root):
        types = _own_types(one)
        if "null" in types:
            found.append(("null",))
        if not types or "string" in types:
            found.append(_describe_own_text(one))
    return tuple(found) or ((),)


def _describe_own_text(schema: Mapping[str, Any]) -> tuple[str, ...]:
    _refuse_others(schema, TEXT_KEYWORDS | DEFINITIONS)
    regexes = []
    if values := _values(schema):
        regexes.append("|".join(map(_spell, (value for value in values if isinstance(value, str)))))
    if "minLength" in schema or "maxLength" in schema:
        regexes.append(f"(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})")
    if isinstance(pattern := schema.get("pattern"), str):
        text = _SLASH_OR_ESCAPE.sub(lambda match: r"\x2f" if match[0][-1] == "/" else match[0], pattern)
        before, after = ("" if text[:1] == "^" else "(?s:.*)"), ("" if text[-1:] == "$" else "(?s:.*)")
        regexes.append(f"{before}(?:{text}){after}")
    return tuple(regexes)


def _refuse_others(schema: Mapping[str, Any], known: frozenset[str]) -> None:
    if others := schema.keys() - known - ANNOTATIONS:
        names = ", ".join(map(repr, sorted(others)))
        raise ValueError(f"unsupported keywords where this model writes text: {names}")


def _spread(schema: object, root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what a schema allows, one or the other; a definition that is referred to, once."""
    waiting, known = deque([schema]), set()
    while waiting:
        one = waiting.popleft()
        if not isinstance(one, Mapping):
            continue
        if isinstance(reference := one.get("$ref"), str):
            if reference not in known:
                known.add(reference)
                waiting.append(_look_up(reference, root))
            continue
        choices = [choice for union in UNIONS if isinstance(one.get(union), list) for choice in one[union]]
        waiting.extend(choices)
        if not choices or "type" in one:
            yield one


def _look_up(reference: str, root: Mapping[str, Any]) -> object:
    node: object = root
    for key in reference.split("/")[1:]:
        node = node.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    named = schema.get("type")
    if named is None:
        return {_TYPES[type(value)] for value in _values(schema)}
    return {name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)}


def _values(schema: Mapping[str, Any]) -> list[Any]:
    values = schema.get("enum")
    return values if isinstance(values, list) else [schema["const"]] if "const" in schema else []


def _spell(text: str) -> str:
    """Return a regex that matches a text."""
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text)
