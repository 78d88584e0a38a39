"""Compiles NetworkPolicy into what the kernel reads: classes of addresses, and the ports that each class may use.

Owns that the tables say what :func:`controlplane.api.permits` says. Pure. A pod is isolated in a direction only if a policy
speaks of it; its own node is always allowed to speak to it, and it to its node.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from agent.kernel.model import Network
from agent.mesh import Mesh
from controlplane.api import NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule, Workload
from controlplane.api.network import Direction, NamedPorts, refusing

#: (protocol, first port, last port); protocol 0 is all of them.
Allowed = frozenset[tuple[int, int, int]]

_EVERYTHING: Allowed = frozenset({(0, 0, 65535)})
_PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}


@dataclass(frozen=True, slots=True)
class Networks:
    """Of one pod; None: not isolated."""

    ingress: Network | None = None
    egress: Network | None = None


OPEN = Networks()


class Compiler:
    """For the pods of one node in one state of the mesh; what pods have in common is compiled once."""

    def __init__(self, mesh: Mesh, host: Collection[str]) -> None:
        """``host``: the node's own addresses."""
        self._mesh = mesh
        self._host = host
        self._members: dict[str, list[Workload]] = {}
        self._naming: list[Workload] = []
        self._done: dict[tuple[object, ...], Networks] = {}
        if mesh.network_policies:
            for uid in sorted(mesh.workloads):
                workload = mesh.workloads[uid]
                if workload.named_ports and not workload.host_network:
                    self._naming.append(workload)
                for group in workload.groups:
                    self._members.setdefault(group, []).append(workload)

    def networks(self, workload: Workload) -> Networks:
        """A policy that is named and not there refuses everything: the doubt is no pass."""
        if not workload.network_policies:
            return OPEN
        key = (workload.network_policies, workload.named_ports)
        found = self._done.get(key)
        if found is None:
            policies = [self._mesh.network_policies.get(k) or refusing(k) for k in workload.network_policies]
            found = self._done[key] = Networks(
                self._network(policies, Direction.INGRESS, workload),
                self._network(policies, Direction.EGRESS, workload),
            )
        return found

    def _network(
        self, policies: Iterable[NetworkPolicy], direction: Direction, workload: Workload
    ) -> Network | None:
        spoken = [some for policy in policies if (some := policy.rules(direction)) is not None]
        if not spoken:
            return None
        rules = [rule for some in spoken for rule in some]
        peers = [peer for rule in rules for peer in rule.peers]
        blocks = sorted({b for peer in peers if peer.cidr for b in (peer.cidr, *peer.excepts)})
        # What the server calls its ports: at our end, or at each other one.
        ours: NamedPorts = workload.named_ports if direction is Direction.INGRESS else ()
        numbers: dict[Allowed, int] = {}

        def number(groups: Collection[str], within: Collection[str], named: NamedPorts) -> int:
            allowed = _allowed(rules, groups, within, ours or named)
            return numbers.setdefault(allowed, len(numbers))

        number((), (), ())  # class 0
        networks = {block: ipaddress.ip_network(block) for block in blocks}
        classes = {
            block: number((), _containing(network, networks), ()) for block, network in networks.items()
        }
        for other in self._others(direction, peers, rules):
            for address in other.addresses:
                host = ipaddress.ip_network(address)
                named: NamedPorts = other.named_ports if direction is Direction.EGRESS else ()
                classes[str(host)] = number(other.groups, _containing(host, networks), named)
        always = numbers.setdefault(_EVERYTHING, len(numbers))
        for address in self._host:
            classes[str(ipaddress.ip_network(address))] = always
        return Network(classes, {n: allowed for allowed, n in numbers.items()})

    def _others(
        self, direction: Direction, peers: Iterable[NetworkPeer], rules: Iterable[NetworkRule]
    ) -> Iterable[Workload]:
        """Pods that an address block alone does not tell apart."""
        found: dict[str, Workload] = {}
        for group in sorted({peer.group for peer in peers if peer.group}):
            found.update((workload.uid, workload) for workload in self._members.get(group, ()))
        if direction is Direction.EGRESS and any(port.name for rule in rules for port in rule.ports):
            found.update((workload.uid, workload) for workload in self._naming)
        # An address that two pods have for a moment: the one that is ready, then any fixed order.
        return sorted(found.values(), key=lambda workload: (workload.ready, workload.uid))


def _containing(
    inner: ipaddress.IPv4Network | ipaddress.IPv6Network,
    blocks: Mapping[str, ipaddress.IPv4Network | ipaddress.IPv6Network],
) -> frozenset[str]:
    return frozenset(
        text
        for text, outer in blocks.items()
        if outer.version == inner.version and inner.subnet_of(outer)  # type: ignore[arg-type]
    )


def _allowed(
    rules: Iterable[NetworkRule], groups: Collection[str], within: Collection[str], named: NamedPorts
) -> Allowed:
    found: set[tuple[int, int, int]] = set()
    for rule in rules:
        if rule.peers and not any(_matches(peer, groups, within) for peer in rule.peers):
            continue
        if not rule.ports:
            return _EVERYTHING
        for port in rule.ports:
            found.update(_ports(port, named))
    return frozenset(found)


def _matches(peer: NetworkPeer, groups: Collection[str], within: Collection[str]) -> bool:
    if peer.group:
        return peer.group in groups
    return peer.cidr in within and not any(block in within for block in peer.excepts)


def _ports(wanted: NetworkPort, named: NamedPorts) -> Iterable[tuple[int, int, int]]:
    protocol = _PROTOCOLS.get(wanted.protocol, 0)
    if not protocol:
        return ()
    if wanted.name:
        return [
            (protocol, number, number)
            for name, spoken, number in named
            if (name, spoken) == (wanted.name, wanted.protocol)
        ]
    if not wanted.port:
        return [(protocol, 0, 65535)]
    return [(protocol, wanted.port, wanted.end_port or wanted.port)]
