"""What the node proxy counts: ``istio_tcp_*`` with Istio's labels, and one log line for each tunnel at its end.

The same is in ``mycel_flow_*`` with zones and verdicts, as the agent has it of what the kernel counts.

Owns the records of open tunnels and the totals of closed ones; both come from one record (:class:`Flow`), which is closed
exactly once. Metrics include open tunnels, so that a long connection is seen while it lasts. Of totals there are at most
:data:`MAX_SERIES`: the workloads of a mesh and their versions come and go while this process lives, and those that a tunnel
ended in longest ago give way.

``from_source`` are the bytes that the client's application wrote (Istio's *received*), ``to_source`` those it was sent
(Istio's *sent*).
"""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from common import logs
from nodeproxy.loop import Loop

_log = logs.get("nodeproxy.access")

#: Most combinations of label values; each is four lines of a scrape.
MAX_SERIES = 10_000


class Reporter(enum.Enum):
    SOURCE = "source"
    DESTINATION = "destination"


class Outcome(enum.Enum):
    """How a tunnel came out; the value is the label ``response_flags`` (as Istio's ambient mode writes it)."""

    OK = "-"
    DENIED = "DENY"  #: policy
    UNREACHABLE = "CONNECT"  #: connecting failed, or the peer's application refused
    TLS = "TLS_FAILURE"  #: the connection between the nodes
    IDENTITY = "IDENTITY"  #: no certificate, or the peer is not who it has to be
    TIMEOUT = "TIMEOUT"
    INVALID = "INVALID"  #: a request or header that makes no sense
    RESET = "RESET"  #: open, then broken off


class Party(NamedTuple):
    """One end, as the labels name it."""

    workload: str = "unknown"
    namespace: str = "unknown"
    principal: str = "unknown"  #: ``spiffe://...``
    app: str = "unknown"
    version: str = "unknown"
    zone: str = "unknown"


UNKNOWN = Party()


class Labels(NamedTuple):
    reporter: str
    source_workload: str
    source_workload_namespace: str
    source_principal: str
    source_app: str
    source_version: str
    source_canonical_service: str
    source_canonical_revision: str
    destination_workload: str
    destination_workload_namespace: str
    destination_principal: str
    destination_app: str
    destination_version: str
    destination_canonical_service: str
    destination_canonical_revision: str
    destination_service: str
    destination_service_name: str
    destination_service_namespace: str
    request_protocol: str
    response_flags: str
    connection_security_policy: str
    # Istio has no labels for these.
    source_zone: str
    destination_zone: str


_ISTIO = Labels._fields[: Labels._fields.index("source_zone")]
_FLOW = (
    "reporter", "source_workload", "source_workload_namespace", "source_principal", "source_zone",
    "destination_workload", "destination_workload_namespace", "destination_principal", "destination_zone",
    "destination_service", "protocol", "verdict", "measured_in",
)  # fmt: skip
#: Label ``verdict`` by how a tunnel came out; what is not here failed.
_VERDICTS = {Outcome.OK.value: "allowed", Outcome.DENIED.value: "policy"}
_FAILED = "failed"


class Counts(Protocol):
    """The live counters of an open tunnel (``relay.Relay``)."""

    read: int
    written: int


class _Totals:
    __slots__ = ("closed", "from_source", "opened", "to_source")

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.from_source = 0
        self.to_source = 0


class Flow:
    """One tunnel, from the moment it is asked for."""

    __slots__ = (
        "addresses", "counts", "destination", "ended", "opened_at", "port", "reporter", "service", "source",
    )  # fmt: skip

    def __init__(
        self,
        reporter: Reporter,
        source: Party,
        destination: Party,
        service: tuple[str, str, str],
        addresses: tuple[str, str],
        opened_at: float,
    ) -> None:
        """One tunnel that is asked for.

        :param service: host, name and namespace of the service that was dialled, empty if none.
        :param addresses: client and destination, ``ADDRESS:PORT``.
        """
        self.reporter = reporter
        self.source = source
        self.destination = destination
        self.service = service
        self.addresses = addresses
        self.opened_at = opened_at
        self.counts: Counts | None = None  #: set while it is open
        self.ended = False

    @property
    def from_source(self) -> int:
        if self.counts is None:
            return 0
        return self.counts.read if self.reporter is Reporter.SOURCE else self.counts.written

    @property
    def to_source(self) -> int:
        if self.counts is None:
            return 0
        return self.counts.written if self.reporter is Reporter.SOURCE else self.counts.read

    def labels(self, outcome: Outcome) -> Labels:
        s, d = self.source, self.destination
        host, name, namespace = self.service
        if not host:
            # Istio: the workload's own names where no service was dialled.
            host, name, namespace = d.workload, d.workload, d.namespace
        return Labels(
            self.reporter.value,
            s.workload, s.namespace, s.principal, s.app, s.version, s.app, s.version,
            d.workload, d.namespace, d.principal, d.app, d.version, d.app, d.version,
            host, name, namespace,
            "tcp",
            outcome.value,
            "mutual_tls",
            s.zone, d.zone,
        )  # fmt: skip


