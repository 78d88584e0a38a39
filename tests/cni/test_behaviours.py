"""The duties of a chained plugin, one test for each behaviour of ``conformance/cni``: real process, real agent socket.

A test's name begins with its case's id. Those of chaining (CHN) are in ``test_chaining.py``.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bpf import links, wire
from cni import protocol
from lab.processes import wait_until
from tests.agent.pods import Netns, workload
from tests.agent.process import REAL, AgentProcess
from tests.cni.plugin import Called, Plugin, network, previous

pytestmark = pytest.mark.privileged

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
MODULE = os.environ.get("MYCEL_TEST_AGENT", REAL)

PODS = [
    workload("web", addresses=()),
    workload("plain", enrolled=False),
    workload("elsewhere", node="n2"),
    *(workload(f"many{n}") for n in range(64)),
]


class Node:
    """An agent, a plugin and namespaces."""

    def __init__(self, folder: Path) -> None:
        self.agent = AgentProcess(folder, *PODS, module=MODULE)
        self.plugin = Plugin(folder / "bin", self.agent.run, pinDir=str(self.agent.pins))

    def call(
        self, command: str, netns: Netns | Path | None, config: Any = None, *, pod: str = "web", **more: Any
    ) -> Called:
        path = str(netns.path if isinstance(netns, Netns) else netns) if netns is not None else None
        environment = {
            "CNI_CONTAINERID": f"c-{pod}",
            "CNI_NETNS": path,
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_UID=uid-{pod}",
            **more,
        }
        if config is None:
            config = self.plugin.config(prevResult=previous())
        if command == "ADD" and isinstance(netns, Netns) and isinstance(config, dict):
            network(netns, config)
        return self.plugin.call(command, config, **environment)

    @property
    def impatient(self) -> dict[str, Any]:
        """A configuration for an agent that will not answer."""
        return self.plugin.config(prevResult=previous(), timeout=0.5)

    def pods(self) -> set[tuple[str, str]]:
        """(container id, interface) of all attachments, as the agent's own book has them."""
        file = self.agent.state / "pods.json"
        return (
            {(a["container_id"], a["ifname"]) for a in json.loads(file.read_text())["pods"]}
            if file.exists()
            else set()
        )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One agent for all tests that leave it as they found it."""
    made = Node(tmp_path_factory.mktemp("node"))
    with made.agent:
        yield made


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Node]:
    """An agent of the test's own, not started."""
    made = Node(tmp_path)
    try:
        yield made
    finally:
        made.agent.clean_up()


@pytest.fixture
def netns() -> Iterator[Netns]:
    with Netns(wired=True) as made:
        yield made


@pytest.fixture
def added(node: Node, netns: Netns) -> Iterator[Netns]:
    """A pod after a successful ADD."""
    assert node.call("ADD", netns).code == 0
    yield netns
    assert node.call("DEL", netns).code == 0


class TestVersion:
    def test_ver_01(self, node):
        answer = node.plugin.call("VERSION", {"cniVersion": "1.1.0"})
        assert answer.status == 0
        assert answer.result["cniVersion"] == "1.1.0"
        assert all(isinstance(v, str) for v in answer.result["supportedVersions"])

    def test_ver_02(self, node):
        assert node.plugin.call("VERSION", {"cniVersion": "0.4.0"}).result["cniVersion"] == "0.4.0"

    def test_ver_03(self, node):
        assert node.plugin.call("VERSION", {"cniVersion": "1.1.0"}, CNI_PATH=None).status == 0

    def test_ver_04(self, node, netns):
        supported = node.plugin.call("VERSION", {"cniVersion": "1.1.0"}).result["supportedVersions"]
        for version in ("0.1.0", "0.2.0", "0.3.0", *VERSIONS, "1.2.0"):
            called = node.call(
                "ADD", netns, node.plugin.config(version, prevResult=previous(version=version))
            )
            assert (called.code == 0) == (version in supported), version
        assert node.call("DEL", netns).code == 0

    def test_ver_05(self, fresh):
        assert fresh.plugin.call("VERSION", {"cniVersion": "1.1.0"}).status == 0


