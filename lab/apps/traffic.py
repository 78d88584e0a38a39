"""Steady traffic that writes down every outcome: a new TCP connection each time, one echo, one line of JSON.

SIGTERM ends it when the connection under way is done and written down. Each line holds the time (``time.time()``), the
outcome (``ok``, or what failed and how) and, when the server greets (see ``tcp_server.py --greet``), who the client was to it.
"""

import argparse
import json
import signal
import socket
import sys
import time
from types import FrameType

ending = False


def stop(number: int, frame: FrameType | None) -> None:
    global ending
    ending = True


signal.signal(signal.SIGTERM, stop)
parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("port", type=int)
parser.add_argument("--interval", type=float, default=0.01)
parser.add_argument("--timeout", type=float, default=12.0)
parser.add_argument("--count", type=int, default=0)
parser.add_argument("--greeted", action="store_true")
options = parser.parse_args()

number = 0
while not ending and (not options.count or number < options.count):
    number += 1
    record: dict[str, object] = {"at": time.time()}
    marker = b"%016d" % number
    step = "connect"
    try:
        with socket.create_connection((options.address, options.port), options.timeout) as sock:
            record["local"] = sock.getsockname()
            stream = sock.makefile("rb")
            if options.greeted:
                step = "greeting"
                line = stream.readline()
                if not line:
                    raise ConnectionAbortedError("end of stream")
                record["greeting"] = json.loads(line)
            step = "echo"
            sock.sendall(marker)
            got = stream.read(len(marker))
            record["outcome"] = (
                "ok" if got == marker else "echo: " + ("end of stream" if not got else repr(got))
            )
    except OSError as error:
        record["outcome"] = f"{step}: {type(error).__name__}"
    record["seconds"] = time.time() - float(str(record["at"]))
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()
    time.sleep(options.interval)
