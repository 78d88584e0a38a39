"""Enrolment on a real cluster: running pods join and leave, kubelet probes under STRICT, identity from the first dial on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import pytest

from lab.kubernetes import Cluster, Kubernetes, programs
from lab.kubernetes.mesh import Mesh
from lab.processes import wait_until
from tests.cluster.apps import IMAGE, Apps, Pod

AMBIENT = "istio.io/dataplane-mode=ambient"
#: Labels of a pod that keep it out whatever else is said: Istio's and ours.
BYPASSES = (("istio.io/dataplane-mode", "none"), ("mycel.io/mesh", "disabled"))
ECHO = 9000
HELD = 9001


@pytest.fixture
def world(mesh: Mesh, apps: Apps) -> dict[str, Pod]:
    """A client and an echo server on each of two nodes."""
    return make_world(apps)


def make_world(apps: Apps) -> dict[str, Pod]:
    nodes = sorted(apps.cluster.ready_nodes())[:2]
    names = []
    with apps.together():
        for number, node in enumerate(nodes, 1):
            script = f"python3 /apps/tcp_server.py {HELD} & exec python3 /apps/tcp_server.py {ECHO} --greet"
            container = {
                "name": "server",
                "image": IMAGE,
                "command": ["sh", "-c", script],
                # The others begin when it has started, however long that takes: none is killed while it starts.
                "startupProbe": {"tcpSocket": {"port": ECHO}, "periodSeconds": 1, "failureThreshold": 60},
                "readinessProbe": {"tcpSocket": {"port": ECHO}, "periodSeconds": 1, "failureThreshold": 1},
                "livenessProbe": {"tcpSocket": {"port": ECHO}, "periodSeconds": 1, "failureThreshold": 3},
            }
            apps.deployment(f"server{number}", container, labels={"app": f"server{number}"}, node=node)
            apps.sleeper(f"client{number}", node=node)
            names += [f"server{number}", f"client{number}"]
    running = apps.running()
    return {name: running[name][0] for name in names}


def kubectl(cluster: Kubernetes, *arguments: str) -> list[str]:
    return [str(programs.folder() / "kubectl"), f"--kubeconfig={cluster.kubeconfig}", *arguments]


class Held:
    """Connections that a pod holds open."""

    def __init__(self, cluster: Kubernetes, pod: Pod) -> None:
        self._process = subprocess.Popen(
            kubectl(
                cluster, "exec", "-i", "-n", pod.namespace, pod.name, "--", "python3", "/apps/tcp_client.py"
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, op: str, key: str, **values: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"op": op, "key": key, **values}), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def traffic(cluster: Kubernetes, client: Pod, server: Pod, count: int) -> subprocess.Popen[str]:
    """New connections, one after the other."""
    options = ["--greeted", "--interval", "0.03", "--count", str(count)]
    argv = ["python3", "/apps/traffic.py", server.address, str(ECHO), *options]
    return subprocess.Popen(
        kubectl(cluster, "exec", "-n", client.namespace, client.name, "--", *argv),
        stdout=subprocess.PIPE,
        text=True,
    )


def outcomes(processes: dict[str, subprocess.Popen[str]]) -> dict[str, list[dict[str, Any]]]:
    """What failed, by who dialled whom."""
    found = {}
    for name, process in processes.items():
        text, _ = process.communicate(timeout=90)
        records = [json.loads(line) for line in text.splitlines()]
        slowest = max(record["seconds"] for record in records)
        print(f"{name}: {len(records)} connections, slowest {slowest:.2f} s")
        if bad := [record for record in records if record["outcome"] != "ok"]:
            found[name] = bad
    return found


def stages(cluster: Kubernetes, pods: dict[str, Pod]) -> dict[str, str]:
    """By name of the pod, from the agents' own pages."""
    found: dict[str, str] = {}
    names = {pod.name: name for name, pod in pods.items()}
    for agent in cluster.get("pods", "-n", "mycel-system", "-l", "app.kubernetes.io/component=agent")[
        "items"
    ]:
        address = agent["status"]["hostIP"]
        some = next(iter(pods.values()))
        rows = json.loads(some.run("curl", "-sS", "-m", "5", f"http://{address}:15020/debug/pods"))
        found |= {names[row["name"]]: row["stage"] for row in rows if row["name"] in names}
    return found


