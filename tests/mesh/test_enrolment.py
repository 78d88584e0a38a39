"""Pods that run already come into the mesh and leave it, on both nodes at once, under traffic.

Nothing that is open ends, no connection and no request fails.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lab import Lab, Pod, Talker, Traffic
from tests.mesh.helpers import ECHO, HTTP, echo_server, echoes, http_server, peer_authentication

pytestmark = pytest.mark.privileged

NODES = ("node1", "node2")
PLAIN_ECHO = 9001  #: of the same pods, without a greeting


@dataclass(frozen=True)
class World:
    namespace: str
    pods: dict[str, Pod]  #: ``client1``, ``server2`` and so on, by what they do and where
    service: str


@contextlib.contextmanager
def before_the_plugin(lab: Lab) -> Iterator[None]:
    """Pods that are made inside never came by our plugin."""
    try:
        for name in NODES:
            lab.node(name).mesh = False
            lab.node(name).configure_network()
        yield
    finally:
        for name in NODES:
            lab.node(name).mesh = True
            lab.node(name).configure_network()


@pytest.fixture(params=["came by CNI ADD", "older than the plugin"])
def world(lab: Lab, request: pytest.FixtureRequest) -> Iterator[World]:
    old = request.param == "older than the plugin"
    namespace = "old" if old else "young"
    lab.namespace(namespace, mesh=False)
    pods: dict[str, Pod] = {}
    with before_the_plugin(lab) if old else contextlib.nullcontext():
        for number, node in enumerate(NODES, 1):
            pods[f"client{number}"] = lab.pod(f"client{number}", node=node, namespace=namespace)
            pods[f"client{number}"].serve(["/bin/sleep", "3600"])
            pods[f"server{number}"] = echo_server(lab, f"server{number}", node=node, namespace=namespace)
            pods[f"server{number}"].serve(pods[f"server{number}"].app("tcp_server", PLAIN_ECHO), PLAIN_ECHO)
            pods[f"web{number}"] = http_server(
                lab, f"web{number}", node=node, namespace=namespace, labels={"app": "web"}
            )
    service = lab.service("web", 80, target_port=HTTP, namespace=namespace)
    lab.settle()
    yield World(namespace, pods, service)
    lab.namespace(namespace, mesh=False)
    for pod in pods.values():
        pod.delete()
    lab.settle()


def stages(lab: Lab, world: World) -> dict[str, str]:
    """By the name of each of this world's pods that its agent knows of."""
    return {
        row["name"]: row["stage"]
        for node in NODES
        for row in lab.get_json(node, "agent", "/debug/pods")
        if row["namespace"] == world.namespace
    }


def enrolled(lab: Lab, world: World) -> bool:
    found = stages(lab, world)
    return set(found) == set(world.pods) and set(found.values()) == {"enrolled"}


def left(lab: Lab, world: World) -> bool:
    return set(stages(lab, world).values()) == {""}


def label(lab: Lab, world: World, **labels: str) -> None:
    lab.namespace(world.namespace, labels, mesh=bool(labels))


def failures(traffic: dict[str, Traffic]) -> dict[str, list[Any]]:
    found = {}
    for name, one in traffic.items():
        records = one.end(at_least=31)
        assert len(records) > 30, f"{name}: {len(records)} connections"
        print(f"{name}: {len(records)} connections, slowest {max(r['seconds'] for r in records):.2f} s")
        if bad := [record for record in records if record["outcome"] != "ok"]:
            found[name] = bad
    return found


def steady(world: World) -> dict[str, Traffic]:
    """New connections from every client to every server, on the same node and on the other."""
    return {
        f"{client} to {server}": Traffic.echo(
            world.pods[client], world.pods[server].address, ECHO, interval=0.02
        )
        for client in ("client1", "client2")
        for server in ("server1", "server2")
    }


