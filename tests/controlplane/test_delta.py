"""Incremental ADS: the session as a transcript, whatever comes in whatever pace, and over real gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.discovery.v3 import discovery_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.compiler import Compiler
from controlplane.model.snapshot import Snapshot
from controlplane.model.world import Settings
from controlplane.xds.delta import Deltas, DeltaSession, Encoded
from controlplane.xds.resources import BY_CHAIN, Resources
from controlplane.xds.service import METHOD_DELTA, SERVICE
from controlplane.xds.session import Answered
from controlplane.xds.types import Type
from tests.controlplane.support import (
    Harness,
    Manifest,
    bearer,
    compile_all,
    eventually,
    istio,
    mesh_namespace,
    objects,
    pod,
    service,
    subsets,
    two_versions,
    write,
)

HOST = "web-app.default.svc.cluster.local"


def virtual(*versions: str, name: str = "web-app") -> Manifest:
    share = [{"destination": {"host": name, "subset": v}, "weight": 50} for v in versions]
    return istio("VirtualService", name, {"hosts": [name], "http": [{"route": share}]})


def snapshot(*versions: str) -> Snapshot:
    return compile_all(*two_versions(), subsets("web-app", "v1", "v2"), virtual(*versions))


def cluster(version: str = "") -> str:
    return f"outbound|80|{version}|{HOST}"


class Client:
    """Subscribes to all of every type, and holds what it is sent by name."""

    def __init__(self, deltas: Deltas | None = None, held: dict[str, dict[str, str]] | None = None) -> None:
        self.session = DeltaSession(BY_CHAIN, deltas or Deltas())
        self.state: dict[Type, dict[str, Any]] = {kind: {} for kind in Type}
        self.pending: dict[Type, str] = {}
        self.log: list[tuple[str, list[str], list[str]]] = []
        for kind in Type:
            self.ask(kind, initial_resource_versions=(held or {}).get(kind.short, {}))

    def ask(self, kind: Type, **fields: Any) -> Answered | None:
        return self.session.request(discovery_pb2.DeltaDiscoveryRequest(type_url=kind.value, **fields))

    def receive(self, resources: Resources) -> list[Encoded]:
        """What is sent now; nothing is answered yet."""
        sent = self.session.responses(resources)
        for encoded in sent:
            response = discovery_pb2.DeltaDiscoveryResponse.FromString(encoded.data)
            kind = Type(response.type_url)
            assert kind not in self.pending, "one response of a type at a time"
            self.pending[kind] = response.nonce
            self.log.append(
                (kind.short, [r.name for r in response.resources], list(response.removed_resources))
            )
            for name in response.removed_resources:
                self.state[kind].pop(name, None)
            self.state[kind] |= {r.name: r.resource for r in response.resources}
        return sent

    def ack(self, kind: Type, error: str = "") -> Answered | None:
        request = discovery_pb2.DeltaDiscoveryRequest(
            type_url=kind.value, response_nonce=self.pending.pop(kind)
        )
        if error:
            request.error_detail.message = error
        return self.session.request(request)

    def follow(self, resources: Resources) -> list[str]:
        """Receive and acknowledge until nothing comes any more; the order of types."""
        order = []
        while sent := self.receive(resources):
            order += [s.kind.short for s in sent]
            for kind in list(self.pending):
                self.ack(kind)
        return order

    def has(self, resources: Resources) -> bool:
        return all(
            self.state[kind] == {n: p.any for n, p in resources.of(kind, BY_CHAIN).items()} for kind in Type
        )


def test_all_then_what_changes() -> None:
    client, one = Client(), Resources(snapshot("v1"))
    assert client.follow(one) == ["CDS", "EDS", "LDS", "RDS"]
    assert client.has(one) and client.session.settled(one)
    assert client.receive(one) == []
    client.log.clear()
    moved = [
        *two_versions()[:-1],
        pod("web-app-v2", "10.2.0.9", "node-b", "web-app", app="web-app", version="v2"),
    ]
    two = Resources(compile_all(*moved, subsets("web-app", "v1", "v2"), virtual("v1")), one)
    assert client.follow(two) == ["EDS"], "an endpoint is no reason to send anything else"
    assert client.log == [("EDS", [cluster()], [])]
    assert client.has(two)


def test_make_before_break() -> None:
    client, one, two = Client(), Resources(snapshot("v1")), Resources(snapshot("v2"))
    client.follow(one)
    client.log.clear()
    client.receive(two)
    assert client.log == [("CDS", [cluster("v2")], []), ("EDS", [cluster("v2")], [])]
    assert client.receive(two) == [], "routes wait for clusters and endpoints"
    client.ack(Type.CLUSTER)
    assert client.receive(two) == []
    client.ack(Type.ENDPOINTS)
    assert [s.kind.short for s in client.receive(two)] == ["RDS"]
    assert not client.session.settled(two)
    assert client.receive(two) == [], "nothing is removed before the routes are taken"
    client.ack(Type.ROUTES)
    client.receive(two)
    assert client.log[-2:] == [("CDS", [], [cluster("v1")]), ("EDS", [], [cluster("v1")])]
    client.ack(Type.CLUSTER)
    client.ack(Type.ENDPOINTS)
    assert client.session.settled(two) and client.has(two)


def test_routes_that_are_refused_keep_their_clusters() -> None:
    client, one, two = Client(), Resources(snapshot("v1")), Resources(snapshot("v2"))
    client.follow(one)
    client.receive(two)
    client.ack(Type.CLUSTER)
    client.ack(Type.ENDPOINTS)
    client.receive(two)
    answered = client.ack(Type.ROUTES, "no")
    assert answered is not None and answered.error == "no"
    assert client.receive(two) == []
    assert cluster("v1") in client.state[Type.CLUSTER]
    assert not client.session.settled(two)
    better = Resources(snapshot("v1", "v2"))
    client.follow(better)
    assert client.session.settled(better) and client.has(better)


def test_what_a_client_still_has_is_not_sent_again() -> None:
    one = Resources(snapshot("v1"))
    held = {kind.short: {n: p.digest[:16] for n, p in one.of(kind, BY_CHAIN).items()} for kind in Type}
    client = Client(held=held)
    client.follow(one)
    assert [entry[1:] for entry in client.log] == [([], [])] * 4, (
        "an empty answer to each type, so that it knows"
    )
    held["CDS"] |= {"outbound|1||gone": "x"}
    held["EDS"] |= {cluster(): "old"}
    other = Client(held=held)
    other.follow(one)
    assert ("EDS", [cluster()], []) in other.log
    assert ("CDS", [], ["outbound|1||gone"]) in other.log


def test_one_encoding_for_all() -> None:
    deltas = Deltas()
    clients = [Client(deltas) for _ in range(3)]
    one, two = Resources(snapshot("v1")), Resources(snapshot("v2"))
    for resources in (one, two):
        sent = [client.receive(resources) for client in clients]
        assert all(a.data is b.data for others in sent[1:] for a, b in zip(sent[0], others, strict=True))
        for client in clients:
            client.follow(resources)
            for kind in list(client.pending):
                client.ack(kind)
            client.follow(resources)
    assert all(client.has(two) for client in clients)


def test_what_does_not_change_is_the_same() -> None:
    compiler = Compiler(Settings())
    manifests = [*two_versions(), subsets("web-app", "v1", "v2"), virtual("v1")]
    one = Resources(compiler.compile(objects(*manifests)))
    manifests[2] = pod(
        "web-app-v1", "10.1.0.1", "node-a", "web-app", ready=False, app="web-app", version="v1"
    )
    two = Resources(compiler.compile(objects(*manifests)), one)
    for kind in Type:
        assert (one.of(kind, BY_CHAIN) is two.of(kind, BY_CHAIN)) is (kind is not Type.ENDPOINTS)
        anew = Resources(compile_all(*manifests)).of(kind, BY_CHAIN)
        assert dict(two.of(kind, BY_CHAIN)) == dict(anew)
        assert list(two.of(kind, BY_CHAIN)) == list(anew)


def test_by_name() -> None:
    session = DeltaSession("/tmp/envoy.sock", Deltas())
    one, two = Resources(snapshot("v1")), Resources(snapshot("v2"))

    def ask(**fields: Any) -> None:
        session.request(discovery_pb2.DeltaDiscoveryRequest(type_url=Type.ENDPOINTS.value, **fields))

    def receive(resources: Resources) -> tuple[list[str], list[str]]:
        (encoded,) = session.responses(resources)
        response = discovery_pb2.DeltaDiscoveryResponse.FromString(encoded.data)
        ask(response_nonce=response.nonce)
        return [r.name for r in response.resources], list(response.removed_resources)

    ask(resource_names_subscribe=[cluster("v1"), "nothing"])
    assert receive(one) == ([cluster("v1")], ["nothing"])
    ask(resource_names_subscribe=[cluster(), cluster("v1")])
    names, removed = receive(one)
    assert (set(names), removed) == ({cluster(), cluster("v1")}, []), "what is asked for again is sent again"
    assert receive(two) == ([], [cluster("v1")])
    ask(resource_names_unsubscribe=[cluster()])
    assert session.responses(two) == []


def test_listeners_by_chain_or_as_one() -> None:
    one = Resources(snapshot("v1"))
    assert list(one.of(Type.LISTENER, BY_CHAIN)) == [f"{HOST}:80"]
    assert list(one.of(Type.LISTENER, "/tmp/envoy.sock")) == ["outbound-l7"]


_COMPILER = Compiler(Settings())
_STATES = [
    Resources(_COMPILER.compile(objects(*manifests)))
    for manifests in (
        [],
        [*two_versions(), subsets("web-app", "v1", "v2"), virtual("v1")],
        [*two_versions(), subsets("web-app", "v1", "v2"), virtual("v2")],
        [*two_versions()[:-1], subsets("web-app", "v1", "v2"), virtual("v1", "v2")],
        [*two_versions(), *two_versions("b", "10.96.0.9")[1:], subsets("b", "v1"), virtual("v1", name="b")],
    )
]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_STATES) - 1), st.integers(0, 15)), max_size=25))
def test_deltas_add_up(steps: list[tuple[int, int]]) -> None:
    """Whatever comes, answered at whatever pace: no route without its clusters, and in the end all and nothing else."""
    client = Client()
    last = _STATES[0]
    for index, answers in steps:
        last = _STATES[index]
        client.receive(last)
        for bit, kind in enumerate(Type):
            if answers >> bit & 1 and kind in client.pending:
                client.ack(kind)
    for kind in list(client.pending):
        client.ack(kind)
    client.follow(last)
    assert client.has(last)
    assert client.session.settled(last)


# -- over gRPC ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


async def test_a_stream(harness: Harness) -> None:
    write(harness.config, "a.yaml", *two_versions(), subsets("web-app", "v1", "v2"), virtual("v1"))
    async with harness.serving() as controller, harness.channel() as channel:
        call: Any = channel.stream_stream(
            f"/{SERVICE}/{METHOD_DELTA}",
            request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=discovery_pb2.DeltaDiscoveryResponse.FromString,
        )
        stream = call(metadata=bearer("node-a"))
        first = discovery_pb2.DeltaDiscoveryRequest(type_url=Type.ENDPOINTS.value)
        first.node.metadata.update({"COMPONENT": "l7proxy", "LISTENERS": "by-chain"})
        await stream.write(first)
        response = await stream.read()
        assert {r.name for r in response.resources} == {cluster(), cluster("v1")}
        await stream.write(
            discovery_pb2.DeltaDiscoveryRequest(type_url=Type.ENDPOINTS.value, response_nonce=response.nonce)
        )

        async def acked() -> bool:
            (client,) = await harness.clients()
            return bool(client["version_acked"] == controller.snapshot.version)

        await eventually(acked)
        write(harness.config, "b.yaml", mesh_namespace("other"), service("x", "10.96.0.77", ns="other"))
        write(
            harness.config,
            "c.yaml",
            pod("web-app-v3", "10.2.0.3", "node-b", "web-app", app="web-app", version="v3"),
        )
        response = await stream.read()
        assert [r.name for r in response.resources] == [cluster()]
        stream.cancel()


async def test_what_is_no_request_is_refused(harness: Harness) -> None:
    async with harness.serving(), harness.channel() as channel:
        call: Any = channel.stream_stream(f"/{SERVICE}/{METHOD_DELTA}")
        stream = call(metadata=bearer("node-a"))
        await stream.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError, match="no request"):
            await stream.read()
        assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
