"""The plugin without an agent: what starts, what waits, and what the runtime is told."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from cni import protocol
from tests.agent.pods import Netns, workload
from tests.agent.process import AgentProcess
from tests.cni.plugin import Plugin, network, previous

pytestmark = pytest.mark.privileged


@pytest.fixture
def netns():
    with Netns(wired=True) as made:
        yield made


@pytest.fixture
def plugin(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    return Plugin(tmp_path / "bin", run, timeout=0.5, pinDir=str(tmp_path / "pins"))


def add(plugin, netns, namespace, command="ADD", **keys):
    return plugin.call(
        command,
        plugin.config(prevResult=previous(), **keys),
        CNI_CONTAINERID="c",
        CNI_NETNS=str(netns.path),
        CNI_IFNAME="eth0",
        CNI_ARGS=f"K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=p;K8S_POD_UID=uid-p",
    )


def test_namespaces_of_the_configuration_pass_unasked(plugin, netns):
    begin = time.monotonic()
    called = add(plugin, netns, "kube-system", outsideNamespaces=["kube-system", "mycel-system"])
    assert called.result == previous()
    assert time.monotonic() - begin < 0.5
    assert add(plugin, netns, "kube-system", "CHECK", outsideNamespaces=["kube-system"]).code == 0
    assert add(plugin, netns, "kube-systemx", outsideNamespaces=["kube-system"]).code == 11


def test_namespaces_that_the_agent_noted_pass(plugin, netns):
    protocol.write_outside(str(plugin.run_dir), ["default", "other"])
    called = add(plugin, netns, "default")
    assert called.result == previous()
    assert "namespace default is outside" in called.stderr
    refused = add(plugin, netns, "shop")
    assert refused.code == protocol.ERR_TRY_AGAIN
    assert "does not answer" in refused.text


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 9, "outside": ["shop"]}', b'{"version": 1, "outside": "shop"}',
     b'{"version": 1, "outside": [["shop"], null, 1]}', b'"shop"', b"\xff"],
)  # fmt: skip
def test_a_note_that_is_none_lets_nobody_pass(plugin, netns, content):
    (plugin.run_dir / protocol.ENROLMENT).write_bytes(content)
    assert add(plugin, netns, "shop").code == protocol.ERR_TRY_AGAIN


def test_a_pod_without_a_namespace_is_in_none(plugin, netns):
    protocol.write_outside(str(plugin.run_dir), ["", "default"])
    assert add(plugin, netns, "", outsideNamespaces=["kube-system"]).code == protocol.ERR_TRY_AGAIN


@pytest.mark.parametrize("value", ["kube-system", [1], {}, None])
def test_settings_are_checked(plugin, netns, value):
    called = add(plugin, netns, "kube-system", outsideNamespaces=value)
    assert called.code == 7
    assert "outsideNamespaces" in called.text


def test_add_waits_for_an_agent_that_comes_back(tmp_path, netns):
    agent = AgentProcess(tmp_path, workload("web", addresses=()))
    try:
        plugin = Plugin(tmp_path / "bin", agent.run, timeout=30)
        starter = threading.Timer(1.0, agent.start)
        starter.start()
        called = plugin.call(
            "ADD",
            network(netns, plugin.config(prevResult=previous(), timeout=30)),
            CNI_CONTAINERID="c",
            CNI_NETNS=str(netns.path),
            CNI_IFNAME="eth0",
            CNI_ARGS="K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=uid-web",
        )
        starter.join()
        assert called.result == previous()
        assert json.loads((agent.state / "pods.json").read_text())["pods"][0]["pod_uid"] == "uid-web"
    finally:
        agent.clean_up()


def test_status_says_ready_where_the_node_would_be_stuck_else(plugin):
    called = plugin.call("STATUS", plugin.config(nodeStatus="ready"))
    assert (called.status, called.stdout) == (0, "")
    assert "not ready for pods of the mesh" in called.stderr
    assert plugin.call("STATUS").code == 51
    assert plugin.call("STATUS", plugin.config(nodeStatus="maybe")).code == 7


def test_the_note_is_whole_at_every_moment(tmp_path):
    wanted = [[f"n{i}" for i in range(2000)], [f"m{i}" for i in range(3000)]]
    protocol.write_outside(str(tmp_path), wanted[0])
    seen, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            seen.append(protocol.read_outside(str(tmp_path)))

    thread = threading.Thread(target=read)
    thread.start()
    for n in range(100):
        protocol.write_outside(str(tmp_path), wanted[n % 2])
    ended.set()
    thread.join()
    assert all(names in wanted for names in seen)
    assert os.listdir(tmp_path) == [protocol.ENROLMENT]
