"""Restarts under traffic, changes of policy under open connections, and what is left of a pod that is gone."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from agent.kernel import (
    Backend,
    Direction,
    FlowKey,
    Frontend,
    Kernel,
    KernelError,
    MapFullError,
    Peer,
    Pod,
    Reason,
    namespace,
)
from bpf import links, wire
from tests.kernel.mesh import Node, TestPod, new_namespace, run
from tests.requirements import ROOT

pytestmark = pytest.mark.privileged

PORT = 8080


class Echo:
    """A server that answers what it is sent, until it is told to end."""

    def __init__(self, listener):
        self.listener = listener
        self.listener.settimeout(0.1)
        self.stop = threading.Event()
        self.socks = []
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self):
        while not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                sock, _ = self.listener.accept()
                self.socks.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                thread.start()
                self.threads.append(thread)

    def _serve(self, sock):
        with sock, contextlib.suppress(OSError):
            # However long its client is silent: the programs' load takes what it takes.
            sock.settimeout(None)
            while data := sock.recv(65536):
                sock.sendall(data)

    def close(self):
        self.stop.set()
        self.threads[0].join(10)
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
        self.listener.close()


def test_loader_again_under_traffic(node, make_pod):
    """Programs are replaced: no connection breaks, no verdict is wrong, nothing is counted twice or lost."""
    client, stranger, server = make_pod().enrol({}), make_pod().enrol({}), make_pod()
    server.enrol({(client.identity, 0): True})
    echo = Echo(server.app.listen(("0.0.0.0", PORT)))
    kept = client.app.connect((server.address, PORT))
    kept.settimeout(5)
    node.kernel.set_service("10.96.9.1", 80, [Backend(server.address, PORT)])
    stop = threading.Event()
    wrong: list[str] = []
    done = {"allowed": 0, "refused": 0, "bytes": 0}

    def dial():
        while not stop.is_set():
            try:
                with client.app.connect(("10.96.9.1", 80)) as sock:
                    if sock.getpeername() != ("10.96.9.1", 80):
                        wrong.append(f"peer {sock.getpeername()}")
                    sock.sendall(b"q" * 100)
                    left = 100
                    while left:
                        left -= len(sock.recv(100))
                    done["allowed"] += 1
            except OSError as error:
                wrong.append(f"client: {error}")
            try:
                stranger.app.connect((server.address, PORT)).close()
                wrong.append("stranger came in")
            except PermissionError:
                done["refused"] += 1

    def talk():
        while not stop.is_set():
            kept.sendall(b"k" * 1000)
            left = 1000
            while left:
                left -= len(kept.recv(left))
            done["bytes"] += 1000

    threads = [threading.Thread(target=dial), threading.Thread(target=talk)]
    for thread in threads:
        thread.start()
    try:
        programs = set()
        for _ in range(3):
            assert node.load("--replace")["maps_made"] == []
            link = links.open_pin(str(node.pins / f"v{wire.ABI}/link_connect4"))
            programs.add(links.link_info(link).program)
            os.close(link)
            guard = links.open_pin(str(node.pins / f"v{wire.ABI}/netns/{server.cookie}"))
            latest = links.open_pin(str(node.pins / f"v{wire.ABI}/program_sk_lookup"))
            assert links.link_info(guard).program == links.program_id(latest)
            os.close(guard)
            os.close(latest)
        assert len(programs) == 3
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert wrong == []
    assert done["allowed"] > 20
    assert done["refused"] > 20
    # A new agent: another facade over the same pins.
    with Kernel(node.pins, node.netns) as successor:
        assert successor.pods()[server.cookie] == Pod(server.cookie, server.addresses, server.identity)
        assert successor.policy(server.cookie) == (1, {(client.identity, 0): True})
        assert successor.services()[Frontend("10.96.9.1", 80)] == (False, (Backend(server.address, PORT),), 0)
        key = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
        sent = done["allowed"] * 100 + done["bytes"]
        deadline = time.monotonic() + 2
        expected = (done["allowed"] + 1, done["allowed"], 0, sent, sent)
        while successor.flows()[key].totals != expected and time.monotonic() < deadline:
            time.sleep(0.02)
        assert successor.flows()[key].totals == expected
        inbound = successor.flows()[key._replace(direction=Direction.INBOUND)]
        assert inbound.totals == expected
        stranger_key = FlowKey(
            stranger.identity, server.identity, PORT, Direction.INBOUND, verdict=Reason.POLICY
        )
        assert successor.flows()[stranger_key].totals == (0, 0, done["refused"], 0, 0)
    kept.close()
    echo.close()
    node.kernel.remove_service("10.96.9.1", 80)


def test_policy_change_names_what_has_to_end(node, make_pod):
    first, second, server = make_pod().enrol({}), make_pod().enrol({}), make_pod()
    server.enrol({(first.identity, 0): True, (second.identity, 0): True})
    with (
        server.app.listen(("0.0.0.0", PORT)) as listener,
        first.app.connect((server.address, PORT)) as one,
        second.app.connect((server.address, PORT)) as two,
    ):
        accepted = [listener.accept()[0] for _ in range(2)]
        assert [c for c in node.kernel.refused_now() if c.netns_cookie == server.cookie] == []
        node.kernel.set_policy(server.cookie, {(second.identity, 0): True}, 2)
        [connection] = [c for c in node.kernel.refused_now() if c.netns_cookie == server.cookie]
        assert (connection.source, connection.generation) == (first.identity, 1)
        assert connection.client == one.getsockname()
        assert node.kernel.destroy(connection, server.netns)
        with pytest.raises(ConnectionResetError):
            one.recv(1)
        accepted[1].sendall(b"on")
        assert two.recv(2) == b"on"
        for sock in accepted:
            sock.close()


def test_admitted_under_the_old_policy_established_under_the_new(node, make_pod):
    """The race: between the SYN's verdict and the handshake's end the policy changes."""
    client, server = make_pod().enrol({}), make_pod()
    server.enrol({(client.identity, 0): True})
    node.kernel.read_events()
    with server.app.listen(("0.0.0.0", PORT)) as listener:
        # The client's ACKs are lost until the policy has changed.
        run(server.netns, "nft", "add table ip t; add chain ip t c { type filter hook input priority 0; }")
        run(server.netns, "nft", "add rule ip t c tcp flags & (syn | ack) == ack drop")
        sock = client.app.connect((server.address, PORT))
        assert [c for c in node.kernel.connections() if c.netns_cookie == server.cookie] == []
        node.kernel.set_policy(server.cookie, {}, 2)
        run(server.netns, "nft", "flush ruleset")
        sock.sendall(b"late")
        accepted, _ = listener.accept()
        [connection] = [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]
        assert connection.revoked
        assert connection.generation == 2
        assert [c.cookie for c in node.kernel.refused_now()] == [connection.cookie]
        events = [e for e in node.kernel.read_events() if e.destination == server.identity]
        assert [e.reason for e in events] == [Reason.REVOKED]
        assert events[0].client == sock.getsockname()
        node.kernel.destroy(connection, server.netns)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        accepted.close()
        sock.close()


def test_changes_and_sweeps_under_load(node, make_pod):
    """After set_policy and one walk, nothing is open that the policy refuses, however many come and go."""
    clients = [make_pod().enrol({}) for _ in range(2)]
    server = make_pod()
    server.enrol({(client.identity, 0): True for client in clients})
    echo = Echo(server.app.listen(("0.0.0.0", PORT)))
    stop = threading.Event()

    def dial(client):
        mine = []
        while not stop.is_set():
            with contextlib.suppress(OSError):
                mine.append(client.app.connect((server.address, PORT), timeout=1))
            if len(mine) > 20:
                mine.pop(0).close()
        for sock in mine:
            sock.close()

    threads = [threading.Thread(target=dial, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        for generation in range(2, 30):
            allowed = clients[generation % 2]
            node.kernel.set_policy(server.cookie, {(allowed.identity, 0): True}, generation)
            for connection in node.kernel.refused_now():
                if connection.netns_cookie == server.cookie:
                    node.kernel.destroy(connection, server.netns)
            time.sleep(0.02)
            # What was in its handshake meanwhile says so itself.
            for connection in node.kernel.connections():
                if connection.netns_cookie == server.cookie and connection.source != allowed.identity:
                    assert connection.revoked
                    node.kernel.destroy(connection, server.netns)
            left = [c for c in node.kernel.refused_now() if c.netns_cookie == server.cookie]
            assert left == []
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
        echo.close()


def everything_about(node, pod):
    """Elements of any map that speak of a pod: its cookie, its address."""
    cookie, address = struct.pack("=Q", pod.cookie), socket.inet_aton(pod.address)
    found = []
    for name, table in node.kernel._maps.items():
        if name in (
            "sockets",
            "udp_sockets",
            "splice_ends",
            "splice_counters",
            "splice_wakes",
            "splice_programs",
            "events",
            "records",
            "counters",
            "closed",
            "flows",
            "refused",
            "conversations",
        ):
            continue
        for key in list(table.keys()):
            value = b"" if name in ("listeners", "policies") else table.lookup(key) or b""
            if cookie in key or address in key or cookie in value or address in value:
                found.append((name, key))
    return found


def test_nothing_stays_of_a_removed_pod(node, make_pod):
    client, server = make_pod().enrol({}), make_pod()
    server.enrol({(client.identity, 0): True})
    listeners = [
        node.kernel.create_listener(server.netns, server.addresses, port)
        for port in (wire.PORT_OUTBOUND, wire.PORT_OUTBOUND_L7, wire.PORT_HBONE)
    ]
    node.kernel.set_peer("10.88.0.9", Peer(False, True, 55))
    captured = server.app.connect(("10.88.0.9", 1))
    with server.app.listen(("0.0.0.0", PORT)) as listener:
        sock = client.app.connect((server.address, PORT))
        sock.sendall(b"12345")
        accepted, _ = listener.accept()
        assert accepted.recv(5) == b"12345"
        with pytest.raises(ConnectionRefusedError):
            node.worker("host").connect((server.address, 1))  # leaves a trace in `recent`
        assert len(everything_about(node, server)) >= 7
        node.kernel.remove_pod(server.cookie)
        assert everything_about(node, server) == []
        assert not (node.pins / f"v{wire.ABI}/netns/{server.cookie}").exists()
        node.kernel.remove_pod(server.cookie)
        # What is open is counted until it closes.
        sock.close()
        accepted.close()
    key = FlowKey(client.identity, server.identity, PORT, Direction.INBOUND)
    deadline = time.monotonic() + 2
    while node.kernel.flows()[key].closed != 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert node.kernel.flows()[key].totals == (1, 1, 0, 0, 5)
    node.kernel.forget_flows([key])
    assert key not in node.kernel.flows()
    captured.close()
    for fd in listeners:
        os.close(fd)
    node.kernel.remove_peer("10.88.0.9")


def with_veth(node, name, address):
    """A namespace with a veth to the node's, and nobody in it."""
    netns = new_namespace()
    subprocess.run(
        [
            *("nsenter", f"--net=/proc/self/fd/{node.netns}", "ip", "link", "add", name),
            *("type", "veth", "peer", "name", "eth0", "netns", f"/proc/self/fd/{netns}"),
        ],
        pass_fds=(netns, node.netns),
        check=True,
        timeout=10,
    )
    run(netns, "sh", "-c", f"ip addr add {address}/16 dev eth0 && ip link set eth0 up && ip link set lo up")
    return netns


