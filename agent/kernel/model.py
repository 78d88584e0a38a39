"""What the kernel facade takes and gives: plain values, without descriptors or behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bpf.wire import PROTOCOL_TCP, VERDICT_ALLOWED, Direction, Protocol, Reason, Via

__all__ = [
    "Backend",
    "Connection",
    "Direction",
    "Event",
    "FlowCounters",
    "FlowKey",
    "Frontend",
    "Network",
    "Peer",
    "Pod",
    "Pressure",
    "Protocol",
    "Reason",
    "Via",
]


class Pod(NamedTuple):
    """A pod of this node that is in the mesh. The cookie of its network namespace is its key in the kernel."""

    netns_cookie: int
    addresses: tuple[str, ...]  #: canonical, at most one of each family
    identity: int  #: from IDENTITY_FIRST on
    #: It joins or leaves as it runs: what its applications dial passes as without a mesh.
    passing: bool = False
    #: The same, for what arrives: plain text is not judged.
    open: bool = False
    zone: int = 0  #: its number; 0 is unknown
    splice: bool = True  #: its connections with pods of this node may go past TCP


class Peer(NamedTuple):
    """Who has an address, on this node or another. Pods given to ``add_pod`` are peers without being told."""

    local: bool  #: on this node
    enrolled: bool
    identity: int  #: 0 where there is none
    joining: bool = False  #: perhaps not captured yet: its plain text is judged as anybody's
    zone: int = 0  #: its number; 0 is unknown
    node: bool = False  #: a node's own address, at which node ports are dialled


class Frontend(NamedTuple):
    """What pods dial for a service. The addresses 0.0.0.0 and :: stand for those of all nodes (``Peer.node``)."""

    address: str
    port: int
    protocol: Protocol = Protocol.TCP


class Backend(NamedTuple):
    address: str
    port: int
    weight: int = 1  #: its share among the service's; 0 takes none


class Service(NamedTuple):
    """What the kernel has of one frontend."""

    l7: bool
    backends: tuple[Backend, ...]
    affinity: int = 0  #: seconds for which a client keeps its backend; 0 is not at all


class Network(NamedTuple):
    """NetworkPolicy of one pod in one direction. The other end's address has a class, and a class ports that are allowed."""

    #: by block (the longest that an address is in counts); what is in none is of class 0
    classes: Mapping[str, int]
    #: (protocol, first port, last port) by class; protocol 0, with every port, is all of them
    allowed: Mapping[int, frozenset[tuple[int, int, int]]]


class Connection(NamedTuple):
    """One open inbound connection of a pod. ``sent`` and ``received`` are bytes as the server's application did."""

    netns_cookie: int
    client: tuple[str, int]
    server: tuple[str, int]
    source: int  #: identity
    destination: int  #: identity
    via: Via
    generation: int  #: of the policy that admitted it; 0 when that policy was gone already
    revoked: bool  #: refused by the policy that was in force when it was established
    sent: int
    received: int
    cookie: int  #: of this end's socket; names this connection and no later one of the same addresses
    rtt_us: int = 0  #: smoothed, as the server's end measures it; 0 is unknown
    retransmits: int = 0  #: segments that the server's end sent again
    dialled: bool = False  #: of :meth:`Kernel.refused_now`: this end is the client's


class FlowKey(NamedTuple):
    """What traffic is counted by. Identities and zones are numbers of this node; ``port`` is the destination's own."""

    source: int
    destination: int
    port: int
    direction: Direction
    protocol: int = PROTOCOL_TCP
    verdict: int = VERDICT_ALLOWED  #: or a :class:`Reason`, or VERDICT_SEVERAL
    source_zone: int = 0
    destination_zone: int = 0


class FlowCounters(NamedTuple):
    """Since the maps were made. ``opened - closed`` are open now, and their bytes are included.

    ``sent`` and ``received`` are what the application at that end wrote and read: at the client for OUTBOUND, at the
    server for INBOUND. Of UDP they are payload that passed that end's veth, and what is opened is a conversation.
    """

    opened: int = 0
    closed: int = 0
    refused: int = 0  #: connections, datagrams
    sent: int = 0
    received: int = 0
    sent_datagrams: int = 0
    received_datagrams: int = 0
    refused_bytes: int = 0  #: of refused datagrams
    retransmits: int = 0
    rtt_us: int = 0  #: sum of smoothed round trip times, of as many
    rtt_samples: int = 0

    @property
    def totals(self) -> tuple[int, int, int, int, int]:
        """(opened, closed, refused, sent, received)."""
        return self[:5]

    def __add__(self, other: object) -> FlowCounters:
        """The sum, member by member."""
        if not isinstance(other, FlowCounters):
            return NotImplemented
        return FlowCounters(*(a + b for a, b in zip(self, other, strict=True)))


class Pressure(NamedTuple):
    """How full a map is, in elements; ``refused`` counts what failed because it was full."""

    used: int
    size: int
    refused: int
    #: Refused because one pod had used its own share up.
    over_share: int = 0
    #: Bytes that the kernel has allocated for it.
    memory: int = 0

    @property
    def ratio(self) -> float:
        return self.used / self.size if self.size else 0.0


class Event(NamedTuple):
    """A connection that the kernel refused, and why. A refused client's retries are told once in a while only.

    REVOKED is told each time: such a connection is open, and has to be ended.
    """

    reason: Reason
    netns_cookie: int  #: of the pod that dialled, or 0 when it was refused at the destination
    source: int  #: identity
    destination: int  #: identity
    client: tuple[str, int]  #: port 0 when it had none yet
    server: tuple[str, int]
