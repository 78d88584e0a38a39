"""Attempts: retries, timeouts, stale connections, weights, balancing; what is answered and what is logged."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from random import Random
from typing import Any

import pytest

from l7proxy.errors import Failure
from l7proxy.model import RetryPolicy
from l7proxy.retry import Decision, RetryState
from tests.l7proxy.conftest import Mesh, eventually
from tests.l7proxy.fakes import xds
from tests.l7proxy.fakes.backend import Request, respond


def route(retry_on: str = "", retries: int = 2, timeout: str = "0s", **policy: Any) -> dict[str, Any]:
    action: dict[str, Any] = {"cluster": xds.cluster_name(), "timeout": timeout}
    if retry_on:
        action["retry_policy"] = {"retry_on": retry_on, "num_retries": retries, **policy}
    return {"match": {"prefix": "/"}, "route": action}


def failing(times: int, status: int = 503) -> Any:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(respond(status if number <= times else 200, b"answer"))

    return script


def closing(times: int) -> Any:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        if number <= times:
            writer.transport.abort()
        else:
            writer.write(respond(200, b"answer"))

    return script


@pytest.mark.parametrize(
    ("retry_on", "status", "retried"),
    [
        ("5xx", 500, True),
        ("gateway-error", 500, False),
        ("gateway-error", 502, True),
        ("gateway-error", 504, True),
        ("retriable-4xx", 409, True),
        ("connect-failure,refused-stream", 503, False),
        ("503", 503, True),
        ("retriable-status-codes", 418, False),
    ],
)
async def test_which_statuses_are_retried(mesh: Mesh, retry_on: str, status: int, retried: bool) -> None:
    backend = await mesh.serve(route(retry_on), backend=await mesh.backend(script=failing(1, status)))
    client = await mesh.client()
    assert (await client.get())[0] == (200 if retried else status)
    assert len(backend.requests) == (2 if retried else 1)


async def test_retries_are_used_up(mesh: Mesh) -> None:
    backend = await mesh.serve(
        route("5xx", 3), backend=await mesh.backend(script=failing(99)), include_request_attempt_count=True
    )
    client = await mesh.client()
    assert (await client.get())[0] == 503
    assert [r.header("x-envoy-attempt-count") for r in backend.requests] == ["1", "2", "3", "4"]
    assert len({r.header("x-request-id") for r in backend.requests}) == 1
    assert " 503 URX " in (await mesh.lines(1))[0]


def test_back_off_is_drawn_below_what_doubles() -> None:
    policy = RetryPolicy(frozenset({"5xx"}), num_retries=9, base_interval=0.025, max_interval=0.25)
    longest = [0.0] * 9
    for seed in range(1000):
        retry = RetryState(policy, Random(seed))
        for i in range(9):
            assert retry.on_failure(Failure.TIMEOUT, request_started=True) is Decision.RETRY
            longest[i] = max(longest[i], retry.delay())
    ceilings = [0.025, 0.075, 0.175, *[0.25] * 6]
    assert all(0.9 * most < found <= most for found, most in zip(longest, ceilings, strict=True))


async def test_retry_on_grpc_status(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(respond(200, grpc_status="14" if number == 1 else "0"))

    backend = await mesh.serve(route("unavailable,cancelled"), backend=await mesh.backend(script=script))
    client = await mesh.client()
    assert (await client.get())[1]["grpc-status"] == "0"
    assert len(backend.requests) == 2


async def test_a_body_is_sent_again(mesh: Mesh) -> None:
    backend = await mesh.serve(route("5xx"), backend=await mesh.backend(script=failing(1)))
    client = await mesh.client()
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300_000)
    assert (await client.response())[0] == 200
    assert [len(r.body) for r in backend.requests] == [300_000, 300_000]
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    backend.requests.clear()
    assert (await client.response())[0] == 200


async def test_a_body_too_large_to_hold_is_sent_once(mesh: Mesh) -> None:
    backend = await mesh.serve(route("5xx"), backend=await mesh.backend(script=failing(1)))
    client = await mesh.client()
    size = 1_500_000
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
    assert (await client.response())[0] == 503
    assert len(backend.requests) == 1


async def test_resets_are_retried_by_policy_only(mesh: Mesh) -> None:
    backend = await mesh.serve(route(), backend=await mesh.backend(script=closing(1)))
    client = await mesh.client()
    status, _, body = await client.get()
    assert status == 503
    assert body.endswith(b"reset reason: connection termination")
    assert " 503 UC " in (await mesh.lines(1))[0]
    backend = await mesh.serve(route("reset"), backend=await mesh.backend(script=closing(1)))
    assert (await client.get())[0] == 200
    assert len(backend.requests) == 2


async def test_a_response_cut_in_the_middle_is_seen_as_cut(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    backend = await mesh.serve(route("5xx,reset"), backend=await mesh.backend(script=script))
    client = await mesh.client()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await client.get()
    assert " 200 UC 0 4 " in (await mesh.lines(1))[0]
    assert len(backend.requests) == 1


async def test_what_is_no_response(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n")

    await mesh.serve(route(), backend=await mesh.backend(script=script))
    client = await mesh.client()
    assert (await client.get())[0] == 502
    assert " 502 UPE " in (await mesh.lines(1))[0]


async def test_more_than_was_asked_ends_the_connection(mesh: Mesh) -> None:
    """Bytes after a response would be taken for the next request's."""

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(respond(200, b"mine") + respond(200, b"poison"))

    backend = await mesh.serve(route(), backend=await mesh.backend(script=script))
    client = await mesh.client()
    for _ in range(3):
        assert (await client.get())[2] == b"mine"
    assert backend.connections == 3


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("POST", 503)])
async def test_a_connection_that_died_idle(mesh: Mesh, method: str, status: int) -> None:
    """The server closes as we reuse: repeated on a fresh connection if the method allows it, else 503."""

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 2:
            writer.transport.abort()
        else:
            writer.write(respond(200, b"ok"))

    backend = await mesh.serve(route(), backend=await mesh.backend(script=script))
    client = await mesh.client()
    assert (await client.get())[0] == 200
    assert (await client.get(method=method))[0] == status
    assert backend.connections == (2 if status == 200 else 1)


