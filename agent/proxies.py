"""Serves the proxies of this node by :mod:`agent.api`: which pods they carry, listeners and sockets in those pods.

Owns the sessions and what each holds. Whether a pod is enrolled is the node's word (:class:`Enrolled`), how a socket comes to
be in a namespace is the kernel's (:class:`Sockets`). No duplicate of a listener stays here: when its proxy dies, it is dead,
and the kernel refuses.

Several proxies of a role may be connected, while one replaces another (:mod:`agent.api`): the foremost gets listeners, the
others keep what they have. Foremost is whoever is ready to serve, of these the one that started last.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from agent import api, processes
from agent.packets import Connection
from common import logs
from common.seqpacket import PacketError

_log = logs.get(__name__)

_HELLO_TIMEOUT = 5.0
#: Seconds that a proxy may take to read what is sent to it before its connection is given up.
_SEND_TIMEOUT = 2.0
_MAX_SOCKETS = 32
#: Seconds after an agent's start in which proxies come back, in any order: what lives in the kernel stays as it is meanwhile.
_RETURN = 5.0
#: Seconds for a process that ends to close its listeners, after its connection to the agent.
_CLOSING = 1.0

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

    def ended(self) -> Sequence[tuple[str, int]]:
        """(UID, netns cookie) of pods that ended while no agent was there to say so."""
        ...

    def attached(self, uid: str, netns_cookie: int) -> bool:
        """Whether this is a pod of this node, enrolled or not: one that has left goes on with what it has open."""
        ...


class Sockets(Protocol):
    """Sockets in pods' namespaces. Descriptors that are returned belong to the caller; failures are SocketErrors."""

    async def listener(self, netns_cookie: int, addresses: tuple[str, ...], kind: api.ListenerKind) -> int:
        """A listening socket for all of a pod's addresses, which nothing comes to yet."""
        ...

    def publish(self, addresses: tuple[str, ...], kind: api.ListenerKind, fd: int) -> None:
        """Make it the one that the kernel knows: what dials from now on comes to it, and to no other."""
        ...

    def live(self, addresses: tuple[str, ...], kind: api.ListenerKind) -> int:
        """The cookie (SO_COOKIE) of the one that the kernel knows; 0 when there is none, not for all, or it is closed."""
        ...

    async def outgoing(
        self, netns_cookie: int, purpose: api.Purpose, count: int, *, ipv6: bool
    ) -> list[int]: ...


class _Outgoing(NamedTuple):
    message: bytes
    fds: tuple[int, ...]


class Session:
    """One connected proxy."""

    def __init__(
        self,
        connection: Connection,
        hello: api.Hello,
        kinds: tuple[api.ListenerKind, ...],
        *,
        started: int,
        returned: bool,
    ) -> None:
        """``started`` is comparable between processes of this machine.

        :param returned: it comes back with what it has, to a new agent: unless that turns out to be wrong, nothing changes.
        """
        self.role = hello.role
        self.kinds = kinds
        self.pid = connection.peer.pid
        self.version = hello.version
        self.serving = hello.serving
        self.started = started
        self.returned = returned
        #: Cookies of its listeners; 0 for one that an older proxy does not tell.
        self.holds: dict[tuple[int, api.ListenerKind], int] = {
            (held.netns_cookie, held.kind): held.socket for held in hello.held
        }
        self._connection = connection
        # Messages to one proxy go out one after the other: a packet never overtakes.
        self._sending = asyncio.Lock()

    async def send(self, message: api.FromAgent, fds: Sequence[int] = ()) -> None:
        """Send; the descriptors stay the caller's.

        :raises OSError: the proxy is gone or does not read.
        """
        async with asyncio.timeout(_SEND_TIMEOUT):
            async with self._sending:
                await self._connection.send(api.encode(message), tuple(fds))

    async def tell(self, message: api.Known | api.Serving | api.Drain) -> None:
        """Send, if it understands.

        :raises OSError: as :meth:`send`.
        """
        if self.version >= 2:
            await self.send(message)

    def abort(self) -> None:
        self._connection.abort()


