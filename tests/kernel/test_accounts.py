"""Accounts against what applications wrote and read, whatever way a connection ends."""

from __future__ import annotations

import itertools
import random
import socket
import struct
import threading
import time

import pytest

from agent.kernel import Direction, FlowCounters, FlowKey
from bpf.wire import VERDICT_SEVERAL
from tests.kernel.mesh import Node, TestPod, run

pytestmark = pytest.mark.privileged
all_families = pytest.mark.families("ipv4", "ipv6", "mapped")
two_families = pytest.mark.families("ipv6", "mapped")

PORT = 8080


class Pair:
    """A connection between two pods, and what its two applications have written and read."""

    def __init__(self, node, client, server):
        self.node = node
        self.client_pod, self.server_pod = client, server
        self.key = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
        # An IPv6 listener also for the mapped: the server's end is an IPv6 socket too then.
        family = socket.AF_INET6 if client.app.mapped or client.app.ipv6 else socket.AF_INET
        self.listener = server.app.listen(("", PORT), family=family)
        self.client = client.app.connect((server.address, PORT))
        self.server, _ = self.listener.accept()
        self.client.settimeout(5)
        self.server.settimeout(5)
        self.wrote = {self.client: 0, self.server: 0}
        self.read = {self.client: 0, self.server: 0}

    def send(self, sock, count):
        sock.sendall(b"d" * count)
        self.wrote[sock] += count

    def receive(self, sock, count):
        left = count
        while left:
            data = sock.recv(min(left, 65536))
            assert data
            left -= len(data)
            self.read[sock] += len(data)

    def receive_end(self, sock):
        assert sock.recv(1) == b""

    def accounts(self):
        flows = self.node.kernel.flows()
        return tuple(
            flows.get(self.key._replace(direction=direction), FlowCounters()) for direction in Direction
        )

    def check(self, *, client_closed=False, server_closed=False):
        """The accounts are exactly what the applications did, soon (packets are under way).

        None: an end that nobody holds any more is closed when its peer's kernel has everything, at the latest.
        """
        deadline = time.monotonic() + 2
        while True:
            out, into = (counters.totals for counters in self.accounts())
            expected = (
                (
                    1,
                    out[1] if client_closed is None else client_closed,
                    0,
                    self.wrote[self.client],
                    self.read[self.client],
                ),
                (
                    1,
                    into[1] if server_closed is None else server_closed,
                    0,
                    self.wrote[self.server],
                    self.read[self.server],
                ),
            )
            if (out, into) == expected or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        assert (out, into) == expected

    def close(self):
        for sock in (self.client, self.server, self.listener):
            sock.close()


@pytest.fixture
def pair(node, make_pod):
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 0): True})
    pair = Pair(node, client, server)
    yield pair
    pair.close()


