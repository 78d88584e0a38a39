"""Bytes and connections are what the applications wrote and read: on both paths, open connections too, never twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest

from lab import Lab, Metrics, Pod, Talker
from tests.mesh.helpers import ECHO, HTTP, echo_server, events, eventually, fetch, http_server, principal

pytestmark = pytest.mark.privileged

NAMESPACE = "accounts"
OPENED = "istio_tcp_connections_opened_total"
CLOSED = "istio_tcp_connections_closed_total"
SENT = "istio_tcp_sent_bytes_total"
RECEIVED = "istio_tcp_received_bytes_total"


@dataclass(frozen=True)
class World:
    server: Pod
    clients: dict[str, Pod]


@pytest.fixture(scope="module")
def world(lab: Lab) -> World:
    lab.namespace(NAMESPACE)
    server = echo_server(lab, "server", node="node1", namespace=NAMESPACE, service_account="server")
    clients = {
        where: lab.pod(f"client-{where}", node=node, namespace=NAMESPACE, service_account=f"client-{where}")
        for where, node in (("near", "node1"), ("far", "node2"))
    }
    lab.settle()
    return World(server, clients)


@dataclass(frozen=True)
class Totals:
    """One side's figures of what one client did, over all processes of both nodes."""

    opened: float
    closed: float
    #: as Istio has it: ``received`` is what the client sent, ``sent`` what the server answered
    received: float
    sent: float

    def __sub__(self, other: Totals) -> Totals:
        return Totals(
            self.opened - other.opened,
            self.closed - other.closed,
            self.received - other.received,
            self.sent - other.sent,
        )


def settled(read: Callable[[], Totals], expected: Totals) -> Totals:
    """What is read, once it is as expected or stays otherwise. Figures that go beyond it do not come back."""
    eventually(lambda: read() == expected)
    time.sleep(0.2)
    return read()


def scrapes(lab: Lab) -> list[Metrics]:
    return [lab.metrics(node.name, component) for node in lab.nodes for component in ("agent", "nodeproxy")]


def totals(lab: Lab, reporter: str, client: Pod, server: Pod) -> Totals:
    labels = {
        "reporter": reporter,
        "source_principal": "spiffe://" + principal(NAMESPACE, client.record.service_account),
        "destination_principal": "spiffe://" + principal(NAMESPACE, server.record.service_account),
        "destination_workload": server.record.owner,
    }
    found = scrapes(lab)
    return Totals(*(sum(m.total(name, **labels) for m in found) for name in (OPENED, CLOSED, RECEIVED, SENT)))


@pytest.mark.parametrize("where", ["near", "far"])
def test_counts_are_what_applications_wrote_and_read(lab: Lab, world: World, where: str):
    client, server = world.clients[where], world.server
    before = {reporter: totals(lab, reporter, client, server) for reporter in ("source", "destination")}
    seen_before = len(events(server, "close"))

    def since(reporter: str) -> Totals:
        return totals(lab, reporter, client, server) - before[reporter]

    written = read = 0
    with Talker(client) as talker:
        for number in range(5):
            assert talker.open(server.address, ECHO, f"{number}").ok
            read += len(talker("read", f"{number}")["text"])
            answer = talker.exchange(f"{number}", size=1000 + number, times=30)
            assert answer.ok, answer.error
            written += (1000 + number) * 30
            read += (1000 + number) * 30
        # While they are open: nothing is closed, every byte is counted.
        open_now = Totals(opened=5, closed=0, received=written, sent=read)
        for reporter in ("source", "destination"):
            assert settled(partial(since, reporter), open_now) == open_now, reporter
        for number in range(3):
            talker.close(f"{number}")
        for reporter in ("source", "destination"):
            now = Totals(5, 3, written, read)
            assert settled(partial(since, reporter), now) == now, reporter
    for reporter in ("source", "destination"):
        now = Totals(5, 5, written, read)
        assert settled(partial(since, reporter), now) == now, reporter
    # And that is what the server saw.
    assert eventually(lambda: len(events(server, "close")) == seen_before + 5)
    seen = events(server, "close")[seen_before:]
    assert sum(event["received"] for event in seen) == written
    assert sum(event["sent"] for event in seen) == read


@pytest.mark.parametrize("where", ["near", "far"])
def test_half_a_conversation_is_counted_exactly(lab: Lab, world: World, where: str):
    """A client that sends much and reads nothing, then resets."""
    client = world.clients[where]
    mute = lab.pod(f"mute-{where}", node="node1", namespace=NAMESPACE, service_account="mute")
    mute.serve(mute.app("tcp_server", ECHO, "--mute"), ECHO)
    lab.settle()
    with Talker(client) as talker:
        assert talker.open(mute.address, ECHO).ok
        for _ in range(20):
            talker("send", text="x" * 10_000)
        expected = Totals(1, 0, 200_000, 0)
        for reporter in ("source", "destination"):
            assert settled(partial(totals, lab, reporter, client, mute), expected) == expected, reporter
    mute.delete()


@pytest.mark.parametrize("where", ["near", "far"])
def test_what_l7proxy_carries_is_counted_at_the_destination_once(lab: Lab, world: World, where: str):
    client = world.clients[where]
    web = http_server(lab, f"web-{where}", node="node1", namespace=NAMESPACE, service_account="web")
    address = lab.service(f"web-{where}", 80, target_port=HTTP, namespace=NAMESPACE)
    file = lab.apply(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": f"web-{where}", "namespace": NAMESPACE},
            "spec": {
                "hosts": [f"web-{where}"],
                "http": [{"route": [{"destination": {"host": f"web-{where}"}}]}],
            },
        }
    )
    try:
        lab.settle()
        answers = fetch(client, f"http://{address}/bytes/50000", count=20, per_connection=20)
        assert {answer["status"] for answer in answers} == {200}
        destination = eventually(lambda: totals(lab, "destination", client, web))
        assert isinstance(destination, Totals)
        assert destination.opened >= 1
        assert 20 * 50_000 < destination.sent < 20 * 51_000
        assert 0 < destination.received < 20 * 1000
    finally:
        lab.withdraw(file)
        web.delete()
        lab.settle()
