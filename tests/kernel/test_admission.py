"""Who gets in: judged in the destination's namespace by who was seen connecting, never by what an address says."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time

import pytest

from agent.kernel import Backend, Direction, FlowKey, Kernel, Network, Peer, Pod, Reason, Via, namespace
from bpf import wire
from bpf.wire import IDENTITY_PLAIN
from tests.kernel.mesh import MPTCP, Node, run

pytestmark = pytest.mark.privileged
FAMILIES = ("ipv4", "ipv6")

PORT = 8080


@pytest.fixture
def far(family):
    """The address of a client on another node."""
    return "fd88::3:4" if family == "ipv6" else "10.88.3.4"


@pytest.fixture
def server(make_pod):
    pod = make_pod()
    pod.enrol({})
    pod.listener = pod.app.listen(("", PORT))
    yield pod
    pod.listener.close()


@pytest.fixture
def host(node):
    worker = node.worker("host")
    yield worker
    worker.close()


def told(node, pod):
    return [event.reason for event in node.kernel.read_events() if event.destination == pod.identity]


def test_permissive_admits_plain(node, server, host):
    node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0): True}, 2)
    with host.connect((server.address, PORT)) as sock:
        accepted, peer = server.listener.accept()
        with accepted:
            assert peer == sock.getsockname()
            [connection] = [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]
            assert (connection.source, connection.via, connection.generation) == (0, Via.PLAIN, 2)
    key = FlowKey(IDENTITY_PLAIN, server.identity, PORT, Direction.INBOUND)
    assert node.kernel.flows()[key].opened == 1


def test_strict_refuses_plain_on_every_port_but_the_exception(node, server, host):
    node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0): False, (IDENTITY_PLAIN, 9000): True}, 2)
    with server.app.listen(("", 9000)):
        for port in (PORT, 1, 65535):
            with pytest.raises(ConnectionRefusedError):
                host.connect((server.address, port))
        host.connect((server.address, 9000)).close()
    assert told(node, server) == [Reason.POLICY] * 3
    key = FlowKey(IDENTITY_PLAIN, server.identity, PORT, Direction.INBOUND)
    assert node.kernel.flows()[key._replace(verdict=Reason.POLICY)].refused == 1


def test_no_policy_refuses(node, make_pod, host):
    client, server = make_pod().enrol({}), make_pod()
    node.kernel.add_pod(Pod(server.cookie, server.addresses, server.identity), server.netns)
    with server.app.listen(("", PORT)):
        with pytest.raises(ConnectionRefusedError):
            host.connect((server.address, PORT))
        with pytest.raises(PermissionError):
            client.app.connect((server.address, PORT))
    assert told(node, server) == [Reason.NO_POLICY] * 2


def test_empty_policy_refuses(node, make_pod, server, host):
    client = make_pod().enrol({})
    with pytest.raises(ConnectionRefusedError):
        host.connect((server.address, PORT))
    with pytest.raises(PermissionError):
        client.app.connect((server.address, PORT))


def test_unknown_identity_is_refused(node, make_pod, server):
    client, stranger = make_pod().enrol({}), make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(client.identity, 0): True}, 2)
    client.app.connect((server.address, PORT)).close()
    with pytest.raises(PermissionError):
        stranger.app.connect((server.address, PORT))


def test_exact_port_goes_before_any_port(node, make_pod, server):
    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(client.identity, 0): False, (client.identity, PORT): True}, 2)
    client.app.connect((server.address, PORT)).close()
    with server.app.listen(("", 8081)), pytest.raises(PermissionError):
        client.app.connect((server.address, 8081))


def test_own_address_needs_no_policy(node, server):
    with server.app.connect((server.address, PORT)):
        accepted, peer = server.listener.accept()
        with accepted:
            assert peer[0] == server.address
            [connection] = [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]
            assert (connection.source, connection.via) == (server.identity, Via.SELF)


def test_own_address_through_a_service(node, server):
    vip = "fd96::8:1" if ":" in server.address else "10.96.8.1"
    node.kernel.set_service(vip, 80, [Backend(server.address, PORT)])
    with server.app.connect((vip, 80)) as sock:
        assert sock.getpeername() == (vip, 80)
        server.listener.accept()[0].close()
    node.kernel.remove_service(vip, 80)


def test_probes_pass_by_their_cgroup_where_probes_go(node, server):
    node.kernel.set_policy(server.cookie, {(wire.IDENTITY_PROBE, PORT): True}, 2)
    prober = node.worker("prober")
    with server.app.listen((server.address, 8081)):
        # No probe of this pod goes there: plain text as any other, refused until that is allowed.
        with pytest.raises(ConnectionRefusedError):
            prober.connect((server.address, 8081))
        node.kernel.set_policy(
            server.cookie, {(wire.IDENTITY_PROBE, PORT): True, (IDENTITY_PLAIN, 8081): True}, 3
        )
        prober.connect((server.address, 8081)).close()
    with prober.connect((server.address, PORT)):
        accepted, _ = server.listener.accept()
        with accepted:
            [connection] = [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]
            assert (connection.source, connection.via) == (wire.IDENTITY_PROBE, Via.PROBE)
    prober.close()


def test_proxies_carry_the_pods_identity(node, make_pod, server):
    """l7proxy's upstream leg, on a socket that the agent made in the client's namespace."""
    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(client.identity, PORT): True}, 2)
    for role in ("l7proxy", "nodeproxy"):
        worker = client.worker(role)
        worker.drop_capabilities()
        [fd] = node.kernel.create_outbound(client.netns, ipv6=":" in client.address)
        with worker.dial_with(fd, (server.address, PORT)) as sock:
            accepted, peer = server.listener.accept()
            with accepted:
                assert peer == sock.getsockname()
                assert peer[0] == client.address
                [connection] = [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]
                assert (connection.source, connection.via) == (client.identity, Via.DIRECT)
        wait_until(lambda: not [c for c in node.kernel.connections() if c.netns_cookie == server.cookie])
    # At the destination only; the outbound side of a request is the proxy's to count.
    outbound = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
    flows = node.kernel.flows()
    assert outbound not in flows
    assert flows[outbound._replace(direction=Direction.INBOUND)].opened == 2
    node.kernel.set_policy(server.cookie, {}, 3)
    [fd] = node.kernel.create_outbound(client.netns, ipv6=":" in client.address)
    with pytest.raises(PermissionError):
        client.worker("l7proxy").dial_with(fd, (server.address, PORT))


def test_l7proxy_is_never_kept_from_the_pod_that_it_dials_for(node, server):
    """A pod that is an endpoint of the service that it asks: as where it dials itself."""
    nothing = Network({}, {0: frozenset()})
    for direction in (Direction.INBOUND, Direction.OUTBOUND):
        node.kernel.set_network(server.cookie, direction, nothing)
    [fd] = node.kernel.create_outbound(server.netns, ipv6=":" in server.address)
    with server.worker("l7proxy").dial_with(fd, (server.address, PORT)):
        with server.listener.accept()[0]:
            [connection] = [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]
            assert (connection.source, connection.via) == (server.identity, Via.SELF)


def wait_until(condition, timeout=3.0):
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("rp_filter", [0, 1])
def test_delivery_with_the_clients_address(node, far, server, rp_filter):
    """The node proxy, without capabilities, bound to an address of another node; data both ways, and a clean end."""
    for name in ("all", "eth0"):
        run(server.netns, "sh", "-c", f"echo {rp_filter} >/proc/sys/net/ipv4/conf/{name}/rp_filter")
    worker = server.worker("nodeproxy")
    worker.drop_capabilities()
    for number in range(3):
        [fd] = node.kernel.create_delivery(server.netns, ipv6=":" in server.address)
        with worker.dial_with(fd, (server.address, PORT), bind=(far, 41000 + number)) as sock:
            accepted, peer = server.listener.accept()
            with accepted:
                assert peer == (far, 41000 + number)
                [connection] = [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]
                assert (connection.source, connection.via) == (wire.IDENTITY_TUNNEL, Via.TUNNEL)
                accepted.sendall(b"a" * 100_000)
                left = 100_000
                while left:
                    left -= len(sock.recv(65536))
                sock.shutdown(socket.SHUT_WR)
                assert accepted.recv(10) == b""
    # Counted by the node proxy.
    assert not [k for k in node.kernel.flows() if server.identity in (k.source, k.destination)]


def test_delivery_to_a_closed_port_is_refused_at_once(node, far, server):
    worker = server.worker("nodeproxy")
    [fd] = node.kernel.create_delivery(server.netns, ipv6=":" in server.address)
    with pytest.raises(ConnectionRefusedError):
        worker.dial_with(fd, (server.address, 9999), bind=(far, 0))


def test_only_the_node_proxy_delivers(node, far, server):
    """The same socket in other hands: plain traffic from somewhere, for the policy to judge."""
    for role in ("app", "l7proxy", "host"):
        worker = server.worker(role)
        [fd] = node.kernel.create_delivery(server.netns, ipv6=":" in server.address)
        with pytest.raises((ConnectionRefusedError, PermissionError)):
            worker.dial_with(fd, (server.address, PORT), bind=(far, 0))


def test_address_of_another_pod_gives_nothing(node, make_pod, server, host):
    """A pod (or anybody) that takes an enrolled pod's address and dials from it."""
    victim, attacker = make_pod().enrol({}), make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(victim.identity, 0): True, (IDENTITY_PLAIN, 0): True}, 2)
    run(attacker.netns, "ip", "addr", "add", victim.address, "dev", "lo")
    run(attacker.netns, "ip", "route", "add", server.address, "dev", "eth0", "src", attacker.address)
    # By connect(): judged as who it is ...
    with pytest.raises(PermissionError):
        attacker.app.connect((server.address, PORT), bind=(victim.address, 0))
    # ... and if that is allowed, it still is not who its address says: nobody.
    node.kernel.set_policy(
        server.cookie,
        {(victim.identity, 0): True, (IDENTITY_PLAIN, 0): True, (attacker.identity, 0): True},
        3,
    )
    before = node.kernel.refusals_by_reason().get(Reason.SPOOFED, 0)
    with pytest.raises((TimeoutError, ConnectionRefusedError)):
        attacker.app.connect((server.address, PORT), bind=(victim.address, 0), timeout=0.5)
    # Dropped at its own veth: already the question which neighbour the server is.
    assert node.kernel.refusals_by_reason()[Reason.SPOOFED] > before
    assert not [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]


