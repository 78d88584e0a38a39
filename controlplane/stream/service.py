"""The Subscribe call over gRPC: reads answers, writes updates, one session per stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import msgspec

from common import logs
from common.tasks import Tasks
from controlplane import api
from controlplane.clients import Client, Clients, CredentialEnded
from controlplane.credentials import Gate, Right
from controlplane.publisher import Publisher
from controlplane.room import Room
from controlplane.stream.session import Session, Updates

_log = logs.get(__name__)
#: Seconds that a new stream may take to say Hello.
_HELLO_TIMEOUT = 10.0
#: Most answers that wait to be looked at: of a client that takes no updates, no more are read.
_ANSWERS = 64
_COMPONENTS = ("agent", "nodeproxy", "l7proxy")


class MeshService:
    """Serves :data:`controlplane.api.METHOD_SUBSCRIBE`."""

    def __init__(self, publisher: Publisher, gate: Gate, clients: Clients, room: Room | None = None) -> None:
        self._publisher = publisher
        self._gate = gate
        self._clients = clients
        self._room = room or Room()
        self._shared = Updates()

    async def subscribe(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        """One client, from its Hello until either side ends the stream."""
        caller = await self._gate.admit(context, Right.SUBSCRIBE)
        node = caller.node
        hello = await self._hello(requests, context)
        if caller.component not in ("", hello.component):
            reason = f"the credential is {caller.component}'s, not {hello.component}'s"
            await self._gate.refuse(context, grpc.StatusCode.PERMISSION_DENIED, reason, caller)
        log = _log.bind(node=node, component=hello.component)
        with self._clients.connected(caller, hello.component, context.peer(), hello.admin) as client:
            log.info("client connected", peer=context.peer(), held=hello.version[:12])
            try:
                async for update in self._updates(requests, hello, client, log):
                    yield update
            except CredentialEnded as e:
                await self._gate.refuse(context, grpc.StatusCode.UNAUTHENTICATED, str(e), caller)
            except msgspec.DecodeError as e:
                log.error("client sent no message of the protocol", error=str(e))
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no client message: {e}")
            finally:
                log.info("client gone")

    async def _updates(
        self, requests: AsyncIterator[bytes], hello: api.Hello, client: Client, log: logs.Logger
    ) -> AsyncIterator[bytes]:
        session = Session(hello.version, self._shared, hello.api)
        wake = asyncio.Event()
        wake.set()
        answers: asyncio.Queue[bytes] = asyncio.Queue(_ANSWERS)

        async def read() -> None:
            try:
                async for data in requests:
                    await answers.put(data)
                    wake.set()
            finally:
                wake.set()

        tasks = Tasks()
        reader = tasks.start(read(), name=f"mesh-stream-{client.id}")
        try:
            with self._publisher.reader(wake), client.woken_by(wake):
                while True:
                    await wake.wait()
                    wake.clear()
                    client.check()
                    while not answers.empty():
                        self._answer(session, api.decode_client(answers.get_nowait()), client, log)
                    if reader.done():
                        return
                    snapshot = self._publisher.snapshot
                    update = session.next_update(snapshot)
                    if update is not None:
                        client.sent(snapshot.version)
                        self._clients.pushed(client, "mesh")
                        log.debug(
                            "update sent",
                            version=update.version[:12],
                            nonce=update.nonce,
                            upserts=len(update.upserts),
                            removes=len(update.removes),
                        )
                        data = self._shared.encode(update, hello.api >= api.API_PACKED)
                        async with self._room.taken(len(data)):
                            yield data
        finally:
            await tasks.cancel()

    def _answer(self, session: Session, message: api.ClientMessage, client: Client, log: logs.Logger) -> None:
        if isinstance(message, api.Hello):
            raise msgspec.DecodeError("a second Hello")
        if not session.answer(message):
            log.warning("answer to no update", nonce=message.nonce)
            return
        client.answered(client.version_sent)
        if isinstance(message, api.Nack):
            client.errors = {e.key: e.reason for e in message.errors}
            self._clients.refused(client, "mesh")
            for error in message.errors:
                log.error(
                    "client refused a resource",
                    key=error.key,
                    reason=error.reason,
                    version=message.version[:12],
                )
        else:
            client.errors = {}

    async def _hello(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> api.Hello:
        reason = "the first message is not Hello"
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT):
                hello = api.decode_client(await anext(requests))
            if isinstance(hello, api.Hello):
                if hello.component not in _COMPONENTS:
                    reason = f"component {hello.component!r} is none of {', '.join(_COMPONENTS)}"
                elif not 1 <= hello.api <= api.API_VERSION:
                    reason = (
                        f"version {hello.api} of the protocol; this controller serves up to {api.API_VERSION}"
                    )
                else:
                    return hello
        except (TimeoutError, StopAsyncIteration):
            reason = "no Hello"
        except msgspec.DecodeError as e:
            reason = f"no client message: {e}"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        raise AssertionError("abort() returns never")
