"""One connection of an application: requests in, answers out in their order.

Owns its transport and request reader, and whether the connection lives on. Requests are taken one at a time: what is
pipelined behind the one under way waits unparsed, within bounds.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from time import monotonic
from typing import TYPE_CHECKING, cast

from common.addresses import end_of
from l7proxy import headers
from l7proxy.errors import REPLIES, ProtocolError, failure_of
from l7proxy.http1.head import RequestHead
from l7proxy.http1.reader import End, RequestReader
from l7proxy.model import Config, Destination
from l7proxy.record import Record
from l7proxy.stream import Stream
from l7proxy.upstream import HIGH_WATER

if TYPE_CHECKING:
    from l7proxy.pods import Pod
    from l7proxy.server import Proxy

#: Bytes that may be pipelined behind a request before the client is paused.
PIPELINE_LIMIT = 64 * 1024
#: Open connections of one pod; further ones are closed, since descriptors and memory are those of every pod of the node.
MAX_CONNECTIONS = 16_384
#: Seconds that a connection is read and discarded after its last response, so that a reset does not overtake it.
LINGER = 1.0
#: Seconds that a connection which is closing is kept while its client takes nothing of what is left.
CLOSING = 60.0
_RESET = struct.pack("ii", 1, 0)  # struct linger: no lingering


class DownstreamConnection(asyncio.Protocol):
    __slots__ = (
        "_aborting", "_closing", "_config", "_destination", "_known", "_pumping", "_reader", "_tunnel", "_unsent", "held",
        "original", "peer", "pod", "proxy", "stream", "touched", "transport", "write_paused",
    )  # fmt: skip

    transport: asyncio.Transport

    def __init__(self, proxy: Proxy, pod: Pod) -> None:
        self.proxy = proxy
        self.pod = pod
        self.stream: Stream | None = None
        self.peer = ("", 0)
        self.original = ("", 0)
        self.touched = monotonic()
        self.write_paused = False
        self.held: set[str] = set()  #: why the client is not being read
        self._reader = RequestReader()
        self._closing = False
        self._aborting = False
        self._tunnel = False
        self._pumping = False
        self._unsent = 0  #: bytes in the transport when idle times were last looked at
        self._known: Config | None = None
        self._config = proxy.config
        self._destination: Destination | None = None

    def destination(self) -> tuple[Config, Destination | None]:
        """Who serves what the application dialled, and by which configuration; looked up once for each that is new."""
        if self.proxy.config is not self._known:
            self._known = self.proxy.config
            self._config, self._destination = self.proxy.destination(self.original)
        return self._config, self._destination

    @property
    def leaving(self) -> bool:
        """What was dialled is served by none here any more: who dials it again goes another way."""
        config, destination = self.destination()
        return destination is None or config is not self._known

    # -- transport ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(HIGH_WATER)
        if len(self.pod.downstream) >= MAX_CONNECTIONS:
            self.proxy.too_many(self.pod)
            self._closing = True
            self.transport.abort()
            return
        peer = end_of(self.transport.get_extra_info("peername")) or None
        original = self.proxy.original_destination(self.pod.enroll.netns_cookie, peer) if peer else None
        if peer is None or original is None or self.pod.withdrawn:
            self.proxy.uncaptured(self.pod, peer)
            self._closing = True
            self.transport.abort()
            return
        self.peer = peer
        self.original = original
        self.pod.downstream.add(self)
        self.proxy.connections += 1

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self.touched = monotonic()
        if self._tunnel:
            if self.stream is not None:
                self.stream.from_tunnel_client(data)
            return
        if self.stream is None and not self.write_paused:
            try:
                head = self._reader.whole(data)
            except ProtocolError as error:
                self._refuse(error)
                return
            if head is not None:
                self._begin(head, complete=head.length == 0)
                return
        self._reader.feed(data)
        self._pump()

    def eof_received(self) -> bool:
        # As Envoy: a client that closes its side has gone, and its request is cancelled.
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self.pod.downstream.discard(self)
        self.proxy.connection_gone()
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.on_downstream_lost()

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.stream is not None and self.stream.upstream is not None and self.stream.upstream.open:
            self.stream.upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.stream is not None and self.stream.upstream is not None and self.stream.upstream.open:
            self.stream.upstream.transport.resume_reading()
        elif self.stream is None and not self._closing:
            self.release("responses")
            self._pump()

    def hold(self, reason: str) -> None:
        """Read no more of the client until every reason is gone."""
        if not self.held and not self.transport.is_closing():
            self.transport.pause_reading()
        self.held.add(reason)

    def release(self, reason: str) -> None:
        if reason in self.held:
            self.held.discard(reason)
            if not self.held and not self.transport.is_closing():
                self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        self.touched = monotonic()
        self.transport.write(data)

    # -- requests ----------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        try:
            while not self._closing:
                stream = self.stream
                if stream is None:
                    if self.write_paused:
                        # A client that reads no answers could else make this process keep any number of them.
                        if self._reader.buffered:
                            self.hold("responses")
                        break
                    head = self._reader.next()
                    if head is None:
                        break
                    complete = cast("RequestHead", head).length == 0
                    if complete:
                        self._reader.next()  # its End
                    self._begin(cast("RequestHead", head), complete=complete)
                elif stream.request_complete:
                    if self._reader.buffered > PIPELINE_LIMIT:
                        self.hold("pipeline")
                    break
                else:
                    event = self._reader.next()
                    if event is None:
                        break
                    if type(event) is bytes:
                        stream.on_request_data(event)
                    else:
                        stream.on_request_end(cast("End", event).trailers)
        except ProtocolError as error:
            self._refuse(error)
        finally:
            self._pumping = False

    def _begin(self, head: RequestHead, *, complete: bool) -> None:
        stream = self.stream = Stream(self, head, request_complete=complete)
        stream.start()

    def _refuse(self, error: ProtocolError) -> None:
        """Nothing that follows on this connection is a request."""
        failure = failure_of(error)
        self.proxy.bad_request(self, error)
        if self.stream is not None:
            self.stream.on_bad_body(failure)
            self._close_soon()
            return
        reply = REPLIES[failure]
        record = Record(self.proxy.on_record, self.pod, None)
        record.status = reply.status
        record.add_flag(reply.flag)
        record.sent = len(reply.body)
        self.write(headers.local_reply(reply.status, reply.body, close=True))
        record.close()
        self._close_soon()

    def on_stream_done(self, *, close: bool) -> None:
        self.stream = None
        if self.held:
            for reason in tuple(self.held):
                self.release(reason)
        if self._closing:
            return
        if self._aborting or self._tunnel:
            self._closing = True
            self.transport.close()
        elif close:
            self._close_soon()
        elif self._reader.buffered:
            self._pump()

    def begin_tunnel(self) -> None:
        """After 101: what follows is no HTTP."""
        self._tunnel = True
        self.release("pipeline")
        rest = self._reader.take_rest()
        if rest and self.stream is not None:
            self.stream.from_tunnel_client(rest)

    # -- closing -----------------------------------------------------------------------------------------------------

    def _close_soon(self) -> None:
        """Close after the response: our end first, then all, so that unread input does not turn into a reset."""
        if self._closing:
            return
        self._closing = True
        if self.transport.is_closing():
            return
        if not self._reader.failed and self._reader.at_start and not self._unread():
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.proxy.wheel.schedule(LINGER, self.transport.close)

    def abort_after_flush(self, *, reset: bool) -> None:
        """The response cannot be completed; what was written still goes out, and then the connection ends.

        :param reset: by a reset, since an orderly end would make what was written a complete response.
        """
        self._aborting = True
        if reset:
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def close_if_idle(self) -> None:
        """Unless a request has come, read or not: that one is answered."""
        if self.stream is None and not self._closing and self._reader.at_start and not self._unread():
            self._closing = True
            self.transport.close()

    def _unread(self) -> bool:
        unread = bytearray(4)
        try:
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, unread)
        except OSError:
            return False
        return any(unread)

    def abort(self) -> None:
        """Close at once; a request under way is recorded as cut off."""
        self._closing = True
        self.transport.abort()

    def check_idle(self, now: float) -> None:
        """Apply the listener's idle timeouts; called every few seconds."""
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent = unsent
            self.touched = now  # The client takes what it is sent.
        quiet = now - self.touched
        if self._closing:
            if quiet > CLOSING:
                self.abort()
            return
        stream = self.stream
        # Between requests the newest configuration counts, also so that none before it is kept alive by an idle client.
        destination = self._destination if stream is not None else self.destination()[1]
        if destination is None:
            if quiet > 60.0:
                self.abort()
            return
        manager = destination.manager
        if stream is not None:
            if manager.stream_idle_timeout and quiet > manager.stream_idle_timeout:
                stream.on_idle()
        elif not self._reader.at_start:
            limit = manager.request_headers_timeout or 60.0
            if quiet > limit:
                self.abort()
        elif self.leaving or (manager.idle_timeout and quiet > manager.idle_timeout):
            self.close_if_idle()
