"""Header blocks of CONNECT tunnels (RFC 9113, sections 8.2, 8.3 and 8.5): check what arrived, write what is sent.

Owns the rules for names, pseudo-header fields and the authority. HPACK itself is the ``hpack`` library's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

Headers = list[tuple[bytes, bytes]]

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE_FORBIDDEN = re.compile(rb"[\x00\r\n]")
_CONNECTION_SPECIFIC = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)
_AUTHORITY = re.compile(r"(?:\[([0-9a-fA-F:.]{2,45})\]|([^:\[\]@/?#\s]+)):([0-9]{1,5})", re.ASCII)


class MalformedError(ValueError):
    """A header section that is no valid message: the stream ends with PROTOCOL_ERROR (section 8.1.1)."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    authority: str
    fields: dict[bytes, bytes] = field(default_factory=dict)

    def get(self, name: bytes) -> str:
        """A field's value, empty if it is not there; repeated fields are joined by a comma (section 8.2.3 aside)."""
        return self.fields.get(name, b"").decode("latin-1")


def _split(headers: Iterable[tuple[bytes, bytes]]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    pseudo: dict[bytes, bytes] = {}
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        if _VALUE_FORBIDDEN.search(value) or value != value.strip(b" \t"):
            raise MalformedError(f"value of {name!r}")
        if name.startswith(b":"):
            if fields:
                raise MalformedError(f"{name!r} after a regular field")
            if name in pseudo:
                raise MalformedError(f"{name!r} twice")
            pseudo[name] = value
            continue
        if not _NAME.fullmatch(name):
            raise MalformedError(f"name {name!r}")
        if name in _CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
            raise MalformedError(f"connection-specific field {name!r}")
        fields[name] = fields[name] + b"," + value if name in fields else value
    return pseudo, fields


def request(headers: Iterable[tuple[bytes, bytes]]) -> Request:
    """:raises MalformedError: this is no request (section 8.3.1), or a CONNECT with a scheme or path (section 8.5)."""
    pseudo, fields = _split(headers)
    method = pseudo.pop(b":method", b"")
    if not method:
        raise MalformedError("no :method")
    authority = pseudo.pop(b":authority", b"")
    if method == b"CONNECT":
        if pseudo:
            raise MalformedError(f"CONNECT with {', '.join(sorted(repr(n) for n in pseudo))}")
        if not authority:
            raise MalformedError("CONNECT without :authority")
    elif set(pseudo) != {b":scheme", b":path"} or not pseudo[b":path"]:
        raise MalformedError("request without :scheme and :path, or with others")
    return Request(method.decode("latin-1"), authority.decode("latin-1"), fields)


def status(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The status of a response.

    :raises MalformedError: it is none (section 8.3.2).
    """
    pseudo, _ = _split(headers)
    value = pseudo.pop(b":status", b"")
    if pseudo or len(value) != 3 or not value.isdigit() or value < b"100":
        raise MalformedError(f"response with status {value!r}")
    return int(value)


def trailers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """:raises MalformedError: a trailer section with pseudo-header fields (section 8.1)."""
    pseudo, _ = _split(headers)
    if pseudo:
        raise MalformedError("pseudo-header field in trailers")


def split_authority(authority: str) -> tuple[str, int] | None:
    """``host:port`` or ``[v6]:port``; None if it is neither or the port is none."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or not 0 < int(match[3]) < 65536:
        return None
    return match[1] or match[2], int(match[3])


def authority_of(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def forwarded_for(value: str) -> tuple[str, int] | None:
    """Address and port of the first ``for`` of a Forwarded field (RFC 7239, section 6); None if there is none."""
    for pair in value.split(",")[0].split(";"):
        name, _, node = pair.strip().partition("=")
        if name.lower() == "for":
            return split_authority(node.strip().strip('"'))
    return None
