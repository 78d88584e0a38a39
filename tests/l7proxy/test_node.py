"""The proxy on its node: the agent's comings and goings, the node proxy, draining, metrics, the process itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agent import api
from l7proxy import pods, server
from l7proxy.accesslog import AccessLog
from l7proxy.metrics import LABELS
from l7proxy.resources import CLUSTER, Resources
from nodeproxy import api as nodeproxy
from tests.l7proxy.conftest import Mesh, eventually
from tests.l7proxy.fakes import xds
from tests.l7proxy.fakes.agent import FakeAgent
from tests.l7proxy.fakes.backend import Backend, Request, respond
from tests.l7proxy.fakes.nodeproxy import NodeProxy
from tests.requirements import ROOT

NOFILE = resource.RLIMIT_NOFILE


async def test_a_withdrawn_pod_loses_everything(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        if number > 1:
            await asyncio.sleep(5)
        writer.write(respond(200, b"ok"))

    await mesh.serve(backend=await mesh.backend(script=script))
    idle, busy = await mesh.client(), await mesh.client()
    assert (await idle.get())[0] == 200
    busy.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    await asyncio.sleep(0.1)
    mesh.agent.withdraw("client")
    assert await idle.closed() == b""
    assert await busy.closed() == b""
    assert not mesh.proxy.pods
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*mesh.address)
    assert " 0 DC " in (await mesh.lines(2))[1]


async def test_the_same_uid_in_another_sandbox_is_another_pod(mesh: Mesh) -> None:
    await mesh.serve()
    client = await mesh.client()
    assert (await client.get())[0] == 200
    address = mesh.agent.enroll("client", netns_cookie=8)
    await eventually(lambda: len([p for p in mesh.proxy.pods.values() if p.server]) == 2)
    mesh.agent.withdraw("client", 7)
    assert await client.closed() == b""
    mesh.address = address
    assert (await (await mesh.client()).get())[0] == 200


async def test_the_agent_away(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is used; who finds nothing waits, then is answered 503; the agent's return is told what is held."""
    monkeypatch.setattr(pods, "SOCKET_WAIT", 0.3)
    backend = await mesh.serve()
    client = await mesh.client()
    assert (await client.get())[0] == 200
    mesh.agent.stop()
    await eventually(lambda: not mesh.proxy.agent.connected)
    # Established connections, and as many new ones as the stock holds.
    assert (await client.get())[0] == 200
    (pod,) = mesh.proxy.pods.values()
    held = len(pod.sockets(ipv6=False)._ready)
    assert held >= pods.LOW

    async def slow(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(1.0)
        writer.write(respond(200))

    backend.script = slow
    clients = [await mesh.client() for _ in range(held + 2)]
    started = time.monotonic()
    answers = [status for status, _, _ in await asyncio.gather(*(c.get() for c in clients))]
    assert time.monotonic() - started < 2
    # One more rides on the connection that was there.
    assert (answers.count(200), answers.count(503)) == (held + 1, 1)
    again = FakeAgent(mesh.run)
    again.start()
    mesh.agent = again
    await again.connected()
    (held_listener,) = again.hellos[0].held
    assert held_listener.socket
    assert held_listener == api.Held("client", 7, api.ListenerKind.OUTBOUND_L7, held_listener.socket)
    assert again.hellos[0].serving
    again.enroll("client", listen=False)
    await eventually(lambda: len(pod.sockets(ipv6=False)._ready) >= pods.STOCK)
    assert (await (await mesh.client()).get())[0] == 200


async def test_an_agent_that_refuses_is_asked_less_and_less(mesh: Mesh) -> None:
    mesh.agent.stop()
    await eventually(lambda: not mesh.proxy.agent.connected)
    mesh.agent = FakeAgent(mesh.run)
    mesh.agent.refuse = "version 9"
    started = time.monotonic()
    mesh.agent.start()
    await eventually(lambda: len(mesh.agent.hellos) == 5)
    assert time.monotonic() - started > 1.0
    mesh.agent.refuse = ""
    await mesh.agent.connected()


async def test_each_agent_has_its_own_time_to_speak_of_a_pod(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that comes back twice: the first one's deadline takes nothing away from the second."""
    monkeypatch.setattr(server, "_CONFIRM_LIMIT", 1.0)
    for _ in range(2):
        mesh.agent.stop()
        await eventually(lambda: not mesh.proxy.agent.connected)
        mesh.agent = FakeAgent(mesh.run)
        mesh.agent.start()
        await mesh.agent.connected()
        await asyncio.sleep(0.6)
    assert mesh.proxy.pods
    await eventually(lambda: not mesh.proxy.pods)


async def test_the_access_log_is_reopened_under_its_descriptor(tmp_path: Path) -> None:
    """The writer thread may hold the number: were it closed, its next line could go into somebody's connection."""
    path = tmp_path / "log"
    log = AccessLog(str(path))
    number = log._fd
    path.rename(tmp_path / "old")
    log.reopen()
    assert log._fd == number
    assert os.fstat(number).st_ino == path.stat().st_ino
    assert not os.get_inheritable(number)
    log.close()


async def test_an_agent_that_refuses_sockets(mesh: Mesh) -> None:
    await mesh.serve()
    (pod,) = mesh.proxy.pods.values()
    await eventually(lambda: len(pod.sockets(ipv6=False)._ready) == pods.STOCK)
    while pod.sockets(ipv6=False)._ready:
        pod.sockets(ipv6=False)._ready.pop().close()
    mesh.agent.refuse_sockets = "denied by policy"
    client = await mesh.client()
    status, _, body = await client.get()
    assert status == 503
    assert body.endswith(b"denied by policy")
    assert " 503 UF " in (await mesh.lines(1))[0]
    mesh.agent.refuse_sockets = ""
    assert (await client.get())[0] == 200


async def test_an_endpoint_on_another_node_goes_to_the_node_proxy(mesh: Mesh, remote: NodeProxy) -> None:
    client = await mesh.client()
    for _ in range(5):
        assert (await client.get())[2] == b"remote\n"
    (handoff,) = remote.handoffs
    assert handoff.client == ("127.0.0.1", client.writer.get_extra_info("sockname")[1])
    assert handoff.destination == ("10.2.0.9", 8080)
    assert handoff.source_uid == "client"
    (line, *_) = await mesh.lines(5)
    assert line.endswith('"10.2.0.9:8080"')


@pytest.mark.parametrize("status", [s for s in nodeproxy.Status if s is not nodeproxy.Status.CONNECTED])
async def test_what_the_node_proxy_refuses_is_503(
    mesh: Mesh, remote: NodeProxy, status: nodeproxy.Status
) -> None:
    remote.status = status
    client = await mesh.client()
    code, _, body = await client.get()
    assert code == 503
    assert status.name.lower() in body.decode()
    assert len(remote.handoffs) == 2
    assert " 503 UF,URX " in (await mesh.lines(1))[0]


async def test_never_in_plain_text_without_the_node_proxy(mesh: Mesh, remote: NodeProxy) -> None:
    remote.stop()
    (mesh.run / "nodeproxy" / "nodeproxy.sock").unlink()
    client = await mesh.client()
    assert (await client.get())[0] == 503
    assert not remote.backend.requests


async def test_draining(mesh: Mesh) -> None:
    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(0.3 if "slow" in request.line else 30 if "stuck" in request.line else 0)
        writer.write(respond(200, b"done"))

    await mesh.serve(backend=await mesh.backend(script=script))
    idle, slow, stuck = await mesh.client(), await mesh.client(), await mesh.client()
    assert (await idle.get())[0] == 200
    slow.send(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n")
    stuck.send(b"GET /stuck HTTP/1.1\r\nhost: a\r\n\r\n")
    await asyncio.sleep(0.1)
    drained = asyncio.create_task(mesh.proxy.drain(1.0))
    started = time.monotonic()
    assert await idle.closed() == b""
    status, fields, body = await slow.response()
    assert (status, fields["connection"], body) == (200, "close", b"done")
    assert await stuck.closed() == b""
    await drained
    assert 0.9 < time.monotonic() - started < 10
    assert len(mesh.log.read_text().splitlines()) == 3


async def test_while_a_successor_serves(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE", 0.5)
    await mesh.serve()
    kept, idle = await mesh.client(), await mesh.client()
    assert "connection" not in (await kept.get())[1]
    assert (await idle.get())[0] == 200
    mesh.agent.say(api.Drain())
    await eventually(lambda: mesh.proxy.draining)
    # Nothing is closed yet, and what comes is answered, by a listener that goes on to take what is on its way.
    late = await mesh.client()
    for client in (kept, late):
        status, fields, _ = await client.get()
        assert (status, fields["connection"]) == (200, "close")
        assert await client.closed() == b""
    drained = asyncio.create_task(mesh.proxy.drain(20.0))
    assert await idle.closed() == b""
    started = time.monotonic()
    await drained
    assert time.monotonic() - started < server.LINGER + 8


async def test_an_idle_connection_with_an_unread_request_is_not_closed(mesh: Mesh) -> None:
    await mesh.serve()
    client = await mesh.client()
    assert (await client.get())[0] == 200
    (connection,) = next(iter(mesh.proxy.pods.values())).downstream
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    # In the kernel, and not read: this test has not let the loop turn since.
    connection.close_if_idle()
    assert (await client.response())[0] == 200
    connection.close_if_idle()
    assert await client.closed() == b""


async def test_a_successor_that_died(mesh: Mesh) -> None:
    await mesh.serve()
    mesh.agent.say(api.Drain())
    await eventually(lambda: mesh.proxy.draining)
    drained = asyncio.create_task(mesh.proxy.drain(1.5))
    mesh.agent.say(api.Serving())
    await eventually(lambda: not mesh.proxy.draining)
    client = await mesh.client()
    status, fields, _ = await client.get()
    assert (status, fields.get("connection")) == (200, None)
    # With nobody else it serves until its deadline.
    await asyncio.sleep(0.5)
    assert not drained.done()
    await drained


async def test_it_serves_when_it_has_a_configuration(mesh: Mesh) -> None:
    assert mesh.agent.hellos[0].serving is False
    assert not mesh.agent.ready.is_set()
    await mesh.serve()
    async with asyncio.timeout(5):
        await mesh.agent.ready.wait()


async def test_another_node_proxy_gets_new_connections(mesh: Mesh, remote: NodeProxy) -> None:
    client = await mesh.client()
    assert (await client.get())[0] == 200
    (pool,) = next(iter(mesh.proxy.pods.values())).pools.values()
    (connection,) = pool.connections
    assert not mesh.proxy.connector.node_proxy_changed()
    path = mesh.run / "nodeproxy" / "nodeproxy.sock"
    other = await NodeProxy(path.with_suffix(".new"), remote.backend).start()
    path.with_suffix(".new").rename(path)
    await eventually(lambda: not connection.open)
    assert (await client.get())[0] == 200
    assert len(other.handoffs) == 1
    other.stop()


def samples(mesh: Mesh, name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric by (destination_version, response_code, response_flags, le)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(mesh.proxy.metrics)
    text = generate_latest(registry).decode()
    result: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                label = sample.labels
                key = (
                    label["destination_version"],
                    label["response_code"],
                    label["response_flags"],
                    label.get("le", ""),
                )
                result[key] = sample.value
    return result


async def test_metrics_tell_what_was_served(mesh: Mesh, remote: NodeProxy) -> None:
    client = await mesh.client()
    for _ in range(7):
        client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 30\r\n\r\n" + b"x" * 30)
        await client.response()
    remote.status = nodeproxy.Status.DENIED
    (pod,) = mesh.proxy.pods.values()
    for pool in pod.pools.values():
        pool.sweep(time.monotonic() + 1000, wanted=True)
    assert (await client.get())[0] == 503
    counts = samples(mesh, "istio_requests_total")
    assert counts == {("v2", "200", "-", ""): 7.0, ("v2", "503", "UF,URX", ""): 1.0}
    assert samples(mesh, "istio_request_duration_milliseconds_count")["v2", "200", "-", ""] == 7.0
    assert samples(mesh, "istio_request_bytes_sum")["v2", "200", "-", ""] == 210.0
    assert samples(mesh, "istio_response_bytes_sum")["v2", "200", "-", ""] == 49.0
    buckets = samples(mesh, "istio_request_bytes_bucket")
    assert (buckets["v2", "200", "-", "25.0"], buckets["v2", "200", "-", "50.0"]) == (0.0, 7.0)
    (series, *_) = mesh.proxy.metrics._series
    labels = dict(zip(LABELS, series, strict=True))
    assert labels["reporter"] == "source"
    assert labels["source_workload"] == "client"
    assert labels["destination_workload"] == "web-app"
    assert labels["destination_service"] == xds.HOST
    assert labels["destination_service_name"] == "web-app"
    assert labels["destination_principal"] == "spiffe://cluster.local/ns/default/sa/web"
    assert labels["connection_security_policy"] == "mutual_tls"
    assert labels["measured_in"] == "l7proxy"


async def test_new_labels_count_separately(mesh: Mesh) -> None:
    await mesh.serve()
    client = await mesh.client()
    await client.get()
    mesh.agent.enroll("client", listen=False, workload_name="renamed")
    (pod,) = mesh.proxy.pods.values()
    await eventually(lambda: pod.enroll.workload_name == "renamed")
    await client.get()
    assert sorted(series[1] for series in mesh.proxy.metrics._series) == ["client", "renamed"]


async def test_an_endpoint_described_anew_counts_separately(mesh: Mesh) -> None:
    """The pod behind a kept connection got another label: its connections stay, its metrics do not."""
    backend = await mesh.serve()
    client = await mesh.client()
    await client.get()
    mesh.configure(xds.assignment(xds.endpoint(backend.port, version="v2")))
    await client.get()
    assert backend.connections == 1
    version = LABELS.index("destination_version")
    assert sorted(series[version] for series in mesh.proxy.metrics._series) == ["v1", "v2"]


async def test_a_bad_resource_leaves_the_last_good(mesh: Mesh) -> None:
    backend = await mesh.serve()
    good = mesh.proxy.config
    errors = mesh.configure(
        xds.cluster(lb_policy="MAGLEV"), xds.listener(), xds.routes({"match": {"prefix": "/"}})
    )
    assert len(errors) == 2
    assert "lb_policy: MAGLEV is not supported" in errors[0]
    assert "routes[0].action" in errors[1]
    assert mesh.proxy.config is not good
    client = await mesh.client()
    assert (await client.get())[0] == 200
    assert len(backend.requests) == 1


def test_a_resource_that_cannot_be_named_removes_nothing() -> None:
    """It may be the very one that is missing from a response that is the complete set."""
    resources = Resources()
    xds.apply(resources, xds.listener(), xds.cluster(), xds.assignment(xds.endpoint(1)))
    damaged = xds.pack(xds.cluster())
    damaged.value = b"\xff" + damaged.value
    assert resources.apply(CLUSTER, "2", [damaged])
    assert xds.cluster_name() in resources.build().clusters
    assert list(resources.rejected) == [(CLUSTER, "resources[0]")]
    assert resources.apply(CLUSTER, "3", []) == []
    assert not resources.build().clusters
    assert not resources.rejected


def test_a_defect_in_a_conversion_is_one_resources_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = Resources()
    xds.apply(resources, xds.cluster(), xds.assignment(xds.endpoint(1)))

    def broken(message: object) -> None:
        raise KeyError("defect")

    with monkeypatch.context() as patch:
        patch.setattr("l7proxy.convert.endpoints", broken)
        errors = xds.apply(resources, xds.assignment(xds.endpoint(2)))
    assert errors == [f"ClusterLoadAssignment {xds.cluster_name()}: KeyError: 'defect'"]
    assert [e.port for e in resources.build().endpoints[xds.cluster_name()]] == [1]


async def test_what_is_forgotten_with_a_configuration(mesh: Mesh) -> None:
    await mesh.serve()
    balancer = mesh.proxy.balancer
    two = xds.assignment(xds.endpoint(1), xds.endpoint(2))
    mesh.configure(two)
    await (await mesh.client()).get()
    assert balancer._turn
    mesh.resources.apply(CLUSTER, "9", [])
    mesh.proxy.publish(mesh.resources.build())
    assert not balancer._turn
    assert not balancer._schedules


async def test_idle_times(mesh: Mesh) -> None:
    """A connection that asked nothing yet has its listener's idle timeout, and holds no configuration but the newest."""

    async def script(request: Request, writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(5)

    backend = await mesh.backend(script=script)
    others = (xds.routes(), xds.cluster(), xds.assignment(xds.endpoint(backend.port)))
    mesh.configure(xds.listener(stream_idle_timeout="100s"), *others)
    (pod,) = mesh.proxy.pods.values()
    client = await mesh.client()
    await eventually(lambda: len(pod.downstream) == 1)
    (connection,) = pod.downstream
    connection.check_idle(time.monotonic() + 600)
    mesh.configure(xds.listener(stream_idle_timeout="200s"))
    connection.check_idle(time.monotonic() + 600)
    assert connection._known is mesh.proxy.config
    pending = asyncio.create_task(client.get())
    await eventually(lambda: bool(backend.requests))
    connection.check_idle(time.monotonic() + 190)
    assert not pending.done()
    connection.check_idle(time.monotonic() + 210)
    assert (await pending)[::2] == (504, b"stream timeout")
    connection.check_idle(time.monotonic() + 4000)
    assert await client.closed() == b""


def test_routes_wait_for_their_clusters_endpoints() -> None:
    now = 0.0
    resources = Resources(clock=lambda: now)
    xds.apply(resources, xds.listener(), xds.routes(), xds.cluster(), xds.assignment(xds.endpoint(1)))
    before = resources.build().hosts[xds.VIP, xds.PORT].routes
    action = {"match": {"prefix": "/"}, "route": {"cluster": xds.cluster_name("v2")}}
    xds.apply(resources, xds.cluster(), xds.cluster("v2"), xds.routes(action))
    assert resources.build().hosts[xds.VIP, xds.PORT].routes is before
    assert resources.warming
    now = 10.0
    assert resources.build().hosts[xds.VIP, xds.PORT].routes is not before
    xds.apply(resources, xds.assignment(xds.endpoint(2), subset="v2"))
    assert xds.cluster_name("v2") in resources.build().clusters
    assert not resources.warming


async def _page(port: int, path: str) -> str:
    def get() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(get)


async def _ready_page(port: int) -> str:
    """The page, once the process has read what the agent answered."""
    async with asyncio.timeout(5):
        while True:
            try:
                return await _page(port, "/healthz/ready")
            except urllib.error.HTTPError:
                await asyncio.sleep(0.02)


async def test_the_process_serves_from_disk_and_stops(tmp_path: Path) -> None:
    """``python -m l7proxy`` without a controller: the last good configuration, metrics, access log, SIGTERM."""
    backend = await Backend().start()
    kept = Resources(tmp_path / "state")
    xds.apply(kept, xds.listener(), xds.routes(), xds.cluster(), xds.assignment(xds.endpoint(backend.port)))
    for kind in kept.versions:
        kept.save(kind)
    agent = FakeAgent(tmp_path)
    agent.start()
    for name in ("roots.pem", "token"):
        (tmp_path / name).write_text("none")
    admin = 20000 + os.getpid() % 20000
    _, hard = resource.getrlimit(NOFILE)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "l7proxy", "--node", "node-a", "--run", str(tmp_path), "--controller", "127.0.0.1:1"),
        *("--roots", str(tmp_path / "roots.pem"), "--credential", str(tmp_path / "token")),
        *("--admin", f"127.0.0.1:{admin}", "--access-log", str(tmp_path / "access.log"), "--drain", "1"),
        *("--state", str(tmp_path / "state"), "--log-format", "json"),
        cwd=ROOT, stderr=asyncio.subprocess.PIPE, preexec_fn=lambda: resource.setrlimit(NOFILE, (256, hard)),
    )  # fmt: skip
    try:
        await agent.connected()
        assert agent.hellos[0].kinds == (api.ListenerKind.OUTBOUND_L7,)
        address = agent.enroll("client")
        assert "ready" in await _ready_page(admin)
        # A container's soft limit is low: the sockets in stock for a node's pods alone may be more.
        assert resource.prlimit(process.pid, NOFILE) == (hard, hard)
        config: dict[str, Any] = json.loads(await _page(admin, "/config"))
        assert config["destinations"] == {f"{xds.VIP}:{xds.PORT}": xds.ROUTE_NAME}
        # Without a map of captured connections nothing is known of any: closed, never guessed.
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        assert "mycel_l7proxy_agent_connected 1.0" in await _page(admin, "/metrics")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            _, errors = await process.communicate()
        assert process.returncode == 0, errors
        events = [json.loads(line)["event"] for line in errors.splitlines() if line.startswith(b"{")]
        assert events[-1] == "stopped", errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        agent.stop()
        await backend.stop()
