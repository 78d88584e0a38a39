"""The network namespaces of this node's pods: descriptors, cookies, and how one is found again.

Owns one descriptor for each attached pod, from ADD to DEL and not longer: an open one keeps a namespace alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from agent import processes
from agent.kernel import namespace


class Namespaces:
    """Descriptors by cookie."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        #: A descriptor's number that was closed may be another file's at once.
        self._lock = threading.Lock()

    def hold(self, cookie: int, netns: int) -> None:
        """Keep a duplicate until :meth:`release_others`."""
        if cookie not in self._fds:
            self._fds[cookie] = os.dup(netns)

    def release_others(self, needed: Collection[int]) -> None:
        """Let go of all but those cookies."""
        for cookie in self._fds.keys() - set(needed):
            with self._lock:
                os.close(self._fds.pop(cookie))

    @contextlib.contextmanager
    def borrow(self, cookie: int) -> Iterator[int]:
        """A descriptor that stays good inside ``with``, also in a thread while the pod is being removed.

        :raises KeyError: no pod with that namespace is attached.
        """
        with self._lock:
            fd = os.dup(self._fds[cookie])
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def borrow_if_there(self, cookie: int) -> Iterator[int | None]:
        """The same, or None where :meth:`borrow` raises."""
        if cookie not in self._fds:
            yield None
            return
        with self.borrow(cookie) as netns:
            yield netns

    async def look(self, netns: int) -> tuple[int, list[str]]:
        """A namespace's cookie and the names of its interfaces.

        :raises OSError: it cannot be entered.
        """

        def work() -> tuple[int, list[str]]:
            return namespace.cookie(netns), namespace.inside(netns, _interfaces)

        return await asyncio.to_thread(work)

    async def find(self, cookie: int, inode: int, path: Path) -> bool:
        """Hold the namespace with that cookie: by its path, or by any process in it. False when it is gone."""
        fds = []
        with contextlib.suppress(OSError):
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        if not fds or os.fstat(fds[0]).st_ino != inode:
            found = await asyncio.to_thread(processes.find_netns, inode)
            fds += [] if found is None else [found]
        try:
            for fd in fds:
                if os.fstat(fd).st_ino != inode:
                    continue
                with contextlib.suppress(OSError):
                    # An inode is used again, a cookie is not.
                    if await asyncio.to_thread(namespace.cookie, fd) == cookie:
                        self.hold(cookie, fd)
                        return True
            return False
        finally:
            for fd in fds:
                os.close(fd)


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]
