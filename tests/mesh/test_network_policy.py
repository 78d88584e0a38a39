"""Kubernetes NetworkPolicy, and authorization by address: on one node (kernel), across nodes (node proxy), behind l7proxy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from lab import Lab, Pod, Talker
from lab.processes import wait_until
from tests.mesh.helpers import (
    ECHO,
    HTTP,
    authorization_policy,
    echo_server,
    echoes,
    fetch,
    http_server,
)

pytestmark = pytest.mark.privileged

NAMESPACE = "netpol"
OTHER = "netpol-other"
SECOND = 9001
DATAGRAMS = 5354
EVERYBODY = ("alice", "bob", "carol")
PLACES = ("near", "far")


@dataclass(frozen=True)
class World:
    """A server, and clients on its own node (``near``) and on the other one (``far``); carol is of another namespace."""

    server: Pod
    web: Pod
    service: str
    clients: dict[tuple[str, str], Pod]


@pytest.fixture(scope="module")
def world(lab: Lab) -> World:
    lab.namespace(NAMESPACE)
    lab.namespace(OTHER, labels={"team": "other"})
    server = echo_server(lab, "server", node="node1", namespace=NAMESPACE, labels={"app": "server"})
    server.serve(server.app("tcp_server", SECOND, "--greet"), SECOND)
    web = http_server(lab, "web", node="node1", namespace=NAMESPACE, labels={"app": "web"})
    service = lab.service("web", 80, target_port=HTTP, namespace=NAMESPACE)
    clients = {
        (where, who): lab.pod(f"{who}-{where}", node=node, namespace=namespace, labels={"app": who})
        for where, node in (("near", "node1"), ("far", "node2"))
        for who, namespace in (("alice", NAMESPACE), ("bob", NAMESPACE), ("carol", OTHER))
    }
    lab.apply(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": NAMESPACE},
            "spec": {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]},
        }
    )
    lab.settle()
    return World(server, web, service, clients)


@pytest.fixture(autouse=True)
def no_policies(lab: Lab, world: World) -> Iterator[None]:
    yield
    for pattern in ("networkpolicy-*", "authorizationpolicy-*"):
        for path in lab.cluster.policies.glob(pattern):
            path.unlink()
    lab.settle()


def isolate(lab: Lab, app: str, *, name: str = "", namespace: str = NAMESPACE, **spec: Any) -> None:
    lab.apply(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name or app, "namespace": namespace},
            "spec": {"podSelector": {"matchLabels": {"app": app}}, **spec},
        }
    )


def each(world: World, asks: Callable[[Pod], bool]) -> dict[str, set[str]]:
    """Who of the clients gets through, near and far. All ask at once."""
    with ThreadPoolExecutor(len(world.clients)) as threads:
        outcomes = dict(zip(world.clients, threads.map(asks, world.clients.values()), strict=True))
    return {
        place: {who for (p, who), passed in outcomes.items() if p == place and passed} for place in PLACES
    }


def allowed(world: World, port: int = ECHO) -> dict[str, set[str]]:
    return each(world, lambda pod: echoes(pod, world.server.address, port, timeout=3) == "")


def both(*who: str) -> dict[str, set[str]]:
    """The same near and far."""
    return {place: set(who) for place in PLACES}


def peers(*found: Any, port: int = 0) -> dict[str, Any]:
    """One rule of ingress."""
    return {"from": list(found)} | ({"ports": [{"port": port}]} if port else {})


ALICE = {"podSelector": {"matchLabels": {"app": "alice"}}}
OTHERS = {"namespaceSelector": {"matchLabels": {"team": "other"}}}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        pytest.param([], (), id="default-deny"),
        pytest.param([{}], EVERYBODY, id="allow-all"),
        pytest.param([peers(ALICE)], ("alice",), id="pods"),
        pytest.param([peers(OTHERS)], ("carol",), id="namespaces"),
        pytest.param([peers({**OTHERS, **ALICE})], (), id="pods-of-namespaces"),
        pytest.param([peers(ALICE, port=SECOND), peers(OTHERS, port=ECHO)], ("carol",), id="ports"),
        pytest.param([{"ports": [{"port": 8000, "endPort": 9000}]}], EVERYBODY, id="range-of-ports"),
        pytest.param([{"ports": [{"port": ECHO, "protocol": "UDP"}]}], (), id="other-protocol"),
        pytest.param([peers({"ipBlock": {"cidr": "0.0.0.0/0"}})], EVERYBODY, id="every-address"),
        pytest.param([peers({"ipBlock": {"cidr": "192.0.2.0/24"}})], (), id="other-addresses"),
    ],
)
def test_ingress(lab: Lab, world: World, rules: list[dict[str, Any]], expected: tuple[str, ...]):
    isolate(lab, "server", ingress=rules)
    lab.settle()
    assert allowed(world) == both(*expected)


def test_a_block_of_addresses_and_its_exceptions(lab: Lab, world: World):
    blocks = {who: [f"{world.clients[p, who].address}/32" for p in PLACES] for who in EVERYBODY}
    isolate(lab, "server", ingress=[peers(*({"ipBlock": {"cidr": b}} for b in blocks["alice"]))])
    lab.settle()
    assert allowed(world) == both("alice")
    block = {"cidr": "0.0.0.0/0", "except": [*blocks["alice"], *blocks["bob"]]}
    isolate(lab, "server", ingress=[peers({"ipBlock": block})])
    lab.settle()
    assert allowed(world) == both("carol")


def test_policies_add_up_and_authorization_counts_too(lab: Lab, world: World):
    isolate(lab, "server", name="one", ingress=[peers(ALICE)])
    isolate(lab, "server", name="two", ingress=[peers(OTHERS)])
    lab.settle()
    assert allowed(world) == both("alice", "carol")
    deny = authorization_policy(
        "deny", NAMESPACE, action="DENY", rules=[{"from": [{"source": {"namespaces": [OTHER]}}]}]
    )
    lab.apply(deny)
    lab.settle()
    assert allowed(world) == both("alice")


def test_egress(lab: Lab, world: World):
    to_server = {"to": [{"podSelector": {"matchLabels": {"app": "server"}}}], "ports": [{"port": ECHO}]}
    isolate(lab, "alice", policyTypes=["Egress"])
    isolate(lab, "bob", policyTypes=["Egress"], egress=[to_server])
    lab.settle()
    assert allowed(world) == both("bob", "carol")
    assert allowed(world, SECOND) == both("carol")


def test_datagrams(lab: Lab, world: World):
    """UDP by the same policies: NetworkPolicy in both directions."""
    world.server.serve(world.server.app("udp", "serve", "0.0.0.0", DATAGRAMS))
    wait_until(
        lambda: f":{DATAGRAMS:04X} " in world.server.run(["/bin/cat", "/proc/net/udp"]).stdout,
        5.0,
        "it serves",
    )

    def answers() -> dict[str, set[str]]:
        return each(world, asks)

    def asks(pod: Pod) -> bool:
        done = pod.run(pod.app("udp", "ask", world.server.address, DATAGRAMS, "x"), check=False)
        return done.returncode == 0 and done.stdout.strip() == "x"

    assert answers() == both(*EVERYBODY)
    udp = {"port": DATAGRAMS, "protocol": "UDP"}
    isolate(lab, "server", ingress=[{"from": [ALICE, OTHERS], "ports": [udp]}])
    isolate(lab, "carol", namespace=OTHER, policyTypes=["Egress"], egress=[{"ports": [{"port": DATAGRAMS}]}])
    lab.settle()
    assert answers() == both("alice"), "carol may go there by TCP only"
    isolate(lab, "server", ingress=[{"ports": [{"port": DATAGRAMS}]}])
    lab.settle()
    assert answers() == both()


def answered(world: World) -> dict[str, set[str]]:
    """Who of the clients has an answer through l7proxy."""

    def asks(pod: Pod) -> bool:
        (answer,) = fetch(pod, f"http://{world.service}/")
        assert answer.get("status") in (None, 200, 403, 503), answer
        assert answer["seconds"] < 10, "nothing hangs"
        return answer.get("status") == 200

    return each(world, asks)


def test_ingress_through_l7proxy(lab: Lab, world: World):
    isolate(lab, "web", ingress=[peers(ALICE, OTHERS, port=HTTP)])
    lab.settle()
    assert answered(world) == both("alice", "carol")
    isolate(lab, "web", ingress=[peers(ALICE, port=80)])
    lab.settle()
    assert answered(world) == both()


def test_egress_through_l7proxy(lab: Lab, world: World):
    """The endpoint that the proxy chose is judged, by its own port; not the service that was dialled."""
    web = {"to": [{"podSelector": {"matchLabels": {"app": "web"}}}]}
    isolate(lab, "alice", policyTypes=["Egress"], egress=[{**web, "ports": [{"port": HTTP}]}])
    isolate(lab, "bob", policyTypes=["Egress"], egress=[{**web, "ports": [{"port": 80}]}])
    lab.settle()
    assert answered(world) == both("alice", "carol")


@pytest.mark.parametrize(
    ("action", "field", "expected"),
    [
        ("ALLOW", "ipBlocks", ("alice",)),
        ("ALLOW", "notIpBlocks", ("bob", "carol")),
        ("DENY", "ipBlocks", ("bob", "carol")),
        ("DENY", "notIpBlocks", ("alice",)),
    ],
)
def test_authorization_by_address(lab: Lab, world: World, action: str, field: str, expected: tuple[str, ...]):
    source = {field: [f"{world.clients[place, 'alice'].address}/32" for place in PLACES]}
    policy = authorization_policy(
        "by-address",
        NAMESPACE,
        action=action,
        selector={"app": "server"},
        rules=[{"from": [{"source": source}]}],
    )
    lab.apply(policy)
    lab.settle()
    assert allowed(world) == both(*expected)


@pytest.mark.parametrize("where", ["near", "far"])
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_what_is_no_longer_allowed_ends(lab: Lab, world: World, where: str, direction: str):
    """Within a second of the file's rename; what is still allowed goes on."""
    alice, bob = (world.clients[where, who] for who in ("alice", "bob"))
    with Talker(alice) as ended, Talker(bob) as unaffected:
        for talker in (ended, unaffected):
            assert talker.open(world.server.address, ECHO).ok
            assert talker("read")["text"]
            assert talker.exchange().ok
        since = time.monotonic()
        if direction == "ingress":
            isolate(lab, "server", ingress=[peers({"podSelector": {"matchLabels": {"app": "bob"}}})])
        else:
            isolate(lab, "alice", policyTypes=["Egress"])
        while ended.exchange(timeout=5.0).ok:
            assert time.monotonic() < since + 5
            time.sleep(0.005)
        assert time.monotonic() - since < 1.0
        assert unaffected.exchange().ok
