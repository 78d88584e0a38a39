"""The workload/policy stream: its core as a transcript, and over real gRPC."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from envoy.service.discovery.v3 import discovery_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from common import logs
from controlplane import api
from controlplane.clients import Clients
from controlplane.credentials import Caller, FolderCredentials, Gate
from controlplane.model.snapshot import Snapshot, build
from controlplane.publisher import Publisher
from controlplane.stream.service import MeshService
from controlplane.stream.session import Session, Updates
from controlplane.xds.service import DiscoveryService
from controlplane.xds.types import Type
from tests.controlplane.support import (
    Harness,
    MeshClient,
    compile_all,
    eventually,
    istio,
    mesh_namespace,
    pod,
    service,
    two_versions,
    write,
)

ONE = compile_all(pod("a"))
TWO = compile_all(pod("a"), pod("b"))
THREE = compile_all(pod("b"), service("s"))


def ack(session: Session, update: api.Update) -> None:
    assert session.answer(api.Ack(update.nonce, update.version))


def test_full_then_deltas() -> None:
    session = Session()
    first = session.next_update(ONE)
    assert first is not None
    assert (first.complete, len(first.upserts), first.removes, first.version) == (True, 2, (), ONE.version)
    assert session.next_update(TWO) is None, "one update at a time"
    ack(session, first)
    second = session.next_update(TWO)
    assert second is not None
    assert (second.complete, [api.resource_key(r) for r in second.upserts], second.removes) == (
        False,
        ["workload/uid-default-b"],
        (),
    )
    ack(session, second)
    assert session.next_update(TWO) is None
    third = session.next_update(THREE)
    assert third is not None
    assert [api.resource_key(r) for r in third.upserts] == ["service/default/s"]
    assert third.removes == ("workload/uid-default-a",)


def test_a_slow_client_gets_the_newest_only() -> None:
    session = Session()
    first = session.next_update(ONE)
    assert first is not None
    assert session.next_update(TWO) is None
    assert session.next_update(THREE) is None
    ack(session, first)
    second = session.next_update(THREE)
    assert second is not None
    assert second.version == THREE.version
    assert second.removes == ("workload/uid-default-a",)


def test_there_and_back_while_busy_says_nothing() -> None:
    session = Session()
    first = session.next_update(ONE)
    assert first is not None
    assert session.next_update(TWO) is None
    ack(session, first)
    assert session.next_update(ONE) is None


def test_what_a_client_still_has_is_not_sent_again() -> None:
    session = Session(ONE.version)
    first = session.next_update(ONE)
    assert first is not None
    assert (first.complete, first.upserts, first.removes) == (False, (), ())
    ack(session, first)
    second = session.next_update(TWO)
    assert second is not None
    assert len(second.upserts) == 1
    other = Session(TWO.version).next_update(ONE)
    assert other is not None
    assert other.complete


def test_what_was_refused_goes_along_again() -> None:
    session = Session()
    first = session.next_update(ONE)
    assert first is not None
    session.answer(
        api.Nack(first.nonce, first.version, (api.ResourceError("workload/uid-default-a", "no room"),))
    )
    second = session.next_update(TWO)
    assert second is not None
    assert {api.resource_key(r) for r in second.upserts} == {
        "workload/uid-default-a",
        "workload/uid-default-b",
    }


def test_what_was_refused_and_is_gone_is_removed() -> None:
    session = Session()
    first = session.next_update(ONE)
    assert first is not None
    ack(session, first)
    second = session.next_update(compile_all(pod("a", "10.1.0.1")))
    assert second is not None
    key = "workload/uid-default-a"
    assert [api.resource_key(r) for r in second.upserts] == [key]
    session.answer(api.Nack(second.nonce, second.version, (api.ResourceError(key, "no"),)))
    third = session.next_update(THREE)
    assert third is not None
    assert key in third.removes, "the client has the version before still"


def test_answers_to_nothing_are_ignored() -> None:
    session = Session()
    assert not session.answer(api.Ack(1, ""))
    first = session.next_update(ONE)
    assert first is not None
    assert not session.answer(api.Ack(first.nonce + 1, first.version))
    ack(session, first)
    assert not session.answer(api.Ack(first.nonce, first.version))


def _with_addresses() -> Snapshot:
    """Objects of the model itself: what clients of different versions are sent of them."""
    blocked = api.Source(("a",), ip_blocks=("10.0.0.0/8",))
    return build(
        [
            api.MeshConfig(),
            api.NetworkPolicy("default", "n", (), None),
            api.Authorization(
                "default",
                "allow",
                api.Action.ALLOW,
                (
                    api.Rule((blocked,)),
                    api.Rule((blocked, api.Source(("b",)))),
                    api.Rule(operations=(api.Operation((80,)),)),
                ),
            ),
            api.Authorization("default", "deny", api.Action.DENY, (api.Rule((blocked,)),)),
        ],
        (),
        (),
    )


def test_a_client_that_knows_no_addresses_is_told_nothing_that_it_would_take_for_more() -> None:
    updates, full = Updates(), _with_addresses()
    new, old = Session("", updates), Session("", updates, api=2)
    first_new, first = new.next_update(full), old.next_update(full)
    assert first_new is not None
    assert first is not None
    assert {api.resource_key(r): r for r in first_new.upserts} == full.resources
    assert updates.encode(first) != updates.encode(first_new)
    sent = {api.resource_key(r): r for r in api.decode_update(updates.encode(first, packed=True)).upserts}
    assert set(sent) == {"mesh", "authorization/default/allow", "authorization/default/deny"}
    allow = sent["authorization/default/allow"]
    assert isinstance(allow, api.Authorization)
    assert allow.rules == (
        api.Rule((api.Source(("b",)),)),
        api.Rule(operations=(api.Operation((80,)),)),
    ), "the rule of which nothing is left allows nobody"
    assert sent["authorization/default/deny"] == full.resources["authorization/default/deny"]
    old.answer(
        api.Nack(first.nonce, first.version, (api.ResourceError("authorization/default/allow", "no"),))
    )
    ack(new, first_new)
    empty = build([api.MeshConfig()], (), ())
    later, all_gone = old.next_update(empty), new.next_update(empty)
    assert later is not None
    assert all_gone is not None
    assert set(later.removes) == {"authorization/default/allow", "authorization/default/deny"}
    assert set(all_gone.removes) == {*later.removes, "network/default/n"}
    ack(old, later)
    back = old.next_update(full)
    assert back is not None
    assert {api.resource_key(r) for r in back.upserts} == set(sent) - {"mesh"}
    assert allow in back.upserts


def test_what_an_older_client_refused_goes_along_again_as_it_knows_it() -> None:
    full, session = _with_addresses(), Session("", api=2)
    first = session.next_update(full)
    assert first is not None
    key = "authorization/default/allow"
    session.answer(api.Nack(first.nonce, first.version, (api.ResourceError(key, "no room"),)))
    more = build([*full.resources.values(), api.Service("default", "s", "h")], (), ())
    second = session.next_update(more)
    assert second is not None
    again = next(r for r in second.upserts if api.resource_key(r) == key)
    assert isinstance(again, api.Authorization)
    assert not any(s.ip_blocks for r in again.rules for s in r.sources)


@pytest.mark.parametrize("before", [1, 2])
def test_what_an_older_client_held_is_not_all_for_the_next_one(before: int) -> None:
    """An agent that is upgraded, or set back, finds the other one's last good state: less is in it, or what it cannot read."""
    full, updates = _with_addresses(), Updates()
    first = Session("", updates, api=before).next_update(full)
    assert first is not None
    assert api.decode_update(updates.encode(first)) == first
    again = Session(first.version, updates, api=before).next_update(full)
    assert again == api.Update(1, first.version), "nothing is new for its like"
    after = Session(first.version, updates).next_update(full)
    assert after is not None
    assert after.complete
    assert {api.resource_key(r): r for r in after.upserts} == full.resources
    assert api.decode_update(updates.encode(after)) == after
    assert Session(after.version, updates, api=before).next_update(full) == first


