"""The CNI plugin on real nodes: kubelet and containerd start pods through the chain, on machines without Python.

The mesh of the run is used, and is whole again after each test.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from lab.kubernetes import Cluster
from lab.kubernetes.node import Node
from lab.processes import wait_until
from tests.cluster.apps import IMAGE, Apps

CONF = "etc/cni/net.d"
BIN = "opt/cni/bin"


def chain(node: Node) -> list[str]:
    """The plugins that the runtime of the node runs, in order."""
    first = min(p for p in (node.root / CONF).iterdir() if p.suffix in (".conf", ".conflist", ".json"))
    return [plugin["type"] for plugin in json.loads(first.read_text())["plugins"]]


def attached(node: Node) -> set[str]:
    """UIDs of the pods that the node's agent has attached."""
    book = node.root / "var/lib/mycel/pods.json"
    return {pod["pod_uid"] for pod in json.loads(book.read_text())["pods"]} if book.exists() else set()


@pytest.fixture
def enrolled(mesh, apps: Apps) -> Apps:
    apps.cluster.kubectl("label", "namespace", apps.namespace, "mycel.io/mesh=enabled")
    return apps


@pytest.fixture
def away(mesh, lab_cluster: Cluster) -> Iterator[None]:
    """No agent on any node, though the mesh is there: as between two agents of an upgrade that hangs."""
    patch = '{"spec":{"template":{"spec":{"nodeSelector":{"mycel.io/away":"true"}}}}}'
    lab_cluster.kubectl("patch", "daemonset", "mycel-agent", "-n", mesh.namespace, "-p", patch)
    try:
        wait_until(lambda: not mesh.pods("agent"), 60.0, "agents are gone", interval=0.2)
        wait_until(
            lambda: not any((node.root / "run/mycel/cni.sock").is_socket() and _answers(node) for node in lab_cluster.nodes),
            30.0, "nobody answers plugins", interval=0.2,
        )  # fmt: skip
        yield
    finally:
        _come_back(mesh)


def _come_back(mesh) -> None:
    patch = '[{"op": "remove", "path": "/spec/template/spec/nodeSelector"}]'
    mesh.cluster.kubectl(
        *("patch", "daemonset", "mycel-agent", "-n", mesh.namespace, "--type=json", "-p", patch), check=False
    )
    mesh.wait_ready()


def _events(apps: Apps) -> str:
    return apps.cluster.kubectl("get", "events", "-n", apps.namespace, "-o", "jsonpath={.items[*].message}")


def _answers(node: Node) -> bool:
    return (
        "mycel-agent" in node.run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"], check=False).stdout
    )


def test_pods_start_through_the_chain_on_a_machine_without_python(mesh, lab_cluster: Cluster, enrolled: Apps):
    for node in lab_cluster.nodes:
        # A node's machine is all of what its root file system has: none of it is an interpreter.
        assert node.run(["sh", "-c", "command -v python3"], check=False).returncode != 0
        assert chain(node)[-1] == "mycel"
        assert chain(node).count("mycel") == 1
        pod = enrolled.client(f"client-{node.name}", node=node.name)
        assert pod.uid in attached(node)
        assert len(list((node.root / BIN / ".mycel").glob("[0-9a-f]*"))) >= 1


def test_another_tool_rewrites_the_list(mesh, lab_cluster: Cluster, enrolled: Apps):
    node = lab_cluster.nodes[0]
    file = min((node.root / CONF).glob("*.conflist"))
    chained = file.read_text()
    # As network agents do it: the whole file, from their own template.
    config = json.loads(chained)
    config["plugins"].pop()
    file.write_text(json.dumps(config, indent=1))
    wait_until(lambda: chain(node)[-1] == "mycel", 5.0, "chained again", interval=0.02)
    assert json.loads(file.read_text()) == json.loads(chained)
    assert enrolled.client(node=node.name).uid in attached(node)


def test_another_list_becomes_the_first(mesh, lab_cluster: Cluster, enrolled: Apps):
    node = lab_cluster.nodes[0]
    old = min((node.root / CONF).glob("*.conflist"))
    new = old.with_name("00-other.conflist")
    config = json.loads(old.read_text())
    config["plugins"].pop()
    new.write_text(json.dumps(config))
    try:
        wait_until(lambda: chain(node)[-1] == "mycel", 5.0, "chained into the new first", interval=0.02)
        wait_until(lambda: "mycel" not in old.read_text(), 5.0, "out of the old one", interval=0.02)
        assert enrolled.client(node=node.name).uid in attached(node)
    finally:
        new.unlink()
    wait_until(lambda: chain(node)[-1] == "mycel", 5.0, "and back", interval=0.02)


