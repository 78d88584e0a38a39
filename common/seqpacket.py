"""SEQPACKET unix sockets that carry one message and its file descriptors per packet.

Owns framing (one packet is one message), SCM_RIGHTS and the size limits; knows no message types. The kernel keeps packet
boundaries, so there is no length prefix and nothing to reassemble; a packet larger than :data:`MAX_MESSAGE` is refused
when it is sent.
"""

from __future__ import annotations

import array
import os
import socket

#: Largest message in bytes. Both ends set their socket buffers so that a packet of this size always fits.
MAX_MESSAGE = 128 * 1024
#: Most file descriptors in one packet (the kernel's SCM_MAX_FD is 253).
MAX_FDS = 64


class PacketError(Exception):
    """A packet that is no message: truncated, too large, or with more descriptors than allowed."""


def send(sock: socket.socket, message: bytes, fds: tuple[int, ...] = ()) -> None:
    """Send one packet. The descriptors are duplicated by the kernel: the caller closes its own.

    :raises PacketError: the message or the list of descriptors is too large.
    :raises BlockingIOError: non-blocking socket, and the peer does not keep up.
    """
    if len(message) > MAX_MESSAGE:
        raise PacketError(f"message of {len(message)} bytes, at most {MAX_MESSAGE}")
    if len(fds) > MAX_FDS:
        raise PacketError(f"{len(fds)} file descriptors, at most {MAX_FDS}")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([message], ancillary)


def receive(sock: socket.socket) -> tuple[bytes, tuple[int, ...]]:
    """Receive one packet: the message (empty at end of stream) and its descriptors, which the caller now owns.

    Descriptors are close-on-exec. On an error those that came with the packet are closed.

    :raises PacketError: the packet was cut.
    """
    message, ancillary, flags, _ = sock.recvmsg(
        MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise PacketError("packet was cut: larger than this end accepts")
    return message, tuple(fds)


def prepare(sock: socket.socket) -> None:
    """Make room for the largest message in a socket's buffers (both ends call it)."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 4 * MAX_MESSAGE)
