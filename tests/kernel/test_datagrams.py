"""UDP of enrolled pods: where datagrams to a service go, and whose the answers seem to be."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from agent.kernel import Backend, Peer, Pod, Reason
from bpf.wire import Protocol
from lab.processes import wait_until
from tests.kernel.mesh import Node, TestPod

pytestmark = pytest.mark.privileged

#: How pods' addresses are, and how they are dialled (``mapped``: IPv4 by IPv6 sockets).
FAMILIES = ("ipv4", "ipv6", "mapped")
VIPS = {"ipv4": "10.96.53.1", "ipv6": "fd96::53:1", "mapped": "10.96.53.1"}
ANY = {"ipv4": "0.0.0.0", "ipv6": "::", "mapped": "0.0.0.0"}
LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1", "mapped": "127.0.0.1"}
PORT = 53
SERVER_PORT = 5353
UDP = Protocol.UDP


@pytest.fixture
def vip(family: str) -> str:
    return VIPS[family]


@pytest.fixture
def client(make_pod: Callable[..., TestPod]) -> TestPod:
    return make_pod().enrol({})


class Server:
    """A pod with a socket, that answers by hand."""

    def __init__(self, pod: TestPod, port: int = SERVER_PORT) -> None:
        self.pod = pod
        self.port = port
        self.sock = pod.app.datagrams(bind=("", port))

    @property
    def backend(self) -> Backend:
        return Backend(self.pod.address, self.port)

    def received(self) -> list[tuple[bytes, tuple[str, int]]]:
        """What is there now, once there is something."""
        found = [self.sock.recvfrom(100)]
        return found + self.more()

    def more(self) -> list[tuple[bytes, tuple[str, int]]]:
        found: list[tuple[bytes, tuple[str, int]]] = []
        self.sock.settimeout(0)
        try:
            while True:
                found.append(self.sock.recvfrom(100))
        except BlockingIOError:
            return found
        finally:
            self.sock.settimeout(3)

    def answer(self, text: str = "") -> tuple[str, int]:
        """To the last that has asked; gives back who that was."""
        data, peer = self.received()[-1]
        self.sock.answer(text.encode() or data, peer)
        return peer


@pytest.fixture
def make_server(make_pod: Callable[..., TestPod], client: TestPod) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(*, allowed: bool = True, port: int = SERVER_PORT) -> Server:
        server = Server(make_pod().enrol({(client.identity, port): True} if allowed else {}), port)
        made.append(server)
        return server

    yield make
    for server in made:
        server.sock.close()


@pytest.fixture
def service(node: Node, vip: str) -> Iterator[Callable[..., None]]:
    made: set[tuple[str, int, Protocol]] = set()

    def make(*servers: Server, address=vip, port=PORT, protocol=UDP, affinity=0, weights=()) -> None:
        backends = [server.backend for server in servers]
        if weights:
            backends = [b._replace(weight=w) for b, w in zip(backends, weights, strict=False)]
        node.kernel.set_service(address, port, backends, protocol=protocol, affinity=affinity)
        made.add((address, port, protocol))

    yield make
    for address, port, protocol in made:
        node.kernel.remove_service(address, port, protocol)


def reasons(node: Node, client: TestPod) -> list[Reason]:
    return [event.reason for event in node.kernel.read_events() if event.netns_cookie == client.cookie]


def asked(servers: list[Server]) -> Server:
    """The one of them that got something."""
    found: list[Server] = []

    def look() -> bool:
        found.extend(server for server in servers if server.more())
        return bool(found)

    wait_until(look, 3.0, "one of the servers got it")
    [server] = found
    return server


def test_answers_come_from_the_service(client, make_server, service, vip):
    server = make_server()
    service(server)
    with client.app.datagrams() as sock:
        client.app.send(sock, "question", (vip, PORT))
        assert server.answer("answer")[0] == client.address
        assert sock.recvfrom(100) == (b"answer", (vip, PORT))


def test_connected(client, make_server, service, vip):
    server = make_server()
    service(server)
    with client.app.datagrams((vip, PORT)) as sock:
        assert sock.getpeername() == (vip, PORT)
        assert sock.getsockname()[0] == client.address
        client.app.send(sock, "question")
        server.answer("answer")
        assert sock.recvfrom(100) == (b"answer", (vip, PORT))


def test_one_socket_and_many_services(client, make_server, service, vip):
    """Also in turns, and those that it has not asked for long."""
    servers = [make_server() for _ in range(3)]
    others = [Server(server.pod, 6000 + n) for server in servers for n in range(8)]
    for other in others:
        client_may: dict[tuple[int, ...], bool] = {(client.identity, 0): True}
        other.pod.node.kernel.set_policy(other.pod.cookie, client_may, 2)
    services = {(vip, 1000 + n): other for n, other in enumerate(others)}
    for (_, port), other in services.items():
        service(other, port=port)
    with client.app.datagrams() as sock:
        for _ in range(2):
            for address in services:
                client.app.send(sock, str(address[1]), address)
            for address, other in reversed(services.items()):
                other.answer()
                assert sock.recvfrom(100) == (str(address[1]).encode(), address)
    for other in others:
        other.sock.close()


@pytest.mark.parametrize("weights", [(), (3, 3, 4)], ids=["in the service", "in slots"])
def test_a_socket_keeps_its_endpoint_and_others_get_others(client, make_server, service, vip, weights):
    servers = [make_server() for _ in range(3)]
    service(*servers, weights=weights)
    met = set()
    for _ in range(40):
        with client.app.datagrams() as sock:
            client.app.send(sock, "first", (vip, PORT))
            server = asked(servers)
            for _ in range(5):
                client.app.send(sock, "next", (vip, PORT))
                assert asked(servers) is server
            met.add(server.pod.address)
    assert len(met) == 3


@pytest.mark.parametrize("weights", [(), (1, 2)], ids=["in the service", "in slots"])
def test_an_endpoint_that_goes_away_is_left(client, make_server, service, vip, weights):
    """As a resolver's socket outlives the servers: no datagram goes to the dead one, and its last word is still the service's."""
    servers = [make_server() for _ in range(2)]
    service(*servers, weights=weights)
    with client.app.datagrams() as sock:
        client.app.send(sock, "question", (vip, PORT))
        first = asked(servers)
        client.app.send(sock, "question", (vip, PORT))
        _, peer = first.received()[-1]
        [second] = [server for server in servers if server is not first]
        service(second)
        for _ in range(10):
            client.app.send(sock, "again", (vip, PORT))
            second.answer()
            assert sock.recvfrom(100) == (b"again", (vip, PORT))
        assert first.more() == []
        first.sock.answer(b"late", peer)
        assert sock.recvfrom(100) == (b"late", (vip, PORT))
        # It comes back with the next version of the server, and so another way: who was moved stays.
        service(first, second, weights=weights)
        client.app.send(sock, "again", (vip, PORT))
        assert asked(servers) is second


def test_endpoints_of_an_old_service_by_the_same_socket(client, make_server, service, vip):
    """What it sent to the endpoint itself comes from there, also where it knows it as a service's."""
    server = make_server()
    service(server)
    with client.app.datagrams() as sock:
        for address in ((vip, PORT), server.backend[:2], (vip, PORT), server.backend[:2]):
            client.app.send(sock, "question", address)
            server.answer()
            assert sock.recvfrom(100)[1] == address