class Proxies:
    """All sessions."""

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
        # One change of listeners at a time, so that the kernel's entry and the foremost session agree.
        self._handing = asyncio.Lock()
        self._began = asyncio.get_running_loop().time()

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
        foremost = False
        try:
            # Pods that ended, or left the mesh and run on, while no agent was there to say so.
            living = [pod.netns_cookie for pod in self._enrolled.enrolled()]
            gone = {(h.uid, h.netns_cookie) for h in hello.held if h.netns_cookie not in living}
            # One that had left the mesh before has no listener, but perhaps sockets and connections.
            if self._since_start() < _RETURN:
                gone |= {one for one in self._enrolled.ended() if one[1] not in living}
            for uid, cookie in gone:
                runs_on = self._enrolled.attached(uid, cookie)
                await session.send(api.Withdraw(uid, cookie, drain=runs_on))
            for cookie in living:
                await self._hand(session, cookie)
            await session.tell(api.Known())
            if not session.returned:
                await self._promote(session)
            while True:
                data, fds = await connection.receive()
                _close(fds)
                if not data:
                    return
                match api.decode_from_proxy(data):
                    case api.GetSockets() as request:
                        await self._get_sockets(session, request)
                    case api.Serve():
                        session.serving, session.returned = True, False
                        await self._promote(session)
                    case _:
                        raise ConnectionAbortedError("a second Hello")
        except (msgspec.DecodeError, TimeoutError) as error:
            _log.warning(
                "proxy is cut off",
                role=session.role.value,
                pid=session.pid,
                reason=str(error) or "does not read",
            )
        finally:
            foremost = self._foremost(session.role) is session
            self._sessions.remove(session)
            _log.info("proxy gone", role=session.role.value, pid=session.pid)
            if foremost:
                await self._fall_back(session.role)

    async def watch(self) -> None:
        """When all who lived before this agent must have come back: whoever is foremost of them has everything from now on."""
        await asyncio.sleep(_RETURN - self._since_start())
        for role in api.Role:
            session = self._foremost(role)
            if session is not None and session.returned:
                session.returned = False
                await self._guarded(session, self._promote(session))

    def _since_start(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    def _foremost(self, role: api.Role) -> Session | None:
        # Backwards, because of equals max() takes the first.
        found = [session for session in reversed(self._sessions) if session.role is role]
        return max(found, key=lambda session: (session.serving, session.started), default=None)

    async def _promote(self, session: Session) -> None:
        """If it is foremost, give it every listener, and tell everybody.

        :raises OSError: it is gone.
        """
        if self._foremost(session.role) is not session:
            return
        for pod in self._enrolled.enrolled():
            await self._hand(session, pod.netns_cookie, told=True)
        if self._foremost(session.role) is not session:
            return
        for other in tuple(self._sessions):
            if other.role is session.role and other is not session:
                _log.info("proxy drains", role=other.role.value, pid=other.pid, successor=session.pid)
                await self._guarded(other, other.tell(api.Drain()))
        _log.info("proxy serves", role=session.role.value, pid=session.pid)
        await session.tell(api.Serving())

    async def _fall_back(self, role: api.Role) -> None:
        """If an older proxy is still there (an upgrade that failed), it takes over again."""
        ending = asyncio.current_task()
        if ending is not None and ending.cancelling():
            return  # it is the agent that ends: whoever has the listeners keeps them
        older = self._foremost(role)
        if older is None:
            return
        older.returned = False
        await self._guarded(older, self._promote(older))
        if not older.serving:
            # It gets only what nobody listens for, and who has just ended may not have closed everything yet.
            await asyncio.sleep(_CLOSING)
            await self._guarded(older, self._promote(older))

    async def enroll(self, pod: api.Enroll) -> None:
        """A pod joined, or its description changed: tell every proxy, with the listeners that it still needs."""
        for session in tuple(self._sessions):
            await self._guarded(session, self._hand(session, pod.netns_cookie))

    async def withdraw(self, uid: str, netns_cookie: int, *, drain: bool = False) -> None:
        """A pod left; with ``drain`` it runs on."""
        # Behind whatever is being handed over at this moment: the last word on a pod is that it is gone.
        async with self._handing:
            for session in tuple(self._sessions):
                session.holds = {key: held for key, held in session.holds.items() if key[0] != netns_cookie}
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
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT):
                data, fds = await connection.receive()
        except TimeoutError:
            raise ProxyRefused("no Hello") from None
        _close(fds)
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
        cgroup, started = self._look_at(connection)
        self._register(hello.role, cgroup)
        maps = dict(self._maps())
        returned = hello.serving and bool(hello.held) and self._since_start() < _RETURN
        session = Session(connection, hello, kinds, started=started, returned=returned)
        try:
            # In the version that it speaks: an older one knows no other.
            await session.send(
                api.Welcome(self._node, version=hello.version, maps=tuple(maps)), tuple(maps.values())
            )
        finally:
            _close(maps.values())
        return session, hello

    def _look_at(self, connection: Connection) -> tuple[processes.Cgroup, int]:
        """The peer's cgroup and when it started."""
        pid = connection.peer.pid
        if pid == 0:
            raise ProxyRefused("the process is in a PID namespace that the agent cannot see")
        # Of enrolled pods only: the proxies may be pods themselves, of which the runtime's plugin has told too.
        if any(pod.netns_cookie == connection.peer_netns for pod in self._enrolled.enrolled()):
            raise ProxyRefused("the process runs in a pod's network namespace")
        try:
            return processes.cgroup_of(pid), processes.started(pid)
        except processes.ProcessError as error:
            raise ProxyRefused(str(error)) from None

    async def _hand(self, session: Session, netns_cookie: int, *, told: bool = False) -> None:
        """Send a pod as it is now, with the listeners that the session lacks; nothing if either has gone meanwhile.

        :param told: it knows the pod, so without listeners there is nothing to say.
        :raises OSError: the proxy is gone.
        """
        made: dict[api.ListenerKind, int] = {}
        async with self._handing:
            pod = next((p for p in self._enrolled.enrolled() if p.netns_cookie == netns_cookie), None)
            if pod is None or session not in self._sessions:
                return
            try:
                for kind in session.kinds if self._foremost(session.role) is session else ():
                    if not self._lacks(session, pod, kind):
                        continue
                    try:
                        made[kind] = await self._sockets.listener(pod.netns_cookie, pod.own, kind)
                    except SocketError as error:
                        # Refused there until the next attempt; the proxy still learns of the pod.
                        self._no_listener(pod, kind, error)
                if told and not made:
                    return
                await session.send(msgspec.structs.replace(pod, listeners=tuple(made)), tuple(made.values()))
                # Only now that it has them: were this process to end in between, the old ones would go on to serve.
                for kind, fd in made.items():
                    try:
                        self._sockets.publish(pod.own, kind, fd)
                    except SocketError as error:
                        self._no_listener(pod, kind, error)
                    else:
                        session.holds[pod.netns_cookie, kind] = self._sockets.live(pod.own, kind)
            finally:
                _close(made.values())

    def _lacks(self, session: Session, pod: api.Enroll, kind: api.ListenerKind) -> bool:
        """Whether it needs a listener: what it has is not the one that the kernel knows."""
        live = self._sockets.live(pod.own, kind)
        if not live:
            return True
        if session.returned or not session.serving:
            return False
        held = session.holds.get((pod.netns_cookie, kind))
        return held is None or held not in (0, live)

    def _no_listener(self, pod: api.Enroll, kind: api.ListenerKind, error: SocketError) -> None:
        _log.error("no listener", pod=f"{pod.namespace}/{pod.name}", kind=kind.value, reason=str(error))

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
                fds = await self._sockets.outgoing(
                    request.netns_cookie, request.purpose, request.count, ipv6=request.ipv6
                )
            except SocketError as failure:
                error = str(failure)
        try:
            await session.send(api.Sockets(request.id, len(fds), error), fds)
        finally:
            _close(fds)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
