"""Another size of a map at the next load: what it holds is carried over, under traffic that goes on."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from agent.kernel import Backend, Direction, FlowKey, Kernel, Peer
from bpf import resize, schema, wire
from bpf.limits import LIMITS
from bpf.maps import Map
from bpf.resize import NOT_IN_FORCE
from tests.kernel.mesh import Node, TestPod
from tests.kernel.test_lifecycle import Echo
from tests.requirements import ROOT

pytestmark = pytest.mark.privileged

PORT = 8080
SIZED = [spec for spec in schema.MAPS if spec.name in LIMITS and spec.name not in NOT_IN_FORCE]
LARGER = tuple(f"{spec.name}={spec.max_entries * 2}" for spec in SIZED)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    node = Node(tmp_path_factory.mktemp("resize"))
    yield node
    node.close()


def contents(node):
    """Of every map that only the agent writes, by value; inner maps by theirs."""
    found = {}
    for name in ("roles", "pods", "peers", "services", "backends", "members"):
        with Map.open(str(node.pins / f"v{wire.ABI}" / name)) as table:
            found[name] = sorted(table.items())
    return found


def refusals(kernel, key: FlowKey) -> int:
    """By whatever reason."""
    return sum(f.refused for k, f in kernel.flows().items() if k[:4] == key[:4])


def sizes(node) -> dict[str, int]:
    found = {}
    for spec in SIZED:
        with Map.open(str(node.pins / f"v{wire.ABI}" / spec.name)) as table:
            found[spec.name] = table.info.max_entries
    return found


def test_every_map_gets_another_size_under_traffic(own):
    node = own
    client, stranger, server, captured = (
        TestPod(node, f"10.77.0.{10 + index}", 20 + index) for index in range(4)
    )
    pods = (client, stranger, server, captured)
    for pod in (client, stranger, captured):
        pod.enrol({})
    server.enrol({(client.identity, 0): True})
    echo = Echo(server.app.listen(("0.0.0.0", PORT)))
    node.kernel.set_service("10.96.9.1", 80, [Backend(server.address, PORT)], affinity=60)
    node.kernel.set_peer("10.88.0.9", Peer(False, True, 55))
    listener = socket.socket(
        fileno=node.kernel.create_listener(captured.netns, captured.addresses, wire.PORT_OUTBOUND)
    )
    listener.settimeout(5)
    reader = [Map(node.kernel.captured_fd())]  # as a proxy has it, until it gets another from a new agent
    kept = client.app.connect((server.address, PORT))
    stop = threading.Event()
    wrong: list[str] = []
    done = {"allowed": 0, "refused": 0, "captured": 0}

    def dial():
        while not stop.is_set():
            try:
                with client.app.connect(("10.96.9.1", 80)) as sock:
                    sock.sendall(b"q" * 100)
                    left = 100
                    while left:
                        left -= len(sock.recv(100))
                    done["allowed"] += 1
                kept.sendall(b"still")
                if kept.recv(5) != b"still":
                    wrong.append("the open connection lost something")
            except OSError as error:
                wrong.append(f"client: {error}")
            try:
                stranger.app.connect((server.address, PORT)).close()
                wrong.append("stranger came in")
            except PermissionError:
                done["refused"] += 1

    def capture():
        while not stop.is_set():
            try:
                with captured.app.connect(("10.88.0.9", 7)) as sock:
                    accepted, _ = listener.accept()
                    with accepted:
                        address, port = sock.getsockname()[:2]
                        key = wire.CapturedKey(captured.cookie, address, port, wire.PORT_OUTBOUND)
                        value = reader[0].lookup(key.pack())
                        if value is None or wire.Captured.unpack(value).destination_address != "10.88.0.9":
                            wrong.append("captured, and a proxy does not see where to")
                done["captured"] += 1
            except OSError as error:
                wrong.append(f"captured: {error}")

    def new_agent():
        with contextlib.suppress(OSError):
            node.kernel.close()
        node.kernel = Kernel(node.pins)
        reader[0] = Map(node.kernel.captured_fd())

    threads = [threading.Thread(target=dial, daemon=True), threading.Thread(target=capture, daemon=True)]
    for thread in threads:
        thread.start()
    try:
        before = contents(node)
        count = done["allowed"]
        result = node.load(*(part for size in LARGER for part in ("--size", size)))
        assert set(result["maps_resized"]) == {spec.name for spec in SIZED}
        assert sizes(node) == {spec.name: spec.max_entries * 2 for spec in SIZED}
        assert contents(node) == before
        assert done["allowed"] > count
        new_agent()
        # The next load is one without the old maps, and one of other sizes goes the same way back.
        assert node.load(*(part for size in LARGER for part in ("--size", size)))["maps_resized"] == {}
        new_agent()
        assert set(node.load()["maps_resized"]) == {spec.name for spec in SIZED}
        assert sizes(node) == {spec.name: spec.max_entries for spec in SIZED}
        assert contents(node) == before
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert wrong == []
    assert min(done.values()) > 20
    kept.close()
    with Kernel(node.pins) as successor:
        assert successor.policy(server.cookie) == (1, {(client.identity, 0): True})
        assert successor.has_listener(captured.address, wire.PORT_OUTBOUND)
        key = FlowKey(client.identity, server.identity, PORT, Direction.OUTBOUND)
        sent = done["allowed"] * 105
        expected = (done["allowed"] + 1, done["allowed"] + 1, 0, sent, sent)
        deadline = time.monotonic() + 2
        while successor.flows()[key][:5] != expected and time.monotonic() < deadline:
            time.sleep(0.02)
        assert successor.flows()[key][:5] == expected
        refused = FlowKey(stranger.identity, server.identity, PORT, Direction.INBOUND)
        assert refusals(successor, refused) == done["refused"]
        # The last ones' ends may take a moment.
        deadline = time.monotonic() + 10
        while left := {n: p.used for n in ("connecting", "captured") if (p := successor.pressure()[n]).used}:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
    echo.close()
    listener.close()
    new_agent()
    for pod in pods:
        pod.close()


@pytest.mark.parametrize("name", ["conversations", "talks"])
def test_what_begins_meanwhile_is_carried_too(name):
    """Else the answer to a datagram that went out before the programs were replaced would be one that begins something."""
    spec = next(spec for spec in schema.MAPS if spec.name == name)
    with contextlib.ExitStack() as stack:
        before, now = (
            stack.enter_context(
                Map.create(spec.type, name, spec.key_size, spec.value_size, size, flags=spec.flags)
            )
            for size in (1024, 2048)
        )
        elements = [(number.to_bytes(spec.key_size, "little"), bytes(spec.value_size)) for number in (1, 2)]
        before.update(*elements[0])
        resize.begin(name, before, now)
        before.update(*elements[1])
        resize.finish({name: resize.Resized(before, now)}, {})
        assert sorted(now.items()) == sorted(elements)


def test_what_has_no_room_changes_nothing(own):
    node = own
    for host in range(1, 40):
        node.kernel.set_peer(f"10.88.1.{host}", Peer(False, True, 55))
    before, held = sizes(node), contents(node)
    command = [sys.executable, "-m", "bpf.loader", "--pins", str(node.pins), "--cgroup", str(node.root)]
    command += ["--size", "services=500", "--size", "peers=20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.returncode == 1
    assert re.search(r"map peers: the 4\d elements that it holds have no room in 20", done.stderr)
    assert sizes(node) == before
    assert contents(node) == held
    # What is in force reads the maps that are pinned.
    assert node.load("--replace")["maps_resized"] == {}
    key = struct.pack("=Q", 1)
    assert node.kernel._maps["pods"].lookup(key) is None