class TestInputAndOutput:
    # IO-01 to IO-04 are judged on every call, by Called.code; here each kind of failure once.
    @pytest.mark.parametrize("case", ["io_01", "io_02", "io_03", "io_04"])
    def test_io_01_to_04(self, node, netns, case):
        failures = [
            node.plugin.call("ADD"),
            node.call("ADD", netns, node.plugin.config()),
            node.call("ADD", netns, pod="elsewhere"),
            node.call("ADD", netns, node.plugin.config(logLevel="loud", prevResult=previous())),
        ]
        assert all(called.status != 0 for called in failures)
        assert [called.code for called in failures] == [4, 7, 100, 7]
        success = node.call("ADD", netns, node.plugin.config(logLevel="debug", prevResult=previous()))
        assert (success.status, success.code) == (0, 0)
        assert node.call("DEL", netns).stdout == ""

    def test_io_05(self, node, netns):
        with open("/proc/self/mem", "rb") as unreadable:
            assert node.plugin.call("ADD", stdin=unreadable, **_environment(netns)).code == 5
        closed = subprocess.run(
            ["/bin/sh", "-c", 'exec "$0" <&-', str(node.plugin.path)],
            env={"CNI_COMMAND": "ADD", **_environment(netns)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert Called(closed.returncode, closed.stdout, closed.stderr).code == 5

    def test_io_06(self, node, netns):
        assert node.call("ADD", netns, "{ not JSON").code == 6

    @pytest.mark.parametrize("text", ["[]", "null", "1", '"text"', "[" * 100000])
    def test_io_07(self, node, netns, text):
        assert node.call("ADD", netns, text).code in (6, 7)

    @pytest.mark.parametrize("version", ["not-a-version", "", "1..0", "1.x.0", 1, None, ["1.0.0"]])
    def test_io_08(self, node, netns, version):
        assert node.call("ADD", netns, node.plugin.config(version, prevResult=previous())).code in (1, 6)

    def test_io_09(self, node, netns):
        called = node.call("ADD", netns, node.plugin.config("99.0.0", prevResult=previous()))
        assert called.code == 1
        missing = node.plugin.config(prevResult=previous())
        del missing["cniVersion"]
        assert node.call("ADD", netns, missing).code == 1

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("runDir", 1),
            ("runDir", "relative"),
            ("unknownPods", "maybe"),
            ("logLevel", ["debug"]),
            ("timeout", "5"),
            ("timeout", True),
            ("timeout", 0),
            ("pinDir", {}),
        ],
    )
    def test_io_10(self, node, netns, key, value):
        called = node.call("ADD", netns, node.plugin.config(prevResult={}, **{key: value}))
        assert called.code == 7
        assert key in called.text
        assert repr(value) in called.text

    def test_io_11(self, node, netns):
        config = node.plugin.config(prevResult={})
        del config["name"]
        assert node.call("ADD", netns, config).code == 7

    def test_io_12(self, node, netns):
        known = {"ipMasq": True, "dns": {"nameservers": ["10.0.0.1"]}, "ipam": {"type": "host-local"}}
        more = {"args": {"labels": []}, "runtimeConfig": {}, "cni.dev/attachments": {"a": 1}}
        config = node.plugin.config(prevResult=previous(), **known, **more)
        assert node.call("ADD", netns, config).code == 0
        assert node.call("DEL", netns, config).code == 0


def _environment(netns: Netns) -> dict[str, str]:
    return {"CNI_CONTAINERID": "c-web", "CNI_NETNS": str(netns.path), "CNI_IFNAME": "eth0"}


