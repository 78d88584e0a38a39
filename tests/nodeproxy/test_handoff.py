"""Streams handed over on ``nodeproxy.sock``: the header, the way, the status byte."""

import select
import socket
import struct
import threading
import time

import msgspec
import pytest

from agent.api import LINGER
from controlplane.api import Action, Authorization, NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule
from nodeproxy import api, loop
from nodeproxy.api import Handoff, Status, Tlv
from tests.nodeproxy.fakes.apps import Server, echo, read_all
from tests.nodeproxy.fakes.world import World, wait_until


@pytest.fixture
def server(world: World):
    made = Server(world.server_address, echo)
    yield made
    made.close()


def hand(world: World, header: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(15)
    sock.connect(str(world.a.run / "nodeproxy/nodeproxy.sock"))
    sock.sendall(header)
    return sock


def header(world: World, destination: tuple[str, int], uid: str = "uid-client", client: str = "") -> bytes:
    tlvs: dict[int, bytes] = {
        Tlv.SOURCE_UID: uid.encode(),
        Tlv.TRACEPARENT: b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01",
    }
    return api.encode(Handoff((client or world.client_address, 40000), destination, tlvs))


def status(sock: socket.socket) -> Status:
    return Status(sock.recv(1)[0])


def test_to_another_node_by_hbone(world: World, server: Server):
    with hand(world, header(world, (world.server_address, server.port)) + b"early") as sock:
        assert status(sock) is Status.CONNECTED
        assert sock.recv(10) == b"early"
        sock.sendall(b"x" * 1_000_000)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"x" * 1_000_000
    assert len(world.a.proxy.pool.links()) == 1
    assert server.peers == [(world.client_address, 40000)]


@pytest.mark.parametrize("far", [True, False])
def test_network_policy_holds_for_an_endpoint_that_a_proxy_chose(world: World, server: Server, far: bool):
    address = world.server_address if far else world.client_address.rsplit(".", 1)[0] + ".5"
    app = server if far else Server(address, echo)
    if not far:
        world.pod(world.a, "near", address, 5)
    own = world.workloads["uid-client"]
    for port, expected in ((app.port, Status.CONNECTED), (app.port + 1, Status.DENIED)):
        rule = NetworkRule((NetworkPeer(cidr=f"{address}/32"),), (NetworkPort("TCP", port),))
        world.network_policies = [NetworkPolicy("default", "n", None, (rule,))]
        world.workloads["uid-client"] = msgspec.structs.replace(own, network_policies=("default/n",))
        world.publish()
        with hand(world, header(world, (address, app.port))) as sock:
            assert status(sock) is expected
    if not far:
        app.close()


def hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


@pytest.mark.parametrize("far", [True, False])
def test_an_end_is_told_from_a_stream_that_broke_off(world: World, far: bool):
    """A unix socket knows no reset: an end is a shutdown, and what broke off is closed."""
    orderly = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"some")
        sock.recv(1)
        if orderly.is_set():
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    address = world.server_address
    if not far:
        address = world.client_address.rsplit(".", 1)[0] + ".5"
        world.pod(world.a, "near", address, 5)
        world.publish()
    app = Server(address, serve)
    for broken in (False, True):
        (orderly.clear if broken else orderly.set)()
        with hand(world, header(world, (address, app.port))) as sock:
            assert status(sock) is Status.CONNECTED
            assert sock.recv(4, socket.MSG_WAITALL) == b"some"
            sock.sendall(b"x")
            assert sock.recv(1) == b""
            assert hung_up(sock) is broken
    app.close()


@pytest.mark.parametrize("far", [True, False])
def test_who_gives_up_on_a_silent_application_leaves_nothing(
    world: World, far: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "ORPHAN", 0.5)
    ended: list[bool] = []

    def serve(sock: socket.socket) -> None:
        assert sock.recv(1) == b"x"
        assert sock.recv(1) == b""  # the end is told at once; this application says nothing to it
        poll = select.poll()
        poll.register(sock, 0)
        while not any(events & select.POLLERR for _, events in poll.poll(100)):
            pass
        ended.append(True)

    address = world.server_address
    if not far:
        address = world.client_address.rsplit(".", 1)[0] + ".5"
        world.pod(world.a, "near", address, 5)
        world.publish()
    app = Server(address, serve)
    with hand(world, header(world, (address, app.port))) as sock:
        assert status(sock) is Status.CONNECTED
        sock.sendall(b"x")
    proxy = world.a.proxy
    wait_until(lambda: proxy.tunnels.open or proxy.handoffs.pairs, "open")
    wait_until(lambda: not proxy.tunnels.open and not proxy.handoffs.pairs, "given up")
    wait_until(lambda: ended, "the application hears of it")
    app.close()


def test_a_header_that_comes_byte_by_byte(world: World, server: Server):
    data = header(world, (world.server_address, server.port))
    with hand(world, b"") as sock:
        for at in range(len(data)):
            sock.sendall(data[at : at + 1])
        assert status(sock) is Status.CONNECTED
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"


