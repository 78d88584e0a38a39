"""NetworkPolicy (networking.k8s.io/v1), compiled: which pods it selects, and who may be at the other end.

Whoever a rule names by labels is a *group*: a key that stands in the policy, and in each workload that is in it. So a pod that
comes, goes or changes costs that workload, and a policy costs itself and the pods whose groups are others by it. Pods on their
node's network are no pods to a NetworkPolicy, as in every implementation of it.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from controlplane.api import NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule, canonical_block
from controlplane.model import selectors
from controlplane.model.graph import Graph
from controlplane.model.kubernetes import Pod
from controlplane.model.selectors import LabelSelector, SelectorIndex
from controlplane.model.store import rows
from controlplane.model.world import store
from controlplane.source import Key, Object

GROUP, KIND = "networking.k8s.io", "NetworkPolicy"
#: Label that every namespace has in a cluster.
_NAMESPACE_NAME = "kubernetes.io/metadata.name"
#: Longest key of a group as text; a longer one is a digest.
_LONGEST = 64

Problem = tuple[str, str]


class Group(NamedTuple):
    """Pods by their labels, in one namespace or in all whose labels are selected."""

    namespace: str  #: empty where ``namespaces`` says it
    namespaces: LabelSelector
    pods: LabelSelector

    @property
    def key(self) -> str:
        """Equal for equal groups, whichever policy names them: ``=NAMESPACE|PODS``, or ``NAMESPACES|PODS``."""
        text = f"{'=' + self.namespace if self.namespace else self.namespaces}|{self.pods}"
        if len(text) <= _LONGEST:
            return text
        return "#" + hashlib.sha256(text.encode()).hexdigest()[:24]


class _Compiled(NamedTuple):
    policy: NetworkPolicy
    pods: LabelSelector
    groups: frozenset[Group]
    port_names: frozenset[str]


class Membership(NamedTuple):
    """What pods of one namespace with the same labels share."""

    groups: tuple[str, ...] = ()  #: keys of all groups that they are in, sorted
    policies: tuple[str, ...] = ()  #: keys of the policies that select them, sorted


def network_policy(g: Graph, key: Key) -> NetworkPolicy | None:
    found = g.get(_compiled, key)
    return found.policy if found else None


def membership(g: Graph, pod: Pod) -> Membership:
    """A pod's groups, and policies where somebody here judges: not for a pod outside of the mesh."""
    if pod.host_network or not g.get(_are_any, None):
        return Membership()
    found = g.get(_membership, (pod.namespace, tuple(sorted(pod.labels.items()))))
    return found if pod.enrolled else Membership(found.groups)


def named_ports_of(g: Graph, pod: Pod) -> tuple[tuple[str, str, int], ...]:
    """(name, protocol, number) of a pod's ports whose names policies use."""
    if pod.host_network or not pod.named_ports:
        return ()
    return tuple(
        sorted(
            (name, transport, number)
            for (name, transport), number in pod.named_ports.items()
            if g.get(_is_port_name, name)
        )
    )


def _compiled(g: Graph, key: Key) -> _Compiled | None:
    policy: Object | None = g.read(store(g).objects, key)
    if policy is None:
        return None
    spec = policy.spec
    written = {"Ingress": spec.get("ingress") or (), "Egress": spec.get("egress") or ()}
    # The API's default: Ingress always, Egress where there are rules for it.
    types = spec.get("policyTypes") or ("Ingress", *(("Egress",) if written["Egress"] else ()))
    for direction, ignored in written.items():
        if ignored and direction not in types:
            text = f"has no effect: policyTypes has no {direction}"
            g.findings.warning(
                policy, f"spec.{direction.lower()}", text, f"add {direction}, or remove the rules"
            )
    reader = _Reader(key.namespace)
    ingress = reader.rules(written["Ingress"], "from") if "Ingress" in types else None
    egress = reader.rules(written["Egress"], "to") if "Egress" in types else None
    return _Compiled(
        NetworkPolicy(key.namespace, key.name, ingress, egress),
        LabelSelector.read(spec.get("podSelector")),
        frozenset(reader.groups.values()),
        frozenset(reader.port_names),
    )


