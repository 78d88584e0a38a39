"""PERMISSIVE and STRICT, from inside and outside of the mesh, with the seed files 02 and 13 as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from lab import Lab, Place, Pod
from tests.mesh.helpers import ECHO, echo_server, echoes, peer_authentication, seed

pytestmark = pytest.mark.privileged

SECOND = 9002


@dataclass(frozen=True)
class World:
    servers: dict[str, Pod]
    inside: dict[str, Pod]
    plain: dict[str, Pod]
    outsider: Place


@pytest.fixture(scope="module")
def world(lab: Lab) -> Iterator[World]:
    lab.namespace("dev")
    lab.namespace("modes-plain", mesh=False)
    servers = {}
    for namespace in ("dev", "default"):
        server = echo_server(lab, f"modes-{namespace}", node="node1", namespace=namespace)
        server.serve(server.app("tcp_server", SECOND, "--greet"), SECOND)
        servers[namespace] = server
    nodes = {"near": "node1", "far": "node2"}
    inside = {
        where: lab.pod(f"modes-{where}", node=node, namespace="default") for where, node in nodes.items()
    }
    plain = {
        where: lab.pod(f"plain-{where}", node=node, namespace="modes-plain") for where, node in nodes.items()
    }
    world = World(servers, inside, plain, lab.outsider("modes-out"))
    lab.settle()
    yield world
    for pod in (*servers.values(), *inside.values(), *plain.values()):
        pod.delete()


def check(world: World, namespace: str, *, plain_passes: bool) -> None:
    server = world.servers[namespace]
    for port in (ECHO, SECOND):
        for pod in world.inside.values():
            assert echoes(pod, server.address, port) == ""
        for place in (*world.plain.values(), world.outsider):
            assert (echoes(place, server.address, port, timeout=2) == "") is plain_passes, place.name


def test_permissive_passes_plain_connections(world: World):
    for namespace in world.servers:
        check(world, namespace, plain_passes=True)


@pytest.mark.parametrize(
    ("number", "namespace", "other"), [("02", "dev", "default"), ("13", "default", "dev")]
)
def test_strict_seed_refuses_plain_connections_on_every_port(
    lab: Lab, world: World, number: str, namespace: str, other: str
):
    assert not list(lab.cluster.policies.glob(f"{number}-*"))
    with lab.applied(seed(number)):
        check(world, namespace, plain_passes=False)
        check(world, other, plain_passes=True)
    check(world, namespace, plain_passes=True)


def test_probes_pass_under_strict_and_only_by_their_cgroup(lab: Lab, world: World):
    server = world.servers["dev"]
    node = lab.node("node1")
    assert lab.probe(server, ECHO)
    with lab.applied(seed("02")):
        assert lab.probe(server, ECHO)
        assert lab.probe(server, SECOND)
        assert not lab.probe(server, 9999)
        # The same dial from the same place, by a process that is not the kubelet's.
        other = node.run(node.app("dial", server.address, ECHO, "--timeout", 1), check=False)
        assert other.returncode != 0


def test_port_level_exception(lab: Lab, world: World):
    policy = peer_authentication("dev", "STRICT", name="by-port")
    policy["spec"]["selector"] = {"matchLabels": {"app": "modes-dev"}}
    policy["spec"]["portLevelMtls"] = {str(SECOND): {"mode": "PERMISSIVE"}}
    server = world.servers["dev"]
    with lab.applied(policy):
        assert echoes(world.outsider, server.address, ECHO, timeout=2) != ""
        assert echoes(world.outsider, server.address, SECOND) == ""


def test_a_plain_dial_from_an_enrolled_pod_s_address_is_refused(lab: Lab, world: World):
    """An enrolled pod's traffic comes by HBONE or not at all: a packet with its address from elsewhere is a forgery."""
    server, victim = world.servers["default"], world.inside["far"]
    node = lab.node("node2")
    node.run(["ip", "address", "add", f"{victim.address}/32", "dev", "lo"])
    try:
        script = (
            "import socket,sys; s=socket.socket(); s.bind((sys.argv[1],0)); s.settimeout(2);"
            "s.connect((sys.argv[2],int(sys.argv[3]))); print('connected')"
        )
        done = node.run(
            ["/usr/bin/python3", "-c", script, victim.address, server.address, str(ECHO)], check=False
        )
        assert "connected" not in done.stdout
    finally:
        node.run(["ip", "address", "del", f"{victim.address}/32", "dev", "lo"])
