"""The commands beside a real mesh: what they say of real traffic, of a route that leads nowhere, and of a missing process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.lab import CONTROL_ADDRESS, Lab
from lab.pod import Pod
from lab.processes import wait_until

pytestmark = pytest.mark.privileged

CONTROLLER = ("--controller", f"{CONTROL_ADDRESS}:15014")
PORT = 8080

SPLIT = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web}
spec:
  host: web
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web}
spec:
  hosts: [web]
  http:
  - route:
    - {destination: {host: web, subset: v1}, weight: 50}
    - {destination: {host: web, subset: v2}, weight: 50}
"""


@pytest.fixture(scope="module")
def client(lab: Lab) -> Pod:
    """Dials ``web`` (routed; v1 beside it, v2 on the other node), ``near`` and ``far`` (L4)."""
    for version, node in (("v1", "node1"), ("v2", "node2")):
        labels = {"app": "web", "version": version}
        pod = lab.pod(f"web-{version}", node=node, service_account="web", labels=labels, ports=(PORT,))
        pod.serve(pod.app("http_server", PORT, "--name", pod.record.name, "--version", version), PORT)
    for name, node in (("near", "node1"), ("far", "node2")):
        pod = lab.pod(name, node=node, service_account=name, ports=(PORT,))
        pod.serve(pod.app("http_server", PORT, "--name", name), PORT)
        lab.service(name, 80, target_port=PORT, port_name="tcp")
    lab.service("web", 80, target_port=PORT)
    lab.apply(SPLIT, name="web.yaml")
    client = lab.pod("client", service_account="client")
    client.set_ready(True)
    lab.settle()
    return client


def address(lab: Lab, service: str) -> str:
    for resource in lab.get_json("controlplane", path="/debug/snapshot")["resources"]:
        if resource["type"] == "service" and resource["name"] == service:
            found: str = resource["addresses"][0]
            return found
    raise AssertionError(f"no service {service}")


def findings(lab: Lab, expected: int) -> list[dict[str, str]]:
    done = lab.mycel("check", *CONTROLLER, "--json", check=False)
    assert done.returncode == expected, done.stdout
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def test_a_whole_mesh_has_no_errors(lab: Lab, client: Pod) -> None:
    assert {f["severity"] for f in findings(lab, 0)} == {"info"}


def test_every_way_is_counted_where_it_is_measured(lab: Lab, client: Pod) -> None:
    urls = [f"http://{address(lab, service)}/?n=[1-200]" for service in ("web", "near", "far")]
    # Until after the second scrape; a connection for each service.
    load = client.popen(["/bin/sh", "-c", f"while :; do curl -s {' '.join(urls)} >/dev/null; done"])
    try:
        stat = json.loads(lab.mycel("stat", *CONTROLLER, "--interval", "3", "--json").stdout)
        table = lab.mycel("stat", *CONTROLLER, "--interval", "1").stdout
    finally:
        load.kill()
        load.wait()
    assert stat["missing"] == []
    rows: dict[tuple[str, str], dict[str, Any]] = {(s["service"], s["measured"]): s for s in stat["services"]}
    web = rows["default/web", "l7proxy"]
    assert web["success_rate"] == 1.0
    assert web["requests_per_second"] > 10
    assert 0 < web["p50_ms"] <= web["p95_ms"] <= web["p99_ms"]
    assert 0.3 < web["mtls_share"] < 0.7, "half of it goes to the other node"
    assert web["mtls_share"] + web["same_node_share"] == pytest.approx(1.0), (
        "and none of it is plain on a wire"
    )
    near, far = rows["default/near", "kernel"], rows["default/far", "node proxy"]
    assert (near["mtls_share"], near["same_node_share"]) == (0.0, 1.0)
    assert (far["mtls_share"], far["same_node_share"]) == (1.0, 0.0)
    for row in (near, far):
        assert row["sent_bytes_per_second"] > 1000
    for name in ("default/web", "default/near", "default/far"):
        assert name in table


def test_a_route_to_a_subset_that_is_none_is_an_error_with_a_remedy(
    lab: Lab, client: Pod, shared: Path
) -> None:
    lab.service("my-app", 80, target_port=PORT)
    with lab.applied(shared / "seed-config" / "10-istio-split-90-10.yaml") as file:
        about = [f for f in findings(lab, 1) if f["object"] == "VirtualService default/my-app-vs"]
    assert about
    for finding in about:
        assert finding["file"].endswith(file)
        assert finding["field"]
        assert "subset" in finding["message"]
        assert "DestinationRule" in finding["action"]
    lab.cluster.remove("Service", "default", "my-app")
    lab.settle()


def test_a_process_that_is_away_is_named_with_its_node(lab: Lab, client: Pod) -> None:
    lab.kill("node2", "l7proxy")
    try:
        wait_until(lambda: lab.mycel("check", *CONTROLLER, check=False).returncode == 1, 10, "check notices")
        errors = [f for f in findings(lab, 1) if f["severity"] == "error"]
        assert [(f["object"], f["message"].split()[:2]) for f in errors] == [
            ("Node node2", ["no", "l7proxy"])
        ]
    finally:
        lab.start("node2", "l7proxy")
    lab.settle()
    findings(lab, 0)
