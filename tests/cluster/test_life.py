"""What happens to a cluster over time, under steady traffic with long connections open: not one request fails.

The traffic is ``lab/apps/steady_client.py`` on both nodes, to servers on both, by requests that the L7 proxy routes (a
VirtualService), by connections of which the kernel and the node proxies alone know, each both short and long.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lab.errors import LabError
from lab.kubernetes import Cluster
from lab.kubernetes.mesh import Mesh
from lab.processes import wait_until
from tests.cluster.apps import DRAIN, IMAGE, Apps, Pod
from tests.requirements import SOAK

pytestmark = pytest.mark.timeout(600)

#: Seconds that a long connection lasts: for ever; or less than a proxy on its way out lets connections end by themselves.
FOR_EVER, WITHIN_DRAIN = 3600.0, DRAIN / 2

ROUTE = """\
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: web
  namespace: {namespace}
spec:
  hosts: [web]
  http:
  - route:
    - destination: {{host: web}}
"""
STRICT = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: {namespace}
spec:
  mtls: {{mode: STRICT}}
"""


class Steady:
    """Steady traffic in a namespace of the mesh: ``web`` (by request) and ``echo`` (by connection), and two clients."""

    def __init__(self, apps: Apps, life: float) -> None:
        self.apps = apps
        self._life = life
        self._seen: dict[str, int] = {}
        self.cluster = apps.cluster

    def start(self) -> None:
        namespace = self.apps.namespace
        self.cluster.apply(ROUTE.format(namespace=namespace), STRICT.format(namespace=namespace))
        self.cluster.apply(_service(namespace, "web", "http", 80, 8080))
        self.cluster.apply(_service(namespace, "echo", "tcp", 9000, 9000))
        with self.apps.together():
            for node in ("node1", "node2"):
                self.apps.deployment(
                    f"server-{node}", _server(), labels={"app": "server"}, node=node, replicas=2, grace=20
                )
        # When the API server was away, the cluster's DNS watches again after a back-off of up to a minute.
        names = [f"{name}.{namespace}" for name in ("web", "echo")]
        server = self.apps.pods("server-node1")[0]
        wait_until(
            lambda: all(_is_known(server, name) for name in names), 90.0, "DNS knows them", interval=1.0
        )
        with self.apps.together():
            for node in ("node1", "node2"):
                command = [
                    *("python3", "-u", "/apps/steady_client.py", "--workers", "2", "--interval", "0.05"),
                    *("--life", str(self._life)),
                    *("--http", f"http://web.{namespace}/", "--echo", f"echo.{namespace}:9000"),
                ]
                container = {"name": "client", "image": IMAGE, "command": command}
                self.apps.deployment(
                    f"client-{node}", container, labels={"app": "client"}, node=node, grace=1
                )
        wait_until(self._runs, 40.0, "every kind of traffic runs", interval=0.5, explain=self._said)

    def check(self, seconds: float = 2.0) -> dict[str, int]:
        """Let it run a little longer; then, no request has failed since the last check, and every kind has gone on.

        :raises AssertionError: with each failure.
        """
        before = self._counts()
        time.sleep(seconds)
        after = self._counts()
        failures = []
        for node, lines in self._lines().items():
            failures += [line for line in lines[self._seen.get(node, 0) :] if "failed" in line]
            self._seen[node] = len(lines)
        assert not failures, f"{len(failures)} failed of {sum(after.values())}: {failures[:8]}"
        stopped = [kind for kind in after if after[kind] == before.get(kind)]
        assert not stopped, f"no traffic of these kinds in the last {seconds} s: {stopped}"
        restarts = sum(
            pod.restarts for node in ("node1", "node2") for pod in self.apps.pods(f"client-{node}")
        )
        assert restarts == 0, "a client was restarted: what it saw is lost"
        return after

    def _lines(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for node in ("node1", "node2"):
            for pod in self.apps.pods(f"client-{node}"):
                found[node] = [json.loads(line) for line in pod.logs().splitlines() if line.startswith("{")]
        return found

    def _counts(self) -> dict[str, int]:
        """What succeeded, by node and kind."""
        counts: dict[str, int] = {}
        for node, lines in self._lines().items():
            reports = [line["counts"] for line in lines if "counts" in line]
            for kind, count in (reports[-1] if reports else {}).items():
                if not kind.endswith(" failed"):
                    counts[f"{node} {kind}"] = count
        return counts

    def _runs(self) -> bool:
        wanted = {f"{node} {kind}" for node in ("node1", "node2") for kind in ("new", "kept", "line", "long")}
        return wanted <= self._counts().keys()

    def _said(self) -> str:
        pods = self.cluster.kubectl("get", "pods", "-A", "-o", "wide", check=False)
        return f"{ {node: lines[-3:] for node, lines in self._lines().items()} }\n{pods}"


def _is_known(pod: Pod, name: str) -> bool:
    found = pod.run("python3", "-c", f"import socket; print(socket.gethostbyname('{name}'))", check=False)
    return found.strip().count(".") == 3


def _server() -> dict[str, Any]:
    return {
        "name": "server",
        "image": IMAGE,
        "command": ["python3", "/apps/steady_server.py", "--linger", "3"],
        "ports": [{"name": "http", "containerPort": 8080}, {"name": "tcp", "containerPort": 9000}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 1},
    }


def _service(namespace: str, name: str, port_name: str, port: int, target: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "selector": {"app": "server"},
            "ports": [{"name": port_name, "port": port, "targetPort": target}],
        },
    }


