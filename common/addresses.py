"""Names of sockets."""

from __future__ import annotations

from typing import Any


def end_of(name: Any) -> Any:
    """Address and port of a TCP socket's name; an IPv4-mapped address is the IPv4 address. Others' names stay as they are."""
    if not isinstance(name, tuple) or len(name) < 4:
        return name
    address: str = name[0]
    return address[7:] if address.startswith("::ffff:") and "." in address else address, name[1]
