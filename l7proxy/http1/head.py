"""Message heads: start line and header fields, strictly (RFC 9112, sections 2 to 6).

Owns what a head means for the connection: framing of the body, persistence, upgrade. Strictness is the defence against
request smuggling: whatever two parsers could read in two ways is refused. A head is immutable, so that one object can
serve every request with the same bytes.
"""

from __future__ import annotations

import copy
import re

from l7proxy.errors import ProtocolError

Fields = tuple[tuple[bytes, bytes], ...]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# RFC 9110, section 5.5: VCHAR, SP, HTAB and obs-text; no other control character, hence no bare CR, LF or NUL.
_FIELD = rb"(?:" + _TOKEN + rb"+:[\t\x20-\x7e\x80-\xff]*+\r\n)"
_FIELDS_BLOCK = re.compile(_FIELD + rb"*+")
_FIELD_PAIR = re.compile(rb"([^:]+):[\t ]*([^\r]*)\r\n")  # of a block that is known to be valid
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/(\d)\.(\d)\r\n")
_STATUS_LINE = re.compile(rb"HTTP/(\d)\.(\d) ([1-9]\d\d)(?: ([\t\x20-\x7e\x80-\xff]*))?\r\n")
# RFC 3986, section 3.2: host with an optional port, no user information.
_AUTHORITY = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~!$&'()*+,;=%]+)(?::\d*)?")
_ABSOLUTE = re.compile(rb"([Hh][Tt][Tt][Pp][Ss]?)://([^/?#]+)([/?][^#]*)?")
#: What a path may have to be normalized for: dot segments, escapes, doubled slashes and backslashes.
_ODD_PATH = re.compile(rb"/\.|//|[%\\]")
_LENGTH = re.compile(rb"[0-9]{1,18}")

#: Most bytes of one message's head (Envoy: max_request_headers_kb).
MAX_HEAD = 60 * 1024
#: Most fields of one message's head or trailers (Envoy: max_headers_count).
MAX_FIELDS = 100

#: Body length of a message whose length is not a number.
CHUNKED = -1
UNTIL_CLOSE = -2

#: Fields that end at this hop (RFC 9110, section 7.6.1), and those that this proxy writes itself.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"transfer-encoding",
        b"upgrade",
        b"te",
        b"http2-settings",
    }
)
#: Fields that say something about this message's framing or connection: a request without any of them is a plain one.
_CONNECTION_FIELDS = HOP_BY_HOP | {b"expect", b"content-length"}
#: What an upstream's response loses: another proxy's service time is not the one that the client is told.
_RESPONSE_DROPPED = HOP_BY_HOP | {b"x-envoy-upstream-service-time"}
#: Fields that must not come twice (RFC 9112, sections 3.2 and 6.3).
_SINGLE = frozenset({b"host", b"content-length"})
#: A Connection field that names one of these does not make it hop-by-hop: an attacker would take away what others rely on.
_NEVER_NOMINATED = frozenset(
    {
        b"host",
        b"content-length",
        b"authorization",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-request-id",
        b"traceparent",
    }
)
#: Fields that a trailer must not carry: framing, routing and authentication (RFC 9110, section 6.5.1).
FORBIDDEN_TRAILERS = frozenset(
    {b"content-length", b"transfer-encoding", b"host", b"connection", b"authorization", b"content-encoding"}
    | {b"content-range", b"te", b"trailer", b"upgrade", b"expect", b"cookie", b"set-cookie"}
)


