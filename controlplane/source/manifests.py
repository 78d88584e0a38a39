"""A file's bytes to manifests: YAML or JSON, many documents, Lists taken apart.

YAML is read as Kubernetes reads it: time stamps and sexagesimal numbers are strings, whole numbers are integers however
they are written (``80.0``), and a key that stands twice in one mapping is an error (whoever wrote it meant one of the two,
and nobody knows which). What comes out is JSON: anything else (a tag that makes bytes or a date, a number that is none,
text that is no Unicode) is refused with its object, so that nothing behind this module can stumble over it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

#: Longest file in bytes (a longer one is not parsed), and the most values and nested levels of one object.
MAX_BYTES = 16 << 20
MAX_VALUES = 500_000
MAX_DEPTH = 64
#: One that is no version would make another object of it, and the one that it was would be gone.
_API_VERSION = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?v[0-9][a-z0-9]*")


class ManifestError(Exception):
    """A document, or the whole file, that cannot be read."""


@dataclass(frozen=True, slots=True)
class Document:
    """One object of a file, or why there is none. ``manifest`` then is what could be told of it, if anything."""

    manifest: dict[str, Any] | None
    where: str  #: ``document 2`` or ``document 2, item 3``
    error: str = ""


class _Loader(yaml.CSafeLoader):
    """The safe loader, with Kubernetes' idea of scalars."""


_NOT_KUBERNETES = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_KUBERNETES]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)


_MERGE = "tag:yaml.org,2002:merge"


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            # PyYAML's own way copies pairs of pairs: a merge of merges grows without end before anyone can count it.
            merged = {**_merged(loader, value_node), **merged}
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            key = _text(key, key_node)
        if key in result:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} stands twice", key_node.start_mark
            )
        result[key] = loader.construct_object(value_node, deep=True)
    return {**merged, **result}


def _merged(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    """What ``<<`` stands for: a mapping, or several of which the first that has a key is right."""
    value = loader.construct_object(node, deep=True)
    mappings = value if isinstance(value, list) else [value]
    result: dict[str, Any] = {}
    for mapping in mappings:
        if not isinstance(mapping, dict):
            raise yaml.constructor.ConstructorError(None, None, "<< takes mappings only", node.start_mark)
        result = {**mapping, **result}
    return result


def _text(key: object, node: yaml.Node) -> str:
    """Keys are strings in JSON; YAML's numbers and truth values become what was written."""
    if isinstance(node, yaml.ScalarNode) and isinstance(key, (int, float, bool)):
        return str(node.value)
    raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", node.start_mark)


def _number(value: float) -> int | float:
    """JSON has one kind of number: what has no fraction is an integer."""
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _float(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    return _number(loader.construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def parse(data: bytes, is_json: bool = False) -> Iterator[Document]:
    """All documents of a file, in order; empty ones are left out.

    :raises ManifestError: the file as a whole cannot be read (it is no text, no YAML): nothing of it is known.
    """
    if len(data) > MAX_BYTES:
        raise ManifestError(f"{len(data)} bytes, at most {MAX_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ManifestError(f"is no UTF-8 text: {e.reason} at byte {e.start}") from None
    for number, value in enumerate(list(_values(text, is_json)), 1):
        if value is not None:
            yield from _objects(value, f"document {number}")


def _values(text: str, is_json: bool) -> Iterator[Any]:
    try:
        if is_json:
            yield (
                json.loads(text, object_pairs_hook=_pairs, parse_float=lambda t: _number(float(t)))
                if text.strip()
                else None
            )
        else:
            yield from yaml.load_all(text, _Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ManifestError(f"{at}{e.problem or e.context}") from None
    except yaml.YAMLError as e:
        raise ManifestError(" ".join(str(e).split())) from None
    except (ValueError, RecursionError) as e:
        raise ManifestError(str(e)) from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return result


def _objects(value: Any, where: str) -> Iterator[Document]:
    if not isinstance(value, dict):
        yield Document(None, where, "is no object: apiVersion, kind and metadata are expected")
        return
    error = _check_head(value)
    if error:
        yield Document(None, where, error)
    elif value["kind"].endswith("List") and isinstance(value.get("items"), list):
        for i, item in enumerate(value["items"], 1):
            if isinstance(item, dict) and value["kind"] != "List":
                # A typed list (PodList) may leave out what its items are.
                item.setdefault("kind", value["kind"].removesuffix("List"))
                item.setdefault("apiVersion", value["apiVersion"])
            yield from _objects(item, f"{where}, item {i}")
    elif not isinstance(value.get("metadata"), dict):
        yield Document(None, where, "metadata: required, but missing")
    elif not isinstance(value["metadata"].get("name"), str) or not value["metadata"]["name"]:
        yield Document(None, where, "metadata.name: required, but missing or no string")
    elif not isinstance(value["metadata"].get("namespace", ""), (str, type(None))):
        yield Document(None, where, "metadata.namespace: no string")
    else:
        error = _no_json(value)
        yield Document(None if error else value, where, error)


def _check_head(value: dict[str, Any]) -> str:
    for name in ("apiVersion", "kind"):
        if name not in value:
            return f"{name}: required, but missing"
        if not isinstance(value[name], str) or not value[name]:
            return f"{name}: no string"
    if not _API_VERSION.fullmatch(value["apiVersion"]):
        return f"apiVersion: {value['apiVersion']!r} is none (like v1, or security.istio.io/v1)"
    return ""


def _no_json(value: Any) -> str:
    """A reason if a value is nested too deep, grows too large once its YAML aliases are followed, or is no JSON."""
    left = MAX_VALUES
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        left -= 1
        if left < 0:
            return f"more than {MAX_VALUES} values (aliases counted each time)"
        if depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        if isinstance(item, dict):
            stack.extend((v, depth + 1) for v in item.values())
            stack.extend((k, depth) for k in item if not k.isascii())
        elif isinstance(item, list):
            stack.extend((v, depth + 1) for v in item)
        elif isinstance(item, str):
            if not item.isascii() and not _is_unicode(item):
                return f"{item!a} is no Unicode text"
        elif isinstance(item, float):
            if not math.isfinite(item):
                return f"{item} is no number"
        elif item is not None and not isinstance(item, (int, bool)):
            return f"a value of type {type(item).__name__}, which JSON has not"
    return ""


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON's escapes can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
