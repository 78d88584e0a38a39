"""What was wished: the verdicts of the policies themselves, beside those that the kernel gives by its tables.

Owns asking :func:`controlplane.api.authorize` and :func:`controlplane.api.permits` about one connection, naming the policies that
decide, and comparing the entries of tables with what the agent compiled. No kernel: what that says comes in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from agent.compiler import Tables, policies_of
from agent.kernel.model import Frontend
from agent.kernel.tables import Slot
from agent.mesh import Mesh
from bpf import wire
from bpf.wire import Protocol
from controlplane.api import Action, MtlsMode, Workload, authorize, permits
from controlplane.api.network import Direction, refusing

#: How far a share of the draws may be from a backend's weight: the kernel's is a fraction of 2^32.
_ROUNDING = 1e-3


class Said(NamedTuple):
    """A verdict, the policies that decide it, and why in words."""

    allowed: bool
    policies: tuple[str, ...] = ()
    text: str = ""

    @property
    def word(self) -> str:
        return "allowed" if self.allowed else "refused"


class Model:
    """One state of the node: the mesh, and what was compiled of it."""

    def __init__(self, mesh: Mesh, tables: Tables, *, node: str, host: Collection[str]) -> None:
        """``host``: the node's own addresses, as the machine has them."""
        self._mesh = mesh
        self._tables = tables
        self._host = frozenset(host) | {
            address for info in mesh.config.nodes if info.name == node for address in info.addresses
        }

    def workload_at(self, address: str) -> Workload | None:
        peer = self._tables.peers.get(address)
        return self._mesh.workloads.get(peer.uid) if peer is not None else None

    def egress(self, source: Workload, address: str, protocol: Protocol, port: int) -> Said:
        """NetworkPolicy of the source's pod."""
        return self._network(source, Direction.EGRESS, address, protocol, port, self.workload_at(address))

    def ingress(self, destination: Workload, address: str, protocol: Protocol, port: int) -> Said:
        """NetworkPolicy of the destination's pod; ``address`` is the source's."""
        return self._network(destination, Direction.INGRESS, address, protocol, port, destination)

    def _network(
        self,
        pod: Workload,
        direction: Direction,
        address: str,
        protocol: Protocol,
        port: int,
        server: Workload | None,
    ) -> Said:
        keys = pod.network_policies
        policies = [self._mesh.network_policies.get(key) or refusing(key) for key in keys]
        isolating = tuple(
            f"{policy.namespace}/{policy.name}" for policy in policies if policy.rules(direction) is not None
        )
        if not isolating:
            return Said(True, (), f"no NetworkPolicy isolates it ({direction.value})")
        if address in self._host:
            return Said(True, isolating, "a node and its pods may always speak")
        other = self.workload_at(address)
        verdict = permits(
            policies,
            direction,
            groups=other.groups if other is not None and not other.host_network else (),
            address=address,
            protocol=protocol.name,
            port=port,
            named_ports=server.named_ports if server is not None and not server.host_network else (),
        )
        if verdict.allowed:
            return Said(True, (verdict.policy,), f"NetworkPolicy {verdict.policy} allows it")
        return Said(False, isolating, f"no rule of NetworkPolicy {', '.join(isolating)} allows it")

    def authorization(
        self, destination: Workload | None, source: Workload | None, address: str, port: int
    ) -> Said:
        """AuthorizationPolicy and mTLS mode; ``source`` is None for plain text."""
        if destination is None:
            return Said(False, (), "nobody knows this pod any more")
        if not destination.enrolled:
            return Said(True, (), "it is not in the mesh")
        mode = dict(destination.port_mtls).get(port, destination.mtls)
        if source is None and mode is MtlsMode.STRICT:
            return Said(False, (), "plain text, and the port's mTLS mode is STRICT (PeerAuthentication)")
        policies = policies_of(self._mesh, destination)
        principal = source.identity.removeprefix("spiffe://") if source is not None else None
        verdict = authorize(policies, principal, port, address)
        if verdict.policy:
            word = "allows" if verdict.allowed else "denies"
            return Said(verdict.allowed, (verdict.policy,), f"AuthorizationPolicy {verdict.policy} {word} it")
        if verdict.allowed:
            names = tuple(f"{p.namespace}/{p.name}" for p in policies)
            said = (
                f"no DENY of AuthorizationPolicy {', '.join(names)} matches"
                if names
                else "no policy selects it"
            )
            return Said(True, names, said)
        allows = tuple(f"{p.namespace}/{p.name}" for p in policies if p.action is Action.ALLOW)
        return Said(False, allows, f"no ALLOW of AuthorizationPolicy {', '.join(allows)} matches")

    # Entries

    def peer_differs(self, address: str, found: wire.Peer | None, netns: int = 0) -> str:
        """How the entry of an address differs from what was compiled; empty if it does not.

        :param netns: of the pod of this node that has it; 0 where it is none's in the mesh.
        """
        want = self._tables.peers.get(address)
        if want is None:
            # A pod that nobody knows any more stays in the kernel, and is refused to everybody.
            stray = found is not None and not found.netns
            return f"peers {address}: the kernel has an entry, the model none" if stray else ""
        if found is None:
            return f"peers {address}: the kernel has no entry, the model one"
        flags = (
            (wire.PEER_LOCAL, "on this node", want.local),
            (wire.PEER_ENROLLED, "in the mesh", want.enrolled),
            (wire.PEER_NODE, "a node's own", want.node),
        )
        for flag, word, wished in flags:
            if bool(found.flags & flag) is not wished:
                return f"peers {address}: {word} in the {'model' if wished else 'kernel'} only"
        if found.identity != want.identity:
            return f"peers {address}: identity {found.identity} in the kernel, {want.identity} in the model"
        if netns and found.netns != netns:
            return f"peers {address}: namespace {found.netns} in the kernel, {netns} in the model"
        return ""

    def pod_differs(
        self, netns: int, uid: str, addresses: Iterable[str], found: wire.Pod | None
    ) -> list[str]:
        """The same of a pod that is in the mesh wholly, and neither joins nor leaves."""
        where = f"pods {netns}"
        if found is None:
            return [f"{where}: the kernel has no entry, the model one"]
        differences = []
        if (identity := self._tables.identities.get(uid)) != found.identity:
            differences.append(f"{where}: identity {found.identity} in the kernel, {identity} in the model")
        have = set(filter(None, (found.address4, found.address6)))
        if have - set(addresses):
            differences.append(
                f"{where}: address {', '.join(sorted(have))} in the kernel, {', '.join(addresses)} in the model"
            )
        if found.flags & (wire.POD_PASSING | wire.POD_OPEN):
            differences.append(f"{where}: joins or leaves in the kernel only (flags {found.flags})")
        workload = self._mesh.workloads.get(uid)
        if workload is not None and bool(found.flags & wire.POD_NO_SPLICE) is workload.splice:
            differences.append(f"{where}: mycel.io/splice differs (flags {found.flags})")
        return differences

    def service_differs(
        self, key: wire.Endpoint, service: wire.Service | None, slots: Iterable[Slot], missing: Iterable[int]
    ) -> list[str]:
        """The same of a service and its backends."""
        where = f"services {key.address}:{key.port}/{Protocol(key.protocol).name}"
        want = self._tables.frontends.entries.get(Frontend(key.address, key.port, Protocol(key.protocol)))
        if want is None:
            return [f"{where}: the kernel has an entry, the model none"] if service is not None else []
        if service is None:
            return [f"{where}: the kernel has no entry, the model has {want.service}"]
        differences = []
        if bool(service.flags & wire.SERVICE_L7) is not want.l7:
            differences.append(f"{where}: L7 in the {'model' if want.l7 else 'kernel'} only")
        affinity = service.flags >> wire.SERVICE_AFFINITY_SHIFT
        if affinity != want.affinity:
            differences.append(
                f"{where}: affinity of {affinity} s in the kernel, {want.affinity} s in the model"
            )
        total = sum(backend.weight for backend in want.backends)
        wished = {(b.address, b.port): b.weight / total for b in want.backends if total}
        found = {(slot.address, slot.port): slot.share for slot in slots}
        for end in sorted(found.keys() - wished.keys()):
            differences.append(f"backends of {where}: {end[0]}:{end[1]} in the kernel only")
        for end in sorted(wished.keys() - found.keys()):
            differences.append(f"backends of {where}: {end[0]}:{end[1]} in the model only")
        for end in sorted(found.keys() & wished.keys()):
            if abs(found[end] - wished[end]) > _ROUNDING and not differences:
                differences.append(
                    f"backends of {where}: {end[0]}:{end[1]} gets {found[end]:.3f} in the kernel, {wished[end]:.3f} in the model"
                )
        differences += [f"backends of {where}: slot {slot} is not there" for slot in missing]
        return differences
