"""``mycel why`` and ``mycel bpf`` beside real connections: what they say is what happens, and what the policies say.

Each verdict is asked for and tried. Then entries of tables are changed by hand under the agent: the kernel's word follows them,
connections do too, and the difference is told.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cli import why as asking
from cli.agents import Agent, Agents
from cli.http import Direct
from lab import Lab, Place, Pod
from lab.processes import wait_until
from tests.mesh.helpers import (
    ECHO,
    HTTP,
    authorization_policy,
    echoes,
    eventually,
    fetch,
    peer_authentication,
    rule,
)

pytestmark = pytest.mark.privileged

NAMESPACE = "why"
OUTSIDE = "why-outside"
DATAGRAMS = 5353
PINS = "/sys/fs/bpf/mycel"


@dataclass(frozen=True)
class World:
    """A server on each node, clients on the first, one of them outside of the mesh; services before the servers."""

    server: Pod
    far: Pod
    client: Pod
    bob: Pod
    stranger: Pod
    echo: str  #: service of both servers, L4
    web: str  #: of both, L7


@pytest.fixture(scope="module")
def world(lab: Lab) -> World:
    lab.namespace(NAMESPACE)
    lab.namespace(OUTSIDE, mesh=False)
    servers = []
    for name, node in (("server", "node1"), ("far", "node2")):
        pod = lab.pod(
            name, node=node, namespace=NAMESPACE, service_account="server", labels={"app": "server"}
        )
        pod.serve(pod.app("tcp_server", ECHO, "--greet"), ECHO)
        pod.serve(pod.app("http_server", HTTP, "--name", name), HTTP)
        pod.serve(pod.app("udp", "serve", "0.0.0.0", DATAGRAMS, name))
        servers.append(pod)
    client, bob = (
        lab.pod(name, namespace=NAMESPACE, service_account=name, labels={"app": name})
        for name in ("client", "bob")
    )
    stranger = lab.pod("stranger", namespace=OUTSIDE)
    for pod in (client, bob, stranger):
        pod.set_ready(True)
    selector = {"app": "server"}
    echo = lab.service(
        "echo",
        namespace=NAMESPACE,
        selector=selector,
        ports=[
            {"name": "tcp", "port": 80, "targetPort": ECHO, "protocol": "TCP"},
            {"name": "dns", "port": 53, "targetPort": DATAGRAMS, "protocol": "UDP"},
        ],
    )
    web = lab.service("web", 80, target_port=HTTP, namespace=NAMESPACE, selector=selector)
    lab.apply(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": NAMESPACE},
            "spec": {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]},
        }
    )
    lab.settle()
    for pod in servers:
        wait_until(partial(pod.listening, DATAGRAMS, kind="udp"), 5.0, "the UDP server serves")
    return World(servers[0], servers[1], client, bob, stranger, echo, web)


class Through(Direct):
    """The agents' pages, from this process; an address is a node's name."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def read_text(self, address: str, path: str, *, who: str) -> str:
        return self._lab.get(address, "agent", path).decode()


def why(
    lab: Lab, source: str, destination: str, *, udp: bool = False, node: str | None = None
) -> dict[str, Any]:
    """What the command would write as JSON."""
    agents = Agents(Through(lab), [Agent(one.name, one.name) for one in lab.nodes], where="the lab")
    return asking.ask(agents, source, destination, protocol="udp" if udp else "tcp", node=node)


def reasons(answer: Mapping[str, Any]) -> dict[str, str]:
    """By endpoint: ``allowed``, or why not."""
    return {e["address"]: e["reason"] or "allowed" for e in answer["endpoints"]}


def ways(answer: Mapping[str, Any]) -> dict[str, str]:
    return {e["address"]: e["way"] for e in answer["endpoints"]}


def asks(client: Place, address: str, port: int = DATAGRAMS) -> bool:
    """Whether a datagram is answered."""
    done = client.run(client.app("udp", "ask", address, port, "hello"), check=False, timeout=15)
    return done.returncode == 0


def name(pod: Pod) -> str:
    return f"{pod.record.namespace}/{pod.record.name}"


