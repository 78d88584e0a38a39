"""Compiles the mesh's state into the tables that the kernel reads.

Owns which pods, peers, services and verdicts a node's kernel has to know. Pure: no I/O, no kernel, no clock; the same input
gives the same tables, so that only differences are written. Verdicts come from :func:`controlplane.api.authorize`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from agent.frontends import Frontends, compile_frontends
from agent.identities import Identities, label_of
from agent.mesh import Mesh
from agent.networks import Compiler, Networks
from agent.verdicts import Verdicts, verdicts
from bpf.wire import IDENTITY_PLAIN
from controlplane.api import Action, Authorization, Rule, Workload


@dataclass(frozen=True, slots=True)
class Peer:
    """Who has an address."""

    uid: str
    local: bool  #: on this node, and judged by this agent if it is enrolled
    enrolled: bool
    identity: int
    zone: int = 0  #: its number, for the accounts; 0 is unknown
    leaving: bool = False  #: of another node, has just left the mesh, and is dialled by it still
    node: bool = False  #: a node, at which node ports are dialled


@dataclass(frozen=True, slots=True)
class Tables:
    """Everything that follows from the state; addresses as canonical text."""

    peers: Mapping[str, Peer]  #: by address
    frontends: Frontends
    policies: Mapping[str, Verdicts]  #: by UID of an enrolled pod that is attached on this node
    networks: Mapping[str, Networks]  #: the same; without those that no NetworkPolicy selects
    identities: Mapping[str, int]  #: number by UID, of every workload


EMPTY = Tables({}, Frontends(), {}, {}, {})


def compile_tables(
    mesh: Mesh,
    *,
    node: str,
    attached: Mapping[str, tuple[str, ...]],
    numbers: Identities,
    host: Collection[str] = (),
    lingering: Collection[str] = (),
    before: Tables = EMPTY,
) -> Tables:
    """Compile.

    :param attached: the pods whose namespaces this agent holds: UID to addresses, as the container runtime gave them.
    :param numbers: the numbering, which grows by what is new.
    :param host: addresses of the node itself, beside those that the controller knows.
    :param lingering: UIDs of pods of other nodes that have left the mesh, and count as in it still.
    :param before: tables of an earlier state, of which is taken what is the same still.
    """
    numbered = {uid: numbers.number(label_of(mesh.workloads[uid])) for uid in sorted(mesh.workloads)}
    return Tables(
        peers=_peers(mesh, node, attached, numbered, numbers, lingering),
        frontends=compile_frontends(mesh.services, node, before.frontends),
        policies=_policies(mesh, attached, numbers, lingering),
        networks=_networks(mesh, node, attached, host),
        identities=numbered,
    )


def _peers(
    mesh: Mesh,
    node: str,
    attached: Mapping[str, tuple[str, ...]],
    numbered: Mapping[str, int],
    numbers: Identities,
    lingering: Collection[str],
) -> dict[str, Peer]:
    peers = _nodes(mesh, node, numbered, numbers)
    rank: dict[str, tuple[bool, bool, str]] = {}
    for uid, workload in mesh.workloads.items():
        # While a pod ends and its address is given away, two have it for a moment: the one that is ready, then any
        # fixed order. An enrolled one is preferred, because the doubt costs a refusal there, not a pass.
        if workload.host_network:
            continue
        order = (workload.ready, workload.enrolled, uid)
        zone = numbers.zone(workload.zone)
        for address in workload.addresses:
            if address not in rank or order > rank[address]:
                rank[address] = order
                # An enrolled pod of this node that is not attached has nobody who would judge at its end: it counts
                # as remote, and who dials it has to find a node proxy there.
                local = workload.node == node and not workload.enrolled
                leaving = uid in lingering
                enrolled = workload.enrolled or leaving
                peers[address] = Peer(uid, local, enrolled, numbered[uid], zone, leaving)
    # On this node the runtime knows first and for certain who has an address.
    for uid, addresses in attached.items():
        known = mesh.workloads.get(uid)
        for address in addresses:
            if known is None:
                peers.pop(address, None)
            else:
                peers[address] = Peer(uid, True, known.enrolled, numbered[uid], numbers.zone(known.zone))
    return peers


def _nodes(mesh: Mesh, node: str, numbered: Mapping[str, int], numbers: Identities) -> dict[str, Peer]:
    """The nodes' own addresses, which pods of their network have too. Known by name where that can be one pod's only."""
    peers: dict[str, Peer] = {}
    for info in mesh.config.nodes:
        for address in info.addresses:
            peers[address] = Peer(
                "", info.name == node, False, IDENTITY_PLAIN, numbers.zone(info.zone), node=True
            )
    dwellers: dict[str, set[tuple[str, str, int]]] = {}
    for uid, workload in mesh.workloads.items():
        if workload.host_network:
            for address in workload.addresses:
                dwellers.setdefault(address, set()).add((uid, workload.node, numbered[uid]))
    for address, found in dwellers.items():
        uid, where, _ = min(found)
        several = {number for _, _, number in found}
        identity = several.pop() if len(several) == 1 else IDENTITY_PLAIN
        zone = numbers.zone(mesh.workloads[uid].zone)
        peers[address] = Peer(uid, where == node, False, identity, zone, node=address in peers)
    return peers


def _policies(
    mesh: Mesh, attached: Mapping[str, tuple[str, ...]], numbers: Identities, lingering: Collection[str]
) -> dict[str, Verdicts]:
    # Of the whole mesh: datagrams of another node's pods are judged by who has their source's address. One that is attached and
    # not enrolled may have been: what it opened then goes on.
    known = {
        w.identity for uid, w in mesh.workloads.items() if w.enrolled or uid in attached or uid in lingering
    }
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
