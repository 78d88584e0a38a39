"""Who is refused: by our server and by our client. Each with a real certificate that is wrong in one way."""

import socket
import time

import msgspec
import pytest
from OpenSSL import SSL

from controlplane.api import Action, Authorization, Rule, SignRequest, Source
from nodeproxy import h2core
from tests.nodeproxy.fakes.apps import Server, echo
from tests.nodeproxy.fakes.authority import Authority
from tests.nodeproxy.fakes.peer import HboneServer, Peer
from tests.nodeproxy.fakes.world import World, identity, wait_until


@pytest.fixture
def server(world: World):
    world.ready()
    made = Server(world.server_address, echo)
    yield made
    made.close()


def refused_by_handshake(world: World, svid) -> None:
    """In TLS 1.3 a client learns of its own refusal with the first read after the handshake."""
    peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)

    def greet() -> None:
        peer.handshake()
        peer.until(h2core.READY)

    with pytest.raises((SSL.Error, ConnectionResetError)):
        greet()
    peer.close()


# --- by our server ------------------------------------------------------------------------------------------------------


def test_a_good_client_is_accepted(world: World, server: Server):
    svid = world.authority.svid(identity("client"))
    peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)
    peer.handshake()
    assert peer.status(f"{world.server_address}:{server.port}") == 200
    assert peer.tls.get_protocol_version_name() == "TLSv1.3"
    assert peer.tls.get_group_name() == "X25519MLKEM768"
    peer.close()


@pytest.mark.parametrize("client_has_it", [True, False])
def test_a_stream_for_the_pod_s_address_of_the_other_family(
    world: World, server: Server, client_has_it: bool
):
    """Delivered from the client's own address of that family; without one there is nobody whom the application could see."""
    there = Server("::1", echo)
    pod = world.b.agent.pods["uid-server", 2]
    world.b.agent.describe(msgspec.structs.replace(pod, addresses=(world.server_address, "::1")))
    if client_has_it:
        uid = world.client.uid
        world.workloads[uid] = msgspec.structs.replace(world.client, addresses=(world.client_address, "::1"))
        world.publish()
    proxied = world.b.client.pods["uid-server", 2]
    wait_until(lambda: "::1" in proxied.addresses, "the pod has two addresses")
    svid = world.authority.svid(identity("client"))
    peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)
    peer.handshake()
    assert peer.status(f"[::1]:{there.port}") == (200 if client_has_it else 400)
    wait_until(lambda: len(there.peers) == client_has_it, "the server has accepted")
    assert [address for address, *_ in there.peers] == (["::1"] if client_has_it else [])
    peer.close()
    there.close()


@pytest.mark.parametrize("block", ["::1/128", "own", "192.0.2.0/24"])
def test_both_of_a_clients_addresses_are_judged(world: World, server: Server, block: str):
    """Of a stream for the other family: where its connection comes from, and what the application is shown."""
    there = Server("::1", echo)
    pod = world.b.agent.pods["uid-server", 2]
    world.b.agent.describe(msgspec.structs.replace(pod, addresses=(world.server_address, "::1")))
    blocks = (f"{world.client_address}/32" if block == "own" else block,)
    world.policies["d"] = Authorization("default", "d", Action.DENY, (Rule((Source(ip_blocks=blocks),)),))
    world.workloads[world.client.uid] = msgspec.structs.replace(
        world.client, addresses=(world.client_address, "::1")
    )
    world.workloads[world.server.uid] = msgspec.structs.replace(world.server, policies=("default/d",))
    world.publish()
    proxied = world.b.client.pods["uid-server", 2]
    wait_until(lambda: "::1" in proxied.addresses, "the pod has two addresses")
    svid = world.authority.svid(identity("client"))
    peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)
    peer.handshake()
    assert peer.status(f"[::1]:{there.port}") == (200 if block == "192.0.2.0/24" else 401)
    peer.close()
    there.close()


def test_server_refuses_a_client_without_certificate(world: World, server: Server):
    refused_by_handshake(world, None)


def test_server_refuses_an_expired_certificate(world: World, server: Server):
    refused_by_handshake(world, world.authority.svid(identity("client"), begin=-100, end=-1))


