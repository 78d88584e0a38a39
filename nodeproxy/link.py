"""An HBONE connection, either end: a socket, TLS on it, and the HTTP/2 core in that.

Owns the socket and the order of things: connect, handshake, peer check, then events to the streams' owners. All receive into
the loop's one buffer; what goes out is written once a turn (:meth:`Link.flush`). Who may do what is the owner's business.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Protocol

from OpenSSL import SSL

from common import logs
from nodeproxy import h2core
from nodeproxy.h2core import Connection
from nodeproxy.h2frames import Code, PeerError
from nodeproxy.h2headers import Request
from nodeproxy.h2sending import Stream
from nodeproxy.loop import BROKEN, IN, OUT, Loop
from nodeproxy.tls import Credentials, Peer, PeerIdentityError, Trust, peer_of

_log = logs.get(__name__)

#: TLS gives at most one record of 16 KiB per read.
RECORD = 16 * 1024
#: Records taken from one connection in one turn, so that none starves the others.
RECORDS = 16
#: A peer that vanishes is noticed within half a minute.
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 15),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 30_000),
)
#: Seconds from the first packet to the peer's first SETTINGS.
HANDSHAKE_TIMEOUT = 10.0


class StreamOwner(Protocol):
    """What a stream reports to; set as ``stream.owner`` when it is opened or requested."""

    def on_data(self, data: memoryview) -> None: ...
    def on_end(self) -> None: ...
    def on_reset(self, code: Code) -> None: ...
    def on_window(self) -> None: ...
    def on_response(self, status: int) -> None: ...


class Resumable(Protocol):
    def resume(self) -> None: ...


class LinkOwner(Protocol):
    def on_open(self, link: Link) -> None:
        """The handshake is complete. ``link.peer`` is verified, its identity not yet compared with who it has to be.

        :raises PeerIdentityError: it is not.
        """

    def on_ready(self, link: Link) -> None:
        """Streams may be opened (client)."""

    def on_request(self, link: Link, stream: Stream, request: Request) -> None: ...

    def on_goaway(self, link: Link) -> None: ...

    def on_stream_gone(self, link: Link) -> None:
        """A stream ended: there may be room for another."""

    def on_closed(self, link: Link, reason: str) -> None:
        """The connection is gone; every stream's owner has been told already."""