@pytest.fixture(scope="module")
def steady(request: pytest.FixtureRequest, mesh: Mesh, lab_cluster: Cluster) -> Iterator[Steady]:
    """Traffic in an enrolled namespace, whose long connections last ``request.param`` seconds.

    It goes on from one test to the next, and ends before the one of another life begins.
    """
    namespace = f"steady-{request.param:.0f}"
    lab_cluster.kubectl("create", "namespace", namespace)
    lab_cluster.kubectl("label", "namespace", namespace, "mycel.io/mesh=enabled")
    traffic = Steady(Apps(lab_cluster, namespace), request.param)
    try:
        traffic.start()
        yield traffic
    finally:
        # Clients first: nothing is to be read from them any more, and they take the next ones' machine.
        lab_cluster.kubectl("delete", "deployments", "--all", "-n", namespace, "--wait=false", check=False)
        lab_cluster.kubectl("delete", "namespace", namespace, "--wait=false", check=False)


def lasting(seconds: float) -> pytest.MarkDecorator:
    """A test under traffic whose long connections last that long; all tests of one life come one after the other.

    A proxy cuts what outlives its drain deadline, so what lasts for ever is for tests in which no proxy ends.
    """
    return pytest.mark.parametrize("steady", [seconds], indirect=True, scope="module", ids="{:.0f}s".format)


@lasting(FOR_EVER)
def test_a_rolling_update_of_backends(steady: Steady):
    servers = [f"deployment/server-{node}" for node in ("node1", "node2")]
    steady.cluster.kubectl("rollout", "restart", "-n", steady.apps.namespace, *servers)
    for node in ("node1", "node2"):
        steady.apps.wait_rolled_out(f"server-{node}", 120)
    # Until the last of the old ones has ended.
    time.sleep(5)
    steady.check()


def roll(traffic: Steady, mesh: Mesh, part: str) -> None:
    before = set(mesh.pods(part))
    mesh.restart(part)
    assert not before & set(mesh.pods(part))
    traffic.check(3.0)


@lasting(FOR_EVER)
@pytest.mark.parametrize("part", ["agent", "controlplane"])
def test_a_rolling_update_of_what_carries_nothing(steady: Steady, mesh: Mesh, part: str):
    """An agent's and a controller's end is nobody's business."""
    roll(steady, mesh, part)


@lasting(FOR_EVER)
def test_a_leader_that_is_killed(steady: Steady, mesh: Mesh):
    def holder() -> str:
        lease = steady.cluster.get("lease", "mycel-controlplane", "-n", mesh.namespace)
        return str(lease["spec"].get("holderIdentity") or "")

    first = holder()
    assert first
    pod = next(name for name in mesh.pods("controlplane") if name in first)
    steady.cluster.kubectl("delete", "pod", "-n", mesh.namespace, pod, "--grace-period=0", "--force")
    wait_until(lambda: holder() not in ("", first), 40.0, "another controller leads", interval=0.5)
    mesh.wait_ready()
    steady.check()


@lasting(FOR_EVER)
@pytest.mark.soak
def test_a_time_without_the_api_server(steady: Steady, mesh: Mesh, lab_cluster: Cluster):
    """With it goes who would, at its return, find that no node has been heard of, and take every endpoint out of service."""
    parts = [
        lab_cluster.control_plane.service(name) for name in ("kube-controller-manager", "kube-apiserver")
    ]
    agents = {node.name: mesh.pods("agent", node.name)[0] for node in lab_cluster.nodes}
    uids = {
        name: lab_cluster.get("pod", pod, "-n", mesh.namespace)["metadata"]["uid"]
        for name, pod in agents.items()
    }
    backend = steady.apps.pods("server-node1")[0]
    for part in parts:
        part.stop()
    try:
        began = time.monotonic()
        time.sleep(3)
        # Containers are restarted in place by their kubelet, which needs nobody for that: agents.
        for node in lab_cluster.nodes:
            for pid in node.pod_pids(uids[node.name]):
                _kill(pid)
        time.sleep((300 if SOAK else 12) - (time.monotonic() - began))
    finally:
        for part in reversed(parts):
            part.start()
            # The other one gives up after ten seconds without an API server.
            lab_cluster.control_plane.wait_ready()
    wait_until(lambda: _answers(lab_cluster), 30.0, "kubectl works again", interval=0.5)
    lab_cluster.wait_nodes()

    def restarted(pod: str) -> bool:
        found = lab_cluster.get("pod", pod, "-n", mesh.namespace)
        return all(status["restartCount"] >= 1 for status in found["status"]["containerStatuses"])

    wait_until(
        lambda: all(map(restarted, agents.values())), 30.0, "kubelets tell of the restarts", interval=0.5
    )
    mesh.wait_ready()
    # Kubelets and the scheduler watch again each after a back-off of its own, of up to a minute.
    for node in lab_cluster.nodes:
        steady.apps.client(f"after-{node.name}", node=node.name)
    assert backend.restarts == 0
    steady.check()


@lasting(WITHIN_DRAIN)
@pytest.mark.parametrize("part", ["nodeproxy", "l7proxy"])
def test_a_rolling_update_of_the_proxies(steady: Steady, mesh: Mesh, part: str):
    """What a proxy carries ends within its drain deadline here."""
    roll(steady, mesh, part)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _answers(cluster: Cluster) -> bool:
    try:
        cluster.get("nodes")
    except LabError:
        return False
    return True
