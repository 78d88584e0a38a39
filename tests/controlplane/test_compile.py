"""Objects to snapshot: workloads, services, mTLS modes, and that nothing but content counts."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from controlplane.api import MeshConfig, MtlsMode, Service, ServicePort, Workload
from controlplane.compiler import compile_snapshot
from controlplane.model.snapshot import SnapshotError, build
from controlplane.model.world import Settings
from tests.controlplane.support import (
    Manifest,
    compile_all,
    istio,
    mesh_namespace,
    messages,
    namespace,
    objects,
    pod,
    service,
    subsets,
    two_versions,
)


def workload(*manifests: Manifest | str, uid: str = "uid-default-p") -> Workload:
    return compile_all(*manifests).workloads[uid]


def test_a_workload_is_what_its_pod_says() -> None:
    labels: dict[str, Any] = {"app": "web", "version": "v2", "pod-template-hash": "6d5"}
    owned = pod("web-6d5-abc", "10.1.0.1", "node-b", "web", **labels)
    owned["metadata"]["ownerReferences"] = [{"kind": "ReplicaSet", "name": "web-6d5"}]
    assert workload(mesh_namespace(), owned, uid="uid-default-web-6d5-abc") == Workload(
        uid="uid-default-web-6d5-abc",
        namespace="default",
        name="web-6d5-abc",
        service_account="web",
        node="node-b",
        identity="spiffe://cluster.local/ns/default/sa/web",
        addresses=("10.1.0.1",),
        enrolled=True,
        ready=True,
        workload_name="web",
        app="web",
        version="v2",
    )


@pytest.mark.parametrize(
    ("kind", "owner", "expected"),
    [
        ("StatefulSet", "db", "db"),
        ("Job", "backup-28923840", "backup"),
        ("Job", "once", "once"),
        ("ReplicaSet", "bare", "bare"),
    ],
)
def test_workload_names_are_istios(kind: str, owner: str, expected: str) -> None:
    owned = pod("p")
    owned["metadata"]["ownerReferences"] = [{"kind": kind, "name": owner}]
    assert workload(owned).workload_name == expected
    assert workload(pod("p")).workload_name == "p"


def test_addresses_come_later_and_go() -> None:
    assert workload(mesh_namespace(), pod("p")).addresses == ()
    assert not workload(pod("p")).ready
    dual = pod("p", "10.1.0.1")
    dual["status"]["podIPs"] = [{"ip": "10.1.0.1"}, {"ip": "FD00:0::1"}]
    assert workload(dual).addresses == ("10.1.0.1", "fd00::1")
    ended = pod("p", "10.1.0.1")
    ended["status"]["phase"] = "Succeeded"
    assert not compile_all(ended).workloads
    leaving = pod("p", "10.1.0.1")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert not workload(leaving).ready


@pytest.mark.parametrize(
    ("labels", "own", "enrolled"),
    [
        ({}, {}, False),
        ({"mycel.io/mesh": "enabled"}, {}, True),
        ({"istio.io/dataplane-mode": "ambient"}, {}, True),
        ({"istio-injection": "enabled"}, {}, True),
        ({"istio-injection": "disabled"}, {}, False),
        ({"mycel.io/mesh": "enabled"}, {"mycel.io/mesh": "disabled"}, False),
        ({"istio.io/dataplane-mode": "ambient"}, {"istio.io/dataplane-mode": "none"}, False),
        ({}, {"istio.io/dataplane-mode": "ambient"}, True),
        ({}, {"mycel.io/mesh": "enabled"}, True),
        ({"istio-injection": "enabled"}, {"sidecar.istio.io/inject": "false"}, False),
        ({"istio.io/dataplane-mode": "ambient"}, {"sidecar.istio.io/inject": "false"}, True),
    ],
)
def test_enrolment(labels: dict[str, str], own: dict[str, Any], enrolled: bool) -> None:
    assert workload(namespace("default", **labels), pod("p", **own)).enrolled is enrolled


def test_the_nodes_own_network_is_never_enrolled() -> None:
    host = pod("p", "192.168.0.1")
    host["spec"]["hostNetwork"] = True
    assert not workload(mesh_namespace(), host).enrolled
    assert not workload(pod("p")).enrolled, "without a Namespace object nothing is enrolled"


def test_endpoints_are_ready_pods_on_their_own_ports() -> None:
    ports = [
        {"name": "http", "port": 80, "targetPort": "web"},
        {"name": "tcp-x", "port": 81},
        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 5353},
    ]
    snapshot = compile_all(
        mesh_namespace(),
        service("web", "10.96.0.1", ports),
        pod("a", "10.1.0.1", ports={"web": 8080}, app="web"),
        pod("b", "10.1.0.2", node="node-b", ports={"web": 9090}, app="web"),
        pod("c", "10.1.0.3", app="web"),
        pod("d", "10.1.0.4", ready=False, ports={"web": 1}, app="web"),
        pod("e", "10.1.0.5", ports={"web": 1}, app="other"),
        pod("f", "10.1.0.6", ns="elsewhere", ports={"web": 1}, app="web"),
    )
    found = snapshot.services["default", "web"]
    assert (found.host, found.addresses) == ("web.default.svc.cluster.local", ("10.96.0.1",))
    first, second, third = found.ports
    assert [(e.uid, e.address, e.port, e.node) for e in first.endpoints] == [
        ("uid-default-a", "10.1.0.1", 8080, "node-a"),
        ("uid-default-b", "10.1.0.2", 9090, "node-b"),
    ]
    assert [(e.address, e.port) for e in second.endpoints] == [
        ("10.1.0.1", 81),
        ("10.1.0.2", 81),
        ("10.1.0.3", 81),
    ]
    assert (third.protocol, third.l7) == ("UDP", False)
    assert "Pod default/c has no container port named web" in messages(snapshot)
    assert "UDP port 53 is judged as any other, and not encrypted" in messages(snapshot)


def test_a_service_may_want_pods_that_are_not_ready() -> None:
    eager = service("web")
    eager["spec"]["publishNotReadyAddresses"] = True
    snapshot = compile_all(eager, pod("a", "10.1.0.1", ready=False, app="web"))
    assert len(snapshot.services["default", "web"].ports[0].endpoints) == 1


def test_a_service_without_selector_has_no_endpoints() -> None:
    snapshot = compile_all(service("web", selector={}), pod("a", "10.1.0.1", app="web"))
    assert snapshot.services["default", "web"].ports[0].endpoints == ()


def peer(
    name: str, mode: str | None, ns: str = "default", app: str = "", ports: Any = None, **metadata: Any
) -> Manifest:
    spec: Manifest = {"mtls": {"mode": mode}} if mode else {}
    if app:
        spec["selector"] = {"matchLabels": {"app": app}}
    if ports:
        spec["portLevelMtls"] = {str(p): {"mode": m} for p, m in ports.items()}
    return istio("PeerAuthentication", name, spec, ns, **metadata)


STRICT, PERMISSIVE = MtlsMode.STRICT, MtlsMode.PERMISSIVE
POD = pod("p", app="a")


@pytest.mark.parametrize(
    ("policies", "mode", "ports"),
    [
        ([], PERMISSIVE, ()),
        ([peer("m", "STRICT", "istio-system")], STRICT, ()),
        ([peer("m", "STRICT", "istio-system"), peer("n", "PERMISSIVE")], PERMISSIVE, ()),
        ([peer("m", "STRICT", "istio-system"), peer("n", "DISABLE")], PERMISSIVE, ()),
        ([peer("m", "STRICT", "istio-system"), peer("n", "UNSET")], STRICT, ()),
        ([peer("m", "STRICT", "istio-system"), peer("n", None)], STRICT, ()),
        ([peer("n", "STRICT"), peer("w", "PERMISSIVE", app="a")], PERMISSIVE, ()),
        ([peer("n", "STRICT"), peer("w", "PERMISSIVE", app="b")], STRICT, ()),
        ([peer("n", "STRICT"), peer("w", "UNSET", app="a")], STRICT, ()),
        ([peer("n", "STRICT", "other")], PERMISSIVE, ()),
        ([peer("w", "STRICT", "istio-system", app="a")], PERMISSIVE, ()),
        ([peer("w", "STRICT", app="a", ports={80: "PERMISSIVE", 81: "STRICT"})], STRICT, ((80, PERMISSIVE),)),
        ([peer("w", None, app="a", ports={9000: "STRICT", 80: "DISABLE"})], PERMISSIVE, ((9000, STRICT),)),
        (
            [peer("n", "STRICT"), peer("w", None, app="a", ports={80: "UNSET", 90: "DISABLE"})],
            STRICT,
            ((90, PERMISSIVE),),
        ),
        (
            [
                peer("a", "STRICT", creationTimestamp="2026-01-02T00:00:00Z"),
                peer("b", "PERMISSIVE", creationTimestamp="2026-01-01T00:00:00Z"),
            ],
            PERMISSIVE,
            (),
        ),
        ([peer("a", "STRICT"), peer("b", "PERMISSIVE")], STRICT, ()),
    ],
)
def test_mtls_precedence(
    policies: list[Manifest], mode: MtlsMode, ports: tuple[tuple[int, MtlsMode], ...]
) -> None:
    found = workload(POD, *policies)
    assert (found.mtls, found.port_mtls) == (mode, ports)


def test_mtls_findings() -> None:
    snapshot = compile_all(
        peer("old", "STRICT", creationTimestamp="2026-01-01T00:00:00Z"),
        peer("twin", "DISABLE", creationTimestamp="2026-01-02T00:00:00Z"),
        peer("root", "STRICT", "istio-system", app="a"),
    )
    assert "PeerAuthentication default/old is older and is the one" in messages(snapshot, "default/twin")
    assert "DISABLE is served as PERMISSIVE" in messages(snapshot, "default/twin")
    assert "has no effect" in messages(snapshot, "istio-system/root")


WORLD = [
    *two_versions(),
    subsets("web-app", "v1", "v2"),
    istio(
        "VirtualService",
        "web",
        {"hosts": ["web-app"], "http": [{"route": [{"destination": {"host": "web-app"}}]}]},
    ),
    peer("n", "STRICT"),
    istio("AuthorizationPolicy", "b", {"rules": [{"to": [{"operation": {"ports": ["80"]}}]}]}),
    istio(
        "AuthorizationPolicy",
        "a",
        {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["x"]}}]}]},
    ),
    service("second", "10.96.0.11"),
    pod("z", "10.1.0.9", app="second"),
]


def test_order_changes_nothing() -> None:
    expected = compile_all(*WORLD)
    rng = random.Random(1)
    for _ in range(20):
        shuffled = WORLD[:]
        rng.shuffle(shuffled)
        snapshot = compile_all(*shuffled)
        assert snapshot == expected
        assert list(snapshot.resources) == list(expected.resources)


def test_the_version_is_the_content() -> None:
    first = compile_all(*WORLD)
    assert len(first.version) == 64
    assert compile_all(*WORLD).version == first.version
    assert compile_all(*WORLD[:-1]).version != first.version
    assert compile_all(*WORLD, settings=Settings(roots="x")).version != first.version
    renamed = compile_all(*WORLD, istio("PeerAuthentication", "empty", {}, "unrelated"))
    assert renamed.version == first.version, "what changes nothing has the same version"


def test_a_snapshot_that_does_not_fit_together_is_refused() -> None:
    with pytest.raises(SnapshotError, match="no mesh configuration"):
        build([], [], [])
    lost = Workload("u", "n", "p", "s", "node", "spiffe://td/x", policies=("n/gone",))
    with pytest.raises(SnapshotError, match="n/gone"):
        build([MeshConfig(), lost], [], [])
    with pytest.raises(SnapshotError, match="stands twice"):
        build([MeshConfig(), MeshConfig()], [], [])
    flagged = Service("n", "s", "s.n.svc.cluster.local", ports=(ServicePort(80, l7=True),))
    with pytest.raises(SnapshotError, match="route tables differ"):
        build([MeshConfig(), flagged], [], [])


def test_a_uid_belongs_to_one_pod() -> None:
    snapshot = compile_all(pod("a", uid="u"), pod("b", uid="u"))
    assert snapshot.workloads["u"].name == "a"
    assert "has the same UID" in messages(snapshot, "default/b")


def test_an_address_belongs_to_one_service() -> None:
    """Else a proxy would have to refuse all services: it cannot tell the two apart."""
    routed = [
        istio("VirtualService", n, {"hosts": [n], "http": [{"route": [{"destination": {"host": n}}]}]})
        for n in "ab"
    ]
    snapshot = compile_all(service("a", "10.96.0.1"), service("b", "10.96.0.1"), *routed)
    assert snapshot.services["default", "a"].addresses == ("10.96.0.1",)
    assert snapshot.services["default", "b"].addresses == ()
    assert list(snapshot.tables) == ["a.default.svc.cluster.local:80"]
    assert "has the address 10.96.0.1" in messages(snapshot, "Service default/b")


def test_kinds_that_have_no_effect_say_so() -> None:
    gateway = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "g"},
        "spec": {"servers": []},
    }
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "r"},
        "spec": {},
    }
    config = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "c"}}
    snapshot = compile_all(*(json.dumps(m) for m in (gateway, route, config)))
    assert "Gateway is read, not in force yet\n" in messages(snapshot) + "\n"
    assert "HTTPRoute is read, not in force yet (nor are its fields checked)" in messages(snapshot)
    assert "Deployment means nothing to the mesh" in messages(snapshot)


def test_the_trust_domain_is_a_setting() -> None:
    snapshot = compile_snapshot(objects(pod("p")), Settings("example.org"))
    assert snapshot.workloads["uid-default-p"].identity == "spiffe://example.org/ns/default/sa/default"
    mesh = snapshot.resources["mesh"]
    assert isinstance(mesh, MeshConfig)
    assert mesh.trust_domain == "example.org"
