"""An HTTP server that says what it received, or does what the test's script says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Request:
    head: bytes
    body: bytes

    @property
    def line(self) -> str:
        return self.head.split(b"\r\n", 1)[0].decode()

    def header(self, name: str) -> str | None:
        found = [
            line.partition(b": ")[2].decode("latin-1")
            for line in self.head.split(b"\r\n")[1:]
            if line.partition(b":")[0].decode().lower() == name
        ]
        return ",".join(found) if found else None


Script = Callable[["Request", asyncio.StreamWriter, int], Awaitable[None]]


@dataclass
class Backend:
    """Reads requests strictly enough for tests: Content-Length and chunked. ``script(request, writer, number)`` answers."""

    name: str = "v1"
    script: Script | None = None
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self) -> Backend:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self._server = None
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = Request(head, b"")
                self.requests.append(request)
                request.body = await self._body(request, reader)
                if self.script is not None:
                    await self.script(request, writer, len(self.requests))
                    if writer.is_closing():
                        return
                else:
                    body = f"{self.name}\n".encode()
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nserver: backend\r\n\r\n" % len(body) + body
                    )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _body(self, request: Request, reader: asyncio.StreamReader) -> bytes:
        if request.header("transfer-encoding") == "chunked":
            body = b""
            while True:
                size = int((await reader.readline()).strip().partition(b";")[0], 16)
                if size == 0:
                    while await reader.readline() != b"\r\n":
                        pass
                    return body
                body += await reader.readexactly(size)
                await reader.readexactly(2)
        length = int(request.header("content-length") or 0)
        return await reader.readexactly(length) if length else b""


def respond(status: int = 200, body: bytes = b"", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode() + body
