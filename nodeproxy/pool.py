"""HBONE connections to other nodes' pods: which stream goes on which connection.

Owns the connections that this node dialled, by :class:`Key`; a connection is used again only under the certificate, trust and
peer identity that hold now. Streams beyond what a peer allows on one connection wait, or get another connection.
"""

from __future__ import annotations

import collections
import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.api import Purpose
from common import logs
from nodeproxy.accounting import Outcome
from nodeproxy.agent_client import AgentClient, Pod
from nodeproxy.certificates import Certificates
from nodeproxy.h2headers import Request
from nodeproxy.h2sending import Stream
from nodeproxy.link import Link
from nodeproxy.loop import Loop
from nodeproxy.tls import Credentials, PeerIdentityError

_log = logs.get(__name__)

HBONE_PORT = 15008
#: Seconds that a connection without streams is kept.
IDLE = 60.0
_SWEEP = 10.0


class Key(NamedTuple):
    """Streams with equal keys may share a connection."""

    uid: str
    netns_cookie: int
    identity: str
    address: str  #: the destination workload's
    expected: str  #: ``spiffe://...`` of the destination workload


class PoolError(NamedTuple):
    outcome: Outcome
    reason: str


#: Gets a link with room for a stream, to be used at once, or why there is none.
Taker = Callable[[Link | PoolError], None]


@dataclass(eq=False)
class _Group:
    pod: Pod
    key: Key
    links: list[_Dialled] = field(default_factory=list)
    waiters: collections.deque[Taker] = field(default_factory=collections.deque)
    dialling: int = 0


class Pool:
    def __init__(self, loop: Loop, agent: AgentClient, certificates: Certificates) -> None:
        self._loop = loop
        self._agent = agent
        self._certificates = certificates
        self._groups: dict[Key, _Group] = {}
        loop.later(_SWEEP, self._sweep)

    def take(self, pod: Pod, key: Key, tls: Credentials, taker: Taker) -> None:
        """Find or dial a connection; ``taker`` is called once, maybe at once."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(pod, key)
        link = self._usable(group, tls)
        if link is not None:
            taker(link)
            return
        group.waiters.append(taker)
        if not group.dialling:
            self._dial(group, tls)

    def _usable(self, group: _Group, tls: Credentials) -> Link | None:
        for dialled in list(group.links):
            link = dialled.link
            if link is None or link.closed or link.peer is None or not dialled.ready:
                continue
            if link.credentials.svid is not tls.svid:
                self._retire(dialled)  # Our own certificate was renewed: the old one would expire on it.
                continue
            try:
                link.peer.verify(tls.trust, time.time())
            except PeerIdentityError as error:
                _log.warning("HBONE connection not used again", peer=link.name, reason=str(error))
                self._retire(dialled)
                continue
            if link.core.available:
                return link
        return None

    def _retire(self, dialled: _Dialled) -> None:
        """No new streams; it ends with its last one."""
        link = dialled.link
        dialled.ready = False
        if link is not None:
            link.shutdown()
            if not link.core.streams:
                link.finish("not needed any more")

    def _dial(self, group: _Group, tls: Credentials) -> None:
        group.dialling += 1
        dialled = _Dialled(self, group)
        group.links.append(dialled)

        def have(sock: socket.socket | None) -> None:
            if sock is None:
                self.lost(dialled, PoolError(Outcome.UNREACHABLE, "no socket from the agent"))
                return
            remote = (group.key.address, HBONE_PORT)
            code = sock.connect_ex(remote)
            if code not in (0, errno.EINPROGRESS):
                sock.close()
                self.lost(dialled, PoolError(Outcome.UNREACHABLE, errno.errorcode.get(code, str(code))))
                return
            dialled.link = Link(self._loop, sock, tls, dialled, client=True, remote=remote)

        self._agent.get_socket(group.pod, Purpose.OUTBOUND, group.key.address, have)

    def serve(self, group: _Group) -> None:
        """Give streams to those who wait, as far as there is room."""
        while group.waiters:
            tls = self._certificates.get(group.pod.uid)
            if tls is None:  # It expired meanwhile, or the pod is gone.
                group.waiters.popleft()(PoolError(Outcome.IDENTITY, "no certificate for the source workload"))
                continue
            link = self._usable(group, tls)
            if link is None:
                if not group.dialling:
                    self._dial(group, tls)
                return
            group.waiters.popleft()(link)

    def lost(self, dialled: _Dialled, error: PoolError) -> None:
        group = dialled.group
        if dialled in group.links:
            group.links.remove(dialled)
        if not dialled.was_ready:
            group.dialling -= 1
            # What one attempt met the others would meet: all who wait for it are told, the next one tries anew.
            if not group.dialling:
                waiters, group.waiters = group.waiters, collections.deque()
                for taker in waiters:
                    taker(error)
        if not group.links and not group.waiters:
            self._groups.pop(group.key, None)
        elif group.waiters:
            self.serve(group)

    def withdraw(self, pod: Pod) -> None:
        """The pod is gone: so are its connections."""
        for key, group in list(self._groups.items()):
            if (key.uid, key.netns_cookie) == (pod.uid, pod.netns_cookie):
                for dialled in list(group.links):
                    if dialled.link is not None:
                        dialled.link.close("pod withdrawn")

    def links(self) -> list[Link]:
        return [d.link for group in self._groups.values() for d in group.links if d.link is not None]

    def _sweep(self) -> None:
        self._loop.later(_SWEEP, self._sweep)
        for dialled in [d for group in self._groups.values() for d in group.links]:
            link = dialled.link
            if (
                link is not None
                and dialled.ready
                and not link.core.streams
                and self._loop.now - link.idle_since > IDLE
            ):
                self._retire(dialled)


class _Dialled:
    """One connection of the pool: what :class:`nodeproxy.link.Link` reports to."""

    def __init__(self, pool: Pool, group: _Group) -> None:
        self.pool = pool
        self.group = group
        self.link: Link | None = None
        self.ready = False
        self.was_ready = False
        self._identity_failed = False

    def on_open(self, link: Link) -> None:
        assert link.peer is not None
        if str(link.peer.identity) != self.group.key.expected:
            self._identity_failed = True
            raise PeerIdentityError(f"{link.peer.identity} instead of {self.group.key.expected}")

    def on_ready(self, link: Link) -> None:
        self.ready = self.was_ready = True
        self.group.dialling -= 1
        self.pool.serve(self.group)

    def on_request(self, link: Link, stream: Stream, request: Request) -> None:
        """Servers open no streams: the core has refused it."""

    def on_goaway(self, link: Link) -> None:
        self.ready = False
        if not link.core.streams:
            link.finish("the peer said GOAWAY")

    def on_stream_gone(self, link: Link) -> None:
        if self.group.waiters and self.ready:
            self.pool.serve(self.group)
        if not self.ready and not link.core.streams and not link.closed:
            link.finish("drained")

    def on_closed(self, link: Link, reason: str) -> None:
        self.ready = False
        if not self.was_ready:
            _log.warning("no HBONE connection", peer=link.name, source=self.group.key.identity, reason=reason)
        outcome = Outcome.UNREACHABLE if reason.startswith("connect") else Outcome.TLS
        if reason.startswith("peer") or "certificate" in reason:
            outcome = Outcome.IDENTITY
        self.pool.lost(self, PoolError(outcome, reason))
