"""What an ELF file asks of others: interpreter and needed libraries. 64 and 32 bits, both byte orders."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_MAGIC = b"\x7fELF"
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_SONAME = 0, 1, 5, 14


@dataclass(frozen=True)
class Elf:
    """``interpreter`` and ``soname`` are empty where there is none."""

    interpreter: str
    needed: tuple[str, ...]
    soname: str


def is_elf(data: bytes) -> bool:
    return data[:4] == _MAGIC


def read(data: bytes) -> Elf:
    """:raises ValueError: no ELF file, or a broken one."""
    if not is_elf(data) or len(data) < 64:
        raise ValueError("no ELF file")
    try:
        return _read(data)
    except (struct.error, IndexError, StopIteration):
        raise ValueError("broken ELF file") from None


def _read(data: bytes) -> Elf:
    wide = data[4] == 2
    order = "<" if data[5] == 1 else ">"
    offset = struct.unpack_from(order + ("Q" if wide else "I"), data, 0x20 if wide else 0x1C)[0]
    size, count = struct.unpack_from(order + "HH", data, 0x36 if wide else 0x2A)
    headers = []  # (type, offset, address, bytes in the file)
    for n in range(count):
        at = offset + n * size
        if wide:
            kind, _, where, address, _, length = struct.unpack_from(order + "IIQQQQ", data, at)
        else:
            kind, where, address, _, length = struct.unpack_from(order + "IIIII", data, at)
        headers.append((kind, where, address, length))

    interpreter = ""
    entries: list[tuple[int, int]] = []
    for kind, where, _, length in headers:
        if kind == _PT_INTERP:
            interpreter = data[where : where + length].rstrip(b"\0").decode()
        elif kind == _PT_DYNAMIC:
            pair = order + ("qQ" if wide else "iI")
            entries = list(struct.iter_unpack(pair, data[where : where + length]))
    strings = 0
    for tag, value in entries:
        if tag == _DT_STRTAB:
            strings = next(w + value - a for k, w, a, n in headers if k == _PT_LOAD and a <= value < a + n)

    def text(at: int) -> str:
        return data[strings + at : data.index(b"\0", strings + at)].decode()

    ended = next((n for n, (tag, _) in enumerate(entries) if tag == _DT_NULL), len(entries))
    entries = entries[:ended]
    return Elf(
        interpreter,
        tuple(text(value) for tag, value in entries if tag == _DT_NEEDED),
        next((text(value) for tag, value in entries if tag == _DT_SONAME), ""),
    )
