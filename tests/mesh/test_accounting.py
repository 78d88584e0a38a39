"""Bytes and connections are what the applications wrote and read: on both paths, open connections too, never twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from lab import Lab, Metrics, Pod, Talker
from lab.processes import wait_until
from tests.mesh.helpers import (
    ECHO,
    HTTP,
    echo_server,
    echoes,
    events,
    eventually,
    fetch,
    http_server,
    principal,
)

pytestmark = pytest.mark.privileged

NAMESPACE = "accounts"
OPENED = "istio_tcp_connections_opened_total"
CLOSED = "istio_tcp_connections_closed_total"
SENT = "istio_tcp_sent_bytes_total"
RECEIVED = "istio_tcp_received_bytes_total"
ZONES = {"node1": "eu-1a", "node2": "eu-1b"}


@dataclass(frozen=True)
class World:
    server: Pod
    clients: dict[str, Pod]


@pytest.fixture(scope="module")
def world(lab: Lab) -> Iterator[World]:
    lab.namespace(NAMESPACE)
    zones = lab.apply(
        [
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node, "labels": {"topology.kubernetes.io/zone": ZONES[node]}},
            }
            for node in ZONES
        ]
    )
    server = echo_server(lab, "server", node="node1", namespace=NAMESPACE, service_account="server")
    clients = {
        where: lab.pod(f"client-{where}", node=node, namespace=NAMESPACE, service_account=f"client-{where}")
        for where, node in (("near", "node1"), ("far", "node2"))
    }
    lab.settle()
    yield World(server, clients)
    lab.withdraw(zones)
    lab.settle()


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


def test_what_the_kernel_says_has_zones_and_a_record_for_each_end(lab: Lab, world: World):
    client, server = world.clients["near"], world.server
    names = {"source": f"{NAMESPACE}/client-near", "destination": f"{NAMESPACE}/server"}
    query = "&".join(f"{key}={value}" for key, value in names.items())

    def records() -> list[dict[str, Any]]:
        rows = lab.get_json("node1", "agent", f"/debug/flows?newest=1000&verdict=allowed&{query}")
        return [row for row in rows if row["client"] == mine]

    with Talker(client) as talker:
        opened = talker.open(server.address, ECHO)
        assert opened.ok
        mine = "{}:{}".format(*opened["local"])
        greeting = len(talker("read")["text"])
        assert talker.exchange(size=777, times=10).ok
        talker.close()
    assert eventually(lambda: len(records()) == 2)
    rows = {row["direction"]: row for row in records()}
    assert rows.keys() == {"outbound", "inbound"}
    out, into = rows["outbound"], rows["inbound"]
    for row in rows.values():
        assert row | names == row
        assert (row["server"], row["protocol"], row["via"]) == (f"{server.address}:{ECHO}", "tcp", "direct")
        assert (row["source_zone"], row["destination_zone"]) == ("eu-1a", "eu-1a")
        assert row["destination_principal"] == "spiffe://" + principal(NAMESPACE, "server")
    assert (out["pod"], into["pod"]) == (client.name, server.name)
    assert (out["sent"], out["received"]) == (7770, 7770 + greeting)
    assert (into["sent"], into["received"]) == (7770 + greeting, 7770)
    zoned = lab.metrics("node1", "agent").total(
        "mycel_flow_received_bytes_total",
        source_zone="eu-1a",
        destination_zone="eu-1a",
        source_workload="client-near",
        destination_workload="server",
        reporter="destination",
        protocol="tcp",
        verdict="allowed",
    )
    labels = {"source_workload": "client-near", "destination_workload": "server", "reporter": "destination"}
    assert zoned == lab.metrics("node1", "agent").total(RECEIVED, **labels) > 0


def test_tunnels_have_no_account_in_the_kernel(lab: Lab, world: World):
    """What goes to another node is counted by the node proxies; their own sockets are nobody's traffic."""
    client, server = world.clients["far"], world.server
    assert echoes(client, server.address, ECHO) == ""
    principals = {
        "source_principal": "spiffe://" + principal(NAMESPACE, "client-far"),
        "destination_principal": "spiffe://" + principal(NAMESPACE, "server"),
    }
    eventually(lambda: totals(lab, "destination", client, server).opened > 0)
    for node, reporter in (("node2", "source"), ("node1", "destination")):
        zones = {"source_zone": "eu-1b", "destination_zone": "eu-1a", "verdict": "allowed"}
        metrics = lab.metrics(node, "nodeproxy")
        expected = metrics.total(RECEIVED, reporter=reporter, **principals)
        found = metrics.total("mycel_flow_received_bytes_total", reporter=reporter, **principals, **zones)
        assert found == expected > 0
    for machine in lab.nodes:
        agent = lab.metrics(machine.name, "agent")
        for name in ("mycel_flow_opened_total", "mycel_flow_sent_bytes_total", OPENED, SENT):
            assert agent.total(name, **principals) == 0, (machine.name, name)
        ports = {row["port"] for row in lab.get_json(machine.name, "agent", "/debug/flows")}
        assert not ports & {15001, 15002, 15008}
        for row in lab.get_json(machine.name, "agent", "/debug/flows?newest=1000&verdict=allowed"):
            assert row["server"].rpartition(":")[2] not in ("15001", "15002", "15008"), row


