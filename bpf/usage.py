"""How many elements a map has, without walking it.

The kernel says of every map how much memory it takes (``memlock`` in fdinfo; since Linux 6.4 that is by elements, where these are
allocated as they come). What one element takes, and what the empty map does, is measured on a twin that is thrown away. Where
memory does not tell (older kernels, maps that are allocated whole), elements are counted.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from bpf import maps
from bpf.maps import Map, MapError

_LPM_TRIE = 11
#: Types whose elements are allocated as they come, if the map says so (a trie's and a socket map's always are).
_BY_ELEMENT = frozenset({maps.HASH, maps.HASH_OF_MAPS, maps.SOCKHASH, _LPM_TRIE})


def memory(one: Map) -> int:
    """Bytes that the kernel has allocated for it (inner maps are maps of their own).

    :raises OSError: fdinfo cannot be read.
    """
    for line in Path(f"/proc/self/fdinfo/{one.fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "memlock":
            return int(value)
    return 0


class Usage:
    """Counts the elements of one map."""

    def __init__(self, one: Map) -> None:
        self._map = one
        self._empty = self._each = 0
        try:
            self._measure()
        except (MapError, OSError):
            self._each = 0

    def _measure(self) -> None:
        one = self._map
        info = one.info
        if info.type not in _BY_ELEMENT:
            return
        if info.type == maps.HASH and not info.flags & maps.F_NO_PREALLOC:
            return
        # The elements of a map of maps are those of a plain one: they hold a pointer.
        kind = maps.HASH if info.type == maps.HASH_OF_MAPS else info.type
        value_size = 8 if info.type == maps.HASH_OF_MAPS else one.value_size
        with Map.create(kind, "twin", one.key_size, value_size, info.max_entries, flags=info.flags) as twin:
            self._empty = memory(twin)
            if kind == maps.SOCKHASH:
                ours, theirs = socket.socketpair()
                with ours, theirs:
                    twin.update(bytes(one.key_size), struct.pack("=Q", ours.fileno()))
                    self._each = memory(twin) - self._empty
            else:
                twin.update(bytes(one.key_size), bytes(value_size))
                self._each = memory(twin) - self._empty

    @property
    def is_cheap(self) -> bool:
        """Whether :meth:`count` walks nothing."""
        return self._each > 0

    def count(self) -> int:
        """Elements now.

        :raises OSError: the map cannot be looked at.
        """
        if self._each <= 0:
            return len(self._map)
        return max(0, memory(self._map) - self._empty) // self._each
