"""The lab without the mesh: nodes, fabric, pods through Debian's CNI plugins. What the other suites stand on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from lab import CniError, CommandError, Lab, LabError, Talker
from lab.processes import wait_until

pytestmark = pytest.mark.privileged


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, mesh=False) as lab:
        lab.namespace("default")
        yield lab


def test_starts_in_a_second_and_leaves_the_machine_s_network_alone():
    def machine() -> str:
        commands = ["ip -o link", "ip -o address", "ip route show table all", "ip rule"]
        return "\n".join(subprocess.check_output(command.split(), text=True) for command in commands)

    before = machine()
    with Lab(nodes=2, mesh=False) as lab:
        assert lab.fabric_seconds < 1.5
        pod = lab.pod("someone")
        assert machine() == before
        assert pod.address == "10.244.1.2"


def test_pods_of_two_nodes_reach_each_other_with_their_own_addresses(lab: Lab):
    server = lab.pod("far-server", node="node2")
    server.serve(server.app("tcp_server", 9000, "--greet"), 9000)
    client = lab.pod("near-client", node="node1")
    with Talker(client) as talker:
        assert talker.open(server.address, 9000).ok
        greeting = json.loads(talker("read")["text"])
        assert greeting["peer"][0] == client.address
        assert talker.exchange(size=100_000)["received"] > 100_000


def test_outsider_and_node_reach_pods(lab: Lab):
    server = lab.pod("server-for-all")
    server.serve(server.app("http_server", 8080, "--version", "v7"), 8080)
    outsider = lab.outsider("stranger")
    about = json.loads(outsider.run(["curl", "-s", f"http://{server.address}:8080/x"]).stdout)
    assert about["version"] == "v7"
    assert about["client"].startswith("10.99.0.")
    assert lab.probe(server, 8080)
    assert not lab.probe(server, 8081)


def test_nodes_have_file_systems_of_their_own(lab: Lab):
    one, two = lab.nodes
    one.run(["/bin/sh", "-c", "echo 1 >/run/mark; echo 1 >/var/lib/mycel/mark; mkdir /sys/fs/bpf/mark"])
    for path in ("/run/mark", "/var/lib/mycel/mark", "/sys/fs/bpf/mark"):
        assert one.run(["/usr/bin/test", "-e", path], check=False).returncode == 0
        assert two.run(["/usr/bin/test", "-e", path], check=False).returncode == 1
        assert subprocess.run(["/usr/bin/test", "-e", path], check=False).returncode == 1


def test_runtime_caches_results_and_uses_them_for_check_and_del(lab: Lab):
    pod = lab.pod("cached")
    node = pod.node
    results = node.root / "var/lib/cni/results"
    (cache,) = results.glob("pods-cached-*")
    kept = json.loads(cache.read_text())
    assert kept["kind"] == "cniCacheV1"
    assert kept["result"]["ips"][0]["address"] == f"{pod.address}/24"
    pod.check()
    pod.run(["ip", "link", "set", "eth0", "down"])
    pod.run(["ip", "address", "flush", "dev", "eth0"])
    with pytest.raises(CniError, match="CHECK by plugin bridge"):
        pod.check()
    pod.delete()
    assert not cache.exists()
    assert not list((node.root / "run/netns").glob("cached-*"))


def test_an_address_can_be_asked_for_and_comes_again(lab: Lab):
    first = lab.pod("first-owner")
    address = first.address
    first.delete()
    second = lab.pod("second-owner", address=address)
    assert second.address == address
    assert second.uid != first.uid


def test_failed_add_is_undone_and_named(lab: Lab):
    first = lab.pod("owner")
    with pytest.raises(CniError, match=r"host-local|bridge") as error:
        lab.pod("thief", address=first.address)
    assert error.value.command == "ADD"
    assert not list((first.node.root / "run/netns").glob("thief-*"))
    assert not (first.node.top / "pods").joinpath("thief").exists()
    assert not list(lab.cluster.objects.glob("pod-default-thief*"))


def test_pod_manifest_follows_the_pod_s_life(lab: Lab):
    path = lab.cluster.objects / "pod-default-living.yaml"
    pod = lab.pod("living", service_account="someone", labels={"app": "x"}, ports=[7000])
    pending = json.loads(path.read_text())
    assert pending["status"]["podIP"] == pod.address
    assert pending["status"]["conditions"] == [{"type": "Ready", "status": "False"}]
    pod.serve(pod.app("tcp_server", 7000), 7000)
    assert json.loads(path.read_text())["status"]["conditions"] == [{"type": "Ready", "status": "True"}]
    assert json.loads((lab.cluster.objects / "serviceaccount-default-someone.yaml").read_text())
    pod.delete()
    assert not path.exists()


def test_capture_sees_the_fabric_and_only_the_fabric(lab: Lab):
    near, far = lab.pod("capture-near", node="node1"), lab.pod("capture-far", node="node2")
    for server in (near, far):
        server.serve(server.app("tcp_server", 9000), 9000)
    client = lab.pod("capture-client", node="node1")
    with lab.capture() as capture, Talker(client) as talker:
        talker.open(near.address, 9000, "near")
        talker("send", "near", text="marker-near")
        talker("read", "near")
        talker.open(far.address, 9000, "far")
        talker("send", "far", text="marker-far")
        talker("read", "far")
    assert capture.holds(b"marker-far") >= 2
    assert capture.holds(b"marker-near") == 0
    assert any(
        payload == b"marker-far" and (source, destination, port) == (client.address, far.address, 9000)
        for source, _, destination, port, payload in capture.segments()
    )


def test_a_failing_command_says_what_it_said(lab: Lab):
    with pytest.raises(CommandError, match="no such luck") as error:
        lab.nodes[0].run(["/bin/sh", "-c", "echo no such luck; exit 3"])
    assert error.value.status == 3
    with pytest.raises(LabError, match="took over"):
        lab.nodes[0].run(["sleep", "5"], timeout=0.1)


def test_waiting_ends(lab: Lab):
    began = time.monotonic()
    with pytest.raises(LabError, match=r"the moon: not within 0\.2 s: still dark"):
        wait_until(lambda: False, 0.2, "the moon", explain=lambda: "still dark")
    assert time.monotonic() - began < 2
