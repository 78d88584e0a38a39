"""Accounts against counts that are not ours: nft counters, the kernel's own statistics, and what a capture saw on the wire."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.kernel import Direction, FlowCounters, FlowKey
from lab.capture import Capture
from tests.kernel.mesh import Node, TestPod, run

pytestmark = pytest.mark.privileged

PORT = 8080
MSG_OOB = socket.MSG_OOB


class Talk:
    """A connection of an enrolled pod to somebody outside of the mesh, whose packets are on the wire."""

    def __init__(self, node: Node, pod: TestPod, outside: TestPod) -> None:
        self.node, self.pod, self.outside = node, pod, outside
        self.key = FlowKey(pod.identity, 0, PORT, Direction.OUTBOUND)
        self.listener = outside.app.listen(("0.0.0.0", PORT))
        self.before = self.now()
        self.client = pod.app.connect((outside.address, PORT))
        self.server, _ = self.listener.accept()
        for sock in (self.client, self.server):
            sock.settimeout(10)

    def now(self) -> FlowCounters:
        return self.node.kernel.flows().get(self.key, FlowCounters())

    def since(self) -> FlowCounters:
        return FlowCounters(*(a - b for a, b in zip(self.now(), self.before, strict=True)))

    def settled(self, sent: int, received: int, closed: int) -> FlowCounters:
        """The account, which is that soon, and no other then."""
        deadline = time.monotonic() + 5
        while (found := self.since()).totals != (1, closed, 0, sent, received):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def close(self) -> None:
        for sock in (self.client, self.server, self.listener):
            sock.close()


@pytest.fixture
def talk(node, make_pod) -> Iterator[Talk]:
    talk = Talk(node, make_pod().enrol({}), make_pod())
    yield talk
    talk.close()


def give(here: socket.socket, there: socket.socket, count: int) -> None:
    """``count`` bytes, in whatever pieces come, with neither end waiting for the other."""
    here.setblocking(False)
    sent = got = 0
    deadline = time.monotonic() + 30
    while got < count:
        assert time.monotonic() < deadline
        try:
            sent += here.send(b"x" * min(65536, count - sent)) if sent < count else 0
        except BlockingIOError:
            pass
        there.settimeout(0.02)
        try:
            got += len(there.recv(65536))
        except TimeoutError:
            pass
    here.settimeout(10)
    there.settimeout(10)


@contextmanager
def rules(netns: int, *lines: str) -> Iterator[None]:
    """Rules of nft in a pod's own namespace."""
    run(netns, "nft", "\n".join(["add table inet t", *lines]))
    try:
        yield
    finally:
        run(netns, "nft", "delete table inet t")


def counters(netns: int) -> dict[str, tuple[int, int]]:
    """By name: packets and bytes."""
    found = json.loads(run(netns, "nft", "-j", "list", "counters"))["nftables"]
    return {
        one["counter"]["name"]: (one["counter"]["packets"], one["counter"]["bytes"])
        for one in found
        if "counter" in one
    }


def retransmitted(netns: int) -> int:
    return int(run(netns, "nstat", "-asz", "TcpRetransSegs").split()[-2])


def on_the_wire(capture: Capture, source: tuple[str, int]) -> int:
    """Payload bytes that somebody sent, each once, however often it was sent: distinct sequence numbers."""
    ranges = []
    first = None
    for packet in capture.packets():
        if packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
            continue
        start = 14 + (packet[14] & 15) * 4
        port, _, sequence = struct.unpack_from("!HHI", packet, start)
        if (socket.inet_ntoa(packet[26:30]), port) != source:
            continue
        total = struct.unpack_from("!H", packet, 16)[0] or len(packet) - 14
        length = 14 + total - start - (packet[start + 12] >> 4) * 4
        if packet[start + 13] & 2:  # SYN
            first = sequence + 1
        if length:
            ranges.append((sequence, length))
    assert first is not None
    seen = 0
    end = 0
    for at, length in sorted(((sequence - first) % 2**32, length) for sequence, length in ranges):
        seen += max(0, at + length - max(at, end))
        end = max(end, at + length)
    return seen


def test_nft_counters_say_the_same(talk, make_pod):
    """Without options every packet but SYN has forty bytes of headers, so that its payload follows from its length."""
    talk.close()
    pod, outside = talk.pod, make_pod()
    for one in (pod, outside):
        run(one.netns, "sh", "-c", "cd /proc/sys/net/ipv4 && echo 0 | tee tcp_timestamps tcp_sack >/dev/null")
    with rules(
        pod.netns,
        "add counter inet t out",
        "add counter inet t in",
        "add chain inet t o { type filter hook output priority 0; }",
        "add chain inet t i { type filter hook input priority 0; }",
        f"add rule inet t o tcp dport {PORT} tcp flags & syn == 0 counter name out",
        f"add rule inet t i tcp sport {PORT} tcp flags & syn == 0 counter name in",
    ):
        counted = Talk(talk.node, pod, outside)
        give(counted.client, counted.server, 345_678)
        give(counted.server, counted.client, 1_234_567)
        counted.close()
        counted.settled(345_678, 1_234_567, 1)
        payload = {name: octets - 40 * packets for name, (packets, octets) in counters(pod.netns).items()}
    assert payload == {"out": 345_678, "in": 1_234_567}


