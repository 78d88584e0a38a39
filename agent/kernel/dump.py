"""What stands in the pinned maps, as text: how large they are, their elements, verdicts by pod.

Owns which record each map's keys and values are. Read only, and without an agent: the pins are enough.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from agent.kernel.errors import KernelError
from agent.kernel.steps import end_text, reason_text
from agent.kernel.tables import Tables, block_text
from bpf import maps, schema, usage, wire
from bpf.limits import UNSIZED
from bpf.maps import Map, MapError
from bpf.usage import Usage

Name = Callable[[int], str]

_TYPES = {
    maps.HASH: "hash",
    maps.ARRAY: "array",
    maps.PROG_ARRAY: "program array",
    maps.HASH_OF_MAPS: "hash of maps",
    maps.LRU_HASH: "LRU hash",
    maps.LPM_TRIE: "LPM trie",
    maps.SOCKHASH: "socket hash",
    maps.SK_STORAGE: "socket storage",
    maps.RINGBUF: "ring buffer",
}
#: Maps without keys, or with values that only programs look into.
_OPAQUE = frozenset({maps.SK_STORAGE, maps.RINGBUF, maps.PROG_ARRAY})

Kind = type[wire.Record] | str
_ELEMENTS: Mapping[str, tuple[Kind, Kind]] = {
    "roles": ("cgroup", "role"),
    "pods": ("netns", wire.Pod),
    "peers": ("address", wire.Peer),
    "services": (wire.Endpoint, wire.Service),
    "backends": (wire.BackendKey, wire.Backend),
    "members": (wire.MemberKey, ""),
    "affinity": (wire.AffinityKey, wire.Affinity),
    "datagrams": ("raw", wire.Endpoint),
    "policies": ("netns", "map"),
    "classes": (wire.ClassKey, "class"),
    "networks": (wire.NetworkOf, "map"),
    "interfaces": ("index", wire.Interface),
    "talks": (wire.TalkKey, wire.Talk),
    "connecting": (wire.Tuple, wire.Who),
    "captured": (wire.CapturedKey, wire.Captured),
    "shares": ("netns", wire.Share),
    "listeners": (wire.Endpoint, "socket"),
    "flows": (wire.FlowKey, wire.Flow),
    "refused": (wire.FlowKey, wire.Refusals),
    "conversations": (wire.ConversationKey, wire.Conversation),
    "recent": (wire.Refusal, "nanoseconds"),
    "closed": ("slot", wire.Closed),
    "counters": ("slot", "count"),
    "splices": ("id", "raw"),
    "splice_sockets": ("key", "socket"),
    "splice_counters": ("slot", "count"),
}


class UnknownMapError(ValueError):
    """There is no map of that name, or none whose elements can be listed; the text is for people."""


@contextmanager
def _opened(pins: Path, name: str) -> Iterator[Map]:
    path = pins / f"v{wire.ABI}" / name
    try:
        found = Map.open(str(path), read_only=True)
    except MapError as error:
        raise KernelError(f"{path}: {error.strerror}") from error
    with found:
        yield found


def sizes(pins: Path) -> list[dict[str, Any]]:
    """Every map, with what the kernel says of it; elements are counted where that walks little.

    :raises KernelError: the pins are not there.
    """
    found = []
    for spec in schema.MAPS:
        with _opened(pins, spec.name) as one:
            used = None
            if spec.key_size and spec.name not in UNSIZED:
                used = Usage(one).count()
            found.append(row(spec.name, one.info, used, usage.memory(one)))
    return found


def row(name: str, info: maps.Info, used: int | None, memory: int) -> dict[str, Any]:
    return {
        "name": name,
        "id": info.id,
        "type": _TYPES.get(info.type, str(info.type)),
        "entries": used,
        "size": info.max_entries,
        "key_bytes": info.key_size,
        "value_bytes": info.value_size,
        "memory_bytes": memory,
    }


def elements(pins: Path, name: str, most: int) -> list[dict[str, Any]]:
    """Some of a map's elements, in no order.

    :raises UnknownMapError: there is no such map, or it has none that can be listed.
    :raises KernelError: the pins are not there.
    """
    spec = next((spec for spec in schema.MAPS if spec.name == name), None)
    if spec is None:
        raise UnknownMapError(
            f"map {name}: there is none; there are {', '.join(s.name for s in schema.MAPS)}"
        )
    if spec.type in _OPAQUE:
        raise UnknownMapError(f"map {name}: a {_TYPES[spec.type]}, whose elements only programs see")
    key_kind, value_kind = _ELEMENTS[name]
    found = []
    with _opened(pins, name) as one:
        for key in islice(one.keys(), most):
            value = one.lookup(key)
            if value is not None:
                found.append({"key": _shown(key_kind, key), "value": _shown(value_kind, value)})
    return found


def _shown(kind: Kind, data: bytes) -> Any:
    if isinstance(kind, str):
        match kind:
            case "":
                return None
            case "address":
                return wire.unpack_address(data)
            case "raw":
                return data.hex()
            case "role":
                return wire.Role(struct.unpack("=I", data)[0]).name.lower()
        return struct.unpack({4: "=I", 8: "=Q"}[len(data)], data)[0]
    record = kind.unpack(data)
    shown: dict[str, Any] = {}
    for member in kind.LAYOUT.members:
        if member not in ("pad", "filler"):
            value = getattr(record, member)
            if isinstance(value, tuple):
                shown[member] = [end_text(end.address, end.port) for end in value]
            else:
                shown[member] = value.hex() if isinstance(value, bytes) else value
    return shown


# Verdicts


def verdicts(pins: Path, netns: int, name: Name) -> dict[str, Any]:
    """All that is judged by at one pod of this node: AuthorizationPolicy with mTLS mode, and NetworkPolicy.

    :param name: what people call an identity.
    """
    with Tables.open(pins) as tables:
        return _verdicts(tables, netns, name)


def all_verdicts(pins: Path, name: Name) -> dict[int, tuple[wire.Pod, dict[str, Any]]]:
    """The same of every pod that the kernel has, by netns cookie."""
    with Tables.open(pins) as tables:
        return {netns: (pod, _verdicts(tables, netns, name)) for netns, pod in tables.pods().items()}


def _verdicts(tables: Tables, netns: int, name: Name) -> dict[str, Any]:
    found = tables.policy_entries(netns)
    shown: dict[str, Any] = {"netns": netns, "generation": 0, "authorization": None, "network": {}}
    if found is not None:
        flags, entries = found
        generation = flags & wire.POLICY_GENERATION_MASK
        shown["generation"] = generation
        classes = tables.class_entries(netns, generation) if flags & wire.POLICY_CLASSES else {}
        shown["authorization"] = [
            {
                "source": name(key.identity),
                "identity": key.identity,
                "port": key.port,
                "addresses": _blocks(classes, key.address_class),
                "allowed": allowed,
            }
            for key, allowed in sorted(
                entries.items(), key=lambda item: (item[0].identity, item[0].address_class, item[0].port)
            )
        ]
    for direction in wire.Direction:
        network = tables.network_entries(netns, direction)
        if network is not None:
            word = "egress" if direction is wire.Direction.OUTBOUND else "ingress"
            shown["network"][word] = _network(network)
    return shown


def _blocks(classes: Mapping[str, int], number: int) -> list[str]:
    """The blocks of a class; none for the class of all other addresses."""
    return sorted(block for block, found in classes.items() if found == number) if number else []


def _network(entries: Mapping[wire.NetworkKey, int]) -> list[dict[str, Any]]:
    """By class: whose addresses, and what they may use. Class 0 is everybody else."""
    blocks: dict[int, list[str]] = {0: []}
    ports: dict[int, list[str]] = {}
    for key, value in entries.items():
        bits = key.prefix_length - wire.NETWORK_PREFIX_BITS
        if key.stage == 0:
            blocks.setdefault(value, []).append(block_text(wire.unpack_address(key.value), bits))
        elif value:
            ports.setdefault(key.stage - 1, []).append(_ports(key.value, bits))
    return [
        {
            "class": number,
            "addresses": sorted(blocks.get(number, [])),
            "allowed": sorted(ports.get(number, [])),
        }
        for number in sorted(blocks.keys() | ports.keys())
    ]


def _ports(value: bytes, bits: int) -> str:
    if not bits:
        return "everything"
    protocol, port = struct.unpack_from("!BH", value)
    word = {6: "TCP", 17: "UDP", 132: "SCTP"}.get(protocol, str(protocol))
    last = port | (1 << (wire.NETWORK_PORT_BITS - bits)) - 1
    if (port, last) == (0, 0xFFFF):
        return word
    return f"{word} {port}" if port == last else f"{word} {port}-{last}"


# Sums


def sums(pins: Path, name: Name) -> list[dict[str, Any]]:
    """The accounts as they stand: what open connections have carried since they were looked at last is not in them yet."""
    found = []
    for table, kind in (("flows", wire.Flow), ("refused", wire.Refusals)):
        with _opened(pins, table) as one:
            for data, value in one.items():
                key, counters = wire.FlowKey.unpack(data), kind.unpack(value)
                shown = {member: getattr(counters, member) for member in kind.LAYOUT.members}
                if any(shown.values()):
                    found.append(
                        {
                            "source": name(key.source),
                            "destination": name(key.destination),
                            "protocol": {6: "tcp", 17: "udp"}.get(key.protocol, str(key.protocol)),
                            "port": key.port,
                            "direction": wire.Direction(key.direction).name.lower(),
                            "verdict": "refused" if key.verdict else "allowed",
                            "reason": _reason(key.verdict),
                            **shown,
                        }
                    )
    return found


def _reason(verdict: int) -> str:
    if verdict == wire.VERDICT_ALLOWED:
        return ""
    try:
        return reason_text(wire.Reason(verdict))
    except ValueError:
        return "several"


def pod_of(pins: Path, text: str) -> tuple[int, wire.Pod]:
    """The pod of this node that has an address, or a netns cookie.

    :raises LookupError: the kernel has none.
    """
    with Tables.open(pins) as tables:
        pods = tables.pods()
    if text.isdecimal() and int(text) in pods:
        return int(text), pods[int(text)]
    try:
        wanted = wire.canonical(str(ipaddress.ip_address(text)))
    except ValueError:
        raise LookupError(f"{text}: no address; without an agent pods are known by theirs only") from None
    for netns, pod in pods.items():
        if wanted in (pod.address4, pod.address6):
            return netns, pod
    raise LookupError(f"{text}: no pod of this node that the kernel has has this address")