def test_server_refuses_a_certificate_that_is_not_valid_yet(world: World, server: Server):
    refused_by_handshake(world, world.authority.svid(identity("client"), begin=100, end=200))


def test_server_refuses_another_trust_domain(world: World, server: Server):
    refused_by_handshake(world, world.authority.svid(identity("client", "other.example")))


def test_server_refuses_another_root(world: World, server: Server):
    other = Authority()
    refused_by_handshake(world, other.svid(identity("client")))


def test_server_refuses_tls_1_2(world: World, server: Server):
    peer = Peer.dial(
        world.server_address,
        world.client_address,
        world.authority.svid(identity("client")),
        world.authority.trust,
    )
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    peer.tls = SSL.Connection(context, None)
    peer.tls.set_connect_state()
    with pytest.raises((SSL.Error, ConnectionResetError)):
        peer.handshake()
    peer.close()


def test_server_refuses_an_svid_that_is_not_of_the_source_address(world: World, server: Server):
    """Another workload's good certificate from the client's address: 401, after the bounded wait."""
    world.pod(world.a, "thief", world.client_address.rsplit(".", 1)[0] + ".9", 9, enroll=False)
    world.publish()
    svid = world.authority.svid(identity("thief"))
    peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)
    peer.handshake()
    began = time.monotonic()
    assert peer.status(f"{world.server_address}:{server.port}") == 401
    assert 1.5 < time.monotonic() - began < 4
    assert server.peers == []
    peer.close()


def test_an_address_that_becomes_known_in_time_is_let_in(world: World, server: Server):
    address = world.client_address.rsplit(".", 1)[0] + ".7"
    svid = world.authority.svid(identity("late"))
    peer = Peer.dial(world.server_address, address, svid, world.authority.trust)
    peer.handshake()
    stream = peer.connect(f"{world.server_address}:{server.port}")
    peer.flush()
    time.sleep(0.3)
    world.pod(world.a, "late", address, 7, enroll=False)
    world.publish()
    assert peer.until(h2core.RESPONSE) == (h2core.RESPONSE, stream, 200)
    peer.close()


def test_other_authorities_and_methods_are_bad_requests(world: World, server: Server):
    svid = world.authority.svid(identity("client"))
    peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)
    peer.handshake()
    for authority in (
        f"{world.client_address}:{server.port}",
        f"{world.server_address}:15008",
        f"{world.server_address}:15001",
        "web.default.svc.cluster.local:80",
        world.server_address,
        f"{world.server_address}:0",
        f"{world.server_address}:99999",
    ):
        assert peer.status(authority) == 400, authority
    assert peer.status(f"{world.server_address}:1") == 503
    assert peer.status(f"{world.server_address}:{server.port}") == 200
    peer.close()


def test_a_pooled_connection_is_verified_with_each_stream(world: World, server: Server):
    """A certificate that expires on an open connection opens no more streams."""
    svid = world.authority.svid(identity("client"), end=2)
    peer = Peer.dial(world.server_address, world.client_address, svid, world.authority.trust)
    peer.handshake()
    assert peer.status(f"{world.server_address}:{server.port}") == 200
    time.sleep(max(0.0, svid.not_after - time.time()) + 0.1)
    assert peer.status(f"{world.server_address}:{server.port}") == 401
    peer.close()


