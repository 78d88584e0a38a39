"""Servers as people run them, each at the other end of a connection that enters the splice, or stays out of it, and overflows."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kernel.mesh import Node, TestPod
from tests.kernel.spliced import Stream, walk_and_nudge
from tests.requirements import require, require_program

pytestmark = pytest.mark.privileged

PROGRAMS = Path(__file__).parent / "programs"
PORT, BEHIND = 8090, 8091


@contextlib.contextmanager
def running(pod: TestPod, command, port=PORT):
    """The program in the pod, once it listens."""
    procs = pod.node.cgroup("app") / "cgroup.procs"
    script = f'echo $$ >{procs}; exec nsenter --net=/proc/self/fd/{pod.netns} -- "$@"'
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", *map(str, command)],
        pass_fds=(pod.netns,),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            with contextlib.suppress(OSError):
                pod.app.connect(("127.0.0.1", port)).close()
                break
            assert time.monotonic() < deadline, f"{command} does not listen"
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def go(tmp_path):
    program = tmp_path / "echo"
    if not program.exists():
        compiler = require_program("go")
        environment = os.environ | {"CGO_ENABLED": "0", "GO111MODULE": "off"}
        done = subprocess.run(
            [compiler, "build", "-o", program, PROGRAMS / "echo.go"],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    return program


def io_uring(tmp_path):
    require(Path("/proc/sys/kernel/io_uring_disabled").read_text() == "0\n", "io_uring")
    program = tmp_path / "ring_echo"
    command = [require_program("gcc"), "-O2", "-o", program, PROGRAMS / "ring_echo.c", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [program, PORT]


def python(kind, port):
    return [sys.executable, "-SE", PROGRAMS / "echo.py", port, kind]


def java(tmp_path):
    require(Path("/usr/bin/javac").exists() and Path("/usr/bin/java").exists(), "a JDK")
    done = subprocess.run(
        ["/usr/bin/javac", "-d", tmp_path, PROGRAMS / "Echo.java"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return ["/usr/bin/java", "-cp", tmp_path, "Echo", PORT]


def haproxy(tmp_path):
    (tmp_path / "haproxy.cfg").write_text(
        "defaults\n mode tcp\n timeout client 60s\n timeout server 60s\n timeout connect 5s\n"
        f"frontend in\n bind :::{PORT} v4v6\n default_backend behind\n"
        f"backend behind\n server echo 127.0.0.1:{BEHIND}\n"
    )
    return [require_program("haproxy"), "-db", "-f", tmp_path / "haproxy.cfg"]


#: Command, whether it may be spliced, whether an echo server has to stand behind it.
SERVERS = {
    "go": (lambda tmp_path: [go(tmp_path), PORT], True, False),
    "go-proxy-by-splice2": (lambda tmp_path: [go(tmp_path), PORT, f"127.0.0.1:{BEHIND}"], False, True),
    # Its sockets are blocking ones, so that the kernel does the waiting.
    "io-uring": (io_uring, False, False),
    "java-nio": (java, True, False),
    "node": (lambda _: [require_program("node"), PROGRAMS / "echo.js", PORT], True, False),
    "python-asyncio": (lambda _: python("asyncio", PORT), True, False),
    "python-blocking": (lambda _: python("blocking", PORT), False, False),
    "haproxy": (haproxy, True, True),
}


@pytest.fixture
def pods(make_pod):
    client, server = make_pod(), make_pod()
    client.enrol({})
    server.enrol({(client.identity, 0): True})
    return client, server


@pytest.mark.parametrize("name", SERVERS)
def test_echo(node, pods, tmp_path, name):
    client, server = pods
    make, may_enter, has_server_behind = SERVERS[name]
    with contextlib.ExitStack() as stack:
        if has_server_behind:
            stack.enter_context(running(server, python("asyncio", BEHIND), BEHIND))
        stack.enter_context(running(server, make(tmp_path)))
        node.kernel.splices.walk()
        streams = [Stream(client.app.connect((server.address, PORT))) for _ in range(4)]
        for stream in streams:
            for _ in range(5):
                stream.echo(300)
        # The server's reader may be at the end of its recv still.
        entered, deadline = node.kernel.splices.walk().entered, time.monotonic() + 3
        while may_enter and entered < 8 and time.monotonic() < deadline:
            entered += node.kernel.splices.walk().entered
        assert entered == (8 if may_enter else 0)
        for number, stream in enumerate(streams):
            for _ in range(20):
                stream.echo(1000 * (number + 1))
            assert stream.is_spliced() == may_enter
            stream.echo(6_000_000)  # more than may be outstanding, both ways
            for _ in range(5):
                stream.echo(200)
            stream.echo_and_end(50_000)
        node.kernel.splices.walk()


def test_nginx(node, pods, tmp_path):
    """A file by sendfile, small answers, pipelined requests, and what it reads by edges and FIONREAD."""
    client, server = pods
    (tmp_path / "small").write_bytes(b"s" * 40)
    large = os.urandom(300_000)
    (tmp_path / "large").write_bytes(large)
    tmp_path.chmod(0o755)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/err;\n"
        "events {}\n"
        f"http {{ access_log off; sendfile on; client_body_temp_path {tmp_path}/b; proxy_temp_path {tmp_path}/p;"
        f" fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;"
        f" server {{ listen [::]:{PORT} ipv6only=off; root {tmp_path}; client_max_body_size 100m;"
        f" location /put {{ dav_methods PUT; }} }} }}\n"
    )
    command = [require_program("nginx"), "-e", tmp_path / "err", "-c", tmp_path / "nginx.conf"]
    with running(server, command):
        sock = client.app.connect((server.address, PORT))
        sock.setblocking(False)
        for _ in range(5):
            assert get(sock, "small") == [b"s" * 40]
        entered, deadline = 0, time.monotonic() + 3
        while entered < 2 and time.monotonic() < deadline:
            entered += node.kernel.splices.walk().entered
        assert entered == 2
        assert get(sock, "small", cookie=b"c" * 3000) == [b"s" * 40]
        for _ in range(10):
            assert get(sock, "large") == [large]
            assert get(sock, *["small"] * 30) == [b"s" * 40] * 30
        for size in (100_000, 5_000_000):
            body = os.urandom(size)
            assert put(node, pods, sock, f"put{size}", body) in (201, 204)
            assert (tmp_path / f"put{size}").read_bytes() == body
        assert get(sock, *["large"] * 20) == [large] * 20
        assert get(sock, "small") == [b"s" * 40]
        sock.close()


def put(node: Node, pods: tuple[TestPod, TestPod], sock: socket.socket, name: str, body: bytes) -> int:
    """The status. More of the body may come than goes past TCP: it leaves then, and is told of what TCP has, as by an agent."""
    head = f"PUT /{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    left = memoryview(head.encode() + body)
    answer = b""
    deadline = time.monotonic() + 20
    while b"\r\n\r\n" not in answer:
        assert time.monotonic() < deadline, f"{len(left)} bytes not sent"
        readable, writable, _ = select.select([sock], [sock] if left else [], [], 0.2)
        if writable:
            left = left[sock.send(left) :]
        if readable:
            answer += sock.recv(1 << 16)
        if not readable and not writable:
            walk_and_nudge(node, *pods)
    return int(answer.split()[1])


def get(sock: socket.socket, *names: str, cookie: bytes = b"") -> list[bytes]:
    """Answers to requests that are all sent at once."""
    request = b"".join(
        b"GET /%s HTTP/1.1\r\nHost: x\r\nCookie: %s\r\n\r\n" % (name.encode(), cookie) for name in names
    )
    assert sock.send(request) == len(request)
    data = b""
    bodies: list[bytes] = []
    while len(bodies) < len(names):
        assert select.select([sock], [], [], 10)[0], "no answer"
        data += sock.recv(1 << 20)
        while True:
            head, separator, rest = data.partition(b"\r\n\r\n")
            if not separator:
                break
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            if len(rest) < length:
                break
            bodies.append(rest[:length])
            data = rest[length:]
    assert not data
    return bodies
