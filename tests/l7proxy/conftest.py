"""A running proxy in the test's own process, with real sockets: see :mod:`tests.l7proxy.fakes`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from google.protobuf.message import Message

from l7proxy.accesslog import AccessLog
from l7proxy.resources import Resources
from l7proxy.server import Proxy
from tests.l7proxy.fakes import xds
from tests.l7proxy.fakes.agent import FakeAgent
from tests.l7proxy.fakes.backend import Backend
from tests.l7proxy.fakes.nodeproxy import NodeProxy


async def eventually(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Wait for something that has no event."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Client:
    """A raw connection of the application."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def response(self, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body (chunks joined; trailers as headers)."""
        async with asyncio.timeout(10):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            status = int(lines[0].split(" ")[1])
            fields = dict(line.split(": ", 1) for line in lines[1:] if line)
            body = b""
            if head_only or status == 204 or status < 200 or status == 304:
                return status, fields, body
            if fields.get("transfer-encoding") == "chunked":
                while size := int((await self.reader.readline()).strip(), 16):
                    body += await self.reader.readexactly(size)
                    await self.reader.readexactly(2)
                while (line := await self.reader.readline()) != b"\r\n":
                    name, value = line.decode().strip().split(": ", 1)
                    fields[name] = value
            elif "content-length" in fields:
                body = await self.reader.readexactly(int(fields["content-length"]))
            else:
                body = await self.reader.read()
            return status, fields, body

    async def get(
        self, path: str = "/", method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.send(f"{method} {path} HTTP/1.1\r\nhost: web-app\r\n{lines}\r\n".encode())
        return await self.response(head_only=method == "HEAD")

    async def closed(self) -> bytes:
        """What still comes until the proxy closes."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    def close(self) -> None:
        self.writer.close()


class Mesh:
    """A proxy on ``node-a`` with one enrolled pod, ``client``."""

    def __init__(self, proxy: Proxy, agent: FakeAgent, log: Path, run: Path) -> None:
        self.proxy = proxy
        self.agent = agent
        self.log = log
        self.run = run
        (run / "nodeproxy").mkdir()
        self.resources = Resources()
        self.address = ("", 0)
        self.dialled = (xds.VIP, xds.PORT)
        self.backends: list[Backend] = []
        self._clients: list[Client] = []
        self._version = 0

    def configure(self, *messages: Message) -> list[str]:
        self._version += 1
        errors = xds.apply(self.resources, *messages, version=str(self._version))
        self.proxy.publish(self.resources.build())
        return errors

    async def backend(self, name: str = "v1", **fields: object) -> Backend:
        backend = await Backend(name, **fields).start()  # type: ignore[arg-type]
        self.backends.append(backend)
        return backend

    async def serve(
        self, *routes: dict[str, object], backend: Backend | None = None, **virtual_host: Any
    ) -> Backend:
        """One service, one backend, the given routes."""
        found = backend or await self.backend()
        self.configure(
            xds.listener(),
            xds.routes(*routes, **virtual_host),
            xds.cluster(),
            xds.assignment(xds.endpoint(found.port)),
        )
        return found

    async def client(self) -> Client:
        for _ in range(500):
            try:
                reader, writer = await asyncio.open_connection(*self.address)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
        client = Client(reader, writer)
        self._clients.append(client)
        return client

    async def lines(self, count: int) -> list[str]:
        """The access log's lines, when there are at least ``count``."""
        for _ in range(200):
            self.proxy._access_log.flush()  # type: ignore[union-attr]
            lines = self.log.read_text().splitlines()
            if len(lines) >= count:
                return lines
            await asyncio.sleep(0.01)
        raise AssertionError(f"access log has {lines}")

    async def stop(self) -> None:
        for client in self._clients:
            client.close()
        for backend in self.backends:
            await backend.stop()
        await self.proxy.drain(0.2)
        self.agent.stop()


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    log = tmp_path / "access.log"
    agent = FakeAgent(tmp_path)
    agent.start()
    dialled: dict[str, Mesh] = {}
    proxy = Proxy(
        node="node-a",
        run=str(tmp_path),
        access_log=AccessLog(str(log)),
        random=Random(1),
        captured=lambda cookie, peer: dialled["mesh"].dialled,
    )
    result = dialled["mesh"] = Mesh(proxy, agent, log, tmp_path)
    proxy.start()
    await agent.connected()
    result.address = agent.enroll("client")
    await eventually(lambda: any(pod.server for pod in proxy.pods.values()))
    yield result
    await result.stop()


@pytest.fixture
async def remote(mesh: Mesh) -> AsyncIterator[NodeProxy]:
    backend = await mesh.backend("remote")
    mesh.configure(
        xds.listener(),
        xds.routes(
            {
                "match": {"prefix": "/"},
                "route": {
                    "cluster": xds.cluster_name(),
                    "timeout": "0s",
                    "retry_policy": {"retry_on": "connect-failure", "num_retries": 1},
                },
            }
        ),
        xds.cluster(),
        xds.assignment(xds.endpoint(8080, address="10.2.0.9", node="node-b", version="v2")),
    )
    result = await NodeProxy(mesh.run / "nodeproxy" / "nodeproxy.sock", backend).start()
    yield result
    result.stop()
