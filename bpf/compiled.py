"""Compiled programs that are kept in a folder: who loads the same again need not compile. For tests, which do it by the hundred.

Owns what is kept and how it is told whether it still fits; what compiles is passed in. Instructions name maps by descriptor:
kept are the places where they do and the maps' names, and each load puts its own descriptors there.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bpf import links

#: In the environment: the folder. Without it nothing is kept.
FOLDER = "MYCEL_PROGRAMS_CACHE"
_HERE = Path(__file__).parent
#: struct bpf_insn: code, registers (destination in the low half), offset, immediate value.
_INSTRUCTION = struct.Struct("=BBhi")
_LD_IMM64 = 0x18
#: So many versions of the programs, of 0.4 MB each.
_FILES = 32
_PSEUDO_MAP_FD = 1


class Module(Protocol):
    """What bcc's compiled module can do, as far as the loader needs it."""

    def dump_func(self, name: str) -> bytes: ...
    def load_func(self, name: str, program_type: int, *, attach_type: int) -> Any: ...
    def cleanup(self) -> None: ...


class Program(NamedTuple):
    fd: int


class _Kept(NamedTuple):
    code: bytes
    maps: tuple[tuple[int, str], ...]  #: number of an instruction, and the map that it names


class Compiled:
    """Programs by function; compiles when the first one is asked for that is not kept.

    :param maps: descriptors by the maps' names.
    :param key: everything that the instructions follow from, but for descriptors.
    """

    def __init__(self, compile: Callable[[], Module], *, maps: Mapping[str, int], key: Iterable[str]) -> None:
        self._compile = compile
        self._maps = dict(maps)
        self._module: Module | None = None
        self._new = False
        self._programs: list[int] = []
        folder = os.environ.get(FOLDER)
        self._file = Path(folder, digest(key)) if folder else None
        self._kept = {} if self._file is None else _read(self._file)

    def dump_func(self, name: str) -> bytes:
        """The instructions, with this load's descriptors.

        :raises Exception: what compiling raises.
        """
        kept = self._kept.get(name)
        if kept is not None and all(table in self._maps for _, table in kept.maps):
            code = bytearray(kept.code)
            for number, table in kept.maps:
                struct.pack_into("=i", code, number * _INSTRUCTION.size + 4, self._maps[table])
            return bytes(code)
        plain = bytes(self._compiled().dump_func(name))
        if self._file is not None:
            self._kept[name] = _without_descriptors(plain, self._maps)
            self._new = True
        return plain

    def load_func(self, name: str, program_type: int, attach_type: int) -> Program:
        """Load it; its descriptor is closed by :meth:`cleanup`. One that is kept has no BTF, so no source for those who dump it.

        :raises links.LinkError: the verifier refuses it.
        """
        if self._file is None:
            return Program(self._compiled().load_func(name, program_type, attach_type=attach_type).fd)
        fd = links.load(name, program_type, attach_type, self.dump_func(name))
        self._programs.append(fd)
        return Program(fd)

    def _compiled(self) -> Module:
        if self._module is None:
            self._module = self._compile()
        return self._module

    def cleanup(self) -> None:
        """Keep what was compiled now, and close."""
        if self._new and self._file is not None:
            _write(self._file, self._kept)
        for fd in self._programs:
            os.close(fd)
        if self._module is not None:
            self._module.cleanup()


def digest(key: Iterable[str]) -> str:
    """A name for what follows from ``key``, from the programs' own files, and from the kernel that runs."""
    found = hashlib.sha256()
    for part in (*key, sys.version, *os.uname()):
        found.update(part.encode() + b"\0")
    for file in sorted([*_HERE.rglob("*.h"), *_HERE.rglob("*.c"), *_HERE.glob("*.py")]):
        found.update(f"{file.relative_to(_HERE)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def _without_descriptors(code: bytes, maps: Mapping[str, int]) -> _Kept:
    names = {fd: name for name, fd in maps.items()}
    found = []
    changed = bytearray(code)
    instructions = list(_INSTRUCTION.iter_unpack(code))
    number = 0
    while number < len(instructions):
        operation, registers, _, value = instructions[number]
        if operation == _LD_IMM64:
            if registers >> 4 == _PSEUDO_MAP_FD:
                found.append((number, names[value]))
                struct.pack_into("=i", changed, number * _INSTRUCTION.size + 4, 0)
            number += 1  # it takes two
        number += 1
    return _Kept(bytes(changed), tuple(found))


def _read(file: Path) -> dict[str, _Kept]:
    try:
        text: Any = json.loads(file.read_bytes())
        return {
            name: _Kept(bytes.fromhex(code), tuple((number, table) for number, table in tables))
            for name, (code, tables) in text.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path, kept: Mapping[str, _Kept]) -> None:
    """Whole or not at all; that it cannot be kept costs time only."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside.write_text(json.dumps({name: (one.code.hex(), one.maps) for name, one in kept.items()}))
        aside.rename(file)
        others = sorted(file.parent.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
        for old in others[_FILES:]:
            old.unlink(missing_ok=True)
    except OSError:
        aside.unlink(missing_ok=True)