def test_plain_syn_from_the_address_of_an_enrolled_workload(node, server, host):
    """It should have come by HBONE: refused also under PERMISSIVE."""
    node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0): True}, 2)
    host.connect((server.address, PORT)).close()
    node.kernel.set_peer(node.gateway, Peer(local=False, enrolled=True, identity=99))
    with pytest.raises(ConnectionRefusedError):
        host.connect((server.address, PORT))
    node.kernel.remove_peer(node.gateway)
    assert told(node, server) == [Reason.SPOOFED]


def test_record_of_another_tuple_is_no_use(node, make_pod, server):
    """A raw SYN with the victim's address while the victim itself is connecting: other port, other tuple."""
    victim = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(victim.identity, 0): True}, 2)
    attacker = make_pod().enrol({})
    raw = namespace.inside(attacker.netns, lambda: raw_socket(attacker.address))
    node.kernel.read_events()
    ports = iter(range(50123, 51000))

    def send():
        raw.sendto(syn(victim.address, server.address, next(ports), PORT), (server.address, 0))
        return Reason.SPOOFED in told(node, server)

    with raw:
        wait_until(send)
    assert not [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]


def syn(source, destination, source_port, port):
    def checksum(data):
        total = sum(struct.unpack(f"!{len(data) // 2}H", data))
        total = (total >> 16) + (total & 0xFFFF)
        return ~(total + (total >> 16)) & 0xFFFF

    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    addresses = socket.inet_pton(family, source) + socket.inet_pton(family, destination)
    tcp = struct.pack("!HHIIBBHHH", source_port, port, 1000, 0, 5 << 4, 2, 8192, 0, 0)
    pseudo = addresses + struct.pack("!BBH", 0, 6, len(tcp))  # for IPv6 the same sum
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    if family == socket.AF_INET6:
        return struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + addresses + tcp
    return struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + addresses + tcp


