"""Where connect() of an enrolled pod goes: services, endpoints, capture, and what applications see of it."""

from __future__ import annotations

import errno
import os
import socket
import time
from ipaddress import ip_network

import pytest

from agent.kernel import (
    Backend,
    Direction,
    FlowKey,
    Frontend,
    MapFullError,
    Network,
    Peer,
    Pod,
    Reason,
    namespace,
)
from bpf.maps import CapturedMap
from bpf.wire import FEW_BACKENDS, PORT_HBONE, PORT_OUTBOUND, PORT_OUTBOUND_L7, Captured
from lab.processes import wait_until
from tests.kernel.mesh import MPTCP, Node, Sock, TestPod, run

pytestmark = pytest.mark.privileged

FAMILIES = ("ipv4", "ipv6")
VIPS = {"ipv4": "10.96.7.1", "ipv6": "fd96::7:1", "mapped": "10.96.7.1"}
#: On another node.
REMOTES = {"ipv4": "10.88.0.5", "ipv6": "fd88::5", "mapped": "10.88.0.5"}
VIP, REMOTE = VIPS["ipv4"], REMOTES["ipv4"]
all_families = pytest.mark.families("ipv4", "ipv6", "mapped")


@pytest.fixture
def client(make_pod):
    return make_pod().enrol({})


@pytest.fixture
def captured(node):
    with CapturedMap(node.kernel.captured_fd()) as table:
        yield table


@pytest.fixture
def vip(family):
    return VIPS[family]


@pytest.fixture
def service(node, vip):
    made = []

    def make(*backends, port=80, l7=False, address=vip):
        node.kernel.set_service(address, port, [Backend(*b) for b in backends], l7=l7)
        made.append((address, port))

    yield make
    for address, port in made:
        node.kernel.remove_service(address, port)


@pytest.fixture
def remote(node, family):
    address = REMOTES[family]
    node.kernel.set_peer(address, Peer(local=False, enrolled=True, identity=77))
    yield address
    node.kernel.remove_peer(address)


def listen(node, pod, port):
    sock = Sock(fileno=node.kernel.create_listener(pod.netns, pod.addresses, port))
    sock.settimeout(3)
    return sock


def reasons(node, client):
    return [event.reason for event in node.kernel.read_events() if event.netns_cookie == client.cookie]


@all_families
def test_service_with_endpoint_here(node, client, make_pod, service, vip, family):
    server = make_pod()
    server.enrol({(client.identity, 8080): True})
    service((server.address, 8080))
    with server.app.listen(("", 8080)) as listener, client.app.connect((vip, 80)) as sock:
        accepted, peer = listener.accept()
        accepted.close()
        assert sock.getpeername() == (vip, 80)
        assert sock.getsockname() == peer == (client.address, peer[1])
        if family == "mapped":
            assert socket.socket.getpeername(sock)[:2] == (f"::ffff:{vip}", 80)
    assert FlowKey(client.identity, server.identity, 8080, Direction.OUTBOUND) in node.kernel.flows()


def test_service_draws_all_its_endpoints(client, make_pod, service, vip):
    servers = [make_pod().enrol({(client.identity, 0): True}) for _ in range(3)]
    service(*((server.address, 8080) for server in servers))
    listeners = [server.app.listen(("", 8080)) for server in servers]
    counts = [0, 0, 0]
    for _ in range(60):
        client.app.connect((vip, 80)).close()
    for index, listener in enumerate(listeners):
        listener.settimeout(0.2)
        while True:
            try:
                listener.accept()[0].close()
            except TimeoutError:
                break
            counts[index] += 1
        listener.close()
    assert sum(counts) == 60
    assert all(count > 5 for count in counts)  # 20 expected each, standard deviation 3.7


@all_families
def test_service_without_endpoints(node, client, service, vip):
    service()
    with pytest.raises(ConnectionRefusedError):
        client.app.connect((vip, 80))
    assert reasons(node, client) == [Reason.NO_BACKEND]


def test_removed_service_is_an_unknown_address(node, client, service, vip):
    service()
    node.kernel.remove_service(vip, 80)
    with pytest.raises(OSError) as caught:  # nobody has it: the network's own answer
        client.app.connect((vip, 80), timeout=0.5)
    assert caught.value.errno != errno.ECONNREFUSED
    assert reasons(node, client) == []