class RequestHead:
    """A request's start line and fields. ``fields`` has lower-case names, in order, all of them.

    :ivar path: origin-form target with query (``/`` for an absolute target without path), Latin-1 text; ``*`` for
        ``OPTIONS *``; empty for CONNECT.
    :ivar host: the authority: of an absolute target, else of Host; empty if an HTTP/1.0 request has none.
    :ivar length: bytes of the body, or :data:`CHUNKED`.
    :ivar upgrade: protocol that the client wants to change to, lower case, or empty (also for HTTP/2, which is not offered).
    :ivar odd_path: the path may differ from its normal form (:mod:`l7proxy.http1.path`).
    :ivar forwarded: the fields to forward, as bytes of whole lines, without hop-by-hop ones, Host, Expect and framing.
    """

    __slots__ = (
        "method", "target", "minor", "fields", "path", "host", "length", "keep_alive", "upgrade", "expects_continue",
        "values", "forwarded", "cached_upstream", "te_trailers", "method_text", "odd_path",
    )  # fmt: skip

    def __init__(self, method: bytes, target: bytes, minor: int, fields: Fields) -> None:
        self.method = method
        self.method_text = method.decode("ascii")
        self.target = target
        self.minor = minor
        self.fields = fields
        values = dict(fields)
        if len(values) != len(fields):
            values = _combine(fields)
        self.values = values
        self.path, self.host = _target(method, target, minor, values)
        #: what the router last built of this head: (its key, bytes); see l7proxy.headers
        self.cached_upstream: tuple[object, bytes] = (None, b"")
        self.odd_path = _ODD_PATH.search(target) is not None
        if _CONNECTION_FIELDS.isdisjoint(values):
            self.length = 0
            self.keep_alive = minor == 1
            self.upgrade = ""
            self.expects_continue = self.te_trailers = False
            self.forwarded = b"".join([b"%b: %b\r\n" % pair for pair in fields if pair[0] != b"host"])
            return
        options = _connection_options(values)
        self.length = _request_length(method, minor, values)
        self.keep_alive = b"close" not in options if minor else b"keep-alive" in options
        self.upgrade = ""
        if b"upgrade" in options and minor:
            self.upgrade = values.get(b"upgrade", b"").decode("latin-1").strip().lower()
            if self.upgrade == "h2c":
                # An offer that a server may ignore (RFC 9110, section 7.8), and does, as Envoy: Java's client makes it by itself.
                self.upgrade = ""
        self.expects_continue = minor == 1 and values.get(b"expect", b"").lower() == b"100-continue"
        self.te_trailers = b"trailers" in (
            part.strip().lower() for part in values.get(b"te", b"").split(b",")
        )
        drop = _CONNECTION_FIELDS | {b"host"} | (options - _NEVER_NOMINATED)
        self.forwarded = b"".join([b"%b: %b\r\n" % pair for pair in fields if pair[0] not in drop])

    def with_path(self, path: str) -> RequestHead:
        """The same request for another path."""
        changed = copy.copy(self)
        changed.path = path
        changed.odd_path = False
        changed.cached_upstream = (None, b"")
        return changed

    def __repr__(self) -> str:
        return f"RequestHead({self.method!r}, {self.target!r}, 1.{self.minor}, {self.fields!r})"


class ResponseHead:
    """A response's status line and fields.

    :ivar length: bytes of the body, :data:`CHUNKED` or :data:`UNTIL_CLOSE`; already 0 where the status or the request's
        method allows no body.
    :ivar forwarded: as of :class:`RequestHead`, but with Content-Length, which describes the body also of a HEAD response.
    """

    __slots__ = (
        "status", "reason", "minor", "fields", "values", "length", "keep_alive", "forwarded", "upgrade",
        "start_line",
    )  # fmt: skip

    def __init__(self, status: int, reason: bytes, minor: int, fields: Fields, method: bytes) -> None:
        self.status = status
        self.reason = reason
        self.minor = minor
        self.fields = fields
        self.values = dict(fields)
        if len(self.values) != len(fields):
            self.values = _combine(fields)
        options = _connection_options(self.values)
        self.upgrade = self.values.get(b"upgrade", b"").decode("latin-1").strip().lower()
        self.length = _response_length(status, minor, self.values, method)
        self.keep_alive = b"close" not in options if minor else b"keep-alive" in options
        if self.length == UNTIL_CLOSE:
            self.keep_alive = False
        drop = _RESPONSE_DROPPED | (options - _NEVER_NOMINATED)
        if b"transfer-encoding" in self.values:
            drop |= {b"content-length"}
        self.forwarded = b"".join([b"%b: %b\r\n" % pair for pair in fields if pair[0] not in drop])
        self.start_line = b"HTTP/1.1 %d %b\r\n" % (status, reason)

    def __repr__(self) -> str:
        return f"ResponseHead({self.status}, {self.fields!r})"


def parse_request_head(data: bytes) -> RequestHead:
    """A complete head, up to and with its empty line.

    :raises ProtocolError: it is not one.
    """
    match = _REQUEST_LINE.match(data)
    if match is None:
        raise ProtocolError("invalid request line")
    method, target, major, minor = match.groups()
    if len(method) > 64:
        raise ProtocolError("method too long", 501)
    _check_version(major, minor)
    return RequestHead(method, target, 1 if minor != b"0" else 0, parse_fields(data, match.end()))


def parse_response_head(data: bytes, method: bytes) -> ResponseHead:
    """A complete head of a response to a request with ``method``.

    :raises ProtocolError: it is not one.
    """
    match = _STATUS_LINE.match(data)
    if match is None:
        raise ProtocolError("invalid status line")
    major, minor, status, reason = match.groups()
    _check_version(major, minor)
    fields = parse_fields(data, match.end())
    return ResponseHead(int(status), reason or b"", 1 if minor != b"0" else 0, fields, method)


