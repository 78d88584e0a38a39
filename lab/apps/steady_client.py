"""Steady traffic of several kinds at once, whose every failure is written down.

``--http URL``: ``new`` asks once per connection, ``kept`` asks again and again on one connection and follows the server's
``connection: close``. ``--echo HOST:PORT``: ``line`` sends one line per connection, ``long`` keeps a connection until the
server says ``bye`` or it is ``--life`` seconds old. A connection that the server ends without announcing it is a failure,
whatever it was doing.

Writes one line of JSON for each failure, as it happens, one each ``--report`` seconds with the counts so far, and one at the
end (SIGTERM, or ``--seconds``) with ``"end": true``. Times are ``time.time()``.
"""

import argparse
import http.client
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

parser = argparse.ArgumentParser()
parser.add_argument("--http", action="append", default=[])
parser.add_argument("--echo", action="append", default=[])
parser.add_argument("--workers", type=int, default=2, help="of each kind and target")
parser.add_argument("--interval", type=float, default=0.05, help="seconds between a worker's requests")
parser.add_argument("--timeout", type=float, default=10.0)
parser.add_argument(
    "--life", type=float, default=float("inf"), help="seconds after which `long` opens another"
)
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("--report", type=float, default=1.0)
options = parser.parse_args()

ending = threading.Event()
lock = threading.Lock()
counts: Counter[str] = Counter()
served: Counter[str] = Counter()
slowest: dict[str, float] = {}


def say(**values: object) -> None:
    print(json.dumps({"at": time.time(), **values}), flush=True)


def done(kind: str, seconds: float, by: str) -> None:
    with lock:
        counts[kind] += 1
        served[by] += 1
        slowest[kind] = max(seconds, slowest.get(kind, 0.0))


def failed(kind: str, target: str, began: float, error: Exception | str) -> None:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    with lock:
        counts[f"{kind} failed"] += 1
        say(failed=kind, target=target, error=text, seconds=round(time.time() - began, 3))


def ask(connection: http.client.HTTPConnection, path: str) -> tuple[bool, str]:
    """(the server will close, the pod that answered)."""
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise ConnectionError(f"status {response.status}: {body[:120]!r}")
    return response.will_close, json.loads(body)["pod"]


def new(target: str) -> None:
    url = urlsplit(target)
    began = time.time()
    try:
        connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=options.timeout)
        _, by = ask(connection, url.path or "/")
        connection.close()
        done("new", time.time() - began, by)
    except (OSError, http.client.HTTPException, ValueError) as error:
        failed("new", target, began, error)


def kept(target: str) -> None:
    url = urlsplit(target)
    while not ending.is_set():
        began = time.time()
        asked = 0
        try:
            connection = http.client.HTTPConnection(
                url.hostname or "", url.port or 80, timeout=options.timeout
            )
            while not ending.wait(options.interval):
                began = time.time()
                closing, by = ask(connection, url.path or "/")
                asked += 1
                done("kept", time.time() - began, by)
                if closing:
                    break
            connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            failed("kept", target, began, f"{type(error).__name__}: {error} (after {asked} answers)")
            ending.wait(options.interval)


def dial(target: str) -> socket.socket:
    host, _, port = target.rpartition(":")
    return socket.create_connection((host, int(port)), options.timeout)


def talk(stream: socket.socket, rest: bytearray) -> tuple[bool, str]:
    """(the server says bye, the pod that answered)."""
    marker = f"{time.monotonic_ns()}".encode()
    stream.sendall(marker + b"\n")
    while b"\n" not in rest:
        part = stream.recv(4096)
        if not part:
            raise ConnectionError("end of stream")
        rest += part
    line, _, left = bytes(rest).partition(b"\n")
    rest[:] = left
    word, by, echoed = line.split(b" ")
    if echoed != marker:
        raise ConnectionError(f"sent {marker!r}, got {line!r}")
    return word == b"bye", by.decode()


def line(target: str) -> None:
    began = time.time()
    try:
        with dial(target) as stream:
            _, by = talk(stream, bytearray())
        done("line", time.time() - began, by)
    except (OSError, ValueError) as error:
        failed("line", target, began, error)


def long(target: str) -> None:
    while not ending.is_set():
        began = time.time()
        opened = began
        try:
            with dial(target) as stream:
                rest = bytearray()
                while not ending.wait(options.interval):
                    began = time.time()
                    bye, by = talk(stream, rest)
                    done("long", time.time() - began, by)
                    if bye or time.time() - opened > options.life:
                        break
        except (OSError, ValueError) as error:
            age = time.time() - opened
            failed("long", target, began, f"{type(error).__name__}: {error} (open for {age:.1f} s)")
            ending.wait(options.interval)


def again(once: Callable[[str], None]) -> Callable[[str], None]:
    def run(target: str) -> None:
        while not ending.wait(options.interval):
            once(target)

    return run


signal.signal(signal.SIGTERM, lambda *_: ending.set())
threads = [
    threading.Thread(target=work, args=(target,), daemon=True)
    for targets, kinds in ((options.http, (again(new), kept)), (options.echo, (again(line), long)))
    for target in targets
    for work in kinds
    for _ in range(options.workers)
]
for thread in threads:
    thread.start()
limit = time.monotonic() + options.seconds if options.seconds else float("inf")
while not ending.wait(options.report) and time.monotonic() < limit:
    with lock:
        say(counts=dict(counts))
ending.set()
for thread in threads:
    thread.join(options.timeout + 1)
with lock:
    say(end=True, counts=dict(counts), served=dict(served), slowest=slowest)
