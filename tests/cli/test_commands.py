"""The commands as somebody types them: output, exit statuses, and what they say when nothing answers."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from typer.testing import CliRunner, Result

from cli import check, watch
from cli.http import Unreachable
from cli.main import app
from common.kubernetes import ApiError
from controlplane.api import API_VERSION
from controlplane.model.findings import Finding, Severity
from tests.cli.conftest import Serve

MISSING_SUBSET = Finding(
    Severity.ERROR,
    "VirtualService default/my-app-vs",
    "spec.http[0].route[0].destination.subset",
    "no DestinationRule defines subset v1 of my-app",
    "add a DestinationRule for host my-app with subset v1",
    "policies/10.yaml",
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def client(component: str, node: str = "node1", admin: str = "", **details: Any) -> dict[str, Any]:
    usual = {"version_acked": "current", "errors": {}}
    return {"component": component, "node": node, "admin": admin, **usual, **details}


def healthy(node: str = "node1") -> list[dict[str, Any]]:
    return [client(component, node) for component in ("agent", "nodeproxy", "l7proxy")]


def controller(
    serve: Serve, *, findings: list[Finding] | None = None, clients: list[dict[str, Any]] | None = None
) -> str:
    pages = {
        "/debug/findings": lambda: findings or [],
        "/debug/clients": lambda: {
            "version": "current",
            "clients": healthy() if clients is None else clients,
        },
    }
    pages["/debug/snapshot"] = lambda: {"version": "current", "resources": resources()}
    return serve(json=pages)


def resources() -> list[dict[str, Any]]:
    """Two services: workload ``db`` is behind one of them, ``shared`` behind both."""
    workloads = [
        {"type": "workload", "uid": f"uid-{name}", "namespace": "default", "workload_name": name}
        for name in ("db", "shared")
    ]
    services = [
        {
            "type": "service",
            "namespace": "default",
            "name": service,
            "ports": [{"port": 80, "endpoints": [{"uid": f"uid-{name}"} for name in names]}],
        }
        for service, names in (("orders-db", ("db", "shared")), ("other", ("shared",)))
    ]
    return [*workloads, *services]


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"127.0.0.1:{port}"


def test_version_says_which_contracts_it_speaks() -> None:
    assert run("version").output.startswith("mycel 0.")
    assert json.loads(run("version", "--json").output)["controller_api"] == API_VERSION


@pytest.mark.parametrize("command", ["check", "stat"])
def test_nobody_there_says_who_and_what_to_do(command: str, nobody: str) -> None:
    result = run(command, "--controller", nobody)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"the controller does not answer at {nobody}" in result.stderr
    assert "MYCEL_CONTROLLER" in result.stderr
    assert "Traceback" not in result.output


def test_something_else_listens_there(serve: Serve) -> None:
    result = run("stat", "--controller", serve())
    assert result.exit_code == 2
    assert "404" in result.stderr


def test_no_http_is_no_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\x00\x00\x12\x04 this is no HTTP/1.1\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        result = run("check", "--controller", f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert result.exit_code == 2
    assert "does not answer" in result.stderr


@pytest.mark.parametrize("value", [{"error": "x"}, ["x"], [{"node": "n"}], 7])
def test_an_answer_of_another_version_is_named(serve: Serve, value: object) -> None:
    address = serve(json={"/debug/findings": list, "/debug/clients": lambda: value})
    result = run("check", "--controller", address)
    assert result.exit_code == 2
    assert "this version does not know" in result.stderr


def test_a_folder_without_manifests_is_not_well(tmp_path: Path) -> None:
    """The wrong folder, mostly: to say "no errors" of it would let everything through."""
    (tmp_path / "README.md").write_text("# Policies\n")
    result = run("check", "--config", str(tmp_path))
    assert result.exit_code == 1
    assert "holds no manifest" in result.stdout
    (tmp_path / "below").mkdir()
    (tmp_path / "below/namespace.yaml").write_text(
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n"
    )
    assert run("check", "--config", str(tmp_path)).exit_code == 0


def test_a_healthy_mesh_has_no_errors_but_its_limits_are_told(serve: Serve) -> None:
    result = run("check", "--controller", controller(serve))
    assert result.exit_code == 0, result.output
    assert "UDP of enrolled pods is judged by identity and not encrypted" in result.stdout
    assert result.stdout.rstrip().endswith("no errors")


def test_an_object_that_some_node_has_not_taken_is_named(serve: Serve) -> None:
    row = {
        "apiVersion": "policy.linkerd.io/v1alpha1",
        "kind": "AuthorizationPolicy",
        "namespace": "shop",
        "name": "a",
        "state": "accepted",
    }
    rows = [row | {"waiting": "node2 agent"}, row | {"name": "b", "state": "programmed", "waiting": ""}]
    pages = {
        "/debug/findings": list,
        "/debug/clients": lambda: {"version": "current", "clients": healthy()},
        "/debug/status": lambda: rows,
    }
    result = run("check", "--controller", serve(json=pages))
    assert result.exit_code == 0, result.output
    assert "AuthorizationPolicy.policy.linkerd.io shop/a" in result.stdout
    assert "waiting for node2 agent" in result.stdout
    assert "shop/b" not in result.stdout
    rows[:] = [{"kind": "x"}]
    result = run("check", "--controller", serve(json=pages))
    assert result.exit_code == 2
    assert "this version does not know" in result.stderr


def test_a_finding_is_shown_with_object_problem_and_remedy(serve: Serve) -> None:
    address = controller(serve, findings=[MISSING_SUBSET])
    result = run("check", "--controller", address)
    assert result.exit_code == 1
    for part in (
        MISSING_SUBSET.object,
        MISSING_SUBSET.field,
        MISSING_SUBSET.message,
        MISSING_SUBSET.action,
        MISSING_SUBSET.file,
    ):
        assert part in result.stdout
    assert "1 error, 0 warnings" in result.stdout
    found = json.loads(run("check", "--controller", address, "--json").output)
    assert found[0] == {
        "severity": "error",
        "object": MISSING_SUBSET.object,
        "field": MISSING_SUBSET.field,
        "message": MISSING_SUBSET.message,
        "action": MISSING_SUBSET.action,
        "file": MISSING_SUBSET.file,
    }


def test_a_node_without_its_agent_is_an_error(serve: Serve) -> None:
    result = run(
        "check",
        "--controller",
        controller(serve, clients=[*healthy("node2"), client("nodeproxy"), client("envoy")]),
    )
    assert result.exit_code == 1
    assert "Node node1: agent is not connected" in result.stdout
    assert "l7proxy" not in result.stdout, "Envoy stands in for it"


def test_no_node_at_all_is_an_error(serve: Serve) -> None:
    result = run("check", "--controller", controller(serve, clients=[]))
    assert result.exit_code == 1
    assert "no node is connected" in result.stdout


def test_what_a_client_refuses_or_has_not_taken_yet_is_told(serve: Serve) -> None:
    clients = healthy()
    clients[0] |= {"version_acked": "old"}
    clients[2] |= {"errors": {"listener web:80": "no such cluster"}}
    result = run("check", "--controller", controller(serve, clients=clients))
    assert result.exit_code == 1
    assert "error: Node node1: l7proxy refuses listener web:80: no such cluster" in result.stdout
    assert "warning: Node node1: agent has not acknowledged" in result.stdout


def test_a_client_that_is_not_ready_is_a_warning(serve: Serve) -> None:
    sick = serve(ready="no configuration yet")
    clients = [client("agent", admin=sick), client("nodeproxy"), client("l7proxy")]
    result = run("check", "--controller", controller(serve, clients=clients))
    assert result.exit_code == 0
    assert "warning: Node node1: agent on node1" in result.stdout
    assert "503 Service Unavailable: no configuration yet" in result.stdout


def test_pods_that_are_not_captured_are_named(serve: Serve) -> None:
    admin = serve(json={"/debug/status": lambda: {"unattached": ["default/early"]}})
    clients = [client("agent", admin=admin), client("nodeproxy"), client("l7proxy")]
    result = run("check", "--controller", controller(serve, clients=clients))
    assert result.exit_code == 0
    assert (
        "warning: Pod default/early: is to be in the mesh and is not captured yet (node node1)"
        in result.stdout
    )
    assert "to do: pods that run already join within seconds; if it stays, look at the log" in result.stdout


def test_admin_servers_that_hang_are_waited_for_at_once() -> None:
    """A node that is gone does not answer: one after the other they would take the time limit each."""
    together = threading.Barrier(6, timeout=10)

    class Hanging:
        def read_text(self, address: str, path: str, *, who: str) -> str:
            together.wait()
            raise Unreachable(f"{who} does not answer")

        def read_json(self, address: str, path: str, *, who: str) -> Any:
            raise AssertionError

    clients = [
        watch.Client(component, node, f"{node}-{component}", "v", {}, "v")
        for node in ("node1", "node2")
        for component in ("agent", "nodeproxy", "l7proxy")
    ]
    found = check.clients(watch.Fleet(frozenset(("v",)), clients), Hanging())
    assert [finding.message for finding in found] == [f"{one} does not answer" for one in clients]


def test_waiting_goes_on_over_an_api_server_that_restarts() -> None:
    """One that comes back answers 503 for a moment; one that says no, says so at once."""
    answers: list[ApiError | list[Finding]] = [ApiError(503, "", "starting"), [MISSING_SUBSET], []]

    def look() -> list[Finding]:
        answer = answers.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        return answer

    assert check.until_well(look, 30.0) == []
    answers[:] = [ApiError(403, "Forbidden", "no")]
    with pytest.raises(ApiError, match="no"):
        check.until_well(look, 30.0)
    answers[:] = [ApiError(503, "", "starting")]
    with pytest.raises(ApiError, match="starting"):
        check.until_well(look, 0.0)


def test_stat_measures_what_happens_while_it_runs(serve: Serve) -> None:
    registry = CollectorRegistry()
    names = (
        "reporter", "source_principal", "destination_service_name", "destination_service_namespace", "response_code",
        "connection_security_policy",
    )  # fmt: skip
    requests = Counter("istio_requests_total", "-", names, registry=registry)
    series = requests.labels(
        "source", "spiffe://c/ns/default/sa/client", "web", "default", "200", "mutual_tls"
    )
    series.inc(10_000)
    stop = threading.Event()

    def traffic() -> None:
        while not stop.wait(0.01):
            series.inc()

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        address = controller(
            serve, clients=[client("l7proxy", admin=serve(registry)), client("agent", admin=serve())]
        )
        result = run("stat", "--controller", address, "--interval", "0.5", "--json")
    finally:
        stop.set()
        thread.join()
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["missing"] == []
    (service,) = answer["services"]
    assert (service["service"], service["measured"]) == ("default/web", "l7proxy")
    assert 30 < service["requests_per_second"] < 110
    assert service["success_rate"] == 1.0
    assert service["mtls_share"] == 1.0
    assert service["p50_ms"] is None


def test_stat_is_an_aligned_table_where_there_is_no_terminal(serve: Serve) -> None:
    registry = CollectorRegistry()
    names = ("destination_workload", "destination_workload_namespace")
    opened = Counter("istio_tcp_connections_opened_total", "-", names, registry=registry)
    stop = threading.Event()

    def traffic() -> None:
        while not stop.wait(0.01):
            opened.labels("db", "default").inc()
            opened.labels("shared", "default").inc()

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        address = controller(serve, clients=[client("agent", admin=serve(registry))])
        lines = run("stat", "--controller", address, "--interval", "0.3").stdout.splitlines()
    finally:
        stop.set()
        thread.join()
    assert lines[0].split()[:2] == ["SERVICE", "SUCCESS"]
    assert lines[1].startswith("default/orders-db "), (
        "the kernel knows workloads; the controller knows whose they are"
    )
    assert lines[2].startswith("default/shared (workload) "), "of several services none is guessed"
    assert lines[1].endswith("kernel")
    assert "\x1b" not in "".join(lines)


def test_a_process_that_does_not_answer_is_named_and_the_others_count(serve: Serve, nobody: str) -> None:
    clients = [client("agent", admin=serve()), client("l7proxy", "node2", admin=nobody)]
    result = run("stat", "--controller", controller(serve, clients=clients), "--interval", "0.1")
    assert result.exit_code == 0
    assert "no traffic" in result.stdout
    assert f"not counted: l7proxy on node2 does not answer at {nobody}" in result.stderr


def test_stat_without_any_client_says_so(serve: Serve) -> None:
    result = run("stat", "--controller", controller(serve, clients=[]))
    assert result.exit_code == 2
    assert "nothing is measured yet" in result.stderr


def test_check_names_workloads_without_a_certificate(serve: Serve) -> None:
    pages: dict[str, dict[str, Any]] = {
        "a": {"identity": "spiffe://cluster.local/ns/shop/sa/web", "not_after": None, "usable": False},
        "b": {"identity": "spiffe://cluster.local/ns/shop/sa/db", "not_after": 1.0, "usable": True},
    }
    admin = serve(json={"/debug/state": lambda: {"certificates": pages}})
    clients = [client("agent"), client("nodeproxy", admin=admin), client("l7proxy")]
    result = run("check", "--controller", controller(serve, clients=clients), "--json")
    (finding,) = [f for f in json.loads(result.stdout) if f["object"] == "Node node1"]
    assert finding["severity"] == "warning"
    assert finding["message"].startswith(
        "1 workload without a certificate that is good, of spiffe://cluster.local/ns/shop/sa/web"
    )
    pages["a"]["usable"] = True
    result = run("check", "--controller", controller(serve, clients=clients), "--json")
    assert not [f for f in json.loads(result.stdout) if f["object"] == "Node node1"]
