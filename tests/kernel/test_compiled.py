"""Programs that are kept are those that were compiled, with the descriptors of whoever loads them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bpf import compiled
from bpf.compiled import Compiled

#: r1 = map descriptor 7; r1 = 7 as a number (two slots each); exit.
CODE = struct.pack("=BBhiBBhi", 0x18, 0x11, 0, 7, 0, 0, 0, 0)
CODE += struct.pack("=BBhiBBhi", 0x18, 0x01, 0, 7, 0x18, 0x11, 0, 7)
CODE += struct.pack("=BBhi", 0x95, 0, 0, 0)


class Module:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def dump_func(self, name: str) -> bytes:
        self.asked.append(name)
        return CODE

    def load_func(self, name: str, program_type: int, *, attach_type: int) -> object:
        raise NotImplementedError

    def cleanup(self) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compiled.FOLDER, str(tmp_path / "kept"))
    return tmp_path / "kept"


def load(key: str = "key", **maps: int) -> tuple[bytes, Module]:
    module = Module()
    one = Compiled(lambda: module, maps=maps, key=[key])
    code = one.dump_func("f")
    one.cleanup()
    return code, module


def test_the_second_load_compiles_nothing_and_has_its_own_descriptors(folder: Path) -> None:
    assert load(table=7)[0] == CODE
    code, module = load(table=9, other=7)
    assert module.asked == []
    # The descriptor alone: neither the number, nor what only looks like an instruction in the second half of one.
    assert code == CODE[:4] + struct.pack("=i", 9) + CODE[8:]


def test_another_key_compiles(folder: Path) -> None:
    load(table=7)
    assert load("other", table=7)[1].asked == ["f"]


def test_a_map_that_is_not_there_compiles(folder: Path) -> None:
    load(table=7)
    assert load(another=7)[1].asked == ["f"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"f": 1}', b'{"f": ["zz", []]}'])
def test_what_cannot_be_read_is_compiled(folder: Path, content: bytes) -> None:
    load(table=7)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert load(table=7)[1].asked == ["f"]


def test_old_ones_go(folder: Path) -> None:
    for number in range(compiled._FILES + 3):
        load(f"key{number}", table=7)
    assert len(list(folder.iterdir())) == compiled._FILES
    assert load(f"key{number}", table=7)[1].asked == []


def test_nothing_is_kept_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiled.FOLDER, raising=False)
    for _ in range(2):
        assert load(table=7)[1].asked == ["f"]
