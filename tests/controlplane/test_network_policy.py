"""NetworkPolicy compiled and judged, against an oracle that reads the objects as the API reference has them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.api import (
    Direction,
    NetworkPeer,
    NetworkPolicy,
    NetworkPort,
    NetworkRule,
    Verdict,
    Workload,
    permits,
)
from controlplane.compiler import Compiler, validate
from controlplane.model.graph import Graph
from controlplane.model.snapshot import Snapshot
from controlplane.model.world import Settings
from tests.controlplane.support import (
    Manifest,
    compile_all,
    mesh_namespace,
    messages,
    namespace,
    objects,
    pod,
    service,
)

IN, OUT = Direction.INGRESS, Direction.EGRESS


def policy(spec: Manifest, name: str = "x", ns: str = "default") -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": ns},
        "spec": spec,
    }


def compiled(spec: Manifest) -> NetworkPolicy:
    found = compile_all(policy(spec)).resources["network/default/x"]
    assert isinstance(found, NetworkPolicy)
    return found


def judge(
    snapshot: Snapshot,
    direction: Direction,
    own: Workload,
    other: Workload | None,
    address: str,
    protocol: str,
    port: int,
) -> Verdict:
    """As agents and node proxies do."""
    policies = [snapshot.resources[f"network/{key}"] for key in own.network_policies]
    destination = own if direction is IN else other
    return permits(
        [p for p in policies if isinstance(p, NetworkPolicy)],
        direction,
        groups=other.groups if other else (),
        address=address,
        protocol=protocol,
        port=port,
        named_ports=destination.named_ports if destination else (),
    )


# -- what is made of one policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        # policyTypes: Ingress always, Egress where there are rules for it
        ({"podSelector": {}}, (), None),
        ({}, (), None),
        ({"podSelector": {}, "egress": []}, (), None),
        ({"podSelector": {}, "egress": [{}]}, (), (NetworkRule(),)),
        ({"podSelector": {}, "policyTypes": ["Egress"]}, None, ()),
        ({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}, (), ()),
        ({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]}, None, ()),
        ({"podSelector": {}, "policyTypes": []}, (), None),
        # one rule without anything allows all; none allows nothing
        ({"podSelector": {}, "ingress": [{}]}, (NetworkRule(),), None),
        ({"podSelector": {}, "ingress": [{"from": [], "ports": []}]}, (NetworkRule(),), None),
        (
            {"ingress": [{"from": [{"ipBlock": {"cidr": "10.1.2.3/8", "except": ["10.1.2.3/16"]}}]}]},
            (NetworkRule((NetworkPeer("", "10.0.0.0/8", ("10.1.0.0/16",)),)),),
            None,
        ),
        (
            {"ingress": [{"ports": [{}, {"protocol": "UDP", "port": 53}, {"port": 1, "endPort": 9}]}]},
            (NetworkRule((), (NetworkPort(), NetworkPort("UDP", 53), NetworkPort("TCP", 1, 9))),),
            None,
        ),
        ({"ingress": [{"ports": [{"port": "web"}]}]}, (NetworkRule((), (NetworkPort(name="web"),)),), None),
    ],
)
def test_one_policy(
    spec: Manifest, ingress: tuple[NetworkRule, ...] | None, egress: tuple[NetworkRule, ...] | None
) -> None:
    assert compiled(spec) == NetworkPolicy("default", "x", ingress, egress)


def test_rules_of_a_direction_that_is_not_meant_are_told() -> None:
    snapshot = compile_all(policy({"policyTypes": ["Egress"], "ingress": [{}]}))
    assert "spec.ingress: has no effect: policyTypes has no Ingress" in messages(snapshot)
    assert "not in force yet" not in messages(snapshot)


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ({"podSelector": {}}, "=default|*"),
        ({"podSelector": {"matchLabels": {"b": "2", "a": "1"}}}, "=default|a=1,b=2"),
        ({"namespaceSelector": {}}, "*|*"),
        ({"namespaceSelector": {"matchLabels": {"team": "x"}}, "podSelector": {}}, "team=x|*"),
        (
            {
                "podSelector": {
                    "matchExpressions": [{"key": "a", "operator": "In", "values": ["2", "1", "2"]}]
                }
            },
            "=default|a in (1,2)",
        ),
        (
            {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}},
            "=default|a=1",
        ),
        ({"podSelector": {"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}}, "=default|!a"),
    ],
)
def test_groups_have_one_key(peer: Manifest, key: str) -> None:
    (rule,) = compiled({"ingress": [{"from": [peer]}]}).ingress or ()
    assert rule.peers == (NetworkPeer(key),)


def test_a_long_selector_has_a_short_key() -> None:
    labels: dict[str, Any] = {f"label-{n}": "x" * 40 for n in range(9)}
    (rule,) = compiled({"ingress": [{"from": [{"podSelector": {"matchLabels": labels}}]}]}).ingress or ()
    (peer,) = rule.peers
    assert peer.group.startswith("#")
    assert len(peer.group) == 25
    snapshot = compile_all(
        policy({"ingress": [{"from": [{"podSelector": {"matchLabels": labels}}]}]}), pod("p", **labels)
    )
    assert snapshot.workloads["uid-default-p"].groups == (peer.group,)


def test_who_is_in_a_group() -> None:
    peers = [
        {"podSelector": {}},
        {"podSelector": {"matchLabels": {"app": "a"}}},
        {"namespaceSelector": {"matchLabels": {"team": "x"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "other"}}},
        {
            "namespaceSelector": {},
            "podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["a"]}]},
        },
    ]
    on_node = pod("on-node", app="a")
    on_node["spec"]["hostNetwork"] = True
    ended = pod("ended", app="a")
    ended["status"]["phase"] = "Succeeded"
    snapshot = compile_all(
        mesh_namespace(),
        namespace("other", team="x"),
        policy({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": peers}]}),
        pod("a", app="a"),
        pod("b", app="b"),
        pod("c", ns="other", app="a"),
        pod("d", ns="nowhere"),
        on_node,
        ended,
    )
    assert {w.name: w.groups for w in snapshot.workloads.values()} == {
        "a": ("=default|*", "=default|app=a"),
        "b": ("*|app notin (a)", "=default|*"),
        "c": ("kubernetes.io/metadata.name=other|*", "team=x|*"),
        "d": ("*|app notin (a)",),
        "on-node": (),
    }
    assert {w.name: w.network_policies for w in snapshot.workloads.values() if w.network_policies} == {
        "a": ("default/x",)
    }, "of a pod that is not in the mesh nobody here is the judge"
    assert snapshot.workloads["uid-default-on-node"].host_network


def test_named_ports_are_sent_where_a_policy_uses_them() -> None:
    own = policy({"ingress": [{"ports": [{"port": "web"}, {"port": "dns", "protocol": "UDP"}]}]})
    snapshot = compile_all(own, pod("p", ports={"web": 8080, "admin": 9090}), pod("q", ports={"other": 1}))
    assert {w.name: w.named_ports for w in snapshot.workloads.values()} == {
        "p": (("web", "TCP", 8080),),
        "q": (),
    }


@pytest.mark.parametrize(
    ("spec", "field", "reason"),
    [
        ({"ingres": [{}]}, "spec.ingres", "did you mean ingress"),
        ({"podSelector": {"matchLabel": {}}}, "spec.podSelector.matchLabel", "unknown field"),
        ({"policyTypes": ["ingress"]}, "spec.policyTypes[0]", "Unsupported value"),
        ({"ingress": [{"from": [{}]}]}, "spec.ingress[0].from[0]", "names nobody"),
        ({"ingress": [{"to": [{}]}]}, "spec.ingress[0].to", "unknown field"),
        ({"ingress": [None]}, "spec.ingress[0]", "null"),
        (
            {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]},
            "spec.egress[0].to[0]",
            "ipBlock stands alone",
        ),
        (
            {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.1"}}]}]},
            "spec.egress[0].to[0].ipBlock.cidr",
            "no CIDR",
        ),
        (
            {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}]},
            "spec.egress[0].to[0].ipBlock.except[0]",
            "no part of",
        ),
        (
            {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}]}]},
            "spec.egress[0].to[0].ipBlock.except[0]",
            "no part of",
        ),
        (
            {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["fd00::/8"]}}]}]},
            "spec.egress[0].to[0].ipBlock.except[0]",
            "no part of",
        ),
        ({"ingress": [{"ports": [{"port": "80"}]}]}, "spec.ingress[0].ports[0].port", "no name of a port"),
        ({"ingress": [{"ports": [{"port": "a--b"}]}]}, "spec.ingress[0].ports[0].port", "no name of a port"),
        ({"ingress": [{"ports": [{"port": 70000}]}]}, "spec.ingress[0].ports[0].port", "none of the forms"),
        ({"ingress": [{"ports": [{"endPort": 80}]}]}, "spec.ingress[0].ports[0].endPort", "needs a port"),
        (
            {"ingress": [{"ports": [{"port": "web", "endPort": 80}]}]},
            "spec.ingress[0].ports[0].endPort",
            "needs",
        ),
        (
            {"ingress": [{"ports": [{"port": 90, "endPort": 80}]}]},
            "spec.ingress[0].ports[0].endPort",
            "smaller than port 90",
        ),
        (
            {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
            "spec.podSelector.matchExpressions[0].values",
            "at least one value",
        ),
        (
            {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}},
            "spec.podSelector.matchExpressions[0].values",
            "has no values",
        ),
        (
            {"podSelector": {"matchLabels": {"a,b": "c"}}},
            "spec.podSelector.matchLabels",
            "no name of a label",
        ),
        (
            {"podSelector": {"matchLabels": {"a": "b,c=d"}}},
            "spec.podSelector.matchLabels.a",
            "does not match",
        ),
    ],
)
def test_what_is_wrong_is_named(spec: Manifest, field: str, reason: str) -> None:
    problems = list(validate(policy(spec)))
    assert [f for f, _ in problems] == [field], problems
    assert reason in problems[0][1]


def test_a_change_computes_what_it_touches() -> None:
    state: dict[Any, Any] = {}
    for number in range(200):
        ns = f"n{number % 10}"
        state |= objects(service(f"s{number}", f"10.96.{number // 250}.{number % 250}", ns=ns))
        for replica in range(5):
            state |= objects(pod(f"s{number}-{replica}", f"10.{number}.0.{replica}", ns=ns, app=f"s{number}"))
    for n in range(10):
        state |= objects(mesh_namespace(f"n{n}"))
        peers = [{"podSelector": {"matchLabels": {"app": f"s{i}"}}} for i in range(n, 200, 20)]
        peers += [{"namespaceSelector": {"matchLabels": {"mycel.io/mesh": "enabled"}}, "podSelector": {}}]
        state |= objects(policy({"ingress": [{"from": peers}]}, ns=f"n{n}"))
    compiler = Compiler(Settings())
    compiler.compile(state)
    graph: Graph = compiler._graph

    def cost(*changed: Manifest) -> int:
        before = graph.computed
        compiler.compile({**state, **objects(*changed)})
        compiler.compile(state)
        return graph.computed - before

    other = pod("s7-0", "10.7.0.0", ns="n7", app="s8")
    assert cost(other) < 40, "a pod's other labels cost its own workload, and services"
    narrower = policy({"ingress": [{"from": peers[:1], "ports": [{"port": 80}]}]}, ns="n9")
    assert cost(narrower) < 2 * (100 + 20), "a policy costs the pods of its namespace at most"
    same_groups = {**peers[0]}
    fewer = policy({"ingress": [{"from": [same_groups, *peers[1:]], "ports": [{"port": 80}]}]}, ns="n9")
    assert cost(fewer) < 20, "and none, if it selects and names the same pods"


# -- the oracle ----------------------------------------------------------------------------------------------------------------

_APPS, _TEAMS = ("a", "b"), ("x", "y")
_ADDRESSES = ("10.0.0.1", "10.0.1.1", "10.0.2.1", "10.0.3.1", "fd00::1")
_OUTSIDE = ("192.0.2.1", "2001:db8::1", "10.0.1.200")
_PORTS = (80, 81, 8080)


def _selector() -> st.SearchStrategy[Manifest]:
    expression = st.one_of(
        st.fixed_dictionaries(
            {
                "key": st.sampled_from(("app", "team")),
                "operator": st.sampled_from(("In", "NotIn")),
                "values": st.lists(st.sampled_from((*_APPS, *_TEAMS)), min_size=1, max_size=2),
            }
        ),
        st.fixed_dictionaries(
            {
                "key": st.sampled_from(("app", "team")),
                "operator": st.sampled_from(("Exists", "DoesNotExist")),
            }
        ),
    )
    return st.one_of(
        st.just({}),
        st.fixed_dictionaries({"matchLabels": st.dictionaries(st.just("app"), st.sampled_from(_APPS))}),
        st.fixed_dictionaries({"matchLabels": st.dictionaries(st.just("team"), st.sampled_from(_TEAMS))}),
        st.fixed_dictionaries({"matchExpressions": st.lists(expression, max_size=2)}),
    )


def _rules(side: str) -> st.SearchStrategy[list[Manifest]]:
    block = st.sampled_from(
        (
            {"cidr": "10.0.0.0/16"},
            {"cidr": "10.0.0.0/16", "except": ["10.0.1.0/24"]},
            {"cidr": "10.0.1.0/24", "except": ["10.0.1.128/25"]},
            {"cidr": "0.0.0.0/0"},
            {"cidr": "::/0", "except": ["fd00::/16"]},
        )
    )
    peer = st.one_of(
        st.fixed_dictionaries({"podSelector": _selector()}),
        st.fixed_dictionaries({"namespaceSelector": _selector()}),
        st.fixed_dictionaries({"namespaceSelector": _selector(), "podSelector": _selector()}),
        st.fixed_dictionaries({"ipBlock": block}),
    )
    port = st.one_of(
        st.just({}),
        st.just({"port": 80}),
        st.just({"port": 80, "endPort": 81}),
        st.just({"port": "web"}),
        st.just({"port": "web", "protocol": "UDP"}),
        st.just({"protocol": "UDP"}),
    )
    optional = {side: st.lists(peer, max_size=2), "ports": st.lists(port, max_size=2)}
    return st.lists(st.fixed_dictionaries({}, optional=optional), max_size=2)


_SPECS = st.fixed_dictionaries(
    {"podSelector": _selector()},
    optional={
        "ingress": _rules("from"),
        "egress": _rules("to"),
        "policyTypes": st.lists(st.sampled_from(("Ingress", "Egress")), unique=True, max_size=2),
    },
)


def _pods() -> list[Manifest]:
    made = []
    for n, (app, ns) in enumerate([("a", "n1"), ("b", "n1"), ("a", "n2"), ("", "n2"), ("b", "n2")]):
        labels: dict[str, Any] = {"app": app} if app else {}
        ports = {"web": _PORTS[n % 3]}
        made.append(pod(f"p{n}", _ADDRESSES[n], ns=ns, ports=ports, **labels))
    made[4]["spec"]["hostNetwork"] = True
    return made


_NAMESPACES = [
    namespace("n1", **{"mycel.io/mesh": "enabled", "team": "x"}),
    namespace("n2", **{"mycel.io/mesh": "enabled"}),
]


def _holds(selector: Manifest, labels: dict[str, str]) -> bool:
    """meta/v1 LabelSelector: matchLabels and matchExpressions are ANDed; an empty one matches everything."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for e in selector.get("matchExpressions") or []:
        there = e["key"] in labels
        if e["operator"] == "Exists" and not there:
            return False
        if e["operator"] == "DoesNotExist" and there:
            return False
        if e["operator"] == "In" and not (there and labels[e["key"]] in e["values"]):
            return False
        if e["operator"] == "NotIn" and there and labels[e["key"]] in e["values"]:
            return False
    return True