@pytest.mark.parametrize("enrolled", [True, False])
def test_to_this_node_and_out_of_the_mesh_directly(world: World, enrolled: bool):
    address = world.client_address.rsplit(".", 1)[0] + ".5"
    workload = world.pod(world.a if enrolled else world.b, "near", address, 5, enroll=enrolled)
    if not enrolled:
        world.workloads[workload.uid] = msgspec.structs.replace(workload, enrolled=False)
    world.publish()
    near = Server(address, echo)
    data = bytes(range(256)) * 20_000
    with hand(world, header(world, (address, near.port))) as sock:
        assert status(sock) is Status.CONNECTED
        received = 0
        sent = 0
        sock.setblocking(False)
        while received < len(data):
            try:
                sent += sock.send(data[sent : sent + 65536])
                if sent == len(data):
                    sock.shutdown(socket.SHUT_WR)
            except (BlockingIOError, BrokenPipeError):
                pass
            try:
                back = sock.recv(65536)
                assert back == data[received : received + len(back)]
                received += len(back)
            except BlockingIOError:
                time.sleep(0.001)
        sock.setblocking(True)
        assert sock.recv(1) == b""
    assert near.peers[0][0] == world.client_address
    assert world.a.proxy.pool.links() == []
    near.close()


def test_an_endpoint_that_has_just_left_is_reached_by_the_mesh(world: World, server: Server):
    """Until its own node, which judges plain text before it knows, has heard of it for certain."""
    gone = msgspec.structs.replace(world.server, enrolled=False)
    world.workloads[gone.uid] = gone
    world.publish()
    dial = header(world, (world.server_address, server.port))
    with hand(world, dial) as sock:
        assert status(sock) is Status.CONNECTED
        [link] = world.a.proxy.pool.links()
    time.sleep(LINGER)
    world.a.call(lambda: link.close("test"))
    with hand(world, dial) as sock:
        assert status(sock) is Status.CONNECTED
        assert world.a.proxy.pool.links() == []
    # The next time it leaves counts from then.
    world.workloads[gone.uid] = world.server
    world.publish()
    with hand(world, dial) as sock:
        assert status(sock) is Status.CONNECTED
        assert len(world.a.proxy.pool.links()) == 1


def test_nobody_listens(world: World, server: Server):
    server.close()
    with hand(world, header(world, (world.server_address, server.port))) as sock:
        assert status(sock) is Status.UNREACHABLE
        assert sock.recv(1) == b""
    address = world.client_address.rsplit(".", 1)[0] + ".6"
    with hand(world, header(world, (address, 1))) as sock:
        assert status(sock) is Status.UNREACHABLE


def test_denied(world: World, server: Server):
    world.policies["nothing"] = Authorization("default", "nothing", Action.ALLOW)
    old = world.workloads["uid-server"]
    world.workloads["uid-server"] = msgspec.structs.replace(old, policies=("default/nothing",))
    world.publish()
    with hand(world, header(world, (world.server_address, server.port))) as sock:
        assert status(sock) is Status.DENIED
        assert sock.recv(1) == b""
    assert server.peers == []


def test_no_certificate(world: World, server: Server):
    world.ready()
    world.a.sign = lambda request: "no"
    late = world.pod(world.a, "late", world.client_address.rsplit(".", 1)[0] + ".3", 3)
    world.publish()
    time.sleep(0.1)
    data = header(world, (world.server_address, server.port), late.uid, late.addresses[0])
    with hand(world, data) as sock:
        assert status(sock) is Status.IDENTITY


def test_a_client_that_is_not_on_this_node(world: World, server: Server):
    destination = (world.server_address, server.port)
    for uid, client in (
        ("uid-other", world.client_address),
        ("uid-client", world.server_address),
        ("", "10.9.9.9"),
    ):
        with hand(world, header(world, destination, uid, client)) as sock:
            assert status(sock) is Status.INVALID
    assert server.peers == []


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", api.SIGNATURE + b"\x20\x11\x00\x0c", b"\r\n\r\n\x00x"]
)
def test_no_header(world: World, data: bytes):
    with hand(world, data) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert status(sock) is Status.INVALID


def test_a_header_that_never_ends(world: World):
    with hand(world, b"\r\n") as sock:
        began = time.monotonic()
        assert status(sock) is Status.TIMEOUT
        assert 4 < time.monotonic() - began < 7


def test_an_unknown_mesh_sends_nothing_plain(world: World, server: Server):
    world.a.call(lambda: setattr(world.a.proxy.mesh, "synced", False))
    with hand(world, header(world, (world.server_address, server.port))) as sock:
        assert status(sock) is Status.IDENTITY
    assert server.peers == []


def test_direct_legs_have_back_pressure(world: World):
    address = world.client_address.rsplit(".", 1)[0] + ".5"
    world.pod(world.a, "near", address, 5)
    world.publish()
    listener = socket.create_server((address, 0))
    with hand(world, header(world, (address, listener.getsockname()[1]))) as sock:
        assert status(sock) is Status.CONNECTED
        far, _ = listener.accept()
        sock.setblocking(False)
        sent = 0
        quiet = time.monotonic() + 0.5
        while time.monotonic() < quiet:
            try:
                sent += sock.send(bytes(1 << 16))
                quiet = time.monotonic() + 0.5
            except BlockingIOError:
                time.sleep(0.005)
        assert sent < 20 << 20
        sock.shutdown(socket.SHUT_WR)
        assert len(read_all(far)) == sent
        far.sendall(b"and back")
        far.close()
        sock.setblocking(True)
        assert read_all(sock) == b"and back"
    listener.close()
