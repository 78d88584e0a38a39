"""A controller that falls silent without a word, seen from its clients: real gRPC, through a relay that stops to carry."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from common.channels import (
    ATTEMPTS,
    BESIDE,
    CLIENT_OPTIONS,
    CONNECT,
    PING,
    PONG,
    SERVER_OPTIONS,
    first_answered,
)

METHOD = "/test/Follow"


class Silence:
    """A relay: what is connected stays connected, but nothing is carried once it is silent."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._carries = asyncio.Event()
        self._carries.set()

    def fall(self) -> None:
        self._carries.clear()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        with contextlib.closing(writer), contextlib.closing(back):
            await asyncio.gather(self._carry(reader, back), self._carry(there, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._carries.wait()
                writer.write(data)
                await writer.drain()


def _follow(channel: grpc.aio.Channel) -> AsyncIterator[bytes]:
    method: Any = channel.unary_stream(METHOD)
    words: AsyncIterator[bytes] = method(b"").__aiter__()
    return words


@pytest.fixture
async def server() -> AsyncIterator[int]:
    """One that says a word to whoever comes and then nothing more."""

    async def follow(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(600)

    made = grpc.aio.server(options=SERVER_OPTIONS)
    handler: Any = grpc.unary_stream_rpc_method_handler(follow)
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Follow": handler}),))
    port = made.add_insecure_port("127.0.0.1:0")
    await made.start()
    yield port
    await made.stop(0)


async def test_a_dead_peer_is_given_up_and_an_idle_one_is_not(server: int) -> None:
    silence = Silence(server)
    relay = await asyncio.start_server(silence.serve, "127.0.0.1", 0)
    port = relay.sockets[0].getsockname()[1]
    options = [*CLIENT_OPTIONS, ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        words = _follow(channel)
        assert await anext(words) == b"first"
        following = asyncio.ensure_future(anext(words))
        # Longer than three pings: the server does not take them for an attack.
        await asyncio.wait([following], timeout=4 * PING + 1)
        assert not following.done()
        silence.fall()
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(following, PING + PONG + 10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        print(f"given up after {time.monotonic() - began:.1f} s")
    relay.close()


async def test_an_attempt_at_an_address_where_nobody_answers_ends(server: int) -> None:
    """The kernel accepts, as it does for a process that hangs."""
    silent = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(anext(_follow(channel)), CONNECT + 10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    silent.close()


async def test_of_several_machines_behind_one_address_one_that_answers_is_found(server: int) -> None:
    """Each connection is another draw: the first three are with a machine that is gone."""
    relay = Silence(server)
    draws = 0

    async def balance(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal draws
        draws += 1
        if draws > 3:
            await relay.serve(reader, writer)

    balancer = await asyncio.start_server(balance, "127.0.0.1", 0)
    port = balancer.sockets[0].getsockname()[1]
    began = time.monotonic()
    async with first_answered(
        lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS)
    ) as channel:
        # Three and a half turns at least, and before the first one was given up.
        assert draws == 4
        assert 3 * BESIDE <= time.monotonic() - began < CONNECT
        assert await anext(_follow(channel)) == b"first"
        assert draws == 4
    balancer.close()


async def test_one_that_is_slow_is_not_given_up_for_one_that_refuses(server: int) -> None:
    """Its handshake takes longer than the time until another is begun."""
    relay = Silence(server)

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2.5 * BESIDE)
        await relay.serve(reader, writer)

    slow = await asyncio.start_server(late, "127.0.0.1", 0)
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        ports = iter([slow.sockets[0].getsockname()[1]])

        def make() -> grpc.aio.Channel:
            port = next(ports, refusing.getsockname()[1])
            return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS)

        async with first_answered(make) as channel:
            assert await anext(_follow(channel)) == b"first"
    slow.close()


async def test_a_name_that_nobody_resolves() -> None:
    """The number of those who ask for it has a bound, and so has the time."""
    made = 0
    with socket.socket(type=socket.SOCK_DGRAM) as resolver:
        resolver.bind(("127.0.0.1", 0))

        def make() -> grpc.aio.Channel:
            nonlocal made
            made += 1
            target = f"dns://127.0.0.1:{resolver.getsockname()[1]}/controller.test:1"
            return grpc.aio.insecure_channel(target, options=CLIENT_OPTIONS)

        with pytest.raises(TimeoutError, match="neither a connection nor an error"):
            async with first_answered(make):
                pass
    assert made == ATTEMPTS


async def test_one_that_refuses_is_heard_of_at_once() -> None:
    """And one where nobody answers at all, when its time is over; the number of attempts has a bound."""
    made = 0

    def make() -> grpc.aio.Channel:
        nonlocal made
        made += 1
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS)

    gone = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    port = gone.sockets[0].getsockname()[1]
    for silent in (True, False):
        if not silent:
            gone.close()
            await gone.wait_closed()
        began = time.monotonic()
        made = 0
        async with first_answered(make) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(_follow(channel))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        if silent:
            assert time.monotonic() - began >= CONNECT - BESIDE
        assert made == (ATTEMPTS if silent else 1)
