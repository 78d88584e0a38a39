"""HTTP/2 connections that carry CONNECT tunnels (RFC 9113): takes bytes, gives events, collects what is to be sent.

Owns parsing, header blocks, stream states, flow control towards us and the limits against abuse (sending is
:mod:`nodeproxy.h2sending`'s). Knows no sockets and no clock (time is an argument), and nothing of what the tunnels mean.

How it is used: bytes that arrived go into :meth:`Connection.receive`, whose events are handled in order and before the next
call (the views in them are the caller's own buffer). What is to be sent stands in ``out[head:tail]``; the caller writes it
whenever it likes, all frames of one turn at once. Payload is put into ``out`` by the caller itself, without a copy in
between: :meth:`room` says how many bytes a stream may send, they are received at ``tail + 9``, and :meth:`commit` puts
the frame's header before them.

Back-pressure. Towards the peer: a stream's window opens only as its bytes are consumed (:meth:`consumed`), so what may
wait for one stream is bounded by ``LIMITS.window`` and for a connection by that times ``LIMITS.streams``; the connection's
own window is given back at once, because a reader that sleeps must not stop its neighbours. From the peer: :meth:`room`.
"""

from __future__ import annotations

from typing import Any, Final

import hpack

from nodeproxy import h2frames as f
from nodeproxy import h2headers
from nodeproxy.h2frames import Code, PeerError, Setting
from nodeproxy.h2sending import CONNECTION_WINDOW, LIMITS, Limits, Sender, Stream

#: Event kinds: the first item of an event ``(kind, stream, value)``. The stream is None where the connection is meant.
DATA: Final = 0  #: value: memoryview of payload, valid until the next receive()
END: Final = 1  #: the peer sends no more on this stream
REQUEST: Final = 2  #: value: h2headers.Request (server)
RESPONSE: Final = 3  #: value: int, the status (client)
RESET: Final = 4  #: value: Code; the stream is gone
WINDOW: Final = 5  #: a stream (or with None the connection) that had no room may have some again
#: value: Code; no new streams. Those that the peer did not process get a RESET with REFUSED_STREAM.
GOAWAY: Final = 6
READY: Final = 7  #: the peer's first SETTINGS are in force

Event = tuple[int, Any, Any]


