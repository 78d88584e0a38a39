"""The benchmark's arithmetic, order and report, on figures whose outcome is known."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from bench import report, rows, stats, wrk
from bench.wrk import Run


def test_a_noisy_minute_that_hits_both_sides_leaves_the_ratio_alone() -> None:
    reference = [100.0, 40.0, 90.0, 10.0, 110.0, 100.0, 80.0, 95.0, 105.0]
    compared = stats.ratio([2 * value for value in reference], reference)
    assert (compared.value, compared.low, compared.high) == (2.0, 2.0, 2.0)


def test_bounds_hold_the_median_and_are_of_the_rounds() -> None:
    generator = random.Random(7)
    ours = [generator.uniform(80, 120) for _ in range(9)]
    compared = stats.ratio(ours, [100.0] * 9)
    assert min(ours) / 100 <= compared.low < compared.value < compared.high <= max(ours) / 100
    assert compared == stats.ratio(ours, [100.0] * 9), "the same figures give the same bounds"


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_what_cannot_be_compared_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError):
        stats.ratio(ours, theirs)


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 25), (99, 50), (98, 49), (100, 50)])
def test_percentile_is_a_value_that_was_measured(percent: float, expected: float) -> None:
    assert stats.percentile(list(range(1, 51)), percent) == expected


def _wrk_said(requests: int = 1000, **errors: int) -> str:
    counted = {"connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0} | errors
    inner = ", ".join(f'"{kind}": {count}' for kind, count in counted.items())
    return (
        f'Running 2s test\n\nMYCEL {{"duration_us": 2000000, "requests": {requests}, "bytes": 9, "p50_us": 70, '
        f'"p99_us": 200, "max_us": 900, "errors": {{{inner}}}}}\n'
    )


def test_a_run_is_read_exactly() -> None:
    assert wrk.parse(_wrk_said()) == Run(requests_per_second=500.0, p50_us=70, p99_us=200, requests=1000)


@pytest.mark.parametrize(
    "output",
    [_wrk_said(status=1), _wrk_said(read=3), _wrk_said(timeout=1), _wrk_said(0), "", "unable to connect"],
)
def test_a_run_with_any_error_fails(output: str) -> None:
    with pytest.raises(wrk.RunError):
        wrk.parse(output)


def test_every_round_runs_every_path_once_in_its_own_order() -> None:
    paths = rows.select([])
    order = list(rows.schedule(paths, rounds=9, clients=(1, 32)))
    runs = sum(len(path.clients or (1, 32)) for path in paths)
    assert len(order) == 9 * runs
    for number in range(9):
        counted = Counter((path.name, clients) for n, path, clients in order if n == number)
        assert set(counted.values()) == {1}
        assert len(counted) == runs
    assert [path.name for n, path, _ in order if n == 0] != [path.name for n, path, _ in order if n == 1]


def test_a_row_brings_what_it_is_compared_with() -> None:
    assert [path.name for path in rows.select(["same-node-l7"])] == [
        "no-mesh",
        "same-node-l7",
        "envoy-http-hop",
    ]
    assert {path.name for path in rows.select(["cross-node-l4"])} == {
        "no-mesh-cross-node", "cross-node-l4", "envoy-mtls-tcp-pair", "envoy-mtls-http-pair",
    }  # fmt: skip
    with pytest.raises(rows.UnknownRow, match="same-node-l5"):
        rows.select(["same-node-l5"])


def test_the_report_compares_each_path_with_its_own_topology_and_judges_the_bars() -> None:
    speed = {
        "no-mesh": 100.0,
        "no-mesh-cross-node": 50.0,
        "same-node-l4": 180.0,
        "same-node-l7": 30.0,
        "cross-node-l4": 20.0,
        "envoy-http-hop": 15.0,
        "envoy-mtls-tcp-pair": 10.0,
        "envoy-mtls-http-pair": 5.0,
    }
    paths = rows.select([name for name in rows.PATHS if name in speed])
    results = {
        (path.name, clients): [Run(speed[path.name] + n, 1, 2, 3) for n in range(9)]
        for path in paths
        for clients in (32, 256)
    }
    figures = {"policy_change_p99_ms": 1200.0, "pss_mb": {"agent": 40.0}, "plain_bytes_between_nodes": 0}
    made = report.build(paths, (32, 256), results, figures)
    assert {row["path"] for row in made["references"]} == {"no-mesh-cross-node"}
    by_row = {(row["path"], row["clients"]): row for row in made["rows"]}
    assert len(by_row) == 7 * 2
    cross = by_row["cross-node-l4", 32]
    assert cross["requests_per_second"] == 24.0
    assert cross["ratio"]["no-mesh"] == round(24 / 54, 3)
    assert cross["ratio_95"]["envoy-mtls-tcp-pair"][0] <= cross["ratio"]["envoy-mtls-tcp-pair"]
    assert by_row["no-mesh", 32]["ratio"] == {}
    judged = report.bars(made)
    assert [held for _, held in judged] == [True, True, True, True, False, True, True]
