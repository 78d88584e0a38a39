"""The HTTP/1.1 core by transcripts and by properties: it parses or raises our error, whole and byte by byte alike."""

from __future__ import annotations

import time

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.errors import ProtocolError
from l7proxy.http1.head import MAX_FIELDS, MAX_HEAD, RequestHead, ResponseHead, parse_request_head
from l7proxy.http1.path import normalize
from l7proxy.http1.reader import End, RequestReader, ResponseReader, request_head

Transcript = list[object]


def read(reader: RequestReader | ResponseReader, data: bytes, cuts: list[int] | None = None) -> Transcript:
    """Events as plain values, bodies joined; the last is the error's status if there was one."""
    result: Transcript = []
    body = b""
    at = 0
    try:
        for cut in [*sorted(c % (len(data) + 1) for c in cuts or []), len(data)]:
            reader.feed(data[at:cut])
            at = max(at, cut)
            while (event := reader.next()) is not None:
                if isinstance(event, bytes):
                    body += event
                elif isinstance(event, End):
                    result += [body, event.trailers]
                    body = b""
                elif isinstance(event, RequestHead):
                    result.append(
                        (event.method, event.path, event.host, event.fields, event.length, event.keep_alive)
                    )
                else:
                    result.append((event.status, event.fields, event.length, event.keep_alive))
    except ProtocolError as error:
        result.append(f"refused {error.status}")
    return [*result, body]


def request(head: bytes, body: bytes = b"") -> bytes:
    return head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + body


