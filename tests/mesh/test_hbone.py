"""Between nodes: nothing but mutual TLS on the wire, from the first byte of the first connection."""

from __future__ import annotations

import secrets
import signal
import time

import pytest

from lab import Lab, Pod, Talker, Traffic
from tests.mesh.helpers import ECHO, echo_server, echoes, greeting

pytestmark = pytest.mark.privileged

NAMESPACE = "hbone"
PLAIN = "hbone-off"


@pytest.fixture(scope="module", autouse=True)
def world(lab: Lab) -> None:
    lab.namespace(NAMESPACE)
    lab.namespace(PLAIN, mesh=False)


@pytest.fixture(scope="module")
def server(lab: Lab, world: None) -> Pod:
    return echo_server(lab, "server", node="node2", namespace=NAMESPACE)


@pytest.fixture(scope="module")
def client(lab: Lab, world: None) -> Pod:
    return lab.pod("client", node="node1", namespace=NAMESPACE)


def send_marker(client: Pod, server: Pod, marker: str) -> None:
    with Talker(client) as talker:
        assert talker.open(server.address, ECHO).ok
        assert talker("read")["text"]
        for _ in range(50):
            talker("send", text=marker * 20)
            received = 0
            while received < len(marker) * 20:
                received += len(talker("read")["text"])


def test_no_plain_byte_between_nodes_and_the_same_capture_finds_it_without_the_mesh(
    lab: Lab, client: Pod, server: Pod
):
    marker = secrets.token_hex(16)
    with lab.capture() as capture:
        send_marker(client, server, marker)
    assert capture.holds(marker.encode()) == 0
    ports = {
        destination_port
        for source, _, destination, destination_port, payload in capture.segments()
        if payload and (source, destination) == (client.address, server.address)
    }
    assert ports == {15008}

    plain_server = echo_server(lab, "plain-server", node="node2", namespace=PLAIN)
    plain_client = lab.pod("plain-client", node="node1", namespace=PLAIN)
    with lab.capture() as capture:
        send_marker(plain_client, plain_server, marker)
    assert capture.holds(marker.encode()) > 50
    plain_server.delete()
    plain_client.delete()


def test_it_is_tls_1_3_with_a_post_quantum_exchange(lab: Lab, server: Pod):
    with lab.capture() as capture:
        # A client of its own, so that its node proxy has no connection to reuse.
        client = lab.pod("fresh", node="node1", namespace=NAMESPACE)
        assert greeting(client, server.address, ECHO)["peer"][0] == client.address
    payloads = [
        payload
        for source, _, destination, port, payload in capture.segments()
        if payload and port == 15008 and (source, destination) == (client.address, server.address)
    ]
    hello = payloads[0] + payloads[1]
    assert hello[0] == 0x16  # handshake record
    assert hello[5] == 0x01  # ClientHello
    assert b"\x00\x2b" in hello  # supported_versions
    assert b"\x03\x04" in hello  # TLS 1.3
    assert b"\x11\xec" in hello  # X25519MLKEM768
    assert b"\x02h2" in hello  # ALPN
    client.delete()


def test_first_connections_of_a_new_pod_wait_for_its_certificate(lab: Lab, server: Pod):
    seconds = []
    for number in range(3):
        client = lab.pod(f"new-{number}", node="node1", namespace=NAMESPACE, service_account=f"new-{number}")
        started = time.monotonic()
        assert greeting(client, server.address, ECHO)["peer"][0] == client.address
        seconds.append(time.monotonic() - started)
        client.delete()
    assert max(seconds) < 10, seconds


@pytest.mark.parametrize(("patience", "expected"), [(2.0, "ok"), (13.0, "greeting: ")])
def test_connection_waits_for_its_certificate_and_not_for_ever(
    lab: Lab, server: Pod, patience: float, expected: str
):
    """The controller falls silent when it has told of the pod and has not signed yet, for ``patience`` seconds."""
    nodeproxy, controller = lab.process("node1", "nodeproxy"), lab.process("controlplane")
    nodeproxy.signal(signal.SIGSTOP)
    try:
        client = lab.pod("waiting", node="node1", namespace=NAMESPACE, service_account="waiting")
        lab.settle(components=["agent"])
        controller.signal(signal.SIGSTOP)
    finally:
        nodeproxy.signal(signal.SIGCONT)
    try:
        traffic = Traffic.echo(client, server.address, ECHO, timeout=20, count=1)
        time.sleep(patience)
    finally:
        controller.signal(signal.SIGCONT)
    (record,) = traffic.wait(20)
    assert record["outcome"].startswith(expected), record
    if expected == "ok":
        assert record["seconds"] > patience - 0.5
    else:
        assert 8 < record["seconds"] < 12
    # Later connections need not wait.
    assert echoes(client, server.address, ECHO) == ""
    client.delete()
    lab.settle()


def test_server_that_is_new_is_reached_as_soon_as_it_is_ready(lab: Lab, client: Pod):
    server = echo_server(lab, "new-server", node="node2", namespace=NAMESPACE)
    lab.settle()
    assert greeting(client, server.address, ECHO)["local"] == [server.address, ECHO]
    server.delete()


def test_connection_to_a_port_where_nobody_listens_ends(client: Pod, server: Pod):
    with Talker(client) as talker:
        opened = talker.open(server.address, 9999)
        if opened.ok:  # connect() ended at the node proxy; the stream did not come about
            answer = talker("read", timeout=5)
            assert answer.error or answer["text"] == ""
            assert "timed out" not in answer.error


def test_many_streams_and_much_data_at_once(client: Pod, server: Pod):
    with Talker(client) as talker:
        keys = [f"stream-{number}" for number in range(40)]
        for key in keys:
            assert talker.open(server.address, ECHO, key).ok
            assert talker("read", key)["text"]
        for key in keys:
            answer = talker.exchange(key, size=60_000, times=4)
            assert answer.ok, answer.error
        answer = talker.exchange(keys[0], size=60_000, times=100)
        assert answer.ok, answer.error
        for key in keys:
            talker.close(key)


def test_pooled_streams_share_connections(lab: Lab, client: Pod, server: Pod):
    with lab.capture() as capture, Talker(client) as talker:
        for number in range(30):
            assert talker.open(server.address, ECHO, f"{number}").ok
            assert talker("read", f"{number}")["text"]
            assert talker.exchange(f"{number}").ok
    opened = {
        (source, port)
        for source, port, destination, destination_port, _ in capture.segments()
        if (source, destination, destination_port) == (client.address, server.address, 15008)
    }
    assert len(opened) <= 4, opened


def test_half_close_goes_through(client: Pod, server: Pod):
    script = (
        "import socket,sys; s=socket.create_connection((sys.argv[1],int(sys.argv[2])),10); s.sendall(b'last words');"
        "s.shutdown(socket.SHUT_WR); d=b''\n"
        "while True:\n    p=s.recv(999)\n    if not p: break\n    d+=p\nprint(d.decode())"
    )
    done = client.run(["/usr/bin/python3", "-c", script, server.address, str(ECHO)])
    assert done.stdout.strip().endswith("last words")
