"""Serves the proxies of this node by :mod:`agent.api`: which pods they carry, listeners and sockets in those pods.

Owns the sessions and what each holds. Whether a pod is enrolled is the node's word (:class:`Enrolled`), how a socket comes to
be in a namespace is the kernel's (:class:`Sockets`). No duplicate of a listener stays here: when its proxy dies, it is dead,
and the kernel refuses.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from agent import api, processes
from agent.packets import Connection, PeerCredentials
from common import logs
from common.seqpacket import PacketError

_log = logs.get(__name__)

_HELLO_TIMEOUT = 5.0
#: Seconds that a proxy may take to read what is sent to it before its connection is given up.
_SEND_TIMEOUT = 2.0
_MAX_SOCKETS = 32

#: Which listeners a role gets if it names none.
_DEFAULT_KINDS = {
    api.Role.NODEPROXY: (api.ListenerKind.OUTBOUND, api.ListenerKind.HBONE),
    api.Role.L7PROXY: (api.ListenerKind.OUTBOUND_L7,),
}
_ALLOWED_KINDS = {
    api.Role.NODEPROXY: frozenset(api.ListenerKind),
    api.Role.L7PROXY: frozenset({api.ListenerKind.OUTBOUND_L7}),
}


class ProxyRefused(Exception):
    """The peer is not served; the text is the reason that it gets."""


class SocketError(Exception):
    """A socket could not be made in a pod's namespace."""


class Enrolled(Protocol):
    """The pods that proxies carry."""

    def enrolled(self) -> Sequence[api.Enroll]:
        """All of them, each without listeners."""
        ...

    def attached(self, uid: str, netns_cookie: int) -> bool:
        """Whether this is a pod of this node, enrolled or not: one that has left goes on with what it has open."""
        ...

    def pod_namespaces(self) -> Collection[int]:
        """Inode numbers of the network namespaces of all attached pods: no proxy runs there."""
        ...


class Sockets(Protocol):
    """Sockets in pods' namespaces. Descriptors that are returned belong to the caller; failures are SocketErrors."""

    async def listener(self, netns_cookie: int, address: str, kind: api.ListenerKind) -> int:
        """A listening socket, known to the kernel as the one for its port from now on."""
        ...

    def has_listener(self, netns_cookie: int, address: str, kind: api.ListenerKind) -> bool:
        """Whether the kernel has a live one."""
        ...

    async def outgoing(self, netns_cookie: int, purpose: api.Purpose, count: int) -> list[int]: ...


class _Outgoing(NamedTuple):
    message: bytes
    fds: tuple[int, ...]


