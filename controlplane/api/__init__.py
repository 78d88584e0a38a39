"""The contract between the controller and its clients on the nodes (agents and node proxies).

Transport: gRPC over TLS on port 15012, generic handlers, messages encoded with :func:`encode`. The caller proves itself
with ``authorization: Bearer CREDENTIAL`` metadata; the controller derives the node's name from the credential, never from
the message.

Versioning: :data:`API_VERSION` stands in :class:`Hello`. Fields are only ever added, with defaults; unknown fields are
ignored by the decoder. A controller N serves clients N and N-1.

This package is a leaf: it imports msgspec and ``common`` only.
"""

from controlplane.api.addresses import canonical_block, in_blocks
from controlplane.api.authorization import (
    Action,
    Authorization,
    Operation,
    Rule,
    Source,
    Verdict,
    authorize,
)
from controlplane.api.messages import (
    API_NETWORK,
    API_PACKED,
    API_VERSION,
    METHOD_SIGN,
    METHOD_SUBSCRIBE,
    Ack,
    ClientMessage,
    Endpoint,
    Hello,
    MeshConfig,
    MtlsMode,
    Nack,
    NodeInfo,
    Resource,
    ResourceError,
    Service,
    ServicePort,
    SignRequest,
    SignResponse,
    Update,
    Workload,
    decode_client,
    decode_sign_request,
    decode_sign_response,
    decode_update,
    encode,
    pack,
    resource_key,
)
from controlplane.api.network import (
    Direction,
    NamedPorts,
    NetworkPeer,
    NetworkPolicy,
    NetworkPort,
    NetworkRule,
    permits,
    refusing,
)

__all__ = [
    "API_NETWORK",
    "API_PACKED",
    "API_VERSION",
    "METHOD_SIGN",
    "METHOD_SUBSCRIBE",
    "Ack",
    "Action",
    "Authorization",
    "ClientMessage",
    "Direction",
    "Endpoint",
    "Hello",
    "MeshConfig",
    "MtlsMode",
    "Nack",
    "NamedPorts",
    "NetworkPeer",
    "NetworkPolicy",
    "NetworkPort",
    "NetworkRule",
    "NodeInfo",
    "Operation",
    "Resource",
    "ResourceError",
    "Rule",
    "Service",
    "ServicePort",
    "SignRequest",
    "SignResponse",
    "Source",
    "Update",
    "Verdict",
    "Workload",
    "authorize",
    "canonical_block",
    "decode_client",
    "decode_sign_request",
    "decode_sign_response",
    "decode_update",
    "encode",
    "in_blocks",
    "pack",
    "permits",
    "refusing",
    "resource_key",
]
