"""Writes the compiled tables into the kernel: only what differs, in an order that never opens a gap.

Owns the knowledge of what the kernel has. It begins with what a predecessor left there, so a restarted agent changes only what
changed meanwhile. What cannot be written is reported and counts as not written, so that the next pass tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from agent import kernel as facade
from agent.compiler import Tables
from agent.frontends import Frontends, ServiceEntry
from agent.kernel import Kernel, KernelError, MapFullError, NoVethError
from agent.namespaces import Namespaces
from agent.networks import OPEN, Networks
from agent.passage import Stage
from agent.verdicts import Verdicts
from bpf.wire import IDENTITY_FIRST, POLICY_GENERATION_MASK, Direction
from common import logs
from controlplane.api import ResourceError

_log = logs.get(__name__)

#: Namespace operations and policy swaps at one time: each may wait for tens of milliseconds in the kernel.
_PARALLEL = 8

#: How full the map of accounts may be before those of the past are dropped.
_FORGET_AT = 0.75

#: Maps with an element for each pod.
_OF_PODS = ("interfaces", "listeners", "peers", "pods", "policies", "shares")

_REFUSED = Verdicts({})


class PodSpec(NamedTuple):
    """A pod that the kernel is to have."""

    uid: str
    netns_cookie: int
    addresses: tuple[str, ...]
    identity: int
    stage: Stage = Stage.ENROLLED
    #: It is on its way out: its verdicts stay as they are.
    leaving: bool = False
    zone: int = 0
    splice: bool = True
    #: No process runs in it yet, and its runtime waits.
    starting: bool = False

    @property
    def pod(self) -> facade.Pod:
        return facade.Pod(
            self.netns_cookie,
            self.addresses,
            self.identity,
            passing=self.stage is Stage.PREPARED,
            open=self.stage is not Stage.ENROLLED,
            zone=self.zone,
            splice=self.splice,
        )


@dataclass
class Outcome:
    """What came of a pass. ``pods``: reason by netns cookie of those that are not as they should be."""

    resources: tuple[ResourceError, ...] = ()
    pods: dict[int, str] = field(default_factory=dict)
    #: Of these, the ones that never will be, whatever is tried again.
    hopeless: set[int] = field(default_factory=set)
    #: Verdicts of pods that were there before have changed: established connections are to be judged again.
    verdicts_changed: bool = False

    @property
    def clean(self) -> bool:
        return not self.resources and not self.pods

    def text(self) -> str:
        reasons = [f"{e.key}: {e.reason}" if e.key else e.reason for e in self.resources]
        known = {e.reason for e in self.resources}
        reasons += [f"pod in namespace {cookie}: {r}" for cookie, r in self.pods.items() if r not in known]
        return "; ".join(reasons)


#: Verdicts that are nobody's: the kernel's differ from what was written.
_UNLIKE_ANY = Verdicts({(-1, 0): False}, {})


class _Policy(NamedTuple):
    generation: int
    verdicts: Verdicts


class Programmer:
    """One caller at a time (the reconciler); the kernel is touched by nobody else in the ways that this does."""

    def __init__(self, kernel: Kernel, namespaces: Namespaces) -> None:
        self._kernel = kernel
        self._namespaces = namespaces
        self._pods: dict[int, facade.Pod] = kernel.pods()
        self._policies: dict[int, _Policy] = {}
        self._networks: dict[tuple[int, Direction], facade.Network | None] = {}
        for cookie in self._pods:
            if (policy := kernel.policy(cookie)) is not None:
                generation, table = policy
                found = Verdicts(table, kernel.policy_classes(cookie, generation))
                self._policies[cookie] = _Policy(generation, found)
        of_pods = {address for pod in self._pods.values() for address in pod.addresses}
        self._peers = {a: peer for a, peer in kernel.peers().items() if a not in of_pods}
        #: Since when pods that came in as they were starting are without links, by netns cookie.
        self.unlinked: dict[int, float] = dict.fromkeys(kernel.unlinked(), 0.0)
        #: What of each was written last; nothing of what a predecessor wrote is known but that it is there.
        self._services: dict[facade.Frontend, ServiceEntry | None] = dict.fromkeys(kernel.services())

    @property
    def programmed(self) -> frozenset[int]:
        """Netns cookies of the pods that the kernel has."""
        return frozenset(self._pods)

    def stages(self) -> dict[int, Stage]:
        """Of these, where each is."""
        return {
            cookie: Stage.PREPARED if pod.passing else Stage.CAPTURED if pod.open else Stage.ENROLLED
            for cookie, pod in self._pods.items()
        }

    def joining(self) -> frozenset[str]:
        """The addresses of pods that other nodes may not have captured yet."""
        return frozenset(address for address, peer in self._peers.items() if peer.joining)

    def has_listener(self, address: str, port: int) -> bool:
        """Whether a proxy listens there."""
        return self._kernel.has_listener(address, port)

    def living(self) -> frozenset[int]:
        """Of these, the ones whose namespace still exists."""
        return self.programmed - self._kernel.gone()

    def host_addresses(self) -> frozenset[str]:
        """The node's own."""
        return self._kernel.host_addresses()

    async def program(
        self,
        tables: Tables,
        specs: Mapping[int, PodSpec],
        *,
        sealed: Collection[int],
        joining: Collection[str] = (),
        left: Collection[int] = (),
    ) -> Outcome:
        """Make the kernel agree.

        :param specs: the enrolled pods by netns cookie.
        :param joining: UIDs of pods that other nodes may not have captured yet.
        :param left: pods that run on, so that what is open in their namespace must go on.
        :param sealed: pods that still run and that nobody knows any more: those that the kernel has stay captured, and
            nobody may connect to them.
        """
        outcome = Outcome()
        errors: list[ResourceError] = []
        slots = asyncio.Semaphore(_PARALLEL)
        kept = specs.keys() | (set(sealed) & self._pods.keys())
        await asyncio.gather(
            *(
                self._remove_pod(cookie, slots, outcome, running=cookie in left)
                for cookie in self._pods.keys() - kept
            )
        )
        # Before pods and services that lead to them: who has an address decides between capture and plain text.
        addresses = {address for spec in specs.values() for address in spec.addresses}
        addresses |= {address for pod in self._pods.values() for address in pod.addresses}
        peers = {a: peer for a, peer in tables.peers.items() if a not in addresses}
        for address, peer in peers.items():
            # Plain text of both is judged as anybody's.
            joins_or_leaves = peer.leaving or peer.uid in joining
            told = facade.Peer(
                peer.local, peer.enrolled, peer.identity, joins_or_leaves, peer.zone, peer.node
            )
            if self._peers.get(address) != told:
                try:
                    self._set_peer(address, told)
                except (KernelError, MapFullError, ValueError) as error:
                    errors.append(ResourceError(f"workload/{peer.uid}", f"address {address}: {error}"))
        await asyncio.gather(
            *(
                self._program_pod(
                    spec,
                    tables.policies.get(spec.uid, _REFUSED),
                    tables.networks.get(spec.uid, OPEN),
                    slots,
                    outcome,
                    errors,
                )
                for spec in specs.values()
            ),
            *(self._seal(cookie, slots, outcome) for cookie in kept - specs.keys()),
        )
        errors += self._program_services(tables.frontends)
        for address in self._peers.keys() - peers.keys():
            try:
                self._kernel.remove_peer(address)
                del self._peers[address]
            except KernelError as error:
                errors.append(ResourceError("", f"address {address}: {error}"))
        outcome.resources = tuple(errors)
        return outcome

    async def link(self, netns_cookie: int) -> None:
        """Make what holds a pod that was starting as lasting as any other's. What fails is left for another time."""
        try:
            with self._namespaces.borrow(netns_cookie) as netns:
                await asyncio.to_thread(self._kernel.link_pod, netns_cookie, netns)
        except Exception as error:
            # Whatever it is: the others' turn comes, and this one's again.
            _log.warning("pod has no links yet", netns_cookie=netns_cookie, reason=repr(error))
            self.unlinked[netns_cookie] = asyncio.get_running_loop().time()
        else:
            del self.unlinked[netns_cookie]

    def missing(self, netns_cookie: int) -> list[str]:
        """What the kernel lacks of a pod that was programmed, in words."""
        if netns_cookie not in self._pods:
            return ["the pod's entry"]
        try:
            with self._namespaces.borrow(netns_cookie) as netns:
                return self._kernel.missing(netns_cookie, netns)
        except KeyError:
            return ["the pod's namespace"]

    async def audit(self, cookies: Collection[int], frontends: Collection[facade.Frontend]) -> Counter[str]:
        """Compare the kernel with what was written into it; what differs is forgotten, so that the next pass writes it again.

        :param cookies: the pods whose namespaces and verdicts are looked at; entries of pods and peers all are.
        :param frontends: the services that are looked at.
        :returns: how much has to be repaired, by what it is.
        """
        found: Counter[str] = Counter()
        pods, peers, damaged = await asyncio.to_thread(
            lambda: (self._kernel.pods(), self._kernel.peers(), self._kernel.damaged_services(frontends))
        )
        lacking = {cookie: await self._lacks(cookie) for cookie in cookies if cookie in self._pods}
        for cookie, pod in pods.items():
            if cookie not in self._pods:
                self._found(found, "stray pod", cookie)
                self._pods[cookie] = pod
        for cookie, known in tuple(self._pods.items()):
            if pods.get(cookie) != known:
                self._found(found, "pod", cookie)
            elif lacking.get(cookie):
                self._found(found, "namespace", cookie, lacks=", ".join(lacking[cookie]))
            else:
                continue
            # Unlike any that is wished, so that it is added again; a pod that is nobody's any more is still removed.
            self._pods[cookie] = known._replace(identity=0)
        for cookie in lacking:
            policy = self._policies.get(cookie)
            if policy is not None and not await asyncio.to_thread(self._has_policy, cookie, policy):
                self._found(found, "policy", cookie)
                self._policies[cookie] = policy._replace(verdicts=_UNLIKE_ANY)
            for direction in Direction:
                key = (cookie, direction)
                if key in self._networks and not await asyncio.to_thread(
                    self._kernel.has_network, cookie, direction, self._networks[key]
                ):
                    self._found(found, "network policy", cookie)
                    del self._networks[key]
        of_pods = {address for pod in (*pods.values(), *self._pods.values()) for address in pod.addresses}
        for address in (peers.keys() | self._peers.keys()) - of_pods:
            there, wished = peers.get(address), self._peers.get(address)
            if there == wished:
                continue
            self._found(found, "peer" if wished is not None else "stray peer", address)
            if there is None:
                del self._peers[address]
            else:
                self._peers[address] = there
        for frontend in damaged:
            if frontend in self._services:
                self._found(found, "service", f"{frontend.address}:{frontend.port}")
                self._services[frontend] = None
        return found

    def _has_policy(self, cookie: int, policy: _Policy) -> bool:
        there = self._kernel.policy(cookie)
        return (
            there == (policy.generation, policy.verdicts.table)
            and self._kernel.policy_classes(cookie, policy.generation) == policy.verdicts.classes
        )

    def _found(self, found: Counter[str], what: str, which: object, **more: object) -> None:
        found[what] += 1
        _log.warning("kernel state is not as it was written: repaired", what=what, which=which, **more)

    async def _lacks(self, cookie: int) -> list[str]:
        with self._namespaces.borrow_if_there(cookie) as netns:
            if netns is None:
                return []
            return await asyncio.to_thread(self._kernel.missing, cookie, netns)

    def carried(self) -> set[int]:
        """The identities that something in the kernel carries: pods, addresses, open connections, accounts."""
        kernel = self._kernel
        found = {pod.identity for pod in kernel.pods().values()}
        found |= {peer.identity for peer in kernel.peers().values()}
        for connection in kernel.connections():
            found |= {connection.source, connection.destination}
        for key in kernel.flows():
            found |= {key.source, key.destination}
        return found

    def detached(self) -> list[str]:
        """Links at the node's cgroup that are gone."""
        return self._kernel.detached()

    def services(self) -> list[facade.Frontend]:
        """Those that were written."""
        return list(self._services)

    def full(self) -> list[str]:
        """The maps that have no room for another pod; what others lack costs a connection or an account."""
        pressure = self._kernel.pressure()
        found = [(name, pressure[name]) for name in _OF_PODS if name in pressure]
        return [name for name, one in found if one.used >= one.size]

    def forget_accounts(self, current: Collection[int]) -> None:
        """When their map fills up, drop the accounts of identities that nobody has any more."""
        pressure = self._kernel.pressure()
        tables = [pressure[name] for name in ("flows", "refused") if name in pressure]
        if all(one.used < one.size * _FORGET_AT for one in tables):
            return

        def is_current(number: int) -> bool:
            return number < IDENTITY_FIRST or number in current

        stale = [
            key
            for key in self._kernel.flows()
            if not (is_current(key.source) and is_current(key.destination))
        ]
        if not stale:
            return
        self._kernel.forget_flows(stale)
        _log.warning("accounts of identities that are gone were added up", accounts=len(stale))

    def count_shares(self) -> None:
        """What goes with a removed pod is in no count of whoever dialled it: its share would shrink for good."""
        if wrong := self._kernel.count_shares():
            _log.debug("pods' shares of maps were counted again", pods=wrong)

    def _set_peer(self, address: str, peer: facade.Peer) -> None:
        try:
            self._kernel.set_peer(address, peer)
        except MapFullError:
            # Not known as one of the mesh it would be dialled in plain text. Of others only the name is lost.
            spare = next((a for a, other in self._peers.items() if not (other.enrolled or other.node)), None)
            if spare is None or not peer.enrolled:
                raise
            self._kernel.remove_peer(spare)
            del self._peers[spare]
            self._kernel.set_peer(address, peer)
        self._peers[address] = peer

    async def _program_pod(
        self,
        spec: PodSpec,
        verdicts: Verdicts,
        networks: Networks,
        slots: asyncio.Semaphore,
        outcome: Outcome,
        errors: list[ResourceError],
    ) -> None:
        cookie = spec.netns_cookie
        pod = spec.pod
        try:
            async with slots:
                if self._pods.get(cookie) != pod:
                    is_first = cookie not in self._pods and cookie not in self._policies
                    first = _Policy(1, verdicts) if is_first and (pod.open or not spec.leaving) else None
                    known = (1, verdicts.table, verdicts.classes) if first is not None else None
                    with self._namespaces.borrow(cookie) as netns:
                        if spec.starting:
                            self.unlinked[cookie] = asyncio.get_running_loop().time()
                        await asyncio.to_thread(
                            self._kernel.add_pod, pod, netns, known, starting=spec.starting
                        )
                    if first is not None:
                        self._policies[cookie] = first
                    self._pods[cookie] = pod
                    for address in pod.addresses:
                        self._peers.pop(address, None)
                if not spec.leaving:
                    await self._set_networks(cookie, networks, outcome)
                    await self._set_policy(cookie, verdicts, outcome)
        except (KernelError, OSError, ValueError, KeyError) as error:
            reason = str(error) if not isinstance(error, KeyError) else "its namespace is gone"
            if cookie not in self._pods:
                # Without verdicts it is refused to everybody; whoever gives it up has to know of it.
                with contextlib.suppress(KernelError):
                    self._pods.update({c: there for c, there in self._kernel.pods().items() if c == cookie})
            outcome.pods[cookie] = reason
            if isinstance(error, NoVethError):
                outcome.hopeless.add(cookie)
            errors.append(ResourceError(f"workload/{spec.uid}", reason))

    async def _seal(self, cookie: int, slots: asyncio.Semaphore, outcome: Outcome) -> None:
        try:
            async with slots:
                await self._set_policy(cookie, _REFUSED, outcome)
        except (KernelError, OSError, ValueError) as error:
            outcome.pods[cookie] = str(error)

    async def _set_networks(self, cookie: int, networks: Networks, outcome: Outcome) -> None:
        for direction, network in (
            (Direction.INBOUND, networks.ingress),
            (Direction.OUTBOUND, networks.egress),
        ):
            key = (cookie, direction)
            if key in self._networks:
                same = self._networks[key] == network
            else:
                # What a predecessor left, or a pod of before.
                same = await asyncio.to_thread(self._kernel.has_network, cookie, direction, network)
            if not same:
                await asyncio.to_thread(self._kernel.set_network, cookie, direction, network)
                outcome.verdicts_changed = True
            self._networks[key] = network

    async def _set_policy(self, cookie: int, verdicts: Verdicts, outcome: Outcome) -> None:
        old = self._policies.get(cookie)
        if old is not None and old.verdicts == verdicts:
            return
        generation = 1 if old is None else old.generation % POLICY_GENERATION_MASK + 1
        await asyncio.to_thread(self._kernel.set_policy, cookie, verdicts.table, generation, verdicts.classes)
        self._policies[cookie] = _Policy(generation, verdicts)
        outcome.verdicts_changed |= old is not None

    async def _remove_pod(
        self, cookie: int, slots: asyncio.Semaphore, outcome: Outcome, *, running: bool
    ) -> None:
        try:
            async with slots:
                with self._namespaces.borrow_if_there(cookie) as netns:
                    # Deliveries that are open need their way back.
                    await asyncio.to_thread(self._kernel.remove_pod, cookie, None if running else netns)
        except (KernelError, OSError) as error:
            outcome.pods[cookie] = str(error)
            return
        del self._pods[cookie]
        self.unlinked.pop(cookie, None)
        self._policies.pop(cookie, None)
        for direction in Direction:
            self._networks.pop((cookie, direction), None)

    def _program_services(self, frontends: Frontends) -> Iterable[ResourceError]:
        for frontend, entry in frontends.entries.items():
            # Equal entries are mostly the same, so that of ten thousand only those that have changed cost anything.
            known = self._services.get(frontend)
            if known is entry or known == entry:
                continue
            address, port, protocol = frontend
            try:
                self._kernel.set_service(
                    address, port, entry.backends, protocol=protocol, l7=entry.l7, affinity=entry.affinity
                )
                self._services[frontend] = entry
            except (KernelError, MapFullError, ValueError) as error:
                yield ResourceError(f"service/{entry.service}", f"{address}:{port}/{protocol.name}: {error}")
        for frontend in self._services.keys() - frontends.entries.keys():
            address, port, protocol = frontend
            try:
                self._kernel.remove_service(address, port, protocol)
                del self._services[frontend]
            except KernelError as error:
                yield ResourceError("", f"service at {address}:{port}/{protocol.name}: {error}")
