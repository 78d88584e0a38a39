"""Figures tell the truth about who spoke to whom, how, and where it was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from lab import Lab, Metrics, Pod, Traffic
from tests.mesh.helpers import ECHO, HTTP, echo_server, echoes, eventually, fetch, http_server

pytestmark = pytest.mark.privileged

NAMESPACE = "metrics"


@dataclass(frozen=True)
class World:
    client: Pod
    servers: dict[str, Pod]
    echo: dict[str, Pod]
    service: str


@pytest.fixture(scope="module")
def world(lab: Lab) -> Iterator[World]:
    lab.namespace(NAMESPACE)
    servers, echo = {}, {}
    for version, node in (("v1", "node1"), ("v2", "node2")):
        servers[version] = http_server(
            lab,
            f"shop-{version}-x7k2",
            version=version,
            node=node,
            namespace=NAMESPACE,
            service_account="shop",
            labels={"app": "shop", "version": version},
            owner=f"shop-{version}",
        )
        echo[version] = echo_server(
            lab,
            f"echo-{version}",
            node=node,
            namespace=NAMESPACE,
            service_account="echo",
            labels={"app": "echo"},
        )
    service = lab.service("shop", 80, target_port=HTTP, namespace=NAMESPACE)
    client = lab.pod(
        "buyer-abc",
        node="node1",
        namespace=NAMESPACE,
        service_account="buyer",
        labels={"app": "buyer", "version": "v9"},
        owner="buyer",
    )
    file = lab.apply(
        [
            {
                "apiVersion": "networking.istio.io/v1",
                "kind": "DestinationRule",
                "metadata": {"name": "shop", "namespace": NAMESPACE},
                "spec": {
                    "host": "shop",
                    "subsets": [{"name": v, "labels": {"version": v}} for v in ("v1", "v2")],
                },
            },
            {
                "apiVersion": "networking.istio.io/v1",
                "kind": "VirtualService",
                "metadata": {"name": "shop", "namespace": NAMESPACE},
                "spec": {
                    "hosts": ["shop"],
                    "http": [
                        {
                            "match": [{"headers": {"want": {"exact": "v2"}}}],
                            "route": [{"destination": {"host": "shop", "subset": "v2"}}],
                        },
                        {"route": [{"destination": {"host": "shop", "subset": "v1"}}]},
                    ],
                },
            },
        ]
    )
    lab.settle()
    yield World(client, servers, echo, service)
    lab.withdraw(file)
    lab.settle()


def at_least(read: Callable[[], float], value: float) -> bool:
    return read() >= value


def requests(lab: Lab, **labels: str) -> float:
    return lab.metrics("node1", "l7proxy").total("istio_requests_total", **labels)


@pytest.mark.parametrize(("version", "policy"), [("v1", "same_node"), ("v2", "mutual_tls")])
def test_requests_carry_what_was_really_served(lab: Lab, world: World, version: str, policy: str):
    labels = {
        "reporter": "source",
        "source_workload": "buyer",
        "source_workload_namespace": NAMESPACE,
        "source_principal": f"spiffe://cluster.local/ns/{NAMESPACE}/sa/buyer",
        "source_app": "buyer",
        "source_version": "v9",
        "destination_workload": f"shop-{version}",
        "destination_workload_namespace": NAMESPACE,
        "destination_principal": f"spiffe://cluster.local/ns/{NAMESPACE}/sa/shop",
        "destination_app": "shop",
        "destination_version": version,
        "destination_service": f"shop.{NAMESPACE}.svc.cluster.local",
        "destination_service_name": "shop",
        "destination_service_namespace": NAMESPACE,
        "request_protocol": "http",
        "connection_security_policy": policy,
    }
    before = {status: requests(lab, response_code=status, **labels) for status in ("200", "418")}
    url = f"http://{world.service}"
    headers = {"want": version}
    assert {a["status"] for a in fetch(world.client, f"{url}/", count=7, headers=headers)} == {200}
    assert {a["status"] for a in fetch(world.client, f"{url}/status/418", count=3, headers=headers)} == {418}
    for status, count in (("200", 7), ("418", 3)):
        # The record is closed before the client has the answer's last byte, or a moment later.
        eventually(
            partial(at_least, partial(requests, lab, response_code=status, **labels), before[status] + count)
        )
        seen = requests(lab, response_code=status, **labels)
        assert seen == before[status] + count, lab.metrics("node1", "l7proxy").text
    duration = lab.metrics("node1", "l7proxy").total(
        "istio_request_duration_milliseconds_count", response_code="200", **labels
    )
    assert duration == before["200"] + 7


@pytest.mark.parametrize(("version", "policy"), [("v1", "same_node"), ("v2", "mutual_tls")])
def test_tcp_carries_both_identities_and_where_it_was_measured(
    lab: Lab, world: World, version: str, policy: str
):
    labels = {
        "source_workload": "buyer",
        "source_principal": f"spiffe://cluster.local/ns/{NAMESPACE}/sa/buyer",
        "destination_workload": f"echo-{version}",
        "destination_principal": f"spiffe://cluster.local/ns/{NAMESPACE}/sa/echo",
    }
    node = world.echo[version].node.name
    measured_by, other = ("agent", "nodeproxy") if version == "v1" else ("nodeproxy", "agent")

    def opened(reporter: str, component: str, **more: str) -> float:
        where = "node1" if reporter == "source" else node
        metrics = lab.metrics(where, component)
        return metrics.total("istio_tcp_connections_opened_total", reporter=reporter, **labels, **more)

    assert echoes(world.client, world.echo[version].address, ECHO) == ""
    for reporter in ("source", "destination"):
        eventually(partial(at_least, partial(opened, reporter, measured_by), 1))
        assert opened(reporter, measured_by) == 1
        assert opened(reporter, other) == 0
    # Who received it knows how it came.
    assert opened("destination", measured_by, connection_security_policy=policy) == 1


def test_access_log_is_envoy_s_default_line(lab: Lab, world: World):
    fetch(world.client, f"http://{world.service}/access-log-check", headers={"user-agent": "suite/1"})
    # [START] "METHOD PATH PROTOCOL" CODE FLAGS BYTES BYTES DURATION UPSTREAM "XFF" "UA" "ID" "AUTHORITY" "HOST"
    line = re.compile(
        r'\[[0-9T:.Z-]+\] "GET /access-log-check HTTP/1.1" 200 - 0 \d+ \d+ (\d+|-) "[^"]*" "suite/1" "[^"]*" '
        rf'"{re.escape(world.service)}" "{re.escape(world.servers["v1"].address)}:{HTTP}"'
    )
    assert eventually(lambda: line.search(lab.logs("node1", "l7proxy", lines=200))), lab.logs(
        "node1", "l7proxy"
    )


def test_every_process_serves_metrics_of_its_own(lab: Lab):
    for node in lab.nodes:
        for component in ("agent", "nodeproxy", "l7proxy"):
            metrics = lab.metrics(node.name, component)
            assert isinstance(metrics, Metrics)
            assert metrics.names()
    assert lab.metrics("controlplane").names()


def test_stat_shows_the_service(lab: Lab, world: World):
    with Traffic(
        world.client, "http_client", f"http://{world.service}/", "--count", 2000, "--interval", 0.01
    ) as traffic:
        done = lab.mycel("stat", "--json", check=False)
        records = traffic.end()
    assert done.returncode == 0, done.stdout
    said = json.loads(done.stdout)
    (shop,) = [service for service in said["services"] if service["service"] == f"{NAMESPACE}/shop"]
    # As many as the client had answers to, in the time that stat looked.
    rate = len(records) / (records[-1]["at"] - records[0]["at"])
    assert 0.7 * rate < shop["requests_per_second"] < 1.4 * rate, (rate, shop)
    assert shop["success_rate"] == 1.0
