"""The clients of a large cluster in one process: an agent, a node proxy and an l7proxy for each node, that only acknowledge.

``python -m bench.fleet_clients TARGET ROOTS TOKENS``: TOKENS is a JSON file, ``{node: {component: token}}``. Real streams over
real TLS, each on a connection of its own, with bytes that are looked at no further than needed. For each version that all
clients of a stream have acknowledged, one line of JSON goes to standard output: stream, version, monotonic time of the last
acknowledgement, and the most bytes that a client was sent for it. ``bytes`` on standard input is answered with the bytes that
each kind of client was sent since the last time (the most of any client).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
from envoy.service.discovery.v3 import discovery_pb2

from controlplane import api

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # A connection for each client, as they have in truth.
    ("grpc.use_local_subchannel_pool", 1),
)
_TYPES = (
    "envoy.config.cluster.v3.Cluster",
    "envoy.config.endpoint.v3.ClusterLoadAssignment",
    "envoy.config.listener.v3.Listener",
    "envoy.config.route.v3.RouteConfiguration",
)
_PREFIX = "type.googleapis.com/"
#: Streams that begin at once.
_STARTING = 32


class _Head(msgspec.Struct, tag="update"):
    """What of an Update is looked at."""

    nonce: int
    version: str


class Fleet:
    """All clients, and what they have been sent."""

    def __init__(self, target: str, roots: bytes, tokens: dict[str, dict[str, str]]) -> None:
        self._target = target
        self._credentials = grpc.ssl_channel_credentials(roots)
        self._tokens = tokens
        self._head = msgspec.msgpack.Decoder(_Head)
        self._acked: dict[str, Counter[str]] = defaultdict(Counter)  # stream -> version -> clients
        self._bytes: dict[str, Counter[str]] = defaultdict(Counter)  # component -> node -> bytes
        self._starting = asyncio.Semaphore(_STARTING)

    async def run(self) -> None:
        """Runs until a stream ends, which is an error."""
        async with asyncio.TaskGroup() as group:
            for node, tokens in self._tokens.items():
                for component in ("agent", "nodeproxy"):
                    group.create_task(self._client(node, component, tokens[component], self._mesh))
                group.create_task(self._client(node, "l7proxy", tokens["l7proxy"], self._discovery))
            group.create_task(self._questions())

    async def _client(
        self, node: str, component: str, token: str, follow: Callable[[Any, str, str, str], Awaitable[None]]
    ) -> None:
        async with grpc.aio.secure_channel(self._target, self._credentials, options=_OPTIONS) as channel:
            await follow(channel, node, component, token)
        raise RuntimeError(f"the stream of {component} on {node} has ended")

    async def _mesh(self, channel: grpc.aio.Channel, node: str, component: str, token: str) -> None:
        await self._starting.acquire()
        call: Any = channel.stream_stream(api.METHOD_SUBSCRIBE)
        stream = call(metadata=(("authorization", f"Bearer {token}"),))
        await stream.write(api.encode(api.Hello(component)))
        first = True
        while isinstance(data := await stream.read(), bytes):
            head = self._head.decode(data)
            await stream.write(api.encode(api.Ack(head.nonce, head.version)))
            self._note("mesh", 2, node, component, head.version, len(data))
            if first:
                self._starting.release()
                first = False

    async def _discovery(self, channel: grpc.aio.Channel, node: str, component: str, token: str) -> None:
        await self._starting.acquire()
        call: Any = channel.stream_stream(
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
        )
        stream = call(metadata=(("authorization", f"Bearer {token}"),))
        for kind in _TYPES:
            request = discovery_pb2.DeltaDiscoveryRequest(type_url=_PREFIX + kind)
            request.node.id = f"l7proxy~{node}"
            request.node.metadata.update({"COMPONENT": "l7proxy", "LISTENERS": "by-chain"})
            await stream.write(request.SerializeToString())
        begun: set[str] = set()
        while isinstance(data := await stream.read(), bytes):
            response = discovery_pb2.DeltaDiscoveryResponse.FromString(data)
            answer = discovery_pb2.DeltaDiscoveryRequest(
                type_url=response.type_url, response_nonce=response.nonce
            )
            await stream.write(answer.SerializeToString())
            kind = response.type_url.removeprefix(_PREFIX)
            self._note(kind, 1, node, component, response.system_version_info, len(data))
            begun.add(kind)
            if len(begun) == len(_TYPES):
                self._starting.release()
                begun.add("")

    def _note(self, stream: str, clients: int, node: str, component: str, version: str, size: int) -> None:
        self._bytes[component][node] += size
        self._acked[stream][version] += 1
        if self._acked[stream][version] == clients * len(self._tokens):
            del self._acked[stream][version]
            _say({"stream": stream, "version": version[:16], "at": time.monotonic()})

    async def _questions(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while await reader.readline():
            _say({"bytes": {component: max(sent.values()) for component, sent in self._bytes.items()}})
            self._bytes.clear()
        sys.exit(0)


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    target, roots, tokens = sys.argv[1:]

    certificates, found = Path(roots).read_bytes(), json.loads(Path(tokens).read_text())

    async def run() -> None:
        await Fleet(target, certificates, found).run()

    asyncio.run(run())


if __name__ == "__main__":
    main()
