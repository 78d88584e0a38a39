"""The endpoints of services: from the pods that a selector names, and from EndpointSlices.

For a service with a selector Kubernetes' own controller derives slices from pods. This does the same from the same pods, and so
does not wait for it: a pod that becomes ready, or begins to end, is known here one hop earlier. Slices that this controller wrote
for such a service are therefore not read; all others are (written by hand, mirrored from Endpoints, another controller's), as
kube-proxy reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from controlplane.model.graph import Graph
from controlplane.model.kubernetes import (
    Pod,
    Port,
    ServiceView,
    canonical,
    read_service,
    selects,
    target_port,
)
from controlplane.model.store import rows
from controlplane.model.world import live, pods_at, store
from controlplane.source import Key, Object

_MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
_KUBERNETES = "endpointslice-controller.k8s.io"


@dataclass(frozen=True, slots=True)
class Backend:
    """One endpoint of one service port that gets connections."""

    pod: Pod | None  #: None: nothing that the mesh knows
    address: str
    port: int
    node: str
    terminating: bool = False


class Backends(NamedTuple):
    """Endpoints by the service's ports; ``unnamed`` has (port's name, pod) where a pod has no port of that name."""

    ports: tuple[tuple[Backend, ...], ...]
    unnamed: tuple[tuple[int, str], ...] = ()


class _Candidate(NamedTuple):
    backend: Backend
    ready: bool
    serving: bool


class _SliceEndpoint(NamedTuple):
    addresses: tuple[str, ...]
    ready: bool
    serving: bool
    terminating: bool
    node: str
    pod: Key | None
    uid: str


class _Slice(NamedTuple):
    managed: bool  #: by Kubernetes' own controller
    ports: tuple[tuple[str, str, int], ...]  #: name, transport, number
    endpoints: tuple[_SliceEndpoint, ...]


def service(g: Graph, key: Key) -> ServiceView | None:
    o = g.read(store(g).objects, key)
    return None if o is None else read_service(o)


def addresses(g: Graph, view: ServiceView) -> tuple[str, ...]:
    """A service's cluster addresses, without those that an older one has too (see :func:`older_claim`)."""
    return tuple(a for a in view.addresses if older_claim(g, view, a) is None)


def older_claim(g: Graph, view: ServiceView, address: str) -> ServiceView | None:
    """The oldest service with this address, if it is not this one."""
    claims = g.read(store(g).services_by_address, address)
    if len(claims) < 2:
        return None
    views = [v for key in claims if (v := g.get(service, key))]
    oldest = min(views, key=lambda v: v.age)
    return None if oldest.key == view.key else oldest


def external_claim(g: Graph, view: ServiceView, address: str) -> Key | None:
    """Whose an external address is already, if it may not be this service's.

    Anybody who may write a Service can name any address in it: those of pods and of the cluster's services stay theirs.
    """
    for table in (store(g).services_by_address, store(g).pods_by_address):
        owners: list[Key] = [k for k in g.read(table, address) if k.kind == "Service" or not _on_node(g, k)]
        if owners:
            return min(owners)
    claims = g.read(store(g).services_by_external_address, address)
    ports = {(p.number, p.transport) for p in view.ports}
    views = [v for key in claims if (v := g.get(service, key))] if len(claims) > 1 else []
    for other in sorted(views, key=lambda v: v.age):
        if other.key == view.key:
            break
        if any((p.number, p.transport) in ports for p in other.ports):
            return other.key
    return None


def _on_node(g: Graph, key: Key) -> bool:
    """Whether a pod's addresses are its node's, or nobody's any more."""
    pod = g.get(live, key)
    return pod is None or pod.host_network


def members(g: Graph, key: Key) -> tuple[Pod, ...]:
    """All pods that a service selects, ready or not, by UID."""
    view = g.get(service, key)
    if view is None or not view.selector:
        return ()
    index = store(g).pods_by_label
    pairs = [(key.namespace, name, value) for name, value in view.selector.items()]
    # Only the pods with the rarest pair are compared: not every service with every pod. Which pair it is changes nothing.
    rarest = min(pairs, key=index.size)
    pods = [pod for k in g.read(index, rarest) if (pod := g.get(live, k))]
    return tuple(sorted((p for p in pods if selects(view.selector, p.labels)), key=lambda p: p.uid))