def test_join_and_leave_under_traffic(lab: Lab, world: World):
    pods = world.pods
    with contextlib.ExitStack() as stack:
        talkers = [stack.enter_context(Talker(pods[name])) for name in ("client1", "client2")]

        def open_all(generation: str) -> None:
            for talker in talkers:
                for server in ("server1", "server2"):
                    assert talker.open(pods[server].address, PLAIN_ECHO, f"{generation} {server}").ok

        def all_work(*generations: str) -> None:
            for talker in talkers:
                for generation in generations:
                    for server in ("server1", "server2"):
                        answer = talker.exchange(f"{generation} {server}")
                        assert answer.ok, (generation, server, answer)

        open_all("before")
        traffic = steady(world)
        time.sleep(1.0)

        label(lab, world, **{"istio.io/dataplane-mode": "ambient"})
        lab.settle()
        open_all("joining")
        lab.wait(
            lambda: enrolled(lab, world), 15, "all pods are enrolled", explain=lambda: stages(lab, world)
        )
        open_all("inside")
        all_work("before", "joining", "inside")
        time.sleep(1.0)
        assert failures(traffic) == {}

        # What is dialled now is the mesh's: between the nodes nothing is plain text, on one node it has an identity.
        marker = b"in the mesh, not to be read " + world.namespace.encode()
        with lab.capture() as capture:
            done = pods["client1"].run(
                pods["client1"].app("traffic", pods["server2"].address, ECHO, "--count", 5, "--greeted")
            )
            assert '"ok"' in done.stdout
            ports = {segment[3] for segment in capture.segments() if segment[0] == pods["client1"].address}
            assert ports == {15008}, (ports, marker)

        traffic = steady(world)
        time.sleep(1.0)
        label(lab, world)
        lab.settle()
        open_all("leaving")
        all_work("before", "joining", "inside", "leaving")
        lab.wait(lambda: left(lab, world), 15, "all pods have left", explain=lambda: stages(lab, world))
        all_work("before", "joining", "inside", "leaving")
        time.sleep(1.0)
        assert failures(traffic) == {}
        open_all("outside")
        all_work("before", "joining", "inside", "leaving", "outside")
        with lab.capture() as capture:
            assert echoes(pods["client1"], pods["server2"].address, ECHO) == ""
            ports = {segment[3] for segment in capture.segments() if segment[0] == pods["client1"].address}
            assert ECHO in ports

        # And once more in, with what has seen it all.
        label(lab, world, **{"istio.io/dataplane-mode": "ambient"})
        lab.wait(
            lambda: enrolled(lab, world), 15, "all pods are enrolled", explain=lambda: stages(lab, world)
        )
        all_work("before", "joining", "inside", "leaving", "outside")


@contextlib.contextmanager
def hears_late(lab: Lab, node: str, seconds: float) -> Iterator[None]:
    """What is changed inside the node's agent learns of so much later than all others."""
    agent = lab.process(node, "agent")
    agent.signal(signal.SIGSTOP)
    try:
        yield
        time.sleep(seconds)
    finally:
        agent.signal(signal.SIGCONT)


@pytest.mark.parametrize("late", NODES)
def test_a_node_that_hears_late_refuses_nobody(lab: Lab, world: World, late: str):
    """STRICT, so that no plain text of others passes by chance: whoever joins or leaves is dialled as its own node expects it."""
    with lab.applied(peer_authentication(world.namespace, "STRICT")):
        traffic = steady(world)
        time.sleep(0.5)
        with hears_late(lab, late, 1.0):
            label(lab, world, **{"istio.io/dataplane-mode": "ambient"})
        lab.wait(
            lambda: enrolled(lab, world), 15, "all pods are enrolled", explain=lambda: stages(lab, world)
        )
        time.sleep(0.5)
        assert failures(traffic) == {}
        traffic = steady(world)
        time.sleep(0.5)
        with hears_late(lab, late, 1.0):
            label(lab, world)
        lab.wait(lambda: left(lab, world), 15, "all pods have left", explain=lambda: stages(lab, world))
        time.sleep(0.5)
        assert failures(traffic) == {}


