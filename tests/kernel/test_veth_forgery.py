"""What CAP_NET_RAW could be for beyond a neighbour's address: leases, errors in others' names, tunnels, nameless addresses."""

from __future__ import annotations

import socket
import struct

import pytest

from agent.kernel import Direction, Network, Peer, Pod, Reason
from bpf.wire import IDENTITY_PLAIN
from tests.kernel.mesh import run
from tests.kernel.test_admission import wait_until
from tests.kernel.test_veth import (
    Wire,
    checksum,
    datagram,
    gateway_of,
    inside,
    ip,
    mac_of,
    never_arrives,
    pods,
    received,
    spoofed,
    udp,
)

__all__ = ["pods"]

pytestmark = pytest.mark.privileged

FAMILIES = ("ipv4", "ipv6")
BROADCAST = (socket.SOL_SOCKET, socket.SO_BROADCAST)


def refused(node, reason):
    return node.kernel.refusals_by_reason().get(reason, 0)


def icmp(source, destination, kind, code, rest):
    """``rest`` is all behind the checksum."""
    if ":" not in source:
        body = struct.pack("!BBH", kind, code, 0) + rest
        return ip(source, destination, 1, body[:2] + struct.pack("!H", checksum(body)) + body[4:])
    body = struct.pack("!BBH", kind, code, 0) + rest
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    sum_ = checksum(ends + struct.pack("!IBBBB", len(body), 0, 0, 0, 58) + body)
    return ip(source, destination, 58, body[:2] + struct.pack("!H", sum_) + body[4:])


def unreachable(source, destination, quoted):
    """Nobody listens at that port."""
    kind, code = (1, 4) if ":" in source else (3, 3)
    return icmp(source, destination, kind, code, bytes(4) + quoted)


# Leases


@pytest.mark.families("ipv4")
def test_ports_of_leases_are_no_way_around_policies(node, pods):
    """Whoever may bind them (containers mostly may) would speak with anybody, unseen by all policies and accounts."""
    client, _, server = pods
    node.kernel.set_policy(server.cookie, {}, 3)
    with (
        udp(server.netns, server.address, 68) as at_client,
        udp(client.netns, client.address, 67) as from_server,
        udp(server.netns, server.address, 67) as at_server,
        udp(client.netns, client.address, 68) as from_client,
    ):
        assert never_arrives(from_server, b"an offer", (server.address, 68), at_client)
        assert never_arrives(from_client, b"a request", (server.address, 67), at_server)
        node.kernel.set_network(client.cookie, Direction.OUTBOUND, Network({}, {0: frozenset()}))
        with udp(node.netns, node.gateway, 67) as outside:
            assert never_arrives(from_client, b"a request", (node.gateway, 67), outside)


@pytest.mark.families("ipv4")
def test_who_asks_for_a_lease_is_answered(node, pods):
    """By somebody who is in no policy; and not by its neighbours in the mesh."""
    client, _, server = pods
    node.kernel.set_policy(server.cookie, {}, 3)
    with (
        udp(server.netns, "0.0.0.0", 68, set=[BROADCAST]) as asking,
        udp(node.netns, "0.0.0.0", 67) as leases,
        udp(client.netns, client.address, 67) as forger,
    ):
        assert never_arrives(leases, b"nobody asked", (server.address, 68), asking)
        asking.sendto(b"discover", ("255.255.255.255", 67))
        assert received(leases) == (b"discover", (server.address, 68))
        leases.sendto(b"offer", (server.address, 68))
        assert received(asking)[0] == b"offer"
        assert never_arrives(forger, b"a better one", (server.address, 68), asking)


# The link's own matters


@pytest.mark.families("ipv4")
def test_group_messages_are_for_groups(node, pods):
    client, _, server = pods
    node.kernel.set_policy(server.cookie, {}, 3)
    with inside(server.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 2)) as listening:
        with Wire(client, server) as w:
            w.send(ip(client.address, "224.0.0.1", 2, b"a query"))
            assert received(listening)[0].endswith(b"a query")
            w.send(ip(client.address, server.address, 2, b"what nobody may know"))
            assert received(listening, 0.3) is None


@pytest.mark.families("ipv6")
@pytest.mark.parametrize(("kind", "hops"), [(135, 64), (133, 254), (143, 1)])
def test_neighbour_discovery_stays_on_its_link(node, pods, kind, hops):
    """What a router has passed on, or a report to one host, is a message like any other."""
    client, _, server = pods
    node.kernel.set_policy(server.cookie, {}, 3)
    with Wire(client, server) as w:
        before = refused(node, Reason.POLICY)
        packet = icmp(client.address, server.address, kind, 0, bytes(4) + b"what nobody may know")
        w.send(packet[:7] + bytes([hops]) + packet[8:])
        wait_until(lambda: refused(node, Reason.POLICY) == before + 1)


