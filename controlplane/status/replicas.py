"""What controllers tell each other: which snapshot each of their clients has whole, and since when which content is in force.

One unary call on the port that clients use, behind the same credentials. It is asked only while something waits, and only about
what waits. Not a leaf: both ends are controllers; fields are only ever added, with defaults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec

from common import logs
from controlplane.clients import Clients
from controlplane.credentials import Gate, Right
from controlplane.status.board import Holding, Member, Replica
from controlplane.status.programming import Programming

_log = logs.get(__name__)

METHOD = "/mycel.control.v1.Replicas/Acknowledged"
_TIMEOUT = 2.0
#: Reasons that are passed on are cut here.
_MAX_REASON = 200
#: Components whose acknowledgement counts; others (a foreign Envoy, a curious tool) come and go.
COMPONENTS = frozenset({"agent", "nodeproxy", "l7proxy", "envoy"})


class Question(msgspec.Struct, frozen=True):
    """``ids``: objects by UID."""

    ids: tuple[str, ...] = ()


class ClientState(msgspec.Struct, frozen=True):
    """One client: the number of the snapshot that it has whole, and what it refuses."""

    node: str
    component: str
    sequence: int
    refusal: str = ""


class Answer(msgspec.Struct, frozen=True):
    clients: tuple[ClientState, ...] = ()
    contents: dict[str, tuple[str, int]] = {}


_encoder = msgspec.msgpack.Encoder()
_question = msgspec.msgpack.Decoder(Question)
_answer = msgspec.msgpack.Decoder(Answer)


def holding(clients: Clients, programming: Programming) -> Holding:
    """What this controller's clients have. Of several of one component on one node, the last one counts."""
    have: dict[Member, int] = {}
    refusals: dict[Member, str] = {}
    for client in clients:
        if client.component not in COMPONENTS:
            continue
        member = (client.node, client.component)
        sequence = programming.sequence_of(client.version_acked)
        # Acknowledged, left by what is on its way, and published again meanwhile: the client will have it again, but has it not.
        left = client.pending and sequence > programming.sequence_of(client.pending)
        # Who has refused a part has not got the whole.
        if client.errors or left:
            sequence = 0
        have[member] = min(sequence, have.get(member, sequence))
        for name, reason in client.errors.items():
            refusals[member] = f"{name}: {reason}"[:_MAX_REASON]
    return Holding(have, refusals)


class ReplicaService:
    """Answers the other controllers."""

    def __init__(self, gate: Gate, clients: Clients, programming: Programming) -> None:
        self._gate = gate
        self._clients = clients
        self._programming = programming

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server needs to serve it."""
        _, service, name = METHOD.split("/")
        return grpc.method_handlers_generic_handler(
            service, {name: grpc.unary_unary_rpc_method_handler(self.acknowledged)}
        )

    async def acknowledged(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        """One question, answered from what is known now."""
        await self._gate.admit(context, Right.REPLICAS)
        try:
            question = _question.decode(request)
        except msgspec.DecodeError as e:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no question: {e}")
            raise AssertionError("abort() returns never") from e
        own = holding(self._clients, self._programming)
        clients = tuple(
            ClientState(n, c, s, own.refusals.get((n, c), "")) for (n, c), s in own.clients.items()
        )
        by_id = self._programming.by_id
        contents = {i: (by_id[i].digest, by_id[i].since) for i in question.ids if i in by_id}
        return _encoder.encode(Answer(clients, contents))


class Peers:
    """The other controllers, and how to ask them.

    ``addresses``: name to ``ADDRESS:PORT`` of every other controller, as of now. ``server_name``: what is in their
    certificates. ``credential``: file with our own token, read for each question.
    """

    def __init__(
        self, addresses: Callable[[], Mapping[str, str]], roots: bytes, server_name: str, credential: Path
    ) -> None:
        self._addresses = addresses
        self._roots = roots
        self._server_name = server_name
        self._credential = credential
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._complained: dict[str, str] = {}

    async def ask(self, ids: Iterable[str]) -> Sequence[Replica]:
        """What all others say. One that does not answer has no clients: they are somewhere else, or missed."""
        addresses = self._addresses()
        for address in self._channels.keys() - set(addresses.values()):
            await self._channels.pop(address).close()
        if not addresses:
            return ()
        request = _encoder.encode(Question(tuple(ids)))
        answers = await asyncio.gather(*(self._ask(n, a, request) for n, a in sorted(addresses.items())))
        return [a for a in answers if a is not None]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _ask(self, name: str, address: str, request: bytes) -> Replica | None:
        try:
            token = await asyncio.to_thread(self._credential.read_text)
            call: Any = self._channel(address).unary_unary(METHOD)
            metadata = (("authorization", f"Bearer {token.strip()}"),)
            answer = _answer.decode(await call(request, metadata=metadata, timeout=_TIMEOUT))
        except (grpc.aio.AioRpcError, OSError, ValueError, msgspec.DecodeError) as e:
            text = (e.details() or e.code().name) if isinstance(e, grpc.aio.AioRpcError) else str(e)
            if self._complained.get(name) != text:
                _log.warning("another controller does not answer", replica=name, address=address, error=text)
            self._complained[name] = text
            return None
        self._complained.pop(name, None)
        return Replica(
            name,
            {(c.node, c.component): c.sequence for c in answer.clients},
            answer.contents,
            {(c.node, c.component): c.refusal for c in answer.clients if c.refusal},
        )

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.secure_channel(
                address,
                grpc.ssl_channel_credentials(self._roots),
                options=[
                    ("grpc.ssl_target_name_override", self._server_name),
                    ("grpc.max_receive_message_length", 64 << 20),
                ],
            )
        return channel