def test_a_root_that_is_taken_back_closes_its_connections(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        other = Authority()
        world.roots = other.pem
        world.publish(world.b)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_roots_are_rotated_without_a_failed_connection(world: World, server: Server):
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        new = Authority()
        world.roots = world.authority.pem + new.pem
        world.publish()
        for _ in range(3):
            with world.dial(server.port) as more:
                more.sendall(b"y")
                assert more.recv(1) == b"y"
        sock.sendall(b"z")
        assert sock.recv(1) == b"z"


# --- by our client ------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_end(world: World):
    """The server's node without its proxy: a listener of the test's own takes its address."""
    world.ready()
    world.b.stop()
    world.nodes.remove(world.b)
    made: list[HboneServer] = []

    def start(svid, trust=None) -> HboneServer:
        made.append(HboneServer(world.server_address, svid, trust or world.authority.trust))
        return made[-1]

    yield start
    for one in made:
        one.close()


def refused(world: World, server: HboneServer, flag: str) -> None:
    def say_a_secret() -> None:
        with world.dial(80) as sock:
            sock.sendall(b"secret")
            sock.recv(1)

    # The reset may come before connect() has told of its success.
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        say_a_secret()
    assert server.requests == 0
    assert {labels.response_flags for labels in world.a.proxy.accounting.snapshot()} == {flag}


def test_the_other_end_works_with_a_good_certificate(world: World, other_end):
    server = other_end(world.authority.svid(identity("server")))
    with world.dial(80):
        wait_until(lambda: server.requests == 1, "the request")


def test_client_refuses_an_expired_certificate(world: World, other_end):
    refused(world, other_end(world.authority.svid(identity("server"), begin=-100, end=-1)), "IDENTITY")


def test_client_refuses_another_trust_domain(world: World, other_end):
    refused(world, other_end(world.authority.svid(identity("server", "other.example"))), "IDENTITY")


def test_client_refuses_another_root(world: World, other_end):
    refused(world, other_end(Authority().svid(identity("server"))), "IDENTITY")


def test_client_refuses_another_workloads_svid(world: World, other_end):
    refused(world, other_end(world.authority.svid(identity("thief"))), "IDENTITY")


def test_client_refuses_a_destination_that_is_not_known(world: World, server: Server):
    world.workloads.pop("uid-server")
    world.publish(world.a)
    with world.dial(server.port) as sock:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert server.peers == []


def test_an_address_that_moved_to_another_identity_gets_a_new_connection(world: World, server: Server):
    """The pooled connection proves who was there: it is not used for who is there now."""
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    old = world.workloads["uid-server"]
    world.workloads["uid-server"] = msgspec.structs.replace(old, identity=identity("other"))
    world.publish(world.a)
    with world.dial(server.port) as sock:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert len(server.peers) == 1


# --- our own certificate -------------------------------------------------------------------------------------------------


def test_certificates_are_renewed_and_connections_replaced(world: World, server: Server):
    world.ready()

    def short(request: SignRequest):
        return world.authority.answer(request, world.workloads[request.uid].identity, end=3)

    world.a.sign = short
    world.a.agent.withdraw("uid-client", 1)
    wait_until(lambda: not world.a.client.pods, "withdrawn")
    world.enroll(world.a, world.client, 11)
    wait_until(lambda: len(world.a.requests) == 2, "a certificate of 3 seconds")
    world.ready()

    def certificate():
        return world.a.call(lambda: world.a.proxy.certificates.get(world.client.uid))

    first = certificate()
    with world.dial(server.port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        wait_until(lambda: certificate() not in (None, first), "renewed", 3)
        with world.dial(server.port) as new:
            new.sendall(b"y")
            assert new.recv(1) == b"y"
            assert len(world.a.proxy.pool.links()) == 2  # the old one has its stream still
        sock.sendall(b"z")
        assert sock.recv(1) == b"z"
    wait_until(lambda: len(world.a.proxy.pool.links()) == 1, "the old connection drains")


def test_a_certificate_of_another_identity_is_not_used(world: World, server: Server):
    world.a.sign = lambda request: world.authority.answer(request, identity("thief"))
    late = world.pod(world.a, "late", world.client_address.rsplit(".", 1)[0] + ".3", 3)
    world.publish()
    wait_until(lambda: [r.uid for r in world.a.requests].count(late.uid) >= 2, "asked again")
    assert world.a.call(lambda: world.a.proxy.certificates.get(late.uid)) is None


def test_nothing_goes_plain_without_a_certificate(world: World, server: Server):
    world.a.sign = lambda request: "PERMISSION_DENIED: no"
    late = world.pod(world.a, "late", world.client_address.rsplit(".", 1)[0] + ".3", 3)
    world.publish()
    wait_until(lambda: late.uid in [r.uid for r in world.a.requests], "asked")
    world.a.captured.destination = (world.server_address, server.port)
    with socket.create_connection((late.addresses[0], 15001), 15, (late.addresses[0], 0)) as sock:
        began = time.monotonic()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert 9 < time.monotonic() - began < 12
    assert server.peers == []
