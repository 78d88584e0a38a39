"""The kinds that are read from the API, and what of each object is kept.

This table is also what the controller's ClusterRole is made from: it reads these kinds and no others.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
#: Domains whose annotations on pods mean something to a mesh; of others a cluster's pods have kilobytes.
_ANNOTATION_DOMAINS = ("istio.io", "linkerd.io", "mycel.io", "smi-spec.io")


class Kind(NamedTuple):
    """One kind. ``version`` is empty for those that a CustomResourceDefinition brings: it says which versions there are."""

    group: str
    kind: str
    plural: str
    version: str = ""

    @property
    def definition(self) -> str:
        """Name of its CustomResourceDefinition."""
        return f"{self.plural}.{self.group}"

    def __str__(self) -> str:
        return self.definition if self.group else self.plural


#: Kinds of Kubernetes itself, followed as a whole.
BUILT_IN = (
    Kind("", "Pod", "pods", "v1"),
    Kind("", "Service", "services", "v1"),
    Kind("", "Node", "nodes", "v1"),
    Kind("", "Namespace", "namespaces", "v1"),
    Kind("", "ServiceAccount", "serviceaccounts", "v1"),
    Kind("discovery.k8s.io", "EndpointSlice", "endpointslices", "v1"),
    Kind("networking.k8s.io", "NetworkPolicy", "networkpolicies", "v1"),
)
#: Followed by name, and only those that some object refers to.
REFERRED = {
    "Secret": Kind("", "Secret", "secrets", "v1"),
    "ConfigMap": Kind("", "ConfigMap", "configmaps", "v1"),
}


def _kinds(group: str, kinds: Mapping[str, str]) -> tuple[Kind, ...]:
    return tuple(Kind(group, kind, plural) for kind, plural in kinds.items())


#: Kinds that are there if their CustomResourceDefinition is.
CUSTOM = (
    *_kinds(
        "networking.istio.io",
        {
            "DestinationRule": "destinationrules",
            "EnvoyFilter": "envoyfilters",
            "Gateway": "gateways",
            "ProxyConfig": "proxyconfigs",
            "ServiceEntry": "serviceentries",
            "Sidecar": "sidecars",
            "VirtualService": "virtualservices",
            "WorkloadEntry": "workloadentries",
            "WorkloadGroup": "workloadgroups",
        },
    ),
    *_kinds(
        "security.istio.io",
        {
            "AuthorizationPolicy": "authorizationpolicies",
            "PeerAuthentication": "peerauthentications",
            "RequestAuthentication": "requestauthentications",
        },
    ),
    *_kinds("telemetry.istio.io", {"Telemetry": "telemetries"}),
    *_kinds("extensions.istio.io", {"TrafficExtension": "trafficextensions", "WasmPlugin": "wasmplugins"}),
    *_kinds(
        "gateway.networking.k8s.io",
        {
            "BackendTLSPolicy": "backendtlspolicies",
            "GatewayClass": "gatewayclasses",
            "Gateway": "gateways",
            "GRPCRoute": "grpcroutes",
            "HTTPRoute": "httproutes",
            "ListenerSet": "listenersets",
            "ReferenceGrant": "referencegrants",
            "TCPRoute": "tcproutes",
            "TLSRoute": "tlsroutes",
            "UDPRoute": "udproutes",
        },
    ),
    *_kinds("linkerd.io", {"ServiceProfile": "serviceprofiles"}),
    *_kinds(
        "policy.linkerd.io",
        {
            "AuthorizationPolicy": "authorizationpolicies",
            "EgressNetwork": "egressnetworks",
            "HTTPLocalRateLimitPolicy": "httplocalratelimitpolicies",
            "HTTPRoute": "httproutes",
            "MeshTLSAuthentication": "meshtlsauthentications",
            "NetworkAuthentication": "networkauthentications",
            "Server": "servers",
            "ServerAuthorization": "serverauthorizations",
        },
    ),
    *_kinds("workload.linkerd.io", {"ExternalWorkload": "externalworkloads"}),
    *_kinds("split.smi-spec.io", {"TrafficSplit": "trafficsplits"}),
    *_kinds(
        "specs.smi-spec.io",
        {"HTTPRouteGroup": "httproutegroups", "TCPRoute": "tcproutes", "UDPRoute": "udproutes"},
    ),
    *_kinds("access.smi-spec.io", {"TrafficTarget": "traffictargets"}),
)
DEFINITIONS = {kind.definition: kind for kind in CUSTOM}
#: Names of kinds that several groups have: by itself such a name says to nobody which one is meant.
AMBIGUOUS = frozenset(name for name, count in Counter(kind.kind for kind in CUSTOM).items() if count > 1)


def trim(kind: Kind, api_version: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an object: no status of configuration (we write it ourselves), no versions, no managed fields.

    Of what a cluster has ten thousand of only what the compiler reads is kept, and two that differ in the rest are equal.
    """
    manifest: dict[str, Any] = {
        "apiVersion": api_version,
        "kind": kind.kind,
        "metadata": _metadata(raw["metadata"], kind.kind == "Pod"),
    }
    keep = _KEPT.get(kind.kind) if kind.version else None
    if keep is not None:
        manifest.update(keep(raw))
    else:
        manifest.update((k, v) for k, v in raw.items() if k not in ("status", *manifest))
    return manifest


