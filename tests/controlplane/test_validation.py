"""Schemas and rules: Istio's own valid and invalid objects, and what the schemas cannot say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controlplane.compiler import validate
from controlplane.schema.rules import RULES, duration
from controlplane.schema.validation import _custom
from controlplane.source.manifests import ManifestError, parse
from tests.controlplane.support import istio, pod, service

#: Cases that are answered differently, each with its reason.
NOT_APPLICABLE = {
    (
        "reqauth-valid.yaml",
        "full",
    ): "has a field that the CRD does not know (presence): here a misspelt field is an error",
    (
        "serviceentry-valid.yaml",
        "?",
    ): "is no YAML 1.2 (001:db8:: bare in a flow sequence), which only Go's parser takes",
}


def _cases(folder: Path) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
    """(file, manifest or None, expected error or empty); None where the file is no YAML."""
    for path in sorted(folder.glob("*.yaml")):
        valid = path.name.endswith("-valid.yaml")
        for text in path.read_bytes().split(b"\n---"):
            try:
                documents = list(parse(text))
            except ManifestError:
                yield path.name, None, ""
                continue
            for document in documents:
                assert document.manifest is not None, (path, document)
                error = document.manifest.pop("_err", "")
                assert bool(error) != valid, path
                yield path.name, document.manifest, error


def test_istio_objects(shared: Path, conformance_count: Callable[..., None]) -> None:
    wrong, passed, total, left_out = [], 0, 0, set()
    for file, manifest, error in _cases(shared / "conformance/istio/validation"):
        total += 1
        case = file, manifest["metadata"]["name"] if manifest else "?"
        if case in NOT_APPLICABLE:
            left_out.add(case)
            continue
        assert manifest is not None, file
        problems = list(validate(manifest))
        if bool(problems) != bool(error):
            wrong.append((case, error, problems))
        else:
            passed += 1
    conformance_count("istio/validation", passed, total, len(left_out))
    assert not wrong
    assert left_out == set(NOT_APPLICABLE)
    assert total == 112


def test_refusals_name_the_field_that_istio_names(shared: Path) -> None:
    """Where Istio's message begins with a field, ours is of that field or one inside it."""
    compared = 0
    for _, manifest, error in _cases(shared / "conformance/istio/validation"):
        field = error.split(":")[0]
        if manifest is None or not field.startswith("spec.") or " " in field:
            continue
        compared += 1
        assert any(f.startswith(field) for f, _ in validate(manifest)), (manifest["metadata"], error)
    assert compared >= 5


def test_every_rule_of_the_schemas_is_known_and_used() -> None:
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            rules = node.get("x-kubernetes-validations")
            found.update(" ".join(r["rule"].split()) for r in rules or () if isinstance(rules, list))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(_custom())
    assert found == set(RULES)


def test_the_sample_application_is_accepted(shared: Path) -> None:
    refused = []
    for path in sorted((shared / "conformance/istio/bookinfo").rglob("*.yaml")):
        for document in parse(path.read_bytes()):
            assert document.manifest is not None, (path, document.error)
            refused += [(path.name, p) for p in validate(document.manifest)]
    assert not refused


