"""One run of wrk: its command line, and what came of it. Any error in a run is a failed run, never a slow one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_name("report.lua")
_MARK = "MYCEL "


class RunError(Exception):
    """wrk did not measure what it was asked to: connections failed, requests timed out or were not answered 2xx."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run measured; latencies in microseconds as the client saw them."""

    requests_per_second: float
    p50_us: int
    p99_us: int
    requests: int
    gbit_per_second: float = 0.0  #: of a bulk transfer, which has no requests


def command(url: str, *, clients: int, seconds: int) -> list[str]:
    """One thread, keep-alive, ``clients`` connections for ``seconds``."""
    return [
        "wrk", "--threads", "1", "--connections", str(clients), "--duration", f"{seconds}s",
        "--timeout", "5s", "--script", str(_SCRIPT), url,
    ]  # fmt: skip


def parse(output: str) -> Run:
    """Take a run from wrk's output.

    :raises RunError: the run had errors, or the output tells of none.
    """
    lines = [line for line in output.splitlines() if line.startswith(_MARK)]
    if len(lines) != 1:
        raise RunError(f"wrk said nothing of its run: {output.strip()[-400:]!r}")
    measured = json.loads(lines[0].removeprefix(_MARK))
    errors = {kind: count for kind, count in measured["errors"].items() if count}
    if errors:
        raise RunError(f"{errors} among {measured['requests']} requests")
    if measured["requests"] == 0 or measured["duration_us"] <= 0:
        raise RunError("no request was answered")
    return Run(
        requests_per_second=measured["requests"] / measured["duration_us"] * 1e6,
        p50_us=measured["p50_us"],
        p99_us=measured["p99_us"],
        requests=measured["requests"],
    )
