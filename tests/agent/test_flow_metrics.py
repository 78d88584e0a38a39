"""The accounts with zones, protocol and verdict, and the bound on their series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agent.flow_metrics import LABELS, OTHER, Records, Series, flow_metrics, record_metrics
from agent.flowlog import Counts
from agent.identities import Identities, label_of
from agent.kernel import Direction, FlowCounters, FlowKey, Reason
from bpf.wire import PROTOCOL_UDP, VERDICT_SEVERAL
from tests.agent.pods import workload


def numbers() -> Identities:
    made = Identities()
    made.number(label_of(workload("client")))
    made.number(label_of(workload("server")))
    made.zone("eu-1a")
    made.zone("eu-1b")
    return made


def samples(metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    class Collected:
        def collect(self):
            return metrics

    registry = CollectorRegistry()
    registry.register(Collected())
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def shown(flows, series: Series | None = None):
    return samples(list(flow_metrics(flows, numbers(), {(17, 53): "dns.default.svc"}, series or Series())))


TCP = FlowKey(16, 17, 80, Direction.INBOUND, source_zone=1, destination_zone=2)


def test_zones_protocol_and_verdict():
    udp = FlowKey(16, 17, 53, Direction.OUTBOUND, PROTOCOL_UDP, 0, 1, 2)
    found = shown(
        {
            TCP: FlowCounters(5, 3, 0, 100, 20, retransmits=2, rtt_us=3_000_000, rtt_samples=6),
            TCP._replace(verdict=Reason.POLICY): FlowCounters(refused=4),
            udp: FlowCounters(2, 1, 0, 30, 900, 3, 9),
            udp._replace(verdict=Reason.NO_POLICY): FlowCounters(refused=2, refused_bytes=60),
        }
    )
    by = {
        (name, labels["protocol"], labels["verdict"]): (labels, value)
        for name, rows in found.items()
        for labels, value in rows
        if labels
    }
    labels, sent = by["mycel_flow_sent_bytes_total", "tcp", "allowed"]
    assert set(labels) == set(LABELS)
    assert labels == {
        "reporter": "destination",
        "source_workload": "client",
        "source_workload_namespace": "default",
        "source_principal": "spiffe://cluster.local/ns/default/sa/client",
        "source_zone": "eu-1a",
        "destination_workload": "server",
        "destination_workload_namespace": "default",
        "destination_principal": "spiffe://cluster.local/ns/default/sa/server",
        "destination_zone": "eu-1b",
        "destination_service": "unknown",
        "protocol": "tcp",
        "verdict": "allowed",
        "measured_in": "kernel",
    }
    assert sent == 100

    def value(name: str, protocol: str, verdict: str = "allowed") -> float:
        return float(by[f"mycel_flow_{name}", protocol, verdict][1])

    assert value("received_bytes_total", "tcp") == 20
    assert value("opened_total", "tcp") == 5
    assert value("closed_total", "tcp") == 3
    assert value("retransmits_total", "tcp") == 2
    assert value("smoothed_rtt_seconds_sum", "tcp") == 3.0
    assert value("smoothed_rtt_seconds_count", "tcp") == 6
    assert value("refused_total", "tcp", "policy") == 4
    # The client's end wrote 30 bytes: the server's side received them.
    assert value("sent_bytes_total", "udp") == 900
    assert value("received_bytes_total", "udp") == 30
    assert value("sent_datagrams_total", "udp") == 9
    assert value("received_datagrams_total", "udp") == 3
    assert value("refused_total", "udp", "no-policy") == 2
    assert value("refused_bytes_total", "udp", "no-policy") == 60
    assert by["mycel_flow_sent_bytes_total", "udp", "allowed"][0]["destination_service"] == "dns.default.svc"
    assert ("mycel_flow_retransmits_total", "udp", "allowed") not in by


def test_what_had_no_room_is_told_apart():
    [(labels, value)] = shown(
        {FlowKey(0, 0, 0, Direction.INBOUND, verdict=VERDICT_SEVERAL): FlowCounters(refused=7)}
    )["mycel_flow_refused_total"]
    assert (labels["verdict"], labels["source_workload"], value) == ("several", "unknown", 7)


def test_series_are_bounded_and_their_sum_is_whole():
    series = Series(most=3)
    flows = {TCP._replace(source_zone=zone): FlowCounters(sent=10**zone) for zone in range(6)}
    zones = Identities()
    for zone in range(1, 6):
        zones.zone(f"z{zone}")
    found = samples(list(flow_metrics(flows, zones, {}, series)))
    rows = found["mycel_flow_sent_bytes_total"]
    assert len(rows) == 4
    assert sum(value for _, value in rows) == 111_111
    [(other, _)] = [row for row in rows if row[0]["source_zone"] == OTHER]
    assert other["destination_workload"] == OTHER
    assert (other["protocol"], other["verdict"], other["reporter"]) == ("tcp", "allowed", "destination")
    assert found["mycel_flow_series_folded"] == [({}, 3)]
    # Those that have a series keep it, whoever comes.
    own = {labels["source_zone"] for labels, _ in rows}
    flows[TCP._replace(source=0)] = FlowCounters(sent=1)
    again = samples(list(flow_metrics(flows, zones, {}, series)))["mycel_flow_sent_bytes_total"]
    assert {labels["source_zone"] for labels, _ in again} == own
    assert sum(value for _, value in again) == 111_112
    # The room of accounts that are gone is others'.
    for key in list(flows)[:2]:
        del flows[key]
    samples(list(flow_metrics(flows, zones, {}, series)))
    assert series.folded < 4


def test_records():
    found = samples(list(record_metrics(Records(Counts(10, 5, 3, 2), 7))))
    assert found["mycel_flow_records_total"] == [({}, 10)]
    assert found["mycel_flow_records_written_total"] == [({}, 5)]
    assert {labels["reason"]: value for labels, value in found["mycel_flow_records_lost_total"]} == {
        "ring_full": 7,
        "log_rate": 3,
        "log_failed": 2,
    }
