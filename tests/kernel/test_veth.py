"""The host's end of a pod's veth: what hooks of sockets never see meets the same verdicts, and a forged source gains nothing."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from pathlib import Path

import pytest

from agent.kernel import (
    Direction,
    Kernel,
    Network,
    Peer,
    Pod,
    Reason,
    namespace,
    netlink,
)
from agent.kernel.interfaces import find
from bpf import links, wire
from bpf.wire import IDENTITY_MESH, IDENTITY_PLAIN
from tests.kernel.mesh import Node, new_namespace, run
from tests.kernel.test_admission import raw_socket, syn, wait_until

pytestmark = pytest.mark.privileged

FAMILIES = ("ipv4", "ipv6")
PORT = 8080
_numbers = itertools.count(1)

NOBODY = {"ipv4": "10.77.250.7", "ipv6": "fd77::250:7"}


def inside(netns, work):
    return namespace.inside(netns, work)


def udp(netns, address, port=0, **options):
    """A datagram socket of the namespace, bound there."""

    def make():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        for level, name in options.get("set", ()):
            sock.setsockopt(level, name, 1)
        sock.bind((address, port))
        sock.settimeout(1)
        return sock

    return inside(netns, make)


def received(sock, timeout=3.0):
    sock.settimeout(timeout)
    try:
        return sock.recvfrom(65536)
    except TimeoutError:
        return None


def never_arrives(sock, data, to, listening):
    """Refused as it is sent, or dropped on the way."""
    try:
        sock.sendto(data, to)
    except PermissionError:
        return True
    return received(listening, 0.3) is None


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    return ~total & 0xFFFF


def ip(source, destination, protocol, payload, identification=1, fragment=0):
    """A packet with its network header."""
    if ":" in source:
        ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + ends + payload
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    size = 20 + len(payload)
    head = struct.pack("!BBHHHBBH", 0x45, 0, size, identification, fragment, 64, protocol, 0) + ends
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def datagram(source, destination, source_port, port, data=b"forged"):
    body = struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    pseudo = socket.inet_pton(family, source) + socket.inet_pton(family, destination)
    sum_ = checksum(pseudo + struct.pack("!BBH", 0, 17, len(body)) + body) or 0xFFFF
    body = body[:6] + struct.pack("!H", sum_) + body[8:]
    return ip(source, destination, 17, body)


def mac_of(netns, interface="eth0"):
    text = run(netns, "ip", "-o", "link", "show", interface)
    return bytes.fromhex(text.split("link/ether ")[1].split()[0].replace(":", ""))


class Wire:
    """A packet socket of a pod: whole frames to another pod, or to the node, past every other hook."""

    def __init__(self, pod, to):
        self.to = mac_of(to.netns, "br0" if isinstance(to, Node) else "eth0")
        self.mac = mac_of(pod.netns)
        self.kind = 0x86DD if ":" in pod.address else 0x0800
        self.socket = inside(pod.netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        inside(pod.netns, lambda: self.socket.bind(("eth0", 0)))

    def send(self, packet, *, mac=None, kind=None):
        self.socket.send(self.to + (mac or self.mac) + struct.pack("!H", kind or self.kind) + packet)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


@pytest.fixture
def pods(node, make_pod):
    """A client, a victim whose identity is worth having, and a server that takes everybody of the mesh and ICMP."""
    client, victim, server = make_pod().enrol({}), make_pod().enrol({}), make_pod().enrol({})
    everybody = {(IDENTITY_MESH, 0): True, (IDENTITY_PLAIN, 0): True}
    for pod in (client, victim, server):
        node.kernel.set_policy(pod.cookie, everybody, 2)
    node.kernel.read_events()
    return client, victim, server


def only(*allowed):
    return {(pod.identity, 0): True for pod in allowed}


def spoofed(node):
    return node.kernel.refusals_by_reason().get(Reason.SPOOFED, 0)


# Datagrams


def test_datagrams_by_identity(node, pods):
    client, victim, server = pods
    with udp(server.netns, server.address, 5353) as listening, udp(client.netns, client.address) as sock:
        node.kernel.set_policy(server.cookie, only(client), 3)
        sock.sendto(b"hello", (server.address, 5353))
        data, sender = received(listening)
        assert data == b"hello"
        assert sender[:2] == sock.getsockname()[:2]
        # The answer needs no policy of the client's.
        node.kernel.set_policy(client.cookie, {}, 3)
        listening.sendto(b"there", sender)
        assert received(sock)[0] == b"there"
        # In force with the next datagram, in both directions of what was going on.
        node.kernel.set_policy(server.cookie, only(victim), 4)
        assert never_arrives(sock, b"hello", (server.address, 5353), listening)
        listening.sendto(b"still there", sender)
        assert received(sock, 0.3) is None


def test_datagrams_by_port(node, pods):
    client, _, server = pods
    node.kernel.set_policy(server.cookie, {(client.identity, 5353): True}, 3)
    with (
        udp(server.netns, server.address, 5353) as right,
        udp(server.netns, server.address, 5354) as wrong,
        Wire(client, server) as wire_socket,
    ):
        for port in (5353, 5354):
            wire_socket.send(datagram(client.address, server.address, 4000, port))
        assert received(right) is not None
        assert received(wrong, 0.3) is None


def test_datagrams_from_outside_are_plain(node, pods):
    _, _, server = pods
    gateway = gateway_of(node, server)
    with udp(server.netns, server.address, 5353) as listening, udp(node.netns, gateway) as outside:
        outside.sendto(b"plain", (server.address, 5353))
        data, sender = received(listening)
        assert data == b"plain"
        node.kernel.set_policy(server.cookie, {(IDENTITY_MESH, 0): True}, 3)  # STRICT
        outside.sendto(b"plain", (server.address, 5353))
        assert received(listening, 0.3) is None
        # Of another node's pod: by who has the address.
        node.kernel.set_peer(gateway, Peer(local=False, enrolled=True, identity=77))
        outside.sendto(b"peer", (server.address, 5353))
        assert received(listening)[0] == b"peer"
        node.kernel.remove_peer(gateway)
        # What the pod itself began is answered under STRICT too (a name server outside of the mesh).
        with udp(server.netns, server.address) as asking:
            asking.sendto(b"question", outside.getsockname()[:2])
            data, sender = received(outside)
            outside.sendto(b"answer", sender)
            assert received(asking)[0] == b"answer"
            # And to no other port of it.
            outside.sendto(b"more", (server.address, 5353))
            assert received(listening, 0.3) is None


def test_fragments_go_the_way_of_the_first(node, pods):
    client, _, server = pods
    with udp(server.netns, server.address, 5353) as listening, udp(client.netns, client.address) as sock:
        sock.sendto(b"x" * 30000, (server.address, 5353))
        data, sender = received(listening)
        assert len(data) == 30000
        listening.sendto(b"y" * 20000, sender)
        assert len(received(sock)[0]) == 20000
    if ":" not in server.address:
        # One that comes without its first is dropped before the pod.
        before = run(server.netns, "cat", "/proc/net/snmp")
        with Wire(client, server) as wire_socket:
            wire_socket.send(ip(client.address, server.address, 17, b"z" * 64, 999, 100))
        after = run(server.netns, "cat", "/proc/net/snmp")
        column = before.splitlines()[0].split().index("ReasmReqds")
        assert before.splitlines()[1].split()[column] == after.splitlines()[1].split()[column]


def echo(netns, address, timeout=3.0):
    """Whether an echo request is answered."""
    ipv6 = ":" in address
    family, protocol = (socket.AF_INET6, 58) if ipv6 else (socket.AF_INET, 1)
    request, reply = (128, 129) if ipv6 else (8, 0)
    with inside(netns, lambda: socket.socket(family, socket.SOCK_RAW, protocol)) as sock:
        body = struct.pack("!BBHHH", request, 0, 0, os.getpid() & 0xFFFF, next(_numbers)) + b"ping"
        if not ipv6:  # the kernel does it for ICMPv6
            body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        sock.sendto(body, (address, 0))
        sock.settimeout(timeout)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                data = sock.recv(1000)
            except TimeoutError:
                return False
            answer = data if ipv6 else data[20:]
            if answer[0] == reply and answer[4:] == body[4:]:
                return True
    return False


def test_echo_is_judged_and_answers_come_back(node, pods):
    client, _, server = pods
    assert echo(client.netns, server.address)
    node.kernel.set_policy(client.cookie, {}, 3)
    assert echo(client.netns, server.address)
    node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0): True}, 3)
    assert not echo(client.netns, server.address, 0.5)
    # The node looks after its pods whatever their policy says.
    node.kernel.set_policy(server.cookie, {}, 4)
    assert echo(node.netns, server.address)


def test_errors_about_what_was_sent_come_back(node, pods):
    client, _, server = pods
    with udp(client.netns, client.address) as sock:
        sock.connect((server.address, 9))
        sock.send(b"nobody listens")
        sock.settimeout(1)
        with pytest.raises(ConnectionRefusedError):
            sock.recv(10)


@pytest.mark.parametrize("direction", [Direction.INBOUND, Direction.OUTBOUND])
def test_network_policy_of_datagrams(node, pods, direction):
    client, _, server = pods
    whose, other = (server, client) if direction is Direction.INBOUND else (client, server)
    bits = 128 if ":" in server.address else 32
    allowed = frozenset({(17, 5353, 5353)})
    network = Network({f"{other.address}/{bits}": 1}, {0: frozenset(), 1: allowed})
    node.kernel.set_network(whose.cookie, direction, network)
    with (
        udp(server.netns, server.address, 5353) as right,
        udp(server.netns, server.address, 5354) as wrong,
        udp(client.netns, client.address, 4001) as sock,
    ):
        sock.sendto(b"a", (server.address, 5353))
        assert received(right)[0] == b"a"
        assert never_arrives(sock, b"b", (server.address, 5354), wrong)
        right.sendto(b"c", (client.address, 4001))
        assert received(sock)[0] == b"c"
        # Forbidden now: in force for the next one, also for answers.
        node.kernel.set_network(whose.cookie, direction, Network({}, {0: frozenset()}))
        assert never_arrives(sock, b"d", (server.address, 5353), right)


# Forged sources


def test_forged_datagrams_are_dropped_and_counted(node, pods):
    client, victim, server = pods
    node.kernel.set_policy(server.cookie, only(victim), 3)
    with (
        udp(server.netns, server.address, 5353) as listening,
        Wire(client, node) as w,
    ):
        before = spoofed(node)
        with inside(client.netns, lambda: raw_socket(server.address)) as raw:
            packet = datagram(victim.address, server.address, 4000, 5353)
            raw.sendto(packet, (server.address, 0))
        w.send(packet)
        w.send(datagram(NOBODY["ipv6" if ":" in server.address else "ipv4"], server.address, 4000, 5353))
        assert received(listening, 0.3) is None
        wait_until(lambda: spoofed(node) >= before + 3)
        # The victim itself is heard.
        with udp(victim.netns, victim.address) as own:
            own.sendto(b"me", (server.address, 5353))
            assert received(listening)[0] == b"me"


def gateway_of(node, pod):
    return node.gateway6 if ":" in pod.address else node.gateway4


def test_transparent_socket_with_a_neighbours_address(node, pods):
    """IP_TRANSPARENT needs CAP_NET_RAW only, and binds any address."""
    client, victim, server = pods
    node.kernel.set_policy(server.cookie, only(victim), 3)
    option = (socket.IPPROTO_IPV6, 75) if ":" in server.address else (socket.SOL_IP, 19)
    with udp(server.netns, server.address, 5353) as listening:
        before = spoofed(node)
        with udp(client.netns, victim.address, 4000, set=[option]) as sock:
            try:
                sock.sendto(b"forged", (server.address, 5353))
            except OSError:
                return  # refused by its own hook already
            assert received(listening, 0.3) is None
        wait_until(lambda: spoofed(node) > before)


@pytest.mark.families("ipv4")
def test_marks_gain_nothing(node, pods):
    client, victim, server = pods
    node.kernel.set_policy(server.cookie, only(victim), 3)
    node.kernel.set_policy(client.cookie, {}, 3)
    with udp(server.netns, server.address, 5353) as listening:
        for mark in (namespace.DELIVERY_MARK, 0x4000, 0x8000):

            def send(mark=mark):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                    try:
                        sock.sendto(b"marked", (server.address, 5353))
                    except OSError:
                        pass
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                    sock.settimeout(0.3)
                    assert sock.connect_ex((server.address, PORT)) != 0

            inside(client.netns, send)
        assert received(listening, 0.3) is None


def test_hardware_address_of_a_neighbour(node, pods):
    client, victim, server = pods
    mac = bytes.fromhex(run(victim.netns, "cat", "/sys/class/net/eth0/address").strip().replace(":", ""))
    with udp(server.netns, server.address, 5353) as listening, Wire(client, server) as w:
        before = spoofed(node)
        w.send(datagram(client.address, server.address, 4000, 5353), mac=mac)
        assert received(listening, 0.3) is None
        wait_until(lambda: spoofed(node) == before + 1)
        w.send(datagram(client.address, server.address, 4000, 5353))
        assert received(listening) is not None


@pytest.mark.families("ipv4")
def test_arp_with_a_neighbours_address(node, pods):
    client, victim, server = pods
    with Wire(client, server) as w:
        before = spoofed(node)

        def arp(sender):
            body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + w.mac + socket.inet_aton(sender)
            w.send(body + w.to + socket.inet_aton(server.address), kind=0x0806)

        known = run(server.netns, "ip", "neigh", "show")
        arp(victim.address)
        wait_until(lambda: spoofed(node) == before + 1)
        assert run(server.netns, "ip", "neigh", "show").count("lladdr") == known.count("lladdr")
        arp(client.address)
        assert spoofed(node) == before + 1


@pytest.mark.families("ipv6")
def test_neighbour_advertisement_of_another_address(node, pods):
    client, victim, server = pods
    with Wire(client, server) as w:

        def advertise(target, kind=136):
            body = struct.pack("!BBHI", kind, 0, 0, 0x60000000) + socket.inet_pton(socket.AF_INET6, target)
            body += b"\2\1" + w.mac
            ends = socket.inet_pton(socket.AF_INET6, client.address)
            ends += socket.inet_pton(socket.AF_INET6, server.address)
            sum_ = checksum(ends + struct.pack("!IBBBB", len(body), 0, 0, 0, 58) + body)
            body = body[:2] + struct.pack("!H", sum_) + body[4:]
            packet = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + ends + body
            w.send(packet)

        before = spoofed(node)
        advertise(client.address)
        assert spoofed(node) == before
        advertise(victim.address)
        advertise(client.address, kind=134)  # a router's
        wait_until(lambda: spoofed(node) == before + 2)


@pytest.mark.families("ipv4")
def test_what_is_no_ip_or_in_a_vlan(node, pods):
    client, _, server = pods
    with udp(server.netns, server.address, 5353) as listening, Wire(client, server) as w:
        before = spoofed(node)
        w.send(b"\0" * 60, kind=0x88B5)
        w.send(
            struct.pack("!HH", 5, 0x0800) + datagram(client.address, server.address, 4000, 5353), kind=0x8100
        )
        wait_until(lambda: spoofed(node) == before + 2)
        assert received(listening, 0.3) is None


# TCP past the hooks


def refused_not_captured(node):
    return node.kernel.refusals_by_reason().get(Reason.NOT_CAPTURED, 0)


@pytest.mark.parametrize("how", ["raw", "packet"])
def test_syn_that_no_hook_wrote_down(node, pods, how):
    client, _, server = pods
    with server.app.listen((server.address, PORT)), Wire(client, server) as w:
        before = refused_not_captured(node)
        packet = syn(client.address, server.address, 50001, PORT)
        if how == "packet":
            w.send(packet)
        else:
            with inside(client.netns, lambda: raw_socket(server.address)) as raw:
                raw.sendto(packet, (server.address, 0))
        wait_until(lambda: refused_not_captured(node) == before + 1)
        assert not [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]


def test_between_nodes_the_node_proxy_speaks_alone(node, pods):
    """HBONE to an enrolled pod of another node: of the node proxy's own dials, and of no packet that only looks like it."""
    client = pods[0]
    gateway = gateway_of(node, client)
    node.kernel.set_peer(gateway, Peer(local=False, enrolled=True, identity=77))
    host = node.worker("host")
    try:
        with host.listen((gateway, wire.PORT_HBONE)), Wire(client, node) as w:
            worker = client.worker("nodeproxy")
            [fd] = node.kernel.create_outbound(client.netns, ipv6=":" in gateway)
            worker.dial_with(fd, (gateway, wire.PORT_HBONE)).close()
            before = refused_not_captured(node)
            w.send(syn(client.address, gateway, 50001, wire.PORT_HBONE))
            wait_until(lambda: refused_not_captured(node) == before + 1)
    finally:
        node.kernel.remove_peer(gateway)
        host.close()


