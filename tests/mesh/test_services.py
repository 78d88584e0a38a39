"""Services as applications use them, dialled in enrolled pods: which endpoint a connection of this pod gets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lab import Lab, Pod
from tests.mesh.helpers import ECHO, dial, echo_server, greeting

pytestmark = pytest.mark.privileged

NAMESPACE = "services"


@dataclass(frozen=True)
class World:
    servers: dict[str, Pod]  #: by node
    clients: dict[str, Pod]


@pytest.fixture(scope="module")
def world(lab: Lab) -> World:
    lab.namespace(NAMESPACE)
    servers = {
        node: echo_server(
            lab,
            f"server-{node}",
            node=node,
            namespace=NAMESPACE,
            labels={"app": "server", "which": f"server-{node}"},
        )
        for node in ("node1", "node2")
    }
    clients = {node: lab.pod(f"client-{node}", node=node, namespace=NAMESPACE) for node in ("node1", "node2")}
    lab.settle()
    return World(servers, clients)


@pytest.fixture
def service(lab: Lab, request: pytest.FixtureRequest) -> Iterator[str]:
    """A Service of the servers with the test's own ``spec``; its address."""
    address = "10.96.77.7"
    spec: dict[str, Any] = {
        "clusterIP": address,
        "clusterIPs": [address],
        "selector": {"app": "server"},
        "ports": [{"name": "tcp", "port": ECHO, "protocol": "TCP"}],
        **getattr(request, "param", {}),
    }
    manifest = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "chosen", "namespace": NAMESPACE},
        "spec": spec,
    }
    with lab.applied(manifest):
        yield address


def reached(client: Pod, address: str, count: int) -> set[str]:
    """The servers' addresses, as they see them."""
    return {str(greeting(client, address, ECHO)["local"][0]) for _ in range(count)}


def shares(client: Pod, address: str, count: int, port: int = ECHO) -> Counter[str]:
    """How many of as many connections each server got, by its address."""
    done = client.run(
        client.app("traffic", address, port, "--count", count, "--interval", 0, "--greeted"), timeout=60
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["outcome"] for r in records} == {"ok"}, records
    return Counter(r["greeting"]["local"][0] for r in records)


@pytest.mark.parametrize(("first", "second", "least", "most"), [(75, 25, 40, 75), (100, 0, 80, 80)])
def test_tcp_routes_share_connections(
    lab: Lab, world: World, service: str, first: int, second: int, least: int, most: int
):
    """Weights of destinations, drawn by the kernel for each connection. The bounds are five standard deviations wide."""
    hosts = ("server-node1", "server-node2")
    subsets = [{"name": h, "labels": {"which": h}} for h in hosts]
    routes = [
        {"destination": {"host": "chosen", "subset": h}, "weight": w}
        for h, w in zip(hosts, (first, second), strict=True)
    ]
    common = {"metadata": {"name": "chosen", "namespace": NAMESPACE}}
    kinds = {
        "DestinationRule": {"host": "chosen", "subsets": subsets},
        "VirtualService": {"hosts": ["chosen"], "tcp": [{"route": routes}]},
    }
    manifests = [
        {"apiVersion": "networking.istio.io/v1", "kind": kind, **common, "spec": spec}
        for kind, spec in kinds.items()
    ]
    with lab.applied(manifests):
        found = shares(world.clients["node1"], service, 80)
        assert least <= found[world.servers["node1"].address] <= most, found


@pytest.mark.parametrize(
    "service",
    [
        {
            "type": "NodePort",
            "externalIPs": ["192.0.2.77"],
            "ports": [{"name": "tcp", "port": ECHO, "nodePort": 30777, "protocol": "TCP"}],
        }
    ],
    indirect=True,
)
def test_external_addresses_and_node_ports(lab: Lab, world: World, service: str):
    """From pods of the mesh, with their identity: nothing but the mesh answers there in this lab."""
    addresses = {node.name: node.address_on_fabric for node in lab.nodes}
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        }
        for name, address in addresses.items()
    ]
    everywhere = {server.address for server in world.servers.values()}
    with lab.applied(nodes):
        for client in world.clients.values():
            assert set(shares(client, "192.0.2.77", 16)) == everywhere
            for address in addresses.values():
                assert set(shares(client, address, 16, 30777)) == everywhere
        assert dial(world.clients["node1"], "192.0.2.77", ECHO + 1, timeout=1) != ""


def test_without_affinity_every_endpoint_gets_some(world: World, service: str):
    expected = {server.address for server in world.servers.values()}
    assert reached(world.clients["node1"], service, 16) == expected


@pytest.mark.parametrize(
    "service",
    [{"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}],
    indirect=True,
)
def test_session_affinity(world: World, service: str):
    for client in world.clients.values():
        assert len(reached(client, service, 8)) == 1


@pytest.mark.parametrize("service", [{"internalTrafficPolicy": "Local"}], indirect=True)
def test_internal_traffic_policy(lab: Lab, world: World, service: str):
    for node, client in world.clients.items():
        assert reached(client, service, 6) == {world.servers[node].address}
    # Where the node has none, another node's is no choice: refused, as kube-proxy's dropped packet in the end is.
    lonely = lab.pod("lonely", node="node2", namespace=NAMESPACE)
    world.servers["node2"].set_ready(False)
    try:
        lab.settle()
        assert "refused" in dial(lonely, service, ECHO).lower()
        assert reached(world.clients["node1"], service, 3) == {world.servers["node1"].address}
    finally:
        world.servers["node2"].set_ready(True)
        lab.settle()
        lonely.delete()


@pytest.mark.parametrize(
    "service",
    [{"sessionAffinity": "ClientIP", "internalTrafficPolicy": "Local"}],
    indirect=True,
)
def test_a_pod_that_dials_its_own_service(world: World, service: str):
    """Its one endpoint on this node is itself: it sees its own address as its peer's, and needs no policy for it."""
    for server in world.servers.values():
        told = greeting(server, service, ECHO)
        assert told["peer"][0] == told["local"][0] == server.address
