"""A real Envoy takes the controller's xDS as it is, and routes by it: handed-over connections in, PROXY v2 headers out.

No kernel is needed: the test hands connections to Envoy's socket as the node proxy does, and the endpoints, on loopback
addresses, read the header that the node proxy would read.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bench import envoy
from cli.main import app
from lab.processes import wait_until
from nodeproxy import api
from nodeproxy.api import Handoff
from tests.peers import controller as controllers
from tests.peers.controller import Controller
from tests.peers.waiting import accepts

VIP = "10.96.0.10"
CLIENT = ("10.244.1.7", 40123)
PORT = 18080

#: Seed files run together, and the service that they are about.
CASES = {
    "01-istio-canary-80-20.yaml": "web-app",
    "03-istio-header-match.yaml 04-istio-destinationrule-lb.yaml": "reviews",
    "10-istio-split-90-10.yaml": "my-app",
    "11-istio-retries-timeout.yaml": "my-app",
    "12-istio-v1beta1-retries.yaml": "my-app",
}


@dataclass
class Endpoint:
    """An application on ``address``: answers its version, and keeps the headers that came in front of each connection."""

    address: str
    version: str
    handed: list[Handoff] = field(default_factory=list)

    @contextmanager
    def serving(self) -> Iterator[None]:
        with socket.create_server((self.address, PORT)) as listener:
            thread = threading.Thread(target=self._accept, args=(listener,))
            thread.start()
            yield
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        data = b""
        with connection:
            connection.settimeout(30)
            while (taken := api.decode(data)) is None if data else True:
                part = connection.recv(4096)
                if not part:
                    return
                data += part
            assert taken is not None
            self.handed.append(taken[0])
            data = data[taken[1] :]
            while True:
                while b"\r\n\r\n" not in data:
                    part = connection.recv(4096)
                    if not part:
                        return
                    data += part
                data = data.partition(b"\r\n\r\n")[2]
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n" + self.version.encode())


@contextmanager
def envoy_of(controller: Controller) -> Iterator[tuple[Path, str]]:
    """An Envoy with the bootstrap that the command writes: its socket and its admin server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        admin = f"127.0.0.1:{free.getsockname()[1]}"
    listen, bootstrap = controller.folder / "envoy.sock", controller.folder / "envoy.json"
    arguments = ["envoy-bootstrap", "--node", "node1", "--controller", f"127.0.0.1:{controller.port}"]
    arguments += ["--roots", str(controller.roots), "--credential", str(controller.credential)]
    arguments += ["--envoy", str(listen), "--admin", admin, "--output", str(bootstrap)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    log = controller.folder / "envoy.log"
    with (
        log.open("w") as output,
        subprocess.Popen(envoy.command(bootstrap), stdout=output, stderr=output) as process,
    ):
        try:
            wait_until(
                lambda: accepts(listen) or process.poll() is not None,
                15,
                "Envoy listens",
                explain=log.read_text,
            )
            assert process.poll() is None, log.read_text()
            yield listen, admin
        finally:
            process.terminate()
            process.wait(10)


def manifests(name: str) -> str:
    """A service with two versions, on loopback addresses."""
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{name}-{version}",
                "namespace": "default",
                "uid": f"uid-{version}",
                "labels": {"app": name, "version": version},
            },
            "spec": {"nodeName": "node1", "serviceAccountName": "web"},
            "status": {
                "phase": "Running",
                "podIP": address,
                "podIPs": [{"ip": address}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }
        for version, address in (("v1", "127.0.8.1"), ("v2", "127.0.8.2"))
    ]
    labels = {"istio.io/dataplane-mode": "ambient"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "clusterIP": VIP,
            "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "targetPort": PORT}],
        },
    }
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": labels}}
    rule = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": {"name": "subsets", "namespace": "default"},
        "spec": {"host": name, "subsets": [{"name": v, "labels": {"version": v}} for v in ("v1", "v2")]},
    }
    made = [namespace, service, *pods]
    return yaml.safe_dump_all(made if name in ("web-app", "reviews") else [*made, rule])


@pytest.fixture(params=CASES, ids=lambda files: files.split("-")[0])
def routed(
    request: pytest.FixtureRequest, tmp_path: Path, shared: Path
) -> Iterator[tuple[str, Path, str, list[Endpoint]]]:
    """(files, Envoy's socket, its admin server, endpoints)"""
    files = request.param
    (tmp_path / "config").mkdir()
    for name in files.split():
        (tmp_path / "config" / name).write_text((shared / "seed-config" / name).read_text())
    (tmp_path / "config" / "cluster.yaml").write_text(manifests(CASES[files]))
    endpoints = [Endpoint("127.0.8.1", "v1"), Endpoint("127.0.8.2", "v2")]
    with ExitStack() as stack:
        for endpoint in endpoints:
            stack.enter_context(endpoint.serving())
        controller = stack.enter_context(controllers.running(tmp_path))
        listen, admin = stack.enter_context(envoy_of(controller))
        yield files, listen, admin, endpoints


def ask(listen: Path, host: str, count: int, headers: str = "") -> Counter[str]:
    """Which versions answer ``count`` requests on one connection handed over as the node proxy does it."""
    seen: Counter[str] = Counter()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(listen))
        connection.sendall(api.encode(Handoff(CLIENT, (VIP, 80))))
        for _ in range(count):
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n".encode())
            answer = b""
            while not re.search(rb"\r\n\r\n..$", answer, re.DOTALL):
                part = connection.recv(65536)
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 200"), answer
            seen[answer[-2:].decode()] += 1
    return seen


def test_envoy_routes_as_the_seed_says(routed: tuple[str, Path, str, list[Endpoint]]) -> None:
    files, listen, admin, endpoints = routed
    match files[:2]:
        case "01":
            seen = ask(listen, "web-app", 400)
            assert 280 <= seen["v1"] <= 360, seen
        case "03":
            assert set(ask(listen, "reviews", 20)) == {"v1"}
            assert set(ask(listen, "reviews", 20, "end-user: jason\r\n")) == {"v2"}
        case "10":
            seen = ask(listen, "my-app", 400)
            assert 330 <= seen["v1"] <= 390, seen
        case _:
            assert sum(ask(listen, "my-app", 20).values()) == 20
    handed = [h for endpoint in endpoints for h in endpoint.handed]
    assert handed
    assert {h.client for h in handed} == {CLIENT}, "the node proxy is told who the client is"
    with urllib.request.urlopen(
        f"http://{admin}/stats?filter=update_rejected&format=json", timeout=5
    ) as response:
        rejected = {s["name"]: s["value"] for s in json.load(response)["stats"]}
    assert rejected
    assert set(rejected.values()) == {0}, rejected
