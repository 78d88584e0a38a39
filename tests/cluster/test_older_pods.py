"""The mesh is taken off a cluster and put on again while pods run: they go on, and join as if they had always been there."""

from __future__ import annotations

import pytest

from lab.kubernetes import Cluster
from lab.kubernetes.mesh import Mesh
from lab.processes import wait_until
from tests.cluster.apps import Apps
from tests.cluster.test_enrolment import (
    AMBIENT,
    HELD,
    Held,
    enrolled,
    established,
    join_and_leave,
    make_world,
    stages,
)

pytestmark = pytest.mark.timeout(400)


def test_pods_older_than_the_mesh(mesh: Mesh, lab_cluster: Cluster, apps: Apps):
    cluster = lab_cluster
    pods = make_world(apps)
    cluster.kubectl("label", "namespace", apps.namespace, AMBIENT)
    wait_until(lambda: enrolled(cluster, pods), 30, "all are enrolled", explain=lambda: stages(cluster, pods))
    held = Held(cluster, pods["client1"])
    try:
        # On its own node: no proxy is in between.
        assert not held("open", "kept", address=pods["server1"].address, port=HELD).get("error")
        cluster.kubectl("label", "namespace", apps.namespace, "istio.io/dataplane-mode-")
        mesh.uninstall("--yes")
        for node in cluster.nodes:
            for folder in ("/sys/fs/bpf/mycel", "/run/mycel", "/var/lib/mycel"):
                found = node.run(["ls", "-A", folder], check=False)
                assert found.returncode != 0 or found.stdout == "", (node.name, folder, found.stdout)
            for file in ("/opt/cni/bin/mycel", "/opt/cni/bin/.mycel"):
                assert node.run(["test", "-e", file], check=False).returncode != 0, (node.name, file)
        for name in ("client1", "server1", "client2", "server2"):
            rules = pods[name].run("ip", "rule")
            assert "fwmark" not in rules, (name, rules)
            assert pods[name].run("cat", "/proc/sys/net/ipv4/tcp_fwmark_accept").strip() == "0"
        assert not held("exchange", "kept", size=64, times=1).get("error")
        for client in ("client1", "client2"):
            for server in ("server1", "server2"):
                assert established(pods[client], pods[server])
        # Made while there is no mesh at all.
        younger = Apps(cluster, apps.namespace)
        cluster.kubectl("delete", "deployment", "-n", apps.namespace, "client2", "server2")
        pods = make_world(younger)
        mesh.install()
        join_and_leave(cluster, pods)
        assert not held("exchange", "kept", size=64, times=1).get("error")
    finally:
        held.end()
