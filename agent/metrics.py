"""What this agent shows to Prometheus: the kernel's account of connections with Istio's names and labels, and its own health.

Owns names, labels and the translation from numbers to names. Counts are not kept here: the kernel's maps hold them, so they go
on while no agent runs. Everything is computed when somebody scrapes, in the scraper's thread.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from agent.flow_metrics import MEASURED_IN, Records, Series, as_server_sees, flow_metrics, record_metrics
from agent.flowlog import Counts
from agent.identities import Identities, Label
from agent.kernel import Direction, FlowCounters, FlowKey, Pressure
from agent.mesh import Mesh
from agent.pressure import level
from bpf.wire import IDENTITY_PLAIN, IDENTITY_PROBE, IDENTITY_TUNNEL, PROTOCOL_TCP

LABELS = (
    "reporter", "source_workload", "source_workload_namespace", "source_principal", "source_app", "source_version",
    "source_canonical_service", "source_canonical_revision", "source_cluster",
    "destination_workload", "destination_workload_namespace", "destination_principal", "destination_app",
    "destination_version", "destination_canonical_service", "destination_canonical_revision", "destination_cluster",
    "destination_service", "destination_service_name", "destination_service_namespace",
    "request_protocol", "response_flags", "connection_security_policy", "measured_in",
)  # fmt: skip

#: Envoy's flag for "denied by policy" in TCP (RBAC access denied).
_REFUSED_FLAG = "UAEX"
_CNI_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_UNKNOWN = "unknown"
#: Labels that name nobody: the series of what has none of its own keeps them.
_NOBODYS = ("reporter", "request_protocol", "response_flags", "connection_security_policy", "measured_in")


@dataclass(frozen=True)
class View:
    """One moment of the node, for a scrape."""

    mesh: Mesh
    numbers: Identities
    flows: Mapping[FlowKey, FlowCounters]
    pressure: Mapping[str, Pressure]
    pods: int
    enrolled: int
    proxies: Mapping[str, int]
    connected: bool
    destroyed: int
    repairs: Mapping[str, int] = field(default_factory=dict)
    records: Records = field(default=Records(Counts(0, 0, 0, 0), 0))


class CniLatencies:
    """Durations of CNI requests; written by the event loop, read by scrapes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[tuple[str, str], tuple[list[int], float]] = {}

    def __call__(self, command: str, seconds: float, code: int) -> None:
        at = bisect_left(_CNI_BUCKETS, seconds)
        with self._lock:
            counts, total = self._series.get((command, str(code)), ([0] * (len(_CNI_BUCKETS) + 1), 0.0))
            counts[at] += 1
            self._series[command, str(code)] = (counts, total + seconds)

    def family(self) -> Metric:
        family = HistogramMetricFamily(
            "mycel_cni_request_duration_seconds",
            "CNI requests by command and error code.",
            labels=("command", "code"),
        )
        with self._lock:
            series = {labels: (tuple(counts), total) for labels, (counts, total) in self._series.items()}
        bounds = [*(str(bound) for bound in _CNI_BUCKETS), "+Inf"]
        for labels, (counts, total) in series.items():
            running = 0
            buckets = []
            for bound, count in zip(bounds, counts, strict=True):
                running += count
                buckets.append((bound, running))
            family.add_metric(labels, buckets, total)
        return family


class Collector:
    """Registered with a prometheus_client registry."""

    def __init__(self, look: Callable[[], View], latencies: CniLatencies) -> None:
        self._look = look
        self._latencies = latencies
        # Scrapes may be several at one time.
        self._lock = threading.Lock()
        self._series = Series()
        self._flow_series = Series()

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        view = self._look()
        services = services_by_identity(view.mesh, view.numbers)
        with self._lock:
            yield from tcp_metrics(view, services, self._series)
            yield from flow_metrics(view.flows, view.numbers, services, self._flow_series)
        yield from record_metrics(view.records)
        used = GaugeMetricFamily(
            "mycel_map_entries", "Elements in a kernel map (bytes of a ring buffer).", labels=("map",)
        )
        size = GaugeMetricFamily("mycel_map_capacity", "Elements that it has room for.", labels=("map",))
        ratio = GaugeMetricFamily("mycel_map_pressure_ratio", "Entries by capacity.", labels=("map",))
        alarm = GaugeMetricFamily(
            "mycel_map_alarm",
            "1 from 80 % on, 2 from 95 % on (0: maps that forget by themselves).",
            labels=("map",),
        )
        over = CounterMetricFamily(
            "mycel_map_share_refused", "Elements of pods that had used their own share up.", labels=("map",)
        )
        memory = GaugeMetricFamily("mycel_map_memory_bytes", "Of the kernel's, by map.", labels=("map",))
        full = CounterMetricFamily("mycel_map_full", "Elements that found no room.", labels=("map",))
        for name, pressure in view.pressure.items():
            used.add_metric((name,), pressure.used)
            size.add_metric((name,), pressure.size)
            full.add_metric((name,), pressure.refused)
            over.add_metric((name,), pressure.over_share)
            memory.add_metric((name,), pressure.memory)
            if pressure.size:
                ratio.add_metric((name,), pressure.ratio)
                alarm.add_metric((name,), level(name, pressure))
        yield from (used, size, ratio, alarm, full, over, memory)
        repairs = CounterMetricFamily(
            "mycel_repairs", "What the kernel had lost or changed, and was written again.", labels=("what",)
        )
        for what in (
            "pod",
            "namespace",
            "policy",
            "peer",
            "service",
            "network policy",
            "listener",
            "link",
            "role",
            "stray pod",
            "stray peer",
        ):
            repairs.add_metric((what,), view.repairs.get(what, 0))
        yield repairs
        yield GaugeMetricFamily(
            "mycel_agent_pods_attached", "Pods that the runtime attached here.", view.pods
        )
        yield GaugeMetricFamily("mycel_agent_pods_enrolled", "Of these, pods in the mesh.", view.enrolled)
        proxies = GaugeMetricFamily("mycel_agent_proxies_connected", "Connected proxies.", labels=("role",))
        for role, count in view.proxies.items():
            proxies.add_metric((role,), count)
        yield proxies
        yield GaugeMetricFamily(
            "mycel_agent_controller_connected",
            "1 while the controller's stream is up.",
            float(view.connected),
        )
        yield CounterMetricFamily(
            "mycel_agent_connections_destroyed",
            "Connections ended because a policy change refuses them.",
            view.destroyed,
        )
        yield self._latencies.family()


