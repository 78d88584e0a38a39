"""The seed files, each as it is and alone, and Istio's sample application."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlplane.istio.virtualservice import DEFAULT_RETRY
from controlplane.model.routing import Balancing, Forward, HeaderMatch, MatchKind, RetryPolicy, StringMatch
from controlplane.source.manifests import parse
from tests.controlplane.support import (
    Manifest,
    compile_all,
    mesh_namespace,
    messages,
    pod,
    subsets,
    two_versions,
)
from tests.controlplane.test_routing import TABLE, clusters_of, l7_ports


def seeds(shared: Path, *numbers: str) -> list[str]:
    return [p.read_text() for n in numbers for p in (shared / "seed-config").glob(f"{n}-*.yaml")]


def test_seed_01_canary(shared: Path) -> None:
    snapshot = compile_all(*two_versions(), *seeds(shared, "01"))
    (route,) = snapshot.tables[TABLE].routes
    assert clusters_of(route) == [
        ("outbound|80|v1|web-app.default.svc.cluster.local", 80),
        ("outbound|80|v2|web-app.default.svc.cluster.local", 20),
    ]
    assert [
        e.version for e in snapshot.clusters["outbound|80|v1|web-app.default.svc.cluster.local"].endpoints
    ] == ["v1"]
    assert [
        e.node for e in snapshot.clusters["outbound|80|v2|web-app.default.svc.cluster.local"].endpoints
    ] == ["node-b"]
    assert not snapshot.findings


def test_seed_02_and_13_strict(shared: Path) -> None:
    snapshot = compile_all(*two_versions(), pod("d", ns="dev"), *seeds(shared, "02"))
    assert snapshot.workloads["uid-dev-d"].mtls.value == "STRICT"
    assert snapshot.workloads["uid-default-web-app-v1"].mtls.value == "PERMISSIVE"
    assert (
        compile_all(*two_versions(), *seeds(shared, "13")).workloads["uid-default-web-app-v1"].mtls.value
        == "STRICT"
    )


def test_seed_03_with_04(shared: Path) -> None:
    snapshot = compile_all(*two_versions("reviews"), *seeds(shared, "03", "04"))
    jason, others = snapshot.tables["reviews.default.svc.cluster.local:80"].routes
    assert jason.match.headers == (HeaderMatch("end-user", StringMatch(MatchKind.EXACT, "jason")),)
    assert clusters_of(jason) == [("outbound|80|v2|reviews.default.svc.cluster.local", 100)]
    assert clusters_of(others) == [("outbound|80|v1|reviews.default.svc.cluster.local", 100)]
    balancing = {c.subset: c.balancing for c in snapshot.clusters.values()}
    assert balancing == {"": Balancing.RANDOM, "v1": Balancing.RANDOM, "v2": Balancing.ROUND_ROBIN}
    assert not snapshot.findings


def test_seed_03_alone_guesses_nothing(shared: Path) -> None:
    snapshot = compile_all(*two_versions("reviews"), *seeds(shared, "03"))
    assert list(snapshot.clusters) == ["outbound|80||reviews.default.svc.cluster.local"]
    assert "no DestinationRule defines subset v2" in messages(snapshot)


def test_seed_10_needs_a_destination_rule(shared: Path) -> None:
    without = compile_all(*two_versions("my-app"), *seeds(shared, "10"))
    assert l7_ports(without, "my-app") == [80]
    assert "outbound|80|v1|my-app.default.svc.cluster.local" not in without.clusters
    (first, _) = [f for f in without.findings if f.severity.name == "ERROR"]
    assert first.object == "VirtualService default/my-app-vs"
    assert first.field == "spec.http[0].route[0].destination.subset"
    assert "answered 503" in first.message
    assert "add a DestinationRule for host my-app.default.svc.cluster.local" in first.action
    complete = compile_all(*two_versions("my-app"), *seeds(shared, "10"), subsets("my-app", "v1", "v2"))
    assert "outbound|80|v1|my-app.default.svc.cluster.local" in complete.clusters
    assert not complete.findings


def test_seed_11_and_12_retries(shared: Path) -> None:
    (route,) = (
        compile_all(*two_versions("my-app"), *seeds(shared, "11"))
        .tables["my-app.default.svc.cluster.local:80"]
        .routes
    )
    assert isinstance(route.action, Forward)
    assert route.action.timeout == 5000
    assert route.action.retry == RetryPolicy(
        3, ("gateway-error", "connect-failure", "refused-stream"), per_try_timeout=2000
    )
    (route,) = (
        compile_all(*two_versions("my-app"), *seeds(shared, "12"))
        .tables["my-app.default.svc.cluster.local:80"]
        .routes
    )
    assert isinstance(route.action, Forward)
    assert route.action.timeout == 10000
    assert route.action.retry == RetryPolicy(3, DEFAULT_RETRY.conditions)


@pytest.mark.parametrize("number", [f"{n:02}" for n in range(1, 14)])
def test_every_seed_file_alone(shared: Path, number: str) -> None:
    """Read without error; what has no effect yet says so."""
    snapshot = compile_all(*seeds(shared, number))
    if number in ("05", "06", "07", "08", "09"):
        assert "not in force yet" in messages(snapshot)
    assert not [f for f in snapshot.findings if f.severity.name == "ERROR"]


def test_the_sample_applications_routes_compile(shared: Path) -> None:
    """Each of Istio's files beside the application; what is not in force yet says so, and nothing else is wrong."""
    sample = shared / "conformance/istio/bookinfo"
    application = [m for m in _documents(sample / "platform/kube/bookinfo.yaml") if m["kind"] == "Service"]
    for n, item in enumerate(application):
        item["spec"]["clusterIP"] = f"10.96.1.{n + 1}"
    rules = _documents(sample / "networking/destination-rule-all.yaml")
    compiled = 0
    for path in sorted((sample / "networking").glob("virtual-service-*.yaml")):
        texts = [json.dumps(m) for m in [*application, *rules, *_documents(path)]]
        snapshot = compile_all(mesh_namespace(), *texts)
        compiled += len(snapshot.tables)
        for finding in snapshot.findings:
            expected = ("not in force yet", "selects no pod", "no service has the host", "not HTTP")
            assert any(e in finding.message for e in expected) or "subset v2-mysql" in finding.message, (
                path,
                finding,
            )
    assert compiled >= 15


def _documents(path: Path) -> list[Manifest]:
    return [d.manifest for d in parse(path.read_bytes()) if d.manifest]