def test_lost_packets_are_counted_as_retransmits_and_bytes_once(node, make_pod):
    pod, outside = make_pod().enrol({}), make_pod()
    with Capture(Path(f"/proc/self/fd/{node.netns}"), [pod.interface]) as capture:
        before = retransmitted(pod.netns)
        talk = Talk(node, pod, outside)
        port = talk.client.getsockname()[1]
        with rules(
            outside.netns,
            "add chain inet t i { type filter hook input priority 0; }",
            f"add rule inet t i tcp dport {PORT} meta length > 100 numgen inc mod 9 0 drop",
        ):
            give(talk.client, talk.server, 400_000)
        give(talk.server, talk.client, 70_000)
        talk.close()
        found = talk.settled(400_000, 70_000, 1)
    assert found.retransmits == retransmitted(pod.netns) - before > 0
    assert on_the_wire(capture, (pod.address, port)) == 400_000
    assert on_the_wire(capture, (outside.address, PORT)) == 70_000


def test_a_connection_that_retransmits_says_so_while_it_is_open(node, make_pod):
    pod, outside = make_pod().enrol({}), make_pod()
    talk = Talk(node, pod, outside)
    before = retransmitted(pod.netns)
    with rules(
        outside.netns,
        "add chain inet t i { type filter hook input priority 0; }",
        f"add rule inet t i tcp dport {PORT} drop",
    ):
        talk.client.sendall(b"is anybody there?")
        deadline = time.monotonic() + 10
        while talk.since().retransmits < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(talk.server.recv(100)) == 17
    talk.close()
    found = talk.settled(17, 0, 1)
    assert found.retransmits == retransmitted(pod.netns) - before


def test_a_closed_window(talk):
    """A reader that sleeps: what its writer could write is counted, what it reads later too, and nothing else."""
    talk.client.setblocking(False)
    wrote = 0
    for _ in range(2):
        try:
            while True:
                wrote += talk.client.send(b"z" * 100_000)
        except BlockingIOError:
            time.sleep(0.3)
    assert talk.since().totals == (1, 0, 0, wrote, 0)
    read = 0
    while read < wrote:
        read += len(talk.server.recv(1 << 20))
        assert talk.since().sent == wrote
    talk.close()
    talk.settled(wrote, 0, 1)


def test_urgent_data_taken_by_the_application(talk):
    """The kernel takes an urgent byte out of the stream: it is counted when MSG_OOB has it, and not again beyond it."""
    server, client = talk.server, talk.client
    server.sendall(b"before")
    server.send(b"!", MSG_OOB)
    server.sendall(b"after")
    deadline = time.monotonic() + 5
    while True:
        try:
            assert client.recv(1, MSG_OOB) == b"!"
            break
        except (BlockingIOError, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    talk.settled(0, 1, 0)
    assert client.recv(100) == b"before"
    talk.settled(0, 7, 0)
    assert client.recv(3) == b"aft"
    talk.settled(0, 10, 0)
    assert client.recv(100) == b"er"
    talk.settled(0, 12, 0)
    talk.close()
    talk.settled(0, 12, 1)


def test_urgent_data_in_the_stream(talk):
    talk.client.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    talk.server.sendall(b"before")
    talk.server.send(b"!", MSG_OOB)
    talk.server.sendall(b"after")
    got = b""
    while len(got) < 12:
        got += talk.client.recv(100)
        talk.settled(0, len(got), 0)
    assert got == b"before!after"
    talk.client.send(b"?", MSG_OOB)
    talk.settled(1, 12, 0)
    talk.close()
    talk.settled(1, 12, 1)


def test_a_pod_that_ends_with_what_it_wrote_under_way(node, make_pod):
    """Its interface goes, nothing more can arrive: what was written is counted, and the end when the kernel gives up."""
    pod, outside = make_pod().enrol({}), make_pod()
    talk = Talk(node, pod, outside)
    tcp_user_timeout = 18
    talk.client.setsockopt(socket.IPPROTO_TCP, tcp_user_timeout, 500)
    give(talk.client, talk.server, 5000)
    run(node.netns, "ip", "link", "del", pod.interface)
    talk.client.sendall(b"y" * 20_000)
    node.kernel.remove_pod(pod.cookie)
    talk.settled(25_000, 0, 0)
    talk.client.close()
    talk.settled(25_000, 0, 1)
    talk.close()


def test_read_when_the_connection_is_over(talk):
    """A socket whose connection has ended still gives what came before: that is read then, and counted then."""
    talk.client.shutdown(socket.SHUT_WR)
    assert talk.server.recv(1) == b""
    talk.server.sendall(b"x" * 5000)
    talk.server.close()
    talk.settled(0, 0, 1)
    read = 0
    while data := talk.client.recv(700):
        read += len(data)
        talk.settled(0, read, 1)
    assert read == 5000
    talk.close()
    talk.settled(0, 5000, 1)
