"""The HTTP/2 core: golden bytes, transcripts of two cores, interop with the h2 library, and whatever bytes may come."""

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeproxy import h2core, h2headers
from nodeproxy import h2frames as f
from nodeproxy.h2core import Connection, Event
from nodeproxy.h2frames import Code, PeerError, Setting
from nodeproxy.h2sending import CONNECTION_WINDOW, LIMITS, OUT, Limits, Stream

AUTHORITY = "10.0.0.2:80"
REQUEST = [(b":method", b"CONNECT"), (b":authority", AUTHORITY.encode())]


def taken(core: Connection) -> bytes:
    """Everything that a core wants to send."""
    parts = []
    while core.head < core.tail:
        parts.append(bytes(core.out_view[core.head : core.tail]))
        core.sent(core.tail - core.head)
    return b"".join(parts)


def give(core: Connection, data: bytes, now: float = 0.0) -> list[Event]:
    return [
        (kind, stream, bytes(value) if kind == h2core.DATA else value)
        for kind, stream, value in core.receive(memoryview(data), now)
    ]


def kinds(events: list[Event]) -> list[int]:
    return [event[0] for event in events]


def payload(events: list[Event]) -> bytes:
    return b"".join(event[2] for event in events if event[0] == h2core.DATA)


def pair(limits: Limits = LIMITS) -> tuple[Connection, Connection]:
    """Client and server that have seen each other's settings."""
    client, server = Connection(client=True, limits=limits), Connection(client=False, limits=limits)
    assert kinds(give(server, taken(client))) == [h2core.READY]
    assert kinds(give(client, taken(server))) == [h2core.READY]
    give(server, taken(client))
    return client, server


def tunnel(client: Connection, server: Connection) -> tuple[Stream, Stream]:
    near = client.connect(AUTHORITY, [(b"baggage", b"a=b")])
    ((kind, far, request),) = give(server, taken(client))
    assert kind == h2core.REQUEST
    assert (request.method, request.authority, request.get(b"baggage")) == ("CONNECT", AUTHORITY, "a=b")
    server.respond(far, 200, end=False)
    assert give(client, taken(server)) == [(h2core.RESPONSE, near, 200)]
    return near, far


def ready_server(limits: Limits = LIMITS) -> Connection:
    server = Connection(client=False, limits=limits)
    give(server, f.PREFACE + f.settings({}))
    taken(server)
    return server


def request_block(headers: list[tuple[bytes, bytes]] = REQUEST) -> bytes:
    return bytes(hpack.Encoder().encode(headers))


# --- golden bytes -------------------------------------------------------------------------------------------------------


def test_golden_frames():
    assert f.frame(f.DATA, f.FLAG_END_STREAM, 1, b"ab").hex() == "000002000100000001" + "6162"
    assert f.window_update(3, 0x10000).hex() == "000004080000000003" + "00010000"
    assert f.rst_stream(5, Code.CONNECT_ERROR).hex() == "000004030000000005" + "0000000a"
    assert f.goaway(7, Code.ENHANCE_YOUR_CALM).hex() == "000008070000000000" + "00000007" + "0000000b"
    assert f.ping(b"12345678", ack=True).hex() == "000008060100000000" + "3132333435363738"
    assert f.settings({Setting.INITIAL_WINDOW_SIZE: 1 << 20}).hex() == "000006040000000000" + "000400100000"
    assert f.SETTINGS_ACK.hex() == "000000040100000000"


def test_golden_greetings():
    assert taken(Connection(client=True)).hex() == (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".hex()
        + "000018040000000000"
        + "000200000000" + "000400080000" + "000500010000" + "000600004000"
        + "000004080000000000" + "00ff0001"
    )  # fmt: skip
    assert taken(Connection(client=False)).hex() == (
        "00001e040000000000"
        + "000200000000" + "000400080000" + "000500010000" + "000600004000" + "000300000100"
        + "000004080000000000" + "00ff0001"
    )  # fmt: skip


def test_golden_data():
    client, server = pair()
    near, _ = tunnel(client, server)
    assert client.write(near, b"hello") == 5
    assert taken(client).hex() == "000005000000000001" + b"hello".hex()
    client.end(near)
    assert taken(client).hex() == "000000000100000001"


