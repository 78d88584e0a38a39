"""ADS: the session's core as a transcript, what a golden table looks like as Envoy's types, and the stream over gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import json_format

from controlplane.model.snapshot import Snapshot
from controlplane.xds.resources import Resources
from controlplane.xds.service import METHOD, SERVICE
from controlplane.xds.session import ENDPOINTS_PATIENCE, AdsSession, Answered
from controlplane.xds.types import Type
from tests.controlplane.support import (
    Harness,
    Manifest,
    bearer,
    compile_all,
    eventually,
    istio,
    service,
    subsets,
    two_versions,
    write,
)

HOST = "web-app.default.svc.cluster.local"
TABLE = f"{HOST}:80"


def virtual(*versions: str, name: str = "web-app") -> Manifest:
    share = [{"destination": {"host": name, "subset": v}, "weight": 50} for v in versions]
    return istio("VirtualService", name, {"hosts": [name], "http": [{"route": share}]})


def snapshot(*versions: str) -> Snapshot:
    return compile_all(*two_versions(), subsets("web-app", "v1", "v2"), virtual(*versions))


def cluster(version: str = "") -> str:
    return f"outbound|80|{version}|{HOST}"


class Client:
    """Plays a well-behaved client: asks for everything in Envoy's order and takes what it is sent."""

    def __init__(self, session: AdsSession) -> None:
        self.session = session
        self.now = 0.0
        self.log: list[tuple[str, list[str]]] = []
        self.resources: dict[Type, dict[str, Any]] = {t: {} for t in Type}
        self._nonces: dict[Type, str] = {}

    def ask(self, kind: Type, *names: str, error: str = "") -> Answered | None:
        request = discovery_pb2.DiscoveryRequest(
            type_url=kind.value, resource_names=names, response_nonce=self._nonces.get(kind, "")
        )
        if error:
            request.error_detail.message = error
        return self.session.request(request)

    def receive(self, resources: Resources) -> list[str]:
        """What is sent now, by type; nothing is answered yet."""
        kinds = []
        for response in self.session.responses(resources, self.now):
            kind = Type(response.type_url)
            kinds.append(kind.short)
            self._nonces[kind] = response.nonce
            names = [_name(kind, r) for r in response.resources]
            self.log.append((kind.short, names))
            if kind.whole:
                self.resources[kind] = {}
            self.resources[kind].update(zip(names, response.resources, strict=True))
        return kinds

    def follow(self, resources: Resources) -> list[str]:
        """Receive and acknowledge until nothing comes any more, as Envoy does. The order of types."""
        order: list[str] = []
        while kinds := self.receive(resources):
            order += kinds
            for kind in Type:
                if kind.short in kinds or (kind is Type.ENDPOINTS and "CDS" in kinds) or kind is Type.ROUTES:
                    self.ask(kind, *self._names(kind))
        return order

    def _names(self, kind: Type) -> list[str]:
        if kind is Type.ENDPOINTS:
            return sorted(self.resources[Type.CLUSTER])
        if kind is Type.ROUTES:
            return [
                chain.name
                for packed in self.resources[Type.LISTENER].values()
                for chain in listener_pb2.Listener.FromString(packed.value).filter_chains
            ]
        return []


def _name(kind: Type, packed: Any) -> str:
    message = {
        Type.CLUSTER: cluster_pb2.Cluster,
        Type.ENDPOINTS: endpoint_pb2.ClusterLoadAssignment,
        Type.LISTENER: listener_pb2.Listener,
        Type.ROUTES: route_pb2.RouteConfiguration,
    }[kind].FromString(packed.value)
    return str(message.cluster_name if kind is Type.ENDPOINTS else message.name)


@pytest.fixture
def client() -> Client:
    """One that has taken a first snapshot, with v1 only."""
    client = Client(AdsSession("/tmp/l7.sock"))
    for kind in Type:
        client.ask(kind)
    assert client.follow(Resources(snapshot("v1")))[:2] == ["CDS", "EDS"]
    client.log.clear()
    return client


def test_a_first_start() -> None:
    client = Client(AdsSession("/tmp/l7.sock"))
    for kind in Type:
        client.ask(kind)
    resources = Resources(snapshot("v1"))
    assert client.follow(resources) == ["CDS", "EDS", "LDS", "RDS"]
    assert client.log == [
        ("CDS", [cluster("v1"), cluster()]),
        ("EDS", [cluster("v1"), cluster()]),
        ("LDS", ["outbound-l7"]),
        ("RDS", [TABLE]),
    ]
    assert client.session.settled(resources)


def test_nothing_changes_nothing_is_sent(client: Client) -> None:
    assert client.receive(Resources(snapshot("v1"))) == []