WRONG: list[tuple[dict[str, Any], str, str]] = [
    (istio("VirtualService", "x", {"http": []}), "spec.hosts", "required"),
    (istio("VirtualService", "x", {"hosts": ["a"], "htp": []}), "spec.htp", "did you mean http?"),
    (istio("VirtualService", "x", {"hosts": "a"}), "spec.hosts", "is a string, not an array"),
    (istio("VirtualService", "x", {"hosts": ["a"]}), "spec", "http, tcp or tls"),
    (
        istio(
            "VirtualService",
            "x",
            {"hosts": ["a"], "http": [{"timeout": "5 s", "route": [{"destination": {"host": "a"}}]}]},
        ),
        "spec.http[0].timeout",
        "valid duration",
    ),
    (
        istio(
            "VirtualService",
            "x",
            {
                "hosts": ["a"],
                "http": [{"route": [{"destination": {"host": "a"}}, {"destination": {"host": "b"}}]}],
            },
        ),
        "spec.http[0].route",
        "sum is 0",
    ),
    (
        istio(
            "VirtualService",
            "x",
            {
                "hosts": ["a"],
                "http": [{"match": [{"uri": {"regex": "(?=a)"}}], "route": [{"destination": {"host": "a"}}]}],
            },
        ),
        "spec.http[0].match[0].uri.regex",
        "RE2",
    ),
    (
        istio(
            "VirtualService",
            "x",
            {
                "hosts": ["a"],
                "http": [
                    {"retries": {"attempts": 1, "retryOn": "moon"}, "route": [{"destination": {"host": "a"}}]}
                ],
            },
        ),
        "spec.http[0].retries.retryOn",
        "'moon'",
    ),
    (
        istio(
            "VirtualService",
            "x",
            {"hosts": ["a"], "http": [{"match": [{"uri": {"exact": "/", "prefix": "/"}}]}]},
        ),
        "spec.http[0].match[0].uri",
        "exactly one of",
    ),
    (istio("DestinationRule", "x", {"host": ""}), "spec.host", "required"),
    (
        istio("DestinationRule", "x", {"host": "a", "subsets": [{"name": "v1"}, {"name": "v1"}]}),
        "spec.subsets[1].name",
        "twice",
    ),
    (
        istio(
            "DestinationRule", "x", {"host": "a", "trafficPolicy": {"loadBalancer": {"simple": "FASTEST"}}}
        ),
        "spec.trafficPolicy.loadBalancer.simple",
        "Unsupported value",
    ),
    (istio("AuthorizationPolicy", "x", {"rules": [{"from": []}]}), "spec.rules[0].from", "empty"),
    (
        istio("AuthorizationPolicy", "x", {"rules": [{"from": [{"source": {}}]}]}),
        "spec.rules[0].from[0].source",
        "empty",
    ),
    (
        istio("AuthorizationPolicy", "x", {"rules": [{"to": [{"operation": {"ports": ["http"]}}]}]}),
        "spec.rules[0].to[0].operation.ports[0]",
        "no port",
    ),
    (
        istio("AuthorizationPolicy", "x", {"rules": [{"from": [{"source": {"ipBlocks": ["10.0.0.0/99"]}}]}]}),
        "spec.rules[0].from[0].source.ipBlocks[0]",
        "CIDR",
    ),
    (
        istio("AuthorizationPolicy", "x", {"rules": [{"when": [{"key": "moon.phase", "values": ["full"]}]}]}),
        "spec.rules[0].when[0].key",
        "no attribute",
    ),
    (istio("AuthorizationPolicy", "x", {"action": "MAYBE"}), "spec.action", "Unsupported value"),
    (
        {**istio("DestinationRule", "x", {"host": "a"}), "apiVersion": "networking.istio.io/v2"},
        "apiVersion",
        "not v2",
    ),
    ({**pod("x"), "status": {"podIP": "300.1.1.1"}}, "status.podIP", "no IP address"),
    (service("x", "10.96.0.1", [{"port": 80, "name": "a"}, {"port": 81}]), "spec.ports[1].name", "several"),
    (service("x", "10.96.0.1", [{"port": 99999}]), "spec.ports[0].port", "at most 65535"),
    (pod("x", account="a b"), "spec.serviceAccountName", "characters"),
    ({**pod("x"), "metadata": {"name": "Big_Name", "uid": "u"}}, "metadata.name", "does not match"),
    ({**pod("x"), "metadata": {"name": "x"}}, "metadata.uid", "required"),
]


@pytest.mark.parametrize(("manifest", "field", "reason"), WRONG, ids=[f"{w[1]}-{w[2]}" for w in WRONG])
def test_what_is_wrong_is_named(manifest: dict[str, Any], field: str, reason: str) -> None:
    problems = list(validate(json.loads(json.dumps(manifest))))
    assert any(f == field and reason in r for f, r in problems), problems


_ROUTE = {"route": [{"destination": {"host": "a"}}]}


@pytest.mark.parametrize(
    ("http", "field", "reason"),
    [
        (
            _ROUTE | {"headers": {"request": {"set": {"x\ny": "1"}}}},
            "headers.request.set",
            "no name of a header",
        ),
        (
            _ROUTE | {"headers": {"response": {"remove": [""]}}},
            "headers.response.remove",
            "no name of a header",
        ),
        (
            _ROUTE | {"headers": {"request": {"add": {"x": "a\r\nb: c"}}}},
            "headers.request.add.x",
            "a line end",
        ),
        (
            {"route": [{"destination": {"host": "a"}, "headers": {"request": {"set": {"x": "\0"}}}}]},
            "route[0].headers.request.set.x",
            "NUL",
        ),
        (
            _ROUTE | {"match": [{"headers": {"x y": {"exact": "1"}}}]},
            "match[0].headers",
            "no name of a header",
        ),
        (_ROUTE | {"rewrite": {"authority": "a\nb"}}, "rewrite.authority", "a line end"),
        ({"redirect": {"uri": "/a\nb"}}, "redirect.uri", "a line end"),
        ({"directResponse": {"status": 101}}, "directResponse.status", "200 to 599"),
        ({"retries": {"retryOn": "\u00b2"}}, "retries.retryOn", "no retry condition"),
        ({"retries": {"retryOn": "1" * 5000}}, "retries.retryOn", "no retry condition"),
        (
            {"route": [{"destination": {"host": "a"}, "weight": 2**31 - 1}] * 3},
            "route",
            "at most 4294967295",
        ),
    ],
)
def test_what_envoy_would_refuse_a_whole_table_for(http: dict[str, Any], field: str, reason: str) -> None:
    problems = list(validate(istio("VirtualService", "x", {"hosts": ["a"], "http": [http]})))
    assert any(f == f"spec.http[0].{field}" and reason in r for f, r in problems), problems


def test_durations_are_gos() -> None:
    assert [duration(t) for t in ("1h30m", "100ms", "1.5s", "0", "-2s")] == [5400, 0.1, 1.5, 0, -2]
    for text in ("", "5", "5 s", "s", "1d", "5sx", "9999999999h"):
        with pytest.raises(ValueError, match="duration"):
            duration(text)


def test_a_duration_is_read_in_one_pass() -> None:
    """Of a megabyte of digits without a unit, too: whoever reaches the webhook may send one."""
    began = time.process_time()
    for text in ("1" * 1_000_000, "1." + "1" * 1_000_000, "1s" * 100_000 + "x", "." * 1_000_000):
        with pytest.raises(ValueError, match="duration"):
            duration(text)
    assert time.process_time() - began < 5.0
