"""The network namespaces of this node's pods: descriptors, cookies, and how one is found again.

Owns one descriptor for each attached pod, from ADD to DEL and not longer: an open one keeps a namespace alive. Work inside a
namespace runs in a thread of its own that ends afterwards, so that no thread of the agent is ever left in a pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from agent import processes

_T = TypeVar("_T")

_CLONE_NEWNET = 0x40000000
_SO_NETNS_COOKIE = 71  # asm-generic/socket.h
_libc = ctypes.CDLL(None, use_errno=True)


def inside(netns: int, work: Callable[[], _T]) -> _T:
    """What ``work`` returns when called in a network namespace; blocks.

    :raises OSError: the namespace cannot be entered, or ``work`` raised it.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if _libc.setns(netns, _CLONE_NEWNET) < 0:
                code = ctypes.get_errno()
                raise OSError(code, f"setns: {os.strerror(code)}")
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def cookie_here() -> int:
    """The cookie of the namespace that the calling thread is in; never 0, never used twice in one boot."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])


class Namespaces:
    """Descriptors by cookie."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}

    def hold(self, cookie: int, netns: int) -> None:
        """Keep a duplicate until :meth:`release_others`."""
        if cookie not in self._fds:
            self._fds[cookie] = os.dup(netns)

    def release_others(self, needed: Collection[int]) -> None:
        """Let go of all but those cookies."""
        for cookie in self._fds.keys() - set(needed):
            os.close(self._fds.pop(cookie))

    @contextlib.contextmanager
    def borrow(self, cookie: int) -> Iterator[int]:
        """A descriptor that stays good inside ``with``, also in a thread while the pod is being removed.

        :raises KeyError: no pod with that namespace is attached.
        """
        fd = os.dup(self._fds[cookie])
        try:
            yield fd
        finally:
            os.close(fd)

    async def look(self, netns: int) -> tuple[int, list[str]]:
        """A namespace's cookie and the names of its interfaces.

        :raises OSError: it cannot be entered.
        """

        def work() -> tuple[int, list[str]]:
            return cookie_here(), [name for _, name in socket.if_nameindex()]

        return await asyncio.to_thread(inside, netns, work)

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
                    if await asyncio.to_thread(inside, fd, cookie_here) == cookie:
                        self.hold(cookie, fd)
                        return True
            return False
        finally:
            for fd in fds:
                os.close(fd)
