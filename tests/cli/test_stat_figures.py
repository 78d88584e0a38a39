"""What ``mycel stat`` makes of two scrapes: rates, quantiles, who is counted, and what is not known."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from cli.metrics import Scrape, quantile
from cli.stat import ServiceStat, services

LABELS = (
    "reporter", "source_principal", "destination_service_name", "destination_service_namespace", "destination_workload",
    "destination_workload_namespace", "response_code", "connection_security_policy",
)  # fmt: skip


class Process:
    """A process' metrics, as prometheus-client serves them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("istio_requests_total", "-", LABELS, registry=self._registry)
        self.duration = Histogram(
            "istio_request_duration_milliseconds",
            "-",
            LABELS,
            buckets=(1, 5, 10, 100),
            registry=self._registry,
        )
        self.opened = Counter("istio_tcp_connections_opened_total", "-", LABELS, registry=self._registry)
        self.sent = Counter("istio_tcp_sent_bytes_total", "-", LABELS, registry=self._registry)
        self.received = Counter("istio_tcp_received_bytes_total", "-", LABELS, registry=self._registry)

    def scrape(self) -> Scrape:
        return Scrape.parse(generate_latest(self._registry).decode())


def labels(**values: str) -> dict[str, str]:
    usual = {
        "reporter": "source",
        "source_principal": "spiffe://cluster.local/ns/default/sa/client",
        "destination_service_name": "web",
        "destination_service_namespace": "default",
        "destination_workload": "web-v1",
        "destination_workload_namespace": "default",
        "response_code": "200",
        "connection_security_policy": "mutual_tls",
    }
    return usual | values


def between(process: Process, act: object, component: str, seconds: float = 2.0) -> list[ServiceStat]:
    before = {"a": process.scrape()}
    assert callable(act)
    act()
    return services(before, {"a": process.scrape()}, {"a": component}, seconds)


def test_requests_of_the_interval_alone_give_rate_success_and_quantiles() -> None:
    process = Process()
    process.requests.labels(**labels(response_code="503")).inc(1000)  # before the interval

    def act() -> None:
        for code, count, milliseconds in (("200", 90, 3.0), ("404", 5, 7.0), ("503", 5, 50.0)):
            values = labels(response_code=code)
            process.requests.labels(**values).inc(count)
            for _ in range(count):
                process.duration.labels(**values).observe(milliseconds)

    (stat,) = between(process, act, "l7proxy")
    assert (stat.service, stat.measured) == ("default/web", "l7proxy")
    assert stat.requests == 50.0
    assert stat.success == pytest.approx(0.95), "404 is the client's affair"
    assert stat.p50 is not None
    assert 1 < stat.p50 < 5
    assert stat.p95 == pytest.approx(10.0)
    assert stat.p99 == pytest.approx(10 + 90 * 4 / 5)
    assert stat.mtls == 1.0


def test_a_connection_is_taken_from_its_source_unless_the_source_is_not_in_the_mesh() -> None:
    process = Process()

    def act() -> None:
        process.opened.labels(**labels(connection_security_policy="unknown")).inc(3)
        process.opened.labels(**labels(reporter="destination", connection_security_policy="same_node")).inc(3)
        plain = labels(reporter="destination", source_principal="unknown", connection_security_policy="none")
        process.opened.labels(**plain).inc(1)
        process.sent.labels(**plain).inc(500)

    (stat,) = between(process, act, "agent")
    assert stat.measured == "kernel"
    assert stat.connections == 2.0
    assert stat.sent == 250.0
    assert (stat.mtls, stat.same_node) == (0.0, 0.75)
    assert "same node 75.0%, plain 25.0%" in stat.cells()
    assert stat.requests is None
    assert stat.p50 is None


def test_connections_opened_before_the_interval_are_secured_all_the_same() -> None:
    process = Process()
    process.opened.labels(**labels()).inc(3)
    (stat,) = between(process, lambda: process.sent.labels(**labels()).inc(100), "nodeproxy")
    assert stat.connections == 0.0
    assert stat.mtls == 1.0
    assert "mTLS 100.0%" in stat.cells()


def test_places_stand_apart_and_a_workload_stands_in_for_an_unknown_service() -> None:
    kernel, tunnel = Process(), Process()
    unknown = {"destination_service_name": "unknown", "destination_service_namespace": "unknown"}
    kernel.opened.labels(**labels(**unknown)).inc()
    kernel.opened.labels(**labels(**unknown, destination_workload="db")).inc()
    tunnel.opened.labels(**labels()).inc()
    scrapes = {"a": kernel.scrape(), "b": tunnel.scrape()}
    components = {"a": "agent", "b": "nodeproxy"}
    found = services({}, scrapes, components, 1.0, {("default", "web-v1"): "web"})
    assert [(s.service, s.measured) for s in found] == [
        ("default/db (workload)", "kernel"),
        ("default/web", "kernel"),
        ("default/web", "node proxy"),
    ]


def test_a_workload_that_stands_where_the_service_should_counts_for_its_service() -> None:
    tunnel = Process()
    tunnel.opened.labels(**labels(destination_service_name="web-v1")).inc()
    tunnel.opened.labels(**labels(destination_service_name="db", destination_workload="db")).inc()
    found = services({}, {"a": tunnel.scrape()}, {"a": "nodeproxy"}, 1.0, {("default", "web-v1"): "web"})
    assert [s.service for s in found] == ["default/db", "default/web"]


def test_requests_that_stay_on_one_node_are_not_plain() -> None:
    process = Process()

    def act() -> None:
        for security, count in (("same_node", 3), ("mutual_tls", 1)):
            process.requests.labels(**labels(connection_security_policy=security)).inc(count)

    (stat,) = between(process, act, "l7proxy")
    assert (stat.mtls, stat.same_node) == (0.25, 0.75)
    assert "mTLS 25.0%, same node 75.0%" in stat.cells()


def test_a_process_that_began_anew_counts_from_nothing() -> None:
    old, new = Process(), Process()
    old.opened.labels(**labels()).inc(100)
    new.opened.labels(**labels()).inc(4)
    (stat,) = services({"a": old.scrape()}, {"a": new.scrape()}, {"a": "agent"}, 2.0)
    assert stat.connections == 2.0


def test_what_is_not_known_is_not_called_mtls_or_plain() -> None:
    process = Process()
    (stat,) = between(
        process, lambda: process.opened.labels(**labels(connection_security_policy="unknown")).inc(), "agent"
    )
    assert stat.mtls is None
    assert "-" in stat.cells()


def test_one_failure_in_many_is_never_rounded_away() -> None:
    assert ServiceStat("a/b", "l7proxy", success=0.99999).cells()[1] == "<100%"
    assert ServiceStat("a/b", "l7proxy", success=1.0).cells()[1] == "100.0%"


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 1.0), (0.75, 5.5), (1.0, 10.0)])
def test_quantiles_are_linear_within_a_bucket(fraction: float, expected: float) -> None:
    assert quantile(fraction, {1.0: 50, 10.0: 100, math.inf: 100}) == pytest.approx(expected)


def test_beyond_the_last_bound_and_of_nothing() -> None:
    assert quantile(0.99, {1.0: 1, 10.0: 2, math.inf: 100}) == 10.0
    assert quantile(0.5, {1.0: 0, math.inf: 0}) is None
    assert quantile(0.5, {}) is None
