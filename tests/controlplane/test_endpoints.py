"""Endpoints of services: from pods and from EndpointSlices, and what applications ask of a service besides."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.api import Service
from controlplane.compiler import validate
from controlplane.model.snapshot import Snapshot
from tests.controlplane.support import (
    Manifest,
    compile_all,
    istio,
    mesh_namespace,
    messages,
    pod,
    service,
)


def endpoint(address: str, target: str = "", uid: str = "", **conditions: bool) -> Manifest:
    made: Manifest = {"addresses": [address], "conditions": conditions, "nodeName": "node-x"}
    if target:
        made["targetRef"] = {"kind": "Pod", "namespace": "default", "name": target, "uid": uid}
    return made


def endpoint_slice(
    *endpoints: Manifest,
    name: str = "web-1",
    port: int = 9000,
    port_name: str = "http",
    managed: bool = False,
) -> Manifest:
    labels = {"kubernetes.io/service-name": "web"}
    if managed:
        labels["endpointslice.kubernetes.io/managed-by"] = "endpointslice-controller.k8s.io"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": [{"name": port_name, "port": port, "protocol": "TCP"}],
    }


def web(selector: dict[str, str] | None = None, **spec: Any) -> Manifest:
    made = service("web", selector=selector)
    made["spec"] |= spec
    return made


def found(snapshot: Snapshot) -> Service:
    return snapshot.services["default", "web"]


def endpoints(snapshot: Snapshot) -> list[tuple[str, str, int, str, bool]]:
    return [(e.uid, e.address, e.port, e.node, e.terminating) for e in found(snapshot).ports[0].endpoints]


def ending(name: str, address: str, ready: bool = True, node: str = "node-a") -> Manifest:
    made = pod(name, address, node, ready=ready, app="web")
    made["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return made


def test_slices_by_hand_are_the_endpoints_of_a_service_without_selector() -> None:
    snapshot = compile_all(
        web({}),
        pod("a", "10.1.0.1"),
        endpoint_slice(endpoint("192.0.2.1"), endpoint("10.1.0.1"), endpoint("192.0.2.9", ready=False)),
        endpoint_slice(endpoint("192.0.2.1"), endpoint("192.0.2.2"), name="web-2", port=9001),
        endpoint_slice(endpoint("192.0.2.3"), name="web-3", port_name="other"),
    )
    assert endpoints(snapshot) == [
        ("", "192.0.2.1", 9000, "node-x", False),
        ("", "192.0.2.1", 9001, "node-x", False),
        ("", "192.0.2.2", 9001, "node-x", False),
        ("uid-default-a", "10.1.0.1", 9000, "node-a", False),
    ]


def test_a_slices_pod_has_to_be_there() -> None:
    snapshot = compile_all(
        web({}),
        pod("a", "10.1.0.1", ready=False),
        ending("b", "10.1.0.2"),
        pod("nowhere", node="", ready=False),
        endpoint_slice(
            endpoint("10.1.0.1", "a", "uid-default-a"),
            endpoint("10.1.0.2", "b"),
            endpoint("10.1.0.3", "gone"),
            endpoint("10.1.0.4", "a", "an older pod of this name"),
            endpoint("10.1.0.5", "nowhere"),
        ),
    )
    assert endpoints(snapshot) == [("uid-default-a", "10.1.0.1", 9000, "node-a", False)], (
        "whoever writes slices says who is ready; who ends, and who is gone, pods say themselves"
    )


def test_a_slices_pod_has_to_have_the_address() -> None:
    """Else its identity, node and enrolment would be taken for somebody else's."""
    snapshot = compile_all(
        web({}),
        pod("a", "10.1.0.1"),
        pod("b", "10.2.0.1", "node-b"),
        pod("starts", "", "node-b", ready=False),
        endpoint_slice(
            endpoint("10.2.0.1", "a"), endpoint("192.0.2.1", "a"), endpoint("10.2.0.2", "starts", ready=True)
        ),
    )
    assert endpoints(snapshot) == [
        ("", "192.0.2.1", 9000, "node-x", False),
        ("uid-default-b", "10.2.0.1", 9000, "node-b", False),
        ("uid-default-starts", "10.2.0.2", 9000, "node-b", False),
    ]


def test_kubernetes_own_slices_are_not_waited_for() -> None:
    """They are made from the pods that are known already: one hop earlier, in both directions."""
    behind = endpoint_slice(
        endpoint("10.1.0.1", "a", ready=False), endpoint("10.1.0.2", "b"), managed=True, port=8080
    )
    snapshot = compile_all(
        web(), pod("a", "10.1.0.1", app="web"), pod("b", "10.1.0.2", ready=False, app="web"), behind
    )
    assert [e[1] for e in endpoints(snapshot)] == ["10.1.0.1"]
    assert endpoints(compile_all(web({}), pod("b", "10.1.0.2", ready=False, app="web"), behind)) == [
        ("uid-default-b", "10.1.0.2", 8080, "node-a", False)
    ], "what is left of a selector that was removed counts"


def test_slices_add_to_what_a_selector_finds() -> None:
    snapshot = compile_all(
        web(),
        pod("a", "10.1.0.1", app="web"),
        endpoint_slice(endpoint("10.1.0.1"), endpoint("192.0.2.1"), port=8080),
    )
    assert endpoints(snapshot) == [
        ("", "192.0.2.1", 8080, "node-x", False),
        ("uid-default-a", "10.1.0.1", 8080, "node-a", False),
    ]


