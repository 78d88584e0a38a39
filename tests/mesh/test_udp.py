"""UDP of applications in the mesh: services, and servers that go away while a client asks."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lab import Lab, Pod
from lab.processes import wait_until

pytestmark = pytest.mark.privileged

NAMESPACE = "datagrams"
PORT = 5353
VIP = "10.96.53.53"
NODE_PORT = 30053


def server(lab: Lab, name: str, node: str) -> Pod:
    pod = lab.pod(name, node=node, namespace=NAMESPACE, labels={"app": "names"})
    pod.serve(pod.app("udp", "serve", "0.0.0.0", PORT, name))
    wait_until(
        lambda: f":{PORT:04X} " in pod.run(["/bin/cat", "/proc/net/udp"]).stdout, 5.0, f"{name} serves"
    )
    return pod


@pytest.fixture(scope="module")
def client(lab: Lab) -> Pod:
    lab.namespace(NAMESPACE)
    return lab.pod("client", namespace=NAMESPACE)


@pytest.fixture(scope="module")
def servers(lab: Lab, client: Pod) -> Iterator[dict[str, Pod]]:
    """By name; a test that ends one puts another in its place."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "names", "namespace": NAMESPACE},
        "spec": {
            "type": "NodePort",
            "clusterIP": VIP,
            "clusterIPs": [VIP],
            "selector": {"app": "names"},
            "ports": [
                {"name": "dns", "port": 53, "targetPort": PORT, "nodePort": NODE_PORT, "protocol": "UDP"},
                {"name": "dns-tcp", "port": 53, "targetPort": PORT, "nodePort": NODE_PORT, "protocol": "TCP"},
            ],
        },
    }
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name},
            "status": {"addresses": [{"type": "InternalIP", "address": node.address_on_fabric}]},
        }
        for node in lab.nodes
    ]
    made = {name: server(lab, name, node) for name, node in (("near", "node1"), ("far", "node2"))}
    with lab.applied([service, *nodes], name="names.yaml"):
        yield made


class Asking:
    """A client that asks all the time; what it was told."""

    def __init__(self, pod: Pod, address: str, port: int, *more: str) -> None:
        self.lines: list[dict[str, Any]] = []
        self._process = pod.popen(pod.app("udp_client", address, port, *more), stderr=subprocess.STDOUT)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(json.loads(line))

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(5)

    def answers(self, count: int, since: int = 0) -> list[str]:
        """Who gave as many answers, one after the other and each from where it was asked."""
        wait_until(
            lambda: sum("text" in line for line in self.lines[since:]) >= count,
            15.0,
            f"{count} answers",
            explain=lambda: str(self.lines[-5:]),
        )
        return [line["text"] for line in self.lines[since:] if "text" in line]


def test_answers_come_from_the_service(lab: Lab, client: Pod, servers: dict[str, Pod]):
    """By its own address and by node ports of both nodes, from an endpoint here and from one on the other node."""
    for address, port in ((VIP, 53), *((node.address_on_fabric, NODE_PORT) for node in lab.nodes)):
        for connected in ((), ("--connected",)):
            met: set[str] = set()
            for _ in range(12):
                with Asking(client, address, port, *connected) as asking:
                    told = set(asking.answers(2))
                    assert len(told) == 1  # a socket keeps its endpoint
                    assert all(line["source"] == [address, port] for line in asking.lines if "text" in line)
                met |= told
                if met == {"near", "far"}:
                    break
            assert met == {"near", "far"}


def test_a_client_outlives_its_server(lab: Lab, client: Pod, servers: dict[str, Pod]):
    """As a resolver in an application that runs for weeks outlives CoreDNS, pod by pod, with one socket."""
    with Asking(client, VIP, 53) as asking:
        for turn in range(2):
            [first] = set(asking.answers(5, len(asking.lines)))
            [second] = servers.keys() - {first}
            gone = servers.pop(first)
            began = len(asking.lines)
            gone.delete()
            lab.settle()
            moved = len(asking.lines)
            assert set(asking.answers(20, moved + 2)) == {second}
            # Lost is what was asked of the dead one until the node had heard of it, and nothing afterwards.
            assert not [line for line in asking.lines[moved + 2 :] if "error" in line]
            assert len([line for line in asking.lines[began:] if "error" in line]) <= 10
            assert all(line["source"] == [VIP, 53] for line in asking.lines if "text" in line)
            name = f"again-{turn}"
            servers[name] = server(lab, name, gone.record.node)
            lab.settle()


def test_no_server_at_all(lab: Lab, client: Pod, servers: dict[str, Pod]):
    """An error at once, and an answer as soon as there is one."""
    with Asking(client, VIP, 53) as asking:
        asking.answers(3)
        for pod in servers.values():
            pod.set_ready(False)
        lab.settle()
        since = len(asking.lines)
        wait_until(lambda: len(asking.lines) > since + 5, 5.0, "it asks on")
        assert {line.get("error") for line in asking.lines[since + 1 : since + 5]} == {
            "ConnectionRefusedError"
        }
        for pod in servers.values():
            pod.set_ready(True)
        lab.settle()
        since = len(asking.lines)
        assert set(asking.answers(5, since)) <= servers.keys()
