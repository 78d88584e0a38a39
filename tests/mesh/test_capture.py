"""What an application sees and what it cannot reach: addresses are true, our own ports are nobody's, doubts are refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import Lab, Place, Pod, Talker
from lab.processes import wait_until
from tests.mesh.helpers import ECHO, HTTP, dial, echo_server, echoes, fetch, greeting, http_server

pytestmark = pytest.mark.privileged

NAMESPACE = "capture"
OURS = (15001, 15002, 15008)


@pytest.fixture(scope="module", autouse=True)
def world(lab: Lab) -> None:
    lab.namespace(NAMESPACE)


@pytest.fixture(scope="module")
def client(lab: Lab, world: None) -> Pod:
    return lab.pod("client", node="node1", namespace=NAMESPACE, service_account="client")


@pytest.fixture(scope="module")
def near(lab: Lab, world: None) -> Pod:
    return echo_server(lab, "near", node="node1", namespace=NAMESPACE)


@pytest.fixture(scope="module")
def far(lab: Lab, world: None) -> Pod:
    return echo_server(lab, "far", node="node2", namespace=NAMESPACE)


@pytest.fixture(scope="module")
def web(lab: Lab, world: None) -> Pod:
    return http_server(lab, "web", node="node2", namespace=NAMESPACE)


@pytest.fixture(scope="module")
def outsider(lab: Lab) -> Place:
    return lab.outsider("capture-out")


@pytest.fixture(scope="module")
def services(lab: Lab, near: Pod, far: Pod, web: Pod) -> dict[str, str]:
    """Cluster addresses."""
    made = {
        name: lab.service(name, 80, target_port=ECHO, namespace=NAMESPACE, port_name="tcp")
        for name in ("near", "far")
    }
    made["web"] = lab.service("web", 80, target_port=HTTP, namespace=NAMESPACE)
    made["empty"] = lab.service("empty", 80, namespace=NAMESPACE, port_name="tcp")
    lab.settle()
    return made


@pytest.mark.parametrize("server", ["near", "far"])
def test_client_sees_the_service_and_server_sees_the_client(
    lab: Lab, client: Pod, near: Pod, far: Pod, services: dict[str, str], server: str
):
    pod = {"near": near, "far": far}[server]
    with Talker(client) as talker:
        seen = talker.open(services[server], 80)
        assert seen.ok, seen.error
        assert seen["peer"] == [services[server], 80]
        assert seen["local"][0] == client.address
    there = greeting(client, services[server], 80)
    assert there["peer"][0] == client.address
    assert there["local"] == [pod.address, ECHO]


@pytest.mark.parametrize("server", ["near", "far"])
def test_dialling_a_pod_s_own_address_is_the_same(client: Pod, near: Pod, far: Pod, server: str):
    pod = {"near": near, "far": far}[server]
    with Talker(client) as talker:
        seen = talker.open(pod.address, ECHO)
        assert seen["peer"] == [pod.address, ECHO]
        assert seen["local"][0] == client.address
    assert greeting(client, pod.address, ECHO)["peer"][0] == client.address


def test_a_pod_reaches_itself(near: Pod):
    with Talker(near) as talker:
        for address in (near.address, "127.0.0.1"):
            assert talker.open(address, ECHO).ok
            assert talker("read")["text"]
            assert talker.exchange().ok


def test_http_through_l7_has_the_service_as_peer(lab: Lab, client: Pod, services: dict[str, str]):
    file = lab.apply(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": NAMESPACE},
            "spec": {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]},
        }
    )
    try:
        lab.settle()
        (answer,) = fetch(client, f"http://{services['web']}/")
        assert answer["status"] == 200, answer
        assert answer["peer"] == [services["web"], 80]
        assert answer["local"][0] == client.address
        # The server is told the client's own address, also behind the proxy.
        assert answer["body"]["client"] == client.address
    finally:
        lab.withdraw(file)
        lab.settle()


def test_service_without_endpoints_is_refused(client: Pod, services: dict[str, str]):
    assert "Refused" in dial(client, services["empty"], 80)


@pytest.mark.parametrize("port", OURS)
def test_nobody_reaches_our_listeners(client: Pod, near: Pod, far: Pod, outsider: Place, port: int):
    # A pod's own, another pod's, and from outside the mesh.
    assert dial(client, client.address, port, timeout=1.0)
    assert dial(client, near.address, port, timeout=1.0)
    if port != 15008:
        assert dial(client, far.address, port, timeout=1.0)
        assert dial(outsider, near.address, port, timeout=1.0)


def test_hbone_port_from_outside_is_ours_and_wants_a_certificate(near: Pod, outsider: Place):
    done = outsider.run(
        ["curl", "-sk", "--http2", "--max-time", "3", f"https://{near.address}:15008/"], check=False
    )
    assert done.returncode != 0
    assert "200" not in done.stdout


def test_a_pod_that_binds_our_ports_gets_nothing_of_ours(lab: Lab, client: Pod, far: Pod):
    thief = lab.pod("thief", node="node2", namespace=NAMESPACE)
    server = thief.popen(thief.app("tcp_server", 15008, "--bind", thief.address))
    other = echo_server(lab, "beside", node="node2", namespace=NAMESPACE)
    victim = thief.popen(thief.app("tcp_server", ECHO, "--greet"))
    try:
        wait_until(lambda: thief.listening(ECHO), 5, "the thief serves")
        thief.set_ready(True)
        lab.settle()
        # HBONE to the thief's address still ends at the node proxy, which delivers to the application.
        assert echoes(client, thief.address, ECHO) == ""
        assert echoes(client, other.address, ECHO) == ""
    finally:
        for process in (server, victim):
            process.kill()
            output, _ = process.communicate()
            if process is server:
                assert "open" not in output
        thief.delete()
        other.delete()


@pytest.fixture
def udp(near: Pod, far: Pod) -> Iterator[dict[str, Pod]]:
    processes = [pod.popen(pod.app("udp", "serve", "0.0.0.0", 5300)) for pod in (near, far)]
    wait_until(lambda: all(pod.listening(5300, kind="udp") for pod in (near, far)), 5, "UDP servers listen")
    yield {"near": near, "far": far}
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("server", ["near", "far"])
def test_udp_passes(client: Pod, udp: dict[str, Pod], server: str):
    answer = client.run(client.app("udp", "ask", udp[server].address, 5300, "hello"))
    assert answer.stdout.strip() == "hello"