def test_where_nothing_is_ready_what_ends_serves_on() -> None:
    pods = [ending("a", "10.1.0.1"), ending("b", "10.1.0.2", ready=False)]
    assert endpoints(compile_all(web(), *pods)) == [("uid-default-a", "10.1.0.1", 8080, "node-a", True)]
    assert [e[1] for e in endpoints(compile_all(web(), *pods, pod("c", "10.1.0.3", app="web")))] == [
        "10.1.0.3"
    ]
    by_hand = endpoint_slice(endpoint("192.0.2.1", ready=False, serving=True, terminating=True))
    assert endpoints(compile_all(web({}), by_hand)) == [("", "192.0.2.1", 9000, "node-x", True)]


def test_local_traffic_decides_that_node_by_node() -> None:
    pods = [ending("a", "10.1.0.1"), ending("b", "10.2.0.1", node="node-b"), pod("c", "10.1.0.2", app="web")]
    snapshot = compile_all(web(internalTrafficPolicy="Local"), *pods)
    assert found(snapshot).internal_local
    assert [(e[1], e[4]) for e in endpoints(snapshot)] == [("10.2.0.1", True), ("10.1.0.2", False)]
    assert not found(compile_all(web(internalTrafficPolicy="Cluster"))).internal_local


def test_not_ready_addresses_are_published_whatever_they_are() -> None:
    pods = [
        ending("a", "10.1.0.1", ready=False),
        pod("b", "10.1.0.2", ready=False, app="web"),
        pod("c", app="web"),
    ]
    assert [(e[1], e[4]) for e in endpoints(compile_all(web(publishNotReadyAddresses=True), *pods))] == [
        ("10.1.0.1", False),
        ("10.1.0.2", False),
    ]


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({}, 0),
        ({"sessionAffinity": "None"}, 0),
        ({"sessionAffinity": "ClientIP"}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}, 60),
    ],
)
def test_session_affinity(spec: Manifest, seconds: int) -> None:
    assert found(compile_all(web(**spec))).session_affinity == seconds


def test_a_named_port_is_each_pods_own() -> None:
    ports = [
        {"name": "a", "port": 80, "targetPort": "x"},
        {"name": "b", "port": 80, "targetPort": "x", "protocol": "UDP"},
    ]
    one, two = pod("a", "10.1.0.1", ports={"x": 1}, app="web"), pod("b", "10.1.0.2", app="web")
    one["spec"]["containers"].append({"name": "second", "ports": [{"name": "x", "containerPort": 9}]})
    two["spec"]["containers"] = [
        {"name": "main", "ports": [{"name": "x", "containerPort": 53, "protocol": "UDP"}]}
    ]
    two["spec"]["initContainers"] = [
        {"name": "early", "ports": [{"name": "x", "containerPort": 8}]},
        {"name": "native", "restartPolicy": "Always", "ports": [{"name": "x", "containerPort": 7}]},
    ]
    snapshot = compile_all(web(ports=ports), one, two)
    tcp, udp = found(snapshot).ports
    assert [(e.address, e.port) for e in tcp.endpoints] == [("10.1.0.1", 1), ("10.1.0.2", 7)]
    assert [(e.address, e.port) for e in udp.endpoints] == [("10.1.0.2", 53)]


def test_an_external_name_passes() -> None:
    made = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"type": "ExternalName", "externalName": "api.example.org", "ports": [{"port": 443}]},
    }
    route = {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]}
    snapshot = compile_all(made, istio("VirtualService", "web", route), pod("a", "10.1.0.1"))
    assert (found(snapshot).addresses, endpoints(snapshot), dict(snapshot.tables)) == ((), [], {})
    assert "calls pass as without a mesh" in messages(snapshot, "Service default/web")
    assert "is outside of the cluster (api.example.org)" in messages(snapshot, "VirtualService default/web")


def test_routed_ports_say_what_they_do_not_keep_to() -> None:
    route = {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]}
    asks = web(sessionAffinity="ClientIP", internalTrafficPolicy="Local")
    snapshot = compile_all(mesh_namespace(), asks, istio("VirtualService", "web", route))
    assert "spec.sessionAffinity: has no effect on port 80" in messages(snapshot)


def test_slices_reach_clusters_too() -> None:
    route = {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]}
    snapshot = compile_all(
        web({}), istio("VirtualService", "web", route), endpoint_slice(endpoint("192.0.2.1"))
    )
    (made,) = snapshot.clusters["outbound|80||web.default.svc.cluster.local"].endpoints
    assert (made.address, made.port, made.uid, made.enrolled) == ("192.0.2.1", 9000, "", False)


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (endpoint_slice(endpoint("not an address")), "endpoints[0].addresses[0]"),
        ({**endpoint_slice(), "addressType": "IPv5"}, "addressType"),
        (web(sessionAffinity="Sometimes"), "spec.sessionAffinity"),
        (web(internalTrafficPolicy="Near"), "spec.internalTrafficPolicy"),
    ],
)
def test_what_is_refused(made: Manifest, field: str) -> None:
    assert field in [f for f, _ in validate(made)]


def test_names_instead_of_addresses_are_left_out() -> None:
    named = {**endpoint_slice(endpoint("api.example.org")), "addressType": "FQDN"}
    assert endpoints(compile_all(web({}), named)) == []
