"""DestinationRule: subsets of a service's endpoints, and how they are balanced.

Looked up by the service: rules in its own namespace first, then in the root namespace; the closest host wins, and rules of equal
closeness are merged, the oldest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controlplane.istio import GROUP_NETWORKING
from controlplane.istio.hosts import Hosts, note_export, reaches, resolve, services_matching
from controlplane.model.findings import Findings
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import Pod, host_of, selects
from controlplane.model.routing import Balancing
from controlplane.model.store import rows
from controlplane.model.world import store
from controlplane.source import Key, Object

_BALANCING = {
    "LEAST_REQUEST": Balancing.LEAST_REQUEST,
    "LEAST_CONN": Balancing.LEAST_REQUEST,
    "ROUND_ROBIN": Balancing.ROUND_ROBIN,
    "RANDOM": Balancing.RANDOM,
}
_NOT_YET = {
    "connectionPool": "limits on connections and requests",
    "outlierDetection": "ejection of failing endpoints",
    "tunnel": "tunnelling",
    "proxyProtocol": "a PROXY header",
    "retryBudget": "a retry budget",
}


@dataclass(frozen=True, slots=True)
class Subset:
    labels: Mapping[str, str]
    policy: Mapping[str, Any]

    def selects(self, pod: Pod) -> bool:
        return selects(self.labels, pod.labels)


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything that DestinationRules say about one service."""

    policy: Mapping[str, Any] = field(default_factory=dict)
    subsets: Mapping[str, Subset] = field(default_factory=dict)

    def balancing(self, port: int, subset: str = "") -> Balancing:
        """For a port of the service and a subset (empty for all endpoints)."""
        simple = self._simple(port, subset)
        return _BALANCING.get(simple or "", Balancing.LEAST_REQUEST)

    def balances(self, port: int) -> bool:
        """True if the rules choose a balancing of their own for all of a port's traffic."""
        return self._simple(port, "") in _BALANCING

    def _simple(self, port: int, subset: str) -> str | None:
        """A subset's goes before the destination's. A port's settings replace those beside them and inherit nothing."""
        chosen = self.subsets[subset].policy if subset in self.subsets else {}
        simple: str | None = None
        for policy in (self.policy, chosen):
            if policy.get("loadBalancer"):
                simple = policy["loadBalancer"].get("simple")
            for settings in policy.get("portLevelSettings") or ():
                if (settings.get("port") or {}).get("number") == port:
                    simple = (settings.get("loadBalancer") or {}).get("simple")
                    break
        return simple


def rules(g: Graph, key: Key) -> Rules:
    """What holds for a service."""
    host = host_of(key)
    for namespace in dict.fromkeys((key.namespace, g.settings.root_namespace)):
        hosts = g.get(_hosts, namespace)
        found = [
            (close, rule)
            for close, k in hosts.matching(host)
            if reaches(rule := g.read(store(g).objects, k), key.namespace)
        ]
        if found:
            best = max(c for c, _ in found)
            return _merge([rule for c, rule in found if c == best], g.findings)
    return Rules()


def destination_rule_notes(g: Graph, key: Key) -> None:
    """What there is to say about one rule, whatever it is used for."""
    rule = g.read(store(g).objects, key)
    if rule is None:
        return
    note_export(rule, g.findings)
    if rule.spec.get("workloadSelector"):
        text = "a rule for some callers only is not in force yet: it is left out"
        g.findings.warning(rule, "spec.workloadSelector", text, "make it a rule for all callers")
        return
    _note(rule, g.findings)
    host = resolve(rule.spec["host"], key.namespace)
    namespaces = {k.namespace for k in services_matching(g, host)}
    if not namespaces:
        text = f"no service has the host {host}"
        g.findings.warning(rule, "spec.host", text, "create it, or correct the host")
    elif key.namespace != g.settings.root_namespace and key.namespace not in namespaces:
        text = "a rule in the namespace of the clients only is not in force yet"
        action = f"move it to the service's namespace or to {g.settings.root_namespace}"
        g.findings.warning(rule, "spec.host", text, action)


def _hosts(g: Graph, namespace: str) -> Hosts:
    return Hosts.of(
        (resolve(rule.spec["host"], namespace), rule.key)
        for rule in rows(store(g).by_namespace, g, (GROUP_NETWORKING, "DestinationRule", namespace))
        if not rule.spec.get("workloadSelector")
    )


def _merge(found: list[Object], findings: Findings) -> Rules:
    policy: Mapping[str, Any] = {}
    subsets: dict[str, Subset] = {}
    origin: dict[str, Object] = {}
    for rule in found:
        own = rule.spec.get("trafficPolicy") or {}
        if policy and own:
            text = f"{found[0].key} is older and its policy holds"
            findings.warning(rule, "spec.trafficPolicy", text, "merge the two rules")
        policy = policy or own
        for i, subset in enumerate(rule.spec.get("subsets") or ()):
            name = subset["name"]
            if name in subsets:
                text = f"subset {name} is already defined by {origin[name].key}, which is older"
                findings.warning(rule, f"spec.subsets[{i}]", text, "merge the two rules")
                continue
            subsets[name] = Subset(subset.get("labels") or {}, subset.get("trafficPolicy") or {})
            origin[name] = rule
    return Rules(policy, subsets)


def _note(rule: Object, findings: Findings) -> None:
    holders = [("spec.trafficPolicy", rule.spec.get("trafficPolicy") or {})]
    for i, subset in enumerate(rule.spec.get("subsets") or ()):
        holders.append((f"spec.subsets[{i}].trafficPolicy", subset.get("trafficPolicy") or {}))
    for path, holder in list(holders):
        holders += [
            (f"{path}.portLevelSettings[{i}]", p) for i, p in enumerate(holder.get("portLevelSettings") or ())
        ]
    for path, policy in holders:
        for name, what in _NOT_YET.items():
            if policy.get(name):
                findings.warning(rule, f"{path}.{name}", f"{what}: accepted, not in force yet")
        balancer = policy.get("loadBalancer") or {}
        for name in balancer.keys() - {"simple"}:
            findings.warning(rule, f"{path}.loadBalancer.{name}", "accepted, not in force yet")
        if balancer.get("simple") == "PASSTHROUGH":
            text = "PASSTHROUGH is not in force: the least loaded endpoint is chosen"
            findings.warning(rule, f"{path}.loadBalancer.simple", text, "choose another")
        mode = (policy.get("tls") or {}).get("mode")
        if mode in ("SIMPLE", "MUTUAL"):
            findings.warning(rule, f"{path}.tls", f"TLS origination ({mode}): accepted, not in force yet")
        elif mode == "DISABLE":
            findings.info(
                rule, f"{path}.tls", "DISABLE has no effect: the mesh encrypts between nodes by itself"
            )
