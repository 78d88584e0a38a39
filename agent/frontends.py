"""Compiles services into frontends: where what a pod sends to one (address, port, protocol) goes.

Owns which addresses a service is reached at from pods of this node (cluster addresses, external ones, node ports) and which of
its endpoints are its backends there. Pure. What was compiled of a service that is still the same object is taken over, so that a
change costs what has changed, and what many tables have in common is there once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from agent.kernel.model import Backend, Frontend
from bpf.wire import Protocol
from controlplane.api import Endpoint, Service, ServicePort

#: The address that stands for every node's, by family: node ports stand under it once.
ANY_NODE = {4: "0.0.0.0", 6: "::"}

_PROTOCOLS = {"TCP": Protocol.TCP, "UDP": Protocol.UDP}


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """What the kernel has of one frontend. ``backends`` are sorted."""

    service: str  #: ``NAMESPACE/NAME``
    #: Connections go to l7proxy, told to be for the one backend, if there is any: the service's own address.
    l7: bool
    backends: tuple[Backend, ...]
    affinity: int = 0  #: seconds for which a client keeps its backend; 0 is not at all


@dataclass(frozen=True, slots=True)
class Frontends:
    """``by_service``: of each service (by key) what it was compiled from, and its entries, in the order of its fields."""

    entries: Mapping[Frontend, ServiceEntry] = field(default_factory=dict)
    by_service: Mapping[str, tuple[Service, Mapping[Frontend, ServiceEntry]]] = field(default_factory=dict)
    node: str = ""

    @property
    def l7(self) -> bool:
        """Whether any of them goes to l7proxy."""
        return any(entry.l7 for entry in self.entries.values())


def compile_frontends(services: Mapping[str, Service], node: str, before: Frontends) -> Frontends:
    """Compile.

    :param services: by key.
    :param node: this one's name.
    :param before: what was compiled before, of any services; it changes no result.
    """
    by_service: dict[str, tuple[Service, Mapping[Frontend, ServiceEntry]]] = {}
    entries: dict[Frontend, ServiceEntry] = {}
    for key in sorted(services):
        service = services[key]
        known = before.by_service.get(key) if before.node == node else None
        if known is None or known[0] is not service:
            known = (service, _of_service(key, service, node, known[1] if known is not None else {}))
        by_service[key] = known
        for frontend, entry in known[1].items():
            # Two services with one address are a fault of the source; the first by name has it.
            entries.setdefault(frontend, entry)
    return Frontends(MappingProxyType(entries), MappingProxyType(by_service), node)


def _of_service(
    key: str, service: Service, node: str, before: Mapping[Frontend, ServiceEntry]
) -> dict[Frontend, ServiceEntry]:
    entries: dict[Frontend, ServiceEntry] = {}
    had: dict[Backend, Backend] = {
        backend: backend for entry in before.values() for backend in entry.backends
    }

    def enter(frontend: Frontend, l7: bool, backends: tuple[Backend, ...]) -> None:
        entry = ServiceEntry(key, l7, backends, service.session_affinity)
        # Equal ones are the same, so that who compares needs not look into them.
        known = before.get(frontend)
        entries.setdefault(frontend, known if known == entry else entry)

    for port in service.ports:
        protocol = _PROTOCOLS.get(port.protocol)
        if protocol is None:
            continue
        l7 = port.l7 and protocol is Protocol.TCP
        for family in (4, 6):
            own = [address for address in service.addresses if family_of(address) == family]
            external = [a for a in service.external_addresses if family_of(a) == family]
            if not own and not external:
                continue
            here, anywhere = (
                tuple(had.setdefault(backend, backend) for backend in backends)
                for backends in _backends(service, port, node, family)
            )
            for address in own:
                enter(Frontend(address, port.port, protocol), l7, () if l7 else here)
            # l7proxy knows the service by its own address.
            outside = (Backend(own[0], port.port),) if l7 and own else anywhere
            for address in external:
                enter(Frontend(address, port.port, protocol), l7 and bool(own), outside)
            if port.node_port and own:
                enter(Frontend(ANY_NODE[family], port.node_port, protocol), l7, outside)
    return entries


def _backends(
    service: Service, port: ServicePort, node: str, family: int
) -> tuple[Iterable[Backend], Iterable[Backend]]:
    """The backends for clients of this node at the service's own addresses, and at all others.

    With ``internalTrafficPolicy: Local`` the first are no other node's, even if there is none. Where a policy is for traffic from
    outside, a pod of the cluster gets any endpoint, as from kube-proxy.
    """
    endpoints = [e for e in port.endpoints if family_of(e.address) == family and e.weight > 0]
    anywhere = _living(endpoints)
    if not service.internal_local:
        return anywhere, anywhere
    return _living(e for e in endpoints if e.node == node), anywhere


def _living(endpoints: Iterable[Endpoint]) -> list[Backend]:
    """Those that end take new connections only where no other does, as with kube-proxy (KEP-1669)."""
    endpoints = list(endpoints)
    living = [e for e in endpoints if not e.terminating]
    found = {(e.address, e.port): e.weight for e in living or endpoints}
    return [Backend(address, port, weight) for (address, port), weight in sorted(found.items())]


def family_of(address: str) -> int:
    """4 or 6; ``address`` is known to be an address."""
    return 6 if ":" in address else 4