_SNAPSHOTS = [
    compile_all(*[pod(n, node=node) for n in names])
    for names in ("", "a", "ab", "bc", "abc")
    for node in "xy"
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_SNAPSHOTS) - 1), st.booleans()), max_size=20))
def test_deltas_add_up(steps: list[tuple[int, bool]]) -> None:
    """Whatever comes in whatever pace: a client that applies what it is sent has the snapshot that it was told."""
    session, pending = Session(), None
    state: dict[str, api.Resource] = {}
    last: Snapshot = _SNAPSHOTS[0]
    for index, acknowledge in [*steps, (0, True), (0, True)]:
        last = _SNAPSHOTS[index]
        update = session.next_update(last)
        if update is not None:
            assert pending is None
            pending = update
            state = {} if update.complete else state
            state |= {api.resource_key(r): r for r in update.upserts}
            for key in update.removes:
                del state[key]
            assert update.version == last.version
            assert state == dict(last.resources)
        if acknowledge and pending is not None:
            ack(session, pending)
            pending = None
    assert state == dict(last.resources)


# -- over gRPC ---------------------------------------------------------------------------------------------------------------


async def test_agents_and_node_proxies_follow(harness: Harness) -> None:
    write(harness.config, "web.yaml", *two_versions())
    async with harness.serving() as controller, harness.channel() as channel:
        agent, proxy = MeshClient(channel, "node-a"), MeshClient(channel, "node-b")
        await agent.hello("agent", admin="10.0.0.1:15020")
        await proxy.hello("nodeproxy")
        for client in (agent, proxy):
            update = await client.take()
            assert update.complete
            assert client.state == dict(controller.snapshot.resources)
        mesh = agent.state["mesh"]
        assert isinstance(mesh, api.MeshConfig)
        assert mesh.roots.encode() == (harness.state / "roots.pem").read_bytes()
        write(
            harness.config,
            "policy.yaml",
            istio(
                "AuthorizationPolicy",
                "deny",
                {"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]},
            ),
        )
        for client in (agent, proxy):
            update = await client.take()
            assert not update.complete
            assert "authorization/default/deny" in client.state
            assert client.state == dict(controller.snapshot.resources)
        expected = [
            ("node-a", "agent", "10.0.0.1:15020", controller.snapshot.version),
            ("node-b", "nodeproxy", "", controller.snapshot.version),
        ]

        async def shown() -> list[tuple[str, ...]]:
            return [
                (c["node"], c["component"], c["admin"], c["version_acked"]) for c in await harness.clients()
            ]

        async def both() -> bool:
            return await shown() == expected

        async def one() -> bool:
            return await shown() == expected[1:]

        await eventually(both)
        agent.stream.cancel()
        await eventually(one)


async def test_reconnecting_with_the_same_state(harness: Harness) -> None:
    write(harness.config, "web.yaml", *two_versions())
    async with harness.serving() as controller, harness.channel() as channel:
        client = MeshClient(channel)
        await client.hello(version=controller.snapshot.version)
        update = await client.take()
        assert (update.complete, update.upserts) == (False, ())


async def test_an_older_client_has_the_snapshot_that_it_acknowledged(harness: Harness) -> None:
    write(harness.config, "web.yaml", *two_versions())
    async with harness.serving() as controller, harness.channel() as channel:
        client = MeshClient(channel)
        await client.hello(api=2)
        assert (await client.take()).version == f"2:{controller.snapshot.version}"

        async def acknowledged() -> bool:
            return bool((await harness.clients())[0]["version_acked"] == controller.snapshot.version)

        await eventually(acknowledged)


async def test_a_refusal_is_shown(harness: Harness) -> None:
    write(harness.config, "web.yaml", *two_versions())
    async with harness.serving(), harness.channel() as channel:
        client = MeshClient(channel)
        await client.hello()
        update = await client.receive()
        await client.nack(update, **{"service/default/web-app": "the map is full"})

        async def refused() -> bool:
            return bool((await harness.clients())[0]["nacks"])

        await eventually(refused)
        (entry,) = await harness.clients()
        assert entry["errors"] == {"service/default/web-app": "the map is full"}
        assert entry["nacks"] == 1
        metrics = await harness.page("/metrics")
        assert 'mycel_controlplane_nacks_total{component="agent",type="mesh"} 1.0' in metrics


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (api.encode(api.Ack(1, "")), "the first message is not Hello"),
        (b"\xc1", "no client message"),
        (api.encode(api.Hello("stranger")), "component 'stranger' is none of"),
        (api.encode(api.Hello("agent", api=99)), "version 99 of the protocol"),
    ],
)
async def test_what_is_no_hello_is_refused(harness: Harness, first: bytes, reason: str) -> None:
    async with harness.serving(), harness.channel() as channel:
        client = MeshClient(channel)
        await client.stream.write(first)
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await client.receive()
        assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in (e.value.details() or "")


