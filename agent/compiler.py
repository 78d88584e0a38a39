"""Compiles the mesh's state into the tables that the kernel reads.

Owns which pods, peers, services and verdicts a node's kernel has to know. Pure: no I/O, no kernel, no clock; the same input
gives the same tables, so that only differences are written. Verdicts come from :func:`controlplane.api.authorize`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from agent.identities import Identities, label_of
from agent.mesh import Mesh, is_ipv4
from agent.networks import Compiler, Networks
from agent.verdicts import Verdicts, verdicts
from controlplane.api import Action, Authorization, Rule, Service, ServicePort, Workload


@dataclass(frozen=True, slots=True)
class Peer:
    """Who has an address."""

    uid: str
    local: bool  #: on this node, and judged by this agent if it is enrolled
    enrolled: bool
    identity: int
    zone: int = 0  #: its number, for the accounts; 0 is unknown


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """Where connections to one (service address, port) go. ``backends`` are (address, port), sorted."""

    service: str  #: ``NAMESPACE/NAME``
    l7: bool
    backends: tuple[tuple[str, int], ...]
    affinity: int = 0  #: seconds for which a client keeps its backend; 0 is not at all


@dataclass(frozen=True, slots=True)
class Tables:
    """Everything that follows from the state; IPv4 only, addresses as dotted text."""

    peers: Mapping[str, Peer]  #: by address
    services: Mapping[tuple[str, int], ServiceEntry]  #: by (service address, port)
    policies: Mapping[str, Verdicts]  #: by UID of an enrolled pod that is attached on this node
    networks: Mapping[str, Networks]  #: the same; without those that no NetworkPolicy selects
    identities: Mapping[str, int]  #: number by UID, of every workload


EMPTY = Tables({}, {}, {}, {}, {})


def compile_tables(
    mesh: Mesh,
    *,
    node: str,
    attached: Mapping[str, tuple[str, ...]],
    numbers: Identities,
    host: Collection[str] = (),
) -> Tables:
    """Compile.

    :param attached: the pods whose namespaces this agent holds: UID to addresses, as the container runtime gave them.
    :param numbers: the numbering, which grows by what is new.
    :param host: addresses of the node itself, beside those that the controller knows.
    """
    numbered = {uid: numbers.number(label_of(mesh.workloads[uid])) for uid in sorted(mesh.workloads)}
    return Tables(
        peers=_peers(mesh, node, attached, numbered, numbers),
        services=_services(mesh, node),
        policies=_policies(mesh, attached, numbers),
        networks=_networks(mesh, node, attached, host),
        identities=numbered,
    )


def _peers(
    mesh: Mesh,
    node: str,
    attached: Mapping[str, tuple[str, ...]],
    numbered: Mapping[str, int],
    numbers: Identities,
) -> dict[str, Peer]:
    peers: dict[str, Peer] = {}
    rank: dict[str, tuple[bool, bool, str]] = {}
    for uid, workload in mesh.workloads.items():
        # While a pod ends and its address is given away, two have it for a moment: the one that is ready, then any
        # fixed order. An enrolled one is preferred, because the doubt costs a refusal there, not a pass.
        order = (workload.ready, workload.enrolled, uid)
        zone = numbers.zone(workload.zone)
        for address in workload.addresses:
            if is_ipv4(address) and (address not in rank or order > rank[address]):
                rank[address] = order
                # An enrolled pod of this node that is not attached has nobody who would judge at its end: it counts
                # as remote, and who dials it has to find a node proxy there.
                local = workload.node == node and not workload.enrolled
                peers[address] = Peer(uid, local, workload.enrolled, numbered[uid], zone)
    # On this node the runtime knows first and for certain who has an address.
    for uid, addresses in attached.items():
        known = mesh.workloads.get(uid)
        for address in addresses:
            if not is_ipv4(address):
                continue
            if known is None:
                peers.pop(address, None)
            else:
                peers[address] = Peer(uid, True, known.enrolled, numbered[uid], numbers.zone(known.zone))
    return peers


def _services(mesh: Mesh, node: str) -> dict[tuple[str, int], ServiceEntry]:
    entries: dict[tuple[str, int], ServiceEntry] = {}
    for key in sorted(mesh.services):
        service = mesh.services[key]
        for port in service.ports:
            if port.protocol != "TCP":
                continue
            backends = _backends(service, port, node)
            entry = ServiceEntry(key, port.l7, backends, service.session_affinity)
            for address in service.addresses:
                if is_ipv4(address):
                    # Two services with one address are a fault of the source; the first by name has it.
                    entries.setdefault((address, port.port), entry)
    return entries


def _backends(service: Service, port: ServicePort, node: str) -> tuple[tuple[str, int], ...]:
    """The endpoints for clients of this node. With ``internalTrafficPolicy: Local`` no other node's, even if there is none.

    Those that end take new connections only where no other does, as with kube-proxy (KEP-1669).
    """
    endpoints = [e for e in port.endpoints if is_ipv4(e.address)]
    if service.internal_local:
        endpoints = [e for e in endpoints if e.node == node]
    living = [e for e in endpoints if not e.terminating]
    return tuple(sorted({(e.address, e.port) for e in living or endpoints}))


def _policies(
    mesh: Mesh, attached: Mapping[str, tuple[str, ...]], numbers: Identities
) -> dict[str, Verdicts]:
    # Of the whole mesh: datagrams of another node's pods are judged by who has their source's address. One that is attached and
    # not enrolled may have been: what it opened then goes on.
    known = {w.identity for uid, w in mesh.workloads.items() if w.enrolled or uid in attached}
    # Also numbers that were a workload's before its labels changed: connections from then still carry them.
    clients = numbers.principals(known)
    tables: dict[str, Verdicts] = {}
    # Most pods share their policies with others: one table for all of them.
    shared: dict[tuple[object, ...], Verdicts] = {}
    for uid in attached:
        workload = mesh.workloads.get(uid)
        if workload is None or not workload.enrolled:
            continue
        key = (workload.policies, workload.mtls, workload.port_mtls)
        if key not in shared:
            shared[key] = verdicts(workload, policies_of(mesh, workload), clients)
        tables[uid] = shared[key]
    return tables


def _networks(
    mesh: Mesh, node: str, attached: Mapping[str, tuple[str, ...]], host: Collection[str]
) -> dict[str, Networks]:
    here = {address for info in mesh.config.nodes if info.name == node for address in info.addresses}
    compiler = Compiler(mesh, here | set(host))
    tables: dict[str, Networks] = {}
    for uid in attached:
        workload = mesh.workloads.get(uid)
        if workload is not None and workload.enrolled and workload.network_policies:
            tables[uid] = compiler.networks(workload)
    return tables


def policies_of(mesh: Mesh, workload: Workload) -> tuple[Authorization, ...]:
    """The policies that select a workload. One that is named but not there refuses everything: the doubt is no pass."""
    found = []
    for key in workload.policies:
        policy = mesh.authorizations.get(key)
        if policy is None:
            namespace, _, name = key.partition("/")
            policy = Authorization(namespace, name, Action.DENY, (Rule(),))
        found.append(policy)
    return tuple(found)
