"""Which service ports are routed by request, and the route tables and clusters for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from controlplane.istio import GROUP_NETWORKING
from controlplane.istio.destinationrule import rules
from controlplane.istio.hosts import Hosts, note_export, reaches, resolve, services_matching
from controlplane.istio.tcproutes import shares, weigh
from controlplane.istio.virtualservice import DEFAULT_RETRY, Compiler, destination_cluster
from controlplane.model.endpoints import Backend, addresses, backends, members, service
from controlplane.model.findings import About
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import Port, Protocol, ServiceView, host_of, service_of
from controlplane.model.routing import (
    Cluster,
    ClusterEndpoint,
    Forward,
    Route,
    RouteMatch,
    RouteTable,
    Weighted,
    cluster_name,
)
from controlplane.model.world import identity, store
from controlplane.source import Key, Object


def routing(g: Graph, key: Key) -> tuple[RouteTable, ...]:
    """The route tables of a service's ports; keeps every cluster that they name and that exists."""
    view = g.get(service, key)
    return tuple(_Service(g, view).tables()) if view else ()


def cluster(g: Graph, of: tuple[Key, int, str]) -> Cluster | None:
    """The cluster of a service, port and subset (empty for all endpoints)."""
    key, number, subset = of
    view, own = g.get(service, key), g.get(rules, key)
    port = view.port(number) if view else None
    if view is None or port is None:
        return None
    endpoints = []
    seen = set()
    for backend in g.get(backends, key).ports[view.ports.index(port)]:
        pod = backend.pod
        if subset and not (pod and subset in own.subsets and own.subsets[subset].selects(pod)):
            continue
        if pod and pod.uid in seen:
            continue  # its other addresses
        if pod:
            seen.add(pod.uid)
        endpoints.append(_endpoint(g, backend))
    return Cluster(
        cluster_name(view.host, number, subset),
        view.host,
        view.name,
        view.namespace,
        number,
        subset,
        own.balancing(number, subset),
        port.protocol is Protocol.HTTP2,
        tuple(endpoints),
    )


def weighted(g: Graph, view: ServiceView, port: Port) -> tuple[tuple[Backend, int], ...] | None:
    """The endpoints, with weights, of a port that requests do not route but a VirtualService shares; None: its own ones."""
    chosen = g.get(_virtual_service, view.key)
    if chosen is None or port.transport != "TCP":
        return None
    virtual_service: Object = g.read(store(g).objects, chosen)
    found = shares(g, virtual_service, port)
    if found is None:
        return None
    if port.protocol in (Protocol.HTTP, Protocol.HTTP2):
        where = f"port {port.number} ({port.name}) of {view.key}"
        text = f"{where} says of itself that it is HTTP: its connections are not shared"
        g.findings.warning(
            virtual_service, "spec.tcp", text, "use http routes, or name the port tcp, or tcp-..."
        )
        return None
    return weigh(found)


def virtual_service_notes(g: Graph, key: Key) -> None:
    """What there is to say about one VirtualService, whatever it is used for."""
    virtual_service = g.read(store(g).objects, key)
    if virtual_service is None:
        return
    spec = virtual_service.spec
    if spec.get("tls"):
        g.findings.warning(virtual_service, "spec.tls", "tls routes: accepted, not in force yet")
    if any(gateway != "mesh" for gateway in spec.get("gateways") or ("mesh",)):
        text = "routes of gateways are accepted, not in force yet"
        g.findings.warning(virtual_service, "spec.gateways", text)
    if not _applies(virtual_service):
        return
    note_export(virtual_service, g.findings)
    for i, host in enumerate(spec.get("hosts") or ()):
        resolved = resolve(host, key.namespace)
        if not services_matching(g, resolved):
            text = f"no service has the host {resolved}: its routes apply to nothing"
            g.findings.warning(virtual_service, f"spec.hosts[{i}]", text, "create it, or correct the host")


def _applies(virtual_service: Object) -> bool:
    """True if it applies within the mesh and has routes that are in force."""
    spec = virtual_service.spec
    return "mesh" in (spec.get("gateways") or ("mesh",)) and bool(spec.get("http") or spec.get("tcp"))


def _hosts_of(g: Graph, key: Key) -> tuple[tuple[str, str, str], tuple[str, ...]]:
    """The age of a VirtualService, and the hosts that it routes."""
    o: Object = g.read(store(g).objects, key)
    hosts = (o.spec.get("hosts") or ()) if _applies(o) else ()
    return o.age, tuple(resolve(host, key.namespace) for host in hosts)


def _hosts(g: Graph, _: None) -> Hosts:
    kind = (GROUP_NETWORKING, "VirtualService")
    found = sorted((*g.get(_hosts_of, key), key) for key in g.read(store(g).by_kind, kind))
    return Hosts.of((host, key) for _, hosts, key in found for host in hosts)


def _virtual_service(g: Graph, key: Key) -> Key | None:
    """The one that applies to a service: the closest host, then the oldest."""
    found = [
        (close, k)
        for close, k in g.get(_hosts, None).matching(host_of(key))
        if reaches(g.read(store(g).objects, k), key.namespace)
    ]
    if not found:
        return None
    best = max(c for c, _ in found)
    chosen, *others = dict.fromkeys(k for c, k in found if c == best)
    for other in others:
        text = f"{chosen} is older and is the one for {host_of(key)}"
        g.findings.warning(g.read(store(g).objects, other), "spec.hosts", text, "merge the two")
    return chosen


