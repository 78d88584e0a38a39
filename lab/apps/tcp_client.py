"""A TCP client that does what it is told: one JSON command per line on standard input, one JSON answer per line on output.

``{"op": "open", "key", "address", "port", "timeout", "family"}``  dial; answers peer, local and seconds, or error
``{"op": "exchange", "key", "size", "times"}``  send, and read the same amount back (an echo server is there);
    answers how many bytes of its life came by TCP too (the others came by the splice)
``{"op": "send", "key", "text"}``, ``{"op": "read", "key", "timeout"}``  one way only; read answers text, "" at the end
``{"op": "close", "key", "how"}``  ``fin`` (default) or ``rst``; answers the bytes sent and received over its life
"""

import json
import socket
import struct
import sys
import time
from typing import Any

_BYTES_RECEIVED = 128  #: offset of tcpi_bytes_received in struct tcp_info


class Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.sent = 0
        self.received = 0


connections: dict[str, Connection] = {}


def main() -> None:
    for line in sys.stdin:
        command = json.loads(line)
        started = time.monotonic()
        try:
            answer = globals()["do_" + command.pop("op")](**command)
        except OSError as error:
            answer = {"error": f"{type(error).__name__}: {error}", "errno": error.errno}
        answer["seconds"] = time.monotonic() - started
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def do_open(
    key: str, address: str, port: int, timeout: float = 12.0, source: int = 0, family: int = 0
) -> dict[str, Any]:
    sock = socket.socket(family or (socket.AF_INET6 if ":" in address else socket.AF_INET))
    try:
        sock.settimeout(timeout)
        if source:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", source))
        sock.connect((address, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer, local = sock.getpeername()[:2], sock.getsockname()[:2]
    except OSError:
        sock.close()
        raise
    connections[key] = Connection(sock)
    return {"peer": peer, "local": local}


def do_exchange(key: str, size: int = 64, times: int = 1, timeout: float = 12.0) -> dict[str, Any]:
    connection = connections[key]
    connection.socket.settimeout(timeout)
    data = bytes(range(256)) * (size // 256 + 1)
    for _ in range(times):
        connection.socket.sendall(data[:size])
        connection.sent += size
        got = b""
        while len(got) < size:
            part = connection.socket.recv(1 << 16)
            if not part:
                return {"error": "end of stream", "errno": 0, "missing": size - len(got)}
            got += part
            connection.received += len(part)
        if got != data[:size]:
            return {"error": "other bytes came back", "errno": 0}
    info = connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (by_tcp,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED)
    return {"sent": connection.sent, "received": connection.received, "by_tcp": by_tcp}


def do_send(key: str, text: str, timeout: float = 12.0) -> dict[str, Any]:
    connection = connections[key]
    connection.socket.settimeout(timeout)
    data = text.encode()
    connection.socket.sendall(data)
    connection.sent += len(data)
    return {"sent": connection.sent}


def do_read(key: str, timeout: float = 12.0, size: int = 1 << 16) -> dict[str, Any]:
    connection = connections[key]
    connection.socket.settimeout(timeout)
    data = connection.socket.recv(size)
    connection.received += len(data)
    return {"text": data.decode("latin-1"), "received": connection.received}


def do_close(key: str, how: str = "fin") -> dict[str, Any]:
    connection = connections.pop(key)
    if how == "rst":
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.socket.close()
    return {"sent": connection.sent, "received": connection.received}


main()
