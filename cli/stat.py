"""``mycel stat``: what each service did between two scrapes of every process that measures.

A connection or request is counted by who sent it and by who got it, as Istio's ``reporter`` label says. Here the source's
count is taken; the destination's only where there is no source in the mesh to count (its principal is unknown).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cli.metrics import Labels, Sample, Scrape, grouped, quantile

#: Who measures what, as the table's last column says it.
PLACES = {"agent": "kernel", "nodeproxy": "node proxy", "l7proxy": "l7proxy"}

_UNKNOWN = ("", "unknown")


@dataclass(frozen=True, slots=True)
class ServiceStat:
    """One service as one kind of process saw it. Rates are per second, latencies in milliseconds; None = not measured."""

    service: str  #: ``NAMESPACE/NAME``; a workload's, where no service was dialled
    measured: str
    success: float | None = None
    requests: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    mtls: float | None = None
    connections: float | None = None
    sent: float | None = None
    received: float | None = None

    def json(self) -> dict[str, Any]:
        return {
            "service": self.service,
            "measured": self.measured,
            "success_rate": self.success,
            "requests_per_second": self.requests,
            "p50_ms": self.p50,
            "p95_ms": self.p95,
            "p99_ms": self.p99,
            "mtls_share": self.mtls,
            "connections_opened_per_second": self.connections,
            "sent_bytes_per_second": self.sent,
            "received_bytes_per_second": self.received,
        }

    def cells(self) -> tuple[str, ...]:
        return (
            self.service,
            _percent(self.success),
            _number(self.requests),
            _number(self.p50),
            _number(self.p95),
            _number(self.p99),
            _number(self.connections),
            _bytes(self.sent),
            _bytes(self.received),
            _percent(self.mtls),
            self.measured,
        )


HEADERS = (
    "SERVICE",
    "SUCCESS",
    "RPS",
    "P50 MS",
    "P95 MS",
    "P99 MS",
    "CONN/S",
    "SENT/S",
    "RECV/S",
    "MTLS",
    "MEASURED BY",
)
RIGHT = frozenset(range(1, 10))


def services(
    before: Mapping[str, Scrape], after: Mapping[str, Scrape], components: Mapping[str, str], seconds: float
) -> list[ServiceStat]:
    """Every service that did something, by name.

    :param before: scrapes by the address they are from; a process missing here is new and counts from nothing.
    :param components: the kind of process at each address.
    """
    found: list[ServiceStat] = []
    for component, place in PLACES.items():
        pairs = [
            (before.get(address, Scrape()), scrape)
            for address, scrape in after.items()
            if components[address] == component
        ]
        found += _http(pairs, place, seconds)
        found += _tcp(pairs, place, seconds)
    return sorted(found, key=lambda stat: (stat.service, stat.measured))


def _http(pairs: list[tuple[Scrape, Scrape]], place: str, seconds: float) -> Iterable[ServiceStat]:
    buckets = _collect(pairs, "istio_request_duration_milliseconds_bucket")
    for service, samples in _collect(pairs, "istio_requests_total").items():
        total = sum(sample.growth for sample in samples)
        if not total:
            continue
        failed = sum(s.growth for s in samples if _failed(s.labels.get("response_code", "0")))
        counts: dict[float, float] = {}
        for bucket in buckets.get(service, ()):
            bound = float(bucket.labels["le"])
            counts[bound] = counts.get(bound, 0.0) + bucket.growth
        yield ServiceStat(
            service=service,
            measured=place,
            success=1 - failed / total,
            requests=total / seconds,
            p50=quantile(0.50, counts),
            p95=quantile(0.95, counts),
            p99=quantile(0.99, counts),
            mtls=_mtls(samples),
        )


def _tcp(pairs: list[tuple[Scrape, Scrape]], place: str, seconds: float) -> Iterable[ServiceStat]:
    opened = _collect(pairs, "istio_tcp_connections_opened_total")
    sent = _collect(pairs, "istio_tcp_sent_bytes_total")
    received = _collect(pairs, "istio_tcp_received_bytes_total")
    for service in opened.keys() | sent.keys() | received.keys():
        sums = [sum(s.growth for s in samples.get(service, ())) for samples in (opened, sent, received)]
        if any(sums):
            connections, out, back = (total / seconds for total in sums)
            mtls = _mtls(opened.get(service, ()))
            yield ServiceStat(service, place, connections=connections, sent=out, received=back, mtls=mtls)


def _collect(pairs: list[tuple[Scrape, Scrape]], metric: str) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for before, after in pairs:
        for service, samples in grouped(after.since(before, metric), _service).items():
            found.setdefault(service, []).extend(samples)
    return found


def _service(labels: Labels) -> str | None:
    """The service that a time series belongs to; None for one that another series counts too."""
    if labels.get("reporter") == "destination" and labels.get("source_principal") not in _UNKNOWN:
        return None
    name = labels.get("destination_service_name", "")
    namespace = labels.get("destination_service_namespace", "")
    if name in _UNKNOWN:
        name = labels.get("destination_workload", "unknown")
        namespace = labels.get("destination_workload_namespace", "")
    return f"{namespace}/{name}" if namespace not in _UNKNOWN else name


def _failed(code: str) -> bool:
    """Istio's convention: what the server (or the mesh) answers with 5xx, and requests that got no answer."""
    return code.startswith("5") or code == "0"


def _mtls(samples: Iterable[Sample]) -> float | None:
    """The share that went by mutual TLS, of what is known; None when nothing is."""
    known = {"mutual_tls": 0.0, "none": 0.0}
    for sample in samples:
        policy = sample.labels.get("connection_security_policy", "unknown")
        if policy in known:
            known[policy] += sample.growth
    total = sum(known.values())
    return known["mutual_tls"] / total if total else None


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    # 99.96 % is not 100 %: a failure must not be rounded away.
    shown = f"{value * 100:.1f}"
    return "<100%" if shown == "100.0" and value < 1 else f"{shown}%"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