def test_data_of_no_tcp_socket(node, pods):
    """As a stack of its own in the pod would send it: nothing of it leaves for the mesh."""
    client, _, server = pods
    with Wire(client, server) as w:
        segment = struct.pack("!HHIIBBHHH", 50001, PORT, 1, 1, 5 << 4, 0x18, 8192, 0, 0)
        before = refused_not_captured(node)
        w.send(ip(client.address, server.address, 6, segment + b"data"))
        wait_until(lambda: refused_not_captured(node) == before + 1)
        w.send(ip(client.address, server.address, 6, segment))  # a bare acknowledgement
        assert refused_not_captured(node) == before + 1


def test_egress_of_what_no_hook_saw(node, pods):
    client, _, _ = pods
    nobody = gateway_of(node, client)
    with Wire(client, node) as w:
        node.kernel.set_network(client.cookie, Direction.OUTBOUND, Network({}, {0: frozenset()}))
        before = node.kernel.refusals_by_reason().get(Reason.NETWORK_POLICY, 0)
        w.send(syn(client.address, nobody, 50001, 443))
        w.send(datagram(client.address, nobody, 50001, 53))
        wait_until(lambda: node.kernel.refusals_by_reason().get(Reason.NETWORK_POLICY, 0) == before + 2)


@pytest.mark.families("ipv4")
def test_server_on_a_packet_socket_is_judged(node, pods):
    """sk_lookup refuses the SYN, a packet socket sees it all the same: its own answer does not leave the pod."""
    server = pods[2]
    node.kernel.set_policy(server.cookie, {}, 3)
    gateway = node.gateway4
    with Wire(server, node) as w:
        before = node.kernel.refusals_by_reason().get(Reason.POLICY, 0)
        segment = struct.pack("!HHIIBBHHH", PORT, 50001, 1, 1, 5 << 4, 0x12, 8192, 0, 0)
        w.send(ip(server.address, gateway, 6, segment))
        wait_until(lambda: node.kernel.refusals_by_reason().get(Reason.POLICY, 0) == before + 1)


