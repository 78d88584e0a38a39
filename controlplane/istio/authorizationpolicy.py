"""AuthorizationPolicy, as far as a connection shows it: identities, addresses and ports.

What only a request shows (paths, methods, tokens, the address that a header names) is made fail-closed, as
:mod:`controlplane.api.authorization` says: such a rule never allows, and denies as if the attribute were not there (as
Istio's ztunnel does). CUSTOM denies what its rules match, since nobody is asked. AUDIT and dry runs decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_network
from typing import Any, NamedTuple

from msgspec.structs import replace

from controlplane.api import Action, Authorization, Operation, Rule, Source, canonical_block
from controlplane.api.authorization import pattern_matches
from controlplane.istio import GROUP_SECURITY
from controlplane.model.endpoints import members
from controlplane.model.findings import Findings
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import Pod, selects
from controlplane.model.store import rows
from controlplane.model.world import store
from controlplane.source import Key, Object

_L7_SOURCE = ("requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks")
_L7_OPERATION = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")


class _Unseen(Exception):
    """An attribute that L4 cannot judge; only raised while an ALLOW rule is compiled."""


class Selector(NamedTuple):
    """Which workloads of its scope a policy selects: by labels, or those behind services of its namespace."""

    policy: str  #: key of the Authorization, ``NAMESPACE/NAME``
    labels: Mapping[str, str]
    services: tuple[Key, ...] | None


def authorization(g: Graph, key: Key) -> Authorization | None:
    """One policy, compiled; None if it decides nothing."""
    policy = g.read(store(g).objects, key)
    if policy is None:
        return None
    return _Compiler(policy, g.settings.trust_domain, g.findings).policy()


def selectors(g: Graph, namespace: str) -> tuple[Selector, ...]:
    """Of all policies of a namespace that decide something."""
    kind = (GROUP_SECURITY, "AuthorizationPolicy", namespace)
    return tuple(
        _selector(policy)
        for policy in rows(store(g).by_namespace, g, kind)
        if g.get(authorization, policy.key) is not None
    )


def policies_of(g: Graph, pod: Pod) -> tuple[str, ...]:
    """Keys of the policies that select a workload, sorted."""
    found = g.get(selectors, pod.namespace)
    if pod.namespace != g.settings.root_namespace:
        found = (*g.get(selectors, g.settings.root_namespace), *found)
    return tuple(sorted(s.policy for s in found if _selects(g, s, pod)))


def _selector(policy: Object) -> Selector:
    namespace, name = policy.key.namespace, policy.key.name
    targets = target_refs(policy)
    services = [
        Key("", "Service", namespace, t["name"])
        for t in targets
        if t.get("kind") == "Service" and t.get("group", "") in ("", "core") and t.get("name")
    ]
    labels = (policy.spec.get("selector") or {}).get("matchLabels") or {}
    return Selector(f"{namespace}/{name}", labels, tuple(services) if targets else None)


def _selects(g: Graph, selector: Selector, pod: Pod) -> bool:
    if selector.services is None:
        return selects(selector.labels, pod.labels)
    # A Service as target means its waypoint in Istio. Here its workloads enforce, for whoever reaches them.
    return any(
        service.namespace == pod.namespace and any(p.key == pod.key for p in g.get(members, service))
        for service in selector.services
    )


def target_refs(policy: Object) -> list[Mapping[str, Any]]:
    """``targetRefs`` and the older ``targetRef``, as one list."""
    one = policy.spec.get("targetRef")
    return [*(policy.spec.get("targetRefs") or ()), *([one] if one else ())]


class _Part(NamedTuple):
    """A condition that all sources, or all operations, of a rule have to meet besides their own."""

    path: str
    field: str
    values: tuple[str, ...]
    not_values: tuple[str, ...]


class _Compiler:
    def __init__(self, policy: Object, trust_domain: str, findings: Findings) -> None:
        self._policy = policy
        self._namespace = policy.key.namespace
        self._domain = trust_domain
        self._findings = findings
        self._action = policy.spec.get("action") or "ALLOW"

    def policy(self) -> Authorization | None:
        """The policy, or None if it decides nothing."""
        policy = self._policy
        if policy.annotations.get("istio.io/dry-run") == "true":
            self._findings.info(policy, "metadata.annotations", "a dry run: accepted, decides nothing")
            return None
        if self._action == "AUDIT":
            self._findings.warning(
                policy, "spec.action", "AUDIT is accepted, not in force yet: nothing is recorded"
            )
            return None
        if self._action == "CUSTOM":
            self._findings.warning(
                policy,
                "spec.action",
                "CUSTOM is not in force yet: what its rules match is refused, since nobody can be asked",
                "use ALLOW or DENY",
            )
        for i, target in enumerate(target_refs(policy)):
            if target.get("kind") != "Service":
                self._findings.warning(
                    policy,
                    f"spec.targetRefs[{i}]",
                    f"{target.get('kind')} as target is not in force yet: it selects nothing",
                )
        spec_rules = policy.spec.get("rules") or ()
        if not spec_rules:
            effect = "refuses everything" if self._action == "ALLOW" else "has no effect"
            self._findings.info(policy, "spec.rules", f"{self._action} without rules {effect}")
        rules = [r for i, rule in enumerate(spec_rules) if (r := self._rule(rule or {}, f"spec.rules[{i}]"))]
        action = Action.ALLOW if self._action == "ALLOW" else Action.DENY
        return Authorization(self._namespace, policy.key.name, action, tuple(rules))

    def _rule(self, rule: Mapping[str, Any], path: str) -> Rule | None:
        """One rule, or None if no connection can match it."""
        try:
            parts = self._conditions(rule, path)
            written = [
                self._source((f or {}).get("source") or {}, f"{path}.from[{i}].source")
                for i, f in enumerate(rule.get("from") or ())
            ]
            sources = [s for s in written if s]
            if written and not sources:
                return None
            operations = [
                self._operation((t or {}).get("operation") or {}, f"{path}.to[{i}].operation")
                for i, t in enumerate(rule.get("to") or ())
            ]
            for part in parts:
                if part.field == "ports":
                    operations = [
                        o for old in operations or [Operation()] if (o := self._with_ports(old, part))
                    ]
                    if not operations:
                        return None
                else:
                    sources = [s for old in sources or [Source()] if (s := self._with(old, part))]
                    if not sources:
                        return None
        except _Unseen:
            return None
        return Rule(tuple(sources), tuple(operations))

    def _source(self, source: Mapping[str, Any], path: str) -> Source | None:
        """One source, or None if nobody can be it."""
        for field in _L7_SOURCE:
            self._unseen(source, field, path, "only an HTTP request shows it")
        result = Source(
            principals=self._principals(source.get("principals") or ()),
            not_principals=self._principals(source.get("notPrincipals") or ())
            + self._accounts(source.get("notServiceAccounts") or ()),
            namespaces=tuple(source.get("namespaces") or ()),
            not_namespaces=tuple(source.get("notNamespaces") or ()),
            ip_blocks=_blocks(source.get("ipBlocks") or ()),
            not_ip_blocks=_blocks(source.get("notIpBlocks") or ()),
        )
        # Schema: service accounts never stand beside principals.
        accounts = self._accounts(source.get("serviceAccounts") or ())
        if accounts:
            result = replace(result, principals=accounts)
        domains = _Part(
            f"{path}.trustDomains",
            "principals",
            self._domains(source, "trustDomains", path),
            self._domains(source, "notTrustDomains", path),
        )
        return self._with(result, domains)

    def _operation(self, operation: Mapping[str, Any], path: str) -> Operation:
        for field in _L7_OPERATION:
            self._unseen(operation, field, path, "only an HTTP request shows it")
        return Operation(_ports(operation.get("ports") or ()), _ports(operation.get("notPorts") or ()))

    def _conditions(self, rule: Mapping[str, Any], path: str) -> list[_Part]:
        parts = []
        for i, condition in enumerate(rule.get("when") or ()):
            at = f"{path}.when[{i}]"
            key = condition["key"]
            values, not_values = tuple(condition.get("values") or ()), tuple(condition.get("notValues") or ())
            if key == "source.principal":
                parts.append(_Part(at, "principals", self._principals(values), self._principals(not_values)))
            elif key == "source.namespace":
                parts.append(_Part(at, "namespaces", values, not_values))
            elif key == "source.ip":
                parts.append(_Part(at, "ip_blocks", _blocks(values), _blocks(not_values)))
            elif key == "destination.port":
                parts.append(_Part(at, "ports", values, not_values))
            else:
                seen = key.startswith(("source.", "destination.", "connection."))
                reason = "it is not judged yet" if seen else "only an HTTP request shows it"
                self._unseen({"key": key}, "key", at, reason)
        return parts

    def _with(self, source: Source, part: _Part) -> Source | None:
        """The source with one more condition; None if nobody can meet both."""
        fields = {f: getattr(source, f) for f in source.__struct_fields__}
        if part.values:
            own = fields[part.field]
            both = (_shared if part.field == "ip_blocks" else _both)(own, part.values)
            if both is None:
                self._cannot(part.path, "two conditions with wildcards on one attribute cannot be joined")
                both = own
            elif not both:
                return None
            fields[part.field] = both
        fields[f"not_{part.field}"] += part.not_values
        return Source(**fields)

    def _with_ports(self, operation: Operation, part: _Part) -> Operation | None:
        ports = operation.ports
        if part.values:
            given = _ports(part.values)
            ports = tuple(p for p in ports if p in given) if ports else given
            if not ports:
                return None
        return Operation(ports, operation.not_ports + _ports(part.not_values))

    def _domains(self, source: Mapping[str, Any], field: str, path: str) -> tuple[str, ...]:
        patterns = []
        for domain in source.get(field) or ():
            if domain.startswith("*") and domain != "*":
                self._unseen({field: domain}, field, path, "a trust domain's suffix is not judged yet")
                return ()
            patterns.append(domain if domain.endswith("*") else f"{domain}/*")
        return tuple(patterns)

    def _principals(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """``cluster.local`` in a policy stands for the mesh's own trust domain too, as in Istio."""
        result: dict[str, None] = {}
        for pattern in patterns:
            result[pattern] = None
            if pattern.startswith("cluster.local/") and self._domain != "cluster.local":
                result[self._domain + pattern.removeprefix("cluster.local")] = None
        return tuple(result)

    def _accounts(self, accounts: Iterable[str]) -> tuple[str, ...]:
        """``NAMESPACE/NAME``, or a name in the policy's own namespace."""
        pairs = [a.split("/", 1) if "/" in a else (self._namespace, a) for a in accounts]
        return tuple(f"*/ns/{namespace}/sa/{name}" for namespace, name in pairs)

    def _unseen(self, holder: Mapping[str, Any], field: str, path: str, reason: str) -> None:
        if holder.get(field):
            self._cannot(f"{path}.{field}", reason)

    def _cannot(self, path: str, reason: str) -> None:
        """Note what is not judged; an ALLOW rule with it never matches."""
        if self._action == "ALLOW":
            effect = "the rule allows nothing"
        else:
            effect = "the rule refuses as if it were not there"
        self._findings.warning(
            self._policy, path, f"{reason}: {effect}", "split what L4 can judge into a rule of its own"
        )
        if self._action == "ALLOW":
            raise _Unseen


def _both(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...] | None:
    """Patterns that match what both match; None if no list of patterns says it."""
    if not first:
        return tuple(second)
    for exact, patterns in ((first, second), (second, first)):
        if not any("*" in value for value in exact):
            return tuple(v for v in exact if any(pattern_matches(p, v) for p in patterns))
    return None


def _shared(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """Blocks of the addresses that are in a block of each: of two blocks one is in the other, or they have nothing in common."""
    if not first:
        return tuple(second)
    found = []
    for one in map(ip_network, first):
        for other in map(ip_network, second):
            if one.version == other.version and one.overlaps(other):
                found.append(str(max(one, other, key=lambda n: n.prefixlen)))
    return tuple(dict.fromkeys(found))


def _blocks(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(canonical_block(v) for v in values)


def _ports(values: Iterable[str]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
