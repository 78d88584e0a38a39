"""The contract by which a stream is handed to the node proxy: a PROXY protocol v2 header with TLVs.

Who hands over: l7proxy through the node proxy's unix socket (``nodeproxy.sock``, SOCK_STREAM), and a real Envoy by dialling
an endpoint (the kernel turns that connection to the node proxy). The header is haproxy's PROXY protocol v2
(proxy-protocol.txt, section 2.2): source = the client (the pod's own address and port), destination = the endpoint that was
chosen. TLVs of the private range (2.2.7) say what an address cannot: :class:`Tlv`. Types are never reused.

On the unix socket the node proxy answers with one byte, a :class:`Status`, before any payload: so l7proxy knows whether the
upstream saw anything (a retry is safe after any status but CONNECTED). A TCP peer (Envoy) is not answered: it sees a reset.
A unix socket knows no reset: there a destination's end is a shutdown(), and a stream that broke off is closed at once, so that
a response which ends with its connection is never taken for complete when it is not.

This module is a leaf: it imports nothing of the project.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
from dataclasses import dataclass, field

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_VERSION_COMMAND = 0x21  # version 2, PROXY
_TCP4 = 0x11
_TCP6 = 0x21
_HEADER = struct.Struct("!12sBBH")
_MAX_LENGTH = 4096


class Tlv(enum.IntEnum):
    SOURCE_UID = 0xE0  #: the client pod's UID, UTF-8
    TRACEPARENT = 0xE1  #: W3C traceparent, ASCII


class Status(enum.IntEnum):
    """How the handing over ended. All but CONNECTED are final, and nothing reached the destination's application."""

    CONNECTED = 0
    UNREACHABLE = 1  #: nobody answers there, or the destination's application refused the connection
    DENIED = 2  #: the destination's policy refuses this client (HBONE 401)
    IDENTITY = 3  #: no certificate yet, or the peer is not who it has to be
    TIMEOUT = 4
    INVALID = 5  #: the header is wrong, or the client is not on this node


class HeaderError(ValueError):
    """The bytes are no header of this contract."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """Addresses are (IP text, port)."""

    client: tuple[str, int]
    destination: tuple[str, int]
    tlvs: dict[int, bytes] = field(default_factory=dict)

    @property
    def source_uid(self) -> str:
        return self.tlvs.get(Tlv.SOURCE_UID, b"").decode("utf-8", "replace")


def encode(handoff: Handoff) -> bytes:
    source = ipaddress.ip_address(handoff.client[0])
    destination = ipaddress.ip_address(handoff.destination[0])
    if source.version != destination.version:
        raise HeaderError("client and destination are of two address families")
    body = source.packed + destination.packed + struct.pack("!HH", handoff.client[1], handoff.destination[1])
    body += b"".join(struct.pack("!BH", t, len(v)) + v for t, v in handoff.tlvs.items())
    family = _TCP4 if source.version == 4 else _TCP6
    return _HEADER.pack(SIGNATURE, _VERSION_COMMAND, family, len(body)) + body


def decode(data: bytes | bytearray | memoryview) -> tuple[Handoff, int] | None:
    """Take a header from the front: it and its length in bytes, or None while it is not complete.

    :raises HeaderError: it can no longer become one.
    """
    data = bytes(data)
    if data[:12] != SIGNATURE[: len(data)]:
        raise HeaderError("no PROXY v2 signature")
    if len(data) < _HEADER.size:
        return None
    _, command, family, length = _HEADER.unpack_from(data)
    if command != _VERSION_COMMAND:
        raise HeaderError(f"version and command {command:#x}, not {_VERSION_COMMAND:#x}")
    size = {_TCP4: 4, _TCP6: 16}.get(family)
    if size is None:
        raise HeaderError(f"address family {family:#x}")
    if length > _MAX_LENGTH or length < 2 * size + 4:
        raise HeaderError(f"length {length}")
    end = _HEADER.size + length
    if len(data) < end:
        return None
    at = _HEADER.size
    source = str(ipaddress.ip_address(data[at : at + size]))
    destination = str(ipaddress.ip_address(data[at + size : at + 2 * size]))
    source_port, destination_port = struct.unpack_from("!HH", data, at + 2 * size)
    at += 2 * size + 4
    tlvs: dict[int, bytes] = {}
    while at < end:
        if at + 3 > end:
            raise HeaderError("TLV is cut")
        kind, size_of = struct.unpack_from("!BH", data, at)
        at += 3
        if at + size_of > end:
            raise HeaderError("TLV is cut")
        tlvs[kind] = data[at : at + size_of]
        at += size_of
    return Handoff((source, source_port), (destination, destination_port), tlvs), end
