"""Processes end, by kill -9 too, and come back: no wrong verdict, no lost count, and what can go on goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lab import Lab, Pod, Talker, Traffic
from tests.mesh.helpers import (
    ECHO,
    HTTP,
    authorization_policy,
    echo_server,
    echoes,
    eventually,
    fetch,
    http_server,
    principal,
    rule,
)

pytestmark = pytest.mark.privileged

NAMESPACE = "restart"


@dataclass(frozen=True)
class World:
    server: Pod
    near: Pod
    far: Pod
    denied_near: Pod
    denied_far: Pod
    web: Pod
    service: str


@pytest.fixture(scope="module")
def world(lab: Lab) -> Iterator[World]:
    lab.namespace(NAMESPACE)
    server = echo_server(lab, "server", node="node1", namespace=NAMESPACE)
    web = http_server(lab, "web", node="node2", namespace=NAMESPACE)
    service = lab.service("web", 80, target_port=HTTP, namespace=NAMESPACE)
    pods = {
        f"{who}-{where}": lab.pod(f"{who}-{where}", node=node, namespace=NAMESPACE, service_account=who)
        for where, node in (("near", "node1"), ("far", "node2"))
        for who in ("good", "bad")
    }
    policy = lab.apply(
        authorization_policy(
            "clients", NAMESPACE, selector={"app": "server"}, rules=[rule(principals=[f"{NAMESPACE}/good"])]
        )
    )
    route = lab.apply(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": NAMESPACE},
            "spec": {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]},
        }
    )
    lab.settle()
    yield World(server, pods["good-near"], pods["good-far"], pods["bad-near"], pods["bad-far"], web, service)
    for file in (policy, route):
        lab.withdraw(file)
    lab.settle()


def outcomes(records: list[dict[str, Any]]) -> set[str]:
    return {record["outcome"] for record in records}


def test_agent_killed_and_restarted_under_traffic(lab: Lab, world: World):
    labels = {
        "reporter": "destination",
        "source_principal": "spiffe://" + principal(NAMESPACE, "good"),
        "destination_workload": "server",
    }

    def opened() -> float:
        return sum(
            lab.metrics("node1", component).total("istio_tcp_connections_opened_total", **labels)
            for component in ("agent", "nodeproxy")
        )

    assert echoes(world.near, world.server.address, ECHO) == ""
    eventually(lambda: opened() >= 1)
    before = opened()
    # Its denied clients may wait for the kernel's SYN timeout, so theirs is short.
    address = world.server.address
    good = [Traffic.echo(pod, address, ECHO) for pod in (world.near, world.far)]
    bad = [Traffic.echo(pod, address, ECHO, timeout=0.5) for pod in (world.denied_near, world.denied_far)]
    with Talker(world.near) as near, Talker(world.far) as far:
        for talker in (near, far):
            assert talker.open(world.server.address, ECHO).ok
            assert talker("read")["text"]
        time.sleep(1)
        lab.kill("node1", "agent")
        for _ in range(10):
            # Established connections do not notice: not in the kernel, and not in the node proxies.
            assert near.exchange().ok
            assert far.exchange().ok
            time.sleep(0.1)
        during = echoes(world.near, world.server.address, ECHO)
        assert during == "", "pinned programs carry new same-node connections without the agent"
        lab.start("node1", "agent")
        time.sleep(1)
        for talker in (near, far):
            assert talker.exchange(times=5).ok
    good_records = [traffic.end(at_least=51) for traffic in good]
    bad_records = [traffic.end(at_least=4) for traffic in bad]
    for records in good_records:
        assert len(records) > 50
        assert outcomes(records) == {"ok"}
    for records in bad_records:
        assert len(records) > 3
        assert "ok" not in outcomes(records)
        assert not any("greeting" in record for record in records)
    # The counters went on: every connection of both clients, before, during and after.
    expected = before + sum(len(records) for records in good_records) + 2 + 1
    eventually(lambda: opened() == expected)
    assert opened() == expected


def test_agent_restart_serves_new_pods_and_gets_policy(lab: Lab, world: World):
    lab.kill("node1", "agent")
    lab.start("node1", "agent")
    pod = lab.pod("after-restart", node="node1", namespace=NAMESPACE, service_account="good")
    assert echoes(pod, world.server.address, ECHO) == ""
    pod.check()
    with lab.applied(
        authorization_policy(
            "deny",
            NAMESPACE,
            action="DENY",
            selector={"app": "server"},
            rules=[rule(principals=[f"{NAMESPACE}/good"])],
        )
    ):
        assert echoes(pod, world.server.address, ECHO, timeout=2) != ""
    assert echoes(pod, world.server.address, ECHO) == ""
    pod.delete()


def test_add_is_refused_while_the_agent_is_away_and_del_is_not(lab: Lab, world: World):
    pod = lab.pod("short", node="node2", namespace=NAMESPACE)
    lab.node("node2").configure_network(timeout=2)
    lab.kill("node2", "agent")
    try:
        pod.delete()
        with pytest.raises(Exception, match="mycel") as error:
            lab.pod("refused", node="node2", namespace=NAMESPACE)
        assert getattr(error.value, "code", 0) == 11
    finally:
        lab.node("node2").configure_network()
        lab.start("node2", "agent")
    lab.pod("welcome", node="node2", namespace=NAMESPACE).delete()


def test_node_proxy_killed_fails_closed_and_recovers(lab: Lab, world: World):
    marker = "fail-closed-marker"
    lab.kill("node2", "nodeproxy")
    try:
        with lab.capture() as capture, Talker(world.far) as talker:
            opened = talker.open(world.server.address, ECHO, timeout=3)
            if opened.ok:
                talker("send", text=marker)
                answer = talker("read", timeout=3)
                assert not answer.ok or answer["text"] == ""
        assert capture.holds(marker.encode()) == 0
        # On one node it is not needed.
        assert echoes(world.near, world.server.address, ECHO) == ""
    finally:
        lab.start("node2", "nodeproxy")
    assert eventually(lambda: echoes(world.far, world.server.address, ECHO) == "", timeout=10)


def test_node_proxy_of_the_server_s_node_killed_fails_closed_and_recovers(lab: Lab, world: World):
    """A dead HBONE listener is nobody's: the connection ends, and nothing comes around it in plain text."""
    lab.kill("node1", "nodeproxy")
    try:
        with lab.capture() as capture, Talker(world.far) as talker:
            opened = talker.open(world.server.address, ECHO, timeout=5)
            if opened.ok:
                talker("send", text="around-it")
                answer = talker("read", timeout=12)
                assert not answer.ok or answer["text"] == ""
        assert capture.holds(b"around-it") == 0
        assert echoes(world.near, world.server.address, ECHO) == ""
    finally:
        lab.start("node1", "nodeproxy")
    assert eventually(lambda: echoes(world.far, world.server.address, ECHO) == "", timeout=10)


