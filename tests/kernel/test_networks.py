"""Verdicts by address: blocks in AuthorizationPolicy, and NetworkPolicy in both directions, on TCP connections."""

from __future__ import annotations

import time

import pytest

from agent.kernel import Direction, Network, Reason
from bpf.wire import IDENTITY_MESH, IDENTITY_PLAIN, IDENTITY_PROBE

pytestmark = pytest.mark.privileged

PORT = 8080
EVERYTHING = frozenset({(0, 0, 65535)})


def tcp(*ports: int) -> frozenset[tuple[int, int, int]]:
    return frozenset((6, port, port) for port in ports)


@pytest.fixture
def server(make_pod):
    pod = make_pod()
    pod.enrol({})
    pod.listener = pod.app.listen(("0.0.0.0", PORT))
    yield pod
    pod.listener.close()


def told(node, pod):
    return [e.reason for e in node.kernel.read_events() if pod.identity in (e.source, e.destination)]


def test_longest_block_decides(node, make_pod, server):
    one, other = make_pod().enrol({}), make_pod().enrol({})
    classes = {"10.77.0.0/16": 1, f"{other.address}/32": 2}
    node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0, 1): True}, 2, classes)
    assert node.kernel.policy(server.cookie) == (2, {(IDENTITY_MESH, 0, 1): True})
    assert node.kernel.policy_classes(server.cookie, 2) == classes
    one.app.connect((server.address, PORT)).close()
    with pytest.raises(PermissionError):
        other.app.connect((server.address, PORT))
    node.kernel.set_policy(
        server.cookie, {(IDENTITY_MESH, 0, 2): True, (IDENTITY_MESH, PORT, 2): False}, 3, classes
    )
    with pytest.raises(PermissionError):
        one.app.connect((server.address, PORT))
    with pytest.raises(PermissionError):
        other.app.connect((server.address, PORT))
    with server.app.listen(("0.0.0.0", 8081)):
        other.app.connect((server.address, 8081)).close()


def test_block_of_plain_text(node, server):
    host = node.worker("host")
    try:
        gateway = {f"{node.gateway}/32": 1}
        node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0, 1): True}, 2, gateway)
        host.connect((server.address, PORT)).close()
        node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0): True}, 3, gateway)
        with pytest.raises(ConnectionRefusedError):
            host.connect((server.address, PORT))
    finally:
        host.close()


def test_probes_from_an_address_in_a_block(node, server):
    """They pass where probes go, wherever the node's address is."""
    prober = node.worker("prober")
    try:
        table = {(IDENTITY_PROBE, PORT): True}
        node.kernel.set_policy(server.cookie, table, 2, {f"{node.gateway}/32": 1, "10.0.0.0/8": 2})
        prober.connect((server.address, PORT)).close()
    finally:
        prober.close()


def test_a_block_of_ipv6_has_no_ipv4_address(node, make_pod, server):
    """``::/0`` neither, where the kernel has the IPv4 addresses among the others."""
    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0, 1): True}, 2, {"::/0": 1})
    assert node.kernel.policy_classes(server.cookie, 2) == {"::/0": 1}
    with pytest.raises(PermissionError):
        client.app.connect((server.address, PORT))
    with pytest.raises(ConnectionRefusedError):  # nobody listens
        client.app.connect((server.address6, PORT))
    both = {"::/0": 1, "0.0.0.0/0": 1}
    node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0, 1): True}, 3, both)
    assert node.kernel.policy_classes(server.cookie, 3) == both
    client.app.connect((server.address, PORT)).close()
    node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0): True}, 4)
    six = Network({"::/0": 1}, {0: frozenset(), 1: EVERYTHING})
    for pod, direction in ((server, Direction.INBOUND), (client, Direction.OUTBOUND)):
        node.kernel.set_network(pod.cookie, direction, six)
        assert node.kernel.has_network(pod.cookie, direction, six)
        with pytest.raises(PermissionError):
            client.app.connect((server.address, PORT))
        with pytest.raises(ConnectionRefusedError):
            client.app.connect((server.address6, PORT))
        node.kernel.set_network(pod.cookie, direction, None)


def test_swap_of_classes_is_one_with_that_of_verdicts(node, make_pod, server):
    """The same block has another number each time, and the client is always allowed: never refused in between."""
    client = make_pod().enrol({})
    for generation in range(2, 12):
        number = generation % 2 + 1
        node.kernel.set_policy(
            server.cookie, {(client.identity, 0, number): True}, generation, {"10.77.0.0/16": number}
        )
        client.app.connect((server.address, PORT)).close()
        assert node.kernel.policy_classes(server.cookie, generation - 1) == {}