REFUSED = {
    "both framings": request(
        b"POST / HTTP/1.1\nhost: a\ncontent-length: 5\ntransfer-encoding: chunked", b"0\r\n\r\n"
    ),
    "two lengths": request(b"POST / HTTP/1.1\nhost: a\ncontent-length: 5\ncontent-length: 5", b"hello"),
    "list of lengths": request(b"POST / HTTP/1.1\nhost: a\ncontent-length: 5, 5", b"hello"),
    "signed length": request(b"POST / HTTP/1.1\nhost: a\ncontent-length: +5", b"hello"),
    "huge length": request(b"POST / HTTP/1.1\nhost: a\ncontent-length: 99999999999999999999"),
    "coding not last": request(b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked, gzip"),
    "coding twice": request(
        b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked\ntransfer-encoding: chunked"
    ),
    "coding obscured": request(b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: xchunked"),
    "coding in 1.0": request(b"POST / HTTP/1.0\nhost: a\ntransfer-encoding: chunked"),
    "space before colon": request(b"GET / HTTP/1.1\nhost : a"),
    "folded line": request(b"GET / HTTP/1.1\nhost: a\nx: 1\n 2"),
    "bare LF": b"GET / HTTP/1.1\nhost: a\n\n",
    "bare LF inside": b"GET / HTTP/1.1\r\nhost: a\nx: 1\r\n\r\n",
    "bare CR": b"GET / HTTP/1.1\r\nhost: a\rx: 1\r\n\r\n",
    "NUL": b"GET / HTTP/1.1\r\nhost: a\x00\r\n\r\n",
    "NUL in the target": b"GET /\x00 HTTP/1.1\r\nhost: a\r\n\r\n",
    "two hosts": request(b"GET / HTTP/1.1\nhost: a\nhost: a"),
    "no host": request(b"GET / HTTP/1.1\nx: 1"),
    "user in host": request(b"GET / HTTP/1.1\nhost: me@a"),
    "path in host": request(b"GET / HTTP/1.1\nhost: a/b"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "two spaces": request(b"GET  / HTTP/1.1\nhost: a"),
    "chunk size": request(
        b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked", b"0x5\r\nhello\r\n0\r\n\r\n"
    ),
    "chunk size signed": request(b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked", b"-5\r\nhello\r\n"),
    "chunk size overflows": request(
        b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked", b"1" + b"0" * 16 + b"\r\n"
    ),
    "chunk longer than said": request(
        b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked", b"2\r\nabc\r\n"
    ),
    "chunk line with LF": request(b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked", b"3\nabc\r\n"),
    "CR in an extension": request(
        b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked", b"3;a\rb\r\nabc\r\n"
    ),
    "framing in trailers": request(
        b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked", b"0\r\nhost: b\r\n\r\n"
    ),
}


def test_many_small_chunks_cost_no_more_than_their_bytes() -> None:
    """One read's worth of one-byte chunks: to copy the rest of the buffer for each would stop the whole node's traffic."""
    reader = RequestReader()
    reader.feed(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    reader.next()
    started = time.process_time()
    reader.feed(b"1\r\nx\r\n" * 42_000)
    assert sum(1 for _ in iter(reader.next, None)) == 42_000
    assert time.process_time() - started < 1.0
    assert reader.buffered == 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_after_it_is_read(name: str) -> None:
    smuggled = request(b"GET /smuggled HTTP/1.1\nhost: a")
    data = REFUSED[name] + smuggled
    for cuts in ([], list(range(len(data)))):
        events = read(RequestReader(), data, cuts)
        assert any(str(e).startswith("refused") for e in events), events
        assert not any("smuggled" in str(e) for e in events), events


def test_limits() -> None:
    def status(data: bytes) -> int:
        return int(str(read(RequestReader(), data)[-2]).removeprefix("refused "))

    assert status(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * MAX_HEAD) == 431
    assert status(b"GET /" + b"y" * MAX_HEAD + b" HTTP/1.1\r\nhost: a\r\n\r\n") == 431
    assert status(b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * MAX_FIELDS + b"\r\n") == 431
    assert (
        status(request(b"POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked", b"1;" + b"x" * 5000)) == 400
    )


def test_what_a_connection_field_may_not_take_away() -> None:
    head = parse_request_head(
        request(b"GET / HTTP/1.1\nhost: a\nauthorization: x\nx-a: 1\nconnection: authorization, x-a")
    )
    assert head.forwarded == b"authorization: x\r\n"


def test_interim_and_closing_responses() -> None:
    reader = ResponseReader()
    reader.expect(b"GET")
    events = read(reader, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nrest")
    assert [e[0] if isinstance(e, tuple) and e else e for e in events] == [100, b"", (), 200, b"rest"]
    assert reader.end_of_stream() is not None
    reader = ResponseReader()
    read(reader, b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel")
    with pytest.raises(ProtocolError):
        reader.end_of_stream()


def test_a_head_response_has_no_body_whatever_it_says() -> None:
    for _ in range(2):  # the second time would come from the cache
        reader = ResponseReader()
        reader.expect(b"HEAD")
        data = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
        assert read(reader, data)[1:] == [b"", (), b""]
        reader.expect(b"GET")
        assert read(reader, data + b"hello")[1] == b"hello"


# -- properties ------------------------------------------------------------------------------------------------------

_token = st.text("abcXYZ-_.09!", min_size=1, max_size=8).map(str.encode)
_value = st.text("abc XYZ\t,;=\xe9", max_size=12).map(lambda s: s.strip(" \t").encode("latin-1"))
_fields = st.lists(st.tuples(_token.filter(lambda n: n.lower() not in {b"te", b"host"}), _value), max_size=6)
_body = st.binary(max_size=40)


@st.composite
def _messages(draw: st.DrawFn) -> bytes:
    """A few valid requests in a row."""
    result = b""
    for _ in range(draw(st.integers(1, 3))):
        lines = [b"%b: %b" % pair for pair in draw(_fields)]
        body = draw(_body)
        framing = draw(st.sampled_from(["none", "length", "chunked"]))
        payload = b""
        if framing == "length":
            lines.append(b"Content-Length: %d" % len(body))
            payload = body
        elif framing == "chunked":
            lines.append(b"Transfer-Encoding: chunked")
            step = draw(st.integers(1, 20))
            chunks = [body[i : i + step] for i in range(0, len(body), step)]
            payload = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
        result += (
            b"POST /p HTTP/1.1\r\nHost: a\r\n"
            + b"".join(line + b"\r\n" for line in lines)
            + b"\r\n"
            + payload
        )
    return result


@given(_messages(), st.lists(st.integers(0, 10_000), max_size=30))
def test_valid_messages_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    whole = read(RequestReader(), data)
    assert not any(str(e).startswith("refused") for e in whole)
    assert read(RequestReader(), data, cuts) == whole
    assert read(RequestReader(), data, list(range(len(data)))) == whole


@given(
    _messages(),
    st.integers(0, 10_000),
    st.binary(min_size=1, max_size=3),
    st.lists(st.integers(0, 10_000), max_size=8),
)
@settings(max_examples=300)
def test_damaged_messages_parse_or_raise_our_error(
    data: bytes, at: int, damage: bytes, cuts: list[int]
) -> None:
    at %= len(data)
    damaged = data[:at] + damage + data[at + 1 :]
    whole = read(RequestReader(), damaged)
    pieces = read(RequestReader(), damaged, cuts)
    refused = [e for e in whole if str(e).startswith("refused")]
    if refused:
        # What came before the defect is the same; a defect may be seen at once or only when its line is complete.
        assert any(str(e).startswith("refused") for e in pieces)
    else:
        # Not complete yet, or complete: then alike.
        assert not any(str(e).startswith("refused") for e in pieces)
        assert pieces == whole


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_parse_or_raise_our_error(data: bytes) -> None:
    read(RequestReader(), data + b"\r\n\r\n", list(range(0, len(data), 7)))
    read(ResponseReader(), data + b"\r\n\r\n", list(range(0, len(data), 7)))
    read(ResponseReader(), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + data)


class _Httptools:
    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.complete = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))

    def on_message_complete(self) -> None:
        self.complete += 1


@given(_fields)
def test_an_independent_parser_reads_the_same(fields: list[tuple[bytes, bytes]]) -> None:
    """What we take, llhttp takes too, and alike: two readers of one connection must not disagree."""
    data = b"GET /p HTTP/1.1\r\nHost: a\r\n" + b"".join(b"%b: %b\r\n" % pair for pair in fields) + b"\r\n"
    ours = request_head(data)
    other = _Httptools()
    httptools.HttpRequestParser(other).feed_data(data)
    assert other.complete == 1
    assert tuple(other.fields) == ours.fields


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("/", "/"),
        ("/a/b?x=../y", "/a/b?x=../y"),
        ("/a/../b", "/b"),
        ("/../../x", "/x"),
        ("/a/./b/.", "/a/b/"),
        ("/a/b/..", "/a/"),
        ("/%2e%2E/admin", "/admin"),
        ("/a%2fb", "/a%2Fb"),
        ("/%61dmin", "/admin"),
        ("/a\\..\\b", "/b"),
        ("/a//b", "/a//b"),
        ("/.hidden", "/.hidden"),
        ("*", "*"),
    ],
)
def test_paths_in_their_normal_form(path: str, normal: str) -> None:
    assert normalize(path) == normal
    assert normalize(normal) == normal


def test_slashes_are_merged_after_dot_segments() -> None:
    """In Envoy's order: an empty segment is what ``..`` takes away."""
    assert normalize("/a//../b//c", merge_slashes=True) == "/a/b/c"


def test_responses_are_not_mixed_up_by_the_cache() -> None:
    data = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    reader = ResponseReader()
    reader.expect(b"GET")
    first = read(reader, data)
    whole = reader.whole(data)
    assert whole is not None
    assert isinstance(whole[0], ResponseHead)
    assert (whole[1], first[1]) == (b"hi", b"hi")
    for wrong in (data + b"x", data[:-1], data[:-4]):
        assert ResponseReader().whole(wrong) is None
