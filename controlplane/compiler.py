"""Objects to snapshot: the one pure function of the controller, with nothing in it of time, order or place."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from controlplane import schema
from controlplane.api import Endpoint, MeshConfig, NodeInfo, Service, ServicePort, Workload
from controlplane.istio import GROUP_NETWORKING, GROUP_SECURITY
from controlplane.istio import validate as istio_validate
from controlplane.istio.authorizationpolicy import authorization, policies_of
from controlplane.istio.destinationrule import destination_rule_notes
from controlplane.istio.peerauthentication import mtls_of, peer_authentications
from controlplane.istio.routing import cluster, routing, virtual_service_notes, weighted
from controlplane.model import checks, networkpolicy
from controlplane.model.endpoints import Backends, addresses, backends, external_claim, older_claim, service
from controlplane.model.enrolment import Asked, asks, foreign_revision
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import SPLICE, Pod, Port, ServiceView, canonical, said_of_splice, zone_of
from controlplane.model.networkpolicy import membership, named_ports_of, network_policy
from controlplane.model.snapshot import Assembly, Change, Changes, Snapshot
from controlplane.model.world import (
    SPLICE_VALUES,
    Settings,
    World,
    any_pod,
    identity,
    namespace,
    owner,
    pods_at,
    splices,
    store,
    zone,
)
from controlplane.source import Key, Object

#: Kinds that have an effect today, or are only read for others.
_COMPILED = frozenset(
    {
        ("", k)
        for k in ("Namespace", "Pod", "Service", "ServiceAccount", "Node", "Secret", "ConfigMap", "Endpoints")
    }
    | {("discovery.k8s.io", "EndpointSlice"), (networkpolicy.GROUP, networkpolicy.KIND)}
    | {(GROUP_NETWORKING, k) for k in ("VirtualService", "DestinationRule")}
    | {(GROUP_SECURITY, k) for k in ("PeerAuthentication", "AuthorizationPolicy")}
)
#: Groups whose kinds are for a mesh to put in force; of others nothing is expected.
_MESH_GROUPS = ("istio.io", "linkerd.io", "smi-spec.io", "gateway.networking.k8s.io", "mycel.io")
_MESH_KINDS = frozenset({(networkpolicy.GROUP, networkpolicy.KIND)})


def is_compiled(group: str, kind: str) -> bool:
    """True for kinds that have an effect."""
    return (group, kind) in _COMPILED


@functools.cache
def is_policy(group: str, kind: str) -> bool:
    """True for kinds that are for a mesh to put in force."""
    return any(group == m or group.endswith(f".{m}") for m in _MESH_GROUPS) or (group, kind) in _MESH_KINDS


def validate(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, reason) of everything wrong with one manifest taken alone: what sources are given as their validator."""
    faulty = False
    for problem in schema.validate(manifest):
        faulty = True
        yield problem
    if not faulty:
        # These read the fields that the schema has found to be of the right shape.
        yield from checks.validate(manifest)
        yield from istio_validate.validate(manifest)


