"""What all of the compiler looks up: settings, namespaces, pods."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from common import spiffe
from controlplane.model.enrolment import Asked
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import Pod, read_pod, said_of_splice, zone_of
from controlplane.model.store import Store
from controlplane.source import Key, Object

#: Namespaces that are never in the mesh; that of the mesh itself is added where it has one.
OUTSIDE = frozenset({"kube-system"})
SPLICE_VALUES = ("enabled", "disabled")
_NAMESPACE_ASKS = ("mycel.io/mesh", "istio.io/dataplane-mode", "istio-injection", "istio.io/rev")


@dataclass(frozen=True)
class Settings:
    """What the process was told, not the objects. ``roots`` is a PEM bundle; ``outside`` are namespaces never in the mesh."""

    trust_domain: str = "cluster.local"
    roots: str = ""
    root_namespace: str = "istio-system"
    outside: Collection[str] = OUTSIDE


@dataclass(frozen=True)
class World:
    """What a graph's cells find as ``graph.settings``."""

    trust_domain: str
    root_namespace: str
    outside: Collection[str]
    store: Store = field(default_factory=Store, compare=False)


def store(g: Graph) -> Store:
    result: Store = g.settings.store
    return result


def namespace(g: Graph, name: str) -> Asked:
    """What a namespace says about the mesh; nothing if there is no Namespace object."""
    o: Object | None = g.read(store(g).objects, Key("", "Namespace", "", name))
    if o is None:
        return Asked()
    labels = {k: o.labels[k] for k in _NAMESPACE_ASKS if k in o.labels}
    annotations = {k: v for k, v in o.annotations.items() if k == "linkerd.io/inject"}
    return Asked(labels, annotations)


def splices(g: Graph, pod: Pod) -> bool:
    """Whether a pod's connections within its node may be spliced. What it says itself goes before what its namespace says."""
    said = pod.splice if pod.splice in SPLICE_VALUES else g.get(_namespace_splice, pod.namespace)
    return said != "disabled"


def _namespace_splice(g: Graph, name: str) -> str:
    o: Object | None = g.read(store(g).objects, Key("", "Namespace", "", name))
    said = said_of_splice(o) if o else ""
    return said if said in SPLICE_VALUES else ""


def zone(g: Graph, node: str) -> str:
    """A node's zone; empty if it is not known."""
    o: Object | None = g.read(store(g).objects, Key("", "Node", "", node)) if node else None
    return zone_of(o) if o else ""


def live(g: Graph, key: Key) -> Pod | None:
    """A pod; None if it is not there, has ended, or has a UID that an older one has too."""
    pod = any_pod(g, key)
    if pod is None or owner(g, pod).key != key:
        return None
    return pod


def owner(g: Graph, pod: Pod) -> Pod:
    """The pod that has this pod's UID: the oldest that claims it."""
    claim = [pod]
    for key in g.read(store(g).pods_by_uid, pod.uid):
        if key != pod.key and (other := any_pod(g, key)):
            claim.append(other)
    return min(claim, key=lambda p: p.age)


def pods_at(g: Graph, address: str) -> tuple[Pod, ...]:
    """The pods with an address of their own network, by UID. More than one: somebody has not noticed yet that one has ended."""
    pods = [g.get(live, key) for key in g.read(store(g).pods_by_address, address)]
    return tuple(sorted((p for p in pods if p and not p.host_network), key=lambda p: p.uid))


def identity(g: Graph, pod: Pod) -> str:
    """A pod's SPIFFE ID."""
    return str(spiffe.workload_id(g.settings.trust_domain, pod.namespace, pod.service_account))


def any_pod(g: Graph, key: Key) -> Pod | None:
    """A pod whoever has its UID; None if it is not there or has ended."""
    o = g.read(store(g).objects, key)
    return None if o is None else read_pod(o, g.get(namespace, key.namespace), g.settings.outside)
