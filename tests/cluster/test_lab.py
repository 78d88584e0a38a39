"""The cluster lab is what its users take it for: a Kubernetes like any other, on machines like any other."""

from __future__ import annotations

import asyncio
import subprocess

from lab.kubernetes import Cluster, Kubernetes
from lab.processes import wait_until
from tests.cluster.apps import Apps


def test_pods_of_two_nodes_talk_by_name(cluster: Kubernetes, apps: Apps):
    nodes = sorted(cluster.ready_nodes())
    assert len(nodes) >= 2
    apps.server("web", node=nodes[1])
    client = apps.client(node=nodes[0])
    server = apps.pods("web")[0]
    assert (client.node, server.node) == (nodes[0], nodes[1])
    apps.wait_reachable(client, "http://web/")
    for name in ("web", f"web.{apps.namespace}", f"web.{apps.namespace}.svc.cluster.local"):
        assert client.curl(f"http://{name}/")["pod"] == server.name
    answer = client.curl(f"http://{server.address}:8080/")
    assert answer["client"] == client.address  # no address translation between pods


def test_logs_exec_and_port_forward_go_through_kubelet(cluster: Kubernetes, apps: Apps):
    client = apps.client()
    assert client.run("echo", "hello").strip() == "hello"
    client.run("sh", "-c", "echo seen >/proc/1/fd/1")
    wait_until(lambda: "seen" in client.logs(), 5.0, "a line in the log")
    apps.server("web")
    forward = subprocess.Popen(
        [
            "kubectl",
            f"--kubeconfig={cluster.kubeconfig}",
            "-n",
            apps.namespace,
            "port-forward",
            "deployment/web",
            ":8080",
        ],
        stdout=subprocess.PIPE,
        text=True,
        executable=_kubectl(),
    )
    try:
        assert forward.stdout is not None
        address = forward.stdout.readline().split()[2]  # Forwarding from 127.0.0.1:PORT -> 8080
        done = subprocess.run(
            ["curl", "-sSfm", "5", f"http://{address}/"], capture_output=True, text=True, check=True
        )
        assert '"version": "v1"' in done.stdout
    finally:
        forward.terminate()
        forward.wait(5)


def test_our_client_works_with_its_kubeconfig(cluster: Kubernetes):
    async def names() -> set[str]:
        async with cluster.client() as client:
            return {item["metadata"]["name"] for item in (await client.list("/api/v1/nodes"))["items"]}

    assert asyncio.run(names()) == cluster.ready_nodes()


def test_a_node_is_a_machine_of_its_own(lab_cluster: Cluster):
    one, two = lab_cluster.nodes
    assert one.run(["hostname"]).stdout.strip() == "node1"
    one.run(["sh", "-c", "echo mine >/run/mark; echo mine >/var/lib/mark; echo mine >/etc/mark"])
    for file in ("/run/mark", "/var/lib/mark", "/etc/mark"):
        assert two.run(["test", "-e", file], check=False).returncode != 0
    processes = one.run(["ps", "-eo", "args"]).stdout
    assert processes.count("kubelet --config") == 1
    assert one.run(["cat", "/proc/1/comm"]).stdout.strip() == "sleep"
    # ... whose Python is not there, and which cannot write where this machine keeps its programs.
    assert one.run(["python3", "-V"], check=False).returncode == 127
    assert one.run(["touch", "/usr/mark"], check=False).returncode != 0
    # Each daemon is told by its cgroup, seen from the node as systemd would have put it.
    for name in ("kubelet", "containerd"):
        pid = one.run(["pgrep", "-xo", name]).stdout.strip()
        assert (
            f"0::/system.slice/{name}.service" in one.run(["cat", f"/proc/{pid}/cgroup"]).stdout.splitlines()
        )


def test_nodes_have_a_zone_and_an_identity_each(lab_cluster: Cluster):
    items = lab_cluster.get("nodes")["items"]
    zones = {i["metadata"]["name"]: i["metadata"]["labels"]["topology.kubernetes.io/zone"] for i in items}
    assert zones == {"node1": "zone-1", "node2": "zone-2"}
    kubeconfig = lab_cluster.nodes[0].disk / "etc/kubernetes/kubelet.kubeconfig"
    as_node = Kubernetes(kubeconfig)
    assert "node1" in as_node.kubectl("label", "node", "node1", "example.com/own=yes")
    refused = as_node.kubectl("label", "node", "node2", "example.com/other=yes", check=False)
    assert "Forbidden" in refused


def test_a_node_that_is_switched_off_comes_back_with_its_disk_alone(lab_cluster: Cluster, apps: Apps):
    node = lab_cluster.nodes[1]
    apps.server("web", node=node.name)
    client = apps.client(node="node1")
    apps.wait_reachable(client, "http://web/")
    before = apps.pods("web")[0]
    assert node.pod_pids(before.uid)
    node.run(
        ["sh", "-c", "touch /run/mark /var/lib/mark && mkdir /sys/fs/bpf/mark && ip link add mark type veth"]
    )
    node.stop()
    assert not node.running
    assert not client.reaches("http://web/")
    node.start()
    for gone in ("/run/mark", "/sys/fs/bpf/mark"):
        assert node.run(["ls", gone], check=False).returncode != 0
    assert node.run(["ip", "link", "show", "mark"], check=False).returncode != 0
    assert node.run(["ls", "/var/lib/mark"]).returncode == 0
    lab_cluster.wait_nodes()
    apps.wait_reachable(client, "http://web/", timeout=60.0)


def test_containers_go_on_while_containerd_and_kubelet_start_again(lab_cluster: Cluster, apps: Apps):
    node = lab_cluster.nodes[0]
    client = apps.client(node=node.name)
    before = node.pod_pids(client.uid)
    for name in ("containerd", "kubelet"):
        service = node.service(name)
        pids = service.pids
        service.restart()
        assert not set(pids) & set(service.pids)
        node.wait_containerd()
    wait_until(
        lambda: "again" in client.run("echo", "again", check=False), 30.0, "kubelet works", interval=0.5
    )
    assert node.pod_pids(client.uid) == before
    assert client.restarts == 0


def test_without_an_api_server_pods_go_on(lab_cluster: Cluster, apps: Apps):
    apps.server("web", node="node2")
    client = apps.client(node="node1")
    apps.wait_reachable(client, "http://web/")
    server = lab_cluster.control_plane.service("kube-apiserver")
    curl = lab_cluster.nodes[0].pod_command(client.uid, ["/usr/bin/curl", "-sSfm", "5", "http://web/"])
    server.kill()
    try:
        assert not lab_cluster.control_plane.ready
        done = subprocess.run(curl, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    finally:
        server.start()
        lab_cluster.control_plane.wait_ready()
    assert client.curl("http://web/")["version"] == "v1"


def test_the_rights_of_a_service_account_are_its_own(cluster: Kubernetes, namespace: str):
    user = f"--as=system:serviceaccount:{namespace}:default"
    assert cluster.kubectl("auth", "can-i", "list", "secrets", "-A", user, check=False).strip() == "no"


def _kubectl() -> str:
    from lab.kubernetes import programs

    return str(programs.folder() / "kubectl")
