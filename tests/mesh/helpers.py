"""What the modules of this suite say often."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lab import Lab, Place, Pod
from tests.requirements import SHARED

ECHO = 9000
HTTP = 8080


def seed(number: str) -> Path:
    """A seed configuration file, as it is."""
    (path,) = (SHARED / "seed-config").glob(f"{number}-*.yaml")
    return path


def echo_server(lab: Lab, name: str, *, port: int = ECHO, **values: Any) -> Pod:
    """A pod whose echo server greets with the addresses that it sees; its log tells each connection's bytes."""
    pod = lab.pod(name, **values)
    pod.serve(pod.app("tcp_server", port, "--greet"), port)
    return pod


def http_server(lab: Lab, name: str, *, version: str = "", port: int = HTTP, **values: Any) -> Pod:
    pod = lab.pod(name, **values)
    pod.serve(pod.app("http_server", port, "--name", name, "--version", version), port)
    return pod


def fetch(
    client: Place,
    url: str,
    *,
    count: int = 1,
    headers: Mapping[str, str] | None = None,
    per_connection: int = 1,
    method: str = "GET",
    body: str = "",
    timeout: float = 60.0,
) -> list[dict[str, Any]]:
    """Ask ``count`` times; one dictionary per answer (see ``lab/apps/http_client.py``)."""
    arguments = [url, "--count", str(count), "--per-connection", str(per_connection), "--method", method]
    for name, value in (headers or {}).items():
        arguments += ["--header", f"{name}: {value}"]
    if body:
        arguments += ["--body", body]
    done = client.run(client.app("http_client", *arguments), timeout=timeout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def dial(client: Place, address: str, port: int, timeout: float = 3.0) -> str:
    """Dial once: empty when established, else what went wrong."""
    done = client.run(
        client.app("dial", address, port, "--timeout", timeout), check=False, timeout=timeout + 10
    )
    return "" if done.returncode == 0 else done.stdout.strip() or "failed"


def echoes(client: Place, address: str, port: int, timeout: float = 12.0) -> str:
    """One connection and one echo: empty when the bytes came back, else what went wrong.

    Across nodes ``connect()`` ends at the node proxy, so that only the bytes tell whether the other end was reached.
    """
    done = client.run(
        client.app("traffic", address, port, "--count", 1, "--greeted", "--timeout", timeout),
        timeout=timeout + 10,
    )
    outcome = json.loads(done.stdout)["outcome"]
    return "" if outcome == "ok" else str(outcome)


def greeting(client: Place, address: str, port: int) -> dict[str, Any]:
    """Who the client is to an echo server: its ``peer`` and ``local`` addresses."""
    done = client.run(client.app("traffic", address, port, "--count", 1, "--greeted"), timeout=25)
    record = json.loads(done.stdout)
    assert record["outcome"] == "ok", record
    return dict(record["greeting"])


def events(server: Pod, name: str) -> list[dict[str, Any]]:
    """The echo server's events of one kind."""
    found = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [event for event in found if event["event"] == name]


def authorization_policy(
    name: str,
    namespace: str,
    *,
    action: str = "ALLOW",
    selector: Mapping[str, str] | None = None,
    rules: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    spec: dict[str, Any] = {"action": action, "rules": list(rules)}
    if selector:
        spec["selector"] = {"matchLabels": dict(selector)}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def rule(
    *, principals: Sequence[str] = (), namespaces: Sequence[str] = (), ports: Sequence[int] = ()
) -> dict[str, Any]:
    """A rule of an AuthorizationPolicy. Principals are service accounts ``NAMESPACE/NAME``."""
    source: dict[str, Any] = {}
    if principals:
        source["principals"] = [principal(*name.split("/")) for name in principals]
    if namespaces:
        source["namespaces"] = list(namespaces)
    made: dict[str, Any] = {}
    if source:
        made["from"] = [{"source": source}]
    if ports:
        made["to"] = [{"operation": {"ports": [str(port) for port in ports]}}]
    return made


def principal(namespace: str, service_account: str) -> str:
    return f"cluster.local/ns/{namespace}/sa/{service_account}"


def peer_authentication(namespace: str, mode: str, name: str = "default") -> dict[str, Any]:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"mtls": {"mode": mode}},
    }


def objects(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def eventually(condition: Callable[[], object], timeout: float = 5.0, interval: float = 0.05) -> object:
    """The last value of ``condition()``, as soon as it is true or when time is up (to be asserted on)."""
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(interval)
    return value