@pytest.mark.parametrize("late", NODES)
def test_requests_of_an_open_connection_go_on_when_both_ends_leave(lab: Lab, world: World, late: str):
    """Through l7proxy, to endpoints of both nodes, one connection for all requests, none of which is tried again."""
    label(lab, world, **{"istio.io/dataplane-mode": "ambient"})
    route = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "web", "namespace": world.namespace},
        "spec": {
            "hosts": ["web"],
            "http": [{"route": [{"destination": {"host": "web"}}], "retries": {"attempts": 0}}],
        },
    }
    with lab.applied([route, peer_authentication(world.namespace, "STRICT")]):
        lab.wait(
            lambda: enrolled(lab, world), 15, "all pods are enrolled", explain=lambda: stages(lab, world)
        )
        options = ["--count", 1_000_000, "--per-connection", 1_000_000, "--interval", 0.01]
        traffic = Traffic(world.pods["client1"], "http_client", f"http://{world.service}/", *options)
        time.sleep(1.0)
        with hears_late(lab, late, 1.0):
            label(lab, world)
        lab.wait(lambda: left(lab, world), 15, "all pods have left", explain=lambda: stages(lab, world))
        time.sleep(1.0)
        records = traffic.end(at_least=201)
    assert len(records) > 200
    assert [record for record in records if record.get("status") != 200] == []
    assert {record["body"]["pod"] for record in records} == {"web1", "web2"}
    assert len({str(record["local"]) for record in records}) == 1


def test_joining_under_strict(lab: Lab, world: World):
    """Whoever joins together with those that it talks to loses nothing; whoever stays outside is refused at the end."""
    lab.namespace("outside", mesh=False)
    outside = lab.pod(f"outside-{world.namespace}", node="node1", namespace="outside")
    pods = world.pods
    with lab.applied(peer_authentication(world.namespace, "STRICT")), Talker(outside) as talker:
        assert talker.open(pods["server2"].address, PLAIN_ECHO).ok
        traffic = steady(world)
        time.sleep(0.5)
        label(lab, world, **{"istio.io/dataplane-mode": "ambient"})
        lab.wait(
            lambda: enrolled(lab, world), 15, "all pods are enrolled", explain=lambda: stages(lab, world)
        )
        time.sleep(0.5)
        assert failures(traffic) == {}
        for server in ("server1", "server2"):
            assert echoes(outside, pods[server].address, ECHO) != ""
        # It is older than the mesh there.
        assert talker.exchange().ok
        label(lab, world)
        lab.wait(lambda: left(lab, world), 15, "all pods have left", explain=lambda: stages(lab, world))
        for server in ("server1", "server2"):
            assert echoes(outside, pods[server].address, ECHO) == ""
    outside.delete()


def test_one_pod_out_of_many(lab: Lab, world: World):
    """A label on the pod itself; and an agent that is killed on the way goes on where it was."""
    pods = world.pods
    traffic = steady(world)
    label(lab, world, **{"istio.io/dataplane-mode": "ambient"})
    lab.kill("node1", "agent")
    lab.start("node1", "agent")
    lab.wait(lambda: enrolled(lab, world), 20, "all pods are enrolled", explain=lambda: stages(lab, world))
    assert failures(traffic) == {}
    traffic = steady(world)
    record = pods["server2"].record
    record.labels = {**record.labels, "istio.io/dataplane-mode": "none"}
    pods["server2"].set_ready(True)
    lab.wait(lambda: stages(lab, world)["server2"] == "", 15, "server2 has left")
    time.sleep(0.5)
    assert failures(traffic) == {}
    found = stages(lab, world)
    assert {name for name, stage in found.items() if stage == "enrolled"} == set(pods) - {"server2"}
    # It comes back among those that are in the mesh and dial it all the time.
    traffic = steady(world)
    del record.labels["istio.io/dataplane-mode"]
    pods["server2"].set_ready(True)
    lab.wait(lambda: enrolled(lab, world), 15, "server2 is back", explain=lambda: stages(lab, world))
    assert failures(traffic) == {}
