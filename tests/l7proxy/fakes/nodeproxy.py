"""A node proxy for l7proxy: nodeproxy.api over a unix socket, plain TCP behind it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from nodeproxy import api as nodeproxy
from tests.l7proxy.fakes.backend import Backend


class NodeProxy:
    """The node proxy's unix socket: one header in, one byte out, then bytes both ways to a backend.

    An end is passed on by a shutdown; what is reset is closed.
    """

    def __init__(self, path: Path, backend: Backend) -> None:
        self.path = path
        self.backend = backend
        self.handoffs: list[nodeproxy.Handoff] = []
        self.status = nodeproxy.Status.CONNECTED
        self._server: asyncio.Server | None = None

    async def start(self) -> NodeProxy:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.readexactly(16)
        data += await reader.readexactly(int.from_bytes(data[14:16], "big"))
        decoded = nodeproxy.decode(data)
        assert decoded is not None
        self.handoffs.append(decoded[0])
        writer.write(bytes((self.status,)))
        if self.status is not nodeproxy.Status.CONNECTED:
            writer.close()
            return
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.backend.port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
                target.write_eof()
                return
            reader.feed_eof()
            inner_writer.close()
            writer.close()

        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        inner_writer.close()
        writer.close()

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()
