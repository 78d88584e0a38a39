"""Install, check, upgrade and uninstall, as a platform team meets them: on a cluster that has no mesh, before and after."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import chart
from lab.errors import LabError
from lab.kubernetes import Cluster
from lab.kubernetes.mesh import NAMESPACE, Mesh
from lab.kubernetes.node import Node
from lab.processes import wait_until
from tests.cluster.apps import IMAGE, Apps
from tests.deploy.helm import helm
from tests.programs import CGROUP_INET4_CONNECT, CGROUP_SOCK_OPS, SK_LOOKUP, attached

pytestmark = pytest.mark.timeout(600)

#: Longest from the first object until `mycel check` passes, seconds. (What it is on a quiet machine is the benchmark's.)
_PATIENCE = 120


@pytest.fixture(scope="module")
def own(lab_cluster: Cluster, images: None) -> Cluster:
    """The cluster, with our images, and without the mesh when these tests begin."""
    if lab_cluster.kubectl("get", "namespace", NAMESPACE, "--ignore-not-found").strip():
        Mesh(lab_cluster).uninstall("--yes")
    return lab_cluster


@pytest.fixture
def installed(own: Cluster) -> Mesh:
    """The mesh as ``mycel install`` makes it; checked."""
    mesh = Mesh(own)
    own.kubectl(
        "apply", "--server-side", "-f", "-", input=mesh.mycel("install", "--crds", "istio"), timeout=120
    )
    mesh.mycel("check", "--wait", f"{_PATIENCE}s", timeout=_PATIENCE + 30)
    return mesh


@pytest.fixture
def apps(own: Cluster) -> Iterator[Apps]:
    name = f"apps-{os.urandom(3).hex()}"
    own.kubectl("create", "namespace", name)
    own.kubectl("label", "namespace", name, "mycel.io/mesh=enabled")
    yield Apps(own, name)
    own.kubectl("delete", "namespace", name, "--wait=false", check=False)


def findings(mesh: Mesh, *arguments: str) -> list[dict[str, Any]]:
    """What ``mycel check`` says, whatever its exit status."""
    found: list[dict[str, Any]] = json.loads(mesh.mycel("check", "--json", *arguments, check=False))
    return found


def test_check_before_there_is_anything(own: Cluster) -> None:
    mesh = Mesh(own)
    assert [f for f in findings(mesh, "--pre") if f["severity"] == "error"] == []
    (missing,) = findings(mesh)
    assert "not installed" in missing["message"]
    assert "mycel install" in missing["action"]


def test_check_sees_every_part_and_goes_on_when_one_is_gone(installed: Mesh, own: Cluster) -> None:
    assert [f for f in findings(installed) if f["severity"] == "error"] == []
    own.kubectl("delete", "daemonset", "mycel-nodeproxy", "-n", NAMESPACE, timeout=90)
    errors = {f["object"]: f["message"] for f in findings(installed) if f["severity"] == "error"}
    assert errors[f"DaemonSet {NAMESPACE}/mycel-nodeproxy"] == "is not there"
    assert "nodeproxy is not connected" in errors["Node node1"]
    own.kubectl("apply", "--server-side", "-f", "-", input=installed.mycel("install"))
    installed.mycel("check", "--wait", f"{_PATIENCE}s", timeout=_PATIENCE + 30)


def test_check_reads_every_replica_and_names_pods_with_a_sidecar(
    installed: Mesh, own: Cluster, apps: Apps
) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "injected",
            "namespace": apps.namespace,
            "annotations": {"sidecar.istio.io/status": "{}"},
        },
        "spec": {
            "containers": [{"name": "app", "image": IMAGE}, {"name": "istio-proxy", "image": IMAGE}],
            "terminationGracePeriodSeconds": 0,
        },
    }
    own.apply(pod)
    wait_until(
        lambda: any(
            f["object"] == f"Pod {apps.namespace}/injected" and "sidecar" in f["message"]
            for f in findings(installed)
        ),
        60.0,
        "mycel check names the pod that has a sidecar",
        interval=1.0,
    )


def test_stat_sees_traffic_between_nodes(installed: Mesh, own: Cluster, apps: Apps) -> None:
    apps.server("web", node="node2")
    client = apps.client("client", node="node1")
    apps.wait_reachable(client, "http://web/")

    services: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60
    while not services and time.monotonic() < deadline:
        before = own.kubectl(
            *("exec", "-n", apps.namespace, client.name, "--", "sh", "-c"),
            "for i in $(seq 40); do curl -s -o /dev/null -m 2 http://web/ & sleep 0.1; done >/dev/null 2>&1 &",
        )
        assert "error" not in before
        found = json.loads(installed.mycel("stat", "--json", "--interval", "3"))
        # (Kubelet's probes are measured by the kernel of the server's node.)
        services = [
            s
            for s in found["services"]
            if s["service"] == f"{apps.namespace}/web" and s["measured"] == "node proxy"
        ]
    assert services, "no traffic to web was measured"
    assert services[0]["mtls_share"] == 1.0, services


def test_nodes_are_looked_into_through_the_api_server(installed: Mesh, apps: Apps) -> None:
    """Both ends' agents are asked by pods/proxy, and agree with the policies."""
    apps.server("web", node="node2")
    client = apps.client("client", node="node1")
    apps.wait_reachable(client, "http://web/")
    question = (f"{apps.namespace}/{client.name}", f"web.{apps.namespace}:80")
    answer = json.loads(installed.mycel("why", *question, "-o", "json"))
    assert (answer["verdict"], answer["differences"], answer["node"]) == ("allowed", [], "node1")
    (endpoint,) = answer["endpoints"]
    assert endpoint["node"] == "node2"
    assert {step.get("node") for step in endpoint["steps"]} == {None, "node2"}
    found = json.loads(installed.mycel("agent", "status", "-o", "json", check=False))
    assert {one["node"] for one in found} >= {"node1", "node2"}
    shown = json.loads(installed.mycel("bpf", "policies", question[0], "-o", "json"))
    assert [(one["node"], one["pod"]) for one in shown] == [("node1", question[0])]


