"""One proxy after another, as a DaemonSet with ``maxSurge: 1`` replaces them: under traffic, with long connections open."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import Lab, Pod, Talker, Traffic
from lab.processes import Process
from tests.mesh.helpers import ECHO, HTTP, echo_server, echoes, eventually, fetch, http_server

pytestmark = pytest.mark.privileged

NAMESPACE = "surge"
REPLACEMENTS = 10
#: Seconds in which a proxy that was replaced ends: l7proxy keeps connections to another node for half a minute.
ENDS = 45.0


@dataclass(frozen=True)
class World:
    echo: Pod
    far: Pod  #: a client on the other node
    near: Pod
    service: str  #: with L7 policy, of one server on each node


@pytest.fixture(scope="module")
def world(lab: Lab) -> Iterator[World]:
    lab.namespace(NAMESPACE)
    echo = echo_server(lab, "echo", node="node1", namespace=NAMESPACE)
    for node in ("node1", "node2"):
        http_server(lab, f"web-{node}", node=node, namespace=NAMESPACE, labels={"app": "web"})
    service = lab.service("web", 80, target_port=HTTP, namespace=NAMESPACE)
    near = lab.pod("near", node="node1", namespace=NAMESPACE)
    far = lab.pod("far", node="node2", namespace=NAMESPACE)
    route = lab.apply(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": NAMESPACE},
            "spec": {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]},
        }
    )
    lab.settle()
    for client in (near, far):
        assert echoes(client, echo.address, ECHO) == ""
        assert fetch(client, f"http://{service}/")[0]["status"] == 200
    yield World(echo, far, near, service)
    lab.withdraw(route)
    lab.settle()


def http_traffic(client: Pod, service: str, per_connection: int) -> Traffic:
    """Requests until it is ended, each connection used for some of them; not one is tried again."""
    options = ["--count", 1_000_000, "--per-connection", per_connection, "--interval", 0.01]
    return Traffic(client, "http_client", f"http://{service}/", *options)


def failures(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r.get("status") != 200 and r.get("outcome") != "ok"]


def ends(old: Process) -> bool:
    return bool(eventually(lambda: not old.running, timeout=ENDS))


def end(old: Process) -> None:
    old.signal(signal.SIGTERM)


@pytest.mark.parametrize("node", ["node1", "node2"], ids=["of-the-server", "of-the-client"])
def test_node_proxies_one_after_another(lab: Lab, world: World, node: str):
    """New connections, open ones, and requests that go between nodes."""
    ended: list[Process] = []
    with (
        Traffic.echo(world.far, world.echo.address, ECHO) as new,
        http_traffic(world.far, world.service, 50) as requests,
        Talker(world.far) as long,
    ):
        assert long.open(world.echo.address, ECHO).ok
        assert long("read")["text"]
        for number in range(REPLACEMENTS):
            old = lab.surge(node, "nodeproxy")
            # A connection of its own for each, which ends while this one drains.
            assert long.open(world.echo.address, ECHO, key=f"n{number}").ok
            assert long("read", key=f"n{number}")["text"]
            end(old)
            ended.append(old)
            assert long.exchange().ok
            time.sleep(0.2)
        time.sleep(1)
        for number in range(REPLACEMENTS):
            assert long.exchange(key=f"n{number}").ok
            assert long.close(key=f"n{number}").ok
        assert long.exchange().ok
        assert ended[0].running, "it serves its long connection"
        long.close()
        connections, answers = new.end(at_least=51), requests.end(at_least=51)
    assert len(connections) > 50
    assert len(answers) > 50
    assert failures(connections) == []
    assert failures(answers) == []
    # With nothing left to serve they end, and end well.
    for process in ended:
        assert ends(process), process.name
        assert process.exit_status == 0


def test_l7_proxies_one_after_another(lab: Lab, world: World):
    ended: list[Process] = []
    with (
        http_traffic(world.near, world.service, 1) as new,
        http_traffic(world.near, world.service, 1000) as kept,
    ):
        for _ in range(REPLACEMENTS):
            old = lab.surge("node1", "l7proxy")
            end(old)
            ended.append(old)
            time.sleep(0.3)
        time.sleep(1)
        records = {"new": new.end(at_least=51), "kept": kept.end(at_least=51)}
    for name, answers in records.items():
        assert len(answers) > 50, name
        assert failures(answers) == [], name
    # A connection that is kept ends with a response that says so, each time.
    closing = [r for r in records["kept"] if r["headers"].get("connection") == "close"]
    assert len(closing) == REPLACEMENTS
    for process in ended:
        assert ends(process), process.name
        assert process.exit_status == 0


@pytest.mark.parametrize("component", ["nodeproxy", "l7proxy"])
@pytest.mark.parametrize("told", [False, True], ids=["serving", "ending"])
def test_a_successor_that_is_killed(lab: Lab, world: World, component: str, told: bool):
    """The old one takes over again, also if it was told to end, and what it holds never notices."""
    client = world.near if component == "l7proxy" else world.far

    def works() -> bool:
        if component == "l7proxy":
            return bool(fetch(client, f"http://{world.service}/", timeout=5)[0].get("status") == 200)
        return echoes(client, world.echo.address, ECHO, timeout=3) == ""

    with Talker(world.far) as long:
        assert long.open(world.echo.address, ECHO).ok
        assert long("read")["text"]
        old = lab.surge("node1", component)
        if told:
            end(old)
            time.sleep(0.2)
            assert old.running
        lab.kill("node1", component)
        assert eventually(works, timeout=5)
        for _ in range(20):
            assert works()
        assert long.exchange().ok
        assert old.running
        # And the next successor takes over from it.
        lab.start("node1", component)
        if not told:
            end(old)
        assert works()
        assert long.exchange().ok
    assert ends(old)
    assert old.exit_status == 0


def test_a_successor_that_is_killed_before_it_serves(lab: Lab, world: World):
    with Traffic.echo(world.far, world.echo.address, ECHO) as traffic:
        old = lab.surge("node1", "nodeproxy", ready=False)
        for _ in range(3):
            time.sleep(0.3)
            lab.kill("node1", "nodeproxy")
            lab.start("node1", "nodeproxy", ready=False)
        lab.kill("node1", "nodeproxy")
        lab.start("node1", "nodeproxy")
        end(old)
        records = traffic.end(at_least=51)
    assert len(records) > 20
    assert failures(records) == []
    assert ends(old)


def test_an_agent_that_is_replaced_while_proxies_are(lab: Lab, world: World):
    """Both proxies come back to the new agent, in any order, and neither loses what it has."""
    with Traffic.echo(world.far, world.echo.address, ECHO) as traffic, Talker(world.far) as long:
        assert long.open(world.echo.address, ECHO).ok
        assert long("read")["text"]
        old = lab.surge("node1", "nodeproxy")
        lab.stop("node1", "agent")
        lab.start("node1", "agent")
        time.sleep(7)  # longer than an agent waits for proxies to return
        assert long.exchange().ok
        end(old)
        long.close()
        assert ends(old)
        time.sleep(0.5)
        records = traffic.end(at_least=51)
    assert len(records) > 50
    assert failures(records) == []


def test_proxies_are_nobody_in_particular(lab: Lab, world: World):
    """No capability, no user's or group's right but their own, and namespaces of their own."""
    for component in ("nodeproxy", "l7proxy"):
        pid = lab.process("node1", component).pid
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert status["Uid"].split() == status["Gid"].split() == ["15008"] * 4
        assert status["Groups"].split() == []
        assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert status["NSpid"].split() == [str(pid), "1"]
        own = {name: Path(f"/proc/{pid}/ns/{name}").readlink() for name in ("net", "pid")}
        agent = lab.process("node1", "agent").pid
        assert all(Path(f"/proc/{agent}/ns/{name}").readlink() != link for name, link in own.items())
