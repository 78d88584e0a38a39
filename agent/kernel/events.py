"""What the kernel tells at once: the records of the ring buffer ``events``."""

from __future__ import annotations

from agent.kernel.model import Event
from agent.kernel.ring import RingReader
from bpf import wire


def read_events(ring: RingReader) -> list[Event]:
    """What came since the last call (also to a predecessor of this process that did not read it)."""
    size = wire.Event.LAYOUT.size
    return [_event(data) for data in ring.read() if len(data) == size]


def _event(data: bytes) -> Event:
    raw = wire.Event.unpack(data)
    return Event(
        wire.Reason(raw.reason),
        raw.netns,
        raw.source,
        raw.destination,
        (raw.client_address, raw.client_port),
        (raw.server_address, raw.server_port),
    )
