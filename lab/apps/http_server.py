"""An HTTP/1.1 server that tells about itself and about each request.

``/`` and any other path: JSON of pod, version, the client's address, the request's method, path, headers and body size.
``/status/CODE``, ``/slow/SECONDS``, ``/bytes/COUNT`` do what they say; ``/flaky/KEY/COUNT[/CODE]`` answers CODE (503) the
first COUNT times for that KEY and 200 afterwards; ``/reset/KEY/COUNT`` resets instead; ``/chunked`` answers in
chunks; ``/counts`` tells how often each path was asked for.
"""

import argparse
import collections
import json
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

seen: collections.Counter[str] = collections.Counter()
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    name = ""
    version = ""

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def answer(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.send_header("x-served-by", self.name)
        self.send_header("x-version", self.version)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def any(self) -> None:
        body = self.body()
        parts = self.path.split("?")[0].strip("/").split("/")
        with lock:
            seen[self.path] += 1
            count = seen[self.path]
        about = {
            "pod": self.name,
            "version": self.version,
            "client": self.client_address[0],
            "client_port": self.client_address[1],
            "local": self.connection.getsockname()[:2],
            "method": self.command,
            "path": self.path,
            "headers": {key.lower(): value for key, value in self.headers.items()},
            "body": len(body),
            "count": count,
        }
        status = 200
        match parts:
            case ["status", code]:
                status = int(code)
            case ["slow", seconds]:
                time.sleep(float(seconds))
            case ["bytes", size]:
                return self.answer(200, b"x" * int(size), "application/octet-stream")
            case ["flaky", _, times, *code]:
                if count <= int(times):
                    status = int(code[0]) if code else 503
            case ["reset", _, times]:
                if count <= int(times):
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                    return None
            case ["counts"]:
                return self.answer(200, json.dumps(seen).encode())
            case ["chunked"]:
                self.send_response(200)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for part in (b"one ", b"two ", b"three"):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.flush()
                    time.sleep(0.01)
                self.wfile.write(b"0\r\n\r\n")
                return None
        return self.answer(status, json.dumps(about).encode())

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = any

    def log_message(self, format: str, *values: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, ValueError, OSError)):
            super().handle_error(request, client_address)


class Server6(Server):
    address_family = socket.AF_INET6


parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("--name", default=socket.gethostname())
parser.add_argument("--version", default="")
parser.add_argument("--bind", default="0.0.0.0")
options = parser.parse_args()
Handler.name, Handler.version = options.name, options.version
(Server6 if ":" in options.bind else Server)((options.bind, options.port), Handler).serve_forever()
