"""What the controller says of the mesh: workloads by UID and address, policies, services, trust.

Owns the last good state and the verdicts that follow from it. Nothing here waits or talks: updates are applied whole, on the
data loop's thread, and whoever is concerned by a change is told afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from agent.api import LINGER
from common import logs, spiffe
from controlplane.api import (
    Authorization,
    Direction,
    MeshConfig,
    NamedPorts,
    NetworkPolicy,
    Resource,
    ResourceError,
    Service,
    Update,
    Workload,
    authorize,
    permits,
    refusing,
    resource_key,
)
from nodeproxy.tls import Trust, load_roots

_log = logs.get(__name__)

#: Seconds that a node may need until it has taken a running pod into the mesh, or let one go.
PASSAGE = 10.0


class Mesh:
    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """``now`` in seconds of any clock."""
        self._now = now
        self._passages: dict[str, float] = {}  # when a running pod joined or left, by UID
        self.synced = False  #: a complete update has been applied
        self.version = ""
        self.trust: Trust | None = None
        self.workloads: dict[str, Workload] = {}
        self._authorizations: dict[str, Authorization] = {}
        self._network_policies: dict[str, NetworkPolicy] = {}
        self._services: dict[str, Service] = {}
        self._at: dict[str, dict[str, Workload]] = {}
        self._service_at: dict[tuple[str, int], Service] = {}

    def apply(self, update: Update) -> tuple[ResourceError, ...]:
        """Put an update in force, except for what is returned: of that the last good state stays."""
        errors: list[ResourceError] = []
        if update.complete:
            keep = {resource_key(resource) for resource in update.upserts}
            for key in [k for k in self._keys() if k not in keep]:
                self._remove(key)
        for key in update.removes:
            self._remove(key)
        for resource in update.upserts:
            try:
                self._upsert(resource)
            except (ValueError, spiffe.SpiffeError) as error:
                errors.append(ResourceError(resource_key(resource), str(error)))
        self._service_at = {
            (address, port.port): service
            for service in self._services.values()
            for address in (*service.external_addresses, *service.addresses)
            for port in service.ports
            if port.protocol == "TCP"
        }
        self.synced = self.synced or update.complete
        # With an error the state is not the snapshot's: on reconnect it has to come again.
        self.version = "" if errors else update.version
        return tuple(errors)

    def _keys(self) -> list[str]:
        return [
            *(f"workload/{uid}" for uid in self.workloads),
            *(f"authorization/{key}" for key in self._authorizations),
            *(f"network/{key}" for key in self._network_policies),
            *(f"service/{key}" for key in self._services),
        ]

    def _upsert(self, resource: Resource) -> None:
        match resource:
            case Workload():
                spiffe.parse(resource.identity)
                known = self.workloads.get(resource.uid)
                # To whom all is new, all may be new: the mesh itself may be younger than its pods.
                was_enrolled = known.enrolled if known is not None else self.synced and resource.enrolled
                if resource.enrolled is not was_enrolled:
                    self._passages[resource.uid] = self._now()
                self._remove_workload(resource.uid)
                self.workloads[resource.uid] = resource
                for address in resource.addresses:
                    self._at.setdefault(address, {})[resource.uid] = resource
            case Authorization():
                self._authorizations[f"{resource.namespace}/{resource.name}"] = resource
            case Service():
                self._services[f"{resource.namespace}/{resource.name}"] = resource
            case NetworkPolicy():
                self._network_policies[f"{resource.namespace}/{resource.name}"] = resource
            case MeshConfig():
                self._set_trust(resource)

    def _set_trust(self, config: MeshConfig) -> None:
        spiffe.check_trust_domain(config.trust_domain)
        roots = load_roots(config.roots)
        if not roots:
            raise ValueError("mesh: no root certificates")
        if self.trust is None or (self.trust.trust_domain, self.trust.roots) != (config.trust_domain, roots):
            self.trust = Trust(config.trust_domain, roots)

    def _remove(self, key: str) -> None:
        kind, _, name = key.partition("/")
        if kind == "workload":
            self._remove_workload(name)
        elif kind == "authorization":
            self._authorizations.pop(name, None)
        elif kind == "network":
            self._network_policies.pop(name, None)
        elif kind == "service":
            self._services.pop(name, None)

    def _remove_workload(self, uid: str) -> None:
        old = self.workloads.pop(uid, None)
        for address in old.addresses if old else ():
            holders = self._at.get(address, {})
            holders.pop(uid, None)
            if not holders:
                self._at.pop(address, None)

    def at(self, address: str) -> Workload | None:
        """The workload of an address. Of several (an old pod not yet removed) the enrolled and the latest one."""
        holders = self._at.get(address)
        if not holders:
            return None
        enrolled = [w for w in holders.values() if w.enrolled]
        return (enrolled or list(holders.values()))[-1]

    def in_passage(self, uid: str) -> bool:
        """Whether a pod joined or left so lately that its node may not have followed yet."""
        began = self._passages.get(uid)
        if began is not None and self._now() - began > PASSAGE:
            del self._passages[uid]
            began = None
        return began is not None

    def is_reached_by_mesh(self, workload: Workload) -> bool:
        """Whether it is dialled by a tunnel: one that has just left is, as its own node may not know it yet."""
        left = self._passages.get(workload.uid)
        return workload.enrolled or (left is not None and self._now() - left < LINGER)

    def service_at(self, address: str, port: int) -> Service | None:
        return self._service_at.get((address, port))

    def refuses(self, workload: Workload, principal: str, address: str, port: int) -> str:
        """Why a client may not connect to a workload's own port; empty if it may. A policy that is not known refuses.

        :param principal: the client's SPIFFE ID without ``spiffe://``.
        :param address: the client's, as the kernel sees it; whose it is was verified.
        """
        policies = []
        for key in workload.policies:
            policy = self._authorizations.get(key)
            if policy is None:
                _log.error("policy refuses because it is missing", workload=workload.name, policy=key)
                return f"policy {key}"
            policies.append(policy)
        verdict = authorize(policies, principal, port, address)
        if not verdict.allowed:
            return f"policy {verdict.policy}" if verdict.policy else "no policy allows it"
        client = self.at(address)
        if client is not None and client.uid == workload.uid:
            return ""
        return self._network_refuses(Direction.INGRESS, workload, client, address, port, workload.named_ports)

    def refuses_egress(self, workload: Workload, address: str, port: int) -> str:
        """Why a workload may not connect to an endpoint; empty if it may. The endpoint's own side judges by itself."""
        other = self.at(address)
        if other is not None and other.uid == workload.uid:
            return ""
        named = other.named_ports if other else ()
        return self._network_refuses(Direction.EGRESS, workload, other, address, port, named)

    def _network_refuses(
        self,
        direction: Direction,
        workload: Workload,
        other: Workload | None,
        address: str,
        port: int,
        named_ports: NamedPorts,
    ) -> str:
        verdict = permits(
            [self._network_policies.get(key) or refusing(key) for key in workload.network_policies],
            direction,
            groups=other.groups if other else (),
            address=address,
            protocol="TCP",
            port=port,
            named_ports=named_ports,
        )
        return "" if verdict.allowed else f"NetworkPolicy {verdict.policy} ({direction.value})"