class TestEnvironment:
    def test_env_01(self, node):
        called = node.plugin.call(None)
        assert called.code == 4
        assert "CNI_COMMAND" in called.text

    def test_env_02(self, node):
        called = node.plugin.call("FROB")
        assert called.code == 4
        assert "CNI_COMMAND" in called.text

    @pytest.mark.parametrize(
        ("case", "name"), [("env_03", "CNI_CONTAINERID"), ("env_04", "CNI_NETNS"), ("env_05", "CNI_IFNAME")]
    )
    def test_env_03_to_05(self, node, netns, case, name):
        called = node.call("ADD", netns, **{name: None})
        assert called.code == 4
        assert name in called.text

    def test_env_06(self, node):
        called = node.plugin.call("ADD")
        assert called.code == 4
        assert all(name in called.text for name in ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"))

    def test_env_07(self, node, netns):
        assert node.call("ADD", netns, CNI_CONTAINERID="").code == 4

    @pytest.mark.parametrize("container", ["-abc", ".abc", "a/b", "a b", "../x", "a\n", "ä"])
    def test_env_08(self, node, netns, container):
        assert node.call("ADD", netns, CNI_CONTAINERID=container).code == 4

    def test_env_09(self, node, netns):
        assert node.call("ADD", netns, CNI_CONTAINERID="0Az_.-9").code == 0
        assert node.call("DEL", netns, CNI_CONTAINERID="0Az_.-9").code == 0

    @pytest.mark.parametrize("ifname", ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "x" * 16])
    def test_env_10(self, node, netns, ifname):
        assert node.call("ADD", netns, CNI_IFNAME=ifname).code == 4

    def test_env_11(self, node, netns):
        arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c"
        assert node.call("ADD", netns, CNI_ARGS=f"{arguments};K8S_POD_UID=uid-web").code == 0
        book = json.loads((node.agent.state / "pods.json").read_text())["pods"]
        assert [(a["pod_namespace"], a["pod_name"], a["pod_uid"]) for a in book] == [
            ("default", "web", "uid-web")
        ]
        assert node.call("DEL", netns).code == 0

    def test_env_12(self, node, netns):
        called = node.call("ADD", netns, CNI_ARGS="K8S_POD_NAME")
        assert called.code == 4
        assert "CNI_ARGS" in called.text

    def test_env_13(self, node, netns):
        refused = node.call("ADD", netns, CNI_ARGS=None, CNI_PATH=None)
        assert refused.code == protocol.ERR_REFUSED
        assert "unknownPods is refuse" in refused.text
        config = node.plugin.config(prevResult=previous(), unknownPods="pass", logLevel="info")
        passed = node.call("ADD", netns, config, CNI_ARGS=None, CNI_PATH=None)
        assert passed.result == previous()
        assert "passed by" in passed.stderr
        assert node.pods() == set()
        assert node.call("CHECK", netns, config, CNI_ARGS=None).code == 0
        assert node.call("DEL", netns, config, CNI_ARGS=None).code == 0