class _Reader:
    """Reads one policy's rules, and collects what they name."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.groups: dict[str, Group] = {}
        self.port_names: set[str] = set()

    def rules(self, written: Iterable[Mapping[str, Any]], side: str) -> tuple[NetworkRule, ...]:
        return tuple(
            NetworkRule(
                tuple(self._peer(p) for p in rule.get(side) or ()),
                tuple(self._port(p) for p in rule.get("ports") or ()),
            )
            for rule in written
        )

    def _peer(self, peer: Mapping[str, Any]) -> NetworkPeer:
        block = peer.get("ipBlock")
        if block is not None:
            excepts = tuple(canonical_block(e) for e in block.get("except") or ())
            return NetworkPeer(cidr=canonical_block(block["cidr"]), excepts=excepts)
        # Not given, and given without conditions, are different: this namespace, and every namespace.
        by_labels = peer.get("namespaceSelector") is not None
        group = Group(
            "" if by_labels else self._namespace,
            LabelSelector.read(peer.get("namespaceSelector")),
            LabelSelector.read(peer.get("podSelector")),
        )
        self.groups[group.key] = group
        return NetworkPeer(group.key)

    def _port(self, port: Mapping[str, Any]) -> NetworkPort:
        protocol, number = port.get("protocol") or "TCP", port.get("port")
        if isinstance(number, str):
            self.port_names.add(number)
            return NetworkPort(protocol, name=number)
        return NetworkPort(protocol, number or 0, port.get("endPort") or 0)


def _of_namespace(g: Graph, namespace: str) -> list[_Compiled]:
    found = rows(store(g).by_namespace, g, (GROUP, KIND, namespace))
    return [c for o in found if (c := g.get(_compiled, o.key))]


def _are_any(g: Graph, _: None) -> bool:
    return bool(g.read(store(g).by_kind, (GROUP, KIND)))


def _membership(g: Graph, of: tuple[str, tuple[tuple[str, str], ...]]) -> Membership:
    """Of pods with these labels. Most share theirs with others, and a change here mostly changes nothing for them."""
    namespace, labels = of[0], dict(of[1])
    return Membership(
        g.get(_groups_in, namespace).matching(labels), g.get(_selecting, namespace).matching(labels)
    )


def _selecting(g: Graph, namespace: str) -> SelectorIndex:
    """What a namespace's policies select."""
    return SelectorIndex.of(
        (f"{namespace}/{c.policy.name}", c.pods)
        for c in _of_namespace(g, namespace)
        if c.policy.ingress is not None or c.policy.egress is not None
    )


def _own_groups(g: Graph, namespace: str) -> frozenset[Group]:
    """The groups that a namespace's policies name in it itself."""
    return frozenset(x for c in _of_namespace(g, namespace) for x in c.groups if x.namespace)


def _wide_groups_of(g: Graph, key: Key) -> frozenset[Group]:
    """The groups that a policy names by labels of namespaces."""
    found = g.get(_compiled, key)
    return frozenset(x for x in found.groups if not x.namespace) if found else frozenset()


def _wide_groups(g: Graph, _: None) -> frozenset[Group]:
    keys = g.read(store(g).by_kind, (GROUP, KIND))
    return frozenset().union(*(g.get(_wide_groups_of, key) for key in keys))


def _groups_in(g: Graph, namespace: str) -> SelectorIndex:
    """The groups that pods of a namespace may be in."""
    groups = g.get(_own_groups, namespace)
    wide = g.get(_wide_groups, None)
    if wide:
        labels = _labels_of(g, namespace)
        groups |= {x for x in wide if x.namespaces.matches(labels)}
    return SelectorIndex.of((x.key, x.pods) for x in groups)


