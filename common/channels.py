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
    """The first of several channels to one address that is connected, or of which it is known that it cannot be.

    They are begun one after the other, and the others closed again. After CONNECT seconds the first one has failed: whoever uses
    it hears why.

    :param make: makes one, with CLIENT_OPTIONS.
    """
    async with contextlib.AsyncExitStack() as chosen:
        waiting: dict[asyncio.Task[None], grpc.aio.Channel] = {}
        try:
            done: set[asyncio.Task[None]] = set()
            while not done:
                channel = make()
                waiting[asyncio.ensure_future(_connected_or_failed(channel))] = channel
                done, _ = await asyncio.wait(waiting, timeout=BESIDE, return_when=asyncio.FIRST_COMPLETED)
            channel = await chosen.enter_async_context(waiting.pop(done.pop()))
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for other in waiting.values():
                await other.close()
        yield channel


async def _connected_or_failed(channel: grpc.aio.Channel) -> None:
    state = channel.get_state(try_to_connect=True)
    while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
