"""The agent takes connections of its node's pods into the splice by itself, and lets them out when it is told to."""

from __future__ import annotations

import pytest

from lab import Lab
from tests.mesh.helpers import eventually

pytestmark = pytest.mark.privileged

NAMESPACE = "splices"

SERVER = """
import asyncio
async def serve(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def run():
    await (await asyncio.start_server(serve, "", 8080)).serve_forever()
asyncio.run(run())
"""
# Says after each round how many of the bytes that it has read came by TCP (tcpi_bytes_received).
CLIENT = """
import select, socket, struct, sys, time
sock = socket.create_connection((sys.argv[1], 80))
sock.setblocking(False)
number = 0
while True:
    data = struct.pack("=Q", number) * 32
    number += 1
    sock.send(data)
    while data:
        assert select.select([sock], [], [], 5)[0]
        came = sock.recv(65536)
        assert came and data.startswith(came), (number, came)
        data = data[len(came):]
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    with open(sys.argv[2], "w") as file:
        print(number * 256 - struct.unpack_from("=Q", info, 128)[0], number, file=file)
    time.sleep(0.01)
"""

# Reads by edges, takes a short read for the end of what is there, and says how much it has read. After an "s" it sleeps.
BY_EDGES = """
import select, socket, struct, time
listener = socket.create_server(("", 8080))
while True:
    sock, _ = listener.accept()
    sock.setblocking(False)
    epoll = select.epoll()
    epoll.register(sock, select.EPOLLIN | select.EPOLLET)
    read, data = 0, b"-"
    while data:
        epoll.poll()
        while True:
            try:
                data = sock.recv(10007)
            except BlockingIOError:
                break
            read += len(data)
            if len(data) < 10007:
                break
        sock.send(struct.pack("=Q", read))
        if data == b"s":
            time.sleep(0.5)
"""
# Once its answers come past TCP it sends more than may wait there, all while the server sleeps.
MUCH_AT_ONCE = """
import select, socket, struct, sys, time
sock = socket.create_connection((sys.argv[1], 80))
sock.setblocking(False)
answers = b""
def answered(count):
    global answers
    while struct.unpack("=Q", answers[-8:].rjust(8, bytes(1)))[0] < count:
        assert select.select([sock], [], [], 20)[0], f"{count} bytes were sent, it has {answers[-8:].hex()}"
        answers += sock.recv(65536)
sent = 0
def send(data):
    global sent
    while data:
        select.select([], [sock], [])
        went = sock.send(data[:65536])
        sent += went
        data = data[went:]
while True:
    send(b"r")
    answered(sent)
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if struct.unpack_from("=Q", info, 128)[0] < len(answers) - 80:
        break
    time.sleep(0.01)
send(b"s")
answered(sent)
send(bytes((1 << 20) + (1 << 16)))
send(bytes(10000))
answered(sent)
"""


def test_pods_of_a_node_and_their_switch(lab: Lab, tmp_path):
    lab.namespace(NAMESPACE)
    server = lab.pod("server", node="node1", namespace=NAMESPACE, labels={"app": "server"})
    client = lab.pod("client", node="node1", namespace=NAMESPACE)
    server.serve(["/usr/bin/python3", "-c", SERVER], 8080)
    address = lab.service("server", 80, target_port=8080, namespace=NAMESPACE, port_name="tcp")
    lab.settle()
    told = tmp_path / "told"
    talker = client.popen(["/usr/bin/python3", "-c", CLIENT, address, str(told)])

    def past_tcp() -> tuple[int, int]:
        assert talker.poll() is None
        words = told.read_text().split() if told.exists() else []
        return (int(words[0]), int(words[1])) if len(words) == 2 else (0, 0)

    def goes_past_tcp() -> bool:
        return past_tcp()[0] > 1000

    def goes_by_tcp() -> bool:
        """Ten rounds, and no byte more past it."""
        before, number = past_tcp()
        assert eventually(lambda: past_tcp()[1] > number + 10)
        return past_tcp()[0] == before

    try:
        assert eventually(goes_past_tcp)
        assert lab.metrics("node1", "agent").total("mycel_splice_entered_total") >= 2
        # An agent that is replaced leaves it there; one that is told to switch it off lets it out.
        lab.stop("node1", "agent")
        lab.start("node1", "agent")
        assert not goes_by_tcp()
        lab.namespace(NAMESPACE, {"mycel.io/splice": "disabled"})
        assert eventually(goes_by_tcp)
    finally:
        talker.kill()
        talker.wait()
    client.delete()
    server.delete()


def test_reader_by_edges_is_told_of_what_tcp_has(lab: Lab):
    """It was told once, when it could see only what had gone past TCP."""
    lab.namespace(NAMESPACE)
    server = lab.pod("edges", node="node1", namespace=NAMESPACE, labels={"app": "edges"})
    client = lab.pod("much", node="node1", namespace=NAMESPACE)
    server.serve(["/usr/bin/python3", "-c", BY_EDGES], 8080)
    address = lab.service("edges", 80, target_port=8080, namespace=NAMESPACE, port_name="tcp")
    lab.settle()
    talker = client.popen(["/usr/bin/python3", "-c", MUCH_AT_ONCE, address])
    try:
        assert talker.wait(60) == 0
    finally:
        talker.kill()
        talker.wait()
    client.delete()
    server.delete()
