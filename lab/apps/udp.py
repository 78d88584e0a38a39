"""UDP there and back: ``serve ADDRESS PORT [NAME]`` gives back what it gets and its name, ``ask ADDRESS PORT TEXT`` prints it."""

import socket
import sys

what, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
    if what == "serve":
        sock.bind((address, port))
        name = sys.argv[4].encode() if len(sys.argv) > 4 else b""
        while True:
            data, peer = sock.recvfrom(1 << 16)
            sock.sendto(data + name, peer)
    sock.settimeout(3)
    sock.sendto(sys.argv[4].encode(), (address, port))
    print(sock.recvfrom(1 << 16)[0].decode())
