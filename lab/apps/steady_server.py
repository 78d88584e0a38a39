"""A server that ends as a well-kept one does: HTTP/1.1 on one port, lines echoed on another.

HTTP answers JSON of its name and version. Each line sent to the echo port comes back with the name in front. SIGTERM begins
the drain: for ``--linger`` seconds new connections are still taken (endpoints are withdrawn meanwhile), then the listeners
close. While draining every HTTP answer says ``connection: close``, and an echoed line begins with ``bye``: the client is
to close. The process ends with its last connection.
"""

import argparse
import asyncio
import json
import signal
import socket
from collections.abc import Awaitable, Callable

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

parser = argparse.ArgumentParser()
parser.add_argument("--http", type=int, default=8080)
parser.add_argument("--echo", type=int, default=9000)
parser.add_argument("--name", default=socket.gethostname())
parser.add_argument("--version", default="")
parser.add_argument("--linger", type=float, default=2.0)
options = parser.parse_args()

draining = False
open_connections: set[asyncio.Task[None]] = set()


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = await reader.readline()
            if not line:
                return
            head += line
        last = draining
        path = head.split(b" ", 2)[1].decode("ascii")
        if path.startswith("/slow/"):
            await asyncio.sleep(float(path.removeprefix("/slow/")))
        peer = writer.get_extra_info("peername")
        about = {"pod": options.name, "version": options.version, "client": peer[0]}
        body = json.dumps(about).encode()
        close = b"connection: close\r\n" if last else b""
        length = b"content-length: %d\r\n" % len(body)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + length + close + b"\r\n" + body
        )
        await writer.drain()
        if last:
            return


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        word = b"bye" if draining else b"ok"
        writer.write(b"%s %s %s" % (word, options.name.encode(), line))
        await writer.drain()


def kept(handler: Handler) -> Handler:
    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_connections.add(task)
        try:
            await handler(reader, writer)
            writer.close()
            await writer.wait_closed()
        except ConnectionError:
            pass
        finally:
            open_connections.discard(task)

    return run


async def main() -> None:
    global draining
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    servers = [
        await asyncio.start_server(kept(handler), "0.0.0.0", port, backlog=1024)
        for handler, port in ((http, options.http), (echo, options.echo))
    ]
    await stop.wait()
    draining = True
    await asyncio.sleep(options.linger)
    for server in servers:
        server.close()
    # A connection that was accepted at the last moment is among them a turn of the loop later.
    await asyncio.sleep(0.05)
    await asyncio.gather(*open_connections)


asyncio.run(main())