class TestAdd:
    def test_add_01(self, node, netns):
        given = previous(dns={"nameservers": ["10.0.0.1"], "search": ["b", "a"]})
        result = node.call("ADD", netns, node.plugin.config(prevResult=given)).result
        assert json.dumps(result) == json.dumps(given)
        assert node.call("DEL", netns).code == 0

    @pytest.mark.parametrize("version", VERSIONS)
    def test_add_02(self, node, netns, version):
        result = node.call(
            "ADD", netns, node.plugin.config(version, prevResult=previous(version=version))
        ).result
        assert result["cniVersion"] == version
        assert node.call("DEL", netns).code == 0

    def test_add_03(self, node, netns):
        given = previous()
        given["interfaces"][2] |= {"mtu": 1400, "socketPath": "/x", "pciID": "0000:00"}
        given["routes"] = [
            {"dst": "0.0.0.0/0", "mtu": 1400, "advmss": 1300, "priority": 9, "table": 7, "scope": 253}
        ]
        given["ours"] = {"new": [1.5, None, "ü"]}
        assert node.call("ADD", netns, node.plugin.config(prevResult=given)).result == given
        assert node.call("DEL", netns).code == 0

    def test_add_04(self, node, netns):
        given = previous()
        given["ips"] += [
            {"address": "fd00:77::2/64", "interface": 2},
            {"address": "10.78.0.1/24", "interface": 0},
        ]
        assert node.call("ADD", netns, node.plugin.config(prevResult=given)).result == given
        (attachment,) = json.loads((node.agent.state / "pods.json").read_text())["pods"]
        assert attachment["addresses"] == ["10.77.0.2", "fd00:77::2"]
        assert node.call("DEL", netns).code == 0

    def test_add_05(self, node, netns):
        called = node.call("ADD", netns, node.plugin.config())
        assert called.code == 7
        assert "chained" in called.text

    def test_add_06(self, node):
        assert node.call("ADD", Path("/run/netns/mk-agent-not-there")).code in (3, 4)
        assert node.pods() == set()

    def test_add_07(self, node, tmp_path):
        file = tmp_path / "file"
        file.write_text("")
        os.mkfifo(tmp_path / "fifo")
        for path in (file, tmp_path / "fifo", tmp_path, Path("/proc/self/ns/mnt")):
            assert node.call("ADD", path).code == 4

    def test_add_07_own_namespace_of_the_node(self, node):
        assert node.call("ADD", Path("/proc/self/ns/net")).code == 4

    def test_add_08(self, node, netns):
        assert node.call("ADD", netns, CNI_IFNAME="eth7").code == 4
        # In prevResult, but not in the namespace.
        config = node.plugin.config(prevResult=previous(interface="eth7"))
        called = node.call("ADD", netns, config, CNI_IFNAME="eth7")
        assert called.code == 4
        assert "eth7" in called.text
        assert node.pods() == set()

    def test_add_09(self, fresh, netns):
        assert fresh.call("ADD", netns, fresh.impatient).code == 11
        for pod in ("plain", "web"):
            assert fresh.call("ADD", netns, fresh.impatient, pod=pod).code == 11

    def test_add_10(self, fresh, netns):
        fresh.agent.start()
        fresh.agent.pause()
        begin = time.monotonic()
        called = fresh.call("ADD", netns, fresh.impatient)
        fresh.agent.resume()
        assert called.code == 11
        assert time.monotonic() - begin < 2.5

    def test_add_11(self, node, netns):
        called = node.call("ADD", netns, pod="elsewhere")
        assert called.code >= 100
        assert "node 'n2'" in called.text
        assert node.pods() == set()

    def test_add_11_arguments_that_contradict_the_controller(self, node, netns):
        arguments = "K8S_POD_NAMESPACE=other;K8S_POD_NAME=web;K8S_POD_UID=uid-web"
        called = node.call("ADD", netns, CNI_ARGS=arguments)
        assert called.code >= 100
        assert "'other'" in called.text

    def test_add_11_no_address(self, node, netns):
        called = node.call("ADD", netns, node.plugin.config(prevResult=previous(ips=[])))
        assert called.code >= 100
        assert "has no address" in called.text

    @pytest.mark.skipif(MODULE != REAL, reason="needs the real kernel")
    @pytest.mark.parametrize("kind", ["macvlan", "tap"])
    def test_add_11_no_veth(self, node, kind):
        """Nobody could judge what such a pod sends: it is not let in, and whoever made it is told what to do."""
        with Netns("net1", wired=True) as netns:
            make = "tuntap add eth0 mode tap" if kind == "tap" else f"link add eth0 link net1 type {kind}"
            subprocess.run(["ip", "-n", netns.name, *make.split()], check=True)
            subprocess.run(["ip", "-n", netns.name, "link", "set", "eth0", "up"], check=True)
            netns.add_address("10.77.0.2/24")
            called = node.call("ADD", netns)
            assert called.code == protocol.ERR_REFUSED
            assert "default/web cannot be in the mesh: it has no veth" in called.text
            assert "istio.io/dataplane-mode=none" in called.text
            assert node.pods() == set()
            assert _holders(netns) == []
            assert node.plugin.call("STATUS").code == 0
            assert node.call("ADD", netns, pod="plain").code == 0
            assert node.call("DEL", netns, pod="plain").code == 0

    def test_add_of_one_family_alone(self, node, netns):
        given = previous("fd00::2/64")
        assert node.call("ADD", netns, node.plugin.config(prevResult=given)).result == given
        assert node.call("DEL", netns).code == 0

    def test_add_12(self, node, netns):
        # Fails when the namespace has been looked at already: the interface is not there.
        assert node.call("ADD", netns, node.plugin.config(prevResult={}), CNI_IFNAME="eth5").code == 4
        assert node.pods() == set()
        assert node.call("ADD", netns).code == 0
        assert node.call("DEL", netns).code == 0

    def test_add_13(self, node):
        pods = [f"many{n}" for n in range(64)]
        spaces = [Netns(wired=True).__enter__() for _ in pods]
        try:
            with concurrent.futures.ThreadPoolExecutor(64) as pool:
                configs = [
                    node.plugin.config(prevResult=previous(f"10.77.1.{n + 1}/24"), timeout=30)
                    for n in range(64)
                ]
                adds = list(
                    pool.map(
                        lambda x: node.call("ADD", x[0], x[1], pod=x[2]),
                        zip(spaces, configs, pods, strict=True),
                    )
                )
                assert [called.result["ips"][0]["address"] for called in adds] == [
                    f"10.77.1.{n + 1}/24" for n in range(64)
                ]
                assert len(node.pods()) == 64
                dels = list(
                    pool.map(lambda x: node.call("DEL", x[0], pod=x[1]), zip(spaces, pods, strict=True))
                )
                assert {called.status for called in dels} == {0}
            assert node.pods() == set()
        finally:
            for space in spaces:
                space.remove()

    def test_add_14(self, node):
        with Netns("eth0", "net1", wired=True) as netns:
            assert node.call("ADD", netns).code == 0
            second = node.plugin.config(prevResult=previous("10.77.9.9/24", interface="net1"))
            assert node.call("ADD", netns, second, CNI_IFNAME="net1").code == 0
            assert node.pods() == {("c-web", "eth0"), ("c-web", "net1")}
            assert node.call("DEL", netns, second, CNI_IFNAME="net1").code == 0
            assert node.pods() == {("c-web", "eth0")}
            assert node.call("CHECK", netns).code == 0
            assert node.call("DEL", netns).code == 0

    def test_add_15(self, node, netns):
        for _ in range(3):
            assert node.call("ADD", netns).result == previous()
            assert node.call("DEL", netns).code == 0

    def test_add_16(self, node, netns):
        network(netns, node.plugin.config(prevResult=previous()))
        before = _sockets_and_rules(netns)
        assert node.call("ADD", netns, pod="plain").result == previous()
        assert _sockets_and_rules(netns) == before
        assert node.call("DEL", netns, pod="plain").code == 0

    def test_add_17(self, node, netns):
        runtime = {
            "portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": {"ingressRate": 1},
            "mac": "02:00:00:00:00:09",
            "ips": ["10.0.0.1/8"],
            "io.kubernetes.cri.pod-annotations": {"a": "b"},
        }
        config = node.plugin.config(prevResult=previous(), runtimeConfig=runtime)
        assert node.call("ADD", netns, config).code == 0
        assert node.call("DEL", netns, config).code == 0

    def test_add_18(self, node, netns):
        before = (os.stat("/proc/self/ns/net").st_ino, _host_links())
        assert node.call("ADD", netns).code == 0
        assert node.call("DEL", netns).code == 0
        assert (os.stat("/proc/self/ns/net").st_ino, _host_links()) == before
        assert _holders(netns) == []


