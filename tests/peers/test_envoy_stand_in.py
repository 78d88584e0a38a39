"""A real Envoy in l7proxy's place on the client's node: the 80/20 canary, from the same controller, as it is written."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import envoy
from lab.lab import CONTROL_ADDRESS, Lab
from lab.pod import Pod
from lab.processes import wait_until
from tests.peers.waiting import accepts

pytestmark = pytest.mark.privileged

#: Envoy is the proxies' user: the node proxy writes to its socket, and it reads the node's token.
NOBODY = ("/usr/bin/setpriv", "--reuid", "15008", "--regid", "15008", "--clear-groups", "--")
SOCKET = "/run/mycel/nodeproxy/envoy.sock"
ADMIN = "127.0.0.1:15000"
PORT = 8080
REQUESTS = 400


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, components=("agent", "nodeproxy"), arguments={"nodeproxy": ["--envoy", SOCKET]}) as lab:
        lab.namespace("default")
        yield lab


@pytest.fixture(scope="module")
def client(lab: Lab) -> Pod:
    pod = lab.pod("client", node="node1", service_account="client")
    pod.set_ready(True)
    return pod


@pytest.fixture(scope="module")
def service(lab: Lab, shared: Path) -> str:
    """``web-app``: v1 beside the client, v2 on the other node, split by the seed configuration."""
    for version, node in (("v1", "node1"), ("v2", "node2")):
        labels = {"app": "web-app", "version": version}
        pod = lab.pod(f"web-app-{version}", node=node, service_account="web", labels=labels, ports=(PORT,))
        pod.serve(pod.app("http_server", PORT, "--name", pod.record.name, "--version", version), PORT)
    address = lab.service("web-app", 80, target_port=PORT)
    lab.apply(shared / "seed-config" / "01-istio-canary-80-20.yaml")
    return address


@pytest.fixture(scope="module")
def running(lab: Lab, service: str, client: Pod) -> Iterator[Path]:
    """Envoy on the client's node, with the bootstrap that the command writes; its log, which is its access log too."""
    node = lab.node("node1")
    bootstrap = node.folder / "envoy.json"
    lab.mycel(
        "envoy-bootstrap", "--node", node.name, "--controller", f"{CONTROL_ADDRESS}:15012", "--roots", str(lab.roots),
        "--credential", str(node.folder / "credential"), "--envoy", SOCKET, "--admin", ADMIN, "--output", str(bootstrap),
    )  # fmt: skip
    log = node.folder / "envoy.log"
    log.touch()
    for file in (bootstrap, log):  # its access log opens /dev/stdout again, by name
        os.chown(file, 15008, 15008)
    with log.open("w") as output:
        process = node.popen(
            [*NOBODY, *envoy.command(bootstrap)],
            cgroup=node.top / "envoy",
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def listening() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return accepts(node.root / SOCKET.removeprefix("/"))

    try:
        wait_until(listening, 20, "Envoy listens on its socket", explain=lambda: log.read_text()[-3000:])
        yield log
    finally:
        process.terminate()
        process.wait(10)


def request(client: Pod, address: str, count: int) -> list[dict[str, object]]:
    """What ``count`` requests on one connection were answered."""
    urls = [f"http://{address}/?n={n}" for n in range(count)]
    answers = client.run(
        ["/usr/bin/curl", "-sS", "--fail", "--max-time", "60", "-w", "\n", "-H", "Host: web-app", *urls],
        timeout=70,
    ).stdout
    return [json.loads(line) for line in answers.splitlines()]


def test_the_canary_is_split_by_envoy(lab: Lab, client: Pod, service: str, running: Path) -> None:
    answers = request(client, service, REQUESTS)
    versions = Counter(str(a["version"]) if "version" in a else "" for a in answers)
    assert sum(versions.values()) == REQUESTS
    # 80 % of 400 is 320 with a standard deviation of 8: five of them either way.
    assert 280 <= versions["v1"] <= 360, versions
    assert versions["v1"] + versions["v2"] == REQUESTS
    assert all("x-request-id" in str(a["headers"]) for a in answers), "Envoy was on the way"


def test_applications_see_the_clients_address_on_both_nodes(client: Pod, service: str, running: Path) -> None:
    seen = {(a["version"], a["client"]) for a in request(client, service, 100)}
    assert seen == {("v1", client.address), ("v2", client.address)}


def test_what_crosses_nodes_is_hbone(lab: Lab, client: Pod, service: str, running: Path) -> None:
    with lab.capture("node1") as capture:
        versions = {a["version"] for a in request(client, service, 100)}
    assert versions == {"v1", "v2"}
    pods = {pod.address for pod in lab.pods}
    ports = {
        min(source_port, destination_port, key=lambda port: port != 15008)
        for source, source_port, destination, destination_port, payload in capture.segments()
        if payload and {source, destination} <= pods
    }
    assert ports == {15008}


def test_the_controller_knows_envoy_and_check_is_content(lab: Lab, running: Path) -> None:
    found = json.loads(
        lab.mycel("check", "--controller", f"{CONTROL_ADDRESS}:15014", "--json", check=False).stdout
    )
    about_node1 = [f for f in found if f["object"] == "Node node1" and f["severity"] == "error"]
    assert about_node1 == []


def test_without_envoy_requests_fail_closed(lab: Lab, client: Pod, service: str, running: Path) -> None:
    """Last in this file: it ends Envoy."""
    for pid in (lab.node("node1").top / "envoy" / "cgroup.procs").read_text().split():
        lab.node("node1").run(["/bin/kill", "-KILL", pid])
    done = client.run(
        ["/usr/bin/curl", "-sS", "--fail", "--max-time", "5", f"http://{service}/"], check=False
    )
    assert done.returncode != 0
