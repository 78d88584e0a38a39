"""Whatever its schema lets through, an object is refused with a reason or compiles, down to Envoy's bytes.

One object that made the compiler raise would stop every other change: so objects are drawn from the schemas themselves.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from controlplane import api
from controlplane.compiler import compile_snapshot, validate
from controlplane.model.world import Settings
from controlplane.schema import core
from controlplane.schema.validation import _custom
from controlplane.source import Key, Object
from controlplane.source.objects import key_of
from controlplane.xds.resources import Resources
from controlplane.xds.types import Type
from tests.controlplane.support import objects, subsets, two_versions

#: Words that mean something somewhere, so that objects refer to each other often.
WORDS = st.sampled_from(
    [
        *(
            "",
            "*",
            "web-app",
            "web-app.default.svc.cluster.local",
            "v1",
            "v2",
            "default",
            "mesh",
            "app",
            "version",
        ),
        *(
            "5s",
            "1ms",
            "0s",
            "9999999999h",
            "-1s",
            "503",
            "5xx",
            "gateway-error",
            "80",
            "http",
            "/x",
            "a(b",
            "(?=x)",
        ),
        *(
            "cluster.local/ns/default/sa/web-app",
            "spiffe://x",
            "10.0.0.0/8",
            "1.2.3.4",
            "::1",
            "None",
            "host",
        ),
        *(
            "source.principal",
            "destination.port",
            "request.headers[x]",
            "source.ip",
            "Service",
            "é",
            "\n",
            "%zz",
        ),
    ]
)
TEXT = WORDS | st.text(max_size=5)


def values(schema: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that mostly fit a structural schema."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("x-kubernetes-int-or-string") or "anyOf" in schema:
        return st.integers(0, 70000) | TEXT
    if any("duration(self)" in r["rule"] for r in schema.get("x-kubernetes-validations", ())):
        return st.sampled_from(["5s", "1ms", "1h30m", "0.5s", "9999999999h", "0s"])
    match schema.get("type"):
        case "object":
            required = set(schema.get("required", ()))
            properties = {k: values(v, depth + 1) for k, v in schema.get("properties", {}).items()}
            if not properties:
                of = schema.get("additionalProperties")
                return st.dictionaries(
                    TEXT, values(of, depth + 1) if isinstance(of, dict) else TEXT, max_size=2
                )
            whole = st.fixed_dictionaries(
                {k: v for k, v in properties.items() if k in required},
                optional={k: v for k, v in properties.items() if k not in required},
            )
            alternatives = {r for s in schema.get("oneOf", ()) for r in s.get("required", ())}
            return st.tuples(whole, st.sets(st.sampled_from(sorted(properties)), max_size=4)).map(
                lambda drawn: _thin(drawn[0], drawn[1], required, alternatives)
            )
        case "array":
            return st.lists(values(schema["items"], depth + 1), max_size=2)
        case "integer":
            low, high = schema.get("minimum", -5), schema.get("maximum", 2**31 - 1)
            return st.sampled_from([n for n in (0, 1, 80, 100, 404, 70000, low, high) if low <= n <= high])
        case "number":
            return st.sampled_from([0, 0.5, 100])
        case "boolean":
            return st.booleans()
    return TEXT


def _thin(
    value: dict[str, Any], keep: set[str], required: set[str], alternatives: set[str]
) -> dict[str, Any]:
    """A few fields at a time, and one of those that exclude each other: else nearly everything would be refused."""
    kept = {k: v for k, v in value.items() if k in keep or k in required}
    for name in sorted(alternatives & kept.keys())[1:]:
        del kept[name]
    return kept


def manifest(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    group, _, name = kind.partition("/")
    custom = _custom().get(kind)
    schema = custom["schema"] if custom else core.KINDS[kind]
    body = values({k: v for k, v in schema.items() if k != "required"} | {"properties": _body(schema)})
    head = {
        "apiVersion": f"{group}/{custom['versions'][0]}" if custom else "v1",
        "kind": name,
        "metadata": {"name": "fuzzed", "namespace": "default", "uid": "fuzzed", "labels": {"app": "web-app"}},
    }
    return body.map(lambda b: _aimed(kind, {**b, **head, "spec": b.get("spec", {})}))


def _aimed(kind: str, drawn: dict[str, Any]) -> dict[str, Any]:
    """A VirtualService that applies to the world's service, and has something to do for each match."""
    if kind.endswith("/VirtualService"):
        spec = drawn["spec"]
        spec["hosts"] = ["web-app"]
        for http in spec.setdefault("http", [{}]) or [{}]:
            if not any(http.get(a) for a in ("route", "redirect", "directResponse")):
                http["route"] = [{"destination": {"host": "web-app"}}]
    return drawn


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in schema["properties"].items() if k in ("spec", "status")}


WORLD = objects(*two_versions(), subsets("web-app", "v1", "v2"))


@pytest.mark.parametrize(
    "kind",
    [
        "networking.istio.io/VirtualService",
        "networking.istio.io/DestinationRule",
        "security.istio.io/AuthorizationPolicy",
        "security.istio.io/PeerAuthentication",
        "/Service",
        "/Pod",
    ],
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_refused_with_a_reason_or_compiled(kind: str, data: st.DataObject) -> None:
    drawn = json.loads(json.dumps(data.draw(manifest(kind))))
    problems = list(validate(drawn))
    assert all(reason for _, reason in problems)
    if problems:
        return
    key: Key = key_of(drawn)
    snapshot = compile_snapshot({**WORLD, key: Object(key, drawn)}, Settings())
    resources = Resources(snapshot)
    for type_ in Type:
        resources.of(type_, "/tmp/x.sock")
    update = api.Update(1, snapshot.version, True, tuple(snapshot.resources.values()))
    assert api.decode_update(api.encode(update)) == update
    event("compiled")
