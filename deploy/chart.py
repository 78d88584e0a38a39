"""Writes the Helm chart from the objects of ``mycel install``: ``python -m deploy.chart`` (see docs/decisions/0005).

The builders run once with placeholders in place of values. Where a placeholder, or a text that holds one, ends up in an
object, its template has the expression that gives Helm the same: ``{{ .Values.image.tag | toJson }}``, because JSON is YAML
whatever its kind. A builder must not branch on a value; what it may do is put it somewhere, set it into a text, or join a list.
Owns templates, ``values.yaml`` and ``values.schema.json`` of the chart; a test says when the files of the checkout are stale.
"""

from __future__ import annotations

import json
import re
import sys
import typing
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import yaml

from deploy import manifests
from deploy.parts import Json
from deploy.values import Values

FOLDER = Path(__file__).with_name("chart")

#: Private-use characters around an expression within a text; no value and no text of ours has them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_EXPRESSION = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_GENERATED = "# Written by `python -m deploy.chart` from deploy/*.py; do not edit.\n"
_NAMESPACE = ".Release.Namespace"


class _Text(str):
    """A text value: within another text it is its expression."""

    def __new__(cls, expression: str) -> _Text:
        return super().__new__(cls, f"{_OPEN}{expression}{_CLOSE}")


class _Number(int):
    """A number value; arithmetic on it is refused, since the template would not have it."""

    expression: str

    def __new__(cls, expression: str) -> _Number:
        made = super().__new__(cls, 0)
        made.expression = expression
        return made

    def __format__(self, specification: str) -> str:
        return f"{_OPEN}int {self.expression}{_CLOSE}"

    def __add__(self, other: object) -> int:
        raise TypeError(f"{self.expression}: no arithmetic on values, the chart cannot follow")

    __sub__ = __mul__ = __add__


class _List(list[Any]):
    """A list value. To a builder it has one text, the joined items: what may be done with a list is to join or to place it."""

    def __init__(self, expression: str) -> None:
        super().__init__([_Text(f'join "," {expression}')])
        self.expression = expression


class _Mapping(dict[str, Any]):
    """A mapping of free keys."""

    def __init__(self, expression: str) -> None:
        super().__init__()
        self.expression = expression


class Chart:
    """The files of the chart by their path in it."""

    def __init__(self) -> None:
        objects = manifests.build(_placeholders(Values, ".Values"), _Text(_NAMESPACE))
        self.files: dict[str, str] = {
            "Chart.yaml": _GENERATED + _yaml(_about()),
            "values.yaml": _GENERATED + "".join(_commented(Values, Values(), 0)),
            "values.schema.json": json.dumps(_schema(), indent=1) + "\n",
            ".helmignore": "*.tmp\n",
        }
        for number, manifest in enumerate(objects, 1):
            # Helm sorts by kind; the number is for people, who read them in apply order.
            kind, name = manifest["kind"].lower(), manifest["metadata"]["name"]
            self.files[f"templates/{number:02}-{kind}-{name}.yaml"] = _GENERATED + template(manifest)
        for crd in manifests.own_crds():
            self.files[f"crds/{crd['metadata']['name']}.yaml"] = manifests.document(crd)

    def write(self, folder: Path = FOLDER) -> None:
        """Make the folder hold these files and no others."""
        for old in [*folder.glob("*/*.yaml")]:
            if str(old.relative_to(folder)) not in self.files:
                old.unlink()
        for name, text in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")

    def stale(self, folder: Path = FOLDER) -> list[str]:
        """Files of a folder that are not as they are to be: of other contents, missing, or too many."""
        there = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        wrong = set(there) ^ set(self.files)
        return sorted(wrong | {n for n in there.keys() & self.files if there[n].read_text() != self.files[n]})


