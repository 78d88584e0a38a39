"""NetworkPolicy on a real cluster: no CNI plugin of the lab's enforces it, so what is refused is refused by us."""

from __future__ import annotations

import json
from typing import Any

from lab.kubernetes import Kubernetes
from lab.kubernetes.mesh import Mesh
from lab.processes import wait_until
from tests.cluster.apps import Apps, Pod
from tests.cluster.test_enrolment import AMBIENT, ECHO, HELD, Held, enrolled, make_world, stages

SERVERS = {"matchExpressions": [{"key": "app", "operator": "In", "values": ["server1", "server2"]}]}
DNS = {
    "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}],
    "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
}
EVERYBODY = frozenset(
    (client, server) for client in ("client1", "client2") for server in ("server1", "server2")
)


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }


def reached(pods: dict[str, Pod]) -> frozenset[tuple[str, str]]:
    """Who gets a greeting of whom."""
    found = set()
    for client, server in EVERYBODY:
        argv = [
            "python3",
            "/apps/traffic.py",
            pods[server].address,
            ECHO,
            "--greeted",
            "--count",
            1,
            "--timeout",
            2,
        ]
        lines = pods[client].run(*argv, check=False).splitlines()
        if any(json.loads(line)["outcome"] == "ok" for line in lines if line.startswith("{")):
            found.add((client, server))
    return frozenset(found)


def exchange(holder: Held, key: str) -> dict[str, Any]:
    return holder("exchange", key, size=64, times=1)


def test_on_one_node_and_between_nodes(cluster: Kubernetes, mesh: Mesh, apps: Apps):
    cluster.kubectl("label", "namespace", apps.namespace, AMBIENT)
    pods = make_world(apps)
    wait_until(lambda: enrolled(cluster, pods), 30, "all are enrolled", explain=lambda: stages(cluster, pods))

    def apply(*objects: dict[str, Any]) -> None:
        for one in objects:
            one["metadata"]["namespace"] = apps.namespace
        cluster.apply(*objects)

    def wait_reached(expected: frozenset[tuple[str, str]]) -> None:
        wait_until(
            lambda: reached(pods) == expected, 30, f"only {sorted(expected)}", explain=lambda: reached(pods)
        )

    wait_reached(EVERYBODY)
    restarts = {name: pod.restarts for name, pod in pods.items()}
    held = {name: Held(cluster, pods[name]) for name in ("client1", "client2")}
    try:
        for holder in held.values():
            for server in ("server1", "server2"):
                opened = holder("open", server, address=pods[server].address, port=HELD)
                assert not opened.get("error"), opened
        apply(
            policy(
                "servers",
                podSelector=SERVERS,
                policyTypes=["Ingress"],
                ingress=[
                    {
                        "from": [{"podSelector": {"matchLabels": {"app": "client1"}}}],
                        "ports": [{"port": ECHO}],
                    },
                    {
                        "from": [{"podSelector": {"matchLabels": {"app": "client2"}}}],
                        "ports": [{"port": HELD}],
                    },
                ],
            )
        )
        of_client1 = frozenset(pair for pair in EVERYBODY if pair[0] == "client1")
        wait_reached(of_client1)
        # What was open before is judged as what is dialled now.
        for server in ("server1", "server2"):
            assert "error" not in exchange(held["client2"], server)
        wait_until(
            lambda: all("error" in exchange(held["client1"], server) for server in ("server1", "server2")),
            10,
            "what may not be dialled any more is ended",
        )
    finally:
        for holder in held.values():
            holder.end()
    apply(
        policy(
            "client1",
            podSelector={"matchLabels": {"app": "client1"}},
            policyTypes=["Egress"],
            egress=[DNS, {"to": [{"podSelector": {"matchLabels": {"app": "server1"}}}]}],
        )
    )
    wait_reached(frozenset({("client1", "server1")}))
    name = pods["client1"].run(
        "python3", "-c", "import socket; print(socket.gethostbyname('kubernetes.default.svc'))"
    )
    assert name.strip().count(".") == 3
    cluster.kubectl("delete", "networkpolicy", "-n", apps.namespace, "--all")
    wait_reached(EVERYBODY)
    # Kubelet's probes were nobody's to refuse.
    assert {name: pod.restarts for name, pod in pods.items()} == restarts
