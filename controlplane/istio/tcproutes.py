"""VirtualService's TCP routes: how connections to one service port are shared among destinations.

L4 alone does this: the endpoints of all destinations stand behind the service's own port, each with a weight, and every
connection draws one of them. What would take more than a port to match is left out and reported; the next route that matches
counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from controlplane.istio.destinationrule import rules
from controlplane.istio.hosts import resolve
from controlplane.model.endpoints import Backend, backends, service
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import Port, service_of
from controlplane.source import Object

#: Largest weight of one endpoint: more would only be a finer share.
MOST_WEIGHT = 1 << 16
_NOT_YET = ("destinationSubnets", "sourceSubnet", "sourceLabels", "sourceNamespace")


class Share(NamedTuple):
    """Endpoints that together get ``weight`` of the connections."""

    weight: int
    backends: tuple[Backend, ...]


def shares(g: Graph, virtual_service: Object, port: Port) -> tuple[Share, ...] | None:
    """The shares of a service port's connections by the first route that matches; None if none does."""
    for i, route in enumerate(virtual_service.spec.get("tcp") or ()):
        path = f"spec.tcp[{i}]"
        if route.get("route") and _matches(g, virtual_service, route, port, path):
            return _shares(g, virtual_service, route["route"], port, path)
    return None


def weigh(found: Sequence[Share]) -> tuple[tuple[Backend, int], ...]:
    """Each endpoint's weight, the smallest whole numbers that make its destination's share; in order of the shares."""
    found = [s for s in found if s.weight and s.backends]
    common = math.lcm(*(len(s.backends) for s in found))
    weights: dict[tuple[str, int], int] = {}
    chosen: dict[tuple[str, int], Backend] = {}
    for share in found:
        for backend in share.backends:
            key = backend.address, backend.port
            chosen[key] = backend
            weights[key] = weights.get(key, 0) + share.weight * common // len(share.backends)
    divisor = math.gcd(*weights.values()) or 1
    largest = max(weights.values(), default=0) // divisor
    scale = min(1.0, MOST_WEIGHT / largest) if largest else 1.0
    # Nobody who has a share loses it to rounding.
    return tuple((chosen[k], max(1, round(w // divisor * scale))) for k, w in weights.items())


def _matches(g: Graph, about: Object, route: Mapping[str, Any], port: Port, path: str) -> bool:
    matches = route.get("match") or ()
    for i, match in enumerate(matches):
        match = match or {}
        if match.get("port") and match["port"] != port.number:
            continue
        if match.get("gateways") and "mesh" not in match["gateways"]:
            continue
        unable = [f for f in _NOT_YET if match.get(f)]
        for field in unable:
            text = "routing by who calls, or which address, is not in force yet: this match is left out"
            g.findings.warning(about, f"{path}.match[{i}].{field}", text, "match by port")
        if not unable:
            return True
    return not matches


def _shares(
    g: Graph, about: Object, written: Sequence[Mapping[str, Any]], port: Port, path: str
) -> tuple[Share, ...]:
    found = []
    for i, route in enumerate(written):
        # The only one gets all, whatever it says.
        weight = route.get("weight", 0) if len(written) > 1 else 1
        if not weight:
            continue
        chosen = _backends(g, about, route["destination"], port, f"{path}.route[{i}].destination")
        found.append(Share(weight, chosen))
    return tuple(found)


def _backends(
    g: Graph, about: Object, to: Mapping[str, Any], dialled: Port, path: str
) -> tuple[Backend, ...]:
    """The endpoints of a destination. One that cannot be has none: others get its connections; alone, it refuses them."""
    key = service_of(resolve(to["host"], about.key.namespace))
    target = g.get(service, key) if key else None
    answer = "it gets no connections"
    if key is None or target is None:
        text = f"no service has the host {resolve(to['host'], about.key.namespace)}: {answer}"
        g.findings.error(about, f"{path}.host", text, "create it, or correct it")
        return ()
    ports = [p.number for p in target.ports if p.transport == "TCP"]
    number = (to.get("port") or {}).get("number") or (ports[0] if len(ports) == 1 else dialled.number)
    port = target.port(number)
    if port is None:
        exist = ", ".join(map(str, ports)) or "none"
        text = f"{target.key} has no port {number} (it has {exist}): {answer}"
        g.findings.error(about, f"{path}.port", text, "name one of its ports")
        return ()
    found = g.get(backends, key).ports[target.ports.index(port)]
    subset = to.get("subset") or ""
    if not subset:
        return found
    selecting = g.get(rules, key).subsets.get(subset)
    if selecting is None:
        text = f"no DestinationRule defines subset {subset} of {target.host}: {answer}"
        action = f"add a DestinationRule for host {target.host} with a subset named {subset}"
        g.findings.error(about, f"{path}.subset", text, action)
        return ()
    return tuple(b for b in found if b.pod and selecting.selects(b.pod))