class Compiler:
    """Compiles one state after the other; each costs what has changed since the one before.

    What comes out depends on the objects alone, not on those before: one that has seen a thousand states and a new one make
    the same snapshot of the same objects.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._mesh: MeshConfig | None = None
        self._begin()

    def compile(self, objects: Mapping[Key, Object], settings: Settings | None = None) -> Snapshot:
        """Compile objects that :func:`validate` accepts. ``settings``: others than before.

        :raises Exception: a bug here; the last snapshot has to stay. Other objects may be compiled afterwards.
        """
        if settings is not None and settings != self._settings:
            anew = settings != replace(self._settings, roots=settings.roots)
            self._settings = settings
            if anew:
                self._begin()
        world: World = self._graph.settings
        came, went = world.store.replace(objects, self._graph)
        for key in went:
            for cell in _roots(key):
                self._graph.unroot(cell, key)
        for key in came:
            for cell in _roots(key):
                self._graph.root(cell, key)
        for item, before in self._graph.update().items():
            # What a snapshot that failed would have taken in is still to be taken in.
            self._pending.setdefault(item, before)
        changes = Changes()
        for (cell, key), before in self._pending.items():
            now = self._graph.result(cell, key)
            if cell is routing:
                changes.tables += [Change(t, None) for t in before or ()] + [
                    Change(None, t) for t in now or ()
                ]
            elif cell is cluster:
                changes.clusters.append(Change(before, now))
            elif cell is _outside:
                self._asking_not.discard(before)
                self._asking_not.update([now] if now else [])
            elif cell is _node:
                self._nodes.pop(key.name, None)
                self._nodes.update({now.name: now} if now else {})
            else:
                changes.resources.append(Change(before, now))
        mesh = MeshConfig(
            self._settings.trust_domain,
            self._settings.roots,
            tuple(sorted(self._asking_not)),
            tuple(node for _, node in sorted(self._nodes.items())),
        )
        if mesh != self._mesh:
            changes.resources.append(Change(self._mesh, mesh))
        try:
            snapshot = self._assembly.apply(changes, self._graph.notes())
        except Exception:
            self._begin()
            raise
        self._pending.clear()
        self._mesh = mesh
        return snapshot

    def _begin(self) -> None:
        settings = self._settings
        world = World(settings.trust_domain, settings.root_namespace, frozenset(settings.outside))
        self._graph = Graph(world, _OUTPUTS)
        self._assembly = Assembly()
        self._pending: dict[tuple[Any, Any], Any] = {}
        self._mesh = None
        self._asking_not: set[str] = set()
        self._nodes: dict[str, NodeInfo] = {}


def compile_snapshot(objects: Mapping[Key, Object], settings: Settings) -> Snapshot:
    """The snapshot of these objects, made from nothing.

    :raises Exception: as :meth:`Compiler.compile`.
    """
    return Compiler(settings).compile(objects)


def _roots(key: Key) -> tuple[Any, ...]:
    """The cells that are wanted because an object is there."""
    return _CELLS.get((key.group, key.kind)) or (() if is_compiled(key.group, key.kind) else (_kind_note,))


def _workload(g: Graph, key: Key) -> Workload | None:
    pod = g.get(any_pod, key)
    if pod is None:
        return None
    _note_pod(g, pod)
    first = owner(g, pod)
    if first.key != key:
        text = f"{first.key} has the same UID {pod.uid}: this pod is unknown to the mesh"
        g.findings.error(pod, "metadata.uid", text, "give every pod a UID of its own")
        return None
    mode, member = mtls_of(g, pod), membership(g, pod)
    return Workload(
        uid=pod.uid,
        namespace=pod.namespace,
        name=pod.name,
        service_account=pod.service_account,
        node=pod.node,
        identity=identity(g, pod),
        addresses=pod.addresses,
        enrolled=pod.enrolled,
        ready=pod.ready,
        mtls=mode.mode,
        port_mtls=mode.ports,
        policies=policies_of(g, pod),
        workload_name=pod.workload,
        app=pod.label("app", "app.kubernetes.io/name"),
        version=pod.label("version", "app.kubernetes.io/version"),
        splice=splices(g, pod),
        host_network=pod.host_network,
        zone=g.get(zone, pod.node),
        groups=member.groups,
        network_policies=member.policies,
        named_ports=named_ports_of(g, pod),
    )


def _service(g: Graph, key: Key) -> Service | None:
    view = g.get(service, key)
    if view is None:
        return None
    for address in view.addresses:
        older = older_claim(g, view, address)
        if older:
            text = f"{older.key} has the address {address}: this service is not reached by it"
            g.findings.error(view, "spec.clusterIP", text, "give every service an address of its own")
    external = []
    for address in view.external_addresses:
        owner_key = external_claim(g, view, address)
        if owner_key is None:
            external.append(address)
        else:
            text = f"{owner_key} has the external address {address}: this service is not reached by it"
            g.findings.error(view, "spec", text, "give every service an address of its own")
    if view.external_name:
        text = f"{view.external_name} is outside of the cluster: calls pass as without a mesh"
        g.findings.info(view, "spec.externalName", text)
    found = g.get(backends, key)
    routed = {table.port for table in g.get(routing, key)}
    for number, pod in found.unnamed:
        target = next(p.target for p in view.ports if p.number == number)
        text = f"{pod} has no container port named {target}: it gets no traffic of port {number}"
        g.findings.warning(view, "spec.ports", text, "name the port in the pod, or use its number")
    return Service(
        view.namespace,
        view.name,
        view.host,
        addresses(g, view),
        tuple(_port(g, view, port, found, i, routed) for i, port in enumerate(view.ports)),
        view.session_affinity,
        view.internal_local,
        tuple(external),
    )


def _port(g: Graph, view: ServiceView, port: Port, found: Backends, i: int, routed: set[int]) -> ServicePort:
    l7 = port.transport == "TCP" and port.number in routed
    shared = None if l7 else weighted(g, view, port)
    endpoints = [
        Endpoint(b.pod.uid if b.pod else "", b.address, b.port, b.node, b.terminating, weight)
        for b, weight in (shared if shared is not None else ((b, 1) for b in found.ports[i]))
    ]
    if port.transport == "UDP" and any(b.pod and b.pod.enrolled for b in found.ports[i]):
        text = f"UDP port {port.number} is judged as any other, and not encrypted"
        g.findings.info(view, "spec.ports", text)
    return ServicePort(port.number, port.name, port.transport, l7, tuple(endpoints), port.node_port)


def _node(g: Graph, key: Key) -> NodeInfo | None:
    o: Object | None = g.read(store(g).objects, key)
    if o is None:
        return None
    written = (o.manifest.get("status") or {}).get("addresses") or ()
    found = dict.fromkeys(canonical(a["address"]) for a in written if a["type"] in checks.NODE_ADDRESSES)
    return NodeInfo(key.name, tuple(found), zone_of(o))


def _note_splice(g: Graph, o: Object) -> None:
    said = said_of_splice(o)
    if said and said not in SPLICE_VALUES:
        where = "labels" if SPLICE in o.labels else "annotations"
        text = f"{SPLICE} is {said!r}, neither enabled nor disabled: it says nothing"
        g.findings.warning(o, f"metadata.{where}", text, "correct it, or remove it")


def _note_pod(g: Graph, pod: Pod) -> None:
    if pod.splice and pod.splice not in SPLICE_VALUES:
        _note_splice(g, g.read(store(g).objects, pod.key))
    if pod.enrolment.refused:
        if pod.enrolment.action:
            g.findings.warning(pod, "", pod.enrolment.refused, pod.enrolment.action)
        else:
            g.findings.info(pod, "", pod.enrolment.refused)
    if pod.host_network:
        return
    for address in pod.addresses:
        if len(g.read(store(g).pods_by_address, address)) > 1:
            first = g.get(pods_at, address)[:1]
            if first and first[0].key != pod.key:
                text = f"address {address} is {first[0].key}'s too"
                g.findings.warning(pod, "status.podIPs", text, "remove the pod that has ended")


def _namespace_note(g: Graph, key: Key) -> None:
    o: Object = g.read(store(g).objects, key)
    _note_splice(g, o)
    asked = g.get(namespace, key.name)
    revision = foreign_revision(asked)
    if revision:
        text = f"revision {revision} is another control plane's: its pods stay outside of the mesh"
        action = "use istio.io/rev: default, or mycel.io/mesh: enabled, to have them in this one"
        g.findings.info(o, "metadata.labels", text, action)
    if key.name in g.settings.outside and asks(Asked(), asked):
        text = "this namespace is always outside of the mesh, whatever its labels say"
        g.findings.warning(o, "metadata.labels", text, "remove the label")


def _outside(g: Graph, key: Key) -> str | None:
    """The namespace's name, if it does not ask for the mesh; a pod in it may still do."""
    g.read(store(g).objects, key)
    inside = key.name not in g.settings.outside and asks(Asked(), g.get(namespace, key.name))
    return None if inside else key.name


