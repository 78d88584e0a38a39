"""Compiling one state after the other gives what compiling each anew gives, and costs what has changed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from controlplane.compiler import Compiler, compile_snapshot
from controlplane.model.graph import Graph
from controlplane.model.snapshot import Snapshot
from controlplane.model.world import Settings
from controlplane.source import Key, Object
from tests.controlplane.support import Manifest, compile_all, istio, namespace, objects, pod, service
from tests.controlplane.test_endpoints import endpoint, endpoint_slice

Objects = dict[Key, Object]
_ROOT = "istio-system"


def _pick(rng: random.Random, *choices: Any) -> Any:
    return rng.choice(choices)


def _pod(rng: random.Random) -> Manifest:
    number = rng.randrange(6)
    made = pod(
        f"p{number}",
        _pick(rng, "", f"10.1.0.{rng.randrange(1, 5)}"),
        _pick(rng, "node-a", "node-b"),
        _pick(rng, "x", "y"),
        _pick(rng, "n1", "n2"),
        rng.random() < 0.7,
        uid=f"u{rng.randrange(8)}",
        ports=_pick(rng, {}, {"web": 8080}),
        app=_pick(rng, "a", "b"),
        version=_pick(rng, "v1", "v2"),
    )
    if rng.random() < 0.2:
        made["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    if rng.random() < 0.1:
        made["status"]["phase"] = "Succeeded"
    if rng.random() < 0.1:
        made["spec"]["hostNetwork"] = True
    made["metadata"]["creationTimestamp"] = f"2026-01-0{rng.randrange(1, 4)}T00:00:00Z"
    return made


def _service(rng: random.Random) -> Manifest:
    ports = [
        {
            "name": _pick(rng, "http", "tcp", "x"),
            "port": _pick(rng, 80, 81),
            "targetPort": _pick(rng, 8080, "web"),
        }
    ]
    made = service(
        _pick(rng, "a", "b", "web"),
        _pick(rng, None, "10.96.0.1", "10.96.0.2"),
        ports,
        _pick(rng, "n1", "n2", "default"),
        _pick(rng, {}, {"app": "a"}, {"app": "b", "version": "v1"}),
    )
    made["spec"] |= _pick(rng, {}, {"internalTrafficPolicy": "Local"}, {"publishNotReadyAddresses": True})
    if rng.random() < 0.3:
        made["spec"]["externalIPs"] = [_pick(rng, "192.0.2.10", "192.0.2.11", "10.96.0.1", "10.1.0.1")]
    return made


def _namespace(rng: random.Random) -> Manifest:
    labels = _pick(
        rng,
        {},
        {"mycel.io/mesh": "enabled"},
        {"istio.io/rev": "other"},
        {"irrelevant": _pick(rng, "x", "y"), "mycel.io/splice": "disabled"},
    )
    return namespace(_pick(rng, "n1", "n2", "kube-system"), **labels)


def _policy(rng: random.Random) -> Manifest:
    spec: Manifest = {"action": _pick(rng, "ALLOW", "DENY", "AUDIT")}
    spec["rules"] = [{"to": [{"operation": {"ports": [str(rng.randrange(1, 9))]}}]}]
    spec |= _pick(
        rng,
        {},
        {"selector": {"matchLabels": {"app": "a"}}},
        {"targetRefs": [{"kind": "Service", "group": "", "name": "a"}]},
    )
    return istio("AuthorizationPolicy", _pick(rng, "x", "y"), spec, _pick(rng, "n1", "n2", _ROOT))


def _mtls(rng: random.Random) -> Manifest:
    spec: Manifest = {"mtls": {"mode": _pick(rng, "STRICT", "PERMISSIVE", "UNSET")}}
    spec |= _pick(
        rng, {}, {"selector": {"matchLabels": {"app": "a"}}, "portLevelMtls": {"80": {"mode": "DISABLE"}}}
    )
    return istio("PeerAuthentication", _pick(rng, "x", "y"), spec, _pick(rng, "n1", "n2", _ROOT))


def _routes(rng: random.Random) -> Manifest:
    to = [
        {
            "destination": {"host": _pick(rng, "a", "b", "gone"), **_pick(rng, {}, {"subset": "v1"})},
            "weight": 50,
        }
        for _ in range(2)
    ]
    host = _pick(rng, "a", "b.n1.svc.cluster.local", "*.n2.svc.cluster.local", "*")
    return istio(
        "VirtualService",
        _pick(rng, "x", "y"),
        {
            "hosts": [host],
            **_pick(rng, {"http": [{"route": to}]}, {"tcp": [{"route": to}]}),
            **_pick(rng, {}, {"exportTo": ["."]}),
        },
        _pick(rng, "n1", "n2"),
        creationTimestamp=f"2026-01-0{rng.randrange(1, 4)}T00:00:00Z",
    )


def _destination(rng: random.Random) -> Manifest:
    spec: Manifest = {
        "host": _pick(rng, "a", "b.n1.svc.cluster.local", "*.n2.svc.cluster.local"),
        "subsets": [{"name": "v1", "labels": {"version": "v1"}}][: rng.randrange(2)],
        "trafficPolicy": {"loadBalancer": {"simple": _pick(rng, "RANDOM", "ROUND_ROBIN")}},
    }
    return istio("DestinationRule", _pick(rng, "x", "y"), spec, _pick(rng, "n1", "n2", _ROOT))


def _slice(rng: random.Random) -> Manifest:
    made = endpoint_slice(
        endpoint("192.0.2.1", ready=rng.random() < 0.5),
        endpoint("10.1.0.1", _pick(rng, "", "p1"), _pick(rng, "", "u1")),
        name=_pick(rng, "s1", "s2"),
        managed=rng.random() < 0.3,
    )
    made["metadata"]["namespace"] = _pick(rng, "n1", "default")
    return made


def _other(rng: random.Random) -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d", "labels": {"x": str(rng.random())}},
    }


def _network(rng: random.Random) -> Manifest:
    def peer() -> Manifest:
        made: Manifest = _pick(
            rng,
            {"podSelector": {}},
            {"podSelector": {"matchLabels": {"app": "a"}}},
            {"namespaceSelector": {"matchLabels": {"irrelevant": "x"}}},
            {"namespaceSelector": {"matchExpressions": [{"key": "mycel.io/mesh", "operator": "Exists"}]}},
            {"namespaceSelector": {}, "podSelector": {"matchLabels": {"version": "v1"}}},
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
        )
        return made

    spec: Manifest = {"podSelector": _pick(rng, {}, {"matchLabels": {"app": "a"}})}
    for direction, side in (("ingress", "from"), ("egress", "to")):
        if rng.random() < 0.6:
            spec[direction] = [
                {side: [peer()], "ports": [{"port": _pick(rng, 80, "web")}]} for _ in range(rng.randrange(3))
            ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": _pick(rng, "x", "y"), "namespace": _pick(rng, "n1", "n2")},
        "spec": spec,
    }


def _node(rng: random.Random) -> Manifest:
    zone = _pick(rng, {}, {"topology.kubernetes.io/zone": _pick(rng, "z1", "z2")})
    address = {"type": "InternalIP", "address": f"192.0.2.{rng.randrange(3)}"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": _pick(rng, "node-a", "node-b"), "labels": zone},
        "status": {"addresses": [address, {"type": "Hostname", "address": "a"}]},
    }


_MAKERS: tuple[tuple[Callable[[random.Random], Manifest], int], ...] = (
    (_pod, 8),
    (_service, 4),
    (_namespace, 2),
    (_policy, 3),
    (_mtls, 2),
    (_routes, 3),
    (_destination, 2),
    (_slice, 2),
    (_network, 4),
    (_node, 1),
    (_other, 1),
)


def edits(rng: random.Random, count: int) -> list[Objects]:
    """States, each a few edits from the one before."""
    state: Objects = {}
    states = []
    makers, weights = zip(*_MAKERS, strict=True)
    for _ in range(count):
        state = dict(state)
        for _ in range(_pick(rng, 1, 1, 1, 3, 10)):
            if state and rng.random() < 0.25:
                del state[rng.choice(sorted(state))]
            else:
                state |= objects(rng.choices(makers, weights)[0](rng))
        states.append(state)
    return states


def same(one: Snapshot, other: Snapshot) -> None:
    assert one == other
    assert one.findings == other.findings
    for mine, theirs in (
        (one.resources, other.resources),
        (one.clusters, other.clusters),
        (one.tables, other.tables),
    ):
        assert list(mine) == list(theirs)
    assert dict(one.workloads) == dict(other.workloads)


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_edits(seed: int) -> None:
    rng = random.Random(seed)
    compiler = Compiler(Settings())
    versions: dict[str, Snapshot] = {}
    for number, state in enumerate(edits(rng, 60)):
        settings = Settings(roots=str(number // 20))
        snapshot = compiler.compile(state, settings)
        same(snapshot, compile_snapshot(state, settings))
        known = versions.setdefault(snapshot.version, snapshot)
        assert (known.resources, known.clusters, known.tables) == (
            snapshot.resources,
            snapshot.clusters,
            snapshot.tables,
        ), "one version, one content"
    assert len(versions) > 10
    same(compiler.compile({}, Settings()), compile_snapshot({}, Settings()))


@pytest.mark.parametrize("seed", range(4))
def test_two_controllers_on_two_ways(seed: int) -> None:
    """Whatever each has seen before, and in which order: of the same objects both make the same."""
    rng = random.Random(seed)
    one, two = Compiler(Settings()), Compiler(Settings())
    for state in edits(rng, 20):
        one.compile(state)
    for step in edits(random.Random(seed + 100), 10):
        two.compile(step)
    items = list(state.items())
    rng.shuffle(items)
    same(one.compile(state), two.compile(dict(items)))


def test_unchanged_parts_are_the_same_objects() -> None:
    compiler = Compiler(Settings())
    first = compiler.compile(objects(pod("a", "10.1.0.1", app="s"), pod("b", "10.1.0.2"), service("s")))
    again = compiler.compile(objects(pod("a", "10.1.0.9", app="s"), pod("b", "10.1.0.2"), service("s")))
    assert first.resources["workload/uid-default-b"] is again.resources["workload/uid-default-b"]
    assert first.workloads["uid-default-a"].addresses == ("10.1.0.1",), "a snapshot never changes"
    assert again.workloads["uid-default-a"].addresses == ("10.1.0.9",)
    assert first.services["default", "s"].ports != again.services["default", "s"].ports


def test_a_bug_in_one_object_costs_nothing_else() -> None:
    """After states that cannot be compiled, the next one is compiled as if they had not been."""
    compiler = Compiler(Settings())
    good = objects(pod("a", "10.1.0.1", app="s"), service("s"))
    compiler.compile(good)
    bad = {**good, **objects(pod("b", "10.1.0.2", app="s"), service("s", "10.96.0.99"))}
    broken = Key("", "Pod", "default", "broken")
    bad[broken] = Object(
        broken, {"metadata": {"uid": "x", "labels": {"app": "s"}}, "spec": "x", "status": {}}
    )
    for _ in range(2):
        with pytest.raises(AttributeError):
            compiler.compile(bad)
    del bad[broken]
    same(compiler.compile(bad), compile_snapshot(bad, Settings()))
    same(compiler.compile(good), compile_snapshot(good, Settings()))


def test_a_change_computes_what_it_touches() -> None:
    state: Objects = {}
    for number in range(200):
        ns = f"n{number % 10}"
        state |= objects(service(f"s{number}", f"10.96.{number // 250}.{number % 250}", ns=ns))
        for replica in range(5):
            state |= objects(pod(f"s{number}-{replica}", f"10.{number}.0.{replica}", ns=ns, app=f"s{number}"))
    compiler = Compiler(Settings())
    compiler.compile(state)
    graph: Graph = compiler._graph

    def cost(**changed: Manifest) -> int:
        before = graph.computed
        compiler.compile({**state, **objects(*changed.values())})
        compiler.compile(state)
        return graph.computed - before

    assert cost(one=pod("s7-0", "10.7.0.0", ns="n7", ready=False, app="s7")) < 30
    assert cost(one=pod("s7-0", "10.7.0.0", ns="n7", app="s7", irrelevant="x")) < 30
    rule = {"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["1"]}}]}]}
    assert cost(one=istio("AuthorizationPolicy", "x", rule, "n7")) < 2 * (100 + 20), (
        "the pods of its namespace"
    )
    started = time.monotonic()
    compiler.compile({**state, **objects(pod("s8-0", "10.8.0.0", ns="n8", ready=False, app="s8"))})
    assert time.monotonic() - started < 0.05


def test_the_order_of_arrival_is_no_content() -> None:
    one = compile_all(pod("a"), pod("b"), service("s"))
    compiler = Compiler(Settings())
    for names in ("b", "ab"):
        last = compiler.compile(objects(*[pod(n) for n in names], *([service("s")] if "a" in names else [])))
    same(last, one)
