"""The node's files: replaced whole, and none waits for another one's disk."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from agent.storage import Storage


def test_what_outlives_a_boot_is_forced_to_the_disk_and_nothing_else(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    storage.write("pods.json", b"[]", outlives_boot=False)
    assert forced == []
    storage.write("mesh.json", b"{}")
    assert len(forced) == 1
    assert (storage.read("pods.json"), storage.read("mesh.json")) == (b"[]", b"{}")


def test_a_slow_disk_holds_up_its_own_file_only(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    writing, go_on = threading.Event(), threading.Event()

    def slow(_fd: int) -> None:
        writing.set()
        assert go_on.wait(10)

    monkeypatch.setattr(os, "fsync", slow)
    thread = threading.Thread(target=storage.write, args=("mesh.json", b"{}"))
    thread.start()
    try:
        assert writing.wait(10)
        storage.write("pods.json", b"[]", outlives_boot=False)
        assert storage.read("pods.json") == b"[]"
        assert storage.read("mesh.json") is None
    finally:
        go_on.set()
        thread.join(10)
    assert storage.read("mesh.json") == b"{}"


def test_what_could_not_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write("mesh.json", b"{}")

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        storage.write("mesh.json", b"[]")
    assert storage.read("mesh.json") == b"{}"
    assert os.listdir(tmp_path) == ["mesh.json"]