def test_make_before_break(client: Client) -> None:
    """From v1 to v2: the new cluster first, routes once its endpoints are there, the old cluster last."""
    resources = Resources(snapshot("v2"))
    assert client.follow(resources) == ["CDS", "EDS", "RDS", "CDS"]
    assert client.log == [
        ("CDS", [cluster("v1"), cluster("v2"), cluster()]),
        ("EDS", [cluster("v2")]),
        ("RDS", [TABLE]),
        ("CDS", [cluster("v2"), cluster()]),
    ]
    assert client.session.settled(resources)


def test_routes_wait_for_endpoints(client: Client) -> None:
    resources = Resources(snapshot("v2"))
    assert client.receive(resources) == ["CDS"]
    assert client.receive(resources) == [], "Envoy acknowledges clusters when they are warm"
    client.ask(Type.ENDPOINTS, cluster(), cluster("v1"), cluster("v2"))
    assert client.receive(resources) == ["EDS"], "so endpoints never wait for that"
    client.ask(Type.ENDPOINTS, cluster(), cluster("v1"), cluster("v2"))
    assert client.receive(resources) == []
    client.ask(Type.CLUSTER)
    assert client.receive(resources) == ["RDS"]


def test_a_client_that_asks_for_no_endpoints_gets_its_routes(client: Client) -> None:
    resources = Resources(snapshot("v2"))
    assert client.receive(resources) == ["CDS"]
    client.ask(Type.CLUSTER)
    assert client.receive(resources) == []
    wait = client.session.wait(client.now)
    assert wait == pytest.approx(ENDPOINTS_PATIENCE)
    client.now += ENDPOINTS_PATIENCE
    assert client.receive(resources) == ["RDS"]
    assert client.session.wait(client.now) is None


def test_a_refusal_keeps_what_was(client: Client) -> None:
    """Routes that are refused keep the clusters that the old ones use, until better ones are taken."""
    resources = Resources(snapshot("v2"))
    client.receive(resources)
    client.ask(Type.ENDPOINTS, cluster(), cluster("v1"), cluster("v2"))
    client.receive(resources)
    client.ask(Type.ENDPOINTS, cluster(), cluster("v1"), cluster("v2"))
    client.ask(Type.CLUSTER)
    assert client.receive(resources) == ["RDS"]
    answered = client.ask(Type.ROUTES, TABLE, error="no such thing")
    assert answered is not None
    assert (answered.kind, answered.error) == (Type.ROUTES, "no such thing")
    assert client.receive(resources) == [], "the same bytes are not offered again"
    assert cluster("v1") in client.resources[Type.CLUSTER]
    better = Resources(snapshot("v1", "v2"))
    assert client.follow(better) == ["RDS"]
    assert client.session.settled(better)


def test_refused_clusters_do_not_block_the_rest(client: Client) -> None:
    resources = Resources(snapshot("v2"))
    client.receive(resources)
    client.ask(Type.CLUSTER, error="no")
    assert client.receive(resources) == ["RDS"]


def test_stale_answers_are_ignored(client: Client) -> None:
    old = client._nonces[Type.CLUSTER]
    client.receive(Resources(snapshot("v2")))
    new, client._nonces[Type.CLUSTER] = client._nonces[Type.CLUSTER], old
    assert client.ask(Type.CLUSTER) is None
    client._nonces[Type.CLUSTER] = new
    assert client.ask(Type.CLUSTER) is not None


def test_types_that_are_not_served_are_ignored(client: Client) -> None:
    request = discovery_pb2.DiscoveryRequest(type_url="type.googleapis.com/envoy.service.runtime.v3.Runtime")
    assert client.session.request(request) is None


def test_only_endpoints_that_changed_are_sent(client: Client) -> None:
    manifests = two_versions()
    manifests[2]["status"]["podIP"] = "10.1.0.77"
    manifests[2]["status"]["podIPs"] = [{"ip": "10.1.0.77"}]
    changed = compile_all(*manifests, subsets("web-app", "v1", "v2"), virtual("v1"))
    assert client.receive(Resources(changed)) == ["EDS"]
    assert client.log == [("EDS", [cluster("v1"), cluster()])]


def test_a_cluster_that_changes_gets_its_endpoints_again(client: Client) -> None:
    rule = subsets("web-app", "v1", "v2", trafficPolicy={"loadBalancer": {"simple": "RANDOM"}})
    changed = Resources(compile_all(*two_versions(), rule, virtual("v1")))
    assert client.follow(changed) == ["CDS", "EDS"]


def test_everything_goes(client: Client) -> None:
    nothing = Resources(compile_all(*two_versions()))
    assert client.follow(nothing) == ["LDS", "CDS"]
    assert client.resources[Type.CLUSTER] == {}
    assert client.resources[Type.LISTENER] == {}