def test_connected_again(client, make_server, service, vip):
    one, other = make_server(), make_server()
    service(one)
    service(other, port=54)
    with client.app.datagrams((vip, PORT)) as sock:
        client.app.reconnect(sock, (vip, 54))
        assert sock.getpeername() == (vip, 54)
        client.app.send(sock, "question")
        other.answer()
        assert sock.recvfrom(100)[1] == (vip, 54)
        client.app.reconnect(sock, one.backend[:2])
        assert sock.getpeername() == one.backend[:2]
        client.app.send(sock, "question")
        one.answer()
        assert sock.recvfrom(100)[1] == one.backend[:2]


def test_connected_and_sent_elsewhere(client, make_server, service, vip):
    one, other = make_server(), make_server()
    service(one)
    service(other, port=54)
    with client.app.datagrams((vip, PORT)) as sock:
        client.app.send(sock, "question", (vip, 54))
        assert other.received()[0][0] == b"question"
        assert sock.getpeername() == (vip, PORT)
        client.app.send(sock, "question")
        one.answer()
        assert sock.recvfrom(100)[1] == (vip, PORT)


def test_session_affinity(client, make_server, service, vip):
    servers = [make_server() for _ in range(3)]
    service(*servers, affinity=60)
    client.app.spread((vip, PORT), 1)
    server = asked(servers)
    for connecting in (False, True):
        client.app.spread((vip, PORT), 15, connecting=connecting)
        assert len(server.received()) == 15
    assert all(not other.more() for other in servers)
    others = [other for other in servers if other is not server]
    service(*others, affinity=60)
    client.app.spread((vip, PORT), 15)
    assert len(asked(others).more()) == 0
    assert server.more() == []