def test_established_connections_pass(node, pods):
    client, _, server = pods
    with (
        server.app.listen((server.address, PORT)) as listener,
        client.app.connect((server.address, PORT)) as dialled,
    ):
        accepted, _ = listener.accept()
        with accepted:
            payload = os.urandom(1 << 20)
            dialled.sendall(payload[: 1 << 16])
            got = b""
            while len(got) < 1 << 16:
                got += accepted.recv(65536)
            assert got == payload[: 1 << 16]


# Life


def names(node, pod):
    return sorted(
        p.name for p in Path(node.pins, f"v{wire.ABI}/veth").iterdir() if p.name.startswith(f"{pod.cookie}_")
    )


@pytest.mark.families("ipv4")
def test_programs_come_and_go_with_the_pod(node, make_pod):
    pod = make_pod()
    assert names(node, pod) == []
    pod.enrol({})
    [end] = find(pod.netns, node.netns, pod.addresses)
    assert names(node, pod) == [f"{pod.cookie}_{end.number}_from", f"{pod.cookie}_{end.number}_to"]
    assert node.kernel.missing(pod.cookie, pod.netns) == []
    [path, _] = Path(node.pins, f"v{wire.ABI}/veth").glob(f"{pod.cookie}_*")
    path.unlink()
    missing = node.kernel.missing(pod.cookie, pod.netns)
    assert [text for text in missing if "no program on interface" in text]
    # What is unpinned runs on for a moment.
    wait_until(lambda: enrols(pod))
    assert node.kernel.missing(pod.cookie, pod.netns) == []
    node.kernel.remove_pod(pod.cookie)
    assert names(node, pod) == []
    assert struct.pack("=I", end.number) not in dict(node.kernel._maps["interfaces"].items())


