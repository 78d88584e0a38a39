"""Kubernetes NetworkPolicy: the model, and the one function that judges a connection by it.

Semantics are those of networking.k8s.io/v1. A pod is isolated in a direction as soon as one policy that selects it speaks of that
direction; isolated, it takes (or makes) only what some rule of some policy allows. Policies add up, none takes away. Ports are
the pods' own, after service translation. What no mesh changes is not judged here and always allowed: a pod's connections to
itself, and its own node's (kubelet's) to it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable

import msgspec

from controlplane.api.addresses import in_blocks
from controlplane.api.authorization import Verdict

#: (name, protocol, number) each.
NamedPorts = tuple[tuple[str, str, int], ...]


class Direction(enum.Enum):
    """As the selected pod sees it."""

    INGRESS = "Ingress"
    EGRESS = "Egress"


class NetworkPeer(msgspec.Struct, frozen=True):
    """Who may be at the other end: the pods of a group, or the addresses of a block."""

    group: str = ""  #: pods that have this in ``Workload.groups``
    cidr: str = ""
    excepts: tuple[str, ...] = ()  #: blocks within ``cidr`` that are not meant


class NetworkPort(msgspec.Struct, frozen=True):
    """``port``, or ``port`` to ``end_port``, or what the destination calls ``name``; none of them: every port."""

    protocol: str = "TCP"
    port: int = 0
    end_port: int = 0
    name: str = ""  #: looked up in the destination's ``Workload.named_ports``; nothing that is no pod has any


class NetworkRule(msgspec.Struct, frozen=True):
    """Allows what matches one of the peers (none given: anybody) and one of the ports (none given: every port and protocol)."""

    peers: tuple[NetworkPeer, ...] = ()
    ports: tuple[NetworkPort, ...] = ()


class NetworkPolicy(msgspec.Struct, frozen=True, tag="network"):
    """One NetworkPolicy. Which workloads it selects stands in ``Workload.network_policies``.

    None: it does not speak of that direction. No rules: it isolates, and allows nothing.
    """

    namespace: str
    name: str
    ingress: tuple[NetworkRule, ...] | None = None
    egress: tuple[NetworkRule, ...] | None = None

    def rules(self, direction: Direction) -> tuple[NetworkRule, ...] | None:
        return self.ingress if direction is Direction.INGRESS else self.egress


def refusing(key: str) -> NetworkPolicy:
    """What stands in for a policy (``NAMESPACE/NAME``) that selects a workload and is not there: the doubt is no pass."""
    namespace, _, name = key.partition("/")
    return NetworkPolicy(namespace, name, (), ())


def permits(
    policies: Iterable[NetworkPolicy],
    direction: Direction,
    *,
    groups: Collection[str],
    address: str | None,
    protocol: str,
    port: int,
    named_ports: NamedPorts = (),
) -> Verdict:
    """Judge one connection, or datagram, at one of its ends.

    :param policies: those that select the pod at this end, in any order.
    :param groups: of the pod at the other end; none where it is no pod, or one on its node's network.
    :param address: of the other end; None: not known, which is in no block.
    :param protocol: ``TCP``, ``UDP``, ``SCTP``; anything else is allowed by rules without ports only.
    :param port: the destination's own (ignored where the protocol has none).
    :param named_ports: the destination's.
    :returns: with the policy that allows, or the first of those that isolate.
    """
    isolating = ""
    for policy in policies:
        rules = policy.rules(direction)
        if rules is None:
            continue
        key = f"{policy.namespace}/{policy.name}"
        isolating = isolating or key
        for rule in rules:
            if _peers_match(rule, groups, address) and _ports_match(rule, protocol, port, named_ports):
                return Verdict(True, key)
    return Verdict(not isolating, isolating)


def _peers_match(rule: NetworkRule, groups: Collection[str], address: str | None) -> bool:
    return not rule.peers or any(_peer_matches(peer, groups, address) for peer in rule.peers)


def _peer_matches(peer: NetworkPeer, groups: Collection[str], address: str | None) -> bool:
    if peer.group:
        return peer.group in groups
    # A pod's address in a block is meant as any other.
    return address is not None and in_blocks(address, (peer.cidr,)) and not in_blocks(address, peer.excepts)


def _ports_match(rule: NetworkRule, protocol: str, port: int, named_ports: NamedPorts) -> bool:
    return not rule.ports or any(_port_matches(p, protocol, port, named_ports) for p in rule.ports)


def _port_matches(wanted: NetworkPort, protocol: str, port: int, named_ports: NamedPorts) -> bool:
    if wanted.protocol != protocol:
        return False
    if wanted.name:
        return (wanted.name, protocol, port) in named_ports
    return not wanted.port or wanted.port <= port <= (wanted.end_port or wanted.port)
