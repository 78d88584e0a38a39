"""One UDP socket that asks without end: ``ADDRESS PORT [--connected]``, a line of JSON for each question.

As resolvers do it: each question has a number and waits 0.2 s for its own answer, then the next one is asked; what comes late is
passed over. A line says ``n``, and ``text`` and ``source`` of the answer, or ``error``.
"""

import json
import socket
import sys
import time

address, port, connected = sys.argv[1], int(sys.argv[2]), "--connected" in sys.argv
with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
    if connected:
        sock.connect((address, port))
    number = 0
    while True:
        number += 1
        line: dict[str, object] = {"n": number}
        question = f"{number} ".encode()
        try:
            if connected:
                sock.send(question)
            else:
                sock.sendto(question, (address, port))
            until = time.monotonic() + 0.2
            while True:
                sock.settimeout(max(0.001, until - time.monotonic()))
                data, source = sock.recvfrom(1 << 16)
                if data.startswith(question):
                    line |= {"text": data[len(question) :].decode(), "source": source[:2]}
                    break
        except OSError as error:
            line["error"] = type(error).__name__
        print(json.dumps(line), flush=True)
        time.sleep(0.01)
