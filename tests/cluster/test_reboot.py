"""A node that loses its power: nothing of the mesh but its disk is there again, and no pod speaks before the mesh does."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from typing import Any

import pytest

from common.channels import CONNECT, PING, PONG
from lab.capture import Capture
from lab.kubernetes import Cluster
from lab.kubernetes.mesh import Mesh
from lab.processes import wait_until
from tests.cluster.apps import IMAGE, Apps
from tests.cluster.test_enrolment import (
    AMBIENT,
    ECHO,
    HELD,
    enrolled,
    established,
    kubectl,
    make_world,
    stages,
)
from tests.requirements import SOAK

pytestmark = [pytest.mark.timeout(400), pytest.mark.soak]

#: Seconds from a change of a Service's endpoints until every node goes by it.
IN_FORCE = 1.0
#: Seconds from a machine's end until everybody has another controller than the one that was there: it is given up, and the
#: next attempt may be at the same address.
UNHEARD = PING + PONG + CONNECT + 2.0


class Endpoints:
    """Which of a Service's endpoints are ready, and since when."""

    def __init__(self, apps: Apps, service: str) -> None:
        template = '{{range .endpoints}}{{index .addresses 0}}={{.conditions.ready}},{{end}}{{"\\n"}}'
        argv = ["get", "endpointslices", "-n", apps.namespace, "-l", f"kubernetes.io/service-name={service}"]
        self._process = subprocess.Popen(
            kubectl(apps.cluster, *argv, "--watch", "-o", f"go-template={template}"),
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seen: list[tuple[float, frozenset[str]]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            endpoints = (item.partition("=") for item in line.strip().split(",") if item)
            self.seen.append(
                (time.time(), frozenset(address for address, _, ready in endpoints if ready == "true"))
            )

    @property
    def ready(self) -> frozenset[str]:
        return self.seen[-1][1] if self.seen else frozenset()

    def withdrawn(self, address: str, after: float) -> float | None:
        """When it was first not ready after that time."""
        return next((when for when, ready in self.seen if when > after and address not in ready), None)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def served_by_both(apps: Apps) -> None:
    """A Service ``both`` with an endpoint on each node."""
    with apps.together():
        for node in ("node1", "node2"):
            container = {
                "name": "server",
                "image": IMAGE,
                "command": ["python3", "/apps/tcp_server.py", str(ECHO), "--greet"],
                "readinessProbe": {"tcpSocket": {"port": ECHO}, "periodSeconds": 1},
            }
            apps.deployment(f"both-{node}", container, labels={"app": "both"}, node=node)
    spec = {"selector": {"app": "both"}, "ports": [{"name": "tcp", "port": ECHO}]}
    apps.cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "both", "namespace": apps.namespace},
            "spec": spec,
        }
    )


