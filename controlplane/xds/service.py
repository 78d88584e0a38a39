"""The aggregated discovery service over gRPC: reads requests, writes responses, one session per stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import discovery_pb2

from common import logs
from common.tasks import Tasks
from controlplane.clients import Client, Clients, CredentialEnded
from controlplane.credentials import Gate, Right
from controlplane.model.snapshot import Snapshot
from controlplane.publisher import Publisher
from controlplane.xds.listeners import DEFAULT_SOCKET
from controlplane.xds.resources import Resources
from controlplane.xds.session import AdsSession
from controlplane.xds.types import Type

_log = logs.get(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
METHOD = "StreamAggregatedResources"
_FIRST_TIMEOUT = 10.0
#: Most requests that wait to be looked at: of a client that takes no responses, no more are read.
_REQUESTS = 64


class DiscoveryService:
    """Serves the state-of-the-world variant of ADS."""

    def __init__(self, publisher: Publisher, gate: Gate, clients: Clients) -> None:
        self._publisher = publisher
        self._gate = gate
        self._clients = clients
        self._resources: Resources | None = None

    async def stream(
        self,
        requests: AsyncIterator[discovery_pb2.DiscoveryRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[discovery_pb2.DiscoveryResponse]:
        """One client, until either side ends the stream."""
        caller = await self._gate.admit(context, Right.DISCOVERY)
        node = caller.node
        try:
            async with asyncio.timeout(_FIRST_TIMEOUT):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no request on the stream")
            return
        component, admin = _component(first.node), _text(first.node, "ADMIN")
        log = _log.bind(node=node, component=component)
        with self._clients.connected(caller, component, context.peer(), admin) as client:
            log.info("client connected", peer=context.peer(), id=first.node.id)
            try:
                async for response in self._serve(first, requests, client, log):
                    yield response
            except CredentialEnded as e:
                await self._gate.refuse(context, grpc.StatusCode.UNAUTHENTICATED, str(e), caller)
            finally:
                log.info("client gone")

    async def _serve(
        self,
        first: discovery_pb2.DiscoveryRequest,
        requests: AsyncIterator[discovery_pb2.DiscoveryRequest],
        client: Client,
        log: logs.Logger,
    ) -> AsyncIterator[discovery_pb2.DiscoveryResponse]:
        session = AdsSession(_text(first.node, "ENVOY_SOCKET") or DEFAULT_SOCKET)
        clock = asyncio.get_running_loop().time
        wake = asyncio.Event()
        wake.set()
        queue: asyncio.Queue[discovery_pb2.DiscoveryRequest] = asyncio.Queue(_REQUESTS)
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
                    try:
                        async with asyncio.timeout(session.wait(clock())):
                            await wake.wait()
                    except TimeoutError:
                        pass
                    wake.clear()
                    client.check()
                    while not queue.empty():
                        self._request(session, queue.get_nowait(), client, log)
                    if reader.done():
                        return
                    resources = self.prepare(self._publisher.snapshot)
                    for response in session.responses(resources, clock()):
                        self._note_sent(session, response, client, log)
                        yield response
                    if session.settled(resources):
                        client.version_acked = resources.version
        finally:
            await tasks.cancel()

    def prepare(self, snapshot: Snapshot) -> Resources:
        """The snapshot's resources: built once, shared by all streams. Called before a snapshot is published too."""
        if self._resources is None or self._resources.version != snapshot.version:
            resources = Resources(snapshot)
            for kind in Type:
                resources.of(kind, DEFAULT_SOCKET)
            self._resources = resources
        return self._resources

    def _request(
        self, session: AdsSession, request: discovery_pb2.DiscoveryRequest, client: Client, log: logs.Logger
    ) -> None:
        answered = session.request(request)
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

    def _note_sent(
        self, session: AdsSession, response: discovery_pb2.DiscoveryResponse, client: Client, log: logs.Logger
    ) -> None:
        kind = next(k for k in session.subscriptions if k.value == response.type_url)
        client.version_sent = self._publisher.snapshot.version
        client.types.setdefault(kind.short, {})["sent"] = response.version_info
        self._clients.pushed(client, kind.short)
        log.debug(
            "update sent", type=kind.short, version=response.version_info, resources=len(response.resources)
        )


def _component(node: base_pb2.Node) -> str:
    return _text(node, "COMPONENT") or ("envoy" if node.user_agent_name == "envoy" else "xds")


def _text(node: base_pb2.Node, name: str) -> str:
    field = node.metadata.fields.get(name)
    return field.string_value if field is not None else ""
