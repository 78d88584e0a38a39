"""The accounts with zones, protocol and verdict, which Istio's metrics have no labels for: the families ``mycel_flow_*``.

Owns their names and labels, and the bound on how many label sets there are: the kernel's accounts are by port and identity,
both of which may be many. Those that came first keep their series; what comes later is added up in one, where every label that
names somebody says ``other``, so that sums stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric

from agent.flowlog import Counts, protocol_name, reason_name
from agent.identities import Identities, Label
from agent.kernel import Direction, FlowCounters, FlowKey

LABELS = (
    "reporter", "source_workload", "source_workload_namespace", "source_principal", "source_zone",
    "destination_workload", "destination_workload_namespace", "destination_principal", "destination_zone",
    "destination_service", "protocol", "verdict", "measured_in",
)  # fmt: skip
MEASURED_IN = "kernel"
#: Label sets of one family at most.
MOST_SERIES = 10_000
OTHER = "other"
ALLOWED = "allowed"
_UNKNOWN = "unknown"

_Labels = tuple[str, ...]


class Series:
    """Which label sets have a series of their own: the first ones. Not for several threads at once."""

    def __init__(self, most: int = MOST_SERIES) -> None:
        self._most = most
        self._own: set[_Labels] = set()
        #: Label sets that were added to another's series, at the last look.
        self.folded = 0

    def bounded(
        self, rows: Mapping[_Labels, FlowCounters], kept: Iterable[int]
    ) -> dict[_Labels, FlowCounters]:
        """:param kept: positions of labels that the common series keeps; the others say OTHER there."""
        # Accounts of identities that are gone are dropped: their room is for others.
        self._own &= rows.keys()
        keep = frozenset(kept)
        found: dict[_Labels, FlowCounters] = {}
        self.folded = 0
        for labels in sorted(rows):
            counters = rows[labels]
            if labels not in self._own:
                if len(self._own) < self._most:
                    self._own.add(labels)
                else:
                    self.folded += 1
                    labels = tuple(value if at in keep else OTHER for at, value in enumerate(labels))
            before = found.get(labels)
            found[labels] = counters if before is None else before + counters
        return found


def as_server_sees(key: FlowKey, counters: FlowCounters) -> FlowCounters:
    """Istio counts from the server's side, whoever reports: ``sent`` is what the server sent.

    The kernel counts what the application at that end wrote, so the client's end is turned round.
    """
    if key.direction is not Direction.OUTBOUND:
        return counters
    return counters._replace(
        sent=counters.received,
        received=counters.sent,
        sent_datagrams=counters.received_datagrams,
        received_datagrams=counters.sent_datagrams,
    )


class Records(NamedTuple):
    """What became of the flow records: in the agent since it began, ``lost`` in the kernel since its maps were made."""

    counts: Counts
    lost: int


def flow_metrics(
    flows: Mapping[FlowKey, FlowCounters],
    numbers: Identities,
    services: Mapping[tuple[int, int], str],
    series: Series,
) -> Iterator[Metric]:
    """The families."""
    rows: dict[_Labels, FlowCounters] = {}
    for key, counters in flows.items():
        labels = _labels(key, numbers, services)
        counters = as_server_sees(key, counters)
        before = rows.get(labels)
        rows[labels] = counters if before is None else before + counters
    at = {name: position for position, name in enumerate(LABELS)}
    kept = [at[name] for name in ("reporter", "protocol", "verdict", "measured_in")]
    rows = series.bounded(rows, kept)

    def counter(name: str, text: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"mycel_flow_{name}", text, labels=LABELS)

    opened = counter("opened", "Connections opened, and UDP conversations begun.")
    closed = counter("closed", "Connections closed, and UDP conversations that fell silent.")
    refused = counter("refused", "Connections refused, and UDP datagrams dropped.")
    refused_bytes = counter("refused_bytes", "Payload of UDP datagrams that were dropped.")
    sent = counter("sent_bytes", "Bytes that the server's application sent (UDP: payload).")
    received = counter("received_bytes", "Bytes that the server's application received (UDP: payload).")
    sent_datagrams = counter("sent_datagrams", "UDP datagrams from the server.")
    received_datagrams = counter("received_datagrams", "UDP datagrams to the server.")
    retransmits = counter("retransmits", "TCP segments that were sent again by the reporter's end.")
    rtt = SummaryMetricFamily(
        "mycel_flow_smoothed_rtt_seconds",
        "Smoothed round trip times of TCP, one sample when a connection closes and one at each reading of the accounts.",
        labels=LABELS,
    )
    at_protocol = at["protocol"]
    for labels, counters in rows.items():
        opened.add_metric(labels, counters.opened)
        closed.add_metric(labels, counters.closed)
        sent.add_metric(labels, counters.sent)
        received.add_metric(labels, counters.received)
        if counters.refused:
            refused.add_metric(labels, counters.refused)
        if counters.refused_bytes:
            refused_bytes.add_metric(labels, counters.refused_bytes)
        if labels[at_protocol] == "udp":
            sent_datagrams.add_metric(labels, counters.sent_datagrams)
            received_datagrams.add_metric(labels, counters.received_datagrams)
        else:
            retransmits.add_metric(labels, counters.retransmits)
            rtt.add_metric(labels, counters.rtt_samples, counters.rtt_us / 1e6)
    yield from (opened, closed, refused, refused_bytes, sent, received, sent_datagrams, received_datagrams)
    yield from (retransmits, rtt)
    folded = GaugeMetricFamily(
        "mycel_flow_series_folded",
        "Label sets that have no series of their own, because there are too many: they are in those that say other.",
    )
    folded.add_metric((), series.folded)
    yield folded


def record_metrics(records: Records) -> Iterator[Metric]:
    """What became of the flow records."""
    yield CounterMetricFamily(
        "mycel_flow_records", "Flow records taken over from the kernel.", records.counts.read
    )
    yield CounterMetricFamily(
        "mycel_flow_records_written", "Flow records written into the flow log.", records.counts.written
    )
    lost = CounterMetricFamily(
        "mycel_flow_records_lost",
        "Flow records that are not to be had: the ring buffer was full, or they are missing in the flow log.",
        labels=("reason",),
    )
    lost.add_metric(("ring_full",), records.lost)
    lost.add_metric(("log_rate",), records.counts.over_rate)
    lost.add_metric(("log_failed",), records.counts.failed)
    yield lost


def _labels(key: FlowKey, numbers: Identities, services: Mapping[tuple[int, int], str]) -> _Labels:
    return (
        "source" if key.direction is Direction.OUTBOUND else "destination",
        *_who(key.source, numbers),
        numbers.zone_name(key.source_zone),
        *_who(key.destination, numbers),
        numbers.zone_name(key.destination_zone),
        services.get((key.destination, key.port), _UNKNOWN),
        protocol_name(key.protocol),
        reason_name(key.verdict) or ALLOWED,
        MEASURED_IN,
    )


def _who(number: int, numbers: Identities) -> tuple[str, str, str]:
    label = numbers.label(number) or Label(_UNKNOWN)
    return label.workload_name, label.namespace, label.identity
