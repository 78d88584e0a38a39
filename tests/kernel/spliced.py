"""A connection between two pods, both of whose applications keep a record of what they wrote and read."""

from __future__ import annotations

import itertools
import random
import select
import socket
import struct
import time

from agent.kernel import Direction
from agent.kernel.splices import Walk
from bpf.wire import SpliceCounter
from tests.kernel.mesh import Node, TestPod

_ports = itertools.count(20000)

#: Bytes that one direction may have outstanding past TCP (SPLICE_CAP), and what TCP's buffers hold beside them at most.
CAP = 1 << 20
BUFFERS = 16 << 20


#: A prime number of bytes, so that no buffer's size divides it.
_BLOCK = random.Random(1).randbytes(1_048_573)


def pattern(start: int, count: int) -> bytes:
    """Bytes of a stream that tell their place in it."""
    start %= len(_BLOCK)
    times = (start + count) // len(_BLOCK) + 1
    return (_BLOCK * times)[start : start + count]


class Connection:
    """``client`` and ``server`` are the sockets, non-blocking as those that may be spliced."""

    def __init__(self, node: Node, client: TestPod, server: TestPod, **options: object) -> None:
        self.node = node
        self.pods = (client, server)
        self.port = next(_ports)
        self.source = client.identity
        self.listener = server.app.listen(("", self.port))
        self.client = client.app.connect((server.address, self.port), **options)  # type: ignore[arg-type]
        self.server, _ = self.listener.accept()
        self.client.setblocking(False)
        self.server.setblocking(False)
        self.wrote = {self.client: 0, self.server: 0}
        self.read = {self.client: 0, self.server: 0}
        self.peer = {self.client: self.server, self.server: self.client}

    def send(self, sock: socket.socket, count: int) -> None:
        """All of it, which has to find room."""
        data = pattern(self.wrote[sock], count)
        while data:
            assert select.select([], [sock], [], 5)[1], "no room"
            sent = sock.send(data)
            self.wrote[sock] += sent
            data = data[sent:]

    def receive(self, sock: socket.socket, count: int) -> None:
        """Exactly so much, and what was sent."""
        while count:
            assert select.select([sock], [], [], 5)[0], f"{count} bytes do not come"
            data = sock.recv(min(count, 1 << 20))
            assert data, f"ends {count} bytes too early"
            assert data == pattern(self.read[sock], len(data)), "wrong bytes"
            self.read[sock] += len(data)
            count -= len(data)

    def exchange(self, sock: socket.socket, count: int) -> None:
        self.send(sock, count)
        self.receive(self.peer[sock], count)

    def rounds(self, count: int = 4) -> None:
        """Enough that both ends may enter."""
        for _ in range(count):
            self.exchange(self.client, 100)
            self.exchange(self.server, 300)

    def fill(self, sock: socket.socket, most: int = 64 << 20) -> int:
        """Send until there is no room for a while; how much went."""
        before = self.wrote[sock]
        while self.wrote[sock] - before < most and select.select([], [sock], [], 0.3)[1]:
            self.wrote[sock] += sock.send(pattern(self.wrote[sock], 1 << 16))
        return self.wrote[sock] - before

    def walk(self) -> Walk:
        return self.node.kernel.splices.walk()

    def walk_and_nudge(self) -> Walk:
        """As the agent does."""
        return walk_and_nudge(self.node, *self.pods)

    def enter(self) -> None:
        self.rounds()
        self._left_before = self._left()
        assert self.walk().entered == 2
        assert self.spliced(self.client) and self.spliced(self.server)

    def _left(self) -> int:
        return self.node.kernel.splices.counters()[SpliceCounter.LEFT]

    def has_left(self) -> bool:
        """Both, since :meth:`enter`."""
        return self._left() == self._left_before + 2

    def leave(self) -> None:
        """Until both are out."""
        deadline = time.monotonic() + 3
        while not self.has_left():
            assert time.monotonic() < deadline, "does not leave"
            self.walk()

    def spliced(self, sock: socket.socket) -> bool:
        """Whether what it sends now, all before being read, goes past TCP."""
        other = self.peer[sock]
        before = by_tcp(other)
        self.exchange(sock, 50)
        came = by_tcp(other) - before
        assert came in (0, 50)
        return came == 0

    def check_accounts(self) -> None:
        """Both ends' accounts are what their applications wrote and read."""
        expected = {
            Direction.OUTBOUND: (self.wrote[self.client], self.read[self.client]),
            Direction.INBOUND: (self.wrote[self.server], self.read[self.server]),
        }
        deadline = time.monotonic() + 3
        while True:
            found = {
                key.direction: (flow.sent, flow.received)
                for key, flow in self.node.kernel.flows().items()
                if (key.source, key.port) == (self.source, self.port) and not key.verdict
            }
            if found == expected or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        assert found == expected

    def close(self) -> None:
        for sock in (self.client, self.server, self.listener):
            sock.close()


def walk_and_nudge(node: Node, *pods: TestPod) -> Walk:
    walk = node.kernel.splices.walk()
    unread = node.kernel.splices.unread()
    for pod in pods:
        if pod.cookie in unread:
            node.kernel.splices.nudge(pod.netns)
    return walk


class Stream:
    """A connection to a server that answers with what it gets."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.wrote = self.read = 0

    def echo(self, count: int) -> None:
        """Write and read at once, since the server does no more than it can write."""
        until = self.wrote + count
        data = memoryview(pattern(self.wrote, count))
        expected = memoryview(bytes(data))
        while self.read < until:
            readable, writable, _ = select.select([self.sock], [self.sock] if data else [], [], 10)
            assert readable or writable, f"hangs at {self.read} of {until}"
            if writable:
                sent = self.sock.send(data)
                self.wrote += sent
                data = data[sent:]
            if readable:
                came = self.sock.recv(1 << 20)
                assert came, "ends too early"
                assert came == expected[: len(came)], "wrong bytes"
                expected = expected[len(came) :]
                self.read += len(came)

    def echo_and_end(self, count: int) -> None:
        self.echo(count)
        self.sock.shutdown(socket.SHUT_WR)
        assert select.select([self.sock], [], [], 10)[0] and self.sock.recv(1) == b""
        self.sock.close()

    def is_spliced(self) -> bool:
        """Whether what the server says now comes past TCP."""
        before = by_tcp(self.sock)
        self.echo(100)
        return by_tcp(self.sock) == before


def by_tcp(sock: socket.socket) -> int:
    """Bytes that came to a socket by TCP: tcpi_bytes_received."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("=Q", info, 128)[0])
