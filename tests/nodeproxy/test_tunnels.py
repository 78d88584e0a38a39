"""Tunnels between two node proxies over real sockets with real certificates: what applications see."""

import hashlib
import os
import socket
import threading
import time

import pytest

from agent import api
from nodeproxy import agent_client
from nodeproxy.accounting import Labels
from tests.nodeproxy.fakes.apps import Server, echo, read_all
from tests.nodeproxy.fakes.world import World, identity, wait_until


@pytest.fixture
def server(world: World):
    made = Server(world.server_address, echo)
    yield made
    made.close()


def totals(world: World, node) -> dict[str, tuple[int, int, int, int]]:
    """By response flags."""
    result: dict[str, tuple[int, int, int, int]] = {}
    snapshot: dict[Labels, tuple[int, int, int, int]] = node.proxy.accounting.snapshot()
    for labels, values in snapshot.items():
        old = result.get(labels.response_flags, (0, 0, 0, 0))
        result[labels.response_flags] = tuple(a + b for a, b in zip(old, values, strict=True))  # type: ignore[assignment]
    return result


def wait_for_totals(world: World, node, expected: dict[str, tuple[int, int, int, int]]) -> None:
    wait_until(lambda: totals(world, node) == expected, f"{expected}")


def test_echo(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""


def test_the_application_sees_the_clients_address_and_port(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        assert server.peers == [sock.getsockname()]


def test_half_close_both_ways(world: World):
    def late(sock: socket.socket) -> None:
        data = read_all(sock)  # until the client's end
        sock.sendall(b"got %d" % len(data))

    server = Server(world.server_address, late)
    with world.dial(server.port) as sock:
        sock.sendall(b"y" * 300_000)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"got 300000"
    server.close()

    def early(sock: socket.socket) -> None:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        seen.append(len(read_all(sock)))

    seen: list[int] = []
    server = Server(world.server_address, early)
    with world.dial(server.port) as sock:
        assert read_all(sock) == b"bye"
        sock.sendall(b"z" * 100_000)
    wait_until(lambda: seen == [100_000], "what was sent after the server's end")
    server.close()


def test_reset_travels_both_ways(world: World):
    reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"

    def rude(sock: socket.socket) -> None:
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

    server = Server(world.server_address, rude)
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    server.close()

    server = Server(world.server_address, echo)
    sock = world.dial(server.port)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    sock.close()
    wait_until(lambda: server.errors, "the server's application sees the reset")
    assert isinstance(server.errors[0], ConnectionResetError)
    server.close()


def test_many_streams_share_one_connection_and_no_byte_is_wrong(world: World, server: Server):
    def one(number: int) -> None:
        data = os.urandom(200_000 + number * 1000)
        with world.dial(server.port) as sock:

            def send() -> None:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            back = read_all(sock)
            sender.join()
            if hashlib.sha256(back).digest() != hashlib.sha256(data).digest():
                wrong.append(number)

    wrong: list[int] = []
    threads = [threading.Thread(target=one, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(world.a.proxy.pool.links()) == 1
    sent = sum(200_000 + n * 1000 for n in range(40))
    for node in world.nodes:
        # Opened, closed, bytes each way: exactly.
        wait_for_totals(world, node, {"-": (40, 40, sent, sent)})


def test_a_sleeping_reader_stops_its_writer_and_nobody_else(world: World, server: Server):
    wake = threading.Event()

    def sleep(sock: socket.socket) -> None:
        wake.wait(20)
        got.append(hashlib.sha256(read_all(sock)).hexdigest())

    got: list[str] = []
    sleeper = Server(world.server_address, sleep)
    data = os.urandom(1 << 20) * 64
    with world.dial(sleeper.port) as sock:
        sock.setblocking(False)
        sent = 0
        quiet = time.monotonic() + 1.0
        while time.monotonic() < quiet:
            try:
                sent += sock.send(data[sent : sent + (1 << 20)])
                quiet = time.monotonic() + 1.0
            except BlockingIOError:
                time.sleep(0.01)
        # Stopped by us: socket buffers of four sockets and one stream's window.
        assert sent < 40 << 20
        tunnel = world.a.proxy.accounting.open_tunnels()[0]
        assert int(str(tunnel["received"])) <= sent
        with world.dial(server.port) as other:
            began = time.monotonic()
            other.sendall(b"ping")
            assert other.recv(10) == b"ping"
            assert time.monotonic() - began < 1.0
        sock.setblocking(True)
        wake.set()
        sock.sendall(data[sent:])
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: got, "the sleeper read everything", 20)
    assert got == [hashlib.sha256(data).hexdigest()]
    sleeper.close()


def test_open_tunnels_are_counted(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"12345")
        assert sock.recv(10) == b"12345"
        wait_for_totals(world, world.a, {"-": (1, 0, 5, 5)})
        wait_for_totals(world, world.b, {"-": (1, 0, 5, 5)})
    wait_until(lambda: totals(world, world.a) == {"-": (1, 1, 5, 5)}, "closed")
    labels = next(iter(world.b.proxy.accounting.snapshot()))
    assert labels.reporter == "destination"
    assert labels.source_principal == identity("client")
    assert labels.destination_workload == "server"
    assert labels.connection_security_policy == "mutual_tls"


def test_nobody_listens(world: World, server: Server):
    server.close()
    with world.dial(server.port) as sock:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    wait_for_totals(world, world.b, {"CONNECT": (1, 1, 0, 0)})
    wait_for_totals(world, world.a, {"CONNECT": (1, 1, 0, 0)})


def test_connections_wait_for_the_certificate(world: World, server: Server):
    world.ready()
    late = world.pod(world.a, "late", world.client_address.rsplit(".", 1)[0] + ".3", 3, enroll=False)
    world.publish()
    signs = world.a.sign
    world.a.sign = lambda request: "UNAVAILABLE: not yet"
    world.enroll(world.a, late, 3)
    wait_until(lambda: len(world.a.requests) == 2, "asked")
    world.a.captured.destination = (world.server_address, server.port)
    with socket.create_connection((late.addresses[0], 15001), 10, (late.addresses[0], 0)) as sock:
        sock.sendall(b"early")
        time.sleep(0.2)
        assert server.peers == []
        world.a.sign = signs
        assert sock.recv(10) == b"early"
    assert len(world.a.requests) >= 3


def test_the_agent_goes_and_comes_back(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"one")
        assert sock.recv(10) == b"one"
        world.a.agent.stop()
        world.b.agent.stop()
        sock.sendall(b"two")
        assert sock.recv(10) == b"two"
        with world.dial(server.port) as new:  # from the stock
            new.sendall(b"three")
            assert new.recv(10) == b"three"
        world.a.agent.start()
        world.b.agent.start()
        wait_until(lambda: len(world.a.agent.hellos) == 2, "the proxy comes back")
        assert {held.kind.value for held in world.a.agent.hellos[1].held} == {"outbound", "hbone"}
        sock.sendall(b"four")
        assert sock.recv(10) == b"four"


def test_what_was_usual_goes_on_while_the_agent_restarts(
    world: World, server: Server, monkeypatch: pytest.MonkeyPatch
):
    """Who had forty connections in a second has as many for ten more, of which none waits for an agent."""
    world.ready()

    def once() -> float:
        began = time.monotonic()
        with world.dial(server.port) as sock:
            sock.sendall(b"x")
            assert sock.recv(10) == b"x"
        return time.monotonic() - began

    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        for _ in range(10):
            once()
        time.sleep(0.05)

    def stocks() -> list[int]:
        return [len(stock.ready) for stock in world.b.client._stocks.values()]

    wait_until(lambda: max(stocks()) >= 400, "the stock is filled", 10)
    world.a.agent.stop()
    world.b.agent.stop()
    assert max(once() for _ in range(400)) < 1.0
    world.a.agent.start()
    world.b.agent.start()
    # What nobody takes any more is not kept.
    wait_until(lambda: max(stocks()) >= 400, "the stock is filled again", 10)
    monkeypatch.setattr(agent_client, "_RATE_KEPT", 0.1)
    wait_until(lambda: max(stocks()) <= 256, "it shrinks", 30)


def test_one_pod_does_not_take_all(world: World, server: Server):
    world.ready()
    world.a.proxy.tunnels._most = 3

    def echoed(sock: socket.socket) -> bool:
        try:
            sock.sendall(b"x")
            return sock.recv(1) == b"x"
        except ConnectionError:
            return False

    held = [world.dial(server.port) for _ in range(3)]
    assert all(echoed(sock) for sock in held)
    try:
        with world.dial(server.port) as refused:
            assert not echoed(refused)
    except ConnectionResetError:
        pass  # The proxy was so fast that connect() has seen its reset already.
    assert all(echoed(sock) for sock in held)
    held.pop().close()
    wait_until(lambda: len(world.a.proxy.tunnels.open) == 2, "ended")
    held.append(world.dial(server.port))
    assert echoed(held[-1])
    for sock in held:
        sock.close()
    wait_until(lambda: not world.a.proxy.tunnels._of, "none is counted")


def test_a_withdrawn_pod_loses_everything(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"one")
        assert sock.recv(10) == b"one"
        world.b.agent.withdraw("uid-server", 2)
        with pytest.raises(ConnectionResetError):
            sock.recv(10)
    wait_until(lambda: not world.b.client.pods, "withdrawn")
    assert world.b.call(lambda: world.b.proxy.certificates.get("uid-server")) is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((world.server_address, 15008), 1)


def test_draining_lets_open_tunnels_end_and_takes_no_new_ones(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"one")
        assert sock.recv(10) == b"one"
        listeners = [one for pod in world.a.client.pods.values() for one in pod.listeners.values()]
        world.a.call(lambda: world.a.proxy.drain(10))
        wait_until(lambda: all(one.fileno() < 0 for one in listeners), "listeners are closed")
        with pytest.raises(ConnectionRefusedError):
            world.dial(server.port)
        assert not (world.a.run / "nodeproxy/nodeproxy.sock").exists()
        time.sleep(0.2)
        assert world.a._thread.is_alive()
        sock.sendall(b"two")
        assert sock.recv(10) == b"two"
    wait_until(lambda: not world.a._thread.is_alive(), "the loop ends with its last tunnel")


def test_the_server_s_goodbye_moves_new_streams_to_a_new_connection(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"one")
        assert sock.recv(10) == b"one"
        (link,) = world.b.proxy.inbound.links()
        world.b.call(link.shutdown)
        for _ in range(3):
            with world.dial(server.port) as new:
                new.sendall(b"new")
                assert new.recv(10) == b"new"
        sock.sendall(b"two")
        assert sock.recv(10) == b"two"
    wait_until(lambda: len(world.b.proxy.inbound.links()) == 1, "the old connection is gone")
    assert world.b.proxy.inbound.links() != [link]


def test_more_streams_than_one_connection_may_carry(world: World, server: Server):
    socks = []
    for number in range(300):
        sock = world.dial(server.port)
        sock.sendall(b"%03d" % number)
        socks.append(sock)
    for number, sock in enumerate(socks):
        assert sock.recv(10) == b"%03d" % number
    assert len(world.a.proxy.pool.links()) == 2
    for sock in socks:
        sock.close()


def test_a_network_that_breaks_resets_what_was_on_it(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"one")
        assert sock.recv(10) == b"one"
        (link,) = world.a.proxy.pool.links()
        world.a.call(lambda: link.sock.shutdown(socket.SHUT_RDWR))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    wait_until(lambda: server.errors, "the application on the other side sees a reset too")
    with world.dial(server.port) as sock:
        sock.sendall(b"again")
        assert sock.recv(10) == b"again"


def test_a_bug_ends_one_connection_and_nothing_else(
    world: World, server: Server, monkeypatch: pytest.MonkeyPatch
):
    """Neither the listener nor the agent's connection is lost by it."""
    world.ready()
    real = world.a.proxy.tunnels.accounting.begin

    def fail_once(_flow: object) -> None:
        monkeypatch.setattr(world.a.proxy.accounting, "begin", real)
        raise RuntimeError("a bug")

    monkeypatch.setattr(world.a.proxy.accounting, "begin", fail_once)
    with pytest.raises(ConnectionResetError), world.dial(server.port) as sock:
        sock.recv(1)
    on_pod = world.a.proxy.on_pod

    def fail_first(_pod: object) -> None:
        monkeypatch.setattr(world.a.proxy, "on_pod", on_pod)
        raise RuntimeError("a bug")

    monkeypatch.setattr(world.a.proxy, "on_pod", fail_first)
    world.pod(world.a, "late", world.client_address.rsplit(".", 1)[0] + ".3", 3)
    wait_until(lambda: len(world.a.agent.hellos) == 2, "the agent is asked again")
    wait_until(lambda: ("uid-late", 3) in world.a.client.pods, "told again")
    wait_until(lambda: len(world.a.client.pods["uid-late", 3].listeners) == 2, "with its listeners")
    with world.dial(server.port) as sock:
        sock.sendall(b"one")
        assert sock.recv(10) == b"one"


def test_a_successor_of_the_server_s_proxy_gets_new_streams(world: World, server: Server):
    """The old one says so twice, so that what is asked of it meanwhile is served; it keeps its listeners and what is open."""
    with world.dial(server.port) as sock:
        sock.sendall(b"one")
        assert sock.recv(10) == b"one"
        (link,) = world.b.proxy.inbound.links()
        world.b.agent.say(api.Drain())
        wait_until(lambda: link.core.closing, "said for good", 5)
        # Nobody has taken over here: its own listener takes what still comes, on a connection that is told the same.
        with world.dial(server.port) as new:
            new.sendall(b"new")
            assert new.recv(10) == b"new"
        sock.sendall(b"two")
        assert sock.recv(10) == b"two"
        world.b.call(lambda: world.b.proxy.drain(30))
        time.sleep(0.3)
        assert world.b._thread.is_alive()
    wait_until(lambda: not world.b._thread.is_alive(), "it ends with its last stream", 10)


def test_a_proxy_that_ends_serves_again_when_its_successor_died(world: World, server: Server):
    world.b.agent.say(api.Drain())
    wait_until(lambda: world.b.proxy.ready() is True, "it could serve again")
    world.b.call(lambda: world.b.proxy.drain(5))
    world.b.agent.say(api.Serving())
    began = time.monotonic()
    while time.monotonic() < began + 4:
        with world.dial(server.port) as sock:
            sock.sendall(b"on")
            assert sock.recv(10) == b"on"
        time.sleep(0.2)
    assert (world.b.run / "nodeproxy/nodeproxy.sock").exists()
    wait_until(lambda: not world.b._thread.is_alive(), "at its deadline", 5)


def test_who_is_not_ready_does_not_say_so(world: World):
    assert world.a.agent.ready.wait(5)
    assert world.a.agent.hellos[0].serving is False
    # To the next agent it is.
    world.a.agent.stop()
    world.a.agent.start()
    wait_until(lambda: len(world.a.agent.hellos) == 2, "back", 10)
    assert world.a.agent.hellos[1].serving is True
    assert all(held.socket for held in world.a.agent.hellos[1].held)
