"""The process: its command line, its life, and ``check`` without one."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from controlplane import compiler
from controlplane.check import Severity, check
from controlplane.controller import Controller
from controlplane.model.graph import Graph
from controlplane.source import Key
from tests.controlplane.support import Harness, MeshClient, eventually, namespace, pod, two_versions, write
from tests.requirements import ROOT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Process:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.port, self.admin = free_port(), free_port()
        (root / "config").mkdir(exist_ok=True)
        (root / "credentials").mkdir(exist_ok=True)
        (root / "credentials/node-a").write_text(hashlib.sha256(b"token-of-node-a").hexdigest())

    def command(self, **changes: str) -> list[str]:
        flags = {
            "config": str(self.root / "config"),
            "state": str(self.root / "state"),
            "listen": f"127.0.0.1:{self.port}",
            "admin": f"127.0.0.1:{self.admin}",
            "credentials": str(self.root / "credentials"),
            "server-name": "127.0.0.1",
            "log-format": "json",
        }
        arguments = [a for k, v in {**flags, **changes}.items() for a in (f"--{k}", v)]
        return [sys.executable, "-m", "controlplane", *arguments]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *self.command(), cwd=ROOT, stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(20):
                while True:
                    try:
                        await asyncio.to_thread(
                            urllib.request.urlopen, f"http://127.0.0.1:{self.admin}/healthz/ready"
                        )
                        break
                    except OSError:
                        assert process.returncode is None
                        await asyncio.sleep(0.05)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def channel(self) -> grpc.aio.Channel:
        roots = (self.root / "state/roots.pem").read_bytes()
        return grpc.aio.secure_channel(f"127.0.0.1:{self.port}", grpc.ssl_channel_credentials(roots))


@pytest.mark.timeout(60)
async def test_life(tmp_path: Path) -> None:
    """Serve, be killed, serve again from the same state with the same root and the last good configuration, end on SIGTERM."""
    process = Process(tmp_path)
    write(tmp_path / "config", "web.yaml", *two_versions())
    async with process.running() as first:
        roots = (tmp_path / "state/roots.pem").read_bytes()
        async with process.channel() as channel:
            client = MeshClient(channel)
            await client.hello()
            await client.take()
            version = client.version
        first.kill()
        await first.wait()
    write(tmp_path / "config", "web.yaml", "}")
    async with process.running() as second:
        assert (tmp_path / "state/roots.pem").read_bytes() == roots
        async with process.channel() as channel:
            client = MeshClient(channel)
            await client.hello(version=version)
            update = await client.take()
            assert (update.version, update.complete, update.upserts) == (version, False, ())
        second.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(second.wait(), 10) == 0
        assert second.stderr is not None
        lines = [
            json.loads(line) for line in (await second.stderr.read()).splitlines() if line.startswith(b"{")
        ]
        (refused,) = [line for line in lines if line["event"] == "configuration refused"]
        assert "web.yaml" in refused["finding"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trust-domain": "Not Valid"}, "trust domain characters"),
        ({"listen": "127.0.0.1:1"}, ""),
        ({"admin": "203.0.113.1:15014"}, "assign requested address"),
    ],
)
async def test_what_cannot_start_says_why(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    process = Process(tmp_path)
    if "listen" in changes:
        busy = socket.create_server(("127.0.0.1", 0))
        changes = {"listen": f"127.0.0.1:{busy.getsockname()[1]}"}
        reason = "cannot be bound"
    started = await asyncio.create_subprocess_exec(
        *process.command(**changes), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    _, error = await asyncio.wait_for(started.communicate(), 20)
    assert started.returncode == 1
    line = json.loads(error.splitlines()[-1])
    assert line["event"] == "cannot start"
    assert reason in line["error"]
    if "listen" in changes:
        busy.close()


def test_check(tmp_path: Path, shared: Path) -> None:
    write(tmp_path, "web.yaml", *two_versions("my-app"))
    write(tmp_path, "bad.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {}")
    for name in ("05-istio-gateway.yaml", "10-istio-split-90-10.yaml"):
        (tmp_path / name).write_text((shared / "seed-config" / name).read_text())
    findings = check(tmp_path)
    assert [f.severity for f in findings] == [Severity.ERROR] * 3 + [Severity.WARNING]
    text = "\n".join(map(str, findings))
    assert "error: bad.yaml Pod default/x metadata.uid: required, but missing" in text
    assert "no DestinationRule defines subset v1 of my-app.default.svc.cluster.local" in text
    assert (
        "warning: 05-istio-gateway.yaml Gateway.networking.istio.io default/bookinfo-gateway: Gateway is read, not in force yet"
        in text
    )


def test_check_is_silent_where_all_is_well(tmp_path: Path) -> None:
    write(tmp_path, "web.yaml", namespace("one"), pod("a"))
    assert check(tmp_path) == []


async def test_a_bug_of_ours_costs_one_object(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler raises for one object: that one is left out, running or at the start, and all others are served."""

    def broken(g: Graph, key: Key) -> None:
        if key.name == "poison":
            raise KeyError("a bug")

    monkeypatch.setitem(compiler._CELLS, ("", "Namespace"), (broken,))
    async with harness.serving() as controller, harness.channel() as channel:
        client = MeshClient(channel)
        await client.hello()
        await client.take()
        poison = write(harness.config, "poison.yaml", namespace("poison"), pod("a"))

        async def rejected() -> bool:
            return "mycel_controlplane_snapshots_rejected_total 1.0" in await harness.page("/metrics")

        await eventually(rejected)
        await client.take()
        assert set(client.state) == {"mesh", "workload/uid-default-a"}
        assert "Namespace poison" in {f.object for f in controller.findings}
        write(harness.config, "b.yaml", pod("b"))
        await client.take()
        assert set(client.state) == {"mesh", "workload/uid-default-a", "workload/uid-default-b"}
    async with harness.serving() as again:
        assert set(again.snapshot.workloads) == {"uid-default-a", "uid-default-b"}
        assert "Namespace poison" in {f.object for f in again.findings}
        poison.unlink()
        await eventually(lambda: _gone(again))
        assert set(again.snapshot.workloads) == {"uid-default-b"}


async def _gone(controller: Controller) -> bool:
    return not controller.findings


async def test_a_source_that_fails_is_followed_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(root: Path) -> Any:
        monkeypatch.undo()
        raise OSError(errno.EMFILE, "no inotify instance")

    monkeypatch.setattr("controlplane.source.folder.watch", watch)
    async with harness.serving() as controller:
        write(harness.config, "a.yaml", pod("a"))

        async def there() -> bool:
            return bool(controller.snapshot.workloads)

        await eventually(there)
