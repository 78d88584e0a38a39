"""The enrolled pods of this node as the proxy knows them, and the stock of sockets in each one's namespace.

Owns, for each pod, its description, its downstream connections, its upstream pools and its sockets. A pod is keyed by
(UID, network namespace cookie): a new sandbox of the same pod shares nothing with the old one.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.api import Enroll
from common import logs
from l7proxy.errors import AgentError

if TYPE_CHECKING:
    from l7proxy.downstream import DownstreamConnection
    from l7proxy.metrics import Series
    from l7proxy.pool import HostPool

_log = logs.get(__name__)

PodKey = tuple[str, int]

#: Sockets kept ready for each pod, and how few make the proxy ask for more.
STOCK = 8
LOW = 4
#: Most sockets of one request to the agent (a packet holds 64 descriptors).
MAX_REQUEST = 32
#: Seconds that a new connection waits for a socket when the agent is away.
SOCKET_WAIT = 20.0


class Sockets:
    """Unconnected sockets in one pod's namespace. ``request(count)`` asks the agent and returns at once."""

    def __init__(self, request: Callable[[int], bool]) -> None:
        self._request = request
        self._ready: deque[socket.socket] = deque()
        self._waiters: deque[asyncio.Future[socket.socket]] = deque()
        self._asked = 0
        self.closed = False

    async def take(self) -> socket.socket:
        """A socket; the caller owns it.

        :raises AgentError: none came within :data:`SOCKET_WAIT` seconds, or the pod is gone.
        """
        if self.closed:
            raise AgentError("the pod was withdrawn")
        if self._ready:
            found = self._ready.popleft()
            self.replenish()
            return found
        waiter: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self.replenish()
        try:
            async with asyncio.timeout(SOCKET_WAIT):
                return await waiter
        except TimeoutError:
            raise AgentError(f"no socket from the agent within {SOCKET_WAIT:.0f} s") from None
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().close()
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def replenish(self) -> None:
        wanted = len(self._waiters) + STOCK - len(self._ready) - self._asked
        if not self.closed and (wanted >= STOCK - LOW or len(self._waiters) > self._asked):
            count = min(wanted, MAX_REQUEST)
            if self._request(count):
                self._asked += count

    def arrived(self, count: int, found: list[socket.socket], error: str) -> None:
        """The agent's answer to a request for ``count``."""
        self._asked = max(0, self._asked - count)
        if error and not found:
            # Those who wait hear it at once: they would only wait for the same answer again.
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(AgentError(error))
            self._waiters.clear()
            return
        self._ready.extend(found)
        while self._waiters and self._ready:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(self._ready.popleft())
        if self.closed:
            self.close("the pod was withdrawn")
        elif self._waiters:
            self.replenish()

    def agent_lost(self) -> None:
        """Nothing that was asked will come; who waits goes on waiting for the next agent."""
        self._asked = 0

    def close(self, reason: str) -> None:
        self.closed = True
        while self._ready:
            self._ready.popleft().close()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(AgentError(reason))
        self._waiters.clear()


def _ask(request: Callable[[int, bool], bool], ipv6: bool, count: int) -> bool:
    return request(count, ipv6)


class Pod:
    def __init__(self, enroll: Enroll, request: Callable[[int, bool], bool]) -> None:
        """``request(count, ipv6)`` asks the agent for sockets and returns at once."""
        self.enroll = enroll
        self._sockets = {ipv6: Sockets(functools.partial(_ask, request, ipv6)) for ipv6 in (False, True)}
        self.downstream: set[DownstreamConnection] = set()
        self.pools: dict[str, HostPool] = {}
        #: metric series of requests that reached no endpoint; see l7proxy.metrics
        self.series: dict[tuple[str, int, str], Series] = {}
        self.server: asyncio.Server | None = None
        self.listener = 0  #: the cookie (SO_COOKIE) of the server's socket
        self.replaced: list[asyncio.Server] = []  #: earlier ones, for what was on its way to them
        self.withdrawn = False
        self.left = False  #: the mesh, and runs on

    def sockets(self, *, ipv6: bool) -> Sockets:
        """Those of a family."""
        return self._sockets[ipv6]

    def replenish(self) -> None:
        """Keep sockets ready of each family that the pod has."""
        for ipv6 in {":" in address for address in self.enroll.own}:
            self._sockets[ipv6].replenish()

    def agent_lost(self) -> None:
        for sockets in self._sockets.values():
            sockets.agent_lost()

    @property
    def key(self) -> PodKey:
        return self.enroll.uid, self.enroll.netns_cookie

    def describe(self, enroll: Enroll) -> None:
        """The workload's description changed: later requests carry the new labels."""
        self.enroll = enroll
        self.series.clear()
        for pool in self.pools.values():
            pool.series.clear()

    def leave(self) -> None:
        """It runs on outside the mesh: no new connections; those that are open go on until they end."""
        self.left = True
        if self.server is not None:
            self.server.close()
            self.server = None
        _log.info("pod left", uid=self.enroll.uid, pod=f"{self.enroll.namespace}/{self.enroll.name}")

    def close_servers(self) -> None:
        """Accept no more."""
        for server in (*self.replaced, *([] if self.server is None else [self.server])):
            server.close()
        self.replaced.clear()
        self.server = None

    def withdraw(self) -> None:
        """Close the listener, every connection and every socket."""
        self.withdrawn = True
        self.close_servers()
        for connection in list(self.downstream):
            connection.abort()
        for pool in list(self.pools.values()):
            pool.close()
        self.pools.clear()
        for sockets in self._sockets.values():
            sockets.close("the pod was withdrawn")
        _log.info("pod withdrawn", uid=self.enroll.uid, pod=f"{self.enroll.namespace}/{self.enroll.name}")
