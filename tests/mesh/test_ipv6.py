"""Native IPv6 of dual-stack pods: the same ways, verdicts, addresses and counts as IPv4."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from lab import Lab, Place, Pod, Talker
from lab.cluster import ipv6_of
from tests.mesh.helpers import (
    ECHO,
    HTTP,
    authorization_policy,
    dial,
    echoes,
    eventually,
    fetch,
    greeting,
    peer_authentication,
    principal,
    rule,
)

pytestmark = pytest.mark.privileged

NAMESPACE = "ipv6"
OPENED = "istio_tcp_connections_opened_total"
RECEIVED = "istio_tcp_received_bytes_total"


@dataclass(frozen=True)
class World:
    clients: dict[str, Pod]
    server: Pod
    web: Pod
    plain: Pod
    outsider: Place
    services: dict[str, str]  #: IPv6 addresses


@pytest.fixture(scope="module")
def world(lab: Lab) -> Iterator[World]:
    lab.namespace(NAMESPACE)
    lab.namespace("ipv6-plain", mesh=False)
    server = lab.pod("server", node="node1", namespace=NAMESPACE, service_account="server")
    server.serve(server.app("tcp_server", ECHO, "--greet", "--bind", "::"), ECHO)
    web = lab.pod("web", node="node1", namespace=NAMESPACE)
    web.serve(web.app("http_server", HTTP, "--name", "web", "--bind", "::"), HTTP)
    clients = {
        where: lab.pod(f"client-{where}", node=node, namespace=NAMESPACE, service_account=where)
        for where, node in (("near", "node1"), ("far", "node2"))
    }
    plain = lab.pod("plain", node="node2", namespace="ipv6-plain")
    services = {
        "server": lab.service("server", 80, target_port=ECHO, namespace=NAMESPACE, port_name="tcp"),
        "web": lab.service("web", 80, target_port=HTTP, namespace=NAMESPACE),
        "empty": lab.service("empty", 80, namespace=NAMESPACE, port_name="tcp"),
    }
    lab.settle()
    world = World(
        clients,
        server,
        web,
        plain,
        lab.outsider("ipv6-out"),
        {name: ipv6_of(address) for name, address in services.items()},
    )
    yield world
    for pod in (*clients.values(), server, web, plain):
        pod.delete()


@pytest.mark.parametrize("where", ["near", "far"])
def test_both_ends_see_true_addresses(world: World, where: str):
    client, server, service = world.clients[where], world.server, world.services["server"]
    with Talker(client) as talker:
        for key, (address, port) in {"service": (service, 80), "pod": (server.address6, ECHO)}.items():
            seen = talker.open(address, port, key)
            assert seen.ok, seen.error
            assert seen["peer"][:2] == [address, port]
            assert seen["local"][0] == client.address6
    for address, port in ((service, 80), (server.address6, ECHO)):
        there = greeting(client, address, port)
        assert there["peer"][0] == client.address6
        assert there["local"][:2] == [server.address6, ECHO]


@pytest.mark.parametrize("where", ["near", "far"])
def test_a_service_leads_to_endpoints_of_the_family_dialled(world: World, where: str):
    client = world.clients[where]
    mapped = f"::ffff:{world.server.address}"
    with Talker(client) as talker:
        seen = talker.open(mapped, ECHO, family=socket.AF_INET6)
        assert seen.ok, seen.error
        assert seen["peer"][:2] == [mapped, ECHO]
    assert greeting(client, world.server.address, ECHO)["peer"][0] == f"::ffff:{client.address}"
    assert "Refused" in dial(client, world.services["empty"], 80)


def test_nothing_between_nodes_is_plain(lab: Lab, world: World):
    marker = f"ipv6-marker-{time.monotonic_ns()}"
    with lab.capture("node2") as capture:
        with Talker(world.clients["far"]) as talker:
            assert talker.open(world.server.address6, ECHO).ok
            talker("read")
            assert talker("send", text=marker).ok
            assert talker("read")["text"] == marker
        ports = [packet[56:58] for packet in capture.packets() if packet[12:14] == b"\x86\xdd"]
        with Talker(world.plain) as talker:
            assert talker.open(world.server.address6, ECHO).ok
            talker("read")
            assert talker("send", text=f"plain {marker}").ok
            assert talker("read").ok
    # It went by IPv6 itself, to the port of HBONE.
    assert (15008).to_bytes(2) in ports
    assert capture.holds(b"plain " + marker.encode()) > 0
    assert capture.holds(marker.encode()) == capture.holds(b"plain " + marker.encode())


def test_requests_go_through_l7_policy(lab: Lab, world: World):
    routed = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "web", "namespace": NAMESPACE},
        "spec": {
            "hosts": ["web"],
            "http": [
                {
                    "route": [{"destination": {"host": "web"}}],
                    "headers": {"response": {"add": {"x-routed": "yes"}}},
                }
            ],
        },
    }
    with lab.applied(routed):
        for client in world.clients.values():
            (answer,) = fetch(client, f"http://[{world.services['web']}]/")
            assert answer["status"] == 200, answer
            assert answer["headers"]["x-routed"] == "yes"
            assert answer["peer"][:2] == [world.services["web"], 80]
            assert answer["local"][0] == client.address6
            # Whichever family the proxy went by: the server is told the client's own address.
            told = answer["body"]["client"].removeprefix("::ffff:")
            assert told in (client.address, client.address6)


def test_strict_refuses_what_is_plain_and_no_probe(lab: Lab, world: World):
    server = world.server
    for place in (world.plain, world.outsider):
        assert echoes(place, server.address6, ECHO) == ""
    with lab.applied(peer_authentication(NAMESPACE, "STRICT")):
        for place in (world.plain, world.outsider):
            assert echoes(place, server.address6, ECHO, timeout=2) != ""
        for client in world.clients.values():
            assert echoes(client, server.address6, ECHO) == ""
        assert lab.probe(server, ECHO, address=server.address6)


def test_policy_refuses_and_ends_what_is_open(lab: Lab, world: World):
    server = world.server
    only_far = authorization_policy(
        "only-far", NAMESPACE, selector={"app": "server"}, rules=[rule(principals=[f"{NAMESPACE}/far"])]
    )
    only_near = authorization_policy(
        "only-far", NAMESPACE, selector={"app": "server"}, rules=[rule(principals=[f"{NAMESPACE}/near"])]
    )
    with Talker(world.clients["near"]) as near, Talker(world.clients["far"]) as far:
        for talker in (near, far):
            assert talker.open(server.address6, ECHO).ok
            assert talker("read").ok
        with lab.applied(only_far):
            assert "ConnectionResetError" in near("read", timeout=3).error
            refused = near.open(server.address6, ECHO, "again", timeout=2)
            assert "PermissionError" in refused.error
            assert far.exchange().ok
        with lab.applied(only_near):
            assert echoes(world.clients["near"], server.address6, ECHO) == ""
            assert echoes(world.clients["far"], server.address6, ECHO, timeout=2) != ""
    assert eventually(lambda: f"server=[{server.address6}]:{ECHO}" in lab.logs("node1", "agent"))


@pytest.mark.parametrize("where", ["near", "far"])
def test_bytes_are_counted_as_of_ipv4(lab: Lab, world: World, where: str):
    client, server = world.clients[where], world.server

    def total(name: str, reporter: str) -> float:
        found = [lab.metrics(node.name, part) for node in lab.nodes for part in ("agent", "nodeproxy")]
        labels = {
            "reporter": reporter,
            "source_principal": "spiffe://" + principal(NAMESPACE, where),
            "destination_workload": server.record.owner,
        }
        return sum(metrics.total(name, **labels) for metrics in found)

    names = [(name, reporter) for name in (OPENED, RECEIVED) for reporter in ("source", "destination")]
    before = [total(*name) for name in names]
    with Talker(client) as talker:
        assert talker.open(server.address6, ECHO).ok
        talker("read")
        assert talker.exchange(size=1234, times=50).ok
        expected = [1.0, 1.0, 61700.0, 61700.0]

        def since() -> list[float]:
            return [total(*name) - was for name, was in zip(names, before, strict=True)]

        assert eventually(lambda: since() == expected), since()


@pytest.mark.parametrize("port", [15001, 15002, 15008])
def test_nobody_reaches_our_listeners(world: World, port: int):
    client = world.clients["near"]
    for address in (client.address6, world.server.address6):
        assert dial(client, address, port, timeout=1.0)
    if port != 15008:
        assert dial(world.outsider, world.server.address6, port, timeout=1.0)


def test_a_pod_reaches_itself_and_its_own_service(world: World):
    server = world.server
    for address, port in ((server.address6, ECHO), ("::1", ECHO), (world.services["server"], 80)):
        assert echoes(server, address, port) == ""
