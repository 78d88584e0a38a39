"""Flow records: what is kept, what is asked for, what is written, and what is counted as lost."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import pytest

from agent.flowlog import FlowLog, Names, Sink
from bpf.wire import Direction, FlowRecord, Reason, Via
from common.admin import BadQueryError

NAMES = Names(
    name=lambda number: {16: "shop/client", 17: "shop/server", 18: "other/client"}.get(number, "plain text"),
    principal=lambda number: f"spiffe://td/{number}" if number >= 16 else "",
    zone=lambda number: {1: "eu-1a"}.get(number, "unknown"),
    pod=lambda cookie: f"shop/pod-{cookie}" if cookie else "",
)


def record(**given: Any) -> FlowRecord:
    now = time.monotonic_ns()
    values: dict[str, Any] = {
        "netns": 7,
        "started": now - 2_500_000_000,
        "ended": now,
        "sent": 1000,
        "received": 200,
        "sent_datagrams": 0,
        "received_datagrams": 0,
        "client_address": "10.0.0.1",
        "server_address": "10.0.0.2",
        "client_port": 40000,
        "server_port": 8080,
        "source": 16,
        "destination": 17,
        "source_zone": 1,
        "destination_zone": 0,
        "port": 8080,
        "verdict": 0,
        "protocol": 6,
        "direction": Direction.INBOUND,
        "flags": 0,
        "rtt_us": 120,
        "retransmits": 3,
        "kind": Via.DIRECT,
    }
    return FlowRecord(**values | given)


class Ring:
    """In the kernel's place."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []
        self.silenced = 0

    def put(self, *records: FlowRecord) -> None:
        self.waiting += [one.pack() for one in records]

    def read_records(self, most):
        while self.waiting and most:
            yield self.waiting.pop(0)
            most -= 1

    def records_pending(self) -> int:
        return len(self.waiting)

    def end_silent_conversations(self) -> None:
        self.silenced += 1


@pytest.fixture
def ring() -> Ring:
    return Ring()


def test_a_record_has_names_and_times(ring):
    log = FlowLog(ring, NAMES)
    ring.put(record())
    assert log.drain(0.0) == 1
    [shown] = log.newest({})
    ended = time.time()
    assert str(shown.pop("started")) < str(shown["ended"])
    assert abs(_epoch(shown.pop("ended")) - ended) < 5
    assert shown == {
        "seconds": 2.5,
        "protocol": "tcp",
        "direction": "inbound",
        "client": "10.0.0.1:40000",
        "server": "10.0.0.2:8080",
        "pod": "shop/pod-7",
        "source": "shop/client",
        "destination": "shop/server",
        "source_principal": "spiffe://td/16",
        "destination_principal": "spiffe://td/17",
        "source_zone": "eu-1a",
        "destination_zone": "unknown",
        "verdict": "allowed",
        "reason": "",
        "via": "direct",
        "sent": 1000,
        "received": 200,
        "rtt_us": 120,
        "retransmits": 3,
    }


def _epoch(text: object) -> float:
    import datetime

    return datetime.datetime.fromisoformat(str(text)).timestamp()


def test_the_newest_are_kept_and_come_first(ring):
    log = FlowLog(ring, NAMES, keep=10)
    ring.put(*(record(sent=n) for n in range(25)))
    assert log.drain(0.0) == 25
    assert [shown["sent"] for shown in log.newest({"newest": "3"})] == [24, 23, 22]
    assert [shown["sent"] for shown in log.newest({"newest": "100"})] == list(range(24, 14, -1))
    assert log.counts.read == 25


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"source": "shop/client"}, [0, 2]),
        ({"source": "shop"}, [0, 2]),
        ({"source": "other"}, [1]),
        ({"destination": "shop/server", "protocol": "udp"}, [2]),
        ({"verdict": "refused"}, [1]),
        ({"reason": "policy"}, [1]),
        ({"verdict": "allowed", "protocol": "tcp"}, [0]),
        ({"direction": "outbound"}, [2]),
        ({"port": "80"}, [1]),
        ({"port": "0"}, []),
        ({"address": "fd00::2"}, [2]),
        ({"address": "fd00:0::0002"}, [2]),
        ({"address": "10.0.0.1"}, [0, 1]),
        ({"address": "10.0.0"}, None),
        ({"pod": "shop/pod-9"}, [1]),
        ({"newest": "1"}, [2]),
    ],
)
def test_queries(ring, query, found):
    log = FlowLog(ring, NAMES)
    ring.put(
        record(sent=0),
        record(sent=1, source=18, verdict=Reason.POLICY, server_port=80, netns=9),
        record(
            sent=2,
            protocol=17,
            direction=Direction.OUTBOUND,
            client_address="fd00::1",
            server_address="fd00::2",
            server_port=53,
        ),
    )
    log.drain(0.0)
    if found is None:
        with pytest.raises(BadQueryError):
            log.newest(query)
        return
    assert sorted(int(str(shown["sent"])) for shown in log.newest(query)) == found


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"sources": "a"}, "sources: no such parameter"),
        ({"newest": "0"}, "newest=0"),
        ({"newest": "many"}, "newest=many"),
        ({"protocol": "icmp"}, "protocol=icmp: not one of tcp, udp"),
        ({"port": "65536"}, "port=65536"),
        ({"verdict": "denied"}, "verdict=denied: not one of allowed, refused"),
        ({"reason": "why"}, "reason=why: not one of"),
        ({"direction": "up"}, "direction=up: not one of outbound, inbound"),
    ],
)
def test_bad_queries_say_what_is_wrong(ring, query, said):
    with pytest.raises(BadQueryError, match=said):
        FlowLog(ring, NAMES).newest(query)


