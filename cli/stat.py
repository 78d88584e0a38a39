"""``mycel stat``: what each service did between two scrapes of every process that measures.

A connection or request is counted by who sent it and by who got it, as Istio's ``reporter`` label says. Here the source's
count is taken; the destination's only where there is no source in the mesh to count (its principal is unknown). How a
connection was secured is asked of both, since the kernel knows it for certain at the destination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    mtls: float | None = None  #: the share that went by mutual TLS
    same_node: float | None = (
        None  #: the share that stayed on one node, where the kernel vouches for who connects
    )
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
            "same_node_share": self.same_node,
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
            _security(self.mtls, self.same_node),
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
RIGHT = frozenset(range(1, 9))


#: Which service a workload belongs to: (namespace, workload) to the service's name, where there is exactly one.
Owners = Mapping[tuple[str, str], str]


def services(
    before: Mapping[str, Scrape],
    after: Mapping[str, Scrape],
    components: Mapping[str, str],
    seconds: float,
    owners: Owners | None = None,
) -> list[ServiceStat]:
    """Every service that did something, by name.

    :param before: scrapes by the address they are from; a process missing here is new and counts from nothing.
    :param components: the kind of process at each address.
    :param owners: for connections whose counts know the workload only (the kernel's).
    """
    found: list[ServiceStat] = []
    for component, place in PLACES.items():
        pairs = [
            (before.get(address, Scrape()), scrape)
            for address, scrape in after.items()
            if components[address] == component
        ]
        table = _Table(pairs, owners or {})
        found += _http(table, place, seconds)
        found += _tcp(table, place, seconds)
    return sorted(found, key=lambda stat: (stat.service, stat.measured))


class _Table:
    """The growth of metrics over all processes of one kind, by service."""

    def __init__(self, pairs: list[tuple[Scrape, Scrape]], owners: Owners) -> None:
        self._pairs = pairs
        self._owners = owners

    def counted(self, metric: str) -> dict[str, list[Sample]]:
        """Each connection or request once."""
        return self._collect(metric, lambda labels: None if _seen_twice(labels) else self._service(labels))

    def all(self, metric: str) -> dict[str, list[Sample]]:
        """By both reporters."""
        return self._collect(metric, self._service)

    def _collect(self, metric: str, key: Callable[[Labels], str | None]) -> dict[str, list[Sample]]:
        found: dict[str, list[Sample]] = {}
        for before, after in self._pairs:
            for service, samples in grouped(after.since(before, metric), key).items():
                found.setdefault(service, []).extend(samples)
        return found

    def _service(self, labels: Labels) -> str:
        name = labels.get("destination_service_name", "")
        namespace = labels.get("destination_service_namespace", "")
        if name in _UNKNOWN:
            workload = labels.get("destination_workload", "unknown")
            namespace = labels.get("destination_workload_namespace", "")
            name = self._owners.get((namespace, workload), f"{workload} (workload)")
        elif name == labels.get("destination_workload"):
            # As in Istio, the workload's own name where no service was dialled.
            name = self._owners.get((namespace, name), name)
        return f"{namespace}/{name}" if namespace not in _UNKNOWN else name


def _http(table: _Table, place: str, seconds: float) -> Iterable[ServiceStat]:
    buckets = table.counted("istio_request_duration_milliseconds_bucket")
    secured = table.all("istio_requests_total")
    for service, samples in table.counted("istio_requests_total").items():
        total = sum(sample.growth for sample in samples)
        if not total:
            continue
        failed = sum(s.growth for s in samples if _failed(s.labels.get("response_code", "0")))
        counts: dict[float, float] = {}
        for bucket in buckets.get(service, ()):
            bound = float(bucket.labels["le"])
            counts[bound] = counts.get(bound, 0.0) + bucket.growth
        mtls, same_node = _shares(secured[service])
        yield ServiceStat(
            service=service,
            measured=place,
            success=1 - failed / total,
            requests=total / seconds,
            p50=quantile(0.50, counts),
            p95=quantile(0.95, counts),
            p99=quantile(0.99, counts),
            mtls=mtls,
            same_node=same_node,
        )


def _tcp(table: _Table, place: str, seconds: float) -> Iterable[ServiceStat]:
    opened = table.counted("istio_tcp_connections_opened_total")
    sent = table.counted("istio_tcp_sent_bytes_total")
    received = table.counted("istio_tcp_received_bytes_total")
    # Long-lived connections are opened before the interval and secured all the same: bytes tell of them too.
    secured = [
        table.all(f"istio_tcp_{name}_total")
        for name in ("connections_opened", "sent_bytes", "received_bytes")
    ]
    for service in opened.keys() | sent.keys() | received.keys():
        sums = [sum(s.growth for s in samples.get(service, ())) for samples in (opened, sent, received)]
        if any(sums):
            connections, out, back = (total / seconds for total in sums)
            shares = (_shares(samples.get(service, ())) for samples in secured)
            mtls, same_node = next((s for s in shares if s != (None, None)), (None, None))
            yield ServiceStat(
                service,
                place,
                mtls=mtls,
                same_node=same_node,
                connections=connections,
                sent=out,
                received=back,
            )


def _seen_twice(labels: Labels) -> bool:
    """Whether another series, the source's, counts the same."""
    return labels.get("reporter") == "destination" and labels.get("source_principal") not in _UNKNOWN


def _failed(code: str) -> bool:
    """Istio's convention: what the server (or the mesh) answers with 5xx, and requests that got no answer."""
    return code.startswith("5") or code == "0"


def _shares(samples: Iterable[Sample]) -> tuple[float | None, float | None]:
    """The shares that went by mutual TLS and that stayed on one node, of what is known; None when nothing is."""
    known = {"mutual_tls": 0.0, "same_node": 0.0, "none": 0.0}
    for sample in samples:
        policy = sample.labels.get("connection_security_policy", "unknown")
        if policy in known:
            known[policy] += sample.growth
    total = sum(known.values())
    return (known["mutual_tls"] / total, known["same_node"] / total) if total else (None, None)


def _security(mtls: float | None, same_node: float | None) -> str:
    """``mTLS 80.0%, same node 20.0%``: what is left is plain."""
    if mtls is None or same_node is None:
        return "-"
    parts = [
        f"{name} {_percent(share)}" for name, share in (("mTLS", mtls), ("same node", same_node)) if share
    ]
    if (plain := 1 - mtls - same_node) > 1e-9:
        parts.append(f"plain {_percent(plain)}")
    return ", ".join(parts)


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