def test_every_way_that_a_connection_may_go(lab: Lab, world: World):
    client, server, far = name(world.client), world.server.address, world.far.address
    answer = why(lab, client, f"{name(world.server)}:{ECHO}")
    assert (answer["verdict"], ways(answer), answer["differences"]) == ("allowed", {server: "direct"}, [])
    assert answer["endpoints"][0]["splice"] in (True, False)
    answer = why(lab, client, f"echo.{NAMESPACE}:tcp")
    assert (answer["verdict"], answer["differences"]) == ("allowed", [])
    assert ways(answer) == {server: "direct", far: "captured:15001"}
    assert {e["address"]: (e["node"], e["share"]) for e in answer["endpoints"]} == {
        server: ("node1", 0.5),
        far: ("node2", 0.5),
    }
    answer = why(lab, client, f"web.{NAMESPACE}.svc.cluster.local:80")
    assert (answer["verdict"], answer["differences"]) == ("allowed", [])
    assert answer["steps"][-1]["facts"] == {"way": "captured:15002"}
    assert set(ways(answer)) == {server, far}
    answer = why(lab, client, f"{world.client.address}:{ECHO}")
    assert (answer["verdict"], ways(answer)) == ("allowed", {world.client.address: "self"})
    answer = why(lab, name(world.far), f"{client}:{ECHO}")
    assert (answer["node"], answer["verdict"], answer["differences"]) == ("node2", "allowed", [])
    answer = why(lab, name(world.stranger), f"{name(world.server)}:{ECHO}")
    assert (answer["verdict"], ways(answer), answer["differences"]) == ("allowed", {server: "plain"}, [])
    answer = why(lab, client, f"echo.{NAMESPACE}:dns", udp=True)
    assert (answer["verdict"], set(ways(answer).values()), answer["differences"]) == (
        "allowed",
        {"datagram"},
        [],
    )
    answer = why(lab, client, f"{name(world.server)}:15008")
    assert (answer["verdict"], answer["reason"]) == ("refused", "own-port")
    if world.server.address6:
        answer = why(lab, client, f"[{world.server.address6}]:{ECHO}")
        assert (answer["verdict"], ways(answer), answer["differences"]) == (
            "allowed",
            {world.server.address6: "direct"},
            [],
        )
    done = lab.mycel("why", client, f"echo.{NAMESPACE}:80", "-o", "json")
    assert (json.loads(done.stdout)["verdict"], done.returncode) == ("allowed", 0)
    text = lab.mycel("why", client, f"echo.{NAMESPACE}:80").stdout
    assert f"from  {client} ({world.client.address}) on node1" in text
    assert "ALLOWED (captured:15001, direct)" in text


def network_policy(app: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": app, "namespace": NAMESPACE},
        "spec": {"podSelector": {"matchLabels": {"app": app}}, **spec},
    }


def authorization(**more: Any) -> dict[str, Any]:
    return authorization_policy("server", NAMESPACE, selector={"app": "server"}, **more)


BOB = {"podSelector": {"matchLabels": {"app": "bob"}}}
DENY_CLIENT = authorization(action="DENY", rules=[rule(principals=[f"{NAMESPACE}/client"])])

