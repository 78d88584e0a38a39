"""Kubernetes' own objects as the compiler sees them: pods and services.

Everything here is a plain reading of single objects; what a mesh makes of them is the compiler's business.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from controlplane.model.enrolment import Asked, Enrolment, enrolment
from controlplane.source import Key, Object

#: Suffix of the hosts of services. The cluster domain is fixed for now, as everywhere in the wild.
CLUSTER_DOMAIN = "cluster.local"
#: Label of an EndpointSlice that names its service.
SLICE_SERVICE = "kubernetes.io/service-name"
#: Label or annotation, ``enabled`` or ``disabled``: whether connections with pods of the same node are spliced.
SPLICE = "mycel.io/splice"
_SESSION_AFFINITY_S = 10800  # the API's default


class Protocol(enum.Enum):
    """What a service port says about itself. UNKNOWN: nothing, or nothing that is known."""

    HTTP = "http"
    HTTP2 = "http2"
    OPAQUE = "opaque"  #: explicitly something that cannot be routed by request: tcp, tls, https, a database's
    UNKNOWN = "unknown"


_PROTOCOLS = {
    "http": Protocol.HTTP,
    "kubernetes.io/ws": Protocol.HTTP,
    "http2": Protocol.HTTP2,
    "grpc": Protocol.HTTP2,
    "grpc-web": Protocol.HTTP,
    "kubernetes.io/h2c": Protocol.HTTP2,
    **dict.fromkeys(("https", "tls", "tcp", "mongo", "mysql", "redis", "kubernetes.io/wss"), Protocol.OPAQUE),
}


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that is, or will be, somewhere: not one that has ended."""

    key: Key
    file: str
    age: tuple[str, str, str]
    uid: str
    service_account: str
    node: str
    addresses: tuple[str, ...]
    serving: bool  #: its readiness probes succeed, also while it ends
    terminating: bool
    labels: Mapping[str, str]
    host_network: bool
    enrolment: Enrolment
    named_ports: Mapping[tuple[str, str], int]  #: by name and transport
    workload: str
    splice: str  #: what it says of itself (:data:`SPLICE`); empty if it says nothing

    @property
    def namespace(self) -> str:
        return self.key.namespace

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def enrolled(self) -> bool:
        return self.enrolment.enrolled

    @property
    def ready(self) -> bool:
        return self.serving and not self.terminating

    def label(self, *names: str) -> str:
        """The first of these labels that is there, else ``unknown``."""
        return next((self.labels[n] for n in names if self.labels.get(n)), "unknown")


@dataclass(frozen=True, slots=True)
class Port:
    number: int
    name: str
    transport: str  #: TCP, UDP, SCTP
    protocol: Protocol
    target: int | str
    node_port: int = 0


@dataclass(frozen=True, slots=True)
class ServiceView:
    """A Service as written; which pods it has is another question."""

    key: Key
    file: str
    age: tuple[str, str, str]
    host: str
    addresses: tuple[str, ...]  #: cluster addresses that it claims; empty for headless
    ports: tuple[Port, ...]
    selector: Mapping[str, str]
    publish_not_ready: bool
    external_name: str
    session_affinity: int  #: seconds; 0 is none
    internal_local: bool
    external_addresses: tuple[str, ...]  #: that it claims beside its cluster addresses

    @property
    def namespace(self) -> str:
        return self.key.namespace

    @property
    def name(self) -> str:
        return self.key.name

    def port(self, number: int) -> Port | None:
        return next((p for p in self.ports if p.number == number and p.transport == "TCP"), None)


def read_pod(pod: Object, namespace: Asked, outside: Collection[str]) -> Pod | None:
    """None for a pod that has ended: its address may be someone else's already."""
    spec, status = pod.spec, pod.manifest.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    metadata = pod.manifest["metadata"]
    addresses = addresses_of(pod)
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
    return Pod(
        key=pod.key,
        file=pod.file,
        age=pod.age,
        uid=metadata["uid"],
        service_account=spec.get("serviceAccountName") or "default",
        node=spec.get("nodeName") or "",
        addresses=addresses,
        serving=conditions.get("Ready") == "True" and bool(addresses),
        terminating=bool(metadata.get("deletionTimestamp")),
        labels=pod.labels,
        host_network=bool(spec.get("hostNetwork")),
        enrolment=enrolment(pod, namespace, outside),
        named_ports=dict(_named_ports(spec)),
        workload=_workload_name(pod),
        splice=said_of_splice(pod),
    )


