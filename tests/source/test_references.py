"""Which Secrets and ConfigMaps objects name."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.source import Key, Object
from controlplane.source.references import references

GATEWAY_API = "gateway.networking.k8s.io"


def found(group: str, kind: str, spec: Any) -> set[str]:
    key = Key(group, kind, "here", "x")
    return {str(k) for k in references(Object(key, {"metadata": {"name": "x"}, "spec": spec}))}


def test_what_is_named() -> None:
    tls = {"credentialName": "kubernetes://a", "credentialNames": ["b", "c"]}
    assert found("networking.istio.io", "Gateway", {"servers": [{"tls": tls}, {}]}) == {
        "Secret here/a",
        "Secret here/b",
        "Secret here/c",
    }
    policy = {"portLevelSettings": [{"tls": {"credentialName": "p"}}], "tls": {"credentialName": "t"}}
    subset = {"trafficPolicy": {"tls": {"credentialName": "s"}}}
    assert found(
        "networking.istio.io", "DestinationRule", {"trafficPolicy": policy, "subsets": [subset]}
    ) == {
        "Secret here/p",
        "Secret here/t",
        "Secret here/s",
    }
    refs = [{"name": "a"}, {"name": "b", "namespace": "there"}, {"name": "c", "group": "other.io"}]
    assert found(GATEWAY_API, "Gateway", {"listeners": [{"tls": {"certificateRefs": refs}}]}) == {
        "Secret here/a",
        "Secret there/b",
    }
    validation = {"caCertificateRefs": [{"name": "ca", "kind": "ConfigMap", "group": ""}]}
    assert found(GATEWAY_API, "BackendTLSPolicy", {"validation": validation}) == {"ConfigMap here/ca"}


@pytest.mark.parametrize(
    "reference",
    [
        {"name": 5},
        {"name": "a/b"},
        {"name": "../x"},
        {"name": "a,type=Opaque"},
        {"name": "a", "namespace": ".."},
        {"name": "a", "namespace": ["b"]},
        {"name": "a" * 254},
        "a",
        None,
        ["a"],
    ],
)
def test_what_names_nothing(reference: Any) -> None:
    """A definition without a schema takes anything; one object of it must not stop all others, nor make a path of its own."""
    assert found(GATEWAY_API, "Gateway", {"listeners": [{"tls": {"certificateRefs": [reference]}}]}) == set()
    assert found(GATEWAY_API, "Gateway", reference) == set()
    assert found(GATEWAY_API, "Gateway", {"listeners": {"a": reference}}) == set()
