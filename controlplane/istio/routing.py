"""Which service ports are routed by request, and the route tables and clusters for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controlplane.istio import GROUP_NETWORKING
from controlplane.istio.destinationrule import DestinationRules, Rules
from controlplane.istio.hosts import closeness, note_export, reaches, resolve
from controlplane.istio.virtualservice import DEFAULT_RETRY, Compiler, destination_cluster
from controlplane.model.findings import Findings
from controlplane.model.kubernetes import Pod, Port, Protocol, ServiceView, ready_pods, target_port
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
from controlplane.model.world import World
from controlplane.source import Object


@dataclass
class Routing:
    """The outcome: tables by (host, port), and every cluster that a table may name and that exists."""

    tables: dict[tuple[str, int], RouteTable] = field(default_factory=dict)
    clusters: dict[str, Cluster] = field(default_factory=dict)


def compile_routing(world: World, identities: Mapping[str, str], findings: Findings) -> Routing:
    """Route all services of a world. ``identities``: SPIFFE IDs by pod UID."""
    return _Compiler(world, identities, findings).compile()


class _Compiler:
    def __init__(self, world: World, identities: Mapping[str, str], findings: Findings) -> None:
        self._world = world
        self._identities = identities
        self._findings = findings
        self._rules = DestinationRules(world, findings)
        self._result = Routing()
        self._virtual_services = self._read_virtual_services()

    def compile(self) -> Routing:
        for service in self._world.services.values():
            rules = self._rules.of(service)
            chosen = self._virtual_service(service)
            for port in service.ports:
                if port.transport == "TCP":
                    self._port(service, port, rules, chosen)
        return self._result

    def _port(self, service: ServiceView, port: Port, rules: Rules, chosen: Object | None) -> None:
        routes = self._routes(chosen, port) if chosen else ()
        balances = rules.balances(port.number) and port.protocol in (Protocol.HTTP, Protocol.HTTP2)
        if not routes and not balances:
            return
        if routes and chosen and port.protocol is Protocol.OPAQUE:
            where = f"port {port.number} ({port.name}) of {service.object.key}"
            text = f"{where} says of itself that it is not HTTP: not routed"
            self._findings.warning(
                chosen, "spec.http", text, "name the port http, or http-..., if it speaks HTTP"
            )
            return
        if not service.addresses:
            about, path = (chosen, "spec.hosts") if chosen else (service.object, "spec.clusterIP")
            text = f"{service.object.key} has no cluster address: calls go to its pods directly and are not routed"
            self._findings.warning(about, path, text, "give the service a cluster address")
            return
        own = cluster_name(service.host, port.number)
        if not routes:
            routes = (Route(RouteMatch(), Forward((Weighted(own, 100),), retry=DEFAULT_RETRY), "default"),)
        name = f"{service.host}:{port.number}"
        table = RouteTable(name, service.host, service.addresses, port.number, routes)
        self._result.tables[service.host, port.number] = table
        self._cluster(service, port, "")

    def _routes(self, virtual_service: Object, port: Port) -> tuple[Route, ...]:
        def destination(to: Mapping[str, Any], path: str, dialled: int) -> str:
            return self._destination(virtual_service, to, path, dialled)

        return Compiler(virtual_service, port.number, destination, self._findings).routes()

    def _destination(self, about: Object, to: Mapping[str, Any], path: str, dialled: int) -> str:
        """The destination's cluster. One that cannot be is named all the same, and missing: 503, never a guess."""
        namespace = about.key.namespace
        target = self._world.services.get(resolve(to["host"], namespace))
        ports = [p for p in target.ports if p.transport == "TCP"] if target else []
        single = ports[0].number if len(ports) == 1 else None
        host, name = destination_cluster(to, namespace, single, dialled)
        answer = "requests that are routed there are answered 503"
        if target is None:
            self._findings.error(
                about, f"{path}.host", f"no service has the host {host}: {answer}", "create it, or correct it"
            )
            return name
        number, subset = int(name.split("|")[1]), to.get("subset") or ""
        port = target.port(number)
        if port is None:
            exist = ", ".join(str(p.number) for p in ports) or "none"
            text = f"{target.object.key} has no port {number} (it has {exist}): {answer}"
            self._findings.error(about, f"{path}.port", text, "name one of its ports")
            return name
        rules = self._rules.of(target)
        if subset and subset not in rules.subsets:
            text = f"no DestinationRule defines subset {subset} of {host}: {answer}"
            action = f"add a DestinationRule for host {host} in namespace {target.namespace} with a subset named {subset}"
            self._findings.error(about, f"{path}.subset", text, action)
            return name
        if subset and not any(rules.subsets[subset].selects(p) for p in target.pods):
            text = f"subset {subset} of {host} selects no pod: {answer}"
            self._findings.warning(about, f"{path}.subset", text, "compare its labels with the pods'")
        self._cluster(target, port, subset)
        return name

    def _cluster(self, service: ServiceView, port: Port, subset: str) -> None:
        name = cluster_name(service.host, port.number, subset)
        if name in self._result.clusters:
            return
        rules = self._rules.of(service)
        pods = [p for p in ready_pods(service) if not subset or rules.subsets[subset].selects(p)]
        endpoints = [
            self._endpoint(pod, address, target)
            for pod in pods
            if (target := target_port(port, pod)) is not None
            for address in pod.addresses[:1]
        ]
        self._result.clusters[name] = Cluster(
            name,
            service.host,
            service.name,
            service.namespace,
            port.number,
            subset,
            rules.balancing(port.number, subset),
            port.protocol is Protocol.HTTP2,
            tuple(endpoints),
        )

    def _endpoint(self, pod: Pod, address: str, port: int) -> ClusterEndpoint:
        return ClusterEndpoint(
            address,
            port,
            pod.uid,
            pod.namespace,
            pod.name,
            pod.node,
            self._identities[pod.uid],
            pod.service_account,
            pod.enrolled,
            pod.workload,
            pod.label("app", "app.kubernetes.io/name"),
            pod.label("version", "app.kubernetes.io/version"),
        )

    def _read_virtual_services(self) -> list[tuple[str, Object]]:
        """(resolved host, object) of all that apply within the mesh and have HTTP routes."""
        result = []
        for virtual_service in self._world.of_kind(GROUP_NETWORKING, "VirtualService"):
            spec = virtual_service.spec
            for kind in ("tcp", "tls"):
                if spec.get(kind):
                    self._findings.warning(
                        virtual_service, f"spec.{kind}", f"{kind} routes: accepted, not in force yet"
                    )
            gateways = spec.get("gateways") or ("mesh",)
            if any(g != "mesh" for g in gateways):
                text = "routes of gateways are accepted, not in force yet"
                self._findings.warning(virtual_service, "spec.gateways", text)
            if "mesh" not in gateways or not spec.get("http"):
                continue
            note_export(virtual_service, self._findings)
            for i, host in enumerate(spec.get("hosts") or ()):
                resolved = resolve(host, virtual_service.key.namespace)
                result.append((resolved, virtual_service))
                if not any(closeness(resolved, s) for s in self._world.services):
                    text = f"no service has the host {resolved}: its routes apply to nothing"
                    self._findings.warning(
                        virtual_service, f"spec.hosts[{i}]", text, "create it, or correct the host"
                    )
        return result

    def _virtual_service(self, service: ServiceView) -> Object | None:
        """The one that applies: the closest host, then the oldest."""
        found = [
            (closeness(host, service.host), o)
            for host, o in self._virtual_services
            if reaches(o, service.namespace)
        ]
        best = max((c for c, _ in found), default=0)
        if not best:
            return None
        candidates = list(dict.fromkeys(o.key for c, o in found if c == best))
        chosen = next(o for c, o in found if c == best)
        for _, other in found:
            if other.key in candidates[1:]:
                text = f"{chosen.key} is older and is the one for {service.host}"
                self._findings.warning(other, "spec.hosts", text, "merge the two")
        return chosen
