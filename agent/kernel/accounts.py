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
_OVERFLOW = frozenset(key.pack() for key in schema.OVERFLOW_KEYS)


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
    )


def flows(pin: Path, totals: Map, refused: Map) -> dict[FlowKey, FlowCounters]:
    """The accounts at this moment.

    :param pin: the iterator that brings open connections' bytes into ``totals``.
    """
    pin.read_bytes()
    refusals = {key: struct.unpack("=Q", value)[0] for key, value in refused.items()}
    found: dict[FlowKey, FlowCounters] = {}
    for key, value in totals.items():
        flow = wire.Flow.unpack(value)
        found[_key(key)] = FlowCounters(
            flow.opened, flow.closed, refusals.pop(key, 0), flow.sent, flow.received
        )
    for key, count in refusals.items():
        found[_key(key)] = FlowCounters(0, 0, count, 0, 0)
    # What had no room is there only once there was something.
    nothing = FlowCounters(0, 0, 0, 0, 0)
    return {key: counters for key, counters in found.items() if counters != nothing}


def forget(totals: Map, refused: Map, keys: Iterable[FlowKey]) -> None:
    """Drop accounts without open connections."""
    for key in keys:
        packed = wire.FlowKey(key.source, key.destination, key.port, key.direction).pack()
        if packed in _OVERFLOW:
            continue
        refused.delete(packed)
        value = totals.lookup(packed)
        if value is not None:
            flow = wire.Flow.unpack(value)
            if flow.opened == flow.closed:
                totals.delete(packed)


def _key(data: bytes) -> FlowKey:
    raw = wire.FlowKey.unpack(data)
    return FlowKey(raw.source, raw.destination, raw.port, Direction(raw.direction))