#: By name: objects, who is refused at the servers, by which reason, and the policies that are named.
CASES: dict[str, tuple[Sequence[dict[str, Any]], set[str], str, str]] = {
    "deny": ([DENY_CLIENT], {"client"}, "policy", f"{NAMESPACE}/server"),
    "allow": (
        [authorization(rules=[rule(principals=[f"{NAMESPACE}/bob"])])],
        {"client", "stranger"},
        "policy",
        f"{NAMESPACE}/server",
    ),
    "other-port": ([authorization(action="DENY", rules=[rule(ports=[ECHO + 1])])], set(), "", ""),
    "strict": ([peer_authentication(NAMESPACE, "STRICT")], {"stranger"}, "policy", ""),
    "ingress": (
        [network_policy("server", ingress=[{"from": [BOB]}])],
        {"client", "stranger"},
        "network-policy",
        f"{NAMESPACE}/server",
    ),
    "egress": (
        [network_policy("client", policyTypes=["Egress"], egress=[{"to": [BOB]}])],
        {"client"},
        "network-policy",
        f"{NAMESPACE}/client",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_it_says_is_what_happens(lab: Lab, world: World, case: str):
    """For three clients, both servers, TCP and UDP."""
    objects, refused, reason, policy = CASES[case]
    clients = {"client": world.client, "bob": world.bob, "stranger": world.stranger}
    servers = {"server": world.server, "far": world.far}

    def both(who: str, which: str, protocol: str) -> tuple[bool, dict[str, Any]]:
        client, server = clients[who], servers[which]
        if protocol == "udp":
            happened = asks(client, server.address)
            answer = why(lab, name(client), f"{name(server)}:{DATAGRAMS}", udp=True)
        else:
            happened = echoes(client, server.address, ECHO, timeout=4) == ""
            answer = why(lab, name(client), f"{name(server)}:{ECHO}")
        return happened, answer

    with lab.applied(list(objects), name=f"why-{case}.yaml"), ThreadPoolExecutor(4) as threads:
        asked = [
            (who, which, protocol)
            for who in clients
            for which in servers
            for protocol in ("tcp", "udp")
            # Every refused datagram is waited for.
            if protocol == "tcp" or which == "server" or who != "stranger"
        ]
        for (who, which, protocol), (happened, answer) in zip(
            asked, threads.map(lambda one: both(*one), asked), strict=True
        ):
            about = f"{case}: {who} to {which} by {protocol}: {json.dumps(answer, indent=1)}"
            assert happened is (who not in refused), about
            assert answer["verdict"] == ("refused" if who in refused else "allowed"), about
            assert answer["differences"] == [], about
            (endpoint,) = answer["endpoints"]
            if who in refused:
                assert endpoint["reason"] == reason, about
                assert (policy in endpoint["policies"]) is bool(policy), about


def test_l7_names_the_endpoint_that_refuses(lab: Lab, world: World):
    deny = authorization(action="DENY", rules=[rule(principals=[f"{NAMESPACE}/client"], ports=[HTTP])])
    with lab.applied(deny, name="why-l7.yaml"):
        answer = why(lab, name(world.client), f"web.{NAMESPACE}:80")
        assert reasons(answer) == {world.server.address: "policy", world.far.address: "policy"}
        assert answer["differences"] == []
        statuses = {one.get("status") for one in fetch(world.client, f"http://{world.web}/", count=4)}
        assert statuses
        assert 200 not in statuses
    assert why(lab, name(world.client), f"web.{NAMESPACE}:80")["verdict"] == "allowed"


def test_the_nodes_own_processes(lab: Lab, world: World):
    server = f"{name(world.server)}:{ECHO}"
    with lab.applied(peer_authentication(NAMESPACE, "STRICT"), name="why-probe.yaml"):
        for source, happens in (
            ("kubelet", lab.probe(world.server, ECHO)),
            ("host", echoes(lab.node("node1"), world.server.address, ECHO, timeout=4) == ""),
        ):
            answer = why(lab, source, server, node="node1")
            assert answer["verdict"] == ("allowed" if happens else "refused")
            assert happens is (source == "kubelet")
            assert answer["differences"] == []
        # A block that the node is in refuses no probe.
        everybody = authorization(
            action="DENY", rules=[{"from": [{"source": {"ipBlocks": ["0.0.0.0/0", "::/0"]}}]}]
        )
        with lab.applied(everybody, name="why-blocks.yaml"):
            assert lab.probe(world.server, ECHO)
            answer = why(lab, "kubelet", server, node="node1")
            assert (answer["verdict"], answer["differences"]) == ("allowed", [])
    # Our own ports are nobody's.
    for source in ("kubelet", "host"):
        answer = why(lab, source, f"{name(world.server)}:15001", node="node1")
        assert (reasons(answer), answer["differences"]) == ({world.server.address: "not-captured"}, [])
    assert not lab.probe(world.server, 15001)
    assert echoes(lab.node("node1"), world.server.address, 15001, timeout=4) != ""


# Entries changed by hand


def on_node(lab: Lab, node: str, code: str) -> str:
    """Run Python on a node, where ``open_map(NAME)`` is one of its pinned maps; what it prints."""
    head = (
        "import struct\nfrom bpf import schema, wire\nfrom bpf.maps import Map\n"
        f"open_map = lambda name: Map.open('{PINS}/v%d/%s' % (wire.ABI, name))\n"
    )
    return lab.node(node).run([sys.executable, "-c", head + code], timeout=20).stdout.strip()


def refuse_everybody(lab: Lab, world: World) -> None:
    """The server's table of verdicts becomes an empty one."""
    on_node(
        lab,
        "node1",
        f"""
netns = wire.Peer.unpack(open_map('peers').lookup(wire.pack_address('{world.server.address}'))).netns
model = schema.INNER_POLICY
with Map.create(model.type, model.name, model.key_size, model.value_size, 4, flags=model.flags) as inner:
    inner.update(wire.PolicyKey(wire.POLICY_GENERATION, 0).pack(), struct.pack('=I', 77))
    open_map('policies').update(struct.pack('=Q', netns), struct.pack('=i', inner.fd))
""",
    )


def forget_the_peer(lab: Lab, world: World) -> None:
    on_node(lab, "node1", f"open_map('peers').delete(wire.pack_address('{world.server.address}'))")


def isolate_the_client(lab: Lab, world: World) -> None:
    on_node(
        lab,
        "node1",
        f"""
netns = wire.Peer.unpack(open_map('peers').lookup(wire.pack_address('{world.client.address}'))).netns
model = schema.INNER_NETWORK
with Map.create(model.type, model.name, model.key_size, model.value_size, 4, flags=model.flags) as inner:
    open_map('networks').update(wire.NetworkOf(netns, wire.Direction.OUTBOUND).pack(), struct.pack('=i', inner.fd))
""",
    )


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        (refuse_everybody, "refused", "authorization: the kernel refuses (policy), the model has it allowed"),
        (
            isolate_the_client,
            "refused",
            "egress: the kernel refuses (network-policy), the model has it allowed",
        ),
        (forget_the_peer, "refused", "the kernel has no entry, the model one"),
    ],
)
def test_an_entry_that_somebody_changed_is_a_difference(
    lab: Lab, world: World, change: Callable[[Lab, World], None], verdict: str, said: str
):
    client, server = name(world.client), f"{name(world.server)}:{ECHO}"
    found: list[str] = []
    # The agent compares too, and may repair it before it was asked.
    for _ in range(3):
        change(lab, world)
        happened = echoes(world.client, world.server.address, ECHO, timeout=3) == ""
        answer = why(lab, client, server)
        found = answer["differences"]
        if found:
            break
    assert any(said in text for text in found), found
    assert answer["verdict"] == verdict
    if verdict == "refused":
        assert not happened
    assert asking.status(answer) == 1
    _look(lab)
    repaired = eventually(lambda: not why(lab, client, server)["differences"], 60.0)
    assert repaired
    assert eventually(lambda: echoes(world.client, world.server.address, ECHO, timeout=3) == "", 60.0)


