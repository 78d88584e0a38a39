"""The aggregated discovery service over gRPC: reads requests, writes responses, one session per stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.message import DecodeError, Message

from common import logs
from common.tasks import Tasks
from controlplane.clients import Client, Clients, CredentialEnded
from controlplane.credentials import Gate, Right
from controlplane.model.snapshot import Snapshot
from controlplane.publisher import Publisher
from controlplane.room import Room
from controlplane.xds.delta import Deltas, DeltaSession, Encoded
from controlplane.xds.listeners import DEFAULT_SOCKET
from controlplane.xds.resources import BY_CHAIN, Resources
from controlplane.xds.session import AdsSession, Answered
from controlplane.xds.types import Type

_log = logs.get(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
METHOD = "StreamAggregatedResources"
METHOD_DELTA = "DeltaAggregatedResources"
_FIRST_TIMEOUT = 10.0
#: Most requests that wait to be looked at: of a client that takes no responses, no more are read.
_REQUESTS = 64


class _Session(Protocol):
    """One stream's state: of the world, or incremental."""

    def take(self, data: bytes) -> Answered | None:
        """:raises DecodeError: it is no request."""

    def give(self, resources: Resources, now: float) -> list[Encoded]: ...

    def wait(self, now: float) -> float | None: ...

    def settled(self, resources: Resources) -> bool: ...


class _StateOfTheWorld:
    def __init__(self, socket: str) -> None:
        self._session = AdsSession(socket)

    def take(self, data: bytes) -> Answered | None:
        return self._session.request(discovery_pb2.DiscoveryRequest.FromString(data))

    def give(self, resources: Resources, now: float) -> list[Encoded]:
        return [
            Encoded(Type(r.type_url), r.version_info, r.nonce, r.SerializeToString(), len(r.resources))
            for r in self._session.responses(resources, now)
        ]

    def wait(self, now: float) -> float | None:
        return self._session.wait(now)

    def settled(self, resources: Resources) -> bool:
        return self._session.settled(resources)


class _Incremental:
    def __init__(self, socket: str, deltas: Deltas) -> None:
        self._session = DeltaSession(socket, deltas)

    def take(self, data: bytes) -> Answered | None:
        return self._session.request(discovery_pb2.DeltaDiscoveryRequest.FromString(data))

    def give(self, resources: Resources, now: float) -> list[Encoded]:
        return self._session.responses(resources)

    def wait(self, now: float) -> float | None:
        return None

    def settled(self, resources: Resources) -> bool:
        return self._session.settled(resources)


