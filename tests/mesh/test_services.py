"""Services as applications use them, dialled in enrolled pods: which endpoint a connection of this pod gets."""

from __future__ import annotations

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
        node: echo_server(lab, f"server-{node}", node=node, namespace=NAMESPACE, labels={"app": "server"})
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
