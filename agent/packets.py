"""SEQPACKET sockets on the event loop: one server class for the plugin's socket and the proxies'.

Owns accepting, waiting and closing; messages are bytes here. Framing and descriptors are :mod:`common.seqpacket`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from common import logs, seqpacket
from common.tasks import Tasks

_log = logs.get(__name__)

_UCRED = struct.Struct("iII")
_SO_NETNS_COOKIE = 71


class PeerCredentials(NamedTuple):
    """Who connected, as the kernel took it down at connect(2). ``pid`` is 0 outside our PID namespace."""

    pid: int
    uid: int
    gid: int


class Connection:
    """One connection; a reader and a writer may wait at the same time, two readers or two writers may not."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        seqpacket.prepare(sock)
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    @property
    def peer(self) -> PeerCredentials:
        data = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return PeerCredentials(*_UCRED.unpack(data))

    @property
    def peer_netns(self) -> int:
        """The cookie of the network namespace that the peer's socket was made in.

        A socket that accept(2) makes belongs to the namespace of the one that dialled (unix_stream_connect in the kernel's
        net/unix/af_unix.c), so that nobody has to look into the peer's /proc, which takes CAP_SYS_PTRACE.
        """
        data = self._sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        return int.from_bytes(data, sys.byteorder)

    async def receive(self) -> tuple[bytes, tuple[int, ...]]:
        """One packet and its descriptors, which the caller now owns; empty at the end.

        :raises OSError: the connection broke.
        :raises PacketError: the packet was cut.
        """
        while True:
            try:
                return seqpacket.receive(self._sock)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)

    async def send(self, message: bytes, fds: tuple[int, ...] = ()) -> None:
        """One packet; the caller keeps (and closes) its descriptors.

        :raises OSError: the connection broke.
        :raises PacketError: too large.
        """
        while True:
            try:
                seqpacket.send(self._sock, message, fds)
                return
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)

    @property
    def ended(self) -> bool:
        """Whether the other end has closed, and said no more than was received."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def abort(self) -> None:
        """End it from either side; whoever waits in :meth:`receive` sees the end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Only when nobody waits in it any more."""
        self._sock.close()

    async def _ready(self, add: Callable[..., object], remove: Callable[[int], object]) -> None:
        fd = self._sock.fileno()
        if fd < 0:
            raise ConnectionAbortedError("closed")
        ready: asyncio.Future[None] = self._loop.create_future()
        add(fd, _set, ready)
        try:
            await ready
        finally:
            remove(fd)


class Server:
    """Listens on a path; each connection is served by a task of its own."""

    def __init__(
        self,
        path: Path,
        serve: Callable[[Connection], Awaitable[None]],
        *,
        name: str,
        group: int | None = None,
    ) -> None:
        """:param group: its members may connect too, not only the owner."""
        self._group = group
        self._path = path
        self._serve = serve
        self._name = name
        self._tasks = Tasks()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    def start(self) -> None:
        """Take the path over, also from a predecessor that is still there or did not clean up.

        :raises OSError: the path cannot be bound, or not be given to the group.
        """
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        before = os.umask(0o177)
        try:
            self._sock.bind(str(aside))
        finally:
            os.umask(before)
        if self._group is not None:
            os.chown(aside, -1, self._group)
            aside.chmod(0o660)
        self._sock.listen(1024)
        # Renamed when it listens: nobody ever meets a path that refuses.
        aside.rename(self._path)
        self._tasks.start(self._accept(), name=f"{self._name} accept")

    async def close(self) -> None:
        """End every connection. The path stays: a successor may own it already."""
        await self._tasks.cancel()
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError as error:
                # Out of descriptors, or a client that was gone again: the next may work.
                _log.error("accept failed", socket=str(self._path), reason=str(error))
                await asyncio.sleep(0.1)
                continue
            self._tasks.start(self._run(sock), name=f"{self._name} connection")

    async def _run(self, sock: socket.socket) -> None:
        connection = Connection(sock)
        try:
            await self._serve(connection)
        except (OSError, seqpacket.PacketError) as error:
            _log.debug("connection broke", socket=self._path.name, reason=str(error))
        finally:
            connection.close()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
