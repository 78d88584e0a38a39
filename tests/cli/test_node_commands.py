"""``mycel agent``, ``mycel bpf`` and ``mycel why`` as somebody types them, over agents' pages of two nodes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from agent.debug_why import Why
from agent.kernel.tables import Tables
from agent.mesh import Mesh
from bpf import wire
from cli import agents as reaching
from cli import why
from cli.main import app
from controlplane.api import Action, MtlsMode
from tests.agent.kernel_tables import HOST, Kernel, Node
from tests.agent.shop import ADDRESSES, OUTSIDE, PORT, mesh, policy
from tests.cli.conftest import Serve
from tests.requirements import require_root

REFUSING = {"policies": ("shop/deny",)}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def status(node: str, **more: Any) -> dict[str, Any]:
    return {
        "node": node,
        "version": "0123456789abcdef",
        "controller": {"connected": True, "problem": ""},
        "problem": "",
        "proxies": {"nodeproxy": 1, "l7proxy": 1},
        "unattached": [],
        "attached": 3,
        "enrolled": 2,
        "detached_links": [],
        "repairs": {},
        "refusals": {},
        "splice": {"supported": True, "on": True, "entered": 7, "left": 7, "overflows": 0, "full": 0},
        "fullest": {"name": "pods", "entries": 2, "size": 1024, "refused": 0},
        **more,
    }


class Cluster:
    """Two nodes over real maps, and their agents' addresses."""

    def __init__(self, stack: ExitStack, serve: Serve, state: Mesh) -> None:
        self.nodes = {name: Node(stack.enter_context(Kernel()), state, name) for name in ("n1", "n2")}
        self.served = {name: self._serve(serve, node) for name, node in self.nodes.items()}

    @staticmethod
    def _serve(serve: Serve, node: Node) -> str:
        page = Why(node, lambda: Tables(node.kernel.maps), lambda: frozenset({HOST})).page
        return serve(json={"/debug/status": lambda: status(node.name)}, queries={"/debug/why": page})

    def why(self, *arguments: str, nodes: tuple[str, ...] = ("n1", "n2")) -> Result:
        return run("why", *arguments, *(part for name in nodes for part in ("--agent", self.served[name])))

    def answer(self, *arguments: str) -> dict[str, Any]:
        done = self.why(*arguments, "-o", "json")
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.exit_code == why.status(found)
        return found


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    require_root()
    monkeypatch.setattr(why, "_SETTLE", 0.01)
    with ExitStack() as stack:
        yield stack


@pytest.mark.privileged
def test_both_ends_are_asked(stack: ExitStack, serve: Serve):
    cluster = Cluster(stack, serve, mesh(policy("deny", Action.DENY, "client", ports=(80,)), **REFUSING))
    answer = cluster.answer("shop/client", "web.shop:80")
    assert (answer["verdict"], answer["differences"]) == ("allowed", [])
    far = next(e for e in answer["endpoints"] if e["address"] == ADDRESSES["far"])
    assert [step["step"] for step in far["steps"] if step.get("node") == "n2"] == [
        *("peer", "listener", "arrival", "authorization", "ingress"),
    ]
    # From the other node's point of view, whichever agent is asked first.
    answer = cluster.answer("shop/far", f"{ADDRESSES['server']}:{PORT}")
    assert (answer["node"], answer["verdict"]) == ("n2", "allowed")


@pytest.mark.privileged
def test_a_refusal_at_the_other_end_depends_on_the_endpoint(stack: ExitStack, serve: Serve):
    cluster = Cluster(stack, serve, mesh(policy("deny", Action.DENY, "client"), **REFUSING))
    answer = cluster.answer("shop/client", "web.shop:80")
    assert answer["verdict"] == "depends"
    shown = cluster.why("client.shop", "web.shop:80")
    assert shown.exit_code == 1
    for text in (
        "from  shop/client (10.244.1.5) on n1, spiffe://cluster.local/ns/shop/sa/client",
        "to    shop/web (10.96.0.1:80/TCP)",
        "10.244.1.7:9000  shop/server on n1  50.0%",
        "REFUSED: policy",
        "shop/deny",
        "10.244.2.7:9000  shop/far on n2  50.0%",
        "n2: 10.244.2.7:15008, the node proxy's",
        "DEPENDS ON THE ENDPOINT: policy (captured:15001) by shop/deny",
    ):
        assert text in shown.stdout
    assert "DIFFER" not in shown.stdout