def enrols(pod):
    try:
        pod.enrol()
    except OSError:
        return False
    return True


@pytest.mark.families("ipv4")
def test_pod_without_a_veth_is_not_enrolled(node, make_pod):
    pod = make_pod()
    run(pod.netns, "ip", "link", "del", "eth0")
    run(pod.netns, "sh", "-c", f"ip link add d0 type bridge && ip addr add {pod.address}/16 dev d0")
    with pytest.raises(OSError, match=r"no veth of the node has 10\..* at its other end"):
        pod.enrol({})
    assert pod.cookie not in node.kernel.pods()


@pytest.mark.families("ipv4")
def test_pod_that_loses_its_address_is_judged_where_it_was(node, make_pod):
    pod = make_pod()
    pod.enrol({})
    before = names(node, pod)
    run(pod.netns, "ip", "addr", "flush", "dev", "eth0")
    with pytest.raises(OSError, match="no veth of the node"):
        find(pod.netns, node.netns, pod.addresses)
    assert node.kernel.missing(pod.cookie, pod.netns) == []
    pod.enrol()
    assert names(node, pod) == before
    run(pod.netns, "ip", "link", "del", "eth0")
    assert any("no veth of the node" in text for text in node.kernel.missing(pod.cookie, pod.netns))
    with pytest.raises(OSError, match="no veth of the node"):
        pod.enrol()