def test_what_comes_back_is_sent_again(client: Client) -> None:
    client.follow(Resources(compile_all(*two_versions())))
    assert client.follow(Resources(snapshot("v1"))) == ["CDS", "EDS", "LDS", "RDS"]


def test_versions_are_content() -> None:
    """Two controllers with the same objects give the same versions; nonces are a stream's own."""
    versions = []
    for _ in range(2):
        client = Client(AdsSession("/tmp/l7.sock"))
        for kind in Type:
            client.ask(kind)
        client.follow(Resources(snapshot("v1", "v2")))
        versions.append([s.version for s in client.session.subscriptions.values()])
    assert versions[0] == versions[1]
    assert len(set(versions[0])) == 4


def test_as_envoys_types() -> None:
    """The contract with proxies, spelled out for the canary."""
    found = Resources(
        compile_all(
            *two_versions(),
            subsets("web-app", "v1"),
            istio(
                "VirtualService",
                "web",
                {
                    "hosts": ["web-app"],
                    "http": [
                        {
                            "name": "canary",
                            "match": [{"headers": {"end-user": {"exact": "jason"}}}],
                            "route": [{"destination": {"host": "web-app", "subset": "v1"}}],
                            "retries": {"attempts": 3, "perTryTimeout": "2s", "retryOn": "gateway-error,503"},
                            "timeout": "5s",
                        },
                        {
                            "route": [
                                {"destination": {"host": "web-app", "subset": "v1"}, "weight": 80},
                                {"destination": {"host": "web-app"}, "weight": 20},
                            ]
                        },
                    ],
                },
            ),
        )
    )
    routes = found.of(Type.ROUTES, "")[TABLE].any
    assert json_format.MessageToDict(route_pb2.RouteConfiguration.FromString(routes.value)) == {
        "name": TABLE,
        "validateClusters": False,
        "virtualHosts": [
            {
                "name": TABLE,
                "domains": ["*"],
                "routes": [
                    {
                        "name": "canary",
                        "match": {
                            "prefix": "/",
                            "headers": [{"name": "end-user", "stringMatch": {"exact": "jason"}}],
                        },
                        "route": {
                            "cluster": cluster("v1"),
                            "timeout": "5s",
                            "retryPolicy": {
                                "retryOn": "gateway-error,retriable-status-codes",
                                "numRetries": 3,
                                "retriableStatusCodes": [503],
                                "perTryTimeout": "2s",
                                "retryHostPredicate": [_PREVIOUS_HOSTS],
                                "hostSelectionRetryMaxAttempts": "5",
                            },
                        },
                    },
                    {
                        "match": {"prefix": "/"},
                        "route": {
                            "weightedClusters": {
                                "clusters": [
                                    {"name": cluster("v1"), "weight": 80},
                                    {"name": cluster(), "weight": 20},
                                ]
                            },
                            "timeout": "0s",
                            "retryPolicy": {
                                "retryOn": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
                                "numRetries": 2,
                                "retryHostPredicate": [_PREVIOUS_HOSTS],
                                "hostSelectionRetryMaxAttempts": "5",
                            },
                        },
                    },
                ],
            }
        ],
    }
    made = json_format.MessageToDict(
        cluster_pb2.Cluster.FromString(found.of(Type.CLUSTER, "")[cluster("v1")].any.value)
    )
    assert made.pop("transportSocket")["name"] == "envoy.transport_sockets.upstream_proxy_protocol"
    assert made == {
        "name": cluster("v1"),
        "type": "EDS",
        "edsClusterConfig": {"edsConfig": _ADS, "serviceName": cluster("v1")},
        "connectTimeout": "10s",
        "lbPolicy": "LEAST_REQUEST",
        "metadata": {
            "filterMetadata": {
                "istio": {"services": [{"host": HOST, "name": "web-app", "namespace": "default"}]}
            }
        },
    }
    endpoints = endpoint_pb2.ClusterLoadAssignment.FromString(
        found.of(Type.ENDPOINTS, "")[cluster("v1")].any.value
    )
    assert json_format.MessageToDict(endpoints) == {
        "clusterName": cluster("v1"),
        "endpoints": [
            {
                "lbEndpoints": [
                    {
                        "endpoint": {
                            "address": {"socketAddress": {"address": "10.1.0.1", "portValue": 8080}}
                        },
                        "healthStatus": "HEALTHY",
                        "loadBalancingWeight": 1,
                        "metadata": {
                            "filterMetadata": {
                                "mycel": {
                                    "uid": "uid-default-web-app-v1",
                                    "name": "web-app-v1",
                                    "namespace": "default",
                                    "workload": "web-app-v1",
                                    "service_account": "web-app",
                                    "identity": "spiffe://cluster.local/ns/default/sa/web-app",
                                    "node": "node-a",
                                    "enrolled": True,
                                    "app": "web-app",
                                    "version": "v1",
                                }
                            }
                        },
                    }
                ]
            }
        ],
    }
    listener = listener_pb2.Listener.FromString(found.of(Type.LISTENER, "/x.sock")["outbound-l7"].any.value)
    assert listener.address.pipe.path == "/x.sock"
    assert [f.name for f in listener.listener_filters] == ["envoy.filters.listener.proxy_protocol"]
    (chain,) = listener.filter_chains
    assert chain.name == TABLE
    (address,) = chain.filter_chain_match.prefix_ranges
    assert (address.address_prefix, address.prefix_len.value) == ("10.96.0.10", 32)
    assert chain.filter_chain_match.destination_port.value == 80
    manager = hcm_pb2.HttpConnectionManager.FromString(chain.filters[0].typed_config.value)
    assert (manager.stat_prefix, manager.rds.route_config_name) == (TABLE, TABLE)
    assert manager.max_request_headers_kb.value == 60
    assert manager.server_header_transformation == manager.PASS_THROUGH
    assert manager.access_log[0].name == "envoy.access_loggers.file"