def raw_socket(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)


def test_refusal_is_told_once_for_repeated_syns(node, server):
    source = "fd77::250:9" if ":" in server.address else "10.77.250.9"
    raw = namespace.inside(node.netns, lambda: raw_socket(server.address))
    found = []
    with raw:
        # The last is another attempt: when that is told, the others have been.
        for port in (50999,) * 5 + (51000,):
            raw.sendto(syn(source, server.address, port, PORT), (server.address, 0))

    def both_told() -> bool:
        found.extend(told(node, server))
        return len(found) >= 2

    wait_until(both_told)
    assert found == [Reason.POLICY] * 2
    key = FlowKey(IDENTITY_PLAIN, server.identity, PORT, Direction.INBOUND)
    assert node.kernel.flows()[key._replace(verdict=Reason.POLICY)].refused == 2


@pytest.mark.parametrize("end", ["client", "server"])
def test_stragglers_of_a_connection_are_no_refusals(node, server, make_pod, end):
    """One end is gone with a reset while the other's data is under way: dropped, and nobody is accused."""
    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(client.identity, 0): True}, 2)
    node.kernel.read_events()
    pods = {"client": client, "server": server}
    dialled = client.app.connect((server.address, PORT))
    accepted, _ = server.listener.accept()
    gone, stays = (dialled, accepted) if end == "client" else (accepted, dialled)
    # The reset does not arrive.
    run(
        pods[end].netns, "nft", "add table inet t; add chain inet t c { type filter hook output priority 0; }"
    )
    run(pods[end].netns, "nft", "add rule inet t c tcp flags rst drop")
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()
    run(pods[end].netns, "nft", "flush ruleset")
    stays.sendall(b"anybody there?")
    with pytest.raises(ConnectionResetError):
        stays.recv(1)
    stays.close()
    assert [
        e for e in node.kernel.read_events() if {client.address, server.address} & {e.client[0], e.server[0]}
    ] == []
    plain = FlowKey(IDENTITY_PLAIN, pods[end].identity, PORT, Direction.INBOUND)
    assert not [k for k in node.kernel.flows() if k[:2] == plain[:2] and k.direction is plain.direction]


def test_client_that_dials_again_and_again_is_told_of_once(node, server, make_pod):
    client = make_pod().enrol({})
    for _ in range(50):
        with pytest.raises(PermissionError):
            client.app.connect((server.address, PORT))
    assert told(node, server) == [Reason.POLICY]
    key = FlowKey(client.identity, server.identity, PORT, Direction.INBOUND)
    assert node.kernel.flows()[key._replace(verdict=Reason.POLICY)].refused == 50


def test_address_that_is_not_the_pods(node, server, host):
    other = "fd77:240::1" if ":" in server.address else "10.77.240.1"
    run(server.netns, "ip", "addr", "add", other, "dev", "lo")
    node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0): True}, 2)
    node.kernel.read_events()
    run(node.netns, "ip", "route", "replace", other, "via", server.address)
    # The refusal would come from that address too, which the pod's veth lets out of nobody.
    with pytest.raises(TimeoutError):
        host.connect((other, PORT), timeout=0.5)
    run(node.netns, "ip", "route", "del", other)
    assert Reason.UNKNOWN_DESTINATION in [e.reason for e in node.kernel.read_events()]


def test_address_given_to_a_new_pod(node, make_pod, server):
    """Under traffic: the same address, another service account; never the old one's identity or verdict."""
    first = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(first.identity, 0): True}, 2)
    stop = threading.Event()

    def accept():
        server.listener.settimeout(0.05)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                server.listener.accept()[0].close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        for _ in range(20):
            first.app.connect((server.address, PORT)).close()
        address = first.address
        node.kernel.remove_pod(first.cookie)
        run(first.netns, "ip", "link", "del", "eth0")
        second = make_pod(address=first.address4)
        second.enrol({})
        run(second.netns, "ip", "neigh", "flush", "all")
        assert node.kernel.peers()[address].identity == second.identity
        for _ in range(20):
            with pytest.raises(PermissionError):
                second.app.connect((server.address, PORT))
        node.kernel.set_policy(server.cookie, {(second.identity, 0): True}, 3)
        with second.app.connect((server.address, PORT)):
            wait_until(
                lambda: (
                    FlowKey(second.identity, server.identity, PORT, Direction.INBOUND) in node.kernel.flows()
                )
            )
    finally:
        stop.set()
        thread.join()
    flows = node.kernel.flows()
    assert flows[FlowKey(first.identity, server.identity, PORT, Direction.INBOUND)].opened == 20
    assert flows[FlowKey(second.identity, server.identity, PORT, Direction.INBOUND)].opened == 1