@all_families
def test_endpoint_on_another_node_is_captured(node, client, service, remote, captured, vip):
    service((remote, 8080))
    with listen(node, client, PORT_OUTBOUND) as listener:
        with client.app.connect((vip, 80)) as sock:
            accepted, peer = listener.accept()
            with accepted:
                assert sock.getpeername() == (vip, 80)
                assert sock.getsockname() == peer
                assert peer[0] == client.address
                assert accepted.getsockname() == (client.address, PORT_OUTBOUND)
                found = captured.find(client.cookie, *peer, PORT_OUTBOUND)
                assert found == Captured(remote, vip, 8080, 80, client.identity)
                assert captured.find(client.cookie + 1, *peer, PORT_OUTBOUND) is None
        # Gone with the listener's end.
        accepted.close()
        assert gone(lambda: captured.find(client.cookie, *peer, PORT_OUTBOUND))
    # The node proxy counts these.
    assert not [k for k in node.kernel.flows() if client.identity in (k.source, k.destination)]


def gone(look):
    deadline = time.monotonic() + 2
    while look() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    return look() is None


def test_client_that_is_gone_before_the_proxy_accepts(node, client, remote, captured):
    with listen(node, client, PORT_OUTBOUND) as listener:
        with client.app.connect((remote, 80)) as sock:
            sock.sendall(b"all there is")
        time.sleep(0.2)  # the client's end has closed by now, in an orderly way
        accepted, peer = listener.accept()
        with accepted:
            found = captured.find(client.cookie, *peer, PORT_OUTBOUND)
            assert found is not None
            assert (found.destination_address, found.destination_port) == (remote, 80)
            assert accepted.recv(64) == b"all there is"
        assert gone(lambda: captured.find(client.cookie, *peer, PORT_OUTBOUND))


def test_address_on_another_node_is_captured(node, client, remote, captured):
    with listen(node, client, PORT_OUTBOUND) as listener, client.app.connect((remote, 8443)) as sock:
        accepted, peer = listener.accept()
        with accepted:
            assert sock.getpeername() == (remote, 8443)
            assert captured.find(client.cookie, *peer, PORT_OUTBOUND) == Captured(
                remote, remote, 8443, 8443, client.identity
            )


def test_pod_with_addresses_of_one_family_only(node, make_pod, remote, captured):
    client = make_pod()
    client.addresses = (client.address,)
    client.enrol({})
    with listen(node, client, PORT_OUTBOUND) as listener, client.app.connect((remote, 8443)) as sock:
        accepted, peer = listener.accept()
        with accepted:
            assert (sock.getpeername(), peer[0]) == ((remote, 8443), client.address)
            assert captured.find(client.cookie, *peer, PORT_OUTBOUND) == Captured(
                remote, remote, 8443, 8443, client.identity
            )
    assert node.kernel.missing(client.cookie, client.netns) == []


@pytest.mark.families("ipv4")
def test_namespace_without_ipv6(node, make_pod, remote, captured):
    client = make_pod()
    run(client.netns, "sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
    client.addresses = (client.address4,)
    client.enrol({})
    assert node.kernel.missing(client.cookie, client.netns) == []
    with listen(node, client, PORT_OUTBOUND) as listener, client.app.connect((remote, 8443)):
        accepted, peer = listener.accept()
        accepted.close()
        assert peer[0] == client.address4
    node.kernel.remove_pod(client.cookie, client.netns)
    assert not namespace.is_prepared(client.netns)


def test_nonblocking_connect_is_captured(node, client, remote):
    with (
        listen(node, client, PORT_OUTBOUND) as listener,
        client.app.connect((remote, 8443), nonblocking=True) as sock,
    ):
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"hello")
            sock.setblocking(True)
            assert sock.recv(10) == b"hello"
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            assert sock.getpeername() == (remote, 8443)


