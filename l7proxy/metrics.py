"""Request metrics with Istio's names and labels, exposed by a collector of our own.

Owns the series and their counting. On the request's path there is one dictionary look-up (kept by whoever owns the
endpoint) and three histogram increments; everything else happens when somebody scrapes, in the scraper's thread.

There are at most :data:`MAX_SERIES`: workloads and their versions come and go while this process lives, and a status is whatever
an upstream says. Those that were counted in longest ago give way, and begin at nothing if they come again, as counters may.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from heapq import nsmallest
from operator import attrgetter

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from l7proxy.record import Record

#: Envoy's default histogram buckets, which Istio uses for milliseconds and for bytes.
BUCKETS = (
    0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000,
)  # fmt: skip
_NAMES = [str(float(b)) for b in BUCKETS] + ["+Inf"]

LABELS = (
    "reporter", "source_workload", "source_workload_namespace", "source_principal", "source_app", "source_version",
    "source_canonical_service", "source_canonical_revision", "source_cluster",
    "destination_workload", "destination_workload_namespace", "destination_principal", "destination_app",
    "destination_version", "destination_canonical_service", "destination_canonical_revision", "destination_cluster",
    "destination_service", "destination_service_name", "destination_service_namespace",
    "request_protocol", "response_code", "grpc_response_status", "response_flags", "connection_security_policy",
    "measured_in",
)  # fmt: skip


#: Most combinations of label values; each is 60 lines of a scrape, and 4 KB here.
MAX_SERIES = 2000
#: Most look-ups that one owner (an endpoint's pool, a pod) remembers.
_MAX_KEPT = 256


class Histogram:
    __slots__ = ("buckets", "total")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def samples(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound."""
        running = 0
        result: list[tuple[str, float]] = []
        for name, count in zip(_NAMES, self.buckets, strict=True):
            running += count
            result.append((name, running))
        return result


class Series:
    """One combination of label values."""

    __slots__ = ("duration", "gone", "labels", "last", "received", "sent")

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.last = 0.0  #: when it was counted in, on the clock of records
        self.gone = False  #: gave way to another
        self.duration = Histogram()
        self.received = Histogram()
        self.sent = Histogram()

    def observe(self, at: float, milliseconds: float, received: int, sent: int) -> None:
        self.last = at
        histogram = self.duration
        histogram.buckets[bisect_left(BUCKETS, milliseconds)] += 1
        histogram.total += milliseconds
        histogram = self.received
        histogram.buckets[bisect_left(BUCKETS, received) if received else 0] += 1
        histogram.total += received
        histogram = self.sent
        histogram.buckets[bisect_left(BUCKETS, sent) if sent else 0] += 1
        histogram.total += sent


class Metrics:
    def __init__(self, limit: int = MAX_SERIES) -> None:
        self._limit = limit
        self._series: dict[tuple[str, ...], Series] = {}
        self._dropped = 0
        #: further gauges and counters: (name, help, type, function)
        self._values: list[tuple[str, str, str, Callable[[], float]]] = []

    def add(self, record: Record) -> None:
        """Count a closed record."""
        home = record.host if record.host is not None else record.pod
        cluster = record.cluster
        key = (cluster.name if cluster is not None else "", record.status, record.flags)
        series = home.series.get(key)
        if series is None or series.gone:
            if len(home.series) >= _MAX_KEPT:
                home.series.clear()
            series = home.series[key] = self._find(_labels(record))
        series.observe(
            record.started + record.duration, record.duration * 1000.0, record.received, record.sent
        )

    def _find(self, labels: tuple[str, ...]) -> Series:
        series = self._series.get(labels)
        if series is not None:
            return series
        if len(self._series) >= self._limit:
            # Many at once, so that looking for them costs each new one little.
            for old in nsmallest(self._limit // 8, self._series.values(), key=attrgetter("last")):
                old.gone = True
                del self._series[old.labels]
                self._dropped += 1
        series = self._series[labels] = Series(labels)
        return series

    def value(self, name: str, help_text: str, kind: str, read: Callable[[], float]) -> None:
        """Expose a number that is kept elsewhere; ``kind`` is ``counter`` or ``gauge``."""
        self._values.append((name, help_text, kind, read))

    def describe(self) -> Iterable[Metric]:
        """No names in advance: prometheus_client would collect, to find out."""
        return []

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("istio_requests", "Requests.", labels=LABELS)
        histograms = [
            HistogramMetricFamily(
                "istio_request_duration_milliseconds", "Duration of requests.", labels=LABELS
            ),
            HistogramMetricFamily("istio_request_bytes", "Sizes of request bodies.", labels=LABELS),
            HistogramMetricFamily("istio_response_bytes", "Sizes of response bodies.", labels=LABELS),
        ]
        for series in list(self._series.values()):
            kept = (series.duration, series.received, series.sent)
            for family, histogram in zip(histograms, kept, strict=True):
                family.add_metric(series.labels, histogram.samples(), histogram.total)
            requests.add_metric(series.labels, sum(series.duration.buckets))
        yield requests
        yield from histograms
        yield CounterMetricFamily(
            "mycel_l7proxy_series_dropped", "Series that gave way to newer ones.", value=self._dropped
        )
        for name, help_text, kind, read in self._values:
            family_type = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            yield family_type(name, help_text, value=read())


def _labels(record: Record) -> tuple[str, ...]:
    """Istio's labels (the Telemetry API's names) for what really happened to this request."""
    source = record.pod.enroll
    host, cluster = record.host, record.cluster
    destination: tuple[str, ...]
    policy = "none"
    if host is not None:
        endpoint = host.endpoint
        known = endpoint.uid != ""
        destination = (
            endpoint.workload,
            endpoint.namespace or "unknown",
            endpoint.identity or "unknown",
            endpoint.app,
            endpoint.version,
            endpoint.app if known else "unknown",
            endpoint.version if known else "unknown",
            "Kubernetes" if known else "unknown",
        )
        # An enrolled endpoint that needs no tunnel is on this node: nothing is encrypted, and nothing is on a wire.
        policy = "mutual_tls" if host.tunnelled else "same_node" if endpoint.enrolled else "none"
    else:
        destination = ("unknown",) * 8
        policy = "unknown"
    return (
        "source",
        source.workload_name,
        source.namespace,
        source.identity or "unknown",
        source.app,
        source.version,
        source.app,
        source.version,
        "Kubernetes",
        *destination,
        cluster.service if cluster is not None else "unknown",
        cluster.service_name if cluster is not None else "unknown",
        cluster.service_namespace if cluster is not None else "unknown",
        "http",
        str(record.status),
        "",
        record.flags,
        policy,
        "l7proxy",
    )
