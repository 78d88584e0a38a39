"""``/debug/maps`` and ``/debug/policies``: what the kernel has, by map and by pod.

Owns the pages' parameters and names; what stands in the maps is :mod:`agent.kernel.dump`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.kernel import Kernel
from agent.kernel.dump import UnknownMapError, all_verdicts, elements, row
from agent.metrics import name_of
from agent.node import Node
from bpf.limits import UNSIZED
from common.admin import BadQueryError

#: Elements of a map that are shown when nobody says how many.
_MOST = 1000

Page = Callable[[], object]
Query = Callable[[Mapping[str, str]], object]


def map_pages(node: Node, kernel: Kernel, pins: Path) -> tuple[dict[str, Page], dict[str, Query]]:
    """Pages without parameters, and with."""

    def name(number: int) -> str:
        return name_of(number, node.numbers)

    def maps() -> list[dict[str, Any]]:
        infos = kernel.map_infos()
        found = []
        for which, pressure in kernel.pressure().items():
            used = None if which in UNSIZED else pressure.used
            shown = row(which, infos[which], used, pressure.memory)
            shown["refused"] = pressure.refused
            shown["over_share"] = pressure.over_share
            found.append(shown)
        return found

    def of_map(query: Mapping[str, str]) -> list[dict[str, Any]]:
        _only(query, "name", "newest")
        most = query.get("newest", str(_MOST))
        if not most.isdecimal() or not 1 <= int(most) <= 1_000_000:
            raise BadQueryError(f"newest={most}: not a number from 1 to 1000000")
        try:
            return elements(pins, query.get("name", ""), int(most))
        except UnknownMapError as error:
            raise BadQueryError(str(error)) from None

    def policies(query: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        _only(query or {}, "pod")
        wanted = (query or {}).get("pod", "")
        sandboxes = node.pods.sandboxes()
        found = []
        for netns, (pod, verdicts) in all_verdicts(pins, name).items():
            sandbox = sandboxes.get(netns)
            addresses = list(filter(None, (pod.address4, pod.address6)))
            called = f"{sandbox.namespace}/{sandbox.name}" if sandbox is not None else ""
            if wanted and wanted not in (called, sandbox.uid if sandbox else "", *addresses):
                continue
            workload = node.mesh.workloads.get(sandbox.uid) if sandbox is not None else None
            found.append(
                {
                    "pod": called,
                    "addresses": addresses,
                    "selected_by": list(workload.policies) if workload is not None else [],
                    "network_policies": list(workload.network_policies) if workload is not None else [],
                    "mtls": workload.mtls.value if workload is not None else "",
                    **verdicts,
                }
            )
        if wanted and not found:
            raise BadQueryError(f"pod={wanted}: no pod of node {node.name} that the kernel has is called so")
        return found

    return (
        {"/debug/maps": maps, "/debug/policies": policies},
        {"/debug/maps": of_map, "/debug/policies": policies},
    )


def _only(query: Mapping[str, str], *known: str) -> None:
    for name in query:
        if name not in known:
            raise BadQueryError(f"{name}: no such parameter; there are {', '.join(known)}")
