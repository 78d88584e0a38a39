"""Compiles mTLS mode and AuthorizationPolicy into a workload's table of verdicts.

Owns that the table says what :func:`controlplane.api.authorize` says, of every identity, port and address. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bpf.wire import IDENTITY_FIRST, IDENTITY_MESH, IDENTITY_PLAIN, IDENTITY_PROBE, IDENTITY_TUNNEL
from controlplane.api import Authorization, MtlsMode, Workload, authorize

#: In a policy table: every port that has no entry of its own.
ANY_PORT = 0
#: The class of addresses that are in no block of the policies.
NO_CLASS = 0

#: (identity, port), or (identity, port, class of the source's address), to whether it may come. What has no entry is refused.
#: What the node proxy delivers is not in it: it was judged there.
PolicyTable = Mapping[tuple[int, ...], bool]

#: Whoever that is: for policies that tell no workload from another.
_ANYBODY = "cluster.local/ns/any/sa/any"

_Block = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Of one workload. ``classes``: the longest of these blocks that an address is in gives its class."""

    table: PolicyTable
    classes: Mapping[str, int] = field(default_factory=dict)


def tells_workloads_apart(policies: Iterable[Authorization]) -> bool:
    """Whether the verdict may hang on who connects, beside whether it is somebody of the mesh."""
    return any(
        source.principals or source.not_principals or source.namespaces or source.not_namespaces
        for policy in policies
        for rule in policy.rules
        for source in rule.sources
    )


def verdicts(workload: Workload, policies: Iterable[Authorization], clients: Mapping[int, str]) -> Verdicts:
    """Every verdict on what comes to one workload.

    :param clients: principal by number, of each identity of the mesh (asked about only if the policies tell them apart).

    An entry for a port stands only where it differs from that of the same identity for any port, and no entry is a refusal.
    """
    policies = tuple(policies)
    ports = (ANY_PORT, *sorted(mentioned_ports(workload, policies)))
    mtls = dict(workload.port_mtls)
    blocks = _blocks(policies)
    classes = {str(block): number for number, block in enumerate(blocks, 1)}
    table: dict[tuple[int, ...], bool] = {}

    def enter(identity: int, number: int, of_port: Mapping[int, bool]) -> None:
        rest = of_port[ANY_PORT]
        suffix = (number,) if number else ()
        if rest:
            table[(identity, ANY_PORT, *suffix)] = True
        for port in ports:
            if of_port[port] != rest:
                table[(identity, port, *suffix)] = of_port[port]

    apart = tells_workloads_apart(policies)
    for number, block in enumerate((None, *blocks)):
        address = _address_in(block, blocks)
        if blocks and address is None:
            continue  # every address of it is in a smaller block
        by_principal: dict[str | None, dict[int, bool]] = {}
        for identity, principal in sorted(clients.items()) if apart else ((IDENTITY_MESH, _ANYBODY),):
            if principal not in by_principal:
                # No rule can name port 0, so its verdict is that of every port that no rule names.
                by_principal[principal] = {
                    port: authorize(policies, principal, port, address).allowed for port in ports
                }
            enter(identity, number, by_principal[principal])
        plain = {
            port: mtls.get(port, workload.mtls) is MtlsMode.PERMISSIVE
            and authorize(policies, None, port, address).allowed
            for port in ports
        }
        enter(IDENTITY_PLAIN, number, plain)
    enter(IDENTITY_PROBE, NO_CLASS, dict.fromkeys(ports, True))
    return Verdicts(table, classes)


def mentioned_ports(workload: Workload, policies: Iterable[Authorization]) -> set[int]:
    """The ports whose verdict may differ from that of all others."""
    ports = {port for port, _ in workload.port_mtls}
    for policy in policies:
        for rule in policy.rules:
            for operation in rule.operations:
                ports.update(operation.ports, operation.not_ports)
    return {port for port in ports if 1 <= port <= 65535}


def _blocks(policies: Iterable[Authorization]) -> list[_Block]:
    texts = {
        block
        for policy in policies
        for rule in policy.rules
        for source in rule.sources
        for block in (*source.ip_blocks, *source.not_ip_blocks)
    }
    return [ipaddress.ip_network(text) for text in sorted(texts)]


def _address_in(block: _Block | None, blocks: Iterable[_Block]) -> str | None:
    """An address for which ``block`` is the longest one; with None, one in no block; None when there is none."""
    outers: list[_Block] = [ipaddress.ip_network("::/0"), ipaddress.ip_network("0.0.0.0/0")]
    if block is not None:
        outers = [block]
    for outer in outers:
        inner = [b for b in blocks if b != block and b.version == outer.version]
        inner = [b for b in inner if b.subnet_of(outer)]  # type: ignore[arg-type]
        number = int(outer.network_address)
        last = int(outer.broadcast_address)
        while number <= last:
            address = ipaddress.ip_address(number) if outer.version == 4 else ipaddress.IPv6Address(number)
            within = [b for b in inner if address in b]
            if not within:
                return str(address)
            number = max(int(b.broadcast_address) for b in within) + 1
    return None


def allowed(found: Verdicts | PolicyTable, identity: int, port: int, address: str | None = None) -> bool:
    """The verdict that the kernel gives by this table."""
    table, classes = (found.table, found.classes) if isinstance(found, Verdicts) else (found, {})
    if identity == IDENTITY_TUNNEL:
        return True
    number: tuple[int, ...] = ()
    if classes and address is not None and identity != IDENTITY_PROBE:
        asked = ipaddress.ip_address(address)
        within = [ipaddress.ip_network(b) for b in classes]
        longest = max((b for b in within if asked in b), key=lambda b: b.prefixlen, default=None)
        number = (classes[str(longest)],) if longest is not None else ()
    if identity >= IDENTITY_FIRST and any(key[0] == IDENTITY_MESH for key in table):
        identity = IDENTITY_MESH
    verdict = table.get((identity, port, *number))
    return table.get((identity, ANY_PORT, *number), False) if verdict is None else verdict
