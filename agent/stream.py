"""The agent's end of the controller's workload/policy stream.

Owns the connection: TLS against the given roots, the node's credential, reconnecting with back-off, and an Ack or Nack for each
update, in order, after it is in force. It knows nothing of what an update means: that is the ``apply`` it is given.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import msgspec

from common import logs
from common.channels import CLIENT_OPTIONS, first_answered
from controlplane.api import (
    METHOD_SUBSCRIBE,
    Ack,
    ClientMessage,
    Hello,
    Nack,
    ResourceError,
    Update,
    decode_update,
    encode,
)

_log = logs.get(__name__)

#: Seconds between attempts: doubled from the first to the last, each drawn from its upper half.
_FIRST_DELAY = 0.2
_LAST_DELAY = 15.0
#: Seconds between looks at the files meanwhile.
_LOOK = 0.25
_MAX_UPDATE = 256 * 1024 * 1024

#: Brings an update into force: gives the errors of what was not taken over.
Apply = Callable[[Update], Awaitable[tuple[ResourceError, ...]]]


@dataclass(frozen=True)
class Settings:
    """``controller`` is HOST:PORT; the two files are read again at each attempt, so that they can be renewed."""

    controller: str
    roots: Path
    credential: Path
    admin: str = ""


class Stream:
    """Runs until cancelled."""

    def __init__(
        self, settings: Settings, *, version: Callable[[], str], apply: Apply, component: str = "agent"
    ) -> None:
        """``version`` gives the snapshot that is held in full, or an empty text."""
        self._settings = settings
        self._version = version
        self._apply = apply
        self._component = component
        self.connected = False
        #: why there is no connection; empty when there is one
        self.problem = "not tried yet"

    async def run(self) -> None:
        delay = _FIRST_DELAY
        while True:
            try:
                served = await self._serve()
                self.problem = "the controller ended the stream"
            except grpc.aio.AioRpcError as error:
                served = self.connected
                self.problem = f"{error.code().name}: {error.details()}"
            except (OSError, ValueError, msgspec.DecodeError) as error:
                served = self.connected
                self.problem = f"{type(error).__name__}: {error}"
            self.connected = False
            delay = _FIRST_DELAY if served else min(delay * 2, _LAST_DELAY)
            wait = delay * random.uniform(0.5, 1.0)
            _log.warning(
                "no stream from the controller",
                controller=self._settings.controller,
                reason=self.problem,
                retry_s=round(wait, 2),
            )
            await self._pause(wait)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until one of the files changes: the roots may come after us, a token is renewed."""
        before = self._files()
        while seconds > 0:
            await asyncio.sleep(min(_LOOK, seconds))
            seconds -= _LOOK
            if self._files() != before:
                return

    def _files(self) -> tuple[tuple[int, int] | None, ...]:
        found: list[tuple[int, int] | None] = []
        for path in (self._settings.roots, self._settings.credential):
            try:
                stat = path.stat()
                found.append((stat.st_ino, stat.st_mtime_ns))
            except OSError:
                found.append(None)
        return tuple(found)

    async def _serve(self) -> bool:
        """One connection; returns when the controller ends it. True if it ever served an update."""
        roots = self._settings.roots.read_bytes()
        token = self._settings.credential.read_text().strip()
        if not token:
            raise ValueError(f"{self._settings.credential} is empty")
        options = [
            ("grpc.max_receive_message_length", _MAX_UPDATE),
            *CLIENT_OPTIONS,
            # Our own back-off is above; gRPC's inside one attempt would only add to it.
            ("grpc.enable_retries", 0),
        ]
        credentials = grpc.ssl_channel_credentials(root_certificates=roots)
        async with first_answered(
            lambda: grpc.aio.secure_channel(self._settings.controller, credentials, options=options)
        ) as channel:
            outgoing: asyncio.Queue[ClientMessage | None] = asyncio.Queue()
            await outgoing.put(
                Hello(component=self._component, version=self._version(), admin=self._settings.admin)
            )

            async def requests() -> AsyncIterator[ClientMessage]:
                while (message := await outgoing.get()) is not None:
                    yield message

            subscribe = channel.stream_stream(
                METHOD_SUBSCRIBE, request_serializer=encode, response_deserializer=decode_update
            )
            call = subscribe(requests(), metadata=(("authorization", f"Bearer {token}"),))
            try:
                async for update in call:
                    if not self.connected:
                        self.connected = True
                        self.problem = ""
                        _log.info(
                            "stream from the controller",
                            controller=self._settings.controller,
                            version=update.version[:12],
                        )
                    errors = await self._apply(update)
                    if errors:
                        await outgoing.put(Nack(update.nonce, update.version, errors))
                    else:
                        await outgoing.put(Ack(update.nonce, update.version))
            finally:
                # Whatever reads what we say ends too, before it would be found waiting.
                outgoing.put_nowait(None)
                await asyncio.sleep(0)
            return self.connected