def test_a_record_of_another_size_is_not_read(ring):
    log = FlowLog(ring, NAMES)
    ring.waiting.append(b"x" * 10)
    ring.put(record())
    assert log.drain(0.0) == 1


def test_lines_are_written_at_a_rate(ring, tmp_path):
    path = tmp_path / "flows.log"
    log = FlowLog(ring, NAMES, sink=Sink(str(path), rate=10))
    ring.put(*(record(sent=n) for n in range(15)))
    log.drain(100.0)
    assert log.counts == (15, 10, 5, 0)
    ring.put(*(record(sent=n) for n in range(15, 30)))
    log.drain(100.5)  # half a second is five lines
    assert log.counts == (30, 15, 15, 0)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sent"] for line in lines] == [*range(10), *range(15, 20)]
    assert lines[0]["source"] == "shop/client"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_begins_anew_when_it_is_large(ring, tmp_path):
    path = tmp_path / "flows.log"
    log = FlowLog(ring, NAMES, sink=Sink(str(path), size=2000))
    for n in range(30):
        ring.put(record(sent=n))
        log.drain(n * 1.0)
    log.close()
    assert path.stat().st_size <= 2000
    before = (tmp_path / "flows.log.1").read_text().splitlines()
    now = path.read_text().splitlines()
    assert [json.loads(line)["sent"] for line in now][-1] == 29
    assert json.loads(before[-1])["sent"] + 1 == json.loads(now[0])["sent"]
    assert sorted(os.listdir(tmp_path)) == ["flows.log", "flows.log.1"]
    assert log.counts.written == 30


def test_somebody_else_may_turn_the_file_over(ring, tmp_path):
    path = tmp_path / "flows.log"
    log = FlowLog(ring, NAMES, sink=Sink(str(path)))
    ring.put(record(sent=1))
    log.drain(0.0)
    path.rename(tmp_path / "old")
    ring.put(record(sent=2))
    log.drain(1.0)
    log.close()
    assert json.loads(path.read_text())["sent"] == 2
    assert json.loads((tmp_path / "old").read_text())["sent"] == 1


def test_what_cannot_be_written_is_counted_and_said_once_in_a_while(ring, tmp_path, caplog):
    caplog.set_level("ERROR")
    path = tmp_path / "away" / "flows.log"
    log = FlowLog(ring, NAMES, sink=Sink(str(path)))
    for second in range(3):
        ring.put(record())
        log.drain(float(second))
    assert log.counts == (3, 0, 0, 3)
    assert len(caplog.records) == 1
    path.parent.mkdir()
    ring.put(record())
    log.drain(3.0)
    assert log.counts == (4, 1, 0, 3)
    log.close()


def test_a_full_disk_leaves_no_half_line(ring, caplog):
    sink = Sink("/dev/full")
    log = FlowLog(ring, NAMES, sink=sink)
    ring.put(record())
    log.drain(0.0)
    assert log.counts.failed == 1
    log.close()


async def test_it_runs_by_itself_and_ends_silent_conversations(ring):
    log = FlowLog(ring, NAMES)
    running = asyncio.create_task(log.run())
    try:
        ring.put(record())
        deadline = time.monotonic() + 5
        while log.counts.read != 1 or not ring.silenced:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
