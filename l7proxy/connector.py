"""How an upstream connection is made: straight from the source pod's namespace, or through the node proxy.

Owns the I/O of connecting. An endpoint on this node, or outside the mesh, is dialled on a socket that the agent made in the
source pod's namespace, so that the kernel judges it as any other connection of that pod. An enrolled endpoint on another node
goes to the node proxy with one header; nothing is ever dialled there in plain text. One that is enrolled where this proxy has not
heard it (yet, or any more) the kernel turns to the node proxy, too.
"""

from __future__ import annotations

import asyncio
import os
import socket

from common import logs
from common.tasks import Tasks
from l7proxy.errors import AgentError, Failure
from l7proxy.pool import HostPool
from l7proxy.upstream import UpstreamConnection
from nodeproxy import api as nodeproxy

_log = logs.get(__name__)

#: Seconds that the node proxy may take to connect the stream; it bounds its own steps (certificate: 10 s).
_HANDOFF_TIMEOUT = 25.0


class ConnectError(Exception):
    def __init__(self, detail: str, failure: Failure = Failure.CONNECTION_FAILURE) -> None:
        super().__init__(detail)
        self.detail = detail
        self.failure = failure


class Connector:
    def __init__(self, node: str, nodeproxy_socket: str, tasks: Tasks) -> None:
        self._node = node
        self._nodeproxy_socket = nodeproxy_socket
        self._tasks = tasks
        self.failures = 0
        self._inode = 0

    def node_proxy_changed(self) -> bool:
        """Whether another node proxy has taken the socket over since this was asked last."""
        try:
            inode = os.stat(self._nodeproxy_socket).st_ino
        except OSError:
            return False
        before, self._inode = self._inode, inode
        return before not in (0, inode)

    def tunnelled(self, node: str, enrolled: bool) -> bool:
        """Whether an endpoint's connections go through the node proxy."""
        return enrolled and node != self._node

    def elsewhere(self, node: str) -> bool:
        """Whether the node proxy may carry an endpoint's connections, whatever was heard of it."""
        return node not in ("", self._node)

    def connect(self, pool: HostPool, timeout: float, client_port: int) -> None:
        """Begin; the pool hears how it went. ``timeout`` is the cluster's connect timeout in seconds."""
        self._tasks.start(self._connect(pool, timeout, client_port), name=f"connect {pool.endpoint.host}")

    async def _connect(self, pool: HostPool, timeout: float, client_port: int) -> None:
        try:
            if pool.tunnelled:
                connection = await self._hand_over(pool, client_port)
            else:
                connection = await self._dial(pool, timeout)
        except ConnectError as error:
            self.failures += 1
            _log.debug("upstream connection failed", endpoint=pool.endpoint.host, reason=error.detail)
            pool.failed(error.failure, error.detail)
        except BaseException:
            pool.failed(Failure.CONNECTION_FAILURE, "internal error")
            raise
        else:
            pool.connected(connection)

    async def _dial(self, pool: HostPool, timeout: float) -> UpstreamConnection:
        loop = asyncio.get_running_loop()
        if not pool.pod.enroll.own_like(pool.endpoint.address):
            raise ConnectError("the pod has no address of the endpoint's family")
        try:
            sock = await pool.pod.sockets(ipv6=":" in pool.endpoint.address).take()
        except AgentError as error:
            raise ConnectError(str(error)) from None
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_connect(sock, (pool.endpoint.address, pool.endpoint.port))
            _, connection = await loop.create_connection(lambda: UpstreamConnection(pool), sock=sock)
        except TimeoutError:
            sock.close()
            raise ConnectError("connect timeout") from None
        except OSError as error:
            sock.close()
            raise ConnectError(error.strerror or str(error)) from None
        except BaseException:
            sock.close()
            raise
        return connection

    async def _hand_over(self, pool: HostPool, client_port: int) -> UpstreamConnection:
        loop = asyncio.get_running_loop()
        enroll = pool.pod.enroll
        own = enroll.own_like(pool.endpoint.address)
        if not own:
            raise ConnectError("the pod has no address of the endpoint's family")
        header = nodeproxy.encode(
            nodeproxy.Handoff(
                (own, client_port),
                (pool.endpoint.address, pool.endpoint.port),
                {nodeproxy.Tlv.SOURCE_UID: enroll.uid.encode()},
            )
        )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            async with asyncio.timeout(_HANDOFF_TIMEOUT):
                await loop.sock_connect(sock, self._nodeproxy_socket)
                await loop.sock_sendall(sock, header)
                answer = await loop.sock_recv(sock, 1)
            if not answer:
                raise ConnectError("the node proxy closed the stream")
            if answer[0] != nodeproxy.Status.CONNECTED:
                raise ConnectError(_status_text(answer[0]))
            _, connection = await loop.create_unix_connection(lambda: UpstreamConnection(pool), sock=sock)
        except ConnectError:
            sock.close()
            raise
        except TimeoutError:
            sock.close()
            raise ConnectError("the node proxy did not answer") from None
        except OSError as error:
            sock.close()
            raise ConnectError(f"node proxy: {error.strerror or error}") from None
        except BaseException:
            sock.close()
            raise
        return connection


def _status_text(status: int) -> str:
    try:
        return f"node proxy: {nodeproxy.Status(status).name.lower()}"
    except ValueError:
        return f"node proxy: unknown status {status}"