def backends(g: Graph, key: Key) -> Backends:
    """Who gets connections to a service, by port."""
    view = g.get(service, key)
    if view is None:
        return Backends(())
    pods = g.get(members, key)
    slices = [s for k in _slices(g, key) if (s := g.get(slice_of, k)) and not (s.managed and view.selector)]
    ports = []
    unnamed = []
    for port in view.ports:
        candidates = list(_of_pods(view, port, pods))
        for part in slices:
            candidates += _of_slice(g, port, part)
        ports.append(_chosen(candidates, view.internal_local))
        if isinstance(port.target, str):
            unnamed += [(port.number, str(p.key)) for p in pods if p.ready and target_port(port, p) is None]
    return Backends(tuple(ports), tuple(unnamed))


def slice_of(g: Graph, key: Key) -> _Slice | None:
    """An EndpointSlice; None for one whose addresses are no addresses."""
    o: Object | None = g.read(store(g).objects, key)
    if o is None or o.manifest.get("addressType") == "FQDN":
        return None
    ports = [
        (p.get("name") or "", p.get("protocol") or "TCP", p["port"])
        for p in o.manifest.get("ports") or ()
        if p.get("port")
    ]
    return _Slice(
        o.labels.get(_MANAGED_BY) == _KUBERNETES,
        tuple(ports),
        tuple(_slice_endpoint(e, key.namespace) for e in o.manifest.get("endpoints") or ()),
    )


def _slices(g: Graph, key: Key) -> list[Key]:
    return [o.key for o in rows(store(g).slices_by_service, g, (key.namespace, key.name))]


def _slice_endpoint(endpoint: dict[str, Any], namespace: str) -> _SliceEndpoint:
    conditions = endpoint.get("conditions") or {}
    target = endpoint.get("targetRef") or {}
    # A condition that is not given is "unknown", and to be taken so (discovery.k8s.io/v1, EndpointConditions).
    ready = conditions.get("ready") is not False
    serving = conditions.get("serving")
    is_pod = target.get("kind") == "Pod" and target.get("name")
    return _SliceEndpoint(
        tuple(canonical(a) for a in endpoint.get("addresses") or ()),
        ready,
        ready if serving is None else serving,
        conditions.get("terminating") is True,
        endpoint.get("nodeName") or "",
        Key("", "Pod", target.get("namespace") or namespace, target["name"]) if is_pod else None,
        target.get("uid") or "",
    )


def _of_pods(view: ServiceView, port: Port, pods: Iterable[Pod]) -> Iterator[_Candidate]:
    for pod in pods:
        number = target_port(port, pod)
        if number is None:
            continue
        for address in pod.addresses:
            backend = Backend(pod, address, number, pod.node, pod.terminating)
            yield _Candidate(backend, pod.ready or view.publish_not_ready, pod.serving)


def _of_slice(g: Graph, port: Port, part: _Slice) -> Iterator[_Candidate]:
    number = next(
        (n for name, transport, n in part.ports if (name, transport) == (port.name, port.transport)), 0
    )
    if not number:
        return
    for endpoint in part.endpoints:
        # All addresses of one endpoint are one backend; kube-proxy takes the first, too.
        for address in endpoint.addresses[:1]:
            if endpoint.pod is not None:
                pod = g.get(live, endpoint.pod)
                if pod is None or not pod.node or (endpoint.uid and endpoint.uid != pod.uid):
                    continue  # it is gone, or nowhere yet
                if pod.addresses and address not in pod.addresses:
                    pod = None  # whoever wrote the slice may name any pod: whose the address is, counts
            else:
                pod = None
            if pod is None:
                owners = g.get(pods_at, address)
                pod = owners[0] if len(owners) == 1 else None
            ends = endpoint.terminating or (pod is not None and pod.terminating)
            backend = Backend(pod, address, number, pod.node if pod else endpoint.node, ends)
            yield _Candidate(backend, endpoint.ready and not (pod and pod.terminating), endpoint.serving)


def _chosen(candidates: Iterable[_Candidate], by_node: bool) -> tuple[Backend, ...]:
    """Those that are ready; where none is, those that serve while they end, as kube-proxy chooses.

    With ``internalTrafficPolicy: Local`` each node has to do with its own, so that this is decided node by node.
    """
    unique: dict[tuple[str, int], _Candidate] = {}
    for candidate in candidates:
        unique.setdefault((candidate.backend.address, candidate.backend.port), candidate)
    ready = [c.backend for c in unique.values() if c.ready]
    served = {b.node for b in ready}
    ending = [
        c.backend
        for c in unique.values()
        if not c.ready
        and c.serving
        and c.backend.terminating
        and (c.backend.node not in served if by_node else not ready)
    ]
    # A service with publishNotReadyAddresses hands out what ends as well: there it is no second choice.
    result = [Backend(b.pod, b.address, b.port, b.node) if b.terminating else b for b in ready] + ending
    return tuple(sorted(result, key=lambda b: (b.pod.uid if b.pod else "", b.port)))