def test_nothing_of_ours_keeps_a_namespace_alive(node):
    """Its own interface tells: when the last reference goes, the peer in the node's namespace vanishes."""
    netns = with_veth(node, "mkgone", "10.77.200.1")
    cookie = namespace.cookie(netns)
    node.kernel.add_pod(Pod(cookie, ("10.77.200.1",), 9000), netns)
    node.kernel.set_policy(cookie, {}, 1)
    fds = [node.kernel.create_listener(netns, ("10.77.200.1",), wire.PORT_HBONE)]
    fds += node.kernel.create_outbound(netns, 3) + node.kernel.create_delivery(netns, 3)
    assert node.kernel.missing(cookie, netns) == []
    node.kernel.connections()
    node.kernel.flows()
    for fd in fds:  # the proxies' part
        os.close(fd)
    node.kernel.remove_pod(cookie)
    assert "mkgone" in run(node.netns, "ip", "-o", "link")
    os.close(netns)
    gc.collect()
    deadline = time.monotonic() + 5
    while "mkgone" in run(node.netns, "ip", "-o", "link") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "mkgone" not in run(node.netns, "ip", "-o", "link")


def test_pod_can_be_removed_after_its_namespace(node):
    netns = with_veth(node, "mkended", "10.77.200.2")
    cookie = namespace.cookie(netns)
    node.kernel.add_pod(Pod(cookie, ("10.77.200.2",), 9001), netns)
    pins = node.pins / f"v{wire.ABI}/veth"
    assert len(list(pins.glob(f"{cookie}_*"))) == 2
    os.close(netns)
    time.sleep(0.3)
    node.load()  # drops links of namespaces that are gone
    assert list(pins.glob(f"{cookie}_*")) == []
    node.kernel.remove_pod(cookie)
    assert cookie not in node.kernel.pods()
    interfaces = node.kernel._maps["interfaces"].items()
    assert cookie not in [wire.Interface.unpack(value).netns for _, value in interfaces]


