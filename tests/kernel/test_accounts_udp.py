"""UDP: what passes a pod's veth is counted to the byte and datagram, by who spoke first, allowed or not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from agent.kernel import Direction, FlowCounters, FlowKey, Reason
from bpf.wire import PROTOCOL_UDP, Conversation, FlowRecord
from tests.kernel.mesh import Node, Sock, TestPod
from tests.kernel.test_accounts_on_the_wire import counters, rules

pytestmark = pytest.mark.privileged

FAMILIES = ("ipv4", "ipv6")
PORT = 5353
#: Empty, small, as large as a packet, and more than one holds.
SIZES = (0, 1, 100, 1400, 1472, 1473, 5000, 60_000)
#: Of a packet in one piece, by family: IP and UDP.
HEADERS = {"ipv4": 28, "ipv6": 48}
UDP_SEGMENT = 103


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Talk:
    """A client's socket and a server's, in two pods."""

    def __init__(self, node: Node, client: TestPod, server: TestPod, port: int = PORT) -> None:
        self.node, self.to = node, (server.address, port)
        self.client: Sock = client.app.datagrams(bind=("", 0))
        self.server: Sock = server.app.datagrams(bind=("", port))
        for sock in (self.client, self.server):
            sock.settimeout(5)
        self.key = FlowKey(client.identity, server.identity, port, Direction.OUTBOUND, PROTOCOL_UDP)
        self.into = self.key._replace(direction=Direction.INBOUND)

    def ask(self, size: int) -> tuple[str, int]:
        """One datagram, that arrives; from whom it came."""
        self.client.sendto(b"q" * size, self.to)
        data, peer = self.server.recvfrom(1 << 17)
        assert len(data) == size
        return peer

    def answer(self, size: int, peer: tuple[str, int]) -> None:
        self.server.sendto(b"a" * size, peer)
        assert len(self.client.recv(1 << 17)) == size

    def accounts(self) -> tuple[FlowCounters, FlowCounters]:
        flows = self.node.kernel.flows()
        return flows.get(self.key, FlowCounters()), flows.get(self.into, FlowCounters())

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def pods(node: Node, make_pod: Callable[..., TestPod]) -> tuple[TestPod, TestPod]:
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, PORT): True})
    list(node.kernel.read_records(1 << 30))
    return client, server


@pytest.fixture
def talk(node: Node, pods: tuple[TestPod, TestPod]) -> Iterator[Talk]:
    talk = Talk(node, *pods)
    yield talk
    talk.close()


def test_what_applications_wrote_and_read(talk: Talk):
    asked = answered = 0
    for size in SIZES:
        peer = talk.ask(size)
        asked += size
        if size < 2000:
            talk.answer(2 * size, peer)
            answered += 2 * size
    answers = sum(size < 2000 for size in SIZES)
    out, into = talk.accounts()
    assert (out.sent, out.received, out.sent_datagrams, out.received_datagrams) == (
        asked,
        answered,
        len(SIZES),
        answers,
    )
    assert (into.sent, into.received, into.sent_datagrams, into.received_datagrams) == (
        answered,
        asked,
        answers,
        len(SIZES),
    )
    assert (out.opened, out.closed, into.opened, into.closed) == (1, 0, 1, 0)


def test_nft_counters_say_the_same(talk: Talk, pods: tuple[TestPod, TestPod], family: str):
    client, _ = pods
    with rules(
        client.netns,
        "add counter inet t out",
        "add counter inet t in",
        "add chain inet t o { type filter hook output priority 0; }",
        "add chain inet t i { type filter hook input priority 0; }",
        f"add rule inet t o udp dport {PORT} counter name out",
        f"add rule inet t i udp sport {PORT} counter name in",
    ):
        for size in (0, 7, 512, 1300):
            talk.answer(size + 3, talk.ask(size))
        counted = counters(client.netns)
    out, _ = talk.accounts()
    packets, octets = counted["out"]
    assert (out.sent_datagrams, out.sent) == (packets, octets - HEADERS[family] * packets)
    packets, octets = counted["in"]
    assert (out.received_datagrams, out.received) == (packets, octets - HEADERS[family] * packets)


def test_many_in_one(talk: Talk):
    """Segmentation offload: one write of the application, and as many datagrams as it asked for."""
    talk.ask(10)
    talk.client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    talk.client.sendto(b"s" * 9500, talk.to)
    got = [len(talk.server.recv(1 << 16)) for _ in range(10)]
    assert got == [1000] * 9 + [500]
    out, into = talk.accounts()
    assert (out.sent, out.sent_datagrams) == (9510, 11)
    assert (into.received, into.received_datagrams) == (9510, 11)


def test_refused_is_counted_at_the_destination(node: Node, pods: tuple[TestPod, TestPod]):
    client, server = pods
    talk = Talk(node, client, server, PORT + 1)
    try:
        refused = talk.into._replace(verdict=Reason.POLICY)
        for size in (100, 23, 0):
            try:
                talk.client.sendto(b"r" * size, talk.to)
            except PermissionError:
                pass
        until(lambda: refused in node.kernel.flows())
        until(lambda: node.kernel.flows()[refused].refused == 3)
        talk.server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            talk.server.recv(1)
        assert talk.into not in node.kernel.flows()
        found = [FlowRecord.unpack(data) for data in node.kernel.read_records(1 << 30)]
        mine = [one for one in found if one.destination == server.identity]
        assert mine
        assert {(one.verdict, one.protocol, one.port) for one in mine} == {
            (Reason.POLICY, PROTOCOL_UDP, PORT + 1)
        }
    finally:
        talk.close()


def test_a_conversation_s_record_is_what_was_counted(talk: Talk, pods: tuple[TestPod, TestPod]):
    client, server = pods
    for size in (5, 50, 500):
        talk.answer(size * 2, talk.ask(size))
    table = talk.node.kernel._maps["conversations"]
    # As after half a minute in which nobody spoke.
    for key, value in table.items():
        one = Conversation.unpack(value)
        if {one.source, one.destination} == {client.identity, server.identity}:
            at = Conversation.LAYOUT.offsets["last"][0]
            late = (one.last - 31_000_000_000).to_bytes(8, "little")
            table.update(key, value[:at] + late + value[at + 8 :])
    talk.node.kernel.end_silent_conversations()
    found = [FlowRecord.unpack(data) for data in talk.node.kernel.read_records(1 << 30)]
    by = {one.direction: one for one in found if one.destination == server.identity}
    out, into = by[Direction.OUTBOUND], by[Direction.INBOUND]
    assert (out.netns, into.netns) == (client.cookie, server.cookie)
    assert (out.sent, out.received, out.sent_datagrams, out.received_datagrams) == (555, 1110, 3, 3)
    assert (into.sent, into.received, into.sent_datagrams, into.received_datagrams) == (1110, 555, 3, 3)
    for record in by.values():
        assert record.client_address == client.address
        assert (record.server_address, record.server_port) == (server.address, PORT)
    assert [flow.closed for flow in talk.accounts()] == [1, 1]
    # And the next datagram begins another one.
    talk.ask(1)
    assert [flow.opened for flow in talk.accounts()] == [2, 2]


@pytest.mark.families("ipv4")
def test_without_room_for_conversations(tmp_path):
    """What is nobody's is in the sum."""
    node = Node(tmp_path, sizes=("conversations=1",))
    try:
        client, server = TestPod(node, "10.77.0.10", 20), TestPod(node, "10.77.0.11", 21)
        client.enrol({})
        server.enrol({(20, 0): True})
        talks = [Talk(node, client, server, PORT + number) for number in range(4)]
        for talk in talks:
            talk.answer(30, talk.ask(100))
            talk.close()
        flows = [flow for key, flow in node.kernel.flows().items() if key.protocol == PROTOCOL_UDP]
        for name, expected in (
            ("sent", 4 * 130),
            ("received", 4 * 130),
            ("sent_datagrams", 8),
            ("received_datagrams", 8),
        ):
            assert sum(getattr(flow, name) for flow in flows) == expected, name
        assert node.kernel.pressure()["conversations"].refused > 0
        client.close()
        server.close()
    finally:
        node.close()