def tcp_metrics(view: View, services: Mapping[tuple[int, int], str], series: Series) -> Iterator[Metric]:
    """The ``istio_tcp_*`` families, and the connections that the kernel refused."""
    sent = CounterMetricFamily("istio_tcp_sent_bytes", "Bytes sent by the server.", labels=LABELS)
    received = CounterMetricFamily(
        "istio_tcp_received_bytes", "Bytes received from the client.", labels=LABELS
    )
    opened = CounterMetricFamily("istio_tcp_connections_opened", "Connections opened.", labels=LABELS)
    closed = CounterMetricFamily("istio_tcp_connections_closed", "Connections closed.", labels=LABELS)
    refused = CounterMetricFamily(
        "mycel_tcp_connections_refused", "Connections that the kernel refused.", labels=LABELS
    )
    kept = [LABELS.index(name) for name in _NOBODYS]
    for labels, counters in series.bounded(_summed(view, services), kept).items():
        opened.add_metric(labels, counters.opened)
        closed.add_metric(labels, counters.closed)
        sent.add_metric(labels, counters.sent)
        received.add_metric(labels, counters.received)
        if counters.refused:
            at = LABELS.index("response_flags")
            refused.add_metric((*labels[:at], _REFUSED_FLAG, *labels[at + 1 :]), counters.refused)
    yield from (sent, received, opened, closed, refused)


def _summed(view: View, services: Mapping[tuple[int, int], str]) -> dict[tuple[str, ...], FlowCounters]:
    """By labels: several ports, zones and verdicts of one workload may share them."""
    sums: dict[tuple[str, ...], FlowCounters] = {}
    for key, counters in view.flows.items():
        if key.protocol != PROTOCOL_TCP:
            continue
        counters = as_server_sees(key, counters)
        labels = labels_of(key, view.numbers, services)
        before = sums.get(labels)
        sums[labels] = counters if before is None else before + counters
    return sums


def labels_of(key: FlowKey, numbers: Identities, services: Mapping[tuple[int, int], str]) -> tuple[str, ...]:
    """The values of :data:`LABELS`."""
    host = services.get((key.destination, key.port), _UNKNOWN)
    name, _, rest = host.partition(".")
    outbound = key.direction is Direction.OUTBOUND
    if outbound:
        # As in Istio: the client's end does not judge.
        security = _UNKNOWN
    elif key.source == IDENTITY_TUNNEL:
        security = "mutual_tls"
    elif key.source in (IDENTITY_PLAIN, IDENTITY_PROBE):
        security = "none"
    else:
        # The source is known from the kernel, but nothing is encrypted between two pods of one node.
        security = "same_node"
    return (
        "source" if outbound else "destination",
        *_workload_labels(key.source, numbers),
        *_workload_labels(key.destination, numbers),
        host,
        name if host != _UNKNOWN else _UNKNOWN,
        rest.partition(".")[0] or _UNKNOWN,
        "tcp",
        "-",
        security,
        MEASURED_IN,
    )


def name_of(number: int, numbers: Identities) -> str:
    """A readable name of an identity, for logs."""
    match number:
        case 0:
            return "plain text"
        case 1:
            return "a probe"
        case 2:
            return "the node proxy"
    label = numbers.label(number)
    return f"{label.namespace}/{label.workload_name}" if label is not None else f"identity {number}"


def _workload_labels(number: int, numbers: Identities) -> tuple[str, ...]:
    label = numbers.label(number) or Label(_UNKNOWN)
    return (
        label.workload_name,
        label.namespace,
        label.identity,
        label.app,
        label.version,
        label.app if label.app != _UNKNOWN else label.workload_name,
        label.version
        if label.version != _UNKNOWN
        else ("latest" if label.identity != _UNKNOWN else _UNKNOWN),
        "Kubernetes" if label.identity != _UNKNOWN else _UNKNOWN,
    )


def services_by_identity(mesh: Mesh, numbers: Identities) -> dict[tuple[int, int], str]:
    """Host of the service behind (destination identity, its own port), where exactly one selects it."""
    found: dict[tuple[int, int], str] = {}
    identities = {uid: numbers.find(workload) for uid, workload in mesh.workloads.items()}
    for service in mesh.services.values():
        for port in service.ports:
            for endpoint in port.endpoints:
                number = identities.get(endpoint.uid)
                if number is not None:
                    key = (number, endpoint.port)
                    found[key] = service.host if found.get(key, service.host) == service.host else _UNKNOWN
    return found
