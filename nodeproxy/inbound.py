"""HBONE arriving: the server on POD:15008, from the request to the destination's application.

Owns the verdict on each stream. In order: the authority is this pod's (400), the client's SVID is that of the workload at the
source address as the kernel sees it (waiting a little for the controller's word, then 401), policy by identity and by the
client's addresses, and NetworkPolicy (401), delivery (503).
Verdicts are taken again when the mesh changes: what is no longer allowed is reset.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import os
import socket
import time
from typing import NamedTuple

from agent.api import ListenerKind, Purpose
from common import logs
from controlplane.api import Workload
from nodeproxy.accounting import Accounting, Flow, Outcome, Party, Reporter
from nodeproxy.agent_client import AgentClient, Pod
from nodeproxy.certificates import Certificates
from nodeproxy.h2frames import Code
from nodeproxy.h2headers import Request, authority_of, forwarded_for, split_authority
from nodeproxy.h2sending import Stream
from nodeproxy.link import Link
from nodeproxy.loop import OUT, Loop, reset
from nodeproxy.mesh import Mesh
from nodeproxy.relay import Relay
from nodeproxy.tls import Credentials, PeerIdentityError
from nodeproxy.tunnel import party_of_pod, party_of_workload

_log = logs.get(__name__)

#: Seconds that a source address may stay unknown, or another's: addresses travel by another way than packets.
SOURCE_PATIENCE = 2.0
#: Seconds for the application to accept.
CONNECT_TIMEOUT = 10.0
#: Connections to one pod that are not ready yet: whoever makes more, from wherever, costs that pod alone.
HALF_OPEN = 4096
_OWN_PORTS = frozenset(kind.port for kind in ListenerKind)
_IP_BIND_ADDRESS_NO_PORT = 24


class _Question(NamedTuple):
    """What a verdict on an open stream hangs on, beside the mesh."""

    uid: str  #: of the destination
    principal: str
    addresses: tuple[str, ...]  #: the client's
    port: int


class Inbound:
    """All HBONE connections that this node's pods have accepted."""

    def __init__(
        self, loop: Loop, mesh: Mesh, agent: AgentClient, certificates: Certificates, accounting: Accounting
    ) -> None:
        self.loop = loop
        self.mesh = mesh
        self.agent = agent
        self.certificates = certificates
        self.accounting = accounting
        self.waiting: dict[Delivery, None] = {}
        self.open: dict[Delivery, None] = {}
        self._servers: dict[_Server, None] = {}
        self._half_open: collections.Counter[Pod] = collections.Counter()

    def listen(self, pod: Pod, listener: socket.socket) -> None:
        def arrived(sock: socket.socket, remote: tuple[str, int]) -> None:
            if self._half_open[pod] >= HALF_OPEN:
                _log.warning("HBONE refused: too many handshakes", pod=pod.uid, client=remote[0])
                reset(self.loop, sock)
                return
            self._half_open[pod] += 1
            self.certificates.wait(pod.uid, functools.partial(self._serve, pod, sock, remote))

        self.loop.listen(listener, arrived)

    def _serve(self, pod: Pod, sock: socket.socket, remote: tuple[str, int], tls: Credentials | None) -> None:
        if tls is None or pod.withdrawn:
            _log.warning(
                "HBONE refused: no certificate", pod=pod.uid, identity=pod.identity, client=remote[0]
            )
            self.settled(pod)
            reset(self.loop, sock)
            return
        server = _Server(self, pod)
        self._servers[server] = None
        server.link = Link(self.loop, sock, tls, server, client=False, remote=remote)

    def settled(self, pod: Pod) -> None:
        """A connection to the pod is ready, or gone before it was."""
        self._half_open[pod] -= 1
        if not self._half_open[pod]:
            del self._half_open[pod]

    def forget(self, server: _Server) -> None:
        self._servers.pop(server, None)

    def links(self) -> list[Link]:
        return [server.link for server in self._servers if server.link is not None]

    def leave(self, pod: Pod) -> None:
        """Peers are to open no more streams; what is open goes on."""
        for server in list(self._servers):
            if server.pod is pod and server.link is not None:
                server.link.shutdown()
                if server.link.open and not server.link.core.streams:
                    server.link.finish("the pod has left the mesh")

    def withdraw(self, pod: Pod) -> None:
        for server in list(self._servers):
            if server.pod is pod and server.link is not None:
                server.link.close("pod withdrawn")

    def mesh_changed(self) -> None:
        """Judge what waited for it."""
        for delivery in list(self.waiting):
            delivery.decide()

    def judge_again(self) -> None:
        """End every open stream that is no longer allowed."""
        verdicts: dict[_Question, str] = {}
        for delivery in list(self.open):
            delivery.judge_again(verdicts)


