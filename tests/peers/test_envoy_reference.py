"""Envoy against Envoy over HBONE: proves the configurations that the node proxy is then tested with."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import envoy
from tests.peers import envoy_hbone
from tests.peers.envoy_hbone import Address
from tests.peers.waiting import wait_until_live


def test_bytes_go_both_ways_and_the_server_sees_who_came(tmp_path: Path) -> None:
    client, server = envoy.make_identities(tmp_path)
    with _running_pair(tmp_path, client, server) as entry:
        for size in (1, 70_000):
            assert _echoed(entry, b"x" * size) == b"x" * size
    records = [json.loads(line) for line in (tmp_path / "server.log").read_text().splitlines()]
    assert len(records) == 2
    assert {r["method"] for r in records} == {"CONNECT"}
    assert {r["peer"] for r in records} == {server.peer}
    assert {r["tls"] for r in records} == {"TLSv1.3"}
    assert len({r["connection"] for r in records}) == 1, "streams share one connection"


def test_a_server_of_another_name_is_refused_by_the_client(tmp_path: Path) -> None:
    client, server = envoy.make_identities(tmp_path)
    stranger = envoy.Identity(
        client.chain, client.key, client.roots, "spiffe://bench.local/ns/default/sa/other"
    )
    with _running_pair(tmp_path, stranger, server) as entry:
        assert _echoed(entry, b"hello") == b""


@contextmanager
def _running_pair(folder: Path, client: envoy.Identity, server: envoy.Identity) -> Iterator[Address]:
    application = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_echo, args=(application,), daemon=True).start()
    entry, hbone, admin_client, admin_server = (Address("127.0.0.1", port) for port in _free_ports(4))
    configs = {
        "server": envoy_hbone.server_config(
            listen=hbone,
            application=Address(*application.getsockname()),
            identity=server,
            admin=admin_server,
            log=folder / "server.log",
        ),
        "client": envoy_hbone.client_config(
            listen=entry, hbone=hbone, authority="10.1.2.3:8080", identity=client, admin=admin_client
        ),
    }
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, config in configs.items():
            command = envoy.command(envoy.write(config, folder / f"{name}.json"))
            running.append(subprocess.Popen(command, stderr=(folder / f"{name}.err").open("wb")))
        for admin in (admin_server, admin_client):
            wait_until_live(admin)
        yield entry
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(10)
        application.close()


def _echo(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)


def _echoed(entry: Address, data: bytes) -> bytes:
    """What comes back for ``data``: nothing when the tunnel is refused."""
    received = bytearray()
    with socket.create_connection((entry.host, entry.port), timeout=10) as connection:
        try:
            connection.sendall(data)
            while len(received) < len(data) and (part := connection.recv(65536)):
                received += part
        except ConnectionError:
            pass
    return bytes(received)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
