"""Readers of requests and responses: feed bytes, take events.

Owns the state machine of one direction of one connection (one method per state) and its buffer. Events are a head,
pieces of body (``bytes``) and :class:`End`. After End the reader stands at the next message; a caller that wants one
message at a time does not ask for more, what was fed stays in the buffer.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from l7proxy.errors import ProtocolError
from l7proxy.http1.head import (
    CHUNKED,
    FORBIDDEN_TRAILERS,
    MAX_HEAD,
    UNTIL_CLOSE,
    Fields,
    RequestHead,
    ResponseHead,
    parse_fields,
    parse_request_head,
    parse_response_head,
)

#: Longest chunk-size line in bytes, extensions included.
_MAX_CHUNK_LINE = 4096
# RFC 9112, section 7.1: size, extensions. Size is at most 15 digits: it fits an int64 and so every peer's parser.
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,15})"
    rb"(?:[\t ]*;[\t ]*[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
    rb"(?:[\t ]*=[\t ]*(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
    rb"|\"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*\"))?)*"
)
_BARE_LF = re.compile(rb"(?<!\r)\n")
_BARE_CR = re.compile(rb"\r(?!\n)(?!\Z)")


class End:
    """The message is complete."""

    __slots__ = ("trailers",)

    def __init__(self, trailers: Fields = ()) -> None:
        self.trailers = trailers


END = End()

RequestEvent = RequestHead | bytes | End
ResponseEvent = ResponseHead | bytes | End


class _Reader:
    """What both directions share: buffer, body states, trailers."""

    __slots__ = ("_at", "_buffer", "_scanned", "_state", "_left", "failed")

    def __init__(self) -> None:
        self._buffer = b""
        self._at = (
            0  # what was taken of the buffer; it is cut when more is fed, not for each of many small chunks
        )
        self._scanned = 0  # up to where the buffer is known to hold no end of head
        self._left = 0
        self._state: Callable[[], object | None] = self._head
        self.failed = False

    @property
    def buffered(self) -> int:
        """Bytes fed and not yet taken."""
        return len(self._buffer) - self._at

    @property
    def at_start(self) -> bool:
        """True between two messages, before the first byte of the next."""
        return self._at == len(self._buffer) and self._state == self._head

    def feed(self, data: bytes) -> None:
        self._buffer = self._buffer[self._at :] + data if self._buffer else data
        self._scanned = max(self._scanned - self._at, 0)
        self._at = 0

    def take_rest(self) -> bytes:
        """Everything fed and not taken: what follows the head of an upgrade is no HTTP."""
        return self._take(len(self._buffer) - self._at)

    def _take(self, count: int) -> bytes:
        """The next ``count`` bytes, or as many as there are."""
        start = self._at
        self._at = min(start + count, len(self._buffer))
        return self._buffer[start : self._at]

    def _next(self) -> object | None:
        if self.failed:
            return None
        try:
            event = self._state()
        except ProtocolError:
            # Nothing after a defect is a message (RFC 9112, section 11.2).
            self.failed = True
            self._buffer, self._at = b"", 0
            raise
        if self._at == len(self._buffer):
            # An idle connection holds no memory for what it has read.
            self._buffer, self._at, self._scanned = b"", 0, 0
        return event

    def _head(self) -> object | None:
        raise NotImplementedError

    def _take_head(self) -> bytes | None:
        """The bytes of a head with its empty line, or None while it is not complete."""
        buffer, start = self._buffer, self._at
        scanned = max(self._scanned, start)
        end = buffer.find(b"\r\n\r\n", scanned)
        if end >= 0:
            size = end + 4 - start
            if size > MAX_HEAD:
                raise ProtocolError(f"head of {size} bytes, at most {MAX_HEAD}", 431)
            return self._take(size)
        # A defect that can be seen is answered now: the end may never come.
        if _BARE_LF.search(buffer, max(scanned - 1, start)) or _BARE_CR.search(buffer, scanned):
            raise ProtocolError("bare CR or LF")
        if len(buffer) - start > MAX_HEAD:
            raise ProtocolError(f"head of more than {MAX_HEAD} bytes", 431)
        self._scanned = max(len(buffer) - 3, start)
        return None

    def _begin_body(self, length: int) -> None:
        if length == CHUNKED:
            self._state = self._chunk_size
        elif length == UNTIL_CLOSE:
            self._state = self._until_close
        elif length:
            self._left = length
            self._state = self._counted
        else:
            self._state = self._end

    def _end(self) -> End:
        self._state = self._head
        return END

    def _counted(self) -> bytes | None:
        data = self._take(self._left)
        self._left -= len(data)
        if not self._left:
            self._state = self._end
        return data or None

    def _until_close(self) -> bytes | None:
        return self.take_rest() or None

    def _chunk_size(self) -> object | None:
        buffer, start = self._buffer, self._at
        end = buffer.find(b"\n", start)
        if end < 0:
            if len(buffer) - start > _MAX_CHUNK_LINE:
                raise ProtocolError("chunk-size line too long")
            if _BARE_CR.search(buffer, start):
                raise ProtocolError("bare CR in a chunk-size line")
            return None
        if end - start > _MAX_CHUNK_LINE or end == start or buffer[end - 1] != 13:
            raise ProtocolError("invalid chunk-size line")
        match = _CHUNK_LINE.fullmatch(buffer, start, end - 1)
        if match is None:
            raise ProtocolError("invalid chunk size")
        self._left = int(match[1], 16)
        self._at = end + 1
        self._state = self._chunk_data if self._left else self._trailers
        return self._state()

    def _chunk_data(self) -> bytes | None:
        data = self._take(self._left)
        self._left -= len(data)
        if not self._left:
            self._state = self._chunk_end
        return data or None

    def _chunk_end(self) -> object | None:
        found = self._buffer[self._at : self._at + 2]
        if found == b"\r\n":
            self._at += 2
            self._state = self._chunk_size
            return self._chunk_size()
        if b"\r\n".startswith(found):
            return None
        raise ProtocolError("no CRLF after a chunk")

    def _trailers(self) -> object | None:
        if self._buffer.startswith(b"\r\n", self._at):
            self._at += 2
            return self._end()
        block = self._take_head() if self.buffered > 1 else None
        if block is None:
            return None
        trailers = parse_fields(block, 0)
        for name, _ in trailers:
            if name in FORBIDDEN_TRAILERS:
                raise ProtocolError(f"trailer field {name.decode()}")
        self._state = self._head
        return End(trailers)


class RequestReader(_Reader):
    """Requests of one downstream connection."""

    __slots__ = ()

    def whole(self, data: bytes) -> RequestHead | None:
        """The short way for what most requests are: one read that is exactly one head. None: feed the bytes.

        A request without a body is then complete: there is no End to take.

        :raises ProtocolError: as :meth:`next`.
        """
        if self._at != len(self._buffer) or self._state != self._head or self.failed:
            return None
        # Only what may be in the cache is looked up: hashing a body that came along would cost more than it saves.
        head = _requests.get(data) if len(data) <= _MAX_CACHED_SIZE else None
        if head is None:
            if (
                data.find(b"\r\n\r\n") != len(data) - 4
                or len(data) < 16
                or data[0] == 13
                or len(data) > MAX_HEAD
            ):
                return None
            try:
                head = request_head(data)
            except ProtocolError:
                self.failed = True
                raise
        if head.length:
            self._begin_body(head.length)
        return head

    def next(self) -> RequestEvent | None:
        """The next event, or None: feed more.

        :raises ProtocolError: once; then nothing more is read.
        """
        return self._next()  # type: ignore[return-value]

    def _head(self) -> RequestHead | None:
        # RFC 9112, section 2.2: an empty line before the request line is ignored.
        if self._buffer.startswith(b"\r\n", self._at) and self._scanned <= self._at:
            self._at += 2
            if self._buffer[self._at : self._at + 1] in (b"\r", b"\n"):
                raise ProtocolError("more than one empty line before the request line")
        if not self.buffered:
            return None
        data = self._take_head()
        if data is None:
            return None
        head = request_head(data)
        self._begin_body(head.length)
        return head


class ResponseReader(_Reader):
    """Responses of one upstream connection: :meth:`expect` tells the method of the request, before the response."""

    __slots__ = ("_method",)

    def __init__(self) -> None:
        super().__init__()
        self._method = b"GET"

    def expect(self, method: bytes) -> None:
        self._method = method

    def whole(self, data: bytes) -> tuple[ResponseHead, bytes] | None:
        """The short way for what most responses are: one read that is exactly one final response. None: feed the bytes.

        Only for a counted body and a head seen before.
        """
        if self._at != len(self._buffer) or self._state != self._head or self._method == b"HEAD":
            return None
        end = data.find(b"\r\n\r\n") + 4
        head = _responses.get(data[:end])
        if head is None or head.status < 200 or len(data) - end != head.length:
            return None
        return head, data[end:]

    def next(self) -> ResponseEvent | None:
        """As :meth:`RequestReader.next`. Interim (1xx) responses are heads too, each followed by End; 101 is not."""
        return self._next()  # type: ignore[return-value]

    def end_of_stream(self) -> End | None:
        """The peer closed: End if that is how this message ends.

        :raises ProtocolError: in the middle of a message.
        """
        if self._state == self._until_close and not self.buffered:
            self._state = self._head
            return END
        if self.at_start:
            return None
        raise ProtocolError("connection closed inside a message")

    def _head(self) -> ResponseHead | None:
        if not self.buffered:
            return None
        data = self._take_head()
        if data is None:
            return None
        head = response_head(data, self._method)
        if head.status == 101:
            self._state = self._until_close
        else:
            self._begin_body(head.length)
        return head


_MAX_CACHED = 1024
_MAX_CACHED_SIZE = 2048
_requests: dict[bytes, RequestHead] = {}
_responses: dict[bytes, ResponseHead] = {}


def request_head(data: bytes) -> RequestHead:
    """As :func:`parse_request_head`, from a bounded cache: a head is a pure function of its bytes, and peers repeat them."""
    head = _requests.get(data)
    if head is None:
        head = parse_request_head(data)
        if len(data) <= _MAX_CACHED_SIZE:
            if len(_requests) >= _MAX_CACHED:
                _requests.clear()
            _requests[data] = head
    return head


def response_head(data: bytes, method: bytes) -> ResponseHead:
    """As :func:`parse_response_head`, from a bounded cache; HEAD is not cached, since it changes what the bytes mean."""
    if method == b"HEAD":
        return parse_response_head(data, method)
    head = _responses.get(data)
    if head is None:
        head = parse_response_head(data, method)
        if len(data) <= _MAX_CACHED_SIZE:
            if len(_responses) >= _MAX_CACHED:
                _responses.clear()
            _responses[data] = head
    return head
