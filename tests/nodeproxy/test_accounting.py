"""The bound of what is counted: totals that no tunnel ends in any more give way."""

from dataclasses import dataclass

import pytest

from nodeproxy.accounting import Accounting, Flow, Outcome, Party, Reporter
from nodeproxy.loop import Loop


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.shutdown()


@dataclass
class Counted:
    """Of an open tunnel, as its relay has it."""

    read: int
    written: int


def count(accounting: Accounting, workload: str) -> None:
    source = Party(workload, "default", f"spiffe://cluster.local/ns/default/sa/{workload}")
    flow = Flow(Reporter.SOURCE, source, Party(), ("", "", ""), ("10.0.0.1:1", "10.0.0.2:2"), 0.0)
    accounting.begin(flow)
    accounting.end(flow, Outcome.OK)


def test_what_is_counted_in_stays_and_what_is_not_gives_way(loop: Loop):
    accounting = Accounting(loop, limit=4)
    for number in range(20):
        count(accounting, "busy")
        count(accounting, f"passing-{number}")
    found = {labels.source_workload: values[0] for labels, values in accounting.snapshot().items()}
    assert found == {"busy": 20, "passing-17": 1, "passing-18": 1, "passing-19": 1}
    dropped = next(f for f in accounting.collect() if f.name == "mycel_nodeproxy_series_dropped")
    assert dropped.samples[0].value == 17


def test_zones_and_verdicts(loop: Loop):
    accounting = Accounting(loop)
    client = Party("client", "default", "spiffe://cluster.local/ns/default/sa/client", zone="eu-1a")
    for zone, outcome, port in (
        ("eu-1a", Outcome.OK, 1),
        ("eu-1b", Outcome.OK, 2),
        ("eu-1b", Outcome.DENIED, 3),
        ("eu-1b", Outcome.UNREACHABLE, 4),
        ("eu-1b", Outcome.TLS, 5),
    ):
        server = Party("server", "default", zone=zone)
        ends = (f"10.0.0.1:{port}", "10.0.0.2:2")
        flow = Flow(Reporter.SOURCE, client, server, ("", "", ""), ends, 0.0)
        accounting.begin(flow)
        if outcome is Outcome.OK:
            flow.counts = Counted(10 * port, 100 * port)
        accounting.end(flow, outcome)
    samples = [s for family in accounting.collect() for s in family.samples]

    def by_zone(name: str) -> dict[tuple[str, str, str], float]:
        return {
            (s.labels["source_zone"], s.labels["destination_zone"], s.labels["verdict"]): s.value
            for s in samples
            if s.name == f"mycel_flow_{name}_total"
        }

    one, two = ("eu-1a", "eu-1a", "allowed"), ("eu-1a", "eu-1b", "allowed")
    assert by_zone("opened") == by_zone("closed") == {one: 1, two: 1}
    assert by_zone("received_bytes") == {one: 10, two: 20}
    assert by_zone("sent_bytes") == {one: 100, two: 200}
    assert by_zone("refused") == {("eu-1a", "eu-1b", "policy"): 1, ("eu-1a", "eu-1b", "failed"): 2}
    # Istio has no zones: what differs in nothing else is one series there.
    istio = {
        s.labels["response_flags"]: s.value for s in samples if s.name == "istio_tcp_received_bytes_total"
    }
    assert istio == {"-": 30, "DENY": 0, "CONNECT": 0, "TLS_FAILURE": 0}
    assert all("source_zone" not in s.labels for s in samples if s.name.startswith("istio"))