def _subset_has_pods(g: Graph, of: tuple[Key, str]) -> bool:
    key, subset = of
    selecting = g.get(rules, key).subsets.get(subset)
    return selecting is not None and any(selecting.selects(p) for p in g.get(members, key))


class _Service:
    """The routes of one service."""

    def __init__(self, g: Graph, view: ServiceView) -> None:
        self._g = g
        self._view = view
        self._rules = g.get(rules, view.key)
        chosen = g.get(_virtual_service, view.key)
        self._chosen: Object | None = g.read(store(g).objects, chosen) if chosen else None

    def tables(self) -> Iterator[RouteTable]:
        own = addresses(self._g, self._view)
        for port in self._view.ports:
            if port.transport == "TCP" and (table := self._port(port, own)):
                yield table

    def _port(self, port: Port, addresses: tuple[str, ...]) -> RouteTable | None:
        view, chosen, findings = self._view, self._chosen, self._g.findings
        routes = self._routes(chosen, port) if chosen else ()
        balances = self._rules.balances(port.number) and port.protocol in (Protocol.HTTP, Protocol.HTTP2)
        if not routes and not balances:
            return None
        about: About = chosen or view
        if routes and port.protocol is Protocol.OPAQUE:
            where = f"port {port.number} ({port.name}) of {view.key}"
            text = f"{where} says of itself that it is not HTTP: not routed"
            findings.warning(about, "spec.http", text, "name the port http, or http-..., if it speaks HTTP")
            return None
        if not addresses:
            path = "spec.hosts" if chosen else "spec.clusterIP"
            what = (
                f"is outside of the cluster ({view.external_name})"
                if view.external_name
                else "has no cluster address"
            )
            calls = "there" if view.external_name else "to its pods"
            text = f"{view.key} {what}: calls go {calls} directly and are not routed"
            findings.warning(about, path, text, "give the service a cluster address")
            return None
        if view.session_affinity:
            text = f"has no effect on port {port.number}, whose requests are routed one by one"
            findings.info(view, "spec.sessionAffinity", text)
        if view.internal_local:
            text = (
                f"is not in force yet on port {port.number}, whose requests are routed: they go to all nodes"
            )
            findings.warning(view, "spec.internalTrafficPolicy", text)
        own = cluster_name(view.host, port.number)
        if not routes:
            routes = (Route(RouteMatch(), Forward((Weighted(own, 100),), retry=DEFAULT_RETRY), "default"),)
        self._g.keep(cluster, (view.key, port.number, ""))
        return RouteTable(f"{view.host}:{port.number}", view.host, addresses, port.number, routes)

    def _routes(self, virtual_service: Object, port: Port) -> tuple[Route, ...]:
        def destination(to: Mapping[str, Any], path: str, dialled: int) -> str:
            return self._destination(virtual_service, to, path, dialled)

        return Compiler(virtual_service, port.number, destination, self._g.findings).routes()

    def _destination(self, about: Object, to: Mapping[str, Any], path: str, dialled: int) -> str:
        """The destination's cluster. One that cannot be is named all the same, and missing: 503, never a guess."""
        findings = self._g.findings
        namespace = about.key.namespace
        key = service_of(resolve(to["host"], namespace))
        target = self._g.get(service, key) if key else None
        ports = [p for p in target.ports if p.transport == "TCP"] if target else []
        single = ports[0].number if len(ports) == 1 else None
        host, name = destination_cluster(to, namespace, single, dialled)
        answer = "requests that are routed there are answered 503"
        if target is None:
            text = f"no service has the host {host}: {answer}"
            findings.error(about, f"{path}.host", text, "create it, or correct it")
            return name
        number, subset = int(name.split("|")[1]), to.get("subset") or ""
        if target.port(number) is None:
            exist = ", ".join(str(p.number) for p in ports) or "none"
            text = f"{target.key} has no port {number} (it has {exist}): {answer}"
            findings.error(about, f"{path}.port", text, "name one of its ports")
            return name
        if subset and subset not in self._g.get(rules, target.key).subsets:
            text = f"no DestinationRule defines subset {subset} of {host}: {answer}"
            action = f"add a DestinationRule for host {host} in namespace {target.namespace} with a subset named {subset}"
            findings.error(about, f"{path}.subset", text, action)
            return name
        if subset and not self._g.get(_subset_has_pods, (target.key, subset)):
            text = f"subset {subset} of {host} selects no pod: {answer}"
            findings.warning(about, f"{path}.subset", text, "compare its labels with the pods'")
        self._g.keep(cluster, (target.key, number, subset))
        return name


def _endpoint(g: Graph, backend: Backend) -> ClusterEndpoint:
    pod = backend.pod
    if pod is None:
        return ClusterEndpoint(
            backend.address,
            backend.port,
            "",
            "",
            "",
            backend.node,
            "",
            "",
            False,
            "unknown",
            "unknown",
            "unknown",
        )
    return ClusterEndpoint(
        backend.address,
        backend.port,
        pod.uid,
        pod.namespace,
        pod.name,
        pod.node,
        identity(g, pod),
        pod.service_account,
        pod.enrolled,
        pod.workload,
        pod.label("app", "app.kubernetes.io/name"),
        pod.label("version", "app.kubernetes.io/version"),
    )
