"""An HTTP/1.1 client that asks many times and writes one line of JSON per answer.

Each line: status, headers, body (parsed if it is JSON), seconds, and the connection's own addresses; or ``error``.
"""

import argparse
import http.client
import json
import sys
import time
from urllib.parse import urlsplit

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--count", type=int, default=1)
parser.add_argument("--method", default="GET")
parser.add_argument("--header", action="append", default=[], help="NAME: VALUE")
parser.add_argument("--body", default="")
parser.add_argument("--per-connection", type=int, default=1, help="requests on one connection")
parser.add_argument("--interval", type=float, default=0.0)
parser.add_argument("--timeout", type=float, default=15.0)
options = parser.parse_args()

url = urlsplit(options.url)
assert url.hostname
headers = dict(line.split(": ", 1) for line in options.header)
connection = None
for number in range(options.count):
    record: dict[str, object] = {"at": time.time()}
    started = time.monotonic()
    try:
        if connection is None:
            connection = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=options.timeout)
            connection.connect()
        record["peer"] = connection.sock.getpeername()
        record["local"] = connection.sock.getsockname()
        path = url.path or "/"
        connection.request(options.method, path, body=options.body or None, headers=headers)
        response = connection.getresponse()
        text = response.read().decode("latin-1")
        record["status"] = response.status
        record["headers"] = {name.lower(): value for name, value in response.getheaders()}
        try:
            record["body"] = json.loads(text)
        except ValueError:
            record["body"] = text
        if response.will_close or (number + 1) % options.per_connection == 0:
            connection.close()
            connection = None
    except (OSError, http.client.HTTPException) as error:
        record["error"] = f"{type(error).__name__}: {error}"
        if connection is not None:
            connection.close()
            connection = None
    record["seconds"] = time.monotonic() - started
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()
    if options.interval:
        time.sleep(options.interval)