def template(manifest: Json) -> str:
    """One object as YAML with Helm's expressions."""
    expressions: list[str] = []

    def mark(node: Any) -> Any:
        expression = _expression(node)
        if expression is not None:
            expressions.append(expression)
            return f"EXPRESSION{len(expressions) - 1:04}"
        if isinstance(node, dict):
            return {key: mark(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [mark(item) for item in node]
        return node

    text = manifests.document(mark(manifest))
    return re.sub(r"EXPRESSION(\d{4})", lambda found: f"{{{{ {expressions[int(found[1])]} }}}}", text)


def _expression(node: Any) -> str | None:
    """The pipeline that yields this node as JSON, or None when it holds no placeholder itself."""
    if isinstance(node, _Number | _List | _Mapping):
        return f"{node.expression} | toJson"
    if not isinstance(node, str) or _OPEN not in node:
        return None
    inside = _EXPRESSION.findall(node)
    if _EXPRESSION.fullmatch(node):
        return f"{inside[0]} | toJson"
    pattern = json.dumps(_EXPRESSION.sub("%v", node.replace("%", "%%")))
    arguments = " ".join(f"({one})" if " " in one else one for one in inside)
    return f"printf {pattern} {arguments} | toJson"


def _placeholders(kind: Any, path: str) -> Any:
    """The values with a placeholder at each leaf."""
    made = {}
    for field in msgspec.structs.fields(kind):
        expression = f"{path}.{field.encode_name}"
        inner = _bare(field.type)
        origin = typing.get_origin(inner) or inner
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            made[field.name] = _placeholders(inner, expression)
        elif origin is int:
            made[field.name] = _Number(expression)
        elif origin is tuple:
            made[field.name] = _List(expression)
        elif origin is dict:
            made[field.name] = _Mapping(expression)
        else:
            made[field.name] = _Text(expression)
    return kind(**made)


def _bare(kind: Any) -> Any:
    return kind.__origin__ if hasattr(kind, "__metadata__") else kind


def _about() -> Json:
    version = metadata.version("mycel")
    return {
        "apiVersion": "v2",
        "name": "mycel",
        "description": "A kernel-native service mesh: Python decides, the kernel carries.",
        "type": "application",
        # Helm wants SemVer, which writes a development version otherwise than Python does.
        "version": re.sub(r"\.dev(\d+)$", r"-dev.\1", version),
        "appVersion": version,
        "kubeVersion": ">=1.30.0-0",
    }


def _commented(kind: Any, values: Any, depth: int) -> Iterator[str]:
    """Lines of ``values.yaml``: each value with its description before it."""
    indent = "  " * depth
    for field in msgspec.structs.fields(kind):
        if description := _description(field.type):
            yield f"{indent}# {description}\n"
        value = getattr(values, field.name)
        if isinstance(value, msgspec.Struct):
            yield f"{indent}{field.encode_name}:\n"
            yield from _commented(type(value), value, depth + 1)
        else:
            plain = json.dumps(msgspec.to_builtins(value))
            yield f"{indent}{field.encode_name}: {plain}\n"


def _description(kind: Any) -> str:
    for meta in getattr(kind, "__metadata__", ()):
        if meta.description:
            return str(meta.description)
    return ""


def _schema() -> Json:
    schema = msgspec.json.schema(Values)
    # Helm puts values of its own beside ours.
    schema["$defs"]["Values"]["properties"]["global"] = {}
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    return {"$schema": "http://json-schema.org/draft-07/schema#", **_without_defaults(schema)}


def _without_defaults(node: Any) -> Any:
    """Defaults stand in values.yaml; twice they would differ one day."""
    if isinstance(node, dict):
        return {
            k: _without_defaults(v)
            for k, v in node.items()
            if k != "default" or (isinstance(v, dict) and "type" in v)
        }
    return [_without_defaults(item) for item in node] if isinstance(node, list) else node


def _yaml(value: Json) -> str:
    return yaml.safe_dump(value, sort_keys=False)


def main() -> None:
    Chart().write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)


if __name__ == "__main__":
    main()