def test_identity_of_a_pod_changes(node, make_pod, server):
    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(client.identity, 0): True}, 2)
    client.app.connect((server.address, PORT)).close()
    node.kernel.add_pod(Pod(client.cookie, client.addresses, client.identity + 5000), client.netns)
    with pytest.raises(PermissionError):
        client.app.connect((server.address, PORT))


def test_mptcp_socket_from_before_enrolment(node, make_pod, server):
    """Kernels differ in whether its subflow is seen by connect4. Seen: as any other. Not seen: refused, never plain."""
    client = make_pod()
    family = socket.AF_INET6 if ":" in client.address else socket.AF_INET
    sockets = [
        namespace.inside(client.netns, lambda: socket.socket(family, socket.SOCK_STREAM, MPTCP)).detach()
        for _ in range(2)
    ]
    client.enrol({})
    node.kernel.set_policy(server.cookie, {(client.identity, 0): True, (IDENTITY_PLAIN, 0): True}, 2)
    try:
        here = client.app.dial_with(sockets[0], (server.address, PORT), timeout=1)
    except OSError:
        pass
    else:
        [connection] = [c for c in node.kernel.connections() if c.destination == server.identity]
        assert (connection.source, connection.via) == (client.identity, Via.DIRECT)
        here.close()
    # An address of another node, which the gateway has here, so that what leaves uncaptured arrives somewhere.
    host = node.worker("host")
    node.kernel.set_peer(node.gateway, Peer(local=False, enrolled=True, identity=98))
    listener = socket.socket(
        fileno=node.kernel.create_listener(client.netns, client.addresses, wire.PORT_OUTBOUND)
    )
    with listener, host.listen((node.gateway, 9004)) as outside:
        outside.settimeout(0.2)
        try:
            client.app.dial_with(sockets[1], (node.gateway, 9004), timeout=1).close()
        except OSError:
            pass
        with pytest.raises(TimeoutError):
            outside.accept()
    node.kernel.remove_peer(node.gateway)
    host.close()


