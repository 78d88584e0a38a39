"""Dial once: exit status 0 if the connection was established, 1 with the reason if not."""

import argparse
import socket
import sys

parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("port", type=int)
parser.add_argument("--timeout", type=float, default=2.0)
options = parser.parse_args()
try:
    socket.create_connection((options.address, options.port), options.timeout).close()
except OSError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
