"""The sending half of an HTTP/2 connection (RFC 9113): limits, streams, and the one buffer of what waits to be written.

Owns framing of what goes out, the windows towards the peer, and the bound of the buffer. :mod:`nodeproxy.h2core` adds the
receiving half, and says how both are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import hpack

from nodeproxy import h2frames as f
from nodeproxy import h2headers
from nodeproxy.h2frames import Code, PeerError, Setting


@dataclass(frozen=True, slots=True)
class Limits:
    """What this end accepts and announces."""

    window: int = 512 * 1024  #: bytes that may wait for one stream
    streams: int = 256  #: concurrent streams that the peer may open
    frame: int = 64 * 1024  #: SETTINGS_MAX_FRAME_SIZE
    header_list: int = 16 * 1024  #: bytes of one header section, also of its compressed form
    continuations: int = 8
    control_queue: int = 64 * 1024  #: answers that wait because the peer does not read
    burst: int = 500  #: resets before an answer, pings, settings, empty frames ...
    refill: float = 100.0  #: ... and how many of them a second


LIMITS: Final = Limits()
#: Size of ``out``: what may wait for the connection's socket.
OUT: Final = 256 * 1024
#: The connection's own receive window.
CONNECTION_WINDOW: Final = 16 * 1024 * 1024


#: Buffers of that size that nobody uses now: most connections have written everything at the end of a turn.
_spare: list[tuple[bytearray, memoryview]] = []
_SPARE: Final = 16
EMPTY: Final = (bytearray(), memoryview(b""))
#: Fields that are another in each request: not worth a place in the compression table.
_UNIQUE: Final = frozenset((b"forwarded", b"traceparent"))


def _header(field: tuple[bytes, bytes]) -> Any:
    return hpack.NeverIndexedHeaderTuple(*field) if field[0] in _UNIQUE else field


class Stream:
    """One tunnel. ``owner`` is the caller's: what it ties to the stream."""

    __slots__ = (
        "answered", "credit", "id", "local_closed", "owner", "receive_window", "remote_closed", "send_window", "starved",
    )  # fmt: skip

    def __init__(self, stream_id: int, send_window: int, receive_window: int) -> None:
        self.id = stream_id
        self.send_window = send_window
        self.receive_window = receive_window
        self.credit = 0  #: consumed, not yet given back
        self.starved = False  #: found no window in room(): wants a WINDOW event
        self.answered = False  #: response headers sent (server) or received (client)
        self.local_closed = False
        self.remote_closed = False
        self.owner: Any = None


