"""One connection to an endpoint: bytes of responses in, events to the stream that uses it.

Owns its transport and response reader. One exchange at a time; whether the connection lives on after it is decided by
:meth:`UpstreamConnection.finish`.
"""

from __future__ import annotations

import asyncio
import select
from time import monotonic
from typing import TYPE_CHECKING, cast

from l7proxy.errors import Failure, ProtocolError
from l7proxy.http1.head import ResponseHead
from l7proxy.http1.reader import End, ResponseReader

if TYPE_CHECKING:
    from l7proxy.pool import HostPool
    from l7proxy.stream import Stream

#: Bytes that may wait in a transport before its source is paused.
HIGH_WATER = 64 * 1024


class UpstreamConnection(asyncio.Protocol):
    __slots__ = (
        "_cut",
        "_interim",
        "_keep_alive",
        "_reader",
        "closing_since",
        "exchanges",
        "made",
        "open",
        "pool",
        "received",
        "retired",
        "stream",
        "transport",
        "tunnel",
        "write_paused",
    )

    transport: asyncio.Transport

    def __init__(self, pool: HostPool) -> None:
        self.pool = pool
        self.stream: Stream | None = None
        self.open = False
        self.made = monotonic()
        self.exchanges = 0  #: begun
        self.received = False  #: bytes of the response to the exchange under way
        self.retired = False  #: no more exchanges: what carries it is about to end
        self.tunnel = False
        self.write_paused = False
        self._reader = ResponseReader()
        self._keep_alive = True
        self._interim = False
        self._cut = False  #: its end is no orderly one
        self.closing_since: float | None = None

    @property
    def usable(self) -> bool:
        """May carry another exchange."""
        return self.open and self._keep_alive and not self.retired and not self.transport.is_closing()

    def begin(self, stream: Stream, method: bytes) -> None:
        self.stream = stream
        self.exchanges += 1
        self.received = False
        self._reader.expect(method)

    def finish(self, *, request_complete: bool) -> None:
        """The response is complete, or nobody wants the rest of it: back to the pool if the connection is clean."""
        self.stream = None
        if request_complete and self._keep_alive and self._reader.at_start and not self.tunnel:
            self.pool.release(self)
        else:
            self.abort()

    def close(self) -> None:
        """Close when everything is sent that was written."""
        self.stream = None
        if self.open and self.closing_since is None:
            self.closing_since = monotonic()
            self.transport.close()

    def abort(self) -> None:
        """Close at once, also with bytes unsent. A stream that uses the connection hears of it."""
        if self.open:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(HIGH_WATER)
        self.open = True

    def data_received(self, data: bytes) -> None:
        stream = self.stream
        if stream is None:
            # Nothing was asked: whatever it says would be taken for the next request's response.
            self.close()
            return
        self.received = True
        if self.tunnel:
            stream.on_tunnel_data(data)
            return
        reader = self._reader
        whole = reader.whole(data)
        if whole is not None:
            self._keep_alive = whole[0].keep_alive
            stream.on_response(whole[0], whole[1])
            return
        reader.feed(data)
        try:
            while (event := reader.next()) is not None:
                kind = type(event)
                if kind is bytes:
                    stream.on_response_data(cast("bytes", event))
                elif kind is End:
                    if self._interim:
                        self._interim = False
                    else:
                        stream.on_response_end(cast("End", event).trailers)
                        return
                else:
                    self._on_head(stream, cast("ResponseHead", event))
                if self.stream is not stream:
                    return
        except ProtocolError as error:
            self._keep_alive = False
            stream.on_upstream_failure(Failure.UPSTREAM_PROTOCOL, error.reason)
            return
        stream.flush()

    def _on_head(self, stream: Stream, head: ResponseHead) -> None:
        if head.status < 200 and head.status != 101:
            # The client's Expect was answered here already; other interim responses are not passed on (nor by Envoy).
            self._interim = True
            return
        self._keep_alive = head.keep_alive
        if head.status == 101:
            if not stream.head.upgrade:
                raise ProtocolError("101 without an upgrade")
            self.tunnel = True
            self._keep_alive = False
            stream.on_switch(head, self._reader.take_rest())
        else:
            stream.on_response_head(head)

    def eof_received(self) -> bool:
        # A stream of the node proxy ends by a shutdown; one that broke off is closed (nodeproxy/api.py).
        self._cut = self.pool.tunnelled and _hung_up(self.transport)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self.pool.lost(self)
        stream, self.stream = self.stream, None
        if stream is None:
            return
        if self.tunnel:
            stream.on_tunnel_end()
            return
        try:
            if exc is not None or self._cut:
                raise ProtocolError(str(exc or "the stream broke off"))
            end = self._reader.end_of_stream()
        except ProtocolError as error:
            stream.on_upstream_failure(Failure.CONNECTION_TERMINATION, error.reason)
            return
        if end is not None:
            stream.on_response_end(end.trailers)
        else:
            stream.on_upstream_failure(Failure.CONNECTION_TERMINATION, "closed before the response")

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.stream is not None:
            self.stream.downstream.hold("upstream")

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.stream is not None:
            self.stream.downstream.release("upstream")


def _hung_up(transport: asyncio.Transport) -> bool:
    """Whether the peer of a unix socket has closed it, not only ended its own direction."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