# --- transcripts --------------------------------------------------------------------------------------------------------


def test_payload_both_ways_and_half_close():
    client, server = pair()
    near, far = tunnel(client, server)
    client.write(near, b"ping")
    assert give(server, taken(client)) == [(h2core.DATA, far, b"ping")]
    client.end(near)
    assert give(server, taken(client)) == [(h2core.END, far, None)]
    server.write(far, b"pong")
    server.end(far)
    assert give(client, taken(server)) == [(h2core.DATA, near, b"pong"), (h2core.END, near, None)]
    assert not client.streams
    assert not server.streams


def test_a_stream_stops_at_its_window_and_goes_on_when_bytes_are_consumed():
    client, server = pair()
    near, far = tunnel(client, server)
    data = bytes(range(256)) * 8192  # 2 MiB
    sent = 0
    received = b""
    while (count := client.write(near, data[sent:])) or client.tail:
        sent += count
        received += payload(give(server, taken(client)))
    assert sent == len(received) == LIMITS.window
    assert near.starved
    server.consumed(far, LIMITS.window)
    assert give(client, taken(server)) == [(h2core.WINDOW, near, None)]
    assert client.room(near) == LIMITS.frame


def test_a_stream_that_is_not_read_stops_no_other():
    client, server = pair()
    sleeping, _ = tunnel(client, server)
    awake, far = tunnel(client, server)
    total = 0
    for _ in range(300):
        while client.write(sleeping, bytes(LIMITS.frame)):
            give(server, taken(client))
        sent = client.write(awake, bytes(LIMITS.frame))
        assert sent == LIMITS.frame
        total += sent
        server.consumed(far, len(payload(give(server, taken(client)))))
        give(client, taken(server))
    assert total > CONNECTION_WINDOW


def test_output_is_bounded():
    client, server = pair()
    streams = [tunnel(client, server)[0] for _ in range(20)]
    for stream in streams:
        client.write(stream, bytes(LIMITS.window))
    assert client.tail <= OUT
    assert client.starved
    data = taken(client)
    assert len(payload(give(server, data))) > OUT - 2000


def test_resets():
    client, server = pair()
    near, far = tunnel(client, server)
    client.reset(near, Code.CONNECT_ERROR)
    assert give(server, taken(client)) == [(h2core.RESET, far, Code.CONNECT_ERROR)]
    near, far = tunnel(client, server)
    client.write(near, b"on its way")
    server.reset(far, Code.CANCEL)
    assert give(client, taken(server)) == [(h2core.RESET, near, Code.CANCEL)]
    assert (
        give(server, taken(client)) == []
    )  # to a stream that is gone: ignored, and the window is kept right
    assert not client.streams
    assert not server.streams


def test_refusal():
    client, server = pair()
    near = client.connect(AUTHORITY, [])
    ((_, far, _),) = give(server, taken(client))
    server.respond(far, 401, end=True)
    server.reset(far, Code.NO_ERROR)
    assert give(client, taken(server)) == [
        (h2core.RESPONSE, near, 401),
        (h2core.END, near, None),
        (h2core.RESET, near, Code.NO_ERROR),
    ]


def test_goaway_says_which_streams_may_be_tried_elsewhere():
    client, server = pair()
    near, _ = tunnel(client, server)
    server.shutdown()
    late = client.connect(AUTHORITY, [])
    events = give(client, taken(server))
    assert events == [
        (h2core.GOAWAY, None, Code.NO_ERROR),
        (h2core.RESET, late, Code.REFUSED_STREAM),
    ]
    assert client.available == 0
    assert list(client.streams.values()) == [near]


def test_concurrent_streams_are_limited():
    limits = Limits(streams=2)
    client, server = pair(limits)
    assert client.available == 2
    tunnel(client, server)
    tunnel(client, server)
    assert client.available == 0
    over = client.connect(AUTHORITY, [])
    assert give(server, taken(client)) == []
    assert give(client, taken(server)) == [(h2core.RESET, over, Code.REFUSED_STREAM)]


def test_header_blocks_in_continuations():
    server = ready_server()
    block = request_block()
    data = f.frame(f.HEADERS, 0, 1, block[:5])
    data += f.frame(f.CONTINUATION, 0, 1, block[5:9])
    data += f.frame(f.CONTINUATION, f.FLAG_END_HEADERS, 1, block[9:])
    ((kind, _, request),) = give(server, data)
    assert kind == h2core.REQUEST
    assert request.authority == AUTHORITY


