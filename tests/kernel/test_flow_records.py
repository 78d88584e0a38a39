"""Flow records: one for each end that closes and for each refusal, equal to the sums, with every loss counted."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest

from agent.flowlog import FlowLog, Names, Sink
from agent.kernel import Direction, FlowKey, Kernel, MapFullError, Peer, Reason
from bpf import wire
from bpf.maps import Map
from bpf.wire import Conversation, ConversationKey, FlowRecord, Via
from tests.kernel.mesh import Node, TestPod

pytestmark = pytest.mark.privileged

PORT = 8080


def records(kernel: Kernel, *pods: TestPod) -> list[FlowRecord]:
    """Those that have come of connections between these pods; others' are read too, and belong to no test of now."""
    identities = {pod.identity for pod in pods}
    found = [FlowRecord.unpack(data) for data in kernel.read_records(1 << 30)]
    return [one for one in found if {one.source, one.destination} <= identities | {0}]


def more(found: list[Any], new: Iterable[Any]) -> list[Any]:
    found.extend(new)
    return found


def emptied(node: Node, name: str) -> Map:
    """A map of the node that other tests have used too, and perhaps filled."""
    table = node.kernel._maps[name]
    for key, _ in list(table.items()):
        table.delete(key)
    return table


def until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def pods(node, make_pod):
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, PORT): True})
    list(node.kernel.read_records(1 << 30))
    return client, server


def talk(client: TestPod, server: TestPod, sizes: list[tuple[int, int]]) -> list[int]:
    """One connection for each (request, answer), in bytes; the clients' ports."""
    ports = []
    with server.app.listen(("0.0.0.0", PORT)) as listener:
        for request, answer in sizes:
            sock = client.app.connect((server.address, PORT))
            accepted, _ = listener.accept()
            ports.append(sock.getsockname()[1])
            for here, there, count in ((sock, accepted, request), (accepted, sock, answer)):
                here.sendall(b"x" * count)
                left = count
                while left:
                    left -= len(there.recv(left))
            sock.close()
            assert accepted.recv(1) == b""
            accepted.close()
    return ports


def test_both_ends_of_a_connection(node, pods):
    client, server = pods
    before = time.monotonic_ns()
    [port] = talk(client, server, [(1000, 300)])
    after = time.monotonic_ns()
    found: list[FlowRecord] = []
    until(lambda: len(more(found, records(node.kernel, *pods))) == 2)
    out, into = sorted(found, key=lambda one: one.direction)
    assert (out.direction, into.direction) == (Direction.OUTBOUND, Direction.INBOUND)
    assert (out.sent, out.received, into.sent, into.received) == (1000, 300, 300, 1000)
    for one, pod in ((out, client), (into, server)):
        assert one.netns == pod.cookie
        assert (one.source, one.destination) == (client.identity, server.identity)
        assert (one.client_address, one.client_port) == (client.address, port)
        assert (one.server_address, one.server_port, one.port) == (server.address, PORT, PORT)
        assert (one.protocol, one.verdict, one.kind) == (wire.PROTOCOL_TCP, 0, Via.DIRECT)
        assert before <= one.started <= one.ended <= after + 1_000_000_000
        assert 0 < one.rtt_us < 1_000_000
        assert (one.retransmits, one.sent_datagrams, one.received_datagrams) == (0, 0, 0)


def test_refusals_have_a_record_each(node, pods):
    client, server = pods
    for _ in range(20):
        with pytest.raises(PermissionError):
            client.app.connect((server.address, PORT + 1))
    found = records(node.kernel, *pods)
    assert len(found) == 20
    assert {(one.verdict, one.port, one.netns) for one in found} == {(Reason.POLICY, PORT + 1, client.cookie)}
    assert {(one.sent, one.received, one.ended - one.started) for one in found} == {(0, 0, 0)}


def test_one_refused_on_arrival(node, pods):
    _, server = pods
    with pytest.raises(ConnectionRefusedError):
        node.worker("somebody").connect((server.address, PORT))
    [one] = records(node.kernel, server)
    assert (one.verdict, one.source, one.destination) == (Reason.POLICY, 0, server.identity)
    assert (one.netns, one.client_address, one.server_address) == (0, node.gateway, server.address)