def test_l7proxy_away_means_refusal_and_a_log_line_never_a_bypass(lab: Lab, world: World):
    (answer,) = fetch(world.near, f"http://{world.service}/")
    assert answer["status"] == 200
    asked = fetch(world.far, f"http://{world.web.address}:{HTTP}/counts")[0]["body"]
    lab.kill("node1", "l7proxy")
    try:
        (answer,) = fetch(world.near, f"http://{world.service}/bypass", timeout=30)
        assert answer.get("status") in (None, 503), answer
        line = f"connection refused reason=no-listener client={world.near.address}:"
        assert eventually(lambda: line in lab.logs("node1", "agent", lines=50))
    finally:
        lab.start("node1", "l7proxy")
    assert eventually(
        lambda: fetch(world.near, f"http://{world.service}/")[0].get("status") == 200, timeout=10
    )
    assert "/bypass" not in asked
    assert "/bypass" not in fetch(world.far, f"http://{world.web.address}:{HTTP}/counts")[0]["body"]


@pytest.mark.parametrize("component", ["agent", "nodeproxy", "l7proxy"])
def test_sigterm_is_an_upgrade(lab: Lab, world: World, component: str):
    """A process that is told to end does so at once and well; what does not pass through it goes on."""
    with Talker(world.near) as talker:
        assert talker.open(world.server.address, ECHO).ok
        assert talker("read")["text"]
        assert lab.stop("node1", component, timeout=15) == 0
        try:
            assert talker.exchange(times=5).ok
            assert echoes(world.near, world.server.address, ECHO) == ""
            assert echoes(world.denied_near, world.server.address, ECHO, timeout=1) != ""
        finally:
            lab.start("node1", component)
        assert talker.exchange(times=5).ok
    assert eventually(lambda: echoes(world.far, world.server.address, ECHO) == "", timeout=10)
    assert eventually(
        lambda: fetch(world.near, f"http://{world.service}/")[0].get("status") == 200, timeout=10
    )


def test_controller_away_and_back_with_the_same_key(lab: Lab, world: World):
    roots = lab.roots.read_bytes()
    near_far = Talker(world.far)
    assert near_far.open(world.server.address, ECHO).ok
    assert near_far("read")["text"]
    lab.kill("controlplane")
    try:
        # What is known goes on, refusals too.
        assert echoes(world.near, world.server.address, ECHO) == ""
        assert echoes(world.far, world.server.address, ECHO) == ""
        assert echoes(world.denied_near, world.server.address, ECHO, timeout=1) != ""
        assert echoes(world.denied_far, world.server.address, ECHO, timeout=3) != ""
        assert fetch(world.near, f"http://{world.service}/")[0]["status"] == 200
    finally:
        lab.start("controlplane")
    assert lab.roots.read_bytes() == roots
    lab.settle(timeout=20)
    assert near_far.exchange().ok
    near_far.end()
    # A pod that is new gets a certificate that the others accept.
    pod = lab.pod("after-controller", node="node2", namespace=NAMESPACE, service_account="good")
    assert echoes(pod, world.server.address, ECHO) == ""
    pod.delete()


def test_agent_starts_with_the_controller_away(lab: Lab, world: World):
    lab.kill("controlplane")
    try:
        lab.kill("node1", "agent")
        lab.start("node1", "agent")
        assert echoes(world.near, world.server.address, ECHO) == ""
        assert echoes(world.denied_near, world.server.address, ECHO, timeout=1) != ""
        assert echoes(world.far, world.server.address, ECHO) == ""
    finally:
        lab.start("controlplane")
    lab.settle(timeout=20)
