"""Carries what a map holds over into one of another size, under traffic.

Owns how each map is carried: by value before any program has the new one; by value into both while both are written
(``bpf/lib/connecting.h``); as sums that are added once no program has the old one any more; or as sockets, which only a program
can take from one map into another (``bpf/carry.c``). Which map has which size is the loader's. A map that has no room for what
the old one holds is refused before anything is changed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bpf import links, maps, schema
from bpf.maps import Map, MapError, MapFullError

#: What is under way in them is no value: they have another size on a node that the mesh comes to, or after a reboot.
NOT_IN_FORCE = frozenset({"splices", "splice_sockets"})
#: Programs and proxies read them meanwhile.
_WRITTEN_TWICE = ("connecting", "captured")
#: What is begun while they are carried is caught up with at the end; until then it is begun anew.
_CAUGHT_UP = ("conversations", "talks")
#: What programs add up in them; their carriers in ``carry.c``.
_SUMS = {"flows": "bpf_iter__bpf_map_elem__flows", "refused": "bpf_iter__bpf_map_elem__refused"}
_SOCKETS = {"listeners": "bpf_iter__sockmap__listeners"}
_BY_VALUE = frozenset({maps.HASH, maps.LRU_HASH, maps.HASH_OF_MAPS, 11})

_MEMBARRIER = {"x86_64": 324, "aarch64": 283}
_MEMBARRIER_CMD_GLOBAL = 1


class ResizeError(Exception):
    """The map stays as it is; the text names it."""


class Resized(NamedTuple):
    before: Map
    now: Map


def begin(name: str, before: Map, now: Map) -> None:
    """Carry over what nobody but the agent writes, and see that the rest has room.

    :raises ResizeError: it has not, or nobody knows how.
    """
    held = len(before) if before.key_size else 0
    room = now.info.max_entries
    if before.key_size and held > room and before.info.type != maps.LRU_HASH:
        raise ResizeError(f"map {name}: the {held} elements that it holds have no room in {room}")
    if name in _WRITTEN_TWICE or name in _SUMS or name in _SOCKETS or before.info.type == maps.RINGBUF:
        return
    if before.info.type not in _BY_VALUE:
        raise ResizeError(f"map {name}: it can only have another size on a node without the mesh")
    try:
        for key, value in before.items():
            if before.info.type == maps.HASH_OF_MAPS:
                with Map.open_id(struct.unpack("=I", value)[0]) as inner:
                    now.update(key, struct.pack("=i", inner.fd))
            else:
                now.update(key, value)
    except MapFullError:
        raise ResizeError(f"map {name}: what it holds has no room in {room} elements") from None


def macros(resized: Mapping[str, Resized]) -> dict[str, int]:
    """For the programs: the maps that others take the place of."""
    return {f"MAP_{name.upper()}_BEFORE": one.before.fd for name, one in resized.items()}


def carriers(resized: Mapping[str, Resized], code_of: Callable[[str], bytes]) -> dict[str, int]:
    """Programs that carry, by map; the descriptors are the caller's. ``code_of`` gives a function's instructions."""
    found: dict[str, int] = {}
    for name in resized:
        function = _SUMS.get(name) or _SOCKETS.get(name)
        if function is not None:
            target = "sockmap" if name in _SOCKETS else "bpf_map_elem"
            found[name] = links.load_tracing(f"carry_{name}", target, links.TRACE_ITER, code_of(function))
    return found


def when_both_are_written(resized: Mapping[str, Resized], programs: Mapping[str, int]) -> None:
    """The program that writes has been replaced, those that read have not: bring over what was there before."""
    if not resized:
        return
    _wait_for_programs()
    for name in _WRITTEN_TWICE:
        if name in resized:
            _catch_up(*resized[name])
    for name in _SOCKETS:
        if name in resized:
            links.run_iterator(programs[name], resized[name].before.fd)


def finish(resized: Mapping[str, Resized], programs: Mapping[str, int]) -> None:
    """No program that is in force has the old maps alone."""
    if not resized:
        return
    _wait_for_programs()
    for name in _CAUGHT_UP:
        if name in resized:
            _catch_up(*resized[name])
    for name in _SUMS:
        if name in resized:
            links.run_iterator(programs[name], resized[name].before.fd)


def _catch_up(before: Map, now: Map) -> None:
    carried = []
    for key, value in before.items():
        try:
            now.update(key, value, maps.NOEXIST)
        except MapFullError:
            break  # counted, as for those that come from now on
        except MapError:
            continue  # written meanwhile
        carried.append(key)
    for key in carried:
        # What went meanwhile has gone from the new one too, if it was there by then.
        if before.lookup(key) is None:
            now.delete(key)


def _wait_for_programs() -> None:
    """Until no program runs any more that was replaced before: one grace period of the kernel's."""
    number = _MEMBARRIER.get(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    if number is not None and libc.syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) == 0:
        return
    # A kernel without it: the swap of an inner map waits as well.
    model = schema.INNER_POLICY
    with (
        Map.create(
            model.type, model.name, model.key_size, model.value_size, model.max_entries, flags=model.flags
        ) as inner,
        Map.create(maps.HASH_OF_MAPS, "wait", 4, 4, 1, flags=maps.F_NO_PREALLOC, inner=inner) as outer,
    ):
        outer.update(bytes(4), struct.pack("=i", inner.fd))


def close(programs: Mapping[str, int]) -> None:
    for fd in programs.values():
        os.close(fd)
