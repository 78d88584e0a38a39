"""``mycel uninstall`` on a real API server: whose objects stay, and when a node may be called clean. (Whole: tests/cluster.)"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cli import uninstall
from cli.cluster import Cluster, Json
from deploy import manifests, parts
from deploy.values import load
from lab.kubernetes import ControlPlane
from tests.requirements import ROOT

pytestmark = pytest.mark.privileged

LEFT = {"terminated": {"exitCode": 0}}
FAILED = {"terminated": {"exitCode": 1}}
PULLING = {"waiting": {"reason": "ImagePullBackOff"}}
RUNNING: dict[str, Any] = {"running": {}}


@pytest.fixture
def cluster(api_server: ControlPlane, api_namespace: str) -> Iterator[Cluster]:
    with Cluster(api_namespace, kubeconfig=api_server.kubeconfig) as cluster:
        yield cluster


@pytest.fixture
def widgets(api_server: ControlPlane, api_namespace: str) -> Iterator[str]:
    """The API group of a kind that nobody but its maker knows."""
    group = f"{api_namespace}.example"
    schema = {"openAPIV3Schema": {"type": "object"}}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"widgets.{group}"},
        "spec": {
            "group": group,
            "names": {"kind": "Widget", "plural": "widgets"},
            "scope": "Namespaced",
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }
    api_server.apply(definition)
    api_server.kubectl("wait", "--for=condition=Established", f"crd/widgets.{group}", "--timeout=30s")
    yield group
    api_server.kubectl("delete", "crd", f"widgets.{group}", "--wait=false")


def test_whatever_somebody_has_put_beside_us_is_seen(
    api_server: ControlPlane, cluster: Cluster, widgets: str
) -> None:
    """A namespace takes all that is in it along, so one with anything of somebody's stays."""
    namespace = cluster.namespace
    api_server.apply(*(o for o in manifests.build(load(), namespace) if o["metadata"].get("namespace")))
    assert uninstall._foreign(cluster) == []
    for version, kind, more in (
        ("networking.k8s.io/v1", "NetworkPolicy", {"spec": {"podSelector": {}}}),
        ("v1", "ResourceQuota", {"spec": {"hard": {"pods": "1000"}}}),
        (f"{widgets}/v1", "Widget", {}),
    ):
        metadata = {"name": "mine", "namespace": namespace}
        api_server.apply({"apiVersion": version, "kind": kind, "metadata": metadata, **more})
    assert set(uninstall._foreign(cluster)) == {"NetworkPolicy mine", "ResourceQuota mine", "Widget mine"}


@pytest.mark.parametrize(
    ("state", "phase", "wrong"),
    [
        (LEFT, "Succeeded", ""),
        (FAILED, "Failed", "the agent on node2 ended with status 1"),
        (PULLING, "Pending", "the agent on node2 did not run when it was to leave"),
    ],
    ids=["left", "failed", "never-ran"],
)
def test_a_node_is_clean_when_its_agent_has_left_it(
    api_server: ControlPlane, cluster: Cluster, state: Json, phase: str, wrong: str
) -> None:
    built = manifests.build(load(), cluster.namespace)
    daemon_set = next(o for o in built if o["kind"] == "DaemonSet" and o["metadata"]["name"] == parts.AGENT)
    api_server.apply(daemon_set)
    nodes = Nodes(api_server, cluster.namespace, {"node1": (LEFT, "Succeeded"), "node2": (state, phase)})
    thread = threading.Thread(target=nodes.end_agents)
    thread.start()
    said: list[str] = []
    try:
        if wrong:
            with pytest.raises(uninstall.UninstallError, match=wrong) as raised:
                uninstall._agents(cluster, manifests.path(daemon_set), 60.0, said.append)
            assert "node1" not in str(raised.value)
            section = str(raised.value).partition("docs/kubernetes.md, ")[2].partition(";")[0]
            assert f"\n### {section}\n" in (ROOT / "docs/kubernetes.md").read_text()
        else:
            uninstall._agents(cluster, manifests.path(daemon_set), 60.0, said.append)
            assert said[-1] == "agents: gone, their nodes are clean"
    finally:
        thread.join()
    assert said[0] == "agents: asked to leave 2 nodes"
    # When somebody has looked after that node, it goes on.
    uninstall._agents(cluster, manifests.path(daemon_set), 60.0, said.append)


class Nodes:
    """Agents' pods, and what kubelets and the garbage collector do of them when their DaemonSet is deleted.

    :param ends: state of the agent's container and phase of its pod at the end, by node.
    """

    def __init__(self, server: ControlPlane, namespace: str, ends: dict[str, tuple[Json, str]]) -> None:
        self._server, self._namespace, self._ends = server, namespace, ends
        for node in ends:
            spec = {
                "nodeName": node,
                "containers": [{"name": "agent", "image": "i"}],
                "automountServiceAccountToken": False,
            }
            metadata = {
                "name": f"agent-{node}",
                "namespace": namespace,
                "labels": parts.selector(parts.AGENT),
            }
            server.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
            self._status(node, RUNNING, "Running")

    def end_agents(self) -> None:
        daemon_set = ("daemonset", parts.AGENT, "-n", self._namespace)
        self._server.kubectl(
            "wait", "--for=jsonpath={.metadata.deletionTimestamp}", *daemon_set, "--timeout=30s"
        )
        for node, (state, phase) in self._ends.items():
            self._status(node, state, phase)
            self._server.kubectl(
                "delete", "pod", f"agent-{node}", "-n", self._namespace, "--grace-period=0", "--force"
            )
        self._server.kubectl("patch", *daemon_set, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')

    def _status(self, node: str, state: Json, phase: str) -> None:
        container = {
            "name": "agent",
            "image": "i",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": state,
        }
        patch = json.dumps({"status": {"phase": phase, "containerStatuses": [container]}})
        pod = ("pod", f"agent-{node}", "-n", self._namespace)
        self._server.kubectl("patch", *pod, "--subresource=status", "--type=merge", "-p", patch)
