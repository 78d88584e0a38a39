"""The agent as a process on the real kernel: start, end, memory, and whom it does not serve."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from agent.state import MESH_FILE
from bpf import wire
from common import seqpacket
from tests.agent.pods import Netns, workload
from tests.agent.process import AgentProcess, connects
from tests.cni.plugin import Plugin, previous
from tests.requirements import ROOT

pytestmark = pytest.mark.privileged

_CLIENT = """
import socket, sys
from agent import api
from common import seqpacket
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
seqpacket.send(sock, api.encode(api.Hello(api.Role(sys.argv[2]))))
sock.settimeout(10)
message = api.decode_from_agent(seqpacket.receive(sock)[0])
print(type(message).__name__, getattr(message, "reason", ""))
"""


@pytest.fixture
def agent(tmp_path):
    with AgentProcess(tmp_path, workload("web"), workload("plain", enrolled=False)) as started:
        yield started


def hello(
    agent: AgentProcess, role: str = "nodeproxy", *, cgroup: str | None = None, netns: Netns | None = None
) -> str:
    """What a proxy is answered that runs in a cgroup below the agent's node's, or in this test's own."""
    command = [sys.executable, "-c", _CLIENT, str(agent.run / "agent.sock"), role]
    if netns is not None:
        command = ["ip", "netns", "exec", netns.name, *command]
    if cgroup is not None:
        folder = agent.cgroup / cgroup
        folder.mkdir(exist_ok=True)
        command = ["/bin/sh", "-c", 'echo $$ >"$0"; exec "$@"', str(folder / "cgroup.procs"), *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def page(agent: AgentProcess, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{agent.admin_port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def test_a_proxy_in_a_cgroup_of_its_own_is_welcome(agent):
    assert hello(agent, cgroup="nodeproxy") == "Welcome"
    assert hello(agent, "l7proxy", cgroup="l7proxy") == "Welcome"


def test_whom_it_does_not_serve(agent, tmp_path):
    assert "is the agent's" in hello(agent, cgroup="agent")
    with Netns(wired=True) as netns:
        netns.add_address("10.77.0.2/24")
        plugin = Plugin(tmp_path / "bin", agent.run)
        environment = {
            "CNI_CONTAINERID": "c",
            "CNI_NETNS": str(netns.path),
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": "K8S_POD_UID=uid-web",
        }
        assert plugin.call("ADD", plugin.config(prevResult=previous()), **environment).code == 0
        assert "pod's network namespace" in hello(agent, cgroup="nodeproxy", netns=netns)
        assert plugin.call("DEL", **environment).code == 0


def test_memory_and_no_compiler_in_it(tmp_path):
    many = [workload(f"w{n}", node="n2", addresses=(f"10.8.{n // 250}.{n % 250 + 1}",)) for n in range(2000)]
    with AgentProcess(tmp_path, *many) as agent:
        page(agent, "/metrics")
        rollup = Path(f"/proc/{agent.pid}/smaps_rollup").read_text()
        pss, rss = (
            int(re.findall(rf"^{name}:\s+(\d+) kB", rollup, re.M)[0]) / 1024 for name in ("Pss", "Rss")
        )
        print(f"agent with 2000 workloads: PSS {pss:.1f} MB, RSS {rss:.1f} MB")
        assert pss <= 60
        # The sixth column: an address may spell anything.
        maps = Path(f"/proc/{agent.pid}/maps").read_text().splitlines()
        files = {fields[5] for fields in (line.split(maxsplit=5) for line in maps) if len(fields) > 5}
        assert [file for file in files if "LLVM" in file or "bcc" in file] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_is_an_upgrade(agent, tmp_path, number):
    with Netns(wired=True) as netns:
        netns.add_address("10.77.0.2/24")
        plugin = Plugin(tmp_path / "bin", agent.run)
        environment = {"CNI_CONTAINERID": "c", "CNI_NETNS": str(netns.path), "CNI_IFNAME": "eth0"}
        pod = {"CNI_ARGS": "K8S_POD_UID=uid-web;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web"}
        config = plugin.config(prevResult=previous())
        assert plugin.call("ADD", config, **environment, **pod).code == 0
        (before,) = json.loads(page(agent, "/debug/pods"))
        assert before["programmed"]
        assert agent.stop(number) == (0 if number == signal.SIGTERM else -number)
        pins = sorted(os.listdir(agent.pins / f"v{wire.ABI}"))
        assert {"link_connect4", "policies", "pods"} <= set(pins)
        assert os.listdir(agent.pins / f"v{wire.ABI}/netns") == [str(before["netns_cookie"])]
        agent.start()
        assert sorted(os.listdir(agent.pins / f"v{wire.ABI}")) == pins
        assert json.loads(page(agent, "/debug/pods")) == [before]
        assert plugin.call("CHECK", config, **environment, **pod).code == 0
        assert plugin.call("DEL", config, **environment).code == 0
        assert os.listdir(agent.pins / f"v{wire.ABI}/netns") == []


def test_there_is_one_agent_at_a_time(agent):
    old = agent.pid
    agent.start(wait=False)
    try:
        agent.wait_for("another agent still runs")
        assert agent.tail(1 << 20).count("agent runs") == 1
    finally:
        os.kill(old, signal.SIGKILL)
        os.waitpid(old, 0)
    agent.wait_ready()
    assert agent.tail(1 << 20).count("agent runs") == 2
    assert connects(agent.run / "cni.sock")


def test_who_may_open_what(agent):
    """The plugin's socket is root's; the proxies' group opens the other, and writes in folders of its own only."""

    def access(name: str) -> tuple[int, int]:
        found = (agent.run / name).stat()
        return found.st_mode & 0o7777, found.st_gid

    assert access("cni.sock") == (0o600, 0)
    assert access("agent.sock") == (0o660, 15008)
    assert access("nodeproxy") == access("l7proxy") == (0o2770, 15008)
    assert access(".")[0] & 0o022 == 0


def test_garbage_on_the_sockets_ends_nothing(agent):
    import socket

    for name in ("agent.sock", "cni.sock"):
        for data in (b"", b"\x00", b"{}", b'{"version": 1, "command": "ADD"}', b"x" * seqpacket.MAX_MESSAGE):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                seqpacket.prepare(sock)
                sock.connect(str(agent.run / name))
                sock.send(data)
                sock.settimeout(5)
                sock.recv(1 << 17)
    assert hello(agent, cgroup="nodeproxy") == "Welcome"


def test_it_says_why_it_cannot_start(tmp_path):
    agent = AgentProcess(tmp_path, workload("web"))
    try:
        agent.pins = tmp_path / "no-bpf-file-system"
        agent.start(wait=False)
        agent.stop(signal.SIGCONT)
        assert "agent cannot run" in agent.tail()
        assert "not on a bpf file system" in agent.tail()
    finally:
        agent.clean_up()


def test_pages(agent):
    assert json.loads(page(agent, "/debug/status"))["node"] == "n1"
    assert json.loads(page(agent, "/debug/flows")) == []
    assert json.loads(page(agent, "/debug/flows?newest=5&verdict=refused")) == []
    with pytest.raises(urllib.error.HTTPError) as bad:
        page(agent, "/debug/flows?newest=all")
    assert (bad.value.code, bad.value.read()) == (400, b"newest=all: not a number from 1 on\n")
    assert json.loads(page(agent, "/debug/connections")) == []
    assert set(json.loads(page(agent, "/debug/tables"))) == {"peers", "services", "pressure"}
    assert page(agent, "/healthz/ready") == "ready\n"
    assert "mycel_agent_controller_connected 0.0" in page(agent, "/metrics")
    assert (agent.state / MESH_FILE).exists()
