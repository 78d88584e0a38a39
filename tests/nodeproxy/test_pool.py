"""Connections of the pool at their end: replaced, drained, broken, silent; nothing is lost or left behind."""

import functools
import socket
import time

import pytest
from OpenSSL import SSL

from nodeproxy import inbound
from nodeproxy import link as link_module
from nodeproxy.link import Link
from nodeproxy.tls import credentials
from tests.nodeproxy.fakes.apps import Server, echo, read_all
from tests.nodeproxy.fakes.authority import Authority
from tests.nodeproxy.fakes.peer import Peer
from tests.nodeproxy.fakes.world import World, identity, wait_until


@pytest.fixture
def server(world: World):
    world.ready()
    made = Server(world.server_address, echo)
    yield made
    made.close()


def exchange(world: World, port: int) -> None:
    with world.dial(port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"


def renew(world: World) -> None:
    """The client's certificate, now."""
    certificates = world.a.proxy.certificates
    old = certificates.get("uid-client")
    world.a.call(lambda: certificates._request(certificates._entries["uid-client"]))
    wait_until(lambda: certificates.get("uid-client") is not old, "renewed")


def test_the_connection_after_a_renewal_is_the_pools(world: World, server: Server):
    exchange(world, server.port)
    (old,) = world.a.proxy.pool.links()
    wait_until(lambda: not old.core.streams, "idle")
    renew(world)
    exchange(world, server.port)
    (new,) = world.a.proxy.pool.links()
    assert new is not old
    exchange(world, server.port)
    assert world.a.proxy.pool.links() == [new]
    world.a.agent.withdraw("uid-client", 1)
    wait_until(lambda: new.closed, "closed with its pod")


def slowly(link: Link) -> None:
    """A connection whose socket takes little at a time."""
    link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_connection_ends_only_when_everything_is_written(world: World, who: str):
    """The peer's application has ended; then come the last bytes and the end, on a connection that takes no new streams."""
    size = 200_000
    got: list[bytes] = []

    def application(sock: socket.socket) -> None:
        if who == "client":
            sock.shutdown(socket.SHUT_WR)
            got.append(read_all(sock))
        else:
            read_all(sock)
            sock.sendall(b"z" * size)

    world.ready()
    server = Server(world.server_address, application)
    with world.dial(server.port) as sock:
        wait_until(lambda: server.peers, "open")
        node = world.a if who == "client" else world.b
        links = world.a.proxy.pool.links() if who == "client" else world.b.proxy.inbound.links()
        world.a.call(functools.partial(slowly, links[0]))
        world.b.call(links[0].shutdown) if who == "server" else world.a.call(links[0].shutdown)
        if who == "client":
            (dialled,) = [d for g in node.proxy.pool._groups.values() for d in g.links]
            dialled.ready = False  # as a renewal leaves it
            assert sock.recv(1) == b""
            sock.sendall(b"z" * size)
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.shutdown(socket.SHUT_WR)
            got.append(read_all(sock))
        wait_until(lambda: got, "the end")
        assert got[0] == b"z" * size
        wait_until(lambda: links[0].closed, "the connection has ended too")
    server.close()


def test_those_who_wait_get_no_connection_that_has_just_broken(world: World, server: Server):
    """The first connection is full, a second one is not ready yet, and the first breaks."""
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        (first,) = world.a.proxy.pool.links()

        def full() -> None:
            first.core.max_streams = 1

        world.a.call(full)
        world.b.call(
            lambda: world.b.loop.later(0, lambda: time.sleep(0.5))
        )  # the second handshake takes a while
        with world.dial(server.port) as new:
            wait_until(lambda: len(world.a.proxy.pool.links()) == 2, "the second connection")
            world.a.call(lambda: first.sock.shutdown(socket.SHUT_RDWR))
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            new.sendall(b"y")
            new.settimeout(3)
            assert new.recv(1) == b"y"


def test_a_peer_that_is_silent_after_the_handshake_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT", 0.5)
    world.ready()
    world.b.stop()
    world.nodes.remove(world.b)
    with socket.create_server((world.server_address, 15008)) as listener:
        with world.dial(80) as sock:
            taken, _ = listener.accept()
            svid = world.authority.svid(identity("server"))
            peer = Peer(taken, credentials(svid, world.authority.trust).server, client=False)
            peer.handshake()
            sock.settimeout(3)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            peer.close()


def test_a_client_that_is_silent_after_the_handshake_is_given_up(
    world: World, server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT", 0.5)
    svid = world.authority.svid(identity("client"))
    peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)
    peer.handshake()
    wait_until(lambda: not world.b.proxy.inbound.links(), "given up", 3)
    with pytest.raises((OSError, SSL.Error)):
        peer.until(-1)
    peer.close()


def test_half_open_connections_are_limited(world: World, server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inbound, "HALF_OPEN", 5)
    address = (world.server_address, 15008)
    silent = [socket.create_connection(address, 3) for _ in range(5)]
    wait_until(lambda: len(world.b.proxy.inbound.links()) == 5, "five handshakes")
    with pytest.raises(ConnectionResetError), socket.create_connection(address, 3) as more:
        more.recv(1)
    for sock in silent:
        sock.close()
    wait_until(lambda: not world.b.proxy.inbound.links(), "given up")
    for _ in range(6):  # those that are ready do not count
        svid = world.authority.svid(identity("client"))
        peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)
        peer.handshake()
        assert peer.status(f"{world.server_address}:{server.port}") == 200
        silent.append(peer.sock)
    assert not world.b.proxy.inbound._half_open
    for sock in silent:
        sock.close()


def test_a_root_that_is_taken_back_ends_what_was_dialled_under_it(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        world.roots = Authority().pem
        world.publish(world.a)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_draining_resets_what_has_not_ended_in_time(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        world.a.call(lambda: world.a.proxy.drain(0.3))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    wait_until(lambda: not world.a._thread.is_alive(), "the loop ends")