async def test_timeout(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(5)

    await mesh.serve(route(timeout="0.3s"), backend=await mesh.backend(script=script))
    client = await mesh.client()
    started = time.monotonic()
    status, _, body = await client.get()
    assert (status, body) == (504, b"upstream request timeout")
    assert 0.29 < time.monotonic() - started < 4
    assert " 504 UT " in (await mesh.lines(1))[0]
    # The client's own connection lives on.
    assert (await client.get())[0] == 504


async def test_the_timeout_spans_the_whole_response(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()
        await asyncio.sleep(5)

    await mesh.serve(route(timeout="0.2s"), backend=await mesh.backend(script=script))
    client = await mesh.client()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await client.get()
    assert " 200 UT 0 4 " in (await mesh.lines(1))[0]


async def test_the_timeout_begins_when_the_request_is_complete(mesh: Mesh) -> None:
    await mesh.serve(route(timeout="0.2s"))
    client = await mesh.client()
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\n")
    for byte in b"slowly":
        await asyncio.sleep(0.08)
        client.send(bytes((byte,)))
    assert (await client.response())[0] == 200


async def test_per_try_timeout(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(5 if number < 3 else 0)
        writer.write(respond(200, b"third"))

    backend = await mesh.serve(
        route("gateway-error", 3, per_try_timeout="0.1s", timeout="5s"),
        backend=await mesh.backend(script=script),
    )
    client = await mesh.client()
    assert (await client.get())[::2] == (200, b"third")
    assert len(backend.requests) == 3
    assert backend.requests[0].header("x-envoy-expected-rq-timeout-ms") == "100"


async def test_another_host_is_tried(mesh: Mesh) -> None:
    good = await mesh.backend("good")
    mesh.configure(
        xds.listener(),
        xds.routes(
            route(
                "connect-failure",
                2,
                retry_host_predicate=[{"name": "envoy.retry_host_predicates.previous_hosts"}],
                host_selection_retry_max_attempts=5,
            )
        ),
        xds.cluster(),
        xds.assignment(xds.endpoint(1), xds.endpoint(good.port)),
    )
    client = await mesh.client()
    for _ in range(10):
        assert (await client.get())[2] == b"good\n"


async def test_weights_are_drawn_per_request(mesh: Mesh) -> None:
    first, second = await mesh.backend("v1"), await mesh.backend("v2")
    weights = [{"name": xds.cluster_name("v1"), "weight": 80}, {"name": xds.cluster_name("v2"), "weight": 20}]
    mesh.configure(
        xds.listener(),
        xds.routes({"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": weights}}}),
        xds.cluster("v1"),
        xds.cluster("v2"),
        xds.assignment(xds.endpoint(first.port), subset="v1"),
        xds.assignment(xds.endpoint(second.port, version="v2"), subset="v2"),
    )
    client = await mesh.client()
    counts = Counter([(await client.get())[2] for _ in range(2000)])
    # Five standard deviations of a binomial distribution.
    assert abs(counts[b"v1\n"] - 1600) < 90, counts
    assert counts[b"v1\n"] + counts[b"v2\n"] == 2000


@pytest.mark.parametrize("policy", ["ROUND_ROBIN", "RANDOM", "LEAST_REQUEST"])
async def test_balancing(mesh: Mesh, policy: str) -> None:
    backends = [await mesh.backend(f"b{i}") for i in range(4)]
    mesh.configure(
        xds.listener(),
        xds.routes(),
        xds.cluster(lb_policy=policy),
        xds.assignment(*(xds.endpoint(b.port) for b in backends)),
    )
    client = await mesh.client()
    counts = Counter([(await client.get())[2] for _ in range(400)])
    assert len(counts) == 4
    if policy == "ROUND_ROBIN":
        assert set(counts.values()) == {100}
    else:
        assert min(counts.values()) > 50
    assert not mesh.proxy.balancer.active


async def test_a_client_that_leaves_cancels_its_request(mesh: Mesh) -> None:
    gone = asyncio.Event()

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        with contextlib.suppress(ConnectionError):
            await asyncio.sleep(0.3)
            for _ in range(5):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(0.05)
            return
        gone.set()

    await mesh.serve(route(), backend=await mesh.backend(script=script))
    client = await mesh.client()
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    await asyncio.sleep(0.1)
    client.close()
    assert " 0 DC " in (await mesh.lines(1))[0]
    async with asyncio.timeout(5):
        await gone.wait()


async def test_an_answer_before_the_request_is_complete(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        raise AssertionError

    backend = await mesh.backend(script=script)

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(respond(413, b"too much"))
        await writer.drain()

    server = await asyncio.start_server(early, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    mesh.configure(xds.listener(), xds.routes(), xds.cluster(), xds.assignment(xds.endpoint(port)))
    client = await mesh.client()
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nstart")
    assert (await client.response())[::2] == (413, b"too much")
    assert await client.closed() == b""
    server.close()
    del backend


async def test_many_clients_at_once(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(0.002)
        writer.write(respond(200, request.line.encode()))

    await mesh.serve(route(), backend=await mesh.backend(script=script))

    async def one(number: int) -> None:
        client = await mesh.client()
        for i in range(20):
            assert (await client.get(f"/{number}/{i}"))[2] == f"GET /{number}/{i} HTTP/1.1".encode()
        client.close()

    await asyncio.gather(*(one(i) for i in range(50)))
    await eventually(lambda: not any(pod.downstream for pod in mesh.proxy.pods.values()))
    assert len(await mesh.lines(1000)) == 1000


async def test_who_waits_for_a_place_gets_it_when_connections_end(mesh: Mesh) -> None:
    """As many connections as the cluster may have, none of which can be used again."""

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(0.01)
        writer.write(respond(200, b"ok", connection="close"))
        writer.close()

    backend = await mesh.backend(script=script)
    mesh.configure(
        xds.listener(),
        xds.routes(),
        xds.cluster(circuit_breakers={"thresholds": [{"max_connections": 2}]}),
        xds.assignment(xds.endpoint(backend.port)),
    )
    clients = [await mesh.client() for _ in range(10)]
    assert [found[0] for found in await asyncio.gather(*(client.get() for client in clients))] == [200] * 10
    pool = next(iter(next(iter(mesh.proxy.pods.values())).pools.values()))
    await eventually(lambda: not pool.connections)
    assert pool.connecting == 0


async def test_what_waits_behind_an_upgrade_is_read_on(mesh: Mesh) -> None:
    sent = 600_000

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(0.2)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")

    backend = await mesh.serve(backend=await mesh.backend(script=script))
    received = asyncio.Event()

    async def swallow(request: Request, reader: asyncio.StreamReader) -> bytes:
        if request.header("upgrade"):
            asyncio.get_running_loop().create_task(rest(reader))
        return b""

    async def rest(reader: asyncio.StreamReader) -> None:
        await asyncio.sleep(0.3)
        await reader.readexactly(sent)
        received.set()

    backend._body = swallow  # type: ignore[method-assign]
    client = await mesh.client()
    client.send(
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n" + bytes(sent)
    )
    async with asyncio.timeout(5):
        await received.wait()
