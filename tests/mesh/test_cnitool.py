"""The CNI project's own tool on our chain, of version 1.1.0: each command, and two hundred attachments at once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lab import Lab, Node, Place, cgroups
from lab.cluster import PodRecord
from lab.cnitool import NETWORK, CniTool
from lab.place import CommandError
from tests.mesh.helpers import ECHO

pytestmark = [pytest.mark.privileged, pytest.mark.timeout(240)]

NAMESPACE = "tool"
COUNT = 200
#: Seconds for that many at once: three programs each, and one agent for all.
PATIENCE = 60.0


class Sandbox:
    """What a runtime knows of a pod: a network namespace that has a name, and arguments."""

    def __init__(self, node: Node, record: PodRecord) -> None:
        self.record = record
        self.netns = f"/run/netns/{record.name}"
        #: As cnitool makes it.
        self.container = f"cnitool-{hashlib.sha512(self.netns.encode()).digest()[:10].hex()}"
        self.arguments = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": record.namespace,
            "K8S_POD_NAME": record.name,
            "K8S_POD_UID": record.uid,
        }
        self._node = node

    def place(self) -> Place:
        cgroup = self._node.top / f"kubepods/pod{self.record.uid}"
        cgroup.mkdir(exist_ok=True)
        return Place(self.record.name, net=self._node.root / self.netns[1:], cgroup=cgroup)


class Sandboxes:
    """Pods of a namespace that is in the mesh, with network namespaces that nobody has connected yet."""

    def __init__(self, lab: Lab, node: Node) -> None:
        self.lab, self.node = lab, node
        self.tool = CniTool(node, "10.77.0.0/16", timeout=40)
        self.all: list[Sandbox] = []

    def make(self, count: int, prefix: str) -> list[Sandbox]:
        self.lab.cluster.namespace(NAMESPACE)
        made = []
        for number in range(count):
            record = PodRecord(NAMESPACE, f"{prefix}{number}", self.node.name, "default", {"app": prefix})
            self.lab.cluster.put(record.manifest())
            made.append(Sandbox(self.node, record))
        self.all += made
        self._each(made, "touch $1; unshare --net=$1 ip link set lo up")
        self.lab.settle(components=("agent",))
        return made

    def close(self) -> None:
        for sandbox in self.all:
            self.lab.cluster.remove("Pod", NAMESPACE, sandbox.record.name)
            cgroups.remove(self.node.top / f"kubepods/pod{sandbox.record.uid}")
        self._each(self.all, "umount -l $1; rm $1")
        self.tool.close()
        self.lab.settle(components=("agent",))

    def _each(self, sandboxes: Iterable[Sandbox], script: str) -> None:
        paths = [sandbox.netns for sandbox in sandboxes]
        body = f"while [ $# -gt 0 ]; do {script}; shift; done"
        self.node.run(["/bin/sh", "-ec", body, "sh", *paths], timeout=60)

    def attached(self) -> set[str]:
        """Containers of this network, by the agent's book."""
        book = json.loads((self.node.root / "var/lib/mycel/pods.json").read_text())["pods"]
        return {pod["container_id"] for pod in book if pod["network"] == NETWORK}

    def enrolled(self) -> set[str]:
        """Names of the pods of this namespace that the kernel has, by the agent's page."""
        pods = self.lab.get_json(self.node.name, "agent", "/debug/pods")
        return {pod["name"] for pod in pods if pod["namespace"] == NAMESPACE and pod["stage"] == "enrolled"}


@pytest.fixture
def sandboxes(lab: Lab) -> Iterator[Sandboxes]:
    made = Sandboxes(lab, lab.node("node1"))
    try:
        yield made
    finally:
        made.close()


def address(result: dict[str, Any]) -> str:
    (ip,) = result["ips"]
    return str(ip["address"]).partition("/")[0]


