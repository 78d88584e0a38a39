"""Requests through a running proxy: routing, framing, keep-alive, pipelining, headers, local replies."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from l7proxy import server
from l7proxy.resources import CLUSTER, LISTENER
from tests.l7proxy.conftest import Mesh, eventually
from tests.l7proxy.fakes import xds
from tests.l7proxy.fakes.backend import Request, respond


async def test_a_request_reaches_the_endpoint_and_comes_back(mesh: Mesh) -> None:
    backend = await mesh.serve()
    client = await mesh.client()
    status, fields, body = await client.get("/hello?x=1", user_agent="test")
    assert (status, body) == (200, b"v1\n")
    assert fields["server"] == "backend"
    assert re.fullmatch(r"\d+", fields["x-envoy-upstream-service-time"])
    seen = backend.requests[0]
    assert seen.line == "GET /hello?x=1 HTTP/1.1"
    assert seen.header("host") == "web-app"
    assert seen.header("x-forwarded-proto") == "http"
    assert seen.header("x-forwarded-for") is None
    request_id = seen.header("x-request-id")
    assert request_id is not None
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", request_id)
    line = (await mesh.lines(1))[0]
    assert re.fullmatch(
        rf'\[\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z\] "GET /hello\?x=1 HTTP/1\.1" 200 - 0 3 \d+ \d+ "-" "test" '
        rf'"{request_id}" "web-app" "127\.0\.0\.1:{backend.port}"',
        line,
    )


async def test_connections_are_kept_on_both_sides(mesh: Mesh) -> None:
    backend = await mesh.serve()
    client = await mesh.client()
    for _ in range(20):
        assert (await client.get())[0] == 200
    assert backend.connections == 1
    assert len(backend.requests) == 20


async def test_pipelined_requests_are_answered_in_order(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(0.02 if number % 2 else 0)
        writer.write(respond(200, request.line.encode()))

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    client.send(b"".join(b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % i for i in range(30)))
    for i in range(30):
        assert (await client.response())[2] == b"GET /%d HTTP/1.1" % i


async def test_one_byte_at_a_time(mesh: Mesh) -> None:
    backend = await mesh.serve()
    client = await mesh.client()
    message = b"POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    message += b"5\r\nhello\r\n3;x=y\r\nyou\r\n0\r\nx-t: 1\r\n\r\n"
    for i in range(len(message)):
        client.send(message[i : i + 1])
        await client.writer.drain()
        await asyncio.sleep(0)
    assert (await client.response())[0] == 200
    assert backend.requests[0].body == b"helloyou"


async def test_chunked_both_ways_with_trailers(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n")
        for piece in (b"one", b"two", b"three"):
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.write(b"0\r\nx-sum: 11\r\n\r\n")

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    status, fields, body = await client.get()
    assert (status, body, fields["x-sum"]) == (200, b"onetwothree", "11")
    assert (await client.get())[2] == b"onetwothree"


async def test_a_body_that_ends_with_the_connection(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nsome")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(b"thing")
        writer.close()

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    status, fields, body = await client.get()
    assert (status, body) == (200, b"something")
    assert fields["transfer-encoding"] == "chunked"
    # The same for HTTP/1.0: no chunks, and our connection's end is the body's.
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    status, fields, body = await client.response()
    assert (status, body) == (200, b"something")
    assert "transfer-encoding" not in fields
    assert await client.closed() == b""


async def test_http_1_0_keep_alive(mesh: Mesh) -> None:
    await mesh.serve()
    client = await mesh.client()
    for _ in range(2):
        client.send(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        status, fields, _ = await client.response()
        assert (status, fields["connection"]) == (200, "keep-alive")
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert (await client.response())[1]["connection"] == "close"
    assert await client.closed() == b""


async def test_head_204_304(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        if request.line.startswith("HEAD"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 %b X\r\n\r\n" % request.line.split("/")[1].split(" ")[0].encode())

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    status, fields, _ = await client.get(method="HEAD")
    assert (status, fields["content-length"]) == (200, "1000")
    assert (await client.get("/204"))[0] == 204
    assert (await client.get("/304"))[0] == 304
    assert (await client.get(method="HEAD"))[0] == 200


async def test_expect_continue_is_answered_here(mesh: Mesh) -> None:
    backend = await mesh.serve()
    client = await mesh.client()
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n")
    assert (await client.response())[0] == 100
    client.send(b"body")
    assert (await client.response())[0] == 200
    assert backend.requests[0].body == b"body"
    assert backend.requests[0].header("expect") is None


async def test_interim_responses_are_not_passed_on(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(
            b"HTTP/1.1 103 Early\r\nlink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + respond(200, b"yes")
        )

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    assert (await client.get())[2] == b"yes"
    assert (await client.get())[2] == b"yes"


async def test_hop_by_hop_fields_stay_here(mesh: Mesh) -> None:
    backend = await mesh.serve()
    client = await mesh.client()
    await client.get(
        connection="keep-alive, x-mine, host",
        keep_alive="timeout=5",
        x_mine="1",
        proxy_connection="x",
        te="gzip",
        x_other="2",
    )
    seen = backend.requests[0]
    for name in ("connection", "keep-alive", "x-mine", "proxy-connection", "te"):
        assert seen.header(name) is None, name
    assert (seen.header("x-other"), seen.header("host")) == ("2", "web-app")


async def test_absolute_form_replaces_host(mesh: Mesh) -> None:
    backend = await mesh.serve()
    client = await mesh.client()
    client.send(b"GET http://other.example:81/p?q HTTP/1.1\r\nhost: web-app\r\n\r\n")
    assert (await client.response())[0] == 200
    assert backend.requests[0].line == "GET /p?q HTTP/1.1"
    assert backend.requests[0].header("host") == "other.example:81"


async def test_websocket_becomes_a_tunnel(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        assert request.header("upgrade") == "websocket"
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhello"
        )
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(b"bye")
        writer.close()

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    client.send(
        b"GET /ws HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n\x81\x00raw"
    )
    status, fields, _ = await client.response(head_only=True)
    assert (status, fields["upgrade"]) == (101, "websocket")
    assert await client.closed() == b"hellobye"
    assert '"GET /ws HTTP/1.1" 101 - 5 8' in (await mesh.lines(1))[0]
    client = await mesh.client()
    assert (await client.get(connection="upgrade", upgrade="other"))[0] == 403


async def test_an_offer_to_upgrade_to_http_2_is_ignored(mesh: Mesh) -> None:
    """Some clients make it with each first request (Java's does); it is no request for anything else."""
    backend = await mesh.serve()
    client = await mesh.client()
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAMAAABkAAQAoAAA"}
    assert (await client.get(**offer))[::2] == (200, b"v1\n")
    for name in ("connection", "upgrade", "http2-settings"):
        assert backend.requests[0].header(name) is None


async def test_large_bodies_both_ways_with_a_slow_client(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(respond(200, request.body[::-1]))

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    body = bytes(range(256)) * 4096 * 8
    client.send(b"PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await asyncio.sleep(0.3)
    assert (await client.response())[2] == body[::-1]


async def test_a_slow_reader_holds_the_sender(mesh: Mesh) -> None:
    written = 0

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (64 << 20))
        for _ in range(64):
            writer.write(bytes(1 << 20))
            await writer.drain()
            written += 1

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    await asyncio.sleep(0.5)
    assert written < 40
    assert len((await client.response())[2]) == 64 << 20


async def test_replies_of_the_proxys_own(mesh: Mesh) -> None:
    client = await mesh.client()
    assert (await client.get())[0] == 503
    client = await mesh.client()
    mesh.configure(
        xds.listener(),
        xds.routes(
            {"match": {"prefix": "/none"}, "route": {"cluster": "gone"}},
            {"match": {"prefix": "/empty"}, "route": {"cluster": xds.cluster_name("empty")}},
            {"match": {"prefix": "/refused"}, "route": {"cluster": xds.cluster_name("refused")}},
            {
                "match": {"prefix": "/redirect"},
                "redirect": {"host_redirect": "new", "response_code": "FOUND"},
            },
            {
                "match": {"path": "/direct"},
                "direct_response": {"status": 418, "body": {"inline_string": "tea"}},
            },
        ),
        xds.cluster("empty"),
        xds.cluster("refused"),
        xds.assignment(subset="empty"),
        xds.assignment(xds.endpoint(1), subset="refused"),
    )
    cases = (("/", 404, "NR"), ("/none", 503, "NC"), ("/empty", 503, "UH"), ("/refused", 503, "UF"))
    for number, (path, status, flag) in enumerate(cases):
        assert (await client.get(path))[0] == status, path
        assert f'"GET {path} HTTP/1.1" {status} {flag} ' in (await mesh.lines(number + 2))[-1]
    status, fields, _ = await client.get("/redirect?a=1")
    assert (status, fields["location"]) == (302, "http://new/redirect?a=1")
    assert (await client.get("/direct"))[::2] == (418, b"tea")
    client.send(b"GET / HTTP/1.1\r\n\r\n")
    assert (await client.response())[0] == 400
    assert await client.closed() == b""
    assert '"- - HTTP/1.1" 400 DPE' in (await mesh.lines(8))[-1]
    client = await mesh.client()
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n")
    assert (await client.response())[0] == 431


async def test_nothing_after_a_bad_request_is_served(mesh: Mesh) -> None:
    backend = await mesh.serve()
    client = await mesh.client()
    client.send(
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
    )
    assert (await client.response())[0] == 400
    assert await client.closed() == b""
    assert backend.requests == []


async def test_a_connection_that_nothing_is_known_of_is_closed(mesh: Mesh) -> None:
    await mesh.serve()
    mesh.dialled = None  # type: ignore[assignment]
    client = await mesh.client()
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert await client.closed() == b""


async def test_a_request_keeps_the_configuration_it_began_with(mesh: Mesh) -> None:
    wait = asyncio.Event()

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await wait.wait()
        writer.write(respond(200, b"old"))

    await mesh.serve(backend=await mesh.backend(script=script))
    client = await mesh.client()
    pending = asyncio.create_task(client.get())
    await asyncio.sleep(0.1)
    await mesh.serve(backend=await mesh.backend("new"))
    other = await mesh.client()
    assert (await other.get())[2] == b"new\n"
    wait.set()
    assert (await pending)[2] == b"old"
    assert (await client.get())[2] == b"new\n"


@pytest.mark.parametrize("body", [b"", b"4\r\nbody\r\n0\r\n\r\n"], ids=["empty", "chunked"])
async def test_a_destination_that_becomes_known_in_time_is_served(mesh: Mesh, body: bytes) -> None:
    """A route that is new: the kernel captures for it, and this proxy hears of it a moment later."""
    backend = await mesh.backend()
    client = await mesh.client()
    framing = b"transfer-encoding: chunked\r\n" if body else b""
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\n" + framing + b"\r\n")
    await eventually(lambda: bool(mesh.proxy.waiting))
    client.send(body)
    mesh.configure(xds.cluster())
    await asyncio.sleep(0.05)
    assert mesh.proxy.waiting
    await mesh.serve(backend=backend)
    status, fields, _ = await client.response()
    assert (status, fields.get("connection")) == (200, None)
    assert backend.requests[0].body == (b"body" if body else b"")
    assert not mesh.proxy.waiting


async def test_a_destination_that_stays_unknown_is_answered(mesh: Mesh) -> None:
    client = await mesh.client()
    started = time.monotonic()
    status, fields, _ = await client.get()
    # Its client is to dial again: that may go another way by then.
    assert (status, fields["connection"]) == (503, "close")
    assert time.monotonic() - started > 1.9
    client = await mesh.client()
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    await eventually(lambda: bool(mesh.proxy.waiting))
    client.close()
    await eventually(lambda: not mesh.proxy.waiting)


async def test_a_destination_that_is_gone_is_served_until_its_clients_have_left(mesh: Mesh) -> None:
    """A service's last route is deleted: connections that are open, or on their way, came here and cannot go elsewhere."""
    await mesh.serve()
    kept, idle = await mesh.client(), await mesh.client()
    assert (await kept.get())[0] == (await idle.get())[0] == 200
    for kind in (LISTENER, CLUSTER):
        mesh.resources.apply(kind, "9", [])
    mesh.proxy.publish(mesh.resources.build())
    for client in (kept, await mesh.client()):
        status, fields, _ = await client.get()
        assert (status, fields["connection"]) == (200, "close")
        assert await client.closed() == b""
    mesh.proxy._sweep(time.monotonic())
    assert await idle.closed() == b""
    mesh.proxy._sweep(time.monotonic() + server.RETIRED + 1)
    assert (await (await mesh.client()).get())[0] == 503
    await mesh.serve()
    assert (await (await mesh.client()).get())[0] == 200


async def test_what_an_earlier_proxy_told_is_told_anew(mesh: Mesh) -> None:
    """Applications pass headers on, and upstreams may be proxies: each of these says one thing, this hop's."""

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(respond(200, b"ok", x_envoy_upstream_service_time="12345"))

    backend = await mesh.serve(
        {
            "match": {"prefix": "/"},
            "route": {"cluster": xds.cluster_name(), "timeout": "3s"},
            "request_headers_to_add": [
                {
                    "header": {"key": "x-forwarded-proto", "value": "https"},
                    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                }
            ],
        },
        backend=await mesh.backend(script=script),
        include_request_attempt_count=True,
    )
    client = await mesh.client()
    client.send(
        b"GET / HTTP/1.1\r\nhost: a\r\nx-envoy-attempt-count: 7\r\nx-envoy-expected-rq-timeout-ms: 99\r\n\r\n"
    )
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert head.lower().count(b"x-envoy-upstream-service-time") == 1
    assert b"12345" not in head
    seen = backend.requests[0]
    assert seen.header("x-envoy-attempt-count") == "1"
    assert seen.header("x-envoy-expected-rq-timeout-ms") == "3000"
    assert seen.header("x-forwarded-proto") == "https"


async def test_connect_is_not_served(mesh: Mesh) -> None:
    backend = await mesh.serve({"match": {"connect_matcher": {}}, "route": {"cluster": xds.cluster_name()}})
    client = await mesh.client()
    client.send(b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n")
    assert (await client.response())[0] == 403
    assert backend.requests == []


async def test_a_direct_response_without_content_has_none(mesh: Mesh) -> None:
    await mesh.serve(
        {"match": {"prefix": "/"}, "direct_response": {"status": 204, "body": {"inline_string": "x"}}}
    )
    client = await mesh.client()
    for _ in range(2):
        assert (await client.get())[0] == 204