class Sender:
    """What both ends of a connection send, and the state that goes with it."""

    def __init__(self, *, client: bool, limits: Limits) -> None:
        self.client = client
        self.limits = limits
        self.streams: dict[int, Stream] = {}
        #: What waits to be written; :data:`EMPTY` while nothing does, so that an idle connection costs no buffer.
        self.out, self.out_view = EMPTY
        self.head = 0
        self.tail = 0
        self.send_window = f.DEFAULT_WINDOW
        self.receive_window = CONNECTION_WINDOW
        self.starved = False  #: some stream found no connection window, or no space in ``out``
        self.max_frame = f.MIN_FRAME  #: the peer's
        self.max_streams = 100  #: the peer's; until it says so, what section 6.5.2 recommends at least
        self.closing = False  #: GOAWAY sent or received: no new streams from here
        self.closed = False  #: an error ended it; receive() does nothing any more
        self.queued = bytearray()  #: frames that found no space in ``out``
        self.overflow = False  #: the peer does not read our answers; the connection has to go
        self._initial_window = f.DEFAULT_WINDOW  #: the peer's
        self._next_id = 1
        self._last_peer_id = 0
        self._encoder = hpack.Encoder()
        announced = {
            Setting.ENABLE_PUSH: 0,
            Setting.INITIAL_WINDOW_SIZE: limits.window,
            Setting.MAX_FRAME_SIZE: limits.frame,
            Setting.MAX_HEADER_LIST_SIZE: limits.header_list,
        }
        if not client:
            announced[Setting.MAX_CONCURRENT_STREAMS] = limits.streams
        self._send(
            (f.PREFACE if client else b"")
            + f.settings(announced)
            + f.window_update(0, CONNECTION_WINDOW - f.DEFAULT_WINDOW)
        )

    def _take_buffer(self) -> None:
        if _spare:
            self.out, self.out_view = _spare.pop()
        else:
            self.out = bytearray(OUT)
            self.out_view = memoryview(self.out)

    def _send(self, data: bytes | bytearray) -> None:
        tail = self.tail
        end = tail + len(data)
        if not self.out:
            self._take_buffer()
        if self.queued or end > OUT:
            if len(self.queued) + len(data) > self.limits.control_queue:
                self.overflow = self.closed = self.closing = True
                return
            self.queued += data
            return
        self.out[tail:end] = data
        self.tail = end

    def sent(self, count: int) -> None:
        """``count`` bytes of ``out[head:tail]`` were written."""
        self.head += count
        if self.head >= self.tail:
            self.head = self.tail = 0
            if not self.queued:
                if len(_spare) < _SPARE:
                    _spare.append((self.out, self.out_view))
                self.out, self.out_view = EMPTY
            else:
                self.tail = min(len(self.queued), OUT)
                self.out[: self.tail] = self.queued[: self.tail]
                del self.queued[: self.tail]

    def room(self, stream: Stream) -> int:
        """How many bytes of payload ``stream`` may send in one frame now, at ``out_view[tail + 9:]``.

        With 0 it has to wait: for a WINDOW event of the stream if ``stream.starved``, else for one of the connection or for
        ``out`` to be written, as ``starved`` says.
        """
        window = stream.send_window
        if window <= 0:
            stream.starved = True
            return 0
        space = OUT - self.tail - f.HEADER_SIZE
        if space < 1024 or self.send_window <= 0 or self.queued:
            self.starved = True
            return 0
        if not self.out:
            self._take_buffer()
        if space < window:
            window = space
        if self.send_window < window:
            window = self.send_window
        return window if window < self.max_frame else self.max_frame

    def commit(self, stream: Stream, count: int) -> None:
        """A frame of the ``count`` bytes that were put at ``tail + 9`` (at most what :meth:`room` said)."""
        tail = self.tail
        f.HEADER.pack_into(self.out, tail, count >> 8, count & 0xFF, f.DATA, 0, stream.id)
        self.tail = tail + f.HEADER_SIZE + count
        stream.send_window -= count
        self.send_window -= count

    def write(self, stream: Stream, data: bytes | memoryview) -> int:
        """Copy as much of ``data`` as there is room for into frames; how much that was."""
        done = 0
        while done < len(data):
            room = min(self.room(stream), len(data) - done)
            if not room:
                break
            at = self.tail + f.HEADER_SIZE
            self.out[at : at + room] = data[done : done + room]
            self.commit(stream, room)
            done += room
        return done

    def end(self, stream: Stream) -> None:
        """No more payload from this end (half-close)."""
        if not stream.local_closed:
            stream.local_closed = True
            self._send(f.frame(f.DATA, f.FLAG_END_STREAM, stream.id))
            self._forget_if_done(stream)

    def reset(self, stream: Stream, code: Code) -> None:
        if self.streams.pop(stream.id, None) is not None:
            stream.local_closed = stream.remote_closed = True
            self._send(f.rst_stream(stream.id, code))

    def connect(self, authority: str, fields: h2headers.Headers) -> Stream:
        """Open a tunnel (client). The caller looks at :attr:`available` first."""
        stream = Stream(self._next_id, self._initial_window, self.limits.window)
        self._next_id += 2
        headers = [
            (b":method", b"CONNECT"),
            (b":authority", authority.encode("ascii")),
            *map(_header, fields),
        ]
        block = self._encoder.encode(headers, huffman=False)
        self.streams[stream.id] = stream
        self._send(f.header_frames(stream.id, block, end_stream=False, max_frame=self.max_frame))
        return stream

    @property
    def available(self) -> int:
        """How many more streams this client may open."""
        if self.closing or self.closed or self._next_id > f.STREAM_ID - 1000:
            return 0
        if len(self.queued) * 4 > self.limits.control_queue:
            return 0  # The peer does not keep up with what it has.
        return max(0, self.max_streams - len(self.streams))

    def respond(
        self, stream: Stream, status: int, fields: h2headers.Headers | None = None, *, end: bool
    ) -> None:
        """Answer a request (server)."""
        headers = [(b":status", b"%d" % status), *(fields or ())]
        block = self._encoder.encode(headers, huffman=False)
        stream.answered = True
        self._send(f.header_frames(stream.id, block, end_stream=end, max_frame=self.max_frame))
        if end:
            stream.local_closed = True
            self._forget_if_done(stream)

    def ping(self, data: bytes) -> None:
        self._send(f.ping(data))

    def shutdown(self, code: Code = Code.NO_ERROR, reason: str = "") -> None:
        """Say GOAWAY: streams that are open may end, new ones are refused."""
        self.closing = True
        self._send(f.goaway(self._last_peer_id, code, reason))

    def warn(self) -> None:
        """Say that :meth:`shutdown` will come, so that no stream is under way when it does (RFC 9113, section 6.8)."""
        self._send(f.goaway(f.STREAM_ID, Code.NO_ERROR))

    def fail(self, error: PeerError) -> None:
        """The connection ends because of the peer; what is left to do is to write ``out`` and to close."""
        if not self.closed:
            self.closed = self.closing = True
            self.queued.clear()
            if self.tail + 200 < OUT:
                self._send(f.goaway(self._last_peer_id, error.code, error.reason))

    def consumed(self, stream: Stream, count: int) -> None:
        """``count`` bytes of the stream's payload have left this process: the peer may send as many more."""
        stream.credit += count
        if stream.credit * 2 >= self.limits.window and not stream.remote_closed:
            self._send(f.window_update(stream.id, stream.credit))
            stream.receive_window += stream.credit
            stream.credit = 0

    def _forget_if_done(self, stream: Stream) -> None:
        if stream.local_closed and stream.remote_closed:
            self.streams.pop(stream.id, None)
