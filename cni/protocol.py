"""The contract between the CNI plugin and the node agent.

Transport: SEQPACKET unix socket ``cni.sock`` in the run folder, one request and one reply per connection, messages in JSON
(the plugin starts in 20 ms and imports nothing but the standard library's small modules). The pod's network namespace comes
as a file descriptor with the request, so that both need not share a mount namespace.

Versioning: ``version`` stands in every request and reply; the agent serves N and N-1. Unknown fields are ignored.

This module is a leaf and imports only ``json``: start-up time is part of the contract.
"""

from __future__ import annotations

import json
from typing import Any

VERSION = 1

#: Seconds that the plugin waits for the agent's reply; longer than any wait inside the agent.
REPLY_TIMEOUT = 15.0

# Error codes of the CNI specification 1.1.0, section "Error", and the plugin's own from 100.
ERR_INCOMPATIBLE_VERSION = 1
ERR_UNSUPPORTED_FIELD = 2
ERR_UNKNOWN_CONTAINER = 3
ERR_INVALID_ENVIRONMENT = 4
ERR_IO = 5
ERR_DECODE = 6
ERR_INVALID_CONFIG = 7
ERR_TRY_AGAIN = 11
ERR_NOT_AVAILABLE = 50
ERR_LIMITED = 51
ERR_REFUSED = 100


class ProtocolError(Exception):
    """The bytes are no message of this contract."""


def request(
    command: str,
    *,
    container_id: str,
    ifname: str,
    network: str,
    netns: str = "",
    addresses: list[str] | None = None,
    pod_uid: str = "",
    pod_namespace: str = "",
    pod_name: str = "",
) -> bytes:
    """A request: ``command`` is ADD, DEL, CHECK or STATUS; ADD and CHECK carry the namespace's descriptor beside it.

    ``addresses`` are those of prevResult without prefix length; ``netns`` is the path, for messages only.
    """
    return json.dumps(
        {
            "version": VERSION,
            "command": command,
            "container_id": container_id,
            "ifname": ifname,
            "network": network,
            "netns": netns,
            "addresses": addresses or [],
            "pod_uid": pod_uid,
            "pod_namespace": pod_namespace,
            "pod_name": pod_name,
        }
    ).encode()


def reply(*, code: int = 0, message: str = "", details: str = "") -> bytes:
    """A reply: ``code`` 0 is success, else one of the error codes above."""
    return json.dumps({"version": VERSION, "code": code, "message": message, "details": details}).encode()


def decode(data: bytes) -> dict[str, Any]:
    """A request or reply as a dictionary.

    :raises ProtocolError: no JSON object, or of a version that this end does not serve.
    """
    try:
        message = json.loads(data)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError("not a JSON object")
    version = message.get("version")
    if version not in (VERSION, VERSION - 1) or version == 0:
        raise ProtocolError(f"version {version!r}, this end serves {VERSION}")
    return message