def parse_fields(data: bytes, start: int) -> Fields:
    """The field lines from ``start`` to the end of ``data``, which is an empty line; names in lower case.

    :raises ProtocolError: a line is no field line, or there are more than :data:`MAX_FIELDS` (431).
    """
    end = len(data) - 2
    block = _FIELDS_BLOCK.match(data, start)
    if block is None or block.end() != end:
        raise ProtocolError("invalid header field")
    pairs = _FIELD_PAIR.findall(data, start, end)
    if len(pairs) > MAX_FIELDS:
        raise ProtocolError(f"{len(pairs)} header fields, at most {MAX_FIELDS}", 431)
    if b" \r\n" in data or b"\t\r\n" in data:
        return tuple([(name.lower(), value.rstrip(b" \t")) for name, value in pairs])
    return tuple([(name.lower(), value) for name, value in pairs])


def _check_version(major: bytes, minor: bytes) -> None:
    if major != b"1" or minor not in (b"0", b"1"):
        raise ProtocolError("HTTP version not supported", 505)


def _combine(fields: Fields) -> dict[bytes, bytes]:
    """Values by name; those of a repeated name joined by a comma (RFC 9110, section 5.3)."""
    values: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in values:
            if name in _SINGLE:
                raise ProtocolError(f"more than one {name.decode()}")
            values[name] += b"," + value
        else:
            values[name] = value
    return values


def _connection_options(values: dict[bytes, bytes]) -> frozenset[bytes]:
    value = values.get(b"connection")
    if value is None:
        return frozenset()
    return frozenset([option.strip().lower() for option in value.split(b",")])


def _target(method: bytes, target: bytes, minor: int, values: dict[bytes, bytes]) -> tuple[str, str]:
    """Path and authority (RFC 9112, section 3.2)."""
    host = values.get(b"host")
    if host is None:
        if minor:
            raise ProtocolError("no Host")
        host = b""
    elif host and not _AUTHORITY.fullmatch(host):
        raise ProtocolError("invalid Host")
    if method == b"CONNECT":
        if not _AUTHORITY.fullmatch(target) or b":" not in target:
            raise ProtocolError("CONNECT wants an authority")
        return "", target.decode("latin-1")
    if b"#" in target:
        raise ProtocolError("fragment in the request target")
    if target[:1] == b"/":
        return target.decode("latin-1"), host.decode("latin-1")
    if target == b"*":
        if method != b"OPTIONS":
            raise ProtocolError("asterisk-form without OPTIONS")
        return "*", host.decode("latin-1")
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or not _AUTHORITY.fullmatch(absolute[2]):
        raise ProtocolError("invalid request target")
    path = absolute[3] or b"/"
    if path[:1] == b"?":
        path = b"/" + path
    # RFC 9112, section 3.2.2: the target's authority replaces Host.
    return path.decode("latin-1"), absolute[2].decode("latin-1")


def _transfer_encoding(minor: int, values: dict[bytes, bytes]) -> bool:
    """True for chunked, False for none; nothing else is accepted."""
    coding = values.get(b"transfer-encoding")
    if coding is None:
        return False
    if not minor:
        raise ProtocolError("Transfer-Encoding in HTTP/1.0")
    if b"content-length" in values:
        raise ProtocolError("both Transfer-Encoding and Content-Length")
    if coding.lower() != b"chunked":
        raise ProtocolError("transfer coding not supported", 501)
    return True


def _content_length(values: dict[bytes, bytes]) -> int | None:
    length = values.get(b"content-length")
    if length is None:
        return None
    if not _LENGTH.fullmatch(length):
        raise ProtocolError("invalid Content-Length")
    return int(length)


def _request_length(method: bytes, minor: int, values: dict[bytes, bytes]) -> int:
    length = CHUNKED if _transfer_encoding(minor, values) else _content_length(values) or 0
    if method == b"CONNECT" and length:
        raise ProtocolError("CONNECT with a body")
    return length


def _response_length(status: int, minor: int, values: dict[bytes, bytes], method: bytes) -> int:
    """RFC 9112, section 6.3."""
    chunked = _transfer_encoding(minor, values)
    length = _content_length(values)
    if status < 200 or status == 204:
        if chunked or length:
            raise ProtocolError(f"status {status} with a body")
        return 0
    if method == b"HEAD" or status == 304:
        return 0
    if chunked:
        return CHUNKED
    return UNTIL_CLOSE if length is None else length