class Connection(Sender):
    """One end of a connection."""

    def __init__(self, *, client: bool, limits: Limits = LIMITS, now: float = 0.0) -> None:
        super().__init__(client=client, limits=limits)
        self.ready = False
        self._credit = 0
        self._preface = b"" if client else f.PREFACE
        self._partial = bytearray()  #: a frame that is not complete yet (never an unpadded DATA frame)
        self._left = 0  #: bytes of the current DATA frame that are still to come ...
        self._left_stream: Stream | None = None
        self._left_end = False
        self._block: bytearray | None = None  #: header block whose CONTINUATION is awaited
        self._block_stream = 0
        self._block_end = False
        self._block_frames = 0
        self._tokens = float(limits.burst)
        self._refilled = now
        self._decoder = hpack.Decoder(max_header_list_size=limits.header_list)

    def receive(self, data: memoryview, now: float) -> list[Event]:
        """Take what arrived.

        :raises PeerError: the peer broke the protocol; :meth:`fail` has been called, and what came before the error is lost.
        """
        if self.closed:
            return []
        try:
            return self._receive(data, now)
        except PeerError as error:
            self.fail(error)
            raise

    def _receive(self, data: memoryview, now: float) -> list[Event]:
        events: list[Event] = []
        streams = self.streams
        unpack_from = f.HEADER.unpack_from
        position = 0
        end = len(data)
        if self._preface:
            position = min(end, len(self._preface))
            if bytes(data[:position]) != self._preface[:position]:
                raise PeerError(Code.PROTOCOL_ERROR, "no HTTP/2 connection preface")
            self._preface = self._preface[position:]
        while position < end:
            if self._left:
                position += self._continue_data(data, position, end, events)
                continue
            if self._partial:
                position = self._complete(data, position, end, events, now)
                continue
            at = position + 9
            if at > end:
                self._partial += data[position:]
                break
            high, low, kind, flags, stream_id = unpack_from(data, position)
            size = high << 8 | low
            if kind == 0 and not flags & 8 and size and self._block is None and self.ready:
                stream = streams.get(stream_id)
                if stream is not None and not stream.remote_closed and size <= self.limits.frame:
                    # The hot path: payload of an open stream.
                    stream.receive_window -= size
                    self.receive_window -= size
                    if stream.receive_window < 0 or self.receive_window < 0 or not stream.answered:
                        self._check_data(stream)
                    stop = at + size
                    if stop <= end:
                        events.append((DATA, stream, data[at:stop]))
                        if flags & 1:
                            self._remote_end(stream, events)
                        position = stop
                    else:
                        if at < end:
                            events.append((DATA, stream, data[at:end]))
                        self._left = stop - end
                        self._left_stream = stream
                        self._left_end = bool(flags & 1)
                        position = end
                    self._credit += size
                    if self._credit * 2 >= CONNECTION_WINDOW:
                        self._give_back()
                    continue
            if size > self.limits.frame:
                raise PeerError(Code.FRAME_SIZE_ERROR, f"frame of {size} bytes")
            stop = at + size
            if stop > end:
                self._partial += data[position:]
                break
            self._frame(kind, flags, stream_id, bytes(data[at:stop]), events, now)
            position = stop
        return events

    def _give_back(self) -> None:
        self._send(f.window_update(0, self._credit))
        self.receive_window += self._credit
        self._credit = 0

    def _check_data(self, stream: Stream) -> None:
        if stream.receive_window < 0 or self.receive_window < 0:
            raise PeerError(Code.FLOW_CONTROL_ERROR, f"stream {stream.id}: more than its window")
        if self.client and not stream.answered:
            raise PeerError(Code.PROTOCOL_ERROR, f"stream {stream.id}: DATA before the response")

    def _continue_data(self, data: memoryview, position: int, end: int, events: list[Event]) -> int:
        count = min(self._left, end - position)
        self._left -= count
        stream = self._left_stream
        # A stream that was reset in the middle of a frame: the rest of it goes nowhere.
        if stream is not None and stream.id in self.streams:
            events.append((DATA, stream, data[position : position + count]))
            if not self._left and self._left_end:
                self._remote_end(stream, events)
        if not self._left:
            self._left_stream = None
        return count

    def _complete(self, data: memoryview, position: int, end: int, events: list[Event], now: float) -> int:
        """Go on with a frame that came in pieces; the new position."""
        partial = self._partial
        if len(partial) < 9:
            take = min(9 - len(partial), end - position)
            partial += data[position : position + take]
            position += take
            if len(partial) < 9:
                return position
        high, low, kind, flags, stream_id = f.HEADER.unpack_from(partial)
        size: int = high << 8 | low
        if kind == f.DATA and not flags & f.FLAG_PADDED and len(partial) == 9 and position < end:
            # Payload is not collected: hand the header and what is here to the loop in one piece.
            joined = memoryview(bytes(partial) + bytes(data[position : position + size]))
            partial.clear()
            events += self._receive(joined, now)
            return position + min(size, end - position)
        if size > self.limits.frame:
            raise PeerError(Code.FRAME_SIZE_ERROR, f"frame of {size} bytes")
        take = min(9 + size - len(partial), end - position)
        partial += data[position : position + take]
        position += take
        if len(partial) == 9 + size:
            payload = bytes(partial[9:])
            partial.clear()
            self._frame(kind, flags, stream_id, payload, events, now)
        return position

    def _spend(self, now: float, what: str) -> None:
        """What costs us more than the peer is limited in rate (RFC 9113, section 10.5)."""
        limits = self.limits
        self._tokens = min(float(limits.burst), self._tokens + (now - self._refilled) * limits.refill)
        self._refilled = now
        self._tokens -= 1
        if self._tokens < 0:
            raise PeerError(Code.ENHANCE_YOUR_CALM, f"too many {what}")

    def _remote_end(self, stream: Stream, events: list[Event]) -> None:
        stream.remote_closed = True
        events.append((END, stream, None))
        self._forget_if_done(stream)

    def _frame(
        self, kind: int, flags: int, raw_id: int, payload: bytes, events: list[Event], now: float
    ) -> None:
        """Any frame that is complete."""
        stream_id = raw_id & f.STREAM_ID
        if self._block is not None and (kind != f.CONTINUATION or stream_id != self._block_stream):
            raise PeerError(Code.PROTOCOL_ERROR, "a header block is interrupted")
        if not self.ready and kind != f.SETTINGS:
            raise PeerError(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if kind == f.DATA:
            self._on_data(flags, stream_id, payload, events, now)
        elif kind == f.HEADERS:
            self._on_headers(flags, stream_id, payload, events, now)
        elif kind == f.CONTINUATION:
            self._on_continuation(flags, payload, events, now)
        elif kind == f.WINDOW_UPDATE:
            self._on_window_update(stream_id, payload, events)
        elif kind == f.RST_STREAM:
            self._on_rst_stream(stream_id, payload, events, now)
        elif kind == f.SETTINGS:
            self._on_settings(flags, stream_id, payload, events, now)
        elif kind == f.PING:
            self._on_ping(flags, stream_id, payload, now)
        elif kind == f.GOAWAY:
            self._on_goaway(stream_id, payload, events)
        elif kind == f.PUSH_PROMISE:
            raise PeerError(Code.PROTOCOL_ERROR, "PUSH_PROMISE, which was forbidden")
        elif kind == f.PRIORITY:
            if not stream_id or len(payload) != 5:
                raise PeerError(Code.FRAME_SIZE_ERROR if stream_id else Code.PROTOCOL_ERROR, "PRIORITY")
            self._spend(now, "PRIORITY frames")
        else:  # Unknown types are ignored (section 4.1), but not for ever.
            self._spend(now, "frames of unknown type")

    def _is_idle(self, stream_id: int) -> bool:
        """No stream of this number was ever opened (section 5.1.1)."""
        if stream_id % 2 == (1 if self.client else 0):
            return stream_id >= self._next_id
        return stream_id > self._last_peer_id

    def _unpadded(self, flags: int, payload: bytes) -> bytes:
        if not flags & f.FLAG_PADDED:
            return payload
        if not payload or payload[0] >= len(payload):
            raise PeerError(Code.PROTOCOL_ERROR, "padding longer than the frame")
        return payload[1 : len(payload) - payload[0]]

    def _on_data(self, flags: int, stream_id: int, payload: bytes, events: list[Event], now: float) -> None:
        """DATA that the hot path left: padded, empty, or of a stream that is not open."""
        if not stream_id or self._is_idle(stream_id):
            raise PeerError(Code.PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is not open")
        size = len(payload)
        data = self._unpadded(flags, payload)
        self.receive_window -= size
        self._credit += size
        if self.receive_window < 0:
            raise PeerError(Code.FLOW_CONTROL_ERROR, "more than the connection's window")
        if self._credit * 2 >= CONNECTION_WINDOW:
            self._give_back()
        stream = self.streams.get(stream_id)
        if stream is None:
            return  # Reset by this end: what was on its way is ignored (section 5.1, closed).
        if stream.remote_closed:
            raise PeerError(Code.STREAM_CLOSED, f"DATA on stream {stream_id} after its end")
        stream.receive_window -= size
        self._check_data(stream)
        if data:
            events.append((DATA, stream, memoryview(data)))
        elif not flags & f.FLAG_END_STREAM:
            self._spend(now, "empty DATA frames")
        if flags & f.FLAG_END_STREAM:
            self._remote_end(stream, events)
        elif size != len(data):
            self.consumed(stream, size - len(data))

    def _on_headers(
        self, flags: int, stream_id: int, payload: bytes, events: list[Event], now: float
    ) -> None:
        if stream_id % 2 == 0:
            raise PeerError(Code.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        block = self._unpadded(flags, payload)
        if flags & f.FLAG_PRIORITY:
            if len(block) < 5:
                raise PeerError(Code.FRAME_SIZE_ERROR, "HEADERS without its priority")
            block = block[5:]
        self._block = bytearray(block)
        self._block_stream = stream_id
        self._block_end = bool(flags & f.FLAG_END_STREAM)
        self._block_frames = 0
        if flags & f.FLAG_END_HEADERS:
            self._headers_complete(events, now)
        elif len(self._block) > self.limits.header_list:
            raise PeerError(Code.ENHANCE_YOUR_CALM, "header block too large")

    def _on_continuation(self, flags: int, payload: bytes, events: list[Event], now: float) -> None:
        if self._block is None:
            raise PeerError(Code.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block += payload
        self._block_frames += 1
        if len(self._block) > self.limits.header_list or self._block_frames > self.limits.continuations:
            raise PeerError(Code.ENHANCE_YOUR_CALM, "header block too large")
        if flags & f.FLAG_END_HEADERS:
            self._headers_complete(events, now)

    def _headers_complete(self, events: list[Event], now: float) -> None:
        block = self._block
        assert block is not None
        self._block = None
        try:
            # Decoded also where nobody wants it: the compression state is the connection's (section 4.3).
            headers = [(bytes(n), bytes(v)) for n, v in self._decoder.decode(bytes(block), raw=True)]
        except hpack.OversizedHeaderListError as error:
            raise PeerError(Code.ENHANCE_YOUR_CALM, "header list too large") from error
        except (hpack.HPACKError, ValueError, IndexError) as error:
            raise PeerError(Code.COMPRESSION_ERROR, "header block") from error
        stream = self.streams.get(self._block_stream)
        try:
            if stream is None:
                self._new_stream(headers, events, now)
            elif stream.remote_closed:
                raise PeerError(Code.STREAM_CLOSED, f"HEADERS on stream {stream.id} after its end")
            elif self.client and not stream.answered:
                self._response(stream, headers, events)
            else:
                h2headers.trailers(headers)
                if not self._block_end:
                    raise h2headers.MalformedError("trailers that do not end the stream")
                self._remote_end(stream, events)
        except h2headers.MalformedError:
            if stream is None:
                stream = Stream(self._block_stream, 0, 0)
                self._send(f.rst_stream(stream.id, Code.PROTOCOL_ERROR))
                self._spend(now, "malformed requests")
                return
            self.reset(stream, Code.PROTOCOL_ERROR)
            events.append((RESET, stream, Code.PROTOCOL_ERROR))

    def _response(self, stream: Stream, headers: h2headers.Headers, events: list[Event]) -> None:
        status = h2headers.status(headers)
        if status < 200:
            if self._block_end or status == 101:
                raise h2headers.MalformedError("an informational response that ends the stream")
            return
        stream.answered = True
        events.append((RESPONSE, stream, status))
        if self._block_end:
            self._remote_end(stream, events)

    def _new_stream(self, headers: h2headers.Headers, events: list[Event], now: float) -> None:
        stream_id = self._block_stream
        if self.client:
            if self._is_idle(stream_id):
                raise PeerError(Code.PROTOCOL_ERROR, f"response on stream {stream_id}, which is not open")
            return  # Reset by this end in the meantime.
        if stream_id <= self._last_peer_id:
            return  # Late frames of a stream that this end has reset.
        self._last_peer_id = stream_id
        request = h2headers.request(headers)
        if self.closing or len(self.streams) >= self.limits.streams:
            self._send(f.rst_stream(stream_id, Code.REFUSED_STREAM))
            self._spend(now, "streams over the limit")
            return
        stream = Stream(stream_id, self._initial_window, self.limits.window)
        self.streams[stream_id] = stream
        events.append((REQUEST, stream, request))
        if self._block_end:
            self._remote_end(stream, events)

    def _on_window_update(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise PeerError(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        increment = int.from_bytes(payload, "big") & f.MAX_WINDOW
        if not stream_id:
            self.send_window += increment
            if not increment:
                raise PeerError(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            if self.send_window > f.MAX_WINDOW:
                raise PeerError(Code.FLOW_CONTROL_ERROR, "the connection's window overflows")
            if self.starved:
                events.append((WINDOW, None, None))
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise PeerError(
                    Code.PROTOCOL_ERROR, f"WINDOW_UPDATE on stream {stream_id}, which is not open"
                )
            return
        stream.send_window += increment
        if not increment or stream.send_window > f.MAX_WINDOW:
            code = Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR
            self.reset(stream, code)
            events.append((RESET, stream, code))
        elif stream.starved and stream.send_window > 0:
            stream.starved = False
            events.append((WINDOW, stream, None))

    def _on_rst_stream(self, stream_id: int, payload: bytes, events: list[Event], now: float) -> None:
        if len(payload) != 4:
            raise PeerError(Code.FRAME_SIZE_ERROR, "RST_STREAM")
        if not stream_id or self._is_idle(stream_id):
            raise PeerError(Code.PROTOCOL_ERROR, f"RST_STREAM on stream {stream_id}, which is not open")
        stream = self.streams.pop(stream_id, None)
        if stream is None:
            return
        if not self.client and not stream.answered:
            self._spend(now, "streams reset before their answer")
        stream.local_closed = stream.remote_closed = True
        number = int.from_bytes(payload, "big")
        known = number <= Code.HTTP_1_1_REQUIRED
        events.append((RESET, stream, Code(number) if known else Code.INTERNAL_ERROR))

    def _on_settings(
        self, flags: int, stream_id: int, payload: bytes, events: list[Event], now: float
    ) -> None:
        if stream_id:
            raise PeerError(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & f.FLAG_ACK:
            if payload:
                raise PeerError(Code.FRAME_SIZE_ERROR, "SETTINGS acknowledgement with a payload")
            if not self.ready:
                raise PeerError(Code.PROTOCOL_ERROR, "the first SETTINGS is an acknowledgement")
            return
        for name, value in f.split_settings(payload):
            self._apply(name, value, events)
        self._send(f.SETTINGS_ACK)
        if self.ready:
            self._spend(now, "SETTINGS frames")
        else:
            self.ready = True
            events.append((READY, None, None))

    def _apply(self, name: int, value: int, events: list[Event]) -> None:
        if name == Setting.INITIAL_WINDOW_SIZE:
            if value > f.MAX_WINDOW:
                raise PeerError(Code.FLOW_CONTROL_ERROR, f"SETTINGS_INITIAL_WINDOW_SIZE {value}")
            change = value - self._initial_window
            self._initial_window = value
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > f.MAX_WINDOW:
                    raise PeerError(Code.FLOW_CONTROL_ERROR, f"stream {stream.id}: its window overflows")
                if stream.starved and stream.send_window > 0:
                    stream.starved = False
                    events.append((WINDOW, stream, None))
        elif name == Setting.MAX_FRAME_SIZE:
            if not f.MIN_FRAME <= value <= f.MAX_FRAME:
                raise PeerError(Code.PROTOCOL_ERROR, f"SETTINGS_MAX_FRAME_SIZE {value}")
            self.max_frame = value
        elif name == Setting.MAX_CONCURRENT_STREAMS:
            self.max_streams = value
        elif name == Setting.HEADER_TABLE_SIZE:
            # More than the default is not used: memory of ours for a saving of theirs.
            self._encoder.header_table_size = min(value, 4096)
        elif name == Setting.ENABLE_PUSH and (value > 1 or (self.client and value)):
            raise PeerError(Code.PROTOCOL_ERROR, f"SETTINGS_ENABLE_PUSH {value}")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        if stream_id:
            raise PeerError(Code.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise PeerError(Code.FRAME_SIZE_ERROR, "PING")
        if not flags & f.FLAG_ACK:
            self._spend(now, "PING frames")
            self._send(f.ping(payload, ack=True))

    def _on_goaway(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id:
            raise PeerError(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise PeerError(Code.FRAME_SIZE_ERROR, "GOAWAY")
        last = int.from_bytes(payload[:4], "big") & f.STREAM_ID
        number = int.from_bytes(payload[4:8], "big")
        self.closing = True
        code = Code(number) if number <= Code.HTTP_1_1_REQUIRED else Code.INTERNAL_ERROR
        events.append((GOAWAY, None, code))
        if self.client:
            for stream in [s for s in self.streams.values() if s.id > last]:
                del self.streams[stream.id]
                stream.local_closed = stream.remote_closed = True
                events.append((RESET, stream, Code.REFUSED_STREAM))
