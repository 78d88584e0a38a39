"""The bound of what is counted: totals that no tunnel ends in any more give way."""

import pytest

from nodeproxy.accounting import Accounting, Flow, Outcome, Party, Reporter
from nodeproxy.loop import Loop


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.shutdown()


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