def _labels_of(g: Graph, namespace: str) -> Mapping[str, str]:
    o: Object | None = g.read(store(g).objects, Key("", "Namespace", "", namespace))
    # In a folder of manifests nobody adds it, and there may be no Namespace at all.
    return {**(o.labels if o else {}), _NAMESPACE_NAME: namespace}


def _port_names_of(g: Graph, key: Key) -> frozenset[str]:
    found = g.get(_compiled, key)
    return found.port_names if found else frozenset()


def _port_names(g: Graph, _: None) -> frozenset[str]:
    keys = g.read(store(g).by_kind, (GROUP, KIND))
    return frozenset().union(*(g.get(_port_names_of, key) for key in keys))


def _is_port_name(g: Graph, name: str) -> bool:
    return name in g.get(_port_names, None)


def validate(spec: Mapping[str, Any]) -> Iterator[Problem]:
    """(field, reason) of everything wrong with a policy that its schema accepts (what an API server refuses)."""
    yield from selectors.validate(spec.get("podSelector"), "spec.podSelector")
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for i, rule in enumerate(spec.get(direction) or ()):
            path = f"spec.{direction}[{i}]"
            for j, peer in enumerate(rule.get(side) or ()):
                yield from _peer_problems(peer, f"{path}.{side}[{j}]")
            for j, port in enumerate(rule.get("ports") or ()):
                yield from _port_problems(port, f"{path}.ports[{j}]")


def _peer_problems(peer: Mapping[str, Any], path: str) -> Iterator[Problem]:
    chosen = [f for f in ("podSelector", "namespaceSelector") if peer.get(f) is not None]
    for field in chosen:
        yield from selectors.validate(peer[field], f"{path}.{field}")
    block = peer.get("ipBlock")
    if block is None:
        if not chosen:
            yield path, "names nobody: podSelector, namespaceSelector or ipBlock is required"
        return
    if chosen:
        yield path, f"ipBlock stands alone, not beside {chosen[0]}"
    cidr = _block(block["cidr"])
    if cidr is None:
        yield f"{path}.ipBlock.cidr", f"{block['cidr']!r} is no CIDR block"
    for i, text in enumerate(block.get("except") or ()):
        at, part = f"{path}.ipBlock.except[{i}]", _block(text)
        if part is None:
            yield at, f"{text!r} is no CIDR block"
        elif cidr is not None and not _strictly_within(part, cidr):
            yield at, f"{text} is no part of {block['cidr']}"


def _port_problems(port: Mapping[str, Any], path: str) -> Iterator[Problem]:
    number, last = port.get("port"), port.get("endPort")
    if isinstance(number, str) and not _is_name(number):
        yield f"{path}.port", f"{number!r} is no name of a port (a number stands without quotes)"
    if last is not None:
        if not isinstance(number, int):
            yield f"{path}.endPort", "needs a port that is a number"
        elif last < number:
            yield f"{path}.endPort", f"{last} is smaller than port {number}"


def _is_name(text: str) -> bool:
    """IANA_SVC_NAME (RFC 6335, 5.1): up to 15 of a-z, 0-9 and -, with a letter, no hyphen at an end or beside another."""
    parts: Sequence[str] = text.split("-")
    return (
        len(text) <= 15
        and all(p and p.isascii() and p.isalnum() and p == p.lower() for p in parts)
        and any(c.isalpha() for c in text)
    )


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _block(text: str) -> _Network | None:
    try:
        return ipaddress.ip_network(text, strict=False) if "/" in text else None
    except ValueError:
        return None


def _strictly_within(part: _Network, whole: _Network) -> bool:
    if isinstance(part, ipaddress.IPv4Network) and isinstance(whole, ipaddress.IPv4Network):
        return part != whole and part.subnet_of(whole)
    if isinstance(part, ipaddress.IPv6Network) and isinstance(whole, ipaddress.IPv6Network):
        return part != whole and part.subnet_of(whole)
    return False
