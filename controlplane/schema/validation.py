"""One object against the schema of its kind."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

from controlplane.schema import core
from controlplane.schema.structural import Problem, problems

_TOP = ("apiVersion", "kind", "metadata")


@functools.cache
def _custom() -> dict[str, Any]:
    text = importlib.resources.files("controlplane.schema").joinpath("istio.json").read_text("utf-8")
    kinds: dict[str, Any] = json.loads(text)
    return kinds


def known(group: str, kind: str) -> bool:
    """True if there is a schema for this kind (in any version)."""
    return f"{group}/{kind}" in _custom() or f"{group}/{kind}" in core.KINDS


def versions(group: str, kind: str) -> tuple[str, ...]:
    """The versions in which a custom kind may be written; none if there is no schema for it."""
    return tuple((_custom().get(f"{group}/{kind}") or {}).get("versions", ()))


def validate(manifest: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with an object: (field, reason) each.

    ``apiVersion``, ``kind`` and ``metadata.name`` have to be there (whoever parsed the file made sure).
    """
    yield from problems(manifest["metadata"], core.METADATA, "metadata")
    group, _, version = manifest["apiVersion"].rpartition("/")
    kind = manifest["kind"]
    custom = _custom().get(f"{group}/{kind}")
    if custom:
        if version not in custom["versions"]:
            yield "apiVersion", f"{kind} has versions {', '.join(custom['versions'])}, not {version}"
            return
        body = {k: v for k, v in manifest.items() if k not in _TOP}
        # The status is what a cluster wrote there: it is not configuration, and judged by nobody here.
        body.pop("status", None)
        yield from problems(body, custom["schema"])
    elif f"{group}/{kind}" in core.KINDS:
        if version != "v1":
            yield "apiVersion", f"{kind} has version v1, not {version}"
            return
        yield from problems(manifest, core.KINDS[f"{group}/{kind}"])
