"""What the controller has told this node: workloads, services, authorizations, as one immutable state.

Owns the application of updates, whole or in part, and the check of each resource before it is taken over: one that fails is
reported by key and reason, and its last good version stays. No I/O, no kernel, no clock.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from common import spiffe
from controlplane.api import (
    Authorization,
    MeshConfig,
    NetworkPolicy,
    Resource,
    ResourceError,
    Service,
    Update,
    Workload,
    resource_key,
)

#: Stands before a version that is not held in full, so that no controller takes it for one.
INCOMPLETE = "incomplete "


@dataclass(frozen=True)
class Mesh:
    """``resources`` by key (:func:`controlplane.api.resource_key`); the four views are made from it once."""

    version: str = ""
    resources: Mapping[str, Resource] = field(default_factory=dict)
    workloads: Mapping[str, Workload] = field(init=False)  #: by UID
    services: Mapping[str, Service] = field(init=False)  #: by ``NAMESPACE/NAME``
    authorizations: Mapping[str, Authorization] = field(init=False)  #: by ``NAMESPACE/NAME``
    network_policies: Mapping[str, NetworkPolicy] = field(init=False)  #: by ``NAMESPACE/NAME``

    def __post_init__(self) -> None:
        workloads: dict[str, Workload] = {}
        services: dict[str, Service] = {}
        authorizations: dict[str, Authorization] = {}
        network_policies: dict[str, NetworkPolicy] = {}
        for resource in self.resources.values():
            match resource:
                case Workload():
                    workloads[resource.uid] = resource
                case Service():
                    services[f"{resource.namespace}/{resource.name}"] = resource
                case Authorization():
                    authorizations[f"{resource.namespace}/{resource.name}"] = resource
                case NetworkPolicy():
                    network_policies[f"{resource.namespace}/{resource.name}"] = resource
        object.__setattr__(self, "workloads", MappingProxyType(workloads))
        object.__setattr__(self, "services", MappingProxyType(services))
        object.__setattr__(self, "authorizations", MappingProxyType(authorizations))
        object.__setattr__(self, "network_policies", MappingProxyType(network_policies))

    @property
    def known(self) -> bool:
        """Whether the controller has ever said anything: before that, nothing is known of any pod."""
        return bool(self.version)

    @property
    def config(self) -> MeshConfig:
        config = self.resources.get("mesh")
        return config if isinstance(config, MeshConfig) else MeshConfig()

    def snapshot(self) -> Update:
        """The whole state as a complete update: what the last good state on disk holds."""
        ordered = tuple(self.resources[key] for key in sorted(self.resources))
        return Update(nonce=0, version=self.version, complete=True, upserts=ordered)


def apply(mesh: Mesh, update: Update) -> tuple[Mesh, tuple[ResourceError, ...]]:
    """The state after an update, and what of it was not taken over.

    Until the next complete one, a state that lacks something says so in its version.
    """
    resources = {} if update.complete else dict(mesh.resources)
    errors: list[ResourceError] = []
    for key in update.removes:
        resources.pop(key, None)
    for resource in update.upserts:
        key = resource_key(resource)
        reason = fault(resource)
        if not reason:
            resources[key] = resource
            continue
        errors.append(ResourceError(key, reason))
        if (last_good := mesh.resources.get(key)) is not None:
            resources[key] = last_good
    whole = not errors and (update.complete or not mesh.version.startswith(INCOMPLETE))
    version = update.version if whole else INCOMPLETE + update.version.removeprefix(INCOMPLETE)
    return replace(mesh, version=version, resources=MappingProxyType(resources)), tuple(errors)


def fault(resource: Resource) -> str:
    """Why this node cannot use a resource: field, value and reason; empty if it can."""
    match resource:
        case Workload():
            return _workload_fault(resource)
        case Service():
            return _service_fault(resource)
        case Authorization():
            return _authorization_fault(resource)
        case NetworkPolicy():
            return _network_policy_fault(resource)
    return ""


def _workload_fault(workload: Workload) -> str:
    if not workload.uid:
        return "uid: empty"
    try:
        spiffe.parse(workload.identity)
    except spiffe.SpiffeError as error:
        return f"identity: {workload.identity!r}: {error}"
    for address in workload.addresses:
        if not is_address(address):
            return f"addresses: {address!r} is no IP address"
    for port, _ in workload.port_mtls:
        if not 1 <= port <= 65535:
            return f"port_mtls: {port} is no port"
    return ""


def _service_fault(service: Service) -> str:
    for name in ("addresses", "external_addresses"):
        for address in getattr(service, name):
            if not is_address(address):
                return f"{name}: {address!r} is no IP address"
    seen: set[tuple[int, str]] = set()
    for port in service.ports:
        if not 1 <= port.port <= 65535:
            return f"ports: {port.port} is no port"
        if (port.port, port.protocol) in seen:
            return f"ports: {port.port}/{port.protocol} stands twice"
        seen.add((port.port, port.protocol))
        if not 0 <= port.node_port <= 65535:
            return f"ports[{port.port}].node_port: {port.node_port} is no port"
        for endpoint in port.endpoints:
            if not is_address(endpoint.address):
                return f"ports[{port.port}].endpoints: {endpoint.address!r} is no IP address"
            if not 1 <= endpoint.port <= 65535:
                return f"ports[{port.port}].endpoints: {endpoint.port} is no port"
    return ""


def _authorization_fault(policy: Authorization) -> str:
    for rule in policy.rules:
        for source in rule.sources:
            for block in (*source.ip_blocks, *source.not_ip_blocks):
                if not _is_block(block):
                    return f"rules: {block!r} is no block of addresses"
    return ""


def _network_policy_fault(policy: NetworkPolicy) -> str:
    for rule in (*(policy.ingress or ()), *(policy.egress or ())):
        for peer in rule.peers:
            if bool(peer.group) is bool(peer.cidr):
                return f"peers: {peer!r} has to have either a group or a block"
            for block in (*((peer.cidr,) if peer.cidr else ()), *peer.excepts):
                if not _is_block(block):
                    return f"peers: {block!r} is no block of addresses"
        for port in rule.ports:
            if not (0 <= port.port <= 65535 and (not port.end_port or port.port <= port.end_port <= 65535)):
                return f"ports: {port.port} to {port.end_port} is no range of ports"
    return ""


def _is_block(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_ipv4(text: str) -> bool:
    """Whether this is a dotted IPv4 address; ``text`` is known to be an address."""
    return ":" not in text


def one_of_each_family(addresses: Iterable[str]) -> tuple[str, ...]:
    """The first IPv4 and the first IPv6 address, in this order; what holds on one link only is nobody's address."""
    found: dict[bool, str] = {}
    for address in addresses:
        if is_address(address) and not ipaddress.ip_address(address).is_link_local:
            found.setdefault(is_ipv4(address), address)
    return tuple(found[family] for family in (True, False) if family in found)