class Session:
    """One connected proxy."""

    def __init__(
        self,
        connection: Connection,
        role: api.Role,
        kinds: tuple[api.ListenerKind, ...],
        held: Collection[api.Held],
        pid: int,
    ) -> None:
        self.role = role
        self.kinds = kinds
        self.pid = pid
        self.holds: set[tuple[int, api.ListenerKind]] = {(h.netns_cookie, h.kind) for h in held}
        self._connection = connection
        # Messages to one proxy go out one after the other: a packet never overtakes.
        self._sending = asyncio.Lock()

    async def send(self, message: api.FromAgent, fds: tuple[int, ...] = ()) -> None:
        """Send, and close the descriptors whatever happens.

        :raises OSError: the proxy is gone or does not read.
        """
        try:
            async with asyncio.timeout(_SEND_TIMEOUT):
                async with self._sending:
                    await self._connection.send(api.encode(message), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def abort(self) -> None:
        self._connection.abort()


class Proxies:
    """All sessions. Of one role the latest is the one that gets listeners; older ones drain and keep what they have."""

    def __init__(
        self,
        *,
        node: str,
        enrolled: Enrolled,
        sockets: Sockets,
        register: Callable[[api.Role, processes.Cgroup], None],
        maps: Callable[[], Mapping[str, int]],
    ) -> None:
        """``register`` makes a cgroup's role known to the kernel and raises ProxyRefused if it must not have it.

        ``maps`` opens the maps that proxies read; the descriptors are closed here.
        """
        self._node = node
        self._enrolled = enrolled
        self._sockets = sockets
        self._register = register
        self._maps = maps
        self._sessions: list[Session] = []
        # One change of listeners at a time, so that the kernel's entry and the latest session agree.
        self._handing = asyncio.Lock()

    def connected(self) -> dict[str, int]:
        """How many proxies of each role are connected."""
        return {role.value: sum(s.role is role for s in self._sessions) for role in api.Role}

    async def serve(self, connection: Connection) -> None:
        """Serve one proxy until its connection ends."""
        try:
            session, hello = await self._greet(connection)
        except ProxyRefused as refusal:
            _log.warning("proxy refused", pid=connection.peer.pid, reason=str(refusal))
            await connection.send(api.encode(api.Refused(str(refusal))))
            return
        _log.info("proxy connected", role=session.role.value, pid=session.pid, held=len(session.holds))
        self._sessions.append(session)
        try:
            # Pods that went while no agent was there to say so.
            living = [pod.netns_cookie for pod in self._enrolled.enrolled()]
            for uid, cookie in {(h.uid, h.netns_cookie) for h in hello.held if h.netns_cookie not in living}:
                await session.send(api.Withdraw(uid, cookie))
            for cookie in living:
                await self._hand(session, cookie)
            while True:
                data, fds = await connection.receive()
                for fd in fds:
                    os.close(fd)
                if not data:
                    return
                message = api.decode_from_proxy(data)
                if not isinstance(message, api.GetSockets):
                    raise ConnectionAbortedError("a second Hello")
                await self._get_sockets(session, message)
        except (msgspec.DecodeError, TimeoutError) as error:
            _log.warning(
                "proxy is cut off",
                role=session.role.value,
                pid=session.pid,
                reason=str(error) or "does not read",
            )
        finally:
            self._sessions.remove(session)
            _log.info("proxy gone", role=session.role.value, pid=session.pid)
            await self._fall_back(session.role)

    async def _fall_back(self, role: api.Role) -> None:
        """If an older proxy is still there (an upgrade that failed), it takes over again."""
        ending = asyncio.current_task()
        if ending is not None and ending.cancelling():
            return  # it is the agent that ends: whoever has the listeners keeps them
        older = [session for session in self._sessions if session.role is role]
        if older:
            for pod in self._enrolled.enrolled():
                await self._guarded(older[-1], self._hand(older[-1], pod.netns_cookie))

    async def enroll(self, pod: api.Enroll) -> None:
        """A pod joined, or its description changed: tell every proxy, with the listeners that it still needs."""
        for session in tuple(self._sessions):
            await self._guarded(session, self._hand(session, pod.netns_cookie))

    async def withdraw(self, uid: str, netns_cookie: int, *, drain: bool = False) -> None:
        """A pod left; with ``drain`` it runs on."""
        # Behind whatever is being handed over at this moment: the last word on a pod is that it is gone.
        async with self._handing:
            for session in tuple(self._sessions):
                session.holds = {(cookie, kind) for cookie, kind in session.holds if cookie != netns_cookie}
                await self._guarded(session, session.send(api.Withdraw(uid, netns_cookie, drain)))

    async def _guarded(self, session: Session, work: Awaitable[None]) -> None:
        """A proxy that cannot be reached does not hold up the others: its own task ends it."""
        try:
            await work
        except (OSError, PacketError, TimeoutError) as error:
            reason = str(error) or "does not read"
            _log.warning("proxy cannot be told", role=session.role.value, pid=session.pid, reason=reason)
            session.abort()

    async def _greet(self, connection: Connection) -> tuple[Session, api.Hello]:
        peer = connection.peer
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT):
                data, fds = await connection.receive()
        except TimeoutError:
            raise ProxyRefused("no Hello") from None
        for fd in fds:
            os.close(fd)
        if not data:
            raise ConnectionAbortedError("gone before it said Hello")
        try:
            hello = api.decode_from_proxy(data)
        except msgspec.DecodeError as error:
            raise ProxyRefused(f"not understood: {error}") from None
        if not isinstance(hello, api.Hello):
            raise ProxyRefused("the first message must be Hello")
        if hello.version not in (api.VERSION, api.VERSION - 1) or hello.version < 1:
            raise ProxyRefused(f"version {hello.version}, this agent serves {api.VERSION}")
        kinds = hello.kinds or _DEFAULT_KINDS[hello.role]
        if not _ALLOWED_KINDS[hello.role].issuperset(kinds):
            raise ProxyRefused(
                f"a {hello.role.value} gets no listeners of the kinds {', '.join(k.value for k in kinds)}"
            )
        self._register(hello.role, self._cgroup_of(peer))
        maps = dict(self._maps())
        session = Session(connection, hello.role, kinds, hello.held, peer.pid)
        await session.send(api.Welcome(self._node, maps=tuple(maps)), tuple(maps.values()))
        return session, hello

    def _cgroup_of(self, peer: PeerCredentials) -> processes.Cgroup:
        if peer.pid == 0:
            raise ProxyRefused("the process is in a PID namespace that the agent cannot see")
        try:
            if processes.netns_inode_of(peer.pid) in self._enrolled.pod_namespaces():
                raise ProxyRefused("the process runs in a pod's network namespace")
            return processes.cgroup_of(peer.pid)
        except processes.ProcessError as error:
            raise ProxyRefused(str(error)) from None

    async def _hand(self, session: Session, netns_cookie: int) -> None:
        """Send a pod as it is now, with the listeners that the session lacks; nothing if either has gone meanwhile.

        :raises OSError: the proxy is gone.
        """
        kinds: list[api.ListenerKind] = []
        fds: list[int] = []
        async with self._handing:
            pod = next((p for p in self._enrolled.enrolled() if p.netns_cookie == netns_cookie), None)
            if pod is None or session not in self._sessions:
                return
            latest = self._latest(session)
            for kind in session.kinds:
                if not latest:
                    continue
                held = (pod.netns_cookie, kind) in session.holds
                if held and self._sockets.has_listener(pod.netns_cookie, pod.address, kind):
                    continue
                try:
                    fds.append(await self._sockets.listener(pod.netns_cookie, pod.address, kind))
                except SocketError as error:
                    # Refused there until the next attempt; the proxy still learns of the pod.
                    _log.error(
                        "no listener", pod=f"{pod.namespace}/{pod.name}", kind=kind.value, reason=str(error)
                    )
                    continue
                kinds.append(kind)
                session.holds.add((pod.netns_cookie, kind))
            await session.send(msgspec.structs.replace(pod, listeners=tuple(kinds)), tuple(fds))

    def _latest(self, session: Session) -> bool:
        return not any(s.role is session.role for s in self._sessions[self._sessions.index(session) + 1 :])

    async def _get_sockets(self, session: Session, request: api.GetSockets) -> None:
        fds: list[int] = []
        error = ""
        if not self._enrolled.attached(request.uid, request.netns_cookie):
            error = f"pod {request.uid} is not enrolled on this node and was not, or of another sandbox"
        elif request.purpose is api.Purpose.DELIVERY and session.role is not api.Role.NODEPROXY:
            error = "only the node proxy delivers"
        elif not 1 <= request.count <= _MAX_SOCKETS:
            error = f"count {request.count} is not from 1 to {_MAX_SOCKETS}"
        else:
            try:
                fds = await self._sockets.outgoing(request.netns_cookie, request.purpose, request.count)
            except SocketError as failure:
                error = str(failure)
        await session.send(api.Sockets(request.id, len(fds), error), tuple(fds))
