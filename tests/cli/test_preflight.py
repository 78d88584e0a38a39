"""``mycel check --pre`` on a real API server: what is in the way is named, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from lab.kubernetes import ControlPlane

pytestmark = pytest.mark.privileged


class Server:
    """An API server on which a test may make objects; they are gone afterwards."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self.kubeconfig = control_plane.kubeconfig
        self.folder = control_plane.folder
        self.kubectl = control_plane.kubectl
        self._control_plane = control_plane
        self._made: list[dict[str, Any]] = []

    def apply(self, *objects: dict[str, Any]) -> None:
        self._made.extend(objects)
        self._control_plane.apply(*objects)

    def clean(self) -> None:
        text = yaml.safe_dump_all(self._made)
        self.kubectl("delete", "--wait=false", "--ignore-not-found", "-f", "-", input=text)


@pytest.fixture
def server(api_server: ControlPlane) -> Iterator[Server]:
    """With one node, as kubelet would tell of it."""
    server = Server(api_server)
    node(server, "here", "6.1.0-18-amd64")
    yield server
    server.clean()


def node(server: Server, name: str, kernel: str, architecture: str = "amd64") -> None:
    server.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    info = {
        "architecture": architecture,
        "bootID": "",
        "containerRuntimeVersion": "containerd://2.0.0",
        "kernelVersion": kernel,
        "kubeProxyVersion": "",
        "kubeletVersion": "v1.36.0",
        "machineID": "",
        "operatingSystem": "linux",
        "osImage": "",
        "systemUUID": "",
    }
    patch = json.dumps({"status": {"nodeInfo": info}})
    server.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", patch)


def found(server: Server, *arguments: str) -> dict[str, dict[str, Any]]:
    """Findings by their object."""
    kubeconfig = str(server.kubeconfig)
    result = CliRunner().invoke(app, ["check", "--pre", "--json", "--kubeconfig", kubeconfig, *arguments])
    assert result.exit_code in (0, 1), result.output
    items: list[dict[str, Any]] = json.loads(result.stdout)
    assert (result.exit_code == 1) == any(item["severity"] == "error" for item in items)
    return {item["object"]: item for item in items}


def workload(kind: str, namespace: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
    pod = {"metadata": {"labels": {"x": name}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"selector": {"matchLabels": {"x": name}}, "template": pod},
    }


def test_an_empty_cluster_is_fine(server: Server) -> None:
    assert found(server) == {}


def test_old_kernels_and_machines_without_images(server: Server) -> None:
    node(server, "here", "5.10.0", "riscv64")
    assert "for which there are no images" in found(server)["Node here"]["message"]
    node(server, "here", "5.10.0")
    finding = found(server)["Node here"]
    assert finding["severity"] == "error"
    assert finding["message"] == "has Linux 5.10.0, and the kernel programs need 6.1"
    assert finding["field"] == "status.nodeInfo.kernelVersion"


@pytest.mark.parametrize(
    ("objects", "where", "severity"),
    [
        (
            [workload("DaemonSet", "kube-system", "istio-cni-node", {"k8s-app": "istio-cni-node"})],
            "DaemonSet kube-system/istio-cni-node",
            "error",
        ),
        (
            [workload("DaemonSet", "kube-system", "ztunnel", {"app": "ztunnel"})],
            "DaemonSet kube-system/ztunnel",
            "error",
        ),
        (
            [workload("Deployment", "kube-system", "istiod-1-30", {"app": "istiod"})],
            "Deployment kube-system/istiod-1-30",
            "warning",
        ),
        (
            [
                workload(
                    "Deployment",
                    "kube-system",
                    "linkerd-destination",
                    {"linkerd.io/control-plane-component": "destination"},
                )
            ],
            "Deployment kube-system/linkerd-destination",
            "warning",
        ),
        (
            [
                {
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"name": "cilium-config", "namespace": "kube-system"},
                    "data": {"kube-proxy-replacement": "true", "cni-exclusive": "false"},
                }
            ],
            "ConfigMap kube-system/cilium-config",
            "error",
        ),
        (
            [
                {
                    "apiVersion": "admissionregistration.k8s.io/v1",
                    "kind": "MutatingWebhookConfiguration",
                    "metadata": {"name": "istio-sidecar-injector-1-30"},
                    "webhooks": [],
                }
            ],
            "MutatingWebhookConfiguration istio-sidecar-injector-1-30",
            "warning",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_meshes_are_named(
    server: Server, objects: list[dict[str, Any]], where: str, severity: str
) -> None:
    server.apply(*objects)
    finding = found(server)[where]
    assert finding["severity"] == severity
    assert finding["action"]


def test_cilium_is_found_in_a_namespace_of_its_own(server: Server, api_namespace: str) -> None:
    data = {"bpf-lb-sock": "true", "cni-exclusive": "true"}
    metadata = {"name": "cilium-config", "namespace": api_namespace}
    server.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    assert found(server)[f"ConfigMap {api_namespace}/cilium-config"]["severity"] == "error"


def test_cilium_that_leaves_pods_alone_is_fine(server: Server) -> None:
    data = {"bpf-lb-sock": "true", "bpf-lb-sock-hostns-only": "true", "cni-exclusive": "false"}
    metadata = {"name": "cilium-config", "namespace": "kube-system"}
    server.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    assert found(server) == {}


def test_an_installation_elsewhere(server: Server) -> None:
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "mycel-controlplane"},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": "mycel-controlplane",
        },
        "subjects": [{"kind": "ServiceAccount", "name": "mycel-controlplane", "namespace": "elsewhere"}],
    }
    server.apply(binding)
    finding = found(server)["ClusterRoleBinding mycel-controlplane"]
    assert "installed in namespace elsewhere" in finding["message"]
    assert found(server, "--namespace", "elsewhere") == {}


def test_pods_with_sidecars_are_counted(server: Server, api_namespace: str) -> None:
    for name, proxy in (("one", "istio-proxy"), ("two", "istio-proxy"), ("three", "app")):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": api_namespace},
            "spec": {
                "containers": [{"name": "main", "image": "i"}],
                "initContainers": [{"name": proxy, "image": "i", "restartPolicy": "Always"}],
                "automountServiceAccountToken": False,
            },
        }
        server.apply(pod)
    message = found(server)[f"Namespace {api_namespace}"]["message"]
    assert message == "2 pods have Istio's sidecar: they would stay outside of the mesh"


def test_somebody_who_may_not_is_told_what_is_lacking(server: Server, api_namespace: str) -> None:
    token = server.kubectl("create", "token", "default", "-n", api_namespace).strip()
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    file = server.folder / "nobody.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["check", "--pre", "--json", "--kubeconfig", str(file)])
    assert result.exit_code == 1, result.output
    messages = [item["message"] for item in json.loads(result.stdout)]
    assert any("you may not" in m and "patch daemonsets" in m and "get pods/proxy" in m for m in messages)
    assert any(m.startswith("cannot look for nodes") for m in messages)
