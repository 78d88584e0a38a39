"""Open connections and the accounts, as the kernel keeps them.

Owns reading the pinned iterators (a read of the pin runs the program over every socket that has something to tell) and the maps
``flows`` and ``refused``. The sums are the kernel's: see ``bpf/lib/account.h`` for why none is counted twice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from agent.kernel.model import Connection, Direction, FlowCounters, FlowKey
from bpf import schema, wire
from bpf.maps import Map

_SIZE = wire.Connection.LAYOUT.size
_OVERFLOW = frozenset(key.pack() for keys in schema.OVERFLOW_KEYS.values() for key in keys)
_NOTHING = FlowCounters()


def connections(pin: Path) -> list[Connection]:
    """What an iterator over open connections writes.

    :raises OSError: it cannot be run.
    """
    data = pin.read_bytes()
    rows = (wire.Connection.unpack(data[at : at + _SIZE]) for at in range(0, len(data), _SIZE))
    # When many come and go meanwhile, the kernel may come to a socket twice.
    return list({row.cookie: _connection(row) for row in rows}.values())


def _connection(row: wire.Connection) -> Connection:
    return Connection(
        row.netns,
        (row.client_address, row.client_port),
        (row.server_address, row.server_port),
        row.source,
        row.destination,
        wire.Via(row.kind),
        row.generation,
        bool(row.flags & wire.SOCKET_REVOKED),
        row.sent,
        row.received,
        row.cookie,
        row.rtt_us,
        row.retransmits,
        bool(row.flags & wire.SOCKET_ACTIVE),
    )


def flows(pin: Path, totals: Map, refused: Map) -> dict[FlowKey, FlowCounters]:
    """The accounts at this moment.

    :param pin: the iterator that brings open connections' bytes into ``totals``.
    """
    pin.read_bytes()
    found: dict[FlowKey, FlowCounters] = {}
    for key, value in totals.items():
        _add(found, _key(key), _of_flow(value))
    for key, value in refused.items():
        _add(found, _key(key), _of_refusals(value))
    # What had no room is there only once there was something.
    return {key: counters for key, counters in found.items() if counters != _NOTHING}


def _add(found: dict[FlowKey, FlowCounters], key: FlowKey, counters: FlowCounters) -> None:
    # What was forgotten and what had no room are shown as one.
    before = found.get(key)
    found[key] = counters if before is None else before + counters


def forget(totals: Map, refused: Map, keys: Iterable[FlowKey]) -> None:
    """Drop accounts without open connections. Their sums go on, under nobody's name."""
    for key in keys:
        packed = _packed(key)
        if packed in _OVERFLOW:
            continue
        value = refused.lookup(packed)
        if value is not None and refused.delete(packed):
            _remember(refused, key._replace(verdict=wire.VERDICT_SEVERAL), value)
        value = totals.lookup(packed)
        if value is not None:
            flow = wire.Flow.unpack(value)
            if flow.opened == flow.closed and totals.delete(packed):
                _remember(totals, key._replace(verdict=wire.VERDICT_ALLOWED), value)


def _remember(table: Map, key: FlowKey, value: bytes) -> None:
    """Add to the account of what was forgotten, which nobody else writes; it has the room of one that was dropped."""
    packed = _packed(FlowKey(0, 0, 0, key.direction, key.protocol, key.verdict), wire.FLOW_FORGOTTEN)
    before = table.lookup(packed) or bytes(len(value))
    layout = struct.Struct(f"={len(value) // 8}Q")
    sums = (a + b for a, b in zip(layout.unpack(before), layout.unpack(value), strict=True))
    table.update(packed, layout.pack(*sums))


def _of_flow(value: bytes) -> FlowCounters:
    flow = wire.Flow.unpack(value)
    return FlowCounters(
        opened=flow.opened,
        closed=flow.closed,
        sent=flow.sent,
        received=flow.received,
        sent_datagrams=flow.sent_datagrams,
        received_datagrams=flow.received_datagrams,
        retransmits=flow.retransmits,
        rtt_us=flow.rtt_us,
        rtt_samples=flow.rtt_samples,
    )


def _of_refusals(value: bytes) -> FlowCounters:
    refusals = wire.Refusals.unpack(value)
    return FlowCounters(refused=refusals.count, refused_bytes=refusals.bytes)


def _packed(key: FlowKey, flags: int = 0) -> bytes:
    return wire.FlowKey(
        key.source,
        key.destination,
        key.source_zone,
        key.destination_zone,
        key.port,
        key.verdict,
        key.protocol,
        key.direction,
        flags,
    ).pack()


def _key(data: bytes) -> FlowKey:
    raw = wire.FlowKey.unpack(data)
    return FlowKey(
        raw.source,
        raw.destination,
        raw.port,
        Direction(raw.direction),
        raw.protocol,
        raw.verdict,
        raw.source_zone,
        raw.destination_zone,
    )
