"""A node that loses its power: nothing of the mesh but its disk is there again, and no pod speaks before the mesh does."""

from __future__ import annotations

import pytest

from lab.capture import Capture
from lab.kubernetes import Cluster
from lab.kubernetes.mesh import Mesh
from lab.processes import wait_until
from tests.cluster.apps import IMAGE, Apps
from tests.cluster.test_enrolment import AMBIENT, ECHO, HELD, enrolled, established, make_world, stages

pytestmark = pytest.mark.timeout(400)


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
    node = cluster.node("node2")
    before = dialler.address
    restarts = dialler.restarts

    with Capture(cluster.network, [f"fabric{cluster.node('node1').number}"]) as capture:
        node.stop()
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

    addresses = {before, dialler.address, *(pod.address for pod in pods.values())}
    segments = [s for s in capture.segments() if addresses & {s[0], s[2]}]
    plain = [s[:4] for s in segments if {ECHO, HELD} & {s[1], s[3]}]
    assert plain == []
    assert any(15008 in (s[1], s[3]) and s[0] == dialler.address for s in segments)