class DiscoveryService:
    """Serves ADS, both the state of the world and incremental. Messages are bytes both ways."""

    def __init__(self, publisher: Publisher, gate: Gate, clients: Clients, room: Room | None = None) -> None:
        self._publisher = publisher
        self._gate = gate
        self._clients = clients
        self._room = room or Room()
        self._resources: Resources | None = None
        self._deltas = Deltas()

    async def stream(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        """One client of the state of the world, until either side ends the stream."""
        async for response in self._stream(requests, context, discovery_pb2.DiscoveryRequest):
            yield response

    async def delta(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        """One client of incremental ADS, likewise."""
        async for response in self._stream(requests, context, discovery_pb2.DeltaDiscoveryRequest):
            yield response

    async def _stream(
        self,
        requests: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[Any, Any],
        of: type[discovery_pb2.DiscoveryRequest | discovery_pb2.DeltaDiscoveryRequest],
    ) -> AsyncIterator[bytes]:
        caller = await self._gate.admit(context, Right.DISCOVERY)
        try:
            async with asyncio.timeout(_FIRST_TIMEOUT):
                data = await anext(requests)
            first = of.FromString(data)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no request on the stream")
            return
        except DecodeError as e:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no request: {e}")
            return
        # Who is expected to have a policy is told by accounts: an Envoy with l7proxy's stands in l7proxy's place.
        component, admin = caller.component or _component(first.node), _text(first.node, "ADMIN")
        session = self._session(first)
        log = _log.bind(node=caller.node, component=component)
        with self._clients.connected(caller, component, context.peer(), admin) as client:
            log.info("client connected", peer=context.peer(), id=first.node.id)
            try:
                async for response in self._serve(session, data, requests, client, log):
                    yield response
            except CredentialEnded as e:
                await self._gate.refuse(context, grpc.StatusCode.UNAUTHENTICATED, str(e), caller)
            except DecodeError as e:
                log.error("client sent no message of the protocol", error=str(e))
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no request: {e}")
            finally:
                log.info("client gone")

    def _session(self, first: Message) -> _Session:
        if isinstance(first, discovery_pb2.DeltaDiscoveryRequest):
            by_chain = _text(first.node, "LISTENERS") == "by-chain"
            socket = BY_CHAIN if by_chain else _text(first.node, "ENVOY_SOCKET") or DEFAULT_SOCKET
            return _Incremental(socket, self._deltas)
        assert isinstance(first, discovery_pb2.DiscoveryRequest)
        return _StateOfTheWorld(_text(first.node, "ENVOY_SOCKET") or DEFAULT_SOCKET)

    async def _serve(
        self,
        session: _Session,
        first: bytes,
        requests: AsyncIterator[bytes],
        client: Client,
        log: logs.Logger,
    ) -> AsyncIterator[bytes]:
        clock = asyncio.get_running_loop().time
        wake = asyncio.Event()
        wake.set()
        queue: asyncio.Queue[bytes] = asyncio.Queue(_REQUESTS)
        queue.put_nowait(first)

        async def read() -> None:
            try:
                async for request in requests:
                    await queue.put(request)
                    wake.set()
            finally:
                wake.set()

        tasks = Tasks()
        reader = tasks.start(read(), name=f"ads-stream-{client.id}")
        try:
            with self._publisher.reader(wake), client.woken_by(wake):
                while True:
                    wait = session.wait(clock())
                    if wait is None:
                        await wake.wait()
                    else:
                        try:
                            async with asyncio.timeout(wait):
                                await wake.wait()
                        except TimeoutError:
                            pass
                    wake.clear()
                    client.check()
                    while not queue.empty():
                        self._answer(session.take(queue.get_nowait()), client, log)
                    if reader.done():
                        return
                    resources = self.prepare(self._publisher.snapshot)
                    for response in session.give(resources, clock()):
                        self._note_sent(response, client, log)
                        async with self._room.taken(len(response.data)):
                            yield response.data
                    if session.settled(resources):
                        client.answered(resources.version)
        finally:
            await tasks.cancel()

    def prepare(self, snapshot: Snapshot) -> Resources:
        """The snapshot's resources: built once, shared by all streams. Called before a snapshot is published too."""
        if self._resources is None or self._resources.version != snapshot.version:
            self._resources = Resources(snapshot, self._resources)
        return self._resources

    def _answer(self, answered: Answered | None, client: Client, log: logs.Logger) -> None:
        if answered is None:
            return
        entry = client.types.setdefault(answered.kind.short, {})
        if answered.error:
            client.errors[answered.kind.short] = answered.error
            self._clients.refused(client, answered.kind.short)
            log.error(
                "client refused an update",
                type=answered.kind.short,
                version=answered.version,
                reason=answered.error,
            )
        else:
            client.errors.pop(answered.kind.short, None)
            entry["acked"] = answered.version

    def _note_sent(self, response: Encoded, client: Client, log: logs.Logger) -> None:
        kind = response.kind.short
        client.sent(self._publisher.snapshot.version)
        client.types.setdefault(kind, {})["sent"] = response.version
        self._clients.pushed(client, kind)
        log.debug("update sent", type=kind, version=response.version, resources=response.resources)


def _component(node: base_pb2.Node) -> str:
    """What a client without an account of its own says that it is: one of few words, for they are labels of metrics."""
    if _text(node, "COMPONENT") == "l7proxy":
        return "l7proxy"
    return "envoy" if node.user_agent_name == "envoy" else "xds"


def _text(node: base_pb2.Node, name: str) -> str:
    field = node.metadata.fields.get(name)
    return field.string_value if field is not None else ""