def _metadata(raw: Mapping[str, Any], pod: bool) -> dict[str, Any]:
    kept = ("name", "namespace", "uid", "generation", "creationTimestamp", "deletionTimestamp")
    result = {k: raw[k] for k in kept if raw.get(k)}
    # A Job's pods, say: thousands with the same few names and labels.
    for name in ("name", "namespace"):
        if name in result:
            result[name] = sys.intern(result[name])
    if raw.get("labels"):
        result["labels"] = {sys.intern(k): sys.intern(v) for k, v in raw["labels"].items()}
    annotations = {
        k: v
        for k, v in (raw.get("annotations") or {}).items()
        if k != _LAST_APPLIED and (not pod or k.partition("/")[0].endswith(_ANNOTATION_DOMAINS))
    }
    if annotations:
        result["annotations"] = annotations
    if raw.get("ownerReferences"):
        result["ownerReferences"] = [_pick(o, "kind", "name", "uid") for o in raw["ownerReferences"]]
    return result


def _pick(raw: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {n: raw[n] for n in names if n in raw}


def _pod(raw: Mapping[str, Any]) -> dict[str, Any]:
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    kept = _pick(spec, "nodeName", "serviceAccountName", "hostNetwork")
    for part in ("containers", "initContainers"):
        if spec.get(part):
            kept[part] = [_pick(c, "name", "restartPolicy", "ports") for c in spec[part]]
    conditions = [
        _pick(c, "type", "status") for c in status.get("conditions") or () if c.get("type") == "Ready"
    ]
    state = _pick(status, "phase", "podIP", "podIPs", "hostIP")
    return {"spec": kept, "status": state | ({"conditions": conditions} if conditions else {})}


def _node(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"spec": {}, "status": _pick(raw.get("status") or {}, "addresses")}


def _service(raw: Mapping[str, Any]) -> dict[str, Any]:
    balancer = (raw.get("status") or {}).get("loadBalancer") or {}
    found = [_pick(item, "ip", "ipMode") for item in balancer.get("ingress") or () if item.get("ip")]
    status = {"status": {"loadBalancer": {"ingress": found}}} if found else {}
    return _spec(raw) | status


def _slice(raw: Mapping[str, Any]) -> dict[str, Any]:
    return _pick(raw, "addressType", "ports", "endpoints")


def _spec(raw: Mapping[str, Any]) -> dict[str, Any]:
    return _pick(raw, "spec")


def _nothing(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_KEPT: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "Pod": _pod,
    "Node": _node,
    "EndpointSlice": _slice,
    "Service": _service,
    "NetworkPolicy": _spec,
    "Namespace": _nothing,
    "ServiceAccount": _nothing,
}
