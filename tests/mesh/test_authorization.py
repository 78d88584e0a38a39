"""AuthorizationPolicy at L4: the same verdicts on one node (kernel), across nodes (node proxy) and behind l7proxy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lab import Lab, Pod
from tests.mesh.helpers import (
    ECHO,
    HTTP,
    authorization_policy,
    echo_server,
    echoes,
    fetch,
    http_server,
    rule,
)

pytestmark = pytest.mark.privileged

NAMESPACE = "authz"
OTHER = "authz-other"
OUTSIDE = "authz-outside"
SECOND = 9001


@dataclass(frozen=True)
class World:
    """A server, and clients of three identities on its own node (``near``) and on the other one (``far``)."""

    server: Pod
    web: Pod
    service: str
    clients: dict[tuple[str, str], Pod]
    stranger: Pod


@pytest.fixture(scope="module")
def world(lab: Lab) -> World:
    lab.namespace(NAMESPACE)
    lab.namespace(OTHER)
    lab.namespace(OUTSIDE, mesh=False)
    server = echo_server(lab, "server", node="node1", namespace=NAMESPACE)
    server.serve(server.app("tcp_server", SECOND, "--greet"), SECOND)
    web = http_server(lab, "web", node="node1", namespace=NAMESPACE)
    service = lab.service("web", 80, target_port=HTTP, namespace=NAMESPACE)
    clients = {
        (where, who): lab.pod(
            f"{who}-{where}", node=node, namespace=namespace, service_account=who, labels={"app": who}
        )
        for where, node in (("near", "node1"), ("far", "node2"))
        for who, namespace in (("alice", NAMESPACE), ("bob", NAMESPACE), ("carol", OTHER))
    }
    stranger = lab.pod("stranger", node="node2", namespace=OUTSIDE)
    # Routes make the service L7, so that its clients go through l7proxy.
    lab.apply(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": NAMESPACE},
            "spec": {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]},
        }
    )
    lab.settle()
    return World(server, web, service, clients, stranger)


@pytest.fixture(autouse=True)
def no_policies(lab: Lab, world: World) -> Iterator[None]:
    yield
    for path in lab.cluster.policies.glob("authorizationpolicy-*"):
        path.unlink()
    lab.settle()


def allowed(world: World, where: str, port: int = ECHO) -> set[str]:
    """Who of the clients gets through."""
    return {
        who
        for (place, who), pod in world.clients.items()
        if place == where and echoes(pod, world.server.address, port, timeout=5) == ""
    }


EVERYBODY = {"alice", "bob", "carol"}


@pytest.mark.parametrize("where", ["near", "far"])
@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        pytest.param([], EVERYBODY, id="none"),
        pytest.param([("ALLOW", [])], set(), id="allow-nothing"),
        pytest.param([("ALLOW", [{}])], EVERYBODY, id="allow-all"),
        pytest.param([("ALLOW", [rule(principals=["authz/alice"])])], {"alice"}, id="principal"),
        pytest.param([("ALLOW", [rule(namespaces=["authz-other"])])], {"carol"}, id="namespace"),
        pytest.param([("ALLOW", [rule(namespaces=["authz"])])], {"alice", "bob"}, id="own-namespace"),
        pytest.param([("DENY", [rule(principals=["authz/alice"])])], {"bob", "carol"}, id="deny"),
        pytest.param(
            [("ALLOW", [rule(namespaces=["authz"])]), ("DENY", [rule(principals=["authz/bob"])])],
            {"alice"},
            id="deny-goes-before-allow",
        ),
        pytest.param(
            [("ALLOW", [rule(principals=["authz/alice"])]), ("ALLOW", [rule(namespaces=["authz-other"])])],
            {"alice", "carol"},
            id="allows-add-up",
        ),
        pytest.param([("ALLOW", [rule(principals=["authz/alice"], ports=[SECOND])])], set(), id="other-port"),
        pytest.param([("ALLOW", [rule(ports=[ECHO])])], EVERYBODY, id="port"),
        pytest.param([("DENY", [rule(ports=[ECHO])])], set(), id="deny-port"),
    ],
)
def test_who_gets_through(
    lab: Lab, world: World, where: str, policies: list[tuple[str, list[dict[str, Any]]]], expected: set[str]
):
    for number, (action, rules) in enumerate(policies):
        lab.apply(
            authorization_policy(
                f"policy-{number}", NAMESPACE, action=action, selector={"app": "server"}, rules=rules
            )
        )
    lab.settle()
    assert allowed(world, where) == expected


@pytest.mark.parametrize("where", ["near", "far"])
def test_ports_are_judged_each_for_itself(lab: Lab, world: World, where: str):
    lab.apply(
        authorization_policy(
            "ports",
            NAMESPACE,
            selector={"app": "server"},
            rules=[
                rule(principals=["authz/alice"], ports=[ECHO]),
                rule(principals=["authz/bob"], ports=[SECOND]),
            ],
        )
    )
    lab.settle()
    assert allowed(world, where, ECHO) == {"alice"}
    assert allowed(world, where, SECOND) == {"bob"}


@pytest.mark.parametrize("where", ["near", "far"])
@pytest.mark.parametrize(
    ("action", "who", "expected"),
    [("ALLOW", "alice", {"alice"}), ("DENY", "alice", {"bob", "carol"})],
)
def test_the_same_verdicts_through_l7proxy(
    lab: Lab, world: World, where: str, action: str, who: str, expected: set[str]
):
    lab.apply(
        authorization_policy(
            "web",
            NAMESPACE,
            action=action,
            selector={"app": "web"},
            rules=[rule(principals=[f"{NAMESPACE}/{who}"])],
        )
    )
    lab.settle()
    answers = {
        who: fetch(pod, f"http://{world.service}/")[0]
        for (place, who), pod in world.clients.items()
        if place == where
    }
    assert {who for who, answer in answers.items() if answer.get("status") == 200} == expected, answers
    # The refused are told by the proxy, or cut off; nothing hangs and nothing slips through.
    for who, answer in answers.items():
        if who not in expected:
            assert answer.get("status") in (None, 403, 503), answer
            assert answer["seconds"] < 10


@pytest.mark.parametrize("where", ["near", "far"])
def test_dialling_the_pod_itself_goes_around_nothing(lab: Lab, world: World, where: str):
    lab.apply(
        authorization_policy(
            "web", NAMESPACE, selector={"app": "web"}, rules=[rule(principals=["authz/alice"])]
        )
    )
    lab.settle()
    url = f"http://{world.web.address}:{HTTP}/"
    answers = {who: fetch(pod, url)[0] for (place, who), pod in world.clients.items() if place == where}
    assert {who for who, answer in answers.items() if answer.get("status") == 200} == {"alice"}, answers


def test_plain_connection_has_no_identity(lab: Lab, world: World):
    # PERMISSIVE, and no policy: it passes.
    assert echoes(world.stranger, world.server.address, ECHO) == ""
    # A rule that asks for an identity never matches it, so ALLOW refuses it, and DENY lets it be.
    lab.apply(
        authorization_policy(
            "who",
            NAMESPACE,
            selector={"app": "server"},
            rules=[rule(principals=["authz/alice"]), rule(namespaces=["*"])],
        )
    )
    lab.settle()
    assert echoes(world.stranger, world.server.address, ECHO, timeout=3) != ""
    lab.apply(
        authorization_policy(
            "who",
            NAMESPACE,
            action="DENY",
            selector={"app": "server"},
            rules=[rule(namespaces=["authz-outside"])],
        )
    )
    lab.settle()
    assert echoes(world.stranger, world.server.address, ECHO) == ""
    # A rule without a source matches everybody.
    lab.apply(
        authorization_policy("who", NAMESPACE, selector={"app": "server"}, rules=[rule(ports=[ECHO])]),
    )
    lab.settle()
    assert echoes(world.stranger, world.server.address, ECHO) == ""


def test_a_pod_with_raw_sockets_cannot_take_another_s_name(lab: Lab, world: World):
    """An address says nothing: bob takes alice's and is still nobody."""
    lab.apply(
        authorization_policy(
            "who", NAMESPACE, selector={"app": "server"}, rules=[rule(principals=["authz/alice"])]
        )
    )
    lab.settle()
    alice, bob = world.clients["near", "alice"], world.clients["near", "bob"]
    script = (
        "import socket,sys; s=socket.socket(); s.bind((sys.argv[1],0)); s.settimeout(3);"
        "s.connect((sys.argv[2],int(sys.argv[3]))); print(s.recv(100))"
    )
    command = ["/usr/bin/python3", "-c", script, alice.address, world.server.address, str(ECHO)]
    bob.run(["ip", "address", "add", f"{alice.address}/32", "dev", "lo"])
    try:
        done = bob.run(command, check=False)
        assert done.returncode != 0
        assert "peer" not in done.stdout
    finally:
        bob.run(["ip", "address", "del", f"{alice.address}/32", "dev", "lo"])
