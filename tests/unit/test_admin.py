import http.client
import io
import json
import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry, Counter

from common import logs
from common.admin import _MAX_REQUESTS, AdminServer, BadQueryError


class Process:
    """What a process hands to its admin server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Counter("requests", "Requests.", registry=self.registry).inc(3)
        self.ready: bool | str = True

    def server(self, address: str = "127.0.0.1") -> AdminServer:
        return AdminServer(
            address,
            0,
            registry=self.registry,
            ready=lambda: self.ready,
            json={"/debug/pods": lambda: {"pods": [Pod("a", 1)]}, "/debug/broken": lambda: 1 // 0},
            queries={"/debug/pods": self.query, "/debug/asked": self.query},
        )

    def query(self, parameters):
        if "uid" not in parameters:
            raise BadQueryError("there is uid")
        return parameters


@dataclass
class Pod:
    uid: str
    connections: int


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def server(process: Process) -> Iterator[AdminServer]:
    with process.server() as server:
        yield server


@pytest.fixture
def keep_levels() -> Iterator[None]:
    root, one = logging.getLogger(), logging.getLogger("test.admin")
    level = root.level
    yield
    root.setLevel(level)
    one.setLevel(logging.NOTSET)


def ask(
    server: AdminServer, method: str, path: str, address: str = "127.0.0.1", **headers: str
) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(address, server.port, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()
    finally:
        connection.close()


def test_metrics_come_from_the_registry_passed_in(server: AdminServer) -> None:
    status, content_type, body = ask(server, "GET", "/metrics")
    assert status == 200
    assert content_type.startswith("text/plain")
    assert "requests_total 3.0" in body
    _, content_type, body = ask(
        server, "GET", "/metrics", Accept="application/openmetrics-text; version=1.0.0"
    )
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


@pytest.mark.parametrize(
    ("ready", "status", "body"),
    [
        (True, 200, "ready\n"),
        (False, 503, "not ready\n"),
        ("no configuration yet", 503, "no configuration yet\n"),
    ],
)
def test_readiness(process: Process, server: AdminServer, ready: bool | str, status: int, body: str) -> None:
    process.ready = ready
    assert ask(server, "GET", "/healthz/ready")[::2] == (status, body)


def test_json_pages(server: AdminServer) -> None:
    status, content_type, body = ask(server, "GET", "/debug/pods")
    assert (status, content_type) == (200, "application/json")
    assert json.loads(body) == {"pods": [{"uid": "a", "connections": 1}]}


def test_a_page_with_parameters(server: AdminServer) -> None:
    status, content_type, body = ask(server, "GET", "/debug/pods?uid=a%20b")
    assert (status, content_type) == (200, "application/json")
    assert json.loads(body) == {"uid": "a b"}
    assert ask(server, "GET", "/debug/pods?name=a")[::2] == (400, "there is uid\n")
    assert ask(server, "GET", "/debug/pods?uid=a&uid=b")[::2] == (400, "uid: given more than once\n")


def test_a_page_that_is_only_for_questions(server: AdminServer) -> None:
    assert ask(server, "GET", "/debug/asked")[::2] == (400, "there is uid\n")
    assert json.loads(ask(server, "GET", "/debug/asked?uid=a")[2]) == {"uid": "a"}
    assert "/debug/asked" in ask(server, "GET", "/")[2].splitlines()


def test_a_page_that_fails_says_so_and_the_server_lives_on(server: AdminServer) -> None:
    status, _, body = ask(server, "GET", "/debug/broken")
    assert (status, body) == (500, "ZeroDivisionError: integer division or modulo by zero\n")
    assert ask(server, "GET", "/healthz/ready")[0] == 200


def test_an_unknown_path_lists_the_known(server: AdminServer) -> None:
    status, _, body = ask(server, "GET", "/")
    assert status == 404
    assert {"/metrics", "/debug/pods"} <= set(body.splitlines())


def test_head_has_no_body(server: AdminServer) -> None:
    assert ask(server, "HEAD", "/healthz/ready") == (200, "text/plain; charset=utf-8", "")


@pytest.mark.usefixtures("keep_levels")
def test_log_levels_are_read_and_changed(server: AdminServer) -> None:
    log = logs.get("test.admin.child")
    logs.setup("info", "text", io.StringIO())
    status, _, body = ask(server, "POST", "/logging?level=test.admin:debug")
    assert status == 200
    assert json.loads(body)["test.admin"] == "debug"
    assert log.enabled("debug")
    assert json.loads(ask(server, "GET", "/logging")[2]) == json.loads(body)


def test_a_bad_level_is_refused(server: AdminServer) -> None:
    for target in ("/logging?level=loud", "/logging"):
        status, _, body = ask(server, "POST", target)
        assert status == 400
        assert "one of error, warning, info, debug" in body


def test_only_logging_takes_a_post(server: AdminServer) -> None:
    assert ask(server, "POST", "/metrics")[0] == 405


@pytest.mark.usefixtures("keep_levels")
def test_another_host_may_read_but_not_change(server: AdminServer) -> None:
    before = logs.levels()
    assert server.answer("POST", "/logging?level=debug", accept="", from_loopback=False).status == 403
    assert logs.levels() == before
    assert server.answer("GET", "/logging", accept="", from_loopback=False).status == 200


def test_ipv6(process: Process) -> None:
    with process.server("::1") as server:
        assert ask(server, "POST", "/logging?level=loud", "::1")[0] == 400  # a loopback peer, so not 403


def test_close_frees_the_port_and_ends_the_thread(process: Process) -> None:
    server = process.server().start()
    port = server.port
    server.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "admin"]
    with socket.create_server(("127.0.0.1", port)):
        pass
    process.server().close()  # one that was never started closes as well


def test_idle_clients_take_neither_the_process_s_threads_nor_others_places(server: AdminServer) -> None:
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(_MAX_REQUESTS + 5)]
    try:
        for client in clients[:5]:
            client.settimeout(5)
            assert client.recv(1) == b""
        assert ask(server, "GET", "/healthz/ready")[0] == 200
        names = [thread.name for thread in threading.enumerate()]
        assert sum("process_request_thread" in name for name in names) <= _MAX_REQUESTS
        clients[-1].sendall(b"GET /healthz/ready HTTP/1.0\r\n\r\n")
        clients[-1].settimeout(5)
        assert clients[-1].recv(12) == b"HTTP/1.0 200"
    finally:
        for client in clients:
            client.close()
    deadline = threading.Event()
    while len([thread for thread in threading.enumerate() if "process_request_thread" in thread.name]) > 1:
        deadline.wait(0.01)
    assert ask(server, "GET", "/healthz/ready")[0] == 200