class Accounting(Collector):
    def __init__(self, loop: Loop, limit: int = MAX_SERIES) -> None:
        self._loop = loop
        self._limit = limit
        self._dropped = 0
        self._lock = threading.Lock()  # against the admin server's thread
        self._totals: OrderedDict[Labels, _Totals] = OrderedDict()
        self._open: dict[Flow, None] = {}

    def begin(self, flow: Flow) -> None:
        """A tunnel is asked for; it counts as opened when its outcome is known."""
        with self._lock:
            self._open[flow] = None

    def end(self, flow: Flow, outcome: Outcome, detail: str = "") -> None:
        """It ended, was refused or failed. Only the first call counts."""
        if flow.ended:
            return
        flow.ended = True
        # What was open has been counted as such: counters never go down. How it ended stands in the log.
        labels = flow.labels(outcome if flow.counts is None else Outcome.OK)
        with self._lock:
            totals = self._totals.get(labels)
            if totals is None:
                totals = self._totals[labels] = _Totals()
                if len(self._totals) > self._limit:
                    self._totals.popitem(last=False)
                    self._dropped += 1
            else:
                self._totals.move_to_end(labels)
            totals.opened += 1
            totals.closed += 1
            totals.from_source += flow.from_source
            totals.to_source += flow.to_source
            self._open.pop(flow, None)
        if _log.enabled("info"):
            _log.info(
                "tunnel",
                reporter=flow.reporter.value,
                flags=outcome.value,
                source=flow.addresses[0],
                source_workload=flow.source.workload,
                source_namespace=flow.source.namespace,
                source_identity=flow.source.principal,
                destination=flow.addresses[1],
                destination_workload=flow.destination.workload,
                destination_namespace=flow.destination.namespace,
                destination_identity=flow.destination.principal,
                destination_service=flow.service[0],
                received=flow.from_source,
                sent=flow.to_source,
                duration_ms=int((self._loop.now - flow.opened_at) * 1000),
                detail=detail,
            )

    def snapshot(self) -> dict[Labels, tuple[int, int, int, int]]:
        """Opened, closed, bytes from and to the source, by labels, with open tunnels."""
        with self._lock:
            result = {
                labels: (t.opened, t.closed, t.from_source, t.to_source) for labels, t in self._totals.items()
            }
            for flow in self._open:
                if flow.counts is not None:
                    labels = flow.labels(Outcome.OK)
                    opened, closed, received, sent = result.get(labels, (0, 0, 0, 0))
                    result[labels] = (
                        opened + 1,
                        closed,
                        received + flow.from_source,
                        sent + flow.to_source,
                    )
        return result

    def collect(self) -> Iterator[Metric]:
        """:mod:`prometheus_client`'s way to ask."""
        snapshot = self.snapshot()
        families = [
            CounterMetricFamily("istio_tcp_connections_opened", "Tunnels opened.", labels=_ISTIO),
            CounterMetricFamily("istio_tcp_connections_closed", "Tunnels closed.", labels=_ISTIO),
            CounterMetricFamily("istio_tcp_received_bytes", "Bytes that clients sent.", labels=_ISTIO),
            CounterMetricFamily("istio_tcp_sent_bytes", "Bytes that clients were sent.", labels=_ISTIO),
        ]
        for labels, values in _summed(
            (key[: len(_ISTIO)], values) for key, values in snapshot.items()
        ).items():
            for family, value in zip(families, values, strict=True):
                family.add_metric(labels, value)
        yield from families
        yield from _flow_metrics(snapshot)
        yield CounterMetricFamily(
            "mycel_nodeproxy_series_dropped", "Series that gave way to newer ones.", value=self._dropped
        )

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def open_tunnels(self) -> list[dict[str, object]]:
        """For the debug page."""
        return [
            {
                "reporter": flow.reporter.value,
                "source": flow.addresses[0],
                "source_identity": flow.source.principal,
                "destination": flow.addresses[1],
                "destination_identity": flow.destination.principal,
                "open": flow.counts is not None,
                "received": flow.from_source,
                "sent": flow.to_source,
            }
            for flow in list(self._open)
        ]


_Values = tuple[int, int, int, int]


def _summed(rows: Iterable[tuple[tuple[str, ...], _Values]]) -> dict[tuple[str, ...], _Values]:
    sums: dict[tuple[str, ...], _Values] = {}
    for labels, (a, b, c, d) in rows:
        w, x, y, z = sums.get(labels, (0, 0, 0, 0))
        sums[labels] = (w + a, x + b, y + c, z + d)
    return sums


def _flow_metrics(snapshot: Mapping[Labels, _Values]) -> Iterator[Metric]:
    def counter(name: str, text: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"mycel_flow_{name}", text, labels=_FLOW)

    opened = counter("opened", "Tunnels opened.")
    closed = counter("closed", "Tunnels closed.")
    refused = counter("refused", "Tunnels refused, and those that failed before they were open.")
    received = counter("received_bytes", "Bytes that clients sent.")
    sent = counter("sent_bytes", "Bytes that clients were sent.")
    for labels, values in _summed((_flow_labels(key), values) for key, values in snapshot.items()).items():
        if labels[_FLOW.index("verdict")] != "allowed":
            refused.add_metric(labels, values[0])
            continue
        for family, value in zip((opened, closed, received, sent), values, strict=True):
            family.add_metric(labels, value)
    yield from (opened, closed, refused, received, sent)


def _flow_labels(key: Labels) -> tuple[str, ...]:
    fields = key._asdict() | {
        "protocol": "tcp",
        "verdict": _VERDICTS.get(key.response_flags, _FAILED),
        "measured_in": "node proxy",
    }
    return tuple(fields[name] for name in _FLOW)