def test_policy_without_blocks_leaves_no_classes(node, make_pod, server):
    classes = node.kernel._maps["classes"]
    node.kernel.set_policy(server.cookie, {}, 2, {"10.0.0.0/8": 1, "fd00::/8": 2})
    assert len(list(classes.keys())) == 2
    node.kernel.set_policy(server.cookie, {}, 3)
    assert len(list(classes.keys())) == 0
    node.kernel.set_policy(server.cookie, {}, 4, {"10.0.0.0/8": 1})
    node.kernel.remove_pod(server.cookie)
    assert len(list(classes.keys())) == 0


def test_ingress_by_address_and_port(node, make_pod, server):
    one, other = make_pod().enrol({}), make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0): True, (IDENTITY_PLAIN, 0): True}, 2)
    network = Network({f"{one.address}/32": 1, "0.0.0.0/0": 0}, {0: frozenset(), 1: tcp(PORT)})
    node.kernel.set_network(server.cookie, Direction.INBOUND, network)
    assert node.kernel.has_network(server.cookie, Direction.INBOUND, network)
    assert not node.kernel.has_network(server.cookie, Direction.INBOUND, None)
    node.kernel.read_events()
    one.app.connect((server.address, PORT)).close()
    with server.app.listen(("0.0.0.0", 8081)), pytest.raises(PermissionError):
        one.app.connect((server.address, 8081))
    with pytest.raises(PermissionError):
        other.app.connect((server.address, PORT))
    assert Reason.NETWORK_POLICY in told(node, server)
    host = node.worker("host")
    with pytest.raises(ConnectionRefusedError):
        host.connect((server.address, PORT))
    host.close()
    node.kernel.set_network(server.cookie, Direction.INBOUND, None)
    other.app.connect((server.address, PORT)).close()


@pytest.mark.parametrize("ports", [(8000, 8100), (8080, 8080), (0, 65535), (8080, 65535), (1, 8080)])
def test_ranges_of_ports(node, make_pod, server, ports):
    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0): True}, 2)
    node.kernel.set_network(server.cookie, Direction.INBOUND, Network({}, {0: frozenset({(6, *ports)})}))
    for port in (7999, 8000, 8079, 8080, 8081, 8100, 8101):
        within = ports[0] <= port <= ports[1]
        # Nobody listens but at one of them: who may come finds that out, who may not does not.
        expected = None if port == PORT and within else ConnectionRefusedError if within else PermissionError
        if expected is None:
            client.app.connect((server.address, port)).close()
        else:
            with pytest.raises(expected):
                client.app.connect((server.address, port))


def test_egress_is_judged_at_connect_by_the_endpoint(node, make_pod, server):
    from agent.kernel import Backend

    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0): True}, 2)
    node.kernel.set_service("10.96.9.1", 80, [Backend(server.address, PORT)])
    allowed = Network({f"{server.address}/32": 1}, {0: frozenset(), 1: tcp(PORT)})
    node.kernel.set_network(client.cookie, Direction.OUTBOUND, allowed)
    client.app.connect(("10.96.9.1", 80)).close()
    client.app.connect((server.address, PORT)).close()
    node.kernel.read_events()
    # The service's own port is nothing that a NetworkPolicy speaks of.
    node.kernel.set_network(
        client.cookie, Direction.OUTBOUND, Network({f"{server.address}/32": 1}, {0: frozenset(), 1: tcp(80)})
    )
    with pytest.raises(PermissionError):
        client.app.connect(("10.96.9.1", 80))
    with pytest.raises(PermissionError):
        client.app.connect(("192.0.2.1", 443), timeout=0.5)
    assert told(node, client)[:1] == [Reason.NETWORK_POLICY]
    # To itself always.
    with client.app.listen(("0.0.0.0", 9000)):
        client.app.connect((client.address, 9000)).close()
    node.kernel.remove_service("10.96.9.1", 80)


@pytest.mark.parametrize("direction", [Direction.INBOUND, Direction.OUTBOUND])
def test_change_ends_what_is_open(node, make_pod, server, direction):
    client = make_pod().enrol({})
    node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0): True}, 2)
    with client.app.connect((server.address, PORT)) as dialled:
        accepted, _ = server.listener.accept()
        assert node.kernel.refused_now() == []
        pod = server if direction is Direction.INBOUND else client
        node.kernel.set_network(pod.cookie, direction, Network({}, {0: frozenset()}))
        [refused] = node.kernel.refused_now()
        assert (refused.netns_cookie, refused.dialled) == (pod.cookie, direction is Direction.OUTBOUND)
        assert node.kernel.destroy(refused, pod.netns)
        for end in (dialled, accepted):
            end.settimeout(2)
            with pytest.raises(ConnectionError):
                end.recv(1)
        accepted.close()
    deadline = time.monotonic() + 2
    while node.kernel.refused_now() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert node.kernel.refused_now() == []


def test_removed_pod_leaves_no_network(node, make_pod, server):
    node.kernel.set_network(server.cookie, Direction.INBOUND, Network({}, {0: EVERYTHING}))
    node.kernel.remove_pod(server.cookie)
    assert len(list(node.kernel._maps["networks"].keys())) == 0
