"""Notices that something in a folder changed (inotify(7)): no content, no order, only that it is time to look again."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Self

_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_IN_ONLYDIR = 0x01000000
#: IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_DELETE, IN_ATTRIB, IN_DELETE_SELF, IN_MOVE_SELF.
_MASK = 0x8 | 0x40 | 0x80 | 0x200 | 0x4 | 0x400 | 0x800

#: struct inotify_event without the name: watch, mask, cookie, length of the name.
_EVENT = struct.Struct("=iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class Watcher:
    """Calls ``notice`` with the folder whose content changed. Folders that are not there are watched once they are."""

    def __init__(self, notice: Callable[[Path], None]) -> None:
        """:raises OSError: the kernel has no more inotify instances for us."""
        self._notice = notice
        self._fd = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._folders: dict[int, Path] = {}
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def watch(self, folder: Path) -> bool:
        """Whether the folder is watched now; again does no harm, and finds one that was replaced."""
        number = _libc.inotify_add_watch(self._fd, os.fsencode(folder), _MASK | _IN_ONLYDIR)
        if number >= 0:
            self._folders[number] = folder
        return bool(number >= 0)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        at = 0
        changed = set()
        while at < len(data):
            number, _, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            # -1: events were lost, any folder may have changed.
            changed |= {self._folders[number]} if number in self._folders else set(self._folders.values())
        for folder in changed:
            self._notice(folder)
