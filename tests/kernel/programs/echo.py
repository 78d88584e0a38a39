"""An echo server: ``echo.py PORT asyncio|blocking``. Standard library only, run by path."""

import asyncio
import socket
import sys
import threading

PORT = int(sys.argv[1])


async def serve(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def run():
    server = await asyncio.start_server(serve, "", PORT)
    print("ready", flush=True)
    await server.serve_forever()


def echo(client):
    with client:
        while data := client.recv(65536):
            client.sendall(data)


if sys.argv[2] == "asyncio":
    asyncio.run(run())
else:
    listener = socket.create_server(("", PORT))
    print("ready", flush=True)
    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
