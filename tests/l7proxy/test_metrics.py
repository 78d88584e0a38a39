"""The bound of what is counted: series that nobody counts in any more give way."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from agent.api import Enroll
from l7proxy.metrics import Metrics
from l7proxy.pods import Pod
from l7proxy.record import Record

LIMIT = 8


def pod_named(name: str) -> Pod:
    identity = f"spiffe://cluster.local/ns/default/sa/{name}"
    return Pod(
        Enroll(name, 1, "10.0.0.1", "default", name, name, identity, workload_name=name),
        lambda _count, _ipv6: True,
    )


def count(metrics: Metrics, pod: Pod, status: int = 200) -> None:
    record = Record(metrics.add, pod, None)
    record.status = status
    record.close()


def totals(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Requests by source workload and status."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    return {
        (sample.labels["source_workload"], sample.labels["response_code"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "istio_requests_total"
    }


def dropped(metrics: Metrics) -> float:
    return next(f for f in metrics.collect() if f.name == "mycel_l7proxy_series_dropped").samples[0].value


def test_what_is_counted_in_stays_and_what_is_not_gives_way() -> None:
    metrics = Metrics(limit=LIMIT)
    busy = pod_named("busy")
    for number in range(10 * LIMIT):
        count(metrics, busy)
        count(metrics, pod_named(f"passing-{number}"))
    found = totals(metrics)
    assert LIMIT * 7 / 8 <= len(found) <= LIMIT
    assert found["busy", "200"] == 10 * LIMIT
    assert ("passing-79", "200") in found
    assert dropped(metrics) == 10 * LIMIT + 1 - len(found)


def test_one_that_comes_again_is_counted_again() -> None:
    """Whoever remembered it must not go on counting where nobody looks."""
    metrics = Metrics(limit=LIMIT)
    pod = pod_named("again")
    count(metrics, pod)
    for number in range(3 * LIMIT):
        count(metrics, pod_named(f"passing-{number}"))
    assert ("again", "200") not in totals(metrics)
    count(metrics, pod)
    assert totals(metrics)["again", "200"] == 1


def test_an_upstreams_every_status_is_remembered_within_bounds() -> None:
    metrics = Metrics(limit=LIMIT)
    pod = pod_named("client")
    for status in range(100, 1000):
        count(metrics, pod, status)
    assert len(totals(metrics)) <= LIMIT
    assert len(pod.series) <= 256
