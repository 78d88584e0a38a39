"""A change of policy: new connections are judged by it, and established ones that it no longer allows end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from lab import Lab, Pod, Talker
from tests.mesh.helpers import (
    ECHO,
    authorization_policy,
    echo_server,
    peer_authentication,
    rule,
)

pytestmark = pytest.mark.privileged

NAMESPACE = "change"
OUTSIDE = "change-outside"
#: Seconds from the file's rename to the moment when nothing refused goes on.
BAR = 1.0


@dataclass(frozen=True)
class World:
    server: Pod
    clients: dict[str, Pod]


@pytest.fixture(scope="module")
def world(lab: Lab) -> World:
    lab.namespace(NAMESPACE)
    lab.namespace(OUTSIDE, mesh=False)
    server = echo_server(lab, "server", node="node1", namespace=NAMESPACE)
    clients = {
        "near": lab.pod("near", node="node1", namespace=NAMESPACE, service_account="near"),
        "far": lab.pod("far", node="node2", namespace=NAMESPACE, service_account="far"),
        "other-near": lab.pod("other-near", node="node1", namespace=NAMESPACE, service_account="other"),
        "other-far": lab.pod("other-far", node="node2", namespace=NAMESPACE, service_account="other"),
        "plain": lab.pod("plain", node="node2", namespace=OUTSIDE),
    }
    lab.settle()
    return World(server, clients)


@pytest.fixture(autouse=True)
def no_policies(lab: Lab, world: World) -> Iterator[None]:
    yield
    for path in lab.cluster.policies.glob("*-change-*"):
        path.unlink()
    lab.settle()


def connect(talker: Talker, server: Pod) -> None:
    opened = talker.open(server.address, ECHO)
    assert opened.ok, opened.error
    assert talker("read")["text"]
    assert talker.exchange().ok


def seconds_until_it_ends(talker: Talker, since: float, patience: float = 5.0) -> float:
    while time.monotonic() < since + patience:
        if not talker.exchange(timeout=patience).ok:
            return time.monotonic() - since
        time.sleep(0.005)
    raise AssertionError(f"the connection goes on after {patience} s")


@pytest.mark.parametrize("where", ["near", "far"])
def test_established_connection_ends_and_new_ones_are_denied_within_a_second(
    lab: Lab, world: World, where: str
):
    other = world.clients[f"other-{where}"]
    with Talker(world.clients[where]) as talker, Talker(other) as unaffected:
        connect(talker, world.server)
        connect(unaffected, world.server)
        began = time.monotonic()
        lab.apply(
            authorization_policy(
                "deny", NAMESPACE, action="DENY", rules=[rule(principals=[f"{NAMESPACE}/{where}"])]
            )
        )
        ended = seconds_until_it_ends(talker, began)
        denied = talker.open(world.server.address, ECHO, "again", timeout=2)
        answer = talker("read", "again", timeout=2) if denied.ok else denied
        refused = time.monotonic() - began
        assert not answer.ok or answer["text"] == ""
        assert ended < BAR
        assert refused < BAR + 2
        assert unaffected.exchange(times=10).ok
    print(f"{where}: established ended after {ended * 1000:.0f} ms")


@pytest.mark.parametrize("where", ["near", "far"])
def test_new_connections_are_denied_within_a_second(lab: Lab, world: World, where: str):
    with Talker(world.clients[where]) as talker:
        connect(talker, world.server)
        began = time.monotonic()
        lab.apply(
            authorization_policy(
                "deny", NAMESPACE, action="DENY", rules=[rule(principals=[f"{NAMESPACE}/{where}"])]
            )
        )
        last_good = 0.0
        while time.monotonic() < began + 2:
            at = time.monotonic()
            opened = talker.open(world.server.address, ECHO, "probe", timeout=0.5)
            if opened.ok:
                answer = talker("read", "probe", timeout=0.5)
                if answer.ok and answer["text"]:
                    last_good = at - began
                talker.close("probe", how="rst")
        assert last_good < BAR


def test_a_handshake_that_ends_long_after_the_change_admits_nobody(lab: Lab, world: World):
    """The client's ACK is held back until the agent has walked over all connections."""
    server = world.server
    hold = (
        "add table ip late; add chain ip late input { type filter hook input priority 0; };"
        f" add rule ip late input ip saddr {world.clients['near'].address} tcp dport {ECHO}"
        " tcp flags & (syn | ack) == ack drop"
    )
    with Talker(world.clients["near"]) as talker:
        server.run(["nft", hold])
        try:
            opened = talker.open(server.address, ECHO)
            assert opened.ok, opened.error
            lab.apply(authorization_policy("deny", NAMESPACE, action="DENY", rules=[{}]))
            lab.settle()
            time.sleep(0.5)
        finally:
            server.run(["nft", "delete table ip late"])
        # The server greets once the handshake is over, which is when its SYN-ACK was sent again.
        talker("read", timeout=4)
        assert seconds_until_it_ends(talker, time.monotonic()) < BAR


def test_a_change_that_says_the_same_ends_nothing(lab: Lab, world: World):
    with Talker(world.clients["near"]) as near, Talker(world.clients["far"]) as far:
        for talker in (near, far):
            connect(talker, world.server)
        lab.apply(authorization_policy("all", NAMESPACE, rules=[rule(namespaces=[NAMESPACE])]))
        lab.settle()
        for talker in (near, far):
            assert talker.exchange(times=20).ok
        lab.apply(
            authorization_policy(
                "all", NAMESPACE, rules=[rule(principals=[f"{NAMESPACE}/near", f"{NAMESPACE}/far"])]
            )
        )
        lab.settle()
        for talker in (near, far):
            assert talker.exchange(times=20).ok


def test_strict_ends_plain_connections_and_leaves_the_others(lab: Lab, world: World):
    with Talker(world.clients["plain"]) as plain, Talker(world.clients["far"]) as far:
        for talker in (plain, far):
            connect(talker, world.server)
        began = time.monotonic()
        lab.apply(peer_authentication(NAMESPACE, "STRICT"))
        assert seconds_until_it_ends(plain, began) < BAR
        assert far.exchange(times=20).ok


def test_denied_and_allowed_again(lab: Lab, world: World):
    with Talker(world.clients["near"]) as near, Talker(world.clients["far"]) as far:
        for turn in range(3):
            lab.apply(authorization_policy("deny", NAMESPACE, action="DENY", rules=[{}]))
            lab.settle()
            for talker in (near, far):
                opened = talker.open(world.server.address, ECHO, f"{turn}-denied", timeout=1)
                answer = talker("read", f"{turn}-denied", timeout=2) if opened.ok else opened
                assert not answer.ok or answer["text"] == ""
            lab.withdraw(f"authorizationpolicy-{NAMESPACE}-deny.yaml")
            lab.settle()
            for talker in (near, far):
                assert talker.open(world.server.address, ECHO, f"{turn}").ok
                assert talker("read", f"{turn}")["text"]
