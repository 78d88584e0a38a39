"""Which Secrets and ConfigMaps the objects of a mesh refer to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from controlplane.source.objects import Key, Object

_ISTIO = "networking.istio.io"
_GATEWAY_API = "gateway.networking.k8s.io"
#: Of a namespace, Secret or ConfigMap. What is none names nothing, and makes no path of the API.
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")


def references(o: Object) -> frozenset[Key]:
    """Keys of Secrets and ConfigMaps that an object names, whether they are there or not.

    Not every kind has a schema of ours, and a cluster's own may take anything: what has not the form that it should have
    names nothing.
    """
    try:
        return frozenset(k for k in _references(o) if _is_name(k.namespace) and _is_name(k.name))
    except (AttributeError, LookupError, TypeError):
        return frozenset()


def _is_name(text: object) -> bool:
    return isinstance(text, str) and len(text) <= 253 and _NAME.fullmatch(text) is not None


def _references(o: Object) -> Iterator[Key]:
    namespace, spec = o.key.namespace, o.spec
    if o.key.group == _ISTIO and o.key.kind == "Gateway":
        # Of the gateway's own workload: its namespace is that of the Gateway unless a selector says otherwise.
        for server in spec.get("servers") or ():
            tls = server.get("tls") or {}
            names = [tls.get("credentialName"), *(tls.get("credentialNames") or ())]
            yield from (_secret(namespace, name) for name in names if name)
    elif o.key.group == _ISTIO and o.key.kind == "DestinationRule":
        for policy in _policies(spec):
            if name := (policy.get("tls") or {}).get("credentialName"):
                yield _secret(namespace, name)
    elif o.key.group == _GATEWAY_API and o.key.kind in ("Gateway", "ListenerSet"):
        for listener in spec.get("listeners") or ():
            tls = listener.get("tls") or {}
            frontend = tls.get("frontendValidation") or {}
            for reference in (
                *(tls.get("certificateRefs") or ()),
                *(frontend.get("caCertificateRefs") or ()),
            ):
                yield from _reference(reference, namespace, "Secret")
    elif o.key.group == _GATEWAY_API and o.key.kind == "BackendTLSPolicy":
        for reference in (spec.get("validation") or {}).get("caCertificateRefs") or ():
            yield from _reference(reference, namespace, "ConfigMap")


def _policies(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for place in (spec, *(spec.get("subsets") or ())):
        policy = place.get("trafficPolicy") or {}
        yield policy
        yield from policy.get("portLevelSettings") or ()


def _reference(reference: Mapping[str, Any], namespace: str, default: str) -> Iterator[Key]:
    kind = reference.get("kind") or default
    if not reference.get("group") and kind in ("Secret", "ConfigMap") and reference.get("name"):
        yield Key("", kind, reference.get("namespace") or namespace, reference["name"])


def _secret(namespace: str, name: str) -> Key:
    # Istio: kubernetes://NAME is the same as NAME, other schemes are no Secrets of Kubernetes.
    return Key("", "Secret", namespace, name.removeprefix("kubernetes://"))