class Link:
    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        tls: Credentials,
        owner: LinkOwner,
        *,
        client: bool,
        remote: tuple[str, int],
    ) -> None:
        """:param sock: accepted, or with a connect() in progress (client)."""
        self.loop = loop
        self.sock = sock
        self.credentials = tls
        self.owner = owner
        self.client = client
        self.remote = remote
        self.peer: Peer | None = None
        self.core: Connection  #: once it is open: a handshake that goes nowhere gets no buffers
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self.paused: dict[Resumable, None] = {}  #: who waits for room in the connection, in order
        self.dirty = False
        self.open = False
        self.closed = False
        self._ending = ""  #: why it closes once everything is written
        self.idle_since = loop.now
        self._connected = not client
        self._mask = OUT if client else IN
        self._tls = SSL.Connection(tls.client if client else tls.server, sock)
        if client:
            self._tls.set_connect_state()
        else:
            self._tls.set_accept_state()
        self._deadline = loop.later(HANDSHAKE_TIMEOUT, self._too_slow)
        self._fd = sock.fileno()
        loop.add(self._fd, self._mask, self._on_handshake)

    # --- until it is open ---------------------------------------------------------------------------------------

    def _too_slow(self) -> None:
        self.close("connect timeout" if not self._connected else "handshake timeout")

    def _on_handshake(self, _events: int) -> None:
        if not self._connected:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self.close(f"connect: {os.strerror(error)}")
                return
            self._connected = True
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            self._want(IN)
            return
        except SSL.WantWriteError:
            self._want(OUT)
            return
        except (SSL.Error, OSError) as error:
            self.close(f"handshake: {describe(error)}")
            return
        try:
            self.peer = peer_of(self._tls, self.credentials.trust)
            self.core = Connection(client=self.client, now=self.loop.now)
            self.owner.on_open(self)
        except PeerIdentityError as error:
            self.close(f"peer: {error}")
            return
        self.open = True
        self.loop.handle(self._fd, self._on_events)
        self._want(IN)
        self.mark()

    def _want(self, mask: int) -> None:
        if mask != self._mask:
            self._mask = mask
            self.loop.modify(self._fd, mask)

    # --- open ---------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """There is something to write: flush at the end of this turn."""
        if not self.dirty:
            self.dirty = True
            self.loop.dirty.append(self)

    def _on_events(self, events: int) -> None:
        if events & (IN | BROKEN):
            self._read()
        if events & OUT and not self.closed:
            self.flush()

    def _read(self) -> None:
        receive = self._tls.recv_into
        core = self.core
        now = self.loop.now
        view = self.loop.view
        record = view[:RECORD]
        try:
            for _ in range(RECORDS):
                count = receive(record)
                for kind, stream, value in core.receive(view[:count], now):
                    if kind == h2core.DATA:
                        stream.owner.on_data(value)
                    else:
                        self._event(kind, stream, value)
                if count < RECORD or self.closed:
                    break
        except SSL.WantReadError:
            pass
        except SSL.WantWriteError:
            self._want(IN | OUT)
        except PeerError as error:
            _log.warning("HTTP/2 peer error", peer=self.name, error=str(error))
            self.flush()
            self.close(str(error))
            return
        except SSL.ZeroReturnError:
            self.close("closed by the peer")
            return
        except (SSL.Error, OSError) as error:
            self.close(describe(error))
            return
        if core.tail and not self.closed:
            self.mark()

    def _event(self, kind: int, stream: Stream, value: object) -> None:
        if kind == h2core.END:
            stream.owner.on_end()
        elif kind == h2core.RESET:
            if stream.owner is not None:
                stream.owner.on_reset(value)
            self.owner.on_stream_gone(self)
        elif kind == h2core.RESPONSE:
            stream.owner.on_response(value)
        elif kind == h2core.REQUEST:
            assert isinstance(value, Request)
            self.owner.on_request(self, stream, value)
        elif kind == h2core.WINDOW:
            if stream is None:
                self._resume()
            else:
                stream.owner.on_window()
        elif kind == h2core.READY:
            self._deadline.cancel()
            self.owner.on_ready(self)
        elif kind == h2core.GOAWAY:
            self.owner.on_goaway(self)

    def _resume(self) -> None:
        self.core.starved = False
        if self.paused:
            paused = list(self.paused)
            self.paused.clear()
            for item in paused:
                item.resume()

    def flush(self) -> None:
        """Write what the core has collected, as far as the socket takes it."""
        self.dirty = False
        if self.closed:
            return
        core = self.core
        send = self._tls.send
        try:
            while core.head < core.tail:
                core.sent(send(core.out_view[core.head : core.tail]))
        except SSL.WantWriteError:
            self._want(IN | OUT)
            return
        except (
            SSL.WantReadError
        ):  # does not happen in TLS 1.3 (no renegotiation); the next packet brings us back
            return
        except (SSL.Error, OSError) as error:
            self.close(describe(error))
            return
        if core.overflow:
            self.close("the peer does not read our answers")
            return
        if self._mask != IN:
            self._want(IN)
        if self._ending:
            self.close(self._ending)
        elif core.starved and core.send_window > 0:
            self._resume()

    def pause(self, item: Resumable) -> None:
        """``item`` found no room in the connection: call its resume() when there may be some."""
        self.paused[item] = None

    @property
    def name(self) -> str:
        who = self.peer.identity if self.peer else "?"
        return f"{who}@{self.remote[0]}:{self.remote[1]}"

    def stream_done(self) -> None:
        """The owner of a stream has let it go."""
        if not self.core.streams:
            self.idle_since = self.loop.now
        self.owner.on_stream_gone(self)

    def reset(self, stream: Stream, code: Code) -> None:
        if not self.closed:
            self.core.reset(stream, code)
            self.mark()

    def warn(self) -> None:
        """Say that :meth:`shutdown` will come: the peer opens its new streams elsewhere, what it has just opened is served."""
        if not self.closed and self.open and not self.core.closing:
            self.core.warn()
            self.mark()

    def shutdown(self) -> None:
        """Say that no new streams are wanted; the connection ends with its last stream."""
        if not self.closed and self.open:
            self.core.shutdown()
            self.mark()

    def verify_again(self, trust: Trust) -> None:
        """Close it if the peer is not trusted any more."""
        try:
            if self.peer is not None and not self.closed:
                self.peer.verify(trust, time.time())
        except PeerIdentityError as error:
            self.close(f"peer: {error}")

    def finish(self, reason: str) -> None:
        """Close as soon as what its streams left is written; there are none any more, and come no more."""
        if not self.closed:
            self._ending = reason
            self.mark()

    def abort(self) -> None:
        self.close("internal error")

    def close(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        was_open, self.open = self.open, False
        self._deadline.cancel()
        self.paused.clear()
        try:
            self._tls.shutdown()
        except (SSL.Error, OSError):
            pass
        self.loop.close(self.sock)
        if was_open:
            streams = list(self.core.streams.values())
            self.core.streams.clear()
            for stream in streams:
                if stream.owner is not None:
                    stream.owner.on_reset(Code.CONNECT_ERROR)
        self.owner.on_closed(self, reason)


def describe(error: Exception) -> str:
    """A TLS or socket error in words."""
    if isinstance(error, SSL.SysCallError):
        number = error.args[0] if error.args else -1
        return os.strerror(number) if number > 0 else "connection lost"
    if isinstance(error, SSL.Error) and error.args and error.args[0]:
        return "; ".join(str(part[-1]) for part in error.args[0])
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, str(error))
    return str(error) or type(error).__name__
