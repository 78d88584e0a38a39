"""An agent for l7proxy: agent.api over a SEQPACKET socket, sockets in this process's own namespace."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from agent import api
from common import seqpacket


class FakeAgent:
    """``captured_fd`` is sent with Welcome, as the map of that name."""

    def __init__(self, run: Path, captured_fd: int = -1) -> None:
        self.path = str(run / "agent.sock")
        self.hellos: list[api.Hello] = []
        self.asked: list[api.GetSockets] = []
        self.ready = asyncio.Event()  #: the proxy said Serve
        self.refuse = ""
        self.refuse_sockets = ""
        self.answer_sockets = True
        self.peer: socket.socket | None = None
        self._captured_fd = captured_fd
        self._listener: socket.socket | None = None
        self._connected = asyncio.Event()
        self._enrolled: list[api.Enroll] = []

    def start(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(self.path)
        listener.listen()
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    async def connected(self) -> None:
        async with asyncio.timeout(5):
            await self._connected.wait()

    def stop(self) -> None:
        """As if the process had been killed."""
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            os.unlink(self.path)
        if self.peer is not None:
            loop.remove_reader(self.peer.fileno())
            self.peer.close()
            self.peer = None
        self._connected.clear()

    def enroll(self, uid: str, *, listen: bool = True, **fields: object) -> tuple[str, int]:
        """Enrol a pod; the address of its l7 listener."""
        values = {
            "netns_cookie": 7,
            "address": "127.0.0.1",
            "namespace": "default",
            "name": uid,
            "service_account": "client",
            "identity": "spiffe://cluster.local/ns/default/sa/client",
            "workload_name": "client",
            "app": "client",
            "version": "v1",
            **fields,
        }
        listener = socket.socket()
        fds: tuple[int, ...] = ()
        kinds: tuple[api.ListenerKind, ...] = ()
        if listen:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            fds, kinds = (listener.fileno(),), (api.ListenerKind.OUTBOUND_L7,)
        message = api.Enroll(uid, listeners=kinds, **values)  # type: ignore[arg-type]
        assert self.peer is not None
        seqpacket.send(self.peer, api.encode(message), fds)
        address: tuple[str, int] = listener.getsockname()
        listener.close()
        return address

    def say(self, message: api.Serving | api.Drain) -> None:
        """As when a successor serves, or has died."""
        assert self.peer is not None
        seqpacket.send(self.peer, api.encode(message))

    def withdraw(self, uid: str, netns_cookie: int = 7) -> None:
        assert self.peer is not None
        seqpacket.send(self.peer, api.encode(api.Withdraw(uid, netns_cookie)))

    def _accept(self) -> None:
        assert self._listener is not None
        self.peer, _ = self._listener.accept()
        self.peer.setblocking(False)
        seqpacket.prepare(self.peer)
        asyncio.get_running_loop().add_reader(self.peer.fileno(), self._readable)

    def _readable(self) -> None:
        peer = self.peer
        assert peer is not None
        try:
            data, _ = seqpacket.receive(peer)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(peer.fileno())
            peer.close()
            self.peer = None
            return
        message = api.decode_from_proxy(data)
        if isinstance(message, api.Hello):
            self.hellos.append(message)
            if self.refuse:
                seqpacket.send(peer, api.encode(api.Refused(self.refuse)))
                return
            fds = (self._captured_fd,) if self._captured_fd >= 0 else ()
            seqpacket.send(peer, api.encode(api.Welcome("node-a", maps=("captured",) if fds else ())), fds)
            for mark in (api.Known(), api.Serving()):
                seqpacket.send(peer, api.encode(mark))
            self._connected.set()
        elif isinstance(message, api.Serve):
            self.ready.set()
        else:
            self.asked.append(message)
            if self.answer_sockets:
                self.give(message)

    def give(self, message: api.GetSockets) -> None:
        """Answer a request for sockets."""
        assert self.peer is not None
        if self.refuse_sockets:
            seqpacket.send(self.peer, api.encode(api.Sockets(message.id, 0, self.refuse_sockets)))
            return
        made = []
        for _ in range(message.count):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.append(sock)
        seqpacket.send(
            self.peer, api.encode(api.Sockets(message.id, len(made))), tuple(s.fileno() for s in made)
        )
        for sock in made:
            sock.close()