def enrolled(cluster: Kubernetes, pods: dict[str, Pod]) -> bool:
    found = stages(cluster, pods)
    return set(found) == set(pods) and set(found.values()) == {"enrolled"}


def left(cluster: Kubernetes, pods: dict[str, Pod]) -> bool:
    return set(stages(cluster, pods).values()) <= {""}


def test_running_pods_join_and_leave(cluster: Kubernetes, world: dict[str, Pod]):
    join_and_leave(cluster, world, bypass={"client1": BYPASSES[0], "server2": BYPASSES[1]})


def join_and_leave(
    mesh: Kubernetes, pods: dict[str, Pod], bypass: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """:param bypass: pods that, on the way, leave by a label of their own, and come back without it."""
    namespace = pods["client1"].namespace
    restarts = {name: pod.restarts for name, pod in pods.items()}
    held = {name: Held(mesh, pods[name]) for name in ("client1", "client2")}
    addresses = {name: pod.address for name, pod in pods.items()}

    def steady() -> dict[str, subprocess.Popen[str]]:
        return {
            f"{client} to {server}": traffic(mesh, pods[client], pods[server], 250)
            for client in held
            for server in ("server1", "server2")
        }

    def open_all(generation: str) -> None:
        for talker in held.values():
            for server in ("server1", "server2"):
                answer = talker("open", f"{generation} {server}", address=addresses[server], port=HELD)
                assert not answer.get("error"), answer

    def all_work(*generations: str) -> None:
        for talker in held.values():
            for generation in generations:
                for server in ("server1", "server2"):
                    answer = talker("exchange", f"{generation} {server}", size=64, times=1)
                    assert not answer.get("error"), (generation, server, answer)

    try:
        open_all("before")
        running = steady()
        time.sleep(1)
        mesh.kubectl("label", "namespace", namespace, AMBIENT)
        wait_until(lambda: enrolled(mesh, pods), 30, "all are enrolled", explain=lambda: stages(mesh, pods))
        open_all("inside")
        all_work("before", "inside")
        assert outcomes(running) == {}
        if bypass:
            running = steady()
            for name, (label, value) in bypass.items():
                mesh.kubectl("label", "pod", "-n", namespace, pods[name].name, f"{label}={value}")
            labelled = time.monotonic()
            some = {name: pods[name] for name in bypass}
            others = {name: pod for name, pod in pods.items() if name not in bypass}
            wait_until(lambda: left(mesh, some), 15, "they have left", explain=lambda: stages(mesh, pods))
            print(f"a bypass label is in force after {time.monotonic() - labelled:.1f} s")
            assert enrolled(mesh, others)
            open_all("beside")
            all_work("before", "inside", "beside")
            assert outcomes(running) == {}
            running = steady()
            for name, (label, _) in bypass.items():
                mesh.kubectl("label", "pod", "-n", namespace, pods[name].name, f"{label}-")
            wait_until(lambda: enrolled(mesh, pods), 15, "they are back", explain=lambda: stages(mesh, pods))
            all_work("before", "inside", "beside")
            assert outcomes(running) == {}
        running = steady()
        time.sleep(1)
        mesh.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode-")
        wait_until(lambda: left(mesh, pods), 30, "all have left", explain=lambda: stages(mesh, pods))
        open_all("outside")
        all_work("before", "inside", "outside")
        assert outcomes(running) == {}
        all_work("before", "inside", "outside")
        assert {name: pod.restarts for name, pod in pods.items()} == restarts
    finally:
        for talker in held.values():
            talker.end()


def strict(namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": namespace},
        "spec": {"mtls": {"mode": "STRICT"}},
    }


def test_kubelet_probes_pass_under_strict(cluster: Kubernetes, world: dict[str, Pod], apps: Apps):
    """Readiness and liveness, every second, by TCP; also by a kubelet that was started anew."""
    outside = f"{apps.namespace}-outside"
    cluster.kubectl("create", "namespace", outside)
    try:
        stranger = Apps(cluster, outside).client()
        assert established(stranger, world["server1"])
        restarts = {name: pod.restarts for name, pod in world.items()}
        cluster.apply(strict(apps.namespace))
        cluster.kubectl("label", "namespace", apps.namespace, AMBIENT)
        wait_until(
            lambda: enrolled(cluster, world), 30, "all are enrolled", explain=lambda: stages(cluster, world)
        )
        wait_until(lambda: not established(stranger, world["server1"]), 10, "STRICT is in force")

        def ready() -> bool:
            return all(
                condition["status"] == "True"
                for name in ("server1", "server2")
                for condition in world[name].manifest["status"]["conditions"]
                if condition["type"] == "Ready"
            )

        def stays_ready(seconds: float) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                assert ready()
                time.sleep(0.5)

        stays_ready(4)
        if isinstance(cluster, Cluster):
            for node in cluster.nodes:
                service = node.service("kubelet")
                service.kill()
                service.start()
            cluster.wait_nodes()
            wait_until(ready, 20, "both are ready")
            stays_ready(5)
        assert {name: pod.restarts for name, pod in world.items()} == restarts
        assert not established(stranger, world["server1"])
    finally:
        cluster.kubectl("delete", "namespace", outside, "--wait=false", check=False)


def established(client: Pod, server: Pod) -> bool:
    argv = ["python3", "/apps/traffic.py", server.address, ECHO, "--greeted", "--count", 1, "--timeout", 3]
    return '"ok"' in client.run(*argv)


def test_init_containers_and_jobs_have_their_identity_from_the_first_connection_on(
    mesh: Mesh, cluster: Kubernetes, apps: Apps
):
    """Each dials as the first thing that it does, a server on the other node that lets in this one identity."""
    namespace = apps.namespace
    cluster.kubectl("label", "namespace", namespace, AMBIENT)
    one, two = sorted(cluster.ready_nodes())[:2]
    apps.server("web", node=two)
    address = apps.pods("web")[0].address
    cluster.apply(
        strict(namespace),
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": "web", "namespace": namespace},
            "spec": {
                "selector": {"matchLabels": {"app": "web"}},
                "rules": [
                    {"from": [{"source": {"principals": [f"cluster.local/ns/{namespace}/sa/{who}"]}}]}
                    for who in ("early", "job")
                ],
            },
        },
    )
    wait_until(
        lambda: not apps.client("nobody", node=one).reaches(f"http://{address}:8080/"),
        20,
        "the policy is in force",
    )
    dial = {"image": IMAGE, "command": ["curl", "-sSf", "-m", "12", f"http://{address}:8080/"]}
    pod = {
        "serviceAccountName": "early",
        "restartPolicy": "Never",
        "initContainers": [{"name": "init", **dial}],
        "containers": [{"name": "main", **dial}],
        "nodeSelector": {"kubernetes.io/hostname": one},
    }
    job = {"serviceAccountName": "job", "restartPolicy": "Never", "nodeSelector": pod["nodeSelector"]}
    cluster.apply(
        *(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": n, "namespace": namespace}}
            for n in ("early", "job")
        ),
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "early", "namespace": namespace},
            "spec": pod,
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "job", "namespace": namespace},
            "spec": {
                "backoffLimit": 0,
                "completions": 3,
                "template": {"spec": {**job, "containers": [{"name": "main", **dial}]}},
            },
        },
    )

    def phase() -> str:
        return str(cluster.get("pod", "early", "-n", namespace)["status"].get("phase"))

    def said() -> str:
        return cluster.kubectl("logs", "-n", namespace, "early", "--all-containers", check=False)

    wait_until(lambda: phase() in ("Succeeded", "Failed"), 60, "the pod has ended")
    assert phase() == "Succeeded", said()

    def jobs() -> dict[str, Any]:
        return dict(cluster.get("job", "job", "-n", namespace)["status"])

    wait_until(
        lambda: jobs().get("succeeded") == 3 or jobs().get("failed"), 60, "the job has ended", explain=jobs
    )
    assert jobs().get("succeeded") == 3, cluster.kubectl("logs", "-n", namespace, "job/job", check=False)
