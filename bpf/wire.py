"""The Python mirror of ``wire.h``: constants, map keys and map values that kernel and user space share.

A leaf: standard library only. Each :class:`Record` says its C layout once, in ``LAYOUT``; packing follows from
it, and a test compares it with the BTF of the loaded programs, field by field. Any change of a layout raises
:data:`ABI`.

Addresses are dotted IPv4 text and ports are host integers on this side; on the wire both are in network byte
order.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

ABI = 1

PORT_OUTBOUND = 15001
PORT_OUTBOUND_L7 = 15002
PORT_HBONE = 15008

IDENTITY_PLAIN = 0
IDENTITY_PROBE = 1
IDENTITY_TUNNEL = 2
IDENTITY_FIRST = 16


class Role(enum.IntEnum):
    """Who a process is, by the cgroup that it runs in."""

    NONE = 0
    AGENT = 1
    NODEPROXY = 2
    L7PROXY = 3
    PROBER = 4
    ENVOY = 5


class Direction(enum.IntEnum):
    """Which end of a connection an account is about: the client's or the server's."""

    OUTBOUND = 0
    INBOUND = 1


class Reason(enum.IntEnum):
    """Why the kernel refused a connection."""

    POLICY = 1  #: the destination's policy has no entry that allows it
    NO_POLICY = 2  #: the destination has no policy (yet)
    SPOOFED = 3  #: plain, with the address of an enrolled workload
    NOT_CAPTURED = 4  #: one of our ports, and not put there by connect()
    NO_LISTENER = 5  #: a dead or missing listener of ours
    NO_BACKEND = 6  #: a service without backends
    OWN_PORT = 7  #: an application dialled one of our ports
    IPV6 = 8  #: native IPv6 TCP
    MPTCP = 9
    MAP_FULL = 10
    UNKNOWN_DESTINATION = 11  #: arrived in a pod's namespace for an address that is not the pod's
    REVOKED = 12  #: admitted, and refused by a newer policy when it was established


@dataclass(frozen=True, slots=True)
class Kind:
    """How one C member is packed: its struct code, and what turns our value into the raw one and back."""

    code: str
    to_wire: Callable[[Any], Any] | None = None
    from_wire: Callable[[Any], Any] | None = None

    @property
    def size(self) -> int:
        return struct.calcsize("=" + self.code)


U64 = Kind("Q")
U32 = Kind("I")
U16 = Kind("H")
U8 = Kind("B")
BOOL = Kind("B", int, bool)
#: ``__be32``, dotted text here
ADDRESS = Kind("4s", socket.inet_aton, socket.inet_ntoa)
#: ``__be16``, an integer here
PORT = Kind("2s", lambda port: port.to_bytes(2, "big"), lambda data: int.from_bytes(data, "big"))


class Layout:
    """One C structure: its tag and members in order, naturally aligned (padding is a member)."""

    def __init__(self, tag: str, **members: Kind) -> None:
        self.tag = tag
        self.members = members
        #: member -> (offset, size), in bytes
        self.offsets: dict[str, tuple[int, int]] = {}
        at = 0
        for name, kind in members.items():
            self.offsets[name] = (at, kind.size)
            at += kind.size
        self.struct = struct.Struct("=" + "".join(kind.code for kind in members.values()))
        self.size = self.struct.size
        self._to_wire = tuple((name, kind.to_wire) for name, kind in members.items())
        self._from_wire = tuple(kind.from_wire for kind in members.values())

    def pack(self, record: object) -> bytes:
        return self.struct.pack(
            *(to(getattr(record, name)) if to else getattr(record, name) for name, to in self._to_wire)
        )

    def unpack(self, data: bytes) -> list[Any]:
        raw = self.struct.unpack(data)
        return [of(value) if of else value for of, value in zip(self._from_wire, raw, strict=True)]


class Record:
    """A key or value of a map."""

    LAYOUT: ClassVar[Layout]
    __slots__ = ()

    def pack(self) -> bytes:
        """The bytes on the wire.

        :raises OSError: an address is no IPv4 address.
        :raises struct.error: a number does not fit its member.
        """
        return self.LAYOUT.pack(self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """:raises struct.error: the bytes are not exactly one record."""
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class CapturedKey(Record):
    """An accepted connection's ``getpeername()``, with the listener's port and its namespace's cookie."""

    LAYOUT = Layout("captured_key", netns=U64, client_address=ADDRESS, client_port=PORT, listener_port=PORT)
    netns: int
    client_address: str
    client_port: int
    listener_port: int


@dataclass(frozen=True, slots=True)
class Captured(Record):
    """What the application dialled: ``service_*`` as it said, ``destination_*`` the endpoint chosen."""

    LAYOUT = Layout(
        "captured",
        destination_address=ADDRESS,
        service_address=ADDRESS,
        destination_port=PORT,
        service_port=PORT,
        identity=U32,
    )
    destination_address: str
    service_address: str
    destination_port: int
    service_port: int
    identity: int