def test_records_add_up_to_the_sums_over_successors(node, pods):
    """Read by one agent after the other, while connections come and go and programs are replaced: none lost, none twice."""
    client, server = pods
    numbers = random.Random(5)
    sizes = [(numbers.randrange(1, 5000), numbers.randrange(1, 5000)) for _ in range(150)]
    ports: list[int] = []
    thread = threading.Thread(target=lambda: ports.extend(talk(client, server, sizes)))
    lost = node.kernel.records_lost()
    found: list[FlowRecord] = []
    thread.start()
    try:
        for number in range(200):
            with Kernel(node.pins, node.netns) as successor:
                found += records(successor, *pods)
            if number == 1:
                node.load("--replace")
            if not thread.is_alive():
                break
    finally:
        thread.join(30)
    until(lambda: len(more(found, records(node.kernel, *pods))) >= 2 * len(sizes))
    time.sleep(0.1)
    found += records(node.kernel, *pods)
    assert node.kernel.records_lost() == lost
    assert len(found) == 2 * len(sizes)
    flows = node.kernel.flows()
    key = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
    for direction in Direction:
        mine = [one for one in found if one.direction == direction]
        sums = flows[key._replace(direction=direction)]
        assert sorted(one.client_port for one in mine) == sorted(ports)
        assert sums.totals == (
            len(sizes),
            len(sizes),
            0,
            sum(one.sent for one in mine),
            sum(one.received for one in mine),
        )
    written = {(request, answer) for request, answer in sizes}
    assert {(one.sent, one.received) for one in found if one.direction == Direction.OUTBOUND} == written


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A node whose maps have little room."""
    sizes = ("records=4096", "pods=2", "peers=6", "services=1", "roles=5")
    node = Node(tmp_path_factory.mktemp("small"), sizes=sizes)
    yield node
    node.close()


@pytest.fixture
def small_pod(small):
    pods: list[TestPod] = []

    def make() -> TestPod:
        number = len(pods) + 20
        pods.append(TestPod(small, f"10.77.0.{number}", number))
        return pods[-1]

    yield make
    for pod in pods:
        pod.close()


def test_losses_are_counted_exactly(small, small_pod):
    """Nobody reads: what found no room is counted, to the record, and the sums are whole."""
    client, server = small_pod(), small_pod()
    client.enrol({})
    server.enrol({(client.identity, PORT): True})
    room = 4096 // (FlowRecord.LAYOUT.size + 8)
    for _ in range(3 * room):
        with pytest.raises(PermissionError):
            client.app.connect((server.address, PORT + 1))
    lost = small.kernel.records_lost()
    kept = list(small.kernel.read_records(1 << 30))
    assert len(kept) + lost == 3 * room
    assert len(kept) == room
    talk(client, server, [(10, 20)] * 5)
    until(lambda: sum(flow.closed for flow in small.kernel.flows().values()) == 10)
    until(lambda: len(more(kept, small.kernel.read_records(1 << 30))) == room + 10)
    assert small.kernel.records_lost() == lost
    flows = small.kernel.flows()
    assert sum(flow.refused for flow in flows.values()) == 3 * room
    assert sum(flow.sent for flow in flows.values()) == 2 * 5 * 15
    # And a successor knows of what was lost before it.
    with Kernel(small.pins) as successor:
        assert successor.records_lost() == lost
        assert successor.pressure()["records"].refused == lost


def test_a_reader_that_dies_over_a_record_leaves_it_to_its_successor(node, pods):
    client, server = pods
    for _ in range(3):
        with pytest.raises(PermissionError):
            client.app.connect((server.address, PORT + 1))
    reading = node.kernel.read_records(1 << 30)
    first, second = next(reading), next(reading)
    reading.close()
    left = list(node.kernel.read_records(1 << 30))
    assert left[0] == second != first
    assert len(left) == 2


def test_a_conversation_ends_by_silence(node, make_pod):
    pod = make_pod().enrol({})
    table = emptied(node, "conversations")
    now = time.monotonic_ns()
    idle = 31_000_000_000

    def conversation(peer_port: int, last: int) -> bytes:
        key = ConversationKey(pod.cookie, pod.address, "10.88.0.1", 40000, peer_port)
        value = Conversation(
            last - 5, last, 100, 2000, 3, 4, pod.identity, 77, 0, 2, peer_port, 0, 17, Direction.OUTBOUND, 0
        )
        table.update(key.pack(), value.pack())
        return key.pack()

    silent, alive = conversation(53, now - idle), conversation(54, now)
    list(node.kernel.read_records(1 << 30))
    node.kernel.end_silent_conversations()
    assert table.lookup(silent) is None
    assert table.lookup(alive) is not None
    # Others' conversations may end in the same pass.
    found = [FlowRecord.unpack(data) for data in node.kernel.read_records(1 << 30)]
    [one] = [one for one in found if one.netns == pod.cookie]
    assert (one.source, one.destination) == (pod.identity, 77)
    assert (one.client_address, one.client_port) == (pod.address, 40000)
    assert (one.server_address, one.server_port) == ("10.88.0.1", 53)
    assert (one.started, one.ended) == (now - idle - 5, now - idle)
    assert (one.sent, one.received, one.sent_datagrams, one.received_datagrams) == (100, 2000, 3, 4)
    assert (one.protocol, one.destination_zone, one.verdict) == (wire.PROTOCOL_UDP, 2, 0)
    key = FlowKey(pod.identity, 77, 53, Direction.OUTBOUND, wire.PROTOCOL_UDP, destination_zone=2)
    assert node.kernel.flows()[key].closed == 1
    node.kernel.end_silent_conversations()
    assert node.kernel.flows()[key].closed == 1
    table.delete(alive)


def test_thousands_of_silent_conversations_end_in_one_pass(node, make_pod):
    pod = make_pod().enrol({})
    table = emptied(node, "conversations")
    last = time.monotonic_ns() - 31_000_000_000
    for port in range(1, 5001):
        key = ConversationKey(pod.cookie, pod.address, "10.88.0.2", port, 53)
        value = Conversation(last, last, 1, 1, 1, 1, pod.identity, 78, 0, 0, 53, 0, 17, 0, 0)
        table.update(key.pack(), value.pack())
    list(node.kernel.read_records(1 << 30))
    lost = node.kernel.records_lost()
    node.kernel.end_silent_conversations()
    assert not [key for key, _ in table.items() if ConversationKey.unpack(key).netns == pod.cookie]
    found = [FlowRecord.unpack(data) for data in node.kernel.read_records(1 << 30)]
    read = sum(one.netns == pod.cookie for one in found)
    assert read + node.kernel.records_lost() - lost == 5000
    account = FlowKey(pod.identity, 78, 53, Direction.OUTBOUND, wire.PROTOCOL_UDP)
    assert node.kernel.flows()[account].closed == 5000


def test_zones_are_in_accounts_and_records(node, make_pod):
    client, server = make_pod(), make_pod()
    client.zone = server.zone = 3
    client.enrol({})
    server.enrol({(client.identity, PORT): True, (0, PORT): True})
    node.kernel.set_peer(node.gateway, Peer(False, False, 0, zone=4))
    list(node.kernel.read_records(1 << 30))
    try:
        talk(client, server, [(1, 1)])
        with server.app.listen(("0.0.0.0", PORT)) as listener:
            node.worker("somebody").connect((server.address, PORT)).close()
            listener.accept()[0].close()
        with pytest.raises(PermissionError):
            client.app.connect((server.address, PORT + 1))
    finally:
        node.kernel.remove_peer(node.gateway)
    found: list[FlowRecord] = []
    until(lambda: len(more(found, records(node.kernel, client, server))) == 4)
    assert {(one.source, one.source_zone, one.destination_zone) for one in found} == {
        (client.identity, 3, 3),
        (0, 4, 3),
    }
    key = FlowKey(
        client.identity, server.identity, PORT, Direction.INBOUND, source_zone=3, destination_zone=3
    )
    flows = node.kernel.flows()
    assert flows[key].opened == 1
    assert flows[key._replace(direction=Direction.OUTBOUND)].opened == 1
    assert flows[key._replace(source=0, source_zone=4)].opened == 1
    assert flows[key._replace(port=PORT + 1, verdict=Reason.POLICY)].refused == 1


def test_reading_accounts_keeps_nobody_from_the_tables(node):
    """Accounts may be many: a pod is added meanwhile."""
    done = threading.Event()

    def read() -> None:
        node.kernel.flows()
        done.set()

    thread = threading.Thread(target=read)
    with node.kernel._lock:
        thread.start()
        assert done.wait(5)
    thread.join()


def test_every_map_counts_what_finds_no_room(small, small_pod):
    small_pod().enrol({})
    small_pod().enrol({})
    with pytest.raises(MapFullError):
        small_pod().enrol({})
    small.kernel.set_service("10.96.0.1", 80, ())
    for _ in range(3):
        with pytest.raises(MapFullError):
            small.kernel.set_service("10.96.0.2", 80, ())
    with pytest.raises(MapFullError):
        small.kernel.set_role(12345, wire.Role.PROBER)
    expected = {"pods": 1, "services": 3, "roles": 1, "peers": 0}
    assert {name: small.kernel.pressure()[name].refused for name in expected} == expected
    with Kernel(small.pins) as successor:
        assert {name: successor.pressure()[name].refused for name in expected} == expected


def test_accounts_that_are_forgotten_stay_in_the_sum(node, pods):
    client, server = pods
    talk(client, server, [(100, 50), (10, 5)])
    with pytest.raises(PermissionError):
        client.app.connect((server.address, PORT + 1))
    key = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
    into = key._replace(direction=Direction.INBOUND)
    until(lambda: all(node.kernel.flows()[one].closed == 2 for one in (key, into)))
    refused = into._replace(port=PORT + 1, verdict=Reason.POLICY)

    def sums() -> tuple[int, ...]:
        flows = node.kernel.flows().values()
        return tuple(sum(column) for column in zip(*(flow.totals for flow in flows), strict=True))

    with server.app.listen(("0.0.0.0", PORT)) as listener, client.app.connect((server.address, PORT)):
        accepted, _ = listener.accept()
        before = sums()
        # Of what is open nothing is forgotten.
        node.kernel.forget_flows([key, into, refused])
        assert {key, into} <= node.kernel.flows().keys()
        assert refused not in node.kernel.flows()
        assert sums() == before
        accepted.close()
    until(lambda: all(node.kernel.flows()[one].closed == 3 for one in (key, into)))
    before = sums()
    for _ in range(2):
        node.kernel.forget_flows([key, into, refused])
        assert not {key, into, refused} & node.kernel.flows().keys()
        assert sums() == before


def test_tcp_info_agrees_on_time_and_retransmits(node, pods):
    client, server = pods
    key = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
    with server.app.listen(("0.0.0.0", PORT)) as listener:
        sock = client.app.connect((server.address, PORT))
        accepted, _ = listener.accept()
        sock.sendall(b"x" * 10_000)
        left = 10_000
        while left:
            left -= len(accepted.recv(left))
        time.sleep(0.1)
        before = node.kernel.flows()[key]
        after = node.kernel.flows()[key]
        [connection] = [c for c in node.kernel.connections() if c.source == client.identity]
        assert (after.rtt_samples, after.rtt_us) == (before.rtt_samples + 1, before.rtt_us + rtt(sock))
        assert (connection.rtt_us, connection.retransmits) == (rtt(accepted), 0)
        accepted.close()
        sock.close()


def rtt(sock: socket.socket) -> int:
    """``tcpi_rtt``, microseconds."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", info, 68)[0])


def test_the_agent_s_log_of_them(node, pods, tmp_path):
    """From the kernel's ring buffer to lines in a file."""
    client, server = pods
    path = tmp_path / "flows"
    names = Names(
        lambda n: f"shop/{n}", lambda n: "", lambda zone: "unknown", lambda cookie: f"shop/{cookie}"
    )
    log = FlowLog(node.kernel, names, sink=Sink(str(path)))
    talk(client, server, [(123, 456)])
    with pytest.raises(PermissionError):
        client.app.connect((server.address, PORT + 1))
    until(lambda: log.drain(time.monotonic()) >= 0 and log.counts.written == 3)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["direction"], one["verdict"], one["reason"], one["sent"]) for one in log.newest({})] == [
        (one["direction"], one["verdict"], one["reason"], one["sent"]) for one in reversed(lines)
    ]
    by = {(one["direction"], one["verdict"]): one for one in lines}
    assert by["outbound", "allowed"]["sent"] == by["inbound", "allowed"]["received"] == 123
    assert by["outbound", "allowed"]["pod"] == f"shop/{client.cookie}"
    assert by["inbound", "refused"]["reason"] == "policy"