@pytest.mark.families("ipv4")
def test_arp_of_a_pod_without_ipv4(node, pods, make_pod):
    """Of what it has there nothing is known; of what its neighbours have it is."""
    victim, server = pods[1:]
    pod = make_pod()
    node.kernel.add_pod(Pod(pod.cookie, (pod.address6,), pod.identity), pod.netns)
    with Wire(pod, server) as w:
        before = spoofed(node)
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + w.mac + socket.inet_aton(victim.address4)
        w.send(body + w.to + socket.inet_aton(server.address4), kind=0x0806)
        wait_until(lambda: spoofed(node) == before + 1)


# Errors


def test_errors_in_a_neighbours_name(node, pods):
    """That a server is not there is said by the server: another pod ends nobody's conversation, and shrinks nobody's path."""
    client, victim, server = pods
    with udp(server.netns, server.address, 5353) as listening, udp(victim.netns, victim.address) as sock:
        sock.connect((server.address, 5353))
        sock.send(b"question")
        assert received(listening)[0] == b"question"
        port = sock.getsockname()[1]
        said = datagram(victim.address, server.address, port, 5353, b"question")
        with Wire(client, victim) as w:
            before = spoofed(node)
            w.send(unreachable(client.address, victim.address, said))
            w.send(unreachable(client.address, victim.address, said[:12]))
            wait_until(lambda: spoofed(node) == before + 2)
        assert received(sock, 0.3) is None
        # About what the victim has sent to it, it may speak.
        sock.connect((client.address, 9))
        sock.send(b"is anybody there?")
        sock.settimeout(3)
        with pytest.raises(ConnectionRefusedError):
            sock.recv(10)


@pytest.mark.families("ipv4")
def test_errors_that_quote_eight_bytes(node, pods, make_pod):
    """Routers need not quote more (RFC 792): a path's size is heard of under STRICT too."""
    client, _, server = pods
    router = make_pod()
    node.kernel.set_policy(client.cookie, {}, 3)

    def heard():
        names, values = (
            line.split()[1:]
            for line in run(client.netns, "cat", "/proc/net/snmp").splitlines()
            if line.startswith("Icmp:")
        )
        return int(values[names.index("InDestUnreachs")])

    before = heard()
    segment = struct.pack("!HHI", 40000, 8080, 1)
    with Wire(router, client) as w:
        quoted = ip(client.address, server.address, 6, segment)
        w.send(icmp(router.address, client.address, 3, 4, struct.pack("!HH", 0, 1400) + quoted))
        wait_until(lambda: heard() == before + 1)


# Tunnels


@pytest.mark.parametrize("protocol", [4, 41, 47, 137])
def test_packets_in_packets_do_not_leave(node, pods, protocol):
    """Whoever takes them out would believe the addresses in them."""
    client, victim, server = pods
    inner = datagram(victim.address, server.address, 4000, 5353)
    with Wire(client, node) as w:
        before = spoofed(node)
        w.send(ip(client.address, gateway_of(node, client), protocol, inner))
        wait_until(lambda: spoofed(node) == before + 1)


@pytest.mark.parametrize("port", [4789, 8472, 6081])
def test_overlays_of_nodes_are_no_pods_business(node, pods, port):
    client, _, server = pods
    gateway = gateway_of(node, client)
    with udp(node.netns, gateway, port) as overlay, udp(client.netns, client.address) as sock:
        before = spoofed(node)
        assert never_arrives(sock, b"a frame", (gateway, port), overlay)
        node.kernel.set_peer(gateway, Peer(local=True, enrolled=False, identity=0, node=True))
        try:
            assert never_arrives(sock, b"a frame", (gateway, port), overlay)
        finally:
            node.kernel.remove_peer(gateway)
        assert spoofed(node) == before + 2
        # Between two pods it is theirs.
        with udp(server.netns, server.address, port) as theirs:
            sock.sendto(b"a frame", (server.address, port))
            assert received(theirs)[0] == b"a frame"


# Addresses by which nobody is known


def link_local(pod):
    text = run(pod.netns, "ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link")
    return text.split("inet6 ")[1].split("/")[0]


def by_link(pod, listening, address, port):
    """Whether a datagram of the pod's to an address of its link arrives."""

    def make():
        return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM), socket.if_nametoindex("eth0")

    sock, index = inside(pod.netns, make)
    with sock:
        sock.sendto(b"by the link", (address, port, 0, index))
        found = received(listening, 0.3)
    return found is not None


@pytest.mark.families("ipv6")
def test_link_local_addresses_name_nobody(node, pods, make_pod):
    """A pod that a policy refuses would be plain text from somewhere by them."""
    client, _, server = pods
    stranger = make_pod()
    node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0): True, (client.identity, 0): False}, 3)
    ends = (link_local(server), "ff02::1")
    with udp(server.netns, "::", 5353) as listening:
        before = refused(node, Reason.NO_ADDRESS)
        for end in ends:
            assert not by_link(client, listening, end, 5353)
            # Who is not in the mesh is plain by any address.
            wait_until(lambda end=end: by_link(stranger, listening, end, 5353))
        assert refused(node, Reason.NO_ADDRESS) >= before + 2