@all_families
def test_l7_service_is_captured_whole(node, client, service, remote, captured, vip):
    """By an address from outside (or a node port) l7proxy is told the service's own, by which it knows it."""
    outside = "2001:db8::7" if ":" in vip else "203.0.113.7"
    service(l7=True)
    service((vip, 80), l7=True, address=outside, port=30080)
    with listen(node, client, PORT_OUTBOUND_L7) as listener:
        for dialled in ((vip, 80), (outside, 30080)):
            with client.app.connect(dialled) as sock:
                accepted, peer = listener.accept()
                with accepted:
                    assert sock.getpeername() == dialled
                    assert captured.find(client.cookie, *peer, PORT_OUTBOUND_L7) == Captured(
                        vip, dialled[0], 80, dialled[1], client.identity
                    )


def test_without_listener_nothing_leaves(node, client, remote, captured):
    """Dead or missing, the connection is refused; no record of the attempt stays."""
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            client.app.connect((remote, 8443))
        assert len(captured) == 0
        assert len(node.kernel._maps["connecting"]) == 0
        listen(node, client, PORT_OUTBOUND).close()
        assert not node.kernel.has_listener(client.address, PORT_OUTBOUND)
    events = [e.reason for e in node.kernel.read_events() if e.destination == client.identity]
    assert Reason.NO_LISTENER in events


def test_second_listener_takes_over(node, client, remote):
    """A proxy's successor: new connections are its, the old listener keeps what it has."""
    with listen(node, client, PORT_OUTBOUND) as old:
        first = client.app.connect((remote, 1))
        with listen(node, client, PORT_OUTBOUND) as new:
            sockets = [client.app.connect((remote, 1)) for _ in range(20)]
            for _ in sockets:
                new.accept()[0].close()
            old.accept()[0].close()
            old.settimeout(0.1)
            with pytest.raises(TimeoutError):
                old.accept()
            assert node.kernel.has_listener(client.address, PORT_OUTBOUND)
            for sock in [first, *sockets]:
                sock.close()


def test_pod_cannot_take_our_port(node, client, remote, captured):
    """What the pod itself binds changes nothing, before or after."""
    with client.app.listen(("", PORT_OUTBOUND)) as theirs, listen(node, client, PORT_OUTBOUND) as ours:
        with client.app.connect((remote, 8443)):
            accepted, peer = ours.accept()
            with accepted:
                assert accepted.getsockname() == (client.address, PORT_OUTBOUND)
                assert captured.find(client.cookie, *peer, PORT_OUTBOUND) is not None
        theirs.settimeout(0.1)
        with pytest.raises(TimeoutError):
            theirs.accept()


def test_peer_outside_the_mesh_is_dialled_directly(node, client, make_pod, service, vip):
    plain = make_pod()
    node.kernel.set_peer(plain.address, Peer(local=False, enrolled=False, identity=78))
    service((plain.address, 8080))
    with plain.app.listen(("", 8080)) as listener, client.app.connect((vip, 80)) as sock:
        accepted, peer = listener.accept()
        accepted.close()
        assert peer == sock.getsockname()
        assert sock.getpeername() == (vip, 80)
    assert node.kernel.flows()[FlowKey(client.identity, 78, 8080, Direction.OUTBOUND)].opened == 1
    node.kernel.remove_peer(plain.address)


def test_unknown_address_passes(node, client):
    worker = node.worker("host")
    with worker.listen((node.gateway, 9000)), client.app.connect((node.gateway, 9000)) as sock:
        assert sock.getpeername() == (node.gateway, 9000)
    assert node.kernel.flows()[FlowKey(client.identity, 0, 9000, Direction.OUTBOUND)].opened == 1
    worker.close()


def test_loopback_and_own_address_pass(client):
    with client.app.listen(("", 7000)):
        client.app.connect(("127.0.0.1", 7000)).close()
        client.app.connect((client.address, 7000)).close()
        client.app.connect(("0.0.0.0", 7000)).close()
        client.app.connect(("::ffff:127.0.0.1", 7000), family=socket.AF_INET6).close()
    with client.app.listen(("::1", 7001), family=socket.AF_INET6):
        client.app.connect(("::1", 7001), family=socket.AF_INET6).close()
        client.app.connect(("::", 7001), family=socket.AF_INET6).close()


