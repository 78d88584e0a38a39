"""eBPF maps at run time, through ``libbpf.so.1`` by ctypes: bcc would map LLVM into the process.

Owns opening, creating and pinning maps and reading and writing their elements as bytes; what the bytes mean
is :mod:`bpf.wire`'s. Lookups need no capability once a process holds the descriptor (the kernel guards only
creation, also with ``unprivileged_bpf_disabled``), so that a proxy without any may read a map that the agent
passed to it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

from bpf.wire import Captured, CapturedKey

# enum bpf_map_type
HASH = 1
ARRAY = 2
PROG_ARRAY = 3
ARRAY_OF_MAPS = 12
HASH_OF_MAPS = 13
LRU_HASH = 9
LPM_TRIE = 11
SOCKHASH = 18
SK_STORAGE = 24
RINGBUF = 27

# map_flags
F_NO_PREALLOC = 1 << 0
F_RDONLY = 1 << 3

# flags of update
ANY = 0
NOEXIST = 1
EXIST = 2

# PyDLL keeps the interpreter's lock: these calls take about a microsecond and never block.
_fast = ctypes.PyDLL("libbpf.so.1", use_errno=True)
_lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
_void = ctypes.c_void_p
_lookup = _fast.bpf_map_lookup_elem
_lookup.argtypes = (ctypes.c_int, ctypes.c_char_p, _void)
_next_key = _fast.bpf_map_get_next_key
_next_key.argtypes = (ctypes.c_int, ctypes.c_char_p, _void)
_lookup_batch = _fast.bpf_map_lookup_batch
_lookup_batch.argtypes = (ctypes.c_int, _void, _void, _void, _void, ctypes.POINTER(ctypes.c_uint32), _void)
# With maps in maps the kernel waits for running programs: this one lets other threads go on.
_update = _lib.bpf_map_update_elem
_update.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64)
_delete = _lib.bpf_map_delete_elem
_delete.argtypes = (ctypes.c_int, ctypes.c_char_p)
_create = _lib.bpf_map_create
_create.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint32,
    _void,
)
_get_info = _lib.bpf_obj_get_info_by_fd
_get_info.argtypes = (ctypes.c_int, _void, ctypes.POINTER(ctypes.c_uint32))
_lib.bpf_btf_load.argtypes = (ctypes.c_char_p, ctypes.c_size_t, _void)
_pin = _lib.bpf_obj_pin
_pin.argtypes = (ctypes.c_int, ctypes.c_char_p)
_get_opts = _lib.bpf_obj_get_opts
_get_opts.argtypes = (ctypes.c_char_p, _void)

_BATCH = 512
_BATCH_TYPES = frozenset({HASH, LRU_HASH, ARRAY})


class MapError(OSError):
    """A map operation failed; ``errno`` is the kernel's."""


class MapFullError(MapError):
    """The map has no room for another element."""


class Info(NamedTuple):
    """Of a map, as the kernel tells it. Sizes in bytes."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class _MapInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


class _ObjGetOpts(ctypes.Structure):
    _fields_ = (("sz", ctypes.c_size_t), ("file_flags", ctypes.c_uint32), ("pad", ctypes.c_uint32))


class CreateOptions(ctypes.Structure):
    """libbpf's ``struct bpf_map_create_opts`` up to ``map_flags``; longer ones are the loader's (BTF)."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    )


def _error(what: str) -> MapError:
    code = ctypes.get_errno()
    if code in (errno.E2BIG, errno.ENOSPC):
        return MapFullError(code, f"{what}: no room for another element")
    return MapError(code, f"{what}: {os.strerror(code)}")


def map_info(fd: int) -> Info:
    """:raises MapError: the descriptor is no map's."""
    info = _MapInfo()
    length = ctypes.c_uint32(ctypes.sizeof(info))
    if _get_info(fd, ctypes.byref(info), ctypes.byref(length)) < 0:
        raise _error("map info")
    sizes = (info.key_size, info.value_size, info.max_entries)
    return Info(info.type, info.id, *sizes, info.map_flags, info.name.decode())


