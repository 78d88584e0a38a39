"""Another version of the programs takes the place of the one in force, and gives it back."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.kernel import Backend, Kernel, Peer
from bpf import links, wire
from tests.kernel.mesh import Node, TestPod
from tests.kernel.test_lifecycle import Echo
from tests.requirements import ROOT, require_root

pytestmark = pytest.mark.privileged

PORT = 8080
NEXT = wire.ABI + 1
HOOKS = {
    "link_sock_ops": links.CGROUP_SOCK_OPS,
    "link_sock_create": links.CGROUP_INET_SOCK_CREATE,
    "link_connect4": links.CGROUP_INET4_CONNECT,
    "link_connect6": links.CGROUP_INET6_CONNECT,
    "link_getpeername4": links.CGROUP_INET4_GETPEERNAME,
    "link_getpeername6": links.CGROUP_INET6_GETPEERNAME,
    "link_sendmsg4": links.CGROUP_UDP4_SENDMSG,
    "link_sendmsg6": links.CGROUP_UDP6_SENDMSG,
    "link_recvmsg4": links.CGROUP_UDP4_RECVMSG,
    "link_recvmsg6": links.CGROUP_UDP6_RECVMSG,
}


@pytest.fixture
def own_node(tmp_path: Path) -> Iterator[Node]:
    """One of its own: others count on the version of its pins."""
    require_root()
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """A tree with the next version of the programs."""
    shutil.copytree(ROOT / "bpf", tmp_path / "later/bpf", ignore=shutil.ignore_patterns("__pycache__"))
    for name, line in (("wire.h", "#define MYCEL_ABI {}"), ("wire.py", "ABI = {}")):
        edit(tmp_path / "later/bpf" / name, line.format(wire.ABI), line.format(NEXT))
    return tmp_path / "later"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new))


def load(node: Node, tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bpf.loader", "--pins", str(node.pins), "--cgroup", str(node.root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tree)


def attached(target: int, kind: int) -> int:
    """How many programs are attached to a cgroup or network namespace at a hook."""
    lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    count = ctypes.c_uint32(8)
    numbers = (ctypes.c_uint32 * 8)()
    assert lib.bpf_prog_query(target, kind, 0, None, numbers, ctypes.byref(count)) == 0, ctypes.get_errno()
    return count.value


def assert_one_at_each_hook(node: Node, *pods: TestPod) -> None:
    cgroup = os.open(node.root, os.O_RDONLY)
    try:
        assert {name: attached(cgroup, kind) for name, kind in HOOKS.items()} == dict.fromkeys(HOOKS, 1)
    finally:
        os.close(cgroup)
    for pod in pods:
        assert attached(pod.netns, links.SK_LOOKUP) == 1


def in_force(node: Node, version: int) -> dict[str, int]:
    found = {}
    for path in (node.pins / f"v{version}").glob("link_*"):
        link = links.open_pin(str(path))
        found[path.name] = links.link_info(link).program
        os.close(link)
    return found


def pods_of(node: Node) -> tuple[TestPod, TestPod, TestPod]:
    client, stranger, server = (TestPod(node, f"10.77.0.{10 + index}", 20 + index) for index in range(3))
    client.enrol({})
    stranger.enrol({})
    server.enrol({(client.identity, 0): True})
    return client, stranger, server


def source_of(kernel: Kernel, client: tuple[str, int]) -> int:
    """Of an open connection: a walk may leave some out while others close."""
    deadline = time.monotonic() + 5
    while True:
        for connection in kernel.connections():
            if connection.client == client:
                return connection.source
        assert time.monotonic() < deadline, f"no connection of {client}"


def test_another_version_takes_over_under_traffic(own_node, later, monkeypatch):
    """There and back: no verdict is wrong, and what is open is known to both."""
    node = own_node
    client, stranger, server = pods_of(node)
    node.kernel.set_service("10.96.9.1", 80, [Backend(server.address, PORT)])
    echo = Echo(server.app.listen(("0.0.0.0", PORT)))
    kept = client.app.connect(("10.96.9.1", 80))
    kept.settimeout(5)
    stop = threading.Event()
    wrong: list[str] = []
    done = {"allowed": 0, "refused": 0}

    def dial() -> None:
        while not stop.is_set():
            try:
                with client.app.connect(("10.96.9.1", 80)) as sock:
                    sock.sendall(b"q")
                    if sock.recv(1) != b"q" or sock.getpeername() != ("10.96.9.1", 80):
                        wrong.append(f"peer {sock.getpeername()}")
                    done["allowed"] += 1
            except OSError as error:
                wrong.append(f"client: {error}")
            with contextlib.suppress(PermissionError):
                stranger.app.connect((server.address, PORT)).close()
                wrong.append("stranger came in")
            done["refused"] += 1

    thread = threading.Thread(target=dial)
    thread.start()
    try:
        before = in_force(node, wire.ABI)
        for tree, version, old in ((later, NEXT, wire.ABI), (ROOT, wire.ABI, NEXT)):
            told = load(node, tree)
            assert told.returncode == 0, told.stderr
            result = json.loads(told.stdout)
            assert (result["maps_made"], result["versions_replaced"]) == ([], [f"v{old}"])
            assert result["namespaces"] == 3
            assert os.listdir(node.pins) == [f"v{version}"]
            assert_one_at_each_hook(node, client, stranger, server)
            after = in_force(node, version)
            assert after.keys() == before.keys() == HOOKS.keys()
            assert not set(after.values()) & set(before.values())
            before = after
            monkeypatch.setattr(wire, "ABI", version)
            with Kernel(node.pins, node.netns) as successor:
                assert successor.pods().keys() == node.kernel.pods().keys()
                assert successor.missing(server.cookie, server.netns) == []
                assert source_of(successor, kept.getsockname()) == client.identity
            # Again: the seal is good.
            assert json.loads(load(node, tree).stdout)["programs_replaced"] == []
        stop.set()
        thread.join(10)
        assert wrong == []
        assert done["allowed"] > 20
        assert done["refused"] > 20
        assert kept.getpeername() == ("10.96.9.1", 80)
        kept.sendall(b"kept")
        assert kept.recv(4) == b"kept"
        node.kernel.set_policy(server.cookie, {}, 2)
        assert kept.getsockname() in [c.client for c in node.kernel.refused_now()]
    finally:
        stop.set()
        thread.join(10)
        kept.close()
        echo.close()
    for pod in (client, stranger, server):
        pod.close()


def test_what_cannot_be_carried_over_is_refused(own_node, later):
    """Elements of a map that verdicts hang on have another form: the old programs stay, and a load of theirs is as ever."""
    node = own_node
    client, stranger, server = pods_of(node)
    before = in_force(node, wire.ABI)
    peers = "wire.Peer.LAYOUT.size, 262144, maps.F_NO_PREALLOC"
    edit(later / "bpf/schema.py", f"{peers}, 2", f"{peers}, 3")
    told = load(node, later)
    assert told.returncode == 1
    assert "peers: its elements have another form than peers.3" in told.stderr
    assert in_force(node, wire.ABI) == before
    with server.app.listen(("0.0.0.0", PORT)):
        client.app.connect((server.address, PORT)).close()
        with pytest.raises(PermissionError):
            stranger.app.connect((server.address, PORT))
    assert_one_at_each_hook(node, client, stranger, server)
    assert node.load()["versions_replaced"] == [f"v{NEXT}"]
    assert os.listdir(node.pins) == [f"v{wire.ABI}"]
    for pod in (client, stranger, server):
        pod.close()


def test_what_only_remembers_begins_anew(own_node, later, monkeypatch):
    node = own_node
    client, _, server = pods = pods_of(node)
    with server.app.listen(("0.0.0.0", PORT)):
        client.app.connect((server.address, PORT)).close()
    node.kernel.set_peer("10.88.0.9", Peer(False, True, 55))
    edit(
        later / "bpf/schema.py",
        "wire.Flow.LAYOUT.size, 131072, maps.F_NO_PREALLOC, 2",
        "wire.Flow.LAYOUT.size, 131072, 1, 3",
    )
    # What an attempt left that did not come to its end is not taken for the newest.
    shutil.copytree(later, later.with_name("broken"))
    (later.with_name("broken") / "bpf/connect.c").write_text("no C")
    assert load(node, later.with_name("broken")).returncode == 1
    assert (node.pins / f"v{NEXT}/peers").exists()
    told = load(node, later)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["maps_made"] == ["flows"]
    assert os.listdir(node.pins) == [f"v{NEXT}"]
    monkeypatch.setattr(wire, "ABI", NEXT)
    with Kernel(node.pins, node.netns) as successor:
        assert successor.flows() == {}
        assert successor.peers()["10.88.0.9"].identity == 55
    for pod in pods:
        pod.close()


def test_two_that_are_attached_become_one(own_node, later):
    """As an earlier version left it that knew nothing of others."""
    node = own_node
    pods = pods_of(node)
    edit(later / "bpf/succession.py", "    return sorted(found,", "    return [] and sorted(found,")
    assert load(node, later).returncode == 0
    cgroup = os.open(node.root, os.O_RDONLY)
    assert attached(cgroup, links.CGROUP_INET4_CONNECT) == 2
    os.close(cgroup)
    assert node.load()["versions_replaced"] == [f"v{NEXT}"]
    assert_one_at_each_hook(node, *pods)
    assert os.listdir(node.pins) == [f"v{wire.ABI}"]
    for pod in pods:
        pod.close()