def _look(lab: Lab) -> None:
    """The agent compares the kernel with what it wrote, at once."""
    os.kill(lab.process("node1", "agent").pid, signal.SIGUSR1)


def test_a_difference_is_written_in_words(lab: Lab, world: World):
    for _ in range(3):
        refuse_everybody(lab, world)
        done = lab.mycel("why", name(world.client), f"{name(world.server)}:{ECHO}", check=False)
        if "DIFFER" in done.stdout:
            break
    assert done.returncode == 1
    assert "REFUSED: policy" in done.stdout
    assert "THE KERNEL AND THE POLICIES DIFFER" in done.stdout
    _look(lab)
    assert eventually(
        lambda: not why(lab, name(world.client), f"{name(world.server)}:{ECHO}")["differences"], 60.0
    )


# What the kernel has


def mycel_json(lab: Lab, *arguments: str) -> Any:
    return json.loads(lab.mycel(*arguments, "-o", "json").stdout)


def on_pins(lab: Lab, *arguments: str, check: bool = True) -> Any:
    """The command on the node itself, which asks nobody."""
    command = [str(Path(sys.executable).parent / "mycel"), *arguments, "--pins", PINS, "-o", "json"]
    done = lab.node("node1").run(command, timeout=30, check=check)
    return json.loads(done.stdout)


@pytest.fixture
def without_agent(lab: Lab, world: World) -> Iterator[None]:
    lab.kill("node1", "agent")
    try:
        yield
    finally:
        lab.start("node1", "agent")
        lab.settle()


def test_the_agents_status(lab: Lab, world: World):
    done = lab.mycel("agent", "status")
    for text in ("NODE", "node1", "node2", "connected", "l7proxy, nodeproxy"):
        assert text in done.stdout
    one, two = mycel_json(lab, "agent", "status")
    assert (one["node"], two["node"], one["problems"], two["problems"]) == ("node1", "node2", [], [])
    assert one["enrolled"] >= 3
    assert one["attached"] >= 4
    assert one["detached_links"] == []


def test_maps_and_their_elements(lab: Lab, world: World):
    rows = {(r["node"], r["name"]): r for r in mycel_json(lab, "bpf", "maps")}
    assert rows["node1", "pods"]["entries"] >= 3
    assert rows["node1", "pods"]["type"] == "hash"
    assert rows["node2", "peers"]["size"] >= rows["node2", "peers"]["entries"] > 0
    table = lab.mycel("bpf", "maps", "--node", "node1").stdout
    assert "policies" in table
    assert "node2" not in table
    services = mycel_json(lab, "bpf", "maps", "services", "--node", "node1")
    assert any(s["key"]["address"] == world.echo and s["key"]["port"] == 53 for s in services)
    for which in ("pods", "policies", "networks", "listeners", "roles", "counters", "shares", "interfaces"):
        assert mycel_json(lab, "bpf", "maps", which, "--node", "node1") is not None
    done = lab.mycel("bpf", "maps", "nothing", check=False)
    assert done.returncode == 2
    assert "map nothing: there is none; there are roles, pods" in done.stdout
    done = lab.mycel("bpf", "maps", "sockets", check=False)
    assert "map sockets: a socket storage, whose elements only programs see" in done.stdout


