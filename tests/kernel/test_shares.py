"""One pod's share of the maps that all write into: who uses its own up is refused, the others go on."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time

import pytest

from agent.kernel import Peer
from bpf import wire
from tests.kernel.mesh import Node, TestPod, run

pytestmark = pytest.mark.privileged

PORT = 8080
SHARE = 16  # the least, whatever the size


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    node = Node(tmp_path_factory.mktemp("shares"), sizes=("connecting=64", "captured=64"))
    pods = [TestPod(node, f"10.77.0.{10 + index}", 20 + index) for index in range(3)]
    yield node, pods
    for pod in pods:
        pod.close()
    node.close()


def share(node, pod) -> wire.Share:
    return wire.Share.unpack(node.kernel._maps["shares"].lookup(struct.pack("=Q", pod.cookie)))


def until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_handshakes_that_nobody_ends_fill_their_own_share_only(small):
    node, (greedy, other, server) = small
    for pod in (greedy, other):
        pod.enrol({})
    server.enrol({(greedy.identity, 0): True, (other.identity, 0): True})
    run(server.netns, "nft", "add table ip t; add chain ip t c { type filter hook input priority 0; }")
    run(server.netns, "nft", "add rule ip t c tcp dport 9999 drop")
    with contextlib.ExitStack() as stack:
        for _ in range(SHARE + 4):
            sock = greedy.app.connect((server.address, 9999), nonblocking=True)
            stack.enter_context(sock)
        assert share(node, greedy).connecting == SHARE
        assert node.kernel.pressure()["connecting"].used == SHARE
        assert node.kernel.pressure()["connecting"].over_share == 4
        listener = stack.enter_context(server.app.listen(("", PORT)))
        # Unnamed it is plain text from an address of the mesh.
        with pytest.raises(OSError) as refused:
            greedy.app.connect((server.address, PORT), timeout=1)
        assert refused.value.errno in (errno.ECONNREFUSED, errno.ETIMEDOUT)
        stack.enter_context(other.app.connect((server.address, PORT)))
        listener.accept()[0].close()
    until(lambda: share(node, greedy).connecting == 0)
    with server.app.listen(("", PORT)), greedy.app.connect((server.address, PORT)):
        pass
    run(server.netns, "nft", "flush ruleset")
    until(lambda: share(node, greedy) == share(node, other) == wire.Share(0, 0))


def test_captured_connections_fill_their_own_share_only(small):
    node, (greedy, other, _) = small
    for pod in (greedy, other):
        pod.enrol({})
    node.kernel.set_peer("10.88.0.9", Peer(False, True, 55))
    with contextlib.ExitStack() as stack:
        for pod in (greedy, other):
            fd = node.kernel.create_listener(pod.netns, pod.addresses, wire.PORT_OUTBOUND)
            stack.enter_context(socket.socket(fileno=fd))
        for _ in range(SHARE):
            stack.enter_context(greedy.app.connect(("10.88.0.9", 1)))
        assert share(node, greedy).captured == SHARE
        with pytest.raises(ConnectionRefusedError):
            greedy.app.connect(("10.88.0.9", 1))
        assert node.kernel.pressure()["captured"].over_share == 1
        stack.enter_context(other.app.connect(("10.88.0.9", 1)))
        assert share(node, other).captured == 1
    until(lambda: share(node, greedy).captured == share(node, other).captured == 0)
    node.kernel.remove_peer("10.88.0.9")


def test_dials_that_went_with_the_pod_that_they_were_to_are_counted_again(small):
    node, (greedy, _, server) = small
    greedy.enrol({})
    server.enrol({(greedy.identity, 0): True})
    run(server.netns, "nft", "add table ip t; add chain ip t c { type filter hook input priority 0; }")
    run(server.netns, "nft", "add rule ip t c tcp dport 9999 drop")
    with greedy.app.connect((server.address, 9999), nonblocking=True):
        assert share(node, greedy).connecting == 1
        node.kernel.remove_pod(server.cookie)
    run(server.netns, "nft", "flush ruleset")
    assert share(node, greedy).connecting == 1
    assert node.kernel.count_shares() == 1
    assert share(node, greedy) == wire.Share(0, 0)


def test_what_was_removed_by_hand_is_counted_again(small):
    node, (greedy, *_) = small
    greedy.enrol({})
    node.kernel._maps["shares"].update(struct.pack("=Q", greedy.cookie), wire.Share(SHARE, 3).pack())
    assert node.kernel.count_shares() == 1
    assert share(node, greedy) == wire.Share(0, 0)
    assert node.kernel.count_shares() == 0
