"""A kernel that only remembers: for tests of the agent's own logic, in process or as ``python -m tests.agent.fakes``.

Started as a module it is the whole agent with this kernel in place of the real one, for tests that need many starts. What is
enforced is proved elsewhere, on the real one.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from agent.kernel import (
    Backend,
    Connection,
    Direction,
    Event,
    FlowCounters,
    FlowKey,
    Frontend,
    Kernel,
    KernelError,
    MapFullError,
    Network,
    Peer,
    Pod,
    Pressure,
    Protocol,
    Reason,
    Service,
)
from agent.kernel.splices import Splices
from bpf.maps import Info
from bpf.wire import Role, SpliceCounter

_SO_COOKIE = 57


class FakeSplices(Splices):
    """Of a kernel that has none."""

    def __init__(self) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def supported(self) -> bool:
        return False

    @property
    def on(self) -> bool:
        return False

    def counters(self) -> dict[SpliceCounter, int]:
        return {}


class FakeKernel(Kernel):
    """``calls`` is the transcript of what was written. ``broken`` makes writes about an address or cookie fail."""

    def __init__(self, pins: Path = Path("/nowhere")) -> None:
        self.splices = FakeSplices()
        self.calls: list[str] = []
        self.broken: set[object] = set()
        self.lacking: dict[int, list[str]] = {}
        self.ended: set[int] = set()
        self.open_connections: list[Connection] = []
        self.refused: list[Connection] = []
        self.accounts: dict[FlowKey, FlowCounters] = {}
        self.map_pressure: dict[str, Pressure] = {"pods": Pressure(0, 1024, 0)}
        self.fake_detached: list[str] = []
        self.share_counts = 0
        self.fake_roles: dict[int, Role] = {}
        self.fake_pods: dict[int, Pod] = {}
        self.fake_policies: dict[int, tuple[int, dict[tuple[int, ...], bool]]] = {}
        self.fake_classes: dict[int, dict[str, int]] = {}
        self.fake_networks: dict[tuple[int, Direction], Network] = {}
        self.fake_peers: dict[str, Peer] = {}
        self.fake_services: dict[Frontend, Service] = {}
        self.fake_listeners: dict[tuple[str, int], int] = {}  #: cookies
        self.fake_events_lost = 0
        self.fake_unlinked: set[int] = set()
        self.fake_links = True  #: whether they can be attached
        self.fake_events, self.fake_events_writer = os.pipe()
        self.fake_fails = os.environ.get("FAKE_KERNEL_FAILS", "").split(",")
        if "pressure" in self.fake_fails:
            self.map_pressure["pods"] = Pressure(1024, 1024, 0)

    def close(self) -> None:
        os.close(self.fake_events)
        os.close(self.fake_events_writer)

    def _write(self, call: str, *about: object) -> None:
        for thing in about:
            if thing in self.broken:
                raise (
                    MapFullError(7, f"map full at {thing}")
                    if isinstance(thing, str)
                    else KernelError(f"{thing} is broken")
                )
        self.calls.append(call)

    def set_role(self, cgroup_id: int, role: Role) -> None:
        self._write(f"role {cgroup_id} {role.name}", cgroup_id)
        self.fake_roles[cgroup_id] = role

    def roles(self) -> dict[int, Role]:
        return dict(self.fake_roles)

    def add_pod(
        self,
        pod: Pod,
        netns: int,
        policy: tuple[int, Mapping[tuple[int, ...], bool], Mapping[str, int]] | None = None,
        *,
        starting: bool = False,
    ) -> None:
        os.fstat(netns)
        self._write(f"add pod {pod.netns_cookie} {','.join(pod.addresses)} {pod.identity}", pod.netns_cookie)
        self.fake_pods[pod.netns_cookie] = pod
        if starting:
            self.fake_unlinked.add(pod.netns_cookie)
        if policy is not None:
            generation, table, classes = policy
            self.set_policy(pod.netns_cookie, table, generation, classes)

    def link_pod(self, netns_cookie: int, netns: int) -> None:
        os.fstat(netns)
        if not self.fake_links:
            raise KernelError("no links now")
        self._write(f"link pod {netns_cookie}")
        self.fake_unlinked.discard(netns_cookie)

    def unlinked(self) -> set[int]:
        return set(self.fake_unlinked)

    def remove_pod(self, netns_cookie: int, netns: int | None = None) -> None:
        self._write(f"remove pod {netns_cookie}", netns_cookie)
        self.fake_unlinked.discard(netns_cookie)
        if "remove-first" in self.fake_fails and netns_cookie == next(iter(self.fake_pods), None):
            raise KernelError(f"pod {netns_cookie} cannot be removed")
        self.fake_pods.pop(netns_cookie, None)
        self.fake_policies.pop(netns_cookie, None)
        for direction in Direction:
            self.fake_networks.pop((netns_cookie, direction), None)

    def pods(self) -> dict[int, Pod]:
        return dict(self.fake_pods)

    def gone(self) -> set[int]:
        return set(self.ended)

    def missing(self, netns_cookie: int, netns: int) -> list[str]:
        return self.lacking.get(netns_cookie, [])

    def make_listener(self, netns: int, addresses: tuple[str, ...], port: int) -> int:
        address = ",".join(addresses)
        self._write(f"listener {address}:{port}", (address, port))
        sock = socket.socket()
        sock.listen()
        return sock.detach()

    def set_listener(self, address: str, port: int, fd: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:
            cookie = sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
        self.fake_listeners[address, port] = int.from_bytes(cookie, sys.byteorder)

    def listener(self, address: str, port: int) -> int:
        return self.fake_listeners.get((address, port), 0)

    def kill_listener(self, address: str, port: int) -> None:
        """As when the proxy that holds it dies."""
        del self.fake_listeners[address, port]

    def create_outbound(self, netns: int, count: int = 1, *, ipv6: bool = False) -> list[int]:
        return [socket.socket().detach() for _ in range(count)]

    def create_delivery(self, netns: int, count: int = 1, *, ipv6: bool = False) -> list[int]:
        return self.create_outbound(netns, count, ipv6=ipv6)

    def set_policy(
        self,
        netns_cookie: int,
        table: Mapping[tuple[int, ...], bool],
        generation: int,
        classes: Mapping[str, int] | None = None,
    ) -> None:
        self._write(f"policy {netns_cookie} generation {generation}", ("policy", netns_cookie))
        self.fake_policies[netns_cookie] = (generation, dict(table))
        self.fake_classes[netns_cookie] = dict(classes or {})

    def policy(self, netns_cookie: int) -> tuple[int, dict[tuple[int, ...], bool]] | None:
        return self.fake_policies.get(netns_cookie)

    def policy_classes(self, netns_cookie: int, generation: int) -> dict[str, int]:
        return self.fake_classes.get(netns_cookie, {})

    def set_network(self, netns_cookie: int, direction: Direction, network: Network | None) -> None:
        self._write(f"network {netns_cookie} {direction.name}", ("network", netns_cookie))
        if network is None:
            self.fake_networks.pop((netns_cookie, direction), None)
        else:
            self.fake_networks[netns_cookie, direction] = network

    def has_network(self, netns_cookie: int, direction: Direction, network: Network | None) -> bool:
        return self.fake_networks.get((netns_cookie, direction)) == network

    def host_addresses(self) -> frozenset[str]:
        return frozenset()

    def set_peer(self, address: str, peer: Peer) -> None:
        if address not in {a for pod in self.fake_pods.values() for a in pod.addresses}:
            self._write(f"peer {address} {'enrolled' if peer.enrolled else 'plain'}", address)
            self.fake_peers[address] = peer

    def remove_peer(self, address: str) -> None:
        if address not in {a for pod in self.fake_pods.values() for a in pod.addresses}:
            self._write(f"no peer {address}", address)
            self.fake_peers.pop(address, None)

    def peers(self) -> dict[str, Peer]:
        return self.fake_peers | {
            address: Peer(True, True, pod.identity)
            for pod in self.fake_pods.values()
            for address in pod.addresses
        }

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
        frontend, wanted = Frontend(address, port, protocol), Service(l7, tuple(backends), affinity)
        if self.fake_services.get(frontend) == wanted:
            return
        ends = ",".join(f"{b.address}:{b.port}" for b in wanted.backends)
        self._write(f"service {address}:{port} {ends}", (address, port))
        self.fake_services[frontend] = wanted

    def remove_service(self, address: str, port: int, protocol: Protocol = Protocol.TCP) -> None:
        self._write(f"no service {address}:{port}", (address, port))
        self.fake_services.pop(Frontend(address, port, protocol), None)

    def services(self) -> dict[Frontend, Service]:
        return dict(self.fake_services)

    def damaged_services(self, frontends: Collection[Frontend]) -> list[Frontend]:
        return [frontend for frontend in frontends if frontend not in self.fake_services]

    def detached(self) -> list[str]:
        return list(self.fake_detached)

    def count_shares(self) -> int:
        self.share_counts += 1
        return 0

    def captured_fd(self) -> int:
        return os.open("/dev/null", os.O_RDONLY)

    def connections(self) -> list[Connection]:
        return list(self.open_connections)

    def refused_now(self) -> list[Connection]:
        return list(self.refused)

    def destroy(self, connection: Connection, netns: int) -> bool:
        if connection not in self.refused:
            return False
        self.refused.remove(connection)
        self.calls.append(f"destroy {connection.client[1]}")
        return True

    def flows(self) -> dict[FlowKey, FlowCounters]:
        return dict(self.accounts)

    def forget_flows(self, keys: Iterable[FlowKey]) -> None:
        for key in keys:
            self.accounts.pop(key, None)

    def pressure(self) -> dict[str, Pressure]:
        return dict(self.map_pressure)

    def map_infos(self) -> dict[str, Info]:
        return {}

    def refusals_by_reason(self) -> dict[Reason, int]:
        return {}

    def events_fd(self) -> int:
        return self.fake_events

    def read_events(self) -> list[Event]:
        return []

    def read_records(self, most: int) -> Iterator[bytes]:
        return iter(())

    def records_pending(self) -> int:
        return 0

    def records_lost(self) -> int:
        return 0

    def events_lost(self) -> int:
        return self.fake_events_lost

    def end_silent_conversations(self) -> None:
        """There are none."""


if __name__ == "__main__":
    import agent.daemon
    from agent.__main__ import main

    async def nothing(_: object) -> None:
        """In the loader's place."""

    setattr(agent.daemon, "Kernel", FakeKernel)  # noqa: B010
    setattr(agent.daemon, "_load", nothing)  # noqa: B010
    main()
