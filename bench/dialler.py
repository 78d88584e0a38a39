"""In a pod: ``serve PORT`` takes connections now and then, and drops them; ``dial PORT`` times connect().

The first line on standard input is the addresses (JSON), each other one ``KIND COUNT``; the answer is the median in nanoseconds
of ``count`` calls, or the error. Kinds: ``tcp``, ``udp``, and ``tcp-last`` for the last of the addresses only.
"""

import json
import os
import random
import socket
import statistics
import struct
import sys
import time

SERVICE_PORT = 80
_TEXTS = 10_000


def serve(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen(4096)
        listener.setblocking(False)
        while True:
            # Not woken for each: where the scheduler puts who wakes would be most of what is measured.
            time.sleep(0.01)
            try:
                while True:
                    listener.accept()[0].close()
            except BlockingIOError:
                pass


def dial(addresses: list[str], kind: str, count: int) -> float:
    tcp = kind != "udp"
    times = []
    for address in random.sample(addresses, min(count, len(addresses))) * (
        count // min(count, len(addresses))
    ):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
            if tcp:
                sock.settimeout(3)
                # No port is left waiting behind.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            target = (address, SERVICE_PORT)
            began = time.perf_counter_ns()
            sock.connect(target)
            times.append(time.perf_counter_ns() - began)
    return statistics.median(times)


def main() -> None:
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    told = json.loads(sys.stdin.readline())
    # As many texts wherever there is one service only, so that the caches hold as little of this process.
    addresses = ["".join(list(told[number % len(told)])) for number in range(max(_TEXTS, len(told)))]
    for line in sys.stdin:
        kind, count = line.split()
        try:
            print(dial(addresses[-1:] if kind == "tcp-last" else addresses, kind, int(count)), flush=True)
        except OSError as error:
            print(f"{kind}: {error}", flush=True)


main()