@pytest.mark.parametrize("port", [PORT_OUTBOUND, PORT_OUTBOUND_L7, PORT_HBONE])
def test_applications_do_not_reach_our_listeners(node, client, make_pod, port, remote):
    other = make_pod().enrol({(client.identity, 0): True})
    with listen(node, client, port), listen(node, other, port):
        for address in (client.address, other.address, remote):
            with pytest.raises(ConnectionRefusedError):
                client.app.connect((address, port))
        # "This host" is the pod's address when the socket is bound to it.
        with pytest.raises(ConnectionRefusedError):
            client.app.connect(("0.0.0.0", port), bind=(client.address4, 0))
        with pytest.raises(ConnectionRefusedError):
            client.app.connect(("::", port))
        # In IPv4 the last is the first address again: counted, and not told so soon.
        assert reasons(node, client) == [Reason.OWN_PORT] * (3 if client.address == client.address4 else 4)
        # Loopback is the pod's own affair; our listener is not there.
        with pytest.raises(ConnectionRefusedError):
            client.app.connect(("127.0.0.1", port))


@pytest.mark.parametrize("port", [PORT_OUTBOUND, PORT_OUTBOUND_L7])
def test_nobody_outside_reaches_the_capture_ports(node, client, port):
    worker = node.worker("host")
    with listen(node, client, port) as listener:
        with pytest.raises(ConnectionRefusedError):
            worker.connect((client.address, port))
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()
    worker.close()
    assert Reason.NOT_CAPTURED in [
        e.reason for e in node.kernel.read_events() if e.destination == client.identity
    ]


def test_hbone_port_is_the_node_proxys(node, client):
    """From outside, whatever the policy is and whatever the pod binds; without the listener it is nobody's."""
    worker = node.worker("host")
    with client.app.listen(("", PORT_HBONE)) as theirs:
        with listen(node, client, PORT_HBONE) as ours:
            with worker.connect((client.address, PORT_HBONE)) as sock:
                accepted, peer = ours.accept()
                accepted.close()
                assert peer == sock.getsockname()
        with pytest.raises(ConnectionRefusedError):
            worker.connect((client.address, PORT_HBONE))
        theirs.settimeout(0.1)
        with pytest.raises(TimeoutError):
            theirs.accept()
    worker.close()


@pytest.mark.families("ipv6")
def test_pod_without_an_address_of_the_family(node, family, vip, remote, make_pod, service):
    """To the mesh nobody could tell who dials, so it does not go there; elsewhere it goes as without a mesh."""
    client = make_pod()
    node.kernel.add_pod(Pod(client.cookie, (client.address4,), client.identity), client.netns)
    service((remote, 8080))
    node.kernel.read_events()
    for address in (remote, vip):
        with pytest.raises(OSError) as caught:
            client.app.connect((address, 80))
        assert caught.value.errno == errno.ENETUNREACH
    events = [e for e in node.kernel.read_events() if e.netns_cookie == client.cookie]
    assert [(e.reason, e.client, e.server) for e in events] == [
        (Reason.NO_ADDRESS, (client.address4, 0), (address, 80)) for address in (remote, vip)
    ]
    worker = node.worker("host")
    with worker.listen((node.gateway6, 9000)):
        client.app.connect((node.gateway6, 9000)).close()
    worker.close()


def test_nothing_of_a_failed_dial_is_taken_for_the_next(node, client):
    """A socket that got no further than connect(), dialled again where we have nothing to do with it."""
    run(client.netns, "ip", "route", "add", "unreachable", "203.0.113.0/24")
    made = namespace.inside(client.netns, lambda: socket.socket(socket.AF_INET6))
    with made, client.app.listen(("::1", 7003), family=socket.AF_INET6):
        with pytest.raises(OSError) as caught:
            client.app.dial_with(os.dup(made.fileno()), ("::ffff:203.0.113.1", 80))
        assert caught.value.errno == errno.EHOSTUNREACH
        with client.app.dial_with(os.dup(made.fileno()), ("::1", 7003)):
            assert made.getpeername()[:2] == ("::1", 7003)
    assert FlowKey(client.identity, 0, 80, Direction.OUTBOUND) not in node.kernel.flows()


