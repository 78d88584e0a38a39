"""Types of the running kernel and of loaded programs, from their BTF, through ``libbpf.so.1`` by ctypes.

Owns the answer to "where in this kernel's structure is this member": headers are another kernel's.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

_KIND_STRUCT = 4
_KIND_UNION = 5
_KIND_ENUM = 6
_MODIFIERS = frozenset({8, 9, 10, 11, 18})  # typedef, volatile, const, restrict, type tag
_KIND_ARRAY = 3
_KIND_POINTER = 2

_lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
_lib.btf__load_vmlinux_btf.restype = ctypes.c_void_p
_lib.btf__load_from_kernel_by_id.argtypes = (ctypes.c_uint32,)
_lib.btf__load_from_kernel_by_id.restype = ctypes.c_void_p
_lib.btf__free.argtypes = (ctypes.c_void_p,)
_lib.btf__free.restype = None
_lib.btf__find_by_name_kind.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32)
_lib.btf__type_by_id.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
_lib.btf__type_by_id.restype = ctypes.c_void_p
_lib.btf__name_by_offset.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
_lib.btf__name_by_offset.restype = ctypes.c_char_p
_lib.btf__resolve_size.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
_lib.btf__resolve_size.restype = ctypes.c_int64


class BtfError(Exception):
    """The kernel has no BTF, or no such type or member."""


class Member(NamedTuple):
    """Bytes from the start of the outermost structure."""

    name: str
    offset: int
    size: int


class _Type(NamedTuple):
    kind: int
    size_or_type: int
    members: list[tuple[str, int, int]]  # name, type id (or value of an enum), bit offset


class Btf:
    """One set of types."""

    def __init__(self, handle: int | None, what: str) -> None:
        if not handle:
            raise BtfError(f"no BTF of {what}")
        self._handle = handle

    @classmethod
    def of_kernel(cls) -> Self:
        """:raises BtfError: the kernel was built without."""
        return cls(_lib.btf__load_vmlinux_btf(), "the kernel")

    @classmethod
    def of_id(cls, number: int) -> Self:
        """That of loaded programs or maps, by its number."""
        return cls(_lib.btf__load_from_kernel_by_id(number), f"number {number}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _lib.btf__free(self._handle)

    def _type(self, number: int) -> _Type:
        address = _lib.btf__type_by_id(self._handle, number)
        if not address:
            raise BtfError(f"no type {number}")
        _, info, size = struct.unpack("=III", ctypes.string_at(address, 12))
        kind = info >> 24 & 0x1F
        count = info & 0xFFFF
        bitfields = bool(info >> 31)
        members: list[tuple[str, int, int]] = []
        if kind in (_KIND_STRUCT, _KIND_UNION):
            raw = ctypes.string_at(address + 12, 12 * count)
            for label, of, offset in struct.iter_unpack("=III", raw):
                members.append((self._name(label), of, offset & 0xFFFFFF if bitfields else offset))
        elif kind == _KIND_ENUM:
            raw = ctypes.string_at(address + 12, 8 * count)
            members = [(self._name(label), value, 0) for label, value in struct.iter_unpack("=Ii", raw)]
        return _Type(kind, size, members)

    def _name(self, offset: int) -> str:
        name: bytes = _lib.btf__name_by_offset(self._handle, offset)
        return name.decode()

    def _find(self, name: str, kind: int) -> int:
        number = int(_lib.btf__find_by_name_kind(self._handle, name.encode(), kind))
        if number < 0:
            raise BtfError(f"no type {name}")
        return number

    def _strip(self, number: int) -> int:
        while (of := self._type(number)).kind in _MODIFIERS:
            number = of.size_or_type
        return number

    def _walk(self, number: int, base: int) -> Iterator[tuple[Member, int]]:
        """Members with their type; those of members without a name as if they stood outside."""
        for name, of, bits in self._type(number).members:
            of = self._strip(of)
            at = base + bits // 8
            if not name:
                yield from self._walk(of, at)
            else:
                yield Member(name, at, int(_lib.btf__resolve_size(self._handle, of))), of

    def size(self, name: str) -> int:
        """Of ``struct name``, in bytes."""
        return self._type(self._find(name, _KIND_STRUCT)).size_or_type

    def members(self, name: str) -> list[Member]:
        """Of ``struct name``, structures within it taken apart (``outer.inner``)."""
        return list(self._flat(self._find(name, _KIND_STRUCT), 0, ""))

    def _flat(self, number: int, base: int, prefix: str) -> Iterator[Member]:
        for member, of in self._walk(number, base):
            if self._type(of).kind == _KIND_STRUCT:
                yield from self._flat(of, member.offset, f"{prefix}{member.name}.")
            else:
                yield member._replace(name=prefix + member.name)

    def offset(self, name: str, path: str) -> int:
        """Of ``struct name``'s member, in bytes; ``path`` goes through structures by dots.

        :raises BtfError: this kernel has no such member.
        """
        number = self._find(name, _KIND_STRUCT)
        at = 0
        for step in path.split("."):
            for member, of in self._walk(number, at):
                if member.name == step:
                    at, number = member.offset, of
                    break
            else:
                raise BtfError(f"struct {name} has no member {path}")
        return at

    def enumerator(self, enum: str, name: str) -> int:
        """:raises BtfError: this kernel has no such value."""
        for label, value, _ in self._type(self._find(enum, _KIND_ENUM)).members:
            if label == name:
                return value
        raise BtfError(f"enum {enum} has no value {name}")
