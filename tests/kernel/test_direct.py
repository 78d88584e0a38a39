"""Connections between two pods of one node, judged in the kernel."""

from __future__ import annotations

import time

import pytest

from agent.kernel import Direction, FlowKey, Reason

pytestmark = pytest.mark.privileged

FAMILIES = ("ipv4", "ipv6", "mapped")


def test_allowed_connection_carries_data_and_is_counted(node, make_pod):
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 8080): True})
    with (
        server.app.listen(("", 8080)) as listener,
        client.app.connect((server.address, 8080)) as dialled,
    ):
        accepted, peer = listener.accept()
        with accepted:
            assert peer == dialled.getsockname()
            assert peer[0] == client.address
            assert dialled.getpeername() == (server.address, 8080)
            dialled.sendall(b"x" * 1000)
            assert accepted.recv(4000) == b"x" * 1000
            accepted.sendall(b"y" * 300)
            assert dialled.recv(4000) == b"y" * 300
            [connection] = [c for c in node.kernel.connections() if c.netns_cookie == server.cookie]
            assert connection.source == client.identity
            assert (connection.sent, connection.received) == (300, 1000)
            flows = node.kernel.flows()
            key = FlowKey(client.identity, server.identity, 8080, Direction.OUTBOUND)
            assert flows[key].totals == (1, 0, 0, 1000, 300)
            assert flows[key._replace(direction=Direction.INBOUND)].totals == (1, 0, 0, 300, 1000)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        flows = node.kernel.flows()
        if all(flows[key._replace(direction=direction)].closed for direction in Direction):
            break
        time.sleep(0.01)
    assert flows[key].totals == (1, 1, 0, 1000, 300)
    assert flows[key._replace(direction=Direction.INBOUND)].totals == (1, 1, 0, 300, 1000)


def test_refused_by_policy(node, make_pod):
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 8080): False, (client.identity, 0): True})
    with server.app.listen(("", 8080)), server.app.listen(("", 8081)):
        with pytest.raises(PermissionError):
            client.app.connect((server.address, 8080))
        client.app.connect((server.address, 8081)).close()
    key = FlowKey(client.identity, server.identity, 8080, Direction.INBOUND)
    assert node.kernel.flows()[key._replace(verdict=Reason.POLICY)].refused == 1
    assert any(
        e.reason is Reason.POLICY and e.netns_cookie == client.cookie for e in node.kernel.read_events()
    )