def read_service(service: Object) -> ServiceView:
    spec = service.spec
    external = spec.get("type") == "ExternalName"
    affinity = 0
    if spec.get("sessionAffinity") == "ClientIP":
        config = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
        affinity = config.get("timeoutSeconds") or _SESSION_AFFINITY_S
    ports = tuple(
        Port(
            p["port"],
            p.get("name") or "",
            p.get("protocol") or "TCP",
            _protocol(p.get("name") or "", p.get("appProtocol") or ""),
            p.get("targetPort") or p["port"],
            p.get("nodePort") or 0,
        )
        for p in spec.get("ports") or ()
    )
    return ServiceView(
        key=service.key,
        file=service.file,
        age=service.age,
        host=host_of(service.key),
        addresses=addresses_of(service),
        ports=ports,
        selector={} if external else spec.get("selector") or {},
        publish_not_ready=spec.get("publishNotReadyAddresses", False),
        external_name=(spec.get("externalName") or "") if external else "",
        session_affinity=affinity,
        internal_local=spec.get("internalTrafficPolicy") == "Local",
        external_addresses=external_addresses_of(service),
    )


def addresses_of(o: Object) -> tuple[str, ...]:
    """The addresses of a pod, or the cluster addresses of a service, as canonical text."""
    if o.key.kind == "Pod":
        status = o.manifest.get("status") or {}
        written = [status.get("podIP"), *(p["ip"] for p in status.get("podIPs") or ())]
    elif o.spec.get("type") == "ExternalName":
        return ()
    else:
        written = [o.spec.get("clusterIP"), *(o.spec.get("clusterIPs") or ())]
    return tuple(dict.fromkeys(canonical(a) for a in written if a and a != "None"))


def external_addresses_of(service: Object) -> tuple[str, ...]:
    """``externalIPs``, and those of a load balancer that leaves the destination as it is, as canonical text."""
    spec = service.spec
    if spec.get("type") == "ExternalName":
        return ()
    written = list(spec.get("externalIPs") or ())
    if spec.get("type") == "LoadBalancer":
        balancer = (service.manifest.get("status") or {}).get("loadBalancer") or {}
        # What comes through one that is a proxy (KEP-1860) is to go through it from here too.
        written += [i.get("ip") for i in balancer.get("ingress") or () if i.get("ipMode") != "Proxy"]
    return tuple(dict.fromkeys(canonical(a) for a in written if a))


def said_of_splice(o: Object) -> str:
    """What a pod or namespace says about splicing, by label, else by annotation; empty if nothing."""
    return o.labels.get(SPLICE) or o.annotations.get(SPLICE) or ""


def zone_of(node: Object) -> str:
    return node.labels.get("topology.kubernetes.io/zone") or ""


def host_of(service: Key) -> str:
    """A service's host name."""
    return f"{service.name}.{service.namespace}.svc.{CLUSTER_DOMAIN}"


def service_of(host: str) -> Key | None:
    """The service that a host would be; None if it can be none's."""
    name, _, rest = host.partition(".")
    namespace, _, domain = rest.partition(".")
    return Key("", "Service", namespace, name) if domain == f"svc.{CLUSTER_DOMAIN}" else None


def target_port(port: Port, pod: Pod) -> int | None:
    """The pod's own port behind a service port; None if the pod names no such port."""
    if isinstance(port.target, int):
        return port.target
    if port.target.isdigit():
        return int(port.target)
    return pod.named_ports.get((port.target, port.transport))


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """matchLabels: every pair has to be there."""
    return all(labels.get(k) == v for k, v in selector.items())


def _named_ports(spec: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], int]]:
    """From the last to the first: of a name that stands twice the first counts, and an init container's comes after all others.

    Init containers have ports while they run on as sidecars (``restartPolicy: Always``).
    """
    containers = [
        *(spec.get("containers") or ()),
        *(c for c in spec.get("initContainers") or () if c.get("restartPolicy") == "Always"),
    ]
    for container in reversed(containers):
        for port in container.get("ports") or ():
            if port.get("name") and port.get("containerPort"):
                yield (port["name"], port.get("protocol") or "TCP"), port["containerPort"]


def _workload_name(pod: Object) -> str:
    """The owner as Istio names it: a ReplicaSet's Deployment, a CronJob's Job without its time, else the owner or the pod."""
    for owner in pod.manifest["metadata"].get("ownerReferences") or ():
        name: str = owner["name"]
        template = pod.labels.get("pod-template-hash")
        if owner["kind"] == "ReplicaSet" and template and name.endswith(f"-{template}"):
            return name.removesuffix(f"-{template}")
        if owner["kind"] == "Job":
            return re.sub(r"-\d{8,}$", "", name)
        return name
    return pod.key.name


def _protocol(name: str, app_protocol: str) -> Protocol:
    if app_protocol:
        return _PROTOCOLS.get(app_protocol.lower(), Protocol.UNKNOWN)
    lower = name.lower()
    if lower.startswith("grpc-web"):
        return Protocol.HTTP
    return _PROTOCOLS.get(lower.split("-", 1)[0], Protocol.UNKNOWN)


@lru_cache(1 << 16)
def canonical(address: str) -> str:
    """An address as it is compared."""
    return str(ipaddress.ip_address(address))