async def test_garbage_ends_one_stream_only(harness: Harness) -> None:
    async with harness.serving(), harness.channel() as channel:
        bad, good = MeshClient(channel), MeshClient(channel, "node-b")
        for client in (bad, good):
            await client.hello()
            await client.take()
        await bad.stream.write(b"\xc1")
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await bad.receive()
        assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        write(harness.config, "a.yaml", pod("a"))
        assert "workload/uid-default-a" in {api.resource_key(r) for r in (await good.take()).upserts}


async def test_strangers_are_refused(harness: Harness) -> None:
    async with harness.serving(), harness.channel() as channel:
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            client = MeshClient(channel, metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as e:
                await client.receive()
            assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_large_mesh_in_one_update(harness: Harness) -> None:
    for n in range(20):
        pods = [pod(f"p{n}-{i}", f"10.{n}.{i // 250}.{i % 250 + 1}", app="x" * 60) for i in range(1000)]
        items = {"apiVersion": "v1", "kind": "List", "items": pods}
        (harness.config / f"{n}.json").write_text(json.dumps(items))
    async with harness.serving(), harness.channel() as channel:
        client = MeshClient(channel)
        await client.hello()
        update = await client.take(timeout=30)
        assert len(update.upserts) == 20_001
        assert len(api.encode(update)) > 4 << 20, (
            "more than gRPC's default limit: clients have to raise theirs"
        )


async def test_who_takes_nothing_is_not_listened_to() -> None:
    """A client that reads no update cannot fill the controller's memory with answers."""
    publisher, clients = Publisher(TWO), Clients(CollectorRegistry())
    gate = Gate(FolderCredentials(Path("nowhere")), CollectorRegistry())
    mesh = MeshService(publisher, gate, clients)
    ads = DiscoveryService(publisher, gate, clients)
    first = discovery_pb2.DiscoveryRequest(type_url=Type.CLUSTER.value)
    request = first.SerializeToString()
    log = logs.get("test")
    read = 0

    async def flood(message: Any) -> AsyncIterator[Any]:
        nonlocal read
        while True:
            await asyncio.sleep(0)
            read += 1
            yield message

    with clients.connected(Caller("node-a"), "agent", "peer") as client:
        streams: tuple[Any, ...] = (
            mesh._updates(flood(api.encode(api.Ack(9, "x"))), api.Hello("agent"), client, log),
            ads._serve(ads._session(first), request, flood(request), client, log),
        )
        for stream in streams:
            read = 0
            await anext(stream)
            for _ in range(1000):
                await asyncio.sleep(0)
            assert 0 < read < 100
            await stream.aclose()


async def test_a_change_reaches_clients_in_milliseconds(harness: Harness) -> None:
    """File to client, with 500 pods: a part of the second that a change may take until it is in force."""
    write(harness.config, "ns.yaml", mesh_namespace())
    for n in range(500):
        write(harness.config, f"pod-{n}.yaml", pod(f"p{n}", f"10.1.{n // 250}.{n % 250 + 1}"))
    async with harness.serving(), harness.channel() as channel:
        client = MeshClient(channel)
        await client.hello()
        await client.take()
        times = []
        for n in range(50):
            spec = {"action": "DENY", "rules": [{"to": [{"operation": {"ports": [str(1000 + n)]}}]}]}
            started = time.monotonic()
            write(harness.config, "policy.yaml", istio("AuthorizationPolicy", "deny", spec))
            update = await client.take()
            times.append(time.monotonic() - started)
            assert update.upserts
        times.sort()
        print(f"median {statistics.median(times) * 1000:.0f} ms, p99 {times[-1] * 1000:.0f} ms")
        # On a machine that does much else meanwhile a single change may take longer; most may not.
        assert statistics.median(times) < 0.25, times
        assert times[44] < 1, times


async def test_bad_configuration_never_reaches_clients(harness: Harness) -> None:
    """The whole way: a bad file is named, the last good state stays, also over a restart."""
    write(harness.config, "web.yaml", *two_versions())
    deny = istio(
        "AuthorizationPolicy",
        "deny",
        {"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]},
    )
    write(harness.config, "policy.yaml", deny)
    async with harness.serving() as controller:
        good = controller.snapshot.version
        deny["spec"]["rules"][0]["to"][0]["operation"]["ports"] = ["many"]
        write(harness.config, "policy.yaml", deny)
        for _ in range(500):
            if controller.findings:
                break
            await asyncio.sleep(0.01)
        assert controller.snapshot.version == good
        (finding,) = await harness.page("/debug/findings")
        assert finding["file"] == "policy.yaml"
        assert finding["object"] == "AuthorizationPolicy.security.istio.io default/deny"
        assert finding["field"] == "spec.rules[0].to[0].operation.ports[0]"
        assert "'many' is no port" in finding["message"]
        assert "its last good version stays" in finding["action"]
    async with harness.serving() as controller, harness.channel() as channel:
        assert controller.snapshot.version == good
        assert len(controller.findings) == 1
        client = MeshClient(channel)
        await client.hello()
        await client.take()
        assert "authorization/default/deny" in client.state
