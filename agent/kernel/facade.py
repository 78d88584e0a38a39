"""Class :class:`Kernel`: what the agent can tell the kernel and ask it."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.kernel import accounts, namespace
from agent.kernel.errors import KernelError, naming
from agent.kernel.events import read_events
from agent.kernel.interfaces import Interfaces
from agent.kernel.model import (
    Backend,
    Connection,
    Direction,
    Event,
    FlowCounters,
    FlowKey,
    Frontend,
    Network,
    Peer,
    Pod,
    Pressure,
    Protocol,
    Service,
)
from agent.kernel.pods import Pods
from agent.kernel.policies import Policies, Verdicts, network_elements
from agent.kernel.ring import RingReader
from agent.kernel.services import Services
from agent.kernel.splices import Splices
from bpf import links, schema, usage, wire
from bpf.limits import UNSIZED
from bpf.maps import Info, Map, MapFullError
from bpf.usage import Usage
from bpf.wire import Role

__all__ = ["Kernel", "KernelError", "MapFullError"]


#: Seconds between two walks over a map whose elements cannot be counted otherwise.
_COUNT_EVERY = 30.0


class Kernel:
    """The pinned maps, programs and links of one node.

    Methods may be called from any thread; each call is done when it returns. They take milliseconds at most, but for
    ``add_pod`` and ``set_policy`` (tens, since they wait for running programs or work in the pod's namespace).
    ``netns`` is always a descriptor of the pod's network namespace that stays the caller's; none is kept here, so that
    nothing of ours outlives ``remove_pod``. Every method is idempotent. They raise MapFullError or KernelError (both are
    OSErrors), ValueError for what no kernel could take, and nothing is half done after either.
    """

    def __init__(self, pins: Path, host: int | None = None) -> None:
        """Open what the loader pinned in ``pins`` (the folder that holds ``v<ABI>``).

        :param host: the node's network namespace, which stays the caller's; None: that of this process.
        :raises KernelError: it is not there, or not whole.
        """
        self._host = host
        self._folder = pins / f"v{wire.ABI}"
        # Lookups share buffers, and some changes are of several maps.
        self._lock = threading.RLock()
        # Accounts are many: whoever reads them keeps nobody from adding a pod.
        self._accounts_lock = threading.Lock()
        self._counters_lock = threading.Lock()
        self._closing = ExitStack()
        with naming(f"pins {self._folder}"), ExitStack() as stack:
            maps = {
                spec.name: stack.enter_context(Map.open(str(self._folder / spec.name)))
                for spec in schema.MAPS
            }
            programs = ("program_sk_lookup", "program_from_pod", "program_to_pod")
            for name in (*programs, "accounts", "connections", "refused_now", "silent", "splice", "nudge"):
                if not (self._folder / name).exists():
                    raise KernelError(f"pins {self._folder}: {name} is not there")
            self._events = RingReader(maps["events"])
            stack.callback(self._events.close)
            self._records = RingReader(maps["records"])
            stack.callback(self._records.close)
            for name, table in maps.items():
                if name in wire.COUNTED_BY_AGENT:
                    table.on_full = partial(self._count, wire.COUNTER_FULL[name])
            self._counters = stack.enter_context(Map.open(str(self._folder / "counters")))
            self._flows = stack.enter_context(Map.open(str(self._folder / "flows")))
            self._refused = stack.enter_context(Map.open(str(self._folder / "refused")))
            #: Connections between two pods of this node that go past TCP.
            self.splices = Splices(self._folder, maps)
            stack.callback(self.splices.close)
            self._maps = maps
            self._usage = {
                spec.name: Usage(maps[spec.name])
                for spec in schema.MAPS
                if spec.key_size and spec.name not in UNSIZED
            }
            #: By map that has to be walked: when that was done last, and what came of it.
            self._counted: dict[str, tuple[float, int]] = {}
            self._pods = Pods(self._folder, maps)
            self._interfaces = Interfaces(self._folder, maps["interfaces"], host)
            self._interfaces.renew()
            self._policies = Policies(maps["policies"], maps["classes"], maps["networks"])
            stack.callback(self._policies.close)
            self._services = Services(maps["services"], maps["backends"], maps["members"])
            #: What the loader attached: the names of its links.
            self._cgroup_links = sorted(
                path.name
                for path in self._folder.glob("link_*")
                if links.info_of_pin(path).type == links.TYPE_CGROUP
            )
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Let go of the descriptors; everything in the kernel stays as it is."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Roles

    def set_role(self, cgroup_id: int, role: Role) -> None:
        """Processes of the cgroup (not of those below it) have this role when they dial; NONE removes it."""
        key = struct.pack("=Q", cgroup_id)
        with self._lock, naming(f"role of cgroup {cgroup_id}"):
            if role is Role.NONE:
                self._maps["roles"].delete(key)
            else:
                self._maps["roles"].update(key, struct.pack("=I", role))

    def roles(self) -> dict[int, Role]:
        """By cgroup id."""
        with self._lock, naming("roles"):
            return {
                struct.unpack("=Q", key)[0]: Role(struct.unpack("=I", value)[0])
                for key, value in self._maps["roles"].items()
            }

    # Pods

    def add_pod(
        self,
        pod: Pod,
        netns: int,
        policy: tuple[int, Verdicts, Mapping[str, int]] | None = None,
        *,
        starting: bool = False,
    ) -> None:
        """Enrol a pod: refuse everything inbound until its policy is set, capture its dials from now on.

        :param policy: generation, table and classes (see :meth:`set_policy`) that judge it. A pod that runs already (``open``) is
            judged by them from the first moment on, as its address is dialled meanwhile; of another everything is refused until
            they are in force, and stays so when they cannot be.
        :param starting: nothing runs in it yet and somebody waits; :meth:`link_pod` is to come later.

        In its namespace: sk_lookup link, ``tcp_fwmark_accept``, the rule and the table that bring answers to delivered
        connections back. Called again with another address or identity it changes those. An address that another
        pod had belongs to this one from now on.
        """
        with naming(f"pod {pod.netns_cookie} ({', '.join(pod.addresses)})"), ThreadPoolExecutor(1) as judging:
            judged: Future[None] | None = None
            with self._lock:
                is_new = self._pods.get(pod.netns_cookie) is None
            # Verdicts and veth not under the lock, and at once: for each the kernel takes some tens of milliseconds.
            if policy is not None:
                generation, table, classes = policy
                judged = judging.submit(
                    self._policies.set_policy, pod.netns_cookie, table, generation, classes
                )
            try:
                if judged is not None and pod.open:
                    judged.result()
                with self._lock:
                    self._pods.add(pod, netns)
                self._interfaces.enrol(pod, netns, starting=starting)
            except (OSError, ValueError):
                if judged is not None:
                    wait([judged])
                if is_new:
                    self._interfaces.remove(pod.netns_cookie)
                    with self._lock:
                        if self._pods.get(pod.netns_cookie) is not None:
                            self._pods.remove(pod.netns_cookie)
                            namespace.restore(netns)
                        if judged is not None:
                            self._policies.remove(pod.netns_cookie)
                raise
            if judged is not None:
                judged.result()

    def link_pod(self, netns_cookie: int, netns: int) -> None:
        """Make what holds a pod that was starting as lasting as any other's; some tens of milliseconds.

        :raises KernelError: it is held as before; its interface may be gone.
        """
        with naming(f"pod {netns_cookie}"):
            self._interfaces.link(netns_cookie, netns)

    def unlinked(self) -> set[int]:
        """Netns cookies of the pods for which :meth:`link_pod` is still to come."""
        with naming("map interfaces"):
            return self._interfaces.unlinked()

    def remove_pod(self, netns_cookie: int, netns: int | None = None) -> None:
        """Forget a pod: no element about it stays in any map, no link in its namespace, no listener.

        Its namespace may be gone already; with ``netns`` what :meth:`add_pod` set in it is undone too. The policy
        goes too. Open connections stay counted until they close.
        """
        with naming(f"pod {netns_cookie}"):
            # Before its verdicts go: a pod that runs on is never refused for their lack.
            self._interfaces.remove(netns_cookie)
        with self._lock, naming(f"pod {netns_cookie}"):
            self._pods.remove(netns_cookie)
            self._policies.remove(netns_cookie)
            if netns is not None:
                namespace.restore(netns)

    def pods(self) -> dict[int, Pod]:
        """By netns cookie, as the kernel has them (also those of a predecessor of this process)."""
        with self._lock, naming("pods"):
            return self._pods.all()

    def gone(self) -> set[int]:
        """Cookies of pods (of :meth:`pods`) whose namespace is no more, so that nothing is left to enforce."""
        with self._lock, naming("pods"):
            return self._pods.gone()

    def missing(self, netns_cookie: int, netns: int) -> list[str]:
        """What a pod lacks to be enforced, in words; empty when it is whole (CNI CHECK)."""
        with self._lock, naming(f"pod {netns_cookie}"):
            found = self._pods.missing(netns_cookie, netns)
            pod = self._pods.get(netns_cookie)
            return found if pod is None else found + self._interfaces.missing(pod, netns)

    def host_addresses(self) -> frozenset[str]:
        """Every address of the node's own namespace."""
        with naming("addresses of the node"):
            return namespace.addresses(self._host)

    def make_listener(self, netns: int, addresses: tuple[str, ...], port: int) -> int:
        """A listening, non-blocking TCP socket in the pod's namespace, which nothing comes to before :meth:`set_listener`.

        :param addresses: the pod's; with an IPv6 address among them the socket is an IPv6 socket that takes both families.
        :param port: PORT_OUTBOUND, PORT_OUTBOUND_L7 or PORT_HBONE.
        :returns: its descriptor, the caller's.
        """
        with naming(f"listener {', '.join(addresses)} port {port}"):
            return namespace.listener(netns, addresses, port).detach()

    def create_listener(self, netns: int, addresses: tuple[str, ...], port: int) -> int:
        """The same, known as the one for that port from now on."""
        fd = self.make_listener(netns, addresses, port)
        try:
            for address in addresses:
                self.set_listener(address, port, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def set_listener(self, address: str, port: int, fd: int) -> None:
        """Make a listening socket the one for (pod's address, port). The entry goes when its last duplicate is closed."""
        key = wire.Endpoint(address, port).pack()
        with self._lock, naming(f"listener {address}:{port}"):
            self._maps["listeners"].update(key, struct.pack("=Q", fd))

    def listener(self, address: str, port: int) -> int:
        """The cookie (SO_COOKIE) of the live one; 0 when there is none."""
        with self._lock, naming(f"listener {address}:{port}"):
            value = self._maps["listeners"].lookup(wire.Endpoint(address, port).pack())
            return 0 if value is None else int(struct.unpack("=Q", value)[0])

    def has_listener(self, address: str, port: int) -> bool:
        """Whether there is a live one."""
        return self.listener(address, port) != 0

    def create_outbound(self, netns: int, count: int = 1, *, ipv6: bool = False) -> list[int]:
        """Unconnected, non-blocking TCP sockets (TCP_NODELAY) in the pod's namespace, for the proxies' own dials."""
        with naming("outbound sockets"):
            return namespace.dialling(netns, count, delivery=False, ipv6=ipv6)

    def create_delivery(self, netns: int, count: int = 1, *, ipv6: bool = False) -> list[int]:
        """The same, transparent and with the delivery mark: may bind a client's address without capabilities."""
        with naming("delivery sockets"):
            return namespace.dialling(netns, count, delivery=True, ipv6=ipv6)

    # Tables

    def set_policy(
        self, netns_cookie: int, table: Verdicts, generation: int, classes: Mapping[str, int] | None = None
    ) -> None:
        """Swap a pod's whole policy: (identity, port or 0 for any other) to whether it may connect; a miss is refused.

        With ``classes``, which has a number from 1 on for blocks of addresses, a third number in a key is the class of the
        source's address: that of the longest block that it is in. Keys of two numbers are about addresses in none. Verdicts on
        IDENTITY_MESH are on every workload's identity, and those on workloads are not asked then.

        When it returns, no connection is admitted by the old one any more, and every one that was is in
        :meth:`connections`. TUNNEL needs no entries; IDENTITY_PROBE on the ports that probes may go to.

        :param generation: from 1 on, any number that the caller can tell from the previous one.
        """
        with naming(f"policy of pod {netns_cookie}"):
            self._require_pod(netns_cookie)
            # Not under the lock: the swap waits for running programs, and those of several pods wait together.
            self._policies.set_policy(netns_cookie, table, generation, classes or {})
            try:
                self._require_pod(netns_cookie)
            except KernelError:
                self._policies.remove(netns_cookie)
                raise

    def _require_pod(self, netns_cookie: int) -> None:
        with self._lock:
            if self._pods.get(netns_cookie) is None:
                raise KernelError(f"policy of pod {netns_cookie}: there is no such pod")

    def policy(self, netns_cookie: int) -> tuple[int, dict[tuple[int, ...], bool]] | None:
        """Generation and table that are in force; None when everything is refused because there is none."""
        with self._lock, naming(f"policy of pod {netns_cookie}"):
            return self._policies.policy(netns_cookie)

    def policy_classes(self, netns_cookie: int, generation: int) -> dict[str, int]:
        """The classes by block that belong to that generation."""
        with self._lock, naming(f"policy of pod {netns_cookie}"):
            return self._policies.classes(netns_cookie, generation)

    def set_network(self, netns_cookie: int, direction: Direction, network: Network | None) -> None:
        """Swap NetworkPolicy of a pod in one direction, as the pod sees it; None: it is not isolated.

        When it returns, nothing is admitted by the old one any more.
        """
        with naming(f"network policy of pod {netns_cookie}"):
            self._require_pod(netns_cookie)
            self._policies.set_network(netns_cookie, direction, network)

    def has_network(self, netns_cookie: int, direction: Direction, network: Network | None) -> bool:
        """Whether that is what is in force."""
        with self._lock, naming(f"network policy of pod {netns_cookie}"):
            found = self._policies.network(netns_cookie, direction)
            return found == (None if network is None else network_elements(network))

    def set_peer(self, address: str, peer: Peer) -> None:
        """Who has an address. For an address of a pod of :meth:`add_pod` it is ignored: what was added there holds."""
        with self._lock, naming(f"peer {address}"):
            self._pods.set_peer(address, peer)

    def remove_peer(self, address: str) -> None:
        """Forget an address (ignored for those of :meth:`add_pod`)."""
        with self._lock, naming(f"peer {address}"):
            self._pods.remove_peer(address)

    def peers(self) -> dict[str, Peer]:
        """By address, those of :meth:`add_pod` too."""
        with self._lock, naming("peers"):
            return self._pods.peers()

    def set_service(
        self,
        address: str,
        port: int,
        backends: Iterable[Backend],
        *,
        protocol: Protocol = Protocol.TCP,
        l7: bool = False,
        affinity: int = 0,
    ) -> None:
        """Where what is sent to (service address, port) goes. No backend refuses it.

        At any moment each client gets one of the backends of before or of now, and on return of now.

        :param l7: to l7proxy; the one backend, if there is any, is what that knows the service by.
        :param affinity: seconds for which a client keeps the backend that it dialled last, while that is one of them.
        """
        with self._lock, naming(f"service {address}:{port}/{protocol.name}"):
            self._services.set(wire.Endpoint(address, port, protocol), backends, l7=l7, affinity=affinity)

    def remove_service(self, address: str, port: int, protocol: Protocol = Protocol.TCP) -> None:
        """What is sent to it passes as to any unknown address."""
        with self._lock, naming(f"service {address}:{port}/{protocol.name}"):
            self._services.remove(wire.Endpoint(address, port, protocol))

    def services(self) -> dict[Frontend, Service]:
        """All of them."""
        with self._lock:
            return self._services.all()

    def damaged_services(self, frontends: Collection[Frontend]) -> list[Frontend]:
        """Of these, the ones that the kernel has not as they were set; their next set writes them anew."""
        with self._lock, naming("services"):
            return [
                frontend
                for frontend in frontends
                if self._services.damaged(wire.Endpoint(frontend.address, frontend.port, frontend.protocol))
            ]

    def detached(self) -> list[str]:
        """Links at the node's cgroup that are not there, or not attached: the loader puts them back."""
        found = []
        for name in self._cgroup_links:
            try:
                link = links.open_pin(str(self._folder / name))
            except links.LinkError:
                found.append(name)
                continue
            try:
                if links.link_info(link).where == 0:
                    found.append(name)
            finally:
                os.close(link)
        return found

    def captured_fd(self) -> int:
        """A new read-only descriptor of the map ``captured`` to hand to a proxy; the caller's."""
        with naming("map captured"):
            table = Map.open(str(self._folder / "captured"), read_only=True)
            return table.detach()

    # Connections and accounts

    def connections(self) -> list[Connection]:
        """Every open inbound connection of the pods (not loopback, not our own listeners')."""
        with naming("connections"):
            return accounts.connections(self._folder / "connections")

    def refused_now(self) -> list[Connection]:
        """Those that the policies of this moment refuse (judged in the kernel by the identity they were admitted with)."""
        with naming("connections"):
            return accounts.connections(self._folder / "refused_now")

    def destroy(self, connection: Connection, netns: int) -> bool:
        """Abort a connection at this end (both ends see a reset); False when it was gone already."""
        with naming(f"connection {connection.client} to {connection.server}"):
            ends = connection.server, connection.client
            local, remote = reversed(ends) if connection.dialled else ends
            return namespace.destroy(netns, local, remote, connection.cookie)

    def flows(self) -> dict[FlowKey, FlowCounters]:
        """The accounts, exact at the moment of the call, open connections included."""
        with self._accounts_lock, naming("flows"):
            return accounts.flows(self._folder / "accounts", self._flows, self._refused)

    def forget_flows(self, keys: Iterable[FlowKey]) -> None:
        """Drop accounts (of identities that nobody has any more); those with open connections stay.

        Their sums are added up in the account of what has no room, so that no total goes back.
        """
        with self._accounts_lock, naming("flows"):
            accounts.forget(self._flows, self._refused, keys)

    def end_silent_conversations(self) -> None:
        """UDP conversations in which nobody has spoken for a while end: each is counted, and has a flow record."""
        with naming("conversations"):
            (self._folder / "silent").read_bytes()

    def read_records(self, most: int) -> Iterator[bytes]:
        """Flow records (:class:`bpf.wire.FlowRecord`), the oldest first; each is the kernel's until the next is asked for.

        For one thread at a time.
        """
        return self._records.read(most)

    def records_pending(self) -> int:
        """Bytes of flow records that wait to be read."""
        return self._records.pending()

    def records_lost(self) -> int:
        """Flow records that found no room, since the maps were made."""
        return self._counter(wire.COUNTER_FULL["records"])

    def pressure(self) -> dict[str, Pressure]:
        """By map."""
        with self._lock, naming("map sizes"):
            found: dict[str, Pressure] = {}
            for spec in schema.MAPS:
                table = self._maps[spec.name]
                found[spec.name] = Pressure(
                    self._used(spec.name),
                    table.info.max_entries,
                    self._counter(wire.COUNTER_FULL.get(spec.name, -1)),
                    self._counter(wire.COUNTER_SHARE.get(spec.name, -1)),
                    usage.memory(table),
                )
            return found

    def map_infos(self) -> dict[str, Info]:
        """What the kernel says of each map, by name."""
        return {name: table.info for name, table in self._maps.items()}

    def _used(self, name: str) -> int:
        counter = self._usage.get(name)
        if counter is None:
            rings = {"events": self._events, "records": self._records}
            return rings[name].pending() if name in rings else 0
        if counter.is_cheap:
            return counter.count()
        now = time.monotonic()
        when, used = self._counted.get(name, (-_COUNT_EVERY, 0))
        if now - when >= _COUNT_EVERY:
            used = counter.count()
            self._counted[name] = (now, used)
        return used

    def count_shares(self) -> int:
        """Set right what each pod has of the maps that have shares; how many were wrong. Walks those maps."""
        with self._lock, naming("shares"):
            return self._pods.count_shares()

    def events_fd(self) -> int:
        """Readable when there are events (for an event loop); stays ours."""
        return self._maps["events"].fd

    def read_events(self) -> list[Event]:
        """The events since the last call."""
        with self._lock:
            return read_events(self._events)

    def events_lost(self) -> int:
        """Events that found no room, since the maps were made."""
        return self._counter(wire.COUNTER_FULL["events"])

    def refusals_by_reason(self) -> dict[wire.Reason, int]:
        """Since the maps were made; repeated SYNs of one attempt count once."""
        with self._lock, naming("counters"):
            return {reason: count for reason in wire.Reason if (count := self._counter(reason))}

    def _counter(self, slot: int) -> int:
        if slot < 0:
            return 0
        with self._counters_lock:
            value = self._counters.lookup(struct.pack("=I", slot))
        return int(struct.unpack("=Q", value)[0]) if value else 0

    def _count(self, slot: int) -> None:
        """One more, of what only this process counts. In the kernel, so that a successor goes on with it."""
        with self._counters_lock:
            key = struct.pack("=I", slot)
            value = self._counters.lookup(key)
            if value is not None:
                self._counters.update(key, struct.pack("=Q", struct.unpack("=Q", value)[0] + 1))
