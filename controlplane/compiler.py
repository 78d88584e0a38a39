"""Objects to snapshot: the one pure function of the controller, with nothing in it of time, order or place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from common import spiffe
from controlplane import schema
from controlplane.api import Endpoint, MeshConfig, Resource, Service, ServicePort, Workload
from controlplane.istio import GROUP_NETWORKING, GROUP_SECURITY
from controlplane.istio import validate as istio_validate
from controlplane.istio.authorizationpolicy import Authorizations
from controlplane.istio.peerauthentication import PeerAuthentications
from controlplane.istio.routing import Routing, compile_routing
from controlplane.model import checks
from controlplane.model.findings import Findings
from controlplane.model.kubernetes import Pod, Port, ServiceView, ready_pods, target_port
from controlplane.model.snapshot import Snapshot, build
from controlplane.model.world import Settings, World, read
from controlplane.source import Key, Object

#: Kinds that have an effect today.
_COMPILED = frozenset(
    {("", k) for k in ("Namespace", "Pod", "Service", "ServiceAccount")}
    | {(GROUP_NETWORKING, k) for k in ("VirtualService", "DestinationRule")}
    | {(GROUP_SECURITY, k) for k in ("PeerAuthentication", "AuthorizationPolicy")}
)
#: Groups whose kinds are for a mesh to put in force; of others nothing is expected.
_MESH_GROUPS = ("istio.io", "linkerd.io", "smi-spec.io", "gateway.networking.k8s.io", "mycel.io")
_MESH_KINDS = frozenset({("networking.k8s.io", "NetworkPolicy")})


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


def compile_snapshot(objects: Mapping[Key, Object], settings: Settings) -> Snapshot:
    """Compile objects that :func:`validate` accepts.

    :raises controlplane.model.snapshot.SnapshotError: a bug here; the last snapshot has to stay.
    """
    world = read(objects, settings)
    findings = Findings()
    _note_kinds(world, findings)
    _note_pods(world, findings)
    for older, younger, address in world.address_twins:
        text = f"{older.object.key} has the address {address}: this service is not reached by it"
        findings.error(younger.object, "spec.clusterIP", text, "give every service an address of its own")
    identities = {
        p.uid: str(spiffe.workload_id(settings.trust_domain, p.namespace, p.service_account))
        for p in world.pods
    }
    authorizations = Authorizations(world, findings)
    mtls = PeerAuthentications(world, findings)
    routing = compile_routing(world, identities, findings)
    resources: list[Resource] = [MeshConfig(settings.trust_domain, settings.roots), *authorizations.compiled]
    for pod in world.pods:
        resources.append(_workload(pod, identities[pod.uid], authorizations, mtls))
    for service in world.services.values():
        resources.append(_service(service, routing, findings))
    return build(resources, routing.clusters.values(), routing.tables.values(), findings.sorted())


def _workload(pod: Pod, identity: str, authorizations: Authorizations, mtls: PeerAuthentications) -> Workload:
    mode = mtls.of(pod)
    return Workload(
        uid=pod.uid,
        namespace=pod.namespace,
        name=pod.name,
        service_account=pod.service_account,
        node=pod.node,
        identity=identity,
        addresses=pod.addresses,
        enrolled=pod.enrolled,
        ready=pod.ready,
        mtls=mode.mode,
        port_mtls=mode.ports,
        policies=authorizations.of(pod),
        workload_name=pod.workload,
        app=pod.label("app", "app.kubernetes.io/name"),
        version=pod.label("version", "app.kubernetes.io/version"),
    )


def _service(service: ServiceView, routing: Routing, findings: Findings) -> Service:
    ports = tuple(_port(service, port, routing, findings) for port in service.ports)
    return Service(service.namespace, service.name, service.host, service.addresses, ports)


def _port(service: ServiceView, port: Port, routing: Routing, findings: Findings) -> ServicePort:
    endpoints = []
    for pod in ready_pods(service):
        target = target_port(port, pod)
        if target is None:
            text = f"{pod.object.key} has no container port named {port.target}: it gets no traffic of port {port.number}"
            findings.warning(
                service.object, "spec.ports", text, "name the port in the pod, or use its number"
            )
            continue
        endpoints += [Endpoint(pod.uid, address, target, pod.node) for address in pod.addresses]
    if port.transport == "UDP" and any(p.enrolled for p in service.pods):
        text = f"UDP port {port.number} passes as without a mesh: not encrypted, not authorized"
        findings.info(service.object, "spec.ports", text)
    l7 = port.transport == "TCP" and (service.host, port.number) in routing.tables
    return ServicePort(port.number, port.name, port.transport, l7, tuple(endpoints))


def _note_kinds(world: World, findings: Findings) -> None:
    for group, kind in sorted(world.kinds()):
        if (group, kind) in _COMPILED:
            continue
        mesh = (
            any(group == g or group.endswith(f".{g}") for g in _MESH_GROUPS) or (group, kind) in _MESH_KINDS
        )
        for o in world.of_kind(group, kind):
            if mesh:
                checked = "" if schema.known(group, kind) else " (nor are its fields checked)"
                findings.warning(o, "", f"{kind} is accepted, not in force yet{checked}")
            else:
                findings.info(o, "", f"{kind} means nothing to the mesh")


def _note_pods(world: World, findings: Findings) -> None:
    for kept, left_out in world.twins:
        text = f"{kept.object.key} has the same UID {kept.uid}: this pod is unknown to the mesh"
        findings.error(left_out.object, "metadata.uid", text, "give every pod a UID of its own")
    owner: dict[str, Pod] = {}
    for pod in world.pods:
        if pod.object.spec.get("hostNetwork"):
            continue
        for address in pod.addresses:
            other = owner.setdefault(address, pod)
            if other is not pod:
                text = f"address {address} is {other.object.key}'s too"
                findings.warning(pod.object, "status.podIPs", text, "remove the pod that has ended")
