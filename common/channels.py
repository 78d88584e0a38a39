"""What every gRPC channel to the controller has in common: when a peer that says nothing is given up, and how another is found.

A controller whose machine has lost its power ends no connection: whoever is connected to it would hold on to the last
configuration, while everybody else goes on. A ping is a few bytes and answered by gRPC's own threads, also while Python is busy.
Behind the controllers' one address somebody (kube-proxy) chooses one for each connection, for a while also one that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

#: Seconds without a word until a client asks, and that an answer may take: together the longest that a dead peer is believed.
PING, PONG = 2, 3
#: Seconds for one attempt to connect: an address may be that of a machine which is gone.
CONNECT = 3
#: Seconds until another connection is begun beside those that nobody has answered.
BESIDE = 0.5
#: Connections that are begun at most: of two machines of which one is gone all of them draw that one once in sixteen times.
ATTEMPTS = 4

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", PING * 1000),
    ("grpc.keepalive_timeout_ms", PONG * 1000),
    # Without it a ping may take a minute, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", PONG * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    # The name is gRPC's; it is the least that an attempt lasts.
    ("grpc.min_reconnect_backoff_ms", CONNECT * 1000),
    # Two channels to one address are two connections.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Who pings more often than twice as often as it should is cut off.
    ("grpc.http2.min_ping_interval_without_data_ms", PING * 500),
)


@contextlib.asynccontextmanager
async def first_answered(make: Callable[[], grpc.aio.Channel]) -> AsyncIterator[grpc.aio.Channel]:
    """The first of some channels to one address that is connected; when all have failed one of them, whose user hears why.

    They are begun one after the other while nobody has answered: one that was begun before may still be about to. The others are
    closed again.

    :param make: makes one, with CLIENT_OPTIONS.
    :raises TimeoutError: none is connected, nor has failed, in good time: their name is not resolved.
    """
    async with contextlib.AsyncExitStack() as chosen:
        waiting: dict[asyncio.Task[bool], grpc.aio.Channel] = {}
        try:
            for patience in (*(BESIDE,) * (ATTEMPTS - 1), CONNECT + 1):
                begun = make()
                waiting[asyncio.ensure_future(_is_connected(begun))] = begun
                if (channel := await _settled(waiting, patience)) is not None:
                    await chosen.enter_async_context(channel)
                    break
            else:
                raise TimeoutError("neither a connection nor an error in good time")
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for other in waiting.values():
                await other.close()
        yield channel


async def _settled(
    waiting: dict[asyncio.Task[bool], grpc.aio.Channel], timeout: float
) -> grpc.aio.Channel | None:
    """Take out the one that is connected, or the last that has failed; those that failed before it are closed.

    None: there is neither within ``timeout`` seconds.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + timeout
    while (left := deadline - now()) > 0:
        done, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=lambda task: not task.result()):
            if task.result() or len(waiting) == 1:
                return waiting.pop(task)
            await waiting.pop(task).close()
    return None


async def _is_connected(channel: grpc.aio.Channel) -> bool:
    """As soon as it is known."""
    state = channel.get_state(try_to_connect=True)
    while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
    return state is grpc.ChannelConnectivity.READY
