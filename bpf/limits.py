"""How large each kernel map may be made, and what happens when it is full.

Owns the bounds that configuration is checked against, and the declared verdict of each map; how large they are without
configuration is :mod:`bpf.schema`'s. A test holds both together, and has for each map here one that fills it. Elements are
allocated when they come, so a bound is about what one node can need and the kernel can take, not about memory.

This module is a leaf: installers check values by it where no kernel program will ever run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class SizeError(ValueError):
    """No size that a map can have; the text names the map, what was given, and what may be."""


class Limit(NamedTuple):
    """Elements (bytes for a ring buffer). ``full`` is what becomes of the element that has no room, and of its traffic."""

    minimum: int
    maximum: int
    full: str
    #: It forgets the oldest by itself, or is read out all the time: that it is full says nothing.
    forgets: bool = False
    power_of_two: bool = False


_MOST = 1 << 24

LIMITS: Mapping[str, Limit] = {
    "roles": Limit(16, 65536, "the proxy is refused, and what its cgroup dials is an application's"),
    "pods": Limit(16, 65536, "ADD fails and the pod does not start; CNI STATUS says so"),
    "peers": Limit(
        1024,
        _MOST,
        "one outside of the mesh gives its room to one inside; where there is none, the address is not known as one of the mesh, "
        "and the agent is not ready",
    ),
    "services": Limit(
        256, _MOST, "the service is dialled as without a mesh; its enrolled endpoints drop what comes plain"
    ),
    "backends": Limit(1024, _MOST, "the service keeps the endpoints that it had, and the agent is not ready"),
    "members": Limit(1024, _MOST, "the service keeps the endpoints that it had, and the agent is not ready"),
    "affinity": Limit(
        1024, _MOST, "who dialled longest ago is forgotten: its next connection draws anew", forgets=True
    ),
    "datagrams": Limit(
        1024,
        _MOST,
        "of a UDP socket of several services the oldest is forgotten: a late answer comes from the endpoint's own address",
        forgets=True,
    ),
    "policies": Limit(16, 65536, "ADD fails and the pod does not start; CNI STATUS says so"),
    "classes": Limit(
        1024, _MOST, "the pod's new policy is not in force, the one before is; the agent is not ready"
    ),
    "networks": Limit(
        32, 131072, "the pod's new policy is not in force, the one before is; the agent is not ready"
    ),
    "interfaces": Limit(16, 65536, "ADD fails and the pod does not start; CNI STATUS says so"),
    "talks": Limit(1024, _MOST, "the oldest is forgotten: its next datagram is judged anew", forgets=True),
    "connecting": Limit(1024, _MOST, "the connection is refused: nobody knows who dials"),
    "captured": Limit(1024, _MOST, "the connection is refused: nobody knows where it was to go"),
    "shares": Limit(16, 65536, "ADD fails and the pod does not start; CNI STATUS says so"),
    "listeners": Limit(64, 262144, "what would come to the listener is refused; CNI STATUS says so"),
    "flows": Limit(
        1024, _MOST, "the connection goes on, and is counted in one account for all that has no room"
    ),
    "refused": Limit(
        1024, _MOST, "it is refused all the same, and counted in one account for all that has no room"
    ),
    "conversations": Limit(
        1024, _MOST, "datagrams pass and are counted in one account for all that has no room"
    ),
    "records": Limit(
        4096, 1 << 26, "the record is lost and counted; its flow has all of it", power_of_two=True
    ),
    "recent": Limit(
        1024, _MOST, "the oldest is forgotten: a refusal may be told and counted again", forgets=True
    ),
    "splices": Limit(16, _MOST, "the connection goes by TCP"),
    "splice_sockets": Limit(16, _MOST, "the connection goes by TCP"),
    "events": Limit(
        4096, 1 << 26, "it is refused all the same; the event is lost and counted", power_of_two=True
    ),
}

#: Maps without a size of their own, and what happens when the kernel has no memory for another element.
UNSIZED: Mapping[str, str] = {
    "closed": "another connection takes the slot: what still comes of the one before it is counted as refused",
    "counters": "it has a slot for each counter from the beginning",
    "udp_sockets": "the datagram, or connect(), is refused with ENOMEM",
    "splice_counters": "it has a slot for each counter from the beginning",
    "splice_ends": "the connection goes by TCP, and what is read after its end is not counted",
    "splice_programs": "it has the one slot that it needs",
    "splice_wakes": "the agent has been woken already",
    "sockets": "the dial is refused with ENOMEM; one that comes in is ended by the agent",
}


def check(name: str, size: int) -> int:
    """The size.

    :raises SizeError: the map cannot have it.
    """
    limit = LIMITS.get(name)
    if limit is None:
        raise SizeError(f"map {name!r}: there is no such map with a size (maps: {', '.join(sorted(LIMITS))})")
    if not limit.minimum <= size <= limit.maximum:
        raise SizeError(f"map {name}: {size} is not from {limit.minimum} to {limit.maximum}")
    if limit.power_of_two and size & (size - 1):
        raise SizeError(f"map {name}: {size} is no power of two")
    return size


def parse(text: str) -> tuple[str, int]:
    """``NAME=ELEMENTS``.

    :raises SizeError: it is none, or the map cannot have that size.
    """
    name, equals, number = text.partition("=")
    if not equals or not (number.isascii() and number.isdecimal()):
        raise SizeError(f"{text!r} is not NAME=ELEMENTS")
    return name, check(name, int(number))


def parse_all(texts: Iterable[str]) -> dict[str, int]:
    """By map.

    :raises SizeError: as :func:`parse`, or a map is named twice.
    """
    found: dict[str, int] = {}
    for text in texts:
        name, size = parse(text)
        if name in found:
            raise SizeError(f"map {name}: two sizes, {found[name]} and {size}")
        found[name] = size
    return found