def _sockets_and_rules(netns: Netns) -> str:
    commands = "ss -Htuanp; ip rule; ip route show table all; ip link"
    return subprocess.run(
        ["ip", "netns", "exec", netns.name, "sh", "-c", commands], capture_output=True, text=True, check=True
    ).stdout


def _host_links() -> str:
    return (
        subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
        .stdout.count("veth")
        .__str__()
    )


def _holders(netns: Netns) -> list[str]:
    """Open descriptors of a namespace, in any process."""
    inode = netns.path.stat().st_ino
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == f"net:[{inode}]":
                found.append(str(fd))
        except OSError:
            continue
    return found


class TestDel:
    def test_del_01(self, node, netns):
        network(netns, node.plugin.config(prevResult=previous()))
        before = _sockets_and_rules(netns)
        assert node.call("ADD", netns).code == 0
        called = node.call("DEL", netns)
        assert (called.status, called.stdout) == (0, "")
        assert node.pods() == set()
        assert _sockets_and_rules(netns) == before
        assert _holders(netns) == []

    def test_del_02(self, node, netns):
        assert node.call("ADD", netns).code == 0
        for _ in range(3):
            assert node.call("DEL", netns).code == 0

    def test_del_03(self, node, netns):
        assert node.call("DEL", netns, CNI_CONTAINERID="never-added").code == 0

    def test_del_04(self, node, netns):
        assert node.call("ADD", netns).code == 0
        assert node.call("DEL", None).code == 0
        assert node.pods() == set()

    def test_del_05(self, node, netns):
        assert node.call("ADD", netns).code == 0
        netns.remove()
        assert node.call("DEL", netns).code == 0
        assert node.pods() == set()

    def test_del_06(self, node, netns):
        for config in (
            node.plugin.config(),
            node.plugin.config(prevResult={}),
            node.plugin.config(prevResult=None),
        ):
            assert node.call("ADD", netns).code == 0
            assert node.call("DEL", netns, config).code == 0
            assert node.pods() == set()

    @pytest.mark.parametrize(("case", "name"), [("del_07", "CNI_CONTAINERID"), ("del_08", "CNI_IFNAME")])
    def test_del_07_and_08(self, node, netns, case, name):
        called = node.call("DEL", netns, **{name: None})
        assert called.code == 4
        assert name in called.text

    @pytest.mark.parametrize("way", ["killed", "hanging"])
    def test_del_09(self, fresh, netns, way):
        fresh.agent.start()
        assert fresh.call("ADD", netns).code == 0
        if way == "killed":
            fresh.agent.kill()
        else:
            fresh.agent.pause()
        called = fresh.call("DEL", netns, fresh.impatient)
        assert (called.status, called.stdout) == (0, "")
        assert "left for later" in called.stderr
        assert len(os.listdir(fresh.agent.run / protocol.NOTES)) == 1
        if way == "killed":
            fresh.agent.start()
        else:
            fresh.agent.resume()
        _wait(lambda: fresh.pods() == set() and not os.listdir(fresh.agent.run / protocol.NOTES), 8)
        assert _holders(netns) == []

    def test_del_09_then_added_again(self, fresh, netns):
        """The note of an earlier DEL never takes away what a later ADD made."""
        fresh.agent.start()
        assert fresh.call("ADD", netns).code == 0
        fresh.agent.kill()
        assert fresh.call("DEL", netns).code == 0
        fresh.agent.start()
        assert fresh.call("ADD", netns).code == 0
        assert os.listdir(fresh.agent.run / protocol.NOTES) == []
        assert fresh.pods() == {("c-web", "eth0")}
        assert fresh.call("CHECK", netns).code == 0

    def test_del_09_without_any_agent_ever(self, tmp_path, netns):
        plugin = Plugin(tmp_path / "bin", Path("/proc/nowhere"))
        assert plugin.call("DEL", CNI_CONTAINERID="c", CNI_IFNAME="eth0").code == 0

    def test_del_10(self, node, netns):
        assert node.call("ADD", netns, node.plugin.config(prevResult={}), CNI_IFNAME="eth5").code == 4
        assert node.call("DEL", netns, CNI_IFNAME="eth5").code == 0
        assert node.pods() == set()
        assert _holders(netns) == []

    @pytest.mark.parametrize("interface", ["there", "gone"])
    def test_del_11(self, node, netns, interface):
        assert node.call("ADD", netns).code == 0
        if interface == "gone":
            subprocess.run(["ip", "-n", netns.name, "link", "del", "eth0"], check=True)
        assert node.call("DEL", netns).code == 0
        assert node.pods() == set()

    def test_del_12(self, node, netns):
        assert node.call("ADD", netns, CNI_CONTAINERID="first").code == 0
        assert node.call("ADD", netns, CNI_CONTAINERID="second").code == 0
        assert node.call("DEL", netns, CNI_CONTAINERID="first").code == 0
        assert node.pods() == {("second", "eth0")}
        assert node.call("CHECK", netns, CNI_CONTAINERID="second").code == 0
        assert node.call("DEL", netns, CNI_CONTAINERID="second").code == 0

    def test_del_13(self, node, netns):
        assert node.call("ADD", netns).code == 0
        config = node.plugin.config(unknownPods="pass", logLevel="error", timeout=1, pinDir="/elsewhere")
        assert node.call("DEL", netns, config).code == 0
        assert node.pods() == set()