def test_counts_and_records_go_on_while_no_agent_runs(lab: Lab, world: World):
    client, server = world.clients["near"], world.server
    before = totals(lab, "source", client, server)
    seen = len(events(server, "close"))
    written = read = 0
    with Talker(client) as talker:

        def talk(key: str, size: int) -> None:
            nonlocal written, read
            assert talker.open(server.address, ECHO, key).ok
            read += len(talker("read", key)["text"])
            more(key, size)

        def more(key: str, size: int) -> None:
            nonlocal written, read
            assert talker.exchange(key, size=size, times=7).ok
            written += 7 * size
            read += 7 * size

        talk("before", 100)
        lab.kill("node1", "agent")
        more("before", 1000)
        for number in range(5):
            talk(f"while {number}", 200 + number)
        talker.close("while 0")
        talker.close("while 1")
        lab.start("node1", "agent")
        more("before", 10)
        more("while 2", 10)
        now = Totals(6, 2, written, read)
        assert settled(lambda: totals(lab, "source", client, server) - before, now) == now
    now = Totals(6, 6, written, read)
    assert settled(lambda: totals(lab, "source", client, server) - before, now) == now
    assert eventually(lambda: len(events(server, "close")) == seen + 6)
    # Records wait in the kernel for the agent that comes: all that this one knows are of those connections.
    rows = lab.get_json(
        "node1", "agent", f"/debug/flows?newest=1000&direction=outbound&source={NAMESPACE}/client-near"
    )
    assert len(rows) == 6
    assert (sum(row["sent"] for row in rows), sum(row["received"] for row in rows)) == (written, read)


@pytest.mark.parametrize("where", ["near", "far"])
def test_datagrams_are_counted_at_both_ends(lab: Lab, world: World, where: str):
    client, server = world.clients[where], world.server
    process = server.popen(server.app("udp", "serve", "0.0.0.0", 5300))
    try:
        wait_until(lambda: server.listening(5300, kind="udp"), 5, "UDP server listens")
        texts = ["hello", "x" * 1000, "y" * 3000]
        for text in texts:
            answer = client.run(client.app("udp", "ask", server.address, 5300, text))
            assert answer.stdout.strip() == text
    finally:
        process.kill()
        process.wait()
    zone = ZONES[client.node.name]
    size = sum(map(len, texts))
    for reporter, node in (("source", client.node.name), ("destination", "node1")):
        labels = {
            "reporter": reporter,
            "source_workload": f"client-{where}",
            "destination_workload": "server",
            "source_zone": zone,
            "destination_zone": ZONES["node1"],
            "protocol": "udp",
            "verdict": "allowed",
        }
        metrics = lab.metrics(node, "agent")
        found = {
            name: metrics.total(f"mycel_flow_{name}_total", **labels)
            for name in ("sent_bytes", "received_bytes", "sent_datagrams", "received_datagrams", "opened")
        }
        assert found == {
            "sent_bytes": size,
            "received_bytes": size,
            "sent_datagrams": 3,
            "received_datagrams": 3,
            "opened": 3,
        }, reporter
        # TCP's metrics know nothing of it.
        istio = {name: labels[name] for name in ("reporter", "source_workload", "destination_workload")}
        tcp = metrics.total("mycel_flow_sent_bytes_total", **(istio | {"protocol": "tcp"}))
        assert metrics.total(SENT, **istio) == tcp
