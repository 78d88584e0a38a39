"""The API server without nodes: what tests of the source, of identity and of the installation build on."""

from __future__ import annotations

import json

import pytest
import yaml

from lab import state
from lab.errors import LabError
from lab.kubernetes import ControlPlane

pytestmark = [pytest.mark.privileged, pytest.mark.timeout(900)]  # the first time it builds Kubernetes


def test_a_bound_token_says_whose_pod_it_is(api_server: ControlPlane, api_namespace: str):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web", "namespace": api_namespace},
        "spec": {"nodeName": "node1", "containers": [{"name": "web", "image": "web"}]},
    }
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}}
    api_server.apply(node, pod)
    token = api_server.kubectl(
        "create",
        "token",
        "default",
        "-n",
        api_namespace,
        "--audience=mycel.io",
        "--bound-object-kind=Pod",
        "--bound-object-name=web",
    ).strip()
    review = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": ["mycel.io"]},
    }
    answer = json.loads(api_server.kubectl("create", "-o", "json", "-f", "-", input=yaml.safe_dump(review)))
    assert answer["status"]["authenticated"] is True
    assert answer["status"]["user"]["username"] == f"system:serviceaccount:{api_namespace}:default"
    assert answer["status"]["user"]["extra"]["authentication.kubernetes.io/node-name"] == ["node1"]
    assert answer["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["web"]


def test_who_has_no_right_is_refused(api_server: ControlPlane, api_namespace: str):
    user = f"system:serviceaccount:{api_namespace}:default"
    with pytest.raises(LabError, match="Forbidden"):
        api_server.kubectl("get", "secrets", "-n", api_namespace, "--as", user)
    assert api_server.kubectl("auth", "can-i", "list", "secrets", "--as", user, check=False).strip() == "no"


def test_the_kubeconfig_checks_who_answers(api_server: ControlPlane):
    cluster = yaml.safe_load(api_server.kubeconfig.read_text())["clusters"][0]["cluster"]
    assert cluster["certificate-authority-data"]
    assert "insecure-skip-tls-verify" not in cluster
    assert api_server.kubeconfig.stat().st_mode & 0o077 == 0


def test_two_at_once_and_nothing_is_left(api_server: ControlPlane):
    with ControlPlane() as other:
        assert other.url != api_server.url
        other.kubectl("create", "namespace", "only-there")
        assert "only-there" not in api_server.kubectl("get", "namespaces")
        server = other.service("kube-apiserver")
        server.stop()
        assert not other.ready
        server.start()
        other.wait_ready()
        assert "only-there" in other.kubectl("get", "namespaces")
        folder, cgroup = other.folder, other.cgroup
    assert not folder.exists()
    assert not cgroup.exists()  # the kernel lets it go with its last process only
    assert folder.parent not in [lab.folder for lab in state.labs()]