@all_families
def test_open_connection(pair):
    pair.check()
    pair.send(pair.client, 1)
    pair.receive(pair.server, 1)
    pair.check()
    pair.send(pair.server, 3_000_000 // 100)
    pair.receive(pair.client, 10_000)
    pair.check()  # the rest is written and not read
    pair.receive(pair.client, 20_000)
    pair.check()


@all_families
def test_closed_by_client(pair):
    pair.send(pair.client, 1000)
    pair.receive(pair.server, 1000)
    pair.client.close()
    pair.receive_end(pair.server)
    pair.check(client_closed=None)
    pair.server.close()
    pair.check(client_closed=True, server_closed=True)


@two_families
def test_closed_by_client_end_not_read(pair):
    pair.send(pair.client, 1000)
    pair.receive(pair.server, 1000)
    pair.client.close()
    pair.check(client_closed=None)
    pair.server.close()
    pair.check(client_closed=True, server_closed=True)


@two_families
def test_closed_by_server(pair):
    pair.send(pair.server, 70_000)
    pair.server.close()
    pair.check(server_closed=None)
    pair.receive(pair.client, 70_000)
    pair.receive_end(pair.client)
    pair.check(server_closed=None)
    pair.client.close()
    pair.check(client_closed=True, server_closed=True)


@two_families
def test_closed_by_both_at_once(pair):
    pair.send(pair.server, 10)
    pair.send(pair.client, 20)
    pair.receive(pair.client, 10)
    pair.receive(pair.server, 20)
    threads = [threading.Thread(target=sock.close) for sock in (pair.client, pair.server)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pair.check(client_closed=True, server_closed=True)


@two_families
def test_half_close(pair):
    pair.send(pair.client, 500)
    pair.client.shutdown(socket.SHUT_WR)
    pair.receive(pair.server, 500)
    pair.receive_end(pair.server)
    pair.check()
    pair.send(pair.server, 100_000)
    pair.receive(pair.client, 100_000)
    pair.check()
    pair.server.shutdown(socket.SHUT_WR)
    pair.receive_end(pair.client)
    pair.check(client_closed=True, server_closed=True)


@two_families
def test_read_side_shut(pair):
    pair.server.shutdown(socket.SHUT_RD)
    pair.send(pair.client, 500)
    pair.receive(pair.server, 500)
    pair.check()
    pair.client.close()
    pair.server.close()
    pair.check(client_closed=True, server_closed=True)


@pytest.mark.parametrize("end", ["client", "server"])
@two_families
def test_reset(pair, end):
    other = {"client": pair.server, "server": pair.client}[end]
    sock = getattr(pair, end)
    pair.send(sock, 300)
    pair.send(other, 200)
    pair.receive(other, 300)
    pair.receive(sock, 200)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    pair.check(client_closed=True, server_closed=True)


@pytest.mark.parametrize("end", ["client", "server"])
@two_families
def test_closed_with_unread_data(pair, end):
    other = {"client": pair.server, "server": pair.client}[end]
    sock = getattr(pair, end)
    pair.send(other, 5000)
    pair.receive(sock, 1200)
    time.sleep(0.05)
    sock.close()  # sends a reset
    pair.check(client_closed=True, server_closed=True)


@two_families
def test_reset_after_half_close(pair):
    pair.send(pair.client, 100)
    pair.client.shutdown(socket.SHUT_WR)
    pair.receive(pair.server, 100)
    pair.receive_end(pair.server)
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.server.close()
    with pytest.raises(ConnectionResetError):
        pair.client.recv(1)
    pair.check(client_closed=True, server_closed=True)


@two_families
def test_written_and_never_delivered(pair):
    """A reader that does not read: what is in the writer's buffer was written all the same."""
    pair.client.setblocking(False)
    total = 0
    while True:
        try:
            total += pair.client.send(b"z" * 65536)
        except BlockingIOError:
            break
    pair.wrote[pair.client] = total
    pair.check()
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.server.close()
    pair.check(client_closed=True, server_closed=True)


@two_families
def test_ended_by_the_agent(pair, node):
    pair.send(pair.client, 100)
    pair.receive(pair.server, 60)
    [connection] = [c for c in node.kernel.connections() if c.destination == pair.key.destination]
    assert (connection.sent, connection.received) == (0, 60)
    netns = pair.server_pod.netns
    assert node.kernel.destroy(connection, netns)
    with pytest.raises(ConnectionResetError):
        pair.client.recv(1)
    pair.check(client_closed=True, server_closed=True)
    # The listener is not taken in place of a connection that is gone.
    assert not node.kernel.destroy(connection, netns)
    assert not node.kernel.destroy(connection, netns)
    pair.client_pod.app.connect((pair.server_pod.address, PORT)).close()


def test_a_socket_that_dials_again(pair):
    """connect() to nobody (AF_UNSPEC) ends a connection, and the socket may have another: bytes are counted for one of them."""
    pair.send(pair.client, 300)
    pair.receive(pair.server, 300)
    pair.send(pair.server, 200)
    pair.receive(pair.client, 200)
    pair.client_pod.app.disconnect(pair.client)
    with pytest.raises(ConnectionResetError):
        pair.server.recv(1)
    pair.check(client_closed=True, server_closed=True)
    pair.client.setblocking(True)
    pair.client_pod.app.reconnect(pair.client, (pair.server_pod.address, PORT))
    again, _ = pair.listener.accept()
    again.sendall(b"d" * 70)
    assert pair.client.recv(1000) == b"d" * 70
    out, into = pair.accounts()
    assert (out.totals, into.totals) == ((2, 1, 0, 300, 270), (2, 1, 0, 270, 300))
    again.close()


@two_families
def test_peek_and_truncation(pair):
    pair.send(pair.client, 100)
    assert len(pair.server.recv(100, socket.MSG_PEEK)) == 100
    pair.check()
    pair.receive(pair.server, 40)
    pair.check()


def test_fast_open(node, make_pod):
    """Data in the SYN is written before the connection is established."""
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 0): True})
    for pod in (client, server):
        run(pod.netns, "sh", "-c", "echo 3 >/proc/sys/net/ipv4/tcp_fastopen")
    fast_open_connect, fast_open = 30, 23
    listener = server.app.listen(("0.0.0.0", PORT), options=((socket.IPPROTO_TCP, fast_open, 16),))
    for _ in range(3):  # the first gets the cookie
        sock = client.app.connect(
            (server.address, PORT), options=((socket.IPPROTO_TCP, fast_open_connect, 1),)
        )
        sock.sendall(b"in the SYN")
        accepted, _ = listener.accept()
        assert accepted.recv(100) == b"in the SYN"
        accepted.sendall(b"and back")
        assert sock.recv(100) == b"and back"
        sock.close()
        assert accepted.recv(1) == b""
        accepted.close()
    listener.close()
    used = run(client.netns, "nstat", "-asz", "TcpExtTCPFastOpenActive")
    assert int(used.split()[-2]) == 2, used
    key = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
    deadline = time.monotonic() + 2
    while node.kernel.flows()[key].closed != 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert node.kernel.flows()[key].totals == (3, 3, 0, 30, 24)
    assert node.kernel.flows()[key._replace(direction=Direction.INBOUND)].totals == (3, 3, 0, 24, 30)