@pytest.mark.families("ipv4")
def test_pair_within_the_pod_is_no_veth_of_the_node(node, make_pod):
    """Where the node has a pair of its own with the same two indices, which is nobody's business."""
    pod = make_pod()
    theirs = new_namespace()
    host = new_namespace()
    try:
        for netns in (theirs, host):
            run(netns, "ip", "link", "add", "a0", "type", "veth", "peer", "name", "a1")
        run(theirs, "ip", "addr", "add", f"{pod.address}/16", "dev", "a0")
        numbers = [inside(netns, lambda: socket.if_nametoindex("a0")) for netns in (theirs, host)]
        assert numbers[0] == numbers[1]
        with pytest.raises(OSError, match="no veth of the node"):
            find(theirs, host, pod.addresses)
    finally:
        os.close(theirs)
        os.close(host)


@pytest.mark.families("ipv4")
def test_index_of_another_namespace_is_no_veth_of_the_pod(node, make_pod):
    """The pod's peer index means something else in a namespace that is not the other end's."""
    pod = make_pod()
    other = new_namespace()
    try:
        run(other, "sh", "-c", "for i in $(seq 400); do ip link add d$i type bridge; done")
        with pytest.raises(OSError, match="no veth of the node"):
            find(pod.netns, other, pod.addresses)
    finally:
        os.close(other)


