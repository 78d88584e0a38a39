"""``python -m bench``: measure, print the table, write ``build/bench.json``.

Exit status 0 when everything was measured (whether or not a bar is met: the table says), 1 when a run failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import (
    cni_add,
    connect_cost,
    figures,
    fleet,
    installation,
    pod_start,
    policy_apply,
    report,
    rows,
    wrk,
)
from bench.testbed import Testbed
from common.kubernetes import ApiError, Unreachable
from lab.errors import LabError

#: What is measured on labs or clusters of its own, each part with its rows.
_ON_CLUSTERS = (connect_cost, fleet, installation, policy_apply, pod_start, cni_add)
_FAILURES = (
    connect_cost.ConnectCostError,
    fleet.FleetError,
    installation.InstallError,
    policy_apply.PolicyApplyError,
    pod_start.PodStartError,
    cni_add.CniAddError,
)


def main() -> int:
    arguments = _arguments()
    names = [name for name in arguments.rows.split(",") if name]
    on_clusters = [part for part in _ON_CLUSTERS if not names or any(name in part.ROWS for name in names)]
    names = [name for name in names if not any(name in part.ROWS for part in _ON_CLUSTERS)]
    try:
        paths = [] if arguments.rows and not names else rows.select(names)
    except rows.UnknownRow as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    clients = tuple(int(count) for count in arguments.clients.split(","))
    # The figures are of the mesh as a whole: a selection of rows leaves them out unless they are asked for.
    with_figures = arguments.figures or not arguments.rows
    results: dict[tuple[str, int], list[wrk.Run]] = defaultdict(list)
    found: figures.Json = {}
    failed = ""
    try:
        if paths or with_figures:
            with Testbed(paths, figures=with_figures) as testbed:
                _measure_rows(testbed, paths, clients, arguments, results)
                if with_figures:
                    try:
                        found = figures.measure(testbed, say=_progress)
                    except (figures.FigureError, LabError) as error:
                        # The rows are worth showing; the run has failed all the same.
                        failed = str(error)
        for part in on_clusters:
            try:
                found |= part.measure(say=_progress)
            except (*_FAILURES, LabError, ApiError, Unreachable) as error:
                failed = failed or str(error)
    except (wrk.RunError, LabError) as error:
        _progress("")
        print(f"bench: failed: {error}", file=sys.stderr)
        return 1
    _progress("")
    made = report.build(paths, clients, results, found)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(made, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(report.table(made))
    for text, held in report.bars(made):
        print(f"{'ok    ' if held else 'MISSED'}  {text}")
    print(f"written to {arguments.output}")
    if failed:
        print(f"bench: failed: {failed}", file=sys.stderr)
    return 1 if failed else 0


def _measure_rows(
    testbed: Testbed,
    paths: Sequence[rows.Path],
    clients: Sequence[int],
    arguments: argparse.Namespace,
    results: dict[tuple[str, int], list[wrk.Run]],
) -> None:
    """:raises wrk.RunError: a path does not work, or a run had an error."""
    for path in paths:
        testbed.check(path)
        testbed.measure(path, clients=max(path.clients or clients), seconds=1)
    total = arguments.rounds * sum(len(path.clients or clients) for path in paths)
    order = rows.schedule(paths, rounds=arguments.rounds, clients=clients)
    for number, (turn, path, count) in enumerate(order, 1):
        run = testbed.measure(path, clients=count, seconds=arguments.seconds)
        results[path.name, count].append(run)
        found = (
            f"{run.gbit_per_second:.1f} Gbit/s"
            if run.gbit_per_second
            else f"{run.requests_per_second:,.0f}/s"
        )
        _progress(f"{number}/{total} round {turn + 1}: {path.name} c={count} {found}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--rows",
        default="",
        help=f"some of: {','.join((*rows.PATHS, *(row for part in _ON_CLUSTERS for row in part.ROWS)))}; "
        "what they are compared with runs too",
    )
    parser.add_argument("--clients", default=",".join(map(str, rows.CLIENTS)))
    parser.add_argument("--rounds", type=int, default=rows.ROUNDS)
    parser.add_argument("--seconds", type=int, default=rows.SECONDS, help="of one run")
    parser.add_argument(
        "--figures", action="store_true", help="with --rows: measure the figures of the mesh too"
    )
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    return parser.parse_args()


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
