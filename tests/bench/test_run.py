"""The benchmark as it is started, on few and short runs; and that its figures can tell good from bad."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench import figures
from lab.capture import Capture


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def test_a_row_that_is_none_is_refused_at_once() -> None:
    done = bench("--rows", "same-node-l5")
    assert done.returncode == 2
    assert "no row same-node-l5; there are no-mesh" in done.stderr


@pytest.mark.privileged
def test_rows_are_measured_with_what_they_are_compared_with(tmp_path: Path) -> None:
    output = tmp_path / "build" / "bench.json"
    done = bench(
        "--rows", "same-node-l7,cross-node-l4", "--clients", "2", "--rounds", "1", "--seconds", "1", "--output", str(output)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [row["path"] for row in report["rows"]] == [
        "no-mesh", "same-node-l7", "cross-node-l4", "envoy-http-hop", "envoy-mtls-tcp-pair", "envoy-mtls-http-pair",
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["clients"] == 2
        assert row["requests_per_second"] > 0
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert row["ratio"].keys() == row["ratio_95"].keys()
    assert report["machine"]["cpus"] >= 1
    assert report["figures"] == {}, "a selection of rows measures no figures unless asked"
    assert "cross-node-l4" in done.stdout


def capture_of(*segments: tuple[str, int, str, int, bytes]) -> Capture:
    def of() -> Iterator[tuple[str, int, str, int, bytes]]:
        return iter(segments)

    return cast(Capture, SimpleNamespace(segments=of))


CLIENT, SERVER, STRANGER = "10.244.1.2", "10.244.2.2", "10.99.0.1"
RECORD = b"\x17\x03\x03\x00\x05hello"


@pytest.mark.parametrize(
    ("segment", "plain", "tunnelled"),
    [
        ((CLIENT, 4000, SERVER, 15008, b"\x16\x03\x01\x00\x01x"), 0, 6),
        ((SERVER, 15008, CLIENT, 4000, RECORD), 0, 10),
        ((CLIENT, 4000, SERVER, 8080, b"GET"), 3, 0),
        ((SERVER, 8080, CLIENT, 4000, b"HTTP"), 4, 0),
        ((CLIENT, 4000, SERVER, 15008, b"GET"), 3, 0),
        ((CLIENT, 4000, SERVER, 15008, b"\x17\x03\x03\x00\x06MARKER"), 11, 0),
        ((CLIENT, 4000, STRANGER, 8080, b"GET"), 0, 0),
        ((CLIENT, 4000, SERVER, 8080, b""), 0, 0),
    ],
)
def test_plain_payload_is_told_from_hbone(segment: tuple[Any, ...], plain: int, tunnelled: int) -> None:
    capture = capture_of(cast(Any, segment))
    assert figures.count_payload(capture, {CLIENT, SERVER}, b"MARKER") == (plain, tunnelled)
