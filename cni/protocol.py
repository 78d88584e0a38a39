"""The contract between the CNI plugin and the node agent.

Transport: SEQPACKET unix socket ``cni.sock`` in the run folder, one request and one reply per connection, messages in JSON
(the plugin starts in 10 ms and imports nothing but the standard library's small modules). The pod's network namespace comes
as a file descriptor with the request, so that both need not share a mount namespace.

Versioning: ``version`` stands in every request and reply; the agent serves N and N-1. Unknown fields are ignored.

Notes: a DEL that found no agent is left as a file in the folder :data:`NOTES` of the run folder, its content the request.
The agent works them off at its start, before every ADD, and from time to time.

Enrolment: in the file :data:`ENROLMENT` of the run folder the agent leaves word of the namespaces in which no pod is in the
mesh, for a plugin that does not find it. What is not in there is not let pass.

This module is a leaf and imports only ``os``, ``time`` and :mod:`cni.fastjson`: start-up time is part of the contract.
"""

from __future__ import annotations

import os
import time

from cni.fastjson import dumps, loads

TYPE_CHECKING = False  # typing itself is not imported: 3 ms
if TYPE_CHECKING:
    from typing import Any

VERSION = 1

#: Versions of the CNI specification that ADD accepts, oldest first. 0.3.1 is the first with the present form of results.
SUPPORTED = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")

#: In the run folder: the agent's socket, and the folder of notes.
SOCKET_NAME = "cni.sock"
NOTES = "cni-notes"
ENROLMENT = "enrolment.json"

#: Seconds that the plugin waits for the agent's reply; longer than any wait inside the agent.
REPLY_TIMEOUT = 15.0
#: The same at most, when the configuration says how long.
LONGEST_TIMEOUT = 60
#: Seconds that a DEL waits at most: a note does as well, and a node that is emptied while its agent hangs waits for each pod.
DEL_TIMEOUT = 3.0
#: Seconds for what is asked though the answer changes nothing: STATUS of a node that is ready always, and a DEL of a namespace
#: that is outside (the list may have been another at the ADD).
BRIEF_TIMEOUT = 1.0

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
ERR_INTERNAL = 101


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
    valid_attachments: list[list[str]] | None = None,
    patience_ms: int = 0,
) -> bytes:
    """A request: ``command`` is ADD, DEL, CHECK, STATUS or GC; ADD and CHECK carry the namespace's descriptor beside it.

    ``addresses`` are those of prevResult without prefix length; ``netns`` is the path (where the agent sees it too, a
    restarted agent finds the namespace by it). ``valid_attachments`` are pairs of container id and interface, for GC.
    ``patience_ms`` is how long the plugin will wait, in milliseconds.
    """
    return dumps(
        {
            "version": VERSION,
            "command": command,
            "patience_ms": patience_ms,
            "container_id": container_id,
            "ifname": ifname,
            "network": network,
            "netns": netns,
            "addresses": addresses or [],
            "pod_uid": pod_uid,
            "pod_namespace": pod_namespace,
            "pod_name": pod_name,
            "valid_attachments": valid_attachments,
        }
    ).encode()


def reply(*, code: int = 0, message: str = "", details: str = "") -> bytes:
    """A reply: ``code`` 0 is success, else one of the error codes above."""
    return dumps({"version": VERSION, "code": code, "message": message, "details": details}).encode()


def write_note(run_dir: str, message: bytes) -> None:
    """Leave a request for an agent that is away. The note is whole or not there.

    :raises OSError: it could not be written.
    """
    folder = f"{run_dir}/{NOTES}"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    name = f"{time.time_ns()}-{os.getpid()}"
    fd = os.open(f"{folder}/.{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, message)
    finally:
        os.close(fd)
    os.rename(f"{folder}/.{name}", f"{folder}/{name}")


def write_outside(run_dir: str, namespaces: list[str]) -> None:
    """Leave word of the namespaces in which no pod is in the mesh. The file is whole or as it was.

    :raises OSError: it could not be written.
    """
    aside = f"{run_dir}/.{ENROLMENT}.{os.getpid()}"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        data = memoryview(dumps({"version": VERSION, "outside": namespaces}).encode())
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
    os.rename(aside, f"{run_dir}/{ENROLMENT}")


def read_outside(run_dir: str) -> list[str]:
    """What :func:`write_outside` wrote; nothing if it is not there, or not as it should be."""
    try:
        fd = os.open(f"{run_dir}/{ENROLMENT}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            message = decode(b"".join(iter(lambda: os.read(fd, 1 << 16), b"")))
        finally:
            os.close(fd)
    except (OSError, ProtocolError):
        return []
    outside = message.get("outside")
    return [name for name in outside if isinstance(name, str) and name] if isinstance(outside, list) else []


def decode(data: bytes) -> dict[str, Any]:
    """A request or reply as a dictionary.

    :raises ProtocolError: no JSON object, or of a version that this end does not serve.
    """
    try:
        message = loads(data)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError("not a JSON object")
    version = message.get("version")
    if version not in (VERSION, VERSION - 1) or version == 0:
        raise ProtocolError(f"version {version!r}, this end serves {VERSION}")
    return message
