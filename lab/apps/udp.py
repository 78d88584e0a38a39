"""UDP there and back: ``udp.py serve PORT`` gives back what it gets, ``udp.py ask ADDRESS PORT TEXT`` prints the answer."""

import socket
import sys

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    if sys.argv[1] == "serve":
        sock.bind(("0.0.0.0", int(sys.argv[2])))
        while True:
            data, peer = sock.recvfrom(1 << 16)
            sock.sendto(data, peer)
    sock.settimeout(3)
    sock.sendto(sys.argv[4].encode(), (sys.argv[2], int(sys.argv[3])))
    print(sock.recvfrom(1 << 16)[0].decode())