def _peer_authentication_note(g: Graph, key: Key) -> None:
    # Also where no pod asks for it, what is wrong with it is to be said.
    g.get(peer_authentications, key.namespace)


def _kind_note(g: Graph, key: Key) -> None:
    o: Object = g.read(store(g).objects, key)
    group, kind = key.group, key.kind
    if is_policy(group, kind):
        checked = "" if schema.known(group, kind) else " (nor are its fields checked)"
        g.findings.warning(o, "", f"{kind} is read, not in force yet{checked}")
    else:
        g.findings.info(o, "", f"{kind} means nothing to the mesh")


#: Whose results are parts of a snapshot, or of its MeshConfig.
_OUTPUTS = (_workload, _service, authorization, network_policy, routing, cluster, _outside, _node)
_CELLS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("", "Namespace"): (_namespace_note, _outside),
    ("", "Node"): (_node,),
    ("", "Pod"): (_workload,),
    ("", "Service"): (_service, routing),
    (networkpolicy.GROUP, networkpolicy.KIND): (network_policy,),
    (GROUP_SECURITY, "AuthorizationPolicy"): (authorization,),
    (GROUP_SECURITY, "PeerAuthentication"): (_peer_authentication_note,),
    (GROUP_NETWORKING, "VirtualService"): (virtual_service_notes,),
    (GROUP_NETWORKING, "DestinationRule"): (destination_rule_notes,),
}