@pytest.mark.parametrize("connecting", [False, True])
def test_no_endpoints(node, client, service, connecting, vip):
    service()
    node.kernel.read_events()
    with pytest.raises(ConnectionRefusedError):
        client.app.spread((vip, PORT), 1, connecting=connecting)
    assert reasons(node, client) == [Reason.NO_BACKEND]


@pytest.mark.parametrize("connecting", [False, True])
def test_refused_by_the_destination(node, client, make_server, service, connecting, vip):
    server = make_server(allowed=False)
    service(server)
    node.kernel.read_events()
    # What is sent to a pod's address may be an answer: it is judged on its way.
    for address in ((vip, PORT), server.backend[:2]) if connecting else ((vip, PORT),):
        with pytest.raises(PermissionError):
            client.app.spread(address, 1, connecting=connecting)
    assert reasons(node, client) == [Reason.POLICY]
    assert server.more() == []
    node.kernel.set_policy(server.pod.cookie, {(client.identity, SERVER_PORT): True}, 2)
    client.app.spread((vip, PORT), 1, connecting=connecting)
    assert len(server.received()) == 1


def test_servers_that_answer(client, make_server, service, vip):
    """Also by connect(), as some do, and to a client to whom nobody may speak first."""
    server = make_server()
    service(server)
    with client.app.datagrams() as sock:
        for answer in ("one", "two"):
            client.app.send(sock, "question", (vip, PORT))
            [(_, peer)] = server.received()
            if answer == "one":
                server.pod.app.send(server.sock, answer, peer)
            else:
                server.pod.app.reconnect(server.sock, peer)
                server.pod.app.send(server.sock, answer)
            assert sock.recvfrom(100) == (answer.encode(), (vip, PORT))
        with pytest.raises(PermissionError):
            server.pod.app.spread(peer, 1, connecting=True)


def test_both_protocols_with_one_number(node, client, make_server, make_pod, service, vip):
    server = make_server()
    stream = make_pod().enrol({(client.identity, 8080): True})
    node.kernel.set_service(vip, PORT, [Backend(stream.address, 8080)])
    try:
        service(server)
        assert len(node.kernel.services().keys() & {(vip, PORT, Protocol.TCP), (vip, PORT, UDP)}) == 2
        client.app.spread((vip, PORT), 1)
        assert len(server.received()) == 1
        with (
            stream.app.listen(("", 8080)) as listener,
            client.app.connect((vip, PORT)) as sock,
        ):
            accepted, _ = listener.accept()
            with accepted:
                assert sock.getpeername() == (vip, PORT)
        node.kernel.remove_service(vip, PORT)
        client.app.spread((vip, PORT), 1)
        assert len(server.received()) == 1
    finally:
        node.kernel.remove_service(vip, PORT)


def test_to_itself(client, service, vip):
    """A pod that is the endpoint of the service that it asks, and asks no policy."""
    own = Server(client)
    service(own)
    with client.app.datagrams() as sock:
        client.app.send(sock, "question", (vip, PORT))
        own.answer()
        assert sock.recvfrom(100) == (b"question", (vip, PORT))
    own.sock.close()


@pytest.fixture
def elsewhere(make_pod) -> Iterator[Server]:
    """Where a service's address leads without a mesh."""
    server = Server(make_pod(), PORT)
    yield server
    server.sock.close()


@pytest.mark.parametrize("role", ["agent", "nodeproxy", "l7proxy", "prober", "envoy"])
def test_own_processes_are_not_captured(client, make_server, service, elsewhere, role):
    server = make_server()
    address = (elsewhere.pod.address, PORT)
    service(server, address=address[0])
    worker = client.worker(role)
    for connecting in (False, True):
        worker.spread(address, 1, connecting=connecting)
        assert len(elsewhere.received()) == 1
    assert server.more() == []
    client.app.spread(address, 1)
    assert len(server.received()) == 1