def _oracle(
    policies: list[Manifest],
    direction: Direction,
    own: Manifest,
    other: Manifest | None,
    address: str,
    protocol: str,
    port: int,
) -> bool:
    """Straight from networking.k8s.io/v1's field descriptions, policy by policy and word by word."""
    namespaces = {n["metadata"]["name"]: dict(n["metadata"]["labels"]) for n in _NAMESPACES}
    for name, labels in namespaces.items():
        labels["kubernetes.io/metadata.name"] = name
    if own["spec"].get("hostNetwork"):
        return True
    if other is not None and other["spec"].get("hostNetwork"):
        other = None
    destination = own if direction is IN else other
    field, side = ("ingress", "from") if direction is IN else ("egress", "to")
    isolated = False
    for item in policies:
        spec, ns = item["spec"], item["metadata"]["namespace"]
        if ns != own["metadata"]["namespace"] or not _holds(spec["podSelector"], own["metadata"]["labels"]):
            continue
        # "If not specified, it defaults based on the existence of ingress or egress rules": Ingress always.
        types = spec.get("policyTypes") or ["Ingress"] + (["Egress"] if spec.get("egress") else [])
        if direction.value not in types:
            continue
        isolated = True
        for rule in spec.get(field) or []:
            peers = rule.get(side) or []
            peer_matches = not peers  # "If this field is empty or missing, this rule matches all sources"
            for peer in peers:
                if "ipBlock" in peer:
                    inside = ipaddress.ip_address(address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
                    out = any(
                        ipaddress.ip_address(address) in ipaddress.ip_network(e)
                        for e in peer["ipBlock"].get("except", [])
                    )
                    peer_matches |= inside and not out
                elif other is not None:
                    its = other["metadata"]["namespace"]
                    in_namespace = (
                        _holds(peer["namespaceSelector"], namespaces[its])
                        if "namespaceSelector" in peer
                        else its == ns
                    )
                    peer_matches |= in_namespace and _holds(
                        peer.get("podSelector") or {}, other["metadata"]["labels"]
                    )
            ports = rule.get("ports") or []
            port_matches = not ports
            for p in ports:
                if p.get("protocol", "TCP") != protocol:
                    continue
                wanted = p.get("port")
                if wanted is None:
                    port_matches = True
                elif isinstance(wanted, str):
                    declared = destination["spec"]["containers"][0]["ports"] if destination else []
                    port_matches |= any(
                        d["name"] == wanted
                        and d.get("protocol", "TCP") == protocol
                        and d["containerPort"] == port
                        for d in declared
                    )
                else:
                    port_matches |= wanted <= port <= p.get("endPort", wanted)
            if peer_matches and port_matches:
                return True
    return not isolated


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(_SPECS, st.sampled_from(("n1", "n2"))), max_size=4))
def test_the_oracle_says_the_same(specs: list[tuple[Manifest, str]]) -> None:
    pods = _pods()
    policies = [policy(spec, f"p{n}", ns) for n, (spec, ns) in enumerate(specs)]
    snapshot = compile_all(*_NAMESPACES, *pods, *policies)
    workload = {w.name: w for w in snapshot.workloads.values()}
    ends = [(p, a) for p, a in zip(pods, _ADDRESSES, strict=True)] + [(None, a) for a in _OUTSIDE]
    for own in pods:
        name = own["metadata"]["name"]
        for other, address in ends:
            if other is own:
                continue
            for direction in Direction:
                for protocol, port in [("TCP", p) for p in _PORTS] + [("UDP", 80)]:
                    expected = _oracle(policies, direction, own, other, address, protocol, port)
                    peer = workload[other["metadata"]["name"]] if other else None
                    found = judge(snapshot, direction, workload[name], peer, address, protocol, port)
                    assert found.allowed == expected, (direction, name, address, protocol, port, found)
