"""Messages of the workload/policy stream and of the certificate authority. See the package for the rules."""

from __future__ import annotations

import enum
import zlib

import msgspec

from controlplane.api.authorization import Authorization
from controlplane.api.network import NetworkPolicy

#: 2: an Update may be packed. 3: addresses in authorization, NetworkPolicy.
API_VERSION = 3
#: Version from which on a client takes packed Updates.
API_PACKED = 2
#: Version from which on a client knows NetworkPolicy, and judges addresses.
API_NETWORK = 3

#: Bidirectional stream: the client sends Hello, then an Ack or Nack for each Update.
METHOD_SUBSCRIBE = "/mycel.mesh.v1.Mesh/Subscribe"
#: Unary: SignRequest to SignResponse. Errors are gRPC codes: UNAUTHENTICATED (credential), PERMISSION_DENIED (no live
#: pod of that UID on the caller's node, one that is never in the mesh, or other names in the CSR), INVALID_ARGUMENT (CSR),
#: UNAVAILABLE (not ready).
METHOD_SIGN = "/mycel.mesh.v1.CertificateAuthority/Sign"


class MtlsMode(enum.Enum):
    """PeerAuthentication's effective mode for a workload. DISABLE is served as PERMISSIVE (HBONE is always offered)."""

    STRICT = "STRICT"
    PERMISSIVE = "PERMISSIVE"


class Workload(msgspec.Struct, frozen=True, tag="workload"):
    """One pod. Its key is the UID; addresses come and go (empty until the cluster has written them)."""

    uid: str
    namespace: str
    name: str
    service_account: str
    node: str
    identity: str  #: ``spiffe://TRUST-DOMAIN/ns/NS/sa/SA``
    addresses: tuple[str, ...] = ()  #: IPv4 dotted or IPv6, canonical text
    enrolled: bool = False
    ready: bool = False
    mtls: MtlsMode = MtlsMode.PERMISSIVE
    port_mtls: tuple[tuple[int, MtlsMode], ...] = ()  #: exceptions by the workload's own port
    policies: tuple[str, ...] = ()  #: keys ``NAMESPACE/NAME`` of the Authorizations that select it
    #: labels for metrics (Istio's canonical names): owner's name, ``app``, ``version``
    workload_name: str = "unknown"
    app: str = "unknown"
    version: str = "unknown"
    #: False: connections with pods of its node are not spliced (``mycel.io/splice: disabled`` on pod or namespace)
    splice: bool = True
    #: True: its addresses are its node's; it is never in the mesh, and NetworkPolicy does not know it
    host_network: bool = False
    zone: str = ""  #: of its node (``topology.kubernetes.io/zone``)
    groups: tuple[
        str, ...
    ] = ()  #: those of all NetworkPolicies' groups that it is in (``NetworkPeer.group``)
    network_policies: tuple[str, ...] = ()  #: keys ``NAMESPACE/NAME`` of the NetworkPolicies that select it
    #: (name, protocol, number) of its ports that some NetworkPolicy calls by name
    named_ports: tuple[tuple[str, str, int], ...] = ()


