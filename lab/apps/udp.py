"""UDP there and back: ``serve ADDRESS PORT`` gives back what it gets, ``ask ADDRESS PORT TEXT`` prints the answer."""

import socket
import sys

what, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
    if what == "serve":
        sock.bind((address, port))
        while True:
            data, peer = sock.recvfrom(1 << 16)
            sock.sendto(data, peer)
    sock.settimeout(3)
    sock.sendto(sys.argv[4].encode(), (address, port))
    print(sock.recvfrom(1 << 16)[0].decode())