def test_who_is_not_in_the_mesh_is_not_captured(node, client, make_pod, make_server, service, elsewhere):
    server = make_server()
    address = (elsewhere.pod.address, PORT)
    service(server, address=address[0])
    for worker in (node.worker("host"), make_pod().app):
        for connecting in (False, True):
            worker.spread(address, 1, connecting=connecting)
            assert len(elsewhere.received()) == 1
    # One that is about to join, too.
    node.kernel.add_pod(
        Pod(client.cookie, client.addresses, client.identity, passing=True, open=True), client.netns
    )
    client.app.spread(address, 1)
    assert len(elsewhere.received()) == 1
    assert server.more() == []


def test_node_ports(node, client, make_pod, make_server, service, family):
    """On whatever node's address; of a peer that is no node, and on loopback, they are ports like any other."""
    server = make_server()
    stream = make_pod().enrol({(client.identity, 8080): True})
    service(server, address=ANY[family], port=30053)
    node.kernel.set_service(ANY[family], 30053, [Backend(stream.address, 8080)])
    host, plain = make_pod(), make_pod()
    try:
        node.kernel.set_peer(host.address, Peer(local=False, enrolled=False, identity=0, node=True))
        node.kernel.set_peer(plain.address, Peer(local=False, enrolled=False, identity=0))
        assert node.kernel.peers()[host.address].node
        with client.app.datagrams() as sock:
            client.app.send(sock, "question", (host.address, 30053))
            server.answer()
            assert sock.recvfrom(100)[1] == (host.address, 30053)
        with (
            stream.app.listen(("", 8080)),
            client.app.connect((host.address, 30053)) as sock,
        ):
            assert sock.getpeername() == (host.address, 30053)
        with pytest.raises(ConnectionRefusedError):
            client.app.connect((host.address, 30054))
        with pytest.raises(ConnectionRefusedError):
            client.app.connect((plain.address, 30053))
        with pytest.raises(ConnectionRefusedError):
            client.app.connect((LOOPBACK[family], 30053))
        own = Server(client, 30053)
        client.app.spread((LOOPBACK[family], 30053), 1)
        assert len(own.received()) == 1
        own.sock.close()
        assert server.more() == []
    finally:
        node.kernel.remove_service(ANY[family], 30053)
        for pod in (host, plain):
            node.kernel.remove_peer(pod.address)


def test_what_nobody_knows_passes(client, elsewhere):
    """No service, no peer: as without a mesh."""
    with client.app.datagrams() as sock:
        client.app.send(sock, "question", (elsewhere.pod.address, PORT))
        elsewhere.answer()
        assert sock.recvfrom(100)[1] == (elsewhere.pod.address, PORT)


def test_no_room_for_what_a_socket_used(client, make_server, service, vip):
    """Thousands of sockets that ask several services: who asks one service only depends on no room of theirs."""
    server = make_server()
    other = Server(server.pod, 6000)
    server.pod.node.kernel.set_policy(server.pod.cookie, {(client.identity, 0): True}, 2)
    service(server)
    service(other, port=54)
    with client.app.datagrams() as sock:
        client.app.send(sock, "question", (vip, PORT))
        [(_, peer)] = server.received()
        client.app.crowd([(vip, PORT), (vip, 54)] * 2, 9000)
        server.more()
        server.sock.answer(b"answer", peer)
        assert sock.recvfrom(100) == (b"answer", (vip, PORT))
    other.sock.close()


def test_errors_of_the_network_come_through(client, make_pod, service, node, vip):
    """An endpoint where nobody listens: the pod's refusal reaches the connected socket."""
    gone = make_pod()
    node.kernel.set_service(vip, PORT, [Backend(gone.address, 9)], protocol=UDP)
    try:
        with client.app.datagrams((vip, PORT)) as sock:
            client.app.send(sock, "question")
            with pytest.raises(ConnectionRefusedError) as caught:
                sock.recv(100)
            assert caught.value.errno == errno.ECONNREFUSED
    finally:
        node.kernel.remove_service(vip, PORT, UDP)
