"""The contract between the node agent and the proxies on its node (local RPC).

Transport: SEQPACKET unix socket ``agent.sock`` in the run folder, framed by :mod:`common.seqpacket`, messages in msgpack.
A proxy connects, says :class:`Hello`, is answered :class:`Welcome` or :class:`Refused`, and from then on both may send.
File descriptors travel in the packet of the message that speaks of them, in the order that its docstring gives.

Versioning: :data:`VERSION` stands in the first message of each side. Fields are only ever added, with defaults. The agent
serves versions N and N-1 and refuses others with a reason.

A proxy outlives the agent: when the connection breaks it keeps every listener and socket that it has and reconnects; the
agent then sends every :class:`Enroll` again (a proxy tells what it holds in ``Hello.held``, and for those the agent makes
no new listeners).

A proxy's successor (version 2) starts while the old one serves. It says :class:`Hello` with ``serving=False``, hears of every
pod (without listeners) and then :class:`Known`, gets ready, says :class:`Serve`, gets a listener of its own for everything,
and hears :class:`Serving`. From each listener's arrival on new connections come to it; the old one keeps its listeners open
for what was on its way, hears :class:`Drain`, and lives on until it is ended. If the new one dies first, the old one gets
listeners again and hears :class:`Serving`. Where no other proxy of its role is there, one that is not ready gets listeners too:
connections then wait for it and are not refused at once.

This module is a leaf: it imports msgspec only.
"""

from __future__ import annotations

import enum

import msgspec

VERSION = 2

#: Seconds that a pod of another node that has left the mesh is dialled by it still (:mod:`agent.passage`).
LINGER = 1.5


class Role(enum.Enum):
    NODEPROXY = "nodeproxy"
    L7PROXY = "l7proxy"


class ListenerKind(enum.Enum):
    """What arrives on a listener in a pod's namespace; the value is its name, :attr:`port` its port."""

    OUTBOUND = "outbound"
    OUTBOUND_L7 = "outbound-l7"
    HBONE = "hbone"

    @property
    def port(self) -> int:
        return {"outbound": 15001, "outbound-l7": 15002, "hbone": 15008}[self.value]


class Purpose(enum.Enum):
    """What a socket in a pod's namespace is for.

    OUTBOUND: dials from the pod's own address (HBONE towards other nodes, l7proxy towards endpoints on this node).
    DELIVERY: dials the pod's own ports bound to a client's address (IP_TRANSPARENT and the delivery mark are set).
    """

    OUTBOUND = "outbound"
    DELIVERY = "delivery"


class Held(msgspec.Struct, frozen=True):
    """A listener that the proxy has already, from an agent that is gone."""

    uid: str
    netns_cookie: int
    kind: ListenerKind
    socket: int = 0  #: its SO_COOKIE, so that it can be told from a successor's; 0 is not known


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a proxy."""

    role: Role
    version: int = VERSION
    held: tuple[Held, ...] = ()
    #: The listeners that this proxy wants of each pod (a node proxy in front of a real Envoy wants ``outbound-l7`` too).
    kinds: tuple[ListenerKind, ...] = ()
    #: False: not ready yet, :class:`Serve` will come.
    serving: bool = True


class Serve(msgspec.Struct, frozen=True, tag="serve"):
    """The proxy is ready: hand it a listener for everything."""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Answer to Hello. Descriptors: one read-only map for each name in ``maps`` (today: ``captured``)."""

    node: str
    version: int = VERSION
    maps: tuple[str, ...] = ()


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Answer to Hello when the agent will not serve; the connection ends."""

    reason: str
    version: int = VERSION


class Enroll(msgspec.Struct, frozen=True, tag="enroll"):
    """A pod of this node is in the mesh. Descriptors: a listening, non-blocking socket for each of ``listeners``.

    Of a pod with addresses of both families it is an IPv6 socket that takes IPv4 too, as ``::ffff:a.b.c.d``.

    Sent again with other values (and no listeners) when the workload's description changes. The pair (uid, netns_cookie)
    is the key: the same UID with another cookie is a new sandbox of the same pod.
    """

    uid: str
    netns_cookie: int
    address: str  #: the first of ``addresses``
    namespace: str
    name: str
    service_account: str
    identity: str  #: ``spiffe://...``
    workload_name: str = "unknown"
    app: str = "unknown"
    version: str = "unknown"
    listeners: tuple[ListenerKind, ...] = ()
    addresses: tuple[
        str, ...
    ] = ()  #: canonical, at most one of each family, IPv4 first; none: ``address`` alone

    @property
    def own(self) -> tuple[str, ...]:
        """Its addresses."""
        return self.addresses or (self.address,)

    def own_like(self, address: str) -> str:
        """Its address of the same family as another one; empty if it has none."""
        return next((own for own in self.own if (":" in own) == (":" in address)), "")


class Withdraw(msgspec.Struct, frozen=True, tag="withdraw", omit_defaults=True):
    """The pod leaves: close its listeners, its sockets and every connection in its namespace; forget its key.

    With ``drain`` it has left the mesh and runs on: close its listeners, and keep what is open until it ends by itself. Sockets
    for that can still be asked for. Another Withdraw follows when the pod ends, or an Enroll when it comes back.
    """

    uid: str
    netns_cookie: int
    drain: bool = False


class Known(msgspec.Struct, frozen=True, tag="known"):
    """Every pod of this moment was told of. Only to proxies of version 2, as the next two."""


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """New connections come to this proxy, all of them."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """They come to another: ask peers to go there, serve what is open, keep the listeners for what is on its way."""


class GetSockets(msgspec.Struct, frozen=True, tag="get-sockets"):
    """A proxy wants up to ``count`` unconnected TCP sockets in a pod's namespace (non-blocking, TCP_NODELAY)."""

    id: int
    uid: str
    netns_cookie: int
    purpose: Purpose
    count: int = 1
    ipv6: bool = False  #: the family


class Sockets(msgspec.Struct, frozen=True, tag="sockets"):
    """Answer to GetSockets with the same ``id``. Descriptors: ``count`` sockets; none with an ``error``."""

    id: int
    count: int
    error: str = ""


FromProxy = Hello | Serve | GetSockets
FromAgent = Welcome | Refused | Enroll | Withdraw | Known | Serving | Drain | Sockets

_encoder = msgspec.msgpack.Encoder()
_from_proxy: msgspec.msgpack.Decoder[FromProxy] = msgspec.msgpack.Decoder(FromProxy)
_from_agent: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)


def encode(message: FromProxy | FromAgent) -> bytes:
    return _encoder.encode(message)


def decode_from_proxy(data: bytes) -> FromProxy:
    """:raises msgspec.DecodeError: the bytes are no message of a proxy."""
    return _from_proxy.decode(data)


def decode_from_agent(data: bytes) -> FromAgent:
    """:raises msgspec.DecodeError: the bytes are no message of an agent."""
    return _from_agent.decode(data)