def _wait(condition: Any, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class TestCheck:
    def test_chk_01(self, node, added):
        called = node.call("CHECK", added)
        assert (called.status, called.stdout) == (0, "")

    def test_chk_02(self, node, added):
        assert node.call("CHECK", added, node.plugin.config()).code == 7

    @pytest.mark.skipif(MODULE != REAL, reason="needs the real kernel")
    def test_chk_03(self, node, added):
        subprocess.run(["ip", "-n", added.name, "rule", "flush"], check=True)
        called = node.call("CHECK", added)
        assert called.code != 0
        assert "rule" in called.text

    @pytest.mark.skipif(MODULE != REAL, reason="needs the real kernel")
    @pytest.mark.parametrize("way", ["from", "to"])
    def test_chk_03_program_of_the_veth(self, node, added, way):
        pins = node.agent.pins / f"v{wire.ABI}/veth"
        # It is judged by filters until links take over.
        wait_until(lambda: len(list(pins.glob("[0-9]*"))) == 2, 10, "it has its links")
        (path,) = pins.glob(f"[0-9]*_{way}")
        link = links.open_pin(str(path))
        try:
            links.detach(link)
        finally:
            os.close(link)
        called = node.call("CHECK", added)
        assert called.code == protocol.ERR_TRY_AGAIN
        assert f"({way} the pod)" in called.text
        assert "no program on interface" in called.text

    def test_chk_04(self, node, added):
        ip = ["ip", "-n", added.name]
        subprocess.run([*ip, "addr", "add", "10.77.0.99/24", "dev", "eth0"], check=True)
        subprocess.run([*ip, "route", "add", "10.250.0.0/16", "dev", "eth0"], check=True)
        subprocess.run(
            ["ip", "netns", "exec", added.name, "sysctl", "-qw", "net.ipv4.tcp_timestamps=0"], check=True
        )
        assert node.call("CHECK", added).code == 0

    def test_chk_05(self, fresh, netns):
        fresh.agent.start()
        assert fresh.call("ADD", netns).code == 0
        fresh.agent.kill()
        assert fresh.call("CHECK", netns).code == 11

    @pytest.mark.parametrize("name", ["CNI_NETNS", "CNI_CONTAINERID", "CNI_IFNAME"])
    def test_chk_06(self, node, added, name):
        called = node.call("CHECK", added, **{name: None})
        assert called.code == 4
        assert name in called.text

    def test_chk_07(self, node, netns):
        assert node.call("ADD", netns).code == 0
        netns.remove()
        assert node.call("CHECK", netns).code != 0
        assert node.call("DEL", netns).code == 0

    def test_chk_07_never_added(self, node, netns):
        assert node.call("CHECK", netns).code == 3

    def test_chk_07_another_namespace(self, node, added):
        with Netns(wired=True) as other:
            assert node.call("CHECK", other).code == 4

    def test_chk_08(self, node, added):
        assert (
            node.call("CHECK", added, node.plugin.config("0.3.1", prevResult=previous(version="0.3.1"))).code
            == 1
        )
        assert (
            node.call("CHECK", added, node.plugin.config("0.4.0", prevResult=previous(version="0.4.0"))).code
            == 0
        )

    def test_chk_09(self, node, netns):
        assert node.call("ADD", netns, pod="plain").code == 0
        assert node.call("CHECK", netns, pod="plain").code == 0
        assert node.call("DEL", netns, pod="plain").code == 0

    def test_chk_10(self, node, added):
        before = (_sockets_and_rules(added), (node.agent.state / "pods.json").read_bytes())
        assert node.call("CHECK", added).code == 0
        assert node.call("CHECK", added, CNI_CONTAINERID="other").code == 3
        assert (_sockets_and_rules(added), (node.agent.state / "pods.json").read_bytes()) == before

    def test_chk_11(self, node, added):
        subprocess.run(["ip", "-n", added.name, "addr", "flush", "dev", "eth0"], check=True)
        assert node.call("CHECK", added).code == 0

    @pytest.mark.skipif(MODULE != REAL, reason="needs the real kernel")
    def test_chk_11_interface(self, node, added):
        """With it our programs are gone."""
        subprocess.run(["ip", "-n", added.name, "link", "del", "eth0"], check=True)
        called = node.call("CHECK", added)
        assert called.code == protocol.ERR_TRY_AGAIN
        assert "no veth of the node has 10.77.0.2 at its other end" in called.text


class TestStatus:
    def test_sta_01(self, node):
        called = node.plugin.call("STATUS")
        assert (called.status, called.stdout) == (0, "")

    @pytest.mark.skipif(MODULE != REAL, reason="needs the real kernel")
    def test_sta_02(self, fresh):
        fresh.agent.start()
        fresh.agent.kill()
        assert fresh.plugin.call("STATUS").code == 50

    def test_sta_03(self, fresh):
        assert fresh.plugin.call("STATUS").code == 51

    def test_sta_04(self, node):
        assert node.plugin.call("STATUS", CNI_PATH=None).code == 0

    def test_sta_06(self, fresh, netns):
        assert fresh.plugin.call("STATUS").code == 51
        fresh.agent.start()
        assert fresh.call("ADD", netns).code == 0

    def test_sta_07(self, node):
        assert node.plugin.call("STATUS", node.plugin.config("1.0.0")).code == 1

    def test_sta_08(self, fresh):
        fresh.agent.start()
        fresh.agent.pause()
        begin = time.monotonic()
        called = fresh.plugin.call("STATUS", fresh.plugin.config(timeout=0.5))
        fresh.agent.resume()
        assert called.code in (50, 51)
        assert time.monotonic() - begin < 2.5

    def test_sta_08_not_ready(self, tmp_path):
        agent = AgentProcess(tmp_path, module=MODULE)
        plugin = Plugin(tmp_path / "bin", agent.run)
        with agent:
            called = plugin.call("STATUS")
            assert called.code == 50
            assert "controller" in called.text


class TestGarbageCollection:
    @staticmethod
    def gc(node: Node, *valid: tuple[str, str], name: str = "pods", **more: Any) -> Called:
        listed = [{"containerID": container, "ifname": ifname} for container, ifname in valid]
        config = node.plugin.config() | {"cni.dev/valid-attachments": listed, "name": name} | more
        return node.plugin.call("GC", config)

    @pytest.fixture
    def three(self, node):
        pods = ["web", "many1", "many2"]
        spaces = [Netns("eth0", "net1", wired=True).__enter__() for _ in pods]
        try:
            for number, (pod, space) in enumerate(zip(pods, spaces, strict=True)):
                config = node.plugin.config(prevResult=previous(f"10.77.2.{number + 1}/24"))
                assert node.call("ADD", space, config, pod=pod).code == 0
            yield spaces
        finally:
            for pod, space in zip(pods, spaces, strict=True):
                node.call("DEL", space, pod=pod)
                space.remove()
            assert node.pods() == set()

    def test_gc_01(self, node, three):
        called = self.gc(node, ("c-web", "eth0"))
        assert (called.status, called.stdout) == (0, "")
        assert node.pods() == {("c-web", "eth0")}
        assert node.call("CHECK", three[0]).code == 0

    def test_gc_02(self, node, three):
        assert self.gc(node, name="other").code == 0
        assert len(node.pods()) == 3
        assert self.gc(node).code == 0
        assert node.pods() == set()

    def test_gc_03(self, node, three):
        for config in (node.plugin.config(), node.plugin.config(**{"cni.dev/valid-attachments": None})):
            assert node.plugin.call("GC", config).code == 7
        assert len(node.pods()) == 3
        broken = node.plugin.config(**{"cni.dev/valid-attachments": [{"containerID": "x"}]})
        assert node.plugin.call("GC", broken).code == 7
        assert len(node.pods()) == 3

    def test_gc_04(self, node):
        assert self.gc(node).code == 0

    def test_gc_05(self, node):
        config = node.plugin.config(**{"cni.dev/valid-attachments": []})
        assert node.plugin.call("GC", config, CNI_PATH=None).code == 0

    def test_gc_07(self, node, three):
        second = node.plugin.config(prevResult=previous("10.77.9.9/24", interface="net1"))
        assert node.call("ADD", three[0], second, CNI_IFNAME="net1").code == 0
        assert self.gc(node, ("c-web", "net1")).code == 0
        assert node.pods() == {("c-web", "net1")}
        assert self.gc(node).code == 0

    def test_gc_08(self, fresh):
        assert self.gc(fresh).code == 11

    def test_gc_09(self, node):
        assert self.gc(node, cniVersion="1.0.0").code == 1

    def test_gc_10(self, node):
        assert self.gc(node, ("unknown", "eth0")).code == 0
        assert node.pods() == set()


class TestOneThatFails:
    """Cases that need a kernel that fails on demand; the plugin and the agent's sockets are real."""

    def test_sta_05(self, failing_node):
        called = failing_node.plugin.call("STATUS")
        assert called.code == 50
        assert "pods" in called.text

    def test_gc_06(self, failing_node):
        with Netns(wired=True) as first, Netns(wired=True) as second:
            assert failing_node.call("ADD", first, pod="many1").code == 0
            config = failing_node.plugin.config(prevResult=previous("10.77.0.3/24"))
            assert failing_node.call("ADD", second, config, pod="many2").code == 0
            called = TestGarbageCollection.gc(failing_node)
            assert called.code == 11
            assert "c-many1" in called.text
            assert "c-many2" not in called.text

    @pytest.fixture
    def failing_node(self, tmp_path, monkeypatch):
        made = Node(tmp_path)
        made.agent.module = "tests.agent.fakes"
        monkeypatch.setenv("FAKE_KERNEL_FAILS", "remove-first,pressure")
        try:
            made.agent.start()
            yield made
        finally:
            made.agent.clean_up()


def test_agent_that_talks_nonsense(tmp_path, netns):
    """Whatever sits at the other end, the runtime gets an error that it can retry."""
    run = tmp_path / "run"
    run.mkdir()
    plugin = Plugin(tmp_path / "bin", run)
    environment = {**_environment(netns), "CNI_ARGS": "K8S_POD_UID=u"}
    for answer in (
        b"",
        b"nonsense",
        b"[]",
        b"{}",
        b'{"version": 99, "code": 0}',
        b'{"version": 1, "code": "0"}',
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.bind(str(run / "cni.sock"))
            server.listen()
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                config = plugin.config(prevResult=previous(), timeout=0.5)
                called = pool.submit(plugin.call, "ADD", config, **environment)
                sock, _ = server.accept()
                with sock:
                    sock.recv(1 << 17)
                    if answer:
                        sock.send(answer)
                assert called.result().code == 11, answer
        (run / "cni.sock").unlink()


def test_every_behaviour_is_tested_or_listed(shared, conformance_count, request):
    cases = {
        case["id"]
        for case in json.loads((shared / "conformance/cni/behaviours.json").read_text())["behaviours"]
    }
    source = Path(__file__).read_text() + Path(__file__).with_name("test_chaining.py").read_text()
    tested = {f"{a.upper()}-{b}" for a, b in re.findall(r"def test_([a-z]{3}|io|gc)_(\d\d)", source)}
    for first, last in re.findall(r"def test_(\w{2,3}_\d\d)_(?:to|and)_(\d\d)", source):
        kind, _, number = first.partition("_")
        tested |= {f"{kind.upper()}-{n:02}" for n in range(int(number), int(last) + 1)}
    assert tested == cases
    conformance_count("cni", len(tested), len(cases), 0)
