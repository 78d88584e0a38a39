"""What the data plane needs to know of places: nodes, zones, addresses beside a service's own, weights, the splice switch."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.api import Endpoint, MeshConfig, NodeInfo, ServicePort
from controlplane.compiler import validate
from controlplane.istio.tcproutes import MOST_WEIGHT, Share, weigh
from controlplane.model.endpoints import Backend
from controlplane.model.snapshot import Snapshot
from controlplane.source.kinds import BUILT_IN, trim
from tests.controlplane.support import (
    Manifest,
    compile_all,
    istio,
    mesh_namespace,
    messages,
    namespace,
    pod,
    service,
    subsets,
)

SPLICE = "mycel.io/splice"


def node(name: str, *addresses: str, zone: str = "") -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone} if zone else {}},
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": a} for a in addresses),
                {"type": "Hostname", "address": name},
            ]
        },
    }


def ports_of(snapshot: Snapshot, name: str, ns: str = "default") -> tuple[ServicePort, ...]:
    return snapshot.services[ns, name].ports


def test_nodes_and_zones() -> None:
    external = node("node-b", "192.0.2.2")
    external["status"]["addresses"].append({"type": "ExternalIP", "address": "2001:DB8::2"})
    on_node = pod("agent", "192.0.2.1", "node-a")
    on_node["spec"]["hostNetwork"] = True
    snapshot = compile_all(
        node("node-a", "192.0.2.1", zone="east"),
        external,
        pod("a", node="node-a"),
        pod("b", node="node-b"),
        on_node,
    )
    mesh = snapshot.resources["mesh"]
    assert isinstance(mesh, MeshConfig)
    assert mesh.nodes == (
        NodeInfo("node-a", ("192.0.2.1",), "east"),
        NodeInfo("node-b", ("192.0.2.2", "2001:db8::2")),
    )
    assert {w.name: (w.zone, w.host_network) for w in snapshot.workloads.values()} == {
        "a": ("east", False),
        "b": ("", False),
        "agent": ("east", True),
    }


def test_a_nodes_address_that_is_none_is_refused() -> None:
    assert [f for f, _ in validate(node("n", "nowhere"))] == ["status.addresses[0].address"]


@pytest.mark.parametrize(
    ("of_namespace", "own", "spliced"),
    [
        ({}, {}, True),
        ({"labels": {SPLICE: "disabled"}}, {}, False),
        ({"annotations": {SPLICE: "disabled"}}, {}, False),
        ({}, {"labels": {SPLICE: "disabled"}}, False),
        ({}, {"annotations": {SPLICE: "disabled"}}, False),
        ({"labels": {SPLICE: "disabled"}}, {"labels": {SPLICE: "enabled"}}, True),
        ({"labels": {SPLICE: "enabled"}}, {"annotations": {SPLICE: "disabled"}}, False),
        ({"labels": {SPLICE: "disabled"}}, {"labels": {SPLICE: "off"}}, False),
        ({"labels": {SPLICE: "off"}}, {}, True),
    ],
)
def test_the_splice_switch(of_namespace: dict[str, Any], own: dict[str, Any], spliced: bool) -> None:
    ns, p = namespace(), pod("p")
    ns["metadata"] |= of_namespace
    p["metadata"] |= own
    snapshot = compile_all(ns, p)
    assert snapshot.workloads["uid-default-p"].splice is spliced
    wrong = "off" in (*of_namespace.get("labels", {}).values(), *own.get("labels", {}).values())
    assert ("neither enabled nor disabled" in messages(snapshot)) is wrong


def exposed(name: str, address: str, ns: str = "default", **spec: Any) -> Manifest:
    made = service(name, address, [{"name": "tcp", "port": 80, "targetPort": 8080, "nodePort": 30080}], ns)
    made["spec"] |= {"type": "LoadBalancer", **spec}
    return made


def test_addresses_beside_its_own() -> None:
    balanced = exposed("web", "10.96.0.1", externalIPs=["192.0.2.10", "2001:DB8::1"])
    balanced["status"] = {
        "loadBalancer": {
            "ingress": [
                {"ip": "198.51.100.1"},
                {"hostname": "lb.example"},
                {"ip": "198.51.100.2", "ipMode": "Proxy"},
                {"ip": "198.51.100.3", "ipMode": "VIP"},
            ]
        }
    }
    found = compile_all(balanced).services["default", "web"]
    assert found.external_addresses == ("192.0.2.10", "2001:db8::1", "198.51.100.1", "198.51.100.3")
    assert found.ports[0].node_port == 30080
    plain = {**balanced, "spec": {**balanced["spec"], "type": "NodePort"}}
    assert compile_all(plain).services["default", "web"].external_addresses == ("192.0.2.10", "2001:db8::1")
    kept = trim(next(k for k in BUILT_IN if k.kind == "Service"), "v1", balanced)
    assert compile_all(kept).services["default", "web"] == found, "what is read from the API is enough"


def test_an_external_address_takes_nobody_elses() -> None:
    """Anybody who may write a Service can name any address in it."""
    snapshot = compile_all(
        service("victim", "10.96.0.1"),
        pod("p", "10.1.0.1"),
        exposed(
            "thief", "10.96.0.2", ns="other", externalIPs=["10.96.0.1", "10.1.0.1", "10.96.0.2", "192.0.2.1"]
        ),
    )
    assert snapshot.services["other", "thief"].external_addresses == ("192.0.2.1",)
    assert "Service default/victim has the external address 10.96.0.1" in messages(snapshot, "thief")
    assert "Pod default/p has the external address 10.1.0.1" in messages(snapshot, "thief")


def test_services_may_share_an_external_address_but_no_port_of_it() -> None:
    first = exposed("first", "10.96.0.1", externalIPs=["192.0.2.1"])
    second = exposed("second", "10.96.0.2", externalIPs=["192.0.2.1"])
    first["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    second["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    found = compile_all(first, second).services
    assert found["default", "first"].external_addresses == ()
    assert found["default", "second"].external_addresses == ("192.0.2.1",)
    second["spec"]["ports"][0]["port"] = 81
    assert compile_all(first, second).services["default", "first"].external_addresses == ("192.0.2.1",)


def test_udp_ports_have_their_endpoints() -> None:
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "dns"},
        {"name": "dns-tcp", "port": 53, "targetPort": 1053},
    ]
    server = pod("p", "10.1.0.1", app="dns")
    server["spec"]["containers"][0]["ports"] = [{"name": "dns", "containerPort": 5353, "protocol": "UDP"}]
    udp, tcp = ports_of(compile_all(service("dns", ports=ports), server), "dns")
    assert (udp.protocol, udp.port, [e.port for e in udp.endpoints]) == ("UDP", 53, [5353])
    assert (tcp.protocol, tcp.port, [e.port for e in tcp.endpoints]) == ("TCP", 53, [1053])


# -- weights -------------------------------------------------------------------------------------------------------------------


def backend(number: int) -> Backend:
    return Backend(None, f"10.0.0.{number}", 80, "n")


@pytest.mark.parametrize(
    ("shares", "weights"),
    [
        ([(1, [1, 2])], {1: 1, 2: 1}),
        ([(90, [1]), (10, [2])], {1: 9, 2: 1}),
        ([(50, [1, 2, 3]), (50, [4])], {1: 1, 2: 1, 3: 1, 4: 3}),
        ([(80, [1, 2]), (20, [3, 4, 5])], {1: 6, 2: 6, 3: 1, 4: 1, 5: 1}),
        # one endpoint of two destinations has both shares
        ([(50, [1, 2]), (50, [2])], {1: 1, 2: 3}),
        # nobody's share goes to the others
        ([(50, []), (50, [2])], {2: 1}),
        ([(0, [1]), (50, [2])], {2: 1}),
        ([], {}),
    ],
)
def test_weights_make_the_shares(shares: list[tuple[int, list[int]]], weights: dict[int, int]) -> None:
    found = weigh([Share(w, tuple(map(backend, numbers))) for w, numbers in shares])
    assert {int(b.address.rpartition(".")[2]): w for b, w in found} == weights


def test_weights_stay_small() -> None:
    found = dict(weigh([Share(2**31, (backend(1),)), Share(1, tuple(map(backend, range(2, 200))))]))
    assert max(found.values()) == MOST_WEIGHT
    assert min(found.values()) == 1


def shared(*routes: Manifest, **more: Any) -> Manifest:
    return istio("VirtualService", "db", {"hosts": ["db"], "tcp": [{"route": list(routes), **more}]})


def to(subset: str = "", weight: int = 0, host: str = "db", port: int = 0) -> Manifest:
    destination: Manifest = {"host": host} | ({"subset": subset} if subset else {})
    destination |= {"port": {"number": port}} if port else {}
    return {"destination": destination, "weight": weight}


DATABASE = [
    mesh_namespace(),
    service("db", ports=[{"name": "tcp", "port": 5432, "targetPort": 5432}]),
    pod("one", "10.1.0.1", app="db", version="v1"),
    pod("two", "10.1.0.2", app="db", version="v1"),
    pod("three", "10.1.0.3", app="db", version="v2"),
    subsets("db", "v1", "v2", "v3"),
]


def weights(*manifests: Manifest) -> dict[str, int]:
    snapshot = compile_all(*DATABASE, *manifests)
    (port,) = ports_of(snapshot, "db")
    assert not port.l7
    return {e.address.rpartition(".")[2]: e.weight for e in port.endpoints}


def test_tcp_routes_weigh_endpoints() -> None:
    assert weights() == {"1": 1, "2": 1, "3": 1}
    assert weights(shared(to("v1", 50), to("v2", 50))) == {"1": 1, "2": 1, "3": 2}
    assert weights(shared(to("v2"))) == {"3": 1}
    other = service(
        "other", "10.96.0.11", [{"name": "tcp", "port": 1, "targetPort": 7}], selector={"app": "o"}
    )
    snapshot = compile_all(
        *DATABASE, other, pod("four", "10.1.0.4", app="o"), shared(to("v1", 50), to(host="other", weight=50))
    )
    assert ports_of(snapshot, "db")[0].endpoints == (
        Endpoint("uid-default-one", "10.1.0.1", 5432, "node-a"),
        Endpoint("uid-default-two", "10.1.0.2", 5432, "node-a"),
        Endpoint("uid-default-four", "10.1.0.4", 7, "node-a", weight=2),
    )
    assert not snapshot.findings


def test_which_tcp_route_counts() -> None:
    only = {"match": [{"port": 1}]}
    assert weights(shared(to("v2"), **only)) == {"1": 1, "2": 1, "3": 1}
    assert weights(shared(to("v2"), match=[{"port": 1}, {"port": 5432}])) == {"3": 1}
    assert weights(shared(to("v2"), match=[{"port": 5432, "gateways": ["edge"]}])) == {"1": 1, "2": 1, "3": 1}
    callers = shared(to("v2"), match=[{"sourceLabels": {"app": "x"}}])
    assert weights(callers) == {"1": 1, "2": 1, "3": 1}
    assert "sourceLabels: routing by who calls" in messages(compile_all(*DATABASE, callers))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (to("v9", 50), "no DestinationRule defines subset v9"),
        (to(host="nobody", weight=50), "no service has the host nobody.default"),
        (to(port=1, weight=50), "has no port 1 (it has 5432)"),
    ],
)
def test_a_destination_that_is_not_there_gets_nothing(wrong: Manifest, reason: str) -> None:
    assert weights(shared(to("v2", 50), wrong)) == {"3": 1}
    assert weights(shared(wrong)) == {}, "alone, it is refused"
    assert reason in messages(compile_all(*DATABASE, shared(wrong)))


def test_a_subset_without_pods_gets_nothing() -> None:
    assert weights(shared(to("v3", 50), to("v2", 50))) == {"3": 1}


def test_http_goes_before_tcp() -> None:
    route = shared(to("v2"))
    route["spec"]["http"] = [{"route": [to("v1")]}]
    assert weights(route) == {"3": 1}, "a port that says it is no HTTP has its tcp routes"
    web = [service("db", ports=[{"name": "http", "port": 80}]), *DATABASE[2:]]
    snapshot = compile_all(mesh_namespace(), *web, route)
    (port,) = ports_of(snapshot, "db")
    assert port.l7
    assert {e.weight for e in port.endpoints} == {1}


@pytest.mark.parametrize(
    ("routes", "field"),
    [
        ([], "spec.tcp[0].route"),
        ([{"weight": 1}], "spec.tcp[0].route[0].destination"),
        ([to("v1"), to("v2")], "spec.tcp[0].route"),
        ([to("v1", -1), to("v2", 2)], "spec.tcp[0].route[0].weight"),
    ],
)
def test_what_is_wrong_with_tcp_routes_is_named(routes: list[Manifest], field: str) -> None:
    found = [f for f, _ in validate(shared(*routes))]
    assert found
    assert all(f.startswith(field) for f in found), found
