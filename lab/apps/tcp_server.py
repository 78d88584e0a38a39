"""A TCP server that gives back what it gets, and writes down who came and how much went each way.

One JSON line per event on standard output: ``open`` with peer and local address, ``close`` with the bytes received and sent.
With ``--greet`` it speaks first, one JSON line that says who the client is to it; with ``--mute`` it answers nothing; with
``--poll`` it reads as event loops do, from a socket that does not block.
"""

import argparse
import json
import socket
import socketserver
import sys
from typing import Any


class Handler(socketserver.BaseRequestHandler):
    greet = False
    mute = False
    poll = False

    def handle(self) -> None:
        sock: socket.socket = self.request
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.poll:
            sock.settimeout(3600)
        received = sent = 0
        about = {"peer": sock.getpeername()[:2], "local": sock.getsockname()[:2]}
        tell({"event": "open", **about})
        error = ""
        try:
            if self.greet:
                line = json.dumps(about).encode() + b"\n"
                sock.sendall(line)
                sent += len(line)
            while data := sock.recv(1 << 16):
                received += len(data)
                if not self.mute:
                    sock.sendall(data)
                    sent += len(data)
        except OSError as failure:
            error = str(failure)
        tell({"event": "close", **about, "received": received, "sent": sent, "error": error})


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512


class Server6(Server):
    address_family = socket.AF_INET6


def tell(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("--bind", default="0.0.0.0")
parser.add_argument("--greet", action="store_true")
parser.add_argument("--mute", action="store_true")
parser.add_argument("--poll", action="store_true")
options = parser.parse_args()
Handler.greet, Handler.mute, Handler.poll = options.greet, options.mute, options.poll
(Server6 if ":" in options.bind else Server)((options.bind, options.port), Handler).serve_forever()