@pytest.mark.privileged
def test_a_difference_is_loud(stack: ExitStack, serve: Serve):
    cluster = Cluster(stack, serve, mesh(policy("deny", Action.DENY, "client"), **REFUSING))
    node = cluster.nodes["n1"]
    netns = node.cookie(node.mesh.workloads["uid-server"])
    node.kernel.policies.set_policy(netns, {(wire.IDENTITY_MESH, 0): True}, 2, {})
    shown = cluster.why("shop/client", f"shop/server:{PORT}")
    assert shown.exit_code == 1
    assert "ALLOWED (direct)" in shown.stdout
    assert "THE KERNEL AND THE POLICIES DIFFER" in shown.stdout
    said = "the kernel allows (an entry), the model has it refused: AuthorizationPolicy shop/deny denies it"
    assert f"DIFFERS: 10.244.1.7:9000 authorization: {said}" in shown.stdout


@pytest.mark.privileged
def test_a_difference_at_the_other_end_is_told_with_its_node(stack: ExitStack, serve: Serve):
    cluster = Cluster(stack, serve, mesh())
    node = cluster.nodes["n2"]
    netns = node.cookie(node.mesh.workloads["uid-far"])
    node.kernel.maps["pods"].delete(struct.pack("=Q", netns))
    answer = cluster.answer("shop/client", f"shop/far:{PORT}")
    assert answer["differences"] == [f"node n2: pods {netns}: the kernel has no entry, the model one"]


@pytest.mark.privileged
def test_udp_is_judged_where_it_arrives(stack: ExitStack, serve: Serve):
    state = mesh(policy("deny", Action.DENY, "far"), mtls=MtlsMode.STRICT, **REFUSING)
    cluster = Cluster(stack, serve, state)
    answer = cluster.answer("shop/far", f"shop/server:{PORT}", "--udp")
    assert (answer["verdict"], answer["endpoints"][0]["reason"]) == ("refused", "policy")
    assert answer["endpoints"][0]["policies"] == ["shop/deny"]
    assert cluster.answer("shop/client", f"shop/server:{PORT}", "--udp")["verdict"] == "allowed"


@pytest.mark.privileged
def test_from_node(stack: ExitStack, serve: Serve):
    cluster = Cluster(stack, serve, mesh(mtls=MtlsMode.STRICT))
    server = f"shop/server:{PORT}"
    assert cluster.answer("kubelet", server)["verdict"] == "allowed"
    assert cluster.answer("host", server)["verdict"] == "refused"
    # Another node's kubelet is nobody here.
    assert cluster.answer("kubelet", server, "--from-node", "n2")["verdict"] == "refused"
    assert cluster.answer(OUTSIDE, server, "--from-node", "n2")["verdict"] == "refused"
    done = cluster.why("shop/client", server, "--from-node", "n2")
    assert (done.exit_code, done.stderr) == (2, "mycel: source shop/client: is on node n1, not on n2\n")
    done = cluster.why("host", server, "--from-node", "n3")
    assert done.exit_code == 2
    assert "node n3: no agent of it is known" in done.stderr
    assert "there are those of n1, n2" in done.stderr


@pytest.mark.privileged
def test_an_end_that_nobody_can_ask_is_not_known(stack: ExitStack, serve: Serve):
    cluster = Cluster(stack, serve, mesh())
    done = cluster.why("shop/client", f"shop/far:{PORT}", nodes=("n1",))
    assert done.exit_code == 2
    assert "NOT KNOWN: its node is not asked: node n2: no agent of it is known" in done.stdout