@pytest.mark.families("ipv4")
def test_addresses_of_the_other_family_name_nobody(node, pods, make_pod):
    server = pods[2]
    pod = make_pod()
    node.kernel.add_pod(Pod(pod.cookie, (pod.address4,), pod.identity), pod.netns)
    node.kernel.set_policy(server.cookie, {(IDENTITY_PLAIN, 0): True}, 3)
    with udp(server.netns, server.address6, 5353) as listening, Wire(pod, server) as w:
        before = refused(node, Reason.NO_ADDRESS)
        w.send(datagram("fd99::1", server.address6, 4000, 5353), kind=0x86DD)
        assert received(listening, 0.3) is None
        assert refused(node, Reason.NO_ADDRESS) == before + 1


@pytest.mark.families("ipv4")
def test_cookies_of_a_pod_that_joins_are_not_judged(node, make_pod):
    """Nothing is that arrives there, so a handshake that no socket has a state of goes on too."""
    pod = make_pod()
    joining = Pod(pod.cookie, pod.addresses, pod.identity, open=True)
    node.kernel.add_pod(joining, pod.netns, (1, {}, {}))
    with Wire(pod, node) as w:
        segment = struct.pack("!HHIIBBHHH", 8080, 50001, 1, 1, 5 << 4, 0x12, 8192, 0, 0)
        before = refused(node, Reason.POLICY)
        w.send(ip(pod.address, node.gateway4, 6, segment))
        assert refused(node, Reason.POLICY) == before
        pod.enrol()
        w.send(ip(pod.address, node.gateway4, 6, segment))
        wait_until(lambda: refused(node, Reason.POLICY) == before + 1)


# TCP sockets, whose segments the veth asks little of

# Of linux/tcp.h.
TCP_REPAIR = 19
TCP_REPAIR_WINDOW = 29
REPAIR_OFF_WITHOUT_PROBE = -1


def test_repaired_socket_with_a_neighbours_address(node, pods):
    """TCP_REPAIR makes an established connection out of nothing, by any address."""
    client, victim, server = pods
    transparent = (socket.IPPROTO_IPV6, 75) if ":" in server.address else (socket.SOL_IP, 19)

    def repaired():
        sock = socket.socket(socket.AF_INET6 if ":" in server.address else socket.AF_INET)
        sock.setsockopt(*transparent, 1)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        sock.bind((victim.address, 40001))
        sock.connect((server.address, 8080))
        window = struct.pack("=5I", 0, 65535, 65535, 65535, 0)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, window)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)
        return sock

    def dropped(direction):
        """Where it leaves, or only where it arrives."""
        flows = node.kernel.flows().items()
        return sum(f.refused for k, f in flows if k.verdict == Reason.SPOOFED and k.direction is direction)

    before = {direction: dropped(direction) for direction in Direction}
    with inside(client.netns, repaired) as sock:
        sock.sendall(b"forged")
        wait_until(lambda: dropped(Direction.OUTBOUND) > before[Direction.OUTBOUND])
        assert dropped(Direction.INBOUND) == before[Direction.INBOUND]


def test_established_socket_by_another_hardware_address(node, pods):
    client, _, server = pods
    with (
        server.app.listen((server.address, 8080)) as listener,
        client.app.connect((server.address, 8080)) as dialled,
    ):
        accepted, _ = listener.accept()
        with accepted:
            before = spoofed(node)
            there = mac_of(server.netns).hex(":")
            run(client.netns, "ip", "link", "set", "eth0", "address", "02:00:00:00:aa:01")
            # Nothing has to be asked by ARP, which is judged too.
            run(client.netns, "ip", "neigh", "replace", server.address, "lladdr", there, "dev", "eth0")
            dialled.sendall(b"forged")
            wait_until(lambda: spoofed(node) > before)
            accepted.settimeout(0.3)
            with pytest.raises(TimeoutError):
                accepted.recv(6)


def test_syn_of_a_socket_that_may_not_leave(node, pods):
    """Of a program that is not captured, as the agent's own."""
    client = pods[0]
    gateway = gateway_of(node, client)
    node.kernel.set_peer(gateway, Peer(local=False, enrolled=True, identity=77))
    try:
        before = refused(node, Reason.NOT_CAPTURED)
        with inside(
            client.netns, lambda: socket.socket(socket.AF_INET6 if ":" in gateway else socket.AF_INET)
        ) as sock:
            sock.setblocking(False)
            assert sock.connect_ex((gateway, 8080)) != 0
            wait_until(lambda: refused(node, Reason.NOT_CAPTURED) > before)
    finally:
        node.kernel.remove_peer(gateway)
