"""The agent's side of the proxy: pods come and go, sockets are asked for, maps are received (:mod:`agent.api`).

Owns the SEQPACKET connection and its descriptors until they are handed on. When the agent goes away everything that was
received stays in use; the client reconnects and tells what it holds.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Protocol

import msgspec

from agent import api
from common import logs, seqpacket
from l7proxy.pods import PodKey

_log = logs.get(__name__)

_RETRY_FIRST = 0.1
_RETRY_LONGEST = 2.0


class Handler(Protocol):
    """What the proxy does with the agent's messages. Sockets and descriptors given belong to the handler."""

    def on_maps(self, maps: dict[str, int]) -> None: ...

    def on_enroll(self, message: api.Enroll, listeners: dict[api.ListenerKind, socket.socket]) -> None: ...

    def on_withdraw(self, message: api.Withdraw) -> None: ...

    def on_sockets(
        self, key: PodKey, count: int, found: list[socket.socket], error: str, *, ipv6: bool
    ) -> None: ...

    def on_agent_lost(self) -> None: ...

    def held(self) -> tuple[api.Held, ...]: ...

    def on_known(self) -> None:
        """Every pod has been told of."""

    def on_serving(self) -> None:
        """New connections come here, all of them."""

    def on_drain(self) -> None:
        """They come to a successor."""


class AgentClient:
    def __init__(self, path: str, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._sock: socket.socket | None = None
        self._next_id = 1
        self._asked: dict[int, tuple[PodKey, int, bool]] = {}
        self._lost: asyncio.Event = asyncio.Event()
        self.connected = False
        self._serving = False  #: ready to serve, which every agent is told

    async def run(self) -> None:
        """Stay connected until cancelled."""
        delay = _RETRY_FIRST
        quiet = False
        while True:
            try:
                await self._session()
                if self.connected:  # and not refused, which it would be again
                    delay, quiet = _RETRY_FIRST, False
            except (OSError, seqpacket.PacketError, msgspec.DecodeError) as error:
                if not quiet:
                    _log.warning("agent is away", socket=self._path, reason=str(error))
                    quiet = True
            finally:
                self._drop()
            await asyncio.sleep(delay)
            delay = min(delay * 2, _RETRY_LONGEST)

    def serve(self) -> None:
        """From now on ready for everything that may come."""
        if self._serving:
            return
        self._serving = True
        if self._sock is not None and self.connected:
            try:
                seqpacket.send(self._sock, api.encode(api.Serve()))
            except OSError as error:
                _log.warning("agent connection broke", reason=str(error))
                self._lost.set()  # the next one is told by Hello

    def get_sockets(self, key: PodKey, count: int, ipv6: bool) -> bool:
        """Ask for sockets in a pod's namespace. False: the agent is away, ask again later."""
        sock = self._sock
        if sock is None or not self.connected:
            return False
        number = self._next_id
        self._next_id += 1
        message = api.GetSockets(number, key[0], key[1], api.Purpose.OUTBOUND, count, ipv6)
        try:
            seqpacket.send(sock, api.encode(message))
        except OSError as error:
            _log.warning("agent does not keep up", reason=str(error))
            return False
        self._asked[number] = (key, count, ipv6)
        return True

    async def _session(self) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        self._sock = sock
        self._lost = asyncio.Event()
        seqpacket.prepare(sock)
        sock.connect(self._path)
        kinds = (api.ListenerKind.OUTBOUND_L7,)
        hello = api.Hello(api.Role.L7PROXY, held=self._handler.held(), kinds=kinds, serving=self._serving)
        seqpacket.send(sock, api.encode(hello))
        loop.add_reader(sock.fileno(), self._readable)
        await self._lost.wait()

    def _drop(self) -> None:
        sock, self._sock = self._sock, None
        was, self.connected = self.connected, False
        self._asked.clear()
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        if was:
            _log.warning("agent connection lost")
            self._handler.on_agent_lost()

    def _readable(self) -> None:
        sock = self._sock
        while sock is not None and sock is self._sock:
            try:
                data, fds = seqpacket.receive(sock)
            except BlockingIOError:
                return
            except (OSError, seqpacket.PacketError) as error:
                _log.warning("agent connection broke", reason=str(error))
                self._lost.set()
                return
            if not data:
                self._lost.set()
                return
            try:
                message = api.decode_from_agent(data)
            except msgspec.DecodeError as error:
                _close(fds)
                _log.error("message of the agent not understood", reason=str(error))
                continue
            self._dispatch(message, fds)

    def _dispatch(self, message: api.FromAgent, fds: tuple[int, ...]) -> None:
        match message:
            case api.Welcome():
                self.connected = True
                _log.info("agent connected", node=message.node, version=message.version)
                names = dict(zip(message.maps, fds, strict=False))
                _close(fds[len(message.maps) :])
                self._handler.on_maps(names)
            case api.Refused():
                _close(fds)
                _log.error("agent refused this proxy", reason=message.reason)
                self._lost.set()
            case api.Enroll():
                listeners = {
                    kind: socket.socket(fileno=fd) for kind, fd in zip(message.listeners, fds, strict=False)
                }
                _close(fds[len(message.listeners) :])
                self._handler.on_enroll(message, listeners)
            case api.Withdraw():
                _close(fds)
                self._handler.on_withdraw(message)
            case api.Known():
                self._handler.on_known()
            case api.Serving():
                self._handler.on_serving()
            case api.Drain():
                self._handler.on_drain()
            case api.Sockets():
                asked = self._asked.pop(message.id, None)
                found = [socket.socket(fileno=fd) for fd in fds]
                if asked is None:
                    for sock in found:
                        sock.close()
                    return
                error = message.error or ("" if found else "the agent sent none")
                self._handler.on_sockets(asked[0], asked[1], found, error, ipv6=asked[2])


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


#: Reads the ``captured`` map: (netns cookie, client address, client port) to the address and port that were dialled.
Captured = Callable[[int, tuple[str, int]], tuple[str, int] | None]
