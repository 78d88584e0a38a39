"""What happens when a map is full, for every map of bpf.schema: what bpf.limits declares. A new map without a test here fails."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.kernel import Backend, Direction, KernelError, MapFullError, Peer, namespace
from agent.kernel.model import Network
from bpf import maps, schema, wire
from bpf.maps import Map
from bpf.wire import Role
from tests.kernel.mesh import Node, TestPod

pytestmark = pytest.mark.privileged

PORT = 8080
ROOM = 64


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    sizes = tuple(
        f"{spec.name}={4096 if spec.type == maps.RINGBUF else ROOM}"
        for spec in schema.MAPS
        if spec.type
        in (maps.HASH, maps.HASH_OF_MAPS, maps.LPM_TRIE, maps.LRU_HASH, maps.SOCKHASH, maps.RINGBUF)
        and not spec.name.startswith("splice")
    )
    node = Node(tmp_path_factory.mktemp("full"), sizes=sizes)
    client, server, spare = (TestPod(node, f"10.77.0.{10 + number}", 20 + number) for number in range(3))
    client.enrol({})
    server.enrol({(client.identity, 0): True})
    yield World(node, client, server, spare)
    for pod in (client, server, spare):
        pod.close()
    node.close()


class World:
    def __init__(self, node, client, server, spare) -> None:
        self.node, self.client, self.server, self.spare = node, client, server, spare
        self.kernel = node.kernel

    @contextlib.contextmanager
    def full(self, name: str) -> Iterator[None]:
        """Elements of nobody until there is no room for another."""
        table: Map = self.kernel._maps[name]
        model = schema.INNER.get(name) if hasattr(schema, "INNER") else None
        with contextlib.ExitStack() as stack:
            if model is not None:
                inner = stack.enter_context(
                    Map.create(
                        model.type, model.name, model.key_size, model.value_size, 64, flags=model.flags
                    )
                )
                value = struct.pack("=i", inner.fd)
            else:
                value = bytes(table.value_size)
            number = 0
            with contextlib.suppress(MapFullError):
                while number < 4 * ROOM:
                    number += 1
                    key = bytearray(b"\xee" * table.key_size)
                    # No index of an interface that is there.
                    struct.pack_into("=I", key, table.key_size - 4, 0xEE000000 + number)
                    if table.info.type == maps.LPM_TRIE:
                        struct.pack_into("=I", key, 0, 8 * (table.key_size - 4))
                    elif table.info.type == maps.SOCKHASH:
                        pair = [stack.enter_context(one) for one in socket.socketpair()]
                        value = struct.pack("=Q", pair[0].fileno())
                    table.update(bytes(key), value)
                    stack.callback(table.delete, bytes(key))
            assert self.kernel.pressure()[name].used >= ROOM or table.info.type == maps.LRU_HASH
            yield

    def connects(self) -> None:
        with (
            self.server.app.listen(("0.0.0.0", PORT)) as listener,
            self.client.app.connect((self.server.address, PORT)) as sock,
        ):
            accepted, _ = listener.accept()
            with accepted:
                sock.sendall(b"x")
                assert accepted.recv(1) == b"x"

    def pod_is_refused(self) -> None:
        with pytest.raises(MapFullError):
            self.spare.enrol({})
        self.kernel.remove_pod(self.spare.cookie)
        assert self.spare.cookie not in self.kernel.pods()
        self.connects()


def roles(world):
    with pytest.raises(MapFullError):
        world.kernel.set_role(1 << 40, Role.NODEPROXY)
    assert 1 << 40 not in world.kernel.roles()


def pods(world):
    world.pod_is_refused()


def interfaces(world):
    """What cannot be guarded at its interface is not enrolled."""
    world.pod_is_refused()


def peers(world):
    with pytest.raises(MapFullError):
        world.kernel.set_peer("10.88.0.1", Peer(False, True, 77))
    world.pod_is_refused()


def a_service(world):
    """It is not there at all, or as it was."""
    many = [Backend("10.77.0.99", 80 + number) for number in range(wire.FEW_BACKENDS + 1)]
    with pytest.raises(MapFullError):
        world.kernel.set_service("10.96.3.1", 80, many, affinity=60)
    assert world.kernel._maps["services"].lookup(wire.Endpoint("10.96.3.1", 80).pack()) is None


def forgets(name):
    def work(world):
        world.connects()
        table = world.kernel._maps[name]
        table.update(b"\x77" * table.key_size, bytes(table.value_size))
        assert table.lookup(b"\x77" * table.key_size) is not None
        table.delete(b"\x77" * table.key_size)

    return work


def policies(world):
    world.kernel.remove_pod(world.spare.cookie)
    with pytest.raises(MapFullError):
        world.spare.enrol({(world.client.identity, 0): True})
    with world.spare.app.listen(("0.0.0.0", PORT)), pytest.raises(PermissionError):
        world.client.app.connect((world.spare.address, PORT), timeout=1)
    world.kernel.remove_pod(world.spare.cookie)


def classes(world):
    before = world.kernel.policy(world.server.cookie)
    with pytest.raises(MapFullError):
        world.kernel.set_policy(world.server.cookie, {(0, 0, 1): True}, 2, {"10.0.0.0/8": 1})
    assert world.kernel.policy(world.server.cookie) == before
    world.connects()


def networks(world):
    network = Network({"10.0.0.0/8": 1}, {1: frozenset({(0, 0, 65535)})})
    with pytest.raises(MapFullError):
        world.kernel.set_network(world.server.cookie, Direction.INBOUND, network)
    world.connects()


def refused_dial(world):
    with world.server.app.listen(("0.0.0.0", PORT)), pytest.raises(OSError) as refused:
        world.client.app.connect((world.server.address, PORT), timeout=1)
    assert refused.value.errno in (111, 110) or isinstance(refused.value, TimeoutError)


def refused_capture(world):
    world.connects()
    peers = world.kernel._maps["peers"]
    world.kernel.set_peer("10.88.0.1", Peer(False, True, 77))
    with pytest.raises(OSError):
        world.client.app.connect(("10.88.0.1", PORT), timeout=1)
    world.kernel.remove_peer("10.88.0.1")
    assert peers.lookup(wire.pack_address("10.88.0.1")) is None


def listeners(world):
    pod = world.server
    with pytest.raises(MapFullError):
        os.close(world.kernel.create_listener(pod.netns, pod.addresses, wire.PORT_HBONE))
    assert not world.kernel.has_listener(pod.address, wire.PORT_HBONE)
    with pytest.raises(OSError):
        world.node.worker("host").connect((pod.address, wire.PORT_HBONE), timeout=1)


def counted_elsewhere(world):
    """The connection goes on; a refused one is refused."""
    world.connects()
    with pytest.raises(PermissionError):
        world.server.app.connect((world.client.address, PORT))


def events(world):
    before = world.kernel.pressure()["events"].refused
    for port in range(1, 120):
        with pytest.raises(PermissionError):
            world.server.app.connect((world.client.address, port))
    assert world.kernel.events_lost() == world.kernel.pressure()["events"].refused > before
    world.connects()
    list(world.kernel.read_events())


#: What fills a map and sees what happens; a text is where that is tested with traffic of its own.
VERDICTS: dict[str, Callable[[World], None] | str] = {
    "roles": roles,
    "pods": pods,
    "peers": peers,
    "services": a_service,
    "backends": a_service,
    "members": a_service,
    "affinity": forgets("affinity"),
    "datagrams": forgets("datagrams"),
    "udp_sockets": "test_datagrams.py::test_no_room_for_what_a_socket_used",
    "policies": policies,
    "classes": classes,
    "networks": networks,
    "interfaces": interfaces,
    "talks": forgets("talks"),
    "connecting": refused_dial,
    "captured": refused_capture,
    "shares": pods,
    "listeners": listeners,
    "flows": counted_elsewhere,
    "refused": counted_elsewhere,
    "conversations": "test_flow_records.py::test_every_map_counts_what_finds_no_room",
    "records": "test_flow_records.py::test_losses_are_counted_exactly",
    "recent": forgets("recent"),
    "events": events,
    "splices": "test_splice.py::test_full_maps",
    "splice_sockets": "test_splice.py::test_full_maps",
}
#: Nothing can fill them, or only the kernel's lack of memory.
NEVER_FULL = {
    "closed",
    "counters",
    "splice_counters",
    "splice_programs",
    "splice_ends",
    "splice_wakes",
    "sockets",
}


@pytest.mark.parametrize("name", [spec.name for spec in schema.MAPS])
def test_what_happens_when_it_is_full(small, name):
    if name in NEVER_FULL:
        assert name not in VERDICTS
        return
    assert name in VERDICTS, f"map {name} has no test of what happens when it is full"
    verdict = VERDICTS[name]
    if isinstance(verdict, str):
        file, _, test = verdict.partition("::")
        assert re.search(rf"def {test}\(", (Path(__file__).parent / file).read_text())
        return
    if schema_of(name).type == maps.RINGBUF:
        verdict(small)
    else:
        with small.full(name):
            verdict(small)
    small.connects()


def test_classes_that_find_no_room_leave_that_of_others(small):
    """Those of a policy that is not in force are nobody's."""
    classes = small.kernel._maps["classes"]

    def of_server():
        return [key for key, _ in classes.items() if wire.ClassKey.unpack(key).netns == small.server.cookie]

    with small.full("classes"):
        classes.delete(next(iter(classes.keys())))
        with pytest.raises(MapFullError):
            small.kernel.set_policy(
                small.server.cookie, {(0, 0, 1): True}, 2, {"10.0.0.0/8": 1, "10.1.0.0/16": 2}
            )
        assert of_server() == []
        small.connects()


def schema_of(name: str) -> schema.MapSpec:
    return next(spec for spec in schema.MAPS if spec.name == name)


def test_a_pod_that_found_no_room_leaves_nothing_in_its_namespace(small):
    with small.full("pods"), pytest.raises((MapFullError, KernelError)):
        small.spare.enrol({})
    assert not namespace.is_prepared(small.spare.netns)