def test_no_plain_text_before_and_after(mesh: Mesh, lab_cluster: Cluster, apps: Apps):
    cluster = lab_cluster
    cluster.kubectl("label", "namespace", apps.namespace, AMBIENT)
    pods = make_world(apps)
    wait_until(lambda: enrolled(cluster, pods), 30, "all are enrolled", explain=lambda: stages(cluster, pods))
    server = pods["server1"].address
    # Its first act is to dial, and it does nothing else.
    container = {
        "name": "dialler",
        "image": IMAGE,
        "command": ["python3", "/apps/traffic.py", server, str(ECHO), "--greeted"],
    }
    apps.deployment("dialler", container, labels={"app": "dialler"}, node="node2")
    dialler = apps.pods("dialler")[0]
    wait_until(lambda: '"ok"' in dialler.logs(), 20, "it dials")
    served_by_both(apps)
    both = Endpoints(apps, "both")
    wait_until(lambda: len(both.ready) == 2, 20, "both nodes serve", explain=lambda: str(both.seen))
    lost = apps.pods("both-node2")[0].address
    time.sleep(IN_FORCE)
    # By address: the cluster's DNS may live on the node that goes.
    address = cluster.get("service", "both", "-n", apps.namespace)["spec"]["clusterIP"]
    argv = ["python3", "-u", "/apps/traffic.py", address, str(ECHO), "--greeted", "--timeout", "3"]
    steady = subprocess.Popen(
        kubectl(
            cluster, "exec", "-n", apps.namespace, pods["client1"].name, "--", *argv, "--interval", "0.02"
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert steady.stdout is not None
    records: list[dict[str, Any]] = []
    reader = threading.Thread(
        target=lambda out: records.extend(map(json.loads, out)), args=(steady.stdout,), daemon=True
    )
    reader.start()
    node = cluster.node("node2")
    before = dialler.address
    restarts = dialler.restarts

    with Capture(cluster.network, [f"fabric{cluster.node('node1').number}"]) as capture:
        off = time.time()
        node.stop()
        if SOAK:
            # Long enough for Kubernetes to give it up; else its endpoints go when it comes back.
            wait_until(lambda: lost not in both.ready, 120, "its endpoint is withdrawn", interval=1.0)
            time.sleep(10)
        node.start()
        cluster.wait_nodes()
        wait_until(
            lambda: (
                dialler.restarts > restarts
                and '"ok"'
                in cluster.kubectl("logs", "-n", apps.namespace, dialler.name, "--since=5s", check=False)
            ),
            120,
            "it dials again",
            interval=0.5,
            explain=lambda: cluster.kubectl("describe", "pod", "-n", apps.namespace, dialler.name)[-1500:],
        )
        wait_until(
            lambda: enrolled(cluster, pods), 60, "all are enrolled", explain=lambda: stages(cluster, pods)
        )
        assert established(pods["client1"], pods["server2"])
        assert established(pods["client2"], pods["server1"])
        wait_until(
            lambda: len(both.ready) == 2 and both.withdrawn(lost, off),
            60,
            "both nodes serve again",
            explain=lambda: str(both.seen),
        )
        back = time.time()
        wait_until(lambda: len(served_since(records, back)) == 2, 30, "both nodes serve the client again")
        time.sleep(IN_FORCE)
        both.end()
        steady.terminate()
        reader.join(20)
        steady.wait(20)
        withdrawn = both.withdrawn(lost, off)
        assert withdrawn is not None
        check_clients_of_the_other_node(records, both.seen, off, withdrawn)

    addresses = {before, dialler.address, *(pod.address for pod in pods.values())}
    segments = [s for s in capture.segments() if addresses & {s[0], s[2]}]
    plain = [s[:4] for s in segments if {ECHO, HELD} & {s[1], s[3]}]
    assert plain == []
    assert any(15008 in (s[1], s[3]) and s[0] == dialler.address for s in segments)


def check_clients_of_the_other_node(
    records: list[dict[str, Any]], seen: list[tuple[float, frozenset[str]]], off: float, withdrawn: float
) -> None:
    """Nothing fails before the node is off, nor once its endpoint is withdrawn, nor when it is ready again."""
    back = next(when for when, ready in seen if when > withdrawn and len(ready) == 2)
    bad = [record for record in records if record["outcome"] != "ok"]
    until = max(withdrawn + IN_FORCE, off + UNHEARD)
    during = [record for record in bad if off - 3.0 < record["at"] < until]
    print(
        f"off, withdrawn after {withdrawn - off:.1f} s, ready again after {back - off:.1f} s: {len(records)} connections,"
        f" {len(bad)} failed, {len(during)} of them in the first {until - off:.1f} s"
    )
    for record in bad:
        print(f"  after {record['at'] - off:.1f} s for {record['seconds']:.1f} s: {record['outcome']}")
    assert [record for record in bad if record not in during] == []
    by = served_since(records, back)
    assert len(by) == 2, f"served by {by} only since {back}"


def served_since(records: list[dict[str, Any]], when: float) -> set[str]:
    """Addresses of the servers."""
    return {
        record["greeting"]["local"][0]
        for record in list(records)
        if record["at"] > when and "greeting" in record
    }
