"""Endpoints that are not there any more when they are dialled: the client hears of it, and its next connection goes elsewhere."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable, Iterator

import pytest

from agent.kernel import Backend
from tests.kernel.mesh import Node, TestPod

pytestmark = pytest.mark.privileged

FAMILIES = ("ipv4", "ipv6", "mapped")
VIPS = {"ipv4": "10.96.79.1", "ipv6": "fd96::79:1", "mapped": "10.96.79.1"}
PORT = 8080


@pytest.fixture
def vip(family: str) -> str:
    return VIPS[family]


@pytest.fixture
def client(make_pod: Callable[..., TestPod]) -> TestPod:
    return make_pod().enrol({})


@pytest.fixture
def server(make_pod: Callable[..., TestPod], client: TestPod) -> TestPod:
    return make_pod().enrol({(client.identity, 0): True})


@pytest.fixture(autouse=True)
def no_service(node: Node, vip: str) -> Iterator[None]:
    yield
    node.kernel.remove_service(vip, 80)


def nothing_is_left(node: Node, client: TestPod) -> None:
    assert node.kernel.pressure()["connecting"].used == 0
    assert node.kernel.pressure()["captured"].used == 0
    assert not [c for c in node.kernel.connections() if c.source == client.identity]


@pytest.mark.parametrize("nonblocking", [False, True])
def test_nobody_listens_there(node, client, server, vip, nonblocking):
    """Its RST is the client's error, also of a connect() that does not wait; nothing of the attempt stays."""
    node.kernel.set_service(vip, 80, [Backend(server.address, PORT)])
    for _ in range(3):
        if not nonblocking:
            with pytest.raises(ConnectionRefusedError):
                client.app.connect((vip, 80))
            continue
        with client.app.connect((vip, 80), nonblocking=True) as sock:
            assert select.select([], [sock], [], 5)[1]
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
            with pytest.raises(OSError) as caught:
                sock.getpeername()
            assert caught.value.errno == errno.ENOTCONN
    nothing_is_left(node, client)
    with (
        server.app.listen(("", PORT)),
        client.app.connect((vip, 80), nonblocking=nonblocking) as sock,
    ):
        assert select.select([], [sock], [], 5)[1]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert sock.getpeername() == (vip, 80)


def test_one_that_has_vanished(node, client, server, make_pod, vip):
    """Between the choice and the SYN its pod is gone: an error or a wait, as without a mesh, and never another pod."""
    gone = make_pod()
    node.kernel.set_service(vip, 80, [Backend(gone.address, PORT)])
    gone.close()
    with server.app.listen(("", PORT)) as listener:
        with pytest.raises(OSError) as caught:
            client.app.connect((vip, 80), timeout=0.3)
        # A namespace that is being taken down may still answer.
        told = (errno.EHOSTUNREACH, errno.ECONNREFUSED)
        assert isinstance(caught.value, TimeoutError) or caught.value.errno in told
        with client.app.connect((vip, 80), nonblocking=True) as waiting:
            node.kernel.set_service(vip, 80, [Backend(server.address, PORT)])
            with client.app.connect((vip, 80)) as sock:
                assert sock.getpeername() == (vip, 80)
                assert listener.accept()[1] == sock.getsockname()
            assert select.select([], [waiting], [], 0)[1] == [] or waiting.getsockopt(
                socket.SOL_SOCKET, socket.SO_ERROR
            )
    nothing = [c for c in node.kernel.connections() if c.server[0] == gone.address]
    assert nothing == []


def test_one_that_goes_away_while_connected(node, client, server, make_pod, vip):
    """What is open stays with its endpoint until that ends it; only new connections go elsewhere."""
    other = make_pod().enrol({(client.identity, 0): True})
    node.kernel.set_service(vip, 80, [Backend(server.address, PORT)])
    with server.app.listen(("", PORT)) as listener, client.app.connect((vip, 80)) as sock:
        accepted, _ = listener.accept()
        node.kernel.set_service(vip, 80, [Backend(other.address, PORT)])
        with accepted, other.app.listen(("", PORT)) as its:
            accepted.sendall(b"still here")
            sock.settimeout(5)
            assert sock.recv(100) == b"still here"
            assert sock.getpeername() == (vip, 80)
            with client.app.connect((vip, 80)) as second:
                assert its.accept()[1] == second.getsockname()
        assert sock.recv(100) == b""