def test_verdicts_of_a_pod(lab: Lab, world: World):
    block = {"cidr": "192.0.2.0/24"}
    objects = [
        DENY_CLIENT,
        network_policy("server", ingress=[{"from": [BOB]}, {"from": [{"ipBlock": block}]}]),
    ]
    with lab.applied(objects, name="why-policies.yaml"):
        (shown,) = mycel_json(lab, "bpf", "policies", name(world.server))
        assert shown["node"] == "node1"
        assert shown["selected_by"] == [f"{NAMESPACE}/server"]
        assert shown["network_policies"] == [f"{NAMESPACE}/server"]
        sources = {one["source"]: one["allowed"] for one in shown["authorization"]}
        assert sources[f"{NAMESPACE}/bob"] is True
        assert f"{NAMESPACE}/client" not in sources
        everything = next(c for c in shown["network"]["ingress"] if "192.0.2.0/24" in c["addresses"])
        assert everything["allowed"] == ["everything"]
        assert f"{world.bob.address}/32" in everything["addresses"]
        text = lab.mycel("bpf", "policies", name(world.server)).stdout
        assert f"AuthorizationPolicy {NAMESPACE}/server" in text
        assert "INGRESS" in text
        (pinned,) = on_pins(lab, "bpf", "policies", world.server.address)
        assert pinned["network"] == shown["network"]
        assert len(pinned["authorization"]) == len(shown["authorization"])
    done = lab.mycel("bpf", "policies", f"{NAMESPACE}/nobody", check=False)
    assert done.returncode == 2
    assert f"pod={NAMESPACE}/nobody: no pod of node" in done.stdout


def test_flows_of_a_refused_connection(lab: Lab, world: World):
    with lab.applied(DENY_CLIENT, name="why-flows.yaml"):
        assert echoes(world.client, world.server.address, ECHO, timeout=4) != ""

        def records() -> Any:
            return mycel_json(
                lab,
                "bpf",
                "flows",
                "--node",
                "node1",
                "--verdict",
                "refused",
                "--from",
                f"{NAMESPACE}/client",
            )

        assert eventually(records, 5.0)
        assert {one["reason"] for one in records()} >= {"policy"}
        assert "refused: policy" in lab.mycel("bpf", "flows", "--verdict", "refused").stdout
        sums = mycel_json(lab, "bpf", "flows", "--sums", "--node", "node1")
        assert any(s["reason"] == "policy" and s["source"] == f"{NAMESPACE}/client" for s in sums)


def test_the_pins_alone_are_enough(lab: Lab, world: World, without_agent: None):
    """No agent runs: the same verdicts by the same maps, without names."""
    client, server = world.client.address, world.server.address
    answer = on_pins(lab, "why", client, f"{server}:{ECHO}")
    assert (answer["verdict"], ways(answer)) == ("allowed", {server: "direct"})
    refuse_everybody(lab, world)
    assert echoes(world.client, server, ECHO, timeout=3) != ""
    answer = on_pins(lab, "why", client, f"{server}:{ECHO}", check=False)
    assert (answer["verdict"], reasons(answer)) == ("refused", {server: "policy"})
    answer = on_pins(lab, "why", client, f"{world.echo}:80", check=False)
    assert reasons(answer) == {server: "policy", world.far.address: "allowed"}
    assert "its node decides" in next(e for e in answer["endpoints"] if e["remote"])["unknown"]
    rows = {row["name"]: row for row in on_pins(lab, "bpf", "maps")}
    assert rows["pods"]["entries"] >= 3
    assert on_pins(lab, "bpf", "flows")
    assert len(on_pins(lab, "bpf", "maps", "pods")) == rows["pods"]["entries"]
    done = lab.mycel(
        "why", f"{NAMESPACE}/client", f"{NAMESPACE}/server:{ECHO}", "--from-node", "node1", check=False
    )
    assert done.returncode == 2
    assert "node1" in done.stdout
