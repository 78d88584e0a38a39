"""A validator for Kubernetes structural schemas (the OpenAPI v3 subset that CustomResourceDefinitions use).

Stricter than an API server in one point, and like ``kubectl apply`` there: a field that the schema does not name is an
error, because a misspelt field of a policy must not be ignored. Rules (``x-kubernetes-validations``) are looked up by their
text in :mod:`controlplane.schema.rules`; a rule that is not there raises KeyError, which a test rules out.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from controlplane.schema.rules import RULES

Schema = Mapping[str, Any]
#: A field's path (``spec.http[0].route``) and what is wrong with it.
Problem = tuple[str, str]

_UNITS = {
    "string": ("Length", "characters"),
    "array": ("Items", "items"),
    "object": ("Properties", "properties"),
}
_INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}


def problems(value: Any, schema: Schema, path: str = "") -> Iterator[Problem]:
    """Everything that is wrong with ``value``, field by field."""
    if value is None:
        if not schema.get("nullable"):
            yield path, f"null, where {_article(schema.get('type', 'value'))} is expected"
        return
    expected = schema.get("type")
    if expected is not None and not _is(expected, value):
        yield path, f"{_show(value)} is {_article(_type_of(value))}, not {_article(expected)}"
        return
    yield from _limits(value, schema, path)
    yield from _combinations(value, schema, path)
    if isinstance(value, dict):
        yield from _members(value, schema, path)
    elif isinstance(value, list):
        yield from _items(value, schema, path)
    for rule in schema.get("x-kubernetes-validations", ()):
        if not _holds(rule["rule"], value):
            yield path, rule.get("message", f"rule failed: {rule['rule']}")


def _members(value: dict[str, Any], schema: Schema, path: str) -> Iterator[Problem]:
    properties = schema.get("properties", {})
    rest = schema.get("additionalProperties")
    preserve = schema.get("x-kubernetes-preserve-unknown-fields")
    for name in schema.get("required", ()):
        if name not in value:
            yield _join(path, name), "required, but missing"
    for name, member in value.items():
        at = _join(path, str(name))
        if name in properties:
            yield from problems(member, properties[name], at)
        elif isinstance(rest, Mapping):
            yield from problems(member, rest, at)
        elif rest is not True and not preserve:
            near = difflib.get_close_matches(str(name), list(properties), 1)
            yield at, f"unknown field{f'; did you mean {near[0]}?' if near else ''}"


def _items(value: list[Any], schema: Schema, path: str) -> Iterator[Problem]:
    of = schema.get("items")
    for i, item in enumerate(value):
        if of is not None:
            yield from problems(item, of, f"{path}[{i}]")
    if schema.get("x-kubernetes-list-type") == "map":
        seen: set[str] = set()
        for i, item in enumerate(value):
            keys = (
                {k: item.get(k) for k in schema["x-kubernetes-list-map-keys"]}
                if isinstance(item, dict)
                else {}
            )
            text = json.dumps(keys)
            if keys and text in seen:
                yield f"{path}[{i}]", f"Duplicate value: {text}"
            seen.add(text)


def _limits(value: Any, schema: Schema, path: str) -> Iterator[Problem]:
    if "enum" in schema and value not in schema["enum"]:
        yield path, f"Unsupported value: {_show(value)}; one of {', '.join(map(str, schema['enum']))}"
    size = len(value) if isinstance(value, (str, list, dict)) else 0
    unit = _UNITS.get(_type_of(value))
    if unit:
        least, most = schema.get("min" + unit[0]), schema.get("max" + unit[0])
        if least is not None and size < least:
            yield path, f"should have at least {least} {unit[1]}, has {size}"
        if most is not None and size > most:
            yield path, f"should have at most {most} {unit[1]}, has {size}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = _INTEGERS.get(schema.get("format", ""), (None, None))
        low, high = schema.get("minimum", low), schema.get("maximum", high)
        if low is not None and value < low:
            yield path, f"Invalid value: {value}, should be at least {low}"
        if high is not None and value > high:
            yield path, f"Invalid value: {value}, should be at most {high}"
    if isinstance(value, str):
        if "pattern" in schema and not _pattern(schema["pattern"]).search(value):
            yield path, f"Invalid value: {_show(value)} does not match {schema['pattern']}"
        if schema.get("format") == "byte" and not _is_base64(value):
            yield path, "is not base64"


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    """``$`` is the end of the text, as in ECMA 262 and RE2; Python's own would let a line end follow."""
    return re.compile(re.sub(r"(?<!\\)\$(?=$|[|)])", r"\\Z", text))


def _combinations(value: Any, schema: Schema, path: str) -> Iterator[Problem]:
    for part in schema.get("allOf", ()):
        yield from _partial(value, part, path)
    if "anyOf" in schema and not any(_matches(value, s) for s in schema["anyOf"]):
        yield path, f"{_show(value)} fits none of the forms allowed"
    if "not" in schema and _matches(value, schema["not"]):
        yield path, "has a form that is not allowed"
    if "oneOf" in schema:
        fits = sum(_matches(value, s) for s in schema["oneOf"])
        if fits != 1:
            names = [r for s in schema["oneOf"] for r in s.get("required", ())]
            yield (
                path,
                f"exactly one of {', '.join(names)} may be set"
                if names
                else "fits not exactly one form allowed",
            )


def _partial(value: Any, schema: Schema, path: str) -> Iterator[Problem]:
    """Judge a schema inside allOf, anyOf, oneOf or not: those speak of fields without naming all of them."""
    if "type" in schema and not _is(schema["type"], value):
        yield path, f"is not {_article(schema['type'])}"
        return
    yield from _limits(value, schema, path)
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                yield _join(path, name), "required, but missing"
        for name, of in schema.get("properties", {}).items():
            if name in value:
                yield from _partial(value[name], of, _join(path, name))
    yield from _combinations(value, schema, path)


def _matches(value: Any, schema: Schema) -> bool:
    return next(_partial(value, schema, ""), None) is None


def _holds(rule: str, value: Any) -> bool:
    check = RULES[" ".join(rule.split())]
    try:
        return check(value)
    except (ValueError, TypeError, AttributeError, LookupError):
        return False  # CEL: an evaluation error fails the rule


def _is(expected: str, value: Any) -> bool:
    match expected:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            if isinstance(value, float):
                return value.is_integer()
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
    raise ValueError(f"schema type {expected}")


def _type_of(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return names.get(type(value), type(value).__name__)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_base64(value: str) -> bool:
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True