def test_missing_says_what_is_missing(node, make_pod):
    pod = make_pod()
    assert node.kernel.missing(pod.cookie, pod.netns) == ["the pod is not in the kernel's tables"]
    pod.enrol()
    assert node.kernel.missing(pod.cookie, pod.netns) == ["no policy"]
    node.kernel.set_policy(pod.cookie, {}, 1)
    assert node.kernel.missing(pod.cookie, pod.netns) == []
    run(pod.netns, "ip", "rule", "del", "priority", str(namespace.DELIVERY_PRIORITY))
    run(pod.netns, "sh", "-c", "echo 0 >/proc/sys/net/ipv4/tcp_fwmark_accept")
    (node.pins / f"v{wire.ABI}/netns/{pod.cookie}").unlink()
    found = node.kernel.missing(pod.cookie, pod.netns)
    assert len(found) == 3
    assert "tcp_fwmark_accept" in " ".join(found)
    pod.enrol()  # again: whole
    assert node.kernel.missing(pod.cookie, pod.netns) == []


def test_wrong_namespace_is_not_enrolled(node, make_pod):
    pod = make_pod()
    with pytest.raises(KernelError, match="cookie"):
        node.kernel.add_pod(Pod(pod.cookie + 1, pod.addresses, pod.identity), pod.netns)
    assert node.kernel.pods().get(pod.cookie + 1) is None
    with pytest.raises(ValueError, match="identity 1"):
        node.kernel.add_pod(Pod(pod.cookie, pod.addresses, 1), pod.netns)
    with pytest.raises(ValueError, match=r"10\.77"):
        node.kernel.add_pod(Pod(pod.cookie, ("10.77",), pod.identity), pod.netns)
    assert pod.cookie not in node.kernel.pods()
    assert "fwmark" not in run(pod.netns, "ip", "rule")
    with pytest.raises(KernelError, match="no such pod"):
        node.kernel.set_policy(pod.cookie, {}, 1)


