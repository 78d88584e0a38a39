"""What was measured, as ``build/bench.json`` and as a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

from bench import stats
from bench.rows import Path, Results, references

Json = dict[str, Any]


def machine() -> Json:
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {"kernel": platform.release(), "cpu": model, "cpus": len(os.sched_getaffinity(0))}


def build(paths: Sequence[Path], clients: Sequence[int], results: Results, figures: Json) -> Json:
    """The whole report. Rows in the paths' order; a path that is a reference only stands under ``references``."""
    report: Json = {"machine": machine(), "rows": [], "references": [], "figures": figures}
    for path in paths:
        for count in path.clients or clients:
            report["references" if path.reference else "rows"].append(_row(path, count, results))
    return report


def _row(path: Path, clients: int, results: Results) -> Json:
    runs = results[path.name, clients]
    row: Json = {
        "path": path.name,
        "topology": path.topology,
        "clients": clients,
        "rounds": len(runs),
        "requests_per_second": round(median(run.requests_per_second for run in runs), 1),
        "p50_us": median(run.p50_us for run in runs),
        "p99_us": median(run.p99_us for run in runs),
        **(
            {"gbit_per_second": round(median(run.gbit_per_second for run in runs), 2)}
            if path.unit == "gbit_per_second"
            else {}
        ),
        "ratio": {},
        "ratio_95": {},
    }
    for name, reference in references(path).items():
        theirs = [getattr(run, path.unit) for run in results[reference.name, clients]]
        compared = stats.ratio([getattr(run, path.unit) for run in runs], theirs)
        row["ratio"][name] = round(compared.value, 3)
        row["ratio_95"][name] = [round(compared.low, 3), round(compared.high, 3)]
    return row


def table(report: Json) -> Table:
    made = Table(
        "path",
        title="medians of interleaved rounds; ratios of requests/s with 95 % bounds",
        title_justify="left",
    )
    for header in ("clients", "requests/s", "p50 µs", "p99 µs"):
        made.add_column(header, justify="right")
    made.add_column("ratio")
    last = ""
    for row in report["references"] + report["rows"]:
        if last and row["path"] != last:
            made.add_section()
        ratios = [
            f"{value:.2f}x {name} [{row['ratio_95'][name][0]:.2f}, {row['ratio_95'][name][1]:.2f}]"
            for name, value in row["ratio"].items()
        ]
        made.add_row(
            row["path"] if row["path"] != last else "",
            str(row["clients"]),
            f"{row['gbit_per_second']:.1f} Gbit/s"
            if "gbit_per_second" in row
            else f"{row['requests_per_second']:,.0f}",
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            "\n".join(ratios),
        )
        last = row["path"]
    return made


#: What has to hold: (path, clients, compared with, at least).
BARS = (
    ("same-node-l4", 32, "no-mesh", 1.7),
    ("same-node-l4-new-connections", 32, "no-mesh", 0.9),
    ("same-node-bulk", 1, "no-mesh", 0.97),
    ("same-node-bulk", 8, "no-mesh", 0.97),
    ("same-node-large-responses", 8, "no-mesh", 1.0),
    ("same-node-l7", 32, "envoy-http-hop", 1.0),
    ("cross-node-l4", 32, "envoy-mtls-tcp-pair", 1.2),
    ("cross-node-l4", 256, "envoy-mtls-tcp-pair", 1.5),
)


def bars(report: Json) -> list[tuple[str, bool]]:
    """Each bar that this report can judge: what was measured against it, and whether it holds."""
    rows = {(row["path"], row["clients"]): row for row in report["rows"]}
    judged = []
    for path, clients, reference, least in BARS:
        if (row := rows.get((path, clients))) is not None:
            value = row["ratio"][reference]
            text = f"{path} c={clients}: {value:.2f}x {reference}, at least {least}x"
            judged.append((text, value >= least))
    if (ours := rows.get(("same-node-l4", 1))) is not None and (
        theirs := rows.get(("no-mesh", 1))
    ) is not None:
        text = f"same-node-l4 c=1: p50 {ours['p50_us']:.0f} µs, at most no-mesh's {theirs['p50_us']:.0f}"
        judged.append((text, ours["p50_us"] <= theirs["p50_us"]))
    figures = report["figures"]
    if (change := figures.get("policy_change_p99_ms")) is not None:
        judged.append((f"policy change p99: {change:.0f} ms, at most 1000", change <= 1000))
    if (agent := figures.get("pss_mb", {}).get("agent")) is not None:
        judged.append((f"agent memory (PSS): {agent:.1f} MB, at most 60", agent <= 60))
    if (plain := figures.get("plain_bytes_between_nodes")) is not None:
        judged.append((f"plain payload bytes between nodes: {plain}, exactly 0", plain == 0))
    if (change := figures.get("fleet_policy_p99_ms")) is not None:
        text = f"policy-fleet: p99 {change:.0f} ms until the last of 200 nodes acknowledges, at most 1000"
        judged.append((text, change <= 1000))
    if (peak := figures.get("controller_peak_mb")) is not None:
        judged.append((f"controller-memory: {peak:.0f} MB at the most, at most 500", peak <= 500))
    if (sent := figures.get("endpoint_bytes")) is not None:
        most = max(sent.values())
        judged.append((f"endpoint-bytes: {most} to a client, at most 10,000", most <= 10_000))
    if (seconds := figures.get("install_seconds")) is not None:
        text = f"install: {seconds:.1f} s until mycel check passes, at most 30"
        judged.append((text, seconds <= 30))
    if (apply := figures.get("policy_apply_ms")) is not None:
        text = f"policy-apply: p99 {apply['p99']:.0f} ms of {apply['changes']} until both nodes enforce, at most 1000"
        judged.append((text, apply["p99"] <= 1000))
    if (add := figures.get("cni_add_ms")) is not None:
        text = (
            f"cni-add: p99 {add['p99']:.0f} ms of {add['rounds']} are our plugin's, one at a time, at most 60"
        )
        judged.append((text, add["p99"] <= 60))
    if (start := figures.get("pod_start_ms")) is not None:
        text = f"pod-start: {start['added']:+.0f} ms p50 with our plugin in the chain, at most +60"
        judged.append((text, start["added"] <= 60))
    if (cost := figures.get("connect_cost")) is not None:
        text = (
            f"connect-cost: {cost['tcp']['ratio']:.2f}x with {cost['services']:,} services and {cost['endpoints']:,} endpoints, "
            "at most 1.1x"
        )
        judged.append((text, cost["tcp"]["ratio"] <= 1.1))
    return judged