def test_accounts_without_room(tmp_path):
    """What no longer fits is counted all the same, under nobody's name."""
    node = Node(tmp_path, sizes=("flows=5", "refused=7"))
    try:
        client, server = TestPod(node, "10.77.0.10", 20), TestPod(node, "10.77.0.11", 21)
        client.enrol({})
        server.enrol({(20, PORT): True, (20, PORT + 1): True})
        for port in (PORT, PORT + 1):
            with server.app.listen(("0.0.0.0", port)) as listener:
                sock = client.app.connect((server.address, port))
                accepted, _ = listener.accept()
                sock.sendall(b"12345")
                assert accepted.recv(5) == b"12345"
                sock.close()
                assert accepted.recv(1) == b""
                accepted.close()
        for port in (1, 2, 3):
            with pytest.raises(PermissionError):
                client.app.connect((server.address, port))
        time.sleep(0.2)
        flows = node.kernel.flows()
        assert sum(f.opened for f in flows.values()) == 4
        assert sum(f.closed for f in flows.values()) == 4
        assert sum(f.sent + f.received for f in flows.values()) == 20
        assert sum(f.refused for f in flows.values()) == 3
        assert flows[FlowKey(0, 0, 0, Direction.INBOUND, verdict=VERDICT_SEVERAL)].refused == 2
        pressure = node.kernel.pressure()
        assert pressure["flows"].used == 5 and pressure["flows"].refused > 0
        assert pressure["refused"][:3] == (7, 7, 2)
        client.close()
        server.close()
    finally:
        node.close()


@two_families
def test_more_than_32_bits(pair):
    """Sequence numbers wrap: 4.5 GB, counted while it goes on."""
    total = 4_500_000_000
    chunk = bytes(1 << 20)
    got = [0]

    def reader():
        buffer = bytearray(1 << 20)
        while n := pair.server.recv_into(buffer):
            got[0] += n

    thread = threading.Thread(target=reader)
    thread.start()
    sent = 0
    last = 0
    while sent < total:
        n = min(len(chunk), total - sent)
        pair.client.sendall(memoryview(chunk)[:n])
        sent += n
        if sent % (1 << 28) == 0:
            out, into = pair.accounts()
            assert out.sent == sent
            assert last <= into.received <= sent
            last = into.received
    pair.client.shutdown(socket.SHUT_WR)
    thread.join(20)
    pair.wrote[pair.client], pair.read[pair.server] = total, got[0]
    assert got[0] == total
    pair.check()


def test_sum_is_right_while_connections_come_and_go(node, make_pod):
    """Accounts are read all the time while connections open, send, read and close; no sum goes back or is wrong."""
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 0): True})
    listener = server.app.listen(("0.0.0.0", PORT))
    key = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
    random_sizes = random.Random(7)
    sizes = [random_sizes.randrange(1, 20_000) for _ in range(400)]
    done = threading.Event()
    read = [0]
    seen = []

    def serve():
        for _ in sizes:
            sock, _ = listener.accept()
            while data := sock.recv(65536):
                read[0] += len(data)
            sock.close()

    def account():
        while not done.is_set():
            flows = node.kernel.flows()
            seen.append((flows.get(key), flows.get(key._replace(direction=Direction.INBOUND))))

    threads = [threading.Thread(target=serve), threading.Thread(target=account)]
    for thread in threads:
        thread.start()
    for size in sizes:
        sock = client.app.connect((server.address, PORT))
        sock.sendall(bytes(size))
        sock.close()
    threads[0].join(20)
    deadline = time.monotonic() + 3
    while node.kernel.flows()[key].closed != len(sizes) and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    threads[1].join(5)
    flows = node.kernel.flows()
    assert flows[key].totals == (len(sizes), len(sizes), 0, sum(sizes), 0)
    assert flows[key._replace(direction=Direction.INBOUND)].totals == (
        len(sizes),
        len(sizes),
        0,
        0,
        sum(sizes),
    )
    assert read[0] == sum(sizes)
    for direction in (0, 1):
        column = [row[direction] for row in seen if row[direction] is not None]
        assert len(column) > 20
        for earlier, later in itertools.pairwise(column):
            assert all(a <= b for a, b in zip(earlier, later, strict=True)), (earlier, later)
    listener.close()
