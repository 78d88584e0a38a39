"""Runs in a pod: dials one address again and again and prints each change of what comes of it, with its time.

A line is ``NANOSECONDS OUTCOME`` on the machine's monotonic clock; the outcome is ``refused``, or the body's first word.
The time is that at which the answer was there, not that of the dial: what is measured can only look slower than it is.

Standard library only: the pod's interpreter knows nothing of this project.
"""

import socket
import sys
import time

_PAUSE = 0.005  # seconds between dials
_PATIENCE = 1.0  # seconds for one answer


def attempt(address: tuple[str, int], request: bytes) -> str:
    answer = b""
    try:
        with socket.create_connection(address, timeout=_PATIENCE) as connection:
            connection.sendall(request)
            while part := connection.recv(4096):
                answer += part
    except OSError:
        return "refused"
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        return "refused"
    return body.decode().partition(".")[0]


def main() -> None:
    host, port, authority = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    request = f"GET / HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n".encode()
    last = ""
    while True:
        outcome = attempt((host, port), request)
        if outcome != last:
            print(time.monotonic_ns(), outcome, flush=True)
            last = outcome
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main()