def test_padding_and_priority_are_understood():
    server = ready_server()
    block = b"\x02" + bytes(5) + request_block() + b"\0\0"
    flags = f.FLAG_END_HEADERS | f.FLAG_PADDED | f.FLAG_PRIORITY
    ((_, stream, _),) = give(server, f.frame(f.HEADERS, flags, 1, block))
    before = server.receive_window
    assert give(server, f.frame(f.DATA, f.FLAG_PADDED, 1, b"\x03abc\0\0\0")) == [
        (h2core.DATA, stream, b"abc")
    ]
    assert before - server.receive_window == 7  # section 6.9.1: padding counts


def test_windows_that_shrink():
    client, server = pair()
    near, _ = tunnel(client, server)
    client.write(near, bytes(1000))
    give(client, f.settings({Setting.INITIAL_WINDOW_SIZE: 500}))
    assert near.send_window == -500
    assert client.room(near) == 0
    assert give(client, f.settings({Setting.INITIAL_WINDOW_SIZE: 2000})) == [(h2core.WINDOW, near, None)]
    assert client.room(near) == 1000


# --- what a peer must not do ----------------------------------------------------------------------------------------------

HEADERS_1 = f.frame(f.HEADERS, f.FLAG_END_HEADERS, 1, request_block())

WRONG = {
    "DATA on stream 0": (f.frame(f.DATA, 0, 0, b"x"), Code.PROTOCOL_ERROR),
    "DATA on an idle stream": (f.frame(f.DATA, 0, 1, b"x"), Code.PROTOCOL_ERROR),
    "DATA after END_STREAM": (
        f.frame(f.HEADERS, f.FLAG_END_HEADERS | f.FLAG_END_STREAM, 1, request_block()) + f.frame(f.DATA, 0, 1, b"x"),
        Code.STREAM_CLOSED,
    ),
    "HEADERS on an even stream": (f.frame(f.HEADERS, f.FLAG_END_HEADERS, 2, request_block()), Code.PROTOCOL_ERROR),
    "HEADERS on stream 0": (f.frame(f.HEADERS, f.FLAG_END_HEADERS, 0, request_block()), Code.PROTOCOL_ERROR),
    "an interrupted block": (f.frame(f.HEADERS, 0, 1, b"") + f.ping(bytes(8)), Code.PROTOCOL_ERROR),
    "a block of another stream": (
        f.frame(f.HEADERS, 0, 1, b"") + f.frame(f.CONTINUATION, 4, 3, b""),
        Code.PROTOCOL_ERROR,
    ),
    "DATA in a block": (HEADERS_1 + f.frame(f.HEADERS, 0, 3, b"") + f.frame(f.DATA, 0, 1, b"x"), Code.PROTOCOL_ERROR),
    "CONTINUATION alone": (f.frame(f.CONTINUATION, 4, 1, b""), Code.PROTOCOL_ERROR),
    "an endless block": (
        f.frame(f.HEADERS, 0, 1, b"") + f.frame(f.CONTINUATION, 0, 1, b"") * 20,
        Code.ENHANCE_YOUR_CALM,
    ),
    "a large block": (f.frame(f.HEADERS, 0, 1, bytes(20_000)), Code.ENHANCE_YOUR_CALM),
    "a header bomb": (
        f.frame(f.HEADERS, f.FLAG_END_HEADERS, 1, request_block([(b"a", b"b" * 4000)]) + b"\xbe" * 2000),
        Code.ENHANCE_YOUR_CALM,
    ),
    "a broken block": (f.frame(f.HEADERS, f.FLAG_END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"), Code.COMPRESSION_ERROR),
    "an index out of the table": (f.frame(f.HEADERS, f.FLAG_END_HEADERS, 1, b"\xfe"), Code.COMPRESSION_ERROR),
    "a frame over the limit": (f.frame(f.SETTINGS, 0, 0, bytes(66_000)), Code.FRAME_SIZE_ERROR),
    "a DATA frame over the limit": (HEADERS_1 + f.frame(f.DATA, 0, 1, bytes(66_000)), Code.FRAME_SIZE_ERROR),
    "padding over the frame": (HEADERS_1 + f.frame(f.DATA, f.FLAG_PADDED, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
    "SETTINGS on a stream": (f.frame(f.SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "SETTINGS of 5 bytes": (f.frame(f.SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
    "an ACK with payload": (f.frame(f.SETTINGS, f.FLAG_ACK, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
    "a window of 2^31": (f.settings({Setting.INITIAL_WINDOW_SIZE: 1 << 31}), Code.FLOW_CONTROL_ERROR),
    "a frame size of 1": (f.settings({Setting.MAX_FRAME_SIZE: 1}), Code.PROTOCOL_ERROR),
    "ENABLE_PUSH 2": (f.settings({Setting.ENABLE_PUSH: 2}), Code.PROTOCOL_ERROR),
    "PING of 7 bytes": (f.frame(f.PING, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "PING on a stream": (f.frame(f.PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "GOAWAY of 7 bytes": (f.frame(f.GOAWAY, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of 0": (f.window_update(0, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE of 3 bytes": (f.frame(f.WINDOW_UPDATE, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE on an idle stream": (f.window_update(1, 1), Code.PROTOCOL_ERROR),
    "a window that overflows": (f.window_update(0, f.MAX_WINDOW), Code.FLOW_CONTROL_ERROR),
    "RST_STREAM on an idle stream": (f.rst_stream(1, 0), Code.PROTOCOL_ERROR),
    "RST_STREAM of 3 bytes": (f.frame(f.RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    "PUSH_PROMISE": (f.frame(f.PUSH_PROMISE, 4, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "more than the window": (
        HEADERS_1 + f.frame(f.DATA, 0, 1, bytes(LIMITS.frame)) * (LIMITS.window // LIMITS.frame + 1),
        Code.FLOW_CONTROL_ERROR,
    ),
    "a flood of PINGs": (f.ping(bytes(8)) * 600, Code.ENHANCE_YOUR_CALM),
    "a flood of SETTINGS": (f.settings({}) * 600, Code.ENHANCE_YOUR_CALM),
    "a flood of empty DATA": (HEADERS_1 + f.frame(f.DATA, 0, 1) * 600, Code.ENHANCE_YOUR_CALM),
    "a flood of unknown frames": (f.frame(200, 0, 0) * 600, Code.ENHANCE_YOUR_CALM),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str):
    data, code = WRONG[name]
    for step in (len(data), 7, 1):
        server = ready_server()
        with pytest.raises(PeerError) as caught:  # noqa: PT012
            for at in range(0, len(data), step):
                give(server, data[at : at + step])
        assert caught.value.code is code
        goodbyes = tuple(f.goaway(last, code, caught.value.reason) for last in (0, 1))
        assert taken(server).endswith(goodbyes)
        assert give(server, HEADERS_1) == []


def test_rapid_reset():
    """A stream opened and reset at once costs us work: allowed in bursts, not for ever (CVE-2023-44487)."""
    encoder = hpack.Encoder()

    def storm(server: Connection, first: int, count: int, now: float) -> None:
        for stream_id in range(first, first + 2 * count, 2):
            give(server, f.frame(f.HEADERS, f.FLAG_END_HEADERS, stream_id, encoder.encode(REQUEST)), now)
            give(server, f.rst_stream(stream_id, Code.CANCEL), now)

    server = ready_server()
    storm(server, 1, 500, 0.0)
    storm(server, 1001, 400, 4.0)
    with pytest.raises(PeerError, match="reset before their answer"):
        storm(server, 3001, 200, 4.0)


def test_the_first_frame_is_settings():
    server = Connection(client=False)
    with pytest.raises(PeerError, match="not SETTINGS"):
        give(server, f.PREFACE + f.ping(bytes(8)))


def test_no_preface():
    with pytest.raises(PeerError, match="preface"):
        give(Connection(client=False), b"GET / HTTP/1.1\r\n")


def test_a_peer_that_does_not_read_our_answers_is_given_up():
    server = ready_server()
    server.tail = OUT  # its socket takes nothing
    now = 0.0
    while not server.overflow:
        now += 1.0
        give(server, f.ping(bytes(8)) * 50, now)
    assert server.closed
    assert len(server.queued) <= LIMITS.control_queue


@pytest.mark.parametrize(
    "headers",
    [
        [(b":method", b"CONNECT")],
        [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b":path", b"/")],
        [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b":scheme", b"http")],
        [(b":method", b"CONNECT"), (b":method", b"CONNECT"), (b":authority", b"a:1")],
        [(b"a", b"b"), *REQUEST],
        [*REQUEST, (b"A", b"b")],
        [*REQUEST, (b"a b", b"c")],
        [*REQUEST, (b"", b"c")],
        [*REQUEST, (b"a", b"b\r\nc: d")],
        [*REQUEST, (b"a", b" b")],
        [*REQUEST, (b"connection", b"close")],
        [*REQUEST, (b"transfer-encoding", b"chunked")],
        [*REQUEST, (b"te", b"gzip")],
        [*REQUEST, (b":status", b"200")],
        [(b":method", b"GET"), (b":authority", b"a")],
    ],
)
def test_malformed_requests_end_their_stream_only(headers: list[tuple[bytes, bytes]]):
    server = ready_server()
    encoder = hpack.Encoder()
    assert give(server, f.frame(f.HEADERS, f.FLAG_END_HEADERS, 1, encoder.encode(headers))) == []
    assert taken(server) == f.rst_stream(1, Code.PROTOCOL_ERROR)
    block = encoder.encode(REQUEST)
    assert kinds(give(server, f.frame(f.HEADERS, f.FLAG_END_HEADERS, 3, block))) == [h2core.REQUEST]


def test_authorities():
    split = h2headers.split_authority
    assert split("10.0.0.1:80") == ("10.0.0.1", 80)
    assert split("[fd00::1]:8080") == ("fd00::1", 8080)
    for wrong in ("10.0.0.1", ":80", "a:0", "a:65536", "a:+1", "a:1x", "fd00::1:80", "u@a:1", "a:1/", ""):
        assert split(wrong) is None, wrong
    assert h2headers.forwarded_for('for="10.0.0.1:80";host=web, for=10.9.9.9:1') == ("10.0.0.1", 80)
    assert h2headers.forwarded_for("host=web;FOR=10.0.0.1:80") == ("10.0.0.1", 80)
    assert h2headers.forwarded_for("for=_hidden") is None


# --- whatever bytes may come ---------------------------------------------------------------------------------------------

frames = st.builds(
    f.frame,
    st.integers(0, 10),
    st.integers(0, 255),
    st.integers(0, 5),
    st.one_of(
        st.binary(max_size=40), st.just(request_block()), st.just(b"\x88"), st.binary(min_size=8, max_size=8)
    ),
)
streams_of_frames = st.lists(frames, max_size=12).map(b"".join)


def outcome(client: bool, data: bytes, sizes: list[int]) -> tuple[list[Event], object]:
    """What comes of bytes in pieces of these sizes: events (payload joined per stream), and the error if there is one."""
    core = Connection(client=client)
    if client:
        core.connect(AUTHORITY, [])
    events: list[Event] = []
    error: object = None
    try:
        at = 0
        while at < len(data):
            size = sizes[at % len(sizes)] if sizes else len(data)
            for kind, stream, value in give(core, data[at : at + size]):
                number = stream.id if stream else 0
                if kind == h2core.DATA and events and events[-1][:2] == (kind, number):
                    events[-1] = (kind, number, events[-1][2] + value)
                else:
                    events.append((kind, number, value))
            at += size
    except PeerError as caught:
        error = caught.code
    return events, error


@given(
    st.booleans(),
    st.one_of(st.binary(max_size=200), streams_of_frames),
    st.lists(st.integers(1, 20), min_size=1),
)
@settings(max_examples=400, deadline=None)
def test_parses_or_raises_our_error_whole_and_in_pieces(client: bool, data: bytes, sizes: list[int]):
    data = (b"" if client else f.PREFACE) + f.settings({}) + data
    whole = outcome(client, data, [])
    assert outcome(client, data, [1])[1] == whole[1]
    pieces = outcome(client, data, sizes)
    assert pieces[1] == whole[1]
    if whole[1] is None:
        assert pieces[0] == whole[0] == outcome(client, data, [1])[0]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.binary(min_size=1, max_size=3000)), max_size=30),
    st.integers(1, 5000),
)
@settings(max_examples=100, deadline=None)
def test_payload_arrives_whole_however_it_is_cut(writes: list[tuple[int, bytes]], size: int):
    client, server = pair()
    near = [tunnel(client, server) for _ in range(4)]
    sent = [b""] * 4
    received = {far.id: b"" for _, far in near}
    for which, data in writes:
        assert client.write(near[which][0], data) == len(data)
        sent[which] += data
    wire = taken(client)
    for at in range(0, len(wire), size):
        for kind, stream, value in give(server, wire[at : at + size]):
            assert kind == h2core.DATA
            received[stream.id] += value
    assert list(received.values()) == sent


# --- interop with the h2 library --------------------------------------------------------------------------------------------


def h2_peer(*, client: bool) -> h2.connection.H2Connection:
    config = h2.config.H2Configuration(client_side=client, header_encoding=False)
    peer = h2.connection.H2Connection(config)
    peer.initiate_connection()
    return peer


def exchange(core: Connection, peer: h2.connection.H2Connection) -> tuple[list[Event], list[h2.events.Event]]:
    """Until both are quiet: our events, theirs."""
    ours: list[Event] = []
    theirs: list[h2.events.Event] = []
    while True:
        out = taken(core)
        if out:
            theirs += peer.receive_data(out)
        back = peer.data_to_send()
        if back:
            ours += give(core, back)
        if not out and not back:
            return ours, theirs


def test_our_client_with_h2_as_server():
    core, peer = Connection(client=True), h2_peer(client=False)
    exchange(core, peer)
    stream = core.connect(AUTHORITY, [(b"baggage", b"x=y")])
    _, theirs = exchange(core, peer)
    (request,) = [e for e in theirs if isinstance(e, h2.events.RequestReceived)]
    assert (b":method", b"CONNECT") in request.headers
    peer.send_headers(1, [(b":status", b"200")])
    ours, _ = exchange(core, peer)
    assert ours == [(h2core.RESPONSE, stream, 200)]
    data = bytes(range(256)) * 1000
    sent = 0
    received = b""
    while sent < len(data):
        sent += core.write(stream, data[sent:])
        _, theirs = exchange(core, peer)
        for event in theirs:
            if isinstance(event, h2.events.DataReceived):
                received += event.data
                peer.acknowledge_received_data(event.flow_controlled_length, 1)
        exchange(core, peer)
    assert received == data
    core.end(stream)
    _, theirs = exchange(core, peer)
    assert any(isinstance(e, h2.events.StreamEnded) for e in theirs)
    peer.end_stream(1)
    assert exchange(core, peer)[0] == [(h2core.END, stream, None)]


def test_our_server_with_h2_as_client():
    core, peer = Connection(client=False), h2_peer(client=True)
    exchange(core, peer)
    peer.send_headers(1, REQUEST)
    ((_, stream, _),), _ = exchange(core, peer)
    core.respond(stream, 200, end=False)
    _, theirs = exchange(core, peer)
    assert any(isinstance(e, h2.events.ResponseReceived) for e in theirs)
    data = bytes(range(256)) * 4000
    sent = 0
    received = b""
    while sent < len(data):
        count = min(peer.local_flow_control_window(1), peer.max_outbound_frame_size, len(data) - sent)
        peer.send_data(1, data[sent : sent + count])
        sent += count
        ours, _ = exchange(core, peer)
        received += payload(ours)
        core.consumed(stream, len(payload(ours)))
        exchange(core, peer)
    assert received == data
    peer.reset_stream(1, h2.errors.ErrorCodes.CANCEL)
    assert exchange(core, peer)[0] == [(h2core.RESET, stream, Code.CANCEL)]
    peer.ping(b"12345678")
    _, theirs = exchange(core, peer)
    assert any(isinstance(e, h2.events.PingAckReceived) for e in theirs)
    peer.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    _, theirs = exchange(core, peer)
    assert any(isinstance(e, h2.events.SettingsAcknowledged) for e in theirs)
    core.shutdown()
    _, theirs = exchange(core, peer)
    assert any(isinstance(e, h2.events.ConnectionTerminated) for e in theirs)