@pytest.mark.families("ipv6")
def test_link_local_addresses_are_nobodys_way_in(node, client):
    """They are dialled as without a mesh, and no pod in the mesh is reached by its own: it would be judged as nobody."""

    def link_local(netns, interface):
        shown = run(netns, "ip", "-6", "-br", "address", "show", "dev", interface, "scope", "link")
        return next(word.partition("/")[0] for word in shown.split() if word.startswith("fe80:"))

    def index(netns, interface):
        return namespace.inside(netns, lambda: socket.if_nametoindex(interface))

    worker = node.worker("host")
    address = link_local(node.netns, "br0")
    with worker.listen(("::", 7002)):
        until = time.monotonic() + 5
        while True:  # an address that is being probed for duplicates is not there yet
            try:
                client.app.connect((address, 7002, 0, index(client.netns, "eth0"))).close()
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.05)
    own = link_local(client.netns, "eth0")
    node.kernel.read_events()
    with client.app.listen(("::", 7002)), pytest.raises(ConnectionRefusedError):
        worker.connect((own, 7002, 0, index(node.netns, "br0")))
    assert (Reason.UNKNOWN_DESTINATION, own) in [(e.reason, e.server[0]) for e in node.kernel.read_events()]
    worker.close()


def test_mptcp_is_refused(node, client, make_pod):
    with pytest.raises(OSError) as caught:
        client.app.connect((node.gateway, 9000), protocol=MPTCP)
    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert Reason.MPTCP in reasons(node, client)


