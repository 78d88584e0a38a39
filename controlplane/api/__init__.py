"""The contract between the controller and its clients on the nodes (agents and node proxies).

Transport: gRPC over TLS on port 15012, generic handlers, messages encoded with :func:`encode`. The caller proves itself
with ``authorization: Bearer CREDENTIAL`` metadata; the controller derives the node's name from the credential, never from
the message.

Versioning: :data:`API_VERSION` stands in :class:`Hello`. Fields are only ever added, with defaults; unknown fields are
ignored by the decoder. A controller N serves clients N and N-1.

This package is a leaf: it imports msgspec and ``common`` only.
"""

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

__all__ = [
    "API_PACKED",
    "API_VERSION",
    "METHOD_SIGN",
    "METHOD_SUBSCRIBE",
    "Ack",
    "Action",
    "Authorization",
    "ClientMessage",
    "Endpoint",
    "Hello",
    "MeshConfig",
    "MtlsMode",
    "Nack",
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
    "decode_client",
    "decode_sign_request",
    "decode_sign_response",
    "decode_update",
    "encode",
    "pack",
    "resource_key",
]
