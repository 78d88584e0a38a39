"""The rules of the splice, one by one: what may enter, what is redirected, when it leaves; and the accounts through all of it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import pytest

from agent.kernel import Pod
from agent.kernel.model import Via
from bpf import links, wire
from bpf.wire import SpliceCounter
from lab.processes import wait_until
from tests.kernel.mesh import Node, TestPod, run
from tests.kernel.spliced import BUFFERS, CAP, Connection, by_tcp, pattern
from tests.requirements import ROOT

pytestmark = pytest.mark.privileged

RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def pods(node, make_pod):
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 0): True})
    node.kernel.splices.walk()
    return client, server


@pytest.fixture
def connection(node, pods):
    one = Connection(node, *pods)
    yield one
    one.check_accounts()
    one.close()


# What enters


@pytest.mark.families("ipv4", "ipv6", "mapped")
def test_enters_late(connection):
    connection.exchange(connection.client, 10)
    connection.exchange(connection.server, 10)
    assert connection.walk().entered == 0
    assert not connection.spliced(connection.client)
    connection.enter()
    connection.exchange(connection.client, 200_000)
    connection.exchange(connection.server, 900_000)


def test_one_end_mapped(node, pods):
    client, server = pods
    with server.app.listen(("::", 19999), family=socket.AF_INET6) as listener:
        one = Connection(node, client, server)
        one.client.close()
        one.server.close()
        one.client = client.app.connect((server.address, 19999), family=socket.AF_INET)
        one.server, _ = listener.accept()
        one.client.setblocking(False)
        one.server.setblocking(False)
        one.wrote, one.read = {one.client: 0, one.server: 0}, {one.client: 0, one.server: 0}
        one.peer = {one.client: one.server, one.server: one.client}
        one.enter()
        one.close()


@pytest.mark.parametrize("end", ["client", "server"])
def test_blocking_reader_stays_out(connection, end):
    getattr(connection, end).setblocking(True)
    connection.rounds()
    assert connection.walk().entered == 0
    assert not connection.spliced(connection.client)


@pytest.mark.parametrize("flags", [socket.MSG_WAITALL, socket.MSG_TRUNC], ids=["waitall", "trunc"])
def test_reader_with_flags_stays_out(connection, flags):
    connection.send(connection.client, 10)
    select.select([connection.server], [], [])
    assert len(connection.server.recv(10, flags)) == 10
    connection.read[connection.server] += 10
    connection.rounds()
    assert connection.walk().entered == 0


@pytest.mark.parametrize(
    "option", [(socket.SOL_SOCKET, socket.SO_OOBINLINE), (socket.SOL_SOCKET, 60)], ids=["oob", "zerocopy"]
)
def test_socket_with_option_stays_out(connection, option):
    connection.server.setsockopt(*option, 1)
    connection.rounds()
    left = connection.node.kernel.splices.counters()[SpliceCounter.LEFT]
    # The other end may be looked at first; then it goes again.
    entered = connection.walk().entered
    assert entered <= 1
    assert not connection.spliced(connection.client) and not connection.spliced(connection.server)
    connection.walk()
    assert connection.node.kernel.splices.counters()[SpliceCounter.LEFT] == left + entered


def test_bulk_stays_out(connection):
    """What would overflow at once: answers larger than the queue takes."""
    connection.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    for _ in range(5):
        connection.exchange(connection.client, 100)
        sent = threading.Thread(target=connection.send, args=(connection.server, 4 << 20))
        sent.start()
        connection.receive(connection.client, 4 << 20)
        sent.join()
    # One end may, and goes again.
    assert connection.walk().entered <= 1
    assert not connection.spliced(connection.client) and not connection.spliced(connection.server)


def test_loopback_stays_out(node, pods):
    client, _ = pods
    with (
        client.app.listen(("127.0.0.1", 7000)) as listener,
        client.app.connect(("127.0.0.1", 7000)) as dialled,
    ):
        accepted, _ = listener.accept()
        with accepted:
            for sock in (dialled, accepted):
                sock.setblocking(False)
            for _ in range(6):
                for one, other in ((dialled, accepted), (accepted, dialled)):
                    one.send(b"x")
                    select.select([other], [], [])
                    other.recv(1)
            assert node.kernel.splices.walk().entered == 0
    assert node.kernel.pressure()["splices"].used == 0


def test_own_address_is_spliced(node, make_pod):
    pod = make_pod().enrol({})
    one = Connection(node, pod, pod)
    assert [c.via for c in node.kernel.connections() if c.server[1] == one.port] == [Via.SELF]
    one.enter()
    one.close()


def test_fast_open_stays_out(node, pods):
    client, server = pods
    for pod in pods:
        run(pod.netns, "sh", "-c", "echo 3 >/proc/sys/net/ipv4/tcp_fastopen")
    listener = server.app.listen(("0.0.0.0", 7001), options=((socket.IPPROTO_TCP, 23, 16),))
    entered = []
    for _ in range(2):  # the first gets the cookie
        sock = client.app.connect((server.address, 7001), options=((socket.IPPROTO_TCP, 30, 1),))
        sock.sendall(b"in the SYN")
        accepted, _ = listener.accept()
        for end in (sock, accepted):
            end.setblocking(False)
        assert select.select([accepted], [], [], 5)[0] and accepted.recv(100) == b"in the SYN"
        for _ in range(5):
            for one, other in ((sock, accepted), (accepted, sock)):
                one.send(b"word")
                assert select.select([other], [], [], 5)[0] and other.recv(100) == b"word"
        entered.append(node.kernel.splices.walk().entered)
        sock.close()
        accepted.close()
    listener.close()
    used = run(client.netns, "nstat", "-asz", "TcpExtTCPFastOpenActive")
    assert int(used.split()[-2]) == 1, used
    assert entered[1] == 0


def test_reader_of_urgent_data_stays_out(connection):
    with pytest.raises(OSError):
        connection.server.recv(1, socket.MSG_OOB)
    connection.rounds()
    assert connection.walk().entered == 0


def test_ends_that_are_not_each_other_s_stay_out(node, pods):
    """Whatever they are called: what the one begins to write is not what the other begins to read."""
    one, other = Connection(node, *pods), Connection(node, *pods)
    ends = node.kernel._maps["splice_ends"]
    keys = [struct.pack("=i", sock.fileno()) for sock in (one.server, other.server)]
    values = [ends.lookup(key) for key in keys]
    for key, mine, others in zip(keys, values, reversed(values), strict=True):
        ends.update(key, others[:8] + mine[8:])  # the id
    for each in (one, other):
        each.rounds()
    assert node.kernel.splices.walk().entered == 0
    for each in (one, other):
        each.rounds()
        each.check_accounts()
        each.close()


def test_tls_inside(connection):
    """Records are bytes as others: they go past TCP, and come as they were sent."""
    connection.enter()
    before = by_tcp(connection.client), by_tcp(connection.server)
    ends = []
    for sock, side in (
        (connection.client, ssl.PROTOCOL_TLS_CLIENT),
        (connection.server, ssl.PROTOCOL_TLS_SERVER),
    ):
        context = ssl.SSLContext(side)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AECDH-AES128-SHA:@SECLEVEL=0")  # without certificates
        came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(came, goes, server_side=side == ssl.PROTOCOL_TLS_SERVER)
        ends.append((sock, tls, came, goes))

    def until(*steps):
        """Both of them, with what they have for each other carried."""
        results: dict[int, None] = {}
        deadline = time.monotonic() + 10
        while len(results) < len(steps):
            assert time.monotonic() < deadline
            for number, ((sock, _, came, goes), step) in enumerate(zip(ends, steps, strict=True)):
                if number not in results:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        results[number] = step()
                if data := goes.read():
                    sock.sendall(data)
                    connection.wrote[sock] += len(data)
                with contextlib.suppress(BlockingIOError):
                    data = sock.recv(1 << 20)
                    connection.read[sock] += len(data)
                    came.write(data)

    (_, client, _, _), (_, server, _, _) = ends
    until(client.do_handshake, server.do_handshake)
    for size in (1, 100, 16_000, 300_000):
        question, answer = os.urandom(size), os.urandom(size)
        got = {client: b"", server: b""}

        def exchange(tls, data, size=size, got=got):
            if data is not None:
                tls.write(data)
            while len(got[tls]) < size:
                got[tls] += tls.read(1 << 16)

        sends = {client: question, server: answer}
        until(
            lambda: exchange(client, sends.pop(client, None)),  # noqa: B023
            lambda: exchange(server, sends.pop(server, None)),  # noqa: B023
        )
        assert (got[server], got[client]) == (question, answer)
    assert (by_tcp(connection.client), by_tcp(connection.server)) == before


# What is redirected


@pytest.mark.families("ipv4", "ipv6", "mapped")
def test_nothing_is_overtaken(connection):
    """What TCP carries is read first: nothing is redirected while some of it is there."""
    connection.rounds()
    connection.send(connection.client, 1000)
    connection.send(connection.server, 70_000)
    assert connection.walk().entered == 2
    before = by_tcp(connection.server)
    connection.send(connection.client, 500)
    connection.send(connection.server, 500)
    connection.receive(connection.server, 1500)
    connection.receive(connection.client, 70_500)
    assert by_tcp(connection.server) - before >= 500
    assert connection.spliced(connection.client) and connection.spliced(connection.server)


def test_nothing_is_overtaken_that_went_by_tcp_unseen(connection, node):
    """As by a thread that was on its way into TCP when its socket entered: this program had no say."""
    connection.enter()
    connection.exchange(connection.client, 10)
    splices = node.kernel._maps["splices"]
    key = node.kernel._maps["splice_ends"].lookup(struct.pack("=i", connection.client.fileno()))[:8]
    runs, flags = 15, struct.Struct("=Q")
    before = splices.lookup(key)
    assert flags.unpack_from(before, 128) == (runs,)
    splices.update(key, before[:128] + flags.pack(runs | 64))
    connection.send(connection.client, 1000)
    splices.update(key, before)
    connection.send(connection.client, 500)
    connection.receive(connection.server, 1500)
    assert connection.spliced(connection.client)


@pytest.mark.parametrize("end", ["client", "server"])
def test_reader_that_sleeps_stops_its_writer(connection, end):
    connection.enter()
    writer = getattr(connection, end)
    reader = connection.peer[writer]
    went = connection.fill(writer)
    assert CAP // 2 < went < CAP + BUFFERS
    assert connection.walk().left <= 1 and connection.walk().waiting == 1
    connection.receive(reader, went)
    # And on, by TCP, for ever and both ways.
    connection.rounds()
    connection.walk()
    assert connection.walk() == (0, 0, 0)
    assert not connection.spliced(writer) and not connection.spliced(reader)
    connection.rounds()
    assert connection.walk().entered == 0


def test_overflow_makes_the_other_direction_pass_too(connection):
    connection.enter()
    went = connection.fill(connection.client, 3 << 20)
    assert not connection.spliced(connection.server)
    connection.receive(connection.server, went)


def test_nothing_is_lost_by_leaving(connection):
    """Its queue is full when it is told to leave: it does when that has been read, and not before."""
    connection.enter()
    connection.send(connection.client, 300_000)
    connection.send(connection.server, 400_000)
    connection.node.kernel.splices.switch(False)
    try:
        assert connection.walk() == (0, 0, 2)
        connection.receive(connection.server, 299_999)
        assert connection.walk() == (0, 0, 2)
        connection.receive(connection.server, 1)
        assert connection.walk() == (0, 1, 1)
        connection.send(connection.server, 1000)
        connection.receive(connection.client, 401_000)
        last = connection.walk()
        assert last == (0, 1, 0)
        assert not connection.spliced(connection.client) and not connection.spliced(connection.server)
    finally:
        connection.node.kernel.splices.switch(True)


# Readers that change


def test_reader_that_becomes_blocking_is_noticed(connection):
    connection.enter()
    connection.server.setblocking(True)
    connection.exchange(connection.client, 100)
    assert not connection.spliced(connection.client) and not connection.spliced(connection.server)
    connection.leave()
    connection.server.setblocking(False)


def test_waitall_is_noticed(connection):
    connection.enter()
    connection.send(connection.client, 10)
    assert len(connection.server.recv(10, socket.MSG_WAITALL)) == 10
    connection.read[connection.server] += 10
    assert not connection.spliced(connection.client)
    connection.leave()


def test_peek_sees_and_takes_nothing(connection):
    connection.enter()
    connection.send(connection.client, 100)
    start = connection.read[connection.server]
    for _ in range(3):
        assert connection.server.recv(60, socket.MSG_PEEK) == pattern(start, 60)
    connection.receive(connection.server, 100)
    assert connection.spliced(connection.client)


def test_reader_by_splice2_before_entering_keeps_to_tcp(connection):
    """Bytes that nobody saw being read count as not read, so that nothing is redirected."""
    connection.rounds()
    reading, writing = os.pipe()
    try:
        connection.send(connection.client, 500)
        select.select([connection.server], [], [])
        assert os.splice(connection.server.fileno(), writing, 500) == 500
        assert os.read(reading, 500) == pattern(connection.read[connection.server], 500)
        connection.read[connection.server] += 500
        connection.walk()
        for _ in range(3):
            connection.send(connection.client, 700)
            select.select([connection.server], [], [])
            assert os.splice(connection.server.fileno(), writing, 700) == 700
            assert os.read(reading, 700) == pattern(connection.read[connection.server], 700)
            connection.read[connection.server] += 700
        assert not connection.spliced(connection.client)
    finally:
        os.close(reading)
        os.close(writing)


def test_reader_by_edges_that_takes_a_short_read_for_all(connection):
    """As epoll(7) allows: it was told once of what waits in the splice and of what TCP has, and sees no end between the two."""
    connection.enter()
    with select.epoll() as epoll:
        epoll.register(connection.server, select.EPOLLIN | select.EPOLLET)
        epoll.poll(0)
        went = connection.fill(connection.client, CAP + (1 << 16)) + 10_000
        connection.send(connection.client, 10_000)
        assert by_tcp(connection.server) > 10_000
        deadline = time.monotonic() + 10
        while went:
            while not epoll.poll(0.1):
                assert time.monotonic() < deadline, f"{went} bytes are there, and nobody says so"
                connection.walk_and_nudge()
            data = b"x" * 10_007
            while len(data) == 10_007:
                try:
                    data = connection.server.recv(10_007)
                except BlockingIOError:
                    break
                assert data == pattern(connection.read[connection.server], len(data))
                connection.read[connection.server] += len(data)
                went -= len(data)


def test_who_has_bytes_of_tcp_at_the_next_walk_leaves(connection):
    """FIONREAD does not tell of them there."""
    connection.rounds()
    connection._left_before = connection._left()
    connection.send(connection.client, 2000)
    assert connection.walk().entered == 2
    connection.node.kernel.splices.unread()
    connection.leave()
    assert connection.node.kernel.splices.unread() == {connection.pods[1].cookie}
    connection.receive(connection.server, 2000)


def test_agent_is_woken_when_an_end_can_leave(connection):
    connection.enter()
    went = connection.fill(connection.client, CAP + (1 << 17))
    splices = connection.node.kernel.splices
    splices.walk()
    connection.receive(connection.server, 1000)
    assert not select.select([splices.fd()], [], [], 0)[0]
    connection.receive(connection.server, went - 1000)
    assert select.select([splices.fd()], [], [], 0)[0]


# How it ends


@pytest.mark.parametrize("end", ["client", "server"])
def test_closed_with_data_in_flight(connection, end):
    connection.enter()
    writer = getattr(connection, end)
    reader = connection.peer[writer]
    connection.send(writer, 500_000)
    writer.close()
    connection.receive(reader, 500_000)
    assert select.select([reader], [], [], 5)[0] and reader.recv(1) == b""


def test_half_close_both_ways(connection):
    connection.enter()
    connection.send(connection.client, 50_000)
    connection.client.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        connection.client.send(b"more")
    connection.receive(connection.server, 50_000)
    assert connection.server.recv(1) == b""
    connection.send(connection.server, 600_000)
    connection.server.shutdown(socket.SHUT_WR)
    connection.receive(connection.client, 600_000)
    assert select.select([connection.client], [], [], 5)[0] and connection.client.recv(1) == b""


def test_both_closed_before_all_is_read(connection):
    """The kernel is done with the connection, the application is not: it reads on, and is counted."""
    connection.enter()
    connection.client.shutdown(socket.SHUT_WR)
    assert select.select([connection.server], [], [], 5)[0]
    connection.send(connection.server, 40_000)
    connection.server.shutdown(socket.SHUT_WR)
    connection.check_accounts()
    connection.receive(connection.client, 40_000)


@pytest.mark.parametrize("end", ["client", "server"])
def test_reset(connection, end):
    connection.enter()
    sock = getattr(connection, end)
    other = connection.peer[sock]
    connection.exchange(sock, 1000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()
    assert select.select([other], [], [], 5)[0]
    with pytest.raises(ConnectionResetError):
        other.recv(1)


def test_ended_by_the_agent(connection, pods):
    """Policy refuses it now: both ends learn it, whatever goes past TCP."""
    connection.enter()
    connection.exchange(connection.client, 1000)
    [open_] = [c for c in connection.node.kernel.connections() if c.server[1] == connection.port]
    assert (open_.sent, open_.received) == (
        connection.wrote[connection.server],
        connection.read[connection.server],
    )
    assert connection.node.kernel.destroy(open_, pods[1].netns)
    for sock in (connection.client, connection.server):
        assert select.select([sock], [], [], 5)[0]
        with pytest.raises(ConnectionError):
            sock.recv(1)
        with pytest.raises((ConnectionError, BrokenPipeError)):
            sock.send(b"x")


def test_nothing_stays(node, pods):
    for _ in range(20):
        one = Connection(node, *pods)
        one.enter()
        one.close()
    node.kernel.splices.walk()
    # The last one's FIN may still be on its way.
    wait_until(lambda: node.kernel.pressure()["splices"].used == 0, 5, "no connection is known")
    assert list(node.kernel._maps["splice_sockets"].keys()) == []


# Switches


def test_pod_that_is_switched_off(node, make_pod):
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 0): True})
    addresses = (server.address,)
    off = Pod(server.cookie, addresses, server.identity, splice=False)
    node.kernel.add_pod(off, server.netns)
    assert node.kernel.pods()[server.cookie] == off
    one = Connection(node, client, server)
    one.rounds()
    assert one.walk().entered == 0
    one.close()
    node.kernel.add_pod(off._replace(splice=True), server.netns)
    one = Connection(node, client, server)
    one.enter()
    node.kernel.add_pod(off, server.netns)
    one.leave()
    assert not one.spliced(one.client)
    one.check_accounts()
    one.close()


def test_full_maps(tmp_path):
    """No room: the connection stays with TCP, and nobody else is touched."""
    for name in ("splices", "splice_sockets"):
        folder = tmp_path / name
        folder.mkdir()
        node = Node(folder, sizes=(f"{name}=16",))
        try:
            client, server = TestPod(node, "10.77.0.10", 20), TestPod(node, "10.77.0.11", 21)
            client.enrol({})
            server.enrol({(20, 0): True})
            ones = [Connection(node, client, server) for _ in range(20)]
            for one in ones:
                one.rounds()
            entered = node.kernel.splices.walk().entered
            assert 16 <= entered <= 34
            node.kernel.splices.walk()
            spliced = [one.spliced(one.client) and one.spliced(one.server) for one in ones]
            assert 0 < sum(spliced) <= 16
            assert node.kernel.splices.counters()[SpliceCounter.FULL] > 0
            for one in ones:
                one.exchange(one.client, 100_000)
                one.check_accounts()
                one.close()
            client.close()
            server.close()
        finally:
            node.close()


# Kernels


def test_kernel_whose_fionread_is_blind(tmp_path):
    """Nothing is spliced; what is read late is counted all the same."""
    node = Node(tmp_path)
    try:
        shutil.copytree(ROOT / "bpf", tmp_path / "tree/bpf", ignore=shutil.ignore_patterns("__pycache__"))
        loader = tmp_path / "tree/bpf/loader.py"
        text = loader.read_text()
        assert '"tcp_bpf_ioctl"' in text
        loader.write_text(text.replace('"tcp_bpf_ioctl"', '"no_such_function"'))
        command = [sys.executable, "-m", "bpf.loader", "--pins", str(node.pins), "--cgroup", str(node.root)]
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path / "tree")
        assert not node.kernel.splices.supported
        node.kernel.splices.switch(True)
        client, server = TestPod(node, "10.77.0.10", 20), TestPod(node, "10.77.0.11", 21)
        client.enrol({})
        server.enrol({(20, 0): True})
        one = Connection(node, client, server)
        one.rounds()
        assert one.walk().entered == 0 and not one.spliced(one.client)
        one.client.shutdown(socket.SHUT_WR)
        one.send(one.server, 40_000)
        one.server.shutdown(socket.SHUT_WR)
        one.check_accounts()
        one.receive(one.client, 40_000)
        one.check_accounts()
        one.close()
        client.close()
        server.close()
    finally:
        node.close()


# Life


def test_upgrade_under_traffic(connection, node):
    """Programs are replaced while bytes go past TCP: every one comes, in order, and is counted once."""
    connection.enter()
    stop = threading.Event()
    problems = []

    def talk():
        try:
            while not stop.is_set():
                connection.exchange(connection.client, 3000)
                connection.exchange(connection.server, 5000)
        except Exception as error:
            problems.append(error)

    def tracepoint():
        link = links.open_pin(str(node.pins / f"v{wire.ABI}" / "tracepoint_sock_recv_length"))
        with contextlib.closing(os.fdopen(link, closefd=True)):
            return links.link_info(link)

    before = tracepoint()
    talker = threading.Thread(target=talk)
    talker.start()
    try:
        for _ in range(3):
            assert "sock_ops" in node.load("--replace")["programs_replaced"]
    finally:
        stop.set()
        talker.join(10)
    assert not problems
    assert tracepoint() == before
    assert connection.spliced(connection.client) and connection.spliced(connection.server)
    went = connection.fill(connection.client, 4 << 20)
    connection.receive(connection.server, went)
    connection.rounds()
    connection.walk()
    assert not connection.spliced(connection.client)


def test_agent_is_woken_when_there_is_something_to_do(connection, node):
    splices = node.kernel.splices
    splices.walk()
    assert not select.select([splices.fd()], [], [], 0)[0]
    connection.exchange(connection.client, 10)
    assert not select.select([splices.fd()], [], [], 0)[0]
    connection.rounds()
    assert select.select([splices.fd()], [], [], 0)[0]
    assert splices.walk().entered == 2
    assert not select.select([splices.fd()], [], [], 0)[0]
    went = connection.fill(connection.client, 3 << 20)
    assert select.select([splices.fd()], [], [], 0)[0]
    connection.receive(connection.server, went)