_ADS = {"ads": {}, "resourceApiVersion": "V3", "initialFetchTimeout": "0s"}
_PREVIOUS_HOSTS = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typedConfig": {
        "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    },
}


# -- over gRPC ---------------------------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, channel: grpc.aio.Channel, metadata: Any = None) -> None:
        call = channel.stream_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=discovery_pb2.DiscoveryRequest.SerializeToString,
            response_deserializer=discovery_pb2.DiscoveryResponse.FromString,
        )
        self.call = call(metadata=metadata if metadata is not None else bearer("node-a"))

    async def ask(
        self, kind: Type, *names: str, nonce: str = "", error: str = "", component: str = "l7proxy"
    ) -> None:
        request = discovery_pb2.DiscoveryRequest(
            type_url=kind.value, resource_names=names, response_nonce=nonce
        )
        request.node.id = "node-a/l7"
        request.node.metadata.update({"COMPONENT": component, "ADMIN": "10.0.0.1:15090"})
        if error:
            request.error_detail.message = error
        await self.call.write(request)

    async def receive(self) -> discovery_pb2.DiscoveryResponse:
        response = await asyncio.wait_for(self.call.read(), 5)
        assert isinstance(response, discovery_pb2.DiscoveryResponse)
        return response


async def test_a_stream(harness: Harness) -> None:
    write(harness.config, "web.yaml", *two_versions(), subsets("web-app", "v1"), virtual("v1"))
    async with harness.serving() as controller, harness.channel() as channel:
        stream = Stream(channel)
        await stream.ask(Type.ROUTES, TABLE)
        first = await stream.receive()
        assert [_name(Type.ROUTES, r) for r in first.resources] == [TABLE]
        await stream.ask(Type.ROUTES, TABLE, nonce=first.nonce)

        async def acked() -> bool:
            return "acked" in (await harness.clients())[0]["types"].get("RDS", {})

        async def refused() -> bool:
            return bool((await harness.clients())[0]["nacks"])

        await eventually(acked)
        (entry,) = await harness.clients()
        assert (entry["node"], entry["component"], entry["admin"]) == ("node-a", "l7proxy", "10.0.0.1:15090")
        assert entry["version_acked"] == controller.snapshot.version
        assert entry["types"] == {"RDS": {"sent": first.version_info, "acked": first.version_info}}
        write(harness.config, "other.yaml", service("other", "10.96.0.11"))
        write(harness.config, "web.yaml", *two_versions(), subsets("web-app", "v1"), virtual("v1", "v2"))
        second = await stream.receive()
        await stream.ask(Type.ROUTES, TABLE, nonce=second.nonce, error="route 1: no")
        await eventually(refused)
        (entry,) = await harness.clients()
        assert entry["errors"] == {"RDS": "route 1: no"}
        assert entry["nacks"] == 1
        assert entry["types"]["RDS"] == {"sent": second.version_info, "acked": first.version_info}
        metrics = await harness.page("/metrics")
        assert 'mycel_controlplane_nacks_total{component="l7proxy",type="RDS"} 1.0' in metrics


async def test_a_client_does_not_pass_for_an_agent(harness: Harness) -> None:
    """Nor makes labels of metrics up."""
    async with harness.serving(), harness.channel() as channel:
        streams = [Stream(channel) for _ in range(2)]
        for stream, component in zip(streams, ("agent", "made up"), strict=True):
            await stream.ask(Type.CLUSTER, component=component)
            await stream.receive()
        assert [c["component"] for c in await harness.clients()] == ["xds", "xds"]


async def test_strangers_are_refused(harness: Harness) -> None:
    async with harness.serving(), harness.channel() as channel:
        stream = Stream(channel, (("authorization", "Bearer wrong"),))
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await stream.receive()
        assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED
