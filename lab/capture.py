"""A packet capture on the fabric that never loses a packet unnoticed.

Reads AF_PACKET sockets opened in the fabric's namespace. A claim that something was *not* on the wire is only as good as
the capture, so the kernel's drop counter is part of the result.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lab import namespaces
from lab.errors import LabError

_ETH_P_ALL = 0x0003
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_BUFFER = 256 << 20
_SNAP = 1 << 16


class Capture:
    """``with lab.capture() as capture: ...``; afterwards :meth:`holds` and :meth:`packets` look at all that was seen.

    :param interfaces: the fabric's ports to listen on; each packet between two nodes is seen at both ports.
    """

    def __init__(self, fabric: Path, interfaces: Sequence[str]) -> None:
        self._fabric = fabric
        self._interfaces = interfaces
        self._packets: list[bytes] = []
        self._sockets: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        #: Packets that the kernel could not give us; the capture proves nothing unless it is 0.
        self.dropped = 0

    def __enter__(self) -> Self:
        def open_all() -> None:
            for name in self._interfaces:
                sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
                self._sockets.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
                sock.setblocking(False)
                sock.bind((name, _ETH_P_ALL))

        namespaces.inside(self._fabric, open_all)
        self._thread = threading.Thread(target=self._read, name="capture")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for sock in self._sockets:
            _, dropped = struct.unpack("II", sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
            self.dropped += dropped
            sock.close()
        if self.dropped and error is None:
            raise LabError(f"the capture lost {self.dropped} packets: it proves nothing")

    def _read(self) -> None:
        poll = select.poll()
        by_fd = {sock.fileno(): sock for sock in self._sockets}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while True:
            ended = self._stop.is_set()
            ready = poll.poll(20)
            for fd, _ in ready:
                for _ in range(256):
                    try:
                        self._packets.append(by_fd[fd].recv(_SNAP))
                    except BlockingIOError:
                        break
            if ended and not ready:
                return

    def packets(self) -> list[bytes]:
        """Whole frames, Ethernet header first."""
        return list(self._packets)

    def holds(self, marker: bytes) -> int:
        """How many packets hold the marker."""
        return sum(marker in packet for packet in self._packets)

    def segments(self) -> Iterator[tuple[str, int, str, int, bytes]]:
        """TCP over IPv4: source address and port, destination address and port, payload."""
        for packet in self._packets:
            if packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
                continue
            start = 14 + (packet[14] & 15) * 4
            total = struct.unpack_from("!H", packet, 16)[0]
            # A segment that the sender's kernel left to segmentation offload may say 0.
            end = 14 + total if total else len(packet)
            source, destination = struct.unpack_from("!HH", packet, start)
            offset = (packet[start + 12] >> 4) * 4
            yield (
                socket.inet_ntoa(packet[26:30]),
                source,
                socket.inet_ntoa(packet[30:34]),
                destination,
                packet[start + offset : end],
            )