def test_each_command(sandboxes: Sandboxes):
    tool = sandboxes.tool
    (pod,) = sandboxes.make(1, "one")
    assert tool.call("status", pod.netns).stdout == ""
    result = json.loads(tool.call("add", pod.netns, pod.arguments).stdout)
    assert result["cniVersion"] == "1.1.0"
    assert sandboxes.attached() == {pod.container}
    assert tool.call("check", pod.netns, pod.arguments).stdout == ""
    # What ADD put into the pod's namespace is judged, and only looked at.
    (rule,) = [
        line for line in pod.place().run(["/usr/sbin/ip", "rule"]).stdout.splitlines() if "fwmark" in line
    ]
    pod.place().run(["/usr/sbin/ip", "rule", "del", "pref", rule.partition(":")[0]])
    for _ in range(2):
        with pytest.raises(CommandError, match=r"missing for pod tool/one0: .*rule"):
            tool.call("check", pod.netns, pod.arguments)
    # An interface that is there already: the plugin before ours fails, and what was is still there.
    with pytest.raises(CommandError):
        tool.call("add", pod.netns, pod.arguments)
    for _ in range(2):
        assert tool.call("del", pod.netns, pod.arguments).stdout == ""
    assert sandboxes.attached() == set()
    assert tool.leased() == set()
    # What it sends for GC has no list of what is valid: what libcni knows of goes, and our plugin removes nothing by guess.
    tool.call("add", pod.netns, pod.arguments)
    tool.forget(pod.container)
    with pytest.raises(CommandError, match="valid-attachments is missing"):
        tool.call("gc", pod.netns)
    tool.collect(pod.container)
    assert sandboxes.attached() == {pod.container}
    tool.collect()
    assert sandboxes.attached() == set()
    tool.call("del", pod.netns, pod.arguments)


def test_what_is_refused_is_the_tool_s_error_too(sandboxes: Sandboxes):
    """By a pod of another node; the plugins before ours have undone their part."""
    (pod,) = sandboxes.make(1, "elsewhere")
    pod.record.node = "node2"
    sandboxes.lab.cluster.put(pod.record.manifest())
    sandboxes.lab.settle(components=("agent",))
    with pytest.raises(CommandError, match="belongs to node 'node2'"):
        sandboxes.tool.call("add", pod.netns, pod.arguments)
    sandboxes.tool.call("del", pod.netns, pod.arguments)
    assert sandboxes.tool.leased() == set()
    assert sandboxes.attached() == set()


def test_two_hundred_at_once(sandboxes: Sandboxes):
    tool, lab = sandboxes.tool, sandboxes.lab
    pods = sandboxes.make(COUNT, "many")
    with ThreadPoolExecutor(COUNT) as pool:

        def all_at_once(verb: str, chosen: list[Sandbox]) -> tuple[list[str], float]:
            begin = time.monotonic()
            done = list(pool.map(lambda pod: tool.call(verb, pod.netns, pod.arguments).stdout, chosen))
            return done, time.monotonic() - begin

        results, took = all_at_once("add", pods)
        addresses = [address(json.loads(result)) for result in results]
        assert len(set(addresses)) == COUNT
        assert sandboxes.attached() == {pod.container for pod in pods}
        assert sandboxes.enrolled() == {pod.record.name for pod in pods}
        assert set(addresses) == tool.leased()
        print(f"{COUNT} ADDs at once: {took:.1f} s")
        assert took < PATIENCE

        # The first and the last that came: what one sends, the other gets, and both are in the mesh.
        server, client = pods[0].place(), pods[-1].place()
        listening = server.popen(server.app("tcp_server", ECHO, "--greet"))
        try:
            lab.wait(lambda: server.listening(ECHO), 5, "it listens")
            done = client.run(client.app("traffic", addresses[0], ECHO, "--count", 3, "--greeted"))
            records = [json.loads(line) for line in done.stdout.splitlines()]
            assert [record["outcome"] for record in records] == ["ok"] * 3
            assert {record["greeting"]["peer"][0] for record in records} == {addresses[-1]}
        finally:
            listening.kill()
            listening.communicate()

        # Half of them go as a runtime lets them go; of the others it lost most notes, as one that was reinstalled.
        half, rest = pods[: COUNT // 2], pods[COUNT // 2 :]
        _, took = all_at_once("del", half)
        print(f"{len(half)} DELs at once: {took:.1f} s")
        assert took < PATIENCE
        assert sandboxes.attached() == {pod.container for pod in rest}
        tool.forget(*(pod.container for pod in rest[10:]))
        with pytest.raises(CommandError, match="valid-attachments is missing"):
            tool.call("gc", rest[0].netns)
        assert sandboxes.attached() == {pod.container for pod in rest[10:]}
        begin = time.monotonic()
        tool.collect(rest[10].container)
        took = time.monotonic() - begin
        print(f"GC of {len(rest) - 11}: {took:.1f} s")
        assert took < PATIENCE / 4
        assert sandboxes.attached() == {rest[10].container}
        assert sandboxes.enrolled() == {rest[10].record.name}
        _, took = all_at_once("del", pods)
        print(f"{COUNT} DELs of what is gone, but for one: {took:.1f} s")
        assert took < PATIENCE
        assert sandboxes.attached() == set()
        assert sandboxes.enrolled() == set()
        assert tool.noted() == set()
        assert tool.leased() == set()
