"""A ring buffer of the kernel's programs, read without libbpf's callbacks.

Owns the buffer's memory protocol (the kernel's Documentation/bpf/ringbuf.rst): the consumer's position in the first page, the
producer's in the second, then the data mapped twice, so that no record is ever cut. What records mean is the reader's.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from bpf.maps import Map

_BUSY = 1 << 31
_DISCARD = 1 << 30
_HEADER = 8


class RingReader:
    """The one reader of a ring buffer."""

    def __init__(self, ring: Map) -> None:
        """:raises OSError: the buffer cannot be mapped."""
        self._size = ring.info.max_entries
        self._page = mmap.PAGESIZE
        self._consumer = mmap.mmap(ring.fd, self._page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            ring.fd, self._page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=self._page
        )

    def pending(self) -> int:
        """Bytes that wait to be read."""
        (position,) = struct.unpack_from("=Q", self._consumer)
        (end,) = struct.unpack_from("=Q", self._producer)
        return int(end - position)

    def read(self, most: int | None = None) -> Iterator[bytes]:
        """What came since the last call (also to a predecessor of this process that did not read it), at most ``most`` records.

        A record's room is the kernel's again when the next one is asked for: one that a reader dies over comes to its successor.
        """
        (position,) = struct.unpack_from("=Q", self._consumer)
        (end,) = struct.unpack_from("=Q", self._producer)
        while position < end and most != 0:
            at = self._page + position % self._size
            (length,) = struct.unpack_from("=I", self._producer, at)
            if length & _BUSY:
                break
            size = length & ~_DISCARD
            if not length & _DISCARD:
                if most is not None:
                    most -= 1
                yield self._producer[at + _HEADER : at + _HEADER + size]
            position += (_HEADER + size + 7) // 8 * 8
            struct.pack_into("=Q", self._consumer, 0, position)

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()