def test_upgrade_keeps_what_was_chosen_and_takes_what_is_new(installed: Mesh, own: Cluster) -> None:
    said = installed.mycel("upgrade", "--set", "log.level=debug", timeout=300)
    parts = ["mycel-controlplane", "mycel-agent", "mycel-nodeproxy"]
    assert sorted(parts, key=said.index) == parts
    said = installed.mycel("upgrade", "--set", "webhook.timeoutSeconds=7", timeout=300)
    agent = own.get("daemonset", "mycel-agent", "-n", NAMESPACE)["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "MYCEL_LOG_LEVEL", "value": "debug"} in agent["env"]
    webhook = own.get("validatingwebhookconfiguration", "mycel")["webhooks"][0]
    assert webhook["timeoutSeconds"] == 7
    installed.mycel("check", "--wait", f"{_PATIENCE}s", timeout=_PATIENCE + 30)
    # By the hand that installed: what is taken back there is taken back here.
    own.kubectl("apply", "--server-side", "-f", "-", input=installed.mycel("install"))


def test_an_upgrade_that_does_not_come_up_stops_there(installed: Mesh, own: Cluster) -> None:
    with pytest.raises(LabError, match="nothing has moved on for 15 s: Deployment"):
        installed.mycel(
            *("upgrade", "--timeout", "15s", "--set", "image.tag=0.1.999", "--set", "image.pullPolicy=Never"),
            timeout=120,
        )
    agent = own.get("daemonset", "mycel-agent", "-n", NAMESPACE)
    assert "0.1.999" not in agent["spec"]["template"]["spec"]["containers"][0]["image"]
    assert [f for f in findings(installed) if "controller" in f["message"] and f["severity"] == "error"] == []
    with pytest.raises(LabError, match="more than one minor version"):
        installed.mycel("upgrade", "--set", "image.tag=0.3.0")
    own.kubectl(*("apply", "--server-side", "--force-conflicts", "-f", "-"), input=installed.mycel("install"))
    installed.mycel("check", "--wait", f"{_PATIENCE}s", timeout=_PATIENCE + 30)


class NodeState:
    """What of a node an installation may change."""

    def __init__(self, node: Node) -> None:
        root = node.root
        self.conflists = {p.name: p.read_text() for p in (root / "etc/cni/net.d").iterdir() if p.is_file()}
        self.plugins = sorted(p.name for p in (root / "opt/cni/bin").iterdir())
        self.pins = sorted(p.name for p in (root / "sys/fs/bpf").iterdir() if not p.name.endswith(".debug"))
        self.files = sorted(
            str(p)
            for folder in ("run/mycel", "var/lib/mycel")
            if (root / folder).is_dir()
            for p in (root / folder).iterdir()
        )
        self.programs = [
            *attached(node.cgroup, CGROUP_INET4_CONNECT),
            *attached(node.cgroup, CGROUP_SOCK_OPS),
        ]

    def same(self, conflists: dict[str, Any]) -> bool:
        return {n: json.loads(t) for n, t in self.conflists.items()} == conflists


def without_ours(text: str) -> dict[str, Any]:
    """A conflist without our entry."""
    conflist: dict[str, Any] = json.loads(text)
    conflist["plugins"] = [entry for entry in conflist["plugins"] if entry["type"] != "mycel"]
    return conflist


def assert_clean(node: Node, conflists: dict[str, Any]) -> None:
    state = NodeState(node)
    assert state.same(conflists), state.conflists
    assert not [name for name in state.plugins if "mycel" in name], state.plugins
    assert not state.pins
    assert not state.files
    assert not state.programs


def netns_programs(own: Cluster, apps: Apps, deployment: str) -> list[int]:
    """Programs on the network namespace of a deployment's first pod."""
    pod = apps.pods(deployment)[0]
    pids = own.node(pod.node).pod_pids(pod.uid)
    return attached(Path(f"/proc/{pids[0]}/ns/net"), SK_LOOKUP)


def test_uninstall_leaves_nothing_of_ours_and_all_of_yours(installed: Mesh, own: Cluster, apps: Apps) -> None:
    apps.server("web", node="node2")
    client = apps.client("client", node="node1")
    apps.wait_reachable(client, "http://web/")
    before = {node.name: NodeState(node) for node in own.nodes}
    assert all(state.pins and state.programs and state.files for state in before.values())
    assert netns_programs(own, apps, "web")
    expected = {
        name: {file: without_ours(text) for file, text in state.conflists.items()}
        for name, state in before.items()
    }
    route = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "web", "namespace": apps.namespace},
        "spec": {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]},
    }
    own.apply(route)
    note = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "notes", "namespace": NAMESPACE},
        "data": {"why": "mine"},
    }
    own.apply(note)

    said = installed.mycel("uninstall", "--yes", timeout=240)

    assert f"Namespace {NAMESPACE}: holds ConfigMap notes" in said
    for node in own.nodes:
        assert_clean(node, expected[node.name])
    assert netns_programs(own, apps, "web") == []
    for kind in ("clusterrole", "clusterrolebinding", "validatingwebhookconfiguration"):
        assert not own.kubectl("get", kind, "-l", "app.kubernetes.io/name=mycel", "-o", "name").strip()
    for kind in ("all", "secret", "lease", "role", "rolebinding", "poddisruptionbudget"):
        there = own.kubectl("get", kind, "-n", NAMESPACE, "-o", "name").split()
        assert not [name for name in there if "mycel" in name], there
    assert own.get("virtualservice", "web", "-n", apps.namespace)["spec"]["hosts"] == ["web"]
    assert own.get("configmap", "notes", "-n", NAMESPACE)["data"] == {"why": "mine"}
    # Applications go on, old pods and new ones.
    assert client.reaches("http://web/")
    apps.client("later", node="node2")
    assert apps.pods("later")[0].reaches("http://web/")

    own.kubectl("delete", "configmap", "notes", "-n", NAMESPACE)
    assert "done\n" in installed.mycel("uninstall", "--yes", timeout=240)
    assert not own.kubectl("get", "namespace", NAMESPACE, "--ignore-not-found").strip()
    assert own.kubectl("get", "crd", "virtualservices.networking.istio.io", "-o", "name").strip()
    # And once more, where there is nothing.
    assert "done\n" in installed.mycel("uninstall", "--yes")


def test_helm_installs_what_passes_the_check_and_takes_it_away(own: Cluster, tmp_path: Path) -> None:
    mesh = Mesh(own)
    mesh.mycel("uninstall", "--yes", timeout=240)
    expected = {
        node.name: {file: json.loads(text) for file, text in NodeState(node).conflists.items()}
        for node in own.nodes
    }
    options: dict[str, Any] = {"home": tmp_path, "kubeconfig": own.kubeconfig}
    own.apply(yaml.safe_load(f"{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}}}}}"))
    own.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=privileged")
    helm("install", "mycel", chart.FOLDER, "-n", NAMESPACE, **options)
    mesh.mycel("check", "--wait", f"{_PATIENCE}s", timeout=_PATIENCE + 30)
    assert all(NodeState(node).pins for node in own.nodes)
    with pytest.raises(LabError, match="helm upgrade"):
        mesh.mycel("upgrade")
    helm("uninstall", "mycel", "-n", NAMESPACE, **options)
    wait_until(
        lambda: not own.get("pods", "-n", NAMESPACE)["items"], 120.0, "all pods have ended", interval=1.0
    )
    for node in own.nodes:
        assert_clean(node, expected[node.name])
    own.kubectl("delete", "namespace", NAMESPACE)
