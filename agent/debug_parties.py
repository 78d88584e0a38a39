"""Whom people mean: a pod, a service or an address by the names that ``kubectl`` and ``istioctl`` take.

Owns the forms of names and the errors that say what there is instead. Reads the mesh as the controller told it, and the book of
attached pods; no kernel.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.mesh import Mesh
from agent.pods import Sandbox
from common.admin import BadQueryError
from controlplane.api import Service, ServicePort, Workload

#: In place of a pod: processes of the node.
KUBELET = "kubelet"
HOST = "host"

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Party:
    """One end. ``workload`` is None for what is no pod that the controller knows, ``sandbox`` unless it runs on this node."""

    text: str
    addresses: tuple[str, ...]
    workload: Workload | None = None
    sandbox: Sandbox | None = None
    service: Service | None = None
    node: str = ""  #: where it is; empty when that is not known
    named: str = ""  #: the one of its addresses by which it was named, and which alone is meant

    @property
    def meant(self) -> tuple[str, ...]:
        return (self.named,) if self.named else self.addresses

    def address(self, like: str = "") -> str:
        """Its address of the family of another one (IPv4 without one, if it has any); empty when it has none."""
        if like:
            return next((a for a in self.meant if (":" in a) == (":" in like)), "")
        return self.meant[0] if self.meant else ""

    def shown(self) -> dict[str, Any]:
        found: dict[str, Any] = {"text": self.text, "addresses": list(self.addresses), "node": self.node}
        if self.workload is not None:
            found |= {
                "pod": f"{self.workload.namespace}/{self.workload.name}",
                "uid": self.workload.uid,
                "identity": self.workload.identity,
                "in_mesh": self.workload.enrolled,
            }
        if self.service is not None:
            found["service"] = f"{self.service.namespace}/{self.service.name}"
        return found


class Parties:
    """In one state of the node."""

    def __init__(self, mesh: Mesh, sandboxes: Mapping[int, Sandbox], owner: Callable[[str], str]) -> None:
        """``owner``: the UID of the pod that has an address, as the agent compiled it; or empty."""
        self._mesh = mesh
        self._sandboxes = sandboxes
        self._latest = tuple(reversed(tuple(sandboxes.values())))
        self._owner = owner

    def source(self, text: str) -> Party:
        """A pod (NAMESPACE/NAME, NAME.NAMESPACE, NAME, UID) or an address.

        :raises BadQueryError: it is nobody, or several are called so.
        """
        if (address := _address(text)) is not None:
            return self._at(text, address)
        return self._pod(text, "source")

    def destination(self, text: str) -> Party:
        """A service (NAME.NAMESPACE, its host), a pod, or an address.

        :raises BadQueryError: it is nobody, or several are called so.
        """
        if (address := _address(text)) is not None:
            return self._at(text, address)
        services = self._services(text)
        if len(services) == 1:
            service = services[0]
            if not service.addresses:
                ends = [e.address for port in service.ports for e in port.endpoints]
                raise BadQueryError(
                    f"destination {text}: service {service.namespace}/{service.name} is headless: name one of its endpoints"
                    + (f" ({_some(ends)})" if ends else ", of which it has none")
                )
            return Party(text, service.addresses, service=service)
        if services:
            raise BadQueryError(
                f"destination {text}: is the name of {_some(f'{s.namespace}/{s.name}' for s in services)}: say NAME.NAMESPACE"
            )
        return self._pod(text, "destination")

    def port(self, party: Party, text: str, protocol: str) -> int:
        """A number, or a service port's name.

        :raises BadQueryError: it is none.
        """
        if text.isdecimal():
            if not 1 <= int(text) <= 65535:
                raise BadQueryError(f"port {text}: not from 1 to 65535")
            return int(text)
        ports: Iterable[ServicePort] = party.service.ports if party.service is not None else ()
        for port in ports:
            if (port.name, port.protocol) == (text, protocol):
                return port.port
        names = _some(port.name for port in ports if port.name and port.protocol == protocol)
        raise BadQueryError(
            f"port {text}: no number, and no {protocol} port of {party.text} is called so"
            + (f"; there is {names}" if names else "")
        )

    def of_uid(self, uid: str, text: str, named: str = "") -> Party | None:
        workload = self._mesh.workloads.get(uid)
        sandbox = next((s for s in self._latest if s.uid == uid), None)
        if workload is None and sandbox is None:
            return None
        addresses = sandbox.addresses if sandbox is not None else workload.addresses if workload else ()
        where = workload.node if workload else ""
        return Party(text, tuple(addresses), workload, sandbox, node=where, named=named)

    def _at(self, text: str, address: str) -> Party:
        """Who has an address: a pod before a node, so that it is as in the kernel's tables."""
        for sandbox in self._latest:
            if address in sandbox.addresses:
                found = self.of_uid(sandbox.uid, text, address)
                if found is not None:
                    return found
        uid = self._owner(address)
        if uid and (found := self.of_uid(uid, text, address)) is not None:
            return found
        for info in self._mesh.config.nodes:
            if address in info.addresses:
                return Party(text, (address,), node=info.name)
        for service in self._mesh.services.values():
            if address in (*service.addresses, *service.external_addresses):
                return Party(text, (address,), service=service)
        return Party(text, (address,))

    def _pod(self, text: str, what: str) -> Party:
        if (found := self.of_uid(text, text)) is not None:
            return found
        names = {(w.namespace, w.name): uid for uid, w in sorted(self._mesh.workloads.items())}
        for sandbox in self._sandboxes.values():
            names.setdefault((sandbox.namespace, sandbox.name), sandbox.uid)
        namespace, slash, name = text.partition("/")
        # A pod's name may have dots: the whole text first, then the last part as the namespace.
        if slash:
            wanted = [(namespace, name)] if (namespace, name) in names else []
        else:
            wanted = [key for key in names if key[1] == text]
            if not wanted:
                name, _, namespace = text.rpartition(".")
                wanted = [(namespace, name)] if (namespace, name) in names else []
        if len(wanted) == 1:
            party = self.of_uid(names[wanted[0]], text)
            if party is not None:
                return party
        if wanted:
            raise BadQueryError(
                f"{what} {text}: pods of {_some(ns for ns, _ in wanted)} are called so: say NAMESPACE/NAME"
            )
        near = [f"{ns}/{n}" for ns, n in names if text.rpartition("/")[2] in n]
        kind = "pod" if what == "source" else "service or pod"
        raise BadQueryError(
            f"{what} {text}: no {kind} of that name is known to this node's agent"
            + (f"; there is {_some(near)}" if near else "")
        )

    def _services(self, text: str) -> list[Service]:
        wanted = text.removesuffix(".")
        found = []
        for service in self._mesh.services.values():
            short = f"{service.name}.{service.namespace}"
            forms = (service.host, short, f"{short}.svc", service.name, f"{service.namespace}/{service.name}")
            if wanted in forms:
                found.append(service)
        # A pod and a service of one name: the service is what applications dial by it.
        return found


def _address(text: str) -> str | None:
    try:
        found = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
    if getattr(found, "scope_id", None):
        return None  # of one interface only: no table has such
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)


def _some(texts: Iterable[str]) -> str:
    """At most a few of them."""
    found = list(dict.fromkeys(texts))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
