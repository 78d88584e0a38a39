"""How connections end, and what their last bytes become: slow and absent readers, ends that are none, tunnels."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from l7proxy import downstream
from tests.l7proxy.conftest import Mesh, eventually
from tests.l7proxy.fakes import xds
from tests.l7proxy.fakes.backend import Request, respond
from tests.l7proxy.fakes.nodeproxy import NodeProxy

SIZE = 4096
DIRECT = {
    "match": {"prefix": "/"},
    "direct_response": {"status": 200, "body": {"inline_string": "x" * SIZE}},
}


def connection_of(mesh: Mesh) -> downstream.DownstreamConnection:
    (pod,) = mesh.proxy.pods.values()
    (connection,) = pod.downstream
    return connection


async def test_a_client_that_reads_no_answers_is_read_no_further(mesh: Mesh) -> None:
    """Answers of the proxy's own wait for nobody: they would fill its memory."""
    mesh.configure(xds.listener(), xds.routes(DIRECT))
    client = await mesh.client()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    count = 10_000
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * count)
    await eventually(lambda: bool(connection_of(mesh).held))
    connection = connection_of(mesh)
    assert connection.transport.get_write_buffer_size() < 1 << 20
    assert connection.held == {"responses"}
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(count):
        assert len((await client.response())[2]) == SIZE
    assert not connection.held


async def test_one_pod_does_not_take_every_connection(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downstream, "MAX_CONNECTIONS", 2)
    await mesh.serve()
    first, second = await mesh.client(), await mesh.client()
    assert (await first.get())[0] == (await second.get())[0] == 200
    assert await (await mesh.client()).closed() == b""
    first.close()
    (pod,) = mesh.proxy.pods.values()
    await eventually(lambda: len(pod.downstream) == 1)
    assert (await (await mesh.client()).get())[0] == 200
    assert (await second.get())[0] == 200


async def test_who_takes_nothing_of_the_last_response_is_let_go(mesh: Mesh) -> None:
    body = {"inline_string": "x" * (16 << 20)}
    mesh.configure(xds.listener(), xds.routes({**DIRECT, "direct_response": {"status": 200, "body": body}}))
    client = await mesh.client()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    await eventually(lambda: connection_of(mesh).transport.is_closing())
    connection = connection_of(mesh)
    now = time.monotonic()
    connection.check_idle(now)
    connection.check_idle(now + downstream.CLOSING - 1)
    await asyncio.sleep(0.05)
    assert connection in connection.pod.downstream
    connection.check_idle(now + downstream.CLOSING + 1)
    await eventually(lambda: connection not in connection.pod.downstream)


async def test_what_a_client_sends_behind_its_last_request_resets_nothing(mesh: Mesh) -> None:
    await mesh.serve()
    client = await mesh.client()
    assert (await client.get())[0] == 200
    connection = connection_of(mesh)
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    # In the kernel, and not read: this test has not let the loop turn since.
    connection._close_soon()
    assert await client.reader.read() == b""


async def half(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
    """A response that ends with its connection, and breaks off."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, downstream._RESET)
    writer.transport.abort()


async def whole(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\nwhole")
    writer.close()


async def test_a_broken_response_without_a_length_is_no_end_for_an_old_client(mesh: Mesh) -> None:
    """HTTP/1.0 knows no chunks: only a reset tells it that something is missing."""
    await mesh.serve(backend=await mesh.backend(script=half))
    client = await mesh.client()
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(client.reader.read(), 10)
    assert " 200 UC 0 4 " in (await mesh.lines(1))[0]


async def test_a_stream_of_the_node_proxy_that_breaks_off_is_no_end(mesh: Mesh, remote: NodeProxy) -> None:
    """It comes by a unix socket, which knows no reset."""
    remote.backend.script = whole
    client = await mesh.client()
    assert (await client.get())[::2] == (200, b"whole")
    remote.backend.script = half
    with pytest.raises((asyncio.IncompleteReadError, ValueError)):
        await client.get()
    assert " 200 UC 0 4 " in (await mesh.lines(2))[1]


async def test_the_last_that_the_client_of_a_tunnel_sends_arrives(mesh: Mesh) -> None:
    sent = 60_000
    go = asyncio.Event()
    received = asyncio.get_running_loop().create_future()
    readers: list[asyncio.StreamReader] = []

    async def body(request: Request, reader: asyncio.StreamReader) -> bytes:
        readers.append(reader)
        return b""

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        transport: Any = writer.transport
        transport.pause_reading()
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        await go.wait()
        transport.resume_reading()
        received.set_result(len(await readers[0].read()))
        writer.close()

    backend = await mesh.backend(script=script)
    (listening,) = backend._server.sockets  # type: ignore[union-attr]
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    backend._body = body  # type: ignore[method-assign]
    await mesh.serve(backend=backend)
    client = await mesh.client()
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
    assert (await client.response(head_only=True))[0] == 101
    (pool,) = connection_of(mesh).pod.pools.values()
    (upstream,) = pool.connections
    upstream.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    client.send(bytes(sent))
    await eventually(lambda: upstream.transport.get_write_buffer_size() > 0)
    client.close()
    (pod,) = mesh.proxy.pods.values()
    await eventually(lambda: not pod.downstream)
    go.set()
    async with asyncio.timeout(10):
        assert await received == sent


async def test_a_connection_that_is_given_up_and_takes_nothing_is_let_go(mesh: Mesh) -> None:
    """Its place in the cluster's limit of connections is another's."""
    backend = await mesh.serve(backend=await mesh.backend(script=lambda *_: asyncio.sleep(30)))
    client = await mesh.client()
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    await eventually(lambda: bool(backend.requests))
    (pool,) = connection_of(mesh).pod.pools.values()
    (upstream,) = pool.connections
    (writer,) = backend._writers
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    upstream.transport.write(bytes(64 << 20))
    upstream.close()
    now = time.monotonic()
    pool.sweep(now, wanted=True)
    assert pool.connections
    pool.sweep(now + 100, wanted=True)
    await eventually(lambda: not pool.connections)


async def test_a_response_to_half_a_request_gives_its_connection_up(mesh: Mesh) -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(0.3)  # for the request to fill what there is room for
        writer.write(respond(413, b"too much"))
        await asyncio.sleep(30)

    server = await asyncio.start_server(early, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    mesh.configure(xds.listener(), xds.routes(), xds.cluster(), xds.assignment(xds.endpoint(port)))
    client = await mesh.client()
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100000000\r\n\r\n" + bytes(32 << 20))
    assert (await client.response())[::2] == (413, b"too much")
    (pod,) = mesh.proxy.pods.values()
    (pool,) = pod.pools.values()
    await eventually(lambda: not pool.connections)
    server.close()
