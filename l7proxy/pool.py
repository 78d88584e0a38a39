"""Upstream connections of one (source pod, endpoint): which is used, when a new one is made, who waits.

Owns the policy, synchronously: it takes connections and waiters and calls ``connect`` when another connection is wanted;
sockets are :mod:`l7proxy.connector`'s. Pools are per source pod because the destination judges each pod by its identity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from l7proxy.errors import Failure

if TYPE_CHECKING:
    from l7proxy.metrics import Series
    from l7proxy.model import Cluster, Endpoint
    from l7proxy.pods import Pod
    from l7proxy.upstream import UpstreamConnection

#: Seconds that a connection may stay unused. Shorter than common servers' own limit (nginx 75 s), so that the race between
#: their close and our next request is rare.
IDLE_TIMEOUT = 60.0
#: Seconds that a connection to another node is used, or kept unused. The node proxies that carry it are replaced now and then
#: and end with their last connection: none may live for as long as there are requests.
TUNNEL_AGE = 30.0
#: Seconds that a connection has to send what was written when it was closed.
CLOSING = 60.0


class Waiter(Protocol):
    """A request that wants a connection."""

    def on_connection(self, connection: UpstreamConnection) -> None: ...

    def on_connection_failure(self, failure: Failure, detail: str) -> None: ...


class HostPool:
    __slots__ = (
        "_connect", "_idle", "_waiters", "ages", "closed", "connecting", "connections", "endpoint", "pod", "series", "tunnelled",
    )  # fmt: skip

    def __init__(
        self,
        pod: Pod,
        endpoint: Endpoint,
        tunnelled: bool,
        connect: Callable[[HostPool, float, int], None],
        *,
        ages: bool,
    ) -> None:
        self.pod = pod
        self.endpoint = endpoint
        self.tunnelled = tunnelled  #: handed to the node proxy
        self.ages = ages  #: the node proxy may carry them: none is older than TUNNEL_AGE
        self._connect = connect
        self._idle: list[tuple[UpstreamConnection, float]] = []
        self._waiters: deque[tuple[Waiter, Cluster, int]] = deque()  #: with its cluster and its client's port
        self.connections: set[UpstreamConnection] = set()
        self.connecting = 0
        self.series: dict[tuple[str, int, str], Series] = {}
        self.closed = False

    def describe(self, endpoint: Endpoint) -> None:
        """The workload behind the address is described anew: later requests carry the new labels."""
        if endpoint != self.endpoint:
            self.endpoint = endpoint
            self.series.clear()

    def acquire(
        self, waiter: Waiter, cluster: Cluster, client_port: int, *, fresh: bool = False
    ) -> UpstreamConnection | Failure | None:
        """An idle connection now, a failure, or None: ``waiter`` will be called. ``fresh``: never a reused one."""
        if self.closed:
            return Failure.CONNECTION_FAILURE
        while self._idle and not fresh:
            connection, _ = self._idle.pop()
            if connection.usable:
                return connection
        if len(self._waiters) >= cluster.max_pending_requests:
            return Failure.OVERFLOW
        self._waiters.append((waiter, cluster, client_port))
        self._connect_for(cluster, client_port)
        return None

    def forget(self, waiter: Waiter) -> None:
        """The request no longer waits."""
        for item in self._waiters:
            if item[0] is waiter:
                self._waiters.remove(item)
                return

    def connected(self, connection: UpstreamConnection) -> None:
        self.connecting -= 1
        if self.closed:
            connection.close()
            return
        self.connections.add(connection)
        self._offer(connection)

    def failed(self, failure: Failure, detail: str) -> None:
        """A connection attempt failed: the request that has waited longest hears it."""
        self.connecting -= 1
        if self._waiters:
            self._waiters.popleft()[0].on_connection_failure(failure, detail)
        self._connect_for_waiting()

    def release(self, connection: UpstreamConnection) -> None:
        """The connection's exchange is complete and it may carry another."""
        if self.closed or not connection.usable or self._old(connection):
            connection.close()
        else:
            self._offer(connection)

    def _old(self, connection: UpstreamConnection) -> bool:
        return self.ages and monotonic() - connection.made > TUNNEL_AGE

    def lost(self, connection: UpstreamConnection) -> None:
        self.connections.discard(connection)
        if self._idle:
            self._idle = [item for item in self._idle if item[0] is not connection]
        self._connect_for_waiting()

    def sweep(self, now: float, *, wanted: bool) -> bool:
        """Close what has been idle too long, or everything idle if no configuration wants this endpoint. True: empty."""
        limit = now - (TUNNEL_AGE if self.ages else IDLE_TIMEOUT) if wanted else now
        stale = [connection for connection, since in self._idle if since <= limit]
        self._idle = [item for item in self._idle if item[1] > limit]
        for connection in stale:
            connection.close()
        for connection in list(self.connections):
            if connection.closing_since is not None and now - connection.closing_since > CLOSING:
                connection.abort()
        return not self.connections and not self.connecting and not self._waiters

    def renew(self) -> None:
        """What carries the connections is about to end: idle ones are closed, others with what they carry now."""
        for connection in self.connections:
            connection.retired = True
        idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def close(self) -> None:
        self.closed = True
        while self._waiters:
            waiter = self._waiters.popleft()[0]
            waiter.on_connection_failure(Failure.CONNECTION_FAILURE, "the pod was withdrawn")
        for connection in list(self.connections):
            connection.abort()
        self._idle.clear()

    def _connect_for(self, cluster: Cluster, client_port: int) -> None:
        if len(self.connections) + self.connecting < cluster.max_connections:
            self.connecting += 1
            self._connect(self, cluster.connect_timeout, client_port)

    def _connect_for_waiting(self) -> None:
        """A place is free: requests that waited for the connection that had it want another."""
        if not self.closed and len(self._waiters) > self.connecting:
            _, cluster, client_port = self._waiters[self.connecting]
            self._connect_for(cluster, client_port)

    def _offer(self, connection: UpstreamConnection) -> None:
        if self._waiters:
            self._waiters.popleft()[0].on_connection(connection)
        else:
            self._idle.append((connection, monotonic()))
