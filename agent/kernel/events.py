"""The ring buffer ``events``, read without libbpf's callbacks.

Owns the buffer's memory protocol (the kernel's Documentation/bpf/ringbuf.rst): the consumer's position in the first page, the
producer's in the second, then the data mapped twice, so that no record is ever cut.
"""

from __future__ import annotations

import mmap
import struct

from agent.kernel.model import Event
from bpf import wire
from bpf.maps import Map

_BUSY = 1 << 31
_DISCARD = 1 << 30
_HEADER = 8


class EventReader:
    """The one reader of a ring buffer."""

    def __init__(self, ring: Map) -> None:
        """:raises OSError: the buffer cannot be mapped."""
        self._size = ring.info.max_entries
        self._page = mmap.PAGESIZE
        self._consumer = mmap.mmap(ring.fd, self._page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            ring.fd, self._page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=self._page
        )

    def read(self) -> list[Event]:
        """What came since the last call (also to a predecessor of this process that did not read it)."""
        events: list[Event] = []
        (position,) = struct.unpack_from("=Q", self._consumer)
        (end,) = struct.unpack_from("=Q", self._producer)
        while position < end:
            at = self._page + position % self._size
            (length,) = struct.unpack_from("=I", self._producer, at)
            if length & _BUSY:
                break
            size = length & ~_DISCARD
            if not length & _DISCARD and size == wire.Event.LAYOUT.size:
                events.append(_event(self._producer[at + _HEADER : at + _HEADER + size]))
            position += (_HEADER + size + 7) // 8 * 8
            struct.pack_into("=Q", self._consumer, 0, position)
        return events

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()


def _event(data: bytes) -> Event:
    raw = wire.Event.unpack(data)
    reason = wire.Reason(raw.reason)
    server = raw.server6 if reason is wire.Reason.IPV6 else raw.server_address
    return Event(
        reason,
        raw.netns,
        raw.source,
        raw.destination,
        (raw.client_address, raw.client_port),
        (server, raw.server_port),
    )