def test_a_pod_without_room_leaves_nothing(tmp_path):
    node = Node(tmp_path, sizes=("pods=1",))
    pods = [TestPod(node, f"10.77.0.{10 + index}", 20 + index) for index in range(2)]
    try:
        pods[0].enrol({})
        with pytest.raises(MapFullError, match=r"pod \d+ \(10.77.0.11, fd77::b\): map pods: update: no room"):
            pods[1].enrol({})
        assert everything_about(node, pods[1]) == []
        assert node.kernel.missing(pods[1].cookie, pods[1].netns) == ["the pod is not in the kernel's tables"]
        assert "fwmark" not in run(pods[1].netns, "ip", "rule")
        assert run(pods[1].netns, "cat", "/proc/sys/net/ipv4/tcp_fwmark_accept") == "0\n"
        assert [path.name for path in (node.pins / f"v{wire.ABI}" / "netns").iterdir()] == [
            str(pods[0].cookie)
        ]
        node.kernel.remove_pod(pods[0].cookie)
        pods[1].enrol({})
    finally:
        for pod in pods:
            pod.close()
        node.close()


def test_a_load_that_fails_changes_nothing(node, make_pod, tmp_path):
    """No headers, so nothing compiles; what is in force goes on to be."""
    before = in_force(node)
    assert len(before) == 10
    done = load_without_headers(node, tmp_path, "--replace")
    assert done.returncode == 1
    assert "bpf.loader: the programs do not compile" in done.stderr
    assert in_force(node) == before
    client, server = make_pod().enrol({}), make_pod().enrol({})
    with server.app.listen(("0.0.0.0", PORT)), pytest.raises(PermissionError):
        client.app.connect((server.address, PORT))


def in_force(node) -> dict[str, int]:
    """The programs by link, at the node's cgroup."""
    found = {}
    for path in (node.pins / f"v{wire.ABI}").glob("link_*"):
        link = links.open_pin(str(path))
        found[path.name] = links.link_info(link).program
        os.close(link)
    return found


def load_without_headers(node, tmp_path, *options: str) -> subprocess.CompletedProcess[str]:
    """A load that fails if it has to compile anything."""
    command = [sys.executable, "-m", "bpf.loader", "--pins", str(node.pins), "--cgroup", str(node.root)]
    environment = {**os.environ, "BCC_KERNEL_SOURCE": str(tmp_path / "nowhere")}
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=180, cwd=ROOT, env=environment
    )


def test_programs_that_are_in_force_are_not_compiled_again(node, make_pod, tmp_path):
    """An agent that is restarted is there at once; whatever is not as it was loaded is loaded again."""
    client, server = make_pod().enrol({}), make_pod()
    server.enrol({(client.identity, 0): True})
    node.load()
    before = in_force(node)
    done = load_without_headers(node, tmp_path)
    assert done.returncode == 0, done.stderr
    assert in_force(node) == before
    folder = node.pins / f"v{wire.ABI}"
    (folder / "link_connect4").unlink()
    assert load_without_headers(node, tmp_path).returncode == 1
    node.load()
    after = in_force(node)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    # A pod whose guard is not the program that was loaded, but an older one.
    older = links.open_pin(str(folder / "program_sk_lookup"))
    node.load("--replace")
    guard = links.open_pin(str(folder / f"netns/{server.cookie}"))
    links.replace(guard, older)
    os.close(guard)
    os.close(older)
    assert load_without_headers(node, tmp_path).returncode == 1
    node.load()
    with server.app.listen(("0.0.0.0", PORT)), client.app.connect((server.address, PORT)):
        pass
