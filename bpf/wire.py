"""The Python mirror of ``wire.h``: constants, map keys and map values that kernel and user space share.

A leaf: standard library only. Each :class:`Record` says its C layout once, in ``LAYOUT``; packing follows from
it, and a test compares it with the BTF of the loaded programs, field by field. Any change of a layout raises
:data:`ABI`.

Addresses are canonical text of either family (:func:`canonical`) and ports are host integers on this side; on the wire an
address has 16 bytes, IPv4 as ``::ffff:a.b.c.d``, and both are in network byte order.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

ABI = 3

#: Flags of :class:`Peer`.
PEER_LOCAL = 1
PEER_ENROLLED = 2
PEER_JOINING = 4
PEER_NODE = 8
#: Flags of :class:`Pod`.
POD_PASSING = 1
POD_OPEN = 2
POD_NO_SPLICE = 4
#: In :class:`Interface`, beside the pod's: filters judge, and links perhaps too.
INTERFACE_FILTERS = 1 << 31
#: Flags of :class:`Service`.
SERVICE_L7 = 1
SERVICE_AFFINITY = 2
SERVICE_MEMBERS = 4
SERVICE_FEW = 8
#: How often a backend is drawn before there is none, and a service read, where it changes at the same time.
DRAWS = 4
CHECK_SEED = 0x811C9DC5
CHECK_PRIME = 0x01000193
CHECK_FOLD = 15
SERVICE_AFFINITY_SHIFT = 8
#: In :class:`Backend`: the slot is all its own.
SHARE_WHOLE = 0xFFFFFFFF
#: Flags of :class:`Connection`.
SOCKET_ACTIVE = 2
SOCKET_REVOKED = 32
#: In :class:`PolicyKey` in place of an identity: the value is the policy's generation, with the two flags.
POLICY_GENERATION = 0xFFFFFFFF
POLICY_GENERATION_MASK = 0x3FFFFFFF
POLICY_CLASSES = 0x80000000
POLICY_ALIKE = 0x40000000
#: Bits of the keys before what a longest prefix is looked up of.
CLASS_PREFIX_BITS = 96
NETWORK_PREFIX_BITS = 32
NETWORK_PORT_BITS = 24

PORT_OUTBOUND = 15001
PORT_OUTBOUND_L7 = 15002
PORT_HBONE = 15008

PROTOCOL_TCP = 6
PROTOCOL_UDP = 17

#: Of :class:`FlowKey`: a verdict is one of these or a :class:`Reason`.
VERDICT_ALLOWED = 0
VERDICT_SEVERAL = 0xFFFF
FLOW_FORGOTTEN = 1

IDENTITY_PLAIN = 0
IDENTITY_PROBE = 1
IDENTITY_TUNNEL = 2
IDENTITY_MESH = 3
IDENTITY_FIRST = 16


class Role(enum.IntEnum):
    """Who a process is, by the cgroup that it runs in."""

    NONE = 0
    AGENT = 1
    NODEPROXY = 2
    L7PROXY = 3
    PROBER = 4
    ENVOY = 5


class Protocol(enum.IntEnum):
    """Of :class:`Endpoint`, as IP numbers them."""

    TCP = 6
    UDP = 17


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
    NO_ADDRESS = 8  #: to the mesh by a family of which the pod has no address
    MPTCP = 9
    MAP_FULL = 10
    UNKNOWN_DESTINATION = 11  #: arrived in a pod's namespace for an address that is not the pod's
    REVOKED = 12  #: admitted, and refused by a newer policy when it was established
    NETWORK_POLICY = 13  #: no NetworkPolicy of the destination, or of the source, allows it


class Via(enum.IntEnum):
    """How a connection goes, or came to be admitted."""

    PLAIN = 1  #: nobody wrote down who dials: outside the mesh
    DIRECT = 2  #: from a pod or a proxy of this node, judged by the source's identity
    PROBE = 3
    TUNNEL = 4  #: delivered by the node proxy, judged there
    SELF = 5  #: a pod to its own address
    CAPTURED = 6  #: turned to a listener of ours


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
S64 = Kind("q")
U32 = Kind("I")
U16 = Kind("H")
U8 = Kind("B")
BOOL = Kind("B", int, bool)


_MAPPED = bytes(10) + b"\xff\xff"
#: How :class:`Pod` says that there is no address of a family.
_NONE = bytes(16)


def pack_address(text: str) -> bytes:
    """The 16 bytes of an address as it stands on the wire; an IPv4-mapped address is the IPv4 address.

    :raises ValueError: it is no address (``inet_aton`` would take much more), or one with a zone.
    """
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return _MAPPED + socket.inet_pton(socket.AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is no IP address") from None


def unpack_address(data: bytes) -> str:
    """The canonical text (RFC 5952); dotted for IPv4."""
    if data.startswith(_MAPPED):
        return socket.inet_ntoa(data[12:])
    return socket.inet_ntop(socket.AF_INET6, data)


def canonical(text: str) -> str:
    """The one text that an address has on this side: dotted for an IPv4-mapped one.

    :raises ValueError: it is no address.
    """
    return unpack_address(pack_address(text))


def _port(number: int) -> bytes:
    if not 0 <= number <= 0xFFFF:
        raise ValueError(f"{number} is no port")
    return number.to_bytes(2, "big")


#: ``struct address``, text here
ADDRESS = Kind("16s", pack_address, unpack_address)
#: The same, or none: the empty text
ADDRESS_OR_NONE = Kind(
    "16s",
    lambda text: pack_address(text) if text else _NONE,
    lambda data: unpack_address(data) if data != _NONE else "",
)
#: ``__be16``, an integer here
PORT = Kind("2s", _port, lambda data: int.from_bytes(data, "big"))


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

        :raises ValueError: an address is no IP address, a port no port.
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

    LAYOUT = Layout(
        "captured_key", netns=U64, client_address=ADDRESS, client_port=PORT, listener_port=PORT, pad=U32
    )
    netns: int
    client_address: str
    client_port: int
    listener_port: int
    pad: int = 0


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


@dataclass(frozen=True, slots=True)
class Pod(Record):
    """Value of ``pods``, whose key is the netns cookie. Of a family that it has no address of: the empty text."""

    LAYOUT = Layout(
        "pod", address4=ADDRESS_OR_NONE, address6=ADDRESS_OR_NONE, identity=U32, flags=U16, zone=U16
    )
    address4: str
    address6: str
    identity: int
    flags: int = 0
    zone: int = 0


@dataclass(frozen=True, slots=True)
class Peer(Record):
    """Value of ``peers``, whose key is the address."""

    LAYOUT = Layout("peer", netns=U64, identity=U32, flags=U16, zone=U16)
    netns: int
    identity: int
    flags: int
    zone: int = 0


@dataclass(frozen=True, slots=True)
class Endpoint(Record):
    """Key of ``services`` and ``listeners``."""

    LAYOUT = Layout("endpoint", address=ADDRESS, port=PORT, protocol=U8, pad=U8)
    address: str
    port: int
    protocol: int = socket.IPPROTO_TCP
    pad: int = 0


@dataclass(frozen=True, slots=True)
class FewBackend(Record):
    """A backend that stands in its service; see :mod:`bpf.checks`."""

    LAYOUT = Layout("few_backend", address=ADDRESS, port=PORT, protocol=U8, pad=U8, check=U32)
    address: str
    port: int
    protocol: int
    pad: int
    check: int


#: How many backends a service may have in itself.
FEW_BACKENDS = 16
_FEW_SIZE = FEW_BACKENDS * FewBackend.LAYOUT.size


def _pack_few(backends: tuple[FewBackend, ...]) -> bytes:
    if len(backends) > FEW_BACKENDS:
        raise ValueError(f"{len(backends)} backends in one service: at most {FEW_BACKENDS}")
    return b"".join(backend.pack() for backend in backends)


def _unpack_few(data: bytes) -> tuple[FewBackend, ...]:
    size = FewBackend.LAYOUT.size
    used = len(data.rstrip(bytes(1)))
    return tuple(FewBackend.unpack(data[at : at + size]) for at in range(0, used, size))


#: Up to the last that is there.
FEW = Kind(f"{_FEW_SIZE}s", _pack_few, _unpack_few)


@dataclass(frozen=True, slots=True)
class Service(Record):
    """Value of ``services``. ``few``: the backends where they stand in it, else empty."""

    LAYOUT = Layout("service", id=U32, generation=U32, count=U32, flags=U32, check=U32, few=FEW)
    id: int
    generation: int
    count: int
    flags: int
    check: int = 0
    few: tuple[FewBackend, ...] = ()


@dataclass(frozen=True, slots=True)
class MemberKey(Record):
    LAYOUT = Layout(
        "member_key", service=U32, generation=U32, address=ADDRESS, port=PORT, protocol=U8, pad=U8
    )
    service: int
    generation: int
    address: str
    port: int
    protocol: int = socket.IPPROTO_TCP
    pad: int = 0


@dataclass(frozen=True, slots=True)
class AffinityKey(Record):
    LAYOUT = Layout("affinity_key", netns=U64, service=U32, pad=U32)
    netns: int
    service: int
    pad: int = 0


@dataclass(frozen=True, slots=True)
class Affinity(Record):
    """Value of ``affinity``; ``used`` in nanoseconds of CLOCK_MONOTONIC."""

    LAYOUT = Layout("affinity", address=ADDRESS, port=PORT, protocol=U8, pad=U8, filler=U32, used=U64)
    address: str
    port: int
    protocol: int
    pad: int
    filler: int
    used: int


@dataclass(frozen=True, slots=True)
class BackendKey(Record):
    LAYOUT = Layout("backend_key", service=U32, generation=U32, slot=U32)
    service: int
    generation: int
    slot: int


@dataclass(frozen=True, slots=True)
class Backend(Record):
    """Value of ``backends``."""

    LAYOUT = Layout(
        "backend", address=ADDRESS, port=PORT, protocol=U8, pad=U8, other=U32, share=U32, check=U32
    )
    address: str
    port: int
    protocol: int
    pad: int
    other: int
    share: int
    check: int


@dataclass(frozen=True, slots=True)
class PolicyKey(Record):
    """Key of the inner maps of ``policies``; port 0 is any port without an entry, class 0 an address in no class."""

    LAYOUT = Layout("policy_key", identity=U32, port=PORT, address_class=U16)
    identity: int
    port: int
    address_class: int = 0


@dataclass(frozen=True, slots=True)
class ClassKey(Record):
    """Key of ``classes``; ``prefix_length`` counts from the generation on."""

    LAYOUT = Layout("class_key", prefix_length=U32, generation=U32, netns=U64, address=ADDRESS)
    prefix_length: int
    generation: int
    netns: int
    address: str


@dataclass(frozen=True, slots=True)
class NetworkOf(Record):
    """Key of ``networks``."""

    LAYOUT = Layout("network_of", netns=U64, direction=U32, pad=U32)
    netns: int
    direction: int
    pad: int = 0


@dataclass(frozen=True, slots=True)
class NetworkKey(Record):
    """Key of the inner maps of ``networks``; ``value`` is an address, or protocol and port (:func:`network_port`)."""

    LAYOUT = Layout("network_key", prefix_length=U32, stage=U32, value=Kind("16s"))
    prefix_length: int
    stage: int
    value: bytes


def network_port(protocol: int, port: int) -> bytes:
    """``NETWORK_PORT`` of wire.h, as a :class:`NetworkKey` has it."""
    return struct.pack("!BHB12x", protocol, port, 0)


@dataclass(frozen=True, slots=True)
class Interface(Record):
    """Value of ``interfaces``, whose key is the index of the host's end of a pod's veth."""

    LAYOUT = Layout(
        "interface",
        netns=U64,
        address4=ADDRESS_OR_NONE,
        address6=ADDRESS_OR_NONE,
        identity=U32,
        flags=U32,
        mac=Kind("6s"),
        pad=U16,
    )
    netns: int
    address4: str
    address6: str
    identity: int
    flags: int
    mac: bytes
    pad: int = 0


@dataclass(frozen=True, slots=True)
class TalkKey(Record):
    """Key of ``talks``."""

    LAYOUT = Layout(
        "talk_key",
        netns=U64,
        pod_address=ADDRESS,
        peer_address=ADDRESS,
        pod_port=PORT,
        peer_port=PORT,
        protocol=U16,
        direction=U16,
    )
    netns: int
    pod_address: str
    peer_address: str
    pod_port: int
    peer_port: int
    protocol: int
    direction: int = 0


@dataclass(frozen=True, slots=True)
class Talk(Record):
    """Value of ``talks``; ``used`` in nanoseconds of CLOCK_MONOTONIC."""

    LAYOUT = Layout("talk", used=U64, direction=U32, flags=U32)
    used: int
    direction: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Tuple(Record):
    """Key of ``connecting``: a connection as its client sees it."""

    LAYOUT = Layout(
        "tuple", client_address=ADDRESS, server_address=ADDRESS, client_port=PORT, server_port=PORT
    )
    client_address: str
    server_address: str
    client_port: int
    server_port: int


@dataclass(frozen=True, slots=True)
class Who(Record):
    """Value of ``connecting``."""

    LAYOUT = Layout("who", netns=U64, identity=U32, generation=U32, kind=U32, pad=U32, splice=U64)
    netns: int
    identity: int
    generation: int
    kind: int
    pad: int = 0
    splice: int = 0


@dataclass(frozen=True, slots=True)
class Share(Record):
    """Value of ``shares``, whose key is the netns cookie: elements that a pod has in two maps (below 0: none)."""

    LAYOUT = Layout("share", connecting=S64, captured=S64)
    connecting: int = 0
    captured: int = 0


@dataclass(frozen=True, slots=True)
class FlowKey(Record):
    """Key of ``flows`` and ``refused``."""

    LAYOUT = Layout(
        "flow_key",
        source=U32,
        destination=U32,
        source_zone=U16,
        destination_zone=U16,
        port=PORT,
        verdict=U16,
        protocol=U8,
        direction=U8,
        flags=U16,
    )
    source: int
    destination: int
    source_zone: int
    destination_zone: int
    port: int
    verdict: int
    protocol: int
    direction: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Flow(Record):
    """Value of ``flows``."""

    LAYOUT = Layout(
        "flow",
        opened=U64,
        closed=U64,
        sent=U64,
        received=U64,
        sent_datagrams=U64,
        received_datagrams=U64,
        retransmits=U64,
        rtt_us=U64,
        rtt_samples=U64,
    )
    opened: int
    closed: int
    sent: int
    received: int
    sent_datagrams: int
    received_datagrams: int
    retransmits: int
    rtt_us: int
    rtt_samples: int


@dataclass(frozen=True, slots=True)
class Refusals(Record):
    """Value of ``refused``."""

    LAYOUT = Layout("refusals", count=U64, bytes=U64)
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ConversationKey(Record):
    """Key of ``conversations``."""

    LAYOUT = Layout(
        "conversation_key",
        netns=U64,
        pod_address=ADDRESS,
        peer_address=ADDRESS,
        pod_port=PORT,
        peer_port=PORT,
        pad=U32,
    )
    netns: int
    pod_address: str
    peer_address: str
    pod_port: int
    peer_port: int
    pad: int = 0


#: Members of a structure ``flow_key`` within another.
_FLOW = FlowKey.LAYOUT.members


@dataclass(frozen=True, slots=True)
class Conversation(Record):
    """Value of ``conversations``; times in nanoseconds of CLOCK_MONOTONIC."""

    LAYOUT = Layout(
        "conversation",
        opened=U64,
        last=U64,
        sent=U64,
        received=U64,
        sent_datagrams=U64,
        received_datagrams=U64,
        **_FLOW,
        pad=U32,
    )
    opened: int
    last: int
    sent: int
    received: int
    sent_datagrams: int
    received_datagrams: int
    source: int
    destination: int
    source_zone: int
    destination_zone: int
    port: int
    verdict: int
    protocol: int
    direction: int
    flags: int
    pad: int = 0


@dataclass(frozen=True, slots=True)
class FlowRecord(Record):
    """What the ring buffer ``records`` holds; times in nanoseconds of CLOCK_MONOTONIC."""

    LAYOUT = Layout(
        "flow_record",
        netns=U64,
        started=U64,
        ended=U64,
        sent=U64,
        received=U64,
        sent_datagrams=U64,
        received_datagrams=U64,
        client_address=ADDRESS,
        server_address=ADDRESS,
        client_port=PORT,
        server_port=PORT,
        **_FLOW,
        rtt_us=U32,
        retransmits=U32,
        kind=U32,
        pad=U32,
    )
    netns: int
    started: int
    ended: int
    sent: int
    received: int
    sent_datagrams: int
    received_datagrams: int
    client_address: str
    server_address: str
    client_port: int
    server_port: int
    source: int
    destination: int
    source_zone: int
    destination_zone: int
    port: int
    verdict: int
    protocol: int
    direction: int
    flags: int
    rtt_us: int
    retransmits: int
    kind: int
    pad: int = 0


@dataclass(frozen=True, slots=True)
class Connection(Record):
    """What the iterators over open connections write."""

    LAYOUT = Layout(
        "connection",
        netns=U64,
        cookie=U64,
        client_address=ADDRESS,
        server_address=ADDRESS,
        client_port=PORT,
        server_port=PORT,
        source=U32,
        destination=U32,
        generation=U32,
        kind=U32,
        flags=U32,
        sent=U64,
        received=U64,
        rtt_us=U32,
        retransmits=U32,
    )
    netns: int
    cookie: int
    client_address: str
    server_address: str
    client_port: int
    server_port: int
    source: int
    destination: int
    generation: int
    kind: int
    flags: int
    sent: int
    received: int
    rtt_us: int
    retransmits: int


@dataclass(frozen=True, slots=True)
class Event(Record):
    """What the ring buffer ``events`` holds."""

    LAYOUT = Layout(
        "event",
        netns=U64,
        reason=U32,
        source=U32,
        destination=U32,
        client_address=ADDRESS,
        server_address=ADDRESS,
        client_port=PORT,
        server_port=PORT,
    )
    netns: int
    reason: int
    source: int
    destination: int
    client_address: str
    server_address: str
    client_port: int
    server_port: int


@dataclass(frozen=True, slots=True)
class Refusal(Record):
    """Key of ``recent``; its value is when that was told last, in nanoseconds."""

    LAYOUT = Layout(
        "refusal",
        client_address=ADDRESS,
        server_address=ADDRESS,
        client_port=PORT,
        server_port=PORT,
        reason=U32,
    )
    client_address: str
    server_address: str
    client_port: int
    server_port: int
    reason: int


@dataclass(frozen=True, slots=True)
class Closed(Record):
    """Value of ``closed``: the connection of that slot that ended last, and when, in nanoseconds."""

    LAYOUT = Layout("closed", fingerprint=U64, when=U64)
    fingerprint: int
    when: int


#: Bytes of ``struct datagram_key`` and ``struct datagram_socket``, too.
DATAGRAM_KEY_SIZE = 32
DATAGRAM_SOCKET_SIZE = 44
#: Bytes of ``struct socket_state``, which only the programs look into.
SOCKET_STATE_SIZE = 168
#: The same of ``struct splice_end`` and ``struct splice``.
SPLICE_END_SIZE = 80
SPLICE_SIZE = 136


#: In the slot OFF: this kernel cannot.
SPLICE_UNSUPPORTED = 2


class SpliceStep(enum.IntEnum):
    """What the iterator ``splice`` did with an end of a connection."""

    ENTERED = 1
    LEFT = 2
    WAITS = 3  #: it has to leave, and its application has not read everything yet
    LEFT_UNREAD = 4  #: the same as LEFT, and TCP has something for it


#: What the iterator writes has the step in as many bits, the cookie of the end's namespace above.
SPLICE_STEP_BITS = 3


class SpliceCounter(enum.IntEnum):
    """Slots of ``splice_counters``: two words of state, then what happened since the map was made."""

    OFF = 0  #: not 0: nothing is spliced on this node
    WOKEN = 1  #: the agent was woken, and has not walked yet
    ENTERED = 2
    LEFT = 3
    OVERFLOWS = 4
    FULL = 5


#: Slots of the map ``counters``: refusals by :class:`Reason`, then these.
COUNTER_FULL = {
    "connecting": 16,
    "captured": 17,
    "flows": 18,
    "refused": 19,
    "sockets": 20,
    "events": 21,
    "records": 24,
    "conversations": 25,
    "roles": 26,
    "pods": 27,
    "peers": 28,
    "services": 29,
    "backends": 30,
    "members": 31,
    "policies": 32,
    "listeners": 33,
    "classes": 34,
    "networks": 35,
    "interfaces": 36,
}
#: And refusals because a pod had used its own share of a map up.
COUNTER_SHARE = {"connecting": 22, "captured": 23}
COUNTERS = 37
#: Of the map ``closed``.
CLOSED_SLOTS = 65536
#: Maps that no program adds elements to.
COUNTED_BY_AGENT = frozenset(
    {
        "roles",
        "pods",
        "interfaces",
        "peers",
        "services",
        "backends",
        "members",
        "policies",
        "classes",
        "networks",
        "listeners",
    }
)