def load_btf_of_bytes(size: int) -> tuple[int, int, int]:
    """BTF for a map whose kind needs some: key ``u32``, value ``u8[size]``. (descriptor, key type, value type).

    :raises MapError: the kernel refuses it.
    """
    names = b"\0u32\0u8\0"
    integer, array = 1 << 24, 3 << 24
    types = struct.pack("=4I", 1, integer, 4, 32) + struct.pack("=4I", 5, integer, 1, 8)
    types += struct.pack("=6I", 0, array, 0, 2, 1, size)
    header = struct.pack("=HBB5I", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    blob = header + types + names
    fd = _lib.bpf_btf_load(blob, len(blob), None)
    if fd < 0:
        raise _error("load BTF")
    return fd, 1, 3


class Map:
    """One map, owned through its descriptor. Keys and values are bytes of exactly the map's sizes.

    Not for use by several threads at once (lookups share a buffer).
    """

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor, also when it raises.

        :raises MapError: it is no map's.
        """
        self.fd = fd
        try:
            self.info = map_info(fd)
        except MapError:
            os.close(fd)
            self.fd = -1
            raise
        #: Without the count of its forms, see :class:`bpf.schema.MapSpec`.
        self.name = self.info.name.partition(".")[0]
        self.key_size = self.info.key_size
        self.value_size = self.info.value_size
        #: Called for each element that finds no room.
        self.on_full: Callable[[], None] | None = None
        self._value = ctypes.create_string_buffer(self.value_size)
        self._value_address = ctypes.addressof(self._value)

    @classmethod
    def open(cls, path: str, *, read_only: bool = False) -> Self:
        """The map pinned at ``path``.

        :param read_only: the descriptor can only look up and iterate, to be handed out.
        :raises MapError: nothing is pinned there, or it is no map.
        """
        options = _ObjGetOpts(ctypes.sizeof(_ObjGetOpts), F_RDONLY if read_only else 0)
        fd = _get_opts(path.encode(), ctypes.byref(options))
        if fd < 0:
            raise _error(f"open {path}")
        return cls(fd)

    @classmethod
    def open_id(cls, number: int) -> Self:
        """The map of that number (what a map in map answers to a lookup).

        :raises MapError: it is gone.
        """
        fd = _lib.bpf_map_get_fd_by_id(number)
        if fd < 0:
            raise _error(f"open map {number}")
        return cls(fd)

    @classmethod
    def create(
        cls,
        kind: int,
        name: str,
        key_size: int,
        value_size: int,
        max_entries: int,
        *,
        flags: int = 0,
        inner: Map | None = None,
        btf: tuple[int, int, int] | None = None,
    ) -> Self:
        """A new map; ``inner`` is the model of a map in map, ``btf`` (descriptor, key type, value type).

        :raises MapError: the kernel refuses it.
        """
        options = CreateOptions(sz=ctypes.sizeof(CreateOptions), map_flags=flags)
        if inner is not None:
            options.inner_map_fd = inner.fd
        if btf is not None:
            options.btf_fd, options.btf_key_type_id, options.btf_value_type_id = btf
        fd = _create(kind, name.encode()[:15], key_size, value_size, max_entries, ctypes.byref(options))
        if fd < 0:
            raise _error(f"create map {name}")
        return cls(fd)

    def pin(self, path: str) -> None:
        """:raises MapError: something is there already, or it is not on a bpf file system."""
        if _pin(self.fd, path.encode()) < 0:
            raise _error(f"pin map {self.name} at {path}")

    def lookup(self, key: bytes) -> bytes | None:
        """The element's value, None when it is not there.

        :raises ValueError: the key is not of the map's size.
        :raises MapError: anything but that the key is not there.
        """
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name}: key of {len(key)} bytes, not {self.key_size}")
        if _lookup(self.fd, key, self._value_address) == 0:
            return self._value.raw
        if ctypes.get_errno() == errno.ENOENT:
            return None
        raise _error(f"map {self.name}: lookup")

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Replace or add one element (atomically, for programs that read it).

        For a map in map the value is the inner map's descriptor (4 bytes), and the call returns when no
        running program uses the replaced one any more.

        :raises ValueError: key or value is not of the map's size.
        :raises MapFullError: no room.
        :raises MapError: the kernel refuses it.
        """
        if len(key) != self.key_size or len(value) != self.value_size:
            wrong = f"{len(key)} + {len(value)} bytes, not {self.key_size} + {self.value_size}"
            raise ValueError(f"map {self.name}: element of {wrong}")
        if _update(self.fd, key, value, flags) < 0:
            error = _error(f"map {self.name}: update")
            if self.on_full is not None and isinstance(error, MapFullError):
                self.on_full()
            raise error

    def delete(self, key: bytes) -> bool:
        """Whether it was there.

        :raises ValueError: the key is not of the map's size.
        """
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name}: key of {len(key)} bytes, not {self.key_size}")
        if _delete(self.fd, key) == 0:
            return True
        if ctypes.get_errno() == errno.ENOENT:
            return False
        raise _error(f"map {self.name}: delete")

    def keys(self) -> Iterator[bytes]:
        """All keys, one call each. A key that goes meanwhile may make others come twice, not be left out."""
        buffer = ctypes.create_string_buffer(self.key_size)
        key: bytes | None = None
        while _next_key(self.fd, key, ctypes.addressof(buffer)) == 0:
            key = buffer.raw
            yield key
        if ctypes.get_errno() != errno.ENOENT:
            raise _error(f"map {self.name}: next key")

    def items(self) -> list[tuple[bytes, bytes]]:
        """All elements, in batches where the type of the map has them.

        Elements that come or go meanwhile may or may not be in it; those that stay are in it exactly once.
        """
        if self.info.type in _BATCH_TYPES:
            key_size, value_size = self.key_size, self.value_size
            return [
                (keys[i * key_size : (i + 1) * key_size], values[i * value_size : (i + 1) * value_size])
                for keys, values, count in self._chunks()
                for i in range(count)
            ]
        return [(key, value) for key in self.keys() if (value := self.lookup(key)) is not None]

    def _chunks(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Keys, values and how many of both."""
        size = _BATCH
        position = ctypes.create_string_buffer(max(self.key_size, 4))
        first = True
        while True:
            keys = ctypes.create_string_buffer(self.key_size * size)
            values = ctypes.create_string_buffer(self.value_size * size)
            count = ctypes.c_uint32(size)
            start = None if first else ctypes.addressof(position)
            status = _lookup_batch(
                self.fd,
                start,
                ctypes.addressof(position),
                ctypes.addressof(keys),
                ctypes.addressof(values),
                ctypes.byref(count),
                None,
            )
            code = ctypes.get_errno() if status < 0 else 0
            if code == errno.ENOSPC:  # one bucket holds more than fits: the position has not moved
                size *= 2
                continue
            if code not in (0, errno.ENOENT):
                raise _error(f"map {self.name}: lookup batch")
            yield keys.raw, values.raw, count.value
            if code == errno.ENOENT:
                return
            first = False

    def __len__(self) -> int:
        """How many elements it has now (counted, in batches where possible)."""
        if self.info.type in _BATCH_TYPES:
            return sum(count for _, _, count in self._chunks())
        return sum(1 for _ in self.keys())

    def detach(self) -> int:
        """Give the descriptor away: this object is closed."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CapturedMap(Map):
    """The map ``captured``, as proxies read it once for each connection they accept."""

    def find(self, netns: int, client_address: str, client_port: int, listener_port: int) -> Captured | None:
        """What a captured client dialled; None when nothing was captured, or the client is gone: close it.

        :param netns: the cookie of the listener's namespace.
        :param client_address: and ``client_port``: the accepted socket's ``getpeername()``.
        :param listener_port: 15001 or 15002.
        :raises MapError: the map cannot be read.
        """
        value = self.lookup(CapturedKey(netns, client_address, client_port, listener_port).pack())
        return None if value is None else Captured.unpack(value)
