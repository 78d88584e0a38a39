"""Kubernetes' own objects as the compiler sees them: namespaces, pods, services, and who is enrolled.

Everything here is a plain reading of single objects; what a mesh makes of them is the compiler's business.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlplane.source import Object

#: Suffix of the hosts of services. The cluster domain is fixed for now, as everywhere in the wild.
CLUSTER_DOMAIN = "cluster.local"


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

    object: Object
    uid: str
    namespace: str
    name: str
    service_account: str
    node: str
    addresses: tuple[str, ...]
    ready: bool
    labels: Mapping[str, str]
    enrolled: bool
    named_ports: Mapping[str, int]
    workload: str

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


@dataclass(frozen=True, slots=True)
class ServiceView:
    object: Object
    namespace: str
    name: str
    host: str
    addresses: tuple[str, ...]
    ports: tuple[Port, ...]
    pods: tuple[Pod, ...]  #: all that it selects, sorted; ready or not

    def port(self, number: int) -> Port | None:
        return next((p for p in self.ports if p.number == number and p.transport == "TCP"), None)


def read_pod(pod: Object, namespace: Object | None) -> Pod | None:
    """None for a pod that has ended: its address may be someone else's already."""
    spec, status = pod.spec, pod.manifest.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    metadata = pod.manifest["metadata"]
    written = [status.get("podIP"), *(p["ip"] for p in status.get("podIPs") or ())]
    addresses = tuple(dict.fromkeys(_address(a) for a in written if a))
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
    named = {
        p["name"]: p["containerPort"]
        for container in spec.get("containers") or ()
        for p in container.get("ports") or ()
        if p.get("name") and p.get("containerPort")
    }
    return Pod(
        object=pod,
        uid=metadata["uid"],
        namespace=pod.key.namespace,
        name=pod.key.name,
        service_account=spec.get("serviceAccountName") or "default",
        node=spec.get("nodeName") or "",
        addresses=addresses,
        ready=conditions.get("Ready") == "True" and bool(addresses) and not metadata.get("deletionTimestamp"),
        labels=pod.labels,
        enrolled=_enrolled(pod, namespace),
        named_ports=named,
        workload=_workload_name(pod),
    )


def read_service(service: Object, pods: Sequence[Pod]) -> ServiceView:
    """``pods``: at least those of the service's namespace that it selects, and no other namespace's."""
    spec = service.spec
    written = [spec.get("clusterIP"), *(spec.get("clusterIPs") or ())]
    addresses = tuple(dict.fromkeys(_address(a) for a in written if a and a != "None"))
    selector = spec.get("selector") or {}
    chosen = [p for p in pods if selector and selects(selector, p.labels)]
    ports = tuple(
        Port(
            p["port"],
            p.get("name") or "",
            p.get("protocol") or "TCP",
            _protocol(p.get("name") or "", p.get("appProtocol") or ""),
            p.get("targetPort") or p["port"],
        )
        for p in spec.get("ports") or ()
    )
    namespace, name = service.key.namespace, service.key.name
    return ServiceView(
        service,
        namespace,
        name,
        f"{name}.{namespace}.svc.{CLUSTER_DOMAIN}",
        addresses,
        ports,
        tuple(sorted(chosen, key=lambda p: p.uid)),
    )


def target_port(port: Port, pod: Pod) -> int | None:
    """The pod's own port behind a service port; None if the pod names no such port."""
    if isinstance(port.target, int):
        return port.target
    if port.target.isdigit():
        return int(port.target)
    return pod.named_ports.get(port.target)


def ready_pods(service: ServiceView) -> list[Pod]:
    """The pods that get the service's traffic."""
    unready_too = service.object.spec.get("publishNotReadyAddresses", False)
    return [p for p in service.pods if p.ready or (unready_too and p.addresses)]


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """matchLabels: every pair has to be there."""
    return all(labels.get(k) == v for k, v in selector.items())


def _enrolled(pod: Object, namespace: Object | None) -> bool:
    if pod.spec.get("hostNetwork"):
        return False  # its network is the node's
    own = pod.labels
    if own.get("istio.io/dataplane-mode") == "none" or own.get("mycel.io/mesh") == "disabled":
        return False
    for labels in (own, namespace.labels if namespace else {}):
        if labels.get("mycel.io/mesh") == "enabled" or labels.get("istio.io/dataplane-mode") == "ambient":
            return True
    injected = namespace is not None and namespace.labels.get("istio-injection") == "enabled"
    return injected and own.get("sidecar.istio.io/inject") != "false"


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


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))