@pytest.mark.families("ipv4")
def test_upgrade_replaces_the_programs_where_they_are(node, pods):
    client, _, server = pods
    before = {name: program(node, name) for name in names(node, client)}
    node.load("--replace")
    after = {name: program(node, name) for name in names(node, client)}
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    with udp(server.netns, server.address, 5353) as listening, Wire(client, server) as w:
        w.send(datagram(client.address, server.address, 4000, 5353))
        assert received(listening) is not None
        w.send(datagram(pods[1].address, server.address, 4000, 5353))
        assert received(listening, 0.3) is None


def program(node, name):
    link = links.open_pin(str(Path(node.pins, f"v{wire.ABI}/veth", name)))
    try:
        return links.link_info(link).program
    finally:
        os.close(link)


def filters(node, index):
    """Numbers of the programs in both filters of an interface."""
    name = run(node.netns, "ip", "-o", "link").split(f"{index}: ", 1)[1].split("@")[0]
    shown = [run(node.netns, "tc", "filter", "show", "dev", name, way) for way in ("ingress", "egress")]
    return [text.split(" id ")[1].split()[0] for text in shown]


@pytest.mark.families("ipv4")
def test_filters_where_the_kernel_has_no_tcx(node, pods, monkeypatch):
    """Linux before 6.6: the same programs in a clsact qdisc, found again and removed."""
    client, victim, server = pods

    def refuse(*_):
        raise links.LinkError(22, "attach")

    monkeypatch.setattr(links, "attach_tcx", refuse)
    node.kernel.remove_pod(client.cookie)
    client.enrol({(IDENTITY_MESH, 0): True})
    assert names(node, client) == []
    [end] = find(client.netns, node.netns, client.addresses)
    assert node.kernel.missing(client.cookie, client.netns) == []
    client.enrol()  # once more changes nothing
    with udp(server.netns, server.address, 5353) as listening, Wire(client, server) as w:
        w.send(datagram(client.address, server.address, 4000, 5353))
        assert received(listening) is not None
        before = spoofed(node)
        w.send(datagram(victim.address, server.address, 4000, 5353))
        assert received(listening, 0.3) is None
        wait_until(lambda: spoofed(node) == before + 1)
    # An upgrade: the agent that comes after it lets the filters run the new programs.
    node.load("--replace")
    before = filters(node, end.number)
    with Kernel(node.pins, node.netns):
        pass
    assert before != filters(node, end.number)
    node.kernel.remove_pod(client.cookie)
    for ingress in (True, False):
        assert not inside(node.netns, lambda ingress=ingress: netlink.has_filter(end.number, ingress=ingress))


@pytest.mark.families("ipv4")
def test_pod_that_joins_passes_until_it_is_in(node, make_pod):
    """Running pods are not cut off while they come or go; whose address it is counts from the first moment."""
    one, other = make_pod(), make_pod()
    for pod in (one, other):
        open_pod = Pod(pod.cookie, pod.addresses, pod.identity, passing=True, open=True)
        node.kernel.add_pod(open_pod, pod.netns, (1, {}, {}))
    with udp(other.netns, other.address, 5353) as listening, Wire(one, other) as w:
        w.send(datagram(one.address, other.address, 4000, 5353))
        assert received(listening) is not None
        w.send(datagram("10.77.250.7", other.address, 4000, 5353))
        assert received(listening, 0.3) is None
    other.enrol({})
    with udp(other.netns, other.address, 5353) as listening, udp(one.netns, one.address) as sock:
        sock.sendto(b"x", (other.address, 5353))
        assert received(listening, 0.3) is None


@pytest.mark.families("ipv4")
def test_successor_takes_the_links_over(node, pods):
    client, _, _ = pods
    held = names(node, client)
    with Kernel(node.pins, node.netns) as successor:
        assert successor.missing(client.cookie, client.netns) == []
    assert names(node, client) == held