def test_endpoints_that_nobody_looked_at_are_not_known():
    allowed = {"kernel": "allowed", "reason": ""}
    for left_out, verdict in ((0, "allowed"), (7, "unknown")):
        answer = {"reason": "", "endpoints": [allowed], "endpoints_left_out": left_out}
        assert why.verdict(answer) == verdict


@pytest.mark.privileged
def test_errors_are_the_agents_own_words(stack: ExitStack, serve: Serve):
    cluster = Cluster(stack, serve, mesh())
    for arguments, said in (
        (("shop/nobody", "shop/server:80"), "mycel: source shop/nobody: no pod of that name is known"),
        (
            ("shop/client", "shop/server"),
            "mycel: destination shop/server: there is no port; say shop/server:PORT",
        ),
        (("shop/client", "fd00::1:80"), "an IPv6 address stands in brackets: [fd00::1]:80"),
        (("shop/client", "web.shop:metrics"), "port metrics: no number, and no TCP port of web.shop"),
    ):
        done = cluster.why(*arguments)
        assert done.exit_code == 2
        assert said in done.stderr
        assert done.stdout == ""


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("KUBECONFIG", "MYCEL_CONTROLLER", "MYCEL_AGENT", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(reaching, "HERE", "127.0.0.1:1")
    for arguments in (("agent", "status"), ("bpf", "maps"), ("why", "shop/a", "shop/b:80")):
        done = run(*arguments)
        assert done.exit_code == 2
        assert "the agent does not answer at 127.0.0.1:1" in done.stderr
        assert "and there is no cluster" in done.stderr
        assert "--pins" in done.stderr


def test_an_agent_of_before_has_no_such_page(serve: Serve):
    done = run("why", "shop/a", "shop/b:80", "--agent", serve(json={"/debug/status": lambda: status("n1")}))
    assert done.exit_code == 2
    assert "the agent of node n1" in done.stderr
    assert "has no page /debug/why: it is of another version" in done.stderr


def test_agent_status(serve: Serve):
    well = serve(json={"/debug/status": lambda: status("n1", refusals={"policy": 3})})
    ill = serve(
        json={
            "/debug/status": lambda: status(
                "n2",
                controller={"connected": False, "problem": "no route"},
                proxies={"nodeproxy": 0, "l7proxy": 1},
                unattached=["shop/early"],
                detached_links=["link_connect4"],
                fullest={"name": "peers", "entries": 1000, "size": 1024, "refused": 5},
            )
        }
    )
    done = run("agent", "status", "--agent", well)
    assert done.exit_code == 0, done.stdout
    assert "n1" in done.stdout
    assert "0123456789ab " in done.stdout
    assert "refused in the kernel so far: policy 3" in done.stdout
    done = run("agent", "status", "--agent", ill, "--agent", well)
    assert done.exit_code == 1
    for text in (
        "n2: no controller is connected: no route; the last good configuration is in force",
        "n2: no nodeproxy is connected",
        "n2: link_connect4 is not attached",
        "n2: pod shop/early is to be in the mesh and is not captured",
        "n2: map peers fills up: 1000 of 1024",
    ):
        assert text in done.stdout
    found = json.loads(run("agent", "status", "--agent", ill, "-o", "json").stdout)
    assert len(found[0]["problems"]) == 5
    done = run("agent", "status", "--agent", ill, "--agent", well, "--node", "n1")
    assert (done.exit_code, "n2" in done.stdout) == (0, False)


def test_one_agent_that_does_not_answer_hides_nobody_else(serve: Serve):
    clients = [
        {"component": "agent", "node": node, "admin": admin, "version_acked": "v", "errors": {}}
        for node, admin in (
            ("n1", serve(json={"/debug/status": lambda: status("n1")})),
            ("n2", "127.0.0.1:1"),
        )
    ]
    controller = serve(json={"/debug/clients": lambda: {"version": "v", "clients": clients}})
    done = run("agent", "status", "--controller", controller)
    assert done.exit_code == 2
    assert "n1" in done.stdout
    assert "the agent of node n2 does not answer at 127.0.0.1:1" in done.stderr


ROW = {
    "source": "shop/client",
    "destination": "shop/server",
    "protocol": "tcp",
    "verdict": "refused",
    "reason": "policy",
    "sent": 5,
    "received": 7,
}


def test_flows(serve: Serve):
    asked: list[dict[str, str]] = []

    def newest(query: Any) -> list[dict[str, Any]]:
        asked.append(dict(query))
        ends = {"ended": "2026-01-02T03:04:05.678901Z", "client": "10.0.0.1:4000", "server": "10.0.0.2:80"}
        return [{**ROW, **ends}]

    sums = {**ROW, "port": 80, "direction": "outbound", "opened": 0, "closed": 0, "refused": 4}
    admin = serve(
        json={"/debug/status": lambda: status("n1"), "/debug/flows": lambda: [sums]},
        queries={"/debug/flows": newest},
    )
    done = run("bpf", "flows", "--agent", admin, "--verdict", "refused", "--from", "shop", "--last", "9")
    assert done.exit_code == 0
    assert asked == [{"newest": "9", "verdict": "refused", "source": "shop"}]
    assert "2026-01-02 03:04:05  n1    refused: policy  tcp       10.0.0.1:4000  10.0.0.2:80" in done.stdout
    done = run("bpf", "flows", "--agent", admin, "--sums")
    assert "outbound   refused: policy     0      4" in done.stdout
    assert json.loads(run("bpf", "flows", "--agent", admin, "--sums", "-o", "json").stdout)[0]["node"] == "n1"
    done = run("bpf", "flows", "--agent", admin, "--sums", "--from", "shop")
    assert done.exit_code == 2
    assert "--from is for records" in done.stderr


def test_policies(serve: Serve):
    pod = {
        "pod": "shop/server",
        "addresses": ["10.0.0.2"],
        "generation": 4,
        "mtls": "STRICT",
        "selected_by": ["shop/deny"],
        "authorization": [
            {"source": "shop/client", "identity": 17, "port": 0, "addresses": ["10.0.0.0/8"], "allowed": True}
        ],
        "network_policies": ["shop/in"],
        "network": {
            "ingress": [
                {"class": 0, "addresses": ["0.0.0.0/0"], "allowed": []},
                {"class": 1, "addresses": ["::/0"], "allowed": ["TCP 80"]},
            ]
        },
    }
    closed = {**pod, "pod": "shop/new", "authorization": None, "network": {}}
    page = {"/debug/status": lambda: status("n1"), "/debug/policies": lambda: [pod, closed]}
    lines = run("bpf", "policies", "--agent", serve(json=page)).stdout.splitlines()
    rows = [line.split() for line in lines]
    assert lines[0] == "shop/server (10.0.0.2) on n1, mTLS STRICT"
    assert ["shop/client", "17", "10.0.0.0/8", "any", "other", "ALLOW"] in rows
    assert ["0.0.0.0/0,any", "other", "nothing"] in rows
    assert ["::/0", "TCP", "80"] in rows
    assert "  no table of verdicts: everything is refused" in lines


def test_pins_that_are_not_there(tmp_path: Path):
    for arguments in (
        ("bpf", "maps"),
        ("bpf", "flows"),
        ("bpf", "policies"),
        ("why", "10.0.0.1", "10.0.0.2:80"),
    ):
        done = run(*arguments, "--pins", str(tmp_path))
        assert done.exit_code == 2
        assert str(tmp_path) in done.stderr
    done = run("why", "10.0.0.1", "10.0.0.2:80", "--pins", str(tmp_path), "--from-node", "n1")
    assert done.exit_code == 2
    assert "goes without --from-node" in done.stderr
    done = run("why", "10.0.0.1", "10.0.0.2:0", "--pins", str(tmp_path))
    assert "port 0: not a number from 1 to 65535" in done.stderr
    (tmp_path / "v1").mkdir()
    assert (
        "there is v1, of another version"
        in run("why", "10.0.0.1", "10.0.0.2:80", "--pins", str(tmp_path)).stderr
    )
    done = run("why", "shop/client", "10.0.0.2:80", "--pins", str(tmp_path))
    assert "source shop/client: no address; without an agent only addresses are known" in done.stderr