def test_full_table_of_connectors_refuses(tmp_path):
    """Nobody can be written down: no connection between pods is admitted, and nothing passes as plain."""
    node = Node(tmp_path, sizes=("connecting=1",))
    from tests.kernel.mesh import TestPod

    try:
        client, server = TestPod(node, "10.77.0.10", 20), TestPod(node, "10.77.0.11", 21)
        client.enrol({})
        server.enrol({(20, 0): True, (IDENTITY_PLAIN, 0): True})
        connecting = node.kernel._maps["connecting"]
        connecting.update(wire.Tuple("1.1.1.1", "1.1.1.2", 1, 1).pack(), wire.Who(1, 1, 1, 1).pack())
        with server.app.listen(("", PORT)):
            with pytest.raises(ConnectionRefusedError):
                client.app.connect((server.address, PORT))
            assert node.kernel.pressure()["connecting"][:3] == (1, 1, 1)
            # The same for what would be captured; nothing of the attempt stays.
            node.kernel.set_peer("10.99.0.1", Peer(local=False, enrolled=True, identity=77))
            with pytest.raises(ConnectionRefusedError):
                client.app.connect(("10.99.0.1", PORT))
            assert node.kernel.pressure()["captured"].used == 0
            connecting.delete(wire.Tuple("1.1.1.1", "1.1.1.2", 1, 1).pack())
            client.app.connect((server.address, PORT)).close()
        client.close()
        server.close()
    finally:
        node.close()


def test_syn_cookies(node, make_pod, server):
    """With cookies the kernel forgets the SYN, and asks again at the first ACK."""
    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(client.identity, 0): True}, 2)
    run(server.netns, "sh", "-c", "echo 2 >/proc/sys/net/ipv4/tcp_syncookies")
    for _ in range(5):
        with client.app.connect((server.address, PORT)) as sock:
            accepted, _ = server.listener.accept()
            with accepted:
                sock.sendall(b"x")
                assert accepted.recv(1) == b"x"
                [connection] = [c for c in node.kernel.connections() if c.source == client.identity]
                assert connection.via is Via.DIRECT
        wait_until(lambda: not [c for c in node.kernel.connections() if c.source == client.identity])


def test_verdicts_follow_random_tables(node, make_pod, server):
    """A few dozen random tables against the documented rule: exact port, else any port, else refused."""
    client = make_pod().enrol({})
    dice = random.Random(11)
    ports = (8080, 8081, 8082)
    listeners = [server.app.listen(("", port)) for port in ports[1:]]
    for generation in range(2, 40):
        table = {(client.identity, port): dice.random() < 0.5 for port in (0, *ports) if dice.random() < 0.6}
        node.kernel.set_policy(server.cookie, table, generation)
        assert node.kernel.policy(server.cookie) == (generation, table)
        for port in ports:
            allowed = table.get((client.identity, port), table.get((client.identity, 0), False))
            if allowed:
                client.app.connect((server.address, port)).close()
            else:
                with pytest.raises(PermissionError):
                    client.app.connect((server.address, port))
    for listener in listeners:
        listener.close()


def test_pod_that_comes_and_goes_as_it_runs_is_never_without_verdicts(node, make_pod):
    """Who dials it from the same node meanwhile is not refused: neither before its verdicts are there nor after."""
    client, server = make_pod().enrol({}), make_pod()
    outcomes, enough = [], threading.Event()
    listener = server.app.listen(("", PORT))

    def dial():
        while not enough.is_set():
            try:
                client.app.connect((server.address, PORT)).close()
                outcomes.append("ok")
            except OSError as error:
                outcomes.append(str(error))
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()

    listener.setblocking(False)
    dialler = threading.Thread(target=dial)
    dialler.start()
    try:
        pod = Pod(server.cookie, server.addresses, server.identity, passing=True, open=True)
        for generation in range(1, 30):
            node.kernel.add_pod(pod, server.netns, (generation, {(client.identity, 0): True}, {}))
            assert node.kernel.policy(server.cookie) == (generation, {(client.identity, 0): True})
            node.kernel.remove_pod(server.cookie)
    finally:
        enough.set()
        dialler.join()
        listener.close()
    assert len(outcomes) > 30
    assert set(outcomes) == {"ok"}
    with pytest.raises(ValueError, match="identity 1 is no workload's"):
        node.kernel.add_pod(Pod(server.cookie, server.addresses, 1, open=True), server.netns, (1, {}, {}))
    assert node.kernel.policy(server.cookie) is None


def test_kernel_opens_only_what_is_whole(tmp_path):
    with pytest.raises(OSError, match=r"pins .*: "):
        Kernel(tmp_path)
