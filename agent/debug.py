"""JSON pages of the admin server: what ``mycel check``, ``mycel stat`` and people ask an agent.

Owns their shape. They are called in the admin server's threads and only read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.debug_maps import map_pages
from agent.debug_why import Why
from agent.flowlog import protocol_name, reason_name
from agent.kernel import FlowCounters, FlowKey, Kernel
from agent.kernel.tables import Tables
from agent.metrics import name_of
from agent.node import Node
from agent.proxies import Proxies
from agent.stream import Stream
from bpf import wire
from bpf.limits import LIMITS
from bpf.wire import PROTOCOL_UDP

Queries = Mapping[str, Callable[[Mapping[str, str]], object]]


def queries(node: Node, kernel: Kernel, pins: Path) -> Queries:
    """Pages with parameters, by path."""
    why = Why(node, lambda: Tables.open(pins), kernel.host_addresses)
    return {"/debug/why": why.page, **map_pages(node, kernel, pins)[1]}


def pages(
    node: Node, kernel: Kernel, proxies: Proxies, stream: Stream, pins: Path
) -> Mapping[str, Callable[[], object]]:
    """Page by path."""

    def name(number: int) -> str:
        return name_of(number, node.numbers)

    def status() -> dict[str, Any]:
        return {
            "node": node.name,
            "version": node.mesh.version,
            "controller": {"connected": stream.connected, "problem": stream.problem},
            "problem": node.problem,
            "proxies": proxies.connected(),
            "unattached": node.unattached(),
            "abi": wire.ABI,
            "attached": len(node.pods.sandboxes()),
            "enrolled": len(node.enrolled()),
            "detached_links": kernel.detached(),
            "repairs": node.repairs,
            "refusals": {reason_name(reason): count for reason, count in kernel.refusals_by_reason().items()},
            "splice": {
                "supported": kernel.splices.supported,
                "on": kernel.splices.on,
                **{slot.name.lower(): count for slot, count in kernel.splices.counters().items()},
            },
            "fullest": _fullest(kernel),
            "limits": [
                "UDP of enrolled pods is judged and counted, and not encrypted",
            ],
        }

    def pods() -> list[dict[str, Any]]:
        enrolled = {pod.netns_cookie for pod in node.enrolled()}
        rows = []
        for cookie, sandbox in node.pods.sandboxes().items():
            workload = node.mesh.workloads.get(sandbox.uid)
            policy = kernel.policy(cookie) if cookie in enrolled else None
            rows.append(
                {
                    "uid": sandbox.uid,
                    "namespace": sandbox.namespace,
                    "name": sandbox.name,
                    "addresses": sandbox.addresses,
                    "netns_cookie": cookie,
                    "known": workload is not None,
                    "enrolled": workload is not None and workload.enrolled,
                    "programmed": cookie in enrolled,
                    "stage": stage.name.lower() if (stage := node.stage(cookie)) is not None else "",
                    "identity": workload.identity if workload is not None else "",
                    "mtls": workload.mtls.value if workload is not None else "",
                    "generation": policy[0] if policy is not None else 0,
                    "policy": [
                        {
                            "source": name(identity),
                            "port": port,
                            "address_class": of[0] if of else 0,
                            "allowed": allowed,
                        }
                        for (identity, port, *of), allowed in sorted(policy[1].items())
                    ]
                    if policy is not None
                    else [],
                }
            )
        return rows

    def flows() -> list[dict[str, Any]]:
        return [
            {
                "source": name(key.source),
                "destination": name(key.destination),
                "source_zone": node.numbers.zone_name(key.source_zone),
                "destination_zone": node.numbers.zone_name(key.destination_zone),
                "protocol": protocol_name(key.protocol),
                "port": key.port,
                "direction": key.direction.name.lower(),
                "verdict": "refused" if key.verdict else "allowed",
                "reason": reason_name(key.verdict),
                "opened": counters.opened,
                "closed": counters.closed,
                "refused": counters.refused,
                "sent": counters.sent,
                "received": counters.received,
                **_more(key, counters),
                "measured_in": "kernel",
            }
            for key, counters in sorted(kernel.flows().items())
        ]

    def connections() -> list[dict[str, Any]]:
        return [
            {
                "client": f"{c.client[0]}:{c.client[1]}",
                "server": f"{c.server[0]}:{c.server[1]}",
                "source": name(c.source),
                "destination": name(c.destination),
                "via": c.via.name.lower(),
                "generation": c.generation,
                "sent": c.sent,
                "received": c.received,
                "rtt_us": c.rtt_us,
                "retransmits": c.retransmits,
            }
            for c in kernel.connections()
        ]

    def tables() -> dict[str, Any]:
        return {
            "peers": {
                address: {"local": peer.local, "enrolled": peer.enrolled, "identity": name(peer.identity)}
                for address, peer in sorted(kernel.peers().items())
            },
            "services": {
                f"{frontend.address}:{frontend.port}/{frontend.protocol.name}": {
                    "l7": service.l7,
                    "backends": [
                        f"{b.address}:{b.port}" + (f" weight {b.weight}" if b.weight != 1 else "")
                        for b in sorted(service.backends)
                    ],
                    "affinity_s": service.affinity,
                }
                for frontend, service in sorted(kernel.services().items())
            },
            "pressure": {m: p._asdict() for m, p in sorted(kernel.pressure().items())},
        }

    return {
        "/debug/status": status,
        "/debug/pods": pods,
        "/debug/flows": flows,
        "/debug/connections": connections,
        "/debug/tables": tables,
        **map_pages(node, kernel, pins)[0],
    }


def _fullest(kernel: Kernel) -> dict[str, Any]:
    """The map that has least room left, of those that do not forget by themselves."""
    found = {m: p for m, p in kernel.pressure().items() if p.size and m in LIMITS and not LIMITS[m].forgets}
    name, pressure = max(found.items(), key=lambda item: (item[1].ratio, item[0]))
    return {
        "name": name,
        "entries": pressure.used,
        "size": pressure.size,
        "refused": sum(p.refused for p in found.values()),
    }


def _more(key: FlowKey, counters: FlowCounters) -> dict[str, Any]:
    """What only one of the protocols has."""
    if key.protocol == PROTOCOL_UDP:
        return {
            "sent_datagrams": counters.sent_datagrams,
            "received_datagrams": counters.received_datagrams,
            "refused_bytes": counters.refused_bytes,
        }
    rtt = round(counters.rtt_us / counters.rtt_samples) if counters.rtt_samples else 0
    return {"retransmits": counters.retransmits, "mean_rtt_us": rtt}