def test_the_plugin_is_put_back(mesh, lab_cluster: Cluster, enrolled: Apps):
    node = lab_cluster.nodes[0]
    (node.root / BIN / "mycel").unlink()
    wait_until((node.root / BIN / "mycel").exists, 5.0, "the launcher is back", interval=0.02)
    bundle = next((node.root / BIN / ".mycel").glob("[0-9a-f]*"))
    (bundle / "lib/libc.so.6").unlink()
    (node.root / BIN / "mycel").write_text("")
    wait_until((bundle / "lib/libc.so.6").exists, 5.0, "a damaged bundle is whole", interval=0.02)
    wait_until(lambda: (node.root / BIN / "mycel").read_text() != "", 5.0, "and the launcher", interval=0.02)
    assert enrolled.client(node=node.name).uid in attached(node)


def test_an_upgrade_takes_nothing_out(mesh, lab_cluster: Cluster, enrolled: Apps):
    """SIGTERM of an upgrade: the entry is there at every moment, and pods that start meanwhile get in, attached."""
    missing: list[str] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            for node in lab_cluster.nodes:
                if chain(node)[-1] != "mycel" or not (node.root / BIN / "mycel").exists():
                    missing.append(node.name)
            time.sleep(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        roll = threading.Thread(target=mesh.restart, args=("agent",))
        roll.start()
        pods = [enrolled.client(f"during-{n}") for n in range(3)]
        roll.join()
    finally:
        ended.set()
        thread.join()
    assert missing == []
    known = set().union(*(attached(node) for node in lab_cluster.nodes))
    assert {pod.uid for pod in pods} <= known


def test_agent_away(mesh, lab_cluster: Cluster, enrolled: Apps, away):
    """Pods outside start at once, those of the mesh wait until they can be programmed."""
    node = lab_cluster.nodes[0]
    assert chain(node)[-1] == "mycel"
    outside = json.loads((node.root / "run/mycel/enrolment.json").read_text())["outside"]
    assert {"default", "kube-system", mesh.namespace} <= set(outside)
    assert enrolled.namespace not in outside

    enrolled.cluster.kubectl("create", "serviceaccount", "plain", "-n", "default", check=False)
    plain = Apps(lab_cluster, "default")
    try:
        pod = plain.client("plain", node=node.name)
        assert pod.uid not in attached(node)
    finally:
        lab_cluster.kubectl("delete", "deployment,serviceaccount", "plain", "-n", "default", "--wait=false")

    container = {"name": "client", "image": IMAGE}
    enrolled.deployment("waits", container, labels={"app": "waits"}, node=node.name, wait=False)
    wait_until(
        lambda: "the node agent does not answer" in _events(enrolled), 40.0, "it is refused", interval=0.5
    )
    assert enrolled.pods("waits") == []
    _come_back(mesh)
    enrolled.wait_rolled_out("waits", timeout=120)
    (waits,) = enrolled.pods("waits")
    assert waits.uid in attached(node)


def test_an_agent_that_hangs_stops_neither_its_node_nor_the_mesh(mesh, lab_cluster: Cluster, enrolled: Apps):
    """Stopped, it holds its sockets: pods of the mesh wait, all others start, and its successor is not held up."""
    node = lab_cluster.nodes[0]
    (agent,) = mesh.pods("agent", node.name)
    agent_uid = lab_cluster.get("pod", agent, "-n", mesh.namespace)["metadata"]["uid"]
    before = enrolled.client("before", node=node.name)
    gone = before.uid
    plain = Apps(lab_cluster, "default")
    lab_cluster.kubectl("create", "serviceaccount", "plain", "-n", "default", check=False)
    stopped = node.pod_pids(agent_uid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        container = {"name": "client", "image": IMAGE}
        enrolled.deployment("waits", container, labels={"app": "waits"}, node=node.name, wait=False)
        plain.deployment("plain", container, labels={"app": "plain"}, node=node.name, wait=False)
        # Of a namespace that is always outside: nobody is asked.
        always = Apps(lab_cluster, "kube-system")
        began = time.monotonic()
        always.deployment("always", container, labels={"app": "always"}, node=node.name)
        took = time.monotonic() - began
        # A pod that goes leaves a note.
        before.delete(wait=False)
        plain.wait_rolled_out("plain", 60)
        print(f"always outside: {took:.1f} s, outside: {time.monotonic() - began:.1f} s")
        assert enrolled.pods("waits") == []
        ready = lab_cluster.get("node", node.name)["status"]["conditions"]
        assert [c["status"] for c in ready if c["type"] == "Ready"] == ["True"]
        wait_until(lambda: "does not answer" in _events(enrolled), 30.0, "it is refused", interval=0.5)
        assert enrolled.pods("waits") == []
        lab_cluster.kubectl("delete", "pod", "-n", mesh.namespace, agent, "--grace-period=0", "--force")
        mesh.wait_ready()
        enrolled.wait_rolled_out("waits", timeout=60)
        (waits,) = enrolled.pods("waits")
        uid = waits.uid
        wait_until(lambda: uid in attached(node) and gone not in attached(node), 20.0, "all is right")
    finally:
        for name, where in (("plain", "default"), ("always", "kube-system")):
            lab_cluster.kubectl(
                *("delete", "deployment,serviceaccount", name, "-n", where, "--wait=false"), check=False
            )
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_a_burst_of_forty_pods(mesh, lab_cluster: Cluster, enrolled: Apps):
    """On one node: kubelet starts them as fast as it can, none is lost, and none of them is left when they go."""
    node = lab_cluster.nodes[0]
    before = attached(node)
    container = {"name": "client", "image": IMAGE}
    began = time.monotonic()
    enrolled.deployment("burst", container, labels={"app": "burst"}, replicas=40, node=node.name)
    print(f"40 pods are available after {time.monotonic() - began:.1f} s")
    pods = enrolled.pods("burst")
    items = lab_cluster.get("pods", "-n", enrolled.namespace, "-l", "deployment=burst")["items"]
    uids = {item["metadata"]["uid"] for item in items}
    assert len(pods) == len(uids) == 40
    assert len({item["status"]["podIP"] for item in items}) == 40
    assert uids <= attached(node)
    lab_cluster.kubectl("delete", "deployment", "-n", enrolled.namespace, "burst", "--wait=false")
    wait_until(
        lambda: not (attached(node) - before), 60.0, "the agent has none of them any more", interval=0.2,
        explain=lambda: str(len(attached(node) - before)),
    )  # fmt: skip


def _wait_gone(node: Node, chained: list[str]) -> None:
    wait_until(lambda: chain(node) == chained[:-1], 40.0, "the entry is out", interval=0.1)
    wait_until(lambda: not (node.root / BIN / "mycel").exists(), 10.0, "and the plugin", interval=0.1)
    wait_until(lambda: not (node.root / BIN / ".mycel").exists(), 10.0, "whole", interval=0.1)
    wait_until(lambda: not list((node.root / "sys/fs/bpf").glob("mycel*/*")), 20.0, "and pins", interval=0.1)


def test_the_daemonset_goes_and_with_it_the_plugin(mesh, lab_cluster: Cluster, apps: Apps):
    before = {node.name: chain(node) for node in lab_cluster.nodes}
    lab_cluster.kubectl("delete", "daemonset", "mycel-agent", "-n", mesh.namespace)
    try:
        for node in lab_cluster.nodes:
            _wait_gone(node, before[node.name])
        # The node goes on without us.
        apps.client(node=lab_cluster.nodes[0].name)
    finally:
        mesh.install()
    for node in lab_cluster.nodes:
        assert chain(node) == before[node.name]


def test_pod_start_is_not_slowed_much(mesh, lab_cluster: Cluster):
    """What the plugin adds to a pod's start, on one node, called as containerd calls it, at its best: others run beside.

    (What it is on a quiet machine is the benchmark's.)
    """
    node = lab_cluster.nodes[0]
    times = []
    for _ in range(11):
        begin = time.perf_counter()
        done = node.run(["sh", "-c", f"echo '{{}}' | CNI_COMMAND=VERSION /{BIN}/mycel"])
        times.append(time.perf_counter() - begin)
        assert "supportedVersions" in done.stdout
    bare = []
    for _ in range(11):
        begin = time.perf_counter()
        node.run(["sh", "-c", "echo '{}' | true"])
        bare.append(time.perf_counter() - begin)
    added = min(times) - min(bare)
    print(f"start of the plugin on a node: {added * 1000:.0f} ms")
    assert added < 0.060