# Of these there are a hundred thousand: what is as always is not written.
class Endpoint(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A backend of one service port that takes new connections. ``uid`` is empty where no pod of the mesh stands behind it.

    A service port without any ready endpoint has those that are terminating and still serve, as kube-proxy does.
    """

    uid: str
    address: str
    port: int
    node: str
    terminating: bool = False  #: serves while it ends; only where nothing else is ready
    weight: int = 1  #: its share of new connections among the port's endpoints; 0 takes none


class ServicePort(msgspec.Struct, frozen=True):
    """A port of a service. TCP and UDP may have the same number."""

    port: int
    name: str = ""
    protocol: str = "TCP"  #: ``TCP``, ``UDP`` or ``SCTP``
    #: True: connections of enrolled pods to this port go to the L7 proxy.
    l7: bool = False
    endpoints: tuple[Endpoint, ...] = ()
    node_port: int = 0  #: the port on every node's addresses; 0: none


class Service(msgspec.Struct, frozen=True, tag="service"):
    namespace: str
    name: str
    host: str  #: ``NAME.NAMESPACE.svc.cluster.local``
    addresses: tuple[str, ...] = ()  #: cluster addresses; empty for headless
    ports: tuple[ServicePort, ...] = ()
    session_affinity: int = 0  #: seconds for which a client's address keeps its endpoint; 0 is none
    #: ``internalTrafficPolicy: Local``: only endpoints of the client's own node, refused when there is none.
    internal_local: bool = False
    #: addresses beside the cluster's own: ``externalIPs``, and those of a load balancer
    external_addresses: tuple[str, ...] = ()


class NodeInfo(msgspec.Struct, frozen=True):
    """A node as its Node object has it."""

    name: str
    addresses: tuple[str, ...] = ()  #: InternalIP and ExternalIP, canonical text
    zone: str = ""


class MeshConfig(msgspec.Struct, frozen=True, tag="mesh"):
    """What holds for the whole mesh; exactly one in each snapshot."""

    trust_domain: str = "cluster.local"
    #: PEM bundle: every root that peers' certificates may chain to.
    roots: str = ""
    #: Namespaces that do not ask for the mesh, in order: a node whose agent is away lets their pods start.
    outside_namespaces: tuple[str, ...] = ()
    nodes: tuple[NodeInfo, ...] = ()  #: by name


Resource = Workload | Service | Authorization | NetworkPolicy | MeshConfig


def resource_key(resource: Resource) -> str:
    """The key by which a resource is replaced and removed: ``KIND/...``."""
    match resource:
        case Workload():
            return f"workload/{resource.uid}"
        case Service():
            return f"service/{resource.namespace}/{resource.name}"
        case Authorization():
            return f"authorization/{resource.namespace}/{resource.name}"
        case NetworkPolicy():
            return f"network/{resource.namespace}/{resource.name}"
        case MeshConfig():
            return "mesh"


class ResourceError(msgspec.Struct, frozen=True):
    key: str
    reason: str


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a stream. ``component`` is ``agent`` or ``nodeproxy``.

    ``version`` is the snapshot that the client still has in full, or empty: if the controller serves the same one, it
    need not send it again and answers with an empty, incomplete Update.
    """

    component: str
    api: int = API_VERSION
    version: str = ""
    #: where this component serves its metrics, ``ADDRESS:PORT`` (``mycel stat`` reads it from the controller)
    admin: str = ""


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """The update is in force (for an agent: the kernel has it)."""

    nonce: int
    version: str


class Nack(msgspec.Struct, frozen=True, tag="nack"):
    """Parts of the update are not in force; the last good state of those stays."""

    nonce: int
    version: str
    errors: tuple[ResourceError, ...] = ()


ClientMessage = Hello | Ack | Nack


class Update(msgspec.Struct, frozen=True, tag="update"):
    """A change to the client's state; ``complete`` replaces all of it.

    ``version`` is the snapshot's SHA-256 in hex; for a client of an earlier protocol, which is sent less, with that protocol's
    number before it (``2:...``). A client applies updates in order and acknowledges each.
    """

    nonce: int
    version: str
    complete: bool = False
    upserts: tuple[Resource, ...] = ()
    removes: tuple[str, ...] = ()  #: keys as of :func:`resource_key`
    #: ``upserts`` instead, as msgpack compressed by zlib; :func:`decode_update` unpacks it
    packed: bytes = b""


class SignRequest(msgspec.Struct, frozen=True):
    """A certificate for the pod ``uid``; the CSR's only name, if any, is the SPIFFE URI (the CA decides it anyway)."""

    uid: str
    csr: bytes  #: PKCS#10, DER


class SignResponse(msgspec.Struct, frozen=True):
    chain: tuple[bytes, ...]  #: DER, leaf first, without the root
    roots: tuple[bytes, ...]  #: DER
    not_after: int  #: seconds since the epoch


_encoder = msgspec.msgpack.Encoder()
_client: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_update = msgspec.msgpack.Decoder(Update)
_upserts = msgspec.msgpack.Decoder(tuple[Resource, ...])
_MOST_UNPACKED = 512 << 20
_sign_request = msgspec.msgpack.Decoder(SignRequest)
_sign_response = msgspec.msgpack.Decoder(SignResponse)


def encode(message: ClientMessage | Update | SignRequest | SignResponse) -> bytes:
    """The message's bytes (msgpack); equal messages give equal bytes."""
    return _encoder.encode(message)


def decode_client(data: bytes) -> ClientMessage:
    """:raises msgspec.DecodeError: (or its ValidationError) if the bytes are no such message."""
    return _client.decode(data)


def decode_update(data: bytes) -> Update:
    """:raises msgspec.DecodeError: as :func:`decode_client`."""
    update = _update.decode(data)
    if not update.packed:
        return update
    unpacking = zlib.decompressobj()
    try:
        unpacked = unpacking.decompress(update.packed, _MOST_UNPACKED)
    except zlib.error as e:
        raise msgspec.DecodeError(f"packed: {e}") from e
    if not unpacking.eof:
        raise msgspec.DecodeError("packed: it is cut off, or too large")
    return msgspec.structs.replace(update, upserts=_upserts.decode(unpacked), packed=b"")


def pack(upserts: bytes) -> bytes:
    """What ``Update.packed`` is of encoded upserts. Of a whole mesh it is a sixteenth."""
    return zlib.compress(upserts, 1)


def decode_sign_request(data: bytes) -> SignRequest:
    """:raises msgspec.DecodeError: as :func:`decode_client`."""
    return _sign_request.decode(data)


def decode_sign_response(data: bytes) -> SignResponse:
    """:raises msgspec.DecodeError: as :func:`decode_client`."""
    return _sign_response.decode(data)