class _Server:
    """One accepted connection: what its link reports to."""

    def __init__(self, inbound: Inbound, pod: Pod) -> None:
        self.inbound = inbound
        self.pod = pod
        self.link: Link | None = None
        self._ready = False

    def on_open(self, link: Link) -> None:
        """Chain, validity and trust domain are verified; whose address it is is asked with each stream."""

    def on_ready(self, link: Link) -> None:
        self._ready = True
        self.inbound.settled(self.pod)

    def on_request(self, link: Link, stream: Stream, request: Request) -> None:
        Delivery(self.inbound, self.pod, link, stream, request).decide()

    def on_goaway(self, link: Link) -> None:
        pass

    def on_stream_gone(self, link: Link) -> None:
        if link.core.closing and not link.core.streams and not link.closed:
            link.finish("drained")

    def on_closed(self, link: Link, reason: str) -> None:
        if link.peer is None:
            _log.warning("HBONE refused", pod=self.pod.uid, client=link.remote[0], reason=reason)
        else:
            _log.debug("HBONE connection closed", peer=link.name, reason=reason)
        if not self._ready:
            self.inbound.settled(self.pod)
        self.inbound.forget(self)


class Delivery:
    """One stream, until its relay takes over; then what judges it again."""

    def __init__(self, inbound: Inbound, pod: Pod, link: Link, stream: Stream, request: Request) -> None:
        self._all = inbound
        self._pod = pod
        self._link = link
        self._stream = stream
        self._request = request
        self._early = bytearray()
        self._ended = False
        self._over = False
        self._sock: socket.socket | None = None
        self._relay: Relay | None = None
        self._port = 0
        self._address = ""  #: the pod's that is meant
        self._own_port = True
        self._broken = Outcome.RESET  #: what an open tunnel that breaks off counts as
        self._timer = inbound.loop.later(SOURCE_PATIENCE, self._unknown)
        stream.owner = self
        inbound.waiting[self] = None
        assert link.peer is not None
        self._peer = link.peer
        who = inbound.mesh.at(link.remote[0])
        source = Party(principal=str(link.peer.identity))
        if who is not None and who.identity == str(link.peer.identity):
            source = party_of_workload(who)
        self._client = (link.remote[0], 0)
        told = forwarded_for(request.get(b"forwarded"))
        if told is not None and told[0] == link.remote[0]:
            self._client = told
        self._flow = Flow(
            Reporter.DESTINATION,
            source,
            party_of_pod(pod, inbound.mesh),
            ("", "", ""),
            (authority_of(*self._client), request.authority),
            inbound.loop.now,
        )
        inbound.accounting.begin(self._flow)

    # --- verdict -----------------------------------------------------------------------------------------------------

    def _unknown(self) -> None:
        self._refuse(401, Outcome.IDENTITY, f"{self._peer.identity} is not known at {self._link.remote[0]}")

    def _verified(self) -> Workload | None:
        """The destination workload, if the client is who the mesh says is at its address; None: not known (yet)."""
        source = self._all.mesh.at(self._link.remote[0])
        if source is None or source.identity != str(self._peer.identity):
            return None
        self._flow.source = party_of_workload(source)
        return self._all.mesh.workloads.get(self._pod.uid)

    def decide(self) -> None:
        """Judge now, or wait for the mesh to know the client."""
        if self._over:
            return
        if self._request.method != "CONNECT":
            self._refuse(400, Outcome.INVALID, f"method {self._request.method}")
            return
        target = split_authority(self._request.authority)
        if target is None or target[0] not in self._pod.addresses or target[1] in _OWN_PORTS:
            self._refuse(400, Outcome.INVALID, f"authority {self._request.authority} is not of this pod")
            return
        self._address, self._port = target
        trust = self._all.mesh.trust
        try:
            if trust is None:
                raise PeerIdentityError("nobody is trusted yet")
            self._peer.verify(trust, time.time())
        except PeerIdentityError as error:
            self._refuse(401, Outcome.IDENTITY, str(error))
            return
        if self._verified() is None:
            return
        self._timer.cancel()
        self._all.waiting.pop(self, None)
        if not self._has_client():
            self._refuse(400, Outcome.INVALID, f"the client has no address of the family of {self._address}")
            return
        if refusal := self._judge(self._question()):
            self._refuse(401, Outcome.DENIED, refusal)
            return
        self._all.open[self] = None
        self._all.agent.get_socket(self._pod, Purpose.DELIVERY, self._address, self._have_socket)

    def _has_client(self) -> bool:
        """Whether there is a client's address to deliver from: a peer may carry one family in a connection of the other."""
        source = self._all.mesh.at(self._link.remote[0])
        known = (self._client[0], *(source.addresses if source is not None else ()))
        found = next((one for one in known if (":" in one) == (":" in self._address)), None)
        if found is None:
            return False
        if found != self._client[0]:
            self._client = (found, 0)
        return True

    def judge_again(self, verdicts: dict[_Question, str]) -> None:
        """After a change. ``verdicts`` remembers those of this round: empty is allowed, else the reason."""
        address = self._link.remote[0]
        source = self._all.mesh.at(address)
        if source is not None and source.identity != str(self._peer.identity):
            reason = f"{source.identity} is at the source address now"
        else:
            key = self._question()
            if key not in verdicts:
                verdicts[key] = self._judge(key)
            reason = verdicts[key]
        if not reason:
            return
        self._broken = Outcome.DENIED
        if self._relay is not None:
            self._relay.abort(reason, Code.CANCEL)
        else:
            self._refuse(401, Outcome.DENIED, reason)

    def _question(self) -> _Question:
        # Where its connection comes from and what the application is shown: of one family they are the same.
        addresses = dict.fromkeys((self._link.remote[0], self._client[0]))
        return _Question(self._pod.uid, self._peer.identity.principal, tuple(addresses), self._port)

    def _judge(self, question: _Question) -> str:
        """Why it may not be; empty if it may. All of the client's addresses have to be allowed."""
        workload = self._all.mesh.workloads.get(question.uid)
        if workload is None:
            return ""  # The pod is on its way out: the agent withdraws it.
        refusals = (
            self._all.mesh.refuses(workload, question.principal, address, question.port)
            for address in question.addresses
        )
        return next(filter(None, refusals), "")

    # --- delivery ----------------------------------------------------------------------------------------------------

    def _have_socket(self, sock: socket.socket | None) -> None:
        if self._over:
            if sock is not None:
                sock.close()
            return
        if sock is None:
            self._refuse(503, Outcome.UNREACHABLE, "no socket from the agent")
            return
        self._sock = sock
        self._timer.cancel()
        self._timer = self._all.loop.later(CONNECT_TIMEOUT, self._too_slow)
        try:
            self._bind(sock)
            code = sock.connect_ex((self._address, self._port))
        except OSError as error:
            code = error.errno or errno.EIO
        if code in (0, errno.EINPROGRESS):
            self._all.loop.add(sock.fileno(), OUT, self._connected)
        elif code in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) and self._own_port:
            # The client's own port is taken here by an earlier connection: any other of its address.
            self._own_port = False
            self._sock = None
            self._all.loop.close(sock)
            self._all.agent.get_socket(self._pod, Purpose.DELIVERY, self._address, self._have_socket)
        else:
            self._refuse(503, Outcome.UNREACHABLE, os.strerror(code))

    def _bind(self, sock: socket.socket) -> None:
        """To the client's address, so that the application sees its true peer."""
        address, port = self._client
        if self._own_port and port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((address, 0))

    def _connected(self, _events: int) -> None:
        sock = self._sock
        assert sock is not None
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._refuse(503, Outcome.UNREACHABLE, os.strerror(code))
            return
        self._timer.cancel()
        self._all.loop.remove(sock.fileno())
        self._link.core.respond(self._stream, 200, end=False)
        self._link.mark()
        relay = self._relay = Relay(self._all.loop, self._link, self._stream, sock, self._done)
        self._flow.counts = relay
        if self._early:
            relay.on_data(memoryview(bytes(self._early)))
            self._early.clear()
        if self._ended and not relay.closed:
            relay.on_end()

    def _done(self, _relay: Relay, reason: str) -> None:
        self._over = True
        self._all.open.pop(self, None)
        outcome = self._broken if reason else Outcome.OK
        self._all.accounting.end(self._flow, outcome, reason)

    def _too_slow(self) -> None:
        self._refuse(503, Outcome.TIMEOUT, "the application does not accept")

    def _refuse(self, status: int, outcome: Outcome, reason: str) -> None:
        if self._over:
            return
        self._give_up(outcome, reason)
        if not self._link.closed:
            self._link.core.respond(self._stream, status, end=True)
            # The client may still be sending: nobody reads it (RFC 9113, section 8.1).
            self._link.reset(self._stream, Code.NO_ERROR)
            self._link.stream_done()

    def _give_up(self, outcome: Outcome, reason: str) -> None:
        self._over = True
        self._timer.cancel()
        self._all.waiting.pop(self, None)
        self._all.open.pop(self, None)
        if self._sock is not None:
            with contextlib.suppress(OSError):
                reset(self._all.loop, self._sock)
        self._all.accounting.end(self._flow, outcome, reason)

    # --- the stream's owner until the relay takes over ----------------------------------------------------------------

    def on_data(self, data: memoryview) -> None:
        """A client that does not wait for the answer: bounded by the stream's window, which is not given back yet."""
        if not self._over:
            self._early += data

    def on_end(self) -> None:
        self._ended = True

    def on_window(self) -> None:
        pass

    def on_response(self, status: int) -> None:
        pass

    def on_reset(self, code: Code) -> None:
        if not self._over:
            self._give_up(Outcome.RESET, f"stream reset: {code.name}")