@pytest.mark.families("ipv4")
def test_udp_passes(client, make_pod):
    """To a pod that allows it, and to our ports alike: those are of TCP."""
    server = make_pod().enrol({(client.identity, 0): True})
    got = namespace.inside(server.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sent = namespace.inside(client.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with got, sent:
        got.settimeout(3)
        got.bind((server.address, PORT_HBONE))
        sent.connect((server.address, PORT_HBONE))
        sent.send(b"datagram")
        assert got.recv(100) == b"datagram"


def test_what_l7proxy_dials_of_the_mesh_on_another_node_is_the_node_proxys(node, client, remote, captured):
    """It may have heard that the endpoint has left, or not yet that it has joined."""
    worker = client.worker("l7proxy")
    with listen(node, client, PORT_OUTBOUND) as listener, worker.connect((remote, 8080)) as sock:
        accepted, peer = listener.accept()
        with accepted:
            assert sock.getpeername() == (remote, 8080)
            found = captured.find(client.cookie, *peer, PORT_OUTBOUND)
            assert found == Captured(remote, remote, 8080, 8080, client.identity)


def test_proxies_are_not_captured(node, client, remote, family):
    """Their own dials out of the mesh go where they say; to the mesh on other nodes the node proxy's do, by HBONE."""
    host = node.worker("host")
    with host.listen((node.gateway, PORT_HBONE)) as listener:
        for role, enrolled in (("agent", False), ("nodeproxy", True), ("l7proxy", False)):
            node.kernel.set_peer(node.gateway, Peer(local=False, enrolled=enrolled, identity=79))
            worker = client.worker(role)
            [fd] = node.kernel.create_outbound(client.netns, ipv6=family == "ipv6")
            try:
                with worker.dial_with(fd, (node.gateway, PORT_HBONE)) as sock:
                    accepted, peer = listener.accept()
                    accepted.close()
                    assert sock.getpeername() == (node.gateway, PORT_HBONE)
                    assert peer[0] == client.address
            finally:
                node.kernel.remove_peer(node.gateway)
    host.close()


@pytest.mark.parametrize("role", ["l7proxy", "nodeproxy"])
def test_network_policy_holds_for_what_proxies_dial_outside_of_the_mesh(node, client, role):
    """Nobody has judged the endpoint that they chose; and what is kept for later requests ends as others do."""
    host, worker = node.worker("host"), client.worker(role)
    to_host = Network({str(ip_network(node.gateway)): 1}, {0: frozenset(), 1: frozenset({(6, 9004, 9004)})})
    with host.listen((node.gateway, 9004)) as listener:
        node.kernel.set_network(client.cookie, Direction.OUTBOUND, to_host)
        with worker.connect((node.gateway, 9004)) as dialled:
            accepted, _ = listener.accept()
            assert node.kernel.refused_now() == []
            node.kernel.set_network(client.cookie, Direction.OUTBOUND, Network({}, {0: frozenset()}))
            [refused] = node.kernel.refused_now()
            assert (refused.netns_cookie, refused.dialled) == (client.cookie, True)
            assert node.kernel.destroy(refused, client.netns)
            with pytest.raises(ConnectionError):
                dialled.recv(1)
            accepted.close()
        with pytest.raises(PermissionError):
            worker.connect((node.gateway, 9004))
        flows = node.kernel.flows().items()
        assert not any(counters.opened for flow, counters in flows if flow.source == client.identity)
    host.close()


def test_envoys_dials_are_turned_to_the_node_proxy(node, remote, captured, family):
    envoy, proxy = node.worker("envoy"), node.worker("nodeproxy")
    cookie = namespace.cookie(node.netns)
    with proxy.listen(("::1" if family == "ipv6" else "127.0.0.1", PORT_OUTBOUND)) as listener:
        with envoy.connect((remote, 8080)) as sock:
            accepted, peer = listener.accept()
            with accepted:
                assert sock.getpeername() == (remote, 8080)
                assert captured.find(cookie, *peer, PORT_OUTBOUND) == Captured(remote, remote, 8080, 8080, 0)
        with proxy.listen((node.gateway, 9003)):
            envoy.connect((node.gateway, 9003)).close()  # nobody's address: as it says
    envoy.close()
    proxy.close()


def test_endpoints_swap_at_once(node, client, make_pod, service, vip):
    """No connection fails, and none goes to an endpoint that left, while the list changes all the time."""
    servers = [make_pod().enrol({(client.identity, 0): True}) for _ in range(2)]
    listeners = [server.app.listen(("", 8080)) for server in servers]
    for index in range(200):
        server = servers[index % 2]
        service((server.address, 8080))
        with client.app.connect((vip, 80)):
            accepted, _ = listeners[index % 2].accept()
            accepted.close()
    assert len(node.kernel._maps["backends"]) == 0
    for listener in listeners:
        listener.close()


def test_full_table_of_captured_refuses(tmp_path):
    """Nobody could tell where it was to go: it does not get to the listener, nor anywhere else."""
    node = Node(tmp_path, sizes=("captured=1", "services=1", "backends=2"))
    try:
        pod = TestPod(node, "10.77.0.10", 20).enrol({})
        node.kernel.set_peer(REMOTE, Peer(local=False, enrolled=True, identity=77))
        with listen(node, pod, PORT_OUTBOUND) as listener:
            with pod.app.connect((REMOTE, 1)), listener.accept()[0]:
                with pytest.raises(ConnectionRefusedError):
                    pod.app.connect((REMOTE, 1))
            wait_until(lambda: not list(node.kernel._maps["captured"].keys()), 5, "it is forgotten")
            pod.app.connect((REMOTE, 1)).close()
        assert node.kernel.pressure()["captured"].refused == 1
        # A table that is full leaves what was there as it was.
        node.kernel.set_service(VIP, 80, [Backend("10.77.0.10", 1)])
        with pytest.raises(MapFullError, match=f"service {VIP}:81/TCP: map services: update: no room"):
            node.kernel.set_service(VIP, 81, [Backend("10.77.0.10", 1)])
        for backends in (
            [Backend("10.77.0.10", n) for n in range(1, FEW_BACKENDS + 2)],
            [Backend("10.77.0.10", n, n) for n in (1, 2, 3)],
        ):
            with pytest.raises(MapFullError):
                node.kernel.set_service(VIP, 80, backends)
        # So does what is no endpoint.
        for wrong in (Backend("10.77.0", 1), Backend("10.77.0.10", 65536)):
            for port in (80, 81):
                with pytest.raises(ValueError, match=r"no IP address|no port"):
                    node.kernel.set_service(VIP, port, [Backend("10.77.0.10", 2), wrong])
        assert node.kernel.services() == {Frontend(VIP, 80): (False, (Backend("10.77.0.10", 1),), 0)}
        assert len(node.kernel._maps["backends"]) == 0
        # Few need no room but the service's.
        node.kernel.set_service(VIP, 80, [Backend("10.77.0.10", n) for n in range(1, FEW_BACKENDS + 1)])
        pod.close()
    finally:
        node.close()
